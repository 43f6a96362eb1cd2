//! What the processes that share a results file have claimed: its rows for a moment, runs while they train them, and sources
//! for as long as they need them. Locks hold claims, so none outlives its process, however that ends.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use super::ResultsFile;
use crate::error::{Error, Result};
use crate::files::{beside, folder_of};

/// A claim's file, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct Claim {
    results: PathBuf,
    path: PathBuf,
    /// Holds the lock for as long as it is open.
    _file: File,
}

/// The sources that a process needs, as other processes see it, until it is dropped or the process ends.
#[derive(Debug)]
pub struct NeededSources {
    sources: BTreeSet<String>,
    claim: Claim,
}

impl ResultsFile {
    /// Claims a run, so that no other thread or process trains it too.
    ///
    /// Returns nothing if someone else holds the run. Whoever gets it should ask [`ResultsFile::recorded`] once more:
    /// another process may have finished it, and given it back, since.
    ///
    /// # Errors
    /// Fails if the claim cannot be written beside the results file.
    pub fn claim(&self, run: &str) -> Result<Option<Claim>> {
        if run.is_empty() || !run.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(Error::configuration(format!("run id `{run}` is not made of letters and digits")));
        }
        let _lock = lock(&self.path)?;
        self.claim_file(run)
    }

    /// Tells other processes that share the results file which runs' weights this one needs, by their ids.
    ///
    /// # Errors
    /// Fails if this cannot be written beside the results file.
    pub fn need_sources(&self, sources: BTreeSet<String>) -> Result<NeededSources> {
        let _lock = lock(&self.path)?;
        let mut number = 0;
        let claim = loop {
            match self.claim_file(&format!("{SOURCES}{number}"))? {
                Some(claim) => break claim,
                None => number += 1,
            }
        };
        let text: String = sources.iter().flat_map(|source| [source, "\n"]).collect();
        fs::write(&claim.path, text).map_err(Error::io("write", &claim.path))?;
        Ok(NeededSources { sources, claim })
    }

    /// Ends the need of sources, and hands those that no other process needs to `remove`.
    ///
    /// # Errors
    /// Fails if what others need cannot be read.
    pub fn release_sources(&self, needed: NeededSources, mut remove: impl FnMut(&str)) -> Result<()> {
        // A process that comes meanwhile waits, and finds what is removed no more.
        let lock = lock(&self.path)?;
        let mut others = HashSet::new();
        let folder = folder_of(&needed.claim.path);
        for entry in fs::read_dir(folder).map_err(Error::io("read", folder))?.flatten() {
            let path = entry.path();
            let is_of_sources = entry.file_name().as_encoded_bytes().starts_with(SOURCES.as_bytes());
            if is_of_sources && path != needed.claim.path && open(&path)?.try_lock().is_err() {
                let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
                others.extend(text.lines().map(str::to_owned));
            }
        }
        needed.sources.iter().filter(|source| !others.contains(*source)).for_each(|source| remove(source));
        // A claim that is dropped takes the lock itself.
        drop(lock);
        Ok(())
    }

    /// Removes the claims of killed processes: what nobody locks, nobody holds. The caller has locked the results, so
    /// that nobody makes a claim meanwhile. What cannot be removed does no harm.
    pub(super) fn clear_claims(&self) {
        let folder = beside(&self.path, ".claims");
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if open(&entry.path()).is_ok_and(|file| file.try_lock().is_ok()) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let _ = fs::remove_dir(&folder);
    }

    /// Claims a name under the lock of the caller; nothing if it is taken.
    fn claim_file(&self, name: &str) -> Result<Option<Claim>> {
        let folder = beside(&self.path, ".claims");
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let path = folder.join(name);
        let file = open(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Claim { results: self.path.clone(), path, _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(Error::io("lock", path)(source)),
        }
    }
}

/// How the names of files begin that name the sources which a process needs. No run's id has a hyphen.
const SOURCES: &str = "sources-";

impl Drop for Claim {
    /// Gives the claim back. What cannot be removed does no harm: a claim without a lock holds nothing.
    fn drop(&mut self) {
        // Under the lock, since otherwise somebody could open the file before it is removed and lock it after.
        if let Ok(_lock) = lock(&self.results) {
            let _ = fs::remove_file(&self.path);
            // Succeeds for the last claim only: the folder must be empty.
            let _ = fs::remove_dir(folder_of(&self.path));
        }
    }
}

/// Locks a results file until the returned file is dropped.
///
/// What is locked is a file beside it, which is never replaced: whoever waited for a lock on the results file itself
/// would, after a replacement, hold a lock on a file that no longer has a name.
pub(super) fn lock(results: &Path) -> Result<File> {
    let path = beside(results, ".lock");
    let file = open(&path)?;
    file.lock().map_err(Error::io("lock", path))?;
    Ok(file)
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(Error::io("create", path))
}
