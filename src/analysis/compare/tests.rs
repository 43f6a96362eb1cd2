use super::{Comparison, Group, Repetition, TUNED, compare};
use crate::experiment::results::{Row, Status};

fn run(method: &str, seed: u64, score: f64) -> Row {
    Row {
        run: format!("{method}-{seed}"),
        model: "bert".into(),
        task: "rte".into(),
        evaluated_on: "rte".into(),
        split: "dev".into(),
        preset: "paper".into(),
        method: method.into(),
        headline: "accuracy".into(),
        learning_rate: 4e-5,
        epochs: 3.0,
        seed,
        score: Some(score),
        degenerate: Some(false),
        ..Row::default()
    }
}

fn broken(method: &str, seed: u64, status: Status) -> Row {
    Row { status, score: None, degenerate: None, ..run(method, seed, 0.0) }
}

/// Vanilla on seeds 1 to 3, a method on 1 to 3 and 5, where it is degenerate; seeds 4 and 6 of it broke.
fn example() -> Vec<Row> {
    vec![
        run("vanilla", 1, 0.60),
        run("vanilla", 2, 0.62),
        run("vanilla", 3, 0.64),
        Row { method_config: "p=0.3".into(), ..run("child_tuning_d", 1, 0.62) },
        Row { method_config: "p=0.3".into(), ..run("child_tuning_d", 2, 0.66) },
        Row { method_config: "p=0.3".into(), ..run("child_tuning_d", 3, 0.64) },
        Row { method_config: "p=0.3".into(), ..broken("child_tuning_d", 4, Status::Failed) },
        Row { method_config: "p=0.3".into(), degenerate: Some(true), ..run("child_tuning_d", 5, 0.80) },
        Row { method_config: "p=0.3".into(), ..broken("child_tuning_d", 6, Status::Diverged) },
    ]
}

fn near(found: Option<f64>, expected: f64) {
    let found = found.unwrap();
    assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
}

fn labels(comparison: &Comparison) -> Vec<String> {
    let groups = comparison.blocks.iter().flat_map(|block| &block.groups);
    groups.map(|group| format!("{} {}", group.method, group.settings).trim().to_owned()).collect()
}

#[test]
fn agrees_with_numbers_worked_out_by_hand() {
    let comparison = compare(&example());
    assert_eq!(comparison.blocks.len(), 1);
    let [vanilla, child] = &comparison.blocks[0].groups[..] else { panic!("two groups are due") };
    let counts = |group: &Group| [group.runs, group.ok, group.failed, group.diverged, group.degenerate];
    assert_eq!((counts(vanilla), counts(child)), ([3, 3, 0, 0, 0], [6, 4, 1, 1, 1]));
    near(vanilla.mean, 0.62);
    near(vanilla.standard_deviation, 0.02);
    near(vanilla.half_width, 0.04968275423500661);
    near(child.mean, 0.68);
    // Deviations of -6, -2, -4 and 12 points: sqrt(200 / 3).
    near(child.standard_deviation, (0.02_f64 / 3.0).sqrt());
    near(child.median, 0.65);
    near(child.best, 0.80);
    assert_eq!((vanilla.has_best_mean, child.has_best_mean), (false, true));
    assert_eq!(vanilla.difference, None);
    let difference = child.difference.unwrap();
    // On seeds 1 to 3: +2, +4 and 0 points.
    assert_eq!(difference.seeds, 3);
    near(Some(difference.mean), 0.02);
    near(difference.standard_deviation, 0.02);
    near(difference.half_width, 0.04968275423500661);
}

#[test]
fn shows_settings_only_where_they_tell_groups_apart() {
    assert_eq!(labels(&compare(&example())), ["vanilla", "child_tuning_d"]);
    let mut rows = example();
    rows.push(Row {
        run: "other p".into(),
        method_config: "p=0.1 scope=all".into(),
        ..run("child_tuning_d", 1, 0.5)
    });
    rows.push(Row { run: "slow".into(), learning_rate: 2e-5, ..run("vanilla", 1, 0.5) });
    assert_eq!(
        labels(&compare(&rows)),
        [
            "vanilla learning_rate=4e-5",
            "child_tuning_d p=0.3 learning_rate=4e-5",
            "child_tuning_d p=0.1 scope=all learning_rate=4e-5",
            "vanilla learning_rate=2e-5",
        ]
    );
}

#[test]
fn a_setting_of_a_method_is_not_taken_for_a_hyperparameter_of_the_same_name() {
    let rows = [
        Row { epsilon: 1e-8, ..run("vanilla", 1, 0.5) },
        Row { epsilon: 1e-8, method_config: "epsilon=0.00001".into(), ..run("r3f", 1, 0.5) },
    ];
    assert_eq!(labels(&compare(&rows)), ["vanilla", "r3f"]);
}

#[test]
fn settings_of_two_stages_are_told_apart() {
    let chain = |first: &str, second: &str| Row {
        run: format!("{first}>{second}"),
        source_task: "mrpc".into(),
        source_method: "child_tuning_d".into(),
        source_config: first.into(),
        method_config: second.into(),
        ..run("child_tuning_d", 1, 0.5)
    };
    let rows = [chain("p=0.1", "p=0.3"), chain("p=0.3", "p=0.1")];
    let method = "child_tuning_d>child_tuning_d";
    assert_eq!(
        labels(&compare(&rows)),
        [format!("{method} stage1.p=0.1 stage2.p=0.3"), format!("{method} stage1.p=0.3 stage2.p=0.1")]
    );
    // A name tells its stage in all rows or in none.
    let rows = [chain("p=0.1", "p=0.3"), chain("p=0.1", "p=0.4")];
    assert_eq!(labels(&compare(&rows)), [format!("{method} stage2.p=0.3"), format!("{method} stage2.p=0.4")]);
    let rows = [chain("q=1", "p=0.3"), chain("q=2", "p=0.3")];
    assert_eq!(labels(&compare(&rows)), [format!("{method} q=1"), format!("{method} q=2")]);
    // A stage without settings keeps its place.
    let rows = [chain("", "p=0.3"), chain("p=0.3", ""), chain("", "")];
    assert_eq!(
        labels(&compare(&rows)),
        [format!("{method} stage2.p=0.3"), format!("{method} stage1.p=0.3"), method.to_owned()]
    );
}

/// What a chain began with is no setting of a method, and vanilla with the same start is the baseline.
#[test]
fn chains_that_begin_with_other_folders_are_other_groups() {
    let chain = |start: &str, method: &str, score: f64| Row {
        run: format!("{start} {method}"),
        source_run: format!("{start} source"),
        source_task: "mrpc".into(),
        source_method: "vanilla".into(),
        source_config: start.into(),
        ..run(method, 1, score)
    };
    let rows = ["", "start=0a", "start=0b"]
        .map(|start| [chain(start, "vanilla", 0.5), chain(start, "child_tuning_f", 0.6)])
        .concat();
    let comparison = compare(&rows);
    assert_eq!(labels(&comparison).len(), 6);
    for groups in comparison.blocks[0].groups.chunks(2) {
        assert_eq!((groups[0].is_baseline, groups[1].is_baseline), (true, false));
        near(groups[1].difference.map(|difference| difference.mean), 0.1);
    }
}

/// Nothing tells which of two runs of a seed belongs to which.
#[test]
fn where_a_seed_has_two_runs_there_is_no_difference() {
    for method in ["vanilla", "child_tuning_d"] {
        let mut rows = example();
        rows.push(Row {
            run: "again".into(),
            ..rows.iter().find(|row| row.method == method).unwrap().clone()
        });
        let groups = &compare(&rows).blocks[0].groups;
        assert_eq!(groups.iter().map(|group| group.surplus).sum::<usize>(), 1);
        assert_eq!(groups[1].difference, None, "{method}");
    }
}

#[test]
fn tuned_runs_stand_beside_the_same_runs_of_a_fixed_setting() {
    let tuned = |row: Row| Row { purpose: "tuned".into(), ..row };
    let fixed = |row: Row| Row { purpose: "report".into(), ..row };
    let rows = [
        fixed(run("vanilla", 1, 0.5)),
        tuned(run("vanilla", 1, 0.5)),
        tuned(Row { learning_rate: 1e-5, ..run("child_tuning_f", 1, 0.6) }),
    ];
    let comparison = compare(&rows);
    assert_eq!(comparison.repeated, Repetition::default());
    let child = &comparison.blocks[0].groups[2];
    near(child.difference.map(|difference| difference.mean), 0.1);
    assert_eq!(labels(&comparison)[0], "vanilla learning_rate=4e-5 purpose=report");
}

/// As after a wider grid in the same file.
#[test]
fn a_tuned_method_is_not_set_against_the_vanilla_of_another_tuning() {
    let tuned = |rate: f64, row: Row| Row {
        purpose: "tuned".into(),
        learning_rate: rate,
        run: format!("{} {rate}", row.run),
        ..row
    };
    let rows = [
        tuned(1e-4, run("vanilla", 1, 0.5)),
        tuned(1e-4, run("child_tuning_f", 1, 0.4)),
        tuned(5e-3, run("vanilla", 1, 0.7)),
        tuned(5e-3, run("child_tuning_f", 1, 0.6)),
    ];
    let groups = &compare(&rows).blocks[0].groups;
    assert!(groups.iter().all(|group| group.difference.is_none() && group.relative_time.is_none()));
    let text = compare(&rows).to_text();
    assert!(text.contains("vanilla was tuned 2 times"), "{text}");
    assert!(!text.contains("no seed has a score"), "{text}");
    near(compare(&rows[2..]).blocks[0].groups[1].difference.map(|difference| difference.mean), -0.1);
}

#[test]
fn sets_a_method_against_vanilla_with_the_same_hyperparameters_only() {
    let slow = |row: Row| Row { learning_rate: 2e-5, run: format!("{} slow", row.run), ..row };
    let rows = [
        run("vanilla", 1, 0.5),
        run("child_tuning_f", 1, 0.6),
        slow(run("vanilla", 1, 0.9)),
        slow(run("child_tuning_f", 1, 0.8)),
        Row { epochs: 4.0, run: "long".into(), ..run("child_tuning_f", 1, 0.7) },
        Row { model: "electra".into(), run: "electra".into(), ..run("child_tuning_f", 1, 0.7) },
        run("child_tuning_f", 2, 0.0),
    ];
    let comparison = compare(&rows);
    let found: Vec<Option<f64>> = comparison.blocks[0]
        .groups
        .iter()
        .map(|group| group.difference.map(|difference| (difference.mean * 1e6).round() / 1e6))
        .collect();
    assert_eq!(found, [None, Some(0.1), None, Some(-0.1), None, None]);
}

/// Each setting is either one that trials may choose, or one that an experiment has once for all its runs.
#[test]
fn every_setting_of_a_row_is_tuned_or_shared() {
    let shared = ["beta1", "beta2", "early_stopping", "label_noise", "freeze", "head"];
    for (name, _) in Row::default().settings() {
        assert!(TUNED.contains(&name) != shared.contains(&name), "{name}");
    }
    let tuned = |method: &str, optimizer: &str, score| Row {
        purpose: "tuned".into(),
        optimizer: optimizer.into(),
        ..run(method, 1, score)
    };
    let comparison = compare(&[tuned("vanilla", "adamw", 0.5), tuned("r3f", "sgd", 0.6)]);
    assert!(comparison.blocks[0].groups[1].difference.is_some());
}

#[test]
fn vanilla_with_settings_of_its_own_is_compared_and_no_baseline() {
    let control = |score| Row {
        method_config: "learning_rate_factor=0.5".into(),
        run: "control".into(),
        ..run("vanilla", 1, score)
    };
    let comparison = compare(&[control(0.7), run("vanilla", 1, 0.5), run("child_tuning_f", 1, 0.6)]);
    let found: Vec<Option<f64>> = comparison.blocks[0]
        .groups
        .iter()
        .map(|group| group.difference.map(|difference| (difference.mean * 1e6).round() / 1e6))
        .collect();
    assert_eq!(found, [Some(0.2), None, Some(0.1)]);
    assert_eq!(labels(&comparison)[0], "vanilla learning_rate_factor=0.5");
}

#[test]
fn separates_tasks_targets_and_training_sizes_in_order_of_appearance() {
    let rows = [
        Row { task: "sts-b".into(), evaluated_on: "sts-b".into(), run: "a".into(), ..run("vanilla", 1, 0.5) },
        Row { evaluated_on: "qnli".into(), examples_train: 5, ..run("vanilla", 1, 0.5) },
        Row { examples_train: 1000, ..run("vanilla", 1, 0.5) },
        Row { examples_train: 0, ..broken("vanilla", 2, Status::Failed) },
        Row { task: "sts-b".into(), evaluated_on: "sts-b".into(), run: "b".into(), ..run("vanilla", 2, 0.5) },
    ];
    let blocks: Vec<_> = compare(&rows)
        .blocks
        .into_iter()
        .map(|block| (block.task, block.evaluated_on, block.groups[0].runs))
        .collect();
    let block = |task: &str, on: &str, runs| (task.to_owned(), on.to_owned(), runs);
    assert_eq!(blocks, [block("sts-b", "sts-b", 2), block("rte", "qnli", 1), block("rte", "rte", 2)]);

    let sizes = [1000, 5000].map(|size| Row {
        run: size.to_string(),
        examples_train: size,
        ..run("vanilla", 1, 0.5)
    });
    assert_eq!(labels(&compare(&sizes)), ["vanilla examples_train=1000", "vanilla examples_train=5000"]);
}

#[test]
fn counts_a_run_once_and_prefers_the_row_that_did_not_fail() {
    let rows = [
        run("vanilla", 1, 0.5),
        run("vanilla", 1, 0.9),
        broken("vanilla", 2, Status::Failed),
        run("vanilla", 2, 0.7),
    ];
    let comparison = compare(&rows);
    assert_eq!(comparison.repeated, Repetition { rows: 2, contradictions: 1 });
    assert_eq!((comparison.blocks[0].groups[0].runs, comparison.blocks[0].groups[0].failed), (2, 0));
    near(comparison.blocks[0].groups[0].mean, 0.6);
    let text = comparison.to_text();
    assert!(text.contains("2 rows left out: the same run was there already."), "{text}");
    assert!(
        text.contains("1 of the rows left out has another score than the row of the same run that counts"),
        "{text}"
    );
}

#[test]
fn says_what_the_statistics_leave_out() {
    let rows = [
        run("vanilla", 1, 0.5),
        Row { run: "hidden setting".into(), ..run("vanilla", 1, 0.7) },
        Row { score: None, ..run("vanilla", 2, 0.0) },
    ];
    let text = compare(&rows).to_text();
    assert!(text.contains("1 of 3 runs ended ok without a score"), "{text}");
    assert!(text.contains("1 of 3 runs repeat a seed of their group"), "{text}");
    let lonely = compare(&[broken("r3f", 1, Status::Diverged)]).to_text();
    assert!(lonely.contains("no difference from vanilla: no seed has a score"), "{lonely}");
}

#[test]
fn text_is_aligned_and_scaled() {
    let text = compare(&example()).to_text();
    let expected = "\
rte (dev), bert: accuracy
───────────────────────────────────────────────────────────────────────────────────────────────────────────────
 method           runs   ok        mean ± sd   median    best   failed   degenerate                 vs vanilla
═══════════════════════════════════════════════════════════════════════════════════════════════════════════════
 vanilla             3    3     62.00 ± 2.00    62.00   64.00        0            0                          -
 child_tuning_d      6    4   * 68.00 ± 8.16    65.00   80.00        2            1   +2.00 [-2.97, +6.97] (3)
───────────────────────────────────────────────────────────────────────────────────────────────────────────────
child_tuning_d: difference from vanilla +2.00 ± 2.00 over 3 common seeds; 95 % interval of the mean -2.97 to +6.97, \
which does not separate them
";
    assert!(text.starts_with(expected), "{text}");
    assert!(text.ends_with("* marks the best mean of a model."), "{text}");
}

#[test]
fn a_verdict_needs_a_spread_that_excludes_zero() {
    let verdict = |scores: &[f64]| {
        let mut rows: Vec<Row> =
            scores.iter().zip(1..).map(|(&score, seed)| run("child_tuning_f", seed, score)).collect();
        rows.extend((1..=scores.len() as u64).map(|seed| run("vanilla", seed, 0.5)));
        let text = compare(&rows).to_text();
        text.lines().find(|line| line.starts_with("child_tuning_f:")).unwrap().to_owned()
    };
    assert!(verdict(&[0.60, 0.61, 0.62]).ends_with(", better than vanilla"));
    assert!(verdict(&[0.40, 0.41, 0.42]).ends_with(", worse than vanilla"));
    let equal = ", the same on each, so that nothing is known of the spread";
    assert!(verdict(&[0.50, 0.50, 0.50]).ends_with(equal) && verdict(&[0.60, 0.60]).ends_with(equal));
    assert!(verdict(&[0.60]).ends_with("+10.00 on 1 common seed, which says nothing about the spread"));
}

#[test]
fn markdown_marks_the_best_and_escapes_bars() {
    let mut rows = example();
    rows.push(Row { model: "a|b".into(), run: "other".into(), ..run("r3f", 1, 0.5) });
    rows.push(Row { run: "f".into(), ..run("child_tuning_f", 1, 0.5) });
    let markdown = compare(&rows).to_markdown();
    let lines: Vec<&str> = markdown.lines().collect();
    assert_eq!(lines[0], "### rte (dev): accuracy");
    assert!(
        lines[1].is_empty() && lines[2].starts_with("| model ") && lines[3].starts_with("|---"),
        "{markdown}"
    );
    assert!(markdown.contains("| **68.00 ± 8.16** |"), "{markdown}");
    assert!(markdown.contains("| a\\|b "), "{markdown}");
    assert!(markdown.contains("(the best of 2 means, which favours it)"), "{markdown}");
    assert!(lines.iter().filter(|line| line.starts_with('|')).all(|line| line.ends_with('|')), "{markdown}");
}

#[test]
fn csv_keeps_every_digit() {
    let csv = compare(&example()).to_csv();
    let mut reader = csv::Reader::from_reader(csv.as_bytes());
    let header = reader.headers().unwrap().clone();
    let records: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    let field = |record: usize, name: &str| {
        records[record].get(header.iter().position(|column| column == name).unwrap()).unwrap()
    };
    assert_eq!(records.len(), 2);
    assert_eq!([field(0, "method"), field(0, "difference"), field(0, "common_seeds")], ["vanilla", "", "0"]);
    let group = &compare(&example()).blocks[0].groups[1];
    assert_eq!(field(1, "mean").parse::<f64>().ok(), group.mean);
    assert_eq!(
        field(1, "difference").parse::<f64>().ok(),
        group.difference.map(|difference| difference.mean)
    );
    assert_eq!([field(1, "failed"), field(1, "diverged"), field(1, "degenerate")], ["1", "1", "1"]);
}

#[test]
fn other_data_and_other_weights_under_the_same_names_are_never_compared() {
    let with = |data: &str, weights: &str, row: Row| Row {
        run: format!("{}{data}{weights}", row.run),
        evaluated_sha256: data.into(),
        model_sha256: weights.into(),
        ..row
    };
    let rows = [
        with("1234567890abcdef", "", run("vanilla", 1, 0.4)),
        with("fedcba0987654321", "", run("vanilla", 1, 0.6)),
        with("fedcba0987654321", "", run("r3f", 1, 0.6)),
    ];
    let comparison = compare(&rows);
    let blocks: Vec<_> =
        comparison.blocks.iter().map(|block| (block.data.as_str(), block.groups.len())).collect();
    assert_eq!(blocks, [("1234567890ab", 1), ("fedcba098765", 2)]);
    near(comparison.blocks[1].groups[1].difference.map(|difference| difference.mean), 0.0);
    let text = comparison.to_text();
    assert!(text.contains("rte (dev, data 1234567890ab), bert: accuracy"), "{text}");
    assert!(compare(&rows[1..]).to_text().contains("rte (dev), bert: accuracy"), "a hash that tells nothing");

    let rows = [
        with("", "aaaaaaaaaaaaaaaa", run("vanilla", 1, 0.4)),
        with("", "bbbbbbbbbbbbbbbb", run("r3f", 1, 0.6)),
    ];
    let comparison = compare(&rows);
    assert_eq!(labels(&comparison), ["vanilla weights=aaaaaaaaaaaa", "r3f weights=bbbbbbbbbbbb"]);
    assert_eq!(comparison.blocks[0].groups[1].difference, None);
    let on =
        |data: &str, row: Row| Row { train_sha256: data.into(), run: format!("{} {data}", row.run), ..row };
    let rows = [
        on("aaaaaaaaaaaaaaaa", run("vanilla", 1, 0.4)),
        on("bbbbbbbbbbbbbbbb", run("vanilla", 1, 0.5)),
        on("bbbbbbbbbbbbbbbb", run("r3f", 1, 0.6)),
    ];
    let comparison = compare(&rows);
    assert_eq!(
        labels(&comparison),
        ["vanilla train_data=aaaaaaaaaaaa", "vanilla train_data=bbbbbbbbbbbb", "r3f train_data=bbbbbbbbbbbb"]
    );
    near(comparison.blocks[0].groups[2].difference.map(|difference| difference.mean), 0.1);
    // Models of other names have other weights as a matter of course.
    let of = |model: &str, row: Row| Row { model: model.into(), model_sha256: model.into(), ..row };
    let rows = [of("bert", run("vanilla", 1, 0.4)), of("roberta", run("r3f", 1, 0.6))];
    assert_eq!(labels(&compare(&rows)), ["vanilla", "r3f"]);
}

#[test]
fn a_model_is_what_it_contains_however_rows_call_it() {
    let of = |model: &str, config: &str, overrides: &str, row: Row| Row {
        run: format!("{}{config}", row.run),
        model: model.into(),
        model_sha256: "w".into(),
        config_sha256: config.into(),
        model_config: overrides.into(),
        ..row
    };
    // A folder, the same by another path and under another preset, and with a default written out.
    let mut rows = vec![
        of("models/tiny", "c", "", run("vanilla", 1, 0.4)),
        of("/srv/models/tiny", "c", "", run("vanilla", 2, 0.5)),
        Row { preset: "official".into(), ..of("models/tiny", "c", "{\"dropout\":0.1}", run("r3f", 1, 0.5)) },
        of("tiny", "c", "", run("r3f", 2, 0.6)),
    ];
    for _ in 0..2 {
        let comparison = compare(&rows);
        assert_eq!(comparison.blocks[0].groups.len(), 2);
        let r3f = comparison.blocks[0].groups.iter().find(|group| group.method == "r3f").unwrap();
        assert_eq!((r3f.difference.map(|difference| difference.seeds), r3f.settings.as_str()), (Some(2), ""));
        assert!(comparison.blocks[0].groups.iter().all(|group| group.model == rows[0].model));
        rows.reverse();
    }
    // Another config is another model, whether the experiment or the folder's file has it.
    let rows = [
        of("tiny", "c", "", run("vanilla", 1, 0.4)),
        of("tiny", "d", "{\"dropout\":0.2}", run("vanilla", 1, 0.5)),
    ];
    assert_eq!(labels(&compare(&rows)), ["vanilla model_config=", "vanilla model_config={\"dropout\":0.2}"]);
    let rows = [of("tiny", "cc", "", run("vanilla", 1, 0.4)), of("tiny", "dd", "", run("r3f", 1, 0.5))];
    let comparison = compare(&rows);
    assert_eq!(labels(&comparison), ["vanilla config=cc", "r3f config=dd"]);
    assert_eq!(comparison.blocks[0].groups[1].difference, None);
}

#[test]
fn settings_of_earlier_stages_set_groups_apart() {
    let after = |method: &str, rate: &str, seed: u64, score: f64| Row {
        run: format!("{method} {rate} {seed}"),
        source_run: format!("{rate} {seed}"),
        source_task: "mrpc".into(),
        source_method: method.into(),
        source_settings: format!("learning_rate={rate} epochs=3"),
        ..run("vanilla", seed, score)
    };
    let rows = [
        after("vanilla", "1e-3", 1, 0.4),
        after("vanilla", "3e-3", 1, 0.5),
        after("child_tuning_f", "1e-3", 1, 0.6),
        after("child_tuning_f", "3e-3", 1, 0.6),
    ];
    let comparison = compare(&rows);
    assert_eq!(
        labels(&comparison),
        [
            "vanilla>vanilla stage1.learning_rate=1e-3",
            "vanilla>vanilla stage1.learning_rate=3e-3",
            "child_tuning_f>vanilla stage1.learning_rate=1e-3",
            "child_tuning_f>vanilla stage1.learning_rate=3e-3"
        ]
    );
    let differences: Vec<_> =
        comparison.blocks[0].groups.iter().map(|group| group.difference.map(|own| own.mean)).collect();
    near(differences[2], 0.2);
    near(differences[3], 0.1);
}

#[test]
fn equal_means_are_equal_in_whatever_order_they_were_added() {
    let of = |method: &str, scores: [f64; 3]| {
        scores.into_iter().zip(1..).map(|(score, seed)| run(method, seed, score)).collect::<Vec<Row>>()
    };
    let rows = [
        of("vanilla", [0.1, 0.1, 0.1]),
        of("r3f", [0.6101, 0.5523, 0.7013]),
        of("r_drop", [0.7013, 0.5523, 0.6101]),
    ]
    .concat();
    let comparison = compare(&rows);
    let best: Vec<bool> = comparison.blocks[0].groups.iter().map(|group| group.has_best_mean).collect();
    assert_eq!(best, [false, true, true]);
    let text = comparison.to_text();
    assert!(text.lines().any(|line| line.starts_with("r3f: ")), "the first of equals: {text}");
}

#[test]
fn a_difference_of_nothing_has_no_sign_and_repeated_seeds_are_the_reason_given() {
    let rows = [
        run("vanilla", 1, 0.5),
        run("vanilla", 2, 0.6),
        run("r3f", 1, 0.5 - 1e-6),
        run("r3f", 2, 0.6 + 1e-9),
    ];
    let text = compare(&rows).to_text();
    assert!(text.contains("+0.00") && !text.contains("-0.00"), "{text}");
    let twice =
        [run("vanilla", 1, 0.5), run("r3f", 1, 0.5), Row { run: "other".into(), ..run("r3f", 1, 0.6) }];
    let text = compare(&twice).to_text();
    assert!(text.contains("no difference from vanilla: seeds have more than one run in a group"), "{text}");
}
