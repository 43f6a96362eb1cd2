//! Tuning: trials on seeds of their own choose the hyper-parameters of the runs that are reported.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::entries::OpenTask;
use super::results::{Row, Status};
use super::run::{Run, RunIds};
use super::spec::ExperimentSpec;
use super::stage_spec::{SelectBy, SelectSpec};
use crate::error::{Error, Result};
use crate::statistics::{is_above, mean};

/// The trials of an experiment, and what they choose between.
#[derive(Default)]
pub struct Selection {
    /// The runs whose scores choose.
    pub trials: Vec<Arc<Run>>,
    /// What is chosen, one for each model, task, method and size of the training data.
    pub choices: Vec<Choice>,
    trial_ids: HashSet<String>,
    report_ids: RunIds,
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
    /// Its hyper-parameters, and the options of its method.
    settings: (Map<String, Value>, String),
    /// The trials that judge it.
    pub trials: Vec<Arc<Run>>,
    /// The runs that are reported if it is chosen.
    pub reports: Vec<Arc<Run>>,
}

/// What the trials of a choice came to.
pub enum Verdict<'a> {
    /// Nothing yet: a trial is missing or failed.
    Open,
    /// All are done, and none has a score.
    Scoreless,
    /// One candidate is the best.
    Chosen {
        /// Which.
        candidate: &'a Candidate,
        /// Its mean headline metric over the seeds of the trials that have one.
        mean: f64,
    },
}

impl Selection {
    /// Adds a point of the grid as a candidate: its trials, and what is reported if it is chosen, from so many training examples,
    /// if the experiment says so.
    ///
    /// # Errors
    /// Fails if what would be reported is there already.
    pub fn add(
        &mut self,
        trials: Vec<Arc<Run>>,
        reports: Vec<Arc<Run>>,
        examples: Option<usize>,
    ) -> Result<()> {
        let Some(run) = reports.first() else { return Ok(()) };
        reports.iter().try_for_each(|run| self.report_ids.add(run, examples))?;
        let what = conditions(run);
        let settings = (run.further_settings(), run.method.options());
        // Two sizes of the training data may both be all that is not held out.
        for trial in &trials {
            if self.trial_ids.insert(trial.id.clone()) {
                self.trials.push(trial.clone());
            }
        }
        let candidate = Candidate { settings, trials, reports };
        match self.choices.iter_mut().find(|choice| choice.what == what) {
            Some(choice) => choice.candidates.push(candidate),
            None => self.choices.push(Choice { what, candidates: vec![candidate] }),
        }
        Ok(())
    }

    /// Keeps the runs that are wanted, and the choices that they leave.
    pub fn retain(&mut self, wanted: impl Fn(&Run) -> bool) {
        self.trials.retain(|run| wanted(run));
        for choice in &mut self.choices {
            for candidate in &mut choice.candidates {
                candidate.trials.retain(|run| wanted(run));
                candidate.reports.retain(|run| wanted(run));
            }
            choice.candidates.retain(|candidate| !candidate.reports.is_empty());
        }
        self.choices.retain(|choice| !choice.candidates.is_empty());
    }
}

/// Says what is not tuned, which is what a choice is made for.
fn conditions(run: &Run) -> String {
    let mut text = format!("{} on {} with {}", run.method.name(), run.task.card.name, run.model.name);
    if let Some(examples) = run.examples {
        text += &format!(" examples={examples}");
    }
    if run.label_noise > 0.0 {
        text += &format!(" label_noise={}", run.label_noise);
    }
    text
}

/// Refuses selections that contradict the rest of the experiment.
///
/// # Errors
/// Fails, naming the keys, if there are stages too, if a seed would both choose and be reported, or if a share is to be held
/// out that nothing holds out.
pub fn check(spec: &ExperimentSpec, seeds: &[u64]) -> Result<()> {
    let Some(select) = &spec.select else { return Ok(()) };
    if spec.then.is_some() {
        return Err(Error::configuration(
            "`select` and `then` exclude each other; tune in one experiment, and go on from its runs in another \
             (`init_from`)",
        ));
    }
    if select.share.is_some() && select.by != SelectBy::HeldOut {
        return Err(Error::configuration(
            "select: `share` is what `by: held_out` holds out, and goes with that only",
        ));
    }
    let shared = select.on_seeds.0.iter().find(|seed| seeds.contains(seed));
    match shared {
        Some(seed) if !select.share_seeds => Err(Error::configuration(format!(
            "select: seed {seed} would both choose the settings and be reported, which flatters the report; take other \
             `on_seeds`, or set `share_seeds: true`"
        ))),
        _ => Ok(()),
    }
}

/// Returns the tasks as trials train on them and are scored: as reports are, or with a part of train in the place of dev.
///
/// # Errors
/// Fails if a task has too few examples to hold some out.
pub fn trial_tasks(select: &SelectSpec, tasks: &[OpenTask]) -> Result<Vec<OpenTask>> {
    /// What is held out where the experiment does not say.
    const SHARE: f64 = 0.1;
    if select.by == SelectBy::Dev {
        return Ok(tasks.to_vec());
    }
    let share = select.share.map_or(SHARE, |share| share.0);
    let held_out = |(task, _): &OpenTask| {
        let task = task.with_held_out(share)?;
        let own = task.own_evaluation()?;
        Ok((Arc::new(task), Arc::from([own])))
    };
    tasks.iter().map(held_out).collect()
}

impl Choice {
    /// Chooses the candidate with the highest mean score, among those with the most trials that have one; the first of
    /// equals.
    pub fn choose(&self, rows: &[Row]) -> Verdict<'_> {
        let mut best: Option<(usize, f64, &Candidate)> = None;
        for candidate in &self.candidates {
            let mut scores = Vec::new();
            for trial in &candidate.trials {
                let row = rows.iter().find(|row| {
                    row.run == trial.id
                        && row.evaluated_on == trial.task.card.name
                        && row.split == trial.task.dev.split.to_string()
                        && row.status != Status::Failed
                });
                let Some(row) = row else { return Verdict::Open };
                scores.extend(row.score.filter(|_| row.status == Status::Ok));
            }
            let Some(mean) = mean(&scores) else { continue };
            let is_better = |(count, best, _): (usize, f64, _)| match scores.len() == count {
                true => is_above(mean, best),
                false => scores.len() > count,
            };
            if best.is_none_or(is_better) {
                best = Some((scores.len(), mean, candidate));
            }
        }
        best.map_or(Verdict::Scoreless, |(_, mean, candidate)| Verdict::Chosen { candidate, mean })
    }

    /// Says what a candidate is made of: its method's options, and what of its hyper-parameters not all candidates share.
    pub fn settings_of(&self, candidate: &Candidate) -> String {
        let (own, options) = &candidate.settings;
        let is_shared = |key: &String, value: &Value| {
            self.candidates.iter().all(|other| other.settings.0.get(key) == Some(value))
        };
        let telling = (own.iter())
            .filter(|(key, value)| !is_shared(key, value))
            .map(|(key, value)| format!("{key}={value}"));
        let options = Some(options.clone()).filter(|options| !options.is_empty());
        let all: Vec<String> = options.into_iter().chain(telling).collect();
        if all.is_empty() { "the only settings".into() } else { all.join(" ") }
    }
}
