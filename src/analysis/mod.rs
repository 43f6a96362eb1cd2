//! What result files say: statistics over seeds and the comparison of methods.

pub mod compare;
pub mod statistics;
