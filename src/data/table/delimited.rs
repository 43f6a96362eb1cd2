//! Cells between commas or tabs, and what a `"` means among them.

use std::borrow::Cow;

use super::{DataFile, Request, Row, Rows, lines};
use crate::csv_lines::record_line;
use crate::error::{Error, Result};

pub(super) fn fits_csv(file: &DataFile) -> bool {
    let first = file.first_line();
    !first.contains('\t') && (file.extension() == "csv" || first.contains(','))
}

/// Reads cells between commas; a `"` encloses a cell unless the request says otherwise.
pub(super) fn read_csv<'a>(file: &'a DataFile, request: &Request) -> Result<Rows<'a>> {
    let text = file.text()?;
    match request.quoting.unwrap_or(true) {
        true => quoted_rows(file, text, b','),
        false => Ok(plain_rows(text, ',')),
    }
}

/// Reads cells between tabs; unless the request says, the file itself shows what a `"` means.
pub(super) fn read_tsv<'a>(file: &'a DataFile, request: &Request) -> Result<Rows<'a>> {
    let text = file.text()?;
    match request.quoting.unwrap_or_else(|| is_quoted(text)) {
        true => quoted_rows(file, text, b'\t'),
        false => Ok(plain_rows(text, '\t')),
    }
}

/// Splits at every separator: a `"` is a character like any other.
fn plain_rows(text: &str, separator: char) -> Rows<'_> {
    let rows = lines(text).map(|(line, text)| {
        let cells = text.split(separator).map(|cell| Some(Cow::Borrowed(cell))).collect();
        Row { line, cells }
    });
    Rows { columns: None, quoted: false, rows: rows.collect() }
}

fn quoted_rows<'a>(file: &DataFile, text: &'a str, separator: u8) -> Result<Rows<'a>> {
    // A reader would take all that follows for a part of the cell.
    if let Some(line) = line_of_open_quote(text, separator) {
        let problem = "a cell begins with a \" here, and has none where it ends; mend it (a \" within a cell is written \"\"), or \
                       set `quoting: false`";
        return Err(Error::data(&file.path, line, problem));
    }
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .delimiter(separator)
        .from_reader(text.as_bytes());
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| Error::data(&file.path, 0, error.to_string()))?;
        let line = record_line(text.as_bytes(), record.position());
        let cells = record.iter().map(|cell| Some(Cow::Owned(cell.to_string()))).collect();
        rows.push(Row { line, cells });
    }
    Ok(Rows { columns: None, quoted: true, rows })
}

/// Returns the line of the first cell that begins with a `"` and does not end with one.
fn line_of_open_quote(text: &str, separator: u8) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut position = 0;
    while position < bytes.len() {
        let rest = &bytes[position..];
        let length = match rest[0] {
            b'"' => match quoted_cell(rest, separator) {
                Some(cell) => cell.length,
                None => return Some(1 + bytes[..position].iter().filter(|byte| **byte == b'\n').count()),
            },
            _ => rest.iter().position(|byte| *byte == separator || *byte == b'\n').unwrap_or(rest.len()),
        };
        position += length + 1;
    }
    None
}

/// Says whether a `"` encloses cells in a tab-separated text.
///
/// Read as if it did, every cell with a `"` must be well formed, and there must be a trace of
/// quoting: a doubled `"` within a cell, a tab or line end there without which the rows would
/// differ in width, or quotes around every cell. One cell of plain text, such as `19" screen`,
/// is proof of the contrary.
fn is_quoted(text: &str) -> bool {
    let bytes = text.as_bytes();
    let (mut position, mut quoted, mut bare) = (0, 0, 0);
    let (mut doubled, mut hides_separator) = (false, false);
    while position < bytes.len() {
        let rest = &bytes[position..];
        let length = if rest[0] == b'"' {
            let Some(cell) = quoted_cell(rest, b'\t') else { return false };
            quoted += 1;
            doubled |= cell.doubled;
            hides_separator |= cell.hides_separator;
            cell.length
        } else {
            let length = rest.iter().position(|byte| matches!(byte, b'\t' | b'\n')).unwrap_or(rest.len());
            if rest[..length].contains(&b'"') {
                return false;
            }
            bare += 1;
            length
        };
        position += length + 1;
    }
    quoted > 0 && (doubled || bare == 0 || (hides_separator && is_ragged(text)))
}

struct QuotedCell {
    /// Bytes up to the separator or line end behind the cell.
    length: usize,
    doubled: bool,
    hides_separator: bool,
}

/// Reads the quoted cell at the start of `bytes`; `None` if it does not end in a `"` before a separator or line end.
fn quoted_cell(bytes: &[u8], separator: u8) -> Option<QuotedCell> {
    let (mut position, mut doubled) = (1, false);
    let close = loop {
        position += bytes[position..].iter().position(|byte| *byte == b'"')?;
        if bytes.get(position + 1) != Some(&b'"') {
            break position;
        }
        doubled = true;
        position += 2;
    };
    let inner = &bytes[1..close];
    let hides_separator = inner.iter().any(|byte| *byte == separator || *byte == b'\n');
    let behind = &bytes[close + 1..];
    let line_end = if behind.starts_with(b"\r\n") { 1 } else { 0 };
    let ends = behind.get(line_end).is_none_or(|byte| *byte == separator || *byte == b'\n');
    ends.then_some(QuotedCell { length: close + 1 + line_end, doubled, hides_separator })
}

/// Says whether the lines of a text differ in their number of tabs.
fn is_ragged(text: &str) -> bool {
    let mut widths = lines(text).map(|(_, line)| line.matches('\t').count());
    let first = widths.next();
    widths.any(|width| Some(width) != first)
}

#[cfg(test)]
mod tests {
    use super::super::Format;
    use super::super::tests::rows;
    use super::*;

    #[test]
    fn without_quoting_a_quotation_mark_is_a_character() {
        let content = "\"a\tb\nsaid \"c\"\td\n";
        for quoting in [None, Some(false)] {
            assert_eq!(rows(content, Format::Tsv, quoting), ["1:\"a|b", "2:said \"c\"|d"]);
        }
    }

    #[test]
    fn with_quoting_a_cell_may_hold_separators_and_line_ends() {
        let content = "text,label\n\"one, \"\"two\"\"\nthree\",1\nfour,0\n";
        let expected = ["1:text|label", "2:one, \"two\"\nthree|1", "4:four|0"];
        assert_eq!(rows(content, Format::Csv, None), expected);
        let tabs = content.replace(',', "\t");
        let expected = ["1:text|label", "2:one\t \"two\"\nthree|1", "4:four|0"];
        assert_eq!(rows(&tabs, Format::Tsv, None), expected);
    }

    #[test]
    fn cells_whose_quotes_do_not_end_are_found() {
        for (text, line) in [
            ("a,b\nx,\"y\nz,w\n", Some(2)),
            ("a,b\n\"x\ny\",\"z\n\"\"\n", Some(3)),
            ("a,b\nx,\"y\" z\n", Some(2)),
            ("a,b\nx,\"", Some(2)),
            ("a,b\r\nx,\"y\"\r\nz,\"\"\"w\"\"\"\r\n", None),
            ("a,b\nx,19\" screen\n,\n", None),
            ("\"a\"", None),
        ] {
            assert_eq!(line_of_open_quote(text, b','), line, "{text:?}");
        }
    }

    #[test]
    fn tab_separated_files_show_whether_they_are_quoted() {
        let quoted = [
            "a\tb\nx\t\"say \"\"y\"\"\"\n",
            "a\tb\r\nx\t\"say \"\"y\"\"\"\r\n\"p\"\tq\r\n",
            "a\tb\n\"x\ty\"\tz\n",
            "a\tb\nx\t\"y\nz\"\n",
            "\"a\"\t\"b\"\n\"x\"\t\"y\"",
            "\"a\"\t\"b\"\r\n\"x\"\t\"\"\r\n",
        ];
        for text in quoted {
            assert!(is_quoted(text), "{text:?}");
        }
        let plain = [
            "",
            "a\tb\nx\ty\n",
            // A whole cell in quotes is no trace: nothing in it needs them.
            "a\tb\n\"x\"\ty\n",
            "a\tb\nx\t19\" screen\n",
            "a\tb\nx\t\"y\n",
            "a\tb\n\"x\" y\tz\n",
            "a\tb\n\"\"x\"\"\ty\n",
            // One cell of ordinary text outweighs a well-formed one.
            "a\tb\nx\t\"say \"\"y\"\"\"\n19\" screen\tz\n",
            // Two loose marks, one at the head of a cell and one at a tail: the lines are even without joining them.
            "a\tb\nx\t\"y\nz\tw\"\n",
        ];
        for text in plain {
            assert!(!is_quoted(text), "{text:?}");
        }
    }
}
