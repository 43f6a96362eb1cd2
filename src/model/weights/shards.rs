//! Weights in several files, and the index that says which tensor is in which.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::marker::PhantomData;
use std::path::{Component, Path};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::file::WeightsFile;
use crate::error::{Error, Result};
use crate::spelling::{excerpt, quoted};

/// The longest index that is read; one of a thousand tensors has some hundred kilobytes.
const LONGEST_INDEX: u64 = 16 << 20;

/// The longest name of a file that systems allow, in bytes.
const LONGEST_FILE_NAME: usize = 255;

/// The files of an index.
pub(super) struct Shards {
    /// In the order of their names.
    pub files: Vec<WeightsFile>,
    /// Each tensor, and the name of its file.
    tensors: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: Entries<String>,
}

/// The entries of a JSON object, of which no two have the same key.
pub(super) struct Entries<V>(pub Vec<(String, V)>);

/// Reads an index, and opens the files that it names.
///
/// # Errors
/// As for [`shard_names`], and if a file is missing.
pub(super) fn open(index: &Path) -> Result<Shards> {
    let tensors = read(index)?;
    let folder = index.parent().unwrap_or(Path::new(""));
    let open = |name: &str| {
        let path = folder.join(name);
        if path.symlink_metadata().is_err() {
            return Err(Error::model(
                path,
                format!("is missing, and {} names it; download the model again", index.display()),
            ));
        }
        WeightsFile::open(&path)
    };
    let files = names(&tensors).into_iter().map(open).collect::<Result<_>>()?;
    Ok(Shards { files, tensors })
}

/// Returns the files that an index names, each once, in order; whether they are there is not looked at.
///
/// # Errors
/// Fails if the index is no JSON, has no `weight_map`, names no file, a tensor twice, or a file that is not in the folder
/// itself.
pub(crate) fn shard_names(index: &Path) -> Result<Vec<String>> {
    Ok(names(&read(index)?).into_iter().map(str::to_owned).collect())
}

/// Reads which tensor is in which file, and checks the names of the files.
fn read(index: &Path) -> Result<Vec<(String, String)>> {
    let file = WeightsFile::open(index)?;
    if file.length() > LONGEST_INDEX {
        return Err(file.fault(format!("has more than {LONGEST_INDEX} bytes; it is no index of shards")));
    }
    let parsed = serde_json::from_slice::<Index>(&file.map(0..file.length())?);
    let Entries(tensors) = parsed
        .map_err(|error| {
            let error = excerpt(&error.to_string(), 300);
            file.fault(format!("is no index of shards ({error}); download or save it again"))
        })?
        .weight_map;
    if tensors.is_empty() {
        return Err(file.fault("names no files; download or save it again"));
    }
    // Links are not followed to see where they lead: the Hub's cache consists of them, and whoever can make a link in the
    // folder needs no index.
    for name in names(&tensors) {
        let plain = matches!(
            Path::new(name).components().collect::<Vec<_>>()[..],
            [Component::Normal(only)] if only == name
        );
        // A backslash separates folders elsewhere, and messages print names.
        if !plain || name.contains('\\') || name.contains(char::is_control) || name.len() > LONGEST_FILE_NAME
        {
            return Err(file
                .fault(format!("names the file {}; shards must be files of the same folder", quoted(name))));
        }
    }
    Ok(tensors)
}

fn names(tensors: &[(String, String)]) -> BTreeSet<&str> {
    tensors.iter().map(|(_, shard)| shard.as_str()).collect()
}

impl Shards {
    /// Returns the first tensor that is not in its file, and the file's name; `file_of` finds where a tensor is.
    pub fn misplaced<'a>(&self, file_of: impl Fn(&str) -> Option<&'a Path>) -> Option<(&str, &str)> {
        let is_there = |(tensor, shard): &&(String, String)| {
            file_of(tensor).and_then(Path::file_name).is_some_and(|name| name == shard.as_str())
        };
        let misplaced = self.tensors.iter().find(|entry| !is_there(entry));
        misplaced.map(|(tensor, shard)| (tensor.as_str(), shard.as_str()))
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Entries<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor(PhantomData))
    }
}

struct EntriesVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for EntriesVisitor<V> {
    type Value = Entries<V>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut entries, mut seen) = (Vec::new(), HashSet::new());
        while let Some((key, value)) = map.next_entry::<String, V>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format_args!("{} is there twice", quoted(&key))));
            }
            entries.push((key, value));
        }
        Ok(Entries(entries))
    }
}
