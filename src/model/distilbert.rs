//! DistilBERT (Sanh et al., 2019) with a classification or regression head.
//!
//! The arithmetic, the names and the places of dropout are those of transformers' `DistilBertForSequenceClassification`.
//! Token types, which its tokenizer makes, are not used.

use tch::Tensor;

use super::classifier::{Network, Sizes};
use super::config::ModelConfig;
use super::layers::Linear;
use super::parameter::ParameterPlace;
use super::params::ParameterTable;
use super::pass::{Pass, Rows};
use super::post_norm::{Embeddings, LayerNames, LayerSettings, Layers};
use crate::error::Result;

/// The epsilon of every normalisation, which no config sets.
const EPSILON: f64 = 1e-12;

const NAMES: LayerNames = LayerNames {
    attention: ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"],
    attention_norm: "sa_layer_norm",
    feed_forward: ["ffn.lin1", "ffn.lin2"],
    output_norm: "output_layer_norm",
};

/// A DistilBERT encoder and head.
struct DistilBert {
    embeddings: Embeddings,
    layers: Layers,
    pre_classifier: Linear,
    classifier: Linear,
    sizes: Sizes,
    classifier_dropout: f64,
}

/// Declares the parameters of a DistilBERT and returns its network.
///
/// # Errors
/// Fails if the config lacks a size or asks for arithmetic that is not here.
pub fn build(config: &ModelConfig, outputs: i64, table: &mut ParameterTable) -> Result<Box<dyn Network>> {
    config.require_multiple("dim", "n_heads")?;
    let positions = config.integer("max_position_embeddings")?;
    let hidden = config.integer("dim")?;
    let sizes = Sizes {
        hidden,
        intermediate: config.integer("hidden_dim")?,
        heads: config.integer("n_heads")?,
        vocabulary: config.integer("vocab_size")?,
        positions: Some(positions),
        token_types: None,
    };
    let settings = LayerSettings {
        sizes,
        layers: config.layers("n_layers")?,
        activation: config.activation_or("activation", "gelu")?,
        epsilon: EPSILON,
        hidden_dropout: config.dropout_or("dropout", 0.1)?,
        // Of the attention's output there is none.
        attention_output_dropout: 0.0,
        attention_dropout: config.dropout_or("attention_dropout", 0.1)?,
    };
    let dropout = settings.hidden_dropout;
    let embeddings = Embeddings::declare(table, "distilbert", (&sizes, positions), hidden, EPSILON, dropout);
    let layers = Layers::declare(table, "distilbert.transformer.layer", &NAMES, settings);
    let mut linear = |name: &str, sizes: [i64; 2]| {
        Linear::declare(table, name, sizes, ParameterPlace::Head, Rows::Examples)
    };
    Ok(Box::new(DistilBert {
        embeddings,
        layers,
        pre_classifier: linear("pre_classifier", [hidden, hidden]),
        classifier: linear("classifier", [hidden, outputs]),
        sizes,
        classifier_dropout: config.dropout_or("seq_classif_dropout", 0.2)?,
    }))
}

impl Network for DistilBert {
    fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        let embedded = self.embeddings.forward(pass, &pass.batch.positions)?;
        self.layers.forward(pass, embedded)
    }

    fn head(&self, pass: &Pass, features: &Tensor) -> Result<Tensor> {
        let hidden = self.pre_classifier.forward(pass, features)?.f_relu()?;
        self.classifier.forward(pass, &pass.dropout(&hidden, self.classifier_dropout, Rows::Examples)?)
    }

    fn output(&self) -> Linear {
        self.classifier
    }

    fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn architecture(&self) -> &'static str {
        "DistilBertForSequenceClassification"
    }

    fn body_prefix(&self) -> &'static str {
        "distilbert."
    }
}
