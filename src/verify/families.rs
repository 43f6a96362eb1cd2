//! Every family on a device against the same family on the CPU.

use tch::Device;

use super::agreement::{Pair, check_dropout, check_passes, classes};
use super::masks::check_fisher;
use super::random_model::family_config;
use super::{Checks, Shape};
use crate::error::Result;
use crate::model::FAMILIES;

/// Returns all families but BERT, which has checks of its own.
pub(super) fn checked() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(family, _)| *family).filter(|family| *family != "bert")
}

/// Makes the checks for a small model of a family. Passes in float32 and bf16 go by rectangles and by packed tokens, and Fisher
/// information by every rule for a squared gradient.
pub(super) fn check(checks: &mut Checks, family: &str, device: Device) -> Result<()> {
    let mut pair = small_pair(family, [0.0; 2], device)?;
    let name = |about: &str| format!("{family}: {about}");
    // Of equal and of mixed lengths.
    check_passes(checks, &mut pair, &[0, 1, 2, 8, 9, 11, 14, 20], name)?;
    check_fisher(checks, &mut pair, &name)?;
    if family == "xlnet" && device.is_cuda() {
        let reason = "its attention has the same dropout, which libtorch draws on a GPU";
        checks.skip("passes", name("with dropout of rows"), reason);
        return Ok(());
    }
    check_dropout(checks, &small_pair(family, [0.3, 0.0], device)?, name)
}

fn small_pair(family: &str, dropouts: [f64; 2], device: Device) -> Result<Pair> {
    let config = family_config(family, Shape::TINY.vocabulary, dropouts);
    let mut pair = Pair::of(&config, Shape::TINY.vocabulary, classes(), device)?;
    // DistilBERT's head has a ReLU. One of few units that rounding takes to the other side of its kink would be more than all
    // else that is looked for; so all stand well on one side.
    for model in [&mut pair.reference, &mut pair.subject] {
        if let Some(bias) = model.parameters.find("pre_classifier.bias") {
            let ten = model.parameters.leaf(bias).f_detach()?.f_full_like(10.0)?;
            model.parameters.set(bias, &ten)?;
        }
    }
    Ok(pair)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::super::agreement::{SEED, on_cpu};
    use super::super::difference;
    use super::*;
    use crate::child::GradientHooks;
    use crate::model::{Dropout, Pass, loss};
    use crate::random::Purpose;

    /// The families whose batches are rounded up in training ([`EncodedDataset::rounded_batch`](crate::data::EncodedDataset::rounded_batch)).
    #[test]
    fn what_rounds_a_batch_up_changes_no_logit_and_no_gradient() {
        let mut checked = 0;
        for (family, _) in FAMILIES {
            let pair = small_pair(family, [0.1; 2], Device::Cpu).unwrap();
            let model = &pair.reference;
            if !model.own_shape().unwrap().reads_packed_tokens {
                continue;
            }
            checked += 1;
            let weights = model.parameters.compute_weights(Kind::Float).unwrap();
            let numbers = [0, 9, 11, 14, 20];
            let run = |is_rounded: bool, is_checkpointed: bool| {
                let (batch, targets) = match is_rounded {
                    true => pair.data.rounded_batch(&numbers, 3, Device::Cpu).unwrap(),
                    false => pair.data.batch(&numbers, 3, Device::Cpu).unwrap(),
                };
                assert_eq!(is_rounded, batch.tokens() % 16 == 0);
                let hooks = GradientHooks::collect(&model.parameters, &weights, |_| true, None).unwrap();
                let dropout = Dropout::new(SEED, Purpose::Dropout, 0, 3, Device::Cpu).unwrap();
                let mut pass = Pass::new(&weights, &batch, Some(dropout));
                if is_checkpointed {
                    pass = pass.checkpointed();
                }
                let logits = model.logits(&pass).unwrap();
                pass.backward(&loss(&logits, &targets, numbers.len()).unwrap()).unwrap();
                hooks.end_step().unwrap();
                (logits.detach(), on_cpu(model.parameters.gradients().unwrap()).unwrap())
            };
            let (logits, gradient) = run(false, false);
            for is_checkpointed in [false, true] {
                let (found, found_gradient) = run(true, is_checkpointed);
                assert!(difference(&found, &logits).unwrap() < 1e-5, "{family}");
                assert!(difference(&found_gradient, &gradient).unwrap() < 1e-5, "{family}");
            }
        }
        assert!(checked >= 4, "{checked} of seven families");
    }
}
