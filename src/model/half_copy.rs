//! The copy of the weights in bfloat16 that passes compute with.

use std::cell::Cell;
use std::ops::Range;

use tch::{Kind, Tensor};

use super::parameter::{Parameter, ParameterKind, ParameterPlace};
use super::params::{Parameters, leaf};
use crate::error::Result;

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
                self.flat.f_narrow(0, *start as i64, run.len() as i64)?.f_copy_(&source)?;
            }
            self.stale.set(false);
        }
        Ok(self.leaves.iter().map(Tensor::shallow_clone).collect())
    }
}
