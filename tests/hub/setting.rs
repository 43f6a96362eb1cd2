//! A server with a model, an empty cache, and what was told while the model was fetched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use child_tuning::error::{Error, Result};
use child_tuning::hub::{Hub, HubEvent, ModelId, Snapshot};
use child_tuning::transfer::{Patience, TransferEvent};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::server::{COMMIT, HubFile, HubServer, Repository, hexadecimal, large, repository, small};

/// The model that the server has.
pub const NAME: &str = "owner/tiny";

pub struct Setting {
    pub server: HubServer,
    pub hub: Hub,
    folder: TempDir,
}

/// What a fetch came to, and what was told meanwhile.
pub struct Fetched {
    pub result: Result<Snapshot>,
    /// `FILE from START`, `wait SECONDS: REASON`, or `locked`.
    pub events: Vec<String>,
}

/// Content that no two parts of are alike.
pub fn weights() -> Vec<u8> {
    (0..400_u32).flat_map(|number| Sha256::digest(number.to_le_bytes()).to_vec()).collect()
}

/// The files of a model in every form that the Hub has.
pub fn files() -> Vec<(&'static str, HubFile)> {
    vec![
        ("config.json", small("{\"model_type\": \"bert\"}")),
        ("tokenizer.json", small("{\"a tokenizer\": true}")),
        ("vocab.txt", small("[PAD]\n")),
        ("model.safetensors", large(weights())),
        ("pytorch_model.bin", large("an older form of the same")),
        ("tf_model.h5", large("another library's form")),
        ("README.md", small("# Tiny")),
    ]
}

/// Returns a repository with the usual files but some.
pub fn without(names: &[&str]) -> Repository {
    let files: Vec<_> = files().into_iter().filter(|(name, _)| !names.contains(name)).collect();
    repository(&files)
}

impl Setting {
    /// Starts a server with the usual files after a change.
    pub fn new(change: impl FnOnce(&mut Repository)) -> Self {
        let mut repository = repository(&files());
        change(&mut repository);
        Self::with(&[(NAME, repository)])
    }

    /// Starts a server with some repositories.
    pub fn with(repositories: &[(&str, Repository)]) -> Self {
        let server = HubServer::new(repositories);
        let folder = tempfile::tempdir().unwrap();
        let hub = Hub {
            cache: folder.path().join("hub"),
            endpoint: server.address.clone(),
            token: None,
            token_file: Some(folder.path().join("token")),
            offline: false,
            patience: Patience { attempts: 4, first_wait: Duration::from_secs(1), sleep: |_| {} },
        };
        Self { server, hub, folder }
    }

    pub fn fetch(&self) -> Fetched {
        self.fetch_as(NAME)
    }

    pub fn fetch_as(&self, name: &str) -> Fetched {
        self.fetch_if(name, &|_| Ok(()))
    }

    pub fn fetch_if(&self, name: &str, accept: &dyn Fn(&Path) -> Result<()>) -> Fetched {
        let id: ModelId = name.parse().unwrap();
        let mut events = Vec::new();
        let mut note = |event: HubEvent| match event {
            HubEvent::Transfer(TransferEvent::Started { url, start, .. }) => {
                events.push(format!("{} from {start}", url.rsplit('/').next().unwrap()));
            }
            HubEvent::Transfer(TransferEvent::Waiting { reason, pause }) => {
                events.push(format!("wait {}: {reason}", pause.as_secs()));
            }
            HubEvent::Transfer(TransferEvent::Received(_)) => {}
            HubEvent::Locked(_) => events.push("locked".into()),
        };
        let result = self.hub.fetch(&id, accept, &mut note);
        Fetched { result, events }
    }

    /// Fetches what cannot be fetched, and returns the sentence that says why.
    pub fn refused(&self, code: u8) -> String {
        self.refused_as(NAME, code)
    }

    pub fn refused_as(&self, name: &str, code: u8) -> String {
        let error: Error = self.fetch_as(name).result.unwrap_err();
        assert_eq!(error.exit_code(), code, "{error}");
        let text = error.to_string();
        assert!(!text.contains('\n') && !text.contains("hf_"), "{text}");
        assert!(self.hub.cached(&name.parse().unwrap()).is_none());
        text
    }

    /// A path in the repository's folder in the cache.
    pub fn path(&self, name: &str) -> PathBuf {
        self.hub.cache.join("models--owner--tiny").join(name)
    }

    /// Where the blob of some content lies, if it is a large file.
    pub fn blob(&self, content: &[u8]) -> PathBuf {
        self.path("blobs").join(hexadecimal(&Sha256::digest(content)))
    }

    /// The names in a folder of the repository's, sorted.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(folder)).into_iter().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Asserts that the usual files are there, at the usual commit, and nothing else.
    pub fn assert_whole(&self) {
        let snapshot = format!("snapshots/{COMMIT}");
        let names = ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"];
        assert_eq!(self.names(&snapshot), names);
        for (name, file) in files().into_iter().filter(|(name, _)| names.contains(name)) {
            assert_eq!(std::fs::read(self.path(&snapshot).join(name)).unwrap(), file.content, "{name}");
        }
        assert_eq!(self.names("blobs").len(), 4, "{:?}", self.names("blobs"));
        assert_eq!(std::fs::read_to_string(self.path("refs/main")).unwrap(), COMMIT);
        let cached = self.hub.cached(&NAME.parse().unwrap()).unwrap();
        assert_eq!((cached.commit.as_str(), cached.folder), (COMMIT, self.path(&snapshot)));
    }

    pub fn write_token(&self, token: &str) {
        std::fs::write(self.folder.path().join("token"), token).unwrap();
    }
}
