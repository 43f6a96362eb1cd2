//! Folders with weights, and the bytes of archives and pickles that no library would write.

use std::io::{Cursor, Write};
use std::path::PathBuf;

use child_tuning::model::Weights;
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Reads a fixture.
pub fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/weights").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Makes a folder with files.
pub fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

/// Returns why the weights among some files are refused, without the name of the folder.
pub fn refusal(files: &[(&str, &[u8])]) -> String {
    let folder = folder(files);
    match Weights::open(folder.path()) {
        Ok(weights) => panic!("opened, with {:?}", weights.names().collect::<Vec<_>>()),
        Err(error) => error.to_string().replace(&format!("{}/", folder.path().display()), ""),
    }
}

/// Requires that a file is refused wherever it is cut off, by a message that names it.
pub fn refused_at_every_cut(name: &str, bytes: &[u8]) {
    let folder = folder(&[(name, bytes)]);
    assert!(Weights::open(folder.path()).is_ok());
    let file = std::fs::OpenOptions::new().write(true).open(folder.path().join(name)).unwrap();
    for length in (0..bytes.len()).rev() {
        file.set_len(length as u64).unwrap();
        let Err(error) = Weights::open(folder.path()) else { panic!("{length} bytes of {name} opened") };
        says(&error.to_string(), &[name]);
    }
}

/// Requires that a message has all parts, and is one line.
pub fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    assert!(!message.contains('\n') && message.len() < 1000, "{message}");
}

/// Makes a ZIP archive whose entries are not compressed.
pub fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in entries {
        zip.start_file(*name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// Makes what torch.save makes of a pickle and the bytes of the storage `0`.
pub fn saved(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
    archive(&[("model/data.pkl", pickle), ("model/byteorder", b"little"), ("model/data/0", storage)])
}

/// Puts the operations of values into a pickle of a dictionary.
pub fn state_dict(items: &[Vec<u8>]) -> Vec<u8> {
    [b"\x80\x02}(".to_vec(), items.concat(), b"u.".to_vec()].concat()
}

/// The operation that makes a text.
pub fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

/// The operation that names a global.
pub fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

/// The operation that makes an integer.
pub fn integer(number: i64) -> Vec<u8> {
    [b"\x8a\x08", &number.to_le_bytes()[..]].concat()
}

/// The operations that make a tuple.
pub fn tuple(parts: &[Vec<u8>]) -> Vec<u8> {
    [b"(".to_vec(), parts.concat(), b"t".to_vec()].concat()
}

/// The operations that make a tuple of integers.
pub fn integers(numbers: &[i64]) -> Vec<u8> {
    tuple(&numbers.iter().map(|&number| integer(number)).collect::<Vec<_>>())
}

/// The operations that make the storage `key` of a class and a number of elements.
pub fn storage(class: &str, key: &str, count: i64) -> Vec<u8> {
    let parts = [text("storage"), global("torch", class), text(key), text("cpu"), integer(count)];
    [tuple(&parts), b"Q".to_vec()].concat()
}

/// The operations that call a function.
pub fn call(function: Vec<u8>, arguments: &[Vec<u8>]) -> Vec<u8> {
    [function, tuple(arguments), b"R".to_vec()].concat()
}

/// The operations that make a tensor.
pub fn tensor(storage: Vec<u8>, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let hooks = call(global("collections", "OrderedDict"), &[]);
    let arguments = [storage, integer(offset), integers(shape), integers(strides), b"\x89".to_vec(), hooks];
    call(global("torch._utils", "_rebuild_tensor_v2"), &arguments)
}
