//! Small trainings with further passes and noise: what must be equal bit for bit, what adds up, and what must not move.

use std::sync::atomic::AtomicBool;

use child_tuning::data::{LabelMap, TaskCard};
use child_tuning::model::{Classifier, Labels, Pass, Precision};
use child_tuning::train::{Checkpoint, Control, Event, Hyperparameters, MicroBatch, Scored, predict, train};
use tch::{Kind, Tensor};

use crate::fixture::{assert_close, classifier, dataset, part, tensors};
use crate::training::{ROUNDING, method, run, settings};

/// With noise that is far above rounding.
const R_DROP: &str = "r_drop: {alpha: 2}";
const R3F: &str = "r3f: {lambda: 2, epsilon: 0.02}";
const R4F: &str = "r4f: {lambda: 2, epsilon: 0.02}";
const SMART: &str = "smart: {alpha: 2, step_size: 0.1, noise: 0.01, radius: 0.05}";
const HYPE: &str = "hype: {scale: 0.05}";
const ALL: [&str; 5] = [R_DROP, R3F, R4F, SMART, HYPE];

fn trained(folder: &str, text: &str, settings: &Hyperparameters, seed: u64) -> Classifier {
    let data = dataset(&tensors(&format!("{folder}/reference.safetensors")));
    let mut classifier = classifier(folder);
    run(&mut classifier, &data, method(text).as_ref(), settings, seed);
    classifier
}

fn weights_after(text: &str, settings: &Hyperparameters, seed: u64) -> Tensor {
    trained("bert_pair", text, settings, seed).parameters.values_copy().unwrap()
}

#[test]
fn strength_zero_is_plain_fine_tuning_bit_for_bit() {
    let settings = Hyperparameters { weight_decay: 0.01, ..settings() };
    let vanilla = weights_after("vanilla", &settings, 7);
    for text in [
        "r_drop: {alpha: 0}",
        "r3f: {lambda: 0, epsilon: 0.02}",
        "smart: {alpha: 0, noise: 0.01}",
        "hype: {scale: 0}",
        "l2_sp: {alpha: 0, beta: 0}",
    ] {
        assert_eq!(weights_after(text, &settings, 7), vanilla, "{text}");
    }
    // Which takes the place of weight decay.
    let without_decay = Hyperparameters { weight_decay: 0.0, ..settings.clone() };
    let found = weights_after("prior_weight_decay: {strength: 0}", &settings, 7);
    assert_eq!(found, weights_after("vanilla", &without_decay, 7));
    assert_ne!(found, vanilla);
}

#[test]
fn no_term_for_scores_is_plain_fine_tuning_bit_for_bit() {
    let weights =
        |text: &str| trained("bert_regression", text, &settings(), 7).parameters.values_copy().unwrap();
    let vanilla = weights("vanilla");
    assert_eq!(weights(R3F), vanilla);
    assert_ne!(weights("r3f: {lambda: 2, epsilon: 0.02, regression: mse}"), vanilla);
}

#[test]
fn the_same_seed_gives_the_same_bits_and_another_seed_does_not() {
    let vanilla = weights_after("vanilla", &settings(), 1);
    for text in ALL {
        let first = weights_after(text, &settings(), 1);
        assert_eq!(first, weights_after(text, &settings(), 1), "{text}");
        assert_ne!(first, weights_after(text, &settings(), 2), "{text}");
        assert_ne!(first, vanilla, "{text}");
    }
}

/// Gradients of one step over five examples.
fn gradients(text: &str, micro_batch: usize) -> Tensor {
    let micro_batch = MicroBatch::Examples(micro_batch);
    let settings = Hyperparameters { epochs: 1.0, batch_size: 5, micro_batch, ..settings() };
    trained("bert_pair", text, &settings, 3).parameters.gradients().unwrap().copy()
}

#[test]
fn micro_batches_with_dropout_add_up_to_the_whole_batch() {
    for text in ALL {
        // SMART's ascent enlarges what is rounded.
        let tolerance = if text == SMART { 10.0 * ROUNDING } else { ROUNDING };
        let expected = gradients(text, 5);
        for micro_batch in [1, 2, 3] {
            let found = gradients(text, micro_batch);
            assert_close(&format!("{text} {micro_batch}"), &found, &expected, tolerance, true);
        }
    }
}

#[test]
fn layers_that_are_computed_again_give_the_same_bits() {
    for precision in [Precision::Float32, Precision::Bf16] {
        for text in ALL {
            let settings = Hyperparameters { precision, ..settings() };
            let checkpointed = Hyperparameters { gradient_checkpointing: true, ..settings.clone() };
            let expected = weights_after(text, &settings, 3);
            assert_eq!(weights_after(text, &checkpointed, 3), expected, "{text} {precision:?}");
        }
    }
}

#[test]
fn bf16_trains_to_nearly_the_same_place() {
    let bf16 = Hyperparameters { precision: Precision::Bf16, ..settings() };
    let mut start = classifier("bert_pair");
    start.reset(3).unwrap();
    let start = start.parameters.values();
    for text in ALL {
        let (half, float) = (weights_after(text, &bf16, 3), weights_after(text, &settings(), 3));
        let away = |from: &Tensor, to: &Tensor| (to - from).to_kind(Kind::Double).norm().double_value(&[]);
        let (apart, way) = (away(&half, &float), away(start, &float));
        assert!(apart > 0.0 && apart < 0.3 * way, "{text}: {apart} of {way}");
    }
}

#[test]
fn the_order_of_composed_methods_makes_no_difference() {
    for mut parts in [
        vec!["r3f: {epsilon: 0.02}", "child_tuning_f: {}"],
        vec!["hype: {scale: 0.05}", "r_drop: {}", "child_tuning_d: {}"],
        vec!["r4f: {}", "smart: {}", "l2_sp: {}"],
    ] {
        let composed = |parts: &[&str]| weights_after(&format!("[{}]", parts.join(", ")), &settings(), 3);
        let expected = composed(&parts);
        parts.reverse();
        assert_eq!(composed(&parts), expected, "{parts:?}");
        for part in &parts {
            assert_ne!(weights_after(part, &settings(), 3), expected, "{part} of {parts:?}");
        }
    }
}

#[test]
fn a_fixed_mask_holds_whatever_is_composed_with_it() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    for others in [
        "hype: {scale: 0.05}, r_drop: {}",
        "r3f: {}, smart: {}, l2_sp: {}",
        "r4f: {}",
        "recadam: {t0: 3, gamma: 50}",
        "prior_weight_decay: {strength: 50}",
    ] {
        let text = format!("[{others}, child_tuning_d: {{p: 0.3, mask: {{scope: all}}}}]");
        let mut classifier = classifier("bert_pair");
        let before = classifier.parameters.values_copy().unwrap();
        let mask = run(&mut classifier, &data, method(&text).as_ref(), &settings(), 5).mask.unwrap();
        let (mut inside, mut moved_inside) = (0, 0);
        // The head of r4f is divided by a number at the end.
        let tensors = mask.child().unwrap().tensors();
        for tensor in tensors.iter().filter(|own| !(text.contains("r4f") && own.name == "classifier.weight"))
        {
            let values = |flat: &Tensor| {
                Vec::<f32>::try_from(part(&classifier.parameters, flat, &tensor.name).reshape([-1])).unwrap()
            };
            let (old, new) = (values(&before), values(classifier.parameters.values()));
            for ((old, new), bit) in old.iter().zip(&new).zip(mask.child().unwrap().bits(tensor)) {
                let moved = old.to_bits() != new.to_bits();
                assert!(bit || !moved, "{text} {}", tensor.name);
                inside += usize::from(bit);
                moved_inside += usize::from(bit && moved);
            }
        }
        assert!(moved_inside > inside * 9 / 10, "{text}: {moved_inside} of {inside} moved");
    }
}

#[test]
fn evaluation_sees_no_noise_and_leaves_no_trace() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let (card, labels) = (TaskCard::builtin("mnli").unwrap(), LabelMap::identity(3));
    let dev = Scored { data: &data, card: &card, labels: &labels };
    for text in ALL {
        let found = trained("bert_pair", text, &settings(), 3);
        let (batch, _) = data.batch(&[0, 1, 2, 3, 4], 0, tch::Device::Cpu).unwrap();
        let weights = found.parameters.compute_weights(Kind::Float).unwrap();
        let plain = tch::no_grad(|| found.logits(&Pass::new(&weights, &batch, None)).unwrap());
        let logits = || predict(&found, &data.inputs, Precision::Float32, |_| Ok(())).unwrap();
        assert_close(text, &logits(), &plain, ROUNDING, true);
        assert_eq!(logits(), logits(), "{text}");
        let mut scored = classifier("bert_pair");
        scored.reset(3).unwrap();
        let mut control = Control { interrupted: &AtomicBool::new(false), report: &mut |_| {} };
        let method = method(text);
        train(&mut scored, &data, Some(dev), method.as_ref(), &settings(), 3, &mut control).unwrap();
        assert_eq!(scored.parameters.values(), found.parameters.values(), "{text}");
    }
}

/// Of equal scores that of the first epoch is the best, whose singular vectors are not those of later steps.
#[test]
fn the_best_weights_are_those_that_were_scored() {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let (card, labels) = (TaskCard::builtin("mnli").unwrap(), LabelMap::identity(3));
    let dev = Scored { data: &data, card: &card, labels: &labels };
    let best = |patience: usize| {
        let settings = Hyperparameters {
            checkpoint: Checkpoint::Best,
            early_stopping: Some(patience),
            learning_rate: 1e-5,
            ..settings()
        };
        let mut scored = classifier("bert_pair");
        scored.reset(3).unwrap();
        let mut epochs = 0;
        let mut report = |event| {
            if let Event::Epoch { epoch, .. } = event {
                epochs = epoch;
            }
        };
        let mut control = Control { interrupted: &AtomicBool::new(false), report: &mut report };
        let method = method(R4F);
        let trained =
            train(&mut scored, &data, Some(dev), method.as_ref(), &settings, 3, &mut control).unwrap();
        assert_eq!((trained.step, epochs), (3, 1 + patience));
        scored.parameters.values_copy().unwrap()
    };
    assert_eq!(best(1), best(2));
}

#[test]
fn the_head_of_r4f_is_kept_with_a_largest_singular_value_of_one() {
    let largest = |classifier: &Classifier| {
        let weight = part(&classifier.parameters, classifier.parameters.values(), "classifier.weight");
        weight.svd(true, false).1.max().double_value(&[])
    };
    let settings = Hyperparameters { learning_rate: 1e-4, ..settings() };
    let found = trained("bert_pair", "r4f: {lambda: 0}", &settings, 3);
    assert_eq!(*found.labels(), *classifier("bert_pair").labels());
    assert!(matches!(found.labels(), Labels::Classes(names) if names.len() == 3));
    // As near as power iterations come in so many steps.
    assert!((largest(&found) - 1.0).abs() < 0.01, "{}", largest(&found));
    assert!((largest(&classifier("bert_pair")) - 1.0).abs() > 0.05);
}

#[test]
fn methods_say_how_many_passes_they_take() {
    for (text, expected) in [(R_DROP, 1), (R3F, 1), (R4F, 1), (SMART, 2), (HYPE, 0), ("r3f: {lambda: 0}", 0)]
    {
        let passes: usize =
            method(text).parts().penalties.iter().map(|penalty| penalty.further_passes(false)).sum();
        assert_eq!(passes, expected, "{text}");
    }
}
