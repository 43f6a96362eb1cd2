//! Experiments with several runs: one row a run, nothing done twice, and a bad run does not end the others.

use std::collections::HashSet;

use crate::support::{Row, Workplace};

const GRID: &str = "method: [vanilla, child_tuning_f]\nseeds: [1, 2, 3]";

/// Which runs rows stand for, sorted.
fn methods_and_seeds(rows: &[Row]) -> Vec<(&str, &str)> {
    let mut pairs: Vec<_> = rows.iter().map(|row| (row["method"].as_str(), row["seed"].as_str())).collect();
    pairs.sort();
    pairs
}

#[test]
fn a_grid_writes_one_row_a_run_and_a_second_start_runs_nothing() {
    let workplace = Workplace::new();
    workplace.experiment(GRID);
    let first = workplace.run(&[]).with_code(0);
    assert!(first.stdout.contains("experiment: 6 runs done; "), "{}", first.stdout);
    assert!(first.stdout.ends_with(" s in all\nresults: results.csv\n"), "{}", first.stdout);
    let written = workplace.read("results.csv");
    assert!(written.starts_with(
        "schema_version,experiment,run,model,model_sha256,model_revision,config_sha256,tokenizer_sha256,task,"
    ));
    let rows = workplace.rows("results.csv");
    let expected = ["child_tuning_f", "vanilla"].map(|method| ["1", "2", "3"].map(|seed| (method, seed)));
    assert_eq!(methods_and_seeds(&rows), expected.concat());
    let ids: HashSet<&str> = rows.iter().map(|row| row["run"].as_str()).collect();
    assert_eq!(ids.len(), 6);

    let second = workplace.run(&[]).with_code(0);
    assert_eq!(second.stderr, "6 of 6 runs are in the results already\n");
    assert!(second.stdout.contains("experiment: 0 runs done, 6 were there already"), "{}", second.stdout);
    assert_eq!(workplace.read("results.csv"), written);

    // A further seed adds its two runs behind the old rows, of which none changes.
    let third = workplace.run(&["--set", "seeds=[1, 2, 3, 4]"]).with_code(0);
    assert!(third.stdout.contains("2 runs done, 6 were there already"), "{}", third.stdout);
    assert!(workplace.read("results.csv").starts_with(&written));
    let seeds = workplace.column("results.csv", "seed");
    assert_eq!(seeds[6..], ["4", "4"]);
}

/// In `plan` before training, and in the results after it.
#[test]
fn methods_show_what_they_cost() {
    let workplace = Workplace::new();
    workplace.experiment(
        "method: [vanilla, r_drop, lt_sft, {child_tuning_d: {p: [0.1, 0.2]}}, [bitfit, child_tuning_d: {p: 0.1, mask: {scope: all}}]]\n\
         seeds: [1]",
    );
    let text = workplace.call(&["plan", "experiment.yaml"]).with_code(0).stdout;
    let lines = |start: &str| text.lines().filter(|line| line.trim_start().starts_with(start)).count();
    let line = |start: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(start));
        line.unwrap_or_else(|| panic!("{start}: {text}")).to_owned()
    };
    assert!(line("method ").ends_with("before training"), "{text}");
    let [vanilla, r_drop, lt_sft] = ["vanilla ", "r_drop ", "lt_sft "].map(line);
    assert!(vanilla.trim_end().ends_with(" 1") && r_drop.trim_end().ends_with(" 2"), "{text}");
    assert!(lt_sft.ends_with("trains once more"), "{text}");
    // Namesakes by the option in which they differ.
    assert!(line("child_tuning_d p=0.1 ").contains(" passes over "), "{text}");
    assert_eq!((lines("child_tuning_d p=0.2 "), lines("bitfit+child_tuning_d ")), (1, 1), "{text}");

    workplace.run(&[]).with_code(0);
    let rows = workplace.rows("results.csv");
    let row = |method: &str| rows.iter().find(|row| row["method"] == method).unwrap();
    let number = |method: &str, column: &str| row(method)[column].parse::<f64>().unwrap();
    assert_eq!((number("vanilla", "passes_per_step"), number("r_drop", "passes_per_step")), (1.0, 2.0));
    for (method, passed) in [("vanilla", false), ("child_tuning_d", true), ("lt_sft", false)] {
        let prepared = if passed { number(method, "examples_train") } else { 0.0 };
        assert_eq!(number(method, "examples_prepared"), prepared, "{method}");
        assert_eq!(number(method, "method_state_mb") > 0.0, method != "vanilla", "{method}");
    }
    let trainable = |method: &str| number(method, "trainable_parameters");
    assert!(trainable("lt_sft") < 0.02 * trainable("vanilla"));
    assert!(trainable("bitfit+child_tuning_d") < trainable("child_tuning_d"));
}

#[test]
fn only_runs_what_was_chosen() {
    let workplace = Workplace::new();
    workplace.experiment(GRID);
    workplace.run(&["--only", "method=vanilla,seed=2"]).with_code(0);
    workplace.run(&["--only", "seed=3", "--only", "method=child_tuning_f"]).with_code(0);
    assert_eq!(
        methods_and_seeds(&workplace.rows("results.csv")),
        [("child_tuning_f", "3"), ("vanilla", "2")]
    );
}

#[test]
fn plan_counts_and_trains_nothing() {
    let workplace = Workplace::new();
    workplace.experiment(GRID);
    let plan = |workplace: &Workplace| workplace.call(&["plan", "experiment.yaml"]).with_code(0).stdout;
    let text = plan(&workplace);
    assert!(text.contains("experiment: 6 runs, 0 finished, 6 to do, 12 optimizer steps"), "{text}");
    assert_eq!(workplace.files("."), ["bert_pair", "experiment.yaml"]);

    workplace.run(&["--only", "seed=1"]).with_code(0);
    let written = workplace.read("results.csv");
    let text = plan(&workplace);
    assert!(
        text.contains("6 runs, 2 finished, 4 to do, 8 optimizer steps; about ")
            && text.contains("; results in results.csv"),
        "{text}"
    );
    let done = workplace.column("results.csv", "run");
    assert_eq!(
        text.lines().filter(|line| done.iter().any(|id| line.contains(id.as_str()))).count(),
        0,
        "{text}"
    );
    assert_eq!(workplace.read("results.csv"), written);
}

#[test]
fn runs_that_end_within_their_warm_up_are_named() {
    let workplace = Workplace::new();
    workplace.experiment("train: {epochs: 1, batch_size: 4096, max_length: 32}");
    let plan = |set: &str| workplace.call(&["plan", "experiment.yaml", "--set", set]).with_code(0).stdout;
    let text = plan("train.warmup=0.1");
    assert!(
        text.contains("note: 1 of 1 runs end before their warm-up") && text.contains("1 step and"),
        "{text}"
    );
    assert!(!plan("train.warmup=0").contains("warm-up"));
}

#[test]
fn a_run_that_diverges_becomes_a_row_and_the_others_still_run() {
    let workplace = Workplace::new();
    workplace.experiment(
        "seeds: [1, 2]\n\
         train: {epochs: 1, examples: 32, max_length: 32, learning_rate: [1e30, 1e-4]}",
    );
    let answer = workplace.run(&[]).with_code(1);
    assert!(
        answer.stdout.contains("2 runs done, 2 diverged or failed (their rows say why)"),
        "{}",
        answer.stdout
    );
    let rows = workplace.rows("results.csv");
    let of_status = |status: &str| rows.iter().filter(|row| row["status"] == status).collect::<Vec<_>>();
    let (diverged, ok) = (of_status("diverged"), of_status("ok"));
    assert_eq!((diverged.len(), ok.len()), (2, 2));
    for row in diverged {
        assert_eq!(row["learning_rate"].parse(), Ok(1e30));
        assert_eq!((row["score"].as_str(), row["accuracy"].as_str(), row["loss"].as_str()), ("", "", ""));
        assert!(row["reason"].contains("loss"), "{}", row["reason"]);
        assert_eq!(row["headline"], "accuracy");
    }
    for row in ok {
        assert_eq!((row["learning_rate"].parse(), row["reason"].as_str()), (Ok(1e-4), ""));
    }
    // The model of the diverged run leaves nothing behind in the next one.
    let alone = Workplace::new();
    alone.experiment("train: {epochs: 1, examples: 32, max_length: 32, learning_rate: 1e-4}");
    alone.run(&[]).with_code(0);
    let alone = alone.row("results.csv");
    let same = rows.iter().find(|row| row["run"] == alone["run"]).unwrap();
    assert_eq!((&same["score"], &same["loss"]), (&alone["score"], &alone["loss"]));

    // It would end in the same way again.
    let again = workplace.run(&[]).with_code(1).stdout;
    assert!(again.contains("0 runs done, 4 were there already, 2 of these had diverged"), "{again}");
}

#[test]
fn a_row_says_where_it_comes_from() {
    let workplace = Workplace::new();
    workplace.experiment("name: provenance\nmethod: child_tuning_d");
    workplace.run(&[]).with_code(0);
    let row = workplace.row("results.csv");
    // Commit and peak memory are known on most machines only; the empty rest belongs to other kinds of runs.
    let optional = [
        "commit",
        "peak_memory_mb",
        "reason",
        "f1",
        "matthews",
        "pearson",
        "spearman",
        "combined",
        "model_revision",
        "model_config",
        "source_run",
        "source_task",
        "source_method",
        "source_config",
        "source_settings",
        "early_stopping",
    ];
    for (column, value) in row.iter().filter(|(column, _)| !optional.contains(&column.as_str())) {
        assert!(!value.is_empty(), "{column} is empty");
    }
    let expected = [
        ("schema_version", "6"),
        ("experiment", "provenance"),
        ("model", "bert_pair"),
        ("task", "rte"),
        ("evaluated_on", "rte"),
        ("split", "dev"),
        ("preset", "paper"),
        ("method", "child_tuning_d"),
        ("status", "ok"),
        ("headline", "accuracy"),
        ("examples_train", "32"),
        ("examples_evaluated", "120"),
        ("step", "2"),
        ("precision", "float32"),
        ("version", env!("CARGO_PKG_VERSION")),
    ];
    for (column, value) in expected {
        assert_eq!(row[column], value, "{column}");
    }
    assert_eq!(row["score"], row["accuracy"]);
    assert!(row["method_config"].starts_with("p=0.3 fisher=per_example"), "{}", row["method_config"]);
    assert!(row["device"].starts_with("cpu (") && row["device"].contains("1 threads"), "{}", row["device"]);
    assert!(row["torch"].starts_with("2."), "{}", row["torch"]);
    for (column, length) in [
        ("run", 16),
        ("model_sha256", 64),
        ("config_sha256", 64),
        ("tokenizer_sha256", 64),
        ("mask_sha256", 64),
    ] {
        let value = &row[column];
        assert!(
            value.len() == length && value.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{column}: {value}"
        );
    }
    assert!(humantime::parse_rfc3339(&row["started_at"]).is_ok(), "{}", row["started_at"]);
}

#[test]
fn the_same_run_gives_the_same_bits_in_another_process() {
    let workplace = Workplace::new();
    workplace.experiment("method: [vanilla, child_tuning_f, child_tuning_d]\nseeds: [1, 2]");
    let outcomes = |results: &str| {
        workplace.run(&["--set", &format!("results={results}")]).with_code(0);
        let rows = workplace.rows(results);
        rows.into_iter()
            .map(|row| ["run", "score", "loss"].map(|column| row[column].clone()))
            .collect::<Vec<_>>()
    };
    let first = outcomes("first.csv");
    assert_eq!(outcomes("second.csv"), first);
    let losses: HashSet<&str> = first.iter().map(|[_, _, loss]| loss.as_str()).collect();
    assert_eq!(losses.len(), 6, "methods and seeds differ: {first:?}");
}
