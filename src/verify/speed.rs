//! Speed: sequences and tokens a second, kernels a step, memory; the Fisher pass against an epoch.

use std::iter::Cycle;
use std::slice::ChunksExact;
use std::time::Instant;

use serde::Serialize;
use tch::{Device, Tensor};

use super::floor::{matrix_rate, operations};
use super::report::measured;
use super::{Account, EXAMPLES_OF_RTE, Options, Shape, WORDS_OF_RTE, attempt, measured_method, random_data};
use crate::child::{Estimator, FisherBatch, FisherOptions, MaskScope, fisher_information};
use crate::data::{EncodedDataset, Order};
use crate::error::Result;
use crate::experiment::{peak_memory, reset_peak_memory};
use crate::libtorch::{Profile, ProfileRow, profile, release_cached_memory};
use crate::method::Prepared;
use crate::model::{Classifier, Labels, Precision};
use crate::statistics::median;
use crate::train::{Hyperparameters, MemoryUse, MicroBatch, Trainer};
use crate::values::yaml_name;

const SEED: u64 = 42;
const DROPOUT: f64 = 0.1;
/// Token counts of real RTE pairs.
pub(super) const RTE_LENGTHS: &str = include_str!("../../benches/rte_lengths.txt");
/// Kernels and operators of each row that are written down.
const SHOWN: usize = 20;
/// Methods, and whether their passes are recorded and replayed.
type Methods = &'static [(&'static str, bool)];
const METHODS: Methods = &[("vanilla", false), ("child_tuning_f", false), ("child_tuning_d", false)];
const VANILLA: Methods = &[("vanilla", false)];
const REPLAYED: Methods = &[("vanilla", true), ("child_tuning_f", true), ("child_tuning_d", true)];

/// Training of one shape with one method and precision.
#[derive(Clone, Debug, Serialize)]
pub struct SpeedRow {
    /// Shape and lengths.
    pub workload: String,
    /// Examples of a step.
    pub batch_size: usize,
    /// `vanilla`, `child_tuning_f` or `child_tuning_d`.
    pub method: &'static str,
    /// Whether its passes were recorded and replayed.
    pub replayed: bool,
    /// Spelling of the precision in YAML.
    pub precision: String,
    /// What was measured, or why not.
    #[serde(serialize_with = "measured")]
    pub outcome: std::result::Result<Speed, String>,
    /// What a step consists of, or why that is not known.
    #[serde(serialize_with = "measured")]
    pub profile: std::result::Result<StepProfile, String>,
}

/// What was measured of a training.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// Examples a second, the median of the rounds.
    pub sequences_per_second: f64,
    /// Real tokens a second.
    pub tokens_per_second: f64,
    /// Operations a second of the encoder's matrix products.
    pub operations_per_second: f64,
    /// Most memory in use, in bytes: of the device on CUDA, of the process on the CPU.
    pub peak_memory: Option<u64>,
    /// What `plan` forecasts of it.
    pub forecast_memory: f64,
}

/// One step under libtorch's profiler.
#[derive(Clone, Debug, Serialize)]
pub struct StepProfile {
    /// Kernels, copies and fills on the GPU in a step; 0 on the CPU.
    pub kernels_per_step: u64,
    /// Time that they took together, in milliseconds.
    pub kernel_milliseconds: f64,
    /// Operator calls on the host in a step.
    pub operators_per_step: u64,
    /// The kernels with the longest time in a step; on the CPU the operators with the longest own time.
    pub longest: Vec<Longest>,
}

/// A kernel or an operator in one step.
#[derive(Clone, Debug, Serialize)]
pub struct Longest {
    /// Its name.
    pub name: String,
    /// How often it ran.
    pub calls: u64,
    /// Its own time in milliseconds.
    pub milliseconds: f64,
}

/// Seconds that the Fisher information of examples takes, against other passes over the same examples.
#[derive(Clone, Debug, Serialize)]
pub struct FisherTimes {
    /// Shape and lengths.
    pub workload: String,
    /// Spelling of the precision in YAML.
    pub precision: String,
    /// Number of examples.
    pub examples: usize,
    /// Every example's squared gradient, in one pass a batch.
    pub exact: f64,
    /// A plain epoch of training, as passes come.
    pub epoch: f64,
    /// One pass for each example; measured on a part of them and multiplied.
    pub one_by_one: f64,
}

/// Numbers of tokens of the examples.
#[derive(Clone, Copy)]
pub(super) enum Lengths {
    /// As many as the pairs of RTE's training set have.
    OfRte,
    /// One number for all examples.
    Equal(usize),
}

/// A model and data that trainings are measured on.
pub(super) struct Workload {
    pub name: String,
    pub shape: Shape,
    pub lengths: Lengths,
    pub batch_size: usize,
    data: EncodedDataset,
    /// Whether the Fisher pass is measured on it.
    has_fisher: bool,
    /// What is measured: in which precision, by which method, and whether passes are replayed.
    trainings: Vec<(Precision, Methods)>,
}

impl Workload {
    /// Describes trainings of a shape on so many examples.
    fn new(
        shape: Shape,
        (lengths, examples): (Lengths, usize),
        batch_size: usize,
        has_fisher: bool,
        trainings: &[(Precision, Methods)],
    ) -> Self {
        let (of, counts) = match lengths {
            Lengths::OfRte => {
                let counts = RTE_LENGTHS.split_whitespace().filter_map(|length| length.parse().ok());
                ("lengths of RTE".to_owned(), counts.cycle().take(examples).collect())
            }
            Lengths::Equal(tokens) => (format!("{tokens} tokens"), vec![tokens; examples]),
        };
        let data = random_data(&counts, shape.vocabulary, WORDS_OF_RTE.min(shape.vocabulary), &labels());
        let (name, trainings) = (format!("{}, {of}", shape.name), trainings.to_vec());
        Self { name, shape, lengths, batch_size, data, has_fisher, trainings }
    }

    /// Returns each training: the settings, and the method.
    fn trainings(&self) -> impl Iterator<Item = (Hyperparameters, &'static str)> {
        self.trainings.iter().flat_map(move |&(precision, methods)| {
            methods.iter().map(move |&(method, replayed)| {
                (Hyperparameters { cuda_graphs: replayed, ..settings(self, precision) }, method)
            })
        })
    }
}

/// A model, made when it is first asked for, since drawing its weights takes the CPU longer than a GPU takes to train it.
struct Models<'w> {
    workload: &'w Workload,
    device: Device,
    /// The model, and the weights that trainings start from, on the CPU.
    made: Option<(Classifier, Tensor)>,
}

impl<'w> Models<'w> {
    fn new(workload: &'w Workload, device: Device) -> Self {
        Self { workload, device, made: None }
    }

    /// Hands out the model with the weights of the start. Where `work` fails or panics, the next training gets another.
    fn with<T>(&mut self, work: impl FnOnce(&mut Classifier) -> Result<T>) -> Result<T> {
        release_cached_memory(self.device)?;
        let (mut model, start) = match self.made.take() {
            Some((mut model, start)) => {
                model.parameters.restore(&start)?;
                (model, start)
            }
            None => {
                let model = model(self.workload, self.device)?;
                let start = model.parameters.values_copy()?.f_to_device(Device::Cpu)?;
                (model, start)
            }
        };
        let outcome = work(&mut model)?;
        self.made = Some((model, start));
        Ok(outcome)
    }
}

fn labels() -> Labels {
    Labels::Classes(vec!["0".into(), "1".into()])
}

/// Returns what is measured.
pub(super) fn workloads(options: Options) -> Vec<Workload> {
    use Precision::{Bf16, Float32, Tf32};
    if options.quick {
        let trainings = [(Float32, METHODS)];
        return vec![Workload::new(Shape::TINY, (Lengths::OfRte, 64), 16, true, &trainings)];
    }
    let trainings = [(Bf16, REPLAYED), (Bf16, VANILLA), (Tf32, VANILLA), (Float32, VANILLA)];
    vec![
        Workload::new(Shape::BERT_LARGE, (Lengths::Equal(128), EXAMPLES_OF_RTE), 32, false, &trainings),
        Workload::new(Shape::BERT_BASE, (Lengths::OfRte, EXAMPLES_OF_RTE), 16, true, &trainings),
    ]
}

/// Measures the matrix rates, trainings and the Fisher pass.
pub(super) fn measure(workloads: &[Workload], options: Options, account: &mut Account) -> Result<()> {
    for precision in [Precision::Bf16, Precision::Tf32, Precision::Float32] {
        let size = if options.quick { 512 } else { 8192 };
        match attempt(|| matrix_rate(precision, size, options.device)) {
            Ok(rate) => account.report.matrix_rates.push(rate),
            Err(reason) => account.note(&format!("matrix rate not measured: {reason}")),
        }
    }
    for workload in workloads {
        let mut models = Models::new(workload, options.device);
        for (settings, method) in workload.trainings() {
            let (precision, replayed) = (yaml_name(&settings.precision), settings.cuda_graphs);
            let how = if replayed { ", replayed" } else { "" };
            account.note(&format!("{}: {method} in {precision}{how} …", workload.name));
            let outcome =
                attempt(|| models.with(|model| training(workload, method, &settings, options, model)));
            account.note(&match &outcome {
                Ok(speed) => format!(
                    "{:.0} sequences/s, {:.0} tokens/s",
                    speed.sequences_per_second, speed.tokens_per_second
                ),
                Err(reason) => format!("not measured: {reason}"),
            });
            account.report.speeds.push(SpeedRow {
                workload: workload.name.clone(),
                batch_size: workload.batch_size,
                method,
                replayed,
                precision,
                outcome,
                profile: Err("not profiled yet".into()),
            });
            account.keep()?;
        }
        if workload.has_fisher {
            account.note(&format!("{}: Fisher information …", workload.name));
            for precision in [Precision::Float32, Precision::Bf16] {
                let times =
                    attempt(|| models.with(|model| fisher_times(workload, precision, options, model)));
                account.report.fisher.push(times);
                account.keep()?;
            }
        }
    }
    Ok(())
}

/// Profiles a step of each training that was measured.
pub(super) fn profile_steps(workloads: &[Workload], options: Options, account: &mut Account) -> Result<()> {
    let mut place = 0;
    for workload in workloads {
        account.note(&format!("{}: what steps consist of …", workload.name));
        let mut models = Models::new(workload, options.device);
        for (settings, method) in workload.trainings() {
            if account.report.speeds[place].outcome.is_ok() {
                let profiled =
                    || models.with(|model| step_profile(workload, method, &settings, options, model));
                account.report.speeds[place].profile = attempt(profiled);
                account.keep()?;
            }
            place += 1;
        }
    }
    Ok(())
}

fn settings(workload: &Workload, precision: Precision) -> Hyperparameters {
    Hyperparameters {
        epochs: 1e6,
        batch_size: workload.batch_size,
        micro_batch: MicroBatch::Examples(workload.batch_size),
        learning_rate: 1e-5,
        precision,
        order: Order::Sequential,
        ..Hyperparameters::default()
    }
}

fn model(workload: &Workload, device: Device) -> Result<Classifier> {
    let mut model = Classifier::untrained(workload.shape.config(DROPOUT, 0.02), labels(), device)?;
    model.reset(SEED)?;
    Ok(model)
}

/// Waits for the device by reading a number.
fn wait(loss: &Tensor) -> Result<()> {
    f64::try_from(loss)?;
    Ok(())
}

/// What steps went through.
#[derive(Default)]
struct Done {
    tokens: usize,
    /// Those of [`operations`].
    operations: f64,
}

/// Takes steps over the next batches, waits for the last, and returns the seconds and what was done.
fn take_steps<'a>(
    trainer: &mut Trainer,
    batches: &mut impl Iterator<Item = &'a [usize]>,
    workload: &Workload,
    steps: usize,
) -> Result<(f64, Done)> {
    let started = Instant::now();
    let (mut done, mut loss) = (Done::default(), None);
    for batch in batches.take(steps) {
        for tokens in batch.iter().map(|&number| workload.data.inputs[number].ids.len()) {
            done.tokens += tokens;
            done.operations += operations(&workload.shape, tokens);
        }
        loss = Some(trainer.step(batch)?);
    }
    loss.as_ref().map_or(Ok(()), wait)?;
    Ok((started.elapsed().as_secs_f64(), done))
}

/// A training, and the batches that it takes over and over.
type Running<'a> = (Trainer<'a>, Cycle<ChunksExact<'a, usize>>);

/// Starts a training over the examples with the given numbers, and takes the steps after which it runs at its usual speed.
fn running<'a>(
    workload: &'a Workload,
    numbers: &'a [usize],
    method: &str,
    settings: &'a Hyperparameters,
    options: Options,
    model: &'a mut Classifier,
) -> Result<Running<'a>> {
    let prepared = measured_method(method, super::random_model::SHARE, model)?;
    let mut batches = numbers.chunks_exact(workload.batch_size).cycle();
    let mut trainer = Trainer::new(model, &workload.data, settings, prepared, SEED)?;
    let steps = if options.quick { 1 } else { 5 };
    // Until most shapes of the batches are recorded.
    let steps = if settings.cuda_graphs { 10 * steps } else { steps };
    take_steps(&mut trainer, &mut batches, workload, steps)?;
    Ok((trainer, batches))
}

fn training(
    workload: &Workload,
    method: &str,
    settings: &Hyperparameters,
    options: Options,
    model: &mut Classifier,
) -> Result<Speed> {
    let Workload { data, batch_size, .. } = workload;
    let (steps, rounds) = if options.quick { (2, 3) } else { (10, 5) };
    reset_peak_memory(options.device);
    let numbers: Vec<usize> = (0..data.len()).collect();
    let memory = MemoryUse::new(&model.own_shape()?, settings, 0, options.device);
    let lengths = data.lengths();
    let largest = lengths.chunks(*batch_size).map(|lengths| memory.of_pass(lengths)).fold(0.0, f64::max);
    let (mut trainer, mut batches) = running(workload, &numbers, method, settings, options, model)?;
    let mut rates = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        let (seconds, done) = take_steps(&mut trainer, &mut batches, workload, steps)?;
        let done = [(steps * batch_size) as f64, done.tokens as f64, done.operations];
        rates.iter_mut().zip(done).for_each(|(rates, done)| rates.push(done / seconds));
    }
    let [sequences, tokens, operations] = rates.map(|rates| median(&rates).unwrap_or(f64::NAN));
    Ok(Speed {
        sequences_per_second: sequences,
        tokens_per_second: tokens,
        operations_per_second: operations,
        peak_memory: peak_memory(options.device),
        forecast_memory: memory.fixed + largest + trainer.optimizer_bytes() as f64,
    })
}

fn step_profile(
    workload: &Workload,
    method: &str,
    settings: &Hyperparameters,
    options: Options,
    model: &mut Classifier,
) -> Result<StepProfile> {
    let data = &workload.data;
    let numbers: Vec<usize> = (0..data.len()).collect();
    let (mut trainer, mut batches) = running(workload, &numbers, method, settings, options, model)?;
    let (_, profile) = profile(options.device, || take_steps(&mut trainer, &mut batches, workload, 1))?;
    Ok(StepProfile {
        kernels_per_step: profile.kernel_runs(),
        kernel_milliseconds: profile.kernels.iter().fold(0.0, |sum, row| sum + row.own.as_secs_f64() * 1e3),
        operators_per_step: profile.operator_calls(),
        longest: longest(&profile),
    })
}

fn longest(profile: &Profile) -> Vec<Longest> {
    let rows = if profile.kernels.is_empty() { &profile.operators } else { &profile.kernels };
    let row = |row: &ProfileRow| Longest {
        name: row.name.clone(),
        calls: row.calls,
        milliseconds: row.own.as_secs_f64() * 1e3,
    };
    rows.iter().take(SHOWN).map(row).collect()
}

/// Times the Fisher pass, an epoch of training and a loop over single examples, each after a warm-up.
fn fisher_times(
    workload: &Workload,
    precision: Precision,
    options: Options,
    model: &mut Classifier,
) -> Result<FisherTimes> {
    let Workload { data, batch_size, .. } = workload;
    let (examples, alone) = if options.quick { (32, 8) } else { (512, 64) };
    let examples = examples.min(data.len());
    let numbers: Vec<usize> = (0..examples).collect();
    let mut exact = |numbers: &[usize], batch_size: usize, estimator: Estimator| -> Result<f64> {
        let started = Instant::now();
        let batches =
            numbers.chunks(batch_size).map(|numbers| FisherBatch::plain(data, numbers, options.device));
        let fisher = FisherOptions { precision, ..FisherOptions::of(estimator) };
        let information = fisher_information(model, batches, &fisher, MaskScope::Backbone, |_| Ok(()))?;
        wait(&information.values.f_select(0, 0)?)?;
        Ok(started.elapsed().as_secs_f64())
    };
    exact(&numbers[..*batch_size], *batch_size, Estimator::PerExample)?;
    let pass = exact(&numbers, *batch_size, Estimator::PerExample)?;
    // The batch estimate with batches of one is the loop over single examples.
    exact(&numbers[..1], 1, Estimator::Batch)?;
    let one_by_one = exact(&numbers[..alone], 1, Estimator::Batch)? * examples as f64 / alone as f64;
    let settings = Hyperparameters { cuda_graphs: false, ..settings(workload, precision) };
    let mut trainer = Trainer::new(model, data, &settings, Prepared::default(), SEED)?;
    let mut batches = numbers.chunks(*batch_size).cycle();
    take_steps(&mut trainer, &mut batches, workload, 1)?;
    let (epoch, _) = take_steps(&mut trainer, &mut batches, workload, examples.div_ceil(*batch_size))?;
    let (workload, precision) = (workload.name.clone(), yaml_name(&precision));
    Ok(FisherTimes { workload, precision, examples, exact: pass, epoch, one_by_one })
}
