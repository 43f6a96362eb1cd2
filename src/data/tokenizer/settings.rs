//! What `tokenizer_config.json` says.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::utils::truncation::TruncationDirection;

use crate::error::{Error, Result};

/// The keys of a folder's `tokenizer_config.json`; none if there is no such file.
pub(super) struct Settings {
    path: PathBuf,
    keys: Map<String, Value>,
}

impl Settings {
    /// Reads the settings of a folder.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the file is there and is no JSON object.
    pub fn read(folder: &Path) -> Result<Settings> {
        let path = folder.join("tokenizer_config.json");
        let keys = read_object(&path)?.unwrap_or_default();
        Ok(Settings { path, keys })
    }

    /// Returns where the settings stand.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the settings themselves.
    pub fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    /// Returns a switch, or what it is where the file does not say.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if it is neither true nor false.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.keys.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => {
                Err(Error::model(&self.path, format!("`{key}` must be true or false, but is {other}")))
            }
        }
    }

    /// Returns a switch that may be left open, as with null.
    ///
    /// # Errors
    ///
    /// As for [`Settings::flag`].
    pub fn open_flag(&self, key: &str) -> Result<Option<bool>> {
        match self.keys.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.flag(key, false).map(Some),
        }
    }

    /// Returns at which end texts are cut that are too long.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if `truncation_side` is neither end.
    pub fn truncation_side(&self) -> Result<TruncationDirection> {
        match self.keys.get("truncation_side") {
            None => Ok(TruncationDirection::Right),
            Some(side) if side == "right" => Ok(TruncationDirection::Right),
            Some(side) if side == "left" => Ok(TruncationDirection::Left),
            Some(other) => Err(Error::model(
                &self.path,
                format!("`truncation_side` must be \"left\" or \"right\", but is {other}"),
            )),
        }
    }
}

/// Reads a file that holds one JSON object; nothing if there is no such file.
pub(super) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    serde_json::from_str(&text).map(Some).map_err(|error| Error::model(path, error.to_string()))
}
