//! The plan: every run of an experiment with no options left, checked before anything trains.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::entries::{Catalogue, Evaluated, ModelEntry, TaskEntry, data_roots, start_folder};
use super::grid::GridPoint;
use super::run::{Run, RunPurpose, Start};
use super::selection::{Candidate, Choice, Selection};
use super::spec::{ExperimentSpec, TaskSpec};
use super::transfer::{EvaluationSpec, ThenSpec};
use crate::error::{Error, Result};
use crate::method::{Method, MethodSpec, Preset};
use crate::model::HeadStart;
use crate::spelling::suggestion;
use crate::train::Freeze;
use crate::values::OneOrMany;

/// What the command line adds to an experiment file.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// Folders with data sets, searched first.
    pub data: Vec<PathBuf>,
    /// Keep only runs whose column has the value: `task=rte`.
    pub only: Vec<(String, String)>,
}

/// All runs of an experiment.
pub struct Plan {
    /// The experiment's name.
    pub name: String,
    /// The runs, those that a comparison needs together next to each other, sources before what starts from them. With a
    /// selection, these are known only when its trials are done.
    pub runs: Vec<Arc<Run>>,
    /// What the user should know about the data, in sentences.
    pub notes: Vec<String>,
    /// Trials that choose the runs.
    pub selection: Option<Selection>,
    /// The description of Child-Tuning that filled in what was left out.
    pub preset: Preset,
    /// The CSV that results are appended to.
    pub results: PathBuf,
    /// Folder that keeps each finished run's model.
    pub save: Option<PathBuf>,
    /// Folder that keeps each finished run's mask.
    pub masks: Option<PathBuf>,
}

impl Plan {
    /// Resolves an experiment: fills in defaults, opens models, reads data, and multiplies the axes out.
    ///
    /// # Errors
    /// Fails, naming file and place, if a model, a task or a data set cannot be used or options contradict each other.
    pub fn resolve(spec: &ExperimentSpec, file: &Path, options: &PlanOptions) -> Result<Self> {
        let preset = spec.preset.unwrap_or_default();
        let name = spec.name.clone().unwrap_or_else(|| "experiment".into());
        let base = file.parent().unwrap_or(Path::new("")).to_path_buf();
        let methods = resolve_methods(&spec.method, preset)?;
        let overrides = spec.model_config.clone().unwrap_or_default();
        let models = (spec.model.0.iter())
            .map(|name| ModelEntry::open(name, &overrides).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let mut builder = Builder {
            preset,
            catalogue: Catalogue::new(&base, data_roots(&options.data, listed(&spec.data))),
        };
        let evaluate = listed(&spec.evaluate);
        let tasks = builder.tasks(&spec.task, evaluate)?;
        let seeds = spec.seeds.as_ref().map_or(vec![42], |seeds| seeds.0.clone());
        let points = GridPoint::default().next_stage(&spec.train.clone().unwrap_or_default());
        check_selection(spec, &seeds)?;
        let trial_seeds = spec.select.as_ref().map(|select| &select.on_seeds.0);

        let mut runs = Vec::new();
        let mut selection = Selection::default();
        for model in &models {
            let start = |seed: u64| -> Result<Start> {
                Ok(match &spec.init_from {
                    None => Start::Pretrained,
                    Some(from) => Start::Folder(Arc::new(start_folder(from, model, seed)?)),
                })
            };
            let starts = seeds.iter().map(|&seed| start(seed)).collect::<Result<Vec<_>>>()?;
            for (task, evaluations) in &tasks {
                let stage = Stage {
                    model,
                    task,
                    evaluations,
                    freeze: spec.freeze.unwrap_or_default(),
                    head: spec.head.unwrap_or_default(),
                    purpose: RunPurpose::Report,
                };
                for point in &points {
                    match trial_seeds {
                        None => {
                            for (&seed, start) in seeds.iter().zip(&starts) {
                                for method in &methods {
                                    let run = stage.run(method, point, preset, start.clone(), seed)?;
                                    let stages = listed(&spec.then);
                                    builder.add(run, point, stages, &mut runs)?;
                                }
                            }
                        }
                        Some(trial_seeds) => {
                            for method in &methods {
                                let on = |seeds: &[u64], purpose| -> Result<Vec<Arc<Run>>> {
                                    let stage = Stage { purpose, ..stage };
                                    seeds
                                        .iter()
                                        .map(|&seed| {
                                            stage.run(method, point, preset, start(seed)?, seed).map(Arc::new)
                                        })
                                        .collect()
                                };
                                selection.add(
                                    on(trial_seeds, RunPurpose::Selection)?,
                                    on(&seeds, RunPurpose::Tuned)?,
                                )?;
                            }
                        }
                    }
                }
            }
        }
        let mut plan = Self {
            results: spec.results.clone().unwrap_or_else(|| PathBuf::from(format!("results/{name}.csv"))),
            save: spec.save.clone(),
            masks: spec.masks.clone(),
            selection: trial_seeds.is_some().then_some(selection),
            name,
            notes: builder.catalogue.notes(),
            runs,
            preset,
        };
        plan.keep_only(&options.only)?;
        Ok(plan)
    }

    /// Returns every run that may come to be trained.
    pub fn all_runs(&self) -> impl Iterator<Item = &Arc<Run>> {
        let selection = self.selection.iter();
        let reports = selection.clone().flat_map(|selection| &selection.choices);
        let reports = reports.flat_map(|choice| &choice.candidates).flat_map(|candidate| &candidate.reports);
        self.runs.iter().chain(selection.flat_map(|selection| &selection.trials)).chain(reports)
    }

    fn keep_only(&mut self, only: &[(String, String)]) -> Result<()> {
        const COLUMNS: [&str; 4] = ["model", "task", "method", "seed"];
        for (column, value) in only {
            let get: fn(&Run) -> String = match column.as_str() {
                "model" => |run| run.model.name.clone(),
                "task" => |run| run.task.card.name.clone(),
                // Of a chain, the method that its first stage compares.
                "method" => |run| run.first_stage().method.name().to_owned(),
                "seed" => |run| run.seed.to_string(),
                _ => {
                    let hint = suggestion(column, COLUMNS);
                    return Err(Error::configuration(format!(
                        "--only knows {}, not `{column}`{hint}",
                        COLUMNS.join(", ")
                    )));
                }
            };
            // A seed chooses among the runs that are reported; all trials are needed to choose their settings.
            let wanted =
                |run: &Run| get(run) == *value || (column == "seed" && run.purpose == RunPurpose::Selection);
            if !self.all_runs().any(|run| get(run) == *value) {
                return Err(Error::configuration(format!("--only {column}={value} leaves no run")));
            }
            let mut kept: Vec<Arc<Run>> = Vec::new();
            for run in self.runs.iter().rev() {
                let is_source =
                    |other: &Arc<Run>| other.source_run().is_some_and(|source| source.id == run.id);
                if wanted(run) || kept.iter().any(is_source) {
                    kept.push(run.clone());
                }
            }
            kept.reverse();
            self.runs = kept;
            if let Some(selection) = &mut self.selection {
                selection.retain(wanted);
            }
        }
        Ok(())
    }
}

/// What the runs of a stage have in common.
#[derive(Clone, Copy)]
struct Stage<'a> {
    model: &'a Arc<ModelEntry>,
    task: &'a Arc<TaskEntry>,
    evaluations: &'a Arc<[Evaluated]>,
    freeze: Freeze,
    head: HeadStart,
    purpose: RunPurpose,
}

impl Stage<'_> {
    fn run(
        &self,
        method: &Arc<dyn Method>,
        point: &GridPoint,
        preset: Preset,
        start: Start,
        seed: u64,
    ) -> Result<Run> {
        if self.freeze == Freeze::Encoder && method.name() != "vanilla" {
            return Err(Error::configuration(format!(
                "`freeze: encoder` trains the head only, and {} chooses among the encoder's weights; use vanilla",
                method.name()
            )));
        }
        let mut run = Run {
            id: String::new(),
            model: self.model.clone(),
            start,
            head: self.head,
            task: self.task.clone(),
            method: method.clone(),
            hyperparameters: point.settle(method.as_ref(), preset, self.freeze)?,
            examples: point.examples,
            label_noise: point.label_noise,
            seed,
            evaluations: self.evaluations.clone(),
            purpose: self.purpose,
        };
        run.id = run.identity();
        Ok(run)
    }
}

type OpenTask = (Arc<TaskEntry>, Arc<[Evaluated]>);

/// Makes runs, stage after stage.
struct Builder {
    preset: Preset,
    catalogue: Catalogue,
}

impl Builder {
    fn tasks(&mut self, specs: &OneOrMany<TaskSpec>, evaluate: &[EvaluationSpec]) -> Result<Vec<OpenTask>> {
        let tasks = specs.0.iter().map(|spec| self.catalogue.task(spec).map(Arc::new));
        let tasks = tasks.collect::<Result<Vec<_>>>()?;
        let open = |task: Arc<TaskEntry>| {
            let evaluations = self.catalogue.evaluations(&task, evaluate)?;
            Ok((task, evaluations))
        };
        tasks.into_iter().map(open).collect()
    }

    /// Adds a run, and behind it the runs of the stages that start from it.
    fn add(
        &mut self,
        run: Run,
        point: &GridPoint,
        stages: &[ThenSpec],
        runs: &mut Vec<Arc<Run>>,
    ) -> Result<()> {
        if runs.iter().any(|other| other.id == run.id) {
            return Err(Error::configuration(format!(
                "the experiment holds the same run twice: {}; remove the repeated entry",
                run.label()
            )));
        }
        let run = Arc::new(run);
        runs.push(run.clone());
        for stage in stages {
            let methods = match &stage.method {
                Some(methods) => resolve_methods(methods, self.preset)?,
                None => MethodSpec::vanilla().resolve(self.preset)?,
            };
            let points = point.next_stage(&stage.train.clone().unwrap_or_default());
            for (task, evaluations) in self.tasks(&stage.task, listed(&stage.evaluate))? {
                let common = Stage {
                    model: &run.model,
                    task: &task,
                    evaluations: &evaluations,
                    freeze: stage.freeze.unwrap_or_default(),
                    head: stage.head.unwrap_or(HeadStart::Fresh),
                    purpose: RunPurpose::Report,
                };
                for point in &points {
                    for method in &methods {
                        let next =
                            common.run(method, point, self.preset, Start::Run(run.clone()), run.seed)?;
                        self.add(next, point, listed(&stage.then), runs)?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl Selection {
    /// Adds a point of the grid as a candidate.
    fn add(&mut self, trials: Vec<Arc<Run>>, reports: Vec<Arc<Run>>) -> Result<()> {
        let Some(run) = trials.first() else { return Ok(()) };
        if self.trials.iter().any(|other| other.id == run.id) {
            return Err(Error::configuration(format!(
                "the experiment holds the same run twice: {}; remove the repeated entry",
                run.label()
            )));
        }
        let noise =
            if run.label_noise > 0.0 { format!(" label_noise={}", run.label_noise) } else { String::new() };
        let size = run.examples.map_or(String::new(), |examples| format!(" examples={examples}"));
        let what =
            format!("{} on {} with {}{size}{noise}", run.method.name(), run.task.card.name, run.model.name);
        let settings = &run.hyperparameters;
        let candidate = Candidate {
            settings: format!(
                "{} learning_rate={:e} epochs={} batch_size={} warmup={} weight_decay={}",
                run.method.options(),
                settings.learning_rate,
                settings.epochs,
                settings.batch_size,
                settings.warmup.0,
                settings.weight_decay
            )
            .trim_start()
            .to_owned(),
            trials: trials.clone(),
            reports,
        };
        self.trials.extend(trials);
        match self.choices.iter_mut().find(|choice| choice.what == what) {
            Some(choice) => choice.candidates.push(candidate),
            None => self.choices.push(Choice { what, candidates: vec![candidate] }),
        }
        Ok(())
    }

    fn retain(&mut self, wanted: impl Fn(&Run) -> bool) {
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

/// Refuses selections that contradict the rest of the experiment.
fn check_selection(spec: &ExperimentSpec, seeds: &[u64]) -> Result<()> {
    let Some(select) = &spec.select else { return Ok(()) };
    if spec.then.is_some() {
        return Err(Error::configuration(
            "`select` and `then` exclude each other; tune in one experiment, and go on from its runs in another \
             (`init_from`)",
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

fn resolve_methods(methods: &OneOrMany<MethodSpec>, preset: Preset) -> Result<Vec<Arc<dyn Method>>> {
    Ok(methods.0.iter().map(|method| method.resolve(preset)).collect::<Result<Vec<_>>>()?.concat())
}

fn listed<T>(values: &Option<OneOrMany<T>>) -> &[T] {
    values.as_ref().map_or(&[], |values| &values.0)
}
