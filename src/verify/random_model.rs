//! Models with random weights and data of random tokens: time and arithmetic do not depend on what they mean.

use std::sync::Arc;

use crate::child::{BernoulliMask, ChildNetwork, Cut, GradientMask, MaskScope, Threshold, random_scores};
use crate::data::{Encoded, EncodedDataset, Targets};
use crate::error::{Error, Result};
use crate::method::{DecayScope, Prepared};
use crate::model::{Classifier, Labels, ModelConfig};
use crate::random::{Key, philox};
use serde_json::json;

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
        self.config_with_dropouts([dropout; 2], spread)
    }

    /// Returns the same with a dropout of rows, and one of attention.
    pub fn config_with_dropouts(&self, [rows, attention]: [f64; 2], spread: f64) -> ModelConfig {
        let config = json!({
            "model_type": "bert",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.hidden * 4,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "hidden_dropout_prob": rows,
            "attention_probs_dropout_prob": attention,
            "initializer_range": spread,
        });
        ModelConfig::from_values(config.as_object().cloned().unwrap_or_default())
    }
}

/// Returns the config of a small model of a family, with something of all that is particular to it, and with a dropout of rows and one
/// of attention, which in XLNet is that of rows.
pub fn family_config(family: &str, vocabulary: u32, [rows, attention]: [f64; 2]) -> ModelConfig {
    let common = json!({
        "model_type": family,
        "vocab_size": vocabulary,
        "pad_token_id": 1,
        "initializer_range": 0.1,
    });
    let of_bert = json!({
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_dropout_prob": rows,
        "attention_probs_dropout_prob": attention,
    });
    let own = match family {
        "distilbert" => vec![json!({
            "dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 96,
            "max_position_embeddings": 512,
            "dropout": rows,
            "attention_dropout": attention,
            "seq_classif_dropout": rows,
        })],
        "xlnet" => vec![json!({
            "d_model": 64,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 96,
            "dropout": rows,
            "summary_last_dropout": rows,
        })],
        "electra" => vec![of_bert, json!({"embedding_size": 48})],
        "deberta-v2" => vec![
            of_bert,
            json!({
                "embedding_size": 48,
                "relative_attention": true,
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 16,
                "share_att_key": true,
                "norm_rel_ebd": "layer_norm",
                "conv_kernel_size": 3,
            }),
        ],
        "modernbert" => vec![
            of_bert,
            json!({
                "local_attention": 16,
                "global_attn_every_n_layers": 2,
                "attention_dropout": attention,
                "embedding_dropout": rows,
                "mlp_dropout": rows,
                "classifier_dropout": rows,
            }),
        ],
        _ => vec![of_bert],
    };
    let parts = [common].into_iter().chain(own);
    ModelConfig::from_values(parts.filter_map(|part| part.as_object().cloned()).flatten().collect())
}

/// How many words of BERT's vocabulary of 30,522 the training data of RTE have.
pub const WORDS_OF_RTE: u32 = 13_865;
/// About as many examples as RTE has to train on, so that all its words occur.
pub const EXAMPLES_OF_RTE: usize = 2560;

/// Makes a data set with examples of the given lengths, from random tokens, with random targets. The tokens are of so many `words`,
/// evenly spread over the vocabulary.
pub fn random_data(lengths: &[usize], vocabulary: u32, words: u32, labels: &Labels) -> EncodedDataset {
    let number =
        |example: usize, position: usize| philox([position as u32, example as u32, 0, 0], Key([1, 2]))[0];
    let example = |(example, &length): (usize, &usize)| Encoded {
        ids: (0..length)
            .map(|position| u64::from(number(example, position) % words) * u64::from(vocabulary))
            .map(|spread| (spread / u64::from(words)) as u32)
            .collect(),
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
            let scores = random_scores(parameters.buffer_len(), SEED);
            let cut = Cut::highest(share, MaskScope::EncoderLayers, Threshold::Global);
            let child = ChildNetwork::from_scores(parameters, &scores, &cut)?;
            (Some(GradientMask::Fixed(Arc::new(child))), DecayScope::Child)
        }
        other => return Err(Error::configuration(format!("unknown method {other}"))),
    };
    Ok(Prepared { mask: mask.map(Arc::new), decay, ..Prepared::default() })
}
