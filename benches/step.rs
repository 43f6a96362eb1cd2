//! One side of the speed benchmark: training steps of this program, on request.
//!
//! Speaks the protocol of `benches/compare.py`: builds a model, takes one warm-up step, prints `{"ready": true}` with the
//! bytes of the optimizer's state and of the process before the model was built, and then
//! for every line `go N` takes N steps and prints a line with their time and tokens. For a line `limit` it prints what to
//! hold the next steps against: the time that the products of the linear layers take by themselves for all tokens in all
//! layers, and the least that the steps can take: without the products of the last layer that no head reads, but with
//! attention's, without padding, and with reading and writing what AdamW has to.

mod common;

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use child_tuning::data::Order;
use child_tuning::experiment::peak_memory;
use child_tuning::libtorch::{Operand, Profile, linear};
use child_tuning::model::{Classifier, Labels, Precision};
use child_tuning::train::{Hyperparameters, MicroBatch, Trainer};
use child_tuning::verify::{EXAMPLES_OF_RTE, Shape, WORDS_OF_RTE, measured_method, random_data};
use clap::Parser;
use common::{precision, set_up, token_counts};
use serde_json::json;
use tch::{Device, Tensor};

const SEED: u64 = 42;

/// Training steps of a model with random weights and tokens.
#[derive(Parser)]
struct Arguments {
    /// vanilla, child_tuning_f or child_tuning_d
    #[arg(long, default_value = "vanilla")]
    method: String,
    /// Share of the child network
    #[arg(long, default_value_t = 0.3)]
    share: f64,
    /// float32, tf32 or bf16
    #[arg(long, default_value = "float32", value_parser = precision)]
    precision: Precision,
    /// One token count a line
    #[arg(long, default_value = "benches/rte_lengths.txt")]
    lengths: PathBuf,
    /// CPU threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Transformer layers
    #[arg(long, default_value_t = 12)]
    layers: i64,
    /// Examples of a step
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Hidden size; heads are 64 wide, the feed-forward layer is four times as wide
    #[arg(long, default_value_t = 768)]
    hidden: i64,
    /// Entries of the table of words
    #[arg(long, default_value_t = 30522)]
    vocabulary: u32,
    /// How many of them the data has: as many as RTE with BERT's vocabulary
    #[arg(long, default_value_t = WORDS_OF_RTE)]
    words: u32,
    /// Take one step under libtorch's profiler, print the operators with the longest own time, and end
    #[arg(long)]
    profile: bool,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let device = set_up(arguments.threads, &arguments.device);
    let lengths = token_counts(&arguments.lengths)?;
    let lengths: Vec<usize> = lengths.into_iter().cycle().take(EXAMPLES_OF_RTE).collect();
    let (layers, hidden) = (arguments.layers, arguments.hidden);
    let shape = Shape { name: "bert", layers, hidden, heads: hidden / 64, vocabulary: arguments.vocabulary };
    let labels = Labels::Classes(vec!["0".into(), "1".into()]);
    let (vocabulary, words) = (arguments.vocabulary, arguments.words.min(arguments.vocabulary));
    let data = random_data(&lengths, vocabulary, words, &labels);
    let resident_before = peak_memory(Device::Cpu);
    let mut classifier = Classifier::untrained(shape.config(0.1, 0.02), labels, device)?;
    classifier.reset(SEED)?;
    let prepared = measured_method(&arguments.method, arguments.share, &classifier)?;
    let settings = settings(arguments.precision, arguments.batch_size);
    let order: Vec<usize> = (0..data.len()).collect();
    let batches: Vec<&[usize]> = order.chunks_exact(arguments.batch_size).collect();
    let mut trainer = Trainer::new(&mut classifier, &data, &settings, prepared, SEED)?;
    finished(trainer.step(batches[0])?)?;
    if arguments.profile {
        let (_, profile) = child_tuning::libtorch::profile(device, || trainer.step(batches[1]))?;
        print_profile(&profile);
        return Ok(());
    }
    println!(
        "{}",
        json!({
            "ready": true,
            "torch": child_tuning::libtorch::version(),
            "resident_before": resident_before,
            "state": trainer.optimizer_bytes(),
        })
    );

    let mut next = batches.iter().cycle();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if let Some(steps) = line.trim().strip_prefix("limit ") {
            let mut limit = Limit {
                layers,
                hidden,
                precision: arguments.precision,
                device,
                tokens: 0,
                seconds: [0.0; 2],
            };
            for batch in next.clone().take(steps.parse()?) {
                limit.add(
                    &batch.iter().map(|&number| data.inputs[number].ids.len() as i64).collect::<Vec<_>>(),
                )?;
            }
            // Two moments a weight; on a GPU with D, where members have places, that is too much by half.
            let moved = trainer.optimizer_bytes() / 8;
            limit.seconds[1] += steps.parse::<f64>()? * optimizer_traffic(moved, device)?;
            let [products, floor] = limit.seconds;
            println!("{}", json!({"seconds": products, "floor_seconds": floor, "tokens": limit.tokens}));
            continue;
        }
        let steps: usize = line.trim().trim_start_matches("go ").parse()?;
        let (mut tokens, mut loss) = (0, None);
        let started = Instant::now();
        for batch in next.by_ref().take(steps) {
            tokens += batch.iter().map(|&number| data.inputs[number].ids.len()).sum::<usize>();
            loss = Some(trainer.step(batch)?);
        }
        loss.map(finished).transpose()?;
        println!("{}", json!({"seconds": started.elapsed().as_secs_f64(), "tokens": tokens, "steps": steps}));
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// What steps are held against.
struct Limit {
    layers: i64,
    hidden: i64,
    precision: Precision,
    device: Device,
    tokens: i64,
    /// Of the products of linear layers for all tokens, and of all that a step needs.
    seconds: [f64; 2],
}

impl Limit {
    /// Adds a step over examples of the given lengths. The products of the head and of the pooler are left out.
    fn add(&mut self, lengths: &[i64]) -> anyhow::Result<()> {
        let (hidden, layers) = (self.hidden, self.layers as f64);
        let tokens = lengths.iter().sum();
        let square = self.product([tokens, hidden, hidden])?;
        let expand = self.product([tokens, hidden, 4 * hidden])?;
        let reduce = self.product([tokens, 4 * hidden, hidden])?;
        let layer = 4.0 * square + expand + reduce;
        // A layer multiplies 12 · hidden² times a token; attention 2 · length · hidden times.
        let squares: i64 = lengths.iter().map(|length| length * length).sum();
        let attention = layer * squares as f64 / (6 * hidden * tokens) as f64;
        self.tokens += tokens;
        self.seconds[0] += layers * layer;
        // Of the last layer keys and values.
        self.seconds[1] += (layers - 1.0) * (layer + attention) + 2.0 * square;
        Ok(())
    }

    /// Returns the seconds of the product of `[rows, inner]` and `[inner, columns]`, forward and backward.
    fn product(&self, [rows, inner, columns]: [i64; 3]) -> anyhow::Result<f64> {
        let ones = |shape: [i64; 2]| Tensor::f_ones(shape, (self.precision.kind(), self.device));
        let (input, weight, gradient) =
            (ones([rows, inner])?, ones([columns, inner])?, ones([rows, columns])?);
        let transposed = weight.f_transpose(0, 1)?;
        let multiply = || -> anyhow::Result<f64> {
            let started = Instant::now();
            let _forward = linear(&input, Operand::plain(&weight), None)?;
            let _to_input = linear(&gradient, Operand::plain(&transposed), None)?;
            let to_weight = gradient.f_transpose(0, 1)?.f_mm(&input)?;
            finished(to_weight.f_flatten(0, -1)?.f_narrow(0, 0, 1)?.f_sum(tch::Kind::Float)?)?;
            Ok(started.elapsed().as_secs_f64())
        };
        // oneDNN compiles kernels for a number of rows when it first comes.
        multiply()?;
        multiply()
    }
}

/// Returns the seconds that it takes to read and write what AdamW has to: weights, moments and gradients are read, all but
/// the gradients written, in float32.
fn optimizer_traffic(weights: usize, device: Device) -> anyhow::Result<f64> {
    const MEGABYTES: i64 = 256;
    let source = Tensor::f_ones([MEGABYTES << 18], (tch::Kind::Float, device))?;
    let mut copy = source.f_ones_like()?;
    let mut fastest = f64::INFINITY;
    for _ in 0..3 {
        let started = Instant::now();
        copy.f_copy_(&source)?;
        finished(copy.f_narrow(0, 0, 1)?.f_sum(tch::Kind::Float)?)?;
        fastest = fastest.min(started.elapsed().as_secs_f64());
    }
    let bytes_per_second = 2.0 * source.numel() as f64 * 4.0 / fastest;
    Ok(7.0 * 4.0 * weights as f64 / bytes_per_second)
}

/// How many operators and how many kernels are shown.
const SHOWN: usize = 30;

fn print_profile(profile: &Profile) {
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    for (what, calls, rows) in [
        ("operator calls", profile.operator_calls(), &profile.operators),
        ("kernels", profile.kernel_runs(), &profile.kernels),
    ] {
        let all: Duration = rows.iter().map(|row| row.own).sum();
        println!("{calls} {what}, {:.1} ms", milliseconds(all));
        for row in rows.iter().take(SHOWN) {
            let share = 100.0 * row.own.as_secs_f64() / all.as_secs_f64();
            let (own, total) = (milliseconds(row.own), milliseconds(row.total));
            println!(
                "{own:10.3} ms {share:5.1} % {total:10.3} ms with calls {:6} ×  {}",
                row.calls, row.name
            );
        }
    }
}

/// Waits for the device by reading the loss.
fn finished(loss: Tensor) -> anyhow::Result<f64> {
    Ok(f64::try_from(&loss)?)
}

fn settings(precision: Precision, batch_size: usize) -> Hyperparameters {
    Hyperparameters {
        epochs: 1e6,
        batch_size,
        micro_batch: MicroBatch::Examples(batch_size),
        learning_rate: 1e-5,
        precision,
        order: Order::Sequential,
        ..Hyperparameters::default()
    }
}
