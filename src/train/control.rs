//! How a run is watched and stopped.

use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::values::nan_as_null;

/// Something that happened in a run, for whoever shows or logs it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// A frozen encoder passed over examples.
    Encoded(Progress),
    /// A method passed over examples before training.
    Prepared(Progress),
    /// An optimizer step ended of the training that a method begins with, whose weights it takes back.
    FirstTraining(Progress),
    /// An optimizer step ended.
    Step {
        /// Steps done, of all steps.
        progress: Progress,
        /// The loss at the last look.
        #[serde(with = "nan_as_null")]
        loss: f64,
    },
    /// Examples were evaluated.
    Evaluated(Progress),
    /// Memory ran out, and passes have at most so many examples from here on.
    MicroBatch(usize),
    /// An epoch was scored on the dev set.
    Epoch {
        /// The epoch, from 1.
        epoch: usize,
        /// Its headline metric.
        #[serde(with = "nan_as_null")]
        headline: f64,
    },
}

/// So many of so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// How many are done.
    pub done: u64,
    /// How many there are.
    pub total: u64,
}

impl Progress {
    /// Makes the progress of a count.
    pub fn new(done: usize, total: usize) -> Self {
        Self { done: done as u64, total: total as u64 }
    }
}

/// How a run is watched and stopped.
pub struct Control<'a> {
    /// Set to ask the run to stop.
    pub interrupted: &'a AtomicBool,
    /// Told what happens.
    pub report: &'a mut dyn FnMut(Event),
}

impl Control<'_> {
    /// Returns an error if the run was asked to stop.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn check(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}
