//! Trainings with each method on a device against the same on the CPU.

use std::sync::atomic::AtomicBool;

use tch::{Device, Tensor};

use super::agreement::{Pair, SEED, classes, on_cpu, settings};
use super::{Checks, Shape, difference};
use crate::data::EncodedDataset;
use crate::error::{Error, Result};
use crate::method::{MethodSpec, Preset};
use crate::model::Classifier;
use crate::train::{Control, Hyperparameters, train};

/// Methods without random numbers in training: the same on any device but for rounding.
const EXACT: &[&str] = &[
    "l2_sp: {alpha: 0.3}",
    "prior_weight_decay: {strength: 50}",
    "recadam: {k: 0.5, t0: 5, gamma: 50}",
    "layer_wise_rates: {decay: 0.7}",
    "reinitialised_layers",
    "top_layers: {k: 1}",
    "bitfit",
    "lora",
    "r_drop",
    "magnitude_mask: {p: 0.3}",
    "magnitude_mask: {p: 0.3, clip: before_mask}",
    "dps: {update_ratio: 0.2}",
    "[l2_sp: {alpha: 0.3}, magnitude_mask: {p: 0.3}]",
];

/// Methods whose random numbers are another device's own, or whose scores may round to another mask there: the same seed must give
/// the same training.
const REPEATED: &[&str] = &[
    "child_tuning_f: {p: 0.3}",
    "child_tuning_d: {p: 0.3}",
    "fish_mask: {p: 0.3}",
    "sift: {p: 0.3}",
    "lt_sft: {p: 0.3}",
    "r3f: {epsilon: 0.02}",
    "r4f: {epsilon: 0.02}",
    "smart: {step_size: 0.1, noise: 0.01, radius: 0.05}",
    "hype: {scale: 0.05}",
    "hype: {scale: 0.05, noise: uniform}",
    "mixout: {q: 0.3}",
    "mixout: {q: 0.3, mask: weight}",
    "dps: {form: mix, update_ratio: 0.2}",
];

/// Makes the checks, with a small model without dropout.
pub(super) fn check(checks: &mut Checks, device: Device) -> Result<()> {
    let Pair { mut reference, mut subject, data } = Pair::new(&Shape::TINY, classes(), device)?;
    let settings = Hyperparameters { epochs: 1.0, max_gradient_norm: Some(1.0), ..settings(8) };
    let trained = |text: &str, model: &mut Classifier| change(text, model, &data, &settings);
    for text in EXACT {
        let expected = trained(text, &mut reference)?;
        checks.at_most("methods", format!("{text}: change of all weights in 10 steps"), 1e-2, || {
            difference(&trained(text, &mut subject)?, &expected)
        });
    }
    for text in REPEATED {
        let vanilla = trained("vanilla", &mut subject)?;
        checks.same("methods", format!("{text}: the same seed, the same weights after 10 steps"), || {
            let first = trained(text, &mut subject)?;
            Ok(first.f_equal(&trained(text, &mut subject)?)? && !first.f_equal(&vanilla)?)
        });
    }
    Ok(())
}

/// Trains an epoch; returns how the weights that the model is scored with changed, on the CPU.
fn change(
    text: &str,
    model: &mut Classifier,
    data: &EncodedDataset,
    settings: &Hyperparameters,
) -> Result<Tensor> {
    let spec: MethodSpec =
        serde_yaml::from_str(text).map_err(|error| Error::configuration(error.to_string()))?;
    let method = spec.resolve(Preset::Paper)?.swap_remove(0);
    model.reset(SEED)?;
    let before = on_cpu(model.parameters.values())?;
    let interrupted = AtomicBool::new(false);
    let mut control = Control { interrupted: &interrupted, report: &mut |_| {} };
    train(model, data, None, method.as_ref(), settings, SEED, &mut control)?;
    let after = on_cpu(model.parameters.values())?;
    model.reset(SEED)?;
    Ok(after.f_sub(&before)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::method::METHODS;

    #[test]
    fn every_method_is_checked() {
        for name in METHODS.iter().filter(|&&name| name != "vanilla") {
            let is_it = |text: &&str| text.split(':').next() == Some(name);
            assert!(EXACT.iter().chain(REPEATED).any(is_it), "{name}");
        }
    }
}
