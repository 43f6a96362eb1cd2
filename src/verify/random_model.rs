//! Models with random weights and data of random tokens: time and arithmetic do not depend on what they mean.

use std::sync::Arc;

use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::child::{BernoulliMask, ChildNetwork, Cut, GradientMask, MaskScope, Threshold};
use crate::data::{Encoded, EncodedDataset, Targets};
use crate::error::{Error, Result};
use crate::method::{DecayScope, Prepared};
use crate::model::{Classifier, Labels, ModelConfig};
use crate::random::{Key, philox};

/// The share of the weights that the measured methods train.
pub(super) const SHARE: f64 = 0.3;
const SEED: u64 = 42;

/// The shape of a BERT.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// What it is called in tables.
    pub name: &'static str,
    /// Transformer layers.
    pub layers: i64,
    /// Hidden size; the feed-forward layer is four times as wide.
    pub hidden: i64,
    /// Attention heads.
    pub heads: i64,
    /// Entries of the token table.
    pub vocabulary: u32,
}

impl Shape {
    /// Seconds for everything.
    pub const TINY: Self = Self { name: "tiny", layers: 2, hidden: 64, heads: 4, vocabulary: 500 };
    /// Heads as wide as BERT's.
    pub const SMALL: Self = Self { name: "small", layers: 3, hidden: 256, heads: 4, vocabulary: 2000 };
    /// bert-base-uncased.
    pub const BERT_BASE: Self =
        Self { name: "BERT-base", layers: 12, hidden: 768, heads: 12, vocabulary: 30522 };
    /// bert-large-uncased.
    pub const BERT_LARGE: Self =
        Self { name: "BERT-large", layers: 24, hidden: 1024, heads: 16, vocabulary: 30522 };

    /// Returns the config of the shape. A spread of the weights above BERT's 0.02 makes attention differ between tokens
    /// before any training.
    pub fn config(&self, dropout: f64, spread: f64) -> ModelConfig {
        let config = json!({
            "model_type": "bert",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.hidden * 4,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "initializer_range": spread,
        });
        ModelConfig::from_values(config.as_object().cloned().unwrap_or_default())
    }
}

/// Makes a data set with examples of the given lengths, from random tokens, with random targets.
pub fn random_data(lengths: &[usize], vocabulary: u32, labels: &Labels) -> EncodedDataset {
    let number =
        |example: usize, position: usize| philox([position as u32, example as u32, 0, 0], Key([1, 2]))[0];
    let example = |(example, &length): (usize, &usize)| Encoded {
        ids: (0..length).map(|position| number(example, position) % vocabulary).collect(),
        token_types: (0..length).map(|position| u32::from(2 * position > length)).collect(),
    };
    let inputs: Vec<Encoded> = lengths.iter().enumerate().map(example).collect();
    // A position that no token has.
    let target = |example: usize| number(example, usize::from(u16::MAX));
    let targets = match labels {
        Labels::Classes(names) => Targets::Classes(
            (0..inputs.len()).map(|example| i64::from(target(example)) % names.len() as i64).collect(),
        ),
        Labels::Score => {
            Targets::Scores((0..inputs.len()).map(|example| target(example) as f32 / 1e9).collect())
        }
    };
    EncodedDataset { inputs, targets, features: None }
}

/// Prepares a method for the measurement of its steps: D's mask is cut by random scores, without a Fisher pass. `share` is
/// that of the child network.
///
/// # Errors
/// Fails if the method is none of `vanilla`, `child_tuning_f` and `child_tuning_d`.
pub fn measured_method(method: &str, share: f64, model: &Classifier) -> Result<Prepared> {
    let parameters = &model.parameters;
    let (mask, decay) = match method {
        "vanilla" => (None, DecayScope::All),
        "child_tuning_f" => {
            let mask = BernoulliMask::new(MaskScope::All, share, true, SEED);
            (Some(GradientMask::Bernoulli(mask)), DecayScope::All)
        }
        "child_tuning_d" => {
            let scores = Tensor::f_rand([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu))?;
            let cut = Cut::highest(share, MaskScope::EncoderLayers, Threshold::Global);
            let child = ChildNetwork::from_scores(parameters, &scores, &cut)?;
            (Some(GradientMask::Fixed(child)), DecayScope::Child)
        }
        other => return Err(Error::configuration(format!("unknown method {other}"))),
    };
    Ok(Prepared { mask: mask.map(Arc::new), decay, ..Prepared::default() })
}
