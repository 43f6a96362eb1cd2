//! A user's own task: a short YAML card that names files and columns.
//!
//! The same keys serve as a file of their own and as the `custom:` map of an experiment.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};

use super::label::same_label;
use super::layout::{Layout, SplitFiles};
use super::metrics::Metric;
use super::reader::label_spellings;
use super::table::Format;
use super::task::{Objective, Split, TaskCard};
use crate::error::{Error, Result};
use crate::spelling::quoted;
use crate::values::OneOrMany;
use crate::yaml;

/// More different labels than this are taken for scores or free text, not for classes.
const MOST_COLLECTED_LABELS: usize = 100;

/// The card of a task that is not built in, as the user writes it.
///
/// ```yaml
/// name: claims
/// train: claims/train.csv
/// dev: claims/dev.csv
/// text: [claim, evidence]
/// label: verdict
/// labels: [refuted, supported]
/// metrics: [accuracy, f1]
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CustomTask {
    /// The name in results.
    pub name: String,
    /// The file to train on.
    #[serde(default)]
    pub train: Option<PathBuf>,
    /// The labelled file to score on.
    #[serde(default)]
    pub dev: Option<PathBuf>,
    /// A further file, labelled or not.
    #[serde(default)]
    pub test: Option<PathBuf>,
    /// How cells are told apart; found out from each file if left out.
    #[serde(default)]
    pub format: Option<Format>,
    /// The one or two text columns.
    #[serde(deserialize_with = "words")]
    pub text: Vec<String>,
    /// The label's column.
    #[serde(deserialize_with = "word")]
    pub label: String,
    /// The labels in id order; collected from the training file, sorted, if left out.
    #[serde(default, deserialize_with = "words", skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Classification unless it says regression.
    #[serde(default)]
    pub objective: CustomObjective,
    /// The metrics to report: accuracy, or those of STS-B for a regression, if left out.
    #[serde(default)]
    pub metrics: Vec<Metric>,
    /// The metric that a run's score is; the first one if left out.
    #[serde(default)]
    pub headline: Option<Metric>,
    /// Other names that a label has in files or models, each with the name in `labels`.
    #[serde(default, deserialize_with = "word_pairs", skip_serializing_if = "BTreeMap::is_empty")]
    pub spellings: BTreeMap<String, String>,
    /// Labels of other tasks that count as one of `labels` when a model with those is scored here.
    #[serde(default, deserialize_with = "word_pairs", skip_serializing_if = "BTreeMap::is_empty")]
    pub merges: BTreeMap<String, String>,
    /// Gold labels that mean "no consensus": such rows are left out of train, dev and test.
    #[serde(default, deserialize_with = "words", skip_serializing_if = "Vec::is_empty")]
    pub drop_labels: Vec<String>,
    /// Whether a `"` encloses a cell; if left out, it does in CSV, and a TSV file shows it.
    #[serde(default)]
    pub quoting: Option<bool>,
    /// Whether the first row names the columns; without it, columns go by number from 1.
    #[serde(default = "yes")]
    pub header: bool,
}

/// What a user's task predicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CustomObjective {
    /// One of several classes.
    #[default]
    Classification,
    /// One real number.
    Regression,
}

fn yes() -> bool {
    true
}

impl CustomTask {
    /// Completes the card; relative file names are taken from the folder `base`.
    ///
    /// Reads the training file if the labels are to be collected from it.
    ///
    /// # Errors
    ///
    /// [`Error::Configuration`] if the keys contradict each other; [`Error::Data`] if labels must
    /// be collected and the training file cannot be read.
    pub fn into_card(self, base: &Path) -> Result<TaskCard> {
        let regression = self.objective == CustomObjective::Regression;
        if regression && !self.labels.is_empty() {
            return Err(self.refusal("`labels` and `objective: regression` exclude each other"));
        }
        if self.text.is_empty() {
            return Err(self.refusal("`text` takes one or two columns, not 0"));
        }
        let columns: Vec<&String> = self.columns().collect();
        let twice = columns.iter().enumerate().find(|(place, column)| columns[..*place].contains(column));
        if let Some((_, column)) = twice.filter(|_| self.text.len() <= 2) {
            return Err(self.refusal(&format!(
                "column `{column}` is named twice; texts and label are columns of their own"
            )));
        }
        if self.labels.iter().any(|label| label.trim().is_empty()) {
            return Err(
                self.refusal("`labels` has an empty one, which in a file means that there is no label")
            );
        }
        if !self.header
            && let Some(column) = self.columns().find(|column| !is_column_number(column))
        {
            let message = format!("without a header a column is a number from 1, not `{column}`");
            return Err(self.refusal(&message));
        }
        let mut card = self.unlabelled_card(base);
        if !regression {
            let labels = match self.labels.is_empty() {
                true => self.collect_labels(&card)?,
                false => self.labels.clone(),
            };
            card.objective = Objective::Classification { labels };
        }
        card.check()?;
        Ok(card)
    }

    fn columns(&self) -> impl Iterator<Item = &String> {
        self.text.iter().chain([&self.label])
    }

    fn refusal(&self, message: &str) -> Error {
        Error::configuration(format!("task `{}`: {message}", self.name))
    }

    /// Everything of the card but the label names, which may have to be read by means of it.
    fn unlabelled_card(&self, base: &Path) -> TaskCard {
        let files = [(Split::Train, &self.train), (Split::Dev, &self.dev), (Split::Test, &self.test)];
        let splits: BTreeMap<_, _> = files
            .into_iter()
            .filter_map(|(split, file)| Some((split, base.join(file.as_ref()?))))
            .map(|(split, file)| (split, vec![SplitFiles { files: vec![file], rows: None }]))
            .collect();
        let metrics = match (self.metrics.is_empty(), self.objective) {
            (false, _) => self.metrics.clone(),
            (true, CustomObjective::Classification) => vec![Metric::Accuracy],
            (true, CustomObjective::Regression) => {
                vec![Metric::Combined, Metric::Pearson, Metric::Spearman]
            }
        };
        let layout = Layout {
            header: self.header,
            widths: Vec::new(),
            text: self.text.clone(),
            label: vec![self.label.clone()],
            labels: Vec::new(),
            format: self.format,
            quoting: self.quoting,
        };
        TaskCard {
            name: self.name.clone(),
            objective: Objective::Regression,
            score_range: None,
            headline: self.headline.unwrap_or(metrics[0]),
            metrics,
            source: String::new(),
            licence: String::new(),
            folders: Vec::new(),
            splits,
            layouts: vec![layout],
            published: BTreeMap::new(),
            spellings: self.spellings.clone(),
            merges: self.merges.clone(),
            drop_labels: self.drop_labels.clone(),
            skip_short_rows: false,
            allow_empty_text: false,
        }
    }

    fn collect_labels(&self, card: &TaskCard) -> Result<Vec<String>> {
        let Some(train) = card.splits.get(&Split::Train) else {
            return Err(self.refusal("name its `labels`, or a `train` file to collect them from"));
        };
        let path = &train[0].files[0];
        let spellings = label_spellings(card, path)?.into_iter().filter(|spelling| !card.drops(spelling));
        let name = |spelling: String| {
            let own = self.spellings.iter().find(|(other, _)| same_label(other, &spelling));
            own.map_or(spelling, |(_, name)| name.clone())
        };
        let labels: BTreeSet<String> = spellings.map(name).collect();
        let mut labels: Vec<String> = labels.into_iter().collect();
        // Labels are read without regard to case: of spellings that differ in it alone, the last in order names the class.
        let all = labels.clone();
        let mut place = 0;
        labels.retain(|label| {
            place += 1;
            !all[place..].iter().any(|later| same_label(later, label))
        });
        if labels.len() < 2 {
            let found =
                labels.first().map_or("no label".to_owned(), |only| format!("no label but {}", quoted(only)));
            let message =
                format!("holds {found}; a classification has two at least: list them under `labels`");
            return Err(Error::data(path, 0, message));
        }
        if labels.len() > MOST_COLLECTED_LABELS {
            let message = format!(
                "column `{}` holds {} different labels; if they are scores, set `objective: regression`, \
                 otherwise list them under `labels`",
                self.label,
                labels.len()
            );
            return Err(Error::data(path, 0, message));
        }
        let numbers: Option<Vec<i64>> = labels.iter().map(|label| label.parse().ok()).collect();
        if numbers.is_some() {
            labels.sort_by_key(|label| label.parse::<i64>().unwrap_or_default());
        }
        Ok(labels)
    }
}

impl TaskCard {
    /// Reads a user's card; relative file names in it are taken from the card's own folder.
    ///
    /// # Errors
    ///
    /// [`Error::Configuration`] that names the file and, for a wrong key or value, line and
    /// column; [`Error::Io`] if the file cannot be read.
    pub fn load(path: &Path) -> Result<TaskCard> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let task: CustomTask = yaml::parse(&text, path)?;
        let card = task.into_card(path.parent().unwrap_or(Path::new("")));
        card.map_err(|error| match error {
            Error::Configuration(message) => Error::configuration(format!("{}: {message}", path.display())),
            other => other,
        })
    }
}

fn is_column_number(column: &str) -> bool {
    column.parse::<usize>().is_ok_and(|number| number > 0)
}

/// A name that YAML may have taken for a number or a truth value.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Word(String);

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WordVisitor).map(Word)
    }
}

fn word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    deserializer.deserialize_any(WordVisitor)
}

/// Reads one name or a list of names.
fn words<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let OneOrMany(words) = OneOrMany::<Word>::deserialize(deserializer)?;
    Ok(words.into_iter().map(|Word(word)| word).collect())
}

/// Reads a map of names to names.
fn word_pairs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    let pairs = BTreeMap::<Word, Word>::deserialize(deserializer)?;
    Ok(pairs.into_iter().map(|(Word(other), Word(name))| (other, name)).collect())
}

struct WordVisitor;

impl Visitor<'_> for WordVisitor {
    type Value = String;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a name or a whole number")
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<String, E> {
        Ok(value.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::super::label::Label;
    use super::super::reader::{read_file, read_split};
    use super::*;

    const CARD: &str = "name: claims\ntrain: t.csv\ndev: d.tsv\ntext: [claim, evidence]\nlabel: verdict\n";
    const TRAIN: &str = "verdict,claim,evidence\n10,a,\"b, c\"\n9,d,e\n10,f,g\n";

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    fn refusal(card: &str) -> String {
        let folder = folder(&[("card.yaml", card), ("t.csv", TRAIN)]);
        TaskCard::load(&folder.path().join("card.yaml")).unwrap_err().to_string()
    }

    #[test]
    fn a_card_reads_files_beside_it_and_collects_numeric_labels_in_order() {
        let dev = "claim\tevidence\tverdict\nh \"i\tj\t9\n";
        let folder = folder(&[("card.yaml", CARD), ("t.csv", TRAIN), ("d.tsv", dev)]);
        let card = TaskCard::load(&folder.path().join("card.yaml")).unwrap();
        assert_eq!(card.labels(), ["9", "10"]);
        assert_eq!((card.headline, &card.metrics[..]), (Metric::Accuracy, &[Metric::Accuracy][..]));
        assert!(card.is_pair());
        let train = read_split(&card, &[], Split::Train).unwrap();
        assert_eq!(train.examples[0].second.as_deref(), Some("b, c"));
        assert_eq!(train.examples[0].label, Some(Label::Class(1)));
        let dev = read_split(&card, &[], Split::Dev).unwrap();
        assert_eq!(dev.examples[0].first, "h \"i");
        let message = read_split(&card, &[], Split::Test).unwrap_err().to_string();
        assert!(message.contains("name a file as `test:` in its card"), "{message}");
    }

    #[test]
    fn a_card_survives_a_round_trip_through_yaml() {
        let task: CustomTask = serde_yaml::from_str(CARD).unwrap();
        let yaml = serde_yaml::to_string(&task).unwrap();
        assert_eq!(serde_yaml::from_str::<CustomTask>(&yaml).unwrap(), task);
    }

    #[test]
    fn words_collect_in_alphabetical_order_and_a_single_text_needs_no_list() {
        let rows = "{\"t\": \"x\", \"y\": \"pear\"}\n{\"t\": \"x\", \"y\": \"apple\"}\n";
        let card = "name: fruit\ntrain: t.jsonl\ntext: t\nlabel: y\n";
        let folder = folder(&[("card.yaml", card), ("t.jsonl", rows)]);
        let card = TaskCard::load(&folder.path().join("card.yaml")).unwrap();
        assert_eq!(card.labels(), ["apple", "pear"]);
        assert!(!card.is_pair());
    }

    #[test]
    fn columns_without_a_header_go_by_number() {
        let card = "name: n\ntrain: t.tsv\nheader: false\ntext: [3, 4]\nlabel: 1\nobjective: regression\n";
        let folder = folder(&[("card.yaml", card), ("t.tsv", "-2.5\tx\ta\tb\n1\tx\tc\td\n")]);
        let card = TaskCard::load(&folder.path().join("card.yaml")).unwrap();
        assert_eq!(card.objective, Objective::Regression);
        assert_eq!(card.headline, Metric::Combined);
        let train = read_split(&card, &[], Split::Train).unwrap();
        assert_eq!((train.examples.len(), train.examples[0].label), (2, Some(Label::Score(-2.5))));
        assert_eq!(train.examples[1].second.as_deref(), Some("d"));
    }

    #[test]
    fn listed_labels_keep_their_order_and_others_are_refused() {
        let task: CustomTask =
            serde_yaml::from_str("{name: n, dev: f.csv, text: t, label: y, labels: [no, 1, true]}").unwrap();
        let folder = folder(&[("f.csv", "t,y\nx,true\nx,0\n")]);
        let card = task.into_card(folder.path()).unwrap();
        assert_eq!(card.labels(), ["no", "1", "true"]);
        let message = read_split(&card, &[], Split::Dev).unwrap_err().to_string();
        assert!(
            message.ends_with("f.csv:3: unknown label `0`; the labels of `n` are no, 1, true"),
            "{message}"
        );
    }

    #[test]
    fn quoting_can_be_switched_on_and_off() {
        let read = |quoting: &str, name: &str, content: &str| {
            let yaml = format!("{{name: n, text: t, label: y, labels: [a, b]{quoting}}}");
            let card = serde_yaml::from_str::<CustomTask>(&yaml).unwrap().into_card(Path::new("")).unwrap();
            let folder = folder(&[(name, content)]);
            read_file(&card, &folder.path().join(name)).unwrap().examples[0].first.clone()
        };
        assert_eq!(read(", quoting: true", "f.tsv", "t\ty\n\"x\"\ta\n"), "x");
        assert_eq!(read(", quoting: false", "f.csv", "t,y\n\"x\",a\n"), "\"x\"");
    }

    #[test]
    fn other_names_of_labels_and_rows_without_consensus_are_the_users_to_name() {
        let card = "name: n\ntrain: t-*.csv\ntext: t\nlabel: y\nspellings: {1: yes, SUPPORTS: yes}\n\
                    merges: {maybe: no}\ndrop_labels: '-'\n";
        let folder = folder(&[
            ("card.yaml", card),
            ("t-1.csv", "t,y\na,yes\nb,supports\nc,-\n"),
            ("t-2.csv", "t,y\nd,1\ne,no\n"),
        ]);
        let card = TaskCard::load(&folder.path().join("card.yaml"));
        assert_eq!(card.unwrap().labels(), ["no", "yes"]);
        let listed = "name: n\ntrain: t-*.csv\ntext: t\nlabel: y\nlabels: [no, yes]\n\
                      spellings: {1: yes, SUPPORTS: yes}\nmerges: {maybe: no}\ndrop_labels: '-'\n";
        std::fs::write(folder.path().join("listed.yaml"), listed).unwrap();
        let card = TaskCard::load(&folder.path().join("listed.yaml")).unwrap();
        assert_eq!(card.merges["maybe"], "no");
        let train = read_split(&card, &[], Split::Train).unwrap();
        let ids: Vec<_> = train.examples.iter().map(|example| example.label).collect();
        assert_eq!((ids, train.dropped), ([1, 1, 1, 0].map(|id| Some(Label::Class(id))).to_vec(), 1));
    }

    #[test]
    fn impossible_cards_are_refused_in_a_sentence() {
        let with = |line: &str| refusal(&format!("{CARD}{line}\n"));
        let three = CARD.replace("[claim, evidence]", "[claim, evidence, verdict]");
        let cases = [
            (refusal(&three), "`text` takes one or two columns, not 3"),
            (
                with("objective: regression\nheadline: f1"),
                "`f1` compares classes and does not fit a regression",
            ),
            (
                with("labels: [a, b, c]\nmetrics: [accuracy, f1]"),
                "`f1` is defined for two labels, the task has 3",
            ),
            (with("labels: [a, b]\nobjective: regression"), "exclude each other"),
            (refusal(&CARD.replace("label: verdict", "label: claim")), "column `claim` is named twice"),
            (with("labels: [a, '']"), "`labels` has an empty one"),
            (with("labels: [a, a]"), "the label `a` is listed twice"),
            (with("labels: [a, b, A]"), "the label `A` is listed twice"),
            (with("labels: [a, b]\nspellings: {c: d}"), "`c` for `d`, which is none of its labels"),
            (with("labels: [a, b]\ndrop_labels: [a]"), "`drop_labels` has `a`, which is a label"),
            (with("labels: [a, b]\ndrop_labels: [A]"), "`drop_labels` has `A`, which is a label"),
            (
                with("labels: [a, b]\nspellings: {B: a}"),
                "`spellings` takes `B` for `a`, but it is a label itself",
            ),
            (
                with("labels: [a, b]\nspellings: {C: a, c: b}"),
                "`spellings` takes `C` for `a` and `c` for `b`, but files differ in case: keep one of them",
            ),
            (
                with("labels: [a, b]\nspellings: {C: a}\nmerges: {c: a}"),
                "`c` is in `spellings` and in `merges`",
            ),
            (refusal(&CARD.replace("t.csv", "t-*.csv")), "there is no file of such a name"),
            (with("labels: [a]"), "at least two labels, not 1"),
            (with("headline: matthews"), "none of its metrics (accuracy)"),
            (with("header: false"), "a column is a number from 1, not `claim`"),
            (refusal(&CARD.replace("train: t.csv\n", "")), "name its `labels`, or a `train` file"),
            (refusal(&CARD.replace("label: verdict", "label: verdicts")), "has no label column"),
            (with("metrics: [acuracy]"), "did you mean `accuracy`?"),
            (with("lables: [a, b]"), "unknown field `lables`"),
            (with("lables: [a, b]"), "did you mean `labels`?"),
            (with("text: []"), "text"),
            (refusal(&CARD.replace("name: claims", "name: 'a>b'")), "must not have `,` or `>`"),
        ];
        for (message, expected) in cases {
            assert!(message.contains(expected), "{expected}: {message}");
        }
        assert!(with("lables: [a, b]").contains("card.yaml:6:1: "), "{}", with("lables: [a, b]"));
    }

    #[test]
    fn joined_files_with_a_second_header_are_refused() {
        let card = "name: n\ntrain: t.csv\ntext: t\nlabel: y\n";
        let folder = folder(&[("card.yaml", card), ("t.csv", "t,y\na,yes\nt,y\nt,no\n")]);
        let card = TaskCard::load(&folder.path().join("card.yaml")).unwrap();
        let message = read_split(&card, &[], Split::Train).unwrap_err().to_string();
        assert!(message.contains("t.csv:3: has the names of the columns once more"), "{message}");
    }

    #[test]
    fn labels_that_look_like_scores_are_questioned() {
        let rows: String = (0..200).map(|row| format!("x,{}\n", f64::from(row) / 10.0)).collect();
        let card = "name: n\ntrain: t.csv\ntext: t\nlabel: y\n";
        let folder = folder(&[("card.yaml", card), ("t.csv", &format!("t,y\n{rows}"))]);
        let message = TaskCard::load(&folder.path().join("card.yaml")).unwrap_err().to_string();
        assert!(message.contains("200 different labels") && message.contains("regression"), "{message}");
    }
}
