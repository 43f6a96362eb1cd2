//! From what a pickle holds to a table of tensors.

use std::collections::HashSet;
use std::ops::Range;

use super::pickle::{Pickle, Value};
use super::stored_tensor::StoredTensor;
use super::torch_globals::Storage;
use crate::spelling::quoted;

/// Returns the tensors of a `state_dict`, by name. `locate` finds the bytes of a storage in the file.
///
/// # Errors
/// Says what is wrong, as a fragment to follow the file's name: the pickle holds something other than tensors by name, a
/// name twice, a storage that `locate` does not find, or a tensor that does not lie within its storage.
pub(super) fn tensors(
    pickle: &Pickle,
    locate: impl Fn(&Storage) -> Result<Range<u64>, String>,
) -> Result<Vec<(String, StoredTensor)>, String> {
    let Value::Dictionary { entries, .. } = pickle.root() else {
        return Err(
            "holds no state_dict, that is, tensors by name; save the model with save_pretrained".into()
        );
    };
    let (mut tensors, mut names) = (Vec::with_capacity(entries.len()), HashSet::new());
    for &(key, value) in entries {
        let Value::Text(name) = pickle.get(key) else {
            return Err("holds a tensor without a name; save the model with save_pretrained".into());
        };
        let Value::Tensor(tensor) = pickle.get(value) else {
            return Err(format!(
                "holds {}, which is no tensor; save the model with save_pretrained",
                quoted(name)
            ));
        };
        if !names.insert(name) {
            return Err(format!("holds tensor {} twice; download or save it again", quoted(name)));
        }
        let Value::Storage(storage) = pickle.get(tensor.storage) else {
            return Err(format!("has no storage for tensor {}", quoted(name)));
        };
        let placed = locate(storage).and_then(|bytes| {
            let (shape, strides) = (tensor.shape.clone(), Some(&tensor.strides[..]));
            StoredTensor::place(storage.element.clone(), shape, strides, tensor.offset, bytes)
        });
        let placed = placed.map_err(|error| {
            format!("is damaged: tensor {} {error}; download or save it again", quoted(name))
        })?;
        tensors.push(((*name).to_owned(), placed));
    }
    Ok(tensors)
}
