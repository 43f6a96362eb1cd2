//! One file with weights, opened, of which parts are mapped while they are read.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::libtorch::map_file;

/// An open file.
pub(super) struct WeightsFile {
    path: PathBuf,
    file: File,
    length: u64,
}

impl WeightsFile {
    /// Opens a file.
    ///
    /// # Errors
    /// Fails if it cannot be read, is not a file, or stands for one that Git LFS has not fetched.
    pub fn open(path: &Path) -> Result<Self> {
        // Looked at first: opening a pipe waits for its other end.
        let length = match std::fs::metadata(path).map_err(Error::io("read", path))? {
            found if found.is_file() => found.len(),
            _ => return Err(Error::model(path, "is not a file")),
        };
        let file = File::open(path).map_err(Error::io("read", path))?;
        let opened = Self { path: path.to_path_buf(), file, length };
        const POINTER: &[u8] = b"version https://git-lfs";
        if length >= POINTER.len() as u64 && *opened.map(0..POINTER.len() as u64)? == *POINTER {
            return Err(opened.fault("is a pointer of Git LFS in place of the weights; run `git lfs pull`"));
        }
        Ok(opened)
    }

    /// Returns the path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the number of bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Maps a part of the file. What is read of it counts as memory of the process until the map is dropped.
    ///
    /// # Errors
    /// Fails if the file ends before the part does, or the system cannot map it.
    pub fn map(&self, range: Range<u64>) -> Result<Mmap> {
        if range.end > self.length || range.start > range.end {
            return Err(self.fault(format!(
                "ends after {} bytes, where {} are needed; download or save it again",
                self.length, range.end
            )));
        }
        map_file(&self.file, range).map_err(Error::io("map", &self.path))
    }

    /// Feeds the whole file to a hash.
    ///
    /// # Errors
    /// Fails if the system cannot map it.
    pub fn hash(&self, hash: &mut Sha256) -> Result<()> {
        const PART: u64 = 16 << 20;
        for start in (0..self.length).step_by(PART as usize) {
            hash.update(&*self.map(start..(start + PART).min(self.length))?);
        }
        Ok(())
    }

    /// Makes an error about this file.
    pub fn fault(&self, message: impl Into<String>) -> Error {
        Error::model(&self.path, message)
    }
}
