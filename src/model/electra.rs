//! ELECTRA (Clark et al., 2020), its discriminator, with a classification or regression head.
//!
//! The arithmetic, the names and the places of dropout are those of transformers' `ElectraForSequenceClassification`.

use tch::Tensor;

use super::classifier::{Network, Sizes};
use super::config::ModelConfig;
use super::head::TwoLayerHead;
use super::layers::{Activation, Linear};
use super::parameter::ParameterPlace;
use super::params::ParameterTable;
use super::pass::{Pass, Rows};
use super::post_norm::{BERT_NAMES, Embeddings, LayerSettings, Layers};
use crate::error::Result;

/// An ELECTRA encoder and head.
struct Electra {
    embeddings: Embeddings,
    /// From the width of the embeddings to that of the layers, where they differ.
    projection: Option<Linear>,
    layers: Layers,
    head: TwoLayerHead,
    sizes: Sizes,
}

/// Declares the parameters of an ELECTRA and returns its network.
///
/// # Errors
/// Fails if the config lacks a size or asks for arithmetic that is not here.
pub fn build(config: &ModelConfig, outputs: i64, table: &mut ParameterTable) -> Result<Box<dyn Network>> {
    let settings = LayerSettings::read(config)?;
    let LayerSettings { sizes, epsilon, hidden_dropout, .. } = settings;
    let hidden = sizes.hidden;
    let width = config.integer("embedding_size")?;
    let entries = (&sizes, config.integer("max_position_embeddings")?);
    let embeddings = Embeddings::declare(table, "electra", entries, width, epsilon, hidden_dropout);
    let mut project = |width: i64| {
        let (name, place) = ("electra.embeddings_project", ParameterPlace::Embeddings);
        Linear::declare(table, name, [width, hidden], place, Rows::Tokens)
    };
    let projection = (width != hidden).then(|| project(width));
    Ok(Box::new(Electra {
        embeddings,
        projection,
        layers: Layers::declare(table, "electra.encoder.layer", &BERT_NAMES, settings),
        // Whatever the activation of the layers is.
        head: TwoLayerHead::declare(
            table,
            [hidden, outputs],
            Activation::Gelu,
            config.dropout_or("classifier_dropout", hidden_dropout)?,
        ),
        sizes,
    }))
}

impl Network for Electra {
    fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        let mut embedded = self.embeddings.forward(pass, &pass.batch.positions)?;
        if let Some(projection) = &self.projection {
            embedded = projection.forward(pass, &embedded)?;
        }
        self.layers.forward(pass, embedded)
    }

    fn head(&self, pass: &Pass, features: &Tensor) -> Result<Tensor> {
        self.head.forward(pass, features)
    }

    fn output(&self) -> Linear {
        self.head.output()
    }

    fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn architecture(&self) -> &'static str {
        "ElectraForSequenceClassification"
    }

    fn body_prefix(&self) -> &'static str {
        "electra."
    }
}
