//! Child-Tuning_F, task-free: a fresh Bernoulli mask at every step.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{ClipOrder, DecayScope, MaskKind, Method, Preparation, Prepared, Preset};
use crate::child::{BernoulliMask, GradientMask, MaskScope};
use crate::error::Result;
use crate::values::{OneOrMany, Share, axis, yaml_name};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    p: Option<OneOrMany<Share>>,
    rescale: Option<bool>,
    mask: Option<MaskOptions>,
    clip: Option<ClipOrder>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MaskOptions {
    scope: Option<MaskScope>,
}

/// Child-Tuning_F.
struct ChildTuningF {
    p: f64,
    rescale: bool,
    scope: MaskScope,
    clip: ClipOrder,
}

impl MethodOptions for Options {
    fn resolve(&self, preset: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let clip = match preset {
            Preset::Paper => ClipOrder::AfterMask,
            Preset::Official => ClipOrder::BeforeMask,
        };
        let method = |p: &Share| -> Arc<dyn Method> {
            Arc::new(ChildTuningF {
                p: p.0,
                rescale: self.rescale.unwrap_or(true),
                scope: self.mask.as_ref().and_then(|mask| mask.scope).unwrap_or(MaskScope::All),
                clip: self.clip.unwrap_or(clip),
            })
        };
        Ok(axis(&self.p, Share(0.3)).iter().map(method).collect())
    }
}

impl Method for ChildTuningF {
    fn name(&self) -> &str {
        "child_tuning_f"
    }

    fn options(&self) -> String {
        format!(
            "p={} rescale={} scope={} clip={}",
            self.p,
            self.rescale,
            yaml_name(&self.scope),
            yaml_name(&self.clip)
        )
    }

    fn is_child_tuning(&self) -> bool {
        true
    }

    fn mask(&self) -> Option<MaskKind> {
        Some(MaskKind::Bernoulli)
    }

    fn prepare(&self, preparation: &mut Preparation) -> Result<Prepared> {
        let mask = BernoulliMask::new(self.scope, self.p, self.rescale, preparation.seed);
        Ok(Prepared {
            mask: Some(Arc::new(GradientMask::Bernoulli(mask))),
            clip: self.clip,
            // No weight is outside the child network for longer than a step.
            decay: DecayScope::All,
            ..Prepared::default()
        })
    }
}
