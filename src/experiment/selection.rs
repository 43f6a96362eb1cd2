//! Tuning: trials on seeds of their own choose the hyper-parameters of the runs that are reported.

use std::sync::Arc;

use super::results::{Row, Status};
use super::run::Run;

/// The trials of an experiment, and what they choose between.
#[derive(Default)]
pub struct Selection {
    /// The runs whose scores choose.
    pub trials: Vec<Arc<Run>>,
    /// What is chosen, one for each model, task, method and size of the training data.
    pub choices: Vec<Choice>,
}

/// A choice between settings of one method on one task.
pub struct Choice {
    /// What is tuned, in a few words.
    pub what: String,
    /// The settings, in the order of the grid.
    pub candidates: Vec<Candidate>,
}

/// One point of the grid.
pub struct Candidate {
    /// Its settings, in a few words.
    pub settings: String,
    /// The trials that judge it.
    pub trials: Vec<Arc<Run>>,
    /// The runs that are reported if it is chosen.
    pub reports: Vec<Arc<Run>>,
}

/// What the trials of a choice came to.
pub struct Chosen<'a> {
    /// What was tuned.
    pub what: &'a str,
    /// The best candidate.
    pub candidate: &'a Candidate,
    /// Its mean headline metric over the seeds of the trials; `None` if no trial has one.
    pub mean: Option<f64>,
}

impl Choice {
    /// Chooses the candidate with the highest mean dev score, among those with the most trials that have one; the first of
    /// equals. Returns nothing while a trial is missing or failed.
    pub fn choose(&self, rows: &[Row]) -> Option<Chosen<'_>> {
        let mut best: Option<(usize, f64, &Candidate)> = None;
        for candidate in &self.candidates {
            let mut scores = Vec::new();
            for trial in &candidate.trials {
                let row = rows.iter().find(|row| {
                    row.run == trial.id
                        && row.evaluated_on == trial.task.card.name
                        && row.status != Status::Failed
                })?;
                scores.extend(row.score.filter(|_| row.status == Status::Ok));
            }
            let mean = scores.iter().sum::<f64>() / scores.len().max(1) as f64;
            if best.is_none_or(|(count, highest, _)| (scores.len(), mean) > (count, highest)) {
                best = Some((scores.len(), mean, candidate));
            }
        }
        let (count, mean, candidate) = best?;
        Some(Chosen { what: &self.what, candidate, mean: (count > 0).then_some(mean) })
    }
}
