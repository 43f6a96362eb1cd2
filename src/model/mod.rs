//! Pretrained encoders: their parameters, layers, families, and the Hugging Face folders they live in.

mod bert;
mod checkpoint;
mod checkpointing;
mod classifier;
mod config;
mod dropout;
mod layer_norm;
mod layers;
mod params;
mod precision;
mod weights;

pub(crate) use checkpoint::publish;
pub use checkpoint::{LoadReport, ModelFolder};
pub use classifier::{Classifier, HeadStart, Labels, ModelShape, Network};
pub use config::{FAMILIES, ModelConfig};
pub use dropout::Dropout;
pub use layer_norm::LayerNorm;
pub use layers::{Embedding, LayerObserver, Linear, Pass, Rows, loss};
pub use params::{
    Parameter, ParameterId, ParameterKind, ParameterPlace, ParameterTable, Parameters, Trainable,
    TrainableGroup,
};
pub use precision::Precision;
pub use weights::{ElementType, StoredTensor, Weights};
