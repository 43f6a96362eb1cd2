//! The plan: every run of an experiment with no options left, checked before anything trains.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::spec::{ExperimentSpec, TaskSpec, TrainSpec};
use crate::data::{Dataset, Split, TaskCard, TokenEncoder, read_split};
use crate::error::{Error, Result};
use crate::method::{Method, Preset};
use crate::model::{HeadStart, ModelFolder};
use crate::spelling::suggestion;
use crate::train::{AdamWForm, Checkpoint, Hyperparameters, OptimizerRule, Order, Precision, Warmup};
use crate::values::{OneOrMany, hexadecimal};

/// What the command line adds to an experiment file.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// Folders with data sets, searched first.
    pub data: Vec<PathBuf>,
    /// Keep only runs whose column has the value: `task=rte`.
    pub only: Vec<(String, String)>,
}

/// A pretrained model that runs start from.
pub struct ModelEntry {
    /// The name as typed.
    pub name: String,
    /// The opened folder.
    pub folder: ModelFolder,
    /// SHA-256 of its weights.
    pub sha256: String,
    /// What makes tokens of texts.
    pub encoder: TokenEncoder,
    /// SHA-256 of the tokenizer's files.
    pub tokenizer_sha256: String,
}

/// A task with its data.
pub struct TaskEntry {
    /// What the task is.
    pub card: TaskCard,
    /// Training data.
    pub train: Dataset,
    /// Data that runs are scored on.
    pub dev: Dataset,
}

/// One run: a model, a task, a method, hyper-parameters and a seed.
#[derive(Clone)]
pub struct Run {
    /// 16 hexadecimal characters over everything that decides the outcome.
    pub id: String,
    /// The model it starts from.
    pub model: Arc<ModelEntry>,
    /// The task it trains on.
    pub task: Arc<TaskEntry>,
    /// The fine-tuning method.
    pub method: Arc<dyn Method>,
    /// Everything else that decides how it trains.
    pub hyperparameters: Hyperparameters,
    /// Size of the subset of the training data; `None` trains on all of it.
    pub examples: Option<usize>,
    /// The seed of head, order, dropout and masks.
    pub seed: u64,
}

/// All runs of an experiment.
pub struct Plan {
    /// The experiment's name.
    pub name: String,
    /// The runs, those that a comparison needs together next to each other.
    pub runs: Vec<Run>,
    /// The description of Child-Tuning that filled in what was left out.
    pub preset: Preset,
    /// What happens to a head in the model folder.
    pub head: HeadStart,
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
        let head = spec.head.unwrap_or_default();
        let name = spec.name.clone().unwrap_or_else(|| "experiment".into());
        let base = file.parent().unwrap_or(Path::new("")).to_path_buf();
        let methods =
            (spec.method.0.iter()).map(|method| method.resolve(preset)).collect::<Result<Vec<_>>>()?.concat();
        let roots = data_roots(spec, options);
        let overrides = spec.model_config.clone().unwrap_or_default();
        let models = (spec.model.0.iter())
            .map(|name| ModelEntry::open(name, &overrides).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let tasks = (spec.task.0.iter())
            .map(|task| TaskEntry::open(task, &base, &roots).map(Arc::new))
            .collect::<Result<Vec<_>>>()?;
        let seeds = spec.seeds.as_ref().map_or(vec![42], |seeds| seeds.0.clone());
        let train = spec.train.clone().unwrap_or_default();

        let mut plan = Self {
            results: spec.results.clone().unwrap_or_else(|| PathBuf::from(format!("results/{name}.csv"))),
            save: spec.save.clone(),
            masks: spec.masks.clone(),
            name,
            runs: Vec::new(),
            preset,
            head,
        };
        for model in &models {
            for task in &tasks {
                for point in train.grid() {
                    for &seed in &seeds {
                        for method in &methods {
                            plan.add(point.run(model, task, method, preset, seed)?)?;
                        }
                    }
                }
            }
        }
        plan.keep_only(&options.only)?;
        Ok(plan)
    }

    fn add(&mut self, mut run: Run) -> Result<()> {
        run.id = identity(&run, self.head);
        if self.runs.iter().any(|other| other.id == run.id) {
            return Err(Error::configuration(format!(
                "the experiment holds the same run twice: {}; remove the repeated entry",
                run.label()
            )));
        }
        self.runs.push(run);
        Ok(())
    }

    fn keep_only(&mut self, only: &[(String, String)]) -> Result<()> {
        const COLUMNS: [&str; 4] = ["model", "task", "method", "seed"];
        for (column, value) in only {
            let get: fn(&Run) -> String = match column.as_str() {
                "model" => |run| run.model.name.clone(),
                "task" => |run| run.task.card.name.clone(),
                "method" => |run| run.method.name().to_owned(),
                "seed" => |run| run.seed.to_string(),
                _ => {
                    let hint = suggestion(column, COLUMNS);
                    return Err(Error::configuration(format!(
                        "--only knows {}, not `{column}`{hint}",
                        COLUMNS.join(", ")
                    )));
                }
            };
            if !self.runs.iter().any(|run| get(run) == *value) {
                return Err(Error::configuration(format!("--only {column}={value} leaves no run")));
            }
            self.runs.retain(|run| get(run) == *value);
        }
        Ok(())
    }
}

impl Run {
    /// Returns the run in a few words, for progress and messages.
    pub fn label(&self) -> String {
        format!("{} {} {} seed {}", self.task.card.name, self.method.name(), self.method.options(), self.seed)
    }

    /// Returns the number of training examples.
    pub fn training_examples(&self) -> usize {
        let all = self.task.train.examples.len();
        self.examples.map_or(all, |examples| examples.min(all))
    }

    /// Returns the number of optimizer steps.
    pub fn total_steps(&self) -> u64 {
        self.hyperparameters.total_steps(self.training_examples())
    }
}

impl ModelEntry {
    fn open(name: &str, overrides: &Map<String, Value>) -> Result<Self> {
        let beside = Path::new("models").join(name);
        let path = if !Path::new(name).exists() && beside.exists() { beside } else { PathBuf::from(name) };
        let mut folder = ModelFolder::open(&path)?;
        folder.config = folder.config.with_overrides(overrides)?;
        folder.config.family()?;
        let encoder = TokenEncoder::from_folder(&path)?;
        let mut tokenizer = Sha256::new();
        for file in encoder.files() {
            tokenizer.update(std::fs::read(&file).map_err(Error::io("read", &file))?);
        }
        let tokenizer_sha256 = hexadecimal(&tokenizer.finalize());
        Ok(Self { name: name.to_owned(), sha256: folder.sha256(), folder, encoder, tokenizer_sha256 })
    }
}

impl TaskEntry {
    fn open(spec: &TaskSpec, base: &Path, roots: &[PathBuf]) -> Result<Self> {
        let card = match spec {
            TaskSpec::Custom(custom) => custom.as_ref().clone().into_card(base)?,
            TaskSpec::Named(name) => named_card(name, base)?,
        };
        let train = read_split(&card, roots, Split::Train)?;
        let dev = read_split(&card, roots, Split::Dev)?;
        Ok(Self { card, train, dev })
    }
}

/// Finds a task by its built-in name, or by its card file beside the experiment or in the working folder.
///
/// # Errors
/// Fails, with the nearest known name, if there is neither.
pub fn named_card(name: &str, base: &Path) -> Result<TaskCard> {
    if let Some(card) = TaskCard::builtin(name) {
        return Ok(card);
    }
    if name.ends_with(".yaml") || name.ends_with(".yml") {
        let beside = base.join(name);
        return TaskCard::load(if beside.exists() { &beside } else { Path::new(name) });
    }
    let known = TaskCard::builtin_names();
    Err(Error::configuration(format!(
        "unknown task `{name}`{}; known are {}, and files of your own that end in .yaml",
        suggestion(name, known.iter().copied()),
        known.join(", ")
    )))
}

/// Where data sets are looked for: the command line, the experiment, the folder `data`.
fn data_roots(spec: &ExperimentSpec, options: &PlanOptions) -> Vec<PathBuf> {
    let mut roots = options.data.clone();
    roots.extend(spec.data.iter().flat_map(|data| data.0.iter().cloned()));
    roots.push(PathBuf::from("data"));
    roots
}

/// One point of the grid of hyper-parameters, still without the parts that depend on model and method.
#[derive(Clone, Debug)]
struct GridPoint {
    hyperparameters: Hyperparameters,
    micro_batch: Option<usize>,
    warmup: Option<Warmup>,
    adamw: Option<AdamWForm>,
    examples: Option<usize>,
}

impl GridPoint {
    fn run(
        &self,
        model: &Arc<ModelEntry>,
        task: &Arc<TaskEntry>,
        method: &Arc<dyn Method>,
        preset: Preset,
        seed: u64,
    ) -> Result<Run> {
        let mut hyperparameters = self.hyperparameters.clone();
        let official = preset == Preset::Official;
        // The released F and D skip the warm-up that their command asks for; its vanilla path has it.
        let warmup = if official && method.is_child_tuning() { 0.0 } else { 0.1 };
        hyperparameters.warmup = self.warmup.unwrap_or(Warmup(warmup));
        hyperparameters.adamw =
            self.adamw.unwrap_or(if official { AdamWForm::HfLegacy } else { AdamWForm::Torch });
        hyperparameters.micro_batch = self.micro_batch.unwrap_or(hyperparameters.batch_size);
        if hyperparameters.micro_batch > hyperparameters.batch_size {
            return Err(Error::configuration(format!(
                "train.micro_batch {} is larger than train.batch_size {}",
                hyperparameters.micro_batch, hyperparameters.batch_size
            )));
        }
        Ok(Run {
            id: String::new(),
            model: model.clone(),
            task: task.clone(),
            method: method.clone(),
            hyperparameters,
            examples: self.examples,
            seed,
        })
    }
}

impl TrainSpec {
    /// Multiplies the lists out, the last key varying fastest.
    fn grid(&self) -> Vec<GridPoint> {
        let mut points = vec![GridPoint {
            hyperparameters: Hyperparameters {
                epochs: 3.0,
                batch_size: 16,
                micro_batch: 16,
                max_length: 128,
                learning_rate: 4e-5,
                warmup: Warmup(0.1),
                weight_decay: 0.01,
                max_gradient_norm: Some(1.0),
                optimizer: OptimizerRule::Adamw,
                betas: self.betas.map_or((0.9, 0.999), |[first, second]| (first.0, second.0)),
                epsilon: 1e-8,
                adamw: AdamWForm::Torch,
                precision: Precision::Float32,
                order: Order::Shuffled,
                checkpoint: Checkpoint::Last,
                early_stopping: self.early_stopping.map(|stopping| stopping.patience.0),
            },
            micro_batch: None,
            warmup: None,
            adamw: None,
            examples: None,
        }];
        axis(&mut points, &self.epochs, |point, value| point.hyperparameters.epochs = value.0);
        axis(&mut points, &self.batch_size, |point, value| point.hyperparameters.batch_size = value.0);
        axis(&mut points, &self.micro_batch, |point, value| point.micro_batch = Some(value.0));
        axis(&mut points, &self.max_length, |point, value| point.hyperparameters.max_length = value.0);
        axis(&mut points, &self.learning_rate, |point, value| point.hyperparameters.learning_rate = value.0);
        axis(&mut points, &self.warmup, |point, value| point.warmup = Some(*value));
        axis(&mut points, &self.weight_decay, |point, value| point.hyperparameters.weight_decay = value.0);
        axis(&mut points, &self.max_gradient_norm, |point, value| {
            point.hyperparameters.max_gradient_norm = Some(value.0).filter(|limit| *limit > 0.0);
        });
        axis(&mut points, &self.optimizer, |point, value| point.hyperparameters.optimizer = *value);
        axis(&mut points, &self.epsilon, |point, value| point.hyperparameters.epsilon = value.0);
        axis(&mut points, &self.adamw, |point, value| point.adamw = Some(*value));
        axis(&mut points, &self.precision, |point, value| point.hyperparameters.precision = *value);
        axis(&mut points, &self.order, |point, value| point.hyperparameters.order = *value);
        axis(&mut points, &self.examples, |point, value| point.examples = Some(value.0));
        axis(&mut points, &self.checkpoint, |point, value| point.hyperparameters.checkpoint = *value);
        points
    }
}

/// Replaces each point by one for each value of an axis, if the axis was typed.
fn axis<T>(points: &mut Vec<GridPoint>, values: &Option<OneOrMany<T>>, set: impl Fn(&mut GridPoint, &T)) {
    let Some(OneOrMany(values)) = values else { return };
    *points = points
        .iter()
        .flat_map(|point| {
            values.iter().map(|value| {
                let mut point = point.clone();
                set(&mut point, value);
                point
            })
        })
        .collect();
}

/// Hashes everything that decides a run's outcome; names and places of files are not part of it, their contents are.
fn identity(run: &Run, head: HeadStart) -> String {
    let card = &run.task.card;
    let content = json!({
        "model": run.model.sha256,
        "config": run.model.folder.config.values(),
        "tokenizer": run.model.tokenizer_sha256,
        "head": head,
        "task": card.name,
        "labels": card.labels(),
        "headline": card.headline,
        "train": run.task.train.sha256,
        "dev": run.task.dev.sha256,
        "examples": run.examples,
        "method": run.method.name(),
        "options": run.method.options(),
        "hyperparameters": run.hyperparameters,
        "seed": run.seed,
    });
    let digest = Sha256::digest(content.to_string());
    hexadecimal(&digest[..8])
}
