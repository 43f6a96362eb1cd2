//! What the methods of an experiment cost, as `plan` shows it.

use std::collections::{HashMap, HashSet};

use anyhow::Result;
use child_tuning::experiment::{Run, method_cost};
use child_tuning::method::option_list;

use super::show;
use super::table::table;

/// Shows a line for each method of some runs, of each model; of its tasks and seeds, the first run stands for all.
pub fn show_costs<'a>(runs: impl Iterator<Item = &'a Run>) -> Result<()> {
    let mut seen = HashSet::new();
    let methods: Vec<&Run> = runs
        .filter(|run| {
            seen.insert((run.model.name.clone(), run.method.name().to_owned(), run.method.options()))
        })
        .collect();
    // How many methods of a name there are, and how many of them have an option.
    let (mut namesakes, mut having) = (HashMap::new(), HashMap::new());
    for run in &methods {
        let name = run.method.name();
        *namesakes.entry(name).or_insert(0) += 1;
        for option in option_list(&run.method.options()) {
            *having.entry((name, option)).or_insert(0) += 1;
        }
    }
    let label = |run: &Run| {
        let name = run.method.name();
        let options = option_list(&run.method.options()).into_iter();
        let telling = options.filter(|option| having.get(&(name, option.clone())) != namesakes.get(name));
        let telling = telling.map(|(option, value)| format!(" {option}={value}"));
        std::iter::once(name.to_owned()).chain(telling).collect::<String>()
    };
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
            label(run),
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
