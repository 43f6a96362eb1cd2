//! Child networks: which weights train, chosen anew at every step (Bernoulli), once by scores or from a file, or now and again by the
//! gradients of the steps before (adaptive).

mod adaptive;
mod bernoulli;
mod cut;
mod fisher;
mod hooks;
mod mask_file;
mod masking;
mod network;
mod overlap;
mod per_example;
mod select;
mod select_device;
mod uncertainty;

pub use adaptive::{AdaptiveMask, Uses};
pub use bernoulli::BernoulliMask;
pub use cut::{Cut, Threshold, random_scores};
pub use fisher::{Estimator, FisherBatch, FisherInformation, FisherOptions, Spread, fisher_information};
pub use hooks::{GradientHooks, GradientMask};
pub use mask_file::{MaskFile, MaskedTensor, read_mask, write_mask};
pub use masking::{CHUNK, StepMask, mask_in_place, norm_of_spans, squares_of_spans};
pub use network::{ChildNetwork, MaskScope, TensorMask};
pub use overlap::{Granularity, Overlap, Part, overlaps};
pub use select::Extreme;
pub use uncertainty::{Uncertainty, uncertainty};
