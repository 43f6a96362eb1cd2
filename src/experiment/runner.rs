//! The runner: trains what the results file does not have yet, one run after the other, and writes each result down.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use tch::Device;

use super::entries::Evaluated;
use super::inspection::write_mask_of;
use super::machine;
use super::plan::Plan;
use super::resident::{ResidentModel, Tokens, has_model};
use super::results::{Ended, Recorded, ResultsFile, Row, Status, beside, read};
use super::rows::{Outcome, described, measured};
use super::run::{Run, RunPurpose};
use super::start::Start;
use super::training_set::training_set;
use crate::child::GradientMask;
use crate::error::{Error, Result};
use crate::libtorch;
use crate::model::ModelFolder;
use crate::train::{Checkpoint, Control, Event, Progress, Scored, evaluate, train};

/// Something that happened while an experiment ran.
pub enum RunEvent<'a> {
    /// Something the user should know, in a sentence.
    Note(String),
    /// Runs that the results file already has: so many of so many.
    Skipped(Progress),
    /// A run starts: its number from 1, the number of runs of the plan, the run.
    Started(usize, usize, &'a Run),
    /// Something happened within the run.
    Progress(Event),
    /// The run ended and its rows are on disk, one for each data set it was scored on.
    Finished(&'a [Row]),
}

/// What became of the runs of an experiment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Runs that ended well in this process.
    pub ok: usize,
    /// Runs that diverged or failed in this process.
    pub failed: usize,
    /// Runs that were there already.
    pub skipped: usize,
    /// Runs that another process is at work on, or that wait for one of those.
    pub elsewhere: usize,
    /// Whether the user stopped the experiment.
    pub interrupted: bool,
}

/// Runs the plan of an experiment.
pub struct Runner<'a> {
    pub(super) plan: &'a Plan,
    device: Device,
    pub(super) interrupted: &'a AtomicBool,
    pub(super) report: &'a mut dyn FnMut(RunEvent),
    /// The model of the last run, kept for the next one.
    pub(super) resident: Option<ResidentModel>,
    pub(super) tokens: Tokens,
    /// What is to be said about the data before the first run.
    notes: &'a [String],
}

/// Whether the weights that a run starts from are at hand.
enum Source {
    /// They are: in the pretrained model, or in this folder.
    Ready,
    /// The run that makes them ended without; how this one ends then, and why.
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
        Self {
            plan,
            device,
            interrupted,
            report,
            resident: None,
            tokens: Tokens::default(),
            notes: &plan.notes,
        }
    }

    /// Trains every run that the results file lacks: the trials of a selection first, then the runs that are reported.
    ///
    /// A run that diverges or fails becomes a row, and the next one starts.
    ///
    /// # Errors
    /// Fails if the results file cannot be used, or a model cannot be loaded.
    pub fn run(mut self) -> Result<Summary> {
        let results = ResultsFile::open(&self.plan.results)?;
        if let Some(repair) = results.repaired() {
            (self.report)(RunEvent::Note(repair.to_owned()));
        }
        self.make_folders()?;
        self.check_models()?;
        let mut summary = Summary::default();
        let plan = self.plan;
        self.train_missing(&plan.selection.trials, &results, &mut summary)?;
        if !summary.interrupted {
            let runs = [plan.runs.clone(), self.chosen(&results)?].concat();
            self.train_missing(&runs, &results, &mut summary)?;
        }
        self.clear_sources(&results)?;
        Ok(summary)
    }

    /// Trains those of some runs that are not there yet.
    fn train_missing(
        &mut self,
        runs: &[Arc<Run>],
        results: &ResultsFile,
        summary: &mut Summary,
    ) -> Result<()> {
        let recorded = results.recorded()?;
        let is_there = |recorded: &Recorded, run: &Run| recorded.has(&run.id, run.rows());
        let there = runs.iter().filter(|run| is_there(&recorded, run)).count();
        summary.skipped += there;
        if there > 0 {
            (self.report)(RunEvent::Skipped(Progress::new(there, runs.len())));
        }
        for (number, run) in runs.iter().enumerate().filter(|(_, run)| !is_there(&recorded, run)) {
            if self.interrupted.load(Ordering::Relaxed) {
                summary.interrupted = true;
                break;
            }
            let Some(_claim) = results.claim(&run.id)? else {
                summary.elsewhere += 1;
                continue;
            };
            // Another process may have finished it since the file was read.
            if is_there(&results.recorded()?, run) {
                summary.skipped += 1;
                continue;
            }
            let source = self.source_of(run, results);
            if let Ok(Source::Elsewhere) = source {
                summary.elsewhere += 1;
                continue;
            }
            for note in std::mem::take(&mut self.notes) {
                (self.report)(RunEvent::Note(note.clone()));
            }
            (self.report)(RunEvent::Started(number + 1, runs.len(), run));
            let rows = match source {
                Ok(Source::Lost(status, why)) => Ok(self.rows_without_scores(
                    run,
                    status,
                    &format!("not trained: {why}"),
                    SystemTime::now(),
                )),
                Ok(_) => self.rows(run),
                Err(error) => Err(error),
            };
            let rows = match rows {
                Err(Error::Interrupted) => {
                    summary.interrupted = true;
                    break;
                }
                rows => rows?,
            };
            results.append(&rows)?;
            if rows.iter().all(|row| row.status == Status::Ok) {
                summary.ok += 1
            } else {
                summary.failed += 1
            }
            (self.report)(RunEvent::Finished(&rows));
        }
        Ok(())
    }

    /// Returns the runs that the trials chose; a choice whose trials are not all done is left open.
    fn chosen(&mut self, results: &ResultsFile) -> Result<Vec<Arc<Run>>> {
        let rows = read(results.path())?;
        let mut runs = Vec::new();
        for choice in &self.plan.selection.choices {
            let note = match choice.choose(&rows) {
                None => format!("{}: not chosen yet, as trials are missing or failed", choice.what),
                Some(chosen) => {
                    runs.extend(chosen.candidate.reports.iter().cloned());
                    let mean = chosen.mean.map_or("no score".into(), |mean| format!("{:.2}", 100.0 * mean));
                    let settings = &chosen.candidate.settings;
                    format!(
                        "{}: chose {settings} (mean {mean}, best of {})",
                        choice.what,
                        choice.candidates.len()
                    )
                }
            };
            (self.report)(RunEvent::Note(note));
        }
        Ok(runs)
    }

    /// Makes the folders of models and masks before anything trains, so that a bad place does not cost trained runs.
    fn make_folders(&self) -> Result<()> {
        for (key, folder) in [("save", &self.plan.save), ("masks", &self.plan.masks)] {
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

    /// Loads every model once before anything trains, and looks at every length that it is to take, so that what does not
    /// fit does not end a grid halfway. Methods look at it too: a mask file may be one of another model.
    fn check_models(&mut self) -> Result<()> {
        let mut checked: Vec<(&str, usize, bool, String)> = Vec::new();
        let plan = self.plan;
        for run in plan.all_runs().filter(|run| run.source_run().is_none()) {
            let (max_length, is_pair) = (run.hyperparameters.max_length, run.task.card.is_pair());
            let case = (run.start_id(), max_length, is_pair, run.method.options());
            if checked.contains(&case) {
                continue;
            }
            checked.push(case);
            self.load(run)?;
            if let Some(resident) = &self.resident {
                resident.classifier.check_inputs(&run.model.encoder, max_length)?;
                run.method.check(&resident.classifier.parameters)?;
            }
            run.model.encoder.encode("a", is_pair.then_some("b"), max_length)?;
        }
        Ok(())
    }

    /// Makes sure that the weights that a run starts from are at hand, training the run that makes them if they are not.
    fn source_of(&mut self, run: &Run, results: &ResultsFile) -> Result<Source> {
        let Some(source) = run.source_run() else { return Ok(Source::Ready) };
        let folder = self.kept(source);
        if has_model(&folder) {
            return Ok(Source::Ready);
        }
        match results.recorded()?.ended(&source.id) {
            Some(Ended::Ok) => {}
            Some(ended) => {
                let (status, verb) = match ended {
                    Ended::Diverged => (Status::Diverged, "diverged"),
                    _ => (Status::Failed, "failed"),
                };
                return Ok(Source::Lost(status, format!("run {} that it starts from {verb}", source.id)));
            }
            // Sources come first in a plan: this one is being trained, or was stopped.
            None => return Ok(Source::Elsewhere),
        }
        let Some(_claim) = results.claim(&source.id)? else { return Ok(Source::Elsewhere) };
        if has_model(&folder) {
            return Ok(Source::Ready);
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

    /// Makes the rows of a run that has no scores.
    fn rows_without_scores(&self, run: &Run, status: Status, reason: &str, started: SystemTime) -> Vec<Row> {
        let row = |evaluated: &Evaluated| Row {
            status,
            reason: Some(reason.to_owned()),
            ..described(self.plan, run, &evaluated.on, self.device, started)
        };
        run.evaluations.iter().map(row).collect()
    }

    /// Does one run. Whatever goes wrong inside it becomes part of its rows.
    fn rows(&mut self, run: &Run) -> Result<Vec<Row>> {
        let started = SystemTime::now();
        machine::reset_peak_memory(self.device);
        self.load(run)?;
        let outcome = catch_unwind(AssertUnwindSafe(|| self.train(run)));
        let outcome = outcome.unwrap_or_else(|panic| {
            // The model may be half changed; the next run starts from the file again.
            self.resident = None;
            Err(Error::Libtorch(format!("panic: {}", libtorch::panic_message(panic.as_ref()))))
        });
        let outcome = match outcome {
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(error) => {
                let diverged = matches!(error, Error::Diverged(_));
                let status = if diverged { Status::Diverged } else { Status::Failed };
                return Ok(self.rows_without_scores(run, status, &error.to_string(), started));
            }
            Ok(outcome) => outcome,
        };
        let kept = self.keep(run, outcome.trained.mask.as_deref());
        let row = |(evaluated, scores): (&Evaluated, _)| {
            let mut row = described(self.plan, run, &evaluated.on, self.device, started);
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

    /// Makes the model of a run resident, reusing what the last run left.
    pub(super) fn load(&mut self, run: &Run) -> Result<()> {
        if self.resident.as_ref().is_some_and(|resident| resident.serves(run)) {
            return Ok(());
        }
        // Freed before the next model is loaded.
        self.resident = None;
        let kept;
        let folder = match &run.start {
            Start::Pretrained => &run.model.folder,
            Start::Folder(start) => &start.folder,
            Start::Run(source) => {
                kept = ModelFolder::open(&self.kept(source))?;
                &kept
            }
        };
        let resident = ResidentModel::load(run, folder, self.device)?;
        let report = &resident.classifier.report;
        if !report.unexpected.is_empty() {
            (self.report)(RunEvent::Note(format!(
                "{} has {} tensors that the model does not use, such as {}",
                folder.path.display(),
                report.unexpected.len(),
                report.unexpected[0]
            )));
        }
        self.resident = Some(resident);
        Ok(())
    }

    /// Trains and scores.
    fn train(&mut self, run: &Run) -> Result<Outcome> {
        let Some(resident) = &mut self.resident else {
            return Err(Error::configuration("no model is loaded"));
        };
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
        let mut forward = |event| report(RunEvent::Progress(event));
        let mut control = Control { interrupted: self.interrupted, report: &mut forward };
        resident.classifier.reset(run.seed)?;
        let started = Instant::now();
        let all = resident.seen_by(run, &all, &mut control)?;
        let data = training_set(&all, run)?;
        let evaluated =
            evaluated.iter().map(|on| resident.seen_by(run, on, &mut control)).collect::<Result<Vec<_>>>()?;
        let features_time = started.elapsed();
        let scored = |place: usize| Scored {
            data: &evaluated[place],
            card: &run.evaluations[place].on.card,
            labels: &run.evaluations[place].labels,
        };
        let watched = settings.checkpoint == Checkpoint::Best || settings.early_stopping.is_some();
        let dev = watched.then(|| scored(0));
        let (classifier, method) = (&mut resident.classifier, run.method.as_ref());
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
    fn keep(&self, run: &Run, mask: Option<&GradientMask>) -> Result<()> {
        let Some(resident) = &self.resident else { return Ok(()) };
        let is_source = |other: &Arc<Run>| other.source_run().is_some_and(|source| source.id == run.id);
        // Of trials only the scores are wanted.
        let is_result = run.purpose != RunPurpose::Selection;
        if self.plan.save.is_some() && is_result || self.plan.runs.iter().any(is_source) {
            resident.classifier.save(&self.kept(run), &run.model.encoder)?;
        }
        if let Some(folder) = self.plan.masks.as_ref().filter(|_| is_result) {
            write_mask_of(self.plan, run, mask, folder)?;
        }
        Ok(())
    }

    /// Returns where the model of a run is kept: in `save:`, or beside the results where others start from it.
    fn kept(&self, run: &Run) -> PathBuf {
        let folder = self.plan.save.clone().unwrap_or_else(|| beside(&self.plan.results, ".sources"));
        folder.join(&run.id)
    }

    /// Removes the models that were kept only for other runs to start from, once those are done.
    fn clear_sources(&self, results: &ResultsFile) -> Result<()> {
        if self.plan.save.is_some() {
            return Ok(());
        }
        let recorded = results.recorded()?;
        for run in &self.plan.runs {
            let mut next = self
                .plan
                .runs
                .iter()
                .filter(|other| other.source_run().is_some_and(|source| source.id == run.id));
            if next.all(|other| recorded.has(&other.id, other.rows())) {
                // What cannot be removed does no harm; the folder above goes with the last one.
                let kept = self.kept(run);
                let _ = std::fs::remove_dir_all(&kept);
                let _ = kept.parent().map(std::fs::remove_dir);
            }
        }
        Ok(())
    }
}
