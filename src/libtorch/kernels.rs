//! Kernels of our own (`kernels.cu`) over stretches of flat float32 buffers, and how all kernels are started: on a GPU, where they are compiled when one is first
//! used, or thread by thread on the CPU, where tests run them.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::{null, null_mut};

use tch::{Device, Kind, Tensor};

use super::ffi;
use crate::error::{Error, Result};
use crate::random::GROUP;

/// Compiled by the first kernel that is started on a GPU.
const SOURCE: &CStr = match CStr::from_bytes_with_nul(
    concat!(include_str!("kernels.cu"), include_str!("rows.cu"), "\0").as_bytes(),
) {
    Ok(source) => source,
    Err(_) => panic!("the kernels have a zero byte"),
};
pub(super) const THREADS: usize = 256;
/// The most blocks of threads that a kernel is started with; each thread takes what it needs of the numbers.
pub(super) const MOST_BLOCKS: usize = 2048;

/// A random mask: where the random number of an element is at most `limit` the factor is `scale`, elsewhere zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomMask {
    /// The key of the step.
    pub key: [u32; 2],
    /// The largest random number that is kept.
    pub limit: u32,
    /// The factor on what is kept.
    pub scale: f32,
}

/// Which numbers of a stretch of the flat buffer a kernel works on.
#[derive(Clone, Copy)]
pub struct Stretch<'a> {
    /// Place of the first number in the flat buffer, divided by [`GROUP`](crate::random::GROUP).
    pub first_group: usize,
    /// Which of the numbers; all if there is no choice.
    pub chosen: Option<&'a Chosen>,
    /// The mask on the gradients of a stretch without members.
    pub mask: Option<RandomMask>,
}

/// A choice among the numbers of a stretch, whose moments stand side by side.
pub enum Chosen {
    /// Places in the stretch, int32.
    Members(Tensor),
    /// Groups of [`GROUP`](crate::random::GROUP) numbers in the stretch, int32, in order. The last of the stretch may lack some.
    Groups(Tensor),
}

impl Chosen {
    /// Returns how many numbers are chosen, with what the last group lacks.
    pub fn count(&self) -> usize {
        match self {
            Chosen::Members(members) => members.numel(),
            Chosen::Groups(groups) => GROUP * groups.numel(),
        }
    }

    /// Returns the places.
    pub fn places(&self) -> &Tensor {
        match self {
            Chosen::Members(places) | Chosen::Groups(places) => places,
        }
    }
}

/// The constants of an AdamW step, as the update of an element uses them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AdamWConstants {
    /// What weight decay leaves of a weight before the update.
    pub decay_before: f32,
    /// What weight decay leaves of a weight after the update.
    pub decay_after: f32,
    /// 1 − β₁.
    pub one_minus_beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// 1 − β₂.
    pub one_minus_beta2: f32,
    /// √(1 − β₂ᵗ).
    pub root_of_correction: f32,
    /// η / (1 − β₁ᵗ).
    pub step_size: f32,
    /// ε.
    pub epsilon: f32,
}

/// As in `kernels.cu`.
#[repr(C)]
struct MaskArgument {
    key: [u32; 2],
    limit: u32,
    scale: f32,
    draws: c_int,
}

#[repr(C)]
struct StretchArgument {
    first_group: i64,
    length: i64,
    count: i64,
    members: *const c_void,
    groups: *const c_void,
}

#[repr(C)]
struct UpdateArguments {
    stretch: StretchArgument,
    mask: MaskArgument,
    constants: AdamWConstants,
    factor: *const c_void,
    gradients: *const c_void,
    values: *mut c_void,
    first_moments: *mut c_void,
    second_moments: *mut c_void,
    half: *mut c_void,
}

#[repr(C)]
struct CollectArguments {
    gradient: *const c_void,
    place: *mut c_void,
    count: i64,
    adds: c_int,
}

#[repr(C)]
struct SquaresArguments {
    stretch: StretchArgument,
    mask: MaskArgument,
    gradients: *const c_void,
    sums: *mut c_void,
}

#[repr(C)]
struct MaskArguments {
    stretch: StretchArgument,
    mask: MaskArgument,
    values: *mut c_void,
}

/// Takes an AdamW step with the gradients of a stretch times its mask and `factor`, a float32 number `[1]`. `values` and
/// `gradients` are the whole stretch, `[length]`, the moments those of what is chosen of it. `half` is a copy of the values in
/// bfloat16, which is kept up to date.
///
/// # Errors
/// Fails if the tensors do not belong together, or if the GPU has no compiler for kernels.
pub fn update(
    stretch: Stretch,
    constants: AdamWConstants,
    factor: &Tensor,
    gradients: &Tensor,
    values: &Tensor,
    [first_moments, second_moments]: [&Tensor; 2],
    half: Option<&Tensor>,
) -> Result<()> {
    let count = stretch.count(gradients);
    let fit = values.numel() == gradients.numel()
        && [first_moments, second_moments].iter().all(|moments| moments.numel() == count)
        && factor.numel() == 1;
    fitting(fit, &[factor, gradients, values, first_moments, second_moments], Kind::Float)?;
    if let Some(half) = half {
        fitting(half.numel() == values.numel() && half.device() == values.device(), &[half], Kind::BFloat16)?;
    }
    let arguments = UpdateArguments {
        stretch: stretch.argument(gradients)?,
        mask: stretch.mask_argument(),
        constants,
        factor: factor.data_ptr(),
        gradients: gradients.data_ptr(),
        values: values.data_ptr(),
        first_moments: first_moments.data_ptr(),
        second_moments: second_moments.data_ptr(),
        half: half.map_or(null_mut(), Tensor::data_ptr),
    };
    // More blocks than a GPU has room for: 1.07 times as fast as threads that go on to the next numbers, on an H100.
    let blocks = count.div_ceil(4 * THREADS).max(1);
    // SAFETY: all tensors are of the kernel's types and lengths, on one device.
    unsafe { launch(c"update", gradients.device(), blocks, arguments) }
}

/// Returns the sum of squares of the gradients of a stretch times its mask, as sums of parts `[parts]` in float64.
///
/// # Errors
/// As for [`update`].
pub fn sums_of_squares(stretch: Stretch, gradients: &Tensor) -> Result<Tensor> {
    fitting(true, &[gradients], Kind::Float)?;
    let blocks = blocks(stretch.count(gradients));
    let sums = Tensor::f_empty([(blocks * THREADS) as i64], (Kind::Double, gradients.device()))?;
    let arguments = SquaresArguments {
        stretch: stretch.argument(gradients)?,
        mask: stretch.mask_argument(),
        gradients: gradients.data_ptr(),
        sums: sums.data_ptr(),
    };
    // SAFETY: as in `update`; each thread has a sum.
    unsafe { launch(c"squares", gradients.device(), blocks, arguments) }?;
    Ok(sums)
}

/// Multiplies the numbers of a stretch by its mask, in place.
///
/// # Errors
/// As for [`update`].
pub fn mask_in_place(stretch: Stretch, values: &Tensor) -> Result<()> {
    fitting(stretch.chosen.is_none(), &[values], Kind::Float)?;
    let arguments = MaskArguments {
        stretch: stretch.argument(values)?,
        mask: stretch.mask_argument(),
        values: values.data_ptr(),
    };
    // SAFETY: as in `update`.
    unsafe { launch(c"mask", values.device(), blocks(values.numel()), arguments) }
}

/// Returns whether [`collect`] takes a gradient: one in bfloat16 that begins where four numbers may be read at a time.
pub fn collects(gradient: &Tensor) -> bool {
    gradient.kind() == Kind::BFloat16 && is_aligned(gradient, 4 * size_of::<u16>())
}

/// Puts a gradient for which [`collects`] holds, `[count]`, to its place of a float32 buffer, or adds it to what is there.
///
/// # Errors
/// As for [`update`].
pub fn collect(gradient: &Tensor, place: &Tensor, adds: bool) -> Result<()> {
    let count = gradient.numel();
    let aligned = collects(gradient) && is_aligned(place, 4 * size_of::<f32>());
    fitting(count == place.numel() && aligned && gradient.device() == place.device(), &[place], Kind::Float)?;
    fitting(true, &[gradient], Kind::BFloat16)?;
    let arguments = CollectArguments {
        gradient: gradient.data_ptr(),
        place: place.data_ptr(),
        count: count as i64,
        adds: adds.into(),
    };
    // SAFETY: as in `update`, and both begin where four numbers may be read at a time.
    unsafe { launch(c"collect", gradient.device(), blocks(count), arguments) }
}

pub(super) fn is_aligned(tensor: &Tensor, bytes: usize) -> bool {
    tensor.data_ptr().addr().is_multiple_of(bytes)
}

impl Stretch<'_> {
    /// Counts the numbers that a kernel works on, of a stretch of the same length as a tensor.
    fn count(&self, stretch: &Tensor) -> usize {
        self.chosen.map_or(stretch.numel(), Chosen::count)
    }

    fn argument(&self, stretch: &Tensor) -> Result<StretchArgument> {
        if let Some(places) = self.chosen.map(Chosen::places) {
            fitting(places.device() == stretch.device(), &[places], Kind::Int)?;
        }
        let (members, groups) = match self.chosen {
            Some(Chosen::Members(members)) => (members.data_ptr().cast_const(), null()),
            Some(Chosen::Groups(groups)) => (null(), groups.data_ptr().cast_const()),
            None => (null(), null()),
        };
        Ok(StretchArgument {
            first_group: self.first_group as i64,
            length: stretch.numel() as i64,
            count: self.count(stretch) as i64,
            members,
            groups,
        })
    }

    fn mask_argument(&self) -> MaskArgument {
        match self.mask {
            Some(RandomMask { key, limit, scale }) => MaskArgument { key, limit, scale, draws: 1 },
            None => MaskArgument { key: [0; 2], limit: 0, scale: 1.0, draws: 0 },
        }
    }
}

/// Refuses tensors that a kernel would misread.
pub(super) fn fitting(fit: bool, tensors: &[&Tensor], kind: Kind) -> Result<()> {
    let device = tensors[0].device();
    let alike = |tensor: &&Tensor| {
        tensor.kind() == kind && tensor.device() == device && tensor.is_contiguous() && tensor.dim() <= 1
    };
    if fit && tensors.iter().all(alike) {
        return Ok(());
    }
    Err(Error::Libtorch("the tensors of a kernel do not belong together".into()))
}

/// Returns the blocks of threads for so many numbers, four a thread.
pub(super) fn blocks(count: usize) -> usize {
    count.div_ceil(4 * THREADS).clamp(1, MOST_BLOCKS)
}

/// Starts a kernel in the order of the device's work.
///
/// # Safety
/// `arguments` must be the struct of the kernel, and what it points to live, on the device, and as long as it says.
pub(super) unsafe fn launch<T>(name: &CStr, device: Device, blocks: usize, arguments: T) -> Result<()> {
    // SAFETY: the caller's word.
    unsafe { launch_blocks(name, device, [blocks, THREADS], arguments) }
}

/// Starts a kernel as [`launch`] does, in blocks of so many threads.
///
/// # Safety
/// As for [`launch`].
pub(super) unsafe fn launch_blocks<T>(
    name: &CStr,
    device: Device,
    [blocks, threads]: [usize; 2],
    mut arguments: T,
) -> Result<()> {
    let index = match device {
        Device::Cuda(index) => index as c_int,
        _ => -1,
    };
    let arguments: *mut T = &mut arguments;
    // SAFETY: strings and arguments live during the call, which copies the arguments; the rest is the caller's word.
    ffi::check(unsafe {
        ffi::child_tuning_launch(
            index,
            SOURCE.as_ptr(),
            name.as_ptr(),
            blocks as u32,
            threads as u32,
            arguments.cast(),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_collected_as_libtorch_converts_them() {
        tch::manual_seed(1);
        for count in [1, 3, 4, 1001] {
            let gradient = Tensor::randn([count], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
            let place = Tensor::full([count], 0.5, (Kind::Float, Device::Cpu));
            collect(&gradient, &place, true).unwrap();
            assert_eq!(place, gradient.to_kind(Kind::Float) + 0.5);
            collect(&gradient, &place, false).unwrap();
            assert_eq!(place, gradient.to_kind(Kind::Float));
        }
        let gradient = Tensor::zeros([9], (Kind::BFloat16, Device::Cpu));
        assert!(collects(&gradient) && !collects(&gradient.narrow(0, 1, 8)));
    }

    #[test]
    fn tensors_that_do_not_belong_together_are_refused() {
        let floats = |count: i64| Tensor::zeros([count], (Kind::Float, Device::Cpu));
        let stretch = Stretch { first_group: 0, chosen: None, mask: None };
        assert!(mask_in_place(stretch, &floats(100)).is_ok());
        assert!(mask_in_place(stretch, &floats(100).to_kind(Kind::Double)).is_err());
        assert!(mask_in_place(stretch, &floats(100).slice(0, 0, 100, 2)).is_err());
        let places = Tensor::arange(10, (Kind::Int64, Device::Cpu));
        let members = Chosen::Members(places.shallow_clone());
        assert!(sums_of_squares(Stretch { chosen: Some(&members), ..stretch }, &floats(100)).is_err());
        let members = Chosen::Members(places.to_kind(Kind::Int));
        let stretch = Stretch { chosen: Some(&members), ..stretch };
        let sums = sums_of_squares(stretch, &(floats(100) + 2.0)).unwrap();
        assert_eq!(f64::try_from(sums.sum(Kind::Double)).unwrap(), 40.0);
    }
}
