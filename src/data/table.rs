//! Text files as rows of cells: the bytes, the line ends, the quoting, and nothing of any task.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::task::Format;
use crate::error::{Error, Result};

/// A whole file in memory, known to be UTF-8.
pub(super) struct TextFile {
    path: PathBuf,
    bytes: Vec<u8>,
    /// Where the text starts: behind a byte order mark.
    start: usize,
}

impl TextFile {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] if it is missing, a folder or not UTF-8; [`Error::Io`] if it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Err(Error::data(path, 0, "is a folder; name a file"));
        }
        if !path.exists() {
            return Err(Error::data(path, 0, "there is no such file"));
        }
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        if let Err(error) = std::str::from_utf8(&bytes) {
            let line = bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count() + 1;
            return Err(Error::data(path, line, "is not UTF-8; convert the file to UTF-8"));
        }
        let start = if bytes.starts_with("\u{feff}".as_bytes()) { 3 } else { 0 };
        Ok(TextFile { path: path.to_path_buf(), bytes, start })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds the file's bytes, as they are on disk, to a checksum.
    pub fn add_to(&self, checksum: &mut Sha256) {
        checksum.update(&self.bytes);
    }

    /// Finds out how the cells are told apart, from the first line more than from the name: the
    /// original STS-B files are called `.csv` and separated by tabs.
    pub fn guess_format(&self) -> Format {
        let extension = self.path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
        let extension = extension.to_ascii_lowercase();
        let first = self.lines().next().map_or("", |(_, line)| line);
        let is_object = first.starts_with('{')
            && serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(first).is_ok();
        if is_object || matches!(extension.as_str(), "jsonl" | "ndjson" | "json") {
            Format::Jsonl
        } else if !first.contains('\t') && (extension == "csv" || first.contains(',')) {
            Format::Csv
        } else {
            Format::Tsv
        }
    }

    /// Splits the file into rows; `quoting` is what a `"` means and has no say in JSON Lines.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] with the line that is not a row.
    pub fn rows(&self, format: Format, quoting: bool) -> Result<Rows<'_>> {
        match (format, quoting) {
            (Format::Jsonl, _) => self.objects(),
            (Format::Csv, true) => self.quoted_rows(b','),
            (Format::Tsv, true) => self.quoted_rows(b'\t'),
            (Format::Csv, false) => Ok(self.plain_rows(',')),
            (Format::Tsv, false) => Ok(self.plain_rows('\t')),
        }
    }

    /// Lines with their numbers from 1, without line ends and without blank lines at the end.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let text = std::str::from_utf8(&self.bytes[self.start..]).unwrap_or_default();
        let text = text.trim_end_matches(['\n', '\r']);
        // An empty text would still be split into one empty line.
        let lines = (!text.is_empty()).then(|| text.split('\n'));
        let lines = lines.into_iter().flatten().enumerate();
        lines.map(|(index, line)| (index + 1, line.strip_suffix('\r').unwrap_or(line)))
    }

    /// Splits at every separator: a `"` is a character like any other.
    fn plain_rows(&self, separator: char) -> Rows<'_> {
        let rows = self.lines().map(|(line, text)| {
            let cells = text.split(separator).map(|cell| Some(Cow::Borrowed(cell))).collect();
            Row { line, cells }
        });
        Rows { columns: None, rows: rows.collect() }
    }

    fn quoted_rows(&self, separator: u8) -> Result<Rows<'_>> {
        let mut reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(separator)
            .from_reader(&self.bytes[self.start..]);
        let mut rows = Vec::new();
        for record in reader.records() {
            let record = record.map_err(|error| Error::data(&self.path, 0, error.to_string()))?;
            let line = record.position().map_or(0, |position| position.line() as usize);
            let cells = record.iter().map(|cell| Some(Cow::Owned(cell.to_string()))).collect();
            rows.push(Row { line, cells });
        }
        Ok(Rows { columns: None, rows })
    }

    /// Reads JSON Lines; the columns are the keys of all objects in order of first appearance.
    fn objects(&self) -> Result<Rows<'_>> {
        let mut columns: Vec<String> = Vec::new();
        let mut rows = Vec::new();
        for (line, text) in self.lines() {
            let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(text)
                .map_err(|error| Error::data(&self.path, line, format!("is not a JSON object: {error}")))?;
            let mut cells = vec![None; columns.len()];
            for (key, value) in object {
                let cell = scalar(value).map(Cow::Owned);
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
        Ok(Rows { columns: Some(columns), rows })
    }
}

/// The text of a string, number or truth value; `None` for null, lists and objects.
fn scalar(value: serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::String(text) => Some(text),
        serde_json::Value::Number(number) => Some(number.to_string()),
        serde_json::Value::Bool(truth) => Some(truth.to_string()),
        _ => None,
    }
}

/// The rows of a file; rows may differ in width.
pub(super) struct Rows<'a> {
    /// The names of the columns where every row carries them, as in JSON Lines.
    pub columns: Option<Vec<String>>,
    pub rows: Vec<Row<'a>>,
}

/// One row and the line it starts at.
pub(super) struct Row<'a> {
    pub line: usize,
    /// `None` is a cell that the file does not have, such as a missing key.
    pub cells: Vec<Option<Cow<'a, str>>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, content: impl AsRef<[u8]>) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    /// Reads a file and joins its cells with `|`, a missing cell being `~`.
    fn rows(name: &str, content: &str, format: Format, quoting: bool) -> Vec<String> {
        let (_folder, path) = file(name, content);
        let file = TextFile::read(&path).unwrap();
        let rows = file.rows(format, quoting).unwrap();
        let join = |row: &Row| {
            let cells: Vec<_> = row.cells.iter().map(|cell| cell.as_deref().unwrap_or("~")).collect();
            format!("{}:{}", row.line, cells.join("|"))
        };
        rows.rows.iter().map(join).collect()
    }

    #[test]
    fn byte_order_mark_line_ends_and_missing_final_newline_leave_no_trace() {
        let expected = ["1:a|b", "2:c|", "3:|d"];
        for content in
            ["a\tb\nc\t\n\td\n", "\u{feff}a\tb\r\nc\t\r\n\td\r\n", "a\tb\nc\t\n\td", "a\tb\r\nc\t\r\n\td\r"]
        {
            assert_eq!(rows("f.tsv", content, Format::Tsv, false), expected, "{content:?}");
        }
    }

    #[test]
    fn without_quoting_a_quotation_mark_is_a_character() {
        let content = "\"a\tb\nsaid \"c\"\td\n";
        assert_eq!(rows("f.tsv", content, Format::Tsv, false), ["1:\"a|b", "2:said \"c\"|d"]);
    }

    #[test]
    fn with_quoting_a_cell_may_hold_separators_and_line_ends() {
        let content = "text,label\n\"one, \"\"two\"\"\nthree\",1\nfour,0\n";
        let expected = ["1:text|label", "2:one, \"two\"\nthree|1", "4:four|0"];
        assert_eq!(rows("f.csv", content, Format::Csv, true), expected);
    }

    #[test]
    fn json_lines_line_up_by_key_and_keep_gaps() {
        let content = "{\"a\": \"x\", \"n\": 3.8}\n{\"n\": null, \"b\": [1], \"a\": \"y\"}\n";
        assert_eq!(rows("f.jsonl", content, Format::Jsonl, false), ["1:x|3.8|~", "2:y|~|~"]);
    }

    #[test]
    fn broken_json_names_its_line() {
        let (_folder, path) = file("f.jsonl", "{\"a\": 1}\n[1]\n");
        let file = TextFile::read(&path).unwrap();
        let message = file.rows(Format::Jsonl, false).err().unwrap().to_string();
        assert!(message.contains("f.jsonl:2: is not a JSON object"), "{message}");
    }

    #[test]
    fn the_format_is_told_from_the_first_line_before_the_name() {
        let cases = [
            ("sts.csv", "genre\tfile\n", Format::Tsv),
            ("a.csv", "text\n", Format::Csv),
            ("a.txt", "text,label\n", Format::Csv),
            ("a.tsv", "sentence\nNo, never.\n", Format::Tsv),
            ("a.txt", "{\"text\": \"x\"}\n", Format::Jsonl),
            ("a.tsv", "{x}\ty\n", Format::Tsv),
            ("a.JSONL", "[]\n", Format::Jsonl),
        ];
        for (name, content, expected) in cases {
            let (_folder, path) = file(name, content);
            assert_eq!(TextFile::read(&path).unwrap().guess_format(), expected, "{name} {content:?}");
        }
    }

    #[test]
    fn what_is_no_text_file_is_refused_with_its_place() {
        let (folder, path) = file("f.tsv", b"a\tb\nc\t\xff\n");
        let message = |path: &Path| TextFile::read(path).err().unwrap().to_string();
        assert!(message(&path).contains("f.tsv:2: is not UTF-8"));
        assert!(message(folder.path()).contains("is a folder"));
        assert!(message(&folder.path().join("none.tsv")).contains("there is no such file"));
    }

    #[test]
    fn checksum_is_of_the_bytes_on_disk() {
        let (_folder, path) = file("f.tsv", "\u{feff}abc");
        let mut checksum = Sha256::new();
        TextFile::read(&path).unwrap().add_to(&mut checksum);
        let expected = "1c28dc3f1f804a1ad9c9b4b4cf5e2658d16ad4ed08e3020d04a8d2865018947c";
        assert_eq!(crate::values::hexadecimal(&checksum.finalize()), expected);
    }
}
