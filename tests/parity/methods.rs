//! Methods that train a part of the model, alone and together with child networks.

use child_tuning::method::MaskKind;
use child_tuning::model::{
    Classifier, HeadStart, Labels, ModelFolder, Parameter, ParameterKind, ParameterPlace,
};
use child_tuning::train::{Hyperparameters, OptimizerRule, Trained};
use tch::{Device, Tensor};

use crate::fixture::{assert_close, classifier, dataset, part, path, tensors};
use crate::optimizer::hyperparameters;
use crate::training::{method, run};

/// One step with dropout and without clipping, which would mix the gradients of all parameters.
fn one_step(text: &str, checkpointing: bool) -> (Classifier, Trained) {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let mut classifier = classifier("bert_pair");
    let settings = Hyperparameters {
        epochs: 1.0,
        batch_size: 5,
        max_gradient_norm: None,
        weight_decay: 0.01,
        gradient_checkpointing: checkpointing,
        ..hyperparameters()
    };
    let trained = run(&mut classifier, &data, method(text).as_ref(), &settings, 3);
    assert_eq!(trained.step, 1);
    (classifier, trained)
}

fn values(classifier: &Classifier, name: &str) -> Tensor {
    part(&classifier.parameters, classifier.parameters.values(), name)
}

/// A weight that trains gets the bits that it gets under `whole`, and all others keep those of the start.
fn assert_trains(text: &str, whole: &str, trains: impl Fn(&Parameter) -> bool) {
    let mut start = classifier("bert_pair");
    start.reset(3).unwrap();
    let (expected, _) = one_step(whole, false);
    for checkpointing in [false, true] {
        let (found, trained) = one_step(text, checkpointing);
        let mut count = 0;
        for (_, parameter) in found.parameters.iter() {
            let reference = if trains(parameter) { &expected } else { &start };
            let name = &parameter.name;
            assert_eq!(values(&found, name), values(reference, name), "{text} {name}");
            count += if trains(parameter) { parameter.count() } else { 0 };
        }
        let has_fixed_mask = method(text).mask() == Some(MaskKind::Fixed);
        assert!(trained.trainable <= count, "{text}: {}", trained.trainable);
        assert_eq!(trained.trainable < count, has_fixed_mask, "{text}: {}", trained.trainable);
        assert!(count > 0 && count < found.parameters.count(), "{text}");
    }
}

fn is_bias(parameter: &Parameter) -> bool {
    let bias = matches!(parameter.kind, ParameterKind::Bias | ParameterKind::LayerNormBias);
    bias || parameter.place == ParameterPlace::Head
}

/// For a model of three layers.
fn is_above(parameter: &Parameter, first: usize) -> bool {
    match parameter.place {
        ParameterPlace::EncoderLayer(layer) => layer >= first,
        ParameterPlace::Embeddings => false,
        ParameterPlace::AboveLayers | ParameterPlace::Pooler | ParameterPlace::Head => true,
    }
}

#[test]
fn bitfit_trains_biases_and_head_as_vanilla_does() {
    assert_trains("bitfit", "vanilla", is_bias);
    let moments = |text: &str| one_step(text, false).1.optimizer_bytes;
    assert!(moments("bitfit") * 10 < moments("vanilla"));
}

#[test]
fn the_top_layers_train_as_in_vanilla() {
    for k in 0..=2 {
        assert_trains(&format!("top_layers: {{k: {k}}}"), "vanilla", |own| is_above(own, 3 - k));
    }
    let all = one_step("top_layers: {k: 3}", false).0;
    let vanilla = one_step("vanilla", false).0;
    let name = "bert.encoder.layer.0.intermediate.dense.weight";
    assert_eq!(values(&all, name), values(&vanilla, name));
}

#[test]
fn composed_methods_change_what_each_of_them_changes() {
    assert_trains("[bitfit, top_layers: {k: 1}]", "vanilla", |own| is_bias(own) && is_above(own, 2));
    for child in ["child_tuning_f: {p: 0.4}", "child_tuning_d: {p: 0.4, mask: {scope: all}}"] {
        assert_trains(&format!("[bitfit, {{{child}}}]"), child, is_bias);
    }
    assert_trains(
        "[bitfit, vanilla: {learning_rate_factor: 2}]",
        "vanilla: {learning_rate_factor: 2}",
        is_bias,
    );
}

#[test]
fn more_layers_than_there_are_is_refused() {
    let classifier = classifier("bert_pair");
    for (text, option) in [("top_layers: {k: 4}", "`k=4"), ("reinitialised_layers: {layers: 4}", "`layers=4")]
    {
        let error = method(text).check(classifier.parameters.declared()).unwrap_err().to_string();
        assert!(error.contains(option) && error.contains("the model has 3 layers"), "{error}");
    }
}

#[test]
fn redrawn_layers_are_new_and_the_rest_is_the_checkpoint() {
    let mut start = classifier("bert_pair");
    start.reset(3).unwrap();
    for (text, is_new) in [
        ("reinitialised_layers", (|own| is_above(own, 2)) as fn(&Parameter) -> bool),
        ("reinitialised_layers: {layers: 2}", |own| is_above(own, 1)),
        ("reinitialised_layers: {layers: 2, pooler: false}", |own| {
            is_above(own, 1) && own.place != ParameterPlace::Pooler
        }),
    ] {
        let begun = |seed: u64| {
            let mut classifier = classifier("bert_pair");
            classifier.reset(seed).unwrap();
            method(text).begin(&mut classifier, seed).unwrap();
            classifier
        };
        let (mut found, other) = (begun(3), begun(4));
        for (id, parameter) in start.parameters.iter() {
            let name = &parameter.name;
            let redrawn = is_new(parameter) && parameter.place != ParameterPlace::Head;
            assert_eq!(found.is_new(id), redrawn, "{text} {name}");
            assert_eq!(values(&found, name) == values(&start, name), !redrawn, "{text} {name}");
            if redrawn && parameter.kind == ParameterKind::Weight {
                assert_ne!(values(&found, name), values(&other, name), "{text} {name}");
                // The config's `initializer_range` is 0.02; the bound is six standard errors of a deviation.
                let deviation = f64::try_from(values(&found, name).std(true)).unwrap();
                assert!(
                    (deviation / 0.02 - 1.0).abs() < 6.0 / (2.0 * parameter.count() as f64).sqrt(),
                    "{deviation}"
                );
            }
        }
        found.reset(3).unwrap();
        assert_eq!(found.parameters.values(), start.parameters.values(), "{text}");
    }
    let nothing = one_step("reinitialised_layers: {layers: 0, pooler: false}", false).0;
    assert_eq!(nothing.parameters.values(), one_step("vanilla", false).0.parameters.values());
}

/// One step of SGD without clipping from a head of its own.
fn head_after_a_step(text: &str, weight_decay: f64) -> Tensor {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let folder = ModelFolder::open(&path("bert_pair")).unwrap();
    let labels = Labels::Classes(folder.config.labels().unwrap().unwrap());
    let mut classifier = Classifier::load(&folder, labels, HeadStart::Fresh, Device::Cpu).unwrap();
    let settings = Hyperparameters {
        epochs: 1.0,
        batch_size: 5,
        max_gradient_norm: None,
        weight_decay,
        learning_rate: 0.5,
        optimizer: OptimizerRule::Sgd,
        ..hyperparameters()
    };
    run(&mut classifier, &data, method(text).as_ref(), &settings, 3);
    values(&classifier, "classifier.weight")
}

#[test]
fn new_weights_are_pulled_towards_zero() {
    let decayed = head_after_a_step("vanilla", 0.1);
    assert_ne!(decayed, head_after_a_step("vanilla", 0.0));
    // w − η (g + β w) is (1 − η β) w − η g.
    for text in ["l2_sp: {beta: 0.1}", "prior_weight_decay: {strength: 0.1}"] {
        assert_close(text, &head_after_a_step(text, 0.0), &decayed, 1e-6, false);
    }
    // Theirs takes the place of plain decay.
    let replaced = head_after_a_step("prior_weight_decay: {strength: 0}", 0.1);
    assert_eq!(replaced, head_after_a_step("vanilla", 0.0));
}
