//! Ten steps in which pulls, masks, clipping, updates and decay meet, held to the documented order of each
//! (`scripts/order_fixtures.py`).

use std::sync::atomic::AtomicBool;

use child_tuning::method::{MethodSpec, Preset};
use child_tuning::model::{Classifier, HeadStart, Labels, ModelFolder};
use child_tuning::train::{AdamWForm, Control, Hyperparameters, MicroBatch, Trainer, prepare};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::fixture::{assert_close, classifier, dataset, part, path, tensors};
use crate::references::settings;

const TOLERANCE: f64 = 1e-6;
/// Of losses, which the last bits of all weights move together.
const LOSS_TOLERANCE: f64 = 3e-6;

/// The fixture's model without dropout, whose head counts as new and has the values of the folder's all the same.
fn with_new_head() -> Classifier {
    let mut folder = ModelFolder::open(&path("bert_pair")).unwrap();
    let overrides = json!({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0});
    folder.config = folder.config.with_overrides(overrides.as_object().unwrap()).unwrap();
    let labels = Labels::Classes(folder.config.labels().unwrap().unwrap());
    let mut model = Classifier::load(&folder, labels, HeadStart::Fresh, Device::Cpu).unwrap();
    model.reset(3).unwrap();
    let own = classifier("bert_pair").parameters;
    for name in ["classifier.weight", "classifier.bias"] {
        let id = model.parameters.find(name).unwrap();
        assert!(model.is_new(id));
        model.parameters.set(id, &part(&own, own.values(), name)).unwrap();
    }
    model
}

fn check(file: &str, method: &str, adamw: AdamWForm) {
    let reference = tensors(&format!("methods/order_{file}.safetensors"));
    let losses = Vec::<f64>::try_from(&reference["losses"]).unwrap();
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let examples: Vec<usize> = (0..data.len()).collect();
    let spec: MethodSpec = serde_yaml::from_str(method).unwrap();
    let method = spec.resolve(Preset::Paper).unwrap().remove(0);
    for micro_batch in [data.len(), 2] {
        let mut model = with_new_head();
        let settings = Hyperparameters {
            weight_decay: 0.1,
            max_gradient_norm: Some(0.05),
            adamw,
            micro_batch: MicroBatch::Examples(micro_batch),
            ..settings(data.len(), micro_batch)
        };
        let interrupted = AtomicBool::new(false);
        let mut control = Control { interrupted: &interrupted, report: &mut |_| {} };
        let prepared = prepare(&mut model, &data, method.as_ref(), &settings, 3, &mut control).unwrap();
        let mut trainer = Trainer::new(&mut model, &data, &settings, prepared, 3).unwrap();
        for (step, expected) in losses.iter().enumerate() {
            let what = format!("{file} micro-batch {micro_batch} step {}", step + 1);
            let loss = f64::try_from(trainer.step(&examples).unwrap()).unwrap();
            assert!((loss - expected).abs() < LOSS_TOLERANCE * expected.abs().max(1.0), "{what}: {loss}");
            for (name, expected) in &reference {
                if let Some(name) = name.strip_prefix(&format!("step{}.", step + 1)) {
                    let parameters = trainer.parameters();
                    let found = part(parameters, parameters.values(), name);
                    assert_close(&format!("{what} {name}"), &found, expected, TOLERANCE, true);
                }
            }
        }
    }
}

/// How far the weights of two references are apart in the end.
fn distance(first: &str, second: &str) -> f64 {
    let [first, second] = [first, second].map(|file| tensors(&format!("methods/{file}.safetensors")));
    let last = first.iter().filter(|(name, _)| name.starts_with("step10."));
    let apart =
        |own: &Tensor, other: &Tensor| (own - other).abs().max().to_kind(Kind::Double).double_value(&[]);
    last.map(|(name, own)| apart(own, &second[name])).fold(0.0, f64::max)
}

const FIXED: &str = "magnitude_mask: {p: 0.3";

#[test]
fn clipping_before_or_after_the_mask_of_f() {
    check("f", "child_tuning_f: {p: 0.3}", AdamWForm::Torch);
    check("f_before_legacy", "child_tuning_f: {p: 0.3, clip: before_mask}", AdamWForm::HfLegacy);
    assert!(distance("order_f", "order_f_before_legacy") > 100.0 * TOLERANCE);
}

#[test]
fn clipping_before_or_after_a_fixed_mask_and_decay_in_it_or_everywhere() {
    check("fixed", &format!("{FIXED}}}"), AdamWForm::Torch);
    let all = format!("{FIXED}, clip: before_mask, decay_scope: all}}");
    check("fixed_before_decay_all", &all, AdamWForm::Torch);
    assert!(distance("order_fixed", "order_fixed_before_decay_all") > 100.0 * TOLERANCE);
}

#[test]
fn pulls_on_gradients_come_before_clipping_and_masks() {
    let l2_sp = "l2_sp: {alpha: 0.5, beta: 0.3}";
    let with = |mask: &str| format!("[{{{mask}, clip: before_mask}}}}, {{{l2_sp}}}]");
    check("f_before_l2_sp", &with("child_tuning_f: {p: 0.3"), AdamWForm::Torch);
    check("fixed_before_l2_sp", &with(FIXED), AdamWForm::Torch);
}

#[test]
fn pulls_on_weights_know_new_heads_and_masks() {
    check("fixed_prior", &format!("[{{{FIXED}}}}}, prior_weight_decay: {{strength: 50}}]"), AdamWForm::Torch);
    let recadam = "recadam: {k: 0.5, t0: 5, gamma: 50}";
    check("recadam", recadam, AdamWForm::Torch);
    check("fixed_recadam", &format!("[{{{FIXED}}}}}, {{{recadam}}}]"), AdamWForm::Torch);
    let rates = "layer_wise_rates: {decay: 0.7}, vanilla: {learning_rate_factor: 0.5}";
    let rates: Vec<String> = rates.split(", ").map(|part| format!("{{{part}}}")).collect();
    let all = format!("[{{{recadam}}}, {}]", rates.join(", "));
    check("recadam_legacy_rates", &all, AdamWForm::HfLegacy);
}
