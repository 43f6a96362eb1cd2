//! One tensor as a file holds it: where its elements lie, and how they become float32.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::file::WeightsFile;
use crate::error::Result;

/// Elements that are converted at a time, so that a conversion takes a few megabytes whatever the tensor.
const BLOCK: u64 = 1 << 18;

/// The type of the elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElementType {
    /// Its name in the format, such as `BF16` or `HalfStorage`.
    pub name: String,
    /// Bytes of an element.
    pub width: u64,
    /// Its name in libtorch, if it is one that becomes float32.
    pub kind: Option<Kind>,
}

/// A tensor in a file.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    /// Its shape.
    pub shape: Vec<i64>,
    /// The type of its elements.
    pub element: ElementType,
    /// From an element to the next along each dimension, counted in elements; `None` if the elements lie in row-major
    /// order without gaps.
    strides: Option<Vec<u64>>,
    /// Number of elements.
    count: u64,
    /// The bytes from the first element to the last.
    span: Range<u64>,
}

impl StoredTensor {
    /// Places a tensor in the bytes `storage` of a file: the first element `offset` elements after their beginning, the
    /// next along each dimension `strides` elements further; without strides in row-major order.
    ///
    /// # Errors
    /// Says what is wrong if a number is negative or too large, or an element lies outside of the bytes.
    pub(super) fn place(
        element: ElementType,
        shape: Vec<i64>,
        strides: Option<&[i64]>,
        offset: i64,
        storage: Range<u64>,
    ) -> Result<Self, String> {
        let placed = Self::checked_place(element, &shape, strides, offset, &storage);
        placed.ok_or_else(|| {
            let layout = strides.map(|strides| format!(" and strides {strides:?}")).unwrap_or_default();
            format!("has shape {shape:?}{layout} at element {offset}, which does not fit its storage")
        })
    }

    fn checked_place(
        element: ElementType,
        shape: &[i64],
        strides: Option<&[i64]>,
        offset: i64,
        storage: &Range<u64>,
    ) -> Option<Self> {
        let mut row_major = vec![1u64; shape.len()];
        let mut count = 1u64;
        for (stride, &size) in row_major.iter_mut().zip(shape).rev() {
            *stride = count;
            count = count.checked_mul(u64::try_from(size).ok()?)?;
        }
        // libtorch counts in i64.
        i64::try_from(count).ok()?;
        let strides = match strides {
            Some(strides) if strides.len() != shape.len() => return None,
            Some(strides) => {
                strides.iter().map(|&stride| u64::try_from(stride).ok()).collect::<Option<_>>()?
            }
            None => row_major.clone(),
        };
        let offset = u64::try_from(offset).ok()?;
        let steps = shape.iter().zip(&strides).try_fold(0u64, |sum, (&size, stride)| {
            sum.checked_add((size as u64).saturating_sub(1).checked_mul(*stride)?)
        })?;
        let start = storage.start.checked_add(offset.checked_mul(element.width)?)?;
        let elements = if count == 0 { 0 } else { steps.checked_add(1)? };
        let span = start..start.checked_add(elements.checked_mul(element.width)?)?;
        if span.end > storage.end {
            return None;
        }
        let lies_in_order =
            count <= 1 || (0..shape.len()).all(|axis| shape[axis] == 1 || strides[axis] == row_major[axis]);
        let strides = (!lies_in_order).then_some(strides);
        Some(Self { shape: shape.to_vec(), element, strides, count, span })
    }

    /// Returns the number of elements.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Copies the elements, in row-major order and as float32, to a tensor `[count]` on any device.
    ///
    /// Goes along the dimension whose elements lie furthest apart, some at a time, so that each part is read once and no more
    /// than it is in memory, also of a tensor that is stored transposed.
    ///
    /// # Errors
    /// Fails if they are of no floating type, or any of them is NaN or infinite.
    pub(super) fn copy_to(&self, name: &str, file: &WeightsFile, target: &Tensor) -> Result<()> {
        let kind = self.element.kind.ok_or_else(|| {
            let element = &self.element.name;
            file.fault(format!("tensor {name} has type {element}; weights must be floating point"))
        })?;
        if self.count == 0 {
            return Ok(());
        }
        let (mut shape, strides) = match &self.strides {
            Some(strides) => (self.shape.clone(), strides.clone()),
            None => (vec![self.count as i64], vec![1]),
        };
        let target = target.f_view(shape.as_slice())?;
        let furthest = (0..shape.len()).max_by_key(|&axis| if shape[axis] > 1 { strides[axis] } else { 0 });
        // A tensor without dimensions lies in order, and is one of one dimension here.
        let axis = furthest.unwrap_or_default();
        let (size, stride, width) = (shape[axis] as u64, strides[axis], self.element.width);
        let steps = |shape: &[i64]| -> u64 {
            shape.iter().zip(&strides).map(|(&size, stride)| (size as u64 - 1) * stride).sum()
        };
        shape[axis] = 1;
        // Elements that lie between the first and the last of one line, and how many there are.
        let (line_span, line_count) = (steps(&shape) + 1, self.count / size);
        let lines = (BLOCK.saturating_sub(line_span) / stride.max(1) + 1).min((BLOCK / line_count).max(1));
        let signed: Vec<i64> = strides.iter().map(|&stride| stride as i64).collect();
        for start in (0..size).step_by(lines as usize) {
            shape[axis] = lines.min(size - start) as i64;
            let (first, elements) = (self.span.start + start * stride * width, steps(&shape) + 1);
            // Mapped anew for each part, so that what was read before does not stay in memory.
            let mapped = file.map(first..first + elements * width)?;
            let part = Tensor::f_from_data_size(&mapped, &[elements as i64], kind)?;
            let part =
                part.f_as_strided(shape.as_slice(), signed.as_slice(), None)?.f_to_kind(Kind::Float)?;
            if i64::try_from(part.f_isfinite()?.f_all()?)? == 0 {
                return Err(file.fault(format!(
                    "tensor {name} holds NaN or infinite values; the checkpoint is damaged"
                )));
            }
            target.f_narrow(axis as i64, start as i64, shape[axis])?.f_copy_(&part)?;
        }
        Ok(())
    }
}
