//! Files as rows of cells: the bytes, what tells the cells apart, and nothing of any task.
//!
//! A format is one file beside this one, a variant of [`Format`] and a line of [`READERS`].

mod delimited;
mod json_lines;
mod parquet;

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

#[cfg(test)]
pub(super) use parquet::tests::{Column, write};

/// How the cells of a file are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Commas between the cells.
    Csv,
    /// Tabs between the cells.
    Tsv,
    /// JSON Lines: one object a line.
    Jsonl,
    /// Apache Parquet, as the Hugging Face Hub holds data sets.
    Parquet,
}

/// One format: how to know it and how to read it.
struct Reader {
    format: Format,
    fits: fn(&DataFile) -> bool,
    read: for<'a> fn(&'a DataFile, &Request) -> Result<Rows<'a>>,
}

/// Every format, in the order in which a file is asked whether it has it; the last one has no conditions.
const READERS: [Reader; 4] = [
    Reader { format: Format::Parquet, fits: parquet::fits, read: parquet::read },
    Reader { format: Format::Jsonl, fits: json_lines::fits, read: json_lines::read },
    Reader { format: Format::Csv, fits: delimited::fits_csv, read: delimited::read_csv },
    Reader { format: Format::Tsv, fits: |_| true, read: delimited::read_tsv },
];

/// What a caller knows of a file and wants of it.
#[derive(Default)]
pub(super) struct Request<'a> {
    /// What a `"` means between commas or tabs; `None` finds out from the file.
    pub quoting: Option<bool>,
    /// The only columns to fill, where columns have names of their own; `None` fills all.
    pub columns: Option<&'a [&'a str]>,
}

impl Request<'_> {
    fn wants(&self, column: &str) -> bool {
        self.columns.is_none_or(|columns| columns.contains(&column))
    }
}

/// What a file that gzip has written begins with.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// A whole file in memory.
pub(super) struct DataFile {
    path: PathBuf,
    bytes: Bytes,
}

impl DataFile {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] if it is missing or a folder; [`Error::Io`] if it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Err(Error::data(path, 0, "is a folder; name a file"));
        }
        if !path.exists() {
            return Err(Error::data(path, 0, "there is no such file"));
        }
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        Ok(DataFile { path: path.to_path_buf(), bytes: bytes.into() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Finds out how the cells are told apart, from the content more than from the name: the
    /// original STS-B files are called `.csv` and separated by tabs.
    pub fn guess_format(&self) -> Format {
        READERS.iter().find(|reader| (reader.fits)(self)).map_or(Format::Tsv, |reader| reader.format)
    }

    /// Splits the file into rows.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] with the line that is not a row, or if the file is not of the format.
    pub fn rows(&self, format: Format, request: &Request) -> Result<Rows<'_>> {
        let reader = READERS.iter().find(|reader| reader.format == format);
        let reader = reader.expect("every format has a reader: a test looks each of them up");
        (reader.read)(self, request)
    }

    /// The file as text, without a byte order mark.
    fn text(&self) -> Result<&str> {
        if self.bytes.starts_with(&GZIP) {
            return Err(Error::data(&self.path, 1, "is compressed by gzip; unpack it (`gunzip`)"));
        }
        let text = std::str::from_utf8(&self.bytes).map_err(|error| {
            let line = self.bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count() + 1;
            Error::data(&self.path, line, "is not UTF-8; convert the file to UTF-8")
        })?;
        Ok(text.strip_prefix('\u{feff}').unwrap_or(text))
    }

    /// The first line, empty where it is no text.
    fn first_line(&self) -> &str {
        let line = self.bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = std::str::from_utf8(line).unwrap_or_default();
        line.strip_prefix('\u{feff}').unwrap_or(line)
    }

    fn extension(&self) -> String {
        let extension = self.path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        extension.to_ascii_lowercase()
    }
}

/// Lines with their numbers from 1, without line ends and without blank lines at the end.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let text = text.trim_end_matches(['\n', '\r']);
    // An empty text would still be split into one empty line.
    let lines = (!text.is_empty()).then(|| text.split('\n'));
    let lines = lines.into_iter().flatten().enumerate();
    lines.map(|(index, line)| (index + 1, line.strip_suffix('\r').unwrap_or(line)))
}

/// The rows of a file; rows may differ in width.
pub(super) struct Rows<'a> {
    /// The names of the columns where the format has them apart from the rows, as in JSON Lines.
    pub columns: Option<Vec<String>>,
    /// Whether a `"` was taken to enclose a cell.
    pub quoted: bool,
    pub rows: Vec<Row<'a>>,
}

/// One row and the line it starts at; in Parquet, its number from 1.
pub(super) struct Row<'a> {
    pub line: usize,
    /// `None` is a cell that the file does not have, such as a missing key.
    pub cells: Vec<Option<Cow<'a, str>>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn file(name: &str, content: impl AsRef<[u8]>) -> (tempfile::TempDir, DataFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let file = DataFile::read(&path).unwrap();
        (folder, file)
    }

    /// Joins the cells of each row with `|`, a missing cell being `~`.
    pub fn show(rows: &Rows) -> Vec<String> {
        let join = |row: &Row| {
            let cells: Vec<_> = row.cells.iter().map(|cell| cell.as_deref().unwrap_or("~")).collect();
            format!("{}:{}", row.line, cells.join("|"))
        };
        rows.rows.iter().map(join).collect()
    }

    /// Reads a file's content in a format, with the meaning of `"` given or found out.
    pub fn rows(content: &str, format: Format, quoting: Option<bool>) -> Vec<String> {
        let (_folder, file) = file("f", content);
        show(&file.rows(format, &Request { quoting, columns: None }).unwrap())
    }

    #[test]
    fn byte_order_mark_line_ends_and_missing_final_newline_leave_no_trace() {
        let expected = ["1:a|b", "2:c|", "3:|d"];
        for content in
            ["a\tb\nc\t\n\td\n", "\u{feff}a\tb\r\nc\t\r\n\td\r\n", "a\tb\nc\t\n\td", "a\tb\r\nc\t\r\n\td\r"]
        {
            assert_eq!(rows(content, Format::Tsv, None), expected, "{content:?}");
        }
    }

    #[test]
    fn what_is_no_text_says_what_to_do() {
        for (content, message) in [
            (&[0x1f, 0x8b, 8, 0][..], "f.tsv:1: is compressed by gzip"),
            (b"a\n\xff\n", "f.tsv:2: is not UTF-8"),
        ] {
            let (_folder, file) = file("f.tsv", content);
            let error = file.rows(Format::Tsv, &Request { quoting: None, columns: None });
            let error = error.err().unwrap().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn the_format_is_told_from_the_content_before_the_name() {
        let cases = [
            ("sts.csv", "genre\tfile\n", Format::Tsv),
            ("a.csv", "text\n", Format::Csv),
            ("a.txt", "text,label\n", Format::Csv),
            ("a.tsv", "sentence\nNo, never.\n", Format::Tsv),
            ("a.txt", "{\"text\": \"x\"}\n", Format::Jsonl),
            ("a.txt", "\u{feff}{\"text\": \"x\"}\r\n", Format::Jsonl),
            ("a.tsv", "{x}\ty\n", Format::Tsv),
            ("a.JSONL", "[]\n", Format::Jsonl),
            ("a.tsv", "PAR1\u{15}", Format::Parquet),
        ];
        for (name, content, expected) in cases {
            assert_eq!(file(name, content).1.guess_format(), expected, "{name} {content:?}");
        }
    }

    #[test]
    fn every_format_has_a_reader_and_the_last_reader_takes_any_file() {
        let formats = [Format::Csv, Format::Tsv, Format::Jsonl, Format::Parquet];
        assert_eq!(READERS.len(), formats.len());
        assert!(formats.iter().all(|format| READERS.iter().any(|reader| reader.format == *format)));
        assert_eq!(file("f", b"\xff\x00").1.guess_format(), Format::Tsv);
    }

    #[test]
    fn what_is_no_text_file_is_refused_with_its_place() {
        let (folder, broken) = file("f.tsv", b"a\tb\nc\t\xff\n");
        let message = broken.rows(Format::Tsv, &Request::default()).err().unwrap().to_string();
        assert!(message.contains("f.tsv:2: is not UTF-8"));
        let message = |path: &Path| DataFile::read(path).err().unwrap().to_string();
        assert!(message(folder.path()).contains("is a folder"));
        assert!(message(&folder.path().join("none.tsv")).contains("there is no such file"));
    }
}
