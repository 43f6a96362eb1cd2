//! Operations over rows of activations on a GPU, each in one kernel each way (`rows.cu`). On the CPU tests run them, thread by
//! thread.

use std::ffi::{c_int, c_void};
use std::ptr::null;

use tch::{Device, Kind, Tensor};

use super::gradient_place::{Operand, gradients_of_sums};
use super::kernels::{LISTS, THREADS, blocks, has_rows_of_fours, launch, launch_blocks, rows_of_part};
use super::own_backward::with_backward;
use crate::error::{Error, Result};
use crate::random::GROUP;

/// As in `rows.cu`.
const WIDEST: i64 = 1024;
const TEAM: usize = 128;
/// Threads of a block that goes over rows backward, and how many of them there are at most: as many as a large GPU has room for,
/// since each has sums of its own.
const THREADS_OF_SUMS: usize = 512;
const BLOCKS_OF_SUMS: usize = 264;
/// Parts of the rows that GELU's backward goes over: more than where nothing but sums is computed.
const PARTS_OF_GELU: [usize; 2] = [64, 256];

/// Which elements of rows dropout keeps, a pure function of key, place in the network, example and token.
pub struct DropoutPattern {
    /// `[2]`, int32, on the device of the rows.
    pub key: Tensor,
    /// The largest random number that is kept.
    pub limit: u32,
    /// The factor on what is kept.
    pub scale: f32,
    /// The place in the network.
    pub site: u32,
    /// What the rows stand for.
    pub rows: DropoutRows,
}

/// What rows with dropout stand for; tensors are int64, on their device.
pub enum DropoutRows {
    /// One a token: position and slot of each, `[rows]` or more.
    Tokens {
        /// The position in its example.
        positions: Tensor,
        /// The number of its example in the step.
        slots: Tensor,
    },
    /// One an example: the slot of each, `[rows]` or more.
    Examples {
        /// The number of the example in the step.
        slots: Tensor,
    },
    /// So many that all examples share, in copies one behind the other.
    Shared(i64),
}

/// As in `rows.cu`.
#[repr(C)]
struct PatternArgument {
    key: *const c_void,
    limit: u32,
    scale: f32,
    site: u32,
    positions: *const c_void,
    slots: *const c_void,
    shared: i64,
}

#[repr(C)]
struct DropArguments {
    pattern: PatternArgument,
    numbers: *const c_void,
    dropped: *mut c_void,
    halves: c_int,
    rows: i64,
    width: i64,
}

#[repr(C)]
struct NormArguments {
    pattern: PatternArgument,
    input: *const c_void,
    residual: *const c_void,
    scale: *const c_void,
    shift: *const c_void,
    rows: i64,
    width: i64,
    epsilon: f32,
    sums: *mut c_void,
    output: *mut c_void,
    means: *mut c_void,
    inverse_deviations: *mut c_void,
}

#[repr(C)]
struct NormBackwardArguments {
    pattern: PatternArgument,
    gradient: *const c_void,
    sums: *const c_void,
    scale: *const c_void,
    means: *const c_void,
    inverse_deviations: *const c_void,
    rows: i64,
    width: i64,
    to_residual: *mut c_void,
    to_input: *mut c_void,
    parts: *mut c_void,
}

#[repr(C)]
struct GeluBackwardArguments {
    gradient: *const c_void,
    input: *const c_void,
    rows: i64,
    width: i64,
    rows_of_part: i64,
    to_input: *mut c_void,
    sums: *mut c_void,
}

impl DropoutPattern {
    /// Returns it for a kernel over so many rows.
    fn argument(&self, rows: i64, device: Device) -> Result<PatternArgument> {
        let (positions, slots, shared) = match &self.rows {
            DropoutRows::Tokens { positions, slots } => (Some(positions), Some(slots), 1),
            DropoutRows::Examples { slots } => (None, Some(slots), 1),
            DropoutRows::Shared(own) => (None, None, *own),
        };
        let fits = |numbers: &&Tensor| {
            numbers.kind() == Kind::Int64
                && numbers.is_contiguous()
                && numbers.numel() as i64 >= rows
                && numbers.device() == device
        };
        let key = self.key.kind() == Kind::Int && self.key.numel() == 2 && self.key.device() == device;
        if !key || shared < 1 || ![positions, slots].iter().flatten().all(fits) {
            return Err(misfit());
        }
        let address =
            |numbers: Option<&Tensor>| numbers.map_or(null(), |numbers| numbers.data_ptr().cast_const());
        Ok(PatternArgument {
            key: self.key.data_ptr(),
            limit: self.limit,
            scale: self.scale,
            site: self.site,
            positions: address(positions),
            slots: address(slots),
            shared,
        })
    }
}

/// Returns the pattern for a kernel, or what keeps all.
fn pattern_argument(pattern: Option<&DropoutPattern>, rows: i64, device: Device) -> Result<PatternArgument> {
    match pattern {
        Some(pattern) => pattern.argument(rows, device),
        None => Ok(PatternArgument {
            key: null(),
            limit: 0,
            scale: 1.0,
            site: 0,
            positions: null(),
            slots: null(),
            shared: 1,
        }),
    }
}

/// Drops elements of rows, `[rows, width]` in float32 or bfloat16, and scales the others, with a gradient. Backward draws the
/// pattern again: none is kept.
///
/// # Errors
/// Fails if the tensors do not belong together, or if the GPU has no compiler for kernels.
pub fn drop_rows(input: &Tensor, pattern: DropoutPattern) -> Result<Tensor> {
    let dropped = dropped(&input.f_detach()?, &pattern)?;
    with_backward(dropped, &[input], move |gradient| Ok(vec![self::dropped(gradient, &pattern)?]))
}

fn dropped(rows: &Tensor, pattern: &DropoutPattern) -> Result<Tensor> {
    let rows = rows.f_contiguous()?;
    let dropped = rows.f_empty_like()?;
    let (&[count, width], true) = (&rows.size()[..], [Kind::Float, Kind::BFloat16].contains(&rows.kind()))
    else {
        return Err(misfit());
    };
    let arguments = DropArguments {
        pattern: pattern.argument(count, rows.device())?,
        numbers: rows.data_ptr(),
        dropped: dropped.data_ptr(),
        halves: (rows.kind() == Kind::BFloat16).into(),
        rows: count,
        width,
    };
    // SAFETY: both are as long and of the type that is said, on the pattern's device.
    unsafe { launch(c"drop", rows.device(), blocks(rows.numel()), arguments) }?;
    Ok(dropped)
}

/// Layer normalisation of the sum of a residual and what dropout leaves of what a linear layer returned.
pub struct AddAndNorm<'a> {
    /// What the linear layer returned, with its bias, `[rows, width]`.
    pub input: &'a Tensor,
    /// That bias, `[width]`, which gets its gradient here.
    pub bias: Operand<'a>,
    /// `[rows, width]`.
    pub residual: &'a Tensor,
    /// Scale of the normalisation, `[width]`.
    pub scale: Operand<'a>,
    /// Its shift, `[width]`.
    pub shift: Operand<'a>,
    /// Added to the variance.
    pub epsilon: f64,
    /// The pattern of dropout, if there is one.
    pub dropout: Option<DropoutPattern>,
}

/// Returns whether [`add_and_norm`] takes rows so wide.
pub fn normalises(width: i64) -> bool {
    width % GROUP as i64 == 0 && (1..=WIDEST).contains(&width)
}

/// Computes layer normalisation of residual + dropout(input), with a gradient; all in bfloat16, and rounded where single operations
/// would.
///
/// # Errors
/// As for [`drop_rows`]; for widths of which [`normalises`] says no.
pub fn add_and_norm(operation: AddAndNorm) -> Result<Tensor> {
    let AddAndNorm { input, bias, residual, scale, shift, epsilon, dropout } = operation;
    let wanted = [scale.wanted(), shift.wanted(), bias.wanted()];
    let (own, scale_values) = (input.f_detach()?.f_contiguous()?, scale.values.f_detach()?);
    let (residual_values, shift_values) = (residual.f_detach()?.f_contiguous()?, shift.values.f_detach()?);
    let (&[rows, width], device) = (&own.size()[..], own.device()) else { return Err(misfit()) };
    if !normalises(width) || residual_values.size() != own.size() {
        return Err(misfit());
    }
    if [&scale_values, &shift_values, bias.values].iter().any(|vector| vector.numel() as i64 != width) {
        return Err(misfit());
    }
    halves(&[&own, &residual_values, &scale_values, &shift_values], device)?;
    let (sums, output) = (own.f_empty_like()?, own.f_empty_like()?);
    let of_rows = || Tensor::f_empty([rows], (Kind::Float, device));
    let (means, inverse_deviations) = (of_rows()?, of_rows()?);
    let arguments = NormArguments {
        pattern: pattern_argument(dropout.as_ref(), rows, device)?,
        input: own.data_ptr(),
        residual: residual_values.data_ptr(),
        scale: scale_values.data_ptr(),
        shift: shift_values.data_ptr(),
        rows,
        width,
        epsilon: epsilon as f32,
        sums: sums.data_ptr(),
        output: output.data_ptr(),
        means: means.data_ptr(),
        inverse_deviations: inverse_deviations.data_ptr(),
    };
    let blocks = (rows as usize).div_ceil(THREADS / TEAM).max(1);
    // SAFETY: all rows are as wide, in bfloat16 and on the pattern's device, and vectors have a number for each column.
    unsafe { launch(c"add_and_norm", device, blocks, arguments) }?;
    let inputs = [input, residual, scale.values, shift.values, bias.values];
    with_backward(output, &inputs, move |gradient| {
        let gradient = gradient.f_contiguous()?;
        halves(&[&gradient], device)?;
        let (to_residual, to_input) = (gradient.f_empty_like()?, gradient.f_empty_like()?);
        let blocks = (rows as usize).div_ceil(THREADS_OF_SUMS / TEAM).clamp(1, BLOCKS_OF_SUMS);
        let parts = Tensor::f_empty([blocks as i64, LISTS as i64 * width], (Kind::Float, device))?;
        let arguments = NormBackwardArguments {
            pattern: pattern_argument(dropout.as_ref(), rows, device)?,
            gradient: gradient.data_ptr(),
            sums: sums.data_ptr(),
            scale: scale_values.data_ptr(),
            means: means.data_ptr(),
            inverse_deviations: inverse_deviations.data_ptr(),
            rows,
            width,
            to_residual: to_residual.data_ptr(),
            to_input: to_input.data_ptr(),
            parts: parts.data_ptr(),
        };
        // SAFETY: as before; each block has a row of sums.
        unsafe { launch_blocks(c"add_and_norm_backward", device, [blocks, THREADS_OF_SUMS], arguments) }?;
        let [to_scale, to_shift, to_bias]: [Tensor; 3] =
            gradients_of_sums(&parts, &wanted.each_ref())?.try_into().map_err(|_| misfit())?;
        Ok(vec![to_input, to_residual, to_scale, to_shift, to_bias])
    })
}

/// Computes x Φ(x) of what a linear layer returned with its bias, `[rows, width]` in bfloat16, with a gradient; the bias gets its
/// own here.
///
/// # Errors
/// As for [`drop_rows`].
pub fn gelu_after_bias(input: &Tensor, bias: Operand) -> Result<Tensor> {
    let (own, wanted) = (input.f_detach()?, bias.wanted());
    with_backward(own.f_gelu("none")?, &[input, bias.values], move |gradient| {
        let gradient = gradient.f_contiguous()?;
        if ![&gradient, &own].into_iter().all(has_rows_of_fours) || gradient.size() != own.size() {
            return Err(misfit());
        }
        let (rows, width, device) = (own.size()[0], own.size()[1], own.device());
        halves(&[&gradient], device)?;
        let rows_of_part = rows_of_part(rows, width, PARTS_OF_GELU);
        let parts = (rows as usize).div_ceil(rows_of_part as usize) as i64;
        let to_input = own.f_empty_like()?;
        let sums = Tensor::f_empty([parts, width], (Kind::Float, device))?;
        let arguments = GeluBackwardArguments {
            gradient: gradient.data_ptr(),
            input: own.data_ptr(),
            rows,
            width,
            rows_of_part,
            to_input: to_input.data_ptr(),
            sums: sums.data_ptr(),
        };
        // SAFETY: all rows are alike, and each part has a row of sums.
        unsafe { launch(c"gelu_backward", device, blocks((parts * width) as usize), arguments) }?;
        Ok(vec![to_input, gradients_of_sums(&sums, &[&wanted])?.swap_remove(0)])
    })
}

/// Refuses what is not in bfloat16 on the device.
fn halves(tensors: &[&Tensor], device: Device) -> Result<()> {
    let alike = |tensor: &&Tensor| {
        tensor.kind() == Kind::BFloat16 && tensor.is_contiguous() && tensor.device() == device
    };
    if tensors.iter().all(alike) { Ok(()) } else { Err(misfit()) }
}

fn misfit() -> Error {
    Error::Libtorch("the rows of a kernel do not belong together".into())
}

#[cfg(test)]
mod tests {
    use super::super::gradient_place::GradientPlace;
    use super::*;
    use crate::random::{Bernoulli, Key, group};

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
    const KEY: [u32; 2] = [7, 0xFFFF_FFF1];
    const SITE: u32 = 5;

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, CPU).to_kind(Kind::BFloat16)
    }

    fn positions(rows: i64) -> [Tensor; 2] {
        let numbers = |number: fn(i64) -> i64| Tensor::from_slice(&(0..rows).map(number).collect::<Vec<_>>());
        [numbers(|row| row % 7), numbers(|row| row / 7 + 3)]
    }

    fn pattern(rows: DropoutRows) -> DropoutPattern {
        let key = Tensor::from_slice(&KEY.map(u32::cast_signed));
        DropoutPattern { key, limit: Bernoulli::new(0.7).limit, scale: 1.0 / 0.7, site: SITE, rows }
    }

    /// The factors of rows whose counters are known, `[rows, width]`.
    fn factors(counters: &[[u32; 3]], width: usize) -> Tensor {
        let limit = Bernoulli::new(0.7).limit;
        let of_row = |&counter: &[u32; 3]| {
            (0..width.div_ceil(GROUP))
                .flat_map(move |index| group(Key(KEY), index as u32, counter))
                .take(width)
                .map(move |number| if number <= limit { 1.0 / 0.7 } else { 0.0f32 })
        };
        let numbers: Vec<f32> = counters.iter().flat_map(of_row).collect();
        Tensor::from_slice(&numbers).view([counters.len() as i64, width as i64])
    }

    fn close(found: &Tensor, expected: &Tensor, share: f64, about: &str) {
        let [found, expected] = [found, expected].map(|tensor| tensor.to_kind(Kind::Double));
        let largest = f64::try_from(expected.abs().max()).unwrap();
        let difference = f64::try_from((found - expected).abs().max()).unwrap();
        assert!(difference <= share * largest, "{about}: {difference} of {largest}");
    }

    #[test]
    fn dropout_draws_for_all_sorts_of_rows_what_the_generator_says() {
        tch::manual_seed(1);
        for width in [1, 64, 100, 192] {
            let [own, slots] = positions(12);
            let token = |row: u32| [row % 7, row / 7 + 3, SITE];
            let cases = [
                (DropoutRows::Tokens { positions: own, slots }, (0..12).map(token).collect::<Vec<_>>()),
                (
                    DropoutRows::Examples { slots: positions(12)[1].shallow_clone() },
                    (0..12).map(|row| [0, row / 7 + 3, SITE]).collect(),
                ),
                (DropoutRows::Shared(4), (0..12).map(|row| [row % 4, u32::MAX, SITE]).collect()),
            ];
            for (rows, counters) in cases {
                let expected = factors(&counters, width);
                let input = Tensor::randn([12, width as i64], CPU).set_requires_grad(true);
                let pattern = pattern(rows);
                let half = dropped(&input.detach().to_kind(Kind::BFloat16), &pattern).unwrap();
                assert_eq!(
                    half,
                    (input.detach().to_kind(Kind::BFloat16).to_kind(Kind::Float) * &expected)
                        .to_kind(Kind::BFloat16)
                );
                let output = drop_rows(&input, pattern).unwrap();
                assert_eq!(output, &input * &expected);
                output.sum(Kind::Float).backward();
                assert_eq!(input.grad(), expected);
            }
        }
    }

    /// Against libtorch's operations in float64, of the same rounded numbers; with and without dropout and places, over fewer and
    /// more rows than there are blocks.
    #[test]
    fn the_sum_is_normalised_as_by_libtorch_and_all_gradients_are_its() {
        tch::manual_seed(1);
        for (rows, width, drops, has_places) in [
            (1, 64, true, true),
            (5, 320, false, true),
            (300, 128, true, false),
            (2200, 64, true, true),
            (37, 1024, true, true),
        ] {
            let leaf = |shape: &[i64]| random(shape).set_requires_grad(true);
            let (input, residual) = (leaf(&[rows, width]), leaf(&[rows, width]));
            let vectors = [leaf(&[width]), leaf(&[width]), leaf(&[width])];
            let counters: Vec<[u32; 3]> = (0..rows as u32).map(|row| [row % 7, row / 7 + 3, SITE]).collect();
            let weights = random(&[rows, width]);

            let exact = |tensor: &Tensor| tensor.detach().to_kind(Kind::Double).set_requires_grad(true);
            let [own, added, scale, shift] = [&input, &residual, &vectors[0], &vectors[1]].map(exact);
            let kept = match drops {
                true => &own * factors(&counters, width as usize).to_kind(Kind::Double),
                false => own.shallow_clone(),
            };
            let expected = (kept + &added).layer_norm([width], Some(&scale), Some(&shift), 1e-3, false);
            (&expected * weights.to_kind(Kind::Double)).sum(Kind::Double).backward();

            let places: Vec<GradientPlace> =
                vectors.iter().map(|_| GradientPlace::new(Tensor::full([width], 9.0, CPU))).collect();
            let operand = |number: usize| Operand {
                values: &vectors[number],
                place: has_places.then(|| &places[number]),
            };
            let [positions, slots] = positions(rows);
            let output = add_and_norm(AddAndNorm {
                input: &input,
                bias: operand(2),
                residual: &residual,
                scale: operand(0),
                shift: operand(1),
                epsilon: 1e-3,
                dropout: drops.then(|| pattern(DropoutRows::Tokens { positions, slots })),
            })
            .unwrap();
            close(&output, &expected, 0.01, "output");
            (&output * &weights).sum(Kind::Float).backward();
            close(&input.grad(), &own.grad(), 0.02, "input");
            close(&residual.grad(), &added.grad(), 0.02, "residual");
            let of_vector = |number: usize| match has_places {
                true => places[number].numbers().shallow_clone(),
                false => vectors[number].grad(),
            };
            close(&of_vector(0), &scale.grad(), 0.02, "scale");
            close(&of_vector(1), &shift.grad(), 0.02, "shift");
            // That of the bias is what comes to the input.
            close(&of_vector(2), &own.grad().sum_dim_intlist(0, false, Kind::Double), 0.02, "bias");
        }
    }

    #[test]
    fn gelu_brings_the_bias_the_sums_of_its_gradient() {
        tch::manual_seed(1);
        for (rows, width) in [(1, 4), (70, 64), (301, 128), (4201, 8)] {
            let input = (random(&[rows, width]) * 2.0).detach().set_requires_grad(true);
            let bias = random(&[width]).set_requires_grad(true);
            let weights = random(&[rows, width]);
            let own = input.detach().to_kind(Kind::Double).set_requires_grad(true);
            let expected = own.gelu("none");
            (&expected * weights.to_kind(Kind::Double)).sum(Kind::Double).backward();
            let output = gelu_after_bias(&input, Operand::plain(&bias)).unwrap();
            close(&output, &expected, 0.01, "output");
            (&output * &weights).sum(Kind::Float).backward();
            close(&input.grad(), &own.grad(), 0.01, "input");
            close(&bias.grad(), &own.grad().sum_dim_intlist(0, false, Kind::Double), 0.02, "bias");
        }
    }

    /// Of all sizes of inputs: no further from the exact slope, times a gradient, than rounding it to bfloat16 can be.
    #[test]
    fn the_slope_of_gelu_is_exact_to_the_rounding() {
        let values: Vec<f32> = (0..4096).map(|number| (number - 2048) as f32 / 256.0).collect();
        let input =
            Tensor::from_slice(&values).to_kind(Kind::BFloat16).view([64, 64]).set_requires_grad(true);
        let bias = Tensor::zeros([64], (Kind::BFloat16, Device::Cpu));
        gelu_after_bias(&input, Operand::plain(&bias)).unwrap().sum(Kind::Float).backward();
        let own = input.detach().to_kind(Kind::Double).set_requires_grad(true);
        own.gelu("none").sum(Kind::Double).backward();
        let difference = (input.grad().to_kind(Kind::Double) - own.grad()).abs();
        let allowed = own.grad().abs() * 2f64.powi(-8) + 3e-7;
        assert!(bool::try_from(difference.le_tensor(&allowed).all()).unwrap());
    }

    #[test]
    fn rows_that_do_not_belong_together_are_refused() {
        let rows = random(&[9, 64]);
        let short = || positions(8);
        let [own, slots] = short();
        assert!(drop_rows(&rows, pattern(DropoutRows::Tokens { positions: own, slots })).is_err());
        assert!(drop_rows(&rows.to_kind(Kind::Double), pattern(DropoutRows::Shared(9))).is_err());
        let vector = random(&[64]);
        let (fewer, floats) = (rows.narrow(0, 0, 8), vector.to_kind(Kind::Float));
        let operation = |residual, scale| AddAndNorm {
            input: &rows,
            bias: Operand::plain(&vector),
            residual,
            scale: Operand::plain(scale),
            shift: Operand::plain(&vector),
            epsilon: 1e-5,
            dropout: None,
        };
        assert!(add_and_norm(operation(&rows, &vector)).is_ok());
        assert!(add_and_norm(operation(&fewer, &vector)).is_err());
        assert!(add_and_norm(operation(&rows, &floats)).is_err());
        assert!(!normalises(1088) && !normalises(100) && normalises(768));
    }
}
