//! Child networks on disk: a safetensors file with one packed bit a weight and what is needed to trust it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

use super::network::{ChildNetwork, MaskScope, sha256_of_mask};
use crate::error::{Error, Result};
use crate::files::write_whole;
use crate::model::{Parameter, ParameterPlace, Parameters};
use crate::spelling::{quoted, visible};

/// Identifies the format, so that another safetensors file is not taken for a mask.
const FORMAT: &str = "child-tuning mask 1";

/// Writes a child network: for each tensor that the mask reaches a `uint8` tensor with its bits (element 0 in the lowest
/// bit of byte 0), and as metadata the format, the hash, shapes and places, and whatever the caller adds. The same child network
/// makes the same bytes.
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
    let mut by_name: Vec<_> = child.tensors().iter().zip(&packed).collect();
    by_name.sort_by(|(left, _), (right, _)| left.name.cmp(&right.name));
    let by_name = by_name.iter().map(|(tensor, bits)| (tensor.name.as_str(), tensor.shape.as_slice(), bits));
    metadata.insert("sha256_by_name".into(), sha256_of_mask(by_name));
    for tensor in child.tensors() {
        metadata.insert(format!("shape/{}", tensor.name), format!("{:?}", tensor.shape));
        metadata.insert(format!("place/{}", tensor.name), tensor.place.to_string());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    let mut file = safetensors::serialize(views, Some(metadata)).map_err(unwritable)?;
    sort_header(&mut file).map_err(|error| unwritable(error.into()))?;
    write_whole(path, |temporary| std::fs::write(temporary, &file).map_err(Error::io("write", path)))
}

/// Sorts the keys of a safetensors file's header, which stand in an order of chance.
fn sort_header(file: &mut [u8]) -> serde_json::Result<()> {
    let Some((length, rest)) = file.split_first_chunk_mut() else { return Ok(()) };
    let header = &mut rest[..u64::from_le_bytes(*length) as usize];
    let entries: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_slice(header)?;
    let sorted = serde_json::to_vec(&entries)?;
    // What pads the header to its length is spaces.
    header.fill(b' ');
    header[..sorted.len()].copy_from_slice(&sorted);
    Ok(())
}

/// What a mask file holds, without the model it belongs to.
#[derive(Debug)]
pub struct MaskFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// The metadata: format, hash, and what the writer added.
    pub about: HashMap<String, String>,
    /// What it says of each tensor, in the order of the names.
    pub tensors: Vec<MaskedTensor>,
}

/// The mask of one tensor, as a file holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct MaskedTensor {
    /// The parameter's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Where in the model it stands.
    pub place: ParameterPlace,
    /// Number of elements.
    pub count: usize,
    /// A bit for each element, element 0 in the lowest bit of byte 0; unused bits are zero.
    pub bits: Vec<u8>,
}

impl MaskedTensor {
    /// Returns the number of elements in the child network.
    pub fn kept(&self) -> usize {
        self.bits.iter().map(|byte| byte.count_ones() as usize).sum()
    }
}

impl MaskFile {
    /// Returns name and shape of each tensor: those of masks of one model and scope are equal.
    pub fn shapes(&self) -> Vec<(String, Vec<i64>)> {
        self.tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect()
    }

    /// Returns the number of weights in the child network.
    pub fn kept(&self) -> usize {
        self.tensors.iter().map(MaskedTensor::kept).sum()
    }

    /// Returns the hash over the mask that its writer noted.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn sha256(&self) -> Result<&str> {
        let sha256 = self.about.get("sha256");
        sha256.map(String::as_str).ok_or_else(|| Error::model(&self.path, "has no `sha256` in its metadata"))
    }

    /// Returns the scope of a mask of a model that declares the given parameters.
    ///
    /// # Errors
    /// Fails, naming the file and a tensor, if the mask is one of another model.
    pub fn scope(&self, declared: &[Parameter]) -> Result<MaskScope> {
        let shapes = |scope: MaskScope| {
            let covered = declared.iter().filter(move |parameter| scope.covers(parameter));
            let mut shapes: Vec<_> =
                covered.map(|parameter| (parameter.name.clone(), parameter.shape.clone())).collect();
            shapes.sort();
            shapes
        };
        let own = self.shapes();
        if let Some(scope) = MaskScope::ALL.into_iter().find(|&scope| shapes(scope) == own) {
            return Ok(scope);
        }
        let all = shapes(MaskScope::All);
        let foreign = own.iter().find(|tensor| !all.contains(tensor));
        Err(Error::model(
            &self.path,
            match foreign {
                Some((name, shape)) => {
                    format!("is a mask of another model: this one has no {name} of shape {shape:?}")
                }
                None => "has other tensors than any `mask.scope` of this model (whose pooler counts only if its checkpoint has one)"
                    .into(),
            },
        ))
    }

    /// Checks that the mask is one of a model that declares the given parameters, and has the bits that its hash was taken of.
    ///
    /// # Errors
    /// Fails, naming the file, if not.
    pub fn check(&self, declared: &[Parameter]) -> Result<()> {
        let scope = self.scope(declared)?;
        let covered = declared.iter().filter(|parameter| scope.covers(parameter));
        let tensors = covered.filter_map(|parameter| self.tensor(&parameter.name));
        let tensors =
            tensors.map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice(), tensor.bits.as_slice()));
        if sha256_of_mask(tensors) == self.sha256()? {
            return Ok(());
        }
        Err(Error::model(&self.path, "is damaged: its bits do not have the `sha256` of its metadata"))
    }

    /// Makes the child network of a model that the mask describes.
    ///
    /// # Errors
    /// As for [`MaskFile::check`].
    pub fn child_network(&self, parameters: &Parameters) -> Result<ChildNetwork> {
        self.check(parameters.declared())?;
        let mut child = ChildNetwork::full(parameters, self.scope(parameters.declared())?)?;
        for index in 0..child.tensors().len() {
            if let Some(tensor) = self.tensor(&child.tensors()[index].name) {
                child.set_words(index, |words| {
                    for (word, bytes) in words.iter_mut().zip(tensor.bits.chunks(8)) {
                        *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
                    }
                    Ok(())
                })?;
            }
        }
        Ok(child)
    }

    fn tensor(&self, name: &str) -> Option<&MaskedTensor> {
        let found = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name));
        found.ok().map(|place| &self.tensors[place])
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
    let mut about = header.metadata().clone().unwrap_or_default();
    // A foreign file may hold anything, and a terminal obeys control characters.
    about.values_mut().for_each(|value| *value = visible(value));
    if about.get("format").map(String::as_str) != Some(FORMAT) {
        return Err(damaged(format!("its format is not `{FORMAT}`")));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|error| damaged(error.to_string()))?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        if name.contains(char::is_control) {
            return Err(damaged(format!("{} is no tensor's name", quoted(name))));
        }
        let shape: Vec<i64> = about
            .get(&format!("shape/{name}"))
            .and_then(|text| serde_json::from_str(text).ok())
            .ok_or_else(|| damaged(format!("{name} has no shape")))?;
        let place = about.get(&format!("place/{name}")).and_then(|text| text.parse().ok());
        let place = place.ok_or_else(|| damaged(format!("{name} has no place in the model")))?;
        let bits = view.data().to_vec();
        let count =
            shape.iter().try_fold(1usize, |count, &size| count.checked_mul(usize::try_from(size).ok()?));
        let count = count.filter(|count| count.div_ceil(8) == bits.len());
        let count = count.ok_or_else(|| damaged(format!("{name} has the wrong number of bits")))?;
        if count % 8 > 0 && bits.last().is_some_and(|last| last >> (count % 8) != 0) {
            return Err(damaged(format!("{name} has bits behind its last weight")));
        }
        tensors.push(MaskedTensor { name: name.to_owned(), shape, place, count, bits });
    }
    if tensors.is_empty() {
        return Err(damaged("it masks no tensor".into()));
    }
    tensors.sort_by(|left, right| left.name.cmp(&right.name));
    let by_name = tensors
        .iter()
        .map(|tensor: &MaskedTensor| (tensor.name.as_str(), tensor.shape.as_slice(), &tensor.bits));
    let noted = about.get("sha256_by_name");
    if noted.is_some_and(|noted| *noted != sha256_of_mask(by_name)) {
        return Err(Error::model(
            path,
            "is damaged: its bits do not have the `sha256_by_name` of its metadata",
        ));
    }
    Ok(MaskFile { path: path.to_path_buf(), about, tensors })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::child::{Cut, MaskScope, Threshold, random_scores};
    use crate::model::{ParameterKind, ParameterTable};

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
        let bytes = std::fs::read(&path).unwrap();
        write_mask(&path, &child, &[("task", "rte".into())]).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes, "the same bytes each time");
        let file = read_mask(&path).unwrap();
        assert_eq!((file.about["task"].as_str(), &file.about["sha256"]), ("rte", &child.sha256()));
        // round(0.4 · 21) and 0.4 · 70.
        let kept: Vec<usize> = file.tensors.iter().map(MaskedTensor::kept).collect();
        assert_eq!(kept, [8, 28]);
        let places: Vec<_> = file.tensors.iter().map(|tensor| tensor.place).collect();
        assert_eq!(places, [ParameterPlace::Embeddings, ParameterPlace::EncoderLayer(1)]);
        let read = file.child_network(&parameters).unwrap();
        assert_eq!((read.scope(), read.tensors()), (MaskScope::Backbone, child.tensors()));
        for tensor in child.tensors() {
            assert!(read.bits(tensor).eq(child.bits(tensor)), "{}", tensor.name);
        }

        std::fs::write(&path, b"no mask").unwrap();
        assert!(read_mask(&path).is_err());
    }

    #[test]
    fn what_no_mask_has_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mask.safetensors");
        let refusal = |shape: &str, place: &str, bits: &[u8]| {
            let about = [("format", FORMAT), ("shape/w", shape), ("place/w", place)];
            let about = about.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            let view = TensorView::new(Dtype::U8, vec![bits.len()], bits).unwrap();
            safetensors::serialize_to_file([("w", view)], Some(about), &path).unwrap();
            read_mask(&path).map_or_else(|error| error.to_string(), |_| String::new())
        };
        assert_eq!(refusal("[2, 5]", "layer 7", &[0xff, 0b11]), "");
        assert!(refusal("[2, 5]", "layer 7", &[0xff, 0b111]).contains("behind its last weight"));
        assert!(refusal("[2, 5]", "cellar", &[0xff, 0b11]).contains("no place"));
        for shape in
            ["[-2, -5]", "[2, 9]", "[4611686018427387904, 4]", "[4611686018427387904, 4611686018427387904]"]
        {
            assert!(refusal(shape, "head", &[0xff, 0b11]).contains("wrong number of bits"), "{shape}");
        }
        assert!(refusal("ten", "head", &[0xff, 0b11]).contains("no shape"));
        let about = HashMap::from([("format".to_owned(), FORMAT.to_owned())]);
        let nothing = std::iter::empty::<(&str, TensorView)>();
        safetensors::serialize_to_file(nothing, Some(about), &path).unwrap();
        assert!(read_mask(&path).unwrap_err().to_string().contains("masks no tensor"));
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
        file.tensors[1].bits[0] ^= 1;
        assert!(refused(&file, &parameters(70)).contains("is damaged"));
        file.tensors.remove(1);
        assert!(refused(&file, &parameters(70)).contains("has other tensors than any"));
    }
}
