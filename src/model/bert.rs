//! BERT (Devlin et al., 2019) with a classification or regression head.
//!
//! The arithmetic, the names and the places of dropout are those of transformers' `BertForSequenceClassification`.

use tch::Tensor;

use super::classifier::{Network, Sizes};
use super::config::ModelConfig;
use super::layers::Linear;
use super::parameter::ParameterPlace;
use super::params::ParameterTable;
use super::pass::{Pass, Rows};
use super::post_norm::{BERT_NAMES, Embeddings, LayerSettings, Layers};
use crate::error::Result;

/// A BERT encoder with pooler and head.
struct Bert {
    embeddings: Embeddings,
    layers: Layers,
    pooler: Linear,
    classifier: Linear,
    sizes: Sizes,
    classifier_dropout: f64,
}

/// Declares the parameters of a BERT and returns its network.
///
/// # Errors
/// Fails if the config lacks a size or asks for arithmetic that is not here.
pub fn build(config: &ModelConfig, outputs: i64, table: &mut ParameterTable) -> Result<Box<dyn Network>> {
    let settings = LayerSettings::read(config)?;
    let LayerSettings { sizes, epsilon, hidden_dropout, .. } = settings;
    let hidden = sizes.hidden;
    let entries = (&sizes, config.integer("max_position_embeddings")?);
    Ok(Box::new(Bert {
        embeddings: Embeddings::declare(table, "bert", entries, hidden, epsilon, hidden_dropout),
        layers: Layers::declare(table, "bert.encoder.layer", &BERT_NAMES, settings),
        pooler: Linear::declare(
            table,
            "bert.pooler.dense",
            [hidden, hidden],
            ParameterPlace::Pooler,
            Rows::Examples,
        ),
        classifier: Linear::declare(
            table,
            "classifier",
            [hidden, outputs],
            ParameterPlace::Head,
            Rows::Examples,
        ),
        sizes,
        classifier_dropout: config.dropout_or("classifier_dropout", hidden_dropout)?,
    }))
}

impl Network for Bert {
    fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        let embedded = self.embeddings.forward(pass, &pass.batch.positions)?;
        self.layers.forward(pass, embedded)
    }

    fn head(&self, pass: &Pass, features: &Tensor) -> Result<Tensor> {
        let pooled = self.pooler.forward(pass, features)?.f_tanh()?;
        self.classifier.forward(pass, &pass.dropout(&pooled, self.classifier_dropout, Rows::Examples)?)
    }

    fn output(&self) -> Linear {
        self.classifier
    }

    fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn architecture(&self) -> &'static str {
        "BertForSequenceClassification"
    }

    fn body_prefix(&self) -> &'static str {
        "bert."
    }
}
