//! Predictions and their scores.

use tch::{IndexOp, Kind, Tensor};

use super::hyperparameters::Precision;
use crate::data::{EncodedDataset, Metric, PackedBatch, Targets, TaskCard, score_classes, score_values};
use crate::error::Result;
use crate::libtorch::elements;
use crate::model::{Classifier, Labels, Pass, loss};

/// Tokens that one forward pass takes at most (a single longer example still runs).
const TOKENS_PER_BATCH: usize = 8192;

/// The scores of a model on one data set.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The metrics of the task.
    pub scores: Vec<(Metric, f64)>,
    /// The headline metric.
    pub headline: f64,
    /// Mean loss.
    pub loss: f64,
    /// Whether the same class (or practically the same score) was predicted for every example.
    pub degenerate: bool,
}

/// Computes the logits of examples, `[examples, outputs]` in float32 on the CPU, in the order of the examples.
///
/// `each` is called after every batch with its number of examples, and ends the pass with an error if it returns one.
///
/// # Errors
/// Fails if libtorch refuses an operation or `each` asks to stop.
pub fn predict(
    classifier: &Classifier,
    data: &[crate::data::Encoded],
    precision: Precision,
    mut each: impl FnMut(usize) -> Result<()>,
) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let weights = classifier.parameters.compute_weights(precision.kind())?;
    let device = classifier.parameters.device();
    // Examples of like length together, so that attention's rectangles have few holes; results do not depend on it.
    let mut order: Vec<usize> = (0..data.len()).collect();
    order.sort_by_key(|&number| std::cmp::Reverse(data[number].ids.len()));
    let logits =
        Tensor::f_zeros([data.len() as i64, classifier.labels().outputs()], (Kind::Float, tch::Device::Cpu))?;
    let mut rest = &order[..];
    while let Some(&longest) = rest.first() {
        let size = (TOKENS_PER_BATCH / data[longest].ids.len().max(1)).clamp(1, rest.len());
        let (now, later) = rest.split_at(size);
        rest = later;
        let inputs: Vec<_> = now.iter().map(|&number| &data[number]).collect();
        let batch = PackedBatch::pack(&inputs, 0, device)?;
        let outputs = classifier.logits(&Pass::new(&weights, &batch, None))?.f_to_device(tch::Device::Cpu)?;
        let rows = Tensor::from_slice(&now.iter().map(|&number| number as i64).collect::<Vec<_>>());
        let _ = logits.shallow_clone().f_index_copy_(0, &rows, &outputs)?;
        each(now.len())?;
    }
    Ok(logits)
}

/// Scores a model on a labelled data set.
///
/// # Errors
/// Fails if libtorch refuses an operation or `each` asks to stop.
pub fn evaluate(
    classifier: &Classifier,
    data: &EncodedDataset,
    card: &TaskCard,
    precision: Precision,
    each: impl FnMut(usize) -> Result<()>,
) -> Result<Evaluation> {
    let logits = predict(classifier, &data.inputs, precision, each)?;
    let (scores, degenerate, targets) = match (&data.targets, classifier.labels()) {
        (Targets::Classes(ids), Labels::Classes(_)) => {
            let predicted = classes(&logits)?;
            let actual: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
            let scores = score_classes(card.label_count(), &predicted, &actual, &card.metrics);
            (scores, predicted.windows(2).all(|pair| pair[0] == pair[1]), Tensor::from_slice(ids))
        }
        (targets, _) => {
            let predicted: Vec<f64> =
                elements::<f32>(&logits)?.iter().map(|&value| f64::from(value)).collect();
            let actual: Vec<f64> = match targets {
                Targets::Scores(scores) => scores.iter().map(|&score| f64::from(score)).collect(),
                Targets::Classes(ids) => ids.iter().map(|&id| id as f64).collect(),
            };
            let scores = score_values(&predicted, &actual, &card.metrics);
            let targets = Tensor::from_slice(&actual).f_to_kind(Kind::Float)?;
            (scores, nearly_constant(&predicted), targets)
        }
    };
    let loss = f64::try_from(loss(&logits, &targets, data.len())?)?;
    let headline =
        scores.iter().find(|(metric, _)| *metric == card.headline).map_or(f64::NAN, |(_, score)| *score);
    Ok(Evaluation { scores, headline, loss, degenerate })
}

/// Returns the class with the highest logit of each example; among equals the first.
///
/// # Errors
/// Fails if libtorch refuses an operation.
pub fn classes(logits: &Tensor) -> Result<Vec<usize>> {
    let ids = logits.f_argmax(1, false)?;
    Ok((0..ids.size()[0]).map(|row| ids.i(row).int64_value(&[]) as usize).collect())
}

/// Whether the predictions differ by less than a thousandth of a point: no ranking can be read from them.
fn nearly_constant(predicted: &[f64]) -> bool {
    let (low, high) = predicted
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &value| (low.min(value), high.max(value)));
    high - low <= 1e-3
}
