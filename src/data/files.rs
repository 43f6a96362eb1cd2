//! Where data sets are looked for, and the files of a split, whose names may hold a `*`.

use std::path::{Path, PathBuf};

use super::fetch::fetched_data_folder;
use super::layout::SplitFiles;
use crate::error::{Error, Result};

/// Returns the files of a choice under a folder, or `None` if one of them is not there.
///
/// # Errors
///
/// Those of [`expand`].
pub(super) fn find(choice: &SplitFiles, folder: &Path) -> Result<Option<Vec<PathBuf>>> {
    let list = choice.rows.as_ref().and_then(|filter| filter.list.as_ref());
    if list.is_some_and(|list| !folder.join(list).exists()) {
        return Ok(None);
    }
    let mut found = Vec::new();
    for file in &choice.files {
        let files = expand(&folder.join(file))?;
        if files.is_empty() || files.iter().any(|file| !file.exists()) {
            return Ok(None);
        }
        found.extend(files);
    }
    Ok(Some(found))
}

/// Returns the files that a path with a `*` in its last part stands for, in alphabetical order;
/// a path without one stands for itself.
///
/// # Errors
///
/// [`Error::Data`] if the names of the files found, such as `train-00000-of-00002.parquet`, say
/// that there should be others; [`Error::Io`] if the folder cannot be read.
pub(super) fn expand(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((start, end)) = name.split_once('*') else { return Ok(vec![path.to_path_buf()]) };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(parent).map_err(Error::io("read", parent))? {
        let name = entry.map_err(Error::io("read", parent))?.file_name().to_string_lossy().into_owned();
        if name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end) {
            names.push(name);
        }
    }
    names.sort();
    if let Some(announced) = names.iter().find_map(|name| shard_count(name))
        && announced != names.len()
    {
        let message = format!("{} files are there of {announced}; fetch the others", names.len());
        return Err(Error::data(path, 0, message));
    }
    Ok(names.into_iter().map(|name| path.with_file_name(name)).collect())
}

/// The number of shards in a name such as `train-00000-of-00002.parquet`.
fn shard_count(name: &str) -> Option<usize> {
    let (stem, _) = name.split_once('.')?;
    stem.rsplit_once("-of-")?.1.parse().ok()
}

/// Returns where data sets are looked for, in order: the folders of the command line, those of the experiment, the
/// folder `data`, and what was fetched. The miniature data that come with the program stand behind what was fetched.
///
/// # Errors
/// Fails, naming it, if a folder of the command line is none, or if all of the experiment are none: other data would take their
/// place unnoticed. (An experiment may list the folders of several machines.)
pub fn data_roots(first: &[PathBuf], then: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let missing = first.iter().find(|folder| !folder.is_dir());
    let missing = missing.or_else(|| then.first().filter(|_| !then.iter().any(|folder| folder.is_dir())));
    if let Some(missing) = missing {
        return Err(Error::configuration(format!("there is no folder {} with data sets", missing.display())));
    }
    let own = PathBuf::from("data");
    let is_miniature = own.join("MINIATURE").exists();
    let mut last = vec![own];
    last.extend(fetched_data_folder());
    if is_miniature {
        last.reverse();
    }
    Ok(first.iter().chain(then).cloned().chain(last).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        folder
    }

    fn names(folder: &Path, pattern: &str) -> Vec<String> {
        let name = |path: PathBuf| path.strip_prefix(folder).unwrap().display().to_string();
        expand(&folder.join(pattern)).unwrap().into_iter().map(name).collect()
    }

    #[test]
    fn a_star_finds_files_in_order_and_a_plain_name_itself() {
        let folder = folder(&["b-2.x", "b-10.x", "b-1.x", "b-1.xy", "a-1.x", "b.x"]);
        assert_eq!(names(folder.path(), "b-*.x"), ["b-1.x", "b-10.x", "b-2.x"]);
        assert_eq!(names(folder.path(), "c-*.x"), [""; 0]);
        assert_eq!(names(folder.path(), "none/*.x"), [""; 0]);
        assert_eq!(names(folder.path(), "c.x"), ["c.x"]);
        // The star is not allowed to use a character twice.
        assert_eq!(names(folder.path(), "b.*.x"), [""; 0]);
    }

    #[test]
    fn a_missing_shard_is_noticed() {
        let folder = folder(&["train-00000-of-00002.parquet", "test-00000-of-00001.parquet"]);
        let pattern = folder.path().join("train-*.parquet");
        let message = expand(&pattern).unwrap_err().to_string();
        assert!(message.ends_with("train-*.parquet: 1 files are there of 2; fetch the others"), "{message}");
        std::fs::write(folder.path().join("train-00001-of-00002.parquet"), "").unwrap();
        assert_eq!(expand(&pattern).unwrap().len(), 2);
        assert_eq!(names(folder.path(), "test-*.parquet").len(), 1);
    }

    #[test]
    fn a_choice_is_found_only_whole() {
        let folder = folder(&["a.tsv", "b-1.tsv"]);
        let choice =
            |files: &[&str]| SplitFiles { files: files.iter().map(PathBuf::from).collect(), rows: None };
        let found = find(&choice(&["a.tsv", "b-*.tsv"]), folder.path()).unwrap();
        assert_eq!(found.unwrap(), [folder.path().join("a.tsv"), folder.path().join("b-1.tsv")]);
        assert_eq!(find(&choice(&["a.tsv", "c-*.tsv"]), folder.path()).unwrap(), None);
        assert_eq!(find(&choice(&["a.tsv", "c.tsv"]), folder.path()).unwrap(), None);
    }
}
