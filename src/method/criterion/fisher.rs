//! Fisher information of the training data: the options of its pass, and the examples it takes.

use serde::Deserialize;

use super::{Criterion, Preparation, Scores};
use crate::child::{Estimator, FisherBatch, FisherOptions, MaskScope, fisher_information};
use crate::data::Order;
use crate::error::{Error, Result};
use crate::method::Preset;
use crate::model::{Dropout, Precision};
use crate::random::{self, Key, Purpose};
use crate::values::{Count, Positive, typed, yaml_name};

/// The options as typed in YAML, under `fisher`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FisherSpec {
    estimator: Option<Estimator>,
    dropout: Option<bool>,
    /// Null does not clip.
    #[serde(default, deserialize_with = "typed")]
    clip: Option<Option<Positive>>,
    precision: Option<Precision>,
    examples: Option<Count>,
}

impl FisherSpec {
    /// Settles the options.
    ///
    /// # Errors
    /// Fails if they contradict each other.
    pub fn resolve(&self, preset: Preset) -> Result<Fisher> {
        let paper = preset == Preset::Paper;
        let estimator =
            self.estimator.unwrap_or(if paper { Estimator::PerExample } else { Estimator::Batch });
        let clip = self.clip.map(|clip| clip.map(|clip| clip.0));
        if clip.flatten().is_some() && estimator != Estimator::Batch {
            return Err(Error::configuration(
                "child_tuning_d: `fisher.clip` clips the gradient of a batch and needs `fisher.estimator: batch`",
            ));
        }
        Ok(Fisher {
            estimator,
            dropout: self.dropout.unwrap_or(!paper),
            clip: clip.unwrap_or((!paper && estimator == Estimator::Batch).then_some(1.0)),
            precision: self.precision,
            examples: self.examples.map(|count| count.0),
        })
    }
}

/// The Fisher information of a weight, with all options settled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fisher {
    /// What is squared and averaged.
    pub estimator: Estimator,
    /// Whether examples are seen with dropout.
    pub dropout: bool,
    /// Largest norm of a tensor's gradient before it is squared.
    pub clip: Option<f64>,
    /// The number type of the passes; that of the run, where none is typed.
    pub precision: Option<Precision>,
    /// How many examples are drawn; all, where none is typed or there are no more.
    pub examples: Option<usize>,
}

impl Criterion for Fisher {
    /// Those options that came later stand there only where they are typed.
    fn text(&self) -> String {
        let mut text = format!("fisher={} fisher.dropout={}", yaml_name(&self.estimator), self.dropout);
        let further = [
            ("clip", self.clip.map(|clip| clip.to_string())),
            ("precision", self.precision.map(|precision| yaml_name(&precision))),
            ("examples", self.examples.map(|examples| examples.to_string())),
        ];
        for (key, value) in further {
            text.extend(value.map(|value| format!(" fisher.{key}={value}")));
        }
        text
    }

    fn examples(&self, available: usize) -> usize {
        self.examples.map_or(available, |examples| examples.min(available))
    }

    fn scores(&self, preparation: &mut Preparation, scope: MaskScope) -> Result<Scores> {
        let Preparation { classifier, data, seed, batch_size, micro_batch, precision, order, host, .. } =
            preparation;
        let device = classifier.parameters.device();
        let of_batches = self.estimator == Estimator::Batch;
        let examples = self.examples(data.len());
        let mut order = match order {
            Order::Shuffled => random::permutation(data.len(), Key::derive(*seed, Purpose::FisherOrder, 0)),
            Order::Sequential => (0..data.len()).collect(),
        };
        if examples < data.len() {
            let mut drawn = random::permutation(data.len(), Key::derive(*seed, Purpose::FisherExamples, 0));
            drawn.truncate(examples);
            let mut taken = vec![false; data.len()];
            drawn.into_iter().for_each(|number| taken[number] = true);
            order.retain(|&number| taken[number]);
        }
        // The batch estimate depends on which examples share a batch, and the released code shuffles them. The other
        // estimates do not, and go faster when examples of like length stand together.
        if !of_batches {
            order.sort_by_key(|&number| data.inputs[number].ids.len());
        }
        // Where results do not depend on who shares a batch, one has the size of those of training; copies of examples take
        // memory as examples do.
        let together = if of_batches || self.dropout { *batch_size } else { *micro_batch };
        let together = (together / self.estimator.copies(classifier.labels())).max(1);
        let batches = order.chunks(together).enumerate().map(|(number, examples)| {
            let (batch, targets) = data.batch(examples, 0, device)?;
            let dropout = || Dropout::new(*seed, Purpose::FisherDropout, number as u64, 0, device);
            let dropout = self.dropout.then(dropout).transpose()?;
            Ok(FisherBatch { batch, targets, dropout })
        });
        let options = FisherOptions {
            estimator: self.estimator,
            precision: self.precision.unwrap_or(*precision),
            clip: self.clip,
            spread: examples < data.len() && !of_batches,
        };
        let information =
            fisher_information(classifier, batches, &options, scope, |examples| host.progress(examples))?;
        Ok(Scores { values: information.values, spread: information.spread })
    }
}
