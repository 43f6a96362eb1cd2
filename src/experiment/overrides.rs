//! `--set path=value`: changes to an experiment from the command line.

use std::fmt;
use std::str::FromStr;

use serde_yaml::Value;

use crate::error::{Error, Result};

/// One change: a dotted path of keys and list positions, and a YAML value.
#[derive(Clone, Debug)]
pub struct Override {
    typed: String,
    path: Vec<String>,
    value: Value,
}

impl FromStr for Override {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, value) = text
            .split_once('=')
            .ok_or_else(|| format!("`{text}` has no `=`; write path=value, such as train.epochs=2"))?;
        let path: Vec<String> = path.split('.').map(|key| key.trim().to_owned()).collect();
        if path.iter().any(String::is_empty) {
            return Err(format!("`{text}` has an empty key in its path"));
        }
        if value.trim().is_empty() {
            return Err(format!("`{text}` has no value; `{text}null` sets the key to nothing"));
        }
        let value =
            serde_yaml::from_str(value).map_err(|error| format!("`{value}` is not a YAML value: {error}"))?;
        Ok(Self { typed: text.to_owned(), path, value })
    }
}

impl Override {
    /// Returns whether it sets a key, a part of it, or something that holds it; the key is a dotted path.
    pub fn concerns(&self, key: &str) -> bool {
        self.path.iter().zip(key.split('.')).all(|(own, part)| own == part)
    }
}

impl fmt::Display for Override {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&self.typed)
    }
}

/// Applies a change to a YAML tree; missing mappings on the way are made.
///
/// # Errors
/// Fails if the path goes through a plain value or beyond the end of a list.
pub fn apply(tree: &mut Value, change: &Override) -> Result<()> {
    let mut place = tree;
    for key in &change.path {
        if place.is_null() {
            *place = Value::Mapping(Default::default());
        }
        place = match place {
            Value::Mapping(mapping) => mapping.entry(Value::String(key.clone())).or_insert(Value::Null),
            Value::Sequence(list) => {
                let length = list.len();
                key.parse::<usize>().ok().and_then(|index| list.get_mut(index)).ok_or_else(|| {
                    Error::configuration(format!(
                        "--set {change}: `{key}` is not an index into a list of {length} (from 0)"
                    ))
                })?
            }
            _ => {
                return Err(Error::configuration(format!(
                    "--set {change}: the value above `{key}` has no keys"
                )));
            }
        };
    }
    *place = change.value.clone();
    Ok(())
}
