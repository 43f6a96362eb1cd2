//! What of a repository a model folder needs, and whether a folder has it.

use std::path::Path;

use super::id::is_name;
use crate::data::TOKENIZER_VOCABULARIES;
use crate::error::{Error, Result};
use crate::model::{FORMATS, shard_names};

/// What says what a model is.
pub(super) const CONFIG: &str = "config.json";

/// Returns what a folder lacks of a model that can be loaded; nothing if it lacks nothing.
pub(super) fn missing(folder: &Path) -> Option<&'static str> {
    if !folder.join(CONFIG).is_file() {
        return Some("config.json");
    }
    if weights(folder).is_none() {
        return Some("weights");
    }
    if !has_tokenizer(folder) { Some("a tokenizer") } else { None }
}

/// Returns whether a folder has files that make tokens.
pub(super) fn has_tokenizer(folder: &Path) -> bool {
    TOKENIZER_VOCABULARIES.iter().any(|names| names.iter().all(|name| folder.join(name).is_file()))
}

/// Returns the files that hold the weights in a folder: those that loading takes
/// ([`Weights::open`](crate::model::Weights::open)); nothing if they are not all there.
pub(super) fn weights(folder: &Path) -> Option<Vec<String>> {
    let is_there = |name: &str| folder.join(name).is_file();
    let format = FORMATS.iter().find(|format| is_there(format.file) || is_there(format.index))?;
    if is_there(format.file) {
        return Some(vec![format.file.to_owned()]);
    }
    let shards = shards(&folder.join(format.index)).ok()?;
    let all = shards.iter().all(|shard| is_there(shard));
    all.then(|| [vec![format.index.to_owned()], shards].concat())
}

/// Returns the files that an index of weights names, each once, in order.
///
/// # Errors
/// As for [`shard_names`], and if a name cannot be a part of an address.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    let names = shard_names(index)?;
    match names.iter().find(|name| !is_name(name)) {
        None => Ok(names),
        Some(name) => Err(Error::model(
            index,
            format!("names the file `{name}`, which no model on the Hub has; nothing of it was loaded"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::TOKENIZER_FILES;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    const SHARDED: &str = r#"{"metadata": {}, "weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#;

    #[test]
    fn says_what_is_missing() {
        let missing = |names: &[&str]| {
            let files: Vec<_> = names.iter().map(|name| (*name, "")).collect();
            missing(folder(&files).path())
        };
        assert_eq!(missing(&["model.safetensors", "tokenizer.json"]), Some("config.json"));
        assert_eq!(missing(&["config.json", "tokenizer.json"]), Some("weights"));
        assert_eq!(
            missing(&["config.json", "pytorch_model.bin", "tokenizer_config.json"]),
            Some("a tokenizer")
        );
        for names in TOKENIZER_VOCABULARIES {
            assert_eq!(missing(&[&["config.json", "model.safetensors"], names].concat()), None);
            assert!(names.iter().all(|name| TOKENIZER_FILES.contains(name)), "{names:?} would not be loaded");
        }
        let half = ["config.json", "model.safetensors", "vocab.json"];
        assert_eq!(missing(&half), Some("a tokenizer"));
    }

    #[test]
    fn one_set_of_weights_is_chosen_and_it_is_whole() {
        let of = |files: &[(&str, &str)]| weights(folder(files).path());
        let (index, one, two) =
            (("model.safetensors.index.json", SHARDED), ("m-1.safetensors", ""), ("m-2.safetensors", ""));
        let (whole, old) = (("model.safetensors", ""), ("pytorch_model.bin", ""));
        assert_eq!(of(&[index, one, two, old, whole]).unwrap(), ["model.safetensors"]);
        assert_eq!(of(&[index, one, two, old]).unwrap(), [index.0, "m-1.safetensors", "m-2.safetensors"]);
        assert_eq!(of(&[old]).unwrap(), ["pytorch_model.bin"]);
        let old_index = ("pytorch_model.bin.index.json", SHARDED);
        assert_eq!(of(&[old_index, one, two]).unwrap(), [old_index.0, "m-1.safetensors", "m-2.safetensors"]);
        assert_eq!(of(&[index, one, old]), None, "loading would take the index and miss a shard");
        assert_eq!(of(&[index, one]), None);
        assert_eq!(of(&[(index.0, "{"), one, two]), None);
    }

    #[test]
    fn an_index_whose_names_cannot_stand_in_an_address_is_refused() {
        let named = |name: &str| {
            let text = format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#);
            let folder = folder(&[("index.json", &text)]);
            shards(&folder.path().join("index.json"))
        };
        for name in ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\\\b", "a?b"] {
            let error = named(name).unwrap_err();
            assert!(error.to_string().contains("names the file"), "{name}: {error}");
        }
        assert_eq!(named("model-00001-of-00002.safetensors").unwrap(), ["model-00001-of-00002.safetensors"]);
    }
}
