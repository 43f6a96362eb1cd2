//! Fisher information, masks and a training step against plain loops and the released optimizer.

use std::sync::atomic::AtomicBool;

use child_tuning::child::{
    ChildNetwork, Cut, Estimator, FisherBatch, FisherInformation, FisherOptions, GradientHooks, MaskScope,
    Threshold, fisher_information,
};
use child_tuning::data::EncodedDataset;
use child_tuning::method::{MethodSpec, Preset};
use child_tuning::model::{Classifier, Labels, Pass, Precision, loss};
use child_tuning::random::{Key, Purpose, permutation};
use child_tuning::train::{AdamWForm, Control, Hyperparameters, prepare};
use tch::{Device, Kind, Tensor};

use crate::fixture::{assert_close, classifier, dataset, part, tensors};
use crate::optimizer::hyperparameters;
use crate::training::{child_bits, run};

const BATCH_SIZE: usize = 4;

fn information(
    classifier: &mut Classifier,
    data: &EncodedDataset,
    batch_size: usize,
    options: &FisherOptions,
) -> Tensor {
    let numbers: Vec<usize> = (0..data.len()).collect();
    information_of(classifier, data, &numbers, batch_size, options).values
}

fn information_of(
    classifier: &mut Classifier,
    data: &EncodedDataset,
    numbers: &[usize],
    batch_size: usize,
    options: &FisherOptions,
) -> FisherInformation {
    let batches = numbers.chunks(batch_size).map(|numbers| FisherBatch::plain(data, numbers, Device::Cpu));
    fisher_information(classifier, batches, options, MaskScope::All, |_| Ok(())).unwrap()
}

/// Key biases do not change a softmax: their information is zero, and what is found is the square of rounding errors.
fn assert_information(name: &str, found: &Tensor, expected: &Tensor) {
    if name.ends_with("key.bias") {
        assert!(found.max().double_value(&[]) < 1e-9 && expected.max().double_value(&[]) < 1e-9, "{name}");
    } else {
        assert_close(name, found, expected, 1e-5, false);
    }
}

const PER_EXAMPLE: FisherOptions = FisherOptions {
    estimator: Estimator::PerExample,
    precision: Precision::Float32,
    clip: None,
    spread: false,
};

#[test]
fn one_pass_per_example_information_equals_a_batch_of_one_loop() {
    for name in ["fisher", "fisher_regression"] {
        let reference = tensors(&format!("{name}/reference.safetensors"));
        let (data, mut classifier) = (dataset(&reference), classifier(name));
        for batch_size in [1, 4, 11] {
            let found = information(&mut classifier, &data, batch_size, &PER_EXAMPLE);
            for (_, parameter) in classifier.parameters.iter() {
                let expected = &reference[&format!("per_example/{}", parameter.name)];
                let found = part(&classifier.parameters, &found, &parameter.name);
                assert_information(&parameter.name, &found, expected);
            }
        }
    }
}

#[test]
fn batch_information_agrees_with_and_without_clipping() {
    let reference = tensors("fisher/reference.safetensors");
    let (data, mut classifier) = (dataset(&reference), classifier("fisher"));
    for (prefix, clip) in [("batch", None), ("official", Some(1.0))] {
        let options = FisherOptions { clip, ..FisherOptions::of(Estimator::Batch) };
        let found = information(&mut classifier, &data, BATCH_SIZE, &options);
        let mut compared = 0;
        for (_, parameter) in classifier.parameters.iter() {
            if let Some(expected) = reference.get(&format!("{prefix}/{}", parameter.name)) {
                let found = part(&classifier.parameters, &found, &parameter.name);
                assert_information(&parameter.name, &found, expected);
                compared += 1;
            }
        }
        assert!(compared >= 32, "{compared}");
    }
}

/// The slow way: a backward pass through plain autograd for each example and label, weighted by the label's probability; or
/// for each score, twice its square.
#[test]
fn the_expected_information_equals_a_loop_over_examples_and_labels() {
    for name in ["fisher", "fisher_regression"] {
        let reference = tensors(&format!("{name}/reference.safetensors"));
        let (data, mut classifier) = (dataset(&reference), classifier(name));
        let mut expected = classifier.parameters.values().zeros_like().to_kind(Kind::Double);
        for number in 0..data.len() {
            let (batch, _) = data.batch(&[number], 0, Device::Cpu).unwrap();
            let weights = classifier.parameters.compute_weights(Kind::Float).unwrap();
            let hooks = GradientHooks::collect(&classifier.parameters, &weights, |_| true, None).unwrap();
            let classes = match classifier.labels() {
                Labels::Classes(names) => names.len() as i64,
                Labels::Score => 1,
            };
            for label in 0..classes {
                hooks.begin_step();
                let logits = classifier.logits(&Pass::new(&weights, &batch, None)).unwrap();
                let weight = match classifier.labels() {
                    Labels::Classes(_) => {
                        let target = Tensor::from_slice(&[label]);
                        loss(&logits, &target, 1).unwrap().backward();
                        logits.softmax(-1, Kind::Double).double_value(&[0, label])
                    }
                    Labels::Score => {
                        logits.sum(Kind::Float).backward();
                        2.0
                    }
                };
                hooks.end_step().unwrap();
                let gradient = classifier.parameters.gradients().unwrap().to_kind(Kind::Double);
                expected += gradient.square() * (weight / data.len() as f64);
            }
        }
        let options = FisherOptions { spread: true, ..FisherOptions::of(Estimator::Expected) };
        let numbers: Vec<usize> = (0..data.len()).collect();
        for batch_size in [1, 4, 11] {
            let found = information_of(&mut classifier, &data, &numbers, batch_size, &options);
            for (_, parameter) in classifier.parameters.iter() {
                let expected = part(&classifier.parameters, &expected, &parameter.name);
                let found = part(&classifier.parameters, &found.values, &parameter.name);
                assert_information(&parameter.name, &found, &expected);
            }
            let totals = found.spread.unwrap().totals;
            let total = expected.sum(Kind::Double).double_value(&[]);
            assert!((totals.iter().sum::<f64>() / totals.len() as f64 / total - 1.0).abs() < 1e-5);
        }
    }
}

/// A weight's estimates from many draws of examples vary as their own standard errors say, and those of all weights
/// together as theirs.
#[test]
fn standard_errors_are_those_of_repeated_draws() {
    let reference = tensors("fisher/reference.safetensors");
    let (data, mut classifier) = (dataset(&reference), classifier("fisher"));
    let (drawn, draws, all) = (5, 400, data.len());
    for estimator in [Estimator::PerExample, Estimator::Expected] {
        let options = FisherOptions { spread: true, ..FisherOptions::of(estimator) };
        let whole = information(&mut classifier, &data, BATCH_SIZE, &options).to_kind(Kind::Double);
        let (mut squared_errors, mut variances) = (whole.zeros_like(), whole.zeros_like());
        let (mut squared_error_of_total, mut variance_of_total) = (0.0, 0.0);
        let total = whole.sum(Kind::Double).double_value(&[]);
        for draw in 0..draws {
            let mut numbers = permutation(all, Key::derive(7, Purpose::FisherExamples, draw));
            numbers.truncate(drawn);
            let found = information_of(&mut classifier, &data, &numbers, BATCH_SIZE, &options);
            let values = found.values.to_kind(Kind::Double);
            let spread = found.spread.unwrap();
            squared_errors += (&values - &whole).square();
            let errors = spread.standard_errors(&found.values, all).unwrap();
            variances += errors.to_kind(Kind::Double).square();
            squared_error_of_total += (values.sum(Kind::Double).double_value(&[]) - total).powi(2);
            let relative = spread.relative_standard_error(all);
            variance_of_total += (relative * values.sum(Kind::Double).double_value(&[])).powi(2);
        }
        // Of all weights together; each by itself has few digits after so many draws.
        let ratio = (squared_errors.sum(Kind::Double) / variances.sum(Kind::Double)).double_value(&[]);
        assert!((ratio - 1.0).abs() < 0.15, "{estimator:?}: {ratio}");
        let ratio = squared_error_of_total / variance_of_total;
        assert!((ratio - 1.0).abs() < 0.15, "{estimator:?}: {ratio}");
        // Weight by weight: the ratios lie around 1 within what 400 draws leave.
        let known = variances.gt(variances.max().double_value(&[]) * 1e-6);
        let ratios = (squared_errors / variances).masked_select(&known);
        let close = (ratios - 1.0).abs().lt(0.35).to_kind(Kind::Double).mean(Kind::Double);
        assert!(close.double_value(&[]) > 0.95, "{estimator:?}: {close}");
    }
}

#[test]
fn passes_in_bf16_agree_to_its_digits() {
    let reference = tensors("fisher/reference.safetensors");
    let (data, mut classifier) = (dataset(&reference), classifier("fisher"));
    for estimator in [Estimator::PerExample, Estimator::Batch, Estimator::Expected] {
        let exact = FisherOptions::of(estimator);
        let rough = FisherOptions { precision: Precision::Bf16, ..exact };
        let [exact, rough] =
            [exact, rough].map(|options| information(&mut classifier, &data, BATCH_SIZE, &options));
        let relative = ((&rough - &exact).norm() / exact.norm()).double_value(&[]);
        assert!(relative > 1e-5 && relative < 0.15, "{estimator:?}: {relative}");
    }
}

/// The draw is a pure function of the seed, and all of the examples are no draw.
#[test]
fn a_part_of_the_examples_is_drawn_by_the_seed() {
    let reference = tensors("fisher/reference.safetensors");
    let (data, mut classifier) = (dataset(&reference), classifier("fisher"));
    let mut child = |text: &str, seed: u64| {
        let spec: MethodSpec = serde_yaml::from_str(text).unwrap();
        let method = spec.resolve(Preset::Paper).unwrap().remove(0);
        let interrupted = AtomicBool::new(false);
        let mut control = Control { interrupted: &interrupted, report: &mut |_| {} };
        let settings = Hyperparameters { batch_size: BATCH_SIZE, ..hyperparameters() };
        let prepared = prepare(&mut classifier, &data, method.as_ref(), &settings, seed, &mut control);
        let prepared = prepared.unwrap();
        (prepared.mask.unwrap().child().unwrap().sha256(), prepared.fisher)
    };
    let few =
        |estimator: &str| format!("child_tuning_d: {{fisher: {{estimator: {estimator}, examples: 6}}}}");
    for estimator in ["per_example", "expected"] {
        let (mask, uncertainty) = child(&few(estimator), 1);
        assert_eq!((&mask, uncertainty), (&child(&few(estimator), 1).0, child(&few(estimator), 1).1));
        assert_ne!(mask, child(&few(estimator), 2).0);
        let uncertainty = uncertainty.unwrap();
        assert_eq!((uncertainty.examples, uncertainty.available), (6, 11));
        assert!((0.0..1.0).contains(&uncertainty.relative_standard_error), "{uncertainty:?}");
        assert!(uncertainty.undecided > 0.0 && uncertainty.undecided < 1.0, "{uncertainty:?}");
    }
    assert_ne!(child(&few("batch"), 1).0, child("child_tuning_d: {fisher: {estimator: batch}}", 1).0);
    assert!(child(&few("batch"), 1).1.is_none());
    let (mask, uncertainty) = child("child_tuning_d: {fisher: {examples: 100}}", 1);
    assert_eq!((mask, uncertainty), child("child_tuning_d", 1));
    assert!(uncertainty.is_none());
}

/// The slow way: gradients of one example at a time through plain autograd, a full sort, and a loop.
#[test]
fn the_mask_of_d_is_the_top_k_of_a_per_example_loop() {
    let reference = tensors("fisher/reference.safetensors");
    let (data, mut classifier) = (dataset(&reference), classifier("fisher"));
    let p = 0.3;
    let found = information(&mut classifier, &data, BATCH_SIZE, &PER_EXAMPLE);
    let child = ChildNetwork::from_scores(
        &classifier.parameters,
        &found,
        &Cut::highest(p, MaskScope::Backbone, Threshold::Global),
    )
    .unwrap();

    let mut scores = Vec::new();
    for tensor in child.tensors() {
        let slow =
            Vec::<f32>::try_from(reference[&format!("per_example/{}", tensor.name)].reshape([-1])).unwrap();
        scores.extend(slow);
    }
    let mut ranked: Vec<usize> = (0..scores.len()).collect();
    ranked.sort_by(|&left, &right| scores[right].total_cmp(&scores[left]));
    let count = (p * scores.len() as f64).round() as usize;
    assert_eq!(child.kept(), count);
    let cut = scores[ranked[count - 1]];
    let mut position = 0;
    for tensor in child.tensors() {
        for bit in child.bits(tensor) {
            // Scores within rounding of the cut may fall on either side of it.
            if (scores[position] - cut).abs() > 1e-4 * cut {
                assert_eq!(bit, scores[position] > cut, "{} at {position}", tensor.name);
            }
            position += 1;
        }
    }
}

#[test]
fn the_official_preset_makes_the_released_mask_and_step() {
    let reference = tensors("fisher/reference.safetensors");
    let data = dataset(&reference);
    let spec: MethodSpec =
        serde_yaml::from_str("child_tuning_d: {p: 0.3, fisher: {dropout: false}}").unwrap();
    let method = spec.resolve(Preset::Official).unwrap().remove(0);
    // A third of an epoch of three steps: the first batch only.
    let settings = Hyperparameters { epochs: 1.0 / 3.0, adamw: AdamWForm::HfLegacy, ..hyperparameters() };
    let mut classifier = classifier("fisher");
    let trained = run(&mut classifier, &data, method.as_ref(), &settings, 42);
    assert_eq!(trained.step, 1);

    let mask = trained.mask.unwrap();
    let child = mask.child().unwrap();
    assert_eq!(child.tensors().len(), 32);
    for tensor in child.tensors() {
        let expected =
            Vec::<u8>::try_from(reference[&format!("official_mask/{}", tensor.name)].reshape([-1])).unwrap();
        let found: Vec<u8> = child_bits(child, &tensor.name).iter().map(|&bit| u8::from(bit)).collect();
        assert_eq!(found, expected, "{}", tensor.name);
    }
    for (_, parameter) in classifier.parameters.iter() {
        let found = part(&classifier.parameters, classifier.parameters.values(), &parameter.name);
        let expected = &reference[&format!("official_step/{}", parameter.name)];
        // Adam's first step is ± the learning rate: where a gradient is nearly zero, rounding decides how near. So the
        // bound is a share of the step, and below it in all but such places.
        let difference = (found - expected).abs();
        assert!(difference.max().double_value(&[]) < 2e-5, "{} {}", parameter.name, difference.max());
        let close = difference.le(1e-6).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!(close > 0.99, "{}: only {close} agree to 1e-6", parameter.name);
    }
}
