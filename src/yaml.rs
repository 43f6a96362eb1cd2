//! YAML files that users write, and errors that lead to the place in them.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::spelling::suggestion;

/// Reads a value from the text of a file. Merge keys (`<<: *other`) are resolved.
///
/// # Errors
/// [`Error::Configuration`] that names file, line and column, the key, and the nearest valid spelling; in a file with merge
/// keys, from which the parser remembers no places, the key alone.
pub fn parse<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T> {
    // Some editors begin a file with a byte order mark.
    let text = text.trim_start_matches('\u{feff}');
    let in_file = |error| located(&error, text, path);
    if !text.contains("<<") {
        return serde_yaml::from_str(text).map_err(in_file);
    }
    let mut tree: serde_yaml::Value = serde_yaml::from_str(text).map_err(in_file)?;
    // By way of text, from which errors know the key; the line is one of that text.
    let merged = tree.apply_merge().and_then(|()| serde_yaml::to_string(&tree));
    merged.and_then(|merged| serde_yaml::from_str(&merged)).map_err(|error| {
        Error::configuration(format!("{}: {}", path.display(), described(without_place(&error.to_string()))))
    })
}

/// Turns a YAML error into `file:line:column: key: message; did you mean …`.
fn located(error: &serde_yaml::Error, text: &str, path: &Path) -> Error {
    let message = error.to_string();
    let Some(location) = error.location() else {
        return Error::configuration(format!("{}: {}", path.display(), described(&message)));
    };
    let message = without_place(&message);
    let (line, column) = place_of_key(message, text, location.line(), location.column());
    Error::configuration(format!("{}:{line}:{column}: {}", path.display(), described(message)))
}

fn without_place(message: &str) -> &str {
    message.split(" at line ").next().unwrap_or_default()
}

/// The parser points at the start of the mapping that holds a bad key; the key itself is found from there.
fn place_of_key(message: &str, text: &str, line: usize, column: usize) -> (usize, usize) {
    let second = message.contains("duplicate field");
    let Some(key) = message.split('`').nth(1).filter(|_| second || message.contains("unknown field")) else {
        return (line, column);
    };
    let lines = text.lines().enumerate().skip(line.saturating_sub(1));
    let mut found = lines.flat_map(|(number, content)| {
        content.match_indices(key).filter_map(move |(start, _)| {
            let before = content[..start].chars().next_back();
            let starts = before.is_none_or(|letter| letter.is_whitespace() || "{,-".contains(letter));
            let after = content[start + key.len()..].trim_start();
            (starts && after.starts_with(':')).then_some((number + 1, start + 1))
        })
    });
    found.nth(usize::from(second)).unwrap_or((line, column))
}

/// Puts an error's message in the words of YAML, with the nearest valid spelling where a name is unknown.
pub fn described(message: &str) -> String {
    let message = &in_the_words_of_yaml(message);
    let words: Vec<&str> = message.split('`').collect();
    if !message.contains("unknown field") && !message.contains("unknown variant") || words.len() < 4 {
        return message.to_owned();
    }
    let known: Vec<&str> = words.iter().skip(3).step_by(2).copied().collect();
    format!("{message}{}", suggestion(words[1], known))
}

/// Replaces the names that types have in this program.
fn in_the_words_of_yaml(message: &str) -> String {
    let mut text = message.to_owned();
    for words in ["expected a YAML tag starting with '!'", "expected a Value::Tagged enum"] {
        text = text.replace(words, "expected one word here, and no list or map");
    }
    if let Some((before, name)) = message.split_once("expected struct ") {
        let rest = name.trim_start_matches(|letter: char| letter.is_alphanumeric() || letter == '_');
        text = format!("{before}expected keys with values{rest}");
    }
    for (type_name, words) in [
        ("expected f64", "expected a number"),
        ("expected u64", "expected a whole number"),
        ("expected usize", "expected a whole number"),
        ("expected any YAML value", "expected a smaller number"),
        ("expected an array of length 2", "expected a list of 2"),
        ("unit value", "null"),
    ] {
        text = text.replace(type_name, words);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn merge_keys_take_over_what_is_not_typed_anew() {
        type Numbers = BTreeMap<String, BTreeMap<String, u64>>;
        let numbers: Numbers =
            parse("one: &one {a: 1, b: 2}\ntwo:\n  <<: *one\n  b: 3\n", Path::new("x.yaml")).unwrap();
        assert_eq!(numbers["two"], [("a".into(), 1), ("b".into(), 3)].into());
        let fault = parse::<Numbers>("one: &one {a: 1}\ntwo: {<<: *one, b: x}\n", Path::new("x.yaml"));
        let message = fault.unwrap_err().to_string();
        assert!(message.starts_with("x.yaml: two.b: invalid type"), "{message}");
    }

    #[test]
    fn messages_have_no_names_of_types() {
        for (message, expected) in [
            (
                "train: invalid type: integer `3`, expected struct TrainSpec",
                "train: invalid type: integer `3`, expected keys with values",
            ),
            (
                "seeds: invalid type: unit value, expected u64",
                "seeds: invalid type: null, expected a whole number",
            ),
        ] {
            assert_eq!(described(message), expected);
        }
    }
}
