//! Predictions and their scores.

use tch::{Kind, Tensor};

use crate::data::{
    Encoded, EncodedDataset, LabelMap, Metric, PackedBatch, Targets, TaskCard, score_classes, score_values,
};
use crate::error::Result;
use crate::libtorch::{elements, upload};
use crate::model::{Classifier, Pass, Precision};

/// Tokens that one forward pass takes at most when nothing is learnt (a single longer example still runs).
pub const TOKENS_PER_BATCH: usize = 8192;

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

/// A labelled data set to score on.
#[derive(Clone, Copy)]
pub struct Scored<'a> {
    /// The examples.
    pub data: &'a EncodedDataset,
    /// Their task: the metrics, and which of them is the headline.
    pub card: &'a TaskCard,
    /// How the model's classes compare with the task's.
    pub labels: &'a LabelMap,
}

/// Computes the logits of examples, `[examples, outputs]` in float32 on the CPU, in the order of the examples.
///
/// `each` is called after every batch with its number of examples, and ends the pass with an error if it returns one.
///
/// # Errors
/// Fails if libtorch refuses an operation or `each` asks to stop.
pub fn predict(
    classifier: &Classifier,
    data: &[Encoded],
    precision: Precision,
    each: impl FnMut(usize) -> Result<()>,
) -> Result<Tensor> {
    let logits = by_batches(classifier, data, precision, each, Classifier::logits)?;
    Ok(logits.f_to_device(tch::Device::Cpu)?)
}

/// Computes what a frozen encoder makes of examples, without dropout: `[examples, hidden]` in float32 on the model's
/// device. `each` is as for [`predict`].
///
/// # Errors
/// Fails if libtorch refuses an operation or `each` asks to stop.
pub fn frozen_features(
    classifier: &Classifier,
    data: &[Encoded],
    precision: Precision,
    each: impl FnMut(usize) -> Result<()>,
) -> Result<Tensor> {
    by_batches(classifier, data, precision, each, Classifier::features)
}

/// Runs all examples forward and collects one row an example on the model's device, in the order of the examples.
/// Nothing waits for the device in between.
fn by_batches(
    classifier: &Classifier,
    data: &[Encoded],
    precision: Precision,
    mut each: impl FnMut(usize) -> Result<()>,
    rows: impl for<'a> Fn(&'a Classifier, &Pass<'a>) -> Result<Tensor>,
) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let device = classifier.parameters.device();
    let _products = precision.matrix_products(device)?;
    let weights = classifier.parameters.compute_weights(precision.kind())?;
    // Examples of like length together, so that attention's rectangles have few holes; results do not depend on it.
    let mut order: Vec<usize> = (0..data.len()).collect();
    order.sort_by_key(|&number| std::cmp::Reverse(data[number].ids.len()));
    let mut parts = Vec::new();
    let mut rest = &order[..];
    while let Some(&longest) = rest.first() {
        let size = (TOKENS_PER_BATCH / data[longest].ids.len().max(1)).clamp(1, rest.len());
        let (now, later) = rest.split_at(size);
        rest = later;
        let inputs: Vec<_> = now.iter().map(|&number| &data[number]).collect();
        let batch = PackedBatch::pack(&inputs, 0, device)?;
        parts.push(rows(classifier, &Pass::new(&weights, &batch, None))?);
        each(now.len())?;
    }
    let mut places = vec![0; data.len()];
    order.iter().enumerate().for_each(|(place, &number)| places[number] = place as i64);
    let rows = Tensor::f_cat(&parts, 0)?;
    drop(parts);
    Ok(rows.f_index_select(0, &upload(&places, device)?)?)
}

/// Returns the number of the first example whose logits `[examples, outputs]` are not all finite.
///
/// # Errors
/// Fails if libtorch refuses an operation.
pub fn first_not_finite(logits: &Tensor) -> Result<Option<usize>> {
    let outputs = (logits.numel() / logits.size()[0].max(1) as usize).max(1);
    let place = elements::<f32>(logits)?.iter().position(|logit| !logit.is_finite());
    Ok(place.map(|place| place / outputs))
}

/// Scores a model on a labelled data set.
///
/// # Errors
/// Fails if libtorch refuses an operation or `each` asks to stop.
pub fn evaluate(
    classifier: &Classifier,
    Scored { data, card, labels }: Scored,
    precision: Precision,
    each: impl FnMut(usize) -> Result<()>,
) -> Result<Evaluation> {
    let logits = match &data.features {
        None => predict(classifier, &data.inputs, precision, each)?,
        Some(_) => head_logits(classifier, data)?,
    };
    let (scores, degenerate, loss) = match &data.targets {
        Targets::Classes(ids) => {
            let predicted: Vec<usize> =
                classes(&logits)?.into_iter().map(|class| labels.predicted(class)).collect();
            let actual: Vec<usize> = ids.iter().map(|&id| labels.actual(id as usize)).collect();
            let scores = score_classes(labels.classes(), &predicted, &actual, &card.metrics);
            let degenerate = predicted.windows(2).all(|pair| pair[0] == pair[1]);
            (scores, degenerate, class_loss(&logits, &actual, labels)?)
        }
        Targets::Scores(scores) => {
            let predicted: Vec<f64> =
                elements::<f32>(&logits)?.iter().map(|&value| f64::from(value)).collect();
            let actual: Vec<f64> = scores.iter().map(|&score| f64::from(score)).collect();
            let scores = score_values(&predicted, &actual, &card.metrics);
            let squares = predicted.iter().zip(&actual).map(|(found, gold)| (found - gold).powi(2));
            (scores, nearly_constant(&predicted), squares.sum::<f64>() / actual.len() as f64)
        }
    };
    let headline =
        scores.iter().find(|(metric, _)| *metric == card.headline).map_or(f64::NAN, |(_, score)| *score);
    Ok(Evaluation { scores, headline, loss, degenerate })
}

/// Applies the head alone, to features that a frozen encoder gave.
fn head_logits(classifier: &Classifier, data: &EncodedDataset) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let device = classifier.parameters.device();
    let _products = Precision::Float32.matrix_products(device)?;
    let weights = classifier.parameters.compute_weights(Kind::Float)?;
    let everything: Vec<usize> = (0..data.len()).collect();
    let (batch, _) = data.batch(&everything, 0, device)?;
    Ok(classifier.logits(&Pass::new(&weights, &batch, None))?.f_to_device(tch::Device::Cpu)?)
}

/// The mean of −log p(gold class), where classes that count as one share their probabilities.
fn class_loss(logits: &Tensor, actual: &[usize], labels: &LabelMap) -> Result<f64> {
    let outputs = logits.size()[1] as usize;
    let logits: &[f32] = elements(logits)?;
    let loss = |(row, &gold): (&[f32], &usize)| {
        let all = row.iter().map(|&logit| f64::from(logit));
        let right = all.clone().enumerate().filter(|&(class, _)| labels.predicted(class) == gold);
        log_sum_of_exponentials(all) - log_sum_of_exponentials(right.map(|(_, logit)| logit))
    };
    Ok(logits.chunks(outputs).zip(actual).map(loss).sum::<f64>() / actual.len() as f64)
}

/// Returns log Σ exp(x), finite where the numbers are, however far apart, and the same in whichever order they come.
fn log_sum_of_exponentials(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_unstable_by(f64::total_cmp);
    let largest = numbers.last().copied().unwrap_or(f64::NEG_INFINITY);
    largest + numbers.into_iter().map(|number| (number - largest).exp()).sum::<f64>().ln()
}

/// Returns the class with the highest logit of each example; among equals the first.
///
/// # Errors
/// Fails if libtorch refuses an operation.
pub fn classes(logits: &Tensor) -> Result<Vec<usize>> {
    let ids = Vec::<i64>::try_from(&logits.f_argmax(1, false)?)?;
    Ok(ids.into_iter().map(|id| id as usize).collect())
}

/// Whether the predictions differ by less than a thousandth of a point: no ranking can be read from them.
fn nearly_constant(predicted: &[f64]) -> bool {
    let (low, high) = predicted
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &value| (low.min(value), high.max(value)));
    high - low <= 1e-3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loss_is_cross_entropy_and_adds_up_classes_that_count_as_one() {
        let logits = Tensor::from_slice(&[1.0f32, -0.5, 2.0, 0.25, 0.0, -3.0]).view([2, 3]);
        let identity = LabelMap::identity(3);
        let expected = logits.cross_entropy_for_logits(&Tensor::from_slice(&[2i64, 0]));
        let loss = class_loss(&logits, &[2, 0], &identity).unwrap();
        assert!((loss - f64::try_from(expected).unwrap()).abs() < 1e-6);

        let card = |name| TaskCard::builtin(name).unwrap();
        let merged = LabelMap::between(&card("snli"), &card("scitail")).unwrap();
        let neutral = |row: [f64; 3]| {
            let sum: f64 = row.iter().map(|logit| logit.exp()).sum();
            -((row[1].exp() + row[2].exp()) / sum).ln()
        };
        let expected = (neutral([1.0, -0.5, 2.0]) + neutral([0.25, 0.0, -3.0])) / 2.0;
        assert!((class_loss(&logits, &[1, 1], &merged).unwrap() - expected).abs() < 1e-6);
        assert!(class_loss(&(logits * f64::NAN), &[1, 1], &merged).unwrap().is_nan());
        // Wholly sure, and wrong.
        let sure = Tensor::from_slice(&[1500.0f32, -1500.0, -2000.0]).view([1, 3]);
        assert_eq!(class_loss(&sure, &[1], &merged).unwrap(), 3000.0);
    }
}
