//! Layer normalisation.

use multiversion::multiversion;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::layers::Linear;
use super::parameter::{ParameterKind, ParameterPlace};
use super::params::{ParameterId, ParameterTable};
use super::pass::{Pass, Rows};
use crate::error::Result;
use crate::libtorch::{AddAndNorm, add_and_norm, elements, elements_mut, normalises, with_backward};

/// Rows whose gradients of scale and shift are added up first. Work is cut at fixed places, so that no bit depends on the
/// number of threads: libtorch has a sum for each thread.
const BLOCK: usize = 32;

/// Numbers that are added up side by side.
const LANES: usize = 16;

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
        let output = if (input.kind(), input.device()) == (Kind::Float, Device::Cpu) {
            self.on_cpu(&input, weight, bias)?
        } else {
            input.f_layer_norm([self.width], Some(weight), bias, self.epsilon, true)?
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
        let (true, Some(shift), Some(bias)) =
            (normalises(self.width) && layer.joins(pass), self.bias, layer.bias)
        else {
            let output = layer.forward(pass, input)?;
            let sum = pass.dropout(&output, probability, self.rows)?.f_add(residual)?;
            return self.forward(pass, &sum);
        };
        let scale = pass.operand(self.weight);
        let output = layer.without_bias_gradient(pass, input)?;
        add_and_norm(AddAndNorm {
            dropout: pass.dropout_pattern(probability, self.rows, output.size()[0]),
            input: &output,
            bias: pass.operand(bias),
            residual: &residual.f_to_kind(scale.values.kind())?,
            scale,
            shift: pass.operand(shift),
            epsilon: self.epsilon,
        })
    }

    /// libtorch's forward with a backward of our own.
    fn on_cpu(&self, input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (rows, scale) = (input.f_detach()?.f_contiguous()?, weight.f_detach()?);
        let shift = bias.map(Tensor::detach);
        let (output, mean, inverse_deviation) =
            rows.f_native_layer_norm([self.width], Some(&scale), shift.as_ref(), self.epsilon)?;
        let inputs: Vec<&Tensor> = [input, weight].into_iter().chain(bias).collect();
        let has_shift = bias.is_some();
        with_backward(output, &inputs, move |gradient| {
            let gradient = gradient.f_contiguous()?;
            let mut to_input = rows.f_empty_like()?;
            let gradients = backward(
                &Saved {
                    input: elements(&rows)?,
                    mean: elements(&mean)?,
                    inverse_deviation: elements(&inverse_deviation)?,
                    scale: elements(&scale)?,
                },
                elements(&gradient)?,
                elements_mut(&mut to_input)?,
            );
            let [to_scale, to_shift] = gradients.map(|sums| Tensor::from_slice(&sums));
            let mut gradients = vec![to_input, to_scale];
            gradients.extend(has_shift.then_some(to_shift));
            Ok(gradients)
        })
    }
}

/// What forward leaves for backward.
struct Saved<'a> {
    input: &'a [f32],
    mean: &'a [f32],
    inverse_deviation: &'a [f32],
    scale: &'a [f32],
}

/// Writes the gradient of the input; returns those of scale and shift.
fn backward(saved: &Saved, gradient: &[f32], to_input: &mut [f32]) -> [Vec<f32>; 2] {
    let width = saved.scale.len();
    let blocks: Vec<[Vec<f32>; 2]> = to_input
        .par_chunks_mut(BLOCK * width)
        .enumerate()
        .map(|(block, to_input)| {
            let mut sums = [vec![0f32; width], vec![0f32; width]];
            for (row, to_input) in to_input.chunks_mut(width).enumerate() {
                let row = block * BLOCK + row;
                let own = row * width..(row + 1) * width;
                let [to_scale, to_shift] = &mut sums;
                row_backward(
                    &saved.input[own.clone()],
                    (saved.mean[row], saved.inverse_deviation[row]),
                    saved.scale,
                    &gradient[own],
                    to_input,
                    (to_scale, to_shift),
                );
            }
            sums
        })
        .collect();
    [0, 1].map(|which| {
        let mut sums = vec![0f64; width];
        for block in &blocks {
            sums.iter_mut().zip(&block[which]).for_each(|(sum, &part)| *sum += f64::from(part));
        }
        sums.into_iter().map(|sum| sum as f32).collect()
    })
}

/// One row: with x̂ = (x − mean) / deviation and h = gradient · scale, the gradient of x is
/// (h − mean(h) − x̂ · mean(h · x̂)) / deviation.
#[multiversion(targets = "simd")]
fn row_backward(
    input: &[f32],
    (mean, inverse_deviation): (f32, f32),
    scale: &[f32],
    gradient: &[f32],
    to_input: &mut [f32],
    (to_scale, to_shift): (&mut [f32], &mut [f32]),
) {
    let normalised = |value: f32| (value - mean) * inverse_deviation;
    let (mut sums, mut products) = ([0f32; LANES], [0f32; LANES]);
    for (((input, scale), gradient), (to_scale, to_shift)) in input
        .chunks(LANES)
        .zip(scale.chunks(LANES))
        .zip(gradient.chunks(LANES))
        .zip(to_scale.chunks_mut(LANES).zip(to_shift.chunks_mut(LANES)))
    {
        for lane in 0..input.len() {
            let (normal, scaled) = (normalised(input[lane]), gradient[lane] * scale[lane]);
            sums[lane] += scaled;
            products[lane] += scaled * normal;
            to_scale[lane] += gradient[lane] * normal;
            to_shift[lane] += gradient[lane];
        }
    }
    let count = input.len() as f32;
    let mean_of = |lanes: [f32; LANES]| lanes.iter().sum::<f32>() / count;
    let (sum, product) = (mean_of(sums), mean_of(products));
    for (((to_input, &input), &scale), &gradient) in to_input.iter_mut().zip(input).zip(scale).zip(gradient) {
        *to_input = (gradient * scale - sum - normalised(input) * product) * inverse_deviation;
    }
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

    #[test]
    fn no_bit_depends_on_the_number_of_threads() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let width = 48;
            let numbers =
                |count: usize| (0..count).map(|index| (index as f32 * 0.37).sin()).collect::<Vec<_>>();
            let (input, gradient, ones) = (numbers(500 * width), numbers(500 * width), vec![1.0; 500]);
            let mut to_input = vec![0f32; 500 * width];
            let saved = Saved { input: &input, mean: &ones, inverse_deviation: &ones, scale: &ones[..width] };
            let sums = pool.install(|| backward(&saved, &gradient, &mut to_input));
            (sums, to_input)
        };
        assert_eq!(run(1), run(3));
    }
}
