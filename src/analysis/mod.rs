//! What result files say: the comparison of methods over seeds, and reports with figures.

pub mod compare;
pub mod cost;
mod figure;
pub mod report;
