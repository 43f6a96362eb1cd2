//! The encoder of BERT and of the families that kept its arithmetic: sums of embeddings, then Transformer layers that
//! normalise after each residual sum.

use serde_json::json;
use tch::Tensor;

use super::classifier::Sizes;
use super::config::ModelConfig;
use super::layer_norm::LayerNorm;
use super::layers::{Activation, Embedding, Linear, branches};
use super::parameter::ParameterPlace;
use super::params::ParameterTable;
use super::pass::{Pass, Rows};
use crate::error::Result;

/// The embeddings of words, positions and, in most families, token types; summed, normalised, and dropped out.
pub(super) struct Embeddings {
    words: Embedding,
    positions: Embedding,
    token_types: Option<Embedding>,
    norm: LayerNorm,
    dropout: f64,
}

impl Embeddings {
    /// Declares the tables below `{prefix}.embeddings`, `width` wide, with entries for the words and token types of the sizes,
    /// and for so many positions.
    pub fn declare(
        table: &mut ParameterTable,
        prefix: &str,
        (sizes, positions): (&Sizes, i64),
        width: i64,
        epsilon: f64,
        dropout: f64,
    ) -> Self {
        let name = |part: &str| format!("{prefix}.embeddings.{part}");
        let mut declare = |part: &str, entries: i64| Embedding::declare(table, &name(part), entries, width);
        Self {
            words: declare("word_embeddings", sizes.vocabulary),
            positions: declare("position_embeddings", positions),
            token_types: sizes.token_types.map(|entries| declare("token_type_embeddings", entries)),
            norm: LayerNorm::declare(table, &name("LayerNorm"), width, epsilon, ParameterPlace::Embeddings),
            dropout,
        }
    }

    /// Embeds the packed tokens, which have the given positions: `[tokens, width]`.
    ///
    /// # Errors
    /// Fails if an index is out of range.
    pub fn forward(&self, pass: &Pass, positions: &Tensor) -> Result<Tensor> {
        let mut sum = pass.words(&self.words)?;
        if let Some(token_types) = &self.token_types {
            sum = sum.f_add(&token_types.forward(pass, &pass.batch.token_types)?)?;
        }
        sum = sum.f_add(&self.positions.forward(pass, positions)?)?;
        pass.dropout(&self.norm.forward(pass, &sum)?, self.dropout, Rows::Tokens)
    }
}

/// Entries of the table of token types where a config names none, as in transformers.
const TOKEN_TYPES: i64 = 2;

/// The names of a layer's parts below the layer's own.
pub(super) struct LayerNames {
    /// Query, key, value, and the projection of what attention returns.
    pub attention: [&'static str; 4],
    pub attention_norm: &'static str,
    /// The two matrices of the feed-forward layer.
    pub feed_forward: [&'static str; 2],
    pub output_norm: &'static str,
}

/// The names of a layer's parts in BERT, RoBERTa and ELECTRA.
pub(super) const BERT_NAMES: LayerNames = LayerNames {
    attention: [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
    ],
    attention_norm: "attention.output.LayerNorm",
    feed_forward: ["intermediate.dense", "output.dense"],
    output_norm: "output.LayerNorm",
};

/// What a config says of the layers.
#[derive(Clone, Copy)]
pub(super) struct LayerSettings {
    pub sizes: Sizes,
    pub layers: i64,
    pub activation: Activation,
    pub epsilon: f64,
    /// Of the embeddings, and of what the feed-forward layer returns.
    pub hidden_dropout: f64,
    /// Of what attention returns.
    pub attention_output_dropout: f64,
    /// Of the attention probabilities.
    pub attention_dropout: f64,
}

impl LayerSettings {
    /// Reads them as BERT, RoBERTa and ELECTRA name them.
    ///
    /// # Errors
    /// Fails if the config lacks a size or asks for arithmetic that is not here.
    pub fn read(config: &ModelConfig) -> Result<Self> {
        config.require("position_embedding_type", &json!("absolute"))?;
        config.require("is_decoder", &json!(false))?;
        config.require("add_cross_attention", &json!(false))?;
        config.require_multiple("hidden_size", "num_attention_heads")?;
        let hidden_dropout = config.dropout_or("hidden_dropout_prob", 0.1)?;
        Ok(Self {
            sizes: Sizes {
                hidden: config.integer("hidden_size")?,
                intermediate: config.integer("intermediate_size")?,
                heads: config.integer("num_attention_heads")?,
                vocabulary: config.integer("vocab_size")?,
                positions: Some(config.integer("max_position_embeddings")?),
                token_types: Some(config.integer_if_any("type_vocab_size")?.unwrap_or(TOKEN_TYPES)),
            },
            layers: config.layers("num_hidden_layers")?,
            activation: config.activation_or("hidden_act", "gelu")?,
            epsilon: config.magnitude_or("layer_norm_eps", 1e-12)?,
            hidden_dropout,
            attention_output_dropout: hidden_dropout,
            attention_dropout: config.dropout_or("attention_probs_dropout_prob", 0.1)?,
        })
    }
}

/// The Transformer layers. Since a head reads the first token of each example, the last layer computes no other: only its
/// keys and values are of all tokens.
pub(super) struct Layers {
    layers: Vec<Layer>,
    settings: LayerSettings,
}

/// One Transformer layer.
pub(super) struct Layer {
    pub query: Linear,
    pub key: Linear,
    value: Linear,
    attention_output: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
    /// What it returns.
    pub rows: Rows,
}

impl Layers {
    /// Declares the layers as `{prefix}.0`, `{prefix}.1` and so on.
    pub fn declare(
        table: &mut ParameterTable,
        prefix: &str,
        names: &LayerNames,
        settings: LayerSettings,
    ) -> Self {
        let layer = |number| {
            let rows = if number + 1 == settings.layers { Rows::Examples } else { Rows::Tokens };
            Layer::declare(table, &format!("{prefix}.{number}"), (number, rows), names, &settings)
        };
        Self { layers: (0..settings.layers).map(layer).collect(), settings }
    }

    /// Runs the layers, each as a segment of the pass: `[tokens, hidden]` to what the first tokens have become,
    /// `[examples, hidden]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn forward<'a>(&'a self, pass: &Pass<'a>, embedded: Tensor) -> Result<Tensor> {
        let run = |states: Tensor, layer: &'a Layer| {
            pass.layer(&states, |pass, states| layer.forward(pass, &self.settings, states))
        };
        self.layers.iter().try_fold(embedded, run)
    }

    /// Iterates over the layers, for families whose attention differs.
    pub fn iter(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter()
    }

    /// Returns what the config says of them.
    pub fn settings(&self) -> &LayerSettings {
        &self.settings
    }
}

impl Layer {
    fn declare(
        table: &mut ParameterTable,
        prefix: &str,
        (number, rows): (i64, Rows),
        names: &LayerNames,
        settings: &LayerSettings,
    ) -> Self {
        let place = ParameterPlace::EncoderLayer(number as usize);
        let Sizes { hidden, intermediate, .. } = settings.sizes;
        let name = |part: &str| format!("{prefix}.{part}");
        let mut linear =
            |part: &str, sizes: [i64; 2], rows: Rows| Linear::declare(table, &name(part), sizes, place, rows);
        let [query, key, value, attention_output] = names.attention;
        let query = linear(query, [hidden, hidden], rows);
        let [key, value] = [key, value].map(|part| linear(part, [hidden, hidden], Rows::Tokens));
        let attention_output = linear(attention_output, [hidden, hidden], rows);
        let [expand, reduce] = names.feed_forward;
        let (expand, reduce) =
            (linear(expand, [hidden, intermediate], rows), linear(reduce, [intermediate, hidden], rows));
        let mut norm =
            |part: &str| LayerNorm::declare(table, &name(part), hidden, settings.epsilon, place).over(rows);
        Self {
            query,
            key,
            value,
            attention_output,
            attention_norm: norm(names.attention_norm),
            intermediate: expand,
            output: reduce,
            output_norm: norm(names.output_norm),
            rows,
        }
    }

    /// Runs the layer: `[tokens, hidden]` to `[rows, hidden]`.
    fn forward(&self, pass: &Pass, settings: &LayerSettings, states: &Tensor) -> Result<Tensor> {
        let (asked, [query, key, value]) = self.projections(pass, states)?;
        let heads = settings.sizes.heads;
        let context = pass.attention([&query, &key, &value], self.rows, heads, settings.attention_dropout)?;
        self.after_attention(pass, settings, &asked, &context)
    }

    /// Returns the states of what the layer is asked for, `[rows, hidden]`; their queries, and keys and values of all states,
    /// `[tokens, hidden]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn projections(&self, pass: &Pass, states: &Tensor) -> Result<(Tensor, [Tensor; 3])> {
        if self.rows == Rows::Tokens {
            let (projections, states) = branches(pass, [&self.query, &self.key, &self.value], states)?;
            return Ok((states, projections));
        }
        let ([query], asked) = branches(pass, [&self.query], &pass.states_of(self.rows, states)?)?;
        let ([key, value], _) = branches(pass, [&self.key, &self.value], states)?;
        Ok((asked, [query, key, value]))
    }

    /// Runs what follows attention, given what it returned for the states: all are `[rows, hidden]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn after_attention(
        &self,
        pass: &Pass,
        settings: &LayerSettings,
        states: &Tensor,
        context: &Tensor,
    ) -> Result<Tensor> {
        let LayerSettings { activation, attention_output_dropout, hidden_dropout, .. } = *settings;
        let attended = (&self.attention_output, context);
        let states = self.attention_norm.of_sum(pass, attended, attention_output_dropout, states)?;
        let [expanded, states] = self.intermediate.activated(pass, &states, activation)?;
        self.output_norm.of_sum(pass, (&self.output, &expanded), hidden_dropout, &states)
    }
}
