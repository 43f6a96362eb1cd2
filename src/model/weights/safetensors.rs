//! The table of tensors at the beginning of a safetensors file.

use safetensors::tensor::{Dtype, SafeTensors};
use serde::de::IgnoredAny;
use tch::Kind;

use super::file::WeightsFile;
use super::shards::Entries;
use super::stored_tensor::{ElementType, StoredTensor};
use crate::error::{Error, Result};
use crate::spelling::{excerpt, quoted};

/// The longest header that is read. A thousand tensors take some hundred kilobytes.
const LONGEST_HEADER: u64 = 16 << 20;

/// Reads the names and places of the tensors.
///
/// # Errors
/// Fails if the file is cut off, or its header is too long, is no JSON, names a tensor twice, or gives tensors places that
/// overlap, leave gaps or do not fit their shapes.
pub(super) fn read_table(file: &WeightsFile) -> Result<Vec<(String, StoredTensor)>> {
    let damaged = |error: String| {
        let error = excerpt(&error, 300);
        file.fault(format!("is not a complete safetensors file ({error}); download or save it again"))
    };
    if file.length() < 8 {
        return Err(damaged("it has no header".into()));
    }
    let length = <[u8; 8]>::try_from(&*file.map(0..8)?).map(u64::from_le_bytes).unwrap_or_default();
    if length > LONGEST_HEADER || length > file.length() - 8 {
        return Err(damaged(format!(
            "its header is to have {length} bytes, where {} are left and {LONGEST_HEADER} the most",
            file.length() - 8
        )));
    }
    // Only the pages of the header are read here.
    let whole = file.map(0..file.length())?;
    let header = &whole[8..8 + length as usize];
    let (_, metadata) = SafeTensors::read_metadata(&whole).map_err(|error| damaged(error.to_string()))?;
    // The crate takes the last of several entries with one name.
    serde_json::from_slice::<Entries<IgnoredAny>>(header).map_err(|error| damaged(error.to_string()))?;
    let data = 8 + length;
    let place = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let (start, end) = info.data_offsets;
        let shape = info.shape.iter().map(|&size| i64::try_from(size)).collect::<Result<_, _>>();
        let tensor = shape.map_err(|_| "has a size beyond all numbers".to_owned()).and_then(|shape| {
            StoredTensor::place(element(info.dtype), shape, None, 0, data + start as u64..data + end as u64)
        });
        match tensor {
            Ok(tensor) => Ok((name, tensor)),
            Err(error) => Err(damaged(format!("tensor {} {error}", quoted(&name)))),
        }
    };
    metadata.tensors().into_iter().map(place).collect::<Result<_, Error>>()
}

fn element(dtype: Dtype) -> ElementType {
    let kind = match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F64 => Some(Kind::Double),
        _ => None,
    };
    ElementType { name: format!("{dtype:?}"), width: dtype.bitsize() as u64 / 8, kind }
}
