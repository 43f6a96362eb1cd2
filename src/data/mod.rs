//! Data: what a task is, its files as examples, its examples as token ids, its metrics.

mod batch;
mod custom;
mod encode;
mod label_map;
mod label_noise;
mod metrics;
mod reader;
mod sheet;
mod table;
mod task;

pub use batch::{EncodedDataset, PackedBatch, Padding, Targets};
pub use custom::{CustomObjective, CustomTask};
pub use encode::{Encoded, TokenEncoder};
pub use label_map::LabelMap;
pub use label_noise::noisy_labels;
pub use metrics::{Metric, score_classes, score_values};
pub use reader::{Dataset, Example, Label, read_file, read_split};
pub use task::{Format, Keep, Layout, Objective, RowFilter, Split, SplitFiles, TaskCard};

pub fn cache_folder() -> Option<std::path::PathBuf> { None }
