//! The plan: every run of an experiment with no options left, checked before anything trains.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::entries::{Catalogue, ModelEntry, OpenTask, TaskEntry, data_roots};
use super::grid::GridPoint;
use super::run::{Run, RunIds, RunPurpose};
use super::selection::{self, Selection};
use super::spec::{ExperimentSpec, TaskSpec};
use super::stage_spec::{EvaluationSpec, ThenSpec};
use super::start::{Start, Starts};
use crate::error::{Error, Result};
use crate::files::is_pipe;
use crate::method::{Method, MethodSpec, Preset};
use crate::model::{Classifier, HeadStart, Labels};
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
    /// The runs, those that a comparison needs together next to each other, sources before what starts from them. Empty
    /// with `select`: these are known only when the trials are done.
    pub runs: Vec<Arc<Run>>,
    /// What the user should know about models and data, in sentences.
    pub notes: Vec<String>,
    /// Trials, and the runs that they choose between; empty without `select`.
    pub selection: Selection,
    /// The description of Child-Tuning that filled in what was left out.
    pub preset: Preset,
    /// The CSV that results are appended to.
    pub results: PathBuf,
    /// Folder that keeps each finished run's model.
    pub save: Option<PathBuf>,
    /// Folder that keeps each finished run's mask.
    pub masks: Option<PathBuf>,
}

/// More runs than any experiment is meant to have.
const MOST_RUNS: usize = 1_000_000;

impl Plan {
    /// Resolves an experiment: fills in defaults, opens models, reads data, and multiplies the axes out.
    ///
    /// # Errors
    /// Fails, naming file and place, if a model, a task or a data set cannot be used or options contradict each other.
    pub fn resolve(spec: &ExperimentSpec, file: &Path, options: &PlanOptions) -> Result<Self> {
        let preset = spec.preset.unwrap_or_default();
        let name = spec.name.clone().unwrap_or_else(|| "experiment".into());
        // It becomes the name of the results file.
        let is_odd = name.contains(['/', '\\']) || name.contains(char::is_control);
        if name.trim().is_empty() || is_odd || name.starts_with('.') {
            return Err(Error::configuration(format!(
                "name: `{name}` cannot name a file; take a word without `/` that does not begin with a dot"
            )));
        }
        // Beside a pipe there is nothing.
        let base = file.parent().filter(|_| !is_pipe(file)).unwrap_or(Path::new(""));
        let mut methods = resolve_methods(&spec.method, preset)?;
        let overrides = spec.model_config.clone().unwrap_or_default();
        let models = (spec.model.0.iter())
            .map(|name| ModelEntry::open(name, &overrides).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let mut too_deep = Vec::new();
        if spec.profile.is_some() {
            let layers = |model: &Arc<ModelEntry>| Classifier::shape(&model.folder.config, &Labels::Score);
            let layers =
                models.iter().map(layers).map(|shape| Ok(shape?.layers)).collect::<Result<Vec<_>>>()?;
            methods.retain(|method| {
                let fits = layers.iter().all(|&layers| method.layers_needed() <= layers);
                if !fits {
                    too_deep.push(format!("{} {}", method.name(), method.options()));
                }
                fits
            });
            if methods.is_empty() {
                return Err(Error::configuration(format!(
                    "method: the profile's model has too few layers for {}; take a deeper one with `--set model=...`",
                    too_deep.join(", ")
                )));
            }
        }
        let mut catalogue = Catalogue::new(base, data_roots(&options.data, listed(&spec.data))?);
        let tasks = open_tasks(&mut catalogue, &spec.task, &spec.evaluate)?;
        let next = NextStage::open(&spec.then, preset, &mut catalogue)?;
        let seeds = spec.seeds.as_ref().map_or(vec![42], |seeds| seeds.0.clone());
        let points = GridPoint::default().next_stage(&spec.train.clone().unwrap_or_default())?;
        let count = [models.len(), tasks.len(), points.len(), methods.len(), seeds.len()];
        let count = count.into_iter().try_fold(1usize, usize::checked_mul);
        if count.is_none_or(|count| count > MOST_RUNS) {
            return Err(Error::configuration(format!(
                "the grid has more than {MOST_RUNS} runs; shorten its lists, or divide them among several files"
            )));
        }
        selection::check(spec, &seeds)?;
        let trial_tasks = match &spec.select {
            Some(select) => selection::trial_tasks(select, &tasks)?,
            None => tasks.clone(),
        };

        let (mut runs, mut ids, mut selection) = (Vec::new(), RunIds::default(), Selection::default());
        for model in &models {
            let mut starts = Starts::new(spec.init_from.as_ref(), model);
            for (open, trial_open) in tasks.iter().zip(&trial_tasks) {
                let (freeze, head) = (spec.freeze.unwrap_or_default(), spec.head.unwrap_or_default());
                let stage = Stage { model, open, freeze, head, preset };
                for point in &points {
                    if let Some(select) = &spec.select {
                        for method in &methods {
                            let mut on = |stage: &Stage, seeds: &[u64], purpose| {
                                let run = |&seed| stage.run(method, point, starts.of(seed)?, seed, purpose);
                                seeds.iter().map(run).collect::<Result<Vec<_>>>()
                            };
                            let trial_stage = Stage { open: trial_open, ..stage };
                            let trials = on(&trial_stage, &select.on_seeds.0, RunPurpose::Selection)?;
                            let reports = on(&stage, &seeds, RunPurpose::Tuned)?;
                            selection.add(trials, reports, point.examples)?;
                        }
                        continue;
                    }
                    for &seed in &seeds {
                        for method in &methods {
                            let run = stage.run(method, point, starts.of(seed)?, seed, RunPurpose::Report)?;
                            add_chain(run, point, &next, preset, (&mut runs, &mut ids))?;
                        }
                    }
                }
            }
        }
        let mut plan = Self {
            results: spec.results.clone().unwrap_or_else(|| PathBuf::from(format!("results/{name}.csv"))),
            save: spec.save.clone(),
            masks: spec.masks.clone(),
            selection,
            name,
            notes: models.iter().filter_map(|model| model.note()).chain(catalogue.notes()).collect(),
            runs,
            preset,
        };
        plan.refuse_odd_places()?;
        plan.keep_only(&options.only)?;
        plan.check_fits()?;
        plan.tell_runs_apart();
        plan.notes.extend(plan.warmup_note());
        plan.notes.extend(examples_note(&points, &tasks));
        plan.notes.extend(dropout_notes(&plan.runs)?);
        plan.notes.extend(
            too_deep.into_iter().map(|method| format!("left out, for a model with more layers: {method}")),
        );
        Ok(plan)
    }

    /// Says which runs never reach their learning rate. The first step of a warm-up has rate 0, so one of a single step trains
    /// nothing.
    fn warmup_note(&self) -> Option<String> {
        let warmup = |run: &Run| run.hyperparameters.warmup.steps(run.total_steps());
        let short: Vec<_> = self.all_runs().filter(|run| warmup(run) >= run.total_steps()).collect();
        let first = short.first()?;
        let (steps, warmup) = (first.total_steps(), warmup(first));
        Some(format!(
            "{} of {} runs end before their warm-up does and never reach `learning_rate`; {} has {steps} step{} and a warm-up of \
             {warmup}",
            short.len(),
            self.all_runs().count(),
            first.label(),
            if steps == 1 { "" } else { "s" }
        ))
    }

    /// Refuses places that cannot be what they are named as, before anything is read from there.
    fn refuse_odd_places(&self) -> Result<()> {
        let places =
            [("results", Some(&self.results)), ("save", self.save.as_ref()), ("masks", self.masks.as_ref())];
        for (key, place) in places.into_iter().filter_map(|(key, place)| Some((key, place?))) {
            let refused = |why: &str| Err(Error::configuration(format!("{key}: {} {why}", place.display())));
            if place.as_os_str().is_empty() {
                return Err(Error::configuration(format!(
                    "{key}: is empty; name a place, or leave the key out"
                )));
            }
            if is_pipe(place) {
                return refused("is neither a file nor a folder; name one");
            }
            match key {
                "results" if place.is_dir() => return refused("is a folder; name a file"),
                "save" | "masks" if place.is_file() => return refused("is a file; name a folder"),
                _ => {}
            }
            if place.starts_with("~") && !Path::new("~").exists() {
                return refused("begins with `~`, which only a shell replaces; write the folder out");
            }
        }
        Ok(())
    }

    /// Gives runs that are called the same the settings in which they differ.
    fn tell_runs_apart(&self) {
        let mut alike: HashMap<String, Vec<&Arc<Run>>> = HashMap::new();
        for run in self.all_runs() {
            alike.entry(run.label()).or_default().push(run);
        }
        for runs in alike.values().filter(|runs| runs.len() > 1) {
            let settings: Vec<_> = runs.iter().map(|run| run.further_settings()).collect();
            let keys: HashSet<&String> = settings.iter().flat_map(|own| own.keys()).collect();
            let differs = |key: &&String| settings.iter().any(|own| own.get(*key) != settings[0].get(*key));
            let differing: HashSet<&String> = keys.into_iter().filter(differs).collect();
            for (run, own) in runs.iter().zip(&settings) {
                let telling = own.iter().filter(|(key, _)| differing.contains(key));
                let telling: Vec<_> = telling
                    .map(|(key, value)| format!("{key}={}", value.to_string().trim_matches('"')))
                    .collect();
                let _ = run.distinction.set(telling.join(" "));
            }
        }
    }

    /// Checks that methods and lengths fit the models, once for each of their kinds.
    fn check_fits(&self) -> Result<()> {
        let mut checked: HashSet<(&str, &str, &str, String, usize)> = HashSet::new();
        for run in self.all_runs() {
            let (model, card, method) = (&run.model, &run.task.card, &run.method);
            let max_length = run.hyperparameters.max_length;
            if !checked.insert((&model.name, &card.name, method.name(), method.options(), max_length)) {
                continue;
            }
            let config = &model.folder.config;
            method.check(run.declared()?.as_slice())?;
            if method.needs_dropout() {
                check_dropout(run)?;
            }
            Classifier::check_inputs(config, &model.encoder, max_length)?;
            model.encoder.encode("a", card.is_pair().then_some("b"), max_length)?;
        }
        Ok(())
    }

    /// Returns every run that may come to be trained.
    pub fn all_runs(&self) -> impl Iterator<Item = &Arc<Run>> {
        let candidates = self.selection.choices.iter().flat_map(|choice| &choice.candidates);
        let reports = candidates.flat_map(|candidate| &candidate.reports);
        self.runs.iter().chain(&self.selection.trials).chain(reports)
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
                let there: BTreeSet<String> = self.all_runs().map(|run| get(run)).collect();
                let there: Vec<&str> = there.iter().map(String::as_str).collect();
                return Err(Error::configuration(format!(
                    "--only {column}={value} leaves no run{}; there are {}",
                    suggestion(value, there.iter().copied()),
                    if there.is_empty() { "none left".into() } else { there.join(", ") }
                )));
            }
            // A run that starts from another stands behind it.
            let (mut kept, mut sources) = (Vec::new(), HashSet::new());
            for run in self.runs.iter().rev() {
                if wanted(run) || sources.contains(&run.id) {
                    sources.extend(run.source_run().map(|source| source.id.clone()));
                    kept.push(run.clone());
                }
            }
            kept.reverse();
            self.runs = kept;
            self.selection.retain(wanted);
        }
        Ok(())
    }
}

/// Says which numbers of training examples are more than there are.
fn examples_note(points: &[GridPoint], tasks: &[OpenTask]) -> Option<String> {
    let too_many = |asked: usize| {
        let all = tasks.iter().map(|(task, _)| (&task.card.name, task.train.dataset.examples.len()));
        all.filter(move |(_, all)| asked > *all)
            .map(move |(name, all)| format!("{asked} for the {all} of {name}"))
    };
    let found: BTreeSet<String> =
        points.iter().filter_map(|point| point.examples).flat_map(too_many).collect();
    let found: Vec<String> = found.into_iter().collect();
    (!found.is_empty()).then(|| {
        format!("`train.examples` asks for more than there are, and takes all: {}", found.join(", "))
    })
}

/// Says which folders that runs start from have other dropout than the model that the experiment names.
fn dropout_notes(runs: &[Arc<Run>]) -> Result<BTreeSet<String>> {
    let (mut notes, mut looked_at) = (BTreeSet::new(), HashSet::new());
    for run in runs {
        let Start::Folder(start) = &run.start else { continue };
        if !looked_at.insert((Arc::as_ptr(start), Arc::as_ptr(&run.model))) {
            continue;
        }
        let (own, named) = (run.config().dropout()?, run.model.folder.config.dropout()?);
        let differing = own.iter().filter(|(key, value)| named.get(*key) != Some(value));
        let differing: Vec<String> = differing.map(|(key, value)| format!("{key}: {value}")).collect();
        if !differing.is_empty() {
            notes.insert(format!(
                "init_from: {} has other dropout than {}, and runs train with it: {}",
                start.folder.path.display(),
                run.model.name,
                differing.join(", ")
            ));
        }
    }
    Ok(notes)
}

/// Refuses a model without dropout for a method whose passes differ by nothing else.
fn check_dropout(run: &Run) -> Result<()> {
    let dropout = run.config().dropout()?;
    if dropout.values().any(|&probability| probability > 0.0) {
        return Ok(());
    }
    let keys: Vec<&str> = dropout.keys().map(String::as_str).collect();
    Err(Error::configuration(format!(
        "method: the passes of {} differ by dropout alone, and {} has none; give it some, such as `model_config: {{{}: 0.1}}`{}",
        run.method.name(),
        run.model.name,
        keys.first().unwrap_or(&"dropout"),
        match keys.len() {
            0 | 1 => String::new(),
            _ => format!(" (its keys are {})", keys.join(", ")),
        }
    )))
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
        if self.freeze == Freeze::Encoder && method.name() != "vanilla" {
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
}

/// Adds a run, and behind it the runs of the stages that start from it.
fn add_chain(
    run: Arc<Run>,
    point: &GridPoint,
    next: &[NextStage],
    preset: Preset,
    (runs, ids): (&mut Vec<Arc<Run>>, &mut RunIds),
) -> Result<()> {
    ids.add(&run, point.examples)?;
    runs.push(run.clone());
    for NextStage { spec, tasks, methods, next } in next {
        let points = point.next_stage(&spec.train.clone().unwrap_or_default())?;
        let (freeze, head) = (spec.freeze.unwrap_or_default(), spec.head.unwrap_or(HeadStart::Fresh));
        for open in tasks {
            let stage = Stage { model: &run.model, open, freeze, head, preset };
            for point in &points {
                for method in methods {
                    let start = Start::Run(run.clone());
                    let target = stage.run(method, point, start, run.seed, RunPurpose::Report)?;
                    add_chain(target, point, next, preset, (runs, ids))?;
                }
            }
        }
    }
    Ok(())
}

fn resolve_methods(methods: &OneOrMany<MethodSpec>, preset: Preset) -> Result<Vec<Arc<dyn Method>>> {
    Ok(methods.0.iter().map(|method| method.resolve(preset)).collect::<Result<Vec<_>>>()?.concat())
}

fn listed<T>(values: &Option<OneOrMany<T>>) -> &[T] {
    values.as_ref().map_or(&[], |values| &values.0)
}
