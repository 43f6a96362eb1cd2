//! Where a task's files lie and what forms they have, as a card says it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::table::Format;

/// Files that together hold one split.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitFiles {
    /// The files, in reading order, relative to the task's folder. One `*` in a file's name
    /// stands for any characters, and the files it finds are read in alphabetical order.
    pub files: Vec<PathBuf>,
    /// Which of their rows belong to the split; without it, all do.
    #[serde(default)]
    pub rows: Option<RowFilter>,
}

/// A choice of rows by their cells in some columns, which make up the key of a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowFilter {
    /// Whether the listed rows are kept or left out.
    pub keep: Keep,
    /// The columns of the data file that make up the key, in the order of the list's columns.
    pub columns: Vec<String>,
    /// A tab-separated file without header, one key a row, relative to the task's folder.
    #[serde(default)]
    pub list: Option<PathBuf>,
    /// In place of a file: the keys, cells of the only column.
    #[serde(default)]
    pub values: Vec<String>,
}

/// Which rows a [`RowFilter`] keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// Rows whose key is in the list.
    Listed,
    /// Rows whose key is not in the list.
    Unlisted,
}

/// One form that a task's file can have.
///
/// A column is named by its header; where there is none, by its number from 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Whether the first row names the columns. JSON Lines and Parquet always name them.
    pub header: bool,
    /// Without a header: how many columns a row may have; empty takes the first row's number.
    #[serde(default)]
    pub widths: Vec<usize>,
    /// The one or two text columns.
    pub text: Vec<String>,
    /// The label's column; of several names the first one present counts.
    pub label: Vec<String>,
    /// What the file calls the labels, in id order, where that differs from the card's names.
    #[serde(default)]
    pub labels: Vec<String>,
    /// How cells are told apart; `None` finds out from the file.
    #[serde(default)]
    pub format: Option<Format>,
    /// Whether a `"` encloses a cell, as in RFC 4180; `None` takes it to in CSV and finds out
    /// from the file in TSV.
    #[serde(default)]
    pub quoting: Option<bool>,
}

impl RowFilter {
    /// Says why the filter cannot work, if it cannot.
    pub(super) fn objection(&self) -> Option<&'static str> {
        match (&self.list, self.values.is_empty()) {
            (None, true) => Some("a choice of rows needs a `list` or `values`"),
            (Some(_), false) => Some("a choice of rows takes a `list` or `values`, not both"),
            (None, false) if self.columns.len() != 1 => {
                Some("a choice of rows by `values` takes one column; use a `list` for several")
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
