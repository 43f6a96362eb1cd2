//! The head of RoBERTa and ELECTRA.

use tch::Tensor;

use super::layers::{Activation, Linear};
use super::parameter::ParameterPlace;
use super::params::ParameterTable;
use super::pass::{Pass, Rows};
use crate::error::Result;

/// A head of two layers, with dropout before each.
pub(super) struct TwoLayerHead {
    dense: Linear,
    output: Linear,
    activation: Activation,
    dropout: f64,
}

impl TwoLayerHead {
    /// Declares the head as `classifier.dense` and `classifier.out_proj`.
    pub fn declare(
        table: &mut ParameterTable,
        [hidden, outputs]: [i64; 2],
        activation: Activation,
        dropout: f64,
    ) -> Self {
        let mut linear = |name: &str, sizes: [i64; 2]| {
            Linear::declare(table, name, sizes, ParameterPlace::Head, Rows::Examples)
        };
        Self {
            dense: linear("classifier.dense", [hidden, hidden]),
            output: linear("classifier.out_proj", [hidden, outputs]),
            activation,
            dropout,
        }
    }

    /// Applies the head to the states of the first tokens: `[examples, hidden]` to `[examples, outputs]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn forward(&self, pass: &Pass, first: &Tensor) -> Result<Tensor> {
        let dropped = pass.dropout(first, self.dropout, Rows::Examples)?;
        let hidden = self.activation.forward(&self.dense.forward(pass, &dropped)?)?;
        self.output.forward(pass, &pass.dropout(&hidden, self.dropout, Rows::Examples)?)
    }

    /// Returns the layer with one output a label.
    pub fn output(&self) -> Linear {
        self.output
    }
}
