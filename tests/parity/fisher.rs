//! Fisher information, masks and a training step against plain loops and the released optimizer.

use child_tuning::child::{
    ChildNetwork, Cut, Estimator, FisherBatch, FisherOptions, MaskScope, Threshold, fisher_information,
};
use child_tuning::data::EncodedDataset;
use child_tuning::method::{MethodSpec, Preset};
use child_tuning::model::Classifier;
use child_tuning::train::{AdamWForm, Hyperparameters};
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
    let batches = numbers.chunks(batch_size).map(|numbers| {
        let (batch, targets) = data.batch(numbers, 0, Device::Cpu)?;
        Ok(FisherBatch { batch, targets, dropout: None })
    });
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

const PER_EXAMPLE: FisherOptions =
    FisherOptions { estimator: Estimator::PerExample, dropout: false, clip: None };

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
        let options = FisherOptions { estimator: Estimator::Batch, dropout: false, clip };
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
