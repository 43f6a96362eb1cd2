//! The number types that a model computes in.

use serde::{Deserialize, Serialize};
use tch::Kind;

/// The number type of the forward and backward pass; weights and optimizer are float32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    /// float32 throughout.
    #[serde(rename = "float32")]
    Float32,
    /// bfloat16 activations and matrix products.
    #[serde(rename = "bf16")]
    Bf16,
}

impl Precision {
    /// Returns the type that the body of the model computes in.
    pub fn kind(self) -> Kind {
        match self {
            Precision::Float32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        }
    }
}
