//! Fine-tunes pretrained text encoders by training only a *child network* (Xu et al., EMNLP 2021), and compares that
//! with other methods over many seeds.
//!
//! The floors of the house, each importing only what stands below it:
//!
//! | module | what it is |
//! |---|---|
//! | [`verify`] | a device against the CPU, and its speed |
//! | [`analysis`] | comparisons, from result CSVs only |
//! | [`experiment`] | YAML as typed → plan of runs → runner → result CSV |
//! | [`hub`] | models from the Hugging Face Hub, and its cache |
//! | [`train`] | the training loop, optimizer, schedule, evaluation of one run |
//! | [`method`] | fine-tuning methods behind one trait |
//! | [`child`] | child networks: masks that are drawn, chosen by scores, or adapted; gradient hooks |
//! | [`model`] | pretrained encoders, one file a family, and Hugging Face folders |
//! | [`data`] | tasks, readers, tokens, batches, metrics |
//! | [`transfer`] | files over HTTP |
//! | [`libtorch`] | what tch leaves out; the only `unsafe` code |
//!
//! The library prints nothing: it returns values and reports events, which the command line shows.

#![warn(missing_docs)]

pub mod analysis;
pub mod child;
mod csv_lines;
pub mod data;
pub mod error;
pub mod experiment;
pub mod files;
pub mod hub;
pub mod libtorch;
mod locking;
pub mod method;
pub mod model;
pub mod random;
pub mod spelling;
pub mod statistics;
pub mod train;
pub mod transfer;
pub mod values;
pub mod verify;
pub mod yaml;
