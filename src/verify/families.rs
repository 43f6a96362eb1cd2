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
