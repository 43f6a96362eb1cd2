//! Data: what a task is, its files as examples, its examples as token ids, its metrics; where data sets come from and
//! what they hold.

mod attention_layout;
mod batch;
mod check;
mod custom;
mod encode;
mod encoded_dataset;
mod fetch;
mod files;
mod label;
mod label_map;
mod label_noise;
mod layout;
mod metrics;
mod order;
mod packed_rows;
mod reader;
mod sheet;
mod subset;
mod table;
mod task;
mod tokenizer;

pub use attention_layout::{AttentionLayout, Rectangle};
pub use batch::{BatchShape, PackedBatch};
pub use check::{InTrain, Lengths, Scores, SplitCheck, TokenLengths, check_splits, read_present};
pub use custom::{CustomObjective, CustomTask};
pub use encode::{Encoded, TokenEncoder};
pub use encoded_dataset::{EncodedDataset, Targets};
pub use fetch::{Download, FetchEvent, FetchOptions, Fetched, downloads_of, fetched_data_folder};
pub use files::data_roots;
pub use label::{Label, same_label};
pub use label_map::LabelMap;
pub use label_noise::noisy_labels;
pub use layout::{Keep, Layout, RowFilter, SplitFiles};
pub use metrics::{Metric, score_classes, score_values};
pub use order::Order;
pub use reader::{Dataset, read_file, read_split, roots_of_training};
pub use sheet::Example;
pub use subset::subset;
pub use table::Format;
pub use task::{Objective, Split, TaskCard};
pub(crate) use tokenizer::{FILES as TOKENIZER_FILES, VOCABULARIES as TOKENIZER_VOCABULARIES};
