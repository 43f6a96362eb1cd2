//! Layer normalisation on the CPU, of rows or of sums of rows with dropout, each way in one pass over them.

use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::dropout::PatternedRows;
use crate::error::{Error, Result};
use crate::libtorch::{Number, elements, elements_mut, with_backward};

/// Rows that a task goes over, and whose gradients of scale and shift are added up first. Work is cut at fixed places, so that no
/// bit depends on the number of threads: libtorch has a sum for each thread.
const BLOCK: usize = 32;

/// Numbers that are added up side by side.
const LANES: usize = 16;

/// What is normalised, `[rows, width]` in float32 or bfloat16.
pub(super) enum Parts<'a> {
    /// Rows as they are.
    One(&'a Tensor),
    /// A residual and what dropout leaves of an output, added up and rounded as single operations would.
    Sum {
        /// What dropout drops elements of.
        output: &'a Tensor,
        /// Which it keeps; all, if there is no pattern.
        pattern: Option<PatternedRows>,
        /// What is added.
        residual: &'a Tensor,
    },
}

/// Normalises rows, and multiplies them by `scale` and adds `shift`, both `[width]` in the type of the rows, with a gradient of all.
///
/// # Errors
/// Fails if shapes or types do not match.
pub(super) fn normalise(
    parts: Parts,
    scale: &Tensor,
    shift: Option<&Tensor>,
    epsilon: f64,
) -> Result<Tensor> {
    match scale.kind() {
        Kind::BFloat16 => normalise_numbers::<bf16>(parts, scale, shift, epsilon),
        _ => normalise_numbers::<f32>(parts, scale, shift, epsilon),
    }
}

fn normalise_numbers<T: Number>(
    parts: Parts,
    scale: &Tensor,
    shift: Option<&Tensor>,
    epsilon: f64,
) -> Result<Tensor> {
    let floats = |vector: &Tensor| -> Result<Vec<f32>> {
        Ok(elements::<T>(&vector.f_detach()?)?.iter().map(|number| number.to_float()).collect())
    };
    let scales = floats(scale)?;
    let shifts = shift.map_or_else(|| Ok(vec![0.0; scales.len()]), floats)?;
    let affine = Affine { scale: &scales, shift: &shifts, epsilon: epsilon as f32 };
    let mut inputs: Vec<&Tensor> = match &parts {
        Parts::One(rows) => vec![rows],
        Parts::Sum { output, residual, .. } => vec![output, residual],
    };
    let width = scales.len();
    if width == 0 || inputs.iter().any(|rows| rows.size() != [inputs[0].size()[0], width as i64]) {
        return Err(Error::Libtorch(format!("rows of another width than {width} are not normalised")));
    }
    let own = inputs
        .iter()
        .map(|rows| rows.f_detach()?.f_contiguous())
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let mut normal = own[0].f_empty_like()?;
    // What is normalised, and the mean and the inverse deviation of each row.
    let (rows, statistics, pattern) = match parts {
        Parts::One(_) => {
            let statistics = normalise_rows::<T>(elements(&own[0])?, affine, elements_mut(&mut normal)?);
            (own[0].shallow_clone(), statistics, None)
        }
        Parts::Sum { pattern, .. } => {
            let mut sums = own[0].f_empty_like()?;
            let summands = Summands {
                output: elements(&own[0])?,
                residual: elements(&own[1])?,
                pattern: pattern.as_ref(),
            };
            let statistics =
                normalise_sums::<T>(summands, affine, elements_mut(&mut sums)?, elements_mut(&mut normal)?);
            (sums, statistics, pattern)
        }
    };
    let (is_sum, has_shift) = (inputs.len() == 2, shift.is_some());
    inputs.extend([scale].into_iter().chain(shift));
    with_backward(normal, &inputs, move |gradient| {
        let gradient = gradient.f_contiguous()?;
        let mut to_rows = rows.f_empty_like()?;
        let mut to_output = pattern.as_ref().map(|_| rows.f_empty_like()).transpose()?;
        let saved = Saved { rows: elements::<T>(&rows)?, statistics: &statistics, scale: &scales };
        let dropped = match (&mut to_output, &pattern) {
            (Some(dropped), Some(pattern)) => Some((elements_mut(dropped)?, pattern)),
            _ => None,
        };
        let sums = backward(&saved, elements(&gradient)?, elements_mut(&mut to_rows)?, dropped);
        let [to_scale, to_shift] = sums.map(|sums| Tensor::from_slice(&sums));
        let mut gradients = match is_sum {
            true => vec![to_output.unwrap_or_else(|| to_rows.shallow_clone()), to_rows],
            false => vec![to_rows],
        };
        // In the type of the rows by libtorch.
        gradients.push(to_scale);
        gradients.extend(has_shift.then_some(to_shift));
        Ok(gradients)
    })
}

/// What is done to normalised rows, and with their variance.
#[derive(Clone, Copy)]
struct Affine<'a> {
    scale: &'a [f32],
    shift: &'a [f32],
    epsilon: f32,
}

/// Mean and inverse deviation of each row.
type Statistics = Vec<(f32, f32)>;

fn normalise_rows<T: Number>(rows: &[T], affine: Affine, normal: &mut [T]) -> Statistics {
    let part = BLOCK * affine.scale.len();
    let blocks = rows.par_chunks(part).zip(normal.par_chunks_mut(part));
    let of_block = |(rows, normal): (&[T], &mut [T])| -> Statistics {
        let width = affine.scale.len();
        let rows = rows.chunks(width).zip(normal.chunks_mut(width));
        rows.map(|(row, normal)| normalise_row(row, affine, normal)).collect()
    };
    blocks.map(of_block).collect::<Vec<_>>().concat()
}

struct Summands<'a, T> {
    output: &'a [T],
    residual: &'a [T],
    pattern: Option<&'a PatternedRows>,
}

/// Writes the sums, too.
fn normalise_sums<T: Number>(
    summands: Summands<T>,
    affine: Affine,
    sums: &mut [T],
    normal: &mut [T],
) -> Statistics {
    let width = affine.scale.len();
    let part = BLOCK * width;
    let outputs = summands.output.par_chunks(part).zip(summands.residual.par_chunks(part));
    let blocks = outputs.zip(sums.par_chunks_mut(part).zip(normal.par_chunks_mut(part))).enumerate();
    let of_block = |(block, ((output, residual), (sums, normal)))| -> Statistics {
        let (output, residual): (&[T], &[T]) = (output, residual);
        let (sums, normal): (&mut [T], &mut [T]) = (sums, normal);
        let rows = output.chunks(width).zip(residual.chunks(width));
        let rows = rows.zip(sums.chunks_mut(width).zip(normal.chunks_mut(width))).enumerate();
        rows.map(|(row, ((output, residual), (sums, normal)))| {
            match summands.pattern {
                Some(pattern) => {
                    pattern.drop_row(block * BLOCK + row, output, sums);
                    add_row(residual, sums);
                }
                None => {
                    sums.copy_from_slice(output);
                    add_row(residual, sums);
                }
            }
            normalise_row(sums, affine, normal)
        })
        .collect()
    };
    blocks.map(of_block).collect::<Vec<_>>().concat()
}

#[multiversion(targets = "simd")]
fn add_row<T: Number>(added: &[T], sums: &mut [T]) {
    sums.iter_mut()
        .zip(added)
        .for_each(|(sum, added)| *sum = T::from_float(sum.to_float() + added.to_float()));
}

/// Returns mean and inverse deviation.
#[multiversion(targets = "simd")]
fn normalise_row<T: Number>(row: &[T], affine: Affine, normal: &mut [T]) -> (f32, f32) {
    let (count, (parts, rest)) = (row.len() as f32, row.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for part in parts {
        for lane in 0..LANES {
            sums[lane] += part[lane].to_float();
        }
    }
    sums.iter_mut().zip(rest).for_each(|(sum, value)| *sum += value.to_float());
    let mean = sums.iter().sum::<f32>() / count;
    let square = |value: T| (value.to_float() - mean) * (value.to_float() - mean);
    let mut squares = [0f32; LANES];
    for part in parts {
        for lane in 0..LANES {
            squares[lane] += square(part[lane]);
        }
    }
    squares.iter_mut().zip(rest).for_each(|(sum, &value)| *sum += square(value));
    let inverse_deviation = 1.0 / (squares.iter().sum::<f32>() / count + affine.epsilon).sqrt();
    for (((normal, value), &scale), &shift) in normal.iter_mut().zip(row).zip(affine.scale).zip(affine.shift)
    {
        *normal = T::from_float((value.to_float() - mean) * inverse_deviation * scale + shift);
    }
    (mean, inverse_deviation)
}

/// What forward leaves for backward.
struct Saved<'a, T> {
    rows: &'a [T],
    statistics: &'a [(f32, f32)],
    scale: &'a [f32],
}

/// Writes the gradient of the rows, and what dropout leaves of it; returns those of scale and shift.
fn backward<T: Number>(
    saved: &Saved<T>,
    gradient: &[T],
    to_rows: &mut [T],
    dropped: Option<(&mut [T], &PatternedRows)>,
) -> [Vec<f32>; 2] {
    let width = saved.scale.len();
    let part = BLOCK * width;
    let (mut nothing, mut pattern) = (Vec::new(), None);
    let dropped: Vec<&mut [T]> = match dropped {
        Some((dropped, of_rows)) => {
            pattern = Some(of_rows);
            dropped.chunks_mut(part).collect()
        }
        None => {
            nothing.resize_with(to_rows.len().div_ceil(part), Vec::new);
            nothing.iter_mut().map(Vec::as_mut_slice).collect()
        }
    };
    let blocks: Vec<[Vec<f32>; 2]> = (to_rows.par_chunks_mut(part).zip(dropped).enumerate())
        .map(|(block, (to_rows, dropped))| {
            let mut sums = [vec![0f32; width], vec![0f32; width]];
            for (number, to_row) in to_rows.chunks_mut(width).enumerate() {
                let row = block * BLOCK + number;
                let own = row * width..(row + 1) * width;
                let [to_scale, to_shift] = &mut sums;
                row_backward(
                    &saved.rows[own.clone()],
                    saved.statistics[row],
                    saved.scale,
                    &gradient[own],
                    to_row,
                    (to_scale, to_shift),
                );
                if let Some(pattern) = pattern {
                    pattern.drop_row(row, to_row, &mut dropped[number * width..(number + 1) * width]);
                }
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
fn row_backward<T: Number>(
    input: &[T],
    (mean, inverse_deviation): (f32, f32),
    scale: &[f32],
    gradient: &[T],
    to_input: &mut [T],
    (to_scale, to_shift): (&mut [f32], &mut [f32]),
) {
    let normalised = |value: T| (value.to_float() - mean) * inverse_deviation;
    let (mut sums, mut products) = ([0f32; LANES], [0f32; LANES]);
    let mut add = |lane: usize, input: T, scale: f32, gradient: T, to_scale: &mut f32, to_shift: &mut f32| {
        let (normal, gradient) = (normalised(input), gradient.to_float());
        sums[lane] += gradient * scale;
        products[lane] += gradient * scale * normal;
        *to_scale += gradient * normal;
        *to_shift += gradient;
    };
    let ((inputs, last_inputs), (scales, last_scales)) =
        (input.as_chunks::<LANES>(), scale.as_chunks::<LANES>());
    let (gradients, last_gradients) = gradient.as_chunks::<LANES>();
    let (to_scales, last_to_scales) = to_scale.as_chunks_mut::<LANES>();
    let (to_shifts, last_to_shifts) = to_shift.as_chunks_mut::<LANES>();
    let parts = inputs.iter().zip(scales).zip(gradients).zip(to_scales.iter_mut().zip(to_shifts));
    for (((input, scale), gradient), (to_scale, to_shift)) in parts {
        for lane in 0..LANES {
            add(lane, input[lane], scale[lane], gradient[lane], &mut to_scale[lane], &mut to_shift[lane]);
        }
    }
    for lane in 0..last_inputs.len() {
        let (to_scale, to_shift) = (&mut last_to_scales[lane], &mut last_to_shifts[lane]);
        add(lane, last_inputs[lane], last_scales[lane], last_gradients[lane], to_scale, to_shift);
    }
    let count = input.len() as f32;
    let mean_of = |lanes: [f32; LANES]| lanes.iter().sum::<f32>() / count;
    let (sum, product) = (mean_of(sums), mean_of(products));
    for (((to_input, &input), &scale), gradient) in to_input.iter_mut().zip(input).zip(scale).zip(gradient) {
        let scaled = gradient.to_float() * scale;
        *to_input = T::from_float((scaled - sum - normalised(input) * product) * inverse_deviation);
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::model::Rows;
    use crate::model::dropout::{Dropout, tests::batch};
    use crate::random::Purpose;

    const WIDTH: i64 = 100;

    fn wave(rows: i64, step: f64, kind: Kind) -> Tensor {
        let numbers = (Tensor::arange(rows * WIDTH, (Kind::Float, Device::Cpu)) * step).sin() * 3.0 + 1.0;
        numbers.view([rows, WIDTH]).to_kind(kind)
    }

    /// Against dropout, sum and libtorch's layer normalisation, one after the other, in float64 from the same rounded sum on.
    #[test]
    fn sums_are_normalised_as_by_single_operations() {
        for (rows, kind, probability, allowed) in [
            (1, Kind::Float, 0.3, 3e-6),
            (70, Kind::Float, 0.0, 3e-6),
            (100, Kind::Float, 0.3, 3e-6),
            (70, Kind::BFloat16, 0.3, 1e-2),
            (33, Kind::BFloat16, 0.0, 1e-2),
        ] {
            let batch = batch(&[rows as usize], 0);
            let dropout = Dropout::new(1, Purpose::Dropout, 0, 0, Device::Cpu).unwrap();
            let leaf = |tensor: Tensor| tensor.detach().set_requires_grad(true);
            let [output, residual] = [0.7, 0.31].map(|step| leaf(wave(rows, step, kind)));
            let [scale, shift] = [0.9, 0.13].map(|step| leaf(wave(1, step, kind).view([WIDTH])));
            let weights = wave(rows, 0.11, Kind::Double);

            let dropped = dropout.rows(&output, probability, 3, (Rows::Tokens, 1), &batch).unwrap();
            let sum = dropped + &residual;
            let [sum_leaf, wide_scale, wide_shift] =
                [&sum, &scale, &shift].map(|tensor| leaf(tensor.to_kind(Kind::Double)));
            let expected = sum_leaf.layer_norm([WIDTH], Some(&wide_scale), Some(&wide_shift), 1e-5, false);
            (&expected * &weights).sum(Kind::Double).backward();
            (&sum * sum_leaf.grad().to_kind(kind)).sum(Kind::Float).backward();
            let expected_gradients = [output.grad(), residual.grad(), wide_scale.grad(), wide_shift.grad()]
                .map(|gradient| gradient.copy());
            for leaf in [&output, &residual] {
                leaf.shallow_clone().zero_grad();
            }

            let pattern = dropout.patterned(probability, 3, (Rows::Tokens, 1), rows, &batch);
            let parts = Parts::Sum { output: &output, pattern, residual: &residual };
            let found = normalise(parts, &scale, Some(&shift), 1e-5).unwrap();
            (found.to_kind(Kind::Double) * &weights).sum(Kind::Double).backward();
            let found_gradients = [&output, &residual, &scale, &shift].map(Tensor::grad);
            for (found, expected) in
                found_gradients.iter().chain([&found]).zip(expected_gradients.iter().chain([&expected]))
            {
                let [found, expected] = [found, expected].map(|tensor| tensor.to_kind(Kind::Double));
                let largest = f64::try_from(expected.abs().max()).unwrap();
                let difference = f64::try_from((found - expected).abs().max()).unwrap();
                assert!(difference <= allowed * largest, "{rows} {kind:?}: {difference} of {largest}");
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
            let (rows, gradient, scale) = (numbers(500 * width), numbers(500 * width), vec![1.0; width]);
            let (mut normal, mut to_rows) = (vec![0f32; 500 * width], vec![0f32; 500 * width]);
            let affine = Affine { scale: &scale, shift: &scale, epsilon: 1e-5 };
            pool.install(|| {
                let statistics = normalise_rows(&rows, affine, &mut normal);
                let saved = Saved { rows: &rows, statistics: &statistics, scale: &scale };
                let sums = backward(&saved, &gradient, &mut to_rows, None);
                (sums, to_rows, normal)
            })
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn rows_of_another_width_are_refused() {
        let rows = wave(2, 0.1, Kind::Float);
        let scale = Tensor::ones([WIDTH + 1], (Kind::Float, Device::Cpu));
        assert!(normalise(Parts::One(&rows), &scale, None, 1e-5).is_err());
    }
}
