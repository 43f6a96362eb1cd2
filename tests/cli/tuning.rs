//! `select`: trials that choose the settings of the runs that are reported.

use crate::support::{Workplace, number};

#[test]
fn trials_may_be_scored_on_what_they_hold_out_of_the_training_data() {
    let workplace = Workplace::new();
    let select = |select: &str, train: &str| {
        workplace.experiment(&format!(
            "task: rte\nmethod: {{child_tuning_f: {{p: [0.3, 0.9]}}}}\nseeds: [5]\nevaluate: qnli\nselect: {select}\n\
             train: {{epochs: 1, max_length: 32{train}}}\n"
        ));
    };
    select("{by: dev, on_seeds: [1, 2], share: 0.25}", "");
    workplace.run(&[]).refused(2, &["select: `share` is what `by: held_out` holds out"]);
    select("{by: held_out, on_seeds: [1, 2], share: 0.25}", "");
    workplace.run(&["--jobs", "2"]).with_code(0);
    let rows = workplace.rows("results.csv");
    let (trials, reports): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row["purpose"] == "selection");
    assert_eq!((trials.len(), reports.len()), (2 * 2, 2));
    for trial in &trials {
        // A quarter of the 320 of train; neither dev nor what the reports are scored on besides.
        let columns = ["evaluated_on", "split", "examples_evaluated", "examples_train"];
        assert_eq!(columns.map(|column| trial[column].as_str()), ["rte", "train", "80", "240"]);
        assert_eq!(trial["evaluated_sha256"], trials[0]["evaluated_sha256"]);
    }
    let mut scored: Vec<[&str; 2]> =
        reports.iter().map(|row| ["evaluated_on", "split"].map(|name| row[name].as_str())).collect();
    scored.sort_unstable();
    assert_eq!(scored, [["qnli", "dev"], ["rte", "dev"]]);
    assert!(reports.iter().all(|row| row["examples_train"] == "320"));
    let answer = workplace.run(&[]).with_code(0);
    for there in ["4 of 4 runs are in the results already", "1 of 1 runs are in the results already"] {
        assert!(answer.stderr.contains(there), "{}", answer.stderr);
    }

    // Both sizes are all that is left to a trial; each is reported.
    select("{by: held_out, on_seeds: [1, 2], share: 0.25}", ", examples: [250, 300]");
    workplace.run(&["--set", "results=sizes.csv", "--set", "method=vanilla"]).with_code(0);
    let sizes: Vec<String> =
        workplace.rows("sizes.csv").iter().map(|row| row["examples_train"].clone()).collect();
    assert_eq!(sizes.iter().filter(|size| *size == "240").count(), 2);
    for size in ["250", "300"] {
        assert_eq!(sizes.iter().filter(|other| *other == size).count(), 2, "a row for rte and one for qnli");
    }
}

#[test]
fn trials_choose_the_settings_of_the_runs_that_are_reported() {
    let workplace = Workplace::new();
    let text = "task: rte\nmethod: [vanilla, child_tuning_f: {p: [0.3, 0.9]}]\nseeds: [5]\n\
        select: {by: dev, on_seeds: [1, 2]}\n\
        train: {epochs: 1, batch_size: 16, examples: 32, max_length: 32, learning_rate: [1e-3, 1e-2]}\n";
    workplace.experiment(text);
    let plan = workplace.call(&["plan", "experiment.yaml"]).with_code(0).stdout;
    assert!(plan.contains(
        "then 1 runs of child_tuning_f on rte with bert_pair examples=32, with the best of 4 settings"
    ));
    assert!(plan.contains("14 runs, 0 finished, 14 to do, 28 optimizer steps"), "{plan}");
    workplace.run(&[]).with_code(0);
    let rows = workplace.rows("results.csv");
    let (trials, reports): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row["purpose"] == "selection");
    assert_eq!((trials.len(), reports.len()), (12, 2));
    for report in reports {
        assert_eq!((report["purpose"].as_str(), report["seed"].as_str()), ("tuned", "5"));
        let mut means: Vec<(f64, (String, String))> = Vec::new();
        for trial in trials.iter().filter(|trial| trial["method"] == report["method"]) {
            let settings = (trial["method_config"].clone(), trial["learning_rate"].clone());
            match means.iter_mut().find(|(_, other)| *other == settings) {
                Some((mean, _)) => *mean = (*mean + number(trial, "score")) / 2.0,
                None => means.push((number(trial, "score"), settings)),
            }
        }
        let best = means.iter().fold(f64::NEG_INFINITY, |best, (mean, _)| best.max(*mean));
        let chosen = means.iter().find(|(mean, _)| *mean == best).map(|(_, settings)| settings);
        assert_eq!(chosen, Some(&(report["method_config"].clone(), report["learning_rate"].clone())));
    }
    let text = workplace.call(&["compare", "results.csv"]).with_code(0).stdout;
    assert!(
        text.contains("12 rows left out: trials that chose the settings.") && text.contains("(1)"),
        "{text}"
    );
    let again = workplace.run(&[]).with_code(0);
    assert!(again.stdout.contains("0 runs done, 14 were there already"), "{}", again.stdout);
}

/// A choice among nothing would be reported as one.
#[test]
fn nothing_is_chosen_where_no_trial_has_a_score() {
    let workplace = Workplace::new();
    workplace.experiment(
        "task: rte\nseeds: [5]\nselect: {by: dev, on_seeds: [1, 2]}\n\
        train: {epochs: 1, batch_size: 16, examples: 32, max_length: 32, learning_rate: [1e30, 1e31]}\n",
    );
    let answer = workplace.run(&[]).with_code(1);
    assert!(
        answer.stderr.contains("nothing is chosen and nothing reported, as no trial has a score"),
        "{answer:?}"
    );
    let rows = workplace.rows("results.csv");
    assert_eq!(rows.len(), 4);
    assert!(rows.iter().all(|row| row["status"] == "diverged" && row["purpose"] == "selection"));
    // Nor is anything promised.
    let plan = workplace.call(&["plan", "experiment.yaml"]).with_code(0);
    assert!(!plan.stdout.contains("with the best of"), "{}", plan.stdout);
}

#[test]
fn runs_of_chosen_settings_are_rows_of_their_own() {
    let workplace = Workplace::new();
    let train =
        "train: {epochs: 1, batch_size: 16, examples: 32, max_length: 32, learning_rate: [1e-3, 1e-2]}\n";
    workplace.experiment(&format!("seeds: [5]\n{train}"));
    workplace.run(&[]).with_code(0);
    workplace.experiment(&format!("seeds: [5]\nselect: {{by: dev, on_seeds: [1]}}\n{train}"));
    workplace.run(&[]).with_code(0);
    let rows = workplace.rows("results.csv");
    let purposes: Vec<&str> = rows.iter().map(|row| row["purpose"].as_str()).collect();
    assert_eq!(purposes, ["report", "report", "selection", "selection", "tuned"]);
}

#[test]
fn only_knows_reported_seeds_and_every_spelling_of_a_task() {
    let workplace = Workplace::new();
    workplace.experiment("task: [rte, mrpc]\nseeds: [5, 6]\nselect: {by: dev, on_seeds: [1, 2]}\ntrain: {max_length: 32, learning_rate: [1e-3, 2e-3]}");
    workplace
        .call(&["plan", "experiment.yaml", "--only", "seed=1"])
        .refused(2, &["leaves no run", "there are 5, 6"]);
    let answer = workplace.call(&["plan", "experiment.yaml", "--only", "task=RTE"]).with_code(0);
    assert!(
        answer.stdout.contains("trial rte") && !answer.stdout.contains("trial mrpc"),
        "{}",
        answer.stdout
    );
}
