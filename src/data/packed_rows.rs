//! Packed rows copied to rectangles and back, on the CPU: in one pass each, where libtorch fills, gathers and scatters by
//! lists of indices.

use std::sync::Arc;

use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::libtorch::{Number, elements, elements_mut, with_backward, with_backward_of_all};

/// Where the packed rows of examples stand in rectangles.
#[derive(Debug)]
pub(super) struct PackedRows {
    /// Number of packed rows of each example.
    lengths: Vec<usize>,
    /// The examples of each rectangle, and the length that they are filled up to.
    rectangles: Vec<(Vec<usize>, usize)>,
}

impl PackedRows {
    /// Makes the places of examples of the given lengths, given the examples of each rectangle and its length.
    pub fn new(lengths: &[usize], rectangles: &[(Vec<usize>, usize)]) -> Self {
        Self { lengths: lengths.to_vec(), rectangles: rectangles.to_vec() }
    }

    /// Returns whether these copies are for tensors like this one.
    pub fn take(rows: &Tensor) -> bool {
        rows.device() == Device::Cpu && matches!(rows.kind(), Kind::Float | Kind::BFloat16)
    }

    /// Lays packed rows `[tokens, heads · head_size]` out in rectangles, each `[examples · heads, length, head_size]` and times
    /// `factor`, with a gradient. Rows of positions that do not exist are zero.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn split(self: &Arc<Self>, rows: &Tensor, heads: i64, factor: f32) -> Result<Vec<Tensor>> {
        let places = self.clone();
        let rectangles = self.laid_out(&rows.f_detach()?, heads, factor)?;
        with_backward_of_all(rectangles, &[rows], move |gradients| {
            Ok(vec![places.collected(gradients, heads, factor)?])
        })
    }

    /// Collects packed rows from rectangles: the way back of [`PackedRows::split`].
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn join(self: &Arc<Self>, rectangles: &[Tensor], heads: i64) -> Result<Tensor> {
        let places = self.clone();
        let detached = rectangles.iter().map(Tensor::f_detach).collect::<Result<Vec<_>, _>>()?;
        let rows = self.collected(&detached, heads, 1.0)?;
        let inputs: Vec<&Tensor> = rectangles.iter().collect();
        with_backward(rows, &inputs, move |gradient| places.laid_out(gradient, heads, 1.0))
    }

    fn laid_out(&self, rows: &Tensor, heads: i64, factor: f32) -> Result<Vec<Tensor>> {
        let head_size = rows.size()[1] / heads;
        let mut rectangles = (self.rectangles.iter())
            .map(|(examples, length)| {
                let shape = [examples.len() as i64 * heads, *length as i64, head_size];
                Ok(Tensor::f_empty(shape, (rows.kind(), Device::Cpu))?)
            })
            .collect::<Result<Vec<_>>>()?;
        match rows.kind() {
            Kind::BFloat16 => self.lay_out::<bf16>(rows, &mut rectangles, head_size as usize, factor)?,
            _ => self.lay_out::<f32>(rows, &mut rectangles, head_size as usize, factor)?,
        }
        Ok(rectangles)
    }

    fn collected(&self, rectangles: &[Tensor], heads: i64, factor: f32) -> Result<Tensor> {
        let rectangles = rectangles.iter().map(Tensor::f_contiguous).collect::<Result<Vec<_>, _>>()?;
        let (kind, head_size) = (rectangles[0].kind(), rectangles[0].size()[2]);
        let shape = [self.lengths.iter().sum::<usize>() as i64, heads * head_size];
        let mut rows = Tensor::f_empty(shape, (kind, Device::Cpu))?;
        match kind {
            Kind::BFloat16 => self.collect::<bf16>(&rectangles, &mut rows, head_size as usize, factor)?,
            _ => self.collect::<f32>(&rectangles, &mut rows, head_size as usize, factor)?,
        }
        Ok(rows)
    }

    /// Writes all rectangles from packed rows.
    fn lay_out<T: Number>(
        &self,
        rows: &Tensor,
        rectangles: &mut [Tensor],
        head_size: usize,
        factor: f32,
    ) -> Result<()> {
        let (width, rows) = (rows.size()[1] as usize, rows.f_contiguous()?);
        let examples = cut(elements::<T>(&rows)?, &self.lengths, width);
        let mut copies = Vec::with_capacity(self.lengths.len());
        for (rectangle, (own, length)) in rectangles.iter_mut().zip(&self.rectangles) {
            let targets = elements_mut::<T>(rectangle)?.chunks_mut(length * width);
            copies.extend(targets.zip(own.iter().map(|&example| (examples[example], *length))));
        }
        copies.into_par_iter().for_each(|(target, (rows, length))| {
            for (head, target) in target.chunks_mut(length * head_size).enumerate() {
                let mut positions = target.chunks_mut(head_size);
                let parts = rows.chunks(width).map(|row| &row[head * head_size..][..head_size]);
                positions.by_ref().zip(parts).for_each(|(position, part)| copy(part, position, factor));
                positions.for_each(|position| position.fill(T::from_float(0.0)));
            }
        });
        Ok(())
    }

    /// Writes packed rows from all rectangles.
    fn collect<T: Number>(
        &self,
        rectangles: &[Tensor],
        rows: &mut Tensor,
        head_size: usize,
        factor: f32,
    ) -> Result<()> {
        let width = rows.size()[1] as usize;
        let mut sources: Vec<(&[T], usize)> = vec![(&[], 0); self.lengths.len()];
        for (rectangle, (own, length)) in rectangles.iter().zip(&self.rectangles) {
            let blocks = elements::<T>(rectangle)?.chunks(length * width);
            own.iter().zip(blocks).for_each(|(&example, block)| sources[example] = (block, *length));
        }
        let targets = cut_mut(elements_mut::<T>(rows)?, &self.lengths, width);
        targets.into_par_iter().zip(sources).for_each(|(target, (source, length))| {
            for (position, row) in target.chunks_mut(width).enumerate() {
                for (head, part) in row.chunks_mut(head_size).enumerate() {
                    copy(&source[(head * length + position) * head_size..][..head_size], part, factor);
                }
            }
        });
        Ok(())
    }
}

/// Copies numbers, times a factor.
fn copy<T: Number>(source: &[T], target: &mut [T], factor: f32) {
    match factor {
        1.0 => target.copy_from_slice(source),
        _ => multiply(source, target, factor),
    }
}

#[multiversion(targets = "simd")]
fn multiply<T: Number>(source: &[T], target: &mut [T], factor: f32) {
    let numbers = target.iter_mut().zip(source);
    numbers.for_each(|(target, source)| *target = T::from_float(source.to_float() * factor));
}

/// Cuts rows into those of each example.
fn cut<'a, T>(mut rows: &'a [T], lengths: &[usize], width: usize) -> Vec<&'a [T]> {
    let take = |length: &usize| rows.split_off(..length * width).unwrap_or_default();
    lengths.iter().map(take).collect()
}

/// Cuts rows into those of each example, for writing.
fn cut_mut<'a, T>(mut rows: &'a mut [T], lengths: &[usize], width: usize) -> Vec<&'a mut [T]> {
    let take = |length: &usize| rows.split_off_mut(..length * width).unwrap_or_default();
    lengths.iter().map(take).collect()
}
