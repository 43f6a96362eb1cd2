//! The copy of the weights in bfloat16 that passes compute with.

use std::cell::Cell;
use std::ops::Range;

use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::parameter::{Parameter, ParameterKind, ParameterPlace};
use super::params::{Parameters, leaf};
use crate::error::Result;
use crate::libtorch::{Number, elements, elements_mut};

/// Numbers that a thread rounds at a time.
const CHUNK: usize = 16_384;

/// The weights of the encoder in bfloat16, for all passes until the values change.
pub struct HalfCopy {
    flat: Tensor,
    /// Ranges of the flat values, and where each of them begins in the copy.
    runs: Vec<(Range<usize>, usize)>,
    /// What a pass uses of each parameter: a leaf of the copy, or that of the float32 values.
    leaves: Vec<Tensor>,
    stale: Cell<bool>,
}

impl HalfCopy {
    /// Makes the copy, to be filled when it is first asked for.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(parameters: &Parameters, kind: Kind) -> Result<Self> {
        let computes = |parameter: &Parameter| {
            let body = !matches!(parameter.place, ParameterPlace::Pooler | ParameterPlace::Head);
            body && !matches!(parameter.kind, ParameterKind::Embedding | ParameterKind::Unused)
        };
        let (mut runs, mut length) = (Vec::new(), 0);
        for span in parameters.trainable(computes).spans {
            runs.push((span.clone(), length));
            length += span.len();
        }
        let flat = Tensor::f_zeros([length as i64], (kind, parameters.device()))?;
        let place = |start: usize| {
            let (run, offset) = runs.iter().rev().find(|(run, _)| run.start <= start)?;
            Some(offset + start - run.start)
        };
        let leaves = parameters.iter().map(|(id, parameter)| match place(parameter.range.start) {
            Some(start) if computes(parameter) => leaf(&flat, start, &parameter.shape),
            _ => Ok(parameters.leaf(id).shallow_clone()),
        });
        Ok(Self { leaves: leaves.collect::<Result<_>>()?, flat, runs, stale: Cell::new(true) })
    }

    /// Returns the part of the copy that holds a range of the flat values, if it holds the first of them, as far as it goes.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn part(&self, range: &Range<usize>) -> Result<Option<Tensor>> {
        let Some((run, offset)) = self.runs.iter().find(|(run, _)| run.contains(&range.start)) else {
            return Ok(None);
        };
        let (start, length) = (offset + range.start - run.start, range.end.min(run.end) - range.start);
        Ok(Some(self.flat.f_narrow(0, start as i64, length as i64)?))
    }

    /// Notes that the copy holds the present values.
    pub fn mark_fresh(&self) {
        self.stale.set(false);
    }

    /// Notes that the values change.
    pub fn mark_stale(&self) {
        self.stale.set(true);
    }

    /// Returns what passes use of the parameters, with the values copied if they have changed since the last time.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn refreshed(&self, values: &Tensor) -> Result<Vec<Tensor>> {
        if self.stale.get() {
            let _guard = tch::no_grad_guard();
            for (run, start) in &self.runs {
                let source = values.f_narrow(0, run.start as i64, run.len() as i64)?;
                let mut target = self.flat.f_narrow(0, *start as i64, run.len() as i64)?;
                if target.device() == Device::Cpu {
                    let chunks = elements_mut(&mut target)?.par_chunks_mut(CHUNK);
                    let sources = elements(&source)?.par_chunks(CHUNK);
                    chunks.zip(sources).for_each(|(target, source)| round(source, target));
                } else {
                    target.f_copy_(&source)?;
                }
            }
            self.stale.set(false);
        }
        Ok(self.leaves.iter().map(Tensor::shallow_clone).collect())
    }
}

/// Rounds as libtorch does; its loop has narrower registers.
#[multiversion(targets = "simd")]
fn round(values: &[f32], rounded: &mut [bf16]) {
    rounded.iter_mut().zip(values).for_each(|(rounded, &value)| *rounded = bf16::from_float(value));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ParameterTable;

    #[test]
    fn the_copy_is_what_libtorch_rounds_to_and_follows_the_values() {
        let mut table = ParameterTable::default();
        let encoder = ParameterPlace::EncoderLayer(0);
        let ids = [
            table.declare("words", &[5, 7], ParameterKind::Embedding, ParameterPlace::Embeddings),
            table.declare("weight", &[200, 170], ParameterKind::Weight, encoder),
            table.declare("bias", &[200], ParameterKind::Bias, encoder),
            table.declare("head", &[2, 200], ParameterKind::Weight, ParameterPlace::Head),
        ];
        let mut parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        tch::manual_seed(1);
        for scale in [1e-3, 1e3] {
            let all = Tensor::randn(parameters.buffer_len() as i64, (Kind::Float, Device::Cpu)) * scale;
            // One of each that rounding has to mind: halfway, not finite, and not a number.
            let special = Tensor::from_slice(&[1.003_906_3f32, f32::INFINITY, -f32::MAX, f32::NAN]);
            let start = parameters.get(ids[1]).range.start as i64;
            all.narrow(0, start, 4).copy_(&special);
            parameters.restore(&all).unwrap();
            let weights = parameters.compute_weights(Kind::BFloat16).unwrap();
            for (place, &id) in ids.iter().enumerate() {
                let values = parameters.leaf(id).detach();
                let kind = if [1, 2].contains(&place) { Kind::BFloat16 } else { Kind::Float };
                let (found, expected) = (weights[place].detach(), values.to_kind(kind));
                assert_eq!(found.kind(), kind);
                assert!(found.allclose(&expected, 0.0, 0.0, true), "{place}");
            }
        }
    }
}
