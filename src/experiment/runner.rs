//! The runner: trains what the results file does not have yet, one run after the other, and writes each result down.

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use tch::Device;

use super::machine;
use super::plan::{ModelEntry, Plan, Run, TaskEntry};
use super::results::{ResultsFile, Row, Status};
use super::training_set::subset;
use crate::child::{GradientMask, write_mask};
use crate::data::{EncodedDataset, Metric, Split};
use crate::error::{Error, Result};
use crate::libtorch;
use crate::model::{Classifier, Labels};
use crate::train::{
    Checkpoint, Control, Evaluation, Event, OptimizerRule, Progress, StepVariance, Trained, evaluate,
    prepare, step_variance, train,
};
use crate::values::yaml_name;

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
    /// The run ended and its row is on disk.
    Finished(&'a Row),
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
    /// Runs that another process is at work on.
    pub elsewhere: usize,
    /// Whether the user stopped the experiment.
    pub interrupted: bool,
}

/// What one run came to.
struct Outcome {
    trained: Trained,
    evaluation: Evaluation,
    evaluate_time: Duration,
}

/// Runs the plan of an experiment.
pub struct Runner<'a> {
    plan: &'a Plan,
    device: Device,
    interrupted: &'a AtomicBool,
    report: &'a mut dyn FnMut(RunEvent),
    /// The model and data of the last run, kept for the next one.
    resident: Option<Resident>,
}

/// A model with its pretrained weights, and a task's data as tokens.
struct Resident {
    model: Arc<ModelEntry>,
    task: Arc<TaskEntry>,
    max_length: usize,
    classifier: Classifier,
    train: EncodedDataset,
    dev: EncodedDataset,
}

impl<'a> Runner<'a> {
    /// Makes a runner. `report` is told what happens; `interrupted` stops it between two batches.
    pub fn new(
        plan: &'a Plan,
        device: Device,
        interrupted: &'a AtomicBool,
        report: &'a mut dyn FnMut(RunEvent),
    ) -> Self {
        Self { plan, device, interrupted, report, resident: None }
    }

    /// Trains every run that the results file lacks.
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
        let finished = results.finished()?;
        summary.skipped = self.plan.runs.iter().filter(|run| finished.contains(&run.id)).count();
        if summary.skipped > 0 {
            (self.report)(RunEvent::Skipped(Progress::new(summary.skipped, self.plan.runs.len())));
        }
        for (number, run) in self.plan.runs.iter().enumerate().filter(|(_, run)| !finished.contains(&run.id))
        {
            let Some(_claim) = results.claim(&run.id)? else {
                summary.elsewhere += 1;
                continue;
            };
            // Another process may have finished it since the file was read.
            if results.finished()?.contains(&run.id) {
                summary.skipped += 1;
                continue;
            }
            if self.interrupted.load(Ordering::Relaxed) {
                summary.interrupted = true;
                break;
            }
            (self.report)(RunEvent::Started(number + 1, self.plan.runs.len(), run));
            let row = match self.row(run) {
                Err(Error::Interrupted) => {
                    summary.interrupted = true;
                    break;
                }
                row => row?,
            };
            results.append(std::slice::from_ref(&row))?;
            if row.status == Status::Ok {
                summary.ok += 1
            } else {
                summary.failed += 1
            }
            (self.report)(RunEvent::Finished(&row));
        }
        Ok(summary)
    }

    /// Computes the masks of all runs whose method has a fixed one, and writes each as `folder/<run>.safetensors`. Trains
    /// nothing.
    ///
    /// # Errors
    /// Fails if a model cannot be loaded, a mask cannot be computed, or the folder cannot be written.
    pub fn compute_masks(mut self, folder: &Path) -> Result<Vec<PathBuf>> {
        let mut written = Vec::new();
        let plan = self.plan;
        self.with_each(
            |run| run.method.has_fixed_mask(),
            |run, classifier, data, control| {
                let (method, settings) = (run.method.as_ref(), &run.hyperparameters);
                let prepared = prepare(classifier, data, method, settings, run.seed, control)?;
                written.extend(write_mask_of(plan, run, prepared.mask.as_deref(), folder)?);
                Ok(())
            },
        )?;
        Ok(written)
    }

    /// Measures the steps of SGD at the start of all runs that Theorem 1 of the paper is about: vanilla and Child-Tuning_F
    /// with `optimizer: sgd`. Trains nothing.
    ///
    /// # Errors
    /// Fails if there is no such run, a model cannot be loaded, or libtorch refuses an operation.
    pub fn step_variances(mut self, draws: u64) -> Result<Vec<(Run, StepVariance)>> {
        let mut measured = Vec::new();
        let concerned = |run: &Run| {
            run.hyperparameters.optimizer == OptimizerRule::Sgd
                && ["vanilla", "child_tuning_f"].contains(&run.method.name())
        };
        if !self.plan.runs.iter().any(concerned) {
            return Err(Error::configuration(format!(
                "{}: no run is vanilla or child_tuning_f with `train.optimizer: sgd`, which Theorem 1 is about",
                self.plan.name
            )));
        }
        self.with_each(concerned, |run, classifier, data, control| {
            let (method, settings) = (run.method.as_ref(), &run.hyperparameters);
            let variance = step_variance(classifier, data, method, settings, run.seed, draws, control)?;
            measured.push((run.clone(), variance));
            Ok(())
        })?;
        Ok(measured)
    }

    /// Loads what each chosen run starts from, resets it for the run's seed, and lets `act` work on it.
    fn with_each(
        &mut self,
        chosen: impl Fn(&Run) -> bool,
        mut act: impl FnMut(&Run, &mut Classifier, &EncodedDataset, &mut Control) -> Result<()>,
    ) -> Result<()> {
        let runs = &self.plan.runs;
        for (number, run) in runs.iter().enumerate().filter(|(_, run)| chosen(run)) {
            (self.report)(RunEvent::Started(number + 1, runs.len(), run));
            self.load(run)?;
            let Some(resident) = &mut self.resident else { continue };
            let (report, interrupted) = (&mut *self.report, self.interrupted);
            let mut forward = |event| report(RunEvent::Progress(event));
            let mut control = Control { interrupted, report: &mut forward };
            let data = training_set(&resident.train, run);
            resident.classifier.reset(run.seed)?;
            act(run, &mut resident.classifier, &data, &mut control)?;
        }
        Ok(())
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

    /// Loads every model once before anything trains, at every length that it is to take, so that what does not fit does
    /// not end a grid halfway. Methods look at it too: a mask file may be one of another model.
    fn check_models(&mut self) -> Result<()> {
        let mut checked: Vec<(&str, usize, String)> = Vec::new();
        for run in &self.plan.runs {
            let (model, method) = (run.model.sha256.as_str(), run.method.options());
            let case = (model, run.hyperparameters.max_length, method);
            if !checked.contains(&case) {
                checked.push(case);
                self.load(run)?;
                if let Some(resident) = &self.resident {
                    run.method.check(&resident.classifier.parameters)?;
                }
            }
        }
        Ok(())
    }

    /// Does one run. Whatever goes wrong inside it becomes part of its row.
    fn row(&mut self, run: &Run) -> Result<Row> {
        let started = SystemTime::now();
        machine::reset_peak_memory(self.device);
        self.load(run)?;
        let outcome = catch_unwind(AssertUnwindSafe(|| self.train(run)));
        let outcome = outcome.unwrap_or_else(|panic| {
            // The model may be half changed; the next run starts from the file again.
            self.resident = None;
            Err(Error::Libtorch(format!("panic: {}", libtorch::panic_message(panic.as_ref()))))
        });
        let mut row = self.described(run, started);
        match outcome {
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(error) => {
                row.status =
                    if matches!(error, Error::Diverged(_)) { Status::Diverged } else { Status::Failed };
                row.reason = Some(error.to_string());
            }
            Ok(outcome) => {
                self.measured(&mut row, &outcome);
                let kept = self
                    .resident
                    .as_ref()
                    .map(|resident| self.keep(run, resident, outcome.trained.mask.as_deref()));
                if let Some(Err(error)) = kept {
                    // The scores stay in the row; as a failed run it is done again, so that its model gets kept.
                    row.status = Status::Failed;
                    row.reason = Some(format!("trained, but not kept: {error}"));
                }
            }
        }
        Ok(row)
    }

    /// Makes model and data of a run resident, reusing what the last run left.
    fn load(&mut self, run: &Run) -> Result<()> {
        let max_length = run.hyperparameters.max_length;
        if let Some(resident) = &self.resident {
            let same = Arc::ptr_eq(&resident.model, &run.model)
                && Arc::ptr_eq(&resident.task, &run.task)
                && resident.max_length == max_length;
            if same {
                return Ok(());
            }
        }
        // Freed before the next model is loaded.
        self.resident = None;
        let (folder, card) = (&run.model.folder, &run.task.card);
        let classifier =
            Classifier::load(folder, Labels::from(&card.objective), self.plan.head, self.device)?;
        let report = &classifier.report;
        if !report.unexpected.is_empty() {
            (self.report)(RunEvent::Note(format!(
                "{} has {} tensors that the model does not use, such as {}",
                folder.path.display(),
                report.unexpected.len(),
                report.unexpected[0]
            )));
        }
        let encoder = &run.model.encoder;
        classifier.check_inputs(encoder, max_length)?;
        let encode = |dataset: &crate::data::Dataset| -> Result<EncodedDataset> {
            let inputs = encoder.encode_dataset(&dataset.examples, max_length)?;
            EncodedDataset::new(inputs, &dataset.examples)
        };
        let (train, dev) = (encode(&run.task.train)?, encode(&run.task.dev)?);
        self.resident = Some(Resident {
            model: run.model.clone(),
            task: run.task.clone(),
            max_length,
            classifier,
            train,
            dev,
        });
        Ok(())
    }

    /// Trains and scores.
    fn train(&mut self, run: &Run) -> Result<Outcome> {
        let Some(resident) = &mut self.resident else {
            return Err(Error::configuration("no model is loaded"));
        };
        let report = &mut *self.report;
        let mut forward = |event| report(RunEvent::Progress(event));
        let mut control = Control { interrupted: self.interrupted, report: &mut forward };
        let settings = &run.hyperparameters;
        let data = training_set(&resident.train, run);
        let watched = settings.checkpoint == Checkpoint::Best || settings.early_stopping.is_some();
        let dev = watched.then_some((&resident.dev, &run.task.card));
        resident.classifier.reset(run.seed)?;
        let trained = train(
            &mut resident.classifier,
            &data,
            dev,
            run.method.as_ref(),
            settings,
            run.seed,
            &mut control,
        )?;
        let started = Instant::now();
        let (mut done, total) = (0, resident.dev.len());
        let evaluation =
            evaluate(&resident.classifier, &resident.dev, &run.task.card, settings.precision, |examples| {
                done += examples;
                (control.report)(Event::Evaluated(Progress::new(done, total)));
                control.check()
            })?;
        if !evaluation.loss.is_finite() {
            return Err(Error::Diverged(format!("the dev loss is {} after the last step", evaluation.loss)));
        }
        Ok(Outcome { trained, evaluation, evaluate_time: started.elapsed() })
    }

    /// Keeps model and mask of a finished run, where the experiment asks for it.
    fn keep(&self, run: &Run, resident: &Resident, mask: Option<&GradientMask>) -> Result<()> {
        if let Some(folder) = &self.plan.save {
            resident.classifier.save(&folder.join(&run.id), &run.model.encoder)?;
        }
        if let Some(folder) = &self.plan.masks {
            write_mask_of(self.plan, run, mask, folder)?;
        }
        Ok(())
    }

    /// Fills in what is known of a run whatever becomes of it.
    fn described(&self, run: &Run, started: SystemTime) -> Row {
        let settings = &run.hyperparameters;
        Row {
            experiment: self.plan.name.clone(),
            run: run.id.clone(),
            model: run.model.name.clone(),
            model_sha256: run.model.sha256.clone(),
            task: run.task.card.name.clone(),
            evaluated_on: run.task.card.name.clone(),
            split: Split::Dev.name().to_owned(),
            preset: yaml_name(&self.plan.preset),
            method: run.method.name().to_owned(),
            method_config: run.method.options(),
            seed: run.seed,
            learning_rate: settings.learning_rate,
            epochs: settings.epochs,
            batch_size: settings.batch_size as u64,
            micro_batch: settings.micro_batch as u64,
            max_length: settings.max_length as u64,
            warmup: settings.warmup.0,
            weight_decay: settings.weight_decay,
            max_gradient_norm: settings.max_gradient_norm,
            epsilon: settings.epsilon,
            adamw: yaml_name(&settings.adamw),
            precision: yaml_name(&settings.precision),
            order: yaml_name(&settings.order),
            checkpoint: yaml_name(&settings.checkpoint),
            headline: run.task.card.headline.name().to_owned(),
            examples_train: run.training_examples() as u64,
            examples_evaluated: run.task.dev.examples.len() as u64,
            device: machine::device_name(self.device),
            torch: libtorch::version(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: Some(env!("CHILD_TUNING_COMMIT").to_owned()).filter(|commit| commit != "unknown"),
            started_at: humantime::format_rfc3339_seconds(started).to_string(),
            ..Row::default()
        }
    }

    /// Fills in what a run that ended well came to.
    fn measured(&self, row: &mut Row, outcome: &Outcome) {
        const MEBIBYTE: f64 = 1024.0 * 1024.0;
        let Outcome { trained, evaluation, evaluate_time } = outcome;
        let seconds = trained.train_time.as_secs_f64();
        row.status = Status::Ok;
        row.score = Some(evaluation.headline);
        row.loss = Some(evaluation.loss);
        row.degenerate = Some(evaluation.degenerate);
        for (metric, value) in &evaluation.scores {
            let column = match metric {
                Metric::Accuracy => &mut row.accuracy,
                Metric::F1 => &mut row.f1,
                Metric::Matthews => &mut row.matthews,
                Metric::Pearson => &mut row.pearson,
                Metric::Spearman => &mut row.spearman,
                Metric::Combined => &mut row.combined,
            };
            *column = Some(*value);
        }
        row.epoch = Some(trained.epoch);
        row.step = Some(trained.step);
        row.train_seconds = Some(seconds);
        row.prepare_seconds = Some(trained.prepare_time.as_secs_f64());
        row.evaluate_seconds = Some(evaluate_time.as_secs_f64());
        row.examples_per_second = Some(trained.examples as f64 / seconds);
        row.tokens_per_second = Some(trained.tokens as f64 / seconds);
        row.peak_memory_mb = machine::peak_memory(self.device).map(|bytes| bytes as f64 / MEBIBYTE);
        row.optimizer_state_mb = Some(trained.optimizer_bytes as f64 / MEBIBYTE);
        let all = self.resident.as_ref().map_or(0, |resident| resident.classifier.parameters.count());
        row.trainable_parameters = Some(all as u64);
        if let Some(mask) = &trained.mask {
            row.child_share = Some(mask.share());
        }
        if let Some(child) = trained.mask.as_ref().and_then(|mask| mask.child()) {
            row.trainable_parameters = Some((all - child.maskable() + child.kept()) as u64);
            row.child_parameters = Some(child.kept() as u64);
            row.mask_sha256 = Some(child.sha256());
        }
    }
}

/// Returns the examples that a run trains on.
fn training_set<'d>(all: &'d EncodedDataset, run: &Run) -> Cow<'d, EncodedDataset> {
    match run.examples {
        None => Cow::Borrowed(all),
        Some(count) => Cow::Owned(all.part(&subset(&run.task.train.examples, count, run.seed))),
    }
}

/// Writes the mask of a run, if it has a fixed one, and returns where.
fn write_mask_of(
    plan: &Plan,
    run: &Run,
    mask: Option<&GradientMask>,
    folder: &Path,
) -> Result<Option<PathBuf>> {
    let Some(child) = mask.and_then(GradientMask::child) else { return Ok(None) };
    let about = [
        ("experiment", plan.name.clone()),
        ("run", run.id.clone()),
        ("model_sha256", run.model.sha256.clone()),
        ("task", run.task.card.name.clone()),
        ("method", format!("{} {}", run.method.name(), run.method.options())),
        ("seed", run.seed.to_string()),
    ];
    let path = folder.join(format!("{}.safetensors", run.id));
    write_mask(&path, child, &about)?;
    Ok(Some(path))
}
