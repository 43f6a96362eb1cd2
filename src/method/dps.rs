//! DPS (Zhang et al., 2022): stages in which all weights train and the squares of their gradients are added up take turns with
//! stages in which only the weights with the highest sums train.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{ClipOrder, DecayScope, Method, Parts, Preparation, Prepared, Preset};
use crate::child::{AdaptiveMask, GradientMask, MaskScope};
use crate::error::{Error, Result};
use crate::values::{OneOrMany, Share};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    p: Option<OneOrMany<Share>>,
    update_ratio: Option<OneOrMany<Share>>,
    dropout: Option<bool>,
}

/// DPS, in its form "dense".
struct Dps {
    p: f64,
    /// The steps of a stage as a share of those of the run.
    update_ratio: f64,
    dropout: bool,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let shares = self.p.as_ref().map_or(&[Share(0.7)][..], |p| &p.0);
        let ratios = self.update_ratio.as_ref().map_or(&[Share(0.05)][..], |ratios| &ratios.0);
        let dropout = self.dropout.unwrap_or(false);
        let method = |p: &Share, ratio: &Share| Dps { p: p.0, update_ratio: ratio.0, dropout };
        let grid = shares.iter().flat_map(|p| ratios.iter().map(move |ratio| method(p, ratio)));
        Ok(grid.map(|method| Arc::new(method) as Arc<dyn Method>).collect())
    }
}

impl Method for Dps {
    fn name(&self) -> &str {
        "dps"
    }

    fn options(&self) -> String {
        format!("p={} update_ratio={} dropout={}", self.p, self.update_ratio, self.dropout)
    }

    fn has_mask(&self) -> bool {
        true
    }

    fn has_adaptive_mask(&self) -> bool {
        true
    }

    fn parts(&self) -> Parts {
        Parts { dropout: self.dropout, ..Parts::default() }
    }

    fn prepare(&self, preparation: &mut Preparation) -> Result<Prepared> {
        // Cut off, as in the released code.
        let stage = (preparation.steps as f64 * self.update_ratio) as u64;
        if stage == 0 {
            return Err(Error::configuration(format!(
                "dps: `update_ratio` {} of the {} steps of this run is less than one step",
                self.update_ratio, preparation.steps
            )));
        }
        let parameters = &preparation.classifier.parameters;
        let mask = AdaptiveMask::new(parameters, MaskScope::AllLinear, self.p, stage)?;
        Ok(Prepared {
            mask: Some(Arc::new(GradientMask::Adaptive(mask))),
            clip: ClipOrder::AfterMask,
            // No weight is outside the child network for longer than a stage.
            decay: DecayScope::All,
            ..Prepared::default()
        })
    }
}
