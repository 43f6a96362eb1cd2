//! `compare` and `report` on the results of a real grid.

use crate::support::{Row, Workplace};

const METHODS: [&str; 3] = ["vanilla", "child_tuning_f", "child_tuning_d"];

/// Three methods on two tasks and two seeds.
fn grid() -> (Workplace, Vec<Row>) {
    let workplace = Workplace::new();
    workplace
        .experiment("task: [rte, mrpc]\nmethod: [vanilla, child_tuning_f, child_tuning_d]\nseeds: [1, 2]");
    workplace.run(&[]).with_code(0);
    let rows = workplace.rows("results.csv");
    assert_eq!(rows.len(), 12);
    (workplace, rows)
}

/// The mean score of a method on a task, from the rows themselves.
fn mean(rows: &[Row], task: &str, method: &str) -> f64 {
    let scores: Vec<f64> = rows
        .iter()
        .filter(|row| row["task"] == task && row["method"] == method)
        .map(|row| row["score"].parse().unwrap())
        .collect();
    assert_eq!(scores.len(), 2);
    scores.iter().sum::<f64>() / 2.0
}

#[test]
fn text_has_a_table_a_task_a_row_a_method_and_a_conclusion() {
    let (workplace, rows) = grid();
    let text = workplace.call(&["compare", "results.csv"]).with_code(0).stdout;
    assert!(text.contains("rte (dev), bert_pair: accuracy\n"), "{text}");
    assert!(text.contains("mrpc (dev), bert_pair: f1\n"), "{text}");
    for (task, block) in ["rte", "mrpc"].into_iter().zip(text.split("mrpc (dev)")) {
        for method in METHODS {
            let line =
                block.lines().map(str::trim).find(|line| line.starts_with(&format!("{method} "))).unwrap();
            let numbers: Vec<&str> =
                line.split_whitespace().filter(|word| word.parse::<f64>().is_ok()).collect();
            let mean = format!("{:.2}", 100.0 * mean(&rows, task, method));
            assert_eq!(numbers[..3], ["2", "2", mean.as_str()], "{line}");
        }
        assert!(block.contains("over 2 common seeds"), "{block}");
    }
    assert!(text.trim_end().ends_with("* marks the best mean of a model."), "{text}");
}

#[test]
fn csv_holds_the_same_numbers_unrounded() {
    let (workplace, rows) = grid();
    let text = workplace.call(&["compare", "results.csv", "--format", "csv"]).with_code(0).stdout;
    workplace.write("comparison.csv", text);
    let groups = workplace.rows("comparison.csv");
    assert_eq!(groups.len(), 6);
    for group in &groups {
        assert!(METHODS.contains(&group["method"].as_str()));
        for (column, value) in [("runs", "2"), ("ok", "2"), ("diverged", "0"), ("failed", "0")] {
            assert_eq!(group[column], value, "{column}");
        }
        let expected = mean(&rows, &group["task"], &group["method"]);
        assert!((group["mean"].parse::<f64>().unwrap() - expected).abs() < 1e-12, "{group:?}");
    }
}

#[test]
fn markdown_tables_are_rectangular() {
    let (workplace, _) = grid();
    let text = workplace.call(&["compare", "results.csv", "--format", "markdown"]).with_code(0).stdout;
    assert_eq!(text.lines().filter(|line| line.starts_with("### ")).count(), 2);
    let cells: Vec<usize> =
        text.lines().filter(|line| line.starts_with('|')).map(|line| line.matches('|').count()).collect();
    // A header, a rule and three methods, twice.
    assert_eq!(cells, [10; 10], "{text}");
    assert!(text.trim_end().ends_with("The best mean of a model is bold."), "{text}");
}

#[test]
fn rows_that_stand_in_two_files_count_once() {
    let (workplace, _) = grid();
    let once = workplace.call(&["compare", "results.csv", "--format", "csv"]).with_code(0).stdout;
    let twice =
        workplace.call(&["compare", "results.csv", "results.csv", "--format", "csv"]).with_code(0).stdout;
    assert_eq!(once, twice);
    let text = workplace.call(&["compare", "results.csv", "results.csv"]).with_code(0).stdout;
    assert!(text.contains("12 rows left out: the same run was there already."), "{text}");
}

#[test]
fn a_report_is_a_text_with_figures_that_are_there() {
    let (workplace, _) = grid();
    let report = |output: &str| workplace.call(&["report", "results.csv", "--output", output]);
    let answer = report("papers/report").with_code(0);
    assert_eq!((answer.stdout.as_str(), answer.stderr.as_str()), ("papers/report/report.md\n", ""));
    assert_eq!(workplace.files("papers/report"), ["01_rte_dev.svg", "02_mrpc_dev.svg", "report.md"]);
    let text = workplace.read("papers/report/report.md");
    for figure in ["01_rte_dev.svg", "02_mrpc_dev.svg"] {
        assert!(text.contains(&format!("]({figure})")), "{text}");
        assert!(workplace.read(&format!("papers/report/{figure}")).trim_end().ends_with("</svg>"));
    }
    let table = workplace.call(&["compare", "results.csv", "--format", "markdown"]).with_code(0).stdout;
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 2 * (2 + METHODS.len()));
    assert!(rows.iter().all(|row| text.contains(row)), "{text}");
    assert!(
        text.contains("Runs: 12, of which 12 ended ok.\n") && !text.contains("did not end well"),
        "{text}"
    );

    // One of fewer results takes the figures away that it no longer has, and nothing else.
    workplace.write("papers/report/own.svg", "mine");
    let only_rte: Vec<String> = (workplace.read("results.csv").lines())
        .filter(|line| !line.contains(",mrpc,"))
        .map(str::to_owned)
        .collect();
    workplace.write("rte.csv", only_rte.join("\n") + "\n");
    workplace.call(&["report", "rte.csv", "--output", "papers/report"]).with_code(0);
    assert_eq!(workplace.files("papers/report"), ["01_rte_dev.svg", "own.svg", "report.md"]);
    report("results.csv").with_code(2);
}

#[test]
fn what_is_typed_otherwise_and_means_the_same_is_compared() {
    let workplace = Workplace::new();
    workplace.experiment("method: [vanilla, child_tuning_f]\nseeds: [1, 2]");
    workplace.run(&["--only", "method=vanilla,seed=1"]).with_code(0);
    // The model by its whole path, one of its values written out, another preset with all that it settles written out.
    let path = format!("model={}", workplace.path("bert_pair").display());
    workplace.run(&["--set", &path]).with_code(0);
    assert_eq!(workplace.rows("results.csv").len(), 4);
    let config: serde_json::Value = serde_json::from_str(&workplace.read("bert_pair/config.json")).unwrap();
    let dropout = format!("model_config={{hidden_dropout_prob: {}}}", config["hidden_dropout_prob"]);
    let official = ["preset=official", "train.warmup=0.1", "train.adamw=torch", &dropout];
    let official: Vec<&str> = official.iter().flat_map(|value| ["--set", value]).collect();
    workplace.run(&official).with_code(0);
    let text = workplace.call(&["compare", "results.csv", "--format", "csv"]).with_code(0).stdout;
    workplace.write("comparison.csv", text);
    let groups = workplace.rows("comparison.csv");
    let counts = |column: &str| groups.iter().map(|row| row[column].clone()).collect::<Vec<_>>();
    assert_eq!(counts("method"), ["vanilla", "child_tuning_f", "child_tuning_f"]);
    assert_eq!(
        (counts("runs"), counts("common_seeds")),
        (vec!["2".to_owned(); 3], ["0", "2", "2"].map(String::from).into())
    );
}
