//! JSON Lines: one object a line, its keys the columns.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::{DataFile, Request, Row, Rows, lines};
use crate::error::{Error, Result};

pub(super) fn fits(file: &DataFile) -> bool {
    let first = file.first_line();
    let is_object = first.starts_with('{') && serde_json::from_str::<Map<String, Value>>(first).is_ok();
    is_object || matches!(file.extension().as_str(), "jsonl" | "ndjson" | "json")
}

/// Reads JSON Lines, empty ones apart; the columns are the keys of all objects in order of first appearance.
pub(super) fn read<'a>(file: &'a DataFile, request: &Request) -> Result<Rows<'a>> {
    let mut columns: Vec<String> = Vec::new();
    let mut rows = Vec::new();
    for (line, text) in lines(file.text()?).filter(|(_, text)| !text.trim().is_empty()) {
        let object: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| Error::data(&file.path, line, format!("is not a JSON object: {error}")))?;
        let mut cells = vec![None; columns.len()];
        for (key, value) in object {
            let cell = if request.wants(&key) { scalar(value).map(Cow::Owned) } else { None };
            match columns.iter().position(|column| *column == key) {
                Some(position) => cells[position] = cell,
                None => {
                    columns.push(key);
                    cells.push(cell);
                }
            }
        }
        rows.push(Row { line, cells });
    }
    for row in &mut rows {
        row.cells.resize(columns.len(), None);
    }
    Ok(Rows { columns: Some(columns), quoted: false, rows })
}

/// The text of a string, number or truth value; `None` for null, lists and objects.
fn scalar(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{file, rows, show};
    use super::super::{Format, Request};

    #[test]
    fn objects_line_up_by_key_and_keep_gaps() {
        let content = "{\"a\": \"x\", \"n\": 3.8}\n{\"n\": null, \"b\": [1], \"a\": \"y\"}\n";
        assert_eq!(rows(content, Format::Jsonl, None), ["1:x|3.8|~", "2:y|~|~"]);
        let with_empty_lines = content.replace('\n', "\n \n\n");
        assert_eq!(rows(&with_empty_lines, Format::Jsonl, None), ["1:x|3.8|~", "4:y|~|~"]);
    }

    #[test]
    fn columns_that_nobody_wants_keep_their_place_and_stay_empty() {
        let (_folder, file) = file("f", "{\"parse\": \"(x)\", \"a\": \"x\"}\n");
        let request = Request { columns: Some(&["a"]), ..Request::default() };
        let found = file.rows(Format::Jsonl, &request).unwrap();
        assert_eq!(found.columns.as_ref().unwrap(), &["parse", "a"]);
        assert_eq!(show(&found), ["1:~|x"]);
    }

    #[test]
    fn broken_json_names_its_line() {
        let (_folder, file) = file("f.jsonl", "{\"a\": 1}\n[1]\n");
        let message = file.rows(Format::Jsonl, &Request::default()).err().unwrap().to_string();
        assert!(message.contains("f.jsonl:2: is not a JSON object"), "{message}");
    }
}
