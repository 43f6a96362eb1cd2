//! The cache on this machine, in the layout of huggingface_hub: a folder for each repository with `blobs` (files by
//! their hash), `snapshots` (a folder for each commit, with links to them) and `refs` (which commit a branch or tag was).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::contents::missing;
use super::id::{ModelId, is_commit, is_name};
use super::settings::Hub;

/// The files of a model at one commit, in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The model.
    pub id: ModelId,
    /// The commit, 40 hexadecimal digits.
    pub commit: String,
    /// The folder with its files.
    pub folder: PathBuf,
}

/// What the cache holds of a model at one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedModel {
    /// The name of the repository.
    pub repository: String,
    /// The branches and tags that were this commit when they were last looked up.
    pub revisions: Vec<String>,
    /// The commit, 40 hexadecimal digits.
    pub commit: String,
    /// Bytes of all files.
    pub bytes: u64,
    /// What it lacks of a model that can be loaded: config, weights or tokenizer.
    pub missing: Option<&'static str>,
}

impl Hub {
    /// Returns the files of a model if the cache has all that is needed to load it. Whether the Hub has a newer commit
    /// of the revision by now is not asked.
    pub fn cached(&self, id: &ModelId) -> Option<Snapshot> {
        self.snapshot(id).filter(|snapshot| missing(&snapshot.folder).is_none())
    }

    /// Returns what the cache holds, sorted by name.
    pub fn cached_models(&self) -> Vec<CachedModel> {
        let mut models = Vec::new();
        for (name, root) in entries(&self.cache) {
            let Some(id) = ModelId::of_folder_name(&name) else { continue };
            let mut revisions: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for revision in references(&root.join("refs"), "") {
                if let Some(commit) = read_commit(&root.join("refs").join(&revision)) {
                    revisions.entry(commit).or_default().push(revision);
                }
            }
            for (commit, folder) in entries(&root.join("snapshots")) {
                if !is_commit(&commit) {
                    continue;
                }
                let sizes = entries(&folder).into_iter().filter_map(|(_, path)| path.metadata().ok());
                models.push(CachedModel {
                    repository: id.repository.clone(),
                    revisions: revisions.remove(&commit).unwrap_or_default(),
                    bytes: sizes.filter(|data| data.is_file()).map(|data| data.len()).sum(),
                    missing: missing(&folder),
                    commit,
                });
            }
        }
        models
    }

    /// Returns the folder of a repository in the cache.
    pub(super) fn repository(&self, id: &ModelId) -> PathBuf {
        self.cache.join(id.folder_name())
    }

    /// Returns the files of a model that are in the cache, all or some.
    pub(super) fn snapshot(&self, id: &ModelId) -> Option<Snapshot> {
        let root = self.repository(id);
        let commit = if id.is_pinned() {
            id.revision.clone()
        } else {
            read_commit(&root.join("refs").join(&id.revision))?
        };
        let folder = root.join("snapshots").join(&commit);
        folder.is_dir().then(|| Snapshot { id: id.clone(), commit, folder })
    }
}

/// Reads the commit in a file of `refs`.
pub(super) fn read_commit(path: &Path) -> Option<String> {
    let commit = std::fs::read_to_string(path).ok()?.trim().to_owned();
    is_commit(&commit).then_some(commit)
}

/// Returns the names of branches and tags under a folder, which may stand in folders of their own, as `refs/pr/1`.
fn references(folder: &Path, before: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (name, path) in entries(folder).into_iter().filter(|(name, _)| is_name(name)) {
        if path.is_dir() {
            names.extend(references(&path, &format!("{before}{name}/")));
        } else {
            names.push(format!("{before}{name}"));
        }
    }
    names
}

/// Returns what is in a folder by name, sorted; nothing if it is not there.
fn entries(folder: &Path) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut entries: Vec<_> =
        entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))).collect();
    entries.sort();
    entries
}
