//! Whole small trainings: what must be equal bit for bit, and what must not move.

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;

use child_tuning::child::{ChildNetwork, GradientHooks};
use child_tuning::data::{BatchShape, EncodedDataset, Order};
use child_tuning::error::Error;
use child_tuning::libtorch::GradientHook;
use child_tuning::method::{Method, MethodSpec, Preset};
use child_tuning::model::{Classifier, Dropout, ParameterPlace, Pass, Precision, loss};
use child_tuning::random::Purpose;
use child_tuning::train::{
    Control, Event, Freeze, Hyperparameters, MicroBatch, OptimizerRule, Trained, Trainer, frozen_features,
    predict, prepare, train,
};
use tch::{Device, Kind, Tensor};

use crate::fixture::{assert_close, classifier, dataset, part, tensors};
use crate::optimizer::hyperparameters;

pub fn run(
    classifier: &mut Classifier,
    data: &EncodedDataset,
    method: &dyn Method,
    settings: &Hyperparameters,
    seed: u64,
) -> Trained {
    classifier.reset(seed).unwrap();
    control(|control| train(classifier, data, None, method, settings, seed, control).unwrap())
}

/// Lends a control that nobody uses.
pub fn control<T>(work: impl FnOnce(&mut Control) -> T) -> T {
    work(&mut Control { interrupted: &AtomicBool::new(false), report: &mut |_| {} })
}

pub fn child_bits(child: &ChildNetwork, name: &str) -> Vec<bool> {
    let tensor = child.tensors().iter().find(|tensor| tensor.name == name).unwrap();
    child.bits(tensor).collect()
}

/// What is the same but for the order of sums differs by at most so much of the largest, forty times the spacing of float32.
/// Found are up to 1.2e-6, by the products of some processors.
pub const ROUNDING: f64 = 5e-6;

pub fn method(text: &str) -> std::sync::Arc<dyn Method> {
    serde_yaml::from_str::<MethodSpec>(text).unwrap().resolve(Preset::Paper).unwrap().remove(0)
}

/// Twelve steps with dropout on a model of its own head; returns the final weights.
fn weights_after(text: &str, settings: &Hyperparameters, seed: u64) -> Tensor {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let mut classifier = classifier("bert_pair");
    run(&mut classifier, &data, method(text).as_ref(), settings, seed);
    classifier.parameters.values_copy().unwrap()
}

/// Twelve steps on the examples of `bert_pair`, or as many epochs of another data set.
pub fn settings() -> Hyperparameters {
    Hyperparameters {
        epochs: 4.0,
        batch_size: 2,
        micro_batch: MicroBatch::Examples(2),
        order: Order::Shuffled,
        ..hyperparameters()
    }
}

#[test]
fn the_same_seed_gives_the_same_bits_and_another_seed_does_not() {
    for text in ["vanilla", "child_tuning_f", "child_tuning_d"] {
        let first = weights_after(text, &settings(), 1);
        assert_eq!(first, weights_after(text, &settings(), 1), "{text}");
        assert_ne!(first, weights_after(text, &settings(), 2), "{text}");
    }
}

#[test]
fn with_p_of_one_every_child_network_is_vanilla_bit_for_bit() {
    for optimizer in [OptimizerRule::Adamw, OptimizerRule::Sgd] {
        let settings = Hyperparameters { optimizer, ..settings() };
        let vanilla = weights_after("vanilla", &settings, 7);
        for text in [
            "vanilla: {learning_rate_factor: 1}",
            "child_tuning_f: {p: 1}",
            "child_tuning_f: {p: 1, clip: before_mask}",
            "child_tuning_d: {p: 1}",
            "child_tuning_d: {p: 1, outside: prune}",
            "child_tuning_d: {p: 1, mask: {choose: random, scope: all}}",
            "child_tuning_d: {p: 1.0, mask: {scope: encoder_layers}, clip: before_mask, decay_scope: all}",
        ] {
            assert_eq!(weights_after(text, &settings, 7), vanilla, "{text} {optimizer:?}");
        }
    }
}

#[test]
fn tf32_on_the_cpu_is_float32_bit_for_bit() {
    let tf32 = Hyperparameters { precision: Precision::Tf32, ..settings() };
    assert_eq!(weights_after("child_tuning_d", &tf32, 7), weights_after("child_tuning_d", &settings(), 7));
}

#[test]
fn a_learning_rate_factor_is_the_same_as_another_learning_rate() {
    let half = Hyperparameters { learning_rate: settings().learning_rate / 2.0, ..settings() };
    let found = weights_after("vanilla: {learning_rate_factor: 0.5}", &settings(), 7);
    assert_eq!(found, weights_after("vanilla", &half, 7));
    assert_ne!(found, weights_after("vanilla", &settings(), 7));
}

/// What lets the optimizer leave out the words that no example has: whatever the method, nothing comes back to them.
#[test]
fn words_that_no_example_has_get_no_gradient_and_no_moments() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let name = "bert.embeddings.word_embeddings.weight";
    let examples: Vec<usize> = (0..data.len()).collect();
    for text in [
        "vanilla",
        "child_tuning_f: {p: 0.3, mask: {scope: all}}",
        "dps",
        "mixout",
        "r3f",
        "smart",
        "hype",
        "[r_drop, prior_weight_decay]",
        "l2_sp",
        "[lora, top_layers: {k: 1}]",
    ] {
        for precision in [Precision::Float32, Precision::Bf16] {
            let settings = Hyperparameters { precision, weight_decay: 0.1, ..settings() };
            let mut model = classifier("bert_pair");
            let prepared = control(|control| {
                prepare(&mut model, &data, method(text).as_ref(), &settings, 3, control).unwrap()
            });
            let mut trainer = Trainer::new(&mut model, &data, &settings, prepared, 3).unwrap();
            for _ in 0..2 {
                let _ = trainer.step(&examples).unwrap();
            }
            let parameters = trainer.parameters();
            let gradient = part(parameters, parameters.gradients().unwrap(), name);
            let used: HashSet<i64> = (0..gradient.size()[0])
                .filter(|&row| f64::try_from(gradient.get(row).abs().max()).unwrap() != 0.0)
                .collect();
            let has = |row: &i64| data.inputs.iter().any(|input| input.ids.contains(&(*row as u32)));
            assert!(text == "l2_sp" || used.iter().all(has), "{text} {precision:?}");
            assert!(used.is_empty() == text.contains("lora"), "{text} {precision:?}");
            let all = parameters.count();
            let most = if text == "l2_sp" { all } else { all - 20 * 32 };
            assert!(trainer.optimizer_bytes() <= 8 * most, "{text} {precision:?}");
            assert!(
                trainer.optimizer_bytes() == 8 * all || text != "l2_sp",
                "its gradients are of all words"
            );
        }
    }
}

#[test]
fn sgd_keeps_no_state() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let settings = Hyperparameters { optimizer: OptimizerRule::Sgd, ..settings() };
    let trained = run(&mut classifier("bert_pair"), &data, method("vanilla").as_ref(), &settings, 1);
    assert_eq!(trained.optimizer_bytes, 0);
}

#[test]
fn pruned_weights_are_zero_and_stay_so() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    for text in [
        "child_tuning_d: {p: 0.5, outside: prune}",
        "child_tuning_d: {mask: {choose: random, scope: all}, outside: prune, clip: before_mask, decay_scope: all}",
    ] {
        let mut classifier = classifier("bert_pair");
        let trained = run(&mut classifier, &data, method(text).as_ref(), &settings(), 5);
        let mask = trained.mask.unwrap();
        let child = mask.child().unwrap();
        assert!(!child.is_full());
        for tensor in child.tensors() {
            let values = part(&classifier.parameters, classifier.parameters.values(), &tensor.name);
            let values = Vec::<f32>::try_from(values.reshape([-1])).unwrap();
            let outside = values.iter().zip(child.bits(tensor)).filter(|(_, bit)| !bit);
            assert!(outside.into_iter().all(|(value, _)| *value == 0.0), "{text} {}", tensor.name);
        }
        // The next run starts from the checkpoint again.
        classifier.reset(5).unwrap();
        let again = crate::fixture::classifier("bert_pair");
        assert_eq!(classifier.parameters.values(), again.parameters.values());
    }
}

#[test]
fn the_lowest_scores_are_others_than_the_highest() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let bits = |text: &str, seed: u64| {
        let trained = run(&mut classifier("bert_pair"), &data, method(text).as_ref(), &settings(), seed);
        let mask = trained.mask.unwrap();
        let child = mask.child().unwrap();
        assert_eq!(child.kept(), (0.3 * child.maskable() as f64).round() as usize, "{text}");
        child.tensors().iter().flat_map(|tensor| child.bits(tensor)).collect::<Vec<bool>>()
    };
    let highest = bits("child_tuning_d", 5);
    let lowest = bits("child_tuning_d: {mask: {choose: lowest}}", 5);
    assert!(!highest.iter().zip(&lowest).any(|(high, low)| *high && *low));
    let random = "child_tuning_d: {mask: {choose: random}}";
    assert_eq!(bits(random, 5), bits(random, 5));
    assert_ne!(bits(random, 5), bits(random, 6));
}

#[test]
fn micro_batches_add_up_to_the_whole_batch() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    // One step, after which the model still holds the accumulated gradients: compared are these, for Adam would blow
    // the rounding of gradients that should be zero (the key biases') up to whole steps.
    let gradients = |text: &str, micro_batch: usize| {
        let mut classifier = classifier("bert_pair");
        let settings = Hyperparameters {
            epochs: 1.0,
            batch_size: 5,
            micro_batch: MicroBatch::Examples(micro_batch),
            ..settings()
        };
        assert_eq!(run(&mut classifier, &data, method(text).as_ref(), &settings, 3).step, 1);
        classifier.parameters.gradients().unwrap().copy()
    };
    for text in ["vanilla", "child_tuning_f", "child_tuning_d"] {
        let expected = gradients(text, 5);
        // 5 = 2 + 2 + 1 and 3 + 2: uneven micro-batches of uneven lengths, dropout on.
        for micro_batch in [1, 2, 3] {
            assert_close(
                &format!("{text} {micro_batch}"),
                &gradients(text, micro_batch),
                &expected,
                ROUNDING,
                true,
            );
        }
    }
}

#[test]
fn updates_within_backward_give_the_same_bits() {
    for (text, settings) in [
        ("vanilla", settings()),
        ("child_tuning_f", settings()),
        ("child_tuning_d", settings()),
        ("child_tuning_d: {decay_scope: all, clip: before_mask}", settings()),
        ("child_tuning_d", Hyperparameters { optimizer: OptimizerRule::Sgd, ..settings() }),
        ("child_tuning_f", Hyperparameters { precision: Precision::Bf16, ..settings() }),
    ] {
        let settings = Hyperparameters { max_gradient_norm: None, ..settings };
        let released = Hyperparameters { release_gradients: true, ..settings.clone() };
        assert_eq!(weights_after(text, &settings, 3), weights_after(text, &released, 3), "{text}");
    }
}

/// Memory runs out in the backward pass of a step's first tries: it goes on with smaller micro-batches, and nothing of the
/// tries is left.
#[test]
fn a_step_that_runs_out_of_memory_is_taken_again_in_smaller_parts() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let gradients = |text: &str, failures: usize, micro_batch: usize| {
        let mut classifier = classifier("bert_pair");
        let weight = classifier.parameters.find("bert.encoder.layer.0.output.dense.weight").unwrap();
        let mut left = failures;
        let _fault = GradientHook::register(classifier.parameters.leaf(weight), move |_| {
            if left == 0 {
                return Ok(());
            }
            left -= 1;
            Err(Error::Libtorch("DefaultCPUAllocator: can't allocate memory: you tried to allocate".into()))
        })
        .unwrap();
        let micro_batch = MicroBatch::Examples(micro_batch);
        let settings = Hyperparameters { epochs: 1.0, batch_size: 5, micro_batch, ..settings() };
        let mut sizes = Vec::new();
        let mut report = |event| {
            if let Event::MicroBatch(size) = event {
                sizes.push(size);
            }
        };
        let mut control = Control { interrupted: &AtomicBool::new(false), report: &mut report };
        let method = method(text);
        classifier.reset(3).unwrap();
        let outcome = train(&mut classifier, &data, None, method.as_ref(), &settings, 3, &mut control);
        (outcome.map(|_| classifier.parameters.gradients().unwrap().copy()), sizes)
    };
    for text in ["vanilla", "child_tuning_f"] {
        let (found, sizes) = gradients(text, 2, 5);
        assert_eq!(sizes, [2]);
        assert_eq!(found.unwrap(), gradients(text, 0, 2).0.unwrap(), "{text}");
        // One example at a time is the last resort.
        assert!(gradients(text, 9, 5).0.unwrap_err().is_out_of_memory());
    }
}

#[test]
fn layers_that_are_computed_again_give_the_same_bits() {
    for (text, precision) in [
        ("vanilla", Precision::Float32),
        ("child_tuning_f", Precision::Float32),
        ("child_tuning_d", Precision::Bf16),
    ] {
        let settings = Hyperparameters { precision, ..settings() };
        let checkpointed = Hyperparameters { gradient_checkpointing: true, ..settings.clone() };
        assert_eq!(weights_after(text, &settings, 3), weights_after(text, &checkpointed, 3), "{text}");
    }
}

#[test]
fn tokens_that_fill_a_batch_up_change_nothing() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let mut classifier = classifier("bert_pair");
    classifier.reset(3).unwrap();
    let numbers = [2, 0, 1];
    let lengths = numbers.map(|number| data.inputs[number].ids.len());
    let passed = |filled: bool| {
        let (batch, targets) = match filled {
            true => data.filled_batch(&numbers, BatchShape::of(&lengths, 40), Device::Cpu),
            false => data.batch(&numbers, 0, Device::Cpu),
        }
        .unwrap();
        let weights = classifier.parameters.compute_weights(Kind::Float).unwrap();
        let hooks = GradientHooks::collect(&classifier.parameters, &weights, |_| true, None).unwrap();
        let dropout = Dropout::new(3, Purpose::Dropout, 0, 0, Device::Cpu).unwrap();
        let logits = classifier.logits(&Pass::new(&weights, &batch, Some(dropout))).unwrap();
        loss(&logits, &targets, numbers.len()).unwrap().backward();
        hooks.end_step().unwrap();
        (logits.detach(), classifier.parameters.gradients().unwrap().copy())
    };
    let (plain, filled) = (passed(false), passed(true));
    assert_close("logits", &filled.0, &plain.0, ROUNDING, false);
    assert_close("gradients", &filled.1, &plain.1, ROUNDING, false);
}

#[test]
fn weights_outside_the_child_network_keep_every_bit() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let (adamw, sgd) = (OptimizerRule::Adamw, OptimizerRule::Sgd);
    for (text, optimizer, frozen) in [
        ("child_tuning_d: {p: 0.3}", adamw, true),
        (
            "child_tuning_d: {p: 0.3, mask: {threshold: per_tensor, scope: all}, clip: before_mask}",
            adamw,
            true,
        ),
        ("child_tuning_d: {p: 0.3, mask: {choose: lowest}}", adamw, true),
        ("child_tuning_d: {p: 0.3, decay_scope: all}", adamw, false),
        ("child_tuning_d: {p: 0.3}", sgd, true),
        ("child_tuning_d: {p: 0.3, decay_scope: all}", sgd, false),
    ] {
        // SGD at a rate that moves more than the last bit of a weight.
        let rate = if optimizer == sgd { 1.0 } else { 1e-3 };
        let settings = Hyperparameters { optimizer, learning_rate: rate, ..settings() };
        let mut classifier = classifier("bert_pair");
        let before = classifier.parameters.values_copy().unwrap();
        let trained = run(&mut classifier, &data, method(text).as_ref(), &settings, 5);
        let mask = trained.mask.unwrap();
        let child = mask.child().unwrap();
        let (mut outside, mut moved_outside, mut inside, mut moved_inside) = (0, 0, 0, 0);
        for tensor in child.tensors() {
            let values = |flat: &Tensor| {
                Vec::<f32>::try_from(part(&classifier.parameters, flat, &tensor.name).reshape([-1])).unwrap()
            };
            let (old, new) = (values(&before), values(classifier.parameters.values()));
            for ((old, new), bit) in old.iter().zip(&new).zip(child.bits(tensor)) {
                let moved = usize::from(old.to_bits() != new.to_bits());
                if bit {
                    (inside, moved_inside) = (inside + 1, moved_inside + moved);
                } else {
                    (outside, moved_outside) = (outside + 1, moved_outside + moved);
                }
            }
        }
        assert!(outside > inside && inside > 0, "{text}");
        assert_eq!(moved_outside == 0, frozen, "{text}: {moved_outside} of {outside} moved");
        assert!(moved_inside > inside * 9 / 10, "{text}: {moved_inside} of {inside} moved");
    }
}

#[test]
fn bf16_trains_to_nearly_the_same_place() {
    let expected = weights_after("child_tuning_d", &settings(), 3);
    let found =
        weights_after("child_tuning_d", &Hyperparameters { precision: Precision::Bf16, ..settings() }, 3);
    let mut start = classifier("bert_pair");
    start.reset(3).unwrap();
    let away = |from: &Tensor, to: &Tensor| (to - from).to_kind(Kind::Double).norm().double_value(&[]);
    let (apart, way) = (away(&found, &expected), away(start.parameters.values(), &expected));
    assert!(apart > 0.0 && apart < 0.3 * way, "{apart} of {way}");
}

#[test]
fn the_head_is_new_for_each_seed_and_the_body_is_the_checkpoint() {
    let folder = child_tuning::model::ModelFolder::open(&crate::fixture::path("bert_pair")).unwrap();
    let labels = child_tuning::model::Labels::Classes(vec!["no".into(), "yes".into()]);
    let mut classifier =
        Classifier::load(&folder, labels, child_tuning::model::HeadStart::Keep, tch::Device::Cpu).unwrap();
    assert_eq!(classifier.report.fresh, ["classifier.weight", "classifier.bias"]);
    let mut heads = Vec::new();
    for seed in [1, 2, 1] {
        classifier.reset(seed).unwrap();
        heads.push(part(&classifier.parameters, classifier.parameters.values(), "classifier.weight").copy());
    }
    assert_eq!(heads[0], heads[2]);
    assert_ne!(heads[0], heads[1]);
    let deviation = heads[0].std(false).double_value(&[]);
    assert!((0.012..0.028).contains(&deviation), "{deviation}");
    assert_eq!(heads[0].kind(), Kind::Float);
}

#[test]
fn a_frozen_encoder_keeps_every_bit_and_gives_the_same_logits() {
    let mut data = dataset(&tensors("bert_pair/reference.safetensors"));
    let mut classifier = classifier("bert_pair");
    classifier.reset(3).unwrap();
    let whole = predict(&classifier, &data.inputs, Precision::Float32, |_| Ok(())).unwrap();
    let features = frozen_features(&classifier, &data.inputs, Precision::Float32, |_| Ok(())).unwrap();
    data = data.with_features(features);
    let numbers: Vec<usize> = (0..data.len()).collect();
    let (batch, _) = data.batch(&numbers, 0, Device::Cpu).unwrap();
    let weights = classifier.parameters.compute_weights(Kind::Float).unwrap();
    let logits = tch::no_grad(|| classifier.logits(&Pass::new(&weights, &batch, None)).unwrap());
    assert_close("logits", &logits, &whole, 1e-6, true);

    let settings = Hyperparameters { freeze: Freeze::Encoder, learning_rate: 1e-2, ..settings() };
    for text in ["optimizer: adamw", "optimizer: sgd"] {
        let optimizer = if text.ends_with("sgd") { OptimizerRule::Sgd } else { OptimizerRule::Adamw };
        let before = classifier.parameters.values_copy().unwrap();
        let settings = Hyperparameters { optimizer, ..settings.clone() };
        let trained = run(&mut classifier, &data, method("vanilla").as_ref(), &settings, 3);
        let after = classifier.parameters.values_copy().unwrap();
        for (_, parameter) in classifier.parameters.iter() {
            let same = part(&classifier.parameters, &before, &parameter.name)
                == part(&classifier.parameters, &after, &parameter.name);
            assert_eq!(same, parameter.place != ParameterPlace::Head, "{text} {}", parameter.name);
        }
        // Three labels on 32 features.
        assert_eq!(trained.trainable, 3 * 33, "{text}");
    }
}
