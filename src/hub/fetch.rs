//! A model from the Hub into the cache.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::cache::{Snapshot, read_commit};
use super::contents::{CONFIG, has_tokenizer, shards, weights};
use super::id::ModelId;
use super::remote::{ADVICE, Remote, RemoteFile};
use super::settings::Hub;
use crate::data::TOKENIZER_FILES;
use crate::error::{Error, Result};
use crate::model::FORMATS;
use crate::transfer::{Transfer, TransferEvent, write_fault};

/// What happens while a model is fetched.
#[derive(Debug)]
pub enum HubEvent<'a> {
    /// Something happens to one of its files.
    Transfer(TransferEvent<'a>),
    /// Another process is loading a file, and is waited for; this is its lock.
    Locked(&'a Path),
}

impl Hub {
    /// Brings a model into the cache at the commit that its revision is now: config, tokenizer, and weights in one format.
    ///
    /// What is there already is compared with its hash and kept. What is loaded is kept if this is cut off, and the next
    /// call goes on from there. `accept` is shown the folder once the config is in it, and may refuse the model before
    /// the weights are loaded. Without a network (`offline`) the model must be in the cache.
    ///
    /// # Errors
    /// [`Error::Configuration`] if there is no such model or revision; [`Error::Environment`] if the Hub, the network or
    /// the disk do not give what is needed; [`Error::Model`] if the repository lacks something, or offline the cache; what
    /// `accept` returns.
    pub fn fetch(
        &self,
        id: &ModelId,
        accept: &dyn Fn(&Path) -> Result<()>,
        report: &mut dyn FnMut(HubEvent),
    ) -> Result<Snapshot> {
        if self.offline {
            return self.cached(id).ok_or_else(|| self.absent(id));
        }
        let remote = Remote { hub: self, id, authorization: self.authorization()? };
        let config = remote.find(CONFIG, &id.revision, &mut transfers(report))?.ok_or_else(|| {
            Error::configuration(format!(
                "{} has no {CONFIG} of a model `{id}`; it is no model of transformers, or there is none of this name{}",
                self.endpoint,
                super::locate::similar_folder(&id.repository)
            ))
        })?;
        let root = self.repository(id);
        let commit = config.commit.clone();
        let folder = root.join("snapshots").join(&commit);
        let mut fetch = Fetch { remote, root, folder, report };
        fetch.bring(CONFIG, &config)?;
        accept(&fetch.folder)?;
        for name in TOKENIZER_FILES {
            fetch.bring_if_there(name, &commit)?;
        }
        if !has_tokenizer(&fetch.folder) {
            return Err(
                fetch.lacks("no tokenizer (tokenizer.json, vocab.txt, vocab.json with merges.txt, spiece.model or spm.model)")
            );
        }
        fetch.bring_weights(&commit)?;
        if !id.is_pinned() {
            fetch.note_reference(&id.revision, &commit)?;
        }
        Ok(Snapshot { id: id.clone(), commit, folder: fetch.folder })
    }
}

/// Makes what is told of transfers something that is told of the Hub.
fn transfers<'a>(report: &'a mut dyn FnMut(HubEvent)) -> impl FnMut(TransferEvent) + 'a {
    move |event| report(HubEvent::Transfer(event))
}

/// One model on its way.
struct Fetch<'a> {
    remote: Remote<'a>,
    /// The repository's folder in the cache.
    root: PathBuf,
    /// The folder of the commit in it.
    folder: PathBuf,
    report: &'a mut dyn FnMut(HubEvent),
}

impl Fetch<'_> {
    /// Brings the weights: those that are there already, or the first of the formats that the repository has.
    fn bring_weights(&mut self, commit: &str) -> Result<()> {
        if let Some(files) = weights(&self.folder) {
            return files.iter().try_for_each(|file| self.bring_named(file, commit));
        }
        for format in FORMATS {
            if self.bring_if_there(format.file, commit)? {
                return Ok(());
            }
            if self.bring_if_there(format.index, commit)? {
                let shards = shards(&self.folder.join(format.index))?;
                return shards.iter().try_for_each(|shard| self.bring_named(shard, commit));
            }
        }
        let known: Vec<&str> = FORMATS.iter().flat_map(|format| [format.file, format.index]).collect();
        Err(self.lacks(&format!("no weights that can be read ({})", known.join(", "))))
    }

    /// Brings a file that the commit must have.
    fn bring_named(&mut self, name: &str, commit: &str) -> Result<()> {
        if self.bring_if_there(name, commit)? {
            return Ok(());
        }
        Err(self.lacks(&format!("no {name}, which belongs to its weights")))
    }

    /// Brings a file of a commit; returns whether the commit has it.
    fn bring_if_there(&mut self, name: &str, commit: &str) -> Result<bool> {
        let Some(file) = self.remote.find(name, commit, &mut transfers(self.report))? else {
            return Ok(false);
        };
        if file.commit != commit {
            return Err(Error::Environment(format!(
                "{}: the server has it at commit {} where {commit} was asked for; {}",
                file.url, file.commit, ADVICE.server
            )));
        }
        self.bring(name, &file)?;
        Ok(true)
    }

    /// Brings a file into the snapshot.
    fn bring(&mut self, name: &str, file: &RemoteFile) -> Result<()> {
        let pointer = self.folder.join(name);
        if is_intact(&pointer, file)? {
            return Ok(());
        }
        let blobs = self.root.join("blobs");
        let blob = blobs.join(file.checksum.digits());
        create_folder(&blobs)?;
        create_folder(&self.folder)?;
        let _lock = self.lock(file)?;
        // Another process may just have loaded it, or another commit has the same file.
        if !is_intact(&blob, file)? {
            let part = blobs.join(format!("{}.incomplete", file.checksum.digits()));
            let transfer = Transfer {
                url: &file.url,
                authorization: self.remote.authorization.as_deref(),
                bytes: file.bytes,
                checksum: &file.checksum,
                part: &part,
                may_change: false,
                advice: ADVICE,
            };
            transfer.run(&self.remote.hub.patience, &mut transfers(self.report))?;
            std::fs::rename(&part, &blob).map_err(write_fault(&blob, ADVICE.disk))?;
        }
        link(&blob, &pointer)
    }

    /// Keeps other processes, Python's among them, from loading the same file.
    fn lock(&mut self, file: &RemoteFile) -> Result<File> {
        let folder = self.remote.hub.cache.join(".locks").join(self.remote.id.folder_name());
        create_folder(&folder)?;
        let path = folder.join(format!("{}.lock", file.checksum.digits()));
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(write_fault(&path, ADVICE.disk))?;
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) => (self.report)(HubEvent::Locked(&path)),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        }
        lock.lock().map_err(Error::io("lock", &path))?;
        Ok(lock)
    }

    /// Notes which commit a branch or tag is.
    fn note_reference(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.root.join("refs").join(revision);
        if read_commit(&path).as_deref() == Some(commit) {
            return Ok(());
        }
        create_folder(path.parent().unwrap_or(&self.root))?;
        replace(&path, |temporary| std::fs::write(temporary, commit))
    }

    fn lacks(&self, what: &str) -> Error {
        Error::model(self.remote.id.to_string(), format!("has {what} on {}", self.remote.hub.endpoint))
    }
}

/// Returns whether a file is there with the length and the hash that it should have.
fn is_intact(path: &Path, file: &RemoteFile) -> Result<bool> {
    let is_as_long = path.metadata().is_ok_and(|data| data.is_file() && data.len() == file.bytes);
    Ok(is_as_long && file.checksum.of_file(path)? == file.checksum)
}

/// Makes a link in a snapshot to a blob, relative as Python's are, so that the cache may be moved.
fn link(blob: &Path, pointer: &Path) -> Result<()> {
    let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
    if std::fs::read_link(pointer).is_ok_and(|found| found == target) {
        return Ok(());
    }
    replace(pointer, |temporary| std::os::unix::fs::symlink(&target, temporary))
}

/// Makes something beside its place and renames it, so that it is never there in part.
fn replace(path: &Path, make: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    static MADE: AtomicU64 = AtomicU64::new(0);
    let number = MADE.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_file_name(format!(".{name}.{}.{number}", std::process::id()));
    // One may be left of a process that was killed and had the same number.
    let _ = std::fs::remove_file(&temporary);
    make(&temporary).and_then(|()| std::fs::rename(&temporary, path)).map_err(write_fault(path, ADVICE.disk))
}

fn create_folder(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| {
        Error::Environment(format!(
            "cannot create the folder {}: {error}; name another place with HF_HOME",
            folder.display()
        ))
    })
}
