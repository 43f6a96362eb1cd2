//! Task cards: what a task asks, how it is scored and where its files lie, as data.
//!
//! A built-in task is one YAML card in `cards/` and one line of [`BUILTIN`]; a user's own task
//! is a [`CustomTask`](super::CustomTask), which turns into the same [`TaskCard`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::label::same_label;
use super::layout::{Layout, SplitFiles};
use super::metrics::Metric;
use crate::error::{Error, Result};
use crate::spelling::suggestion;

const BUILTIN: [(&str, &str); 15] = [
    ("cola", include_str!("cards/cola.yaml")),
    ("rte", include_str!("cards/rte.yaml")),
    ("mrpc", include_str!("cards/mrpc.yaml")),
    ("stsb", include_str!("cards/stsb.yaml")),
    ("sst2", include_str!("cards/sst2.yaml")),
    ("qqp", include_str!("cards/qqp.yaml")),
    ("mnli", include_str!("cards/mnli.yaml")),
    ("mnli_mm", include_str!("cards/mnli_mm.yaml")),
    ("qnli", include_str!("cards/qnli.yaml")),
    ("wnli", include_str!("cards/wnli.yaml")),
    ("ax", include_str!("cards/ax.yaml")),
    ("snli", include_str!("cards/snli.yaml")),
    ("scitail", include_str!("cards/scitail.yaml")),
    ("sick", include_str!("cards/sick.yaml")),
    ("sick_r", include_str!("cards/sick_r.yaml")),
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
    /// Names that the task's folder goes by under a data root; without any, files are looked
    /// up as they stand.
    #[serde(default)]
    pub folders: Vec<String>,
    /// For each split the file sets that can provide it; the first one present is read.
    pub splits: BTreeMap<Split, Vec<SplitFiles>>,
    /// The forms a file of this task can have; the first one that fits a file is used.
    pub layouts: Vec<Layout>,
    /// How many usable examples the publishers count in each split.
    #[serde(default)]
    pub published: BTreeMap<Split, usize>,
    /// Other names that a label has in files or models, each with the card's own name for it.
    #[serde(default)]
    pub spellings: BTreeMap<String, String>,
    /// Labels of other tasks that count as one of this task's when a model with those labels is
    /// scored here; gold labels are not read by it.
    #[serde(default)]
    pub merges: BTreeMap<String, String>,
    /// Gold labels that mean "no consensus": [`read_split`](super::read_split) leaves such rows out.
    #[serde(default)]
    pub drop_labels: Vec<String>,
    /// Whether [`read_split`](super::read_split) leaves out rows with missing cells; otherwise
    /// they are errors.
    #[serde(default)]
    pub skip_short_rows: bool,
    /// Whether a text may be empty.
    #[serde(default)]
    pub allow_empty_text: bool,
}

impl TaskCard {
    /// Returns the built-in card of a task, by its name or its GLUE spelling in any case, such
    /// as `stsb`, `STS-B` or `CoLA`.
    pub fn builtin(name: &str) -> Option<TaskCard> {
        let plain = |name: &str| name.to_lowercase().replace(['-', '_'], "");
        let (_, card) = BUILTIN.iter().find(|(builtin, _)| plain(builtin) == plain(name))?;
        Some(serde_yaml::from_str(card).expect("built-in cards are valid: a test reads each of them"))
    }

    /// Finds a task by its built-in name, or by its card file, which ends in `.yaml` or `.yml`.
    ///
    /// # Errors
    /// Fails, with the nearest known name, if there is neither, or if the file is no card.
    pub fn named(name: &str) -> Result<TaskCard> {
        Self::named_beside(Path::new(""), name)
    }

    /// Does what [`TaskCard::named`] does, with card files of a folder before those of the working folder.
    ///
    /// # Errors
    /// As for [`TaskCard::named`].
    pub fn named_beside(folder: &Path, name: &str) -> Result<TaskCard> {
        if let Some(card) = TaskCard::builtin(name) {
            return Ok(card);
        }
        if name.ends_with(".yaml") || name.ends_with(".yml") {
            let beside = folder.join(name);
            return TaskCard::load(if beside.exists() { &beside } else { Path::new(name) });
        }
        let known = TaskCard::builtin_names();
        Err(Error::configuration(format!(
            "unknown task `{name}`{}; known are {}, and files of your own that end in .yaml",
            suggestion(name, known.iter().copied()),
            known.join(", ")
        )))
    }

    /// Returns the split that models are scored on where nothing is said: dev, or test where there is no dev.
    pub fn scored_split(&self) -> Split {
        if self.splits.contains_key(&Split::Dev) { Split::Dev } else { Split::Test }
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

    /// Returns the class id of a label's own name, in any case.
    pub fn label_id(&self, name: &str) -> Option<usize> {
        self.labels().iter().position(|label| same_label(label, name))
    }

    /// Says whether a gold label means that the row is to be left out.
    pub(super) fn drops(&self, cell: &str) -> bool {
        self.drop_labels.iter().any(|label| same_label(label, cell))
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
        if self.name.contains([',', '>']) {
            return refuse(
                "its name must not have `,` or `>`, by which tasks of a list or of a chain are told apart"
                    .into(),
            );
        }
        if let Objective::Classification { labels } = &self.objective {
            if labels.len() < 2 {
                return refuse(format!("classification needs at least two labels, not {}", labels.len()));
            }
            let is_there =
                |(id, label): &(usize, &String)| labels[..*id].iter().any(|other| same_label(other, label));
            if let Some(label) = labels.iter().enumerate().find(is_there) {
                return refuse(format!("the label `{}` is listed twice", label.1));
            }
        }
        if let Some(reason) = self.objection_to_names() {
            return refuse(reason);
        }
        for layout in &self.layouts {
            if !matches!(layout.text.len(), 1 | 2) {
                return refuse(format!("`text` takes one or two columns, not {}", layout.text.len()));
            }
        }
        for filter in self.splits.values().flatten().filter_map(|choice| choice.rows.as_ref()) {
            if let Some(reason) = filter.objection() {
                return refuse(reason.to_string());
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
        let counts = self.layouts.iter().map(|layout| layout.labels.len());
        if let Some(given) = counts.into_iter().find(|given| ![0, self.labels().len()].contains(given)) {
            return refuse(format!("a layout names {given} labels, the task has {}", self.labels().len()));
        }
        Ok(())
    }

    /// Says which other name of a label leads nowhere or two ways, if one does.
    fn objection_to_names(&self) -> Option<String> {
        // Files differ in case, so names that differ in nothing else are one.
        let is_label = |name: &String| self.label_id(name).is_some();
        let is_among = |names: &BTreeMap<String, String>, name: &String| {
            names.keys().any(|other| same_label(other, name))
        };
        for (key, names) in [("spellings", &self.spellings), ("merges", &self.merges)] {
            for (other, name) in names {
                if !is_label(name) {
                    return Some(format!(
                        "`{key}` takes `{other}` for `{name}`, which is none of its labels"
                    ));
                }
                if is_label(other) && self.label_id(other) != self.label_id(name) {
                    return Some(format!("`{key}` takes `{other}` for `{name}`, but it is a label itself"));
                }
            }
        }
        if let Some(other) = self.merges.keys().find(|other| is_among(&self.spellings, other)) {
            return Some(format!("`{other}` is in `spellings` and in `merges`; keep one of them"));
        }
        for (key, names) in [("spellings", &self.spellings), ("merges", &self.merges)] {
            for (other, name) in names {
                let differs = |(alike, label): &(&String, &String)| {
                    same_label(alike, other) && !same_label(label, name)
                };
                if let Some((alike, label)) = names.iter().find(differs) {
                    return Some(format!(
                        "`{key}` takes `{other}` for `{name}` and `{alike}` for `{label}`, but files differ in case: keep one of them"
                    ));
                }
            }
        }
        let is_known = |name: &&String| is_label(name) || is_among(&self.spellings, name);
        let dropped = self.drop_labels.iter().find(is_known)?;
        Some(format!("`drop_labels` has `{dropped}`, which is a label"))
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
            // The diagnostic set has nothing to train on and nothing to choose by.
            let splits = if name == "ax" { &[Split::Test][..] } else { &Split::ALL[..] };
            assert!(card.splits.keys().eq(splits) && card.published.keys().eq(splits), "{name}");
            assert!(card.splits.values().all(|choices| !choices.is_empty()), "{name}");
            assert!(card.layouts.iter().all(|layout| (layout.text.len() == 2) == card.is_pair()));
        }
    }

    #[test]
    fn glue_spellings_name_the_same_cards() {
        for (spelling, name) in [
            ("CoLA", "cola"),
            ("STS-B", "stsb"),
            ("sts_b", "stsb"),
            ("MNLI-mm", "mnli_mm"),
            ("SST-2", "sst2"),
        ] {
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
        let three = ["entailment", "neutral", "contradiction"];
        for name in ["mnli", "mnli_mm", "ax", "snli", "sick"] {
            assert_eq!(card(name).labels(), three, "{name}");
        }
        assert_eq!(card("qnli").labels(), ["entailment", "not_entailment"]);
        assert_eq!(card("wnli").labels(), ["not_entailment", "entailment"]);
        assert_eq!(card("scitail").labels(), ["entails", "neutral"]);
        assert_eq!(card("sst2").labels(), ["negative", "positive"]);
        assert_eq!(card("qqp").labels(), ["not_duplicate", "duplicate"]);
        assert_eq!((card("sick_r").labels().len(), card("sick_r").score_range), (0, Some((1.0, 5.0))));
        for name in TaskCard::builtin_names() {
            let expected = match name {
                "cola" | "ax" => Metric::Matthews,
                "mrpc" | "qqp" => Metric::F1,
                "stsb" | "sick_r" => Metric::Combined,
                _ => Metric::Accuracy,
            };
            assert_eq!(card(name).headline, expected, "{name}");
        }
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
        fn put(names: &mut BTreeMap<String, String>, other: &str, name: &str) {
            names.insert(other.into(), name.into());
        }
        let cases: [(Spoil, &str); 14] = [
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
            (
                |card| put(&mut card.spellings, "same", "equal"),
                "`same` for `equal`, which is none of its labels",
            ),
            (|card| put(&mut card.merges, "equivalent", "not_equivalent"), "but it is a label itself"),
            (
                |card| {
                    put(&mut card.spellings, "same", "equivalent");
                    put(&mut card.merges, "same", "equivalent");
                },
                "in `spellings` and in `merges`",
            ),
            (
                |card| card.drop_labels.push("equivalent".into()),
                "`drop_labels` has `equivalent`, which is a label",
            ),
            (|card| card.layouts[0].labels.push("2".into()), "a layout names 3 labels, the task has 2"),
            (
                |card| card.splits.get_mut(&Split::Dev).unwrap()[1].rows.as_mut().unwrap().list = None,
                "needs a `list` or `values`",
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
