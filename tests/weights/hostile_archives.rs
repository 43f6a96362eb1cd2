//! Files around a pickle: archives and the older form, damaged, compressed, or not of torch.

use std::io::{Cursor, Write};

use child_tuning::model::Weights;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::support::{
    archive, fixture, folder, refusal, refused_at_every_cut, saved, says, state_dict, storage, tensor, text,
};

fn refused(bytes: &[u8], parts: &[&str]) {
    let message = refusal(&[("pytorch_model.bin", bytes)]);
    says(&message, &["pytorch_model.bin: "]);
    says(&message, parts);
}

/// A good pickle of one tensor of four numbers.
fn pickle() -> Vec<u8> {
    state_dict(&[text("a"), tensor(storage("FloatStorage", "0", 4), 0, &[4], &[1])])
}

/// Changes bytes of an archive behind the first occurrence of others.
fn patched(bytes: &[u8], find: &[u8], offset: usize, patch: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let start = bytes.windows(find.len()).position(|window| window == find).unwrap() + offset;
    bytes[start..start + patch.len()].copy_from_slice(patch);
    bytes
}

#[test]
fn every_cut_of_a_file_is_refused() {
    for form in ["odd/archive.bin", "odd/legacy.bin"] {
        refused_at_every_cut("pytorch_model.bin", &fixture(form));
        refused(b"", &["neither a ZIP archive nor a pickle", "save_pretrained"]);
    }
    refused(b"not weights at all", &["neither a ZIP archive nor a pickle", "save_pretrained"]);
}

#[test]
fn archives_of_something_else_are_refused() {
    let pickle = pickle();
    refused(&archive(&[("model/readme", b"")]), &["not of torch.save", "no data.pkl"]);
    refused(&archive(&[]), &["not of torch.save"]);
    let two = archive(&[("a/data.pkl", &pickle), ("b/data.pkl", &pickle)]);
    refused(&two, &["more than one data.pkl"]);
    let big = archive(&[("a/data.pkl", &pickle), ("a/byteorder", b"big"), ("a/data/0", &[0; 16])]);
    refused(&big, &["highest byte first"]);
    let none = archive(&[("a/data.pkl", &pickle), ("a/byteorder", b""), ("a/data/0", &[0; 16])]);
    refused(&none, &["highest byte first"]);
    let elsewhere = archive(&[("a/data.pkl", &pickle), ("b/data/0", &[0; 16])]);
    refused(&elsewhere, &["storage `0` that is missing"]);
}

#[test]
fn compressed_and_encrypted_entries_are_refused() {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
    zip.start_file("model/data.pkl", options).unwrap();
    zip.write_all(&pickle()).unwrap();
    refused(
        &zip.finish().unwrap().into_inner(),
        &["`model/data.pkl` compressed or encrypted", "save_pretrained"],
    );
    let bytes = saved(&pickle(), &[0; 16]);
    // The flags in the first entry of the directory.
    refused(&patched(&bytes, b"PK\x01\x02", 8, &[1, 0]), &["compressed or encrypted"]);
}

#[test]
fn directories_that_lie_are_refused() {
    let bytes = saved(&pickle(), &[0; 16]);
    let entry = |offset, patch: &[u8]| patched(&bytes, b"PK\x01\x02", offset, patch);
    let end = |offset, patch: &[u8]| patched(&bytes, b"PK\x05\x06", offset, patch);
    // Entries beyond the directory, or where no header is.
    refused(
        &entry(20, &[0xf0, 0xff, 0xff, 0x7f, 0xf0, 0xff, 0xff, 0x7f]),
        &["does not lie before its directory"],
    );
    refused(&entry(42, &[0xf0, 0xff, 0xff, 0x7f]), &["does not lie before its directory"]);
    refused(&entry(42, &[1, 0, 0, 0]), &["does not lie before its directory"]);
    // Names and fields beyond the directory; numbers that are announced elsewhere, and are not there.
    refused(&entry(28, &[0xff, 0xff]), &["directory is cut off"]);
    refused(&entry(30, &[0xff, 0xff]), &["directory is cut off"]);
    refused(&entry(42, &[0xff; 4]), &["directory is cut off"]);
    // More entries than there are; a directory beyond the file; one that is to be found through a record that is missing.
    refused(&end(10, &[0xfe, 0xff]), &["directory is cut off"]);
    refused(&end(12, &[0xfe, 0xff, 0xff, 0xff]), &["directory is cut off"]);
    refused(&end(16, &[0xfe, 0xff, 0xff, 0xff]), &["directory is cut off"]);
    refused(&end(10, &[0xff, 0xff]), &["directory is cut off"]);
    refused(&end(16, &[0xff; 4]), &["directory is cut off"]);
}

#[test]
fn directories_of_archives_beyond_four_gigabytes_are_read() {
    let bytes = saved(&pickle(), &[0; 16]);
    let end = bytes.len() - 22;
    let field = |from: usize, to: usize| {
        let mut number = [0; 8];
        number[..to - from].copy_from_slice(&bytes[end + from..end + to]);
        number
    };
    let mut wide = bytes[..end].to_vec();
    wide.extend([&b"PK\x06\x06\x2c\0\0\0\0\0\0\0-\0-\0\0\0\0\0\0\0\0\0"[..], &field(8, 10)].concat());
    wide.extend([field(10, 12), field(12, 16), field(16, 20)].concat());
    wide.extend([&b"PK\x06\x07\0\0\0\0"[..], &(end as u64).to_le_bytes(), b"\x01\0\0\0"].concat());
    wide.extend([&b"PK\x05\x06\0\0\0\0"[..], &[0xff; 12], b"\0\0"].concat());
    let folder = folder(&[("pytorch_model.bin", &wide)]);
    assert_eq!(Weights::open(folder.path()).unwrap().names().collect::<Vec<_>>(), ["a"]);
    // The place of the record: the record itself, its first bytes, and what it says.
    for (offset, patch) in [
        (end + 56 + 8, &[0xff; 8][..]),
        (end + 56 + 8, &[1]),
        (end + 56, b"PK\x06\x08"),
        (end, b"PK\x06\x07"),
        (end + 32, &[0xff; 8]),
        (end + 40, &[0xff; 8]),
        (end + 48, &[0xff; 8]),
    ] {
        let mut damaged = wide.clone();
        damaged[offset..offset + patch.len()].copy_from_slice(patch);
        refused(&damaged, &["directory is cut off"]);
    }
}

#[test]
fn entries_that_overlap_or_repeat_are_refused() {
    let pickle = pickle();
    let bytes = archive(&[("a/data.pkl", &pickle), ("a/data/0", &[0; 16]), ("a/data/1", &[0; 16])]);
    // Both names of the second storage, in its header and in the directory.
    let renamed: Vec<u8> = {
        let mut bytes = bytes.clone();
        let places: Vec<_> = (0..bytes.len() - 8).filter(|&at| &bytes[at..at + 8] == b"a/data/1").collect();
        assert_eq!(places.len(), 2);
        places.into_iter().for_each(|at| bytes[at + 7] = b'0');
        bytes
    };
    refused(&renamed, &["`a/data/0` is there twice"]);
    // The last entry of the directory leads to the header of the one before it.
    let headers: Vec<_> = (0..bytes.len() - 4).filter(|&at| &bytes[at..at + 4] == b"PK\x03\x04").collect();
    let entries: Vec<_> = (0..bytes.len() - 4).filter(|&at| &bytes[at..at + 4] == b"PK\x01\x02").collect();
    let mut overlapping = bytes.clone();
    overlapping[entries[2] + 42..entries[2] + 46].copy_from_slice(&(headers[1] as u32).to_le_bytes());
    refused(&overlapping, &["entries overlap"]);
}

#[test]
fn the_older_form_is_checked_too() {
    let bytes = fixture("odd/legacy.bin");
    refused(&patched(&bytes, b"\x80\x02M\xe9\x03.", 3, &[0xea]), &["not of version 1001"]);
    refused(&patched(&bytes, b"little_endianq\x02\x88", 15, &[0x89]), &["highest byte first"]);
    refused(&patched(&bytes, b"little_endian", 0, b"LITTLE_ENDIAN"), &["highest byte first"]);
    // The first storage is to be longer than the file, and than all numbers.
    let keys = bytes.windows(3).rposition(|window| window == b"\x80\x02]").unwrap();
    let data = keys + bytes[keys..].iter().position(|&byte| byte == b'.').unwrap() + 1;
    for count in [[0xff; 8], [0xff, 0xff, 0, 0, 0, 0, 0, 0], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x1f]]
    {
        let mut long = bytes.clone();
        long[data..data + 8].copy_from_slice(&count);
        refused(&long, &["has a storage", "is cut off"]);
    }
    let mut short = bytes.clone();
    short[data..data + 8].copy_from_slice(&[0; 8]);
    refused(&short, &[]);
}
