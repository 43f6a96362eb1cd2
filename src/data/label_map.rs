//! From the labels that a model knows to those of the task it is scored on.
//!
//! Labels are matched by name, not by id: models and data sets number the same labels in different orders. Where one side
//! has fewer labels, as SciTail has no contradiction, the cards' `merges` say which of them count as one.

use super::label::same_label;
use super::metrics::Metric;
use super::task::{Objective, TaskCard};
use crate::error::{Error, Result};

/// How the classes that a model predicts compare with the classes of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelMap {
    /// For each class of the model, the class it counts as.
    predicted: Vec<usize>,
    /// For each class of the data set, the class it counts as.
    actual: Vec<usize>,
    /// Number of classes that are compared.
    classes: usize,
}

impl LabelMap {
    /// Returns the map of a model that has the task's own labels.
    pub fn identity(classes: usize) -> Self {
        Self { predicted: (0..classes).collect(), actual: (0..classes).collect(), classes }
    }

    /// Returns whether each class counts as itself.
    pub fn is_identity(&self) -> bool {
        *self == Self::identity(self.classes)
    }

    /// Returns the map for a model with the labels of `trained` on the data of `scored`; with regressions on both sides,
    /// the empty map.
    ///
    /// The model's labels become the data's where each has a counterpart there and none of the data's is left out;
    /// otherwise the data's become the model's.
    ///
    /// # Errors
    /// Fails, naming the label, if neither side can be expressed in the labels of the other.
    pub fn between(trained: &TaskCard, scored: &TaskCard) -> Result<Self> {
        let fault = |message: String| {
            Error::configuration(format!(
                "a model of task `{}` cannot be scored on `{}`: {message}",
                trained.name, scored.name
            ))
        };
        let (model, data) = match (&trained.objective, &scored.objective) {
            (Objective::Regression, Objective::Regression) => return Ok(Self::identity(0)),
            (Objective::Classification { labels: model }, Objective::Classification { labels: data }) => {
                (model, data)
            }
            _ => return Err(fault("one predicts classes, the other a score".into())),
        };
        let problem = match Self::to_labels_of(model, scored) {
            Ok(map) => return Ok(map),
            Err(problem) => problem,
        };
        let Ok(actual) = counterparts(data, trained) else {
            return Err(fault(format!(
                "{problem}; say what counts as what under `merges:` of a card of your own"
            )));
        };
        if scored.metrics.contains(&Metric::F1) {
            return Err(fault(format!("`f1` needs the labels {}, and the model has fewer", data.join(", "))));
        }
        Ok(Self { predicted: (0..model.len()).collect(), actual, classes: model.len() })
    }

    /// Returns the map for a model with the given labels, in id order, where each has a counterpart in the data's and none
    /// of the data's is left out.
    ///
    /// # Errors
    /// Says what has no counterpart.
    pub fn to_labels_of(model: &[String], scored: &TaskCard) -> Result<Self, String> {
        let data = scored.labels();
        let predicted = counterparts(model, scored)
            .map_err(|label| format!("its label `{label}` is none of {}", data.join(", ")))?;
        match (0..data.len()).find(|class| !predicted.contains(class)) {
            Some(class) => Err(format!("it has no label for `{}`", data[class])),
            None => Ok(Self { predicted, actual: (0..data.len()).collect(), classes: data.len() }),
        }
    }

    /// Returns the number of classes that are compared.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Returns what a class of the model counts as.
    pub fn predicted(&self, class: usize) -> usize {
        self.predicted[class]
    }

    /// Returns what a class of the data counts as.
    pub fn actual(&self, class: usize) -> usize {
        self.actual[class]
    }
}

/// Finds for each label the class of a card that it stands for; the first label that has none is the error.
fn counterparts(labels: &[String], card: &TaskCard) -> Result<Vec<usize>, String> {
    labels.iter().map(|label| counterpart(label, card).ok_or_else(|| label.clone())).collect()
}

fn counterpart(label: &str, card: &TaskCard) -> Option<usize> {
    let own = |label: &str| card.labels().iter().position(|name| same_label(name, label));
    let stands_for =
        |(other, name): (&String, &String)| same_label(other, label).then(|| own(name)).flatten();
    own(label).or_else(|| card.spellings.iter().chain(&card.merges).find_map(stands_for))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(name: &str, labels: &[&str], further: &str) -> TaskCard {
        let yaml = format!("{{name: {name}, text: t, label: y, labels: {labels:?}{further}}}");
        let task: crate::data::CustomTask = serde_yaml::from_str(&yaml).unwrap();
        let mut card = task.into_card(std::path::Path::new("")).unwrap();
        if labels.len() == 2 && labels.contains(&"entails") {
            card.spellings.insert("entailment".into(), "entails".into());
            card.merges.insert("contradiction".into(), "neutral".into());
        }
        card
    }

    fn nli() -> TaskCard {
        card("snli", &["entailment", "neutral", "contradiction"], "")
    }

    #[test]
    fn a_permuted_model_is_mapped_by_name_in_any_case() {
        let labels = ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"].map(str::to_owned);
        let map = LabelMap::to_labels_of(&labels, &nli()).unwrap();
        assert_eq!([0, 1, 2].map(|class| map.predicted(class)), [2, 1, 0]);
        assert_eq!([0, 1, 2].map(|class| map.actual(class)), [0, 1, 2]);
        assert_eq!(LabelMap::between(&nli(), &nli()).unwrap(), LabelMap::identity(3));
    }

    #[test]
    fn labels_that_a_task_lacks_are_merged_on_the_side_that_has_them() {
        let scitail = card("scitail", &["entails", "neutral"], "");
        let map = LabelMap::between(&nli(), &scitail).unwrap();
        assert_eq!(([0, 1, 2].map(|class| map.predicted(class)), map.classes()), ([0, 1, 1], 2));
        let map = LabelMap::between(&scitail, &nli()).unwrap();
        assert_eq!(([0, 1, 2].map(|class| map.actual(class)), map.classes()), ([0, 1, 1], 2));
        assert_eq!([0, 1].map(|class| map.predicted(class)), [0, 1]);
    }

    #[test]
    fn what_has_no_counterpart_is_refused_by_name() {
        let topic = card("topic", &["sports", "politics"], "");
        let message = LabelMap::between(&topic, &nli()).unwrap_err().to_string();
        assert!(
            message.contains("its label `sports` is none of entailment, neutral, contradiction"),
            "{message}"
        );
        let part = card("part", &["entailment", "neutral"], "");
        let message = LabelMap::between(&part, &nli()).unwrap_err().to_string();
        assert!(message.contains("it has no label for `contradiction`"), "{message}");
        let merged =
            card("merged", &["yes", "no"], ", merges: {a: yes, b: no, c: no}, metrics: [accuracy, f1]");
        let three = card("three", &["a", "b", "c"], "");
        assert!(LabelMap::between(&three, &merged).is_ok());
        let whole = card("whole", &["yes", "no"], ", metrics: [accuracy, f1]");
        let one = card("one", &["yes", "other"], ", merges: {no: other}");
        let message = LabelMap::between(&one, &whole).unwrap_err().to_string();
        assert!(message.contains("`f1` needs the labels yes, no"), "{message}");
        let score = TaskCard { objective: Objective::Regression, ..nli() };
        let message = LabelMap::between(&score, &nli()).unwrap_err().to_string();
        assert!(message.contains("one predicts classes, the other a score"), "{message}");
    }
}
