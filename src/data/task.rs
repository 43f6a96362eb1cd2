//! Task cards: what a task asks, how it is scored and where its files lie, as data.
//!
//! A built-in task is one YAML card in `cards/` and one line of [`BUILTIN`]; a user's own task
//! is a [`CustomTask`](super::CustomTask), which turns into the same [`TaskCard`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::metrics::Metric;
use crate::error::{Error, Result};

const BUILTIN: [(&str, &str); 4] = [
    ("cola", include_str!("cards/cola.yaml")),
    ("rte", include_str!("cards/rte.yaml")),
    ("mrpc", include_str!("cards/mrpc.yaml")),
    ("stsb", include_str!("cards/stsb.yaml")),
];

/// What a model learns to predict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// One of several classes; the position of a label is its class id.
    Classification {
        /// The names of the classes in id order.
        labels: Vec<String>,
    },
    /// One real number.
    Regression,
}

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Examples to learn from.
    Train,
    /// Labelled examples to score on.
    Dev,
    /// Examples whose labels may be withheld.
    Test,
}

impl Split {
    /// Every split, in the order of use.
    pub const ALL: [Split; 3] = [Split::Train, Split::Dev, Split::Test];

    /// Returns the name used in YAML, in file names and in the result CSV.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Dev => "dev",
            Split::Test => "test",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Split {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Split::ALL
            .into_iter()
            .find(|split| split.name() == text)
            .ok_or_else(|| Error::configuration(format!("unknown split `{text}`; use train, dev or test")))
    }
}

/// Everything the program knows about a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskCard {
    /// The name used in YAML and in results, such as `cola`.
    pub name: String,
    /// What is predicted.
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub objective: Objective,
    /// The least and greatest score of a regression task, both allowed; `None` allows any.
    #[serde(default)]
    pub score_range: Option<(f64, f64)>,
    /// The metrics to report, in order.
    pub metrics: Vec<Metric>,
    /// The metric that a run's score is.
    pub headline: Metric,
    /// Where the data come from.
    #[serde(default)]
    pub source: String,
    /// Under what terms the data may be used.
    #[serde(default)]
    pub licence: String,
    /// How many rows each split has as it was published.
    #[serde(default)]
    pub published: BTreeMap<Split, usize>,
    /// Names that the task's folder goes by under a data root; without any, files are looked
    /// up as they stand.
    #[serde(default)]
    pub folders: Vec<String>,
    /// For each split the file sets that can provide it; the first one present is read.
    pub splits: BTreeMap<Split, Vec<SplitFiles>>,
    /// The forms a file of this task can have; the first one that fits a file is used.
    pub layouts: Vec<Layout>,
}

/// Files that together hold one split.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitFiles {
    /// The files, in reading order, relative to the task's folder.
    pub files: Vec<PathBuf>,
    /// Which of their rows belong to the split; without it, all do.
    #[serde(default)]
    pub rows: Option<RowFilter>,
}

/// A choice of rows by a list of keys in another file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowFilter {
    /// Whether the listed rows are kept or left out.
    pub keep: Keep,
    /// A tab-separated file without header, one key a row, relative to the task's folder.
    pub list: PathBuf,
    /// The columns of the data file that make up the key, in the order of the list's columns.
    pub columns: Vec<String>,
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
}

/// One form that a task's file can have.
///
/// A column is named by its header; where there is none, by its number from 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// Whether the first row names the columns. JSON Lines always name them.
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
    /// Whether a `"` encloses a cell, as in RFC 4180; `None` means in CSV only.
    #[serde(default)]
    pub quoting: Option<bool>,
}

impl TaskCard {
    /// Returns the built-in card of a task, by its name or its GLUE spelling in any case, such
    /// as `stsb`, `STS-B` or `CoLA`.
    pub fn builtin(name: &str) -> Option<TaskCard> {
        let plain: String = name.to_lowercase().chars().filter(|c| !matches!(c, '-' | '_')).collect();
        let (_, card) = BUILTIN.iter().find(|(builtin, _)| *builtin == plain)?;
        Some(serde_yaml::from_str(card).expect("built-in cards are valid: a test reads each of them"))
    }

    /// Returns the names of the built-in tasks.
    pub fn builtin_names() -> Vec<&'static str> {
        BUILTIN.iter().map(|(name, _)| *name).collect()
    }

    /// Returns the label names in id order; empty for regression.
    pub fn labels(&self) -> &[String] {
        match &self.objective {
            Objective::Classification { labels } => labels,
            Objective::Regression => &[],
        }
    }

    /// Returns the number of outputs a model needs for the task: 1 for regression.
    pub fn label_count(&self) -> usize {
        match &self.objective {
            Objective::Classification { labels } => labels.len(),
            Objective::Regression => 1,
        }
    }

    /// Says whether an example has two texts.
    pub fn is_pair(&self) -> bool {
        self.layouts.iter().any(|layout| layout.text.len() == 2)
    }

    /// Checks that the parts of the card go together.
    ///
    /// # Errors
    ///
    /// [`Error::Configuration`] that says in a sentence what does not.
    pub fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::configuration(format!("task `{}`: {message}", self.name)));
        if self.name.trim().is_empty() {
            return Err(Error::configuration("a task needs a name"));
        }
        if let Objective::Classification { labels } = &self.objective {
            if labels.len() < 2 {
                return refuse(format!("classification needs at least two labels, not {}", labels.len()));
            }
            if let Some(label) = labels.iter().enumerate().find(|(id, label)| labels[..*id].contains(label)) {
                return refuse(format!("the label `{}` is listed twice", label.1));
            }
        }
        for layout in &self.layouts {
            if !matches!(layout.text.len(), 1 | 2) {
                return refuse(format!("`text` takes one or two columns, not {}", layout.text.len()));
            }
        }
        for metric in self.metrics.iter().chain([&self.headline]) {
            if let Some(reason) = self.objection(*metric) {
                return refuse(reason);
            }
        }
        for (position, metric) in self.metrics.iter().enumerate() {
            if self.metrics[..position].contains(metric) {
                return refuse(format!("the metric `{metric}` is listed twice"));
            }
        }
        if !self.metrics.contains(&self.headline) {
            let names: Vec<_> = self.metrics.iter().map(|metric| metric.name()).collect();
            let metrics = names.join(", ");
            return refuse(format!(
                "the headline `{}` is none of its metrics ({metrics}); add it to `metrics`",
                self.headline
            ));
        }
        Ok(())
    }

    /// Says why the task cannot have a metric, if it cannot.
    fn objection(&self, metric: Metric) -> Option<String> {
        let labels = self.label_count();
        match &self.objective {
            Objective::Regression if !metric.fits_values() => {
                Some(format!("`{metric}` compares classes and does not fit a regression"))
            }
            Objective::Classification { .. } if !metric.fits_classes() => {
                Some(format!("`{metric}` compares scores and does not fit a classification"))
            }
            _ if metric == Metric::F1 && labels != 2 => {
                Some(format!("`f1` is defined for two labels, the task has {labels}"))
            }
            _ if metric == Metric::Combined && self.metrics.len() < 3 => {
                Some("`combined` is the mean of the other metrics and needs two or more of them".to_string())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_card_is_valid_and_bears_its_registered_name() {
        for name in TaskCard::builtin_names() {
            let card = TaskCard::builtin(name).unwrap();
            assert_eq!(card.name, name);
            card.check().unwrap();
            assert!(!card.source.is_empty() && !card.licence.is_empty() && !card.folders.is_empty());
            for split in Split::ALL {
                assert!(!card.splits[&split].is_empty(), "{name} {split}");
            }
            for layout in &card.layouts {
                assert!(layout.labels.is_empty() || layout.labels.len() == card.label_count());
            }
            assert!(card.layouts.iter().all(|layout| (layout.text.len() == 2) == card.is_pair()));
        }
    }

    #[test]
    fn glue_spellings_name_the_same_cards() {
        for (spelling, name) in [("CoLA", "cola"), ("STS-B", "stsb"), ("sts_b", "stsb"), ("MRPC", "mrpc")] {
            assert_eq!(TaskCard::builtin(spelling).unwrap().name, name);
        }
        assert_eq!(TaskCard::builtin("colab"), None);
    }

    #[test]
    fn label_order_and_headlines_are_those_of_glue() {
        let card = |name| TaskCard::builtin(name).unwrap();
        assert_eq!(card("cola").labels(), ["unacceptable", "acceptable"]);
        assert_eq!(card("rte").labels(), ["entailment", "not_entailment"]);
        assert_eq!(card("mrpc").labels(), ["not_equivalent", "equivalent"]);
        assert_eq!(card("stsb").objective, Objective::Regression);
        assert_eq!(card("stsb").label_count(), 1);
        let headlines = ["cola", "rte", "mrpc", "stsb"].map(|name| card(name).headline);
        assert_eq!(headlines, [Metric::Matthews, Metric::Accuracy, Metric::F1, Metric::Combined]);
    }

    #[test]
    fn a_card_survives_a_round_trip_through_yaml_and_json() {
        for name in TaskCard::builtin_names() {
            let card = TaskCard::builtin(name).unwrap();
            let yaml = serde_yaml::to_string(&card).unwrap();
            assert_eq!(serde_yaml::from_str::<TaskCard>(&yaml).unwrap(), card);
            let json = serde_json::to_string(&card).unwrap();
            assert_eq!(serde_json::from_str::<TaskCard>(&json).unwrap(), card);
        }
    }

    #[test]
    fn cards_that_contradict_themselves_are_refused() {
        type Spoil = fn(&mut TaskCard);
        let spoilt = |spoil: Spoil| {
            let mut card = TaskCard::builtin("mrpc").unwrap();
            spoil(&mut card);
            card.check().unwrap_err().to_string()
        };
        let cases: [(Spoil, &str); 8] = [
            (|card| card.headline = Metric::Pearson, "does not fit a classification"),
            (|card| card.headline = Metric::Matthews, "none of its metrics (f1, accuracy, combined)"),
            (|card| card.objective = Objective::Regression, "does not fit a regression"),
            (|card| card.metrics.push(Metric::Pearson), "does not fit a classification"),
            (|card| card.metrics = vec![Metric::F1, Metric::Combined], "needs two or more"),
            (|card| card.metrics.push(Metric::F1), "listed twice"),
            (|card| card.layouts[0].text.push("c".into()), "one or two columns, not 3"),
            (
                |card| card.objective = Objective::Classification { labels: vec!["a".into(), "a".into()] },
                "`a` is listed twice",
            ),
        ];
        for (spoil, expected) in cases {
            let message = spoilt(spoil);
            assert!(message.contains(expected) && message.contains("mrpc"), "{message}");
        }
        let three = |card: &mut TaskCard| {
            card.objective = Objective::Classification { labels: ["a", "b", "c"].map(String::from).to_vec() };
        };
        assert!(spoilt(three).contains("`f1` is defined for two labels, the task has 3"));
    }

    #[test]
    fn splits_read_back_and_unknown_ones_are_refused() {
        for split in Split::ALL {
            assert_eq!(split.to_string().parse::<Split>().unwrap(), split);
        }
        assert!("valid".parse::<Split>().unwrap_err().to_string().contains("train, dev or test"));
    }
}
