//! RoBERTa (Liu et al., 2019) with a classification or regression head.
//!
//! The arithmetic, the names and the places of dropout are those of transformers' `RobertaForSequenceClassification`.

use tch::{Kind, Tensor};

use super::classifier::{Network, Sizes};
use super::config::ModelConfig;
use super::head::TwoLayerHead;
use super::layers::{Activation, Linear};
use super::params::ParameterTable;
use super::pass::Pass;
use super::post_norm::{BERT_NAMES, Embeddings, LayerSettings, Layers};
use crate::data::PackedBatch;
use crate::error::Result;

/// A RoBERTa encoder and head.
struct Roberta {
    embeddings: Embeddings,
    layers: Layers,
    head: TwoLayerHead,
    sizes: Sizes,
    /// The token that stands where nothing is; positions count from behind its number.
    padding: i64,
}

/// Declares the parameters of a RoBERTa and returns its network.
///
/// # Errors
/// Fails if the config lacks a size or asks for arithmetic that is not here.
pub fn build(config: &ModelConfig, outputs: i64, table: &mut ParameterTable) -> Result<Box<dyn Network>> {
    let mut settings = LayerSettings::read(config)?;
    let padding = config.token_or("pad_token_id", 1)?;
    let rows = config.integer("max_position_embeddings")?;
    let positions = rows - padding - 1;
    if positions < 1 {
        return Err(config.error("`max_position_embeddings` leaves no position behind `pad_token_id`"));
    }
    settings.sizes.positions = Some(positions);
    let LayerSettings { sizes, epsilon, hidden_dropout, .. } = settings;
    let entries = (&sizes, rows);
    Ok(Box::new(Roberta {
        embeddings: Embeddings::declare(table, "roberta", entries, sizes.hidden, epsilon, hidden_dropout),
        layers: Layers::declare(table, "roberta.encoder.layer", &BERT_NAMES, settings),
        head: TwoLayerHead::declare(
            table,
            [sizes.hidden, outputs],
            Activation::Tanh,
            config.dropout_or("classifier_dropout", hidden_dropout)?,
        ),
        sizes,
        padding,
    }))
}

impl Network for Roberta {
    fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        let embedded = self.embeddings.forward(pass, &positions(pass.batch, self.padding)?)?;
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
        "RobertaForSequenceClassification"
    }

    fn body_prefix(&self) -> &'static str {
        "roberta."
    }
}

/// Returns the position of each token, `[tokens]`: they count from `padding + 1` over the tokens of the example that are
/// not the padding token, which a text may spell out; that one has the position `padding`.
///
/// The reference is transformers' `create_position_ids_from_input_ids`.
fn positions(batch: &PackedBatch, padding: i64) -> Result<Tensor> {
    let counts = batch.input_ids.f_ne(padding)?.f_to_kind(Kind::Int64)?;
    let all = counts.f_cumsum(0, Kind::Int64)?;
    let first =
        Tensor::f_arange(counts.size()[0], (Kind::Int64, counts.device()))?.f_sub(&batch.positions)?;
    let before = all.f_sub(&counts)?.f_index_select(0, &first)?;
    Ok(all.f_sub(&before)?.f_mul(&counts)?.f_add_scalar(padding)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::data::Encoded;

    #[test]
    fn a_model_without_a_position_for_text_is_refused() {
        let config = json!({
            "vocab_size": 10, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4,
            "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 2,
        });
        let config = ModelConfig::from_values(config.as_object().cloned().unwrap());
        let error = build(&config, 2, &mut ParameterTable::default()).err().unwrap().to_string();
        assert!(error.contains("leaves no position behind `pad_token_id`"), "{error}");
    }

    #[test]
    fn positions_leave_out_padding_that_a_text_spells_out() {
        let example = |ids: &[u32]| Encoded { ids: ids.to_vec(), token_types: vec![0; ids.len()] };
        let examples = [example(&[0, 5, 1, 6, 2]), example(&[1, 1, 7]), example(&[0, 2])];
        let batch = PackedBatch::pack(&examples.iter().collect::<Vec<_>>(), 0, Device::Cpu).unwrap();
        let found: Vec<i64> = positions(&batch, 1).unwrap().try_into().unwrap();
        assert_eq!(found, [2, 3, 1, 4, 5, 1, 1, 2, 2, 3]);
    }
}
