//! BERT (Devlin et al., 2019) with a classification or regression head.
//!
//! The arithmetic, the names and the places of dropout are those of transformers' `BertForSequenceClassification`.

use serde_json::json;
use tch::Tensor;

use super::classifier::Network;
use super::config::ModelConfig;
use super::layer_norm::LayerNorm;
use super::layers::{Activation, Embedding, Linear, Pass, Rows};
use super::params::{ParameterPlace, ParameterTable};
use crate::error::Result;

/// A BERT encoder with pooler and head.
struct Bert {
    word_embeddings: Embedding,
    position_embeddings: Embedding,
    token_type_embeddings: Embedding,
    embedding_norm: LayerNorm,
    layers: Vec<Layer>,
    pooler: Linear,
    classifier: Linear,
    heads: i64,
    activation: Activation,
    hidden_dropout: f64,
    attention_dropout: f64,
    classifier_dropout: f64,
}

/// One Transformer layer.
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

/// Declares the parameters of a BERT and returns its network.
///
/// # Errors
/// Fails if the config lacks a size or asks for arithmetic that is not here.
pub fn build(config: &ModelConfig, outputs: i64, table: &mut ParameterTable) -> Result<Box<dyn Network>> {
    config.require("position_embedding_type", &json!("absolute"))?;
    config.require("is_decoder", &json!(false))?;
    config.require("add_cross_attention", &json!(false))?;
    let hidden = config.integer("hidden_size")?;
    let heads = config.integer("num_attention_heads")?;
    if hidden % heads != 0 {
        return Err(
            config.error(format!("`hidden_size` {hidden} is no multiple of `num_attention_heads` {heads}"))
        );
    }
    let intermediate = config.integer("intermediate_size")?;
    let epsilon = config.number_or("layer_norm_eps", 1e-12)?;
    let hidden_dropout = config.dropout_or("hidden_dropout_prob", 0.1)?;

    let embeddings = ParameterPlace::Embeddings;
    let embedding = |table: &mut ParameterTable, name: &str, entries: i64| {
        Embedding::declare(table, &format!("bert.embeddings.{name}"), entries, hidden)
    };
    let word_embeddings = embedding(table, "word_embeddings", config.integer("vocab_size")?);
    let position_embeddings =
        embedding(table, "position_embeddings", config.integer("max_position_embeddings")?);
    let token_type_embeddings = embedding(table, "token_type_embeddings", config.integer("type_vocab_size")?);
    let embedding_norm = LayerNorm::declare(table, "bert.embeddings.LayerNorm", hidden, epsilon, embeddings);

    let layer = |table: &mut ParameterTable, number: i64| {
        let place = ParameterPlace::EncoderLayer(number as usize);
        let name = |part: &str| format!("bert.encoder.layer.{number}.{part}");
        let mut linear =
            |part: &str, sizes: [i64; 2]| Linear::declare(table, &name(part), sizes, place, Rows::Tokens);
        Layer {
            query: linear("attention.self.query", [hidden, hidden]),
            key: linear("attention.self.key", [hidden, hidden]),
            value: linear("attention.self.value", [hidden, hidden]),
            attention_output: linear("attention.output.dense", [hidden, hidden]),
            intermediate: linear("intermediate.dense", [hidden, intermediate]),
            output: linear("output.dense", [intermediate, hidden]),
            attention_norm: LayerNorm::declare(
                table,
                &name("attention.output.LayerNorm"),
                hidden,
                epsilon,
                place,
            ),
            output_norm: LayerNorm::declare(table, &name("output.LayerNorm"), hidden, epsilon, place),
        }
    };
    let layers = (0..config.integer("num_hidden_layers")?).map(|number| layer(table, number)).collect();
    let pooler =
        Linear::declare(table, "bert.pooler.dense", [hidden, hidden], ParameterPlace::Pooler, Rows::Examples);
    let classifier =
        Linear::declare(table, "classifier", [hidden, outputs], ParameterPlace::Head, Rows::Examples);
    Ok(Box::new(Bert {
        word_embeddings,
        position_embeddings,
        token_type_embeddings,
        embedding_norm,
        layers,
        pooler,
        classifier,
        heads,
        activation: Activation::parse(config.text_or("hidden_act", "gelu")?)?,
        hidden_dropout,
        attention_dropout: config.dropout_or("attention_probs_dropout_prob", 0.1)?,
        classifier_dropout: config.dropout_or("classifier_dropout", hidden_dropout)?,
    }))
}

impl Network for Bert {
    fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        let mut states = self.embed(pass)?;
        for layer in &self.layers {
            states = pass.segment(&states, |pass, states| self.layer(pass, layer, states))?;
        }
        let first = states.f_index_select(0, &pass.batch.first_tokens)?;
        Ok(self.pooler.forward(pass, &first)?.f_tanh()?)
    }

    fn head(&self, pass: &Pass, features: &Tensor) -> Result<Tensor> {
        self.classifier.forward(pass, &pass.dropout(features, self.classifier_dropout, Rows::Examples)?)
    }

    fn output(&self) -> Linear {
        self.classifier
    }

    fn architecture(&self) -> &'static str {
        "BertForSequenceClassification"
    }

    fn body_prefix(&self) -> &'static str {
        "bert."
    }
}

impl Bert {
    /// Embeds the packed tokens: `[tokens, hidden]`.
    fn embed(&self, pass: &Pass) -> Result<Tensor> {
        let words = self.word_embeddings.forward(pass, &pass.batch.input_ids)?;
        let token_types = self.token_type_embeddings.forward(pass, &pass.batch.token_types)?;
        let positions = self.position_embeddings.forward(pass, &pass.batch.positions)?;
        let sum = words.f_add(&token_types)?.f_add(&positions)?;
        pass.dropout(&self.embedding_norm.forward(pass, &sum)?, self.hidden_dropout, Rows::Tokens)
    }

    /// Runs one Transformer layer: `[tokens, hidden]` to the same.
    fn layer(&self, pass: &Pass, layer: &Layer, states: &Tensor) -> Result<Tensor> {
        let [query, key, value] =
            [&layer.query, &layer.key, &layer.value].map(|linear| linear.forward(pass, states));
        let context = pass.attention(&query?, &key?, &value?, self.heads, self.attention_dropout)?;
        let attended = layer.attention_output.forward(pass, &context)?;
        let attended = pass.dropout(&attended, self.hidden_dropout, Rows::Tokens)?.f_add(states)?;
        let states = layer.attention_norm.forward(pass, &attended)?;

        let expanded = self.activation.forward(&layer.intermediate.forward(pass, &states)?)?;
        let output = layer.output.forward(pass, &expanded)?;
        let output = pass.dropout(&output, self.hidden_dropout, Rows::Tokens)?.f_add(&states)?;
        layer.output_norm.forward(pass, &output)
    }
}
