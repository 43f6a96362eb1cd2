//! Operations over rows of activations on a GPU, each in one kernel each way (`rows.cu`). On the CPU tests run them, thread by
//! thread.

#[cfg(test)]
mod tests;

use std::ffi::{c_int, c_void};
use std::ptr::null;

use tch::{Device, Kind, Tensor};

use super::gradient_place::{Operand, gradients_of_sums};
use super::kernels::{THREADS, blocks, launch, launch_blocks};
use super::own_backward::with_backward;
use super::row_sums::{LISTS, has_rows_of_fours, rows_of_part};
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
/// would. Returns it, and the sum that was normalised, without a graph.
///
/// # Errors
/// As for [`drop_rows`]; for widths of which [`normalises`] says no.
pub fn add_and_norm(operation: AddAndNorm) -> Result<[Tensor; 2]> {
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
    let normalised = sums.shallow_clone();
    let output = with_backward(output, &inputs, move |gradient| {
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
    })?;
    Ok([output, normalised])
}

/// Returns whether [`gelu_after_bias`] takes rows so wide.
pub fn activates(width: i64) -> bool {
    width % 4 == 0
}

/// Computes x Φ(x) of what a linear layer returned with its bias, `[rows, width]` in bfloat16, with a gradient; the bias gets its
/// own here.
///
/// # Errors
/// As for [`drop_rows`]; for widths of which [`activates`] says no.
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
