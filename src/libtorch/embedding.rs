//! Looking entries up in a table, and rows that are added up by the entry they stand for.

use std::ffi::c_void;

use tch::{Kind, Tensor};

use super::gradient_place::{GradientPlace, Operand};
use super::kernels::{fitting, launch};
use super::own_backward::with_backward;
use crate::error::{Error, Result};

/// The most blocks that go over the rows; each takes what it needs of them.
const MOST_BLOCKS: usize = 8192;

/// As in `rows.cu`.
#[repr(C)]
struct EntriesArguments {
    gradient: *const c_void,
    entries: *const c_void,
    rows: i64,
    width: i64,
    sums: *mut c_void,
    is_first: *mut c_void,
    table: *mut c_void,
}

#[repr(C)]
struct PartEntriesArguments {
    numbers: *const c_void,
    entries: *const c_void,
    rows: i64,
    width: i64,
    ends: *const c_void,
    sums: *mut c_void,
}

/// Looks `entries`, `[rows]` int64, up in a table `[entries, width]` in float32: `[rows, width]`, with a gradient
/// (`torch.nn.functional.embedding`). That of a table with a place is added up there, row after row, so that its bits are the same each
/// time; libtorch sorts rows first, and makes a table of its own that is then copied.
///
/// # Errors
/// Fails if an entry is out of range, or if the GPU has no compiler for kernels.
pub fn embedding(table: Operand, entries: &Tensor) -> Result<Tensor> {
    let look_up = |table: &Tensor, sparse| Tensor::f_embedding(table, entries, -1, false, sparse);
    let Some(place) = table.place.filter(|_| table.values.requires_grad()) else {
        // On the CPU a gradient of the rows that are used, not of the table: filling that with zeros takes longer than all
        // else. On a GPU rows would be added up in any order.
        return Ok(look_up(table.values, !table.values.device().is_cuda())?);
    };
    let (place, entries) = (place.shallow_clone(), entries.shallow_clone());
    let output = look_up(&table.values.f_detach()?, false)?;
    with_backward(output, &[table.values], move |gradient| {
        add_to_place(&gradient.f_contiguous()?, &entries, &place)?;
        Ok(vec![Tensor::new()])
    })
}

/// Adds rows to the place of a table's gradient; the first to come there fills it with zeros before.
fn add_to_place(rows: &Tensor, entries: &Tensor, place: &GradientPlace) -> Result<()> {
    if !place.claim() {
        let _ = place.numbers().shallow_clone().f_zero_()?;
    }
    add_to_entries(rows, entries, place.numbers())
}

/// Adds rows `[rows, width]` in float32 to a table of `[entries, width]` numbers, each to its entry, `[rows]` int64: always in one
/// order, where libtorch's `index_add` on a GPU takes rows as they come.
///
/// # Errors
/// Fails if the tensors do not belong together, or if the GPU has no compiler for kernels.
pub fn add_to_entries(rows: &Tensor, entries: &Tensor, table: &Tensor) -> Result<()> {
    let (count, width) = (rows.size()[0], checked_width(rows, entries)?);
    let (entries, flat) = (entries.f_contiguous()?, table.f_view([-1])?);
    fitting(flat.numel() as i64 % width == 0 && flat.device() == rows.device(), &[&flat], Kind::Float)?;
    let sums = rows.f_empty_like()?;
    let is_first = Tensor::f_empty([count], (Kind::Int, rows.device()))?;
    let arguments = || EntriesArguments {
        gradient: rows.data_ptr(),
        entries: entries.data_ptr(),
        rows: count,
        width,
        sums: sums.data_ptr(),
        is_first: is_first.data_ptr(),
        table: flat.data_ptr(),
    };
    for kernel in [c"entries_of_chunks", c"entries_of_table"] {
        // SAFETY: all are as long and of the type that is said, on one device; the entries have been looked up in the table, so they
        // are there.
        unsafe { launch(kernel, rows.device(), blocks_of(count), arguments()) }?;
    }
    Ok(())
}

/// Adds up rows `[rows, width]` in float32 that stand for the same entry, `[rows]` int64, within parts whose ends `ends` names,
/// `[parts]` int64 in ascending order up to the number of rows: `[rows, width]`, each sum at the first row of its entry in its part, and
/// zeros at the others.
///
/// # Errors
/// As for [`add_to_entries`].
pub fn sums_of_entries(rows: &Tensor, entries: &Tensor, ends: &Tensor) -> Result<Tensor> {
    let (count, width) = (rows.size()[0], checked_width(rows, entries)?);
    let entries = entries.f_contiguous()?;
    fitting(ends.device() == rows.device(), &[ends], Kind::Int64)?;
    let sums = rows.f_empty_like()?;
    let arguments = PartEntriesArguments {
        numbers: rows.data_ptr(),
        entries: entries.data_ptr(),
        rows: count,
        width,
        ends: ends.data_ptr(),
        sums: sums.data_ptr(),
    };
    // SAFETY: as above; the last part ends with the rows by the caller's word, which `Examples` keeps.
    unsafe { launch(c"entries_of_parts", rows.device(), blocks_of(count), arguments) }?;
    Ok(sums)
}

/// Returns the width of rows, each of which stands for an entry.
fn checked_width(rows: &Tensor, entries: &Tensor) -> Result<i64> {
    let device = rows.device();
    let alike = |tensor: &Tensor, kind: Kind| tensor.kind() == kind && tensor.device() == device;
    match rows.size()[..] {
        [count, width]
            if width > 0
                && entries.numel() as i64 == count
                && alike(rows, Kind::Float)
                && rows.is_contiguous()
                && alike(entries, Kind::Int64) =>
        {
            Ok(width)
        }
        _ => Err(Error::Libtorch("the rows of a table do not belong together".into())),
    }
}

/// A block is a row's.
fn blocks_of(rows: i64) -> usize {
    (rows as usize).clamp(1, MOST_BLOCKS)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Entries that come once, often, and never; in one chunk and in several; in two passes.
    #[test]
    fn a_table_gets_the_gradient_that_libtorch_gives() {
        tch::manual_seed(1);
        for (rows, count, width) in
            [(1i64, 3i64, 5i64), (128, 2, 8), (300, 2, 16), (1000, 400, 12), (40_000, 3, 2)]
        {
            let options = (Kind::Float, Device::Cpu);
            let table = Tensor::randn([count, width], options).set_requires_grad(true);
            let entries = Tensor::randint(count, [rows], (Kind::Int64, Device::Cpu));
            let factors = Tensor::randn([rows, width], options);
            let expected =
                Tensor::embedding_dense_backward(&factors.to_kind(Kind::Double), &entries, count, -1, false);
            let place = GradientPlace::new(Tensor::full([count * width], 9.0, options));
            for pass in 1..=2 {
                let output = embedding(Operand { values: &table, place: Some(&place) }, &entries).unwrap();
                assert_eq!(output, table.index_select(0, &entries));
                (output * &factors).sum(Kind::Float).backward();
                let difference =
                    (place.numbers().view([count, width]) / f64::from(pass) - &expected).abs().max();
                assert!(
                    f64::try_from(difference).unwrap() < 2e-4 * (rows as f64 / count as f64).sqrt().max(1.0)
                );
            }
            assert!(place.holds() && !table.grad().defined());
        }
    }
    /// Parts with entries that come once and often; parts without rows; and nothing of one part in another.
    #[test]
    fn rows_of_an_entry_are_added_up_within_their_part() {
        tch::manual_seed(1);
        for (ends, count, width) in
            [(vec![1i64], 3i64, 5i64), (vec![4, 4, 300, 301], 2, 300), (vec![0, 70, 200], 50, 1030)]
        {
            let rows = *ends.last().unwrap();
            let entries = Tensor::randint(count, [rows], (Kind::Int64, Device::Cpu));
            let numbers = Tensor::randn([rows, width], (Kind::Float, Device::Cpu));
            let found = sums_of_entries(&numbers, &entries, &Tensor::from_slice(&ends)).unwrap();
            let (mut start, entry_of) = (0, Vec::<i64>::try_from(&entries).unwrap());
            for end in ends {
                for row in start..end {
                    let part = &entry_of[start as usize..end as usize];
                    let is_first = !entry_of[start as usize..row as usize].contains(&entry_of[row as usize]);
                    let own = (part.iter().zip(start..))
                        .filter(|(entry, _)| is_first && **entry == entry_of[row as usize])
                        .fold(Tensor::zeros([width], (Kind::Double, Device::Cpu)), |sum, (_, other)| {
                            sum + numbers.get(other)
                        });
                    let difference = (found.get(row) - own).abs().max();
                    assert!(f64::try_from(difference).unwrap() < 1e-4, "{row} of {count}");
                }
                start = end;
            }
        }
        let rows = Tensor::zeros([3, 2], (Kind::Float, Device::Cpu));
        let ends = Tensor::from_slice(&[3i64]);
        assert!(sums_of_entries(&rows, &Tensor::from_slice(&[0i64, 1]), &ends).is_err());
    }
}
