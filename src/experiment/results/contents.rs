//! What a results file holds, as far as appending to it goes: whole lines, and which run each belongs to.
//!
//! Rows are looked at as text here, so that a row somebody edited by hand cannot keep a trained run from being saved.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::row::{SCHEMA_VERSION, Status};
use super::text::{SEMICOLONS, other_version};
use crate::csv_lines::record_start;
use crate::data::Split;
use crate::error::{Error, Result};
use crate::spelling::quoted;

/// The rows of a results file and where in its bytes they are.
pub(super) struct Contents {
    /// The whole file.
    pub bytes: Vec<u8>,
    /// The header line, with its newline.
    pub header: Range<usize>,
    /// The rows, in the order of the file.
    pub rows: Vec<Found>,
}

/// The fields of a row that decide whether a run has to be done again.
pub(super) struct Found {
    pub run: String,
    pub evaluated_on: String,
    pub split: String,
    /// SHA-256 of the data that were scored.
    pub data: String,
    pub status: Status,
    /// Whether the row has a field for every column.
    pub whole: bool,
    /// The row with its newline.
    pub line: Range<usize>,
}

/// What a results file holds of every run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    rows: HashMap<String, Vec<([String; 3], Status)>>,
}

impl Recorded {
    /// Returns what stands for a run and is no id, if there is such a thing; the first in order of several. A spreadsheet takes many ids
    /// for numbers.
    pub fn mangled_run(&self) -> Option<&str> {
        self.rows.keys().map(String::as_str).filter(|run| !is_run_id(run)).min()
    }

    /// Returns how a run ended, if it is there: failed, if any of its rows is.
    pub fn status(&self, run: &str) -> Option<Status> {
        let rows = self.rows.get(run)?;
        let has = |status: &Status| rows.iter().any(|(_, other)| other == status);
        [Status::Failed, Status::Diverged].into_iter().find(has).or(Some(Status::Ok))
    }

    /// Returns whether a run need not be done again: it did not fail, and has a row for each of these tasks, splits and
    /// hashes of the data.
    pub fn has<'r>(&self, run: &str, rows: impl IntoIterator<Item = (&'r str, Split, &'r str)>) -> bool {
        let there = self.rows.get(run).map_or(&[][..], Vec::as_slice);
        let has = |(task, split, data): (&str, Split, &str)| {
            there.iter().any(|(key, _)| *key == [task, split.name(), data])
        };
        self.status(run).is_some_and(|status| status != Status::Failed) && rows.into_iter().all(has)
    }
}

/// Returns whether a text is the id of a run: 16 hexadecimal digits.
pub(super) fn is_run_id(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Contents {
    /// Finds the rows of a file; `expected` is the header line it must have.
    ///
    /// # Errors
    /// Fails with a configuration error if the file has other columns.
    pub fn find(path: &Path, bytes: Vec<u8>, expected: &[u8]) -> Result<Self> {
        let mut reader = reader(&bytes);
        let mut header = csv::ByteRecord::new();
        read_record(&mut reader, &mut header, path)?;
        check_header(path, &mut reader, &header, expected)?;
        let column = |name: &str| header.iter().position(|column| column == name.as_bytes());
        let [run, evaluated_on, split, data, status] =
            ["run", "evaluated_on", "split", "evaluated_sha256", "status"].map(column);

        let mut reader = self::reader(&bytes);
        let mut record = csv::ByteRecord::new();
        let mut starts = Vec::new();
        let mut rows = Vec::new();
        while read_record(&mut reader, &mut record, path)? {
            starts.push(record_start(&bytes, record.position()));
            let field = |column: Option<usize>| {
                let bytes = column.and_then(|column| record.get(column)).unwrap_or_default();
                String::from_utf8_lossy(bytes).into_owned()
            };
            rows.push(Found {
                run: field(run),
                evaluated_on: field(evaluated_on),
                split: field(split),
                data: field(data),
                status: Status::of_field(&field(status)),
                whole: record.len() >= header.len(),
                line: 0..0,
            });
        }
        starts.push(bytes.len());
        for (row, ends) in rows.iter_mut().zip(starts.windows(2)) {
            row.line = ends[0]..ends[1];
        }
        let header = rows.remove(0).line;
        Ok(Self { bytes, header, rows })
    }

    /// Removes and returns a last row that was cut off while it was written: it lacks fields or its newline.
    pub fn take_torn(&mut self) -> Option<Found> {
        let cut_off = !self.bytes.ends_with(b"\n");
        let torn = self.rows.pop_if(|last| cut_off || !last.whole)?;
        self.bytes.truncate(torn.line.start);
        Some(torn)
    }

    /// Returns what the file holds of every run.
    pub fn recorded(self) -> Recorded {
        let mut recorded = Recorded::default();
        for found in self.rows {
            let key = [found.evaluated_on, found.split, found.data];
            recorded.rows.entry(found.run).or_default().push((key, found.status));
        }
        recorded
    }
}

/// Refuses a file whose lines end in CR alone, as old Macs and Excel's "CSV (Macintosh)" have it: they would not be told apart.
///
/// # Errors
/// Fails with a configuration error.
pub(super) fn check_line_ends(path: &Path, bytes: &[u8]) -> Result<()> {
    match bytes.windows(2).any(|pair| pair[0] == b'\r' && pair[1] != b'\n') {
        false => Ok(()),
        true => Err(Error::configuration(format!(
            "{}: its lines end as on an old Mac (CR alone); save it with line ends of Unix or Windows",
            path.display()
        ))),
    }
}

fn reader(bytes: &[u8]) -> csv::Reader<&[u8]> {
    csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(bytes)
}

fn read_record(reader: &mut csv::Reader<&[u8]>, record: &mut csv::ByteRecord, path: &Path) -> Result<bool> {
    reader.read_byte_record(record).map_err(|error| Error::data(path, 0, error.to_string()))
}

/// Checks that a file has the expected columns in their order; `rest` is the file behind its header.
fn check_header(
    path: &Path,
    rest: &mut csv::Reader<&[u8]>,
    header: &csv::ByteRecord,
    expected: &[u8],
) -> Result<()> {
    let mut columns = csv::ByteRecord::new();
    read_record(&mut reader(expected), &mut columns, path)?;
    let longest = columns.len().max(header.len());
    let Some(index) = (0..longest).find(|&index| columns.get(index) != header.get(index)) else {
        return Ok(());
    };
    let mut first = csv::ByteRecord::new();
    if header.get(0) == Some(b"schema_version".as_slice()) && read_record(rest, &mut first, path)? {
        let version = String::from_utf8_lossy(first.get(0).unwrap_or_default());
        if version != SCHEMA_VERSION.to_string() {
            return Err(other_version(path, 0, &version));
        }
    }
    let name = |column: Option<&[u8]>| match column {
        Some(name) => quoted(&String::from_utf8_lossy(name)),
        None => "the end of the line".into(),
    };
    if header.get(0).is_some_and(|first| first.starts_with(b"schema_version;")) {
        return Err(Error::configuration(format!("{}: {SEMICOLONS}", path.display())));
    }
    Err(Error::configuration(format!(
        "{}: is not a results file of this program: column {} is {}, expected {}; name another file with `results:`",
        path.display(),
        index + 1,
        name(header.get(index)),
        name(columns.get(index)),
    )))
}
