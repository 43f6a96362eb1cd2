//! The weights in a model folder, in whichever format and number of files they lie there: named tensors, read as data,
//! block by block from memory maps.

mod bytes;
mod file;
mod formats;
mod pickle;
mod safetensors;
mod shards;
mod state_dict;
mod stored_tensor;
mod torch_archive;
mod torch_file;
mod torch_globals;
mod torch_legacy;

pub(crate) use formats::FORMATS;
pub use formats::Weights;
pub(crate) use shards::shard_names;
pub use stored_tensor::{ElementType, StoredTensor};
