//! The axes of an experiment, and the runs of its grid: every model with every task, point, seed and method.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use super::entries::{Catalogue, ModelEntry, OpenTask, TaskEntry};
use super::grid::GridPoint;
use super::run::{Run, RunIds, RunPurpose};
use super::selection::{self, Selection};
use super::spec::{ExperimentSpec, TaskSpec};
use super::stage_spec::{EvaluationSpec, SelectSpec, ThenSpec};
use super::start::{Start, Starts};
use crate::error::{Error, Result};
use crate::method::{Method, MethodSpec, Preset};
use crate::model::{Classifier, HeadStart, Labels};
use crate::train::Freeze;
use crate::values::OneOrMany;

/// More runs than any experiment is meant to have.
const MOST_RUNS: usize = 1_000_000;

/// What an experiment multiplies out, opened and filled in.
pub struct Axes<'s> {
    spec: &'s ExperimentSpec,
    /// The description of Child-Tuning that fills in what is left out.
    pub preset: Preset,
    /// The pretrained models.
    pub models: Vec<Arc<ModelEntry>>,
    /// The seeds of the runs that are reported.
    pub seeds: Vec<u64>,
    methods: Vec<Arc<dyn Method>>,
    /// Methods that are left out, since the model of a profile has too few layers for them.
    too_deep: Vec<String>,
    tasks: Vec<OpenTask>,
    points: Vec<GridPoint>,
    next: Vec<NextStage<'s>>,
}

impl<'s> Axes<'s> {
    /// Opens the models and data of an experiment, and fills in its methods and hyper-parameters.
    ///
    /// # Errors
    /// Fails, naming key and place, if one of them cannot be used, or the grid has too many runs.
    pub fn open(spec: &'s ExperimentSpec, catalogue: &mut Catalogue) -> Result<Self> {
        let preset = spec.preset.unwrap_or_default();
        let mut methods = resolve_methods(&spec.method, preset)?;
        let overrides = spec.model_config.clone().unwrap_or_default();
        let models = (spec.model.0.iter())
            .map(|name| ModelEntry::open(name, &overrides).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let too_deep = match spec.profile {
            Some(_) => drop_too_deep(&mut methods, &models)?,
            None => Vec::new(),
        };
        let axes = Self {
            spec,
            preset,
            models,
            seeds: spec.seeds.as_ref().map_or(vec![42], |seeds| seeds.0.clone()),
            methods,
            too_deep,
            tasks: open_tasks(catalogue, &spec.task, &spec.evaluate)?,
            points: GridPoint::default().next_stage(spec.train.as_ref())?,
            next: NextStage::open(&spec.then, preset, catalogue)?,
        };
        if axes.count()? > MOST_RUNS {
            return Err(Error::configuration(format!(
                "the grid has more than {MOST_RUNS} runs; shorten its lists, or divide them among several files"
            )));
        }
        Ok(axes)
    }

    /// Counts the runs, those of further stages and trials included; the largest number if there are more than that.
    fn count(&self) -> Result<usize> {
        let trials = self.spec.select.as_ref().map_or(0, |select| select.on_seeds.0.len());
        let of_each = [
            self.models.len(),
            self.tasks.len(),
            self.points.len(),
            self.methods.len(),
            self.seeds.len().saturating_add(trials),
        ];
        Ok(product(&of_each).saturating_mul(chain_length(&self.next)?))
    }

    /// Makes all runs, each before those that start from it.
    ///
    /// # Errors
    /// Fails, naming the run, if one cannot be or is there twice.
    pub fn runs(&self) -> Result<Vec<Arc<Run>>> {
        let mut chains = Chains { preset: self.preset, runs: Vec::new(), ids: RunIds::default() };
        for model in &self.models {
            let mut starts = self.starts(model);
            for open in &self.tasks {
                let stage = self.stage(model, open);
                for point in &self.points {
                    // The methods of a seed stand together, so that a comparison has its pairs early.
                    for &seed in &self.seeds {
                        for method in &self.methods {
                            let run = stage.run(method, point, starts.of(seed)?, seed, RunPurpose::Report)?;
                            chains.add(run, point, &self.next)?;
                        }
                    }
                }
            }
        }
        Ok(chains.runs)
    }

    /// Makes all trials, and the runs that they choose between.
    ///
    /// # Errors
    /// As for [`Axes::runs`].
    pub fn selection(&self, select: &SelectSpec) -> Result<Selection> {
        let trial_tasks = selection::trial_tasks(select, &self.tasks)?;
        let mut selection = Selection::default();
        for model in &self.models {
            let mut starts = self.starts(model);
            for (open, trial_open) in self.tasks.iter().zip(&trial_tasks) {
                let (stage, trial_stage) = (self.stage(model, open), self.stage(model, trial_open));
                for point in &self.points {
                    for method in &self.methods {
                        let mut on = |stage: &Stage, seeds: &[u64], purpose| {
                            let run = |&seed| stage.run(method, point, starts.of(seed)?, seed, purpose);
                            seeds.iter().map(run).collect::<Result<Vec<_>>>()
                        };
                        let trials = on(&trial_stage, &select.on_seeds.0, RunPurpose::Selection)?;
                        let reports = on(&stage, &self.seeds, RunPurpose::Tuned)?;
                        selection.add(trials, reports, point.examples)?;
                    }
                }
            }
        }
        Ok(selection)
    }

    /// Says which numbers of training examples are more than there are.
    ///
    /// # Errors
    /// Fails if a stage has more grid points than anyone means.
    pub fn examples_note(&self) -> Result<Option<String>> {
        let mut found = too_many_examples(&self.points, &self.tasks);
        let mut stages: Vec<&NextStage> = self.next.iter().collect();
        while let Some(stage) = stages.pop() {
            found.extend(too_many_examples(&stage.points(&GridPoint::default())?, &stage.tasks));
            stages.extend(&stage.next);
        }
        let found: Vec<String> = found.into_iter().collect();
        Ok((!found.is_empty()).then(|| {
            format!("`train.examples` asks for more than there are, and takes all: {}", found.join(", "))
        }))
    }

    /// Says which methods the model of a profile has too few layers for.
    pub fn notes_on_depth(&self) -> impl Iterator<Item = String> {
        self.too_deep.iter().map(|method| format!("left out, for a model with more layers: {method}"))
    }

    fn starts<'a>(&'a self, model: &'a ModelEntry) -> Starts<'a> {
        Starts::new(self.spec.init_from.as_ref(), model)
    }

    fn stage<'a>(&self, model: &'a Arc<ModelEntry>, open: &'a OpenTask) -> Stage<'a> {
        let (freeze, head) = (self.spec.freeze.unwrap_or_default(), self.spec.head.unwrap_or_default());
        Stage { model, open, freeze, head, preset: self.preset }
    }
}

/// Multiplies lengths; the largest number if the product is above it.
fn product(lengths: &[usize]) -> usize {
    lengths.iter().fold(1, |product, &length| product.saturating_mul(length))
}

/// Returns how many runs a run is with those of the stages that start from it.
fn chain_length(next: &[NextStage]) -> Result<usize> {
    next.iter().try_fold(1usize, |length, stage| {
        let points = stage.points(&GridPoint::default())?.len();
        let runs = product(&[stage.tasks.len(), points, stage.methods.len()]);
        Ok(length.saturating_add(runs.saturating_mul(chain_length(&stage.next)?)))
    })
}

/// Says where points ask for more training examples than a task has.
fn too_many_examples(points: &[GridPoint], tasks: &[OpenTask]) -> BTreeSet<String> {
    let too_many = |asked: usize| {
        let all = tasks.iter().map(|(task, _)| (&task.card.name, task.train.dataset.examples.len()));
        all.filter(move |(_, all)| asked > *all)
            .map(move |(name, all)| format!("{asked} for the {all} of {name}"))
    };
    points.iter().filter_map(|point| point.examples).flat_map(too_many).collect()
}

/// Keeps the methods that every model has enough layers for, and returns the others in words.
fn drop_too_deep(methods: &mut Vec<Arc<dyn Method>>, models: &[Arc<ModelEntry>]) -> Result<Vec<String>> {
    let layers =
        |model: &Arc<ModelEntry>| Ok(Classifier::shape(&model.folder.config, &Labels::Score)?.layers);
    let layers = models.iter().map(layers).collect::<Result<Vec<_>>>()?;
    let fits = |method: &Arc<dyn Method>| layers.iter().all(|&layers| method.layers_needed() <= layers);
    let others = methods.iter().filter(|method| !fits(method));
    let others: Vec<String> =
        others.map(|method| format!("{} {}", method.name(), method.options())).collect();
    methods.retain(fits);
    if methods.is_empty() {
        return Err(Error::configuration(format!(
            "method: the profile's model has too few layers for {}; take a deeper one with `--set model=...`",
            others.join(", ")
        )));
    }
    Ok(others)
}

/// Opens the tasks of a stage: all that are trained before those that are only scored.
fn open_tasks(
    catalogue: &mut Catalogue,
    tasks: &OneOrMany<TaskSpec>,
    evaluate: &Option<OneOrMany<EvaluationSpec>>,
) -> Result<Vec<OpenTask>> {
    let tasks = tasks.0.iter().map(|spec| catalogue.task(spec)).collect::<Result<Vec<_>>>()?;
    for (place, task) in tasks.iter().enumerate() {
        let is_namesake =
            |other: &&TaskEntry| other.card.name == task.card.name && other.train.sha256 != task.train.sha256;
        if tasks[..place].iter().any(|other| is_namesake(&other)) {
            return Err(Error::configuration(format!(
                "task: two tasks with different data are called `{}`; give one of them another `name`",
                task.card.name
            )));
        }
    }
    let open = |task: TaskEntry| {
        let evaluations = catalogue.evaluations(&task, listed(evaluate))?;
        Ok((Arc::new(task), evaluations))
    };
    tasks.into_iter().map(open).collect()
}

/// What the runs of a stage on one task have in common.
#[derive(Clone, Copy)]
struct Stage<'a> {
    model: &'a Arc<ModelEntry>,
    open: &'a OpenTask,
    freeze: Freeze,
    head: HeadStart,
    preset: Preset,
}

impl Stage<'_> {
    fn run(
        &self,
        method: &Arc<dyn Method>,
        point: &GridPoint,
        start: Start,
        seed: u64,
        purpose: RunPurpose,
    ) -> Result<Arc<Run>> {
        if self.freeze == Freeze::Encoder && !method.is_vanilla() {
            return Err(Error::configuration(format!(
                "`freeze: encoder` trains the head only and goes with vanilla, not with {}",
                method.name()
            )));
        }
        let (task, evaluations) = self.open;
        let mut run = Run {
            id: String::new(),
            model: self.model.clone(),
            start,
            head: self.head,
            task: task.clone(),
            method: method.clone(),
            hyperparameters: point.settle(method.as_ref(), self.preset, self.freeze)?,
            // As many as there are is all.
            examples: point.examples.filter(|&examples| examples < task.train.dataset.examples.len()),
            label_noise: point.label_noise,
            seed,
            evaluations: evaluations.clone(),
            purpose,
            distinction: OnceLock::new(),
        };
        run.id = run.identity();
        Ok(Arc::new(run))
    }
}

/// A stage that goes on from another, with its tasks opened.
struct NextStage<'a> {
    spec: &'a ThenSpec,
    tasks: Vec<OpenTask>,
    methods: Vec<Arc<dyn Method>>,
    next: Vec<NextStage<'a>>,
}

impl<'a> NextStage<'a> {
    fn open(
        stages: &'a Option<OneOrMany<ThenSpec>>,
        preset: Preset,
        catalogue: &mut Catalogue,
    ) -> Result<Vec<Self>> {
        let open = |spec: &'a ThenSpec| {
            Ok(Self {
                spec,
                tasks: open_tasks(catalogue, &spec.task, &spec.evaluate)?,
                methods: match &spec.method {
                    Some(methods) => resolve_methods(methods, preset)?,
                    None => MethodSpec::vanilla().resolve(preset)?,
                },
                next: Self::open(&spec.then, preset, catalogue)?,
            })
        };
        listed(stages).iter().map(open).collect()
    }

    /// Returns the stage's points, which go on from one of the stage before.
    fn points(&self, before: &GridPoint) -> Result<Vec<GridPoint>> {
        before.next_stage(self.spec.train.as_ref())
    }
}

/// Runs, each before those that start from it.
struct Chains {
    preset: Preset,
    runs: Vec<Arc<Run>>,
    ids: RunIds,
}

impl Chains {
    /// Adds a run, and behind it the runs of the stages that start from it.
    fn add(&mut self, run: Arc<Run>, point: &GridPoint, next: &[NextStage]) -> Result<()> {
        self.ids.add(&run, point.examples)?;
        self.runs.push(run.clone());
        for next in next {
            let points = next.points(point)?;
            let freeze = next.spec.freeze.unwrap_or_default();
            let head = next.spec.head.unwrap_or(HeadStart::Fresh);
            for open in &next.tasks {
                let stage = Stage { model: &run.model, open, freeze, head, preset: self.preset };
                for point in &points {
                    for method in &next.methods {
                        let start = Start::Run(run.clone());
                        let target = stage.run(method, point, start, run.seed, RunPurpose::Report)?;
                        self.add(target, point, &next.next)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn resolve_methods(methods: &OneOrMany<MethodSpec>, preset: Preset) -> Result<Vec<Arc<dyn Method>>> {
    Ok(methods.0.iter().map(|method| method.resolve(preset)).collect::<Result<Vec<_>>>()?.concat())
}

/// Returns the values of a key that may be missing.
pub fn listed<T>(values: &Option<OneOrMany<T>>) -> &[T] {
    values.as_ref().map_or(&[], |values| &values.0)
}
