//! The formats that weights are read from, and the weights of a folder whatever their format.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::file::WeightsFile;
use super::stored_tensor::StoredTensor;
use super::{safetensors, shards, torch_file};
use crate::error::{Error, Result};
use crate::spelling::quoted;
use crate::values::hexadecimal;

/// A format of weights.
pub(crate) struct Format {
    /// The name of the file, if it is one.
    pub file: &'static str,
    /// The name of the file that names the shards, if there are several.
    pub index: &'static str,
    /// Reads the table of tensors of a file.
    read: ReadTable,
}

/// Reads the names and places of the tensors in a file, each name once.
pub(super) type ReadTable = fn(&WeightsFile) -> Result<Vec<(String, StoredTensor)>>;

/// The formats, in the order in which transformers prefers them. A new one is a file beside this one and a line here.
pub(crate) const FORMATS: &[Format] = &[
    Format {
        file: "model.safetensors",
        index: "model.safetensors.index.json",
        read: safetensors::read_table,
    },
    Format { file: "pytorch_model.bin", index: "pytorch_model.bin.index.json", read: torch_file::read_table },
];

/// The longest name of a tensor, in bytes; those of models have some dozens.
const LONGEST_NAME: usize = 1000;

/// The weights in a model folder: open files, and the places of the named tensors in them.
pub struct Weights {
    path: PathBuf,
    /// In the order of their names.
    files: Vec<WeightsFile>,
    tensors: BTreeMap<String, (usize, StoredTensor)>,
}

impl Weights {
    /// Opens the weights in a folder: the first there is of `model.safetensors`, the shards that
    /// `model.safetensors.index.json` names, `pytorch_model.bin`, the shards that `pytorch_model.bin.index.json` names.
    /// The tensors themselves are not read yet.
    ///
    /// # Errors
    /// Fails, naming file and mend, if there is none of them or what there is is damaged, incomplete or contradicts
    /// itself; and if a pickle asks for anything but tensors, of which nothing is ever executed.
    pub fn open(folder: &Path) -> Result<Self> {
        for format in FORMATS {
            let (file, index) = (folder.join(format.file), folder.join(format.index));
            if file.symlink_metadata().is_ok() {
                return Self::of(file.clone(), vec![WeightsFile::open(&file)?], format.read);
            }
            if index.symlink_metadata().is_ok() {
                return Self::of_shards(index, format.read);
            }
        }
        let names: Vec<_> = FORMATS.iter().flat_map(|format| [format.file, format.index]).collect();
        Err(Error::model(
            folder,
            format!("has no weights: looked for {}; save the model with save_pretrained", names.join(", ")),
        ))
    }

    fn of_shards(index: PathBuf, read: ReadTable) -> Result<Self> {
        let mut shards = shards::open(&index)?;
        let weights = Self::of(index, std::mem::take(&mut shards.files), read)?;
        let place = |name: &str| weights.tensors.get(name).map(|(file, _)| weights.files[*file].path());
        match shards.misplaced(place) {
            None => Ok(weights),
            Some((tensor, shard)) => Err(Error::model(
                &weights.path,
                format!(
                    "says that {shard} holds tensor {}, which it does not; the files do not belong together, download \
                     them again",
                    quoted(tensor)
                ),
            )),
        }
    }

    fn of(path: PathBuf, files: Vec<WeightsFile>, read: ReadTable) -> Result<Self> {
        let mut tensors = BTreeMap::<String, (usize, StoredTensor)>::new();
        for (number, file) in files.iter().enumerate() {
            for (name, tensor) in read(file)? {
                // So that every later message may print it.
                if name.len() > LONGEST_NAME || name.contains(char::is_control) {
                    return Err(file.fault(format!(
                        "holds a tensor with the impossible name {}; download or save it again",
                        quoted(&name)
                    )));
                }
                if let Some((other, _)) = tensors.get(&name) {
                    return Err(file.fault(format!(
                        "holds tensor {}, as {} does; the files do not belong together, download them again",
                        quoted(&name),
                        files[*other].path().display()
                    )));
                }
                tensors.insert(name, (number, tensor));
            }
        }
        Ok(Self { path, files, tensors })
    }

    /// Returns the path of the file, or of the index of the shards.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Iterates over the names of the tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Looks a tensor up.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name).map(|(_, tensor)| tensor)
    }

    /// Reads a tensor as float32, on the CPU and in its shape.
    ///
    /// # Errors
    /// As for [`Weights::copy`].
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let (_, tensor) = self.find(name)?;
        let values = Tensor::f_zeros([tensor.count() as i64], (Kind::Float, Device::Cpu))?;
        self.copy(name, &values)?;
        Ok(values.f_view(tensor.shape.as_slice())?)
    }

    /// Copies a tensor as float32 to the elements of another one, `[count]` on any device.
    ///
    /// # Errors
    /// Fails if there is none of the name, its elements are of no floating type, or any of them is NaN or infinite.
    pub fn copy(&self, name: &str, target: &Tensor) -> Result<()> {
        let (file, tensor) = self.find(name)?;
        tensor.copy_to(name, file, target)
    }

    fn find(&self, name: &str) -> Result<(&WeightsFile, &StoredTensor)> {
        let found = self.tensors.get(name).map(|(file, tensor)| (&self.files[*file], tensor));
        found.ok_or_else(|| Error::model(&self.path, format!("has no tensor {name}")))
    }

    /// Returns the SHA-256 of the weights, in hexadecimal: that of the file; of shards, that of their bytes one file
    /// after the other in the order of their names, as `cat model-*.safetensors | sha256sum` has it.
    ///
    /// # Errors
    /// Fails if a file cannot be mapped.
    pub fn sha256(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for file in &self.files {
            file.hash(&mut hash)?;
        }
        Ok(hexadecimal(&hash.finalize()))
    }
}
