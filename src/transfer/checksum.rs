//! Hashes that tell whether a file is the published one.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::values::hexadecimal;

/// How much is read at once.
const BLOCK: usize = 256 * 1024;

/// The published hash of a file, in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// SHA-256 of the content.
    Sha256(String),
    /// SHA-1 of the content as git counts it: behind the word `blob`, its length and a zero byte.
    GitBlob(String),
}

impl Checksum {
    /// Returns the hash that an ETag of the Hub is: SHA-256 for large files, git's SHA-1 for others; nothing if it is
    /// neither.
    pub fn of_etag(etag: &str) -> Option<Self> {
        let digits = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"').to_ascii_lowercase();
        match digits.len() {
            _ if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) => None,
            64 => Some(Self::Sha256(digits)),
            40 => Some(Self::GitBlob(digits)),
            _ => None,
        }
    }

    /// Returns the hexadecimal digits.
    pub fn digits(&self) -> &str {
        match self {
            Self::Sha256(digits) | Self::GitBlob(digits) => digits,
        }
    }

    /// Computes the same hash of a file.
    ///
    /// # Errors
    /// Fails if the file cannot be read.
    pub fn of_file(&self, path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("read", path))?;
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        let digest = match self {
            Self::Sha256(_) => Self::Sha256(digest::<Sha256>(b"", &mut file, path)?),
            Self::GitBlob(_) => {
                Self::GitBlob(digest::<Sha1>(format!("blob {length}\0").as_bytes(), &mut file, path)?)
            }
        };
        Ok(digest)
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Sha256(digits) => write!(formatter, "SHA-256 {digits}"),
            Self::GitBlob(digits) => write!(formatter, "git SHA-1 {digits}"),
        }
    }
}

fn digest<D: Digest>(before: &[u8], file: &mut File, path: &Path) -> Result<String> {
    let mut hash = D::new_with_prefix(before);
    let mut block = vec![0; BLOCK];
    loop {
        let count = file.read(&mut block).map_err(Error::io("read", path))?;
        if count == 0 {
            return Ok(hexadecimal(&hash.finalize()));
        }
        hash.update(&block[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "what is up, doc?").unwrap();
        let of = |etag: &str| Checksum::of_etag(etag).unwrap().of_file(&path).unwrap().to_string();
        // The first is the example in the book on git, the second what sha256sum prints.
        assert_eq!(of(&"0".repeat(40)), "git SHA-1 bd9dbf5aae1a3862dd1526723246b20206e5fc37");
        let sha256 = "af4e812d13b4eae6da91024f15f7679dae49d40aee3fb4c7216b56d04193f46c";
        assert_eq!(of(&"0".repeat(64)), format!("SHA-256 {sha256}"));
    }

    #[test]
    fn only_hashes_are_taken_from_etags() {
        let (git, large) = ("A5".repeat(20), "0f".repeat(32));
        assert_eq!(Checksum::of_etag(&format!("W/\"{git}\"")), Some(Checksum::GitBlob("a5".repeat(20))));
        assert_eq!(Checksum::of_etag(&format!("\"{large}\"")), Some(Checksum::Sha256(large.clone())));
        for etag in ["", "\"\"", "5f3-abc", "../../../../etc/passwd", &"g".repeat(40), &large[1..]] {
            assert_eq!(Checksum::of_etag(etag), None, "{etag}");
        }
    }
}
