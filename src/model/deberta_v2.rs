//! DeBERTa of the second and third version (He et al., 2021 and 2023) with a classification or regression head.
//!
//! The arithmetic, the names and the places of dropout are those of transformers' `DebertaV2ForSequenceClassification`.

use serde_json::json;
use tch::Tensor;

use super::classifier::{Network, Sizes};
use super::config::ModelConfig;
use super::convolution::Convolution;
use super::disentangled::{Disentangled, RelativePositions, Term};
use super::layer_norm::LayerNorm;
use super::layers::{Activation, Embedding, Linear};
use super::parameter::ParameterPlace;
use super::params::ParameterTable;
use super::pass::{Pass, Rows};
use super::post_norm::{Layer, LayerNames, LayerSettings, Layers};
use crate::error::Result;

const NAMES: LayerNames = LayerNames {
    attention: [
        "attention.self.query_proj",
        "attention.self.key_proj",
        "attention.self.value_proj",
        "attention.output.dense",
    ],
    attention_norm: "attention.output.LayerNorm",
    feed_forward: ["intermediate.dense", "output.dense"],
    output_norm: "output.LayerNorm",
};

/// A DeBERTa encoder with pooler and head.
struct DebertaV2 {
    embeddings: Embeddings,
    layers: Layers,
    attention: SelfAttention,
    convolution: Option<ConvolutionBlock>,
    pooler: Linear,
    pooler_activation: Activation,
    pooler_dropout: f64,
    classifier: Linear,
    classifier_dropout: f64,
    sizes: Sizes,
}

/// What the scores of the layers are made of.
enum SelfAttention {
    /// Contents and relative positions.
    Disentangled(Disentangled),
    /// Contents only, times a factor beside 1 / √d.
    Plain { factor: f64 },
}

/// Declares the parameters of a DeBERTa and returns its network.
///
/// # Errors
/// Fails if the config lacks a size or asks for arithmetic that is not here.
pub fn build(config: &ModelConfig, outputs: i64, table: &mut ParameterTable) -> Result<Box<dyn Network>> {
    config.require("z_steps", &json!(0))?;
    config.require_multiple("hidden_size", "num_attention_heads")?;
    let (hidden, heads) = (config.integer("hidden_size")?, config.integer("num_attention_heads")?);
    // With any other value the reference's shapes do not match.
    config.require("attention_head_size", &json!(hidden / heads))?;
    config.require("pooler_hidden_size", &json!(hidden))?;
    let is_biased = config.boolean_or("position_biased_input", true)?;
    let positions = is_biased.then(|| config.integer("max_position_embeddings")).transpose()?;
    let sizes = Sizes {
        hidden,
        intermediate: config.integer("intermediate_size")?,
        heads,
        vocabulary: config.integer("vocab_size")?,
        positions,
        token_types: config.count_if_any("type_vocab_size")?,
    };
    let hidden_dropout = config.dropout_or("hidden_dropout_prob", 0.1)?;
    let settings = LayerSettings {
        sizes,
        layers: config.layers("num_hidden_layers")?,
        activation: config.activation_or("hidden_act", "gelu")?,
        epsilon: config.magnitude_or("layer_norm_eps", 1e-7)?,
        hidden_dropout,
        attention_output_dropout: hidden_dropout,
        attention_dropout: config.dropout_or("attention_probs_dropout_prob", 0.1)?,
    };
    let embeddings = Embeddings::declare(config, table, &settings)?;
    let layers = Layers::declare(table, "deberta.encoder.layer", &NAMES, settings);
    let attention = SelfAttention::declare(config, table, &layers)?;
    let convolution = ConvolutionBlock::declare(config, table, &settings)?;
    let mut linear = |name: &str, outputs: i64, place: ParameterPlace| {
        Linear::declare(table, name, [hidden, outputs], place, Rows::Examples)
    };
    Ok(Box::new(DebertaV2 {
        embeddings,
        layers,
        attention,
        convolution,
        pooler: linear("pooler.dense", hidden, ParameterPlace::Pooler),
        pooler_activation: config.activation_or("pooler_hidden_act", "gelu")?,
        pooler_dropout: config.dropout_or("pooler_dropout", 0.0)?,
        classifier: linear("classifier", outputs, ParameterPlace::Head),
        classifier_dropout: config.dropout_or("cls_dropout", hidden_dropout)?,
        sizes,
    }))
}

impl Network for DebertaV2 {
    fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        let embedded = self.embeddings.forward(pass)?;
        match &self.attention {
            SelfAttention::Disentangled(attention) => {
                let relative = attention.relative(pass, &embedded)?;
                self.run(pass, embedded, move |pass, number, rows, projections| {
                    attention.attend(pass, number, (rows, projections), &relative)
                })
            }
            &SelfAttention::Plain { factor } => {
                let LayerSettings { sizes, attention_dropout, .. } = *self.layers.settings();
                self.run(pass, embedded, move |pass, _, rows, [query, key, value]| {
                    let query = &query.f_mul_scalar(factor)?;
                    pass.attention([query, key, value], rows, sizes.heads, attention_dropout)
                })
            }
        }
    }

    fn head(&self, pass: &Pass, features: &Tensor) -> Result<Tensor> {
        let first = pass.dropout(features, self.pooler_dropout, Rows::Examples)?;
        let pooled = self.pooler_activation.forward(&self.pooler.forward(pass, &first)?)?;
        self.classifier.forward(pass, &pass.dropout(&pooled, self.classifier_dropout, Rows::Examples)?)
    }

    fn output(&self) -> Linear {
        self.classifier
    }

    fn sizes(&self) -> Sizes {
        self.sizes
    }

    fn architecture(&self) -> &'static str {
        "DebertaV2ForSequenceClassification"
    }

    fn body_prefix(&self) -> &'static str {
        "deberta."
    }

    fn reads_packed_tokens(&self) -> bool {
        matches!(self.attention, SelfAttention::Plain { .. }) && self.convolution.is_none()
    }
}

impl DebertaV2 {
    /// Runs the layers, each as a segment of the pass: `[tokens, hidden]` to what the first tokens have become,
    /// `[examples, hidden]`. `attend` computes the attention of a layer, given its number, what its queries stand for, and its
    /// queries, keys and values.
    fn run<'a>(
        &'a self,
        pass: &Pass<'a>,
        embedded: Tensor,
        attend: impl Fn(&Pass, usize, Rows, [&Tensor; 3]) -> Result<Tensor> + Clone + 'a,
    ) -> Result<Tensor> {
        let run = |states: Tensor, (number, layer): (usize, &'a Layer)| {
            let attend = attend.clone();
            let convolution = self.convolution.as_ref().filter(|_| number == 0);
            pass.layer(&states, move |pass, states| {
                let (asked, projections) = layer.projections(pass, states)?;
                let context = attend(pass, number, layer.rows, projections.each_ref())?;
                let output = layer.after_attention(pass, self.layers.settings(), &asked, &context)?;
                match convolution {
                    Some(convolution) => convolution.forward(pass, states, (layer.rows, &output)),
                    None => Ok(output),
                }
            })
        };
        self.layers.iter().enumerate().try_fold(embedded, run)
    }
}

/// The embeddings of words and, where the config has them, of positions and token types; summed, projected, normalised, and
/// dropped out.
struct Embeddings {
    words: Embedding,
    positions: Option<Embedding>,
    token_types: Option<Embedding>,
    /// From the width of the embeddings to that of the layers, where they differ.
    projection: Option<Linear>,
    norm: LayerNorm,
    dropout: f64,
}

impl Embeddings {
    fn declare(config: &ModelConfig, table: &mut ParameterTable, settings: &LayerSettings) -> Result<Self> {
        let Sizes { hidden, vocabulary, positions, token_types, .. } = settings.sizes;
        let width = config.integer_if_any("embedding_size")?.unwrap_or(hidden);
        let name = |part: &str| format!("deberta.embeddings.{part}");
        let mut declare = |part: &str, entries: i64| Embedding::declare(table, &name(part), entries, width);
        let (words, positions, token_types) = (
            declare("word_embeddings", vocabulary),
            positions.map(|entries| declare("position_embeddings", entries)),
            token_types.map(|entries| declare("token_type_embeddings", entries)),
        );
        let place = ParameterPlace::Embeddings;
        let mut project = || {
            let sizes = [width, hidden];
            Linear::declare_without_bias(table, &name("embed_proj"), sizes, place, Rows::Tokens)
        };
        Ok(Self {
            words,
            positions,
            token_types,
            projection: (width != hidden).then(&mut project),
            norm: LayerNorm::declare(table, &name("LayerNorm"), hidden, settings.epsilon, place),
            dropout: settings.hidden_dropout,
        })
    }

    /// Embeds the packed tokens: `[tokens, hidden]`.
    fn forward(&self, pass: &Pass) -> Result<Tensor> {
        let mut sum = pass.words(&self.words)?;
        if let Some(positions) = &self.positions {
            sum = sum.f_add(&positions.forward(pass, &pass.batch.positions)?)?;
        }
        if let Some(token_types) = &self.token_types {
            sum = sum.f_add(&token_types.forward(pass, &pass.batch.token_types)?)?;
        }
        if let Some(projection) = &self.projection {
            sum = projection.forward(pass, &sum)?;
        }
        pass.dropout(&self.norm.forward(pass, &sum)?, self.dropout, Rows::Tokens)
    }
}

impl SelfAttention {
    fn declare(config: &ModelConfig, table: &mut ParameterTable, layers: &Layers) -> Result<Self> {
        let types = config.words("pos_att_type", &["c2p", "p2c", "none"])?;
        let has = |name: &str, term: Term| types.iter().any(|own| own == name).then_some(term);
        let terms = [has("c2p", Term::ContentToPosition), has("p2c", Term::PositionToContent)];
        // Both count, whether there are relative positions or not.
        let parts = 1 + terms.iter().flatten().count();
        let settings = layers.settings();
        let hidden = settings.sizes.hidden;
        let is_relative = config.boolean_or("relative_attention", false)?;
        let positions = is_relative.then(|| RelativePositions::read(config)).transpose()?;
        let embeddings = positions.map(|positions| {
            let name = "deberta.encoder.rel_embeddings";
            let declared = Embedding::declare(table, name, positions.table_entries(), hidden);
            (positions, Embedding { rows: Rows::Shared, ..declared })
        });
        let norms = config.words("norm_rel_ebd", &["layer_norm", "none"])?;
        let norm = norms.iter().any(|own| own == "layer_norm").then(|| {
            let (name, place) = ("deberta.encoder.LayerNorm", ParameterPlace::Embeddings);
            LayerNorm::declare(table, name, hidden, settings.epsilon, place).over(Rows::Shared)
        });
        let shares_projections = config.boolean_or("share_att_key", false)?;
        let [first, second] = terms;
        let terms = first.or(second).map(|term| (term, first.and(second)));
        let (Some((positions, embeddings)), Some(terms)) = (embeddings, terms) else {
            return Ok(SelfAttention::Plain { factor: 1.0 / (parts as f64).sqrt() });
        };
        let head_size = hidden / settings.sizes.heads;
        Ok(SelfAttention::Disentangled(Disentangled::declare(
            table,
            "deberta.encoder.layer",
            layers,
            (positions, embeddings, norm),
            terms,
            shares_projections,
            1.0 / ((head_size * parts as i64) as f64).sqrt(),
        )))
    }
}

/// What stands beside the first layer: a convolution over the embeddings, whose output is added to the layer's.
struct ConvolutionBlock {
    convolution: Convolution,
    activation: Activation,
    norm: LayerNorm,
    dropout: f64,
}

/// More than any model has, and little enough that sizes do not overflow.
const LARGEST_KERNEL: i64 = 255;

impl ConvolutionBlock {
    fn declare(
        config: &ModelConfig,
        table: &mut ParameterTable,
        settings: &LayerSettings,
    ) -> Result<Option<Self>> {
        let Some(kernel) = config.count_if_any("conv_kernel_size")? else { return Ok(None) };
        if kernel % 2 == 0 || kernel > LARGEST_KERNEL {
            return Err(config.error(format!(
                "`conv_kernel_size` must be odd and at most {LARGEST_KERNEL}, not {kernel}"
            )));
        }
        let groups = config.integer_if_any("conv_groups")?.unwrap_or(1);
        if groups > 1 {
            config.require_multiple("hidden_size", "conv_groups")?;
        }
        let (hidden, place) = (settings.sizes.hidden, ParameterPlace::Embeddings);
        let name = |part: &str| format!("deberta.encoder.conv.{part}");
        Ok(Some(Self {
            convolution: Convolution::declare(table, &name("conv"), hidden, kernel, groups, place),
            activation: config.activation_or("conv_act", "tanh")?,
            norm: LayerNorm::declare(table, &name("LayerNorm"), hidden, settings.epsilon, place),
            dropout: settings.hidden_dropout,
        }))
    }

    /// Adds to the output of the first layer, `[rows, hidden]`, whose input is `embedded`, `[tokens, hidden]`.
    fn forward(&self, pass: &Pass, embedded: &Tensor, (rows, output): (Rows, &Tensor)) -> Result<Tensor> {
        let convolved = pass.states_of(rows, &self.convolution.forward(pass, embedded)?)?;
        let convolved = self.activation.forward(&pass.dropout(&convolved, self.dropout, rows)?)?;
        self.norm.over(rows).forward(pass, &output.f_add(&convolved)?)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn problem(key: &str, value: Value) -> Option<String> {
        let config = json!({
            "vocab_size": 40, "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1,
            "intermediate_size": 20, "max_position_embeddings": 17, "relative_attention": true,
            "position_buckets": 8, "pos_att_type": "p2c|c2p", "conv_kernel_size": 3, "norm_rel_ebd": "layer_norm",
        });
        let mut values = config.as_object().cloned().unwrap();
        values.insert(key.to_owned(), value);
        let built = build(&ModelConfig::from_values(values), 2, &mut ParameterTable::default());
        built.err().map(|error| error.to_string())
    }

    #[test]
    fn what_a_config_asks_for_is_done_or_refused_by_name() {
        let refused = [
            ("z_steps", json!(2)),
            ("attention_head_size", json!(5)),
            ("pooler_hidden_size", json!(8)),
            ("pos_att_type", json!("c2p|p2p")),
            ("pos_att_type", json!(["C2P"])),
            ("norm_rel_ebd", json!("batch_norm")),
            ("position_buckets", json!(1)),
            ("max_relative_positions", json!(5)),
            ("conv_kernel_size", json!(4)),
            ("conv_groups", json!(5)),
            ("type_vocab_size", json!("none")),
        ];
        for (key, value) in refused {
            let problem = problem(key, value.clone());
            assert!(problem.as_ref().is_some_and(|text| text.contains(key)), "{key} {value}: {problem:?}");
        }
        let accepted = [
            ("z_steps", json!(0)),
            ("attention_head_size", json!(4)),
            ("pos_att_type", json!("none")),
            ("pos_att_type", json!("C2P | p2c")),
            ("pos_att_type", json!([""])),
            ("norm_rel_ebd", json!(null)),
            ("position_buckets", json!(-1)),
            ("max_relative_positions", json!(-1)),
            ("conv_kernel_size", json!(0)),
            ("type_vocab_size", json!(0)),
        ];
        for (key, value) in accepted {
            assert_eq!(problem(key, value.clone()), None, "{key} {value}");
        }
    }
}
