//! A report on result files: tables and figures, costs, what failed, and where the numbers come from.

use std::collections::BTreeMap;

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};

use super::compare::{Block, compare, markdown_text, short_hash, without_repetition};
use super::figure::figure;
use crate::experiment::results::{Row, Status};
use crate::values::yaml_name;

/// What is said once of all tables of costs.
const COSTS_LEGEND: &str = "\
Costs are medians over the runs that ended ok. Passes are forward passes over each example of a step; state is that of the
optimizer and the method; times are by the clock, so that what else the machine did is in them.";

/// A Markdown text and the figures that it shows, as files of one folder.
#[derive(Clone, Debug)]
pub struct Report {
    /// The text.
    pub markdown: String,
    /// Names of files and their content, SVG.
    pub figures: Vec<(String, String)>,
}

/// Writes a report on the rows of result files.
pub fn report(rows: &[Row]) -> Report {
    let comparison = compare(rows);
    let figures: Vec<(String, String)> = comparison
        .blocks
        .iter()
        .enumerate()
        .map(|(place, block)| (file_name(place + 1, block), figure(block)))
        .collect();
    let (rows, _) = without_repetition(rows);
    let experiments = markdown_text(&listed(&rows, |row| row.experiment.clone()));
    let mut markdown = format!("# {experiments}\n\n{}\n\n", opening(&rows));
    for (block, (name, _)) in comparison.blocks.iter().zip(&figures) {
        let title = markdown_text(&block.title());
        markdown += &format!("{}\n![{title}]({name})\n\n{}\n\n", block.to_markdown(), costs(block));
    }
    markdown += &format!("{}\n\n{COSTS_LEGEND}\n\n", comparison.markdown_notes());
    if let Some(failures) = failures(&rows) {
        markdown += &format!("## Runs that did not end well\n\n{failures}\n\n");
    }
    markdown += &format!("## Where the numbers come from\n\n{}\n", origin(&rows));
    Report { markdown, figures }
}

/// Counts the runs, each once, however many data sets it was scored on.
fn opening(rows: &[&Row]) -> String {
    let count = |is_trial: bool| {
        let mut runs: BTreeMap<&str, bool> = BTreeMap::new();
        for row in rows.iter().filter(|row| row.is_trial() == is_trial) {
            *runs.entry(&row.run).or_insert(true) &= row.status == Status::Ok;
        }
        (runs.len(), runs.values().filter(|ok| **ok).count())
    };
    let ((runs, ok), (trials, _)) = (count(false), count(true));
    let before = if trials > 0 { format!("; trials that chose settings: {trials}") } else { String::new() };
    format!("Runs: {runs}, of which {ok} ended ok{before}.")
}

/// Returns a name that says what the figure shows, and by its number is the only one.
fn file_name(number: usize, block: &Block) -> String {
    let plain = |character: char| if character.is_ascii_alphanumeric() { character } else { '_' };
    let what = [&block.source_task, &block.task, &block.evaluated_on, &block.split];
    let mut words: Vec<String> = what.map(|word| word.chars().map(plain).collect()).to_vec();
    words.retain(|word| !word.is_empty());
    words.dedup();
    // File names have an end.
    let stem: String = words.join("_").chars().take(80).collect();
    format!("{number:02}_{stem}.svg")
}

fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header(header.to_vec());
    for row in rows {
        table.add_row(row.iter().map(|cell| markdown_text(cell)));
    }
    table
}

fn costs(block: &Block) -> String {
    let number =
        |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
    let rows = block.groups.iter().map(|group| {
        let cost = &group.cost;
        vec![
            block.label(group),
            number(cost.passes_per_step, 0),
            number(cost.trainable_parameters, 0),
            number(cost.child_share.map(|share| 100.0 * share), 2),
            number(cost.state_mb, 1),
            number(cost.peak_memory_mb, 0),
            number(cost.prepare_seconds, 1),
            number(cost.train_seconds, 1),
            number(group.relative_time, 2),
        ]
    });
    let header = [
        "method",
        "passes",
        "weights trained",
        "child, %",
        "state, MiB",
        "peak, MiB",
        "preparation, s",
        "training, s",
        "both, to vanilla",
    ];
    let mut table = table(&header, rows);
    table.column_iter_mut().skip(1).for_each(|column| {
        column.set_cell_alignment(CellAlignment::Right);
    });
    table.trim_fmt()
}

/// Lists what went wrong, each reason once, with an example to look for.
fn failures(rows: &[&Row]) -> Option<String> {
    let mut reasons: Vec<(Status, &str, Vec<&Row>)> = Vec::new();
    for row in rows.iter().copied().filter(|row| row.status != Status::Ok) {
        let reason = row.reason.as_deref().unwrap_or("");
        match reasons.iter_mut().find(|(status, other, _)| (*status, *other) == (row.status, reason)) {
            Some((_, _, rows)) => rows.push(row),
            None => reasons.push((row.status, reason, vec![row])),
        }
    }
    let rows = reasons.iter().map(|(status, reason, rows)| {
        let Row { task, method, seed, run, .. } = rows[0];
        vec![
            yaml_name(status),
            (*reason).to_owned(),
            rows.len().to_string(),
            format!("{task} {method} seed {seed} ({run})"),
        ]
    });
    (!reasons.is_empty()).then(|| table(&["status", "reason", "rows", "such as"], rows).trim_fmt())
}

/// Says with what the numbers were made.
fn origin(rows: &[&Row]) -> String {
    let model = |row: &Row| match row.model_revision.as_str() {
        "" => format!("{} (SHA-256 {})", row.model, short_hash(&row.model_sha256)),
        revision => {
            format!("{}@{} (SHA-256 {})", row.model, short_hash(revision), short_hash(&row.model_sha256))
        }
    };
    let data = |row: &Row| {
        format!("{} {} (SHA-256 {})", row.evaluated_on, row.split, short_hash(&row.evaluated_sha256))
    };
    let program = |row: &Row| match &row.commit {
        Some(commit) => format!("{} ({})", row.version, short_hash(commit)),
        None => row.version.clone(),
    };
    let day = |row: &Row| row.started_at.chars().take(10).collect::<String>();
    let (first, last) = (rows.iter().map(|row| day(row)).min(), rows.iter().map(|row| day(row)).max());
    let mut days: Vec<String> = first.into_iter().chain(last).collect();
    days.dedup();
    let reports: Vec<&Row> = rows.iter().copied().filter(|row| !row.is_trial()).collect();
    let facts = [
        ("model", listed(rows, model)),
        ("data", listed(rows, data)),
        ("seeds", listed(&reports, |row| row.seed.to_string())),
        ("precision", listed(rows, |row| row.precision.clone())),
        ("device", listed(rows, |row| row.device.clone())),
        ("child-tuning", listed(rows, program)),
        ("libtorch", listed(rows, |row| row.torch.clone())),
        ("runs begun", days.join(" to ")),
    ];
    table(&["", ""], facts.map(|(name, value)| vec![name.to_owned(), value])).trim_fmt()
}

/// Joins what the rows say, each once, in the order in which it first appears.
fn listed(rows: &[&Row], value: impl Fn(&Row) -> String) -> String {
    let mut found: Vec<String> = Vec::new();
    for value in rows.iter().map(|row| value(row)).filter(|value| !value.is_empty()) {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(method: &str, seed: u64, score: f64) -> Row {
        Row {
            experiment: "small".into(),
            run: format!("{method}-{seed}"),
            model: "bert".into(),
            model_sha256: "0123456789abcdef".into(),
            task: "rte".into(),
            evaluated_on: "rte".into(),
            split: "dev".into(),
            headline: "accuracy".into(),
            method: method.into(),
            seed,
            score: Some(score),
            passes_per_step: 1,
            prepare_seconds: Some(0.0),
            train_seconds: Some(10.0 * seed as f64),
            device: "cpu".into(),
            started_at: format!("2026-11-2{seed}T10:00:00Z"),
            ..Row::default()
        }
    }

    fn example() -> Vec<Row> {
        let broken = |seed, reason: &str| Row {
            status: Status::Failed,
            reason: Some(reason.into()),
            score: None,
            ..run("r3f", seed, 0.0)
        };
        vec![
            run("vanilla", 1, 0.5),
            run("vanilla", 2, 0.6),
            Row { train_seconds: Some(30.0), ..run("r3f", 1, 0.7) },
            Row { train_seconds: Some(30.0), ..run("r3f", 2, 0.7) },
            broken(3, "out of memory | killed"),
            broken(4, "out of memory | killed"),
            broken(5, "disk full"),
        ]
    }

    #[test]
    fn shows_scores_costs_failures_and_origin() {
        let Report { markdown, figures } = report(&example());
        let has = |text: &str| assert!(markdown.contains(text), "{text} is not in {markdown}");
        has("# small\n\nRuns: 7, of which 4 ended ok.\n");
        has("### rte (dev), bert: accuracy");
        has("![rte (dev), bert: accuracy](01_rte_dev.svg)");
        has("**70.00 ± 0.00**");
        has(" 30.0 |             2.00 |");
        has("| failed | out of memory \\| killed | 2    | rte r3f seed 3 (r3f-3) |");
        has("| bert (SHA-256 0123456789ab)");
        has("| 1, 2, 3, 4, 5 ");
        has("| 2026-11-21 to 2026-11-25 ");
        assert_eq!(figures.len(), 1);
        assert_eq!(figures[0].0, "01_rte_dev.svg");
        assert!(figures[0].1.starts_with("<svg"));
    }

    #[test]
    fn a_run_counts_once_and_as_it_ended_at_last() {
        let mut rows = example();
        rows.push(run("r3f", 3, 0.7));
        rows.extend(example());
        rows.push(Row { purpose: "selection".into(), ..run("r3f", 9, 0.7) });
        let markdown = report(&rows).markdown;
        assert!(
            markdown.contains("Runs: 7, of which 5 ended ok; trials that chose settings: 1."),
            "{markdown}"
        );
        assert!(
            markdown.contains("| failed | out of memory \\| killed | 1    | rte r3f seed 4"),
            "{markdown}"
        );
        assert!(markdown.contains("| 1, 2, 3, 4, 5 "), "seeds of trials are not reported: {markdown}");
    }

    #[test]
    fn names_are_shown_as_they_are() {
        let rows = [Row { experiment: "a <b> [c] *d*".into(), task: "x|y".into(), ..run("vanilla", 1, 0.5) }];
        let markdown = report(&rows).markdown;
        assert!(markdown.starts_with("# a \\<b> \\[c\\] \\*d\\*\n"), "{markdown}");
        assert!(markdown.contains("![x\\|y, evaluated on rte"), "{markdown}");
    }

    #[test]
    fn says_nothing_of_failures_where_there_are_none() {
        let markdown = report(&example()[..2]).markdown;
        assert!(!markdown.contains("did not end well"), "{markdown}");
    }

    #[test]
    fn every_figure_has_a_file_of_its_own() {
        let rows = ["a/b", "a b"].map(|task| Row {
            task: task.into(),
            evaluated_on: "x".into(),
            run: task.into(),
            ..run("vanilla", 1, 0.5)
        });
        let names: Vec<String> = report(&rows).figures.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["01_a_b_x_dev.svg", "02_a_b_x_dev.svg"]);
    }
}
