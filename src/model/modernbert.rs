//! ModernBERT (Warner et al., 2024) with a classification or regression head.
//!
//! The arithmetic, the names and the places of dropout are those of transformers' `ModernBertForSequenceClassification`.
//! Layers normalise before they compute, positions turn queries and keys, and most layers attend within a window.

mod settings;

use std::rc::Rc;

use tch::{Kind, Tensor};

use self::settings::{Pooling, Reach, Settings, reaches_of_layers};
use super::attention::Attention;
use super::classifier::{Network, Sizes};
use super::config::ModelConfig;
use super::fresh_weights::FreshWeights;
use super::layer_norm::LayerNorm;
use super::layers::{Embedding, Linear};
use super::parameter::ParameterPlace;
use super::params::{ParameterId, ParameterTable};
use super::pass::{Pass, Rows};
use super::rotary::Rotation;
use crate::error::{Error, Result};

/// A ModernBERT encoder and head.
struct ModernBert {
    words: Embedding,
    embedding_norm: LayerNorm,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    dense: Linear,
    head_norm: LayerNorm,
    classifier: Linear,
    settings: Settings,
}

/// One Transformer layer.
struct Layer {
    /// The first layer has none.
    attention_norm: Option<LayerNorm>,
    /// Query, key and value.
    attention: Linear,
    attention_output: Linear,
    feed_forward_norm: LayerNorm,
    /// The numbers that are activated, and those that they are multiplied by.
    expand: Linear,
    reduce: Linear,
    /// Its place among [`Settings::reaches`].
    reach: usize,
    /// What it returns: the last layer computes nothing but first tokens where the head reads no others.
    rows: Rows,
}

/// Declares the parameters of a ModernBERT and returns its network.
///
/// # Errors
/// Fails if the config lacks a size or asks for arithmetic that is not here.
pub fn build(config: &ModelConfig, outputs: i64, table: &mut ParameterTable) -> Result<Box<dyn Network>> {
    let settings = Settings::read(config)?;
    let hidden = settings.sizes.hidden;
    let mut declare = Declaration::read(config, table)?;
    let words = Embedding::declare(
        declare.table,
        "model.embeddings.tok_embeddings",
        settings.sizes.vocabulary,
        hidden,
    );
    declare.spread(words.table, declare.range);
    let embedding_norm = declare.norm("model.embeddings.norm", ParameterPlace::Embeddings);
    let reaches = reaches_of_layers(config)?;
    let count = reaches.len();
    let layers = (reaches.into_iter().enumerate())
        .map(|(number, reach)| {
            let first_only = number + 1 == count && settings.pooling == Pooling::FirstToken;
            let rows = if first_only { Rows::Examples } else { Rows::Tokens };
            Layer::declare(&mut declare, number, (reach, rows), &settings.sizes)
        })
        .collect();
    let final_norm = declare.norm("model.final_norm", ParameterPlace::AboveLayers);
    // Pretraining brings the head's first layer and its normalisation.
    let (place, rows) = (ParameterPlace::Pooler, Rows::Examples);
    let (bias, spread) = (config.boolean_or("classifier_bias", false)?, declare.output_range);
    let dense = declare.linear("head.dense", [hidden, hidden], (bias, spread), place, rows);
    let head_norm = declare.norm("head.norm", place).over(rows);
    let spread = (hidden as f64).powf(-0.5);
    let classifier =
        declare.linear("classifier", [hidden, outputs], (true, spread), ParameterPlace::Head, rows);
    Ok(Box::new(ModernBert {
        words,
        embedding_norm,
        layers,
        final_norm,
        dense,
        head_norm,
        classifier,
        settings,
    }))
}

/// What parameters are declared with: which layers have biases, and where new weights come from.
struct Declaration<'a> {
    table: &'a mut ParameterTable,
    hidden: i64,
    epsilon: f64,
    norm_bias: bool,
    attention_bias: bool,
    feed_forward_bias: bool,
    /// The standard deviation of new weights.
    range: f64,
    /// That of matrices whose products are added to the hidden states.
    output_range: f64,
    /// Weights are at most so many standard deviations away from zero.
    cutoff: f64,
}

impl<'a> Declaration<'a> {
    fn read(config: &ModelConfig, table: &'a mut ParameterTable) -> Result<Self> {
        let range = config.magnitude_or("initializer_range", 0.02)?;
        let cutoff = config.magnitude_or("initializer_cutoff_factor", 2.0)?;
        if cutoff <= 0.0 {
            return Err(config.error(format!("`initializer_cutoff_factor` must be above 0, not {cutoff}")));
        }
        Ok(Self {
            table,
            hidden: config.integer("hidden_size")?,
            epsilon: config.magnitude_or("norm_eps", 1e-5)?,
            norm_bias: config.boolean_or("norm_bias", false)?,
            attention_bias: config.boolean_or("attention_bias", false)?,
            feed_forward_bias: config.boolean_or("mlp_bias", false)?,
            range,
            output_range: range / (2.0 * config.layers("num_hidden_layers")? as f64).sqrt(),
            cutoff,
        })
    }

    fn norm(&mut self, name: &str, place: ParameterPlace) -> LayerNorm {
        let declare = if self.norm_bias { LayerNorm::declare } else { LayerNorm::declare_without_bias };
        declare(self.table, name, self.hidden, self.epsilon, place)
    }

    /// Declares a linear layer, given whether it has a bias and the standard deviation of new weights.
    fn linear(
        &mut self,
        name: &str,
        sizes: [i64; 2],
        (bias, spread): (bool, f64),
        place: ParameterPlace,
        rows: Rows,
    ) -> Linear {
        let declare = if bias { Linear::declare } else { Linear::declare_without_bias };
        let linear = declare(self.table, name, sizes, place, rows);
        self.spread(linear.weight, spread);
        linear
    }

    fn spread(&mut self, weight: ParameterId, standard_deviation: f64) {
        let fresh = FreshWeights::TruncatedNormal { standard_deviation, cutoff: self.cutoff };
        self.table.start_from(weight, fresh);
    }
}

impl Layer {
    fn declare(
        declare: &mut Declaration,
        number: usize,
        (reach, rows): (usize, Rows),
        sizes: &Sizes,
    ) -> Self {
        let place = ParameterPlace::EncoderLayer(number);
        let name = |part: &str| format!("model.layers.{number}.{part}");
        let (hidden, expanded) = (sizes.hidden, sizes.intermediate);
        let (inner, outer) = (declare.range, declare.output_range);
        let (attention_bias, feed_forward_bias) = (declare.attention_bias, declare.feed_forward_bias);
        let linear =
            |declare: &mut Declaration, part: &str, sizes: [i64; 2], start: (bool, f64), rows: Rows| {
                declare.linear(&name(part), sizes, start, place, rows)
            };
        let (to_attention, within) = ((attention_bias, inner), (feed_forward_bias, inner));
        Self {
            attention_norm: (number > 0).then(|| declare.norm(&name("attn_norm"), place)),
            // One matrix, so queries, too, are of all tokens.
            attention: linear(declare, "attn.Wqkv", [hidden, 3 * hidden], to_attention, Rows::Tokens),
            attention_output: linear(declare, "attn.Wo", [hidden, hidden], (attention_bias, outer), rows),
            feed_forward_norm: declare.norm(&name("mlp_norm"), place).over(rows),
            expand: linear(declare, "mlp.Wi", [hidden, expanded], within, rows),
            reduce: linear(declare, "mlp.Wo", [expanded / 2, hidden], (feed_forward_bias, outer), rows),
            reach,
            rows,
        }
    }

    /// Runs the layer: `[tokens, hidden]` to `[rows, hidden]`.
    fn forward(
        &self,
        pass: &Pass,
        settings: &Settings,
        rotation: &Rotation,
        states: &Tensor,
    ) -> Result<Tensor> {
        let normalised = self.attention_norm.as_ref().map(|norm| norm.forward(pass, states)).transpose()?;
        let together = self.attention.forward(pass, normalised.as_ref().unwrap_or(states))?;
        let [query, key, value] = &rotation.apply(&together)?;
        let (heads, dropout) = (settings.sizes.heads, settings.attention_dropout);
        let scale = ((settings.sizes.hidden / heads) as f64).powf(-0.5);
        let (states, query) = (pass.states_of(self.rows, states)?, &pass.states_of(self.rows, query)?);
        let attention = Attention { query, queries: self.rows, key, value, heads, scale, dropout };
        let context = pass.attention_within(&attention, settings.reaches[self.reach].window)?;
        let attended = self.attention_output.forward(pass, &context)?;
        let states = pass.dropout(&attended, dropout, self.rows)?.f_add(&states)?;

        let normalised = self.feed_forward_norm.forward(pass, &states)?;
        let expanded = self.expand.forward(pass, &normalised)?.f_chunk(2, 1)?;
        let [activated, gate] = &expanded[..] else {
            return Err(Error::Libtorch("the feed-forward layer has no two halves".into()));
        };
        let gated = settings.activation.forward(activated)?.f_mul(gate)?;
        let gated = pass.dropout(&gated, settings.feed_forward_dropout, self.rows)?;
        Ok(self.reduce.forward(pass, &gated)?.f_add(&states)?)
    }
}

impl ModernBert {
    /// Normalises what the last layer returns, and takes one row an example of it: `[examples, hidden]`.
    fn pooled(&self, pass: &Pass, states: &Tensor) -> Result<Tensor> {
        match self.settings.pooling {
            Pooling::FirstToken => self.final_norm.over(Rows::Examples).forward(pass, states),
            Pooling::Mean => mean_of_examples(pass, &self.final_norm.forward(pass, states)?),
        }
    }
}

/// Takes the mean of each example's rows, in float32: `[tokens, hidden]` to `[examples, hidden]`.
fn mean_of_examples(pass: &Pass, rows: &Tensor) -> Result<Tensor> {
    let batch = pass.batch;
    let options = (Kind::Int64, rows.device());
    // Which example a token is of. What fills a batch up stands behind the examples that are asked for.
    let owner = batch.positions.f_eq(0)?.f_cumsum(0, Kind::Int64)?.f_unsqueeze(0)?;
    let examples = Tensor::f_arange(batch.first_tokens.size()[0], options)?.f_add_scalar(1)?;
    let own = examples.f_unsqueeze(1)?.f_eq_tensor(&owner)?.f_to_kind(Kind::Float)?;
    let shares = own.f_div(&own.f_sum_dim_intlist(1i64, true, Kind::Float)?)?;
    Ok(shares.f_matmul(&rows.f_to_kind(Kind::Float)?)?)
}

impl Network for ModernBert {
    fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        let settings = &self.settings;
        let embedded = pass.words(&self.words)?;
        let embedded = self.embedding_norm.forward(pass, &embedded)?;
        let embedded = pass.dropout(&embedded, settings.embedding_dropout, Rows::Tokens)?;
        let packed = pass.batch.flash_lengths().is_some() && embedded.kind() == Kind::BFloat16;
        if settings.deterministic && packed {
            return Err(Error::configuration(
                "`deterministic_flash_attn: true` of the model's config.json is not supported on a GPU in bf16; set it to \
                 false",
            ));
        }
        let head_size = settings.sizes.hidden / settings.sizes.heads;
        let rotation =
            |reach: Reach| Rotation::new(&pass.batch.positions, reach.theta, head_size).map(Rc::new);
        let [global, local] = settings.reaches.map(rotation);
        let rotations = [global?, local?];
        let run = |states: Tensor, layer: &'a Layer| {
            let rotation = rotations[layer.reach].clone();
            pass.layer(&states, move |pass, states| layer.forward(pass, settings, &rotation, states))
        };
        let states = self.layers.iter().try_fold(embedded, run)?;
        self.pooled(pass, &states)
    }

    fn head(&self, pass: &Pass, features: &Tensor) -> Result<Tensor> {
        let dense = self.settings.head_activation.forward(&self.dense.forward(pass, features)?)?;
        let normalised = self.head_norm.forward(pass, &dense)?;
        let dropped = pass.dropout(&normalised, self.settings.classifier_dropout, Rows::Examples)?;
        self.classifier.forward(pass, &dropped)
    }

    fn output(&self) -> Linear {
        self.classifier
    }

    fn sizes(&self) -> Sizes {
        self.settings.sizes
    }

    fn architecture(&self) -> &'static str {
        "ModernBertForSequenceClassification"
    }

    fn body_prefix(&self) -> &'static str {
        "model."
    }

    fn reads_packed_tokens(&self) -> bool {
        // First tokens within windows go to rectangles, whatever layer they are of (`Pass::attention_within`).
        let is_narrow = |layer: &Layer| {
            layer.rows == Rows::Examples && self.settings.reaches[layer.reach].window.is_some()
        };
        !self.layers.iter().any(is_narrow)
    }

    fn narrows_last_layer(&self) -> bool {
        self.settings.pooling == Pooling::FirstToken
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tch::Device;

    use super::settings::tests::config;
    use super::*;
    use crate::data::{BatchShape, Encoded, EncodedDataset, PackedBatch, Targets};
    use crate::model::{Classifier, Labels};

    fn data(lengths: &[usize]) -> EncodedDataset {
        let example = |&length: &usize| Encoded {
            ids: (0..length as u32).map(|place| (place * 7 + length as u32) % 40).collect(),
            token_types: vec![0; length],
        };
        let inputs = lengths.iter().map(example).collect();
        EncodedDataset { inputs, targets: Targets::Classes(vec![0; lengths.len()]), features: None }
    }

    fn model(changes: Value) -> Classifier {
        let labels = Labels::Classes(vec!["a".into(), "b".into(), "c".into()]);
        let mut model = Classifier::untrained(config(changes), labels, Device::Cpu).unwrap();
        model.reset(5).unwrap();
        model
    }

    fn logits(model: &Classifier, batch: &PackedBatch, kind: Kind) -> Tensor {
        let weights = model.parameters.compute_weights(kind).unwrap();
        tch::no_grad(|| model.logits(&Pass::new(&weights, batch, None)).unwrap())
    }

    fn largest(values: &Tensor) -> f64 {
        values.abs().max().double_value(&[])
    }

    #[test]
    fn bfloat16_is_near_and_what_fills_a_batch_up_does_not_count() {
        for pooling in ["mean", "cls"] {
            let model = model(json!({"classifier_pooling": pooling, "initializer_range": 0.3}));
            let data = data(&[20, 3, 40, 33, 7]);
            let (batch, _) = data.batch(&[0, 2, 4], 0, Device::Cpu).unwrap();
            let exact = logits(&model, &batch, Kind::Float);
            let spread = largest(&(&exact - exact.mean_dim(0i64, true, Kind::Float)));
            assert!(spread > 0.1, "{pooling} {spread}");
            let half = logits(&model, &batch, Kind::BFloat16);
            assert!(largest(&(half - &exact)) < 0.1 * largest(&exact), "{pooling}");
            let shape = BatchShape::of(&[20, 40, 7], 128);
            let (filled, _) = data.filled_batch(&[0, 2, 4], shape, Device::Cpu).unwrap();
            let found = logits(&model, &filled, Kind::Float);
            assert!(largest(&(found - &exact)) < 1e-5 * largest(&exact), "{pooling}");
        }
    }

    #[test]
    fn new_weights_are_as_wide_as_those_of_the_reference() {
        let model = model(json!({
            "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1, "initializer_cutoff_factor": 1.5,
        }));
        let largest_of =
            |name: &str| largest(&model.parameters.leaf(model.parameters.find(name).unwrap()).detach());
        let output = 0.1 / 8f64.sqrt();
        for (name, deviation) in [
            ("model.embeddings.tok_embeddings.weight", 0.1),
            ("model.layers.1.attn.Wqkv.weight", 0.1),
            ("model.layers.2.attn.Wo.weight", output),
            ("model.layers.0.mlp.Wi.weight", 0.1),
            ("model.layers.3.mlp.Wo.weight", output),
            ("head.dense.weight", output),
            ("classifier.weight", 0.125),
        ] {
            // Of so many draws the largest is just below the cutoff.
            let share = largest_of(name) / (1.5 * deviation);
            assert!((0.9..=1.000_001).contains(&share), "{name} {share}");
        }
        assert_eq!((largest_of("head.norm.weight"), largest_of("classifier.bias")), (1.0, 0.0));
    }

    #[test]
    fn passes_that_go_to_rectangles_say_so() {
        let reads_packed_tokens = |last: &str, pooling: &str| {
            let layers = ["full_attention", "sliding_attention", "full_attention", last];
            // Heads of eight numbers, which flash attention takes.
            let config = config(json!({"layer_types": layers, "classifier_pooling": pooling}));
            Classifier::shape(&config, &Labels::Score).unwrap().reads_packed_tokens
        };
        assert!(reads_packed_tokens("full_attention", "cls"));
        assert!(reads_packed_tokens("sliding_attention", "mean"));
        assert!(!reads_packed_tokens("sliding_attention", "cls"));
    }
}
