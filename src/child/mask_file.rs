//! Child networks on disk: a safetensors file with one packed bit a weight and what is needed to trust it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::network::{ChildNetwork, MaskScope};
use crate::error::{Error, Result};
use crate::model::{Parameters, publish};

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
#[derive(Debug)]
pub struct MaskFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// The metadata: format, hash, and what the writer added.
    pub about: HashMap<String, String>,
    /// Name, shape and packed bits of each tensor, in the order of the names.
    pub tensors: Vec<(String, Vec<i64>, Vec<u8>)>,
}

impl MaskFile {
    /// Returns the number of elements that a tensor's bits keep.
    pub fn kept(bits: &[u8]) -> usize {
        bits.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    /// Returns the hash over the mask that its writer noted.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn sha256(&self) -> Result<&str> {
        let sha256 = self.about.get("sha256");
        sha256.map(String::as_str).ok_or_else(|| Error::model(&self.path, "has no `sha256` in its metadata"))
    }

    /// Makes the child network of a model that the mask describes.
    ///
    /// # Errors
    /// Fails, naming the file and a tensor, if the mask is one of another model, or its bits are not those that its hash was
    /// taken of.
    pub fn child_network(&self, parameters: &Parameters) -> Result<ChildNetwork> {
        let shapes = |parameters: &Parameters, scope: MaskScope| {
            let covered = parameters.iter().filter(move |(_, parameter)| scope.covers(parameter));
            let mut shapes: Vec<_> =
                covered.map(|(_, parameter)| (parameter.name.clone(), parameter.shape.clone())).collect();
            shapes.sort();
            shapes
        };
        let own: Vec<_> = self.tensors.iter().map(|(name, shape, _)| (name.clone(), shape.clone())).collect();
        let scope = MaskScope::ALL.into_iter().find(|&scope| shapes(parameters, scope) == own);
        let Some(scope) = scope else {
            let all = shapes(parameters, MaskScope::All);
            let foreign = own.iter().find(|tensor| !all.contains(tensor));
            return Err(Error::model(
                &self.path,
                match foreign {
                    Some((name, shape)) => {
                        format!("is a mask of another model: this one has no {name} of shape {shape:?}")
                    }
                    None => "leaves out tensors of every `mask.scope` of this model".into(),
                },
            ));
        };
        let mut child = ChildNetwork::full(parameters, scope)?;
        for index in 0..child.tensors().len() {
            let name = child.tensors()[index].name.as_str();
            let found = self.tensors.binary_search_by(|(other, ..)| other.as_str().cmp(name));
            if let Ok(place) = found {
                child.set_words(index, |words| {
                    for (word, bytes) in words.iter_mut().zip(self.tensors[place].2.chunks(8)) {
                        *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
                    }
                    Ok(())
                })?;
            }
        }
        if child.sha256() != self.sha256()? {
            return Err(Error::model(
                &self.path,
                "is damaged: its bits do not have the `sha256` of its metadata",
            ));
        }
        Ok(child)
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
    Ok(MaskFile { path: path.to_path_buf(), about, tensors })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::child::{Cut, MaskScope, Threshold, random_scores};
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable, Parameters};

    fn parameters(second: i64) -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("second", &[second], ParameterKind::Bias, ParameterPlace::EncoderLayer(1));
        table.declare("first", &[3, 7], ParameterKind::Embedding, ParameterPlace::Embeddings);
        table.declare("head", &[5], ParameterKind::Bias, ParameterPlace::Head);
        Parameters::allocate(table, Device::Cpu).unwrap()
    }

    #[test]
    fn a_mask_survives_the_file_and_foreign_files_are_refused() {
        let parameters = parameters(70);
        let scores = Tensor::rand([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu));
        let child = ChildNetwork::from_scores(
            &parameters,
            &scores,
            &Cut::highest(0.4, MaskScope::Backbone, Threshold::PerTensor),
        )
        .unwrap();

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("masks/mask.safetensors");
        write_mask(&path, &child, &[("task", "rte".into())]).unwrap();
        let file = read_mask(&path).unwrap();
        assert_eq!((file.about["task"].as_str(), &file.about["sha256"]), ("rte", &child.sha256()));
        // round(0.4 · 21) and 0.4 · 70.
        let kept: Vec<usize> = file.tensors.iter().map(|(_, _, bits)| MaskFile::kept(bits)).collect();
        assert_eq!(kept, [8, 28]);
        let read = file.child_network(&parameters).unwrap();
        assert_eq!((read.scope(), read.tensors()), (MaskScope::Backbone, child.tensors()));
        for tensor in child.tensors() {
            assert!(read.bits(tensor).eq(child.bits(tensor)), "{}", tensor.name);
        }

        std::fs::write(&path, b"no mask").unwrap();
        assert!(read_mask(&path).is_err());
    }

    #[test]
    fn a_mask_of_another_model_or_with_other_bits_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mask.safetensors");
        let scores = random_scores(parameters(70).buffer_len(), 1);
        let cut = Cut::highest(0.4, MaskScope::Backbone, Threshold::Global);
        let child = ChildNetwork::from_scores(&parameters(70), &scores, &cut).unwrap();
        write_mask(&path, &child, &[]).unwrap();
        let mut file = read_mask(&path).unwrap();
        let refused = |file: &MaskFile, parameters: &Parameters| {
            let message = file.child_network(parameters).unwrap_err().to_string();
            assert!(message.contains("mask.safetensors"), "{message}");
            message
        };
        assert!(refused(&file, &parameters(71)).contains("no second of shape [70]"));
        file.tensors[1].2[0] ^= 1;
        assert!(refused(&file, &parameters(70)).contains("is damaged"));
        file.tensors.remove(1);
        assert!(refused(&file, &parameters(70)).contains("leaves out tensors"));
    }
}
