//! What a config says of a ModernBERT, with the keys of today and the older ones of the published models.

use serde_json::{Value, json};

use crate::error::Result;
use crate::model::classifier::Sizes;
use crate::model::config::ModelConfig;
use crate::model::layers::Activation;

/// The names of what layers attend to, in the order of [`Settings::reaches`].
const REACHES: [&str; 2] = [FULL, SLIDING];
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// What a config says.
pub(super) struct Settings {
    pub sizes: Sizes,
    /// What layers attend to: those of all tokens, and those of a window.
    pub reaches: [Reach; 2],
    pub activation: Activation,
    pub head_activation: Activation,
    pub pooling: Pooling,
    pub embedding_dropout: f64,
    /// Of the attention probabilities, and of what attention returns.
    pub attention_dropout: f64,
    /// Within the feed-forward layer.
    pub feed_forward_dropout: f64,
    pub classifier_dropout: f64,
    /// Whether gradients of flash attention must be the same each time.
    pub deterministic: bool,
}

/// What a layer attends to.
#[derive(Clone, Copy)]
pub(super) struct Reach {
    /// How far away a token may be that another one attends to; `None` without a limit.
    pub window: Option<i64>,
    /// The base of the wavelengths of the rotary embedding.
    pub theta: f64,
}

/// What the head sees of an example.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pooling {
    FirstToken,
    Mean,
}

impl Settings {
    /// Reads them.
    ///
    /// # Errors
    /// Fails if the config lacks a size or asks for arithmetic that is not here.
    pub fn read(config: &ModelConfig) -> Result<Self> {
        config.require_multiple("hidden_size", "num_attention_heads")?;
        let (hidden, heads) = (config.integer("hidden_size")?, config.integer("num_attention_heads")?);
        let head_size = hidden / heads;
        config.require("head_dim", &json!(head_size))?;
        if head_size % 2 != 0 {
            return Err(config.error(format!(
                "`hidden_size` / `num_attention_heads` is {head_size}, but rotary positions need an even number"
            )));
        }
        config.require("rope_scaling", &Value::Null)?;
        // Of both sides, as the reference counts it.
        let window = match config.integer_if_any("sliding_window")? {
            Some(window) => window,
            None => config.integer_if_any("local_attention")?.unwrap_or(128) / 2,
        };
        let pooling = match config.text_or("classifier_pooling", "cls")? {
            "cls" => Pooling::FirstToken,
            "mean" => Pooling::Mean,
            other => {
                let problem = format!("`classifier_pooling: {other}` is not supported, only cls and mean");
                return Err(config.error(problem));
            }
        };
        Ok(Self {
            sizes: Sizes {
                hidden,
                // The first matrix of the feed-forward layer has two halves.
                intermediate: 2 * config.integer("intermediate_size")?,
                heads,
                vocabulary: config.integer("vocab_size")?,
                positions: Some(config.integer("max_position_embeddings")?),
                token_types: None,
            },
            reaches: [
                Reach { window: None, theta: theta(config, FULL, "global_rope_theta", 160_000.0)? },
                Reach { window: Some(window), theta: theta(config, SLIDING, "local_rope_theta", 10_000.0)? },
            ],
            activation: config.activation_or("hidden_activation", "gelu")?,
            head_activation: config.activation_or("classifier_activation", "gelu")?,
            pooling,
            embedding_dropout: config.dropout_or("embedding_dropout", 0.0)?,
            attention_dropout: config.dropout_or("attention_dropout", 0.0)?,
            feed_forward_dropout: config.dropout_or("mlp_dropout", 0.0)?,
            classifier_dropout: config.dropout_or("classifier_dropout", 0.0)?,
            deterministic: config.boolean_or("deterministic_flash_attn", false)?,
        })
    }
}

/// Returns the theta of one sort of layers: that of `rope_parameters`, that of the older key, or the default.
fn theta(config: &ModelConfig, layers: &str, older_key: &str, default: f64) -> Result<f64> {
    let older = config.number_or(older_key, default)?;
    let none = Value::Null;
    let parameters = config.object_if_any("rope_parameters")?.and_then(|all| all.get(layers));
    let part = |key: &str| parameters.and_then(|own| own.get(key)).unwrap_or(&none);
    for key in ["rope_type", "type"] {
        if !part(key).is_null() && part(key) != "default" {
            let problem = format!("`rope_parameters.{layers}.{key}: {}` is not supported", part(key));
            return Err(config.error(problem + ", only \"default\""));
        }
    }
    let (key, theta) = match part("rope_theta") {
        Value::Null if config.values().get(older_key).is_some_and(Value::is_null) => {
            (older_key.to_owned(), None)
        }
        Value::Null => (older_key.to_owned(), Some(older)),
        number => (format!("rope_parameters.{layers}.rope_theta"), number.as_f64()),
    };
    let positive = theta.filter(|theta| *theta > 0.0);
    positive.ok_or_else(|| config.error(format!("`{key}` must be a positive number")))
}

/// Returns what each layer attends to, as a place among [`Settings::reaches`].
///
/// # Errors
/// Fails if the config names something else, or not one for each layer.
pub(super) fn reaches_of_layers(config: &ModelConfig) -> Result<Vec<usize>> {
    let count = config.layers("num_hidden_layers")? as usize;
    let every = config.integer_if_any("global_attn_every_n_layers")?.unwrap_or(3) as usize;
    let names = config.words("layer_types", &REACHES)?;
    if names.is_empty() {
        return Ok((0..count).map(|layer| usize::from(layer % every != 0)).collect());
    }
    if names.len() != count {
        return Err(config.error(format!(
            "`layer_types` has {} entries, but `num_hidden_layers` is {count}",
            names.len()
        )));
    }
    Ok(names.iter().map(|name| usize::from(name == SLIDING)).collect())
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::Map;

    use super::super::build;
    use super::*;
    use crate::model::ParameterTable;

    /// A config with the given keys; null takes one out.
    pub fn config(changes: Value) -> ModelConfig {
        let mut values = json!({
            "model_type": "modernbert", "vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 4, "intermediate_size": 20, "max_position_embeddings": 64, "local_attention": 6,
            "classifier_pooling": "mean",
        });
        let values: &mut Map<String, Value> = values.as_object_mut().unwrap();
        values.extend(changes.as_object().unwrap().clone());
        ModelConfig::from_values(values.clone())
    }

    #[test]
    fn older_configs_say_the_same_with_other_keys() {
        let said = |changes: Value| {
            let config = config(changes);
            let settings = Settings::read(&config).unwrap();
            let all = settings.reaches.map(|reach| (reach.window, reach.theta));
            (all, reaches_of_layers(&config).unwrap())
        };
        let usual = ([(None, 160_000.0), (Some(3), 10_000.0)], vec![0, 1, 1, 0]);
        assert_eq!(said(json!({})), usual);
        let older = json!({"global_rope_theta": 7, "local_rope_theta": 2.5, "global_attn_every_n_layers": 2});
        assert_eq!(said(older), ([(None, 7.0), (Some(3), 2.5)], vec![0, 1, 0, 1]));
        let newer = json!({
            "rope_parameters": {"full_attention": {"rope_theta": 9.0, "rope_type": "default"}, "sliding_attention": null},
            "global_rope_theta": 7, "local_rope_theta": 2.5, "local_attention": 5,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        });
        assert_eq!(said(newer), ([(None, 9.0), (Some(2), 2.5)], vec![1, 0, 0, 1]));
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let cases = [
            (json!({"rope_scaling": {"rope_type": "linear"}}), "`rope_scaling"),
            (
                json!({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}),
                "`rope_parameters.full_attention.rope_type: \"yarn\"`",
            ),
            (
                json!({"rope_parameters": {"sliding_attention": {"rope_theta": -1}}}),
                "`rope_parameters.sliding_attention.rope_theta`",
            ),
            (json!({"local_rope_theta": null}), "`local_rope_theta` must be a positive number"),
            (json!({"layer_types": ["full_attention"]}), "`layer_types` has 1 entries"),
            (json!({"layer_types": ["conv", "conv", "conv", "conv"]}), "`layer_types: conv`"),
            (json!({"classifier_pooling": "max"}), "`classifier_pooling: max`"),
            (json!({"head_dim": 4}), "`head_dim: 4`"),
            (json!({"hidden_size": 6}), "rotary positions need an even number"),
            (json!({"initializer_cutoff_factor": 0.0}), "`initializer_cutoff_factor`"),
        ];
        for (changes, expected) in cases {
            let error = build(&config(changes), 2, &mut ParameterTable::default()).err().unwrap();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
