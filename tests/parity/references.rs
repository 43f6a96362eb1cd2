//! Ten training steps of other methods, held to those that PyTorch takes from the methods' definitions
//! (`scripts/method_fixtures.py`, `scripts/dps_fixtures.py`).

use std::sync::atomic::AtomicBool;

use child_tuning::child::GradientMask;
use child_tuning::data::Order;
use child_tuning::method::{MethodSpec, Preset};
use child_tuning::model::{Classifier, HeadStart, Labels, ModelFolder, Parameters};
use child_tuning::train::{Control, Hyperparameters, MicroBatch, Trainer, prepare};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::fixture::{assert_close, dataset, part, path, tensors};
use crate::optimizer::hyperparameters;

const STEPS: usize = 10;

/// A fixture's model with another share of its hidden states dropped, and no attention.
fn with_dropout(folder: &str, dropout: f64) -> Classifier {
    let mut folder = ModelFolder::open(&path(folder)).unwrap();
    let overrides = json!({"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0});
    folder.config = folder.config.with_overrides(overrides.as_object().unwrap()).unwrap();
    let labels = match folder.config.labels().unwrap().unwrap() {
        names if names.len() == 1 => Labels::Score,
        names => Labels::Classes(names),
    };
    Classifier::load(&folder, labels, HeadStart::Keep, Device::Cpu).unwrap()
}

pub fn settings(examples: usize, micro_batch: usize) -> Hyperparameters {
    Hyperparameters {
        epochs: STEPS as f64,
        batch_size: examples,
        micro_batch: MicroBatch::Examples(micro_batch),
        order: Order::Sequential,
        learning_rate: 1e-3,
        epsilon: 1e-4,
        weight_decay: 0.01,
        max_gradient_norm: Some(1.0),
        ..hyperparameters()
    }
}

/// A method held to a reference. `tolerance` is relative to the loss, and to the largest weight of a tensor.
struct Case {
    file: &'static str,
    method: &'static str,
    model: &'static str,
    dropout: f64,
    tolerance: f64,
}

impl Case {
    fn new(file: &'static str, method: &'static str) -> Self {
        Self { file, method, model: "bert_pair", dropout: 0.0, tolerance: 1e-6 }
    }

    fn check(&self) {
        let reference = tensors(&format!("methods/{}.safetensors", self.file));
        let losses = Vec::<f64>::try_from(&reference["losses"]).unwrap();
        let data = dataset(&tensors(&format!("{}/reference.safetensors", self.model)));
        let examples: Vec<usize> = (0..data.len()).collect();
        for (micro_batch, checkpointing) in [(data.len(), false), (data.len(), true), (2, false)] {
            let mut classifier = with_dropout(self.model, self.dropout);
            classifier.reset(3).unwrap();
            let spec: MethodSpec = serde_yaml::from_str(self.method).unwrap();
            let method = spec.resolve(Preset::Paper).unwrap().remove(0);
            let settings = Hyperparameters {
                gradient_checkpointing: checkpointing,
                ..settings(data.len(), micro_batch)
            };
            let interrupted = AtomicBool::new(false);
            let mut control = Control { interrupted: &interrupted, report: &mut |_| {} };
            let prepared =
                prepare(&mut classifier, &data, method.as_ref(), &settings, 3, &mut control).unwrap();
            let mask = prepared.mask.clone();
            let mut trainer = Trainer::new(&mut classifier, &data, &settings, prepared, 3).unwrap();
            let what = format!("{} micro-batch {micro_batch} checkpointing {checkpointing}", self.file);
            for (step, expected) in losses.iter().enumerate() {
                let loss = f64::try_from(trainer.step(&examples).unwrap()).unwrap();
                let difference = (loss - expected).abs() / expected.abs().max(1.0);
                assert!(difference < self.tolerance, "{what} step {step}: {loss} instead of {expected}");
                for (name, expected) in &reference {
                    if let Some(name) = name.strip_prefix(&format!("mask{}.", step + 1)) {
                        let found = members(mask.as_deref(), trainer.parameters(), name);
                        let different = found.view(expected.size().as_slice()).not_equal_tensor(expected);
                        assert_eq!(different.sum(Kind::Int64).int64_value(&[]), 0, "{what} {name}");
                    }
                    let name = name.strip_prefix(&format!("step{}.", step + 1));
                    // Where the reference has a sum of a matrix and what changes it, only the latter is there in training.
                    let is_sum = |name: &&str| {
                        let factor = format!("step1.{}.lora_A", name.trim_end_matches(".weight"));
                        reference.contains_key(&factor)
                    };
                    if let Some(name) = name.filter(|name| !is_sum(name)) {
                        let parameters = trainer.parameters();
                        let found = part(parameters, parameters.values(), name);
                        assert_close(&format!("{what} {name}"), &found, expected, self.tolerance, true);
                    }
                }
            }
        }
    }

    /// How far the weights of the reference are from those of plain fine-tuning.
    fn distance_from_vanilla(&self) -> f64 {
        let [own, vanilla] =
            [self.file, "vanilla"].map(|file| tensors(&format!("methods/{file}.safetensors")));
        let distance = |(name, weights): (&String, &Tensor)| {
            let difference = vanilla.get(name).filter(|_| name.starts_with("step10."))? - weights;
            Some(f64::try_from(difference.abs().max().to_kind(Kind::Double)).unwrap())
        };
        own.iter().filter_map(distance).fold(0.0, f64::max)
    }
}

/// Which elements of a parameter the mask of the last step lets through.
fn members(mask: Option<&GradientMask>, parameters: &Parameters, name: &str) -> Tensor {
    let Some(GradientMask::Adaptive(mask)) = mask else { panic!("there is no adaptive mask") };
    let parameter = parameters.get(parameters.find(name).unwrap());
    mask.members(parameter, Device::Cpu).unwrap().unwrap()
}

#[test]
fn plain_fine_tuning() {
    Case::new("vanilla", "vanilla").check();
    Case { dropout: 0.1, ..Case::new("vanilla_dropout", "vanilla") }.check();
}

#[test]
fn pulls_towards_the_pretrained_weights() {
    for case in [
        Case::new("l2_sp", "l2_sp: {alpha: 0.3}"),
        Case::new("prior_weight_decay", "prior_weight_decay: {strength: 50}"),
        Case::new("recadam", "recadam: {k: 0.5, t0: 5, gamma: 50}"),
    ] {
        case.check();
        assert!(case.distance_from_vanilla() > 20.0 * case.tolerance, "{}", case.file);
    }
}

#[test]
fn layer_wise_learning_rates() {
    Case::new("layer_wise_rates", "layer_wise_rates: {decay: 0.7}").check();
}

#[test]
fn weights_mixed_with_the_pretrained_ones() {
    for case in [
        Case::new("mixout_input_neuron", "mixout: {q: 0.3}"),
        Case::new("mixout_weight", "mixout: {q: 0.3, mask: weight}"),
    ] {
        case.check();
        assert!(case.distance_from_vanilla() > 20.0 * case.tolerance, "{}", case.file);
    }
}

#[test]
fn low_rank_changes_of_weights() {
    Case::new("lora", "lora: {rank: 3, alpha: 6, targets: [query, value]}").check();
}

#[test]
fn noise_on_hidden_states() {
    Case::new("hype_normal", "hype: {scale: 0.05}").check();
    Case::new("hype_uniform", "hype: {scale: 0.05, noise: uniform}").check();
}

#[test]
fn two_passes_with_different_dropout() {
    let case = Case { dropout: 0.1, ..Case::new("r_drop", "r_drop: {alpha: 1.5}") };
    case.check();
    let regression = "bert_regression";
    Case { file: "r_drop_regression", model: regression, ..case }.check();
}

#[test]
fn child_networks_that_the_gradients_of_earlier_steps_choose() {
    for case in [
        Case::new("dps_dense", "dps: {p: 0.7, update_ratio: 0.2}"),
        Case::new("dps_mix", "dps: {form: mix, p: 0.7, update_ratio: 0.2}"),
    ] {
        case.check();
        assert!(case.distance_from_vanilla() > 20.0 * case.tolerance, "{}", case.file);
    }
}

#[test]
fn a_second_pass_with_noise_on_the_words() {
    Case::new("r3f_uniform", "r3f: {lambda: 2, epsilon: 0.02}").check();
    Case::new("r3f_normal", "r3f: {lambda: 2, epsilon: 0.02, noise: normal}").check();
    let regression = Case::new("r3f_regression_mse", "r3f: {lambda: 2, epsilon: 0.02, regression: mse}");
    Case { model: "bert_regression", ..regression }.check();
}

#[test]
fn a_head_divided_by_its_largest_singular_value() {
    Case::new("r4f", "r4f: {epsilon: 0.02}").check();
}

/// Where noise leaves the outputs of an example nearly as they are, by chance, the gradient by it is not far above rounding, and
/// is divided by its largest number: the shift is then off by up to 1e-4 of its 5e-2 (in PyTorch's float32 too), the loss by 1e-5.
#[test]
fn a_pass_at_the_shift_that_moves_predictions_most() {
    let text = "smart: {step_size: 0.1, noise: 0.01, radius: 0.05}";
    let case = Case { tolerance: 5e-5, ..Case::new("smart", text) };
    case.check();
    assert!(case.distance_from_vanilla() > 20.0 * case.tolerance);
    Case { file: "smart_regression", model: "bert_regression", ..case }.check();
}
