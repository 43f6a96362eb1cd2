//! What the steps of each method cost beside those of plain fine-tuning: one Markdown table.
//!
//! Each method is timed against vanilla with the same model, the same random tokens of real lengths and the same batches, the
//! two taking turns of one step, and the ratio is the median over the turns. `passes` is what the method's definition needs, in
//! forward and backward passes over all weights: a pass whose weights are constants counts as two thirds, since a third of the
//! products are those of weight gradients.

mod common;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use child_tuning::data::{EncodedDataset, Order};
use child_tuning::method::{MethodSpec, Preset};
use child_tuning::model::{Classifier, Labels, Precision};
use child_tuning::statistics::{maximum, median, minimum};
use child_tuning::train::{Control, Hyperparameters, MicroBatch, Trainer, prepare};
use child_tuning::verify::{EXAMPLES_OF_RTE, Shape, WORDS_OF_RTE, random_data};
use clap::Parser;
use common::{precision, set_up, token_counts};

const SEED: u64 = 42;
const VOCABULARY: u32 = 30522;

/// The methods, and the passes that they need.
const METHODS: &[(&str, f64)] = &[
    ("vanilla", 1.0),
    ("child_tuning_f: {p: 0.3}", 1.0),
    ("child_tuning_d: {p: 0.3, fisher: {examples: 32}}", 1.0),
    ("fish_mask: {examples: 32}", 1.0),
    ("sift: {examples: 32}", 1.0),
    ("magnitude_mask", 1.0),
    ("lt_sft", 1.0),
    ("dps", 1.0),
    ("l2_sp", 1.0),
    ("prior_weight_decay", 1.0),
    ("recadam", 1.0),
    ("layer_wise_rates", 1.0),
    ("reinitialised_layers", 1.0),
    ("hype", 1.0),
    ("mixout", 1.0),
    ("mixout: {mask: weight}", 1.0),
    ("lora", 1.0),
    ("bitfit", 1.0),
    ("top_layers: {k: 3}", 1.0),
    ("r_drop", 2.0),
    ("r3f", 2.0),
    ("r4f", 2.0),
    ("smart", 2.0 + 2.0 / 3.0),
    ("[child_tuning_f: {p: 0.3}, r_drop]", 2.0),
    ("[child_tuning_d: {p: 0.3, fisher: {examples: 32}}, mixout]", 1.0),
];

/// Steps of methods against those of vanilla.
#[derive(Parser)]
struct Arguments {
    /// Only the methods whose text has this in it
    #[arg(long, default_value = "")]
    only: String,
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
    #[arg(long, default_value_t = 6)]
    layers: i64,
    /// Hidden size; heads are 32 wide, the feed-forward layer is four times as wide
    #[arg(long, default_value_t = 384)]
    hidden: i64,
    /// Examples of a step
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Steps of each side
    #[arg(long, default_value_t = 11)]
    steps: usize,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let device = set_up(arguments.threads, &arguments.device);
    let lengths = token_counts(&arguments.lengths)?;
    let labels = Labels::Classes(vec!["0".into(), "1".into()]);
    let lengths: Vec<usize> = lengths.into_iter().cycle().take(EXAMPLES_OF_RTE).collect();
    let data = random_data(&lengths, VOCABULARY, WORDS_OF_RTE, &labels);
    let model = || -> anyhow::Result<Classifier> {
        let (layers, hidden) = (arguments.layers, arguments.hidden);
        let shape = Shape { name: "bert", layers, hidden, heads: hidden / 32, vocabulary: VOCABULARY };
        let mut classifier = Classifier::untrained(shape.config(0.1, 0.02), labels.clone(), device)?;
        classifier.reset(SEED)?;
        Ok(classifier)
    };
    let settings = Hyperparameters {
        epochs: 1.0,
        batch_size: arguments.batch_size,
        micro_batch: MicroBatch::Examples(arguments.batch_size),
        order: Order::Sequential,
        precision: arguments.precision,
        ..Hyperparameters::default()
    };
    println!(
        "| method | passes | step / vanilla's | lowest | highest | per pass |\n|---|---|---|---|---|---|"
    );
    for (text, passes) in METHODS.iter().filter(|(text, _)| text.contains(&arguments.only)) {
        let (mut own, mut plain) = (model()?, model()?);
        let mut own = trainer(text, &mut own, &data, &settings)?;
        let mut plain = trainer("vanilla", &mut plain, &data, &settings)?;
        let mut ratios = Vec::new();
        let order: Vec<usize> = (0..data.len()).collect();
        let batches = order.chunks_exact(arguments.batch_size).cycle();
        for (turn, batch) in batches.take(arguments.steps + 1).enumerate() {
            let ratio = match turn % 2 {
                0 => {
                    let own = seconds(&mut own, batch)?;
                    own / seconds(&mut plain, batch)?
                }
                _ => {
                    let plain = seconds(&mut plain, batch)?;
                    seconds(&mut own, batch)? / plain
                }
            };
            // The first one warms up.
            ratios.extend((turn > 0).then_some(ratio));
        }
        let [middle, least, most] = [median, minimum, maximum].map(|of| of(&ratios).unwrap_or(f64::NAN));
        println!(
            "| `{text}` | {passes:.2} | {middle:.2} | {least:.2} | {most:.2} | {:.2} |",
            middle / passes
        );
    }
    Ok(())
}

fn trainer<'a>(
    text: &str,
    classifier: &'a mut Classifier,
    data: &'a EncodedDataset,
    settings: &'a Hyperparameters,
) -> anyhow::Result<Trainer<'a>> {
    let spec: MethodSpec = serde_yaml::from_str(text)?;
    let method = spec.resolve(Preset::Paper)?.remove(0);
    let interrupted = AtomicBool::new(false);
    let mut control = Control { interrupted: &interrupted, report: &mut |_| {} };
    let prepared = prepare(classifier, data, method.as_ref(), settings, SEED, &mut control)?;
    Ok(Trainer::new(classifier, data, settings, prepared, SEED)?)
}

/// Takes a step; reading the loss waits for the device.
fn seconds(trainer: &mut Trainer, batch: &[usize]) -> anyhow::Result<f64> {
    let started = Instant::now();
    let loss = trainer.step(batch)?;
    f64::try_from(loss)?;
    Ok(started.elapsed().as_secs_f64())
}
