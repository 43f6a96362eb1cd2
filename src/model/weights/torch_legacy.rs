//! What `torch.save` wrote before torch 1.6: pickles, one after the other, and then the storages.

use std::collections::HashMap;
use std::ops::Range;

use super::file::WeightsFile;
use super::pickle::{Pickle, Value};
use super::state_dict;
use super::stored_tensor::StoredTensor;
use super::torch_file::LONGEST_PICKLE;
use super::torch_globals::Storage;
use crate::error::Result;
use crate::spelling::quoted;

/// The pickle that such a file begins with: a number that stands for the form.
pub(super) const BEGINNING: [u8; 15] =
    [0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];

/// The version of the form.
const VERSION: i64 = 1001;

/// Reads the names and places of the tensors.
///
/// # Errors
/// Fails if the file is damaged, was written on a machine with the highest byte first, or asks for anything but tensors.
pub(super) fn read_table(file: &WeightsFile) -> Result<Vec<(String, StoredTensor)>> {
    // The rest, storages included; only the pages of the pickles are read.
    let bytes = file.map(0..file.length())?;
    let pickles =
        Pickles { bytes: &bytes[..bytes.len().min(LONGEST_PICKLE as usize)], next: BEGINNING.len() };
    let read = |mut pickles: Pickles| -> Result<_, String> {
        let version = pickles.read()?;
        if !matches!(version.root(), Value::Integer(VERSION)) {
            return Err(format!(
                "is not of version {VERSION} of its form; save the model with save_pretrained"
            ));
        }
        check_byte_order(&pickles.read()?)?;
        let state_dict = pickles.read()?;
        let keys = pickles.read()?;
        let storages = locate(&bytes, pickles.next, &state_dict, &keys)?;
        state_dict::tensors(&state_dict, |storage| {
            let bytes =
                storages.get(storage.key).filter(|bytes| storage.size() == Some(bytes.end - bytes.start));
            bytes.cloned().ok_or_else(|| format!("has a storage {} of another size", quoted(storage.key)))
        })
    };
    read(pickles).map_err(|error| file.fault(error))
}

struct Pickles<'a> {
    bytes: &'a [u8],
    next: usize,
}

impl<'a> Pickles<'a> {
    fn read(&mut self) -> Result<Pickle<'a>, String> {
        let pickle = Pickle::read(&self.bytes[self.next..])?;
        self.next += pickle.length;
        Ok(pickle)
    }
}

fn check_byte_order(machine: &Pickle) -> Result<(), String> {
    let Value::Dictionary { entries, .. } = machine.root() else {
        return Err("does not say what machine wrote it; download or save it again".into());
    };
    let little = entries.iter().any(|&(key, value)| {
        matches!((machine.get(key), machine.get(value)), (Value::Text("little_endian"), Value::Bool(true)))
    });
    if little { Ok(()) } else { Err(BIG_ENDIAN.into()) }
}

/// What is wrong with files of rare machines, in both forms.
pub(super) const BIG_ENDIAN: &str = "was written on a machine with the highest byte first; load it in Python and save the model with save_pretrained";

/// Finds the storages, which lie behind the pickles in the order of `keys`, each after its number of elements.
fn locate<'a>(
    bytes: &[u8],
    mut next: usize,
    state_dict: &Pickle<'a>,
    keys: &Pickle<'a>,
) -> Result<HashMap<&'a str, Range<u64>>, String> {
    let Value::List(keys_in_order) = keys.root() else {
        return Err("does not list its storages; download or save it again".into());
    };
    let known: HashMap<&str, &Storage> =
        state_dict.storages().map(|storage| (storage.key, storage)).collect();
    let mut places = HashMap::new();
    for &key in keys_in_order {
        let Value::Text(key) = keys.get(key) else {
            return Err("lists a storage without a name; download or save it again".into());
        };
        let damaged =
            |what: &str| format!("has a storage {} that {what}; download or save it again", quoted(key));
        let storage = known.get(key).ok_or_else(|| damaged("no tensor refers to"))?;
        let count =
            bytes.get(next..).and_then(|rest| rest.first_chunk()).map(|&count| u64::from_le_bytes(count));
        let count = count.ok_or_else(|| damaged("is cut off"))?;
        let start = next as u64 + 8;
        let end = count.checked_mul(storage.element.width).and_then(|size| start.checked_add(size));
        let end = end.filter(|&end| end <= bytes.len() as u64).ok_or_else(|| damaged("is cut off"))?;
        next = end as usize;
        if places.insert(*key, start..end).is_some() {
            return Err(damaged("is there twice"));
        }
    }
    Ok(places)
}
