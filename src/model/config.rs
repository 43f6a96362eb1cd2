//! A model's `config.json`, read as transformers reads it, and the registry of families.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value};

use super::classifier::Network;
use super::layers::Activation;
use super::params::ParameterTable;
use super::{bert, deberta_v2, distilbert, electra, modernbert, roberta, xlnet};
use crate::error::{Error, Result};
use crate::locking::locked;

/// Makes a family's network from its config: declares the parameters and returns the arithmetic. The second argument
/// is the number of outputs of the head.
pub type Build = fn(&ModelConfig, i64, &mut ParameterTable) -> Result<Box<dyn Network>>;

/// The families that run, by `model_type`. A new family is a file beside `bert.rs` and a line here.
pub const FAMILIES: &[(&str, Build)] = &[
    ("bert", bert::build),
    ("deberta-v2", deberta_v2::build),
    ("distilbert", distilbert::build),
    ("electra", electra::build),
    ("modernbert", modernbert::build),
    ("roberta", roberta::build),
    ("xlnet", xlnet::build),
];

/// No size of a model is larger; so no product of two, and no sum of as many as a model has, overflows.
const LARGEST_SIZE: i64 = 1 << 24;
/// No model has more layers.
const MOST_LAYERS: i64 = 1 << 10;

/// A model's `config.json`, with the overrides of the experiment.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    path: PathBuf,
    values: Map<String, Value>,
    /// Whether the experiment overrides some of them.
    is_overridden: bool,
    /// Every key that was looked up here or in a copy, whether it was there or not: what the family reads.
    asked: Arc<Mutex<BTreeSet<String>>>,
    /// The probabilities of dropout that were read, by key.
    dropout: Arc<Mutex<BTreeMap<String, f64>>>,
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
            Ok(Value::Object(values)) => Ok(Self { path, ..Self::from_values(values) }),
            Ok(_) => Err(Error::model(path, "is not a JSON object")),
            Err(error) => Err(Error::model(path, format!("is not valid JSON: {error}"))),
        }
    }

    /// Makes a config that is in no file.
    pub fn from_values(values: Map<String, Value>) -> Self {
        let path = PathBuf::from("config.json");
        Self { path, values, is_overridden: false, asked: Arc::default(), dropout: Arc::default() }
    }

    /// Overrides keys of the config (`model_config:` of an experiment).
    ///
    /// # Errors
    /// Fails if a key is neither in the file nor one that the family reads, since a misspelt key would have no effect; or if
    /// the family cannot be built so.
    pub fn with_overrides(mut self, overrides: &Map<String, Value>) -> Result<Self> {
        let own: BTreeSet<String> = self.values.keys().cloned().collect();
        self.values.extend(overrides.clone());
        self.is_overridden = !overrides.is_empty();
        self.declare(1)?;
        let read = locked(&self.asked).clone();
        let known = || own.iter().chain(&read).map(String::as_str);
        match overrides.keys().find(|key| !own.contains(*key) && !read.contains(*key)) {
            None => Ok(self),
            Some(key) => Err(Error::configuration(format!(
                "model_config: {} has no key `{key}`{}",
                self.path.display(),
                crate::spelling::suggestion(key, known())
            ))),
        }
    }

    /// Looks a key up.
    fn get(&self, key: &str) -> Option<&Value> {
        locked(&self.asked).insert(key.to_owned());
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// Returns the probabilities of dropout that the family reads, by key.
    ///
    /// # Errors
    /// Fails if the family cannot be built.
    pub fn dropout(&self) -> Result<BTreeMap<String, f64>> {
        let own = Self { dropout: Arc::default(), ..self.clone() };
        own.declare(1)?;
        Ok(locked(&own.dropout).clone())
    }

    /// Declares the parameters of a model with so many outputs; returns them with its arithmetic.
    ///
    /// # Errors
    /// Fails if the family does not run here or the config is incomplete.
    pub fn declare(&self, outputs: i64) -> Result<(Box<dyn Network>, ParameterTable)> {
        let mut table = ParameterTable::default();
        let network = self.family()?(self, outputs, &mut table)?;
        Ok((network, table))
    }

    /// Returns the activation function that a key names, or one that is named here.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is not known.
    pub fn activation_or(&self, key: &str, default: &str) -> Result<Activation> {
        Activation::parse(self.text_or(key, default)?)
            .map_err(|error| self.error(format!("`{key}`: {error}")))
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

    /// Returns the keys and values as JSON, in their order.
    pub fn to_json(&self) -> String {
        Value::Object(self.values.clone()).to_string()
    }

    /// Returns a positive integer that must be there.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is missing or of another type.
    pub fn integer(&self, key: &str) -> Result<i64> {
        self.integer_if_any(key)?.ok_or_else(|| self.error(format!("`{key}` is missing")))
    }

    /// Returns a positive integer, if the key is there and not null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is something else, or larger than any size of a model.
    pub fn integer_if_any(&self, key: &str) -> Result<Option<i64>> {
        let positive = |value: &Value| {
            let integer = value.as_i64().filter(|integer| (1..=LARGEST_SIZE).contains(integer));
            integer.ok_or_else(|| {
                self.error(format!("`{key}` must be an integer from 1 to {LARGEST_SIZE}, not {value}"))
            })
        };
        self.get(key).map(positive).transpose()
    }

    /// Returns the number of layers, a positive integer that must be there.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is missing, something else, or more than any model has.
    pub fn layers(&self, key: &str) -> Result<i64> {
        match self.integer(key)? {
            layers if layers > MOST_LAYERS => {
                Err(self
                    .error(format!("`{key}` is {layers}; more than {MOST_LAYERS} layers are not supported")))
            }
            layers => Ok(layers),
        }
    }

    /// Returns a positive integer, if the key is there and neither null nor an integer below 1, as configs say that there is
    /// none of something.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is something else.
    pub fn count_if_any(&self, key: &str) -> Result<Option<i64>> {
        let integer = |value: &Value| {
            let integer = value.as_i64().filter(|integer| *integer <= LARGEST_SIZE);
            integer.ok_or_else(|| {
                self.error(format!("`{key}` must be an integer, at most {LARGEST_SIZE}, not {value}"))
            })
        };
        Ok(self.get(key).map(integer).transpose()?.filter(|&integer| integer > 0))
    }

    /// Returns the number of a token, or a default where the key is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is no integer from zero on.
    pub fn token_or(&self, key: &str, default: i64) -> Result<i64> {
        let token = |value: &Value| {
            let number = value.as_i64().filter(|number| (0..=LARGEST_SIZE).contains(number));
            number.ok_or_else(|| self.error(format!("`{key}` must be the number of a token, not {value}")))
        };
        self.get(key).map_or(Ok(default), token)
    }

    /// Returns a truth value, or a default where the key is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is of another type.
    pub fn boolean_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.error(format!("`{key}` must be true or false, not {value}"))),
        }
    }

    /// Returns a number, or a default where the key is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is of another type.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => {
                value.as_f64().ok_or_else(|| self.error(format!("`{key}` must be a number, not {value}")))
            }
        }
    }

    /// Returns a number of at least 0, or a default where the key is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is something else.
    pub fn magnitude_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.number_or(key, default)? {
            number if number >= 0.0 => Ok(number),
            number => Err(self.error(format!("`{key}` must be at least 0, not {number}"))),
        }
    }

    /// Returns a probability in [0, 1), or a default where the key is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is something else.
    pub fn dropout_or(&self, key: &str, default: f64) -> Result<f64> {
        let value = self.number_or(key, default)?;
        if (0.0..1.0).contains(&value) {
            locked(&self.dropout).insert(key.to_owned(), value);
            return Ok(value);
        }
        Err(self.error(format!("`{key}` must be at least 0 and below 1, not {value}")))
    }

    /// Returns a text, or a default where the key is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is of another type.
    pub fn text_or<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => {
                value.as_str().ok_or_else(|| self.error(format!("`{key}` must be a text, not {value}")))
            }
        }
    }

    /// Returns an object, if the key is there and not null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is something else.
    pub fn object_if_any(&self, key: &str) -> Result<Option<&Map<String, Value>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let error = || self.error(format!("`{key}` must be an object, not {value}"));
        value.as_object().map(Some).ok_or_else(error)
    }

    /// Returns the words of a list, or of a text in lower case with `|` between them, without empty ones; none where the key
    /// is missing or null.
    ///
    /// # Errors
    /// Fails, naming file and key, if it is something else, or has a word that is not among the known ones.
    pub fn words(&self, key: &str, known: &[&str]) -> Result<Vec<String>> {
        let no_words = |value: &Value| self.error(format!("`{key}` must be words, not {value}"));
        let mut words: Vec<String> = match self.get(key) {
            None => Vec::new(),
            Some(Value::String(text)) => text.split('|').map(|word| word.trim().to_lowercase()).collect(),
            Some(value) => {
                let list = value.as_array().ok_or_else(|| no_words(value))?;
                let word = |word: &Value| word.as_str().map(str::to_owned).ok_or_else(|| no_words(value));
                list.iter().map(word).collect::<Result<_>>()?
            }
        };
        words.retain(|word| !word.is_empty());
        match words.iter().find(|word| !known.contains(&word.as_str())) {
            None => Ok(words),
            Some(word) => {
                Err(self.error(format!("`{key}: {word}` is not supported, only {}", known.join(", "))))
            }
        }
    }

    /// Refuses a config that asks for arithmetic that this program does not do.
    ///
    /// # Errors
    /// Fails, naming file and key, if the key has any value but the given one (or is missing or null).
    pub fn require(&self, key: &str, only: &Value) -> Result<()> {
        match self.get(key) {
            None => Ok(()),
            Some(value) if value == only => Ok(()),
            Some(value) => Err(self.error(format!("`{key}: {value}` is not supported, only {only}"))),
        }
    }

    /// Refuses a config in which one size is no multiple of another.
    ///
    /// # Errors
    /// Fails, naming file and keys, then, and if one of them is no positive integer.
    pub fn require_multiple(&self, key: &str, of: &str) -> Result<()> {
        let (size, divisor) = (self.integer(key)?, self.integer(of)?);
        if size % divisor == 0 {
            return Ok(());
        }
        Err(self.error(format!("`{key}` {size} is no multiple of `{of}` {divisor}")))
    }

    /// Returns the names of the labels in id order, from `id2label`, or from `label2id` where that alone is there; none if neither
    /// names any.
    ///
    /// # Errors
    /// Fails, naming file and key, if the labels are not numbered from 0 on.
    pub fn labels(&self) -> Result<Option<Vec<String>>> {
        let (key, named) = match self.object_if_any("id2label")?.filter(|names| !names.is_empty()) {
            Some(names) => {
                ("id2label", names.iter().map(|(id, name)| (id.parse().ok(), text_of(name))).collect())
            }
            None => {
                let ids = self.object_if_any("label2id")?.into_iter().flatten();
                ("label2id", ids.map(|(name, id)| (id.as_u64(), Some(name.clone()))).collect::<Vec<_>>())
            }
        };
        if named.is_empty() {
            return Ok(None);
        }
        let name =
            |id: u64| named.iter().find(|(own, _)| *own == Some(id)).and_then(|(_, name)| name.clone());
        let names: Option<Vec<String>> = (0..named.len() as u64).map(name).collect();
        let fault =
            || self.error(format!("`{key}` must name {} labels by the numbers from 0 on", named.len()));
        names.map(Some).ok_or_else(fault)
    }

    /// Makes an error about this config.
    pub fn error(&self, message: impl Into<String>) -> Error {
        let message = message.into();
        match self.is_overridden {
            true => Error::model(&self.path, format!("with the experiment's `model_config`, {message}")),
            false => Error::model(&self.path, message),
        }
    }
}

/// A name that may be a number.
fn text_of(name: &Value) -> Option<String> {
    match name {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}
