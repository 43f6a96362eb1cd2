//! Child networks that gradients choose anew in training: what is equal bit for bit, and what moves.

use child_tuning::child::GradientMask;
use child_tuning::model::{Classifier, ParameterKind};
use child_tuning::train::{Hyperparameters, MicroBatch, OptimizerRule, Trained, Trainer, prepare};
use tch::{Device, Kind, Tensor};

use crate::fixture::{classifier, dataset, tensors};
use crate::training::{self, control, method, run};

/// With the dropout of the model, where the method leaves it on.
fn settings() -> Hyperparameters {
    Hyperparameters { weight_decay: 0.01, ..training::settings() }
}

fn trained(text: &str, settings: &Hyperparameters, seed: u64) -> (Tensor, Trained) {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let mut classifier = classifier("bert_pair");
    let trained = run(&mut classifier, &data, method(text).as_ref(), settings, seed);
    (classifier.parameters.values_copy().unwrap(), trained)
}

#[test]
fn with_p_of_one_it_is_vanilla_bit_for_bit() {
    for optimizer in [OptimizerRule::Adamw, OptimizerRule::Sgd] {
        let settings = Hyperparameters { optimizer, ..settings() };
        let (vanilla, _) = trained("vanilla", &settings, 7);
        for form in ["dense", "mix"] {
            let text = format!("dps: {{form: {form}, p: 1, update_ratio: 0.2, dropout: true}}");
            let (found, trained) = trained(&text, &settings, 7);
            assert_eq!(found, vanilla, "{text} {optimizer:?}");
            assert_eq!(trained.mask.unwrap().share(), 1.0);
        }
    }
}

#[test]
fn a_seed_gives_the_same_bits_for_any_number_of_threads_and_another_seed_does_not() {
    let threads = |threads: usize, text: &str, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| trained(text, &settings(), seed).0)
    };
    for text in [
        "dps: {update_ratio: 0.2}",
        "dps: {form: mix, update_ratio: 0.2}",
        "[dps: {update_ratio: 0.2, dropout: true}, r_drop]",
        "[dps: {update_ratio: 0.2}, l2_sp]",
        "[dps: {update_ratio: 0.2}, recadam: {t0: 5, gamma: 50}, layer_wise_rates]",
        "[dps: {update_ratio: 0.2}, top_layers: {k: 1}]",
    ] {
        let first = threads(1, text, 1);
        assert_eq!(first, threads(3, text, 1), "{text}");
        assert_ne!(first, threads(1, text, 2), "{text}");
    }
}

#[test]
fn its_parts_leave_their_mark() {
    let text = "dps: {update_ratio: 0.2}";
    let (found, dps) = trained(text, &settings(), 1);
    let share = dps.mask.as_ref().unwrap().share();
    assert!((0.7..0.701).contains(&share), "{share}");
    assert!(dps.mask.unwrap().child().is_none(), "moments stay dense");
    for other in [
        "vanilla",
        "dps: {update_ratio: 0.2, dropout: true}",
        "dps: {update_ratio: 0.25}",
        "dps: {update_ratio: 0.2, p: 0.5}",
        "dps: {update_ratio: 0.2, form: mix}",
        "[dps: {update_ratio: 0.2}, l2_sp: {alpha: 0.3}]",
    ] {
        assert_ne!(found, trained(other, &settings(), 1).0, "{other}");
    }
}

/// Takes ten steps over the same examples, in stages of two; shows each step's mask and the values before and after it.
fn each_step(
    text: &str,
    settings: &Hyperparameters,
    mut look: impl FnMut(usize, &GradientMask, &Classifier, [&Tensor; 2]),
) {
    let data = dataset(&tensors("bert_pair/reference.safetensors"));
    let settings = Hyperparameters { epochs: 10.0, batch_size: data.len(), ..settings.clone() };
    let (mut classifier, table) = (classifier("bert_pair"), classifier("bert_pair"));
    classifier.reset(3).unwrap();
    let prepared = control(|control| {
        prepare(&mut classifier, &data, method(text).as_ref(), &settings, 3, control).unwrap()
    });
    let mask = prepared.mask.clone().unwrap();
    let mut trainer = Trainer::new(&mut classifier, &data, &settings, prepared, 3).unwrap();
    let examples: Vec<usize> = (0..data.len()).collect();
    for step in 0..10 {
        let before = trainer.parameters().values_copy().unwrap();
        let _ = trainer.step(&examples).unwrap();
        let after = trainer.parameters().values_copy().unwrap();
        look(step, &mask, &table, [&before, &after]);
    }
}

/// Counts the weights of matrices outside the child network that stay and that move, and checks that all else moves.
fn count_outside(text: &str, settings: &Hyperparameters) -> (i64, i64) {
    let (mut still, mut moved) = (0, 0);
    each_step(text, settings, |step, mask, classifier, [before, after]| {
        let GradientMask::Adaptive(mask) = mask else { panic!("there is no adaptive mask") };
        for (id, parameter) in classifier.parameters.iter() {
            let of = |flat: &Tensor| classifier.parameters.part(flat, id).unwrap();
            let moves = of(before).not_equal_tensor(&of(after));
            let count = |which: &Tensor| which.sum(Kind::Int64).int64_value(&[]);
            let members = mask.members(parameter, Device::Cpu).unwrap();
            assert_eq!(members.is_some(), step / 2 % 2 == 1, "step {step}");
            match members {
                Some(members) if parameter.kind == ParameterKind::Weight => {
                    assert!(
                        count(&moves.logical_and(&members)) * 10 > count(&members) * 9,
                        "{}",
                        parameter.name
                    );
                    moved += count(&moves.logical_and(&members.logical_not()));
                    still +=
                        count(&members.logical_not()) - count(&moves.logical_and(&members.logical_not()));
                }
                _ => {
                    assert!(members.is_none_or(|members| members.all().int64_value(&[]) == 1));
                    // The biases of keys have no gradient but for rounding.
                    let moves = count(&moves) > 0 || parameter.name.ends_with("key.bias");
                    assert!(moves, "{} step {step}", parameter.name);
                }
            }
        }
    });
    (still, moved)
}

#[test]
fn outside_the_child_network_sgd_moves_nothing_and_adam_goes_on_by_its_moments() {
    let micro_batch = MicroBatch::Examples(2);
    let sgd = Hyperparameters {
        weight_decay: 0.0,
        optimizer: OptimizerRule::Sgd,
        learning_rate: 0.1,
        ..settings()
    };
    for text in [
        "dps: {update_ratio: 0.2}",
        "dps: {update_ratio: 0.2, form: mix}",
        // The mask is on what the pull adds, too.
        "[dps: {update_ratio: 0.2}, l2_sp: {alpha: 0.1}]",
    ] {
        let (still, moved) = count_outside(text, &Hyperparameters { micro_batch, ..sgd.clone() });
        assert!(still > 10_000 && moved == 0, "{text}: {still} {moved}");
    }
    let adam = Hyperparameters { weight_decay: 0.0, micro_batch, ..settings() };
    let (still, moved) = count_outside("dps: {update_ratio: 0.2}", &adam);
    assert!(moved > 10 * still, "{still} {moved}");
}

#[test]
fn stages_have_a_step_at_least() {
    let values = |ratio: f64| trained(&format!("dps: {{update_ratio: {ratio}}}"), &settings(), 3).0;
    // Of twelve steps 0.6, 1.02 and 2.04.
    assert_eq!(values(0.05), values(0.085));
    assert_ne!(values(0.05), values(0.17));
}
