//! Experiments and command lines that ask for something impossible are refused before anything runs.

use crate::support::Workplace;

/// Runs an experiment that must be refused and must not have started anything.
fn refused(text: &str, further: &[&str], code: i32, parts: &[&str]) {
    let workplace = Workplace::new();
    workplace.experiment(text);
    workplace.run(further).refused(code, parts);
    assert_eq!(workplace.files("."), ["bert_pair", "experiment.yaml"], "{text} {further:?}");
}

#[test]
fn a_misspelt_key_is_shown_with_its_place_and_the_nearest_spelling() {
    let key = "train:\n  epochs: 1\n  learning_rat: 1e-4";
    refused(key, &[], 2, &["experiment.yaml:3:3: ", "`learning_rat`", "did you mean `learning_rate`?"]);
    refused("trian: {epochs: 1}", &[], 2, &["experiment.yaml:1:1: ", "`trian`", "did you mean `train`?"]);
}

#[test]
fn a_share_outside_its_range_is_refused() {
    let zero = ["experiment.yaml:1:31: ", "child_tuning_d.p", "above 0 and at most 1, not 0"];
    refused("method: [{child_tuning_d: {p: 0}}]", &[], 2, &zero);
    let large = ["experiment.yaml:1:31: ", "child_tuning_f.p", "above 0 and at most 1, not 1.5"];
    refused("method: [{child_tuning_f: {p: 1.5}}]", &[], 2, &large);
}

#[test]
fn unknown_names_come_with_the_nearest_known_one() {
    refused("method: vanila", &[], 2, &["experiment.yaml:1:9: ", "`vanila`", "did you mean `vanilla`?"]);
    let task = ["experiment.yaml: ", "task `rt`", "did you mean `rte`?", "cola, rte, mrpc, stsb"];
    refused("task: rt", &[], 2, &task);
    refused("preset: offical", &[], 2, &["experiment.yaml:1:9: ", "`offical`", "did you mean `official`?"]);
    let key = ["model_config", "`hidden_dropout_prop`", "did you mean `hidden_dropout_prob`?"];
    refused("model_config: {hidden_dropout_prop: 0}", &[], 2, &key);
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let micro_batch = "train: {batch_size: 8, micro_batch: 16}";
    refused(micro_batch, &[], 2, &["experiment.yaml: ", "train.micro_batch 16", "train.batch_size 8"]);
    let twice = ["experiment.yaml: ", "same run twice", "rte vanilla", "seed 1", "remove the repeated entry"];
    refused("method: [vanilla, vanilla]", &[], 2, &twice);
    refused("task: [rte, RTE]", &[], 2, &twice);
    refused("seeds: [3, 3]", &[], 2, &["experiment.yaml:1:", "seed 3", "twice"]);
    let all = ["same run twice", "`train.examples: 1000` is all of the 320 that there are"];
    refused("train: {examples: [500, 1000], max_length: 32}", &[], 2, &all);
}

#[test]
fn places_that_can_be_none_are_refused_before_anything_trains() {
    for (text, message) in [
        ("save: \"\"", "save: is empty; name a place, or leave the key out"),
        ("results: \"\"", "results: is empty"),
        ("results: bert_pair", "results: bert_pair is a folder; name a file"),
        ("masks: experiment.yaml", "masks: experiment.yaml is a file; name a folder"),
        ("results: a.csv\nsave: a.csv", "save: a.csv is the `results` file; name a folder"),
    ] {
        refused(text, &[], 2, &["experiment.yaml: ", message]);
    }
}

#[test]
fn a_file_is_no_folder_to_write_to() {
    let workplace = Workplace::new();
    workplace.experiment("method: child_tuning_d");
    for command in [
        &["child", "compute", "experiment.yaml"][..],
        &["export", "--model", "bert_pair", "--task", "rte"],
        &["report", "results.csv"],
    ] {
        let call = [command, &["--output", "experiment.yaml"]].concat();
        workplace.call(&call).refused(2, &["--output experiment.yaml is a file; name a folder"]);
    }
}

#[test]
fn what_json_has_no_word_for_overrides_no_config() {
    for number in [".nan", ".inf", "-.inf"] {
        let text = format!("model_config: {{hidden_dropout_prob: {number}}}");
        refused(
            &text,
            &[],
            2,
            &["experiment.yaml:1:", "model_config: hidden_dropout_prob: expected a finite number"],
        );
    }
}

#[test]
fn a_model_without_dropout_is_refused_where_nothing_else_tells_passes_apart() {
    let without = "model_config: {hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}\nmethod: ";
    let parts = ["r_drop", "dropout", "`model_config: {", "hidden_dropout_prob"];
    refused(&format!("{without}[r_drop]"), &[], 2, &parts);
    refused(&format!("{without}[[r_drop, child_tuning_f]]"), &[], 2, &parts);
    let workplace = Workplace::new();
    for accepted in ["[vanilla, r3f, r_drop: {alpha: 0}]", "[[r_drop: {alpha: 0}, bitfit]]"] {
        workplace.experiment(&format!("{without}{accepted}"));
        workplace.call(&["plan", "experiment.yaml"]).with_code(0);
    }
}

#[test]
fn options_of_methods_that_contradict_each_other_are_refused() {
    let refuse = |method: &str, parts: &[&str]| refused(&format!("method: [{{{method}}}]"), &[], 2, parts);
    refuse(
        "child_tuning_d: {mask: {choose: lowest, threshold: percentile}}",
        &["experiment.yaml: ", "`mask.choose: lowest`", "`percentile`"],
    );
    refuse(
        "child_tuning_d: {mask: {choose: random}, fisher: {estimator: batch}}",
        &["`mask.choose: random`", "remove `fisher`"],
    );
    refuse("child_tuning_d: {mask: {choose: lowst}}", &["experiment.yaml:1:", "did you mean `lowest`?"]);
    refuse("child_tuning_d: {outside: prone}", &["experiment.yaml:1:", "did you mean `prune`?"]);
    refuse(
        "vanilla: {learning_rate_factor: 0}",
        &["learning_rate_factor", "a number above 0 that float32 can hold, not 0"],
    );
    refuse("vanilla: {learning_rate: 1}", &["`learning_rate`", "did you mean `learning_rate_factor`?"]);
    refused("train: {optimizer: adam}", &[], 2, &["experiment.yaml:1:", "did you mean `adamw`?"]);
}

#[test]
fn places_that_are_no_files_and_grids_that_nobody_means_are_refused() {
    refused("results: /dev/null", &[], 2, &["results: /dev/null", "neither a file nor a folder"]);
    refused("results: ~/results.csv", &[], 2, &["results: ~/results.csv", "only a shell"]);
    let numbers = |count: usize| (1..=count).map(|number| number.to_string()).collect::<Vec<_>>().join(", ");
    let many = numbers(1000);
    let train = format!("train: {{max_length: 32, batch_size: [{many}], epochs: [{many}]}}");
    refused(&train, &[], 2, &["experiment.yaml: ", "more than 100000 settings"]);
    let train = format!("train: {{max_length: 32, batch_size: [{many}]}}\nseeds: [{}]", numbers(1001));
    refused(&train, &[], 2, &["experiment.yaml: ", "more than 1000000 runs"]);
    let stages = format!("seeds: [{many}]\nthen: {{task: mrpc, train: {{batch_size: [{}]}}}}", numbers(1001));
    refused(&stages, &[], 2, &["experiment.yaml: ", "more than 1000000 runs"]);
    let trials =
        format!("train: {{batch_size: [{many}]}}\nselect: {{by: dev, on_seeds: [{}]}}", numbers(1001));
    refused(&trials, &[], 2, &["experiment.yaml: ", "more than 1000000 runs"]);
}

#[test]
fn a_key_that_is_there_twice_is_refused_where_it_comes_again() {
    refused(
        "task: rte\nmethod: vanilla\ntask: cola",
        &[],
        2,
        &["experiment.yaml:3:1: duplicate field `task`"],
    );
    let twice = "model_config: {hidden_dropout_prob: 0.0, hidden_dropout_prob: 0.1}";
    refused(twice, &[], 2, &["experiment.yaml:1:", "duplicate field `hidden_dropout_prob`"]);
}

#[test]
fn a_missing_experiment_is_named() {
    Workplace::new().call(&["run", "absent.yaml"]).refused(2, &["experiment absent.yaml", "No such file"]);
}

#[test]
fn bad_overrides_are_refused() {
    let misspelt = ["--set train.epoch=2: ", "`epoch`", "did you mean `epochs`?"];
    refused("", &["--set", "train.epoch=2"], 2, &misspelt);
    refused("", &["--set", "train.epochs.a=2"], 2, &["--set train.epochs.a=2: ", "`a`"]);
    let position = ["--set method.3=vanilla: ", "`3` is not an index into a list of 1"];
    refused("method: [vanilla]", &["--set", "method.3=vanilla"], 2, &position);
}

#[test]
fn a_choice_that_leaves_no_run_is_refused() {
    refused("", &["--only", "sed=1"], 2, &["--only", "`sed`", "did you mean `seed`?"]);
    refused("", &["--only", "seed=9"], 2, &["experiment.yaml: ", "--only seed=9 leaves no run"]);
}

#[test]
fn a_device_that_is_not_there_is_refused() {
    refused("", &["--device", "gpu"], 2, &["`gpu`", "cpu, cuda, or cuda:1"]);
    if std::process::Command::new("nvidia-smi").output().is_ok_and(|output| output.status.success()) {
        println!("skipped: this machine has a graphics card");
        return;
    }
    refused("", &["--device", "cuda"], 3, &["no CUDA device", "leave --device out", "doctor"]);
}

/// Arguments that do not parse: the parser says what is wrong in its first line and points to the help.
#[test]
fn arguments_that_do_not_parse_are_refused() {
    let workplace = Workplace::new();
    workplace.experiment("");
    let refused = |arguments: &[&str], parts: &[&str]| {
        let answer = workplace.call(arguments).with_code(2);
        assert!(answer.stdout.is_empty() && answer.stderr.starts_with("error: "), "{answer:?}");
        for part in parts.iter().chain(&["--help"]) {
            assert!(answer.stderr.contains(part), "`{part}` is not in: {}", answer.stderr);
        }
    };
    let run = ["run", "experiment.yaml"];
    let no_value = ["`train.epochs` has no `=`", "train.epochs=2"];
    refused(&[&run[..], &["--set", "train.epochs"]].concat(), &no_value);
    let nothing = ["`seeds=` has no value", "`seeds=null` sets the key to nothing"];
    refused(&[&run[..], &["--set", "seeds="]].concat(), &nothing);
    refused(&[&run[..], &["--only", "rte"]].concat(), &["`rte` has no `=`", "task=rte"]);
    refused(&[&run[..], &["--threads", "0"]].concat(), &["'--threads <N>'", "0 is not in 1.."]);
    refused(&["run"], &["EXPERIMENT.yaml"]);
    refused(&["rum", "experiment.yaml"], &["'rum'", "'run'"]);
    refused(&["compare", "results.csv", "--format", "html"], &["text, markdown, csv"]);
    refused(&["child", "overlap", "only.safetensors"], &["MASK.safetensors"]);
    assert_eq!(workplace.files("."), ["bert_pair", "experiment.yaml"]);
}

#[test]
fn every_command_has_help_that_names_its_options() {
    let workplace = Workplace::with_models(&[]);
    let experiment = ["EXPERIMENT.yaml", "--set", "--only", "--data"];
    let compute = ["--device", "--threads"];
    let cases: [(&[&str], &[&str]); 14] = [
        (&[], &["run", "plan", "compare", "predict", "child", "export", "doctor", "Exit codes"]),
        (&["run"], &[&experiment[..], &compute].concat()),
        (&["plan"], &experiment),
        (&["compare"], &["RESULTS.csv", "--format"]),
        (&["report"], &["RESULTS.csv", "--output"]),
        (&["model", "inspect"], &["MODEL", "--task", "--tensors"]),
        (&["predict"], &["--model", "--task", "--input", "--output", "--max-length", "--logits", "--device"]),
        (&["child"], &["compute", "inspect", "overlap", "variance"]),
        (&["child", "compute"], &[&experiment[..], &compute, &["--output"]].concat()),
        (&["child", "inspect"], &["MASK.safetensors", "--tensors"]),
        (&["child", "overlap"], &["MASK.safetensors", "--output", "--by"]),
        (&["child", "variance"], &[&experiment[..], &compute, &["--draws", "--output"]].concat()),
        (&["export"], &["--model", "--output", "--task", "--seed"]),
        (&["doctor"], &["--data", "--models"]),
    ];
    for (command, options) in cases {
        let help = workplace.call(&[command, &["--help"]].concat()).with_code(0);
        assert_eq!(help.stderr, "");
        for option in options {
            assert!(help.stdout.contains(option), "{command:?}: `{option}` is not in\n{}", help.stdout);
        }
    }
}

#[test]
fn gradients_that_choose_a_child_network_are_not_released() {
    let train = "train: {release_gradients: true, max_gradient_norm: 0}";
    let keys = ["train.release_gradients", "the method has more than one use for them"];
    refused(&format!("{train}\nmethod: [dps: {{dropout: true}}]"), &[], 2, &keys);
}

#[test]
fn what_cannot_be_recorded_is_refused_with_the_key_to_change() {
    for (settings, sentence) in [
        ("", "only in bf16 do many batches have one shape: set `train.precision: bf16`"),
        (
            "precision: bf16, batch_size: 8, micro_batch: 4",
            "only passes over whole batches are recorded: leave `train.micro_batch` out",
        ),
        (
            "precision: bf16, gradient_checkpointing: true",
            "which no record can: leave `train.gradient_checkpointing` out",
        ),
        (
            "precision: bf16, release_gradients: true, max_gradient_norm: 0",
            "the optimizer steps are not recorded: leave `train.release_gradients` out",
        ),
    ] {
        let lines = format!("train: {{cuda_graphs: true, {settings}}}");
        refused(&lines, &[], 2, &["train.cuda_graphs: ", sentence]);
    }
    let set = ["--set", "method=r_drop", "--set", "train.precision=bf16"];
    let sentence =
        "train.cuda_graphs: r_drop has other passes than plain fine-tuning, and only those are recorded";
    refused("train: {cuda_graphs: true}", &set, 2, &[sentence]);
}
