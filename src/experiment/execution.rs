//! An experiment from its plan to a complete results file, whoever trains the runs: this process or several workers.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::kept::{kept_folder, mask_file};
use super::plan::Plan;
use super::queue::{Queue, Turn};
use super::results::{NeededSources, Recorded, ResultsFile, Row, Status, read};
use super::run::{Run, RunPurpose};
use super::runner::{Attempt, RunEvent};
use super::selection::Verdict;
use crate::data::TaskCard;
use crate::error::{Error, Result};
use crate::method::MaskKind;
use crate::model::is_saved;
use crate::spelling::quoted;

/// Who trains runs: as many at once as it has room for.
pub trait Executor {
    /// Tells what happens to whoever watches.
    fn report(&mut self, event: RunEvent);

    /// Makes ready to train those runs of a plan that are missing, and checks the models they start from.
    ///
    /// # Errors
    /// Fails if a model cannot be used.
    fn prepare(&mut self, missing: &[&Arc<Run>]) -> Result<()>;

    /// Returns whether another run can be started.
    fn has_room(&self) -> bool;

    /// Starts a run.
    ///
    /// # Errors
    /// Fails if nobody is left to train it.
    fn start(&mut self, turn: Turn) -> Result<()>;

    /// Waits until a run that was started has ended; nothing if none was started.
    ///
    /// # Errors
    /// Fails if the results file cannot be used, or a model cannot be loaded.
    fn wait(&mut self, results: &ResultsFile) -> Result<Option<(Turn, Attempt)>>;
}

/// What became of the runs of an experiment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Runs that ended well in this process or its workers.
    pub ok: usize,
    /// Runs that diverged or failed there.
    pub failed: usize,
    /// Runs that were there already.
    pub skipped: usize,
    /// Of these, runs that had diverged.
    pub diverged_before: usize,
    /// Runs that another process is at work on, or that wait for one of those.
    pub elsewhere: usize,
    /// Choices of which no trial has a score, so that nothing is reported.
    pub not_chosen: usize,
    /// Whether the user stopped the experiment.
    pub interrupted: bool,
}

/// Trains every run that the results file of a plan lacks: the trials of a selection first, then the runs that are
/// reported. `interrupted` stops it between two batches.
///
/// A run that diverges or fails becomes a row, and the next one starts.
///
/// # Errors
/// Fails if the results file cannot be used, or a model cannot be loaded.
pub fn execute(plan: &Plan, executor: &mut dyn Executor, interrupted: &AtomicBool) -> Result<Summary> {
    let results = open_places(plan)?;
    if let Some(repair) = results.repaired() {
        executor.report(RunEvent::Note(repair.to_owned()));
    }
    let sources = sources(plan);
    let needed = (!sources.is_empty()).then(|| results.need_sources(sources)).transpose()?;
    let recorded = results.recorded()?;
    if let Some(run) = recorded.mangled_run() {
        return Err(Error::configuration(format!(
            "{}: {} is no id of a run, 16 hexadecimal digits; a spreadsheet may have taken it for a number, and runs would be done again",
            plan.results.display(),
            quoted(run)
        )));
    }
    for note in not_kept(plan, &recorded).chain(not_scored(plan)) {
        executor.report(RunEvent::Note(note));
    }
    let missing: Vec<_> = plan.all_runs().filter(|run| !recorded.has(&run.id, run.rows())).collect();
    executor.prepare(&missing)?;
    let mut execution =
        Execution { executor, results, interrupted, notes: &plan.notes, summary: Summary::default() };
    execution.train_missing(&plan.selection.trials)?;
    if !execution.summary.interrupted {
        let runs = [plan.runs.clone(), execution.chosen(plan)?].concat();
        execution.train_missing(&runs)?;
    }
    if let Some(needed) = needed {
        clear_sources(plan, &execution.results, needed)?;
    }
    let had_diverged = |run: &&Arc<Run>| recorded.status(&run.id) == Some(Status::Diverged);
    execution.summary.diverged_before = plan.all_runs().filter(had_diverged).count();
    Ok(execution.summary)
}

/// Says how many runs have ended before and left no model, or no mask, in the folder that the plan now keeps those in.
fn not_kept(plan: &Plan, recorded: &Recorded) -> impl Iterator<Item = String> {
    let lacking = |what: &str, folder: &Path, lacks: &dyn Fn(&Run) -> bool| {
        let ended = |run: &&Arc<Run>| recorded.status(&run.id) == Some(Status::Ok);
        let kept = plan.all_runs().filter(|run| run.purpose != RunPurpose::Selection);
        let count = kept.filter(ended).filter(|run| lacks(run)).count();
        (count > 0).then(|| {
            format!(
                "{count} runs that had ended before have no {what} in {}; with another `results` file they are trained again",
                folder.display()
            )
        })
    };
    let model = plan
        .save
        .as_ref()
        .and_then(|folder| lacking("model", folder, &|run| !is_saved(&kept_folder(plan, &run.id))));
    let mask = plan.masks.as_ref().and_then(|folder| {
        lacking("mask", folder, &|run| {
            run.method.mask() == Some(MaskKind::Fixed) && !mask_file(folder, &run.id).exists()
        })
    });
    model.into_iter().chain(mask)
}

/// Says which metrics of a data set the runs lack that had ended before: an experiment may have got them since.
fn not_scored(plan: &Plan) -> impl Iterator<Item = String> {
    // What cannot be read has been edited, which `compare` will say.
    let mut rows = read(&plan.results).unwrap_or_default();
    let runs: HashSet<&str> = plan.all_runs().map(|run| run.id.as_str()).collect();
    rows.retain(|row| row.status == Status::Ok && runs.contains(row.run.as_str()));
    let mut cards: BTreeMap<&str, &TaskCard> = BTreeMap::new();
    for evaluated in plan.all_runs().flat_map(|run| run.evaluations.iter()) {
        cards.insert(&evaluated.on.card.name, &evaluated.on.card);
    }
    let mut notes = Vec::new();
    for (name, card) in cards {
        // Where the score is not defined, since predictions are constant, other metrics may not be either.
        let mut own: Vec<&mut Row> =
            rows.iter_mut().filter(|row| row.evaluated_on == name && row.score.is_some()).collect();
        let (mut missing, mut lacking) = (Vec::new(), HashSet::new());
        for metric in &card.metrics {
            let without =
                own.iter_mut().filter_map(|row| row.column_of(*metric).is_none().then(|| row.run.clone()));
            let without: Vec<String> = without.collect();
            if !without.is_empty() {
                missing.push(metric.to_string());
                lacking.extend(without);
            }
        }
        if !missing.is_empty() {
            notes.push(format!(
                "{} runs that had ended before have no {} on {name}, which the task did not have then; with another `results` file \
                 they are scored again",
                lacking.len(),
                missing.join(", ")
            ));
        }
    }
    notes.into_iter()
}

/// Opens the results file of a plan, and makes the folders of its models and masks.
///
/// # Errors
/// Fails if one of them cannot be used.
pub fn open_places(plan: &Plan) -> Result<ResultsFile> {
    make_folders(plan)?;
    ResultsFile::open(&plan.results)
}

struct Execution<'a> {
    executor: &'a mut dyn Executor,
    results: ResultsFile,
    interrupted: &'a AtomicBool,
    /// What is to be said about models and data before the first run.
    notes: &'a [String],
    summary: Summary,
}

impl Execution<'_> {
    /// Trains those of some runs that are not there yet.
    fn train_missing(&mut self, runs: &[Arc<Run>]) -> Result<()> {
        let mut queue = Queue::new(runs, &self.results.recorded()?);
        self.summary.skipped += queue.there();
        self.executor.report(RunEvent::Queued {
            there: queue.there(),
            total: queue.total(),
            steps: queue.waiting().map(|run| run.total_steps()).sum(),
        });
        loop {
            while self.executor.has_room() && !self.interrupted.load(Ordering::Relaxed) {
                let Some(turn) = queue.take_next() else { break };
                for note in std::mem::take(&mut self.notes) {
                    self.executor.report(RunEvent::Note(note.clone()));
                }
                self.executor.start(turn)?;
            }
            let Some((turn, attempt)) = self.executor.wait(&self.results)? else { break };
            match attempt {
                Attempt::Ended(rows) => {
                    let ok = rows.iter().all(|row| row.status == Status::Ok);
                    *(if ok { &mut self.summary.ok } else { &mut self.summary.failed }) += 1;
                    queue.ended(&turn);
                }
                Attempt::There => {
                    self.summary.skipped += 1;
                    queue.ended(&turn);
                }
                Attempt::Elsewhere => queue.is_elsewhere(&turn),
                Attempt::Interrupted | Attempt::Lost => queue.put_back(&turn),
            }
        }
        // Only an interruption leaves runs that nobody has tried.
        self.summary.interrupted |= queue.waiting().next().is_some();
        self.summary.elsewhere += queue.elsewhere();
        Ok(())
    }

    /// Returns the runs that the trials chose; a choice whose trials are not all done is left open.
    fn chosen(&mut self, plan: &Plan) -> Result<Vec<Arc<Run>>> {
        if plan.selection.choices.is_empty() {
            return Ok(Vec::new());
        }
        let rows = read(self.results.path())?;
        let mut runs = Vec::new();
        for choice in &plan.selection.choices {
            let note = match choice.choose(&rows) {
                Verdict::Open => format!("{}: not chosen yet, as trials are missing or failed", choice.what),
                Verdict::Scoreless => {
                    self.summary.not_chosen += 1;
                    format!(
                        "{}: nothing is chosen and nothing reported, as no trial has a score",
                        choice.what
                    )
                }
                Verdict::Chosen { candidate, mean } => {
                    runs.extend(candidate.reports.iter().cloned());
                    let (settings, count) = (choice.settings_of(candidate), choice.candidates.len());
                    format!("{}: chose {settings} (mean {:.2}, best of {count})", choice.what, 100.0 * mean)
                }
            };
            self.executor.report(RunEvent::Note(note));
        }
        Ok(runs)
    }
}

/// Makes the folders of models and masks before anything trains, so that a bad place does not cost trained runs.
fn make_folders(plan: &Plan) -> Result<()> {
    for (key, folder) in [("save", &plan.save), ("masks", &plan.masks)] {
        let Some(folder) = folder else { continue };
        std::fs::create_dir_all(folder).map_err(|error| {
            Error::Environment(format!(
                "cannot create the folder {}: {error}; name another place with `{key}:`",
                folder.display()
            ))
        })?;
    }
    Ok(())
}

/// Returns the ids of the runs whose weights are kept only for others of a plan to start from.
fn sources(plan: &Plan) -> BTreeSet<String> {
    let sources = plan.runs.iter().filter(|_| plan.save.is_none()).filter_map(|run| run.source_run());
    sources.map(|source| source.id.clone()).collect()
}

/// Removes the weights that were kept only for other runs to start from, once those are done and no other process needs them.
fn clear_sources(plan: &Plan, results: &ResultsFile, needed: NeededSources) -> Result<()> {
    let recorded = results.recorded()?;
    let is_open = |run: &&Arc<Run>| !recorded.has(&run.id, run.rows());
    let still_needed: HashSet<&str> = (plan.runs.iter().filter(is_open))
        .filter_map(|run| run.source_run().map(|source| source.id.as_str()))
        .collect();
    results.release_sources(needed, |source| {
        if !still_needed.contains(source) {
            // What cannot be removed does no harm; the folder above goes with the last one.
            let kept = kept_folder(plan, source);
            let _ = std::fs::remove_dir_all(&kept);
            if let Some(above) = kept.parent() {
                let _ = std::fs::remove_dir(above);
            }
        }
    })
}
