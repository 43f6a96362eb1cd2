//! Looking entries up in a table, whose gradient goes to its place.

use std::ffi::c_void;

use tch::{Kind, Tensor};

use super::gradient_place::{GradientPlace, Operand};
use super::kernels::launch;
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
        add_entries(&gradient.f_contiguous()?, &entries, &place)?;
        Ok(vec![Tensor::new()])
    })
}

/// Adds rows `[rows, width]` to the place of a table's gradient, each to its entry; the first to come there fills the others with zeros.
fn add_entries(gradient: &Tensor, entries: &Tensor, place: &GradientPlace) -> Result<()> {
    let (&[rows, width], device) = (&gradient.size()[..], gradient.device()) else { return Err(misfit()) };
    let (entries, table) = (entries.f_contiguous()?, place.numbers());
    let kinds = [(gradient, Kind::Float), (&entries, Kind::Int64), (table, Kind::Float)];
    let alike = kinds
        .iter()
        .all(|(tensor, kind)| tensor.kind() == *kind && tensor.device() == device && tensor.is_contiguous());
    if !alike || entries.numel() as i64 != rows || width == 0 || table.numel() as i64 % width != 0 {
        return Err(misfit());
    }
    if !place.claim() {
        let _ = table.shallow_clone().f_zero_()?;
    }
    let sums = gradient.f_empty_like()?;
    let is_first = Tensor::f_empty([rows], (Kind::Int, device))?;
    let arguments = || EntriesArguments {
        gradient: gradient.data_ptr(),
        entries: entries.data_ptr(),
        rows,
        width,
        sums: sums.data_ptr(),
        is_first: is_first.data_ptr(),
        table: table.data_ptr(),
    };
    let blocks = (rows as usize).clamp(1, MOST_BLOCKS);
    for kernel in [c"entries_of_chunks", c"entries_of_table"] {
        // SAFETY: all are as long and of the type that is said, on one device; forward has looked the entries up, so they are in
        // the table.
        unsafe { launch(kernel, device, blocks, arguments()) }?;
    }
    Ok(())
}

fn misfit() -> Error {
    Error::Libtorch("the rows of a table do not belong together".into())
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
}
