//! What the methods of an experiment cost, as `plan` shows it.

use anyhow::Result;
use child_tuning::experiment::{Run, method_cost};
use child_tuning::method::option_list;

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
    let own = option_list(&run.method.options());
    let namesakes: Vec<_> = (methods.iter())
        .filter(|other| other.method.name() == run.method.name())
        .map(|other| option_list(&other.method.options()))
        .collect();
    let tells = |option: &&(String, String)| namesakes.iter().any(|other| !other.contains(option));
    let different = own.iter().filter(tells).map(|(name, value)| format!(" {name}={value}"));
    std::iter::once(run.method.name().to_owned()).chain(different).collect()
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
