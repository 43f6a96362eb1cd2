//! One file of a task as examples.
//!
//! Which of the card's layouts a file has is read off the file itself. Text is kept exactly as
//! it stands there, outer spaces included; every fault is reported with its file and line.

use std::collections::HashSet;
use std::path::Path;

use super::label::{Gold, Label, LabelReader};
use super::layout::{Keep, Layout, RowFilter};
use super::table::{DataFile, Format, Request, Row, Rows};
use super::task::TaskCard;
use crate::error::{Error, Result};

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

/// What examples are read for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Purpose {
    /// Training or choosing: each example has a label; rows that the card gives up are left out.
    Learning,
    /// Testing: as for learning, but labels may be withheld.
    Testing,
    /// Predicting: each row is an example, whatever stands for its label.
    Predicting,
}

/// The keys of a [`RowFilter`].
pub(super) struct Listed<'a> {
    filter: &'a RowFilter,
    keys: HashSet<Vec<String>>,
}

impl<'a> Listed<'a> {
    pub fn read(filter: &'a RowFilter, folder: &Path) -> Result<Self> {
        let Some(list) = &filter.list else {
            let keys = filter.values.iter().map(|value| vec![value.clone()]).collect();
            return Ok(Listed { filter, keys });
        };
        let file = DataFile::read(&folder.join(list))?;
        let request = Request { quoting: Some(false), columns: None };
        let rows = file.rows(Format::Tsv, &request)?.rows;
        let width = filter.columns.len();
        let key = |row: &Row| {
            let cells: Vec<String> = row.cells.iter().flatten().map(|cell| cell.to_string()).collect();
            match row.cells.len() == width && cells.len() == width {
                true => Ok(cells),
                false => Err(Error::data(
                    file.path(),
                    row.line,
                    format!("has {} cells, not the {width} by which rows are listed", row.cells.len()),
                )),
            }
        };
        Ok(Listed { filter, keys: rows.iter().map(key).collect::<Result<_>>()? })
    }
}

/// A file together with the layout it turned out to have.
pub(super) struct Sheet<'a> {
    card: &'a TaskCard,
    file: &'a DataFile,
    layout: &'a Layout,
    rows: Rows<'a>,
    columns: Vec<String>,
    /// How many cells a row may have; empty where rows are not made of positions.
    widths: Vec<usize>,
    text: Vec<usize>,
    label: Option<usize>,
}

impl<'a> Sheet<'a> {
    /// Finds the layout of a file.
    pub fn open(card: &'a TaskCard, file: &'a DataFile) -> Result<Self> {
        let columns = columns_of(card);
        let mut seen = Vec::new();
        // The layouts of a card as a rule agree in format and quoting: one reading serves them all.
        let mut last: Option<((Format, Option<bool>), Rows)> = None;
        for layout in &card.layouts {
            let form = (layout.format.unwrap_or_else(|| file.guess_format()), layout.quoting);
            let rows = match last.take() {
                Some((known, rows)) if known == form => rows,
                _ => file.rows(form.0, &Request { quoting: form.1, columns: Some(&columns) })?,
            };
            if rows.rows.is_empty() {
                return Err(Error::data(file.path(), 0, "has no examples"));
            }
            match Sheet::fit(card, file, layout, rows) {
                Ok(sheet) => return sheet.with_columns_of_its_own(),
                Err((rows, first)) => (last, seen) = (Some((form, rows)), first),
            }
        }
        let expected: Vec<_> = card.layouts.iter().map(describe).collect();
        let message = format!("does not look like task `{}`: expected {}", card.name, expected.join(", or "));
        Err(Error::data(file.path(), 1, format!("{message}; found {}", preview(&seen))))
    }

    /// Finds the layout's columns in the rows; if one is missing, gives back the rows and the
    /// cells or names of the first one.
    fn fit(
        card: &'a TaskCard,
        file: &'a DataFile,
        layout: &'a Layout,
        mut rows: Rows<'a>,
    ) -> Result<Self, (Rows<'a>, Vec<String>)> {
        let first = || rows.rows[0].cells.iter().map(|cell| cell.as_deref().unwrap_or_default());
        let width = rows.rows[0].cells.len();
        let (columns, widths): (Vec<String>, _) = match &rows.columns {
            Some(columns) => (columns.clone(), Vec::new()),
            None if layout.header => (first().map(|name| name.trim().to_string()).collect(), vec![width]),
            None => {
                let widths = if layout.widths.is_empty() { vec![width] } else { layout.widths.clone() };
                ((1..=width).map(|number| number.to_string()).collect(), widths)
            }
        };
        let position = |column: &String| columns.iter().position(|name| name == column);
        let text: Option<Vec<usize>> = layout.text.iter().map(position).collect();
        let is_right_width = widths.is_empty() || widths.contains(&width);
        let Some(text) = text.filter(|_| is_right_width) else {
            let seen = rows.columns.clone().unwrap_or_else(|| first().map(str::to_string).collect());
            return Err((rows, seen));
        };
        let label = layout.label.iter().find_map(position);
        if layout.header && rows.columns.is_none() {
            rows.rows.remove(0);
        }
        Ok(Sheet { card, file, layout, rows, columns, widths, text, label })
    }

    /// Refuses a file in which two columns have the name of one that is read.
    fn with_columns_of_its_own(self) -> Result<Self> {
        let name = |place: &usize| &self.columns[*place];
        let read = || self.text.iter().chain(&self.label).map(name);
        let twice = read().find(|&name| self.columns.iter().filter(|other| *other == name).count() > 1);
        match twice {
            Some(name) => Err(self.fault(1, format!("has more than one column called `{name}`"))),
            None => Ok(self),
        }
    }

    fn fault(&self, line: usize, message: impl Into<String>) -> Error {
        Error::data(self.file.path(), line, message)
    }

    fn require_label(&self) -> Result<()> {
        match self.label {
            Some(_) => Ok(()),
            None => {
                let names = self.layout.label.join("` or `");
                Err(self.fault(1, format!("has no label column; expected one named `{names}`")))
            }
        }
    }

    /// Appends the examples of the rows that `listed` lets through; returns how many rows the
    /// card gave up.
    pub fn read(
        &self,
        listed: Option<&Listed>,
        purpose: Purpose,
        examples: &mut Vec<Example>,
    ) -> Result<usize> {
        if purpose == Purpose::Learning {
            self.require_label()?;
        }
        let labels = LabelReader::new(self.card, self.layout);
        let key = listed.map_or(Ok(Vec::new()), |listed| self.key_columns(&listed.filter.columns))?;
        let mut dropped = 0;
        for row in &self.rows.rows {
            if self.card.skip_short_rows && purpose != Purpose::Predicting && self.is_short(row) {
                dropped += 1;
                continue;
            }
            self.check_width(row)?;
            self.refuse_header(row)?;
            if let Some(listed) = listed {
                let cell = |&position: &usize| row.cells[position].as_deref().unwrap_or("").to_string();
                let is_listed = listed.keys.contains(&key.iter().map(cell).collect::<Vec<_>>());
                if is_listed != (listed.filter.keep == Keep::Listed) {
                    continue;
                }
            }
            match self.example(row, &labels, purpose)? {
                Some(example) => examples.push(example),
                None => dropped += 1,
            }
        }
        Ok(dropped)
    }

    fn key_columns(&self, names: &[String]) -> Result<Vec<usize>> {
        let place = |name: &String| {
            let mut places = (0..self.columns.len()).filter(|&place| self.columns[place] == *name);
            match (places.next(), places.next()) {
                (Some(place), None) => Ok(place),
                (None, _) => Err(self.fault(1, format!("has no column `{name}`"))),
                _ => Err(self.fault(1, format!("has more than one column called `{name}`"))),
            }
        };
        names.iter().map(place).collect()
    }

    fn is_short(&self, row: &Row) -> bool {
        let is_missing = |position: &usize| row.cells.get(*position).is_none_or(Option::is_none);
        self.widths.iter().all(|width| row.cells.len() < *width) && !self.widths.is_empty()
            || self.text.iter().any(is_missing)
    }

    fn check_width(&self, row: &Row) -> Result<()> {
        let width = row.cells.len();
        if self.widths.is_empty() || self.widths.contains(&width) {
            return Ok(());
        }
        let expected: Vec<_> = self.widths.iter().map(usize::to_string).collect();
        let hint = match self.rows.quoted {
            true => "; if a `\"` is an ordinary character in this file, set `quoting: false`",
            false => "",
        };
        let message = format!("expected {} columns, found {width}{hint}", expected.join(" or "));
        Err(self.fault(row.line, message))
    }

    /// Refuses a row that has the names of the columns that are read, two at least, as joined files have it.
    fn refuse_header(&self, row: &Row) -> Result<()> {
        let is_name = |place: &usize| {
            row.cells.get(*place).and_then(Option::as_deref).map(str::trim) == Some(&self.columns[*place])
        };
        let reads_several = self.text.len() + usize::from(self.label.is_some()) > 1;
        let has_header = self.layout.header && self.rows.columns.is_none();
        match has_header && reads_several && self.text.iter().chain(&self.label).all(is_name) {
            true => Err(self.fault(row.line, "has the names of the columns once more; remove the line")),
            false => Ok(()),
        }
    }

    /// Reads a row; `None` if its label is one of those that the card gives up.
    fn example(&self, row: &Row, labels: &LabelReader, purpose: Purpose) -> Result<Option<Example>> {
        let gold = match self.label(row).map(|cell| labels.read(cell)) {
            Some(Err(message)) if purpose != Purpose::Predicting => return Err(self.fault(row.line, message)),
            read => read.and_then(Result::ok),
        };
        let label = match gold {
            Some(Gold::Known(label)) => Some(label),
            Some(Gold::Dropped) if purpose != Purpose::Predicting => return Ok(None),
            _ if purpose == Purpose::Learning => return Err(self.fault(row.line, "has no label")),
            _ => None,
        };
        let first = self.text(row, 0)?;
        let second = if self.text.len() == 2 { Some(self.text(row, 1)?) } else { None };
        Ok(Some(Example { first, second, label }))
    }

    fn text(&self, row: &Row, index: usize) -> Result<String> {
        let column = &self.layout.text[index];
        match row.cells[self.text[index]].as_deref() {
            None => Err(self.fault(row.line, format!("has no text in column `{column}`"))),
            Some(text) if text.trim().is_empty() && !self.card.allow_empty_text => {
                Err(self.fault(row.line, format!("the text in column `{column}` is empty")))
            }
            Some(text) => Ok(text.to_string()),
        }
    }

    /// Returns what a row has as its label, if anything.
    fn label<'row>(&self, row: &'row Row) -> Option<&'row str> {
        let cell = row.cells.get(self.label?)?.as_deref()?.trim();
        (!cell.is_empty()).then_some(cell)
    }

    /// Returns the spellings in the label column.
    pub fn label_spellings(&self) -> Result<impl Iterator<Item = &str>> {
        self.require_label()?;
        Ok(self.rows.rows.iter().filter_map(|row| self.label(row)))
    }
}

/// Returns the columns that any layout or choice of rows of a card names.
fn columns_of(card: &TaskCard) -> Vec<&str> {
    let layouts = card.layouts.iter().flat_map(|layout| layout.text.iter().chain(&layout.label));
    let filters = card.splits.values().flatten().filter_map(|choice| choice.rows.as_ref());
    layouts.chain(filters.flat_map(|filter| &filter.columns)).map(String::as_str).collect()
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

    use super::Purpose::{Learning, Predicting};
    use super::*;

    /// Reads a file's content as the named task does.
    fn read(task: &str, name: &str, content: &str, purpose: Purpose) -> Result<Vec<Example>> {
        let card = TaskCard::builtin(task).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let file = DataFile::read(&path)?;
        let mut examples = Vec::new();
        Sheet::open(&card, &file)?.read(None, purpose, &mut examples)?;
        Ok(examples)
    }

    fn refusal(task: &str, content: &str) -> String {
        read(task, "f.tsv", content, Learning).unwrap_err().to_string()
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
        assert_eq!(read("cola", "f.tsv", rows, Learning).unwrap(), expected);
        let test = "index\tsentence\n0\tHe left.\n";
        let expected = [example("He left.", None, None)];
        assert_eq!(read("cola", "f.tsv", test, Predicting).unwrap(), expected);
    }

    #[test]
    fn similarity_scores_come_with_a_header_or_in_seven_or_nine_columns() {
        let pair = |score| example(" a", Some("b"), Some(Label::Score(score)));
        let headed = "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\t a\tb\t3.800\n1\tnews\t a\tb\t4\n";
        let expected = [pair(3.8), pair(4.0)];
        assert_eq!(read("stsb", "f.tsv", headed, Learning).unwrap(), expected);
        let original = "g\tf\ty\t1\t3.800\t a\tb\ng\tf\ty\t2\t4\t a\tb\tlicence\tlicence\n";
        assert_eq!(read("stsb", "sts-train.csv", original, Learning).unwrap(), expected);
    }

    #[test]
    fn prediction_files_may_be_json_lines_or_quoted_csv_under_the_hubs_names() {
        let rows = "{\"sentence2\": \"b, c\", \"sentence1\": \"a\", \"idx\": 0, \"label\": 1}\n\
                    {\"sentence1\": \"d\", \"sentence2\": \"e\", \"label\": -1}\n";
        let expected = [example("a", Some("b, c"), Some(Label::Class(1))), example("d", Some("e"), None)];
        assert_eq!(read("mrpc", "f.jsonl", rows, Predicting).unwrap(), expected);
        let rows = "sentence1,sentence2,label\na,\"b, c\",equivalent\nd,e,\n";
        assert_eq!(read("mrpc", "f.csv", rows, Predicting).unwrap(), expected);
        // Only a file of positions can have the names of its columns once more.
        let named = "{\"sentence1\": \"sentence1\", \"sentence2\": \"sentence2\", \"label\": 1}\n";
        let expected = [example("sentence1", Some("sentence2"), Some(Label::Class(1)))];
        assert_eq!(read("mrpc", "f.jsonl", named, Learning).unwrap(), expected);
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
        let message = read("rte", "f.jsonl", rows, Predicting).unwrap_err().to_string();
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
        let refusal = |rows: &str| {
            let rows = format!("sentence1,sentence2,label\n{rows}");
            read("mrpc", "f.csv", &rows, Learning).unwrap_err().to_string()
        };
        let message = refusal("a,\"b,1\nc\",d,0\n");
        assert!(message.contains(":2: expected 3 columns, found 4; if a `\"` is"), "{message}");
        let message = refusal("a,b,1\nc,\"d,0\n");
        assert!(
            message.contains(":3: a cell begins with a \" here") && message.contains("set `quoting: false`"),
            "{message}"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_either_labelled_examples_or_a_refusal(
            task in prop::sample::select(TaskCard::builtin_names()),
            header in prop::sample::select(vec!["", "sentence\tlabel\n", "sentence1,sentence2,label\n", "{"]),
            body in "[\t\n\r\",{}:a01.\u{feff}é-]{0,60}",
        ) {
            if let Ok(examples) = read(task, "f.txt", &format!("{header}{body}"), Learning) {
                for example in examples {
                    prop_assert!(example.label.is_some());
                    prop_assert!(!example.first.is_empty() || TaskCard::builtin(task).unwrap().allow_empty_text);
                }
            }
        }
    }
}
