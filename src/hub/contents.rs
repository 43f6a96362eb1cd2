//! What of a repository a model folder needs, and whether a folder has it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use super::id::is_name;
use crate::data::TOKENIZER_VOCABULARIES;
use crate::error::{Error, Result};

/// What says what a model is.
pub(super) const CONFIG: &str = "config.json";
/// Weights in one file.
pub(super) const WEIGHTS: &str = "model.safetensors";
/// Says which of several files holds which weights.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Weights as old versions of transformers wrote them.
pub(super) const OLD_WEIGHTS: &str = "pytorch_model.bin";

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

/// Returns the files that hold the weights in a folder, as transformers chooses among them; nothing if no set of them is
/// complete.
pub(super) fn weights(folder: &Path) -> Option<Vec<String>> {
    let is_there = |name: &str| folder.join(name).is_file();
    if is_there(WEIGHTS) {
        return Some(vec![WEIGHTS.to_owned()]);
    }
    if is_there(INDEX) {
        let shards = shards(&folder.join(INDEX)).ok()?;
        if shards.iter().all(|shard| is_there(shard)) {
            return Some([vec![INDEX.to_owned()], shards].concat());
        }
    }
    is_there(OLD_WEIGHTS).then(|| vec![OLD_WEIGHTS.to_owned()])
}

/// Returns the files that an index of weights names, each once, in order.
///
/// # Errors
/// Fails if it is no such index, or a name is not that of a file beside it.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(Error::io("read", index))?;
    let fault = |message: String| Error::model(index, message);
    let Index { weight_map } =
        serde_json::from_str(&text).map_err(|error| fault(format!("is no index of weights: {error}")))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    if let Some(name) = names.iter().find(|name| !is_name(name)) {
        return Err(fault(format!("names `{name}`, which is no file beside it; nothing of it was loaded")));
    }
    Ok(names.into_iter().collect())
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
        let (index, one, two) = ((INDEX, SHARDED), ("m-1.safetensors", ""), ("m-2.safetensors", ""));
        let old = (OLD_WEIGHTS, "");
        assert_eq!(of(&[index, one, two, old, (WEIGHTS, "")]).unwrap(), [WEIGHTS]);
        assert_eq!(of(&[index, one, two, old]).unwrap(), [INDEX, "m-1.safetensors", "m-2.safetensors"]);
        assert_eq!(of(&[index, one, old]).unwrap(), [OLD_WEIGHTS]);
        assert_eq!(of(&[index, one]), None);
        assert_eq!(of(&[(INDEX, "{"), one, two]), None);
    }

    #[test]
    fn an_index_that_leads_out_of_its_folder_is_refused() {
        let named = |name: &str| {
            let text = format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#);
            shards(&folder(&[(INDEX, &text)]).path().join(INDEX))
        };
        for name in ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\\\b", "a?b"] {
            let error = named(name).unwrap_err();
            assert!(error.to_string().contains("which is no file beside it"), "{name}: {error}");
        }
        assert_eq!(named("model-00001-of-00002.safetensors").unwrap(), ["model-00001-of-00002.safetensors"]);
        let other = shards(&folder(&[(INDEX, "[]")]).path().join(INDEX)).unwrap_err();
        assert!(other.to_string().contains("is no index of weights"), "{other}");
    }
}
