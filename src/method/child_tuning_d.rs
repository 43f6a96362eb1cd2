//! Child-Tuning_D, task-driven: the weights with the highest Fisher information train (section 3.2 of the paper).

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{ClipOrder, DecayScope, Method, Preparation, Prepared, Preset};
use crate::child::{
    ChildNetwork, Estimator, FisherBatch, FisherOptions, GradientMask, MaskScope, Threshold,
    fisher_information,
};
use crate::error::{Error, Result};
use crate::model::Dropout;
use crate::random::{self, Key, Purpose};
use crate::values::{OneOrMany, Positive, Share, yaml_name};

/// The options as typed in YAML.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    p: Option<OneOrMany<Share>>,
    fisher: Option<FisherSpec>,
    mask: Option<MaskSpec>,
    decay_scope: Option<DecayScope>,
    clip: Option<ClipOrder>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct FisherSpec {
    estimator: Option<Estimator>,
    dropout: Option<bool>,
    clip: Option<Positive>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MaskSpec {
    scope: Option<MaskScope>,
    threshold: Option<Threshold>,
}

/// Child-Tuning_D.
struct ChildTuningD {
    p: f64,
    fisher: FisherOptions,
    scope: MaskScope,
    threshold: Threshold,
    decay: DecayScope,
    clip: ClipOrder,
}

impl MethodOptions for Options {
    fn resolve(&self, preset: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let paper = preset == Preset::Paper;
        let (fisher, mask) = (self.fisher.clone().unwrap_or_default(), self.mask.clone().unwrap_or_default());
        let estimator =
            fisher.estimator.unwrap_or(if paper { Estimator::PerExample } else { Estimator::Batch });
        let clip = fisher.clip.map(|clip| clip.0);
        if clip.is_some() && estimator == Estimator::PerExample {
            return Err(Error::configuration(
                "child_tuning_d: `fisher.clip` clips the gradient of a batch and needs `fisher.estimator: batch`",
            ));
        }
        let fisher = FisherOptions {
            estimator,
            dropout: fisher.dropout.unwrap_or(!paper),
            clip: clip.or((!paper && estimator == Estimator::Batch).then_some(1.0)),
        };
        let method = |p: &Share| -> Arc<dyn Method> {
            Arc::new(ChildTuningD {
                p: p.0,
                fisher,
                scope: mask.scope.unwrap_or(if paper {
                    MaskScope::Backbone
                } else {
                    MaskScope::EncoderLayers
                }),
                threshold: mask.threshold.unwrap_or(if paper {
                    Threshold::Global
                } else {
                    Threshold::Percentile
                }),
                decay: self.decay_scope.unwrap_or(if paper { DecayScope::Child } else { DecayScope::All }),
                clip: self.clip.unwrap_or(if paper { ClipOrder::AfterMask } else { ClipOrder::BeforeMask }),
            })
        };
        Ok(self.p.as_ref().map_or(&[Share(0.3)][..], |p| &p.0).iter().map(method).collect())
    }
}

impl Method for ChildTuningD {
    fn name(&self) -> &'static str {
        "child_tuning_d"
    }

    fn options(&self) -> String {
        let clip = self.fisher.clip.map_or(String::new(), |clip| format!(" fisher.clip={clip}"));
        format!(
            "p={} fisher={} fisher.dropout={}{clip} scope={} threshold={} decay={} clip={}",
            self.p,
            yaml_name(&self.fisher.estimator),
            self.fisher.dropout,
            yaml_name(&self.scope),
            yaml_name(&self.threshold),
            yaml_name(&self.decay),
            yaml_name(&self.clip)
        )
    }

    fn is_child_tuning(&self) -> bool {
        true
    }

    fn passes_over_data(&self) -> bool {
        true
    }

    fn prepare(&self, preparation: &mut Preparation) -> Result<Prepared> {
        let Preparation { classifier, data, seed, batch_size, shuffled, progress } = preparation;
        let device = classifier.parameters.device();
        let mut order = match shuffled {
            true => random::permutation(data.len(), Key::derive(*seed, Purpose::FisherOrder, 0)),
            false => (0..data.len()).collect(),
        };
        // The batch estimate depends on which examples share a batch, and the released code shuffles them. The estimate by
        // example does not, and goes faster when examples of like length stand together.
        if self.fisher.estimator == Estimator::PerExample {
            order.sort_by_key(|&number| data.inputs[number].ids.len());
        }
        let batches = order.chunks(*batch_size).enumerate().map(|(number, examples)| {
            let (batch, targets) = data.batch(examples, 0, device)?;
            let dropout = self
                .fisher
                .dropout
                .then(|| Dropout::new(*seed, Purpose::FisherDropout, number as u64, device));
            Ok(FisherBatch { batch, targets, dropout })
        });
        let information = fisher_information(classifier, batches, &self.fisher, self.scope, progress)?;
        let child = ChildNetwork::from_scores(
            &classifier.parameters,
            &information,
            self.p,
            self.scope,
            self.threshold,
        )?;
        Ok(Prepared { mask: Some(Arc::new(GradientMask::Fixed(child))), clip: self.clip, decay: self.decay })
    }
}
