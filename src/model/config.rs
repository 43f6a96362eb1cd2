//! A model's `config.json`, read as transformers reads it, and the registry of families.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::bert;
use super::classifier::Network;
use super::params::ParameterTable;
use crate::error::{Error, Result};

/// Makes a family's network from its config: declares the parameters and returns the arithmetic. The second argument
/// is the number of outputs of the head.
pub type Build = fn(&ModelConfig, i64, &mut ParameterTable) -> Result<Box<dyn Network>>;

/// The families that run, by `model_type`. A new family is a file beside `bert.rs` and a line here.
pub const FAMILIES: &[(&str, Build)] = &[("bert", bert::build)];

/// A model's `config.json`, with the overrides of the experiment.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    path: PathBuf,
    values: Map<String, Value>,
}

impl ModelConfig {
    /// Reads `config.json` in a model folder.
    ///
    /// # Errors
    /// Fails if the file is missing or is not a JSON object.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::model(
                folder,
                format!("has no readable config.json ({error}); name a folder that save_pretrained wrote"),
            )
        })?;
        match serde_json::from_str(&text) {
            Ok(Value::Object(values)) => Ok(Self { path, values }),
            Ok(_) => Err(Error::model(path, "is not a JSON object")),
            Err(error) => Err(Error::model(path, format!("is not valid JSON: {error}"))),
        }
    }

    /// Makes a config that is in no file.
    pub fn from_values(values: Map<String, Value>) -> Self {
        Self { path: PathBuf::from("config.json"), values }
    }

    /// Overrides keys of the config (`model_config:` of an experiment).
    ///
    /// # Errors
    /// Fails if a key is neither in the file nor one that the family reads; a misspelt key would have no effect.
    pub fn with_overrides(mut self, overrides: &Map<String, Value>) -> Result<Self> {
        const READ_BY_FAMILIES: [&str; 6] = [
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "classifier_dropout",
            "layer_norm_eps",
            "hidden_act",
            "initializer_range",
        ];
        for (key, value) in overrides {
            if !self.values.contains_key(key) && !READ_BY_FAMILIES.contains(&key.as_str()) {
                let known = self.values.keys().map(String::as_str).chain(READ_BY_FAMILIES);
                let hint = crate::spelling::suggestion(key, known);
                return Err(Error::configuration(format!(
                    "model_config: {} has no key `{key}`{hint}",
                    self.path.display()
                )));
            }
            self.values.insert(key.clone(), value.clone());
        }
        Ok(self)
    }

    /// Returns the family's constructor.
    ///
    /// # Errors
    /// Fails if the family does not run here, listing those that do.
    pub fn family(&self) -> Result<Build> {
        let model_type = self.text_or("model_type", "bert")?;
        FAMILIES.iter().find(|(name, _)| *name == model_type).map(|(_, build)| *build).ok_or_else(|| {
            let known: Vec<_> = FAMILIES.iter().map(|(name, _)| *name).collect();
            self.error(format!(
                "model_type `{model_type}` is not supported yet; known are {}",
                known.join(", ")
            ))
        })
    }

    /// Returns all keys and values.
    pub fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// Returns a positive integer that must be there.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is missing or of another type.
    pub fn integer(&self, key: &str) -> Result<i64> {
        match self.values.get(key).map(Value::as_i64) {
            Some(Some(value)) if value > 0 => Ok(value),
            Some(_) => {
                Err(self.error(format!("`{key}` must be a positive integer, not {}", self.values[key])))
            }
            None => Err(self.error(format!("`{key}` is missing"))),
        }
    }

    /// Returns a number, or a default where the key is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is of another type.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => {
                value.as_f64().ok_or_else(|| self.error(format!("`{key}` must be a number, not {value}")))
            }
        }
    }

    /// Returns a probability in [0, 1), or a default where the key is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is something else.
    pub fn dropout_or(&self, key: &str, default: f64) -> Result<f64> {
        let value = self.number_or(key, default)?;
        if (0.0..1.0).contains(&value) {
            return Ok(value);
        }
        Err(self.error(format!("`{key}` must be at least 0 and below 1, not {value}")))
    }

    /// Returns a text, or a default where the key is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is of another type.
    pub fn text_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => {
                value.as_str().ok_or_else(|| self.error(format!("`{key}` must be a text, not {value}")))
            }
        }
    }

    /// Refuses a config that asks for arithmetic that this program does not do.
    ///
    /// # Errors
    /// Fails, naming file and key, if the key has any value but the given one (or is missing or null).
    pub fn require(&self, key: &str, only: &Value) -> Result<()> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if value == only => Ok(()),
            Some(value) => Err(self.error(format!("`{key}: {value}` is not supported, only {only}"))),
        }
    }

    /// Returns the names of the labels in id order, if the config has `id2label`.
    pub fn labels(&self) -> Option<Vec<String>> {
        let names = self.values.get("id2label")?.as_object()?;
        (0..names.len()).map(|id| names.get(&id.to_string())?.as_str().map(str::to_owned)).collect()
    }

    /// Makes an error about this config.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::model(&self.path, message)
    }
}
