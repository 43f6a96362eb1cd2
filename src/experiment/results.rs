//! The results file: a CSV that keeps every finished run, whatever happens to the process that wrote it.
//!
//! Promises, and what keeps them:
//! - *Nothing is torn.* One row goes out in one write and is synced to the disk; what a kill or a full disk leaves of
//!   it has no newline and is cut away at the next start. Several rows, and a row that replaces another, go into a
//!   new file that takes the old one's place in one step, so that a run never has only some of its rows.
//! - *Nothing is there twice.* Every change is made under a lock, after the file has been read again; a row whose
//!   (run, data set, split, hash of the data) is there already is dropped.
//! - *Nothing is done twice.* A run is claimed before it is trained; the claim ends with the process.
//! - *Nothing is taken away.* The weights that runs start from stay as long as a process needs them.
//! - *Nothing stays failed.* A run counts as finished once it ended `ok` or `diverged`. A `failed` one is tried again,
//!   and what it brings then takes the place of its failed rows.

mod claims;
mod contents;
mod row;
mod text;

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use claims::lock;
pub use claims::{Claim, NeededSources};
pub use contents::Recorded;
use contents::{Contents, Found, check_line_ends};
pub use row::{Row, SCHEMA_VERSION, Status};
pub use text::read;

pub(super) use text::{from_text, to_text};

use crate::error::{Error, Result};
use crate::files::{folder_of, is_pipe, write_bytes};

/// Returns whether a file holds results, of whatever version and in whatever order of its columns.
pub fn is_results_file(path: &Path) -> bool {
    /// More than a header takes.
    const START: u64 = 1 << 16;
    let mut start = Vec::new();
    if is_pipe(path) || File::open(path).and_then(|file| file.take(START).read_to_end(&mut start)).is_err() {
        return false;
    }
    let header = start.split(|&byte| byte == b'\n' || byte == b'\r').next().unwrap_or_default();
    header.split(|&byte| byte == b',').any(|column| column == b"schema_version")
}

/// A results file that this process may append to, along with others.
#[derive(Debug)]
pub struct ResultsFile {
    path: PathBuf,
    repaired: OnceLock<String>,
}

impl ResultsFile {
    /// Opens a results file, or makes it along with its folder, so that a bad place shows before anything is trained.
    ///
    /// A last row that was cut off while it was written is removed; [`ResultsFile::repaired`] says so.
    ///
    /// # Errors
    /// Fails with an environment error if the folder cannot be made or written to, with a configuration error if the
    /// file has other columns or another schema version, and with a data error if a row does not parse.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.file_name().is_none() || path.is_dir() {
            let message = format!("results file `{}` is a folder; name a file in it", path.display());
            return Err(Error::configuration(message));
        }
        let folder = folder_of(path);
        fs::create_dir_all(folder).map_err(|source| unwritable("create the folder", folder, &source))?;
        // A replaced file must land where a link points, not on the link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let results = Self { path, repaired: OnceLock::new() };
        let _lock = lock(&results.path).map_err(|error| match error {
            Error::Io { action, path, source } => unwritable(action, &path, &source),
            other => other,
        })?;
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&results.path)
            .map_err(|source| unwritable("write", &results.path, &source))?;
        // Before anything is mended: a file that is refused stays as it is.
        text::parse(&results.path, &whole_rows(&results.path)?.bytes)?;
        let _ = results.contents()?;
        results.clear_claims();
        Ok(results)
    }

    /// Returns what was cut away from the file because it had been written in part only, if anything was.
    pub fn repaired(&self) -> Option<&str> {
        self.repaired.get().map(String::as_str)
    }

    /// Returns what is there of every run.
    ///
    /// # Errors
    /// Fails if the file cannot be read or has been replaced by a foreign one.
    pub fn recorded(&self) -> Result<Recorded> {
        let _lock = lock(&self.path)?;
        Ok(self.contents()?.recorded())
    }

    /// Returns the path, with links followed.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends the rows of one run and returns how many of them were new.
    ///
    /// Left out are rows whose (run, data set, split, hash of the data) is in the file; failed rows of the same run make
    /// way for the new ones. When this returns, the rows are on the disk.
    ///
    /// # Errors
    /// Fails if the file cannot be written, as on a full disk; the file is then as it was.
    pub fn append(&self, rows: &[Row]) -> Result<usize> {
        let _lock = lock(&self.path)?;
        let contents = self.contents()?;
        let runs: HashSet<&str> = rows.iter().map(|row| row.run.as_str()).collect();
        let (superseded, kept): (Vec<&Found>, Vec<&Found>) = contents
            .rows
            .iter()
            .partition(|found| found.status == Status::Failed && runs.contains(found.run.as_str()));
        let mut taken: HashSet<[&str; 4]> = kept
            .iter()
            .map(|found| [&*found.run, &*found.evaluated_on, &*found.split, &*found.data])
            .collect();
        let new: Vec<&Row> = (rows.iter())
            .filter(|row| {
                taken.insert(
                    [&row.run, &row.evaluated_on, &row.split, &row.evaluated_sha256].map(String::as_str),
                )
            })
            .collect();
        let lines = text::encode(&new).map_err(|error| Error::io("write", &self.path)(error.into()))?;
        match new.len() {
            0 if superseded.is_empty() => {}
            1 if superseded.is_empty() => self.append_in_place(contents.bytes.len(), &lines)?,
            _ => {
                let mut bytes = contents.bytes[contents.header.clone()].to_vec();
                kept.iter().for_each(|found| bytes.extend_from_slice(&contents.bytes[found.line.clone()]));
                bytes.extend_from_slice(&lines);
                write_bytes(&self.path, &bytes)?;
            }
        }
        Ok(new.len())
    }

    /// Reads the file, which the caller has locked, and mends what a cut-off write left of its end.
    fn contents(&self) -> Result<Contents> {
        let header = header(&self.path)?;
        let mut bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            // Deleted by the user while runs were going on: those that end from here on start a new one.
            Err(source) if source.kind() == ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(Error::io("read", &self.path)(source)),
        };
        check_line_ends(&self.path, &bytes)?;
        if bytes.len() < header.len() && header.starts_with(&bytes) {
            write_bytes(&self.path, &header)?;
            bytes.clone_from(&header);
        }
        if lacks_newline(&bytes) {
            self.append_in_place(bytes.len(), b"\n")?;
            bytes.push(b'\n');
        }
        let mut contents = Contents::find(&self.path, bytes, &header)?;
        if let Some(torn) = contents.take_torn() {
            self.truncate(torn.line.start)?;
            let message = format!(
                "{}: removed a last row that was cut off while it was written ({} bytes, of run `{}`)",
                self.path.display(),
                torn.line.len(),
                torn.run
            );
            // One note is enough: a second repair would say the same of another process's row.
            let _ = self.repaired.set(message);
        }
        Ok(contents)
    }

    /// Appends lines in one write; if that fails, takes back what of them was written.
    fn append_in_place(&self, length: usize, lines: &[u8]) -> Result<()> {
        let written = OpenOptions::new().append(true).open(&self.path).and_then(|mut file| {
            file.write_all(lines)?;
            file.sync_all()
        });
        written.map_err(|source| {
            // If even this fails, the next start finds the row without its newline and removes it.
            let _ = self.truncate(length);
            Error::io("append to", &self.path)(source)
        })
    }

    fn truncate(&self, length: usize) -> Result<()> {
        OpenOptions::new()
            .write(true)
            .open(&self.path)
            .and_then(|file| {
                file.set_len(length as u64)?;
                file.sync_all()
            })
            .map_err(Error::io("truncate", &self.path))
    }
}

/// Tells what is there of every run, without a lock, and without mending or writing anything.
///
/// # Errors
/// Fails if the file cannot be read, has other columns or another schema version.
pub fn recorded(path: &Path) -> Result<Recorded> {
    Ok(whole_rows(path)?.recorded())
}

/// Finds the rows of a file, but for a last one that was cut off.
fn whole_rows(path: &Path) -> Result<Contents> {
    let mut bytes = fs::read(path).map_err(Error::io("read", path))?;
    check_line_ends(path, &bytes)?;
    let header = header(path)?;
    if bytes.len() < header.len() && header.starts_with(&bytes) {
        bytes.clone_from(&header);
    }
    if lacks_newline(&bytes) {
        bytes.push(b'\n');
    }
    let mut contents = Contents::find(path, bytes, &header)?;
    // Not there yet: its run is done again.
    let _ = contents.take_torn();
    Ok(contents)
}

fn header(path: &Path) -> Result<Vec<u8>> {
    text::header().map_err(|error| Error::io("write", path)(error.into()))
}

/// Returns whether the last row is all there but for its newline, as an editor may leave it: it ends with a whole time.
fn lacks_newline(bytes: &[u8]) -> bool {
    let last = bytes.rsplit(|&byte| byte == b'\n').next().unwrap_or_default();
    let last = last.strip_suffix(b"\r").unwrap_or(last);
    let time = last.rsplit(|&byte| byte == b',').next().unwrap_or_default();
    std::str::from_utf8(time).is_ok_and(|time| humantime::parse_rfc3339(time).is_ok())
}

fn unwritable(action: &str, path: &Path, source: &std::io::Error) -> Error {
    Error::Environment(format!(
        "cannot {action} {}: {source}; make it writable, or name another place with `results:`",
        path.display()
    ))
}

#[cfg(test)]
mod tests;
