//! Kernels of our own (`kernels.cu`) over stretches of flat float32 buffers: on a GPU, where they are compiled when one is first
//! used, or thread by thread on the CPU, where tests run them.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::{null, null_mut};

use tch::{Device, Kind, Tensor};

use super::ffi;
use crate::error::{Error, Result};

/// Compiled by the first kernel that is started on a GPU.
const SOURCE: &CStr = match CStr::from_bytes_with_nul(
    concat!(include_str!("kernels.cu"), include_str!("rows.cu"), "\0").as_bytes(),
) {
    Ok(source) => source,
    Err(_) => panic!("the kernels have a zero byte"),
};
pub(super) const THREADS: usize = 256;
/// Threads that run together.
const WARP: usize = 32;
/// Rows are summed in parts, by threads of their own: in so many that all of a large GPU's processors have some, and so few that
/// adding the parts up is no work.
const PARTS_OF_COLUMNS: [usize; 2] = [64, 128];
/// Sums of four columns that a GPU is busy with.
const SUMS_AT_A_TIME: usize = 32_768;
/// The most blocks of threads that a kernel is started with; each thread takes what it needs of the numbers.
const MOST_BLOCKS: usize = 2048;

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
    /// Places in the stretch, int32; all if there are none.
    pub members: Option<&'a Tensor>,
    /// The mask on the gradients of a stretch without members.
    pub mask: Option<RandomMask>,
}

/// The constants of an AdamW step, as the update of an element uses them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AdamWConstants {
    /// What weight decay leaves of a weight before the update.
    pub decay_before: f32,
    /// The same after the update.
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
    count: i64,
    members: *const c_void,
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

/// Rows, or sums of them, that stand side by side in what is made of them, at most; as in `kernels.cu`.
pub(super) const LISTS: usize = 3;

#[repr(C)]
struct ColumnsArguments {
    numbers: [*const c_void; LISTS],
    lists: c_int,
    rows: i64,
    width: i64,
    rows_of_part: i64,
    sums: *mut c_void,
}

#[repr(C)]
struct TotalsArguments {
    sums: *const c_void,
    rows: i64,
    width: i64,
    totals: [*mut c_void; LISTS],
    adds: [c_int; LISTS],
    lists: c_int,
}

#[repr(C)]
struct LayOutArguments {
    rows: *const c_void,
    unit: c_int,
    width: i64,
    row_of_place: *const c_void,
    places: i64,
    laid_out: *mut c_void,
}

#[repr(C)]
struct PartSumsArguments {
    numbers: *const c_void,
    halves: c_int,
    factors: *const c_void,
    width: i64,
    ends: *const c_void,
    parts: i64,
    sums: *mut c_void,
}

#[repr(C)]
struct PartSquaresArguments {
    numbers: *const c_void,
    parts: i64,
    count: i64,
    sums: *mut c_void,
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
/// `gradients` are the whole stretch, `[count]`, the moments those of its members if it has any. `half` is a copy of the values in
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
    let count = stretch.members.map_or(gradients.numel(), Tensor::numel);
    let fit = values.numel() == gradients.numel()
        && [first_moments, second_moments].iter().all(|moments| moments.numel() == count)
        && factor.numel() == 1;
    fitting(fit, &[factor, gradients, values, first_moments, second_moments], Kind::Float)?;
    if let Some(half) = half {
        fitting(half.numel() == values.numel() && half.device() == values.device(), &[half], Kind::BFloat16)?;
    }
    let arguments = UpdateArguments {
        stretch: stretch.argument(count, gradients.device())?,
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
    let count = stretch.members.map_or(gradients.numel(), Tensor::numel);
    let blocks = blocks(count);
    let sums = Tensor::f_empty([(blocks * THREADS) as i64], (Kind::Double, gradients.device()))?;
    let arguments = SquaresArguments {
        stretch: stretch.argument(count, gradients.device())?,
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
    fitting(stretch.members.is_none(), &[values], Kind::Float)?;
    let arguments = MaskArguments {
        stretch: stretch.argument(values.numel(), values.device())?,
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

/// Returns whether rows in bfloat16 are stored so that kernels read four numbers of one at a time.
pub(super) fn has_rows_of_fours(rows: &Tensor) -> bool {
    let of_fours = rows.dim() == 2 && rows.size()[1] % 4 == 0 && rows.size()[0] > 0;
    of_fours
        && rows.kind() == Kind::BFloat16
        && rows.is_contiguous()
        && is_aligned(rows, 4 * size_of::<u16>())
}

/// How many of the rows a thread adds up that sums four columns, where they are cut into so many parts at most.
pub(super) fn rows_of_part(rows: i64, width: i64, [fewest, most]: [usize; 2]) -> i64 {
    let parts = (4 * SUMS_AT_A_TIME / width.max(1) as usize).clamp(fewest, most);
    (rows as usize).div_ceil(parts) as i64
}

/// Sums the columns of parts of rows in bfloat16, at most three lists of one shape, `[rows, width]`, for which
/// [`has_rows_of_fours`] holds: `[parts, lists · width]` in float32, for [`totals`].
///
/// # Errors
/// As for [`update`].
pub(super) fn column_sums(lists: &[&Tensor]) -> Result<Tensor> {
    let alike = |rows: &&Tensor| has_rows_of_fours(rows) && rows.size() == lists[0].size();
    if !(1..=LISTS).contains(&lists.len()) || !lists.iter().all(alike) {
        return Err(Error::Libtorch("these rows have no column sums".into()));
    }
    let (count, width, device) = (lists[0].size()[0], lists[0].size()[1], lists[0].device());
    let rows_of_part = rows_of_part(count, width, PARTS_OF_COLUMNS);
    let parts = (count as usize).div_ceil(rows_of_part as usize) as i64;
    let sums = Tensor::f_empty([parts, lists.len() as i64 * width], (Kind::Float, device))?;
    let arguments = ColumnsArguments {
        numbers: std::array::from_fn(|list| {
            lists.get(list).map_or(null(), |rows| rows.data_ptr().cast_const())
        }),
        lists: lists.len() as c_int,
        rows: count,
        width,
        rows_of_part,
        sums: sums.data_ptr(),
    };
    // SAFETY: as in `update`: `columns` writes all sums, which begin where allocations do.
    unsafe { launch(c"columns", device, blocks(sums.numel()), arguments) }?;
    Ok(sums)
}

/// Where a list of sums goes, `[width]` in float32.
pub(super) struct Total {
    pub numbers: Tensor,
    /// Whether to add to what is there.
    pub adds: bool,
}

/// Adds up rows of sums, of which each holds at most three lists side by side, `[rows, lists · width]` in float32; a list without
/// a target is left out.
///
/// # Errors
/// As for [`update`].
pub(super) fn totals(sums: &Tensor, targets: &[Option<Total>]) -> Result<()> {
    let (rows, lists) = (sums.size()[0], targets.len());
    let width = sums.size()[1] / lists as i64;
    let own: Vec<&Tensor> = targets.iter().flatten().map(|total| &total.numbers).collect();
    if own.is_empty() {
        return Ok(());
    }
    let fit = lists <= LISTS
        && width * lists as i64 == sums.size()[1]
        && own.iter().all(|numbers| numbers.numel() == width as usize);
    let flat = sums.f_view([-1])?;
    fitting(fit, &own.into_iter().chain([&flat]).collect::<Vec<_>>(), Kind::Float)?;
    let target = |list: usize| targets.get(list).and_then(Option::as_ref);
    let arguments = TotalsArguments {
        sums: sums.data_ptr(),
        rows,
        width,
        totals: std::array::from_fn(|list| target(list).map_or(null_mut(), |total| total.numbers.data_ptr())),
        adds: std::array::from_fn(|list| target(list).is_some_and(|total| total.adds).into()),
        lists: lists as c_int,
    };
    let blocks = (lists * width as usize).div_ceil(WARP).clamp(1, MOST_BLOCKS);
    // SAFETY: as in `update`.
    unsafe { launch(c"totals", sums.device(), blocks, arguments) }
}

/// Puts rows `[rows, width]`, of any type, to places, `[places, width]`: `row_of_place` names the row of each, int64, and is below
/// zero where there is none, which gets zeros.
///
/// # Errors
/// As for [`update`].
pub fn lay_out(rows: &Tensor, row_of_place: &Tensor) -> Result<Tensor> {
    let (rows, places) = (rows.f_contiguous()?, row_of_place.size()[0]);
    fitting(rows.dim() == 2 && row_of_place.device() == rows.device(), &[row_of_place], Kind::Int64)?;
    let laid_out = Tensor::f_empty([places, rows.size()[1]], (rows.kind(), rows.device()))?;
    let bytes = rows.size()[1] as usize * rows.kind().elt_size_in_bytes();
    let fits = |unit: &usize| bytes.is_multiple_of(*unit) && is_aligned(&rows, *unit);
    let Some(unit) = [8, 4, 2].into_iter().find(fits) else {
        return Err(Error::Libtorch("rows of single bytes are not laid out".into()));
    };
    let arguments = LayOutArguments {
        rows: rows.data_ptr(),
        unit: unit as c_int,
        width: (bytes / unit) as i64,
        row_of_place: row_of_place.data_ptr(),
        places,
        laid_out: laid_out.data_ptr(),
    };
    let blocks = blocks(4 * places as usize * bytes / unit);
    // SAFETY: as in `update`; the rows are there by the caller's word, which `Examples` keeps.
    unsafe { launch(c"lay_out", rows.device(), blocks, arguments) }?;
    Ok(laid_out)
}

/// Sums rows `[rows, width]` in float32 or bfloat16, each number times its factor if there are `factors` in float32, over parts
/// whose ends `ends` names, `[parts]` int64 in ascending order and no more than there are rows: `[parts, width]` in float32.
///
/// # Errors
/// As for [`update`].
pub fn sums_of_parts(rows: &Tensor, factors: Option<&Tensor>, ends: &Tensor) -> Result<Tensor> {
    let (width, parts) = (rows.size()[1], ends.size()[0]);
    let sums = Tensor::f_empty([parts, width], (Kind::Float, rows.device()))?;
    let flat = rows.f_flatten(0, -1)?;
    let factors = factors.map(|factors| factors.f_flatten(0, -1)).transpose()?;
    let kind = if rows.kind() == Kind::BFloat16 { Kind::BFloat16 } else { Kind::Float };
    fitting(ends.device() == rows.device(), &[&flat], kind)?;
    if let Some(factors) = &factors {
        fitting(
            factors.numel() == flat.numel() && factors.device() == flat.device(),
            &[factors],
            Kind::Float,
        )?;
    }
    fitting(true, &[ends], Kind::Int64)?;
    let arguments = PartSumsArguments {
        numbers: flat.data_ptr(),
        halves: (kind == Kind::BFloat16).into(),
        factors: factors.as_ref().map_or(null(), |factors| factors.data_ptr().cast_const()),
        width,
        ends: ends.data_ptr(),
        parts,
        sums: sums.data_ptr(),
    };
    // SAFETY: as in `update`; the rows of each part are there by the caller's word, which `Examples` keeps.
    unsafe { launch(c"part_sums", rows.device(), blocks(4 * (parts * width) as usize), arguments) }?;
    Ok(sums)
}

/// Adds the squares of numbers of several parts, `[parts, ...]`, to sums of the shape `[...]`, part by part.
///
/// # Errors
/// As for [`update`].
pub fn add_squares_of_parts(numbers: &Tensor, sums: &Tensor) -> Result<()> {
    let (numbers, sums) = (numbers.f_flatten(0, -1)?, sums.f_view([-1])?);
    let count = sums.numel();
    fitting(numbers.numel().is_multiple_of(count.max(1)), &[&numbers, &sums], Kind::Float)?;
    let arguments = PartSquaresArguments {
        numbers: numbers.data_ptr(),
        parts: (numbers.numel() / count.max(1)) as i64,
        count: count as i64,
        sums: sums.data_ptr(),
    };
    // SAFETY: as in `update`.
    unsafe { launch(c"part_squares", sums.device(), blocks(4 * count), arguments) }
}

pub(super) fn is_aligned(tensor: &Tensor, bytes: usize) -> bool {
    tensor.data_ptr().addr().is_multiple_of(bytes)
}

impl Stretch<'_> {
    fn argument(&self, count: usize, device: Device) -> Result<StretchArgument> {
        if let Some(members) = self.members {
            fitting(members.device() == device, &[members], Kind::Int)?;
        }
        Ok(StretchArgument {
            first_group: self.first_group as i64,
            count: count as i64,
            members: self.members.map_or(null(), |members| members.data_ptr().cast_const()),
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
fn fitting(fit: bool, tensors: &[&Tensor], kind: Kind) -> Result<()> {
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
    fn halves_are_collected_and_summed_as_libtorch_does() {
        tch::manual_seed(1);
        for (rows, width) in [(1, 4), (63, 8), (200, 12), (1000, 64)] {
            let numbers = Tensor::randn([rows, width], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
            let exact = numbers.to_kind(Kind::Double).sum_dim_intlist(0, false, Kind::Double);
            let sums = column_sums(&[&numbers]).unwrap();
            let found = Tensor::full([width], 0.5, (Kind::Float, Device::Cpu));
            for adds in [false, true] {
                totals(&sums, &[Some(Total { numbers: found.shallow_clone(), adds })]).unwrap();
                let times = if adds { 2.0 } else { 1.0 };
                let difference = (found.to_kind(Kind::Double) - &exact * times).abs().max();
                assert!(f64::try_from(difference).unwrap() < 1e-3, "{rows} {width}");
            }
        }
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
    fn rows_are_laid_out_with_zeros_between_whatever_their_type() {
        let places = Tensor::from_slice(&[2i64, -1, 0, 0, -1, 1]);
        for (kind, width) in [
            (Kind::Float, 4),
            (Kind::Float, 3),
            (Kind::BFloat16, 3),
            (Kind::BFloat16, 2),
            (Kind::BFloat16, 8),
            (Kind::Int64, 5),
        ] {
            let rows =
                Tensor::arange(3 * width, (Kind::Int64, Device::Cpu)).view([3, width]).to_kind(kind) + 1;
            let expected =
                rows.index_select(0, &places.clamp_min(0)) * places.ge(0).unsqueeze(1).to_kind(kind);
            assert_eq!(lay_out(&rows, &places).unwrap(), expected, "{kind:?} {width}");
        }
        let bytes = Tensor::zeros([3, 5], (Kind::Uint8, Device::Cpu));
        assert!(lay_out(&bytes, &places).is_err());
    }

    #[test]
    fn tensors_that_do_not_belong_together_are_refused() {
        let floats = |count: i64| Tensor::zeros([count], (Kind::Float, Device::Cpu));
        let stretch = Stretch { first_group: 0, members: None, mask: None };
        assert!(mask_in_place(stretch, &floats(100)).is_ok());
        assert!(mask_in_place(stretch, &floats(100).to_kind(Kind::Double)).is_err());
        assert!(mask_in_place(stretch, &floats(100).slice(0, 0, 100, 2)).is_err());
        let places = Tensor::arange(10, (Kind::Int64, Device::Cpu));
        assert!(sums_of_squares(Stretch { members: Some(&places), ..stretch }, &floats(100)).is_err());
        let places = places.to_kind(Kind::Int);
        let sums =
            sums_of_squares(Stretch { members: Some(&places), ..stretch }, &(floats(100) + 2.0)).unwrap();
        assert_eq!(f64::try_from(sums.sum(Kind::Double)).unwrap(), 40.0);
    }
}
