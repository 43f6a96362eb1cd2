//! `run` and `plan`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use child_tuning::analysis::compare;
use child_tuning::error::Error;
use child_tuning::experiment::results;
use child_tuning::experiment::{
    ExperimentSpec, Forecast, Override, Pace, Plan, PlanOptions, Run, RunEvent, Runner, Speed, Summary,
    Tokens, Verdict, execute, forecast, open_places,
};
use child_tuning::files::is_pipe;
use child_tuning::hub::missing_models;
use clap::Args;
use tch::Device;

use super::costs::show_costs;
use super::jobs::{JobsArguments, WorkerPlace, worker_pool};
use super::model::fetch_model;
use super::progress::Display;
use super::signals::stop_between_batches;
use super::{ComputeArguments, DataArguments, is_broken_pipe, show, tell};

/// What to do with which experiments.
#[derive(Args)]
pub struct ExperimentArguments {
    /// Experiment files
    #[arg(required = true, value_name = "EXPERIMENT.yaml")]
    experiments: Vec<PathBuf>,
    /// Change a key of the experiment: a dotted path and a YAML value; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE")]
    overrides: Vec<Override>,
    /// Only the runs with this model, task, method or seed, such as task=rte; may be repeated or joined by commas, and all must
    /// hold
    #[arg(long, value_name = "COLUMN=VALUE", value_delimiter = ',', value_parser = column_and_value)]
    only: Vec<(String, String)>,
    #[command(flatten)]
    data: DataArguments,
}

#[derive(Args)]
pub struct RunArguments {
    #[command(flatten)]
    experiment: ExperimentArguments,
    #[command(flatten)]
    compute: ComputeArguments,
    #[command(flatten)]
    jobs: JobsArguments,
    /// Be one of the processes of another `run`, that trains what it is told to
    #[arg(long, hide = true, value_name = "DEVICE,THREADS")]
    worker: Option<WorkerPlace>,
}

#[derive(Args)]
pub struct PlanArguments {
    #[command(flatten)]
    experiment: ExperimentArguments,
    #[command(flatten)]
    compute: ComputeArguments,
    #[command(flatten)]
    jobs: JobsArguments,
}

fn column_and_value(text: &str) -> Result<(String, String), String> {
    let (column, value) =
        text.split_once('=').ok_or_else(|| format!("`{text}` has no `=`; write it as task=rte"))?;
    Ok((column.to_owned(), value.to_owned()))
}

impl ExperimentArguments {
    /// Returns the experiment files.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.experiments.iter().map(PathBuf::as_path)
    }

    /// Reads the experiments, each file once: it may be a pipe.
    fn specs(&self) -> Result<Vec<ExperimentSpec>, Error> {
        self.experiments.iter().map(|path| ExperimentSpec::read(path, &self.overrides)).collect()
    }

    /// Resolves the experiments before anything runs.
    fn resolve(&self, specs: &[ExperimentSpec]) -> Result<Vec<Plan>, Error> {
        let options = PlanOptions { data: self.data.folders(), only: self.only.clone() };
        let plan = |(path, spec): (&PathBuf, _)| {
            Plan::resolve(spec, path, &options).map_err(|error| match error {
                Error::Configuration(message) => {
                    Error::configuration(format!("{}: {message}", path.display()))
                }
                other => other,
            })
        };
        self.experiments.iter().zip(specs).map(plan).collect()
    }

    /// Reads and resolves all experiments.
    fn plans(&self) -> Result<Vec<Plan>, Error> {
        self.resolve(&self.specs()?)
    }

    /// Reads and resolves all experiments, after it has downloaded the models of the Hub that they name and the cache lacks.
    pub(super) fn plans_with_models(&self) -> Result<Vec<Plan>, Error> {
        let specs = self.specs()?;
        for spec in &specs {
            for id in missing_models(spec.model.0.iter().map(String::as_str))? {
                fetch_model(&id)?;
            }
        }
        self.resolve(&specs)
    }

    /// Refuses pipes where several processes have to read the experiments.
    fn check_shared(&self) -> Result<(), Error> {
        // What is called so is another file in another process, whatever it is here.
        let is_of_process =
            |path: &PathBuf| ["/dev/stdin", "/dev/fd", "/proc"].iter().any(|place| path.starts_with(place));
        match self.experiments.iter().find(|path| is_pipe(path) || is_of_process(path)) {
            None => Ok(()),
            Some(path) => Err(Error::configuration(format!(
                "{} is no file, and can be read only once; write the experiment to a file, or use --jobs 1",
                path.display()
            ))),
        }
    }
}

/// Trains what is missing, then shows the comparison.
pub fn run(arguments: RunArguments) -> Result<ExitCode> {
    let RunArguments { experiment, compute, jobs, worker } = arguments;
    if let Some(place) = worker {
        return place.serve(|| experiment.plans(), &stop_between_batches(Arc::new(AtomicBool::new(true)))?);
    }
    let device = compute.device()?;
    let is_training = Arc::new(AtomicBool::new(false));
    let interrupted = stop_between_batches(is_training.clone())?;
    let plans = experiment.plans_with_models()?;
    is_training.store(true, Ordering::Relaxed);
    let places = jobs.places(&compute, &plans)?;
    if places.len() > 1 {
        experiment.check_shared()?;
    }
    // Before the first run of the first, so that a bad place of the last does not cost trained runs.
    for plan in &plans {
        if let Some(repair) = open_places(plan)?.repaired() {
            tell(format_args!("note: {repair}"));
        }
    }
    let mut pool = (places.len() > 1).then(|| worker_pool(&places));
    let (mut failed, mut all_shown) = (false, Ok(()));
    for (number, plan) in plans.iter().enumerate() {
        let started = Instant::now();
        let mut display = Display::new();
        let mut report = |event: RunEvent| display.show(event);
        let summary = match &mut pool {
            Some(pool) => {
                execute(plan, &mut pool.for_plan(plan, number, &interrupted, &mut report), &interrupted)?
            }
            None => execute(plan, &mut Runner::new(plan, device, &interrupted, &mut report), &interrupted)?,
        };
        display.finish();
        let shown =
            show_comparison(&plan.results).and_then(|()| show(sentence(plan, &summary, started.elapsed())));
        // Whoever read this may have seen enough, or a disk be full; the runs of the other experiments are wanted all the same.
        all_shown =
            all_shown.and(shown.or_else(|error| if is_broken_pipe(&error) { Ok(()) } else { Err(error) }));
        failed |= summary.failed > 0 || summary.diverged_before > 0 || summary.not_chosen > 0;
        if summary.interrupted {
            return Ok(ExitCode::from(Error::Interrupted.exit_code()));
        }
    }
    all_shown?;
    Ok(ExitCode::from(u8::from(failed)))
}

/// Shows what would run.
pub fn plan(arguments: PlanArguments) -> Result<ExitCode> {
    let device = arguments.compute.device()?;
    let plans = arguments.experiment.plans()?;
    let places = arguments.jobs.places(&arguments.compute, &plans)?;
    if let [place, _, ..] = places[..] {
        // What is measured is what one of the jobs will have.
        place.set_up();
    }
    let speed = Speed::measure(device)?;
    for plan in &plans {
        show_plan(plan, device, &speed, places.len())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows the runs of a plan that are not done, with their number of steps and what they will cost.
fn show_plan(plan: &Plan, device: Device, speed: &Speed, jobs: usize) -> Result<()> {
    // `run` begins an empty file.
    let (recorded, rows) = match plan.results.metadata().is_ok_and(|file| file.len() > 0) {
        true => (results::recorded(&plan.results)?, results::read(&plan.results)?),
        false => Default::default(),
    };
    let (mut chosen, mut open) = (Vec::new(), Vec::new());
    for choice in &plan.selection.choices {
        match choice.choose(&rows) {
            Verdict::Chosen { candidate, .. } => chosen.extend(&candidate.reports),
            Verdict::Open => open.push(choice),
            Verdict::Scoreless => {
                show(format_args!("note: {}: nothing is chosen, as no trial has a score", choice.what))?;
            }
        }
    }
    let runs: Vec<_> = plan.selection.trials.iter().chain(&plan.runs).chain(chosen).collect();
    let to_do: Vec<_> = runs.iter().filter(|run| !recorded.has(&run.id, run.rows())).collect();
    let mut cost = Cost {
        pace: Pace::of(&rows, device),
        speed,
        tokens: Tokens::default(),
        runs: 0,
        steps: 0,
        seconds: (0.0, 0.0),
        memory: 0.0,
        by_pace: 0,
    };
    for run in &to_do {
        let model = &run.model.name;
        show(format_args!("{}  {model}  {} steps  {}", run.id, run.total_steps(), run.label()))?;
        cost.add(run)?;
    }
    for choice in open {
        let Some(candidate) = choice.candidates.first() else { continue };
        let (seeds, candidates) = (candidate.reports.len(), choice.candidates.len());
        show(format_args!("then {seeds} runs of {}, with the best of {candidates} settings", choice.what))?;
        // Any of the candidates may be chosen: the first one stands for them.
        for run in &candidate.reports {
            cost.add(run)?;
        }
    }
    show_costs(runs.iter().map(|run| run.as_ref()))?;
    for note in &plan.notes {
        show(format_args!("note: {note}"))?;
    }
    let finished = runs.len() - to_do.len();
    show(format_args!(
        "{}: {} runs, {finished} finished, {} to do, {} optimizer steps; {}; results in {}",
        plan.name,
        finished + cost.runs,
        cost.runs,
        cost.steps,
        cost.in_words(jobs),
        plan.results.display()
    ))
}

/// What some runs will cost, added up.
struct Cost<'a> {
    pace: Pace,
    speed: &'a Speed,
    tokens: Tokens,
    runs: usize,
    steps: u64,
    /// Seconds of all runs one after the other, and of the longest.
    seconds: (f64, f64),
    /// Bytes of the run that needs most.
    memory: f64,
    /// Runs whose time is known from finished ones.
    by_pace: usize,
}

impl Cost<'_> {
    fn add(&mut self, run: &Run) -> Result<()> {
        let Forecast { mut seconds, memory } = forecast(run, &mut self.tokens, self.speed)?;
        if let Some(known) = self.pace.seconds(run, &mut self.tokens)? {
            seconds = known;
            self.by_pace += 1;
        }
        self.runs += 1;
        self.steps += run.total_steps();
        self.seconds = (self.seconds.0 + seconds, self.seconds.1.max(seconds));
        self.memory = self.memory.max(memory);
        Ok(())
    }

    /// Says time and memory, and what the time is known from. Jobs share the work, but not within a run; each needs the memory
    /// of one.
    fn in_words(&self, jobs: usize) -> String {
        let jobs = jobs.min(self.runs).max(1);
        let (all, longest) = self.seconds;
        let time = duration((all / jobs as f64).max(longest));
        let known = match self.by_pace {
            0 => "on this machine".into(),
            known if known == self.runs => "by the speed of finished runs".into(),
            known => format!("({known} runs by the speed of finished ones)"),
        };
        let memory = self.memory / 1e9;
        match jobs {
            1 => format!("about {time} {known}, up to {memory:.1} GB"),
            jobs => format!("about {time} {known} with {jobs} jobs, up to {jobs} × {memory:.1} GB"),
        }
    }
}

/// Writes a time that is a guess: in two units at most.
fn duration(seconds: f64) -> String {
    let seconds = seconds.ceil() as u64;
    let rounded = match seconds {
        0..60 => seconds,
        60..3600 => seconds.next_multiple_of(10),
        3600..86_400 => seconds.next_multiple_of(60),
        _ => seconds.checked_next_multiple_of(3600).unwrap_or(seconds),
    };
    humantime::format_duration(Duration::from_secs(rounded)).to_string()
}

fn show_comparison(path: &Path) -> Result<()> {
    let rows = results::read(path)?;
    if !rows.is_empty() {
        show(format_args!("\n{}", compare::compare(&rows).to_text()))?;
    }
    Ok(())
}

fn sentence(plan: &Plan, summary: &Summary, time: Duration) -> String {
    let mut parts = vec![format!("{} runs done", summary.ok)];
    for (count, what) in [
        (summary.failed, "diverged or failed (their rows say why)"),
        (summary.skipped, "were there already"),
        (summary.diverged_before, "of these had diverged"),
        (summary.elsewhere, "left to another process at work on them"),
        (summary.not_chosen, "settings not chosen, for want of a score"),
    ] {
        if count > 0 {
            parts.push(format!("{count} {what}"));
        }
    }
    let again = if summary.interrupted { "; interrupted: run the same command again to resume" } else { "" };
    let took = match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        seconds => humantime::format_duration(Duration::from_secs(seconds)).to_string(),
    };
    format!("{}: {}; {took} in all{again}\nresults: {}", plan.name, parts.join(", "), plan.results.display())
}
