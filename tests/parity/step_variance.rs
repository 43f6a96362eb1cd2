//! Theorem 1: steps of SGD have the mean and the variance that the paper derives.

use std::sync::atomic::AtomicBool;

use child_tuning::method::{MethodSpec, Preset};
use child_tuning::train::{Control, Hyperparameters, StepVariance, step_variance};

use crate::fixture::{classifier, dataset, tensors};
use crate::optimizer::hyperparameters;

/// Draws steps of four of the fixture's eleven examples.
fn measured(method: &str) -> StepVariance {
    let data = dataset(&tensors("fisher/reference.safetensors"));
    let method =
        serde_yaml::from_str::<MethodSpec>(method).unwrap().resolve(Preset::Paper).unwrap().remove(0);
    let mut classifier = classifier("fisher");
    let before = classifier.parameters.values_copy().unwrap();
    let interrupted = AtomicBool::new(false);
    let mut control = Control { interrupted: &interrupted, report: &mut |_| {} };
    let settings = Hyperparameters { batch_size: 4, learning_rate: 0.02, ..hyperparameters() };
    let found =
        step_variance(&mut classifier, &data, method.as_ref(), &settings, 3, 300, &mut control).unwrap();
    assert_eq!(classifier.parameters.values(), &before);
    assert_eq!((found.batch_size, found.examples, found.draws), (4, 11, 300));
    found
}

/// The seed is fixed, so that these bounds either hold or do not.
fn agrees(what: &str, found: &StepVariance) {
    assert!(
        (found.ratio.unwrap() - 1.0).abs() < 5.0 * found.standard_error_of_ratio.unwrap(),
        "{what}: {found:?}"
    );
    // Tight enough to see the theorem: without replacement the first term is 0.7 of what it is with.
    assert!(found.standard_error_of_ratio.unwrap() < 0.05, "{what}: {found:?}");
    assert!(found.mean_error_norm < 2.0 * found.expected_mean_error_norm, "{what}: {found:?}");
    assert!(found.mean_error_norm < 0.2 * found.predicted_mean_norm, "{what}: {found:?}");
    assert!(found.within_three_standard_errors.unwrap() > 0.98, "{what}: {found:?}");
}

#[test]
fn mean_and_variance_are_those_of_theorem_1() {
    let vanilla = measured("vanilla");
    let whole = measured("child_tuning_f: {p: 1}");
    assert_eq!(vanilla, whole);
    agrees("p = 1", &whole);

    let masked = measured("child_tuning_f: {p: 0.3}");
    agrees("p = 0.3", &masked);
    // The mean does not change, the variance becomes V/p + (1 − p) g²/p.
    assert!((masked.predicted_mean_norm / whole.predicted_mean_norm - 1.0).abs() < 1e-6);
    let expected = whole.predicted_variance / 0.3 + 0.7 / 0.3 * whole.predicted_mean_norm.powi(2);
    assert!((masked.predicted_variance / expected - 1.0).abs() < 1e-6, "{masked:?} {expected}");
}

#[test]
fn without_rescaling_and_in_a_scope_the_same_holds() {
    let found = measured(
        "child_tuning_f: {p: 0.3, rescale: false, mask: {scope: encoder_layers}, clip: before_mask}",
    );
    agrees("rescale: false", &found);
    assert!(found.weights < measured("vanilla").weights);
}

#[test]
fn fixed_masks_are_refused() {
    let data = dataset(&tensors("fisher/reference.safetensors"));
    let method =
        serde_yaml::from_str::<MethodSpec>("child_tuning_d").unwrap().resolve(Preset::Paper).unwrap();
    let interrupted = AtomicBool::new(false);
    let mut control = Control { interrupted: &interrupted, report: &mut |_| {} };
    let mut classifier = classifier("fisher");
    let refused =
        step_variance(&mut classifier, &data, method[0].as_ref(), &hyperparameters(), 3, 10, &mut control);
    assert!(refused.unwrap_err().to_string().contains("drawn at every step"));
}
