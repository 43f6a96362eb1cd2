//! The program as its users start it: what it answers, with which exit code, and what it leaves behind.
//!
//! Every test works in a folder of its own, on tiny models from `tests/fixtures` and the miniature data sets in `data/`.

mod bad_arguments;
mod bad_files;
mod child;
mod compare;
mod data;
mod doctor;
mod experiments;
mod export;
mod families;
mod gpu_check;
mod grid;
mod hub;
#[path = "../hub/server.rs"]
mod hub_server;
#[path = "../common/interpreter.rs"]
mod interpreter;
mod interruption;
mod jobs;
mod launcher;
mod predict;
mod server;
mod support;
mod transfer;
mod tuning;
