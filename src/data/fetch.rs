//! Data sets from where they are published, into a folder where the task cards find them.

mod archive;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::Deserialize;

use self::archive::unpack;
use super::task::TaskCard;
use crate::error::{Error, Result};
use crate::transfer::{Advice, Checksum, Patience, Transfer, TransferEvent};

/// The file beside the data that says where they come from. It is written last, so that it also says that they are
/// complete.
const RECEIPT: &str = "SOURCE.txt";

/// Where files grow and are unpacked, under the folder that data sets go to.
const WORKSHOP: &str = ".fetching";

/// What helps where a server or the disk does not give what is needed.
const ADVICE: Advice = Advice {
    server: "CHILD_TUNING_DATA_ENDPOINT names a mirror",
    disk: "make room, or name another folder with --to",
};

static DOWNLOADS: LazyLock<Vec<Download>> = LazyLock::new(|| {
    serde_yaml::from_str(include_str!("downloads.yaml")).expect("the built-in list is valid: a test reads it")
});

/// A data set that can be fetched.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Download {
    /// The built-in tasks whose data it holds.
    pub tasks: Vec<String>,
    /// The folder it goes to, under the folder with data sets.
    pub folder: String,
    sources: Vec<Source>,
}

/// A file on the network.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    url: String,
    bytes: u64,
    sha256: String,
    /// The folder in the ZIP archive that the files stand in; `None` where the source is itself the only file.
    within: Option<String>,
    files: Vec<String>,
    #[serde(default)]
    optional: Vec<String>,
}

/// Where to fetch to and from.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// The folder that the data set's own folder is made in.
    pub to: PathBuf,
    /// What takes the place of scheme and host of every address, such as `http://127.0.0.1:8000`.
    pub endpoint: Option<String>,
}

/// What happens while a data set is fetched.
#[derive(Debug)]
pub enum FetchEvent<'a> {
    /// Something happens to one of its files.
    Transfer(TransferEvent<'a>),
    /// The files are put in place.
    Unpacking,
}

/// What [`Download::fetch`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The data set is there now.
    New,
    /// It was there already.
    Already,
}

/// Returns the folder for what the program keeps of the network: `CHILD_TUNING_CACHE`, or `child-tuning` in
/// `XDG_CACHE_HOME`, or in `.cache` of the home folder; nothing if none of these is set.
fn cache_folder() -> Option<PathBuf> {
    let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder("CHILD_TUNING_CACHE")
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("child-tuning")))
        .or_else(|| Some(folder("HOME")?.join(".cache/child-tuning")))
}

/// Returns the folder that data sets are fetched to: `data` in the folder for what the program keeps of the network.
pub fn fetched_data_folder() -> Option<PathBuf> {
    Some(cache_folder()?.join("data"))
}

impl Download {
    /// Returns the download that holds the data of a built-in task, by the name in its card.
    pub fn of(task: &str) -> Option<&'static Download> {
        DOWNLOADS.iter().find(|download| download.tasks.iter().any(|name| name == task))
    }

    /// Returns how many bytes are transferred.
    pub fn bytes(&self) -> u64 {
        self.sources.iter().map(|source| source.bytes).sum()
    }

    /// Returns the addresses that are fetched from.
    pub fn urls(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(|source| source.url.as_str())
    }

    /// Says whether a folder with data sets holds all of this one, as it was fetched.
    pub fn is_complete(&self, to: &Path) -> bool {
        let folder = to.join(&self.folder);
        let receipt = std::fs::read_to_string(folder.join(RECEIPT)).unwrap_or_default();
        self.sources.iter().all(|source| {
            receipt.contains(&source.sha256) && source.files.iter().all(|file| folder.join(file).is_file())
        })
    }

    /// Fetches the data set, unless it is there already.
    ///
    /// What is loaded is kept if this is cut off, and the next call goes on from there. The data set's folder
    /// appears when it is complete, not before.
    ///
    /// # Errors
    ///
    /// [`Error::Configuration`] if the folder is there and was not fetched; [`Error::Environment`] if the network or the
    /// disk do not give what is needed, or another process is fetching the same; [`Error::Data`] if an archive
    /// does not hold what it should.
    pub fn fetch(
        &self,
        card: &TaskCard,
        options: &FetchOptions,
        report: &mut dyn FnMut(FetchEvent),
    ) -> Result<Fetched> {
        self.fetch_with(&Patience::default(), card, options, report)
    }

    fn fetch_with(
        &self,
        patience: &Patience,
        card: &TaskCard,
        options: &FetchOptions,
        report: &mut dyn FnMut(FetchEvent),
    ) -> Result<Fetched> {
        if self.is_complete(&options.to) {
            return Ok(Fetched::Already);
        }
        let folder = options.to.join(&self.folder);
        self.refuse_foreign(&folder)?;
        let workshop = options.to.join(WORKSHOP);
        std::fs::create_dir_all(&workshop).map_err(write_fault(&workshop))?;
        let lock = self.lock(&workshop)?;
        // Another process may just have finished.
        if self.is_complete(&options.to) {
            return Ok(Fetched::Already);
        }
        let urls: Vec<String> =
            self.urls().map(|url| relocated(url, options.endpoint.as_deref())).collect::<Result<_>>()?;
        let parts: Vec<PathBuf> = urls.iter().map(|url| workshop.join(self.part_name(url))).collect();
        let checksums: Vec<Checksum> =
            self.sources.iter().map(|source| Checksum::Sha256(source.sha256.clone())).collect();
        let transfers = self.sources.iter().zip(&checksums).zip(urls.iter().zip(&parts));
        let transfers = transfers.map(|((source, checksum), (url, part))| Transfer {
            url,
            authorization: None,
            bytes: source.bytes,
            checksum,
            part,
            may_change: true,
            advice: ADVICE,
        });
        let transfers: Vec<_> = transfers.collect();
        for transfer in &transfers {
            transfer.run(patience, &mut |event| report(FetchEvent::Transfer(event)))?;
        }
        report(FetchEvent::Unpacking);
        let fresh = workshop.join(&self.folder);
        self.install(card, &parts, &fresh)?;
        remove_folder(&folder)?;
        std::fs::rename(&fresh, &folder).map_err(write_fault(&folder))?;
        for transfer in &transfers {
            transfer.discard()?;
        }
        drop(lock);
        // Only clears up: neither matters if it stays, and another fetch may be at work there.
        let _ = std::fs::remove_file(self.lock_path(&workshop));
        let _ = std::fs::remove_dir(&workshop);
        Ok(Fetched::New)
    }

    /// Refuses to replace what this program did not put there.
    fn refuse_foreign(&self, folder: &Path) -> Result<()> {
        let is_empty =
            std::fs::read_dir(folder).map_or(!folder.exists(), |mut entries| entries.next().is_none());
        if is_empty || folder.join(RECEIPT).is_file() {
            return Ok(());
        }
        Err(Error::configuration(format!(
            "{} already exists and was not fetched by this program, so it was not touched; name another folder with --to, or \
             move it away",
            folder.display()
        )))
    }

    fn lock_path(&self, workshop: &Path) -> PathBuf {
        workshop.join(format!("{}.lock", self.folder))
    }

    fn lock(&self, workshop: &Path) -> Result<File> {
        let path = self.lock_path(workshop);
        let file = File::create(&path).map_err(write_fault(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => {
                Err(Error::Environment(format!("another process is fetching {}; wait for it", self.folder)))
            }
            Err(TryLockError::Error(error)) => Err(Error::io("lock", &path)(error)),
        }
    }

    fn part_name(&self, url: &str) -> String {
        let path = url.split('?').next().unwrap_or(url);
        format!("{}-{}.part", self.folder, path.rsplit('/').next().unwrap_or("file"))
    }

    /// Puts the files and the receipt into a new folder.
    fn install(&self, card: &TaskCard, parts: &[PathBuf], fresh: &Path) -> Result<()> {
        remove_folder(fresh)?;
        std::fs::create_dir_all(fresh).map_err(write_fault(fresh))?;
        for (source, part) in self.sources.iter().zip(parts) {
            match &source.within {
                Some(within) => unpack(part, within, &source.files, &source.optional, fresh)?,
                None => {
                    for path in source.files.iter().map(|file| fresh.join(file)) {
                        std::fs::copy(part, &path).map_err(write_fault(&path))?;
                    }
                }
            }
        }
        let path = fresh.join(RECEIPT);
        std::fs::write(&path, self.receipt(card)).map_err(write_fault(&path))
    }

    fn receipt(&self, card: &TaskCard) -> String {
        let mut lines = vec![
            format!("{}: {}", self.folder, card.source),
            format!("Licence: {}", card.licence),
            "Fetched by child-tuning from".to_owned(),
        ];
        lines
            .extend(self.sources.iter().map(|source| format!("{}\n  SHA-256 {}", source.url, source.sha256)));
        lines.join("\n") + "\n"
    }
}

/// Returns the downloads of some tasks, each once, in the order of their first task.
pub fn downloads_of<'a>(
    tasks: impl IntoIterator<Item = &'a TaskCard>,
) -> Result<Vec<(&'a TaskCard, &'static Download)>> {
    let mut seen = BTreeSet::new();
    let mut downloads = Vec::new();
    for card in tasks {
        let download = Download::of(&card.name).ok_or_else(|| {
            Error::configuration(format!(
                "task `{}` is not published anywhere; only built-in tasks can be fetched",
                card.name
            ))
        })?;
        if seen.insert(&download.folder) {
            downloads.push((card, download));
        }
    }
    Ok(downloads)
}

/// Turns a failed write into an error that tells a full disk from others.
fn write_fault(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    crate::transfer::write_fault(path, ADVICE.disk)
}

fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if folder.exists() => Err(Error::io("remove", folder)(error)),
        _ => Ok(()),
    }
}

/// Puts an endpoint in the place of scheme and host.
fn relocated(url: &str, endpoint: Option<&str>) -> Result<String> {
    let Some(endpoint) = endpoint.map(|endpoint| endpoint.trim_end_matches('/')) else {
        return Ok(url.to_owned());
    };
    if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
        return Err(Error::configuration(format!(
            "the endpoint `{endpoint}` is no address; write it as https://mirror.example or http://127.0.0.1:8000"
        )));
    }
    let path = url.splitn(4, '/').nth(3).unwrap_or_default();
    Ok(format!("{endpoint}/{path}"))
}
