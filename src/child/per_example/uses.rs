//! Layers that a pass uses more than once: the gradient of an example is the sum over all uses, before it is squared.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tch::Tensor;

use super::Examples;
use crate::error::Result;
use crate::libtorch::upload;
use crate::locking::locked;
use crate::model::ParameterId;

/// One use of a linear layer: what went in, `[rows, in]`, and the gradient of what came out, `[rows, out]`.
pub(super) struct Use {
    pub input: Tensor,
    pub gradient: Tensor,
    pub examples: Arc<Examples>,
}

/// The uses of every layer in one pass.
#[derive(Default)]
pub(super) struct Uses {
    layers: RefCell<HashMap<ParameterId, Arc<Mutex<UsesOfLayer>>>>,
}

/// The uses of one layer in one pass. Forward has noted all of them before backward ends the first.
#[derive(Default)]
pub(super) struct UsesOfLayer {
    /// How many have no gradient yet.
    open: usize,
    ended: Vec<Use>,
}

/// A use that forward has begun.
pub(super) struct BegunUse(Arc<Mutex<UsesOfLayer>>);

impl Uses {
    /// Notes that forward uses the layer of a weight.
    pub fn begin(&self, weight: ParameterId) -> BegunUse {
        let mut layers = self.layers.borrow_mut();
        let layer = layers.entry(weight).or_default();
        locked(layer).open += 1;
        BegunUse(layer.clone())
    }
}

impl BegunUse {
    /// Notes that backward knows the gradient of this use. Returns all uses as one if this was the last, with the rows of
    /// each example side by side.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn end(self, own: Use) -> Result<Option<Use>> {
        let mut layer = locked(&self.0);
        layer.open -= 1;
        layer.ended.push(own);
        if layer.open > 0 {
            return Ok(None);
        }
        match &layer.ended[..] {
            [_] => Ok(layer.ended.pop()),
            uses => joined(uses).map(Some),
        }
    }
}

/// Puts the rows of several uses together.
fn joined(uses: &[Use]) -> Result<Use> {
    let (mut rows, mut rows_of_parts) = (Vec::new(), Vec::new());
    for part in 0..uses[0].examples.ends.len() {
        let before = rows.len();
        let mut first = 0;
        for own in uses {
            rows.extend(own.examples.part(part).map(|row| (first + row) as i64));
            first += own.examples.rows();
        }
        rows_of_parts.push(rows.len() - before);
    }
    let rows = upload(&rows, uses[0].input.device())?;
    let together = |part: fn(&Use) -> &Tensor| -> Result<Tensor> {
        let parts: Vec<&Tensor> = uses.iter().map(part).collect();
        Ok(Tensor::f_cat(&parts, 0)?.f_index_select(0, &rows)?)
    };
    Ok(Use {
        input: together(|own| &own.input)?,
        gradient: together(|own| &own.gradient)?,
        examples: Arc::new(Examples::new(rows_of_parts.into_iter(), uses[0].examples.copies)),
    })
}
