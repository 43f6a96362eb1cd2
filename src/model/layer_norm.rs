//! Layer normalisation.

use tch::{Device, Kind, Tensor};

use super::cpu_norm::{Parts, normalise};
use super::layers::Linear;
use super::parameter::{ParameterKind, ParameterPlace};
use super::params::{ParameterId, ParameterTable};
use super::pass::{Pass, Rows};
use crate::error::Result;
use crate::libtorch::{AddAndNorm, add_and_norm, normalises};

/// Layer normalisation over the last dimension, with scale and shift.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    /// Scale, `[width]`.
    pub weight: ParameterId,
    /// Shift, `[width]`.
    pub bias: Option<ParameterId>,
    /// Added to the variance.
    pub epsilon: f64,
    /// What the rows of its input stand for.
    pub rows: Rows,
    width: i64,
}

impl LayerNorm {
    /// Declares the layer as `{name}.weight` and `{name}.bias`, for rows of tokens.
    pub fn declare(
        table: &mut ParameterTable,
        name: &str,
        width: i64,
        epsilon: f64,
        place: ParameterPlace,
    ) -> Self {
        Self {
            weight: table.declare(format!("{name}.weight"), &[width], ParameterKind::LayerNormWeight, place),
            bias: Some(table.declare(format!("{name}.bias"), &[width], ParameterKind::LayerNormBias, place)),
            epsilon,
            rows: Rows::Tokens,
            width,
        }
    }

    /// Declares the layer as `{name}.weight`, without a shift.
    pub fn declare_without_bias(
        table: &mut ParameterTable,
        name: &str,
        width: i64,
        epsilon: f64,
        place: ParameterPlace,
    ) -> Self {
        let weight = table.declare(format!("{name}.weight"), &[width], ParameterKind::LayerNormWeight, place);
        Self { weight, bias: None, epsilon, rows: Rows::Tokens, width }
    }

    /// Returns the same layer for rows of another sort.
    pub fn over(self, rows: Rows) -> Self {
        Self { rows, ..self }
    }

    /// Applies the layer to `[rows, width]`, in the type of its weights.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn forward(&self, pass: &Pass, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (pass.weight(self.weight), self.bias.map(|bias| pass.weight(bias)));
        let input = input.f_to_kind(weight.kind())?;
        let output = match runs_here(&input) {
            true => normalise(Parts::One(&input), weight, bias, self.epsilon)?,
            false => input.f_layer_norm([self.width], Some(weight), bias, self.epsilon, true)?,
        };
        pass.observe(|observer| observer.layer_norm(self, &input, &output))?;
        Ok(output)
    }

    /// Normalises the sum of a residual, `[rows, width]`, and what dropout leaves of what a linear layer makes of an input.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn of_sum(
        &self,
        pass: &Pass,
        (layer, input): (&Linear, &Tensor),
        probability: f64,
        residual: &Tensor,
    ) -> Result<Tensor> {
        let (weight, shift) = (pass.weight(self.weight), self.bias.map(|bias| pass.weight(bias)));
        if let (Some(own_shift), true) = (self.bias, normalises(self.width) && layer.joins(pass)) {
            let (output, bias) = layer.with_open_bias(pass, input)?;
            let [output, sum] = add_and_norm(AddAndNorm {
                dropout: pass.dropout_pattern(probability, self.rows, output.size()[0]),
                input: &output,
                bias,
                residual: &residual.f_to_kind(weight.kind())?,
                scale: pass.operand(self.weight),
                shift: pass.operand(own_shift),
                epsilon: self.epsilon,
            })?;
            pass.observe(|observer| observer.layer_norm(self, &sum, &output))?;
            return Ok(output);
        }
        let output = layer.forward(pass, input)?;
        let is_alike = [residual, weight].iter().all(|other| other.kind() == output.kind());
        if runs_here(&output) && is_alike && !pass.is_observed() {
            let pattern = pass.patterned_rows(probability, self.rows, output.size()[0]);
            return normalise(Parts::Sum { output: &output, pattern, residual }, weight, shift, self.epsilon);
        }
        let sum = pass.dropout(&output, probability, self.rows)?.f_add(residual)?;
        self.forward(pass, &sum)
    }
}

/// Returns whether rows are normalised by our own code on the CPU.
fn runs_here(rows: &Tensor) -> bool {
    rows.device() == Device::Cpu && [Kind::Float, Kind::BFloat16].contains(&rows.kind())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Encoded, PackedBatch};
    use crate::model::Parameters;

    const WIDTH: i64 = 40;

    /// Gradients of input, scale and shift; of libtorch's layer normalisation where `ours` is false.
    fn gradients(rows: i64, ours: bool) -> [Tensor; 3] {
        let mut table = ParameterTable::default();
        let layer = LayerNorm::declare(&mut table, "norm", WIDTH, 1e-5, ParameterPlace::EncoderLayer(0));
        let parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        let numbers =
            |count: i64, scale: f64| (Tensor::arange(count, (Kind::Float, Device::Cpu)) * scale).sin();
        let weights: Vec<Tensor> = parameters
            .iter()
            .map(|(id, _)| (numbers(WIDTH, 0.3 + id.index() as f64) + 1.5).set_requires_grad(true))
            .collect();
        let input = (numbers(rows * WIDTH, 0.7) * 3.0 + 1.0).view([rows, WIDTH]).set_requires_grad(true);
        let output = if ours {
            let example = Encoded { ids: vec![1], token_types: vec![0] };
            let batch = PackedBatch::pack(&[&example], 0, Device::Cpu).unwrap();
            layer.forward(&Pass::new(&weights, &batch, None), &input).unwrap()
        } else {
            input.layer_norm([WIDTH], Some(&weights[0]), Some(&weights[1]), 1e-5, true)
        };
        (output * numbers(rows * WIDTH, 0.11).view([rows, WIDTH])).sum(Kind::Float).backward();
        [input.grad(), weights[0].grad(), weights[1].grad()]
    }

    #[test]
    fn gradients_are_those_of_libtorch() {
        for rows in [1, 5, 32, 100] {
            for (ours, theirs) in gradients(rows, true).iter().zip(gradients(rows, false)) {
                let largest = f64::try_from(theirs.abs().max()).unwrap();
                let difference = f64::try_from((ours - &theirs).abs().max()).unwrap();
                assert!(difference <= 2e-6 * largest.max(1.0), "{rows} rows: {difference} of {largest}");
            }
        }
    }
}
