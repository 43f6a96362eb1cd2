//! Squared gradients of single examples in one backward pass over a batch.
//!
//! A linear layer's weight gradient for example b is dY_bᵀ X_b, over the rows of that example: the same products that
//! backward would compute for the whole batch, kept apart by example, squared and summed at once, so that no more than
//! one layer's gradient of one example exists at a time.

use std::cell::RefCell;
use std::ops::Range;

use tch::{Kind, Tensor};

use super::network::MaskScope;
use crate::data::PackedBatch;
use crate::error::Result;
use crate::libtorch::{GradientHook, HookedGradient};
use crate::model::{Embedding, LayerNorm, LayerObserver, Linear, ParameterId, Parameters, Rows};

/// Adds Σ_b (∂ loss_b / ∂w)² of one batch to a buffer while backward runs.
pub struct SquaredGradients<'a> {
    parameters: &'a Parameters,
    /// The flat buffer that is added to.
    sums: &'a Tensor,
    scope: MaskScope,
    batch: &'a PackedBatch,
    hooks: RefCell<Vec<GradientHook>>,
}

impl<'a> SquaredGradients<'a> {
    /// Observes one pass over `batch`; parameters outside `scope` are skipped.
    pub fn new(parameters: &'a Parameters, sums: &'a Tensor, scope: MaskScope, batch: &'a PackedBatch) -> Self {
        Self { parameters, sums, scope, batch, hooks: RefCell::default() }
    }

    /// Returns the part of the buffer that belongs to a parameter, in its shape; `None` outside the scope.
    fn sum_of(&self, id: ParameterId) -> Result<Option<Tensor>> {
        let parameter = self.parameters.get(id);
        if !self.scope.covers(parameter) {
            return Ok(None);
        }
        let range = &parameter.range;
        let flat = self.sums.f_narrow(0, range.start as i64, range.len() as i64)?;
        Ok(Some(flat.f_view(parameter.shape.as_slice())?))
    }

    /// Returns the rows of each example.
    fn segments(&self, rows: Rows) -> Vec<Range<i64>> {
        let mut start = 0;
        let length = |length: usize| if rows == Rows::Tokens { length as i64 } else { 1 };
        self.batch
            .lengths
            .iter()
            .map(|&tokens| {
                let segment = start..start + length(tokens);
                start = segment.end;
                segment
            })
            .collect()
    }

    /// Returns the example of each token, `[tokens]`.
    fn example_of_token(&self) -> Result<Tensor> {
        let numbers: Vec<i64> = (self.batch.lengths.iter().enumerate())
            .flat_map(|(example, &length)| std::iter::repeat_n(example as i64, length))
            .collect();
        Ok(Tensor::from_slice(&numbers).f_to_device(self.sums.device())?)
    }

    fn hook(&self, output: &Tensor, function: impl FnMut(Tensor) -> Result<()> + Send + 'static) -> Result<()> {
        let mut function = function;
        let hook = GradientHook::register(output, move |HookedGradient { gradient, .. }| {
            function(gradient)?;
            Ok(None)
        })?;
        self.hooks.borrow_mut().push(hook);
        Ok(())
    }
}

impl LayerObserver for SquaredGradients<'_> {
    fn linear(&self, layer: &Linear, input: &Tensor, output: &Tensor) -> Result<()> {
        let (weight, bias) = (self.sum_of(layer.weight)?, self.sum_of(layer.bias)?);
        if weight.is_none() && bias.is_none() {
            return Ok(());
        }
        let (input, segments, rows) = (input.f_detach()?, self.segments(layer.rows), layer.rows);
        self.hook(output, move |gradient| match rows {
            // One row an example: (dy xᵀ)² = dy² (x²)ᵀ, and the sum over examples is one product.
            Rows::Examples => {
                let squares = gradient.f_square()?;
                if let Some(sum) = &weight {
                    add(sum, &squares.f_transpose(0, 1)?.f_matmul(&input.f_square()?)?)?;
                }
                bias.as_ref().map_or(Ok(()), |sum| add(sum, &total(&squares)?))
            }
            Rows::Tokens => {
                for segment in &segments {
                    let length = segment.end - segment.start;
                    let gradient = gradient.f_narrow(0, segment.start, length)?;
                    if let Some(sum) = &weight {
                        let input = input.f_narrow(0, segment.start, length)?;
                        add_square(sum, &gradient.f_transpose(0, 1)?.f_matmul(&input)?)?;
                    }
                    if let Some(sum) = &bias {
                        add_square(sum, &total(&gradient)?)?;
                    }
                }
                Ok(())
            }
        })
    }

    fn layer_norm(&self, layer: &LayerNorm, input: &Tensor, output: &Tensor) -> Result<()> {
        let (weight, bias) = (self.sum_of(layer.weight)?, self.sum_of(layer.bias)?);
        if weight.is_none() && bias.is_none() {
            return Ok(());
        }
        let width = input.size()[1];
        let normalised = input.f_detach()?.f_layer_norm([width], None::<Tensor>, None::<Tensor>, layer.epsilon, true)?;
        let examples = self.example_of_token()?;
        let count = self.batch.examples() as i64;
        self.hook(output, move |gradient| {
            let sums = |rows: &Tensor| -> Result<Tensor> {
                let empty = Tensor::f_zeros([count, width], (rows.kind(), rows.device()))?;
                Ok(empty.f_index_add(0, &examples, rows)?)
            };
            if let Some(sum) = &weight {
                add(sum, &total(&sums(&gradient.f_mul(&normalised)?)?.f_square()?)?)?;
            }
            bias.as_ref().map_or(Ok(()), |sum| add(sum, &total(&sums(&gradient)?.f_square()?)?))
        })
    }

    fn embedding(&self, layer: &Embedding, indices: &Tensor, output: &Tensor) -> Result<()> {
        let Some(sum) = self.sum_of(layer.table)? else { return Ok(()) };
        // An entry used twice in one example has one gradient, the sum of both rows, before it is squared.
        let entries = sum.size()[0];
        let uses = self.example_of_token()?.f_mul_scalar(entries)?.f_add(indices)?;
        let (distinct, row_of_use, _) = uses.f_unique_dim(0, true, true, false)?;
        let entry = distinct.f_remainder(entries)?;
        let (count, width) = (distinct.size()[0], output.size()[1]);
        self.hook(output, move |gradient| {
            let empty = Tensor::f_zeros([count, width], (gradient.kind(), gradient.device()))?;
            let squares = empty.f_index_add(0, &row_of_use, &gradient)?.f_square()?;
            let _ = sum.shallow_clone().f_index_add_(0, &entry, &squares)?;
            Ok(())
        })
    }
}

fn total(rows: &Tensor) -> Result<Tensor> {
    Ok(rows.f_sum_dim_intlist(0i64, false, Kind::Float)?)
}

fn add(sum: &Tensor, values: &Tensor) -> Result<()> {
    let _ = sum.shallow_clone().f_add_(values)?;
    Ok(())
}

fn add_square(sum: &Tensor, values: &Tensor) -> Result<()> {
    let _ = sum.shallow_clone().f_addcmul_(values, values)?;
    Ok(())
}
