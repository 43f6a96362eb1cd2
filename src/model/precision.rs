//! The number types that a model computes in.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::error::Result;
use crate::libtorch::Tf32;

/// The number type of the forward and backward pass; weights and optimizer are float32 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    /// float32 throughout.
    #[serde(rename = "float32")]
    Float32,
    /// float32 throughout, but matrix products in TF32 on GPUs that have it; on the CPU exactly [`Precision::Float32`].
    #[serde(rename = "tf32")]
    Tf32,
    /// bfloat16 activations and matrix products.
    #[serde(rename = "bf16")]
    Bf16,
}

impl Precision {
    /// Returns the type that the body of the model computes in.
    pub fn kind(self) -> Kind {
        match self {
            Precision::Float32 | Precision::Tf32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        }
    }

    /// Settles what products of float32 matrices are on a device, for as long as the returned value lives.
    ///
    /// # Errors
    /// As for [`Tf32::allow`].
    pub fn matrix_products(self, device: Device) -> Result<Tf32> {
        Tf32::allow(self == Precision::Tf32, device)
    }
}
