//! Sums over rows of activations and gradients, by kernels of our own (`kernels.cu`).

use std::ffi::{c_int, c_void};
use std::ptr::{null, null_mut};

use tch::{Kind, Tensor};

use super::kernels::{MOST_BLOCKS, blocks, fitting, is_aligned, launch};
use crate::error::{Error, Result};

/// Threads that run together.
const WARP: usize = 32;
/// Rows are summed in parts, by threads of their own: in so many that all of a large GPU's processors have some, and so few that
/// adding the parts up is no work.
const PARTS_OF_COLUMNS: [usize; 2] = [64, 128];
/// Sums of four columns that a GPU is busy with.
const SUMS_AT_A_TIME: usize = 32_768;

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
/// As for [`lay_out`].
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
    // SAFETY: as in `kernels::update`: `columns` writes all sums, which begin where allocations do.
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
/// As for [`lay_out`].
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
    // SAFETY: as in `kernels::update`.
    unsafe { launch(c"totals", sums.device(), blocks, arguments) }
}

/// Puts rows `[rows, width]`, of any type, to places, `[places, width]`: `row_of_place` names the row of each, int64, and is below
/// zero where there is none, which gets zeros.
///
/// # Errors
/// Fails if the tensors do not belong together, or if the GPU has no compiler for kernels.
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
    // SAFETY: as in `kernels::update`; the rows are there by the caller's word, which `Examples` keeps.
    unsafe { launch(c"lay_out", rows.device(), blocks, arguments) }?;
    Ok(laid_out)
}

/// Sums rows `[rows, width]` in float32 or bfloat16, each number times its factor if there are `factors` in float32, over parts
/// whose ends `ends` names, `[parts]` int64 in ascending order and no more than there are rows: `[parts, width]` in float32.
///
/// # Errors
/// As for [`lay_out`].
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
    // SAFETY: as in `kernels::update`; the rows of each part are there by the caller's word, which `Examples` keeps.
    unsafe { launch(c"part_sums", rows.device(), blocks(4 * (parts * width) as usize), arguments) }?;
    Ok(sums)
}

/// Adds the squares of numbers of several parts, `[parts, ...]`, to sums of the shape `[...]`, part by part.
///
/// # Errors
/// As for [`lay_out`].
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
    // SAFETY: as in `kernels::update`.
    unsafe { launch(c"part_squares", sums.device(), blocks(4 * count), arguments) }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn columns_are_summed_and_added_to_what_is_there() {
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
}
