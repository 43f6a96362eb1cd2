//! How long it takes to cut a child network out of hundreds of millions of scores, and the memory that it needs besides
//! them: `cargo bench --bench threshold`.

use std::time::Instant;

use child_tuning::child::{ChildNetwork, Cut, MaskScope, Threshold};
use child_tuning::experiment::{peak_memory, reset_peak_memory};
use child_tuning::model::{ParameterKind, ParameterPlace, ParameterTable, Parameters};
use child_tuning::statistics::{maximum, median, minimum};
use clap::Parser;
use tch::{Device, Kind, Tensor};

/// Cuts with each of the thresholds.
#[derive(Parser)]
struct Arguments {
    /// Millions of scores
    #[arg(long, default_value_t = 300)]
    millions: i64,
    /// Times that each threshold is cut at
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// CPU threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    child_tuning::libtorch::use_threads(Some(arguments.threads), Device::Cpu);
    // Matrices of the size of a large encoder's, and a tenth of the scores equal.
    let mut table = ParameterTable::default();
    for number in 0..arguments.millions / 4 {
        let name = format!("{number}");
        table.declare(name, &[2000, 2000], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
    }
    let parameters = Parameters::allocate(table, Device::Cpu)?;
    let mut scores = Tensor::f_empty([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu))?;
    scores = scores.f_uniform_(-0.1, 0.9)?.f_relu_()?;
    scores = scores.f_pow_(4.0)?;
    for threshold in [Threshold::Global, Threshold::PerTensor, Threshold::Percentile] {
        reset_peak_memory(Device::Cpu);
        let before = peak_memory(Device::Cpu).unwrap_or(0);
        let mut seconds: Vec<f64> = Vec::new();
        let mut kept = 0;
        for _ in 0..arguments.turns {
            let started = Instant::now();
            let cut = Cut::highest(0.3, MaskScope::All, threshold);
            let child = ChildNetwork::from_scores(&parameters, &scores, &cut)?;
            seconds.push(started.elapsed().as_secs_f64());
            kept = child.kept();
        }
        println!(
            "{threshold:?}: {kept} of {} kept, {:.2} s ({:.2} to {:.2}), {:.0} MB at most besides the scores, bits included",
            parameters.count(),
            median(&seconds).unwrap_or(f64::NAN),
            minimum(&seconds).unwrap_or(f64::NAN),
            maximum(&seconds).unwrap_or(f64::NAN),
            (peak_memory(Device::Cpu).unwrap_or(0) - before) as f64 / 1e6,
        );
    }
    Ok(())
}
