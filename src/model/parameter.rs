//! One parameter of a model: what it is and where it stands.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use super::fresh_weights::FreshWeights;

/// What a parameter is to its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// The matrix of a linear layer, `[out, in]` or `[in, out]`; the second may be cut into heads.
    Weight,
    /// The bias of a linear layer, `[out]`.
    Bias,
    /// The scale of a layer normalisation.
    LayerNormWeight,
    /// The shift of a layer normalisation.
    LayerNormBias,
    /// A table of embeddings, `[entries, hidden]`.
    Embedding,
    /// A factor of the low-rank change of a matrix, which a method adds.
    LowRank,
    /// What pretraining alone uses: no pass here does, so it has no gradient, and like torch's optimizers ours leave it alone.
    Unused,
}

/// The part of the model that a parameter belongs to, in the order from the input to the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ParameterPlace {
    /// The embeddings and what normalises them, and all else that feeds the layers.
    Embeddings,
    /// An encoder layer, counted from 0 at the input.
    EncoderLayer(usize),
    /// What stands above the layers and belongs to none, such as ModernBERT's last normalisation.
    AboveLayers,
    /// The pooler, which pretraining brings and the encoder layers feed.
    Pooler,
    /// The task's head, which fine-tuning adds.
    Head,
}

impl fmt::Display for ParameterPlace {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Embeddings => formatter.write_str("embeddings"),
            Self::EncoderLayer(number) => write!(formatter, "layer {number}"),
            Self::AboveLayers => formatter.write_str("above the layers"),
            Self::Pooler => formatter.write_str("pooler"),
            Self::Head => formatter.write_str("head"),
        }
    }
}

impl FromStr for ParameterPlace {
    type Err = ();

    /// Reads what [`fmt::Display`] writes.
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "embeddings" => Ok(Self::Embeddings),
            "above the layers" => Ok(Self::AboveLayers),
            "pooler" => Ok(Self::Pooler),
            "head" => Ok(Self::Head),
            _ => {
                let number = text.strip_prefix("layer ").and_then(|number| number.parse().ok());
                number.map(Self::EncoderLayer).ok_or(())
            }
        }
    }
}

/// One parameter, as a model declares it.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its name in transformers, such as `bert.encoder.layer.0.output.dense.weight`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// What it is to its layer.
    pub kind: ParameterKind,
    /// Where in the model it is.
    pub place: ParameterPlace,
    /// Its elements in the flat buffers.
    pub range: Range<usize>,
    /// Where new weights come from, if it is a matrix or a table.
    pub fresh: FreshWeights,
    /// Whether it is a matrix whose first dimension is that of the inputs, not of the outputs.
    pub input_first: bool,
}

/// Returns the number of encoder layers that parameters belong to.
pub fn layers_of(parameters: &[Parameter]) -> usize {
    parameters.iter().map(Parameter::layer).max().unwrap_or(0)
}

impl Parameter {
    /// Returns the number of the encoder layer that it belongs to, from 1 at the input; 0 if to none.
    pub fn layer(&self) -> usize {
        match self.place {
            ParameterPlace::EncoderLayer(layer) => layer + 1,
            _ => 0,
        }
    }

    /// Returns whether weight decay applies: to matrices and embeddings, not to biases and layer normalisations.
    pub fn decays(&self) -> bool {
        matches!(self.kind, ParameterKind::Weight | ParameterKind::Embedding | ParameterKind::LowRank)
    }

    /// Returns the number of elements.
    pub fn count(&self) -> usize {
        self.range.len()
    }
}
