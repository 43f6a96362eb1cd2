//! Memory as Rust slices: the elements of a tensor, the bytes of a mapped file.

use std::fs::File;
use std::ops::Range;

use half::bf16;
use memmap2::{Mmap, MmapOptions};
use tch::{Device, Kind, Tensor};

use super::ffi;
use crate::error::{Error, Result};

/// A type of Rust that the elements of a tensor have in memory. (The trait of tch takes bfloat16 for float16.)
pub trait Element: Copy {
    /// What libtorch calls it.
    const KIND: Kind;
}

macro_rules! elements_are {
    ($($rust:ty = $kind:ident),*) => {
        $(impl Element for $rust {
            const KIND: Kind = Kind::$kind;
        })*
    };
}
elements_are!(bool = Bool, u8 = Uint8, i64 = Int64, bf16 = BFloat16, f32 = Float, f64 = Double);

/// Borrows the elements of a contiguous CPU tensor, in row-major order.
///
/// # Errors
/// Fails if the tensor is elsewhere, of another type, or not contiguous.
pub fn elements<T: Element>(tensor: &Tensor) -> Result<&[T]> {
    let (pointer, count) = view::<T>(tensor)?;
    // SAFETY: `view` checked type, place and layout; the borrow of the tensor keeps the memory alive.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// Borrows the elements of a contiguous CPU tensor for writing, in row-major order.
///
/// Tensors share memory freely, so libtorch must not compute with this memory while the slice is in use; with the
/// exclusive borrow of the handle this holds as long as no other thread works on a view of it.
///
/// # Errors
/// Fails if the tensor is elsewhere, of another type, or not contiguous.
pub fn elements_mut<T: Element>(tensor: &mut Tensor) -> Result<&mut [T]> {
    let (pointer, count) = view::<T>(tensor)?;
    // SAFETY: as in `elements`, and the exclusive borrow of the handle covers the writing.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, count) })
}

/// Maps the bytes `range` of a file for reading. They must be there, and the file must not be cut shorter while it is
/// mapped; checkpoints are written once.
///
/// # Errors
/// Fails if the operating system cannot map the file.
pub fn map_file(file: &File, range: Range<u64>) -> std::io::Result<Mmap> {
    let length = usize::try_from(range.end.saturating_sub(range.start)).map_err(std::io::Error::other)?;
    // SAFETY: the bytes are only read; a checkpoint that another process truncates meanwhile would end this process
    // with SIGBUS, as it does in every program that maps weights, and is accepted for not copying gigabytes.
    unsafe { MmapOptions::new().offset(range.start).len(length).map(file) }
}

/// Copies numbers to a device, `[count]`. The host does not wait for a GPU: the copy takes its place among the work
/// that the GPU has still to do, as every operation does.
///
/// # Errors
/// Fails if libtorch cannot allocate.
pub fn upload<T: tch::kind::Element>(values: &[T], device: Device) -> Result<Tensor> {
    let mut host = Tensor::from_slice(values);
    let Device::Cuda(index) = device else { return Ok(host.f_to_device(device)?) };
    let mut copy = std::ptr::null_mut();
    // SAFETY: `host` is a live tensor, and `copy` is valid for writing during the call.
    ffi::check(unsafe { ffi::child_tuning_upload(host.as_mut_ptr(), index as i32, &mut copy) })?;
    // SAFETY: the shim wrote a new tensor, which this handle owns.
    Ok(unsafe { Tensor::from_ptr(copy) })
}

fn view<T: Element>(tensor: &Tensor) -> Result<(*mut T, usize)> {
    if tensor.device() != Device::Cpu || tensor.kind() != T::KIND || !tensor.is_contiguous() {
        return Err(Error::Libtorch(format!(
            "a contiguous {:?} tensor on the CPU was expected, not {:?} on {:?}",
            T::KIND,
            tensor.kind(),
            tensor.device()
        )));
    }
    let count = tensor.numel();
    // An empty tensor may have a null pointer, which no slice may have.
    let pointer =
        if count == 0 { std::ptr::NonNull::<T>::dangling().as_ptr() } else { tensor.data_ptr().cast::<T>() };
    Ok((pointer, count))
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn slices_show_and_change_the_tensor() {
        let mut tensor = Tensor::from_slice(&[1.0f32, 2.0, 3.0]);
        elements_mut::<f32>(&mut tensor).unwrap()[1] = 5.0;
        assert_eq!(elements::<f32>(&tensor).unwrap(), [1.0, 5.0, 3.0]);
        assert!(elements::<f64>(&tensor).is_err());
        assert!(elements::<f32>(&tensor.reshape([3, 1]).expand([3, 2], false)).is_err());
        assert_eq!(elements::<f32>(&Tensor::zeros([0], (Kind::Float, Device::Cpu))).unwrap(), [0.0f32; 0]);
    }
}
