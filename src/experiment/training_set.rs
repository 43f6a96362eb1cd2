//! The examples that a run trains on: all, or a subset that is random, stratified by label, nested and a pure function of the
//! seed; with the labels they have, or some of them wrong.

use std::borrow::Cow;

use super::run::Run;
use crate::data::{EncodedDataset, noisy_labels, subset};
use crate::error::Result;
use crate::random::{Key, Purpose};

/// Returns the examples that a run trains on, with the labels it trains on.
///
/// # Errors
/// Fails if libtorch cannot allocate.
pub fn training_set<'d>(all: &'d EncodedDataset, run: &Run) -> Result<Cow<'d, EncodedDataset>> {
    let chosen = match run.examples {
        None => Cow::Borrowed(all),
        Some(count) => Cow::Owned(all.part(&subset(
            &run.task.train.dataset.examples,
            count,
            Key::derive(run.seed, Purpose::Subset, 0),
        ))?),
    };
    if run.label_noise == 0.0 {
        return Ok(chosen);
    }
    let mut noisy = chosen.into_owned();
    noisy.targets = noisy_labels(&noisy.targets, run.task.card.label_count(), run.label_noise, run.seed)?;
    Ok(Cow::Owned(noisy))
}
