//! What the methods of an experiment cost, as `plan` shows it.

use anyhow::Result;
use child_tuning::experiment::{Run, method_cost};

use super::show;
use super::table::table;

/// Shows a line for each method of some runs, of each model; of its tasks and seeds, the first run stands for all.
pub fn show_costs<'a>(runs: impl Iterator<Item = &'a Run>) -> Result<()> {
    let mut methods: Vec<&Run> = Vec::new();
    for run in runs {
        let key = |run: &Run| (run.model.name.clone(), run.method.name().to_owned(), run.method.options());
        if methods.iter().all(|other| key(other) != key(run)) {
            methods.push(run);
        }
    }
    let header = ["method", "model", "trains", "moments", "keeps", "passes", "before training"];
    let mut table = table(&header, 2..6);
    for run in &methods {
        let cost = method_cost(run)?;
        let before = match (cost.fine_tunes_first, cost.examples_prepared) {
            (true, _) => "trains once more".to_owned(),
            (false, 0) => String::new(),
            (false, examples) => format!("passes over {examples} examples"),
        };
        table.add_row([
            label(run, &methods),
            run.model.name.clone(),
            weights(cost.trainable),
            megabytes(cost.optimizer_bytes),
            megabytes(cost.method_bytes),
            cost.passes.to_string(),
            before,
        ]);
    }
    show(table.trim_fmt())
}

/// The name of a method, with those of its options in which it differs from its namesakes.
fn label(run: &Run, methods: &[&Run]) -> String {
    let own = run.method.options();
    let namesakes: Vec<String> = (methods.iter())
        .filter(|other| other.method.name() == run.method.name() && other.method.options() != own)
        .map(|other| other.method.options())
        .collect();
    let shared = |option: &&str| namesakes.iter().all(|other| other.split(' ').any(|own| own == *option));
    let different = own.split(' ').filter(|option| !shared(option));
    let words: Vec<&str> = std::iter::once(run.method.name()).chain(different).collect();
    words.join(" ")
}

fn weights(count: usize) -> String {
    match count {
        0..100_000 => count.to_string(),
        _ => format!("{:.2} M", count as f64 / 1e6),
    }
}

fn megabytes(bytes: usize) -> String {
    match bytes {
        0 => String::new(),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}
