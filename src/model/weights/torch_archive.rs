//! What `torch.save` has written since torch 1.6: a ZIP archive with the pickle `*/data.pkl` and, as they are, the storages
//! `*/data/0` and so on.
//!
//! The archive's directory is read here and not by a general crate: all that counts is where entries lie that nothing has
//! compressed, and how much memory a directory takes must not depend on what it says about itself.

use std::collections::HashMap;
use std::ops::Range;

use super::bytes::Bytes;
use super::file::WeightsFile;
use super::pickle::Pickle;
use super::state_dict;
use super::stored_tensor::StoredTensor;
use super::torch_file::LONGEST_PICKLE;
use super::torch_legacy::BIG_ENDIAN;
use crate::error::Result;
use crate::spelling::quoted;

/// The longest directory that is read; one of a thousand tensors has some hundred kilobytes.
const LONGEST_DIRECTORY: u64 = 16 << 20;
/// Bytes of the record that ends an archive, without a comment, which torch does not write.
const END: u64 = 22;
/// Bytes of the record before it in archives that may be larger than 4 GiB, and the end of what it leads to.
const LOCATOR: u64 = 20;
const WIDE_END: u64 = 56;
/// Bytes of the header before each entry, without its name and further fields.
const HEADER: u64 = 30;

/// Reads the names and places of the tensors.
///
/// # Errors
/// Fails if the archive is damaged, compressed, not one of torch.save, written on a machine with the highest byte first,
/// or its pickle asks for anything but tensors.
pub(super) fn read_table(file: &WeightsFile) -> Result<Vec<(String, StoredTensor)>> {
    let entries = entries(file)?;
    let mut pickles = entries.keys().filter_map(|name| name.strip_suffix("data.pkl"));
    let folder = match (pickles.next(), pickles.next()) {
        (Some(folder), None) => folder,
        (None, _) => {
            return Err(file.fault(
                "is a ZIP archive, but not of torch.save: it has no data.pkl; save the model with save_pretrained",
            ));
        }
        _ => return Err(file.fault("holds more than one data.pkl; save the model with save_pretrained")),
    };
    if let Some(order) = entries.get(&format!("{folder}byteorder"))
        && *file.map(order.start..order.end.min(order.start + 16))? != *b"little"
    {
        return Err(file.fault(BIG_ENDIAN));
    }
    let pickle = entries[&format!("{folder}data.pkl")].clone();
    if pickle.end - pickle.start > LONGEST_PICKLE {
        return Err(
            file.fault(format!("has a data.pkl of more than {LONGEST_PICKLE} bytes; it is no state_dict"))
        );
    }
    let bytes = file.map(pickle)?;
    let tensors = Pickle::read(&bytes).and_then(|pickle| {
        state_dict::tensors(&pickle, |storage| {
            let bytes = entries.get(&format!("{folder}data/{}", storage.key));
            let bytes = bytes.filter(|bytes| storage.size() == Some(bytes.end - bytes.start));
            bytes.cloned().ok_or_else(|| {
                format!("has a storage {} that is missing or of another size", quoted(storage.key))
            })
        })
    });
    tensors.map_err(|error| file.fault(error))
}

/// Returns the bytes of every entry, by name.
fn entries(file: &WeightsFile) -> Result<HashMap<String, Range<u64>>> {
    let damaged =
        |what: &str| file.fault(format!("is a damaged ZIP archive: {what}; download or save it again"));
    let (count, directory) = directory(file)?.ok_or_else(|| damaged("its directory is cut off"))?;
    if directory.end - directory.start > LONGEST_DIRECTORY {
        return Err(damaged("its directory is longer than that of any model"));
    }
    let bytes = file.map(directory.clone())?;
    let mut bytes = Bytes::new(&bytes);
    let mut entries = HashMap::new();
    for _ in 0..count {
        let entry = Entry::read(&mut bytes).ok_or_else(|| damaged("its directory is cut off"))?;
        let name = quoted(&entry.name);
        if entry.method != 0 || entry.flags & 1 != 0 || entry.packed_size != entry.size {
            return Err(file.fault(format!(
                "holds {name} compressed or encrypted, which torch.save does not do; save the model with save_pretrained"
            )));
        }
        let place = place(file, &entry, directory.start)?;
        let place = place.ok_or_else(|| damaged(&format!("{name} does not lie before its directory")))?;
        if entries.insert(entry.name, place).is_some() {
            return Err(damaged(&format!("{name} is there twice")));
        }
    }
    let mut places: Vec<_> = entries.values().filter(|place| !place.is_empty()).collect();
    places.sort_by_key(|place| place.start);
    match places.is_sorted_by(|before, after| before.end <= after.start) {
        true => Ok(entries),
        false => Err(damaged("its entries overlap")),
    }
}

/// Finds the directory: the number of its entries, and its bytes. Nothing if the archive is cut off.
fn directory(file: &WeightsFile) -> Result<Option<(u64, Range<u64>)>> {
    let Some(end) = file.length().checked_sub(END) else { return Ok(None) };
    let Some((mut count, mut size, mut start)) = end_record(&file.map(end..file.length())?) else {
        return Ok(None);
    };
    let mut limit = end;
    if count == u64::from(u16::MAX) || size == u64::from(u32::MAX) || start == u64::from(u32::MAX) {
        let Some(locator) = end.checked_sub(LOCATOR) else { return Ok(None) };
        let place = wide_end_place(&file.map(locator..end)?);
        let Some((place, after)) = place.and_then(|place| Some((place, place.checked_add(WIDE_END)?))) else {
            return Ok(None);
        };
        if after > locator {
            return Ok(None);
        }
        let Some(record) = wide_end_record(&file.map(place..after)?) else { return Ok(None) };
        (count, size, start) = record;
        limit = place;
    }
    let after = start.checked_add(size).filter(|&after| after <= limit);
    Ok(after.map(|after| (count, start..after)))
}

fn end_record(record: &[u8]) -> Option<(u64, u64, u64)> {
    let mut bytes = Bytes::new(record);
    (bytes.take(4)? == b"PK\x05\x06").then_some(())?;
    bytes.take(6)?;
    Some((bytes.u16()?.into(), bytes.u32()?.into(), bytes.u32()?.into()))
}

fn wide_end_place(record: &[u8]) -> Option<u64> {
    let mut bytes = Bytes::new(record);
    (bytes.take(8)? == b"PK\x06\x07\0\0\0\0").then(|| bytes.u64())?
}

fn wide_end_record(record: &[u8]) -> Option<(u64, u64, u64)> {
    let mut bytes = Bytes::new(record);
    (bytes.take(4)? == b"PK\x06\x06").then_some(())?;
    bytes.take(28)?;
    Some((bytes.u64()?, bytes.u64()?, bytes.u64()?))
}

/// An entry of the directory.
struct Entry {
    name: String,
    flags: u16,
    method: u16,
    packed_size: u64,
    size: u64,
    header: u64,
}

impl Entry {
    fn read(bytes: &mut Bytes) -> Option<Self> {
        (bytes.take(4)? == b"PK\x01\x02").then_some(())?;
        bytes.take(4)?;
        let (flags, method) = (bytes.u16()?, bytes.u16()?);
        bytes.take(8)?;
        let (packed_size, size) = (bytes.u32()?, bytes.u32()?);
        let (name, further, comment) = (bytes.u16()?, bytes.u16()?, bytes.u16()?);
        bytes.take(8)?;
        let mut numbers = [size, packed_size, bytes.u32()?].map(u64::from);
        let name = String::from_utf8_lossy(bytes.take(name.into())?).into_owned();
        let mut fields = Bytes::new(bytes.take(further.into())?);
        bytes.take(comment.into())?;
        // A field of type 1 holds, in this order, the numbers for which four bytes are too few.
        let mut wide = numbers.iter_mut().filter(|number| **number == u64::from(u32::MAX)).peekable();
        while wide.peek().is_some() {
            let (kind, length) = (fields.u16()?, fields.u16()?);
            let mut field = Bytes::new(fields.take(length.into())?);
            if kind == 1 {
                for number in wide.by_ref() {
                    *number = field.u64()?;
                }
            }
        }
        let [size, packed_size, header] = numbers;
        Some(Self { name, flags, method, packed_size, size, header })
    }
}

/// Finds the bytes of an entry behind its header. Nothing if they do not lie before the directory.
fn place(file: &WeightsFile, entry: &Entry, directory: u64) -> Result<Option<Range<u64>>> {
    let Some(after) = entry.header.checked_add(HEADER).filter(|&after| after <= directory) else {
        return Ok(None);
    };
    let header = file.map(entry.header..after)?;
    let start = header_length(&header).map(|further| after + further);
    let end = start.and_then(|start| start.checked_add(entry.size)).filter(|&end| end <= directory);
    Ok(start.zip(end).map(|(start, end)| start..end))
}

fn header_length(header: &[u8]) -> Option<u64> {
    let mut bytes = Bytes::new(header);
    (bytes.take(4)? == b"PK\x03\x04").then_some(())?;
    bytes.take(22)?;
    Some(u64::from(bytes.u16()?) + u64::from(bytes.u16()?))
}
