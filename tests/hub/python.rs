//! Python's huggingface_hub and this program share a cache, in both directions.

use std::path::PathBuf;

use crate::interpreter::python_with;
use crate::server::COMMIT;
use crate::setting::{NAME, Setting, weights};

/// Prints where each file is; loads what is missing unless the network is forbidden.
const DOWNLOAD: &str = "
import sys
from huggingface_hub import hf_hub_download
name, revision, *files = sys.argv[1:]
for file in files:
    print(hf_hub_download(name, file, revision=revision))
";

/// What Python says of the files of a model; `None`, with the reason printed, where the library is not installed.
fn python(setting: &Setting, revision: &str, files: &[&str], offline: bool) -> Option<Vec<PathBuf>> {
    let mut command = python_with("huggingface_hub")?;
    command.args(["-c", DOWNLOAD, NAME, revision]).args(files);
    command.env("HF_HUB_CACHE", &setting.hub.cache).env("HF_ENDPOINT", &setting.server.address);
    command.env("HF_HUB_OFFLINE", if offline { "1" } else { "0" }).env("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
    let output = command.env("HF_HUB_DISABLE_TELEMETRY", "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap().lines().map(PathBuf::from).collect())
}

#[test]
fn python_finds_what_this_program_fetched() {
    let setting = Setting::new(|_| {});
    let folder = setting.fetch().result.unwrap().folder;
    let requests = setting.server.requests().len();
    let files = ["config.json", "tokenizer.json", "model.safetensors"];
    for (revision, offline) in [("main", true), (COMMIT, true), ("main", false)] {
        let Some(paths) = python(&setting, revision, &files, offline) else { return };
        assert_eq!(paths, files.map(|file| folder.join(file)));
        if offline {
            assert_eq!(setting.server.requests().len(), requests);
        }
    }
    let asked = &setting.server.requests()[requests..];
    assert!(!asked.is_empty() && asked.iter().all(|request| request.method == "HEAD"), "{asked:?}");
}

#[test]
fn this_program_finds_what_python_fetched() {
    let setting = Setting::new(|_| {});
    let some = ["config.json", "tokenizer.json"];
    if python(&setting, "main", &some, false).is_none() {
        return;
    }
    assert!(setting.hub.cached(&NAME.parse().unwrap()).is_none());
    let Some(paths) = python(&setting, "main", &["model.safetensors"], false) else { return };
    assert_eq!(std::fs::read(&paths[0]).unwrap(), weights());
    let cached = setting.hub.cached(&NAME.parse().unwrap()).unwrap();
    assert_eq!((cached.commit.as_str(), cached.folder.join("model.safetensors")), (COMMIT, paths[0].clone()));
    // Only what Python did not load.
    assert_eq!(setting.fetch().events, ["vocab.txt from 0"]);
    setting.assert_whole();
}
