//! Where a model is that is named: in a folder, or on the Hub.

use std::path::{Path, PathBuf};

use super::cache::Snapshot;
use super::contents::missing;
use super::id::ModelId;
use super::settings::Hub;
use crate::error::{Error, Result};
use crate::spelling::suggestion;

/// The folder beside experiments in which models are looked for by their names.
const BESIDE: &str = "models";

/// What a model's name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelPlace {
    /// A folder on this machine, which need not be there.
    Folder(PathBuf),
    /// A model on the Hub, which need not be there either.
    Hub(ModelId),
}

/// Says what a model's name stands for: the folder of this name, the one in `models/`, or else, if it can be one and does not
/// begin with `models/`, a model on the Hub.
pub fn place_of(name: &str) -> ModelPlace {
    let (own, beside) = (PathBuf::from(name), Path::new(BESIDE).join(name));
    if own.exists() {
        return ModelPlace::Folder(own);
    }
    if beside.exists() {
        return ModelPlace::Folder(beside);
    }
    match name.parse() {
        Ok(id) if !own.starts_with(BESIDE) => ModelPlace::Hub(id),
        _ => ModelPlace::Folder(own),
    }
}

/// Returns the folder of a model, and its commit if it is one of the Hub. Nothing is downloaded.
///
/// # Errors
/// Fails, saying what gets it, if it is a model of the Hub that is not in the cache.
pub fn model_folder(name: &str) -> Result<(PathBuf, Option<String>)> {
    if name.is_empty() {
        return Err(Error::configuration(
            "the name of the model is empty; name a folder, or a model of the Hub",
        ));
    }
    match place_of(name) {
        ModelPlace::Folder(folder) => match folder.strip_prefix(BESIDE) {
            Ok(own) if !folder.exists() => Err(Error::model(
                name,
                format!(
                    "no such model folder{}; put a Hugging Face folder there, or name another model: `--set model={}`, without \
                     `{BESIDE}/`, is one of the Hub",
                    similar_folder(name),
                    own.display()
                ),
            )),
            _ => Ok((folder, None)),
        },
        ModelPlace::Hub(id) => {
            let hub = Hub::from_environment()?;
            let Snapshot { folder, commit, .. } = hub.cached(&id).ok_or_else(|| hub.absent(&id))?;
            Ok((folder, Some(commit)))
        }
    }
}

/// Returns those of some models that are to be fetched from the Hub before they can be loaded, each once.
///
/// # Errors
/// Fails if it is not clear where the cache is.
pub fn missing_models<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Vec<ModelId>> {
    let mut missing = Vec::new();
    for name in names {
        if let ModelPlace::Hub(id) = place_of(name)
            && Hub::from_environment()?.cached(&id).is_none()
            && !missing.contains(&id)
        {
            missing.push(id);
        }
    }
    Ok(missing)
}

impl Hub {
    /// Says that a model is not in the cache, and what puts it there.
    pub(super) fn absent(&self, id: &ModelId) -> Error {
        let cache = self.cache.display();
        let there = match self.snapshot(id) {
            Some(snapshot) => {
                format!(
                    "the Hugging Face cache {cache} lacks its {}",
                    missing(&snapshot.folder).unwrap_or("files")
                )
            }
            None => format!("it is not in the Hugging Face cache {cache}"),
        };
        let mend = if self.offline {
            format!(
                "HF_HUB_OFFLINE forbids the download: run `child-tuning model fetch {id}` where there is a network and \
                 copy {} into {cache}, or put a Hugging Face folder with config.json, weights and tokenizer at {}",
                id.folder_name(),
                Path::new(BESIDE).join(&id.repository).display()
            )
        } else {
            format!("`child-tuning model fetch {id}` downloads it, and so does `run`")
        };
        let similar = similar_folder(&id.repository);
        Error::model(id.to_string(), format!("no such model folder{similar}, and {there}; {mend}"))
    }
}

/// Returns `; did you mean ...?` with the folder on this machine whose name is nearest, or nothing if none is near.
pub(super) fn similar_folder(name: &str) -> String {
    let path = Path::new(name);
    let parent = path.parent().unwrap_or(Path::new(""));
    let folders = |folder: &Path, before: &Path| {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let folders = entries.filter(|entry| entry.path().join("config.json").is_file());
        let names = folders.map(|entry| before.join(entry.file_name()).display().to_string());
        names.collect::<Vec<_>>()
    };
    let known = [folders(parent, parent), folders(&Path::new(BESIDE).join(parent), parent)].concat();
    suggestion(name, known.iter().map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_the_hub_and_paths_are_never_asked_for_there() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().to_str().unwrap();
        assert_eq!(place_of(there), ModelPlace::Folder(there.into()));
        // The tests run in the folder of the project.
        assert_eq!(place_of("tests"), ModelPlace::Folder("tests".into()));
        for path in ["./x", "/no/such", "../x", "a/b/c", "~/x", "x/", "models/x"] {
            assert_eq!(place_of(path), ModelPlace::Folder(path.into()), "{path}");
        }
        let id = "owner/no-such-model@v1".parse().unwrap();
        assert_eq!(place_of("owner/no-such-model@v1"), ModelPlace::Hub(id));
    }

    #[test]
    fn a_folder_of_models_that_is_not_there_is_none_of_the_hub() {
        let error = model_folder("models/bert-large-cased").unwrap_err().to_string();
        assert!(
            error.contains("no such model folder") && error.contains("`--set model=bert-large-cased`"),
            "{error}"
        );
    }

    #[test]
    fn near_misses_are_folders_with_models() {
        assert_eq!(similar_folder("tests/fixtures/bert_pear"), "; did you mean `tests/fixtures/bert_pair`?");
        assert_eq!(similar_folder("test"), "");
        assert_eq!(similar_folder("nowhere/x"), "");
    }
}
