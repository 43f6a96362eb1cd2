//! The runner: trains one run after the other in this process, and writes each result down.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Instant, SystemTime};

use tch::Device;

use super::entries::Evaluated;
use super::execution::Executor;
use super::kept::{KeptModel, keep_mask, keep_model, kept_folder, look_at};
use super::machine;
use super::plan::Plan;
use super::queue::Turn;
use super::resident::{ResidentModel, Tokens};
use super::results::{ResultsFile, Row, Status};
use super::run::{Run, RunPurpose};
use super::run_rows::{Outcome, described, measured};
use super::start::Start;
use super::training_set::training_set;
use crate::child::GradientMask;
use crate::error::{Error, Result};
use crate::libtorch;
use crate::model::{Classifier, ModelFolder, is_saved};
use crate::train::{Checkpoint, Control, Event, Progress, Scored, evaluate, train};
use crate::values::yaml_name;

/// Something that happened while an experiment ran.
pub enum RunEvent<'a> {
    /// Something the user should know, in a sentence.
    Note(String),
    /// Runs are about to be trained.
    Queued {
        /// The runs that the results have already.
        there: usize,
        /// All runs.
        total: usize,
        /// Optimizer steps of those that are to be trained.
        steps: u64,
    },
    /// A run starts.
    Started {
        /// The worker that trains it, counted from 0; without worker processes 0.
        worker: usize,
        /// The run and its place.
        turn: &'a Turn,
    },
    /// Something happened within the run that a worker trains.
    Progress {
        /// The worker.
        worker: usize,
        /// What happened.
        event: Event,
    },
    /// The run that a worker trained ended, and its rows are on disk, one for each data set it was scored on.
    Finished {
        /// The worker.
        worker: usize,
        /// The rows.
        rows: &'a [Row],
    },
}

/// What became of a run that was to be trained.
pub enum Attempt {
    /// It ended, well or not, and its rows are on the disk.
    Ended(Vec<Row>),
    /// The results had it already.
    There,
    /// Another process is at work on it, or on what it starts from.
    Elsewhere,
    /// The user asked to stop.
    Interrupted,
    /// The process that trained it was killed; it is to be tried again.
    Lost,
}

/// Trains the runs of a plan.
pub struct Runner<'a> {
    pub(super) plan: &'a Plan,
    device: Device,
    pub(super) interrupted: &'a AtomicBool,
    pub(super) report: &'a mut dyn FnMut(RunEvent),
    /// The model of the last run, kept for the next one.
    pub(super) resident: Option<ResidentModel>,
    pub(super) tokens: Tokens,
    /// Runs whose weights others start from, and were found to be what they left.
    seen_sources: HashSet<String>,
    /// The run that was given and not yet trained.
    turn: Option<Turn>,
}

/// Whether the weights that a run starts from are at hand.
enum Source {
    /// They are: in the pretrained model, or in this folder.
    Ready,
    /// The run that should have made them did not: how this one ends then, and why.
    Lost(Status, String),
    /// Another process is training that run.
    Elsewhere,
}

impl<'a> Runner<'a> {
    /// Makes a runner. `report` is told what happens; `interrupted` stops it between two batches.
    pub fn new(
        plan: &'a Plan,
        device: Device,
        interrupted: &'a AtomicBool,
        report: &'a mut dyn FnMut(RunEvent),
    ) -> Self {
        let (tokens, seen_sources) = (Tokens::default(), HashSet::new());
        Self { plan, device, interrupted, report, resident: None, tokens, seen_sources, turn: None }
    }

    /// Trains a run that nobody else has trained or is at work on, and appends its rows to the results.
    ///
    /// A run that diverges or fails becomes rows that say so.
    ///
    /// # Errors
    /// Fails if the results file cannot be used, or a model cannot be loaded.
    pub fn attempt(&mut self, turn: &Turn, results: &ResultsFile) -> Result<Attempt> {
        let run = turn.run.as_ref();
        let Some(_claim) = results.claim(&run.id)? else { return Ok(Attempt::Elsewhere) };
        // Another process may have finished it since the file was read.
        if results.recorded()?.has(&run.id, run.rows()) {
            return Ok(Attempt::There);
        }
        let source = self.source_of(run, results);
        if let Ok(Source::Elsewhere) = source {
            return Ok(Attempt::Elsewhere);
        }
        (self.report)(RunEvent::Started { worker: 0, turn });
        let rows = match source {
            Ok(Source::Lost(status, why)) => Ok(rows_without_scores(
                self.plan,
                run,
                self.device,
                (status, &format!("not trained: {why}")),
                SystemTime::now(),
            )),
            Ok(_) => self.rows(run),
            Err(error) => Err(error),
        };
        let rows = match rows {
            Err(Error::Interrupted) => return Ok(Attempt::Interrupted),
            rows => rows?,
        };
        results.append(&rows)?;
        Ok(Attempt::Ended(rows))
    }

    /// Loads every model of some runs once before anything trains, so that weights that do not fit do not end a grid halfway.
    /// Says once a model what of it is left out.
    ///
    /// # Errors
    /// Fails, naming what does not fit.
    pub fn check_models<'r>(&mut self, runs: impl IntoIterator<Item = &'r Arc<Run>>) -> Result<()> {
        let mut checked: HashSet<[&str; 3]> = HashSet::new();
        let mut noted: HashSet<&str> = HashSet::new();
        for run in runs.into_iter().filter(|run| run.source_run().is_none()) {
            if !checked.insert([&run.model.name, run.start_id(), &run.task.card.name]) {
                continue;
            }
            let model = self.take_model(run)?;
            let summary = model.classifier.report.summary();
            self.resident = Some(model);
            if let Some(text) = summary.filter(|_| noted.insert(run.start_id())) {
                let folder = match &run.start {
                    Start::Folder(start) => &start.folder,
                    _ => &run.model.folder,
                };
                (self.report)(RunEvent::Note(format!("{}: {text}", folder.path.display())));
            }
        }
        Ok(())
    }

    /// Makes sure that the weights that a run starts from are at hand, training the run that makes them if they are not.
    fn source_of(&mut self, run: &Run, results: &ResultsFile) -> Result<Source> {
        let Some(source) = run.source_run() else { return Ok(Source::Ready) };
        if self.has_left(source) {
            return Ok(Source::Ready);
        }
        match results.recorded()?.status(&source.id) {
            Some(Status::Ok) => {}
            Some(status) => {
                let reason = format!("run {} that it starts from {}", source.id, yaml_name(&status));
                return Ok(Source::Lost(status, reason));
            }
            // Sources come first in a plan: this one is being trained, or was stopped.
            None => return Ok(Source::Elsewhere),
        }
        let Some(_claim) = results.claim(&source.id)? else { return Ok(Source::Elsewhere) };
        if self.has_left(source) {
            return Ok(Source::Ready);
        }
        if let Some(why) = self.obstacle(source) {
            return Ok(Source::Lost(Status::Failed, why));
        }
        if let Source::Elsewhere = self.source_of(source, results)? {
            return Ok(Source::Elsewhere);
        }
        (self.report)(RunEvent::Note(format!(
            "{} is trained again: other runs start from it, and its weights were not kept",
            source.label()
        )));
        match self.rows(source)?.into_iter().find(|row| row.status != Status::Ok) {
            None => Ok(Source::Ready),
            Some(row) => Ok(Source::Lost(Status::Failed, row.reason.unwrap_or_default())),
        }
    }

    /// Returns whether the weights that a run has left for others are there, and what it left.
    fn has_left(&mut self, source: &Run) -> bool {
        let folder = self.kept(source);
        if self.seen_sources.contains(&source.id) && is_saved(&folder) {
            return true;
        }
        let is_whole = look_at(&folder, &source.id) == KeptModel::Whole;
        if is_whole {
            self.seen_sources.insert(source.id.clone());
        }
        is_whole
    }

    /// Says why the weights of a run cannot be trained again in their place, if they cannot: whoever asks has the run's claim, so that
    /// nobody is writing them.
    fn obstacle(&self, source: &Run) -> Option<String> {
        let folder = self.kept(source);
        let what = match look_at(&folder, &source.id) {
            KeptModel::Missing | KeptModel::Whole => return None,
            // Those in a folder of this program's own are of a process that was killed.
            KeptModel::Nameless if self.plan.save.is_none() => return None,
            KeptModel::Nameless => "has a model of which nothing says that this run left it",
            KeptModel::Changed => "has other weights or another config than this run left there",
        };
        let (folder, run) = (folder.display(), &source.id);
        Some(format!("{folder}, of run {run}, {what}; remove the folder, and the run is trained again"))
    }

    /// Does one run. Whatever goes wrong inside it becomes part of its rows.
    fn rows(&mut self, run: &Run) -> Result<Vec<Row>> {
        let started = SystemTime::now();
        machine::reset_peak_memory(self.device);
        let (plan, device) = (self.plan, self.device);
        let without_scores =
            |status, reason: &str| rows_without_scores(plan, run, device, (status, reason), started);
        let mut model = match self.take_model(run) {
            Ok(model) => model,
            Err(error) => {
                // What a source left may be removed by another process that needs it no more.
                let Some(source) = run.source_run().filter(|source| !is_saved(&self.kept(source))) else {
                    return Err(error);
                };
                let reason =
                    format!("the weights of run {} that it starts from have been removed", source.id);
                return Ok(without_scores(Status::Failed, &reason));
            }
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let outcome = self.train(run, &mut model)?;
            let kept = self.keep(run, &model.classifier, outcome.trained.mask.as_deref());
            Ok((outcome, kept))
        }));
        let outcome = match outcome {
            Ok(outcome) => {
                self.resident = Some(model);
                outcome
            }
            // The model may be half changed; the next run starts from the file again.
            Err(panic) => Err(Error::Libtorch(format!("panic: {}", libtorch::panic_message(panic.as_ref())))),
        };
        let (outcome, kept) = match outcome {
            Ok(outcome) => outcome,
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(error @ Error::Diverged(_)) => {
                return Ok(without_scores(Status::Diverged, &error.to_string()));
            }
            Err(error) => return Ok(without_scores(Status::Failed, &error.to_string())),
        };
        let row = |(evaluated, scores): (&Evaluated, _)| {
            let mut row = described(self.plan, run, evaluated, self.device, started);
            measured(&mut row, &outcome, scores);
            if let Err(error) = &kept {
                // The scores stay in the row; as a failed run it is done again, so that its model gets kept.
                row.status = Status::Failed;
                row.reason = Some(format!("trained, but not kept: {error}"));
            }
            row
        };
        Ok(run.evaluations.iter().zip(&outcome.evaluations).map(row).collect())
    }

    /// Takes the model of a run: what the last run left, if it serves, or else from the files. Whoever has taken it puts it back, if
    /// it is whole.
    pub(super) fn take_model(&mut self, run: &Run) -> Result<ResidentModel> {
        // Another one is freed before the next is loaded.
        if let Some(model) = self.resident.take().filter(|model| model.serves(run)) {
            return Ok(model);
        }
        match &run.start {
            Start::Pretrained => ResidentModel::load(run, &run.model.folder, self.device),
            Start::Folder(start) => ResidentModel::load(run, &start.folder, self.device),
            Start::Run(source) => {
                ResidentModel::load(run, &ModelFolder::open(&self.kept(source))?, self.device)
            }
        }
    }

    /// Trains and scores.
    fn train(&mut self, run: &Run, model: &mut ResidentModel) -> Result<Outcome> {
        let settings = &run.hyperparameters;
        let tokens = &mut self.tokens;
        let mut encode = |dataset| tokens.of(&run.model, dataset, settings.max_length);
        let all = encode(&run.task.train.dataset)?;
        let evaluated = run
            .evaluations
            .iter()
            .map(|evaluated| encode(&evaluated.on.dataset))
            .collect::<Result<Vec<_>>>()?;
        let report = &mut *self.report;
        let mut forward = |event| report(RunEvent::Progress { worker: 0, event });
        let mut control = Control { interrupted: self.interrupted, report: &mut forward };
        model.classifier.reset(run.seed)?;
        let started = Instant::now();
        let all = model.seen_by(run, &all, &mut control)?;
        let data = training_set(&all, run)?;
        let evaluated =
            evaluated.iter().map(|on| model.seen_by(run, on, &mut control)).collect::<Result<Vec<_>>>()?;
        let features_time = started.elapsed();
        let scored = |place: usize| Scored {
            data: &evaluated[place],
            card: &run.evaluations[place].on.card,
            labels: &run.evaluations[place].labels,
        };
        let watched = settings.checkpoint == Checkpoint::Best || settings.early_stopping.is_some();
        let dev = watched.then(|| scored(0));
        let (classifier, method) = (&mut model.classifier, run.method.as_ref());
        let mut trained = train(classifier, &data, dev, method, settings, run.seed, &mut control)?;
        if run.is_frozen() {
            trained.prepare_time += features_time;
        }
        let mut evaluations = Vec::with_capacity(evaluated.len());
        for (place, data) in evaluated.iter().enumerate() {
            let started = Instant::now();
            let (mut done, total) = (0, data.len());
            let evaluation = evaluate(classifier, scored(place), settings.precision, |examples| {
                done += examples;
                (control.report)(Event::Evaluated(Progress::new(done, total)));
                control.check()
            })?;
            if !evaluation.loss.is_finite() {
                let (loss, split) = (evaluation.loss, run.evaluations[place].on.split);
                return Err(Error::Diverged(format!("the {split} loss is {loss} after the last step")));
            }
            evaluations.push((evaluation, started.elapsed()));
        }
        Ok(Outcome { trained, evaluations, peak_memory: machine::peak_memory(self.device) })
    }

    /// Keeps model and mask of a finished run, where the experiment asks for it or another run starts from it.
    fn keep(&self, run: &Run, classifier: &Classifier, mask: Option<&GradientMask>) -> Result<()> {
        let is_source = |other: &Arc<Run>| other.source_run().is_some_and(|source| source.id == run.id);
        // Of trials only the scores are wanted.
        let is_result = run.purpose != RunPurpose::Selection;
        if self.plan.save.is_some() && is_result || self.plan.runs.iter().any(is_source) {
            keep_model(self.plan, run, classifier, &self.kept(run))?;
        }
        if let Some(folder) = self.plan.masks.as_ref().filter(|_| is_result) {
            keep_mask(self.plan, run, mask, folder)?;
        }
        Ok(())
    }

    /// Returns where the model of a run is kept.
    fn kept(&self, run: &Run) -> PathBuf {
        kept_folder(self.plan, &run.id)
    }
}

impl Executor for Runner<'_> {
    fn report(&mut self, event: RunEvent) {
        (self.report)(event);
    }

    fn prepare(&mut self, missing: &[&Arc<Run>]) -> Result<()> {
        self.check_models(missing.iter().copied())
    }

    fn has_room(&self) -> bool {
        self.turn.is_none()
    }

    fn start(&mut self, turn: Turn) -> Result<()> {
        self.turn = Some(turn);
        Ok(())
    }

    fn wait(&mut self, results: &ResultsFile) -> Result<Option<(Turn, Attempt)>> {
        let Some(turn) = self.turn.take() else { return Ok(None) };
        let attempt = self.attempt(&turn, results)?;
        if let Attempt::Ended(rows) = &attempt {
            (self.report)(RunEvent::Finished { worker: 0, rows });
        }
        Ok(Some((turn, attempt)))
    }
}

/// Makes the rows of a run that has no scores, with how it ended and why.
pub(super) fn rows_without_scores(
    plan: &Plan,
    run: &Run,
    device: Device,
    (status, reason): (Status, &str),
    started: SystemTime,
) -> Vec<Row> {
    let row = |evaluated: &Evaluated| Row {
        status,
        reason: Some(reason.to_owned()),
        ..described(plan, run, evaluated, device, started)
    };
    run.evaluations.iter().map(row).collect()
}
