//! Folders with tokenizers, and the fixtures' own files.

use std::path::{Path, PathBuf};

use child_tuning::data::TokenEncoder;

pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn fixtures() -> PathBuf {
    project().join("tests/fixtures/tokenizers")
}

/// Makes a folder with copies of files, and with further files.
pub fn folder(copied: &[PathBuf], written: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for path in copied {
        std::fs::copy(path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    for (name, content) in written {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

/// Returns what a text or pair becomes: ids, and token types as digits.
pub fn encoded(
    encoder: &TokenEncoder,
    pair: &(String, Option<String>),
    max_length: usize,
) -> (Vec<u32>, String) {
    let made = encoder.encode(&pair.0, pair.1.as_deref(), max_length).unwrap();
    (made.ids, made.token_types.iter().map(u32::to_string).collect())
}
