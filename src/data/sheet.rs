//! One file of a task as examples.
//!
//! Which of the card's layouts a file has is read off the file itself. Text is kept exactly as
//! it stands there, outer spaces included; every fault is reported with its file and line.

use std::collections::HashSet;
use std::path::Path;

use sha2::Sha256;

use super::table::{Row, TextFile};
use super::task::{Format, Keep, Layout, Objective, RowFilter, TaskCard};
use crate::error::{Error, Result};

/// The gold answer of an example.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Label {
    /// A class id, the position of the label in the card.
    Class(usize),
    /// A finite score.
    Score(f32),
}

/// One text or one pair of texts, with its label where the file has one.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// The only text, or the first of two.
    pub first: String,
    /// The second text of a pair.
    pub second: Option<String>,
    /// The gold label; `None` in unlabelled data.
    pub label: Option<Label>,
}

/// Whether every example must have a label.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Labels {
    Required,
    Optional,
}

/// The keys of a [`RowFilter`]'s list.
pub(super) struct Listed<'a> {
    filter: &'a RowFilter,
    keys: HashSet<Vec<String>>,
}

impl<'a> Listed<'a> {
    pub fn read(filter: &'a RowFilter, folder: &Path, checksum: &mut Sha256) -> Result<Self> {
        let file = TextFile::read(&folder.join(&filter.list))?;
        file.add_to(checksum);
        let rows = file.rows(Format::Tsv, false)?.rows;
        let key = |row: &Row| row.cells.iter().flatten().map(|cell| cell.to_string()).collect();
        Ok(Listed { filter, keys: rows.iter().map(key).collect() })
    }
}

/// A file together with the layout it turned out to have.
pub(super) struct Sheet<'a> {
    file: &'a TextFile,
    layout: &'a Layout,
    quoting: bool,
    pub rows: Vec<Row<'a>>,
    columns: Vec<String>,
    /// How many cells a row may have; empty where rows are not made of positions.
    widths: Vec<usize>,
    text: Vec<usize>,
    label: Option<usize>,
}

impl<'a> Sheet<'a> {
    /// Finds the layout of a file.
    pub fn open(card: &'a TaskCard, file: &'a TextFile) -> Result<Self> {
        let mut seen = Vec::new();
        for layout in &card.layouts {
            let sheet = Sheet::split(file, layout)?;
            if sheet.columns.is_empty() {
                return Err(Error::data(file.path(), 0, "has no examples"));
            }
            if let Some(sheet) = sheet.fit(&mut seen) {
                return Ok(sheet);
            }
        }
        let expected: Vec<_> = card.layouts.iter().map(describe).collect();
        let message = format!("does not look like task `{}`: expected {}", card.name, expected.join(", or "));
        Err(Error::data(file.path(), 1, format!("{message}; found {}", preview(&seen))))
    }

    /// Splits the file into named columns as a layout says, whether or not it fits.
    fn split(file: &'a TextFile, layout: &'a Layout) -> Result<Self> {
        let format = layout.format.unwrap_or_else(|| file.guess_format());
        let quoting = layout.quoting.unwrap_or(format == Format::Csv);
        let parsed = file.rows(format, quoting)?;
        let mut rows = parsed.rows;
        let mut widths = Vec::new();
        let columns = match parsed.columns {
            Some(columns) => columns,
            None if layout.header && !rows.is_empty() => {
                let header = rows.remove(0).cells;
                widths.push(header.len());
                header.into_iter().map(|name| name.unwrap_or_default().trim().to_string()).collect()
            }
            None => {
                let width = rows.first().map_or(0, |row| row.cells.len());
                widths = if layout.widths.is_empty() { vec![width] } else { layout.widths.clone() };
                (1..=width).map(|number| number.to_string()).collect()
            }
        };
        Ok(Sheet { file, layout, quoting, rows, columns, widths, text: Vec::new(), label: None })
    }

    /// Finds the layout's columns; if one is missing, notes in `seen` what the first row holds.
    fn fit(mut self, seen: &mut Vec<String>) -> Option<Self> {
        let text: Option<Vec<usize>> = self.layout.text.iter().map(|column| self.position(column)).collect();
        let right_width = self.widths.is_empty() || self.widths.contains(&self.columns.len());
        match text {
            Some(text) if right_width => {
                self.text = text;
                self.label = self.layout.label.iter().find_map(|column| self.position(column));
                Some(self)
            }
            _ => {
                let named = self.layout.header || self.widths.is_empty();
                let first = self.rows.first().filter(|_| !named);
                let cells = first.map(|row| row.cells.iter().flatten().map(|cell| cell.to_string()));
                *seen = cells.map_or_else(|| self.columns.clone(), Iterator::collect);
                None
            }
        }
    }

    fn position(&self, column: &str) -> Option<usize> {
        self.columns.iter().position(|name| name == column)
    }

    fn fault(&self, line: usize, message: impl Into<String>) -> Error {
        Error::data(self.file.path(), line, message)
    }

    pub fn require_label(&self) -> Result<()> {
        match self.label {
            Some(_) => Ok(()),
            None => {
                let names = self.layout.label.join("` or `");
                Err(self.fault(1, format!("has no label column; expected one named `{names}`")))
            }
        }
    }

    /// Appends the examples of the rows that `listed` lets through.
    pub fn read(
        &self,
        card: &TaskCard,
        listed: Option<&Listed>,
        labels: Labels,
        examples: &mut Vec<Example>,
    ) -> Result<()> {
        if labels == Labels::Required {
            self.require_label()?;
        }
        let key = listed.map_or(Ok(Vec::new()), |listed| self.key_columns(&listed.filter.columns))?;
        for row in &self.rows {
            self.check_width(row)?;
            if let Some(listed) = listed {
                let cell = |&position: &usize| row.cells[position].as_deref().unwrap_or("").to_string();
                let is_listed = listed.keys.contains(&key.iter().map(cell).collect::<Vec<_>>());
                if is_listed != (listed.filter.keep == Keep::Listed) {
                    continue;
                }
            }
            examples.push(self.example(card, row, labels)?);
        }
        Ok(())
    }

    fn key_columns(&self, names: &[String]) -> Result<Vec<usize>> {
        let missing = |name: &String| self.fault(1, format!("has no column `{name}`"));
        names.iter().map(|name| self.position(name).ok_or_else(|| missing(name))).collect()
    }

    fn check_width(&self, row: &Row) -> Result<()> {
        let width = row.cells.len();
        if self.widths.is_empty() || self.widths.contains(&width) {
            return Ok(());
        }
        let expected: Vec<_> = self.widths.iter().map(usize::to_string).collect();
        let hint = match self.quoting {
            true => "; if a `\"` is an ordinary character in this file, set `quoting: false`",
            false => "",
        };
        let message = format!("expected {} columns, found {width}{hint}", expected.join(" or "));
        Err(self.fault(row.line, message))
    }

    fn example(&self, card: &TaskCard, row: &Row, labels: Labels) -> Result<Example> {
        let text = |index: usize| {
            let position = self.text[index];
            let column = &self.layout.text[index];
            match row.cells[position].as_deref() {
                None => Err(self.fault(row.line, format!("has no text in column `{column}`"))),
                Some(text) if text.trim().is_empty() => {
                    Err(self.fault(row.line, format!("the text in column `{column}` is empty")))
                }
                Some(text) => Ok(text.to_string()),
            }
        };
        let first = text(0)?;
        let second = if self.text.len() == 2 { Some(text(1)?) } else { None };
        let label = match self.label(row) {
            Some(cell) => {
                parse_label(card, self.layout, cell).map_err(|message| self.fault(row.line, message))?
            }
            None => None,
        };
        if label.is_none() && labels == Labels::Required {
            return Err(self.fault(row.line, "has no label"));
        }
        Ok(Example { first, second, label })
    }

    /// Returns what a row has as its label, if anything.
    pub fn label<'row>(&self, row: &'row Row) -> Option<&'row str> {
        let cell = row.cells.get(self.label?)?.as_deref()?.trim();
        (!cell.is_empty()).then_some(cell)
    }
}

/// Reads a label; `None` is the -1 that the hub's copies of GLUE give a withheld one.
fn parse_label(card: &TaskCard, layout: &Layout, cell: &str) -> Result<Option<Label>, String> {
    match &card.objective {
        Objective::Classification { labels } => {
            let id = [labels, &layout.labels]
                .into_iter()
                .find_map(|names| names.iter().position(|name| name == cell));
            match id {
                Some(id) => Ok(Some(Label::Class(id))),
                None if cell == "-1" => Ok(None),
                None => {
                    let (known, other) = (labels.join(", "), layout.labels.join(", "));
                    let other =
                        if other.is_empty() { other } else { format!(", in this order also {other}") };
                    Err(format!("unknown label `{cell}`; the labels of `{}` are {known}{other}", card.name))
                }
            }
        }
        Objective::Regression => {
            let score = cell.parse::<f32>().ok().filter(|score| score.is_finite());
            let score = score.ok_or_else(|| format!("the score `{cell}` is not a finite number"))?;
            match card.score_range {
                Some((least, greatest)) if !(least..=greatest).contains(&f64::from(score)) => {
                    if score == -1.0 {
                        return Ok(None);
                    }
                    Err(format!("the score `{cell}` is outside the range {least} to {greatest}"))
                }
                _ => Ok(Some(Label::Score(score))),
            }
        }
    }
}

/// Says what a layout looks like, for a message.
fn describe(layout: &Layout) -> String {
    if layout.header {
        return format!("a header with `{}`", layout.text.join("` and `"));
    }
    let widths: Vec<_> = layout.widths.iter().map(usize::to_string).collect();
    match widths.is_empty() {
        true => format!("no header and text in column {}", layout.text.join(" and ")),
        false => format!("{} columns without a header", widths.join(" or ")),
    }
}

/// Shows the cells of a first row in at most a line or two.
fn preview(cells: &[String]) -> String {
    const CELLS: usize = 10;
    const CHARACTERS: usize = 24;
    let short = |cell: &String| match cell.chars().count() > CHARACTERS {
        true => format!("`{}…`", cell.chars().take(CHARACTERS).collect::<String>()),
        false => format!("`{cell}`"),
    };
    let shown: Vec<_> = cells.iter().take(CELLS).map(short).collect();
    let more = if cells.len() > CELLS { ", …" } else { "" };
    format!("{} columns: {}{more}", cells.len(), shown.join(", "))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Reads a file's content as the named task does.
    fn read(task: &str, name: &str, content: &str, labels: Labels) -> Result<Vec<Example>> {
        let card = TaskCard::builtin(task).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let file = TextFile::read(&path)?;
        let mut examples = Vec::new();
        Sheet::open(&card, &file)?.read(&card, None, labels, &mut examples)?;
        Ok(examples)
    }

    fn refusal(task: &str, content: &str) -> String {
        read(task, "f.tsv", content, Labels::Required).unwrap_err().to_string()
    }

    fn example(first: &str, second: Option<&str>, label: Option<Label>) -> Example {
        Example { first: first.into(), second: second.map(Into::into), label }
    }

    #[test]
    fn cola_has_no_header_but_its_test_file_has() {
        let rows = "gj04\t1\t\tHe left.\nks08\t0\t*\t \"He\tleft\"\n";
        let message = refusal("cola", rows);
        assert!(message.contains("f.tsv:2: expected 4 columns, found 5"), "{message}");
        let rows = "gj04\t1\t\tHe left.\r\nks08\t0\t*\t \"He left ";
        let expected = [
            example("He left.", None, Some(Label::Class(1))),
            example(" \"He left ", None, Some(Label::Class(0))),
        ];
        assert_eq!(read("cola", "f.tsv", rows, Labels::Required).unwrap(), expected);
        let test = "index\tsentence\n0\tHe left.\n";
        let expected = [example("He left.", None, None)];
        assert_eq!(read("cola", "f.tsv", test, Labels::Optional).unwrap(), expected);
    }

    #[test]
    fn similarity_scores_come_with_a_header_or_in_seven_or_nine_columns() {
        let pair = |score| example(" a", Some("b"), Some(Label::Score(score)));
        let headed = "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\t a\tb\t3.800\n1\tnews\t a\tb\t4\n";
        let expected = [pair(3.8), pair(4.0)];
        assert_eq!(read("stsb", "f.tsv", headed, Labels::Required).unwrap(), expected);
        let original = "g\tf\ty\t1\t3.800\t a\tb\ng\tf\ty\t2\t4\t a\tb\tlicence\tlicence\n";
        assert_eq!(read("stsb", "sts-train.csv", original, Labels::Required).unwrap(), expected);
    }

    #[test]
    fn prediction_files_may_be_json_lines_or_quoted_csv_under_the_hubs_names() {
        let rows = "{\"sentence2\": \"b, c\", \"sentence1\": \"a\", \"idx\": 0, \"label\": 1}\n\
                    {\"sentence1\": \"d\", \"sentence2\": \"e\", \"label\": -1}\n";
        let expected = [example("a", Some("b, c"), Some(Label::Class(1))), example("d", Some("e"), None)];
        assert_eq!(read("mrpc", "f.jsonl", rows, Labels::Optional).unwrap(), expected);
        let rows = "sentence1,sentence2,label\na,\"b, c\",equivalent\nd,e,\n";
        assert_eq!(read("mrpc", "f.csv", rows, Labels::Optional).unwrap(), expected);
    }

    #[test]
    fn rows_that_are_no_examples_are_refused_with_line_and_reason() {
        let rte = |rows: &str| refusal("rte", &format!("index\tsentence1\tsentence2\tlabel\n{rows}"));
        let cases = [
            (rte("0\ta\tb\tentailment\n1\ta\tb\n"), ":3: expected 4 columns, found 3"),
            (
                rte("0\ta\tb\tentails\n"),
                ":2: unknown label `entails`; the labels of `rte` are entailment, not_entailment, \
                 in this order also 0, 1",
            ),
            (rte("0\ta\t \tentailment\n"), ":2: the text in column `sentence2` is empty"),
            (rte("0\ta\tb\t\n"), ":2: has no label"),
            (rte("0\ta\tb\t-1\n"), ":2: has no label"),
        ];
        for (message, expected) in cases {
            assert!(message.ends_with(expected), "{expected}: {message}");
        }
        let rows =
            "{\"sentence1\": \"a\", \"sentence2\": \"b\"}\n{\"sentence1\": \"a\", \"sentence2\": [\"b\"]}\n";
        let message = read("rte", "f.jsonl", rows, Labels::Optional).unwrap_err().to_string();
        assert!(message.ends_with(":2: has no text in column `sentence2`"), "{message}");
    }

    #[test]
    fn scores_must_be_finite_and_in_range() {
        for (score, expected) in [
            ("high", "the score `high` is not a finite number"),
            ("nan", "the score `nan` is not a finite number"),
            ("1e60", "the score `1e60` is not a finite number"),
            ("5.01", "the score `5.01` is outside the range 0 to 5"),
        ] {
            let message = refusal("stsb", &format!("g\tf\ty\t1\t{score}\ta\tb\n"));
            assert!(message.ends_with(&format!("f.tsv:1: {expected}")), "{message}");
        }
    }

    #[test]
    fn a_file_of_another_form_is_told_what_was_expected_and_found() {
        let message = refusal("cola", "text\tlabel\nHe left.\t1\n");
        let expected = "f.tsv:1: does not look like task `cola`: expected a header with `sentence`, \
                        or 4 columns without a header; found 2 columns: `text`, `label`";
        assert!(message.ends_with(expected), "{message}");
        let message = refusal("rte", "{\"premise\": \"a\", \"hypothesis\": \"b\"}\n");
        assert!(message.ends_with("found 2 columns: `premise`, `hypothesis`"), "{message}");
    }

    #[test]
    fn a_quoted_file_that_joins_lines_is_told_how_to_read_it_plainly() {
        let rows = "sentence1,sentence2,label\na,\"b,1\nc,d,0\n";
        let message = read("mrpc", "f.csv", rows, Labels::Required).unwrap_err().to_string();
        assert!(message.contains(":2: expected 3 columns, found 2; if a `\"` is"), "{message}");
    }

    proptest! {
        #[test]
        fn any_text_is_either_labelled_examples_or_a_refusal(
            task in prop::sample::select(TaskCard::builtin_names()),
            header in prop::sample::select(vec!["", "sentence\tlabel\n", "sentence1,sentence2,label\n", "{"]),
            body in "[\t\n\r\",{}:a01.\u{feff}é-]{0,60}",
        ) {
            if let Ok(examples) = read(task, "f.txt", &format!("{header}{body}"), Labels::Required) {
                for example in examples {
                    prop_assert!(!example.first.is_empty() && example.label.is_some());
                }
            }
        }
    }
}
