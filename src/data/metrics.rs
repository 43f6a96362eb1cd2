//! The scores of a task, with the values of scikit-learn and scipy.
//!
//! Every metric is one line of [`REGISTRY`]. Accuracy, F1 and the Matthews correlation follow
//! `sklearn.metrics.accuracy_score`, `f1_score` and `matthews_corrcoef`; Pearson and Spearman
//! follow `scipy.stats.pearsonr` and `spearmanr`; [`Metric::Combined`] is GLUE's `combined_score`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::spelling::suggestion;

/// A score that compares predictions with gold labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Metric {
    /// Share of examples whose class is right.
    Accuracy,
    /// Binary F1; the positive class is id 1.
    F1,
    /// Matthews correlation, for any number of classes.
    Matthews,
    /// Pearson correlation of scores.
    Pearson,
    /// Spearman rank correlation of scores; ties share their average rank.
    Spearman,
    /// Plain mean of the task's other metrics, GLUE's `combined_score`.
    Combined,
}

/// How a metric's value comes about, which also says what objective it fits.
#[derive(Clone, Copy)]
enum Formula {
    Classes(fn(&Confusion) -> f64),
    Values(fn(&[f64], &[f64]) -> f64),
    MeanOfOthers,
}

struct Entry {
    metric: Metric,
    name: &'static str,
    formula: Formula,
    /// What the reference gives where the formula would divide zero by zero.
    degenerate: Option<f64>,
}

/// All metrics; of each, the larger value is the better one.
const REGISTRY: [Entry; 6] = [
    entry(Metric::Accuracy, "accuracy", Formula::Classes(accuracy), None),
    entry(Metric::F1, "f1", Formula::Classes(f1), Some(0.0)),
    entry(Metric::Matthews, "matthews", Formula::Classes(matthews), Some(0.0)),
    entry(Metric::Pearson, "pearson", Formula::Values(pearson), Some(f64::NAN)),
    entry(Metric::Spearman, "spearman", Formula::Values(spearman), Some(f64::NAN)),
    entry(Metric::Combined, "combined", Formula::MeanOfOthers, None),
];

const fn entry(metric: Metric, name: &'static str, formula: Formula, degenerate: Option<f64>) -> Entry {
    Entry { metric, name, formula, degenerate }
}

impl Metric {
    /// Iterates over every metric there is.
    pub fn all() -> impl Iterator<Item = Metric> {
        REGISTRY.iter().map(|entry| entry.metric)
    }

    /// Returns the name used in YAML, on the command line and as a CSV column.
    pub fn name(self) -> &'static str {
        self.entry().name
    }

    /// Says whether the metric compares classes.
    pub fn fits_classes(self) -> bool {
        !matches!(self.entry().formula, Formula::Values(_))
    }

    /// Says whether the metric compares scores.
    pub fn fits_values(self) -> bool {
        !matches!(self.entry().formula, Formula::Classes(_))
    }

    /// Returns the value that stands in where the formula divides zero by zero, such as when a
    /// model predicts one class or one score only: scikit-learn's 0, scipy's NaN; `None` for a
    /// metric that has no such case of its own.
    pub fn degenerate_value(self) -> Option<f64> {
        self.entry().degenerate
    }

    fn entry(self) -> &'static Entry {
        // The registry lists the variants in declaration order; a test holds it to that.
        &REGISTRY[self as usize]
    }

    /// Divides, with the degenerate value in place of zero by zero.
    fn ratio(self, numerator: f64, denominator: f64) -> f64 {
        match self.degenerate_value() {
            Some(value) if denominator == 0.0 => value,
            _ => numerator / denominator,
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(self.name())
    }
}

impl FromStr for Metric {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(entry) = REGISTRY.iter().find(|entry| entry.name == text) {
            return Ok(entry.metric);
        }
        let names = REGISTRY.map(|entry| entry.name);
        let (hint, known) = (suggestion(text, names), names.join(", "));
        Err(Error::configuration(format!("unknown metric `{text}`{hint}; known metrics: {known}")))
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Metric {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map_err(serde::de::Error::custom)
    }
}

/// Scores predicted classes against gold ones, in the order of `metrics`.
///
/// A class is an id below `label_count`. Without examples every value is NaN, and so is the
/// value of a metric that compares scores, not classes.
///
/// # Panics
///
/// If the two slices differ in length or hold an id that is not below `label_count`.
pub fn score_classes(
    label_count: usize,
    predicted: &[usize],
    actual: &[usize],
    metrics: &[Metric],
) -> Vec<(Metric, f64)> {
    let confusion = Confusion::new(label_count, predicted, actual);
    with_means(metrics, |formula| match formula {
        Formula::Classes(score) if confusion.examples > 0.0 => score(&confusion),
        _ => f64::NAN,
    })
}

/// Scores predicted values against gold ones, in the order of `metrics`.
///
/// A correlation needs at least two examples and some variation on both sides and is NaN
/// otherwise, as in scipy; so is a metric that compares classes, not values.
///
/// # Panics
///
/// If the two slices differ in length.
pub fn score_values(predicted: &[f64], actual: &[f64], metrics: &[Metric]) -> Vec<(Metric, f64)> {
    assert_eq!(predicted.len(), actual.len(), "one prediction for each example");
    with_means(metrics, |formula| match formula {
        Formula::Values(score) => score(predicted, actual),
        _ => f64::NAN,
    })
}

/// Computes each metric by itself, then the means over the others.
fn with_means(metrics: &[Metric], compute: impl Fn(Formula) -> f64) -> Vec<(Metric, f64)> {
    let is_mean = |metric: Metric| matches!(metric.entry().formula, Formula::MeanOfOthers);
    let mut scores: Vec<_> =
        metrics.iter().map(|&metric| (metric, compute(metric.entry().formula))).collect();
    let others: Vec<f64> =
        scores.iter().filter(|(metric, _)| !is_mean(*metric)).map(|(_, value)| *value).collect();
    let mean = others.iter().sum::<f64>() / others.len() as f64;
    for (metric, value) in &mut scores {
        if is_mean(*metric) {
            *value = mean;
        }
    }
    scores
}

/// Counts of (gold class, predicted class), kept as floats because every formula divides them;
/// they are exact up to 2^53 examples.
struct Confusion {
    /// `counts[gold][predicted]`.
    counts: Vec<Vec<f64>>,
    examples: f64,
}

impl Confusion {
    fn new(label_count: usize, predicted: &[usize], actual: &[usize]) -> Self {
        assert_eq!(predicted.len(), actual.len(), "one prediction for each example");
        let mut counts = vec![vec![0.0; label_count]; label_count];
        for (&predicted, &actual) in predicted.iter().zip(actual) {
            counts[actual][predicted] += 1.0;
        }
        Confusion { counts, examples: actual.len() as f64 }
    }

    fn correct(&self) -> f64 {
        self.counts.iter().enumerate().map(|(class, row)| row[class]).sum()
    }

    fn actual(&self, class: usize) -> f64 {
        self.counts[class].iter().sum()
    }

    fn predicted(&self, class: usize) -> f64 {
        self.counts.iter().map(|row| row[class]).sum()
    }
}

fn accuracy(confusion: &Confusion) -> f64 {
    Metric::Accuracy.ratio(confusion.correct(), confusion.examples)
}

fn f1(confusion: &Confusion) -> f64 {
    if confusion.counts.len() < 2 {
        return f64::NAN;
    }
    let positives = confusion.actual(1) + confusion.predicted(1);
    Metric::F1.ratio(2.0 * confusion.counts[1][1], positives)
}

/// The K-category correlation R_K of Gorodkin (2004); with two classes the usual formula.
fn matthews(confusion: &Confusion) -> f64 {
    let examples = confusion.examples;
    let mut joint = confusion.correct() * examples;
    let mut predicted_spread = examples * examples;
    let mut actual_spread = examples * examples;
    for class in 0..confusion.counts.len() {
        let (actual, predicted) = (confusion.actual(class), confusion.predicted(class));
        joint -= actual * predicted;
        predicted_spread -= predicted * predicted;
        actual_spread -= actual * actual;
    }
    Metric::Matthews.ratio(joint, (predicted_spread * actual_spread).sqrt())
}

fn pearson(predicted: &[f64], actual: &[f64]) -> f64 {
    if predicted.len() < 2 || is_constant(predicted) || is_constant(actual) {
        return f64::NAN;
    }
    let (predicted, actual) = (normalised_deviations(predicted), normalised_deviations(actual));
    let correlation: f64 = predicted.iter().zip(&actual).map(|(x, y)| x * y).sum();
    correlation.clamp(-1.0, 1.0)
}

fn spearman(predicted: &[f64], actual: &[f64]) -> f64 {
    if predicted.iter().chain(actual).any(|value| value.is_nan()) {
        return f64::NAN;
    }
    pearson(&ranks(predicted), &ranks(actual))
}

fn is_constant(values: &[f64]) -> bool {
    values.windows(2).all(|pair| pair[0] == pair[1])
}

/// Deviations from the mean, scaled to unit length.
fn normalised_deviations(values: &[f64]) -> Vec<f64> {
    // Scores may sit far from zero: measured from the first of them, the sum stays exact enough.
    let origin = values[0];
    let mean = origin + values.iter().map(|value| value - origin).sum::<f64>() / values.len() as f64;
    let deviations: Vec<f64> = values.iter().map(|value| value - mean).collect();
    // Dividing by the largest deviation first keeps the squares from overflowing or vanishing.
    let largest = deviations.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    let squares: f64 = deviations.iter().map(|value| (value / largest).powi(2)).sum();
    let length = largest * squares.sqrt();
    deviations.iter().map(|value| value / length).collect()
}

/// Ranks from 1; equal values share the average of the ranks they span.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for tied in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let rank = before as f64 + (tied.len() + 1) as f64 / 2.0;
        for &index in tied {
            ranks[index] = rank;
        }
        before += tied.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// Values by scikit-learn and scipy; `scripts/make_metric_fixtures.py` writes them.
    const FIXTURES: &str = include_str!("../../tests/fixtures/metrics.json");

    fn numbers(value: &Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    }

    fn classes(value: &Value) -> Vec<usize> {
        value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as usize).collect()
    }

    /// Checks every metric that a fixture case names; JSON has no NaN, so null stands for it.
    fn check(case: &Value, score: impl Fn(&[Metric]) -> Vec<(Metric, f64)>) {
        for (name, expected) in case["expected"].as_object().unwrap() {
            let metric: Metric = name.parse().unwrap();
            let found = score(&[metric])[0].1;
            match expected.as_f64() {
                Some(value) => {
                    assert!((found - value).abs() <= 1e-12, "{}: {name} {found} {value}", case["name"])
                }
                None => assert!(found.is_nan(), "{}: {name} {found}", case["name"]),
            }
        }
    }

    #[test]
    fn values_agree_with_scikit_learn_and_scipy() {
        let fixtures: Value = serde_json::from_str(FIXTURES).unwrap();
        let class_cases = fixtures["classes"].as_array().unwrap();
        let value_cases = fixtures["values"].as_array().unwrap();
        assert!(class_cases.len() >= 10 && value_cases.len() >= 10);
        for case in class_cases {
            let label_count = case["label_count"].as_u64().unwrap() as usize;
            let (predicted, actual) = (classes(&case["predicted"]), classes(&case["actual"]));
            check(case, |metrics| score_classes(label_count, &predicted, &actual, metrics));
        }
        for case in value_cases {
            let (predicted, actual) = (numbers(&case["predicted"]), numbers(&case["actual"]));
            check(case, |metrics| score_values(&predicted, &actual, metrics));
        }
    }

    #[test]
    fn registry_is_in_declaration_order_and_names_read_back() {
        for (position, metric) in Metric::all().enumerate() {
            assert_eq!(metric as usize, position);
            assert_eq!(metric.name().parse::<Metric>().unwrap(), metric);
        }
    }

    #[test]
    fn combined_is_the_mean_of_the_other_metrics_wherever_it_stands() {
        let metrics = [Metric::Combined, Metric::Accuracy, Metric::F1];
        let scores = score_classes(2, &[1, 1, 0, 0], &[1, 0, 0, 0], &metrics);
        assert_eq!(scores[1], (Metric::Accuracy, 0.75));
        assert_eq!(scores[2].1, 2.0 / 3.0);
        assert_eq!(scores[0].1, (0.75 + 2.0 / 3.0) / 2.0);
        assert!(score_classes(2, &[0], &[0], &[Metric::Combined])[0].1.is_nan());
    }

    #[test]
    fn a_metric_of_the_other_kind_and_no_examples_are_nan() {
        assert!(score_classes(2, &[0], &[0], &[Metric::Pearson])[0].1.is_nan());
        assert!(score_values(&[0.0], &[0.0], &[Metric::F1])[0].1.is_nan());
        assert!(score_classes(2, &[], &[], &[Metric::Accuracy])[0].1.is_nan());
    }

    #[test]
    fn a_misspelt_metric_is_told_the_nearest_name() {
        let message = "mathews".parse::<Metric>().unwrap_err().to_string();
        assert!(message.contains("did you mean `matthews`?"), "{message}");
        let message = "perplexity".parse::<Metric>().unwrap_err().to_string();
        assert!(!message.contains("did you mean") && message.contains("known metrics"), "{message}");
    }

    proptest! {
        #[test]
        fn correlations_ignore_scale_and_offset(
            pairs in prop::collection::vec((0.0..5.0f64, 0.0..5.0f64), 3..40),
            scale in 0.1..10.0f64,
            offset in -1e3..1e3f64,
        ) {
            let (predicted, actual): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            let moved: Vec<f64> = predicted.iter().map(|value| value * scale + offset).collect();
            let before = score_values(&predicted, &actual, &[Metric::Pearson])[0].1;
            let after = score_values(&moved, &actual, &[Metric::Pearson])[0].1;
            prop_assert!((before - after).abs() < 1e-7, "{before} {after}");
            prop_assert!((-1.0..=1.0).contains(&before));
        }

        #[test]
        fn two_class_matthews_changes_sign_when_predictions_are_swapped(
            pairs in prop::collection::vec((0..2usize, 0..2usize), 1..60),
        ) {
            let (predicted, actual): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            let swapped: Vec<usize> = predicted.iter().map(|class| 1 - class).collect();
            let score = |predicted: &[usize]| score_classes(2, predicted, &actual, &[Metric::Matthews])[0].1;
            prop_assert!((score(&predicted) + score(&swapped)).abs() < 1e-12);
        }
    }
}
