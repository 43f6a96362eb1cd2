//! XLNet (Yang et al., 2019) with a classification or regression head.
//!
//! The arithmetic, the names and the places of dropout are those of transformers' `XLNetForSequenceClassification` for an
//! example alone. In a batch its `first` and `mean` summaries see the padding before shorter examples, and `attn_type: uni`
//! fails on the mask; here no example depends on its batch. There are no memories of earlier texts, so what a config says of
//! them (`mem_len`, `reuse_len`, `use_mems_eval`, `use_mems_train`) changes nothing; `untie_r` does not either, as the
//! biases of each layer are stored.

use std::rc::Rc;

use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::classifier::{Network, Sizes};
use super::config::ModelConfig;
use super::layer_norm::LayerNorm;
use super::layers::{Activation, Embedding, Linear};
use super::parameter::{ParameterKind, ParameterPlace};
use super::params::ParameterTable;
use super::pass::{Pass, Rows};
use super::xlnet_attention::{Asked, AttentionSettings, Pairs, RelativeAttention, Visible};
use crate::data::PackedBatch;
use crate::error::Result;
use crate::libtorch::upload;

/// An XLNet encoder and head.
struct XlNet {
    words: Embedding,
    layers: Vec<Layer>,
    attention: AttentionSettings,
    dropout: f64,
    summary: Summary,
    summary_projection: Option<Linear>,
    summary_activation: Option<Activation>,
    /// Before the projection, and after the activation.
    summary_dropout: [f64; 2],
    classifier: Linear,
    sizes: Sizes,
}

/// The tokens that stand for an example.
#[derive(Clone, Copy)]
enum Summary {
    First,
    Last,
    Mean,
}

/// One Transformer layer.
struct Layer {
    attention: RelativeAttention,
    attention_norm: LayerNorm,
    expand: Linear,
    reduce: Linear,
    output_norm: LayerNorm,
    activation: Activation,
    dropout: f64,
    /// What it returns.
    rows: Rows,
}

/// Declares the parameters of an XLNet and returns its network.
///
/// # Errors
/// Fails if the config lacks a size or asks for arithmetic that is not here.
pub fn build(config: &ModelConfig, outputs: i64, table: &mut ParameterTable) -> Result<Box<dyn Network>> {
    let sizes = sizes(config)?;
    let hidden = sizes.hidden;
    let epsilon = config.magnitude_or("layer_norm_eps", 1e-12)?;
    let dropout = config.dropout_or("dropout", 0.1)?;
    let summary = summary(config)?;
    let attention = attention_settings(config, &sizes, dropout, summary)?;
    let activation = config.activation_or("ff_activation", "gelu")?;
    let words = Embedding::declare(table, "transformer.word_embedding", sizes.vocabulary, hidden);
    // The word of targets in pretraining: part of the model, but of no classification.
    let place = ParameterPlace::Embeddings;
    table.declare("transformer.mask_emb", &[1, 1, hidden], ParameterKind::Unused, place);
    let layers = match config.integer_if_any("num_hidden_layers")? {
        Some(_) => config.layers("num_hidden_layers")?,
        None => config.layers("n_layer")?,
    };
    let layers = (0..layers).map(|number| {
        let rows = if number + 1 == layers { attention.rows_of_last_layer() } else { Rows::Tokens };
        let place = ParameterPlace::EncoderLayer(number as usize);
        let name = |part: &str| format!("transformer.layer.{number}.{part}");
        let attention = RelativeAttention::declare(table, &name("rel_attn"), place, rows, attention);
        let mut norm = |part: &str| LayerNorm::declare(table, &name(part), hidden, epsilon, place).over(rows);
        let (attention_norm, output_norm) = (norm("rel_attn.layer_norm"), norm("ff.layer_norm"));
        let mut linear =
            |part: &str, sizes: [i64; 2]| Linear::declare(table, &name(part), sizes, place, rows);
        Layer {
            attention,
            attention_norm,
            expand: linear("ff.layer_1", [hidden, sizes.intermediate]),
            reduce: linear("ff.layer_2", [sizes.intermediate, hidden]),
            output_norm,
            activation,
            dropout,
            rows,
        }
    });
    let layers = layers.collect();
    let has_projection = config.boolean_or("summary_use_proj", true)?;
    if has_projection {
        config.require("summary_proj_to_labels", &json!(false))?;
    }
    let mut linear = |name: &str, sizes: [i64; 2]| {
        Linear::declare(table, name, sizes, ParameterPlace::Head, Rows::Examples)
    };
    Ok(Box::new(XlNet {
        words,
        layers,
        attention,
        dropout,
        summary,
        summary_projection: has_projection.then(|| linear("sequence_summary.summary", [hidden, hidden])),
        summary_activation: summary_activation(config)?,
        summary_dropout: [
            config.dropout_or("summary_first_dropout", 0.0)?,
            config.dropout_or("summary_last_dropout", 0.1)?,
        ],
        classifier: linear("logits_proj", [hidden, outputs]),
        sizes,
    }))
}

/// Reads a size that has two names; the second, common to all families, counts for more in transformers.
fn size(config: &ModelConfig, own: &str, common: &str) -> Result<i64> {
    config.integer_if_any(common)?.map_or_else(|| config.integer(own), Ok)
}

fn sizes(config: &ModelConfig) -> Result<Sizes> {
    let sizes = Sizes {
        hidden: size(config, "d_model", "hidden_size")?,
        intermediate: config.integer("d_inner")?,
        heads: size(config, "n_head", "num_attention_heads")?,
        vocabulary: size(config, "vocab_size", "n_token")?,
        // Distances have no limit.
        positions: None,
        token_types: None,
    };
    let Sizes { hidden, heads, .. } = sizes;
    if hidden % heads != 0 {
        return Err(config.error(format!("`d_model` {hidden} is no multiple of `n_head` {heads}")));
    }
    if hidden % 2 != 0 {
        return Err(config.error(format!("`d_model` {hidden} is odd; sinusoids need an even number")));
    }
    match config.integer_if_any("d_head")? {
        Some(head_size) if head_size != hidden / heads => Err(config.error(format!(
            "`d_head: {head_size}` is not supported, only `d_model` / `n_head`, which is {}",
            hidden / heads
        ))),
        _ => Ok(sizes),
    }
}

fn attention_settings(
    config: &ModelConfig,
    sizes: &Sizes,
    dropout: f64,
    summary: Summary,
) -> Result<AttentionSettings> {
    config.require("bi_data", &json!(false))?;
    let same_length = config.boolean_or("same_length", false)?;
    let visible = match config.text_or("attn_type", "bi")? {
        "bi" => Visible::All,
        "uni" if same_length => Visible::Own,
        "uni" => Visible::Earlier,
        other => return Err(config.error(format!("`attn_type: {other}` is not supported, only bi and uni"))),
    };
    let largest_distance = config.number_or("clamp_len", -1.0)?;
    if largest_distance.fract() != 0.0 {
        return Err(config.error(format!("`clamp_len` must be an integer, not {largest_distance}")));
    }
    Ok(AttentionSettings {
        hidden: sizes.hidden,
        heads: sizes.heads,
        dropout,
        visible,
        asked: match summary {
            Summary::Last if visible != Visible::Own => Asked::Last,
            _ => Asked::All,
        },
        largest_distance: (largest_distance > 0.0).then_some(largest_distance as i64),
    })
}

fn summary(config: &ModelConfig) -> Result<Summary> {
    match config.text_or("summary_type", "last")? {
        "first" => Ok(Summary::First),
        // A classifier names no index of its own, and the default of the reference is the last token.
        "last" | "cls_index" => Ok(Summary::Last),
        "mean" => Ok(Summary::Mean),
        other => Err(config.error(format!(
            "`summary_type: {other}` is not supported, only last, first, mean and cls_index"
        ))),
    }
}

/// Returns the activation of the summary; an empty text and null stand for none.
fn summary_activation(config: &ModelConfig) -> Result<Option<Activation>> {
    let name = config.text_or("summary_activation", "tanh")?;
    let is_null = config.values().get("summary_activation").is_some_and(Value::is_null);
    match name.is_empty() || is_null {
        true => Ok(None),
        false => config.activation_or("summary_activation", "tanh").map(Some),
    }
}

impl Layer {
    /// Runs the layer: `[tokens, hidden]` to `[rows, hidden]`.
    fn forward(&self, pass: &Pass, pairs: &Pairs, states: &Tensor) -> Result<Tensor> {
        let asked = pairs.states_of(self.rows, states)?;
        let attended = self.attention.forward(pass, pairs, &asked, states)?;
        let attended = pass.dropout(&attended, self.dropout, self.rows)?.f_add(&asked)?;
        let states = self.attention_norm.forward(pass, &attended)?;

        let expanded = self.activation.forward(&self.expand.forward(pass, &states)?)?;
        let expanded = pass.dropout(&expanded, self.dropout, self.rows)?;
        let output = self.reduce.forward(pass, &expanded)?;
        let output = pass.dropout(&output, self.dropout, self.rows)?.f_add(&states)?;
        self.output_norm.forward(pass, &output)
    }
}

impl Network for XlNet {
    fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        let embedded = pass.words(&self.words)?;
        let embedded = pass.dropout(&embedded, self.dropout, Rows::Tokens)?;
        let kind = self.layers[0].attention.kind(pass);
        let pairs = Rc::new(Pairs::new(pass, &self.attention, kind)?);
        let run = |states: Tensor, layer: &'a Layer| {
            let pairs = pairs.clone();
            pass.layer(&states, move |pass, states| layer.forward(pass, &pairs, states))
        };
        let states = self.layers.iter().try_fold(embedded, run)?;
        self.summary.forward(pass, &states, self.attention.asked, self.dropout)
    }

    fn head(&self, pass: &Pass, features: &Tensor) -> Result<Tensor> {
        let [before, after] = self.summary_dropout;
        let mut summary = pass.dropout(features, before, Rows::Examples)?;
        if let Some(projection) = &self.summary_projection {
            summary = projection.forward(pass, &summary)?;
        }
        if let Some(activation) = self.summary_activation {
            summary = activation.forward(&summary)?;
        }
        self.classifier.forward(pass, &pass.dropout(&summary, after, Rows::Examples)?)
    }

    fn output(&self) -> Linear {
        self.classifier
    }

    fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn architecture(&self) -> &'static str {
        "XLNetForSequenceClassification"
    }

    fn body_prefix(&self) -> &'static str {
        "transformer."
    }

    fn reads_packed_tokens(&self) -> bool {
        false
    }

    fn narrows_last_layer(&self) -> bool {
        self.attention.asked == Asked::Last
    }
}

impl Summary {
    /// Sums the examples up, with dropout of the states that are used: `[tokens, hidden]`, or of those that the last layer is
    /// asked for, to `[examples, hidden]`.
    fn forward(self, pass: &Pass, states: &Tensor, asked: Asked, dropout: f64) -> Result<Tensor> {
        if asked == Asked::Last {
            return pass.dropout(states, dropout, Rows::Examples);
        }
        let select = |rows: &Tensor| pass.dropout(&states.f_index_select(0, rows)?, dropout, Rows::Examples);
        let (first, lengths) = (&pass.batch.first_tokens, lengths(pass.batch)?);
        match self {
            Summary::First => select(first),
            Summary::Last => select(&first.f_add(&lengths)?.f_sub_scalar(1)?),
            Summary::Mean => {
                let states = pass.dropout(states, dropout, Rows::Tokens)?.f_to_kind(Kind::Float)?;
                let tokens = Tensor::f_arange(states.size()[0], (Kind::Int64, states.device()))?;
                let (first, lengths) = (first.f_unsqueeze(1)?, lengths.f_unsqueeze(1)?);
                let own = tokens.f_ge_tensor(&first)?;
                let own = own.f_logical_and(&tokens.f_lt_tensor(&first.f_add(&lengths)?)?)?;
                Ok(own.f_to_kind(Kind::Float)?.f_div(&lengths)?.f_matmul(&states)?)
            }
        }
    }
}

/// Returns the number of tokens of each example that an output is asked of, `[examples]`.
fn lengths(batch: &PackedBatch) -> Result<Tensor> {
    let asked = batch.first_tokens.size()[0] as usize;
    let lengths: Vec<i64> = batch.lengths[..asked].iter().map(|&length| length as i64).collect();
    upload(&lengths, batch.first_tokens.device())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(changes: Value) -> Result<usize> {
        let mut values = json!({
            "model_type": "xlnet", "vocab_size": 40, "d_model": 12, "n_head": 2, "n_layer": 1, "d_inner": 20,
            "d_head": 6, "bi_data": false, "mem_len": null, "reuse_len": 3, "untie_r": true,
        });
        let values = values.as_object_mut().unwrap();
        values.extend(changes.as_object().unwrap().clone());
        let mut table = ParameterTable::default();
        build(&ModelConfig::from_values(values.clone()), 3, &mut table)?;
        Ok(table.iter().filter(|parameter| parameter.place == ParameterPlace::Head).count())
    }

    #[test]
    fn arithmetic_that_is_not_here_is_refused_by_name() {
        let cases = [
            (json!({"bi_data": true}), "`bi_data: true`"),
            (json!({"attn_type": "tri"}), "`attn_type: tri`"),
            (json!({"summary_type": "attn"}), "`summary_type: attn`"),
            (json!({"summary_proj_to_labels": true}), "`summary_proj_to_labels: true`"),
            (json!({"d_head": 4}), "`d_head: 4`"),
            (json!({"n_head": 5}), "`d_model` 12 is no multiple of `n_head` 5"),
            (json!({"d_model": 9, "n_head": 3, "d_head": 3}), "`d_model` 9 is odd"),
            (json!({"clamp_len": 1.5}), "`clamp_len`"),
            (json!({"ff_activation": "softplus"}), "`softplus`"),
        ];
        for (changes, message) in cases {
            let error = built(changes).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn the_head_has_a_projection_if_the_config_says_so() {
        assert_eq!(built(json!({})).unwrap(), 4);
        let without = json!({"summary_use_proj": false, "summary_proj_to_labels": true});
        assert_eq!(built(without).unwrap(), 2);
    }

    #[test]
    fn a_summary_may_have_no_activation() {
        let activation = |value: Value| {
            let values = [("summary_activation".to_owned(), value)].into_iter().collect();
            summary_activation(&ModelConfig::from_values(values)).unwrap()
        };
        assert_eq!(activation(json!("relu")), Some(Activation::Relu));
        assert_eq!((activation(json!("")), activation(Value::Null)), (None, None));
    }
}
