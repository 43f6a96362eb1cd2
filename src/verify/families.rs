//! Every family on a device against the same family on the CPU.

use tch::Device;

use super::agreement::{Pair, check_passes, classes};
use super::masks::check_fisher;
use super::random_model::family_config;
use super::{Checks, Shape};
use crate::error::Result;
use crate::model::FAMILIES;

/// Makes the checks for small models of all families but BERT, which has those of its own. Passes in float32 and bf16 go by
/// rectangles and by packed tokens, and Fisher information by every rule for a squared gradient.
pub(super) fn check(checks: &mut Checks, device: Device) -> Result<()> {
    for (family, _) in FAMILIES.iter().filter(|(family, _)| *family != "bert") {
        let config = family_config(family, Shape::TINY.vocabulary, 0.0);
        let mut pair = Pair::of(&config, Shape::TINY.vocabulary, classes(), device)?;
        let name = |about: &str| format!("{family}: {about}");
        // Of equal and of mixed lengths.
        check_passes(checks, &mut pair, &[0, 1, 2, 8, 9, 11, 14, 20], name)?;
        check_fisher(checks, &mut pair, &name)?;
    }
    Ok(())
}
