//! Squared gradients of single examples in one backward pass over a batch.
//!
//! A linear layer's weight gradient for example b is dY_bᵀ X_b, over the rows of that example: the same products that
//! backward would compute for the whole batch, kept apart by example, squared and summed at once, so that no more than a
//! block of one layer's rows exists for the examples of a batch at a time.

use std::cell::RefCell;

use tch::{Kind, Tensor};

use super::network::MaskScope;
use crate::data::PackedBatch;
use crate::error::Result;
use crate::libtorch::GradientHook;
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
    pub fn new(
        parameters: &'a Parameters,
        sums: &'a Tensor,
        scope: MaskScope,
        batch: &'a PackedBatch,
    ) -> Self {
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

    /// Returns the example of each token, `[tokens]`.
    fn example_of_token(&self) -> Result<Tensor> {
        let numbers: Vec<i64> = (self.batch.lengths.iter().enumerate())
            .flat_map(|(example, &length)| std::iter::repeat_n(example as i64, length))
            .collect();
        Ok(Tensor::from_slice(&numbers).f_to_device(self.sums.device())?)
    }

    fn hook(
        &self,
        output: &Tensor,
        function: impl FnMut(Tensor) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.hooks.borrow_mut().push(GradientHook::register(output, function)?);
        Ok(())
    }
}

impl LayerObserver for SquaredGradients<'_> {
    fn linear(&self, layer: &Linear, input: &Tensor, output: &Tensor) -> Result<()> {
        let (weight, bias) = (self.sum_of(layer.weight)?, self.sum_of(layer.bias)?);
        if weight.is_none() && bias.is_none() {
            return Ok(());
        }
        let input = input.f_detach()?;
        if layer.rows == Rows::Examples {
            // One row an example: (dy xᵀ)² = dy² (x²)ᵀ, and the sum over examples is one product.
            return self.hook(output, move |gradient| {
                let squares = gradient.f_square()?;
                if let Some(sum) = &weight {
                    add(sum, &squares.f_transpose(0, 1)?.f_matmul(&input.f_square()?)?)?;
                }
                bias.as_ref().map_or(Ok(()), |sum| add(sum, &total(&squares)?))
            });
        }
        let rectangle = Rectangle::new(self.batch)?;
        let input = rectangle.lay_out(&input)?;
        self.hook(output, move |gradient| {
            let gradient = rectangle.lay_out(&gradient)?;
            if let Some(sum) = &weight {
                add_squared_products(sum, &gradient.f_transpose(1, 2)?, &input)?;
            }
            let Some(sum) = &bias else { return Ok(()) };
            add(sum, &total(&gradient.f_sum_dim_intlist(1i64, false, Kind::Float)?.f_square()?)?)
        })
    }

    fn layer_norm(&self, layer: &LayerNorm, input: &Tensor, output: &Tensor) -> Result<()> {
        let (weight, bias) = (self.sum_of(layer.weight)?, self.sum_of(layer.bias)?);
        if weight.is_none() && bias.is_none() {
            return Ok(());
        }
        let width = input.size()[1];
        let normalised =
            input.f_detach()?.f_layer_norm([width], None::<Tensor>, None::<Tensor>, layer.epsilon, true)?;
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

/// How to lay packed tokens out as `[examples, longest, width]`, zeros where nothing is.
struct Rectangle {
    examples: i64,
    longest: i64,
    /// Place of each token, `[tokens]`; `None` where all examples are of one length.
    places: Option<Tensor>,
}

impl Rectangle {
    fn new(batch: &PackedBatch) -> Result<Self> {
        let places = batch.padding.as_ref().map(|padding| padding.places.shallow_clone());
        Ok(Self { examples: batch.examples() as i64, longest: batch.longest() as i64, places })
    }

    fn lay_out(&self, rows: &Tensor) -> Result<Tensor> {
        let shape = [self.examples, self.longest, rows.size()[1]];
        let Some(places) = &self.places else { return Ok(rows.f_reshape(shape)?) };
        let empty = Tensor::f_zeros([shape[0] * shape[1], shape[2]], (rows.kind(), rows.device()))?;
        Ok(empty.f_index_copy(0, places, rows)?.f_view(shape)?)
    }
}

/// Adds Σ_b (gradient_b input_b)² to `sum`, `[out, in]`, from `[examples, out, tokens]` and `[examples, tokens, in]`.
///
/// Works on blocks of output rows whose products for all examples stay in the cache: single examples' gradients never
/// travel to memory, and no more than one block of them exists.
fn add_squared_products(sum: &Tensor, gradient: &Tensor, input: &Tensor) -> Result<()> {
    let [examples, outputs, _] = [0, 1, 2].map(|dimension| gradient.size()[dimension]);
    let inputs = input.size()[2];
    let elements: i64 = if sum.device().is_cuda() { 1 << 26 } else { 1 << 18 };
    let rows = (elements / (examples * inputs)).clamp(1, outputs);
    for start in (0..outputs).step_by(rows as usize) {
        let count = rows.min(outputs - start);
        let mut products = gradient.f_narrow(1, start, count)?.f_bmm(input)?;
        let squares = products.f_square_()?.f_sum_dim_intlist(0i64, false, Kind::Float)?;
        add(&sum.f_narrow(0, start, count)?, &squares)?;
    }
    Ok(())
}
