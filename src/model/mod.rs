//! Pretrained encoders: their parameters, layers, families, and the Hugging Face folders they live in.

mod attention;
mod bert;
mod checkpoint;
mod checkpointing;
mod classifier;
mod config;
mod convolution;
mod deberta_v2;
mod disentangled;
mod distilbert;
mod dropout;
mod electra;
mod fresh_weights;
mod head;
mod layer_norm;
mod layers;
mod modernbert;
mod noise;
mod params;
mod pass;
mod post_norm;
mod precision;
mod roberta;
mod rotary;
mod weights;
mod xlnet;
mod xlnet_attention;

pub(crate) use checkpoint::publish;
pub use checkpoint::{LoadReport, ModelFolder};
pub use classifier::{Classifier, HeadStart, Labels, ModelShape, Network, Sizes};
pub use config::{FAMILIES, ModelConfig};
pub use convolution::Convolution;
pub use dropout::Dropout;
pub use fresh_weights::FreshWeights;
pub use layer_norm::LayerNorm;
pub use layers::{Embedding, Linear, Vector, loss};
pub(crate) use noise::normal_rows;
pub use noise::{Noise, NoiseKind};
pub use params::{
    Parameter, ParameterId, ParameterKind, ParameterPlace, ParameterTable, Parameters, Trainable,
    TrainableGroup, Treatment,
};
pub use pass::{LayerObserver, Pass, Rows, Shift};
pub use precision::Precision;
pub use weights::{ElementType, StoredTensor, Weights};
pub(crate) use weights::{FORMATS, shard_names};
