//! The order in which training goes through examples.

use serde::{Deserialize, Serialize};

use crate::random::{self, Key, Purpose};

/// The order of the training examples in an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Another permutation in every epoch, a pure function of seed and epoch.
    Shuffled,
    /// As in the file.
    Sequential,
}

impl Order {
    /// Returns the numbers of the training examples in the order of an epoch, from 0.
    pub fn of_epoch(self, examples: usize, seed: u64, epoch: usize) -> Vec<usize> {
        match self {
            Order::Shuffled => random::permutation(examples, Key::derive(seed, Purpose::Order, epoch as u64)),
            Order::Sequential => (0..examples).collect(),
        }
    }
}
