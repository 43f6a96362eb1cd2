//! Child networks on disk: a safetensors file with one packed bit a weight and what is needed to trust it.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::network::ChildNetwork;
use crate::error::{Error, Result};
use crate::model::publish;

/// Identifies the format, so that another safetensors file is not taken for a mask.
const FORMAT: &str = "child-tuning mask 1";

/// Writes a child network: for each tensor that the mask reaches a `uint8` tensor with its bits (element 0 in the lowest
/// bit of byte 0), and as metadata the format, the hash, the shapes and whatever the caller adds.
///
/// # Errors
/// Fails if the file cannot be written.
pub fn write_mask(path: &Path, child: &ChildNetwork, about: &[(&str, String)]) -> Result<()> {
    let unwritable = |error: safetensors::SafeTensorError| {
        Error::Environment(format!("cannot write {}: {error}", path.display()))
    };
    let packed: Vec<Vec<u8>> = child.tensors().iter().map(|tensor| child.packed_bits(tensor)).collect();
    let views = child.tensors().iter().zip(&packed).map(|(tensor, bytes)| {
        Ok((tensor.name.as_str(), TensorView::new(Dtype::U8, vec![bytes.len()], bytes)?))
    });
    let views = views.collect::<Result<Vec<_>, _>>().map_err(unwritable)?;
    let mut metadata: HashMap<String, String> =
        about.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    metadata.insert("format".into(), FORMAT.into());
    metadata.insert("sha256".into(), child.sha256());
    for tensor in child.tensors() {
        metadata.insert(format!("shape/{}", tensor.name), format!("{:?}", tensor.shape));
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    // Written beside and renamed, so that a crash leaves no half mask under the real name.
    let temporary = path.with_extension("partial");
    safetensors::serialize_to_file(views, Some(metadata), &temporary).map_err(unwritable)?;
    publish(&temporary, path)
}

/// What a mask file holds, without the model it belongs to.
pub struct MaskFile {
    /// The metadata: format, hash, and what the writer added.
    pub about: HashMap<String, String>,
    /// Name, number of elements and packed bits of each tensor.
    pub tensors: Vec<(String, Vec<i64>, Vec<u8>)>,
}

impl MaskFile {
    /// Returns the number of elements that a tensor's bits keep.
    pub fn kept(bits: &[u8]) -> usize {
        bits.iter().map(|byte| byte.count_ones() as usize).sum()
    }
}

/// Reads a mask file.
///
/// # Errors
/// Fails if the file is missing, damaged or no mask.
pub fn read_mask(path: &Path) -> Result<MaskFile> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let damaged =
        |reason: String| Error::model(path, format!("is not a mask written by this program ({reason})"));
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| damaged(error.to_string()))?;
    let about = header.metadata().clone().unwrap_or_default();
    if about.get("format").map(String::as_str) != Some(FORMAT) {
        return Err(damaged(format!("its format is not `{FORMAT}`")));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|error| damaged(error.to_string()))?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        let shape: Vec<i64> = about
            .get(&format!("shape/{name}"))
            .and_then(|text| serde_json::from_str(text).ok())
            .ok_or_else(|| damaged(format!("{name} has no shape")))?;
        if view.data().len() as i64 != (shape.iter().product::<i64>() + 7) / 8 {
            return Err(damaged(format!("{name} has the wrong number of bits")));
        }
        tensors.push((name.to_owned(), shape, view.data().to_vec()));
    }
    tensors.sort();
    Ok(MaskFile { about, tensors })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::child::{MaskScope, Threshold};
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable, Parameters};

    #[test]
    fn a_mask_survives_the_file_and_foreign_files_are_refused() {
        let mut table = ParameterTable::default();
        table.declare("first", &[3, 7], ParameterKind::Weight, ParameterPlace::Head);
        table.declare("second", &[70], ParameterKind::Bias, ParameterPlace::Head);
        let parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        let scores = Tensor::rand([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu));
        let child =
            ChildNetwork::from_scores(&parameters, &scores, 0.4, MaskScope::All, Threshold::PerTensor)
                .unwrap();

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("masks/mask.safetensors");
        write_mask(&path, &child, &[("task", "rte".into())]).unwrap();
        let file = read_mask(&path).unwrap();
        assert_eq!((file.about["task"].as_str(), &file.about["sha256"]), ("rte", &child.sha256()));
        // round(0.4 · 21) and 0.4 · 70.
        let kept: Vec<usize> = file.tensors.iter().map(|(_, _, bits)| MaskFile::kept(bits)).collect();
        assert_eq!(kept, [8, 28]);
        for (tensor, (name, shape, bits)) in child.tensors().iter().zip(&file.tensors) {
            assert_eq!((&tensor.name, &tensor.shape), (name, shape));
            let unpacked: Vec<bool> =
                (0..tensor.count).map(|bit| bits[bit / 8] >> (bit % 8) & 1 == 1).collect();
            assert_eq!(unpacked, child.bits(tensor).collect::<Vec<_>>());
        }

        std::fs::write(&path, b"no mask").unwrap();
        assert!(read_mask(&path).is_err());
    }
}
