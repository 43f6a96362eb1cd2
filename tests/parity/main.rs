//! Numbers against references that this project did not compute: PyTorch, transformers, the released optimizer.
//!
//! The references are files under `tests/fixtures`, written by `scripts/make_fixtures.py`.

mod adaptive;
mod bert;
mod criteria;
mod families;
mod fisher;
mod fixture;
#[path = "../common/interpreter.rs"]
mod interpreter;
mod methods;
mod optimizer;
mod penalties;
mod references;
mod step_order;
mod step_variance;
mod training;
mod weights;
