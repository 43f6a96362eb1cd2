//! Convolution over the tokens of each example.

use tch::Tensor;

use super::parameter::{ParameterKind, ParameterPlace};
use super::params::{ParameterId, ParameterTable};
use super::pass::Pass;
use crate::error::Result;

/// A convolution over the tokens of each example, which has zeros around it; of an odd number of tokens, so that there are
/// as many outputs as tokens.
#[derive(Clone, Copy, Debug)]
pub struct Convolution {
    /// `[width, width / groups, kernel]`.
    pub weight: ParameterId,
    /// `[width]`.
    pub bias: ParameterId,
    /// Number of groups of channels, as `groups` of `torch.nn.Conv1d`.
    pub groups: i64,
}

impl Convolution {
    /// Declares the layer as `{name}.weight` and `{name}.bias`.
    pub fn declare(
        table: &mut ParameterTable,
        name: &str,
        width: i64,
        kernel: i64,
        groups: i64,
        place: ParameterPlace,
    ) -> Self {
        let shape = [width, width / groups, kernel];
        Self {
            weight: table.declare(format!("{name}.weight"), &shape, ParameterKind::Weight, place),
            bias: table.declare(format!("{name}.bias"), &[width], ParameterKind::Bias, place),
            groups,
        }
    }

    /// Applies the layer to packed tokens `[tokens, width]`, in the type of its weights.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn forward(&self, pass: &Pass, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (pass.weight(self.weight), pass.weight(self.bias));
        let [width, kernel] = [0, 2].map(|dimension| weight.size()[dimension]);
        let windows = windows(pass, &input.f_to_kind(weight.kind())?, kernel)?;
        let matrices = weight.f_view([self.groups, width / self.groups, -1])?.f_transpose(1, 2)?;
        let inputs = windows.f_view([windows.size()[0], self.groups, -1])?.f_transpose(0, 1)?;
        let output = inputs.f_bmm(&matrices)?.f_transpose(0, 1)?.f_reshape([-1, width])?.f_add(bias)?;
        pass.observe(|observer| observer.convolution(self, &windows, &output))?;
        Ok(output)
    }
}

/// Returns what each output is made of, `[tokens, width · kernel]`: of every number of the token, those of its neighbours in
/// the example, itself in the middle.
fn windows(pass: &Pass, input: &Tensor, kernel: i64) -> Result<Tensor> {
    let (tokens, reach) = (input.size()[0], kernel / 2);
    let positions = &pass.batch.positions;
    let (rows, places) =
        (input.f_constant_pad_nd([0, 0, reach, reach])?, positions.f_constant_pad_nd([reach, reach])?);
    let neighbours = (0..kernel)
        .map(|start| {
            // Positions differ by the distance within an example only.
            let distances = places.f_narrow(0, start, tokens)?.f_sub(positions)?;
            let is_in_example = distances.f_eq(start - reach)?.f_to_kind(input.kind())?.f_unsqueeze(1)?;
            Ok(rows.f_narrow(0, start, tokens)?.f_mul(&is_in_example)?)
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_stack(&neighbours, 2)?.f_view([tokens, -1])?)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::data::{Encoded, PackedBatch};

    #[test]
    fn neighbours_are_those_of_the_example() {
        let example = |length: usize| Encoded { ids: vec![1; length], token_types: vec![0; length] };
        let examples = [example(3), example(1), example(2)];
        let batch = PackedBatch::pack(&examples.iter().collect::<Vec<_>>(), 0, Device::Cpu).unwrap();
        let input = (Tensor::arange(12, (Kind::Float, Device::Cpu)) + 1.0).view([6, 2]);
        for kernel in [1, 3, 5] {
            let found = windows(&Pass::new(&[], &batch, None), &input, kernel).unwrap();
            let mut first = 0;
            for own in &examples {
                let length = own.ids.len() as i64;
                let reach = kernel / 2;
                let padded = input.narrow(0, first, length).constant_pad_nd([0, 0, reach, reach]);
                // [length, width, kernel]
                let expected = padded.unfold(0, kernel, 1).contiguous().view([length, 2 * kernel]);
                assert_eq!(found.narrow(0, first, length), expected, "{kernel}");
                first += length;
            }
        }
    }
}
