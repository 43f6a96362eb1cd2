//! One tensor as a file holds it: where its elements lie, and how they become float32.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::file::WeightsFile;
use crate::error::Result;

/// Elements that are converted at a time, so that a conversion takes a few megabytes whatever the tensor.
const BLOCK: u64 = 1 << 18;

/// The type of the elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElementType {
    /// Its name in the format, such as `BF16` or `HalfStorage`.
    pub name: String,
    /// Bytes of an element.
    pub width: u64,
    /// Its name in libtorch, if it is one that becomes float32.
    pub kind: Option<Kind>,
}

/// A tensor in a file.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    /// Its shape.
    pub shape: Vec<i64>,
    /// The type of its elements.
    pub element: ElementType,
    /// From an element to the next along each dimension, counted in elements; `None` if the elements lie in row-major
    /// order without gaps.
    strides: Option<Vec<u64>>,
    /// Number of elements.
    count: u64,
    /// The bytes from the first element to the last.
    span: Range<u64>,
}

impl StoredTensor {
    /// Places a tensor in the bytes `storage` of a file: the first element `offset` elements after their beginning, the
    /// next along each dimension `strides` elements further; without strides in row-major order.
    ///
    /// # Errors
    /// Says what is wrong if a number is negative or too large, or an element lies outside of the bytes.
    pub(super) fn place(
        element: ElementType,
        shape: Vec<i64>,
        strides: Option<&[i64]>,
        offset: i64,
        storage: Range<u64>,
    ) -> Result<Self, String> {
        let placed = Self::checked_place(element, &shape, strides, offset, &storage);
        placed.ok_or_else(|| {
            let layout = strides.map(|strides| format!(" and strides {strides:?}")).unwrap_or_default();
            format!("has shape {shape:?}{layout} at element {offset}, which does not fit its storage")
        })
    }

    fn checked_place(
        element: ElementType,
        shape: &[i64],
        strides: Option<&[i64]>,
        offset: i64,
        storage: &Range<u64>,
    ) -> Option<Self> {
        let mut row_major = vec![1u64; shape.len()];
        let mut count = 1u64;
        for (stride, &size) in row_major.iter_mut().zip(shape).rev() {
            *stride = count;
            count = count.checked_mul(u64::try_from(size).ok()?)?;
        }
        // libtorch counts in i64.
        i64::try_from(count).ok()?;
        let strides = match strides {
            Some(strides) if strides.len() != shape.len() => return None,
            Some(strides) => {
                strides.iter().map(|&stride| u64::try_from(stride).ok()).collect::<Option<_>>()?
            }
            None => row_major.clone(),
        };
        let offset = u64::try_from(offset).ok()?;
        let steps = shape.iter().zip(&strides).try_fold(0u64, |sum, (&size, stride)| {
            sum.checked_add((size as u64).saturating_sub(1).checked_mul(*stride)?)
        })?;
        let start = storage.start.checked_add(offset.checked_mul(element.width)?)?;
        let elements = if count == 0 { 0 } else { steps.checked_add(1)? };
        let span = start..start.checked_add(elements.checked_mul(element.width)?)?;
        if span.end > storage.end {
            return None;
        }
        let lies_in_order =
            count <= 1 || (0..shape.len()).all(|axis| shape[axis] == 1 || strides[axis] == row_major[axis]);
        let strides = (!lies_in_order).then_some(strides);
        Some(Self { shape: shape.to_vec(), element, strides, count, span })
    }

    /// Returns the number of elements.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Copies the elements, in row-major order and as float32, to a tensor `[count]` on any device.
    ///
    /// # Errors
    /// Fails if they are of no floating type, or any of them is NaN or infinite.
    pub(super) fn copy_to(&self, name: &str, file: &WeightsFile, target: &Tensor) -> Result<()> {
        let kind = self.element.kind.ok_or_else(|| {
            let element = &self.element.name;
            file.fault(format!("tensor {name} has type {element}; weights must be floating point"))
        })?;
        let width = self.element.width;
        let mut gathered = Vec::new();
        for start in (0..self.count).step_by(BLOCK as usize) {
            let length = BLOCK.min(self.count - start);
            // Mapped anew for each block, so that what was read before does not stay in memory.
            let mapped;
            let bytes: &[u8] = match &self.strides {
                Some(strides) => {
                    mapped = file.map(self.span.clone())?;
                    gathered.clear();
                    self.gather(&mapped, strides, start, length, &mut gathered);
                    &gathered
                }
                None => {
                    let first = self.span.start + start * width;
                    mapped = file.map(first..first + length * width)?;
                    &mapped
                }
            };
            let block = Tensor::f_from_data_size(bytes, &[length as i64], kind)?.f_to_kind(Kind::Float)?;
            if i64::try_from(block.f_isfinite()?.f_all()?)? == 0 {
                return Err(file.fault(format!(
                    "tensor {name} holds NaN or infinite values; the checkpoint is damaged"
                )));
            }
            target.f_narrow(0, start as i64, length as i64)?.f_copy_(&block)?;
        }
        Ok(())
    }

    /// Appends the bytes of the elements `start` and on, counted in row-major order; `map` holds the span.
    fn gather(&self, map: &[u8], strides: &[u64], start: u64, length: u64, bytes: &mut Vec<u8>) {
        let width = self.element.width as usize;
        let mut index = vec![0u64; self.shape.len()];
        let mut rest = start;
        for (index, &size) in index.iter_mut().zip(&self.shape).rev() {
            *index = rest % size as u64;
            rest /= size as u64;
        }
        for _ in 0..length {
            let place = index.iter().zip(strides).map(|(index, stride)| index * stride).sum::<u64>() as usize;
            bytes.extend_from_slice(&map[place * width..(place + 1) * width]);
            for (index, &size) in index.iter_mut().zip(&self.shape).rev() {
                *index += 1;
                if *index < size as u64 {
                    break;
                }
                *index = 0;
            }
        }
    }
}
