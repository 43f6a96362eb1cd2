//! Child networks by other criteria than Child-Tuning_D's, against plain loops in float64.

use child_tuning::child::{ChildNetwork, Cut, MaskScope, Threshold, write_mask};
use child_tuning::data::Order;
use child_tuning::model::{Classifier, HeadStart, Labels, ModelFolder, ParameterPlace, Parameters};
use child_tuning::train::{Hyperparameters, MicroBatch, Trained};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::fixture::{classifier, dataset, part, path, tensors};
use crate::optimizer::hyperparameters;
use crate::training::{method, run};

/// The model of the references: bert_pair without dropout.
fn without_dropout() -> Classifier {
    let mut folder = ModelFolder::open(&path("bert_pair")).unwrap();
    let none = |key: &str| (key.to_owned(), Value::from(0.0));
    let overrides = ["hidden_dropout_prob", "attention_probs_dropout_prob"].map(none);
    folder.config = folder.config.with_overrides(&Map::from_iter(overrides)).unwrap();
    let labels = Labels::Classes(folder.config.labels().unwrap().unwrap());
    Classifier::load(&folder, labels, HeadStart::Keep, Device::Cpu).unwrap()
}

/// All five examples in every step, in the order of the file.
fn plain_steps(epochs: f64) -> Hyperparameters {
    Hyperparameters {
        epochs,
        batch_size: 5,
        micro_batch: MicroBatch::Examples(5),
        epsilon: 1e-4,
        weight_decay: 0.01,
        max_gradient_norm: Some(1.0),
        ..hyperparameters()
    }
}

/// Steps with dropout over shuffled batches.
fn settings() -> Hyperparameters {
    Hyperparameters {
        epochs: 3.0,
        batch_size: 2,
        micro_batch: MicroBatch::Examples(2),
        order: Order::Shuffled,
        weight_decay: 0.1,
        ..hyperparameters()
    }
}

fn trained(classifier: &mut Classifier, text: &str, settings: &Hyperparameters) -> Trained {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    run(classifier, &data, method(text).as_ref(), settings, 7)
}

fn is_head(parameters: &Parameters, name: &str) -> bool {
    parameters.get(parameters.find(name).unwrap()).place == ParameterPlace::Head
}

/// Compares the bits of every tensor that a reference has, and returns how many it has.
fn assert_mask(
    what: &str,
    child: &ChildNetwork,
    reference: &std::collections::HashMap<String, Tensor>,
) -> usize {
    let mut compared = 0;
    for tensor in child.tensors() {
        if let Some(expected) = reference.get(&format!("mask/{}", tensor.name)) {
            let expected = Vec::<u8>::try_from(expected).unwrap();
            assert_eq!(child.packed_bits(tensor), expected, "{what} {}", tensor.name);
            compared += 1;
        }
    }
    compared
}

#[test]
fn masks_have_the_bits_of_plain_loops() {
    for (name, options) in [
        ("fish_mask_empirical", "fish_mask: {p: P}"),
        ("fish_mask_expected", "fish_mask: {p: P, estimator: expected}"),
        ("sift", "sift: {p: P, dropout: false}"),
        ("magnitude_mask", "magnitude_mask: {p: P}"),
        ("magnitude_mask_lowest", "magnitude_mask: {p: P, mask: {choose: lowest}}"),
    ] {
        let reference = tensors(&format!("criteria/{name}.safetensors"));
        let share = reference["share"].double_value(&[0]);
        let mut classifier = classifier("bert_pair");
        let text = options.replace('P', &share.to_string());
        let trained = trained(&mut classifier, &text, &plain_steps(1.0));
        let mask = trained.mask.unwrap();
        let child = mask.child().unwrap();
        let compared = assert_mask(name, child, &reference);
        let (reached, all) = (child.tensors(), classifier.parameters.count());
        let round = |count: usize| (share * count as f64).round() as usize;
        if name.starts_with("fish_mask") {
            // The head has the first part of the budget.
            assert_eq!(compared, reached.len(), "{name}");
            assert_eq!(child.kept(), round(all) - (all - child.maskable()), "{name}");
        } else {
            // Without the biases of the keys of three layers.
            assert_eq!(compared, reached.len() - 3, "{name}");
            assert!(reached.iter().all(|tensor| tensor.kept == round(tensor.count)), "{name}");
        }
        assert!(reached.iter().all(|tensor| !is_head(&classifier.parameters, &tensor.name)), "{name}");
    }
}

const ALL: [&str; 7] = [
    "lt_sft: {p: 0.1}",
    "fish_mask: {p: 0.03, examples: 3}",
    "fish_mask: {p: 0.03, estimator: expected}",
    "sift: {examples: 3, p: 0.1}",
    "magnitude_mask: {p: 0.1}",
    "magnitude_mask: {p: 0.1, mask: {choose: lowest, threshold: global}}",
    "sift: {p: 0.1, clip: before_mask, mask: {threshold: percentile}}",
];

#[test]
fn nothing_moves_but_the_mask_and_the_head() {
    let start = {
        let mut start = classifier("bert_pair");
        start.reset(7).unwrap();
        start
    };
    let bits = |values: &Tensor| -> Vec<u32> {
        Vec::<f32>::try_from(values.reshape([-1])).unwrap().into_iter().map(f32::to_bits).collect()
    };
    for text in ALL {
        let mut classifier = classifier("bert_pair");
        let trained = trained(&mut classifier, text, &settings());
        let mask = trained.mask.unwrap();
        let child = mask.child().unwrap();
        let (mut outside, mut moved) = (0, 0);
        for tensor in child.tensors() {
            let values =
                |model: &Classifier| bits(&part(&model.parameters, model.parameters.values(), &tensor.name));
            for ((before, after), kept) in
                values(&start).into_iter().zip(values(&classifier)).zip(child.bits(tensor))
            {
                assert!(kept || before == after, "{text} {}", tensor.name);
                outside += usize::from(!kept);
                moved += usize::from(before != after);
            }
        }
        assert_eq!(outside, child.maskable() - child.kept(), "{text}");
        assert!(outside > 0 && 2 * moved > child.kept(), "{text}: {moved} of {}", child.kept());
        let head = classifier.parameters.iter().find(|(_, own)| own.place == ParameterPlace::Head).unwrap().1;
        let head = |model: &Classifier| bits(&part(&model.parameters, model.parameters.values(), &head.name));
        assert!(head(&start).iter().zip(head(&classifier)).all(|(before, after)| *before != after), "{text}");
    }
}

#[test]
fn with_p_of_one_every_criterion_is_vanilla_bit_for_bit() {
    let weights = |text: &str| {
        let mut classifier = classifier("bert_pair");
        let trained = trained(&mut classifier, text, &settings());
        assert!(trained.mask.is_none_or(|mask| mask.child().unwrap().is_full()), "{text}");
        classifier.parameters.values_copy().unwrap()
    };
    let vanilla = weights("vanilla");
    for name in ["fish_mask", "sift", "magnitude_mask", "lt_sft"] {
        for options in ["{p: 1}", "{p: 1, mask: {scope: all}}"] {
            assert_eq!(weights(&format!("{name}: {options}")), vanilla, "{name} {options}");
        }
    }
}

/// A mask of SIFT on as many examples as a batch has is that of the gradient of the first step, dropout and all.
#[test]
fn the_gradients_of_sift_are_those_of_the_first_step() {
    let settings = Hyperparameters { epochs: 1.0 / 3.0, max_gradient_norm: None, ..settings() };
    let mut vanilla = classifier("bert_pair");
    let first = trained(&mut vanilla, "vanilla", &settings);
    assert_eq!(first.step, 1);
    let gradient = vanilla.parameters.gradients().unwrap();
    let mut classifier = classifier("bert_pair");
    let trained =
        trained(&mut classifier, "sift: {examples: 2, p: 0.1, mask: {threshold: global}}", &settings);
    let mask = trained.mask.unwrap();
    let child = mask.child().unwrap();
    let (mut least, mut most) = (f32::INFINITY, 0f32);
    for tensor in child.tensors() {
        let gradient = part(&vanilla.parameters, gradient, &tensor.name).abs().reshape([-1]);
        for (value, kept) in Vec::<f32>::try_from(gradient).unwrap().into_iter().zip(child.bits(tensor)) {
            (least, most) = if kept { (least.min(value), most) } else { (least, most.max(value)) };
        }
    }
    assert!(least >= most && most > 0.0, "{least} {most}");
}

/// Training, rewinding and training again; the values of what trains the second time.
#[test]
fn lt_sft_takes_what_moved_farthest_and_trains_it_from_the_same_start() {
    let reference = tensors("criteria/lt_sft.safetensors");
    let share = reference["share"].double_value(&[0]);
    let mut classifier = without_dropout();
    let trained = trained(&mut classifier, &format!("lt_sft: {{p: {share}}}"), &plain_steps(10.0));
    assert_eq!(trained.step, 10);
    let mask = trained.mask.unwrap();
    let child = mask.child().unwrap();
    assert_eq!(assert_mask("lt_sft", child, &reference), child.tensors().len());
    assert_eq!(child.kept(), (share * child.maskable() as f64).round() as usize);
    let mut start = without_dropout();
    start.reset(7).unwrap();
    for (_, parameter) in classifier.parameters.iter() {
        let name = &parameter.name;
        let flat =
            |model: &Classifier| part(&model.parameters, model.parameters.values(), name).reshape([-1]);
        let (found, before) = (flat(&classifier), flat(&start));
        let kept = match child.tensors().iter().find(|tensor| tensor.name == *name) {
            Some(tensor) => Tensor::from_slice(&child.bits(tensor).collect::<Vec<_>>()),
            None => Tensor::ones([parameter.count() as i64], (Kind::Bool, Device::Cpu)),
        };
        let outside = kept.logical_not();
        assert_eq!(found.masked_select(&outside), before.masked_select(&outside), "{name}");
        let expected = reference[&format!("after/{name}")].reshape([-1]);
        if expected.numel() > 0 {
            // Of steps of up to 1e-3, ten of them.
            let difference = (found.masked_select(&kept) - expected).abs().max().double_value(&[]);
            assert!(difference < 2e-6, "{name}: off by {difference:e}");
        }
    }
}

/// The weights that LT-SFT's mask is of, found by training, and the training after it, by a mask file.
#[test]
fn lt_sft_rewinds_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mask.safetensors");
    let mut classifier = classifier("bert_pair");
    let first = trained(&mut classifier, "lt_sft: {p: 0.1}", &settings());
    let mask = first.mask.unwrap();
    write_mask(&file, mask.child().unwrap(), &[]).unwrap();
    let found = classifier.parameters.values_copy().unwrap();

    // The same steps, without a training before them.
    let text = format!("child_tuning_d: {{mask: {{file: {}}}}}", file.display());
    let _ = trained(&mut classifier, &text, &settings());
    assert_eq!(classifier.parameters.values(), &found);

    classifier.reset(7).unwrap();
    let start = classifier.parameters.values_copy().unwrap();
    let _ = trained(&mut classifier, "vanilla", &settings());
    let changes = (classifier.parameters.values() - start).abs();
    let cut = Cut::highest(0.1, MaskScope::Backbone, Threshold::Global);
    let expected = ChildNetwork::from_scores(&classifier.parameters, &changes, &cut).unwrap();
    assert_eq!(mask.child().unwrap().sha256(), expected.sha256());
}

#[test]
fn a_budget_that_the_head_uses_up_is_refused() {
    let classifier = classifier("bert_pair");
    // 99 of 28211 weights are in the head.
    let error =
        method("fish_mask: {p: 0.0035}").check(classifier.parameters.declared()).unwrap_err().to_string();
    assert!(error.contains("fish_mask: `p: 0.0035` of the model are 99 weights, and the 99"), "{error}");
    method("fish_mask: {p: 0.0036}").check(classifier.parameters.declared()).unwrap();
}
