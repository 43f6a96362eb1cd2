//! The cost of exact Fisher information: a pass over an epoch, against the plain forward and backward passes over the same
//! batches, in one process, turn by turn.
//!
//! `cargo bench --bench fisher -- --precision bf16`. Every turn measures one plain epoch (no optimizer step) and one epoch
//! of each estimator; ratios are to the plain epoch of the same turn.

mod common;

use std::path::PathBuf;
use std::time::Instant;

use child_tuning::child::{
    Estimator, FisherBatch, FisherOptions, GradientHooks, MaskScope, fisher_information,
};
use child_tuning::data::EncodedDataset;
use child_tuning::experiment::{peak_memory, reset_peak_memory};
use child_tuning::model::{Classifier, Labels, Pass, Precision, loss};
use child_tuning::statistics::{maximum, median, minimum};
use child_tuning::verify::{Shape, random_data};
use clap::Parser;
use common::{precision, set_up, token_counts};

const BATCH_SIZE: usize = 16;

/// Fisher passes over a model with random weights and tokens.
#[derive(Parser)]
struct Arguments {
    /// float32 or bf16; both without it
    #[arg(long, value_parser = precision)]
    precision: Option<Precision>,
    /// One token count a line
    #[arg(long, default_value = "benches/rte_lengths.txt")]
    lengths: PathBuf,
    /// The one estimator to measure, per_example, expected or batch; all without it
    #[arg(long)]
    only: Option<String>,
    /// The first so many of them
    #[arg(long, default_value_t = 160)]
    examples: usize,
    /// Turns, the first of which is thrown away
    #[arg(long, default_value_t = 6)]
    turns: usize,
    /// CPU threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Transformer layers
    #[arg(long, default_value_t = 12)]
    layers: i64,
    /// Hidden size; heads are 64 wide, the feed-forward layer is four times as wide
    #[arg(long, default_value_t = 768)]
    hidden: i64,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
}

/// What a turn measures besides the plain epoch.
const PASSES: [(&str, Estimator, bool); 4] = [
    ("per_example", Estimator::PerExample, false),
    ("per_example with its standard error", Estimator::PerExample, true),
    ("expected", Estimator::Expected, false),
    ("batch", Estimator::Batch, false),
];

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let device = set_up(arguments.threads, &arguments.device);
    let shape = Shape {
        name: "measured",
        layers: arguments.layers,
        hidden: arguments.hidden,
        heads: arguments.hidden / 64,
        vocabulary: 30522,
    };
    let labels = Labels::Classes(vec!["0".into(), "1".into()]);
    let mut lengths = token_counts(&arguments.lengths)?;
    lengths.truncate(arguments.examples);
    let data = random_data(&lengths, shape.vocabulary, shape.vocabulary, &labels);
    let held_before = peak_memory(device).unwrap_or(0);
    let mut classifier = Classifier::untrained(shape.config(0.1, 0.02), labels, device)?;
    classifier.reset(42)?;
    let both = vec![Precision::Float32, Precision::Bf16];
    let precisions = arguments.precision.map_or(both, |precision| vec![precision]);
    for precision in precisions {
        reset_peak_memory(device);
        let mut plain = Vec::new();
        let passes: Vec<_> = (PASSES.iter())
            .filter(|(name, ..)| arguments.only.as_ref().is_none_or(|only| only == name))
            .collect();
        let mut ratios = vec![Vec::new(); passes.len()];
        for turn in 0..arguments.turns {
            let seconds = plain_epoch(&mut classifier, &data, precision)?;
            for (ratios, &&(_, estimator, spread)) in ratios.iter_mut().zip(&passes) {
                let options = FisherOptions { precision, spread, ..FisherOptions::of(estimator) };
                let pass = fisher_epoch(&mut classifier, &data, &options)?;
                if turn > 0 {
                    ratios.push(pass / seconds);
                }
            }
            if turn > 0 {
                plain.push(seconds);
            }
        }
        println!("{precision:?}: plain epoch of {} examples, s: {}", data.len(), spread(&plain));
        for (ratios, (name, ..)) in ratios.iter().zip(&passes) {
            println!("{precision:?}: {name}, plain epochs: {}", spread(ratios));
        }
        let peak = peak_memory(device).unwrap_or(0).saturating_sub(held_before);
        println!("{precision:?}: {:.0} MB at most, model included", peak as f64 / 1e6);
    }
    Ok(())
}

/// Shows the median of values, the lowest and the highest.
fn spread(values: &[f64]) -> String {
    match [median, minimum, maximum].map(|of| of(values)) {
        [Some(middle), Some(least), Some(most)] => format!("{middle:.3} ({least:.3} to {most:.3})"),
        _ => "-".into(),
    }
}

/// Returns the seconds of forward and backward passes over the data, the gradients of each batch collected as in training.
fn plain_epoch(
    classifier: &mut Classifier,
    data: &EncodedDataset,
    precision: Precision,
) -> anyhow::Result<f64> {
    let started = Instant::now();
    let device = classifier.parameters.device();
    let weights = classifier.parameters.compute_weights(precision.kind())?;
    let hooks = GradientHooks::collect(&classifier.parameters, &weights, |_| true, None)?;
    for numbers in in_order(data).chunks(BATCH_SIZE) {
        hooks.begin_step();
        let (batch, targets) = data.batch(numbers, 0, device)?;
        let loss = loss(&classifier.logits(&Pass::new(&weights, &batch, None))?, &targets, numbers.len())?;
        loss.f_backward()?;
        hooks.end_step()?;
    }
    // Reading a number waits for the device.
    let _ = classifier.parameters.gradients()?.f_double_value(&[0])?;
    Ok(started.elapsed().as_secs_f64())
}

fn fisher_epoch(
    classifier: &mut Classifier,
    data: &EncodedDataset,
    options: &FisherOptions,
) -> anyhow::Result<f64> {
    let started = Instant::now();
    let device = classifier.parameters.device();
    let order = in_order(data);
    let batches = order.chunks(BATCH_SIZE).map(|numbers| FisherBatch::plain(data, numbers, device));
    let information = fisher_information(classifier, batches, options, MaskScope::Backbone, |_| Ok(()))?;
    let _ = information.values.f_double_value(&[0])?;
    Ok(started.elapsed().as_secs_f64())
}

/// The order of the program's own pass: by length.
fn in_order(data: &EncodedDataset) -> Vec<usize> {
    let mut order: Vec<usize> = (0..data.len()).collect();
    order.sort_by_key(|&number| data.inputs[number].ids.len());
    order
}
