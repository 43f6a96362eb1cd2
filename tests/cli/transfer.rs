//! Stages, further evaluations, starts from other runs: what goes beyond one task and its dev set.

use std::collections::{BTreeSet, HashMap};

use child_tuning::experiment::results::ResultsFile;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::support::{Row, Workplace, number};

/// A short source on MRPC and heads for two targets on its frozen encoder.
const STAGES: &str = "task: mrpc\nmethod: [vanilla, child_tuning_d: {p: 0.5}]\n\
    train: {epochs: 1, batch_size: 16, examples: 32, max_length: 32, learning_rate: 1e-3}\n\
    then: {freeze: encoder, task: [cola, stsb], train: {epochs: 2, learning_rate: 1e-2}}\n";

fn started<'t>(text: &'t str, what: &str) -> Vec<&'t str> {
    text.lines().filter(|line| line.contains(what) && line.ends_with(" steps")).collect()
}

#[test]
fn a_source_is_trained_once_and_its_encoder_stays_as_it_is() {
    let workplace = Workplace::new();
    workplace.experiment(&format!("{STAGES}save: kept\n"));
    let answer = workplace.run(&[]).with_code(0);
    assert_eq!(started(&answer.stderr, "] mrpc ").len(), 2, "{}", answer.stderr);
    let rows = workplace.rows("results.csv");
    assert_eq!(rows.len(), 2 * 3);
    for source in rows.iter().filter(|row| row["source_run"].is_empty()) {
        let targets: Vec<_> = rows.iter().filter(|row| row["source_run"] == source["run"]).collect();
        assert_eq!(targets.len(), 2);
        let before = workplace.tensors(&format!("kept/{}/model.safetensors", source["run"]));
        for target in targets {
            assert_eq!(
                (target["source_task"].as_str(), &target["source_method"]),
                ("mrpc", &source["method"])
            );
            assert_eq!((target["freeze"].as_str(), target["head"].as_str()), ("encoder", "fresh"));
            // Hidden size 32: one row an output and its bias.
            let outputs = if target["task"] == "stsb" { 1 } else { 2 };
            assert_eq!(target["trainable_parameters"], (33 * outputs).to_string());
            let after = workplace.tensors(&format!("kept/{}/model.safetensors", target["run"]));
            let (body, head): (Vec<_>, Vec<_>) = after.keys().partition(|name| name.starts_with("bert."));
            assert_eq!(head.len(), 2);
            assert!(body.iter().all(|name| before[*name] == after[*name]), "an encoder tensor changed");
        }
    }

    // Weights that the run did not leave there are not taken for its own, and nothing is written over them.
    let sources: Vec<&str> =
        rows.iter().filter(|row| row["source_run"].is_empty()).map(|row| row["run"].as_str()).collect();
    let [own, other] = [0, 1].map(|place| format!("kept/{}/model.safetensors", sources[place]));
    let whole = std::fs::read(workplace.path(&own)).unwrap();
    for foreign in [std::fs::read(workplace.path(&other)).unwrap(), whole[..whole.len() / 2].to_vec()] {
        workplace.write(&own, &foreign);
        let answer = workplace.run(&["--set", "then.task=qnli"]).with_code(1);
        assert!(answer.stdout.contains("1 diverged or failed"), "{}", answer.stdout);
        let failed: Vec<Row> =
            workplace.rows("results.csv").into_iter().filter(|row| row["status"] == "failed").collect();
        assert_eq!(failed.len(), 1);
        assert!(
            failed[0]["reason"]
                .contains("has other weights or another config than this run left there; remove the folder"),
            "{}",
            failed[0]["reason"]
        );
        assert_eq!(std::fs::read(workplace.path(&own)).unwrap(), foreign);
    }
    workplace.write(&own, &whole);

    // Another target later: the sources that were kept are not trained again.
    let again = workplace.run(&["--set", "then.task=[cola, stsb, rte]"]).with_code(0);
    assert!(started(&again.stderr, "] mrpc ").is_empty() && !again.stderr.contains("trained again"));
    assert_eq!(started(&again.stderr, " rte ").len(), 2, "{}", again.stderr);
}

#[test]
fn a_source_that_another_process_needs_is_left_to_it() {
    let workplace = Workplace::new();
    workplace.experiment(STAGES);
    workplace.run(&["--only", "task=cola"]).with_code(0);
    let rows = workplace.rows("results.csv");
    let sources: BTreeSet<String> =
        rows.iter().filter(|row| row["task"] == "mrpc").map(|row| row["run"].clone()).collect();
    std::fs::remove_file(workplace.path("results.csv")).unwrap();
    // This process stands for one at work on the other target.
    let results = ResultsFile::open(workplace.path("results.csv")).unwrap();
    let needed = results.need_sources(sources.clone()).unwrap();
    workplace.run(&["--only", "task=cola"]).with_code(0);
    for source in &sources {
        assert!(workplace.path(&format!("results.csv.sources/{source}/model.safetensors")).exists());
    }
    let mut left = BTreeSet::new();
    results.release_sources(needed, |source| _ = left.insert(source.to_owned())).unwrap();
    assert_eq!(left, sources);
    // The next process that needs them takes them as they are, and clears up.
    let answer = workplace.run(&["--only", "task=stsb"]).with_code(0);
    assert!(started(&answer.stderr, "] mrpc ").is_empty(), "{}", answer.stderr);
    assert!(!workplace.path("results.csv.sources").exists());
}

#[test]
fn weights_that_were_kept_for_targets_only_are_removed_and_made_again_when_needed() {
    let workplace = Workplace::new();
    workplace.experiment(STAGES);
    workplace.run(&["--only", "task=cola"]).with_code(0);
    assert!(!workplace.path("results.csv.sources").exists());
    let score = |task: &str| {
        let rows = workplace.rows("results.csv");
        rows.into_iter().filter(|row| row["task"] == task).map(|row| row["score"].clone()).collect::<Vec<_>>()
    };
    let (sources, targets) = (score("mrpc"), score("cola"));
    let answer = workplace.run(&[]).with_code(0);
    assert_eq!(answer.stderr.matches("is trained again").count(), 2, "{}", answer.stderr);
    assert_eq!((score("mrpc"), score("cola"), score("stsb").len()), (sources, targets, 2));
    // A seed's source is the same however often it is made: the same target comes out.
    let first = workplace.rows("results.csv");
    std::fs::remove_file(workplace.path("results.csv")).unwrap();
    workplace.run(&[]).with_code(0);
    let key = |row: &Row| (row["run"].clone(), row["score"].clone());
    let sorted = |rows: &[Row]| {
        let mut keys: Vec<_> = rows.iter().map(key).collect();
        keys.sort();
        keys
    };
    assert_eq!(sorted(&workplace.rows("results.csv")), sorted(&first));
}

#[test]
fn targets_of_a_source_without_weights_are_rows_that_say_why() {
    let workplace = Workplace::new();
    workplace.experiment(STAGES);
    let answer =
        workplace.run(&["--set", "train.learning_rate=1e30", "--only", "method=vanilla"]).with_code(1);
    let rows = workplace.rows("results.csv");
    assert_eq!(rows.len(), 3, "{}", answer.stderr);
    assert!(rows.iter().all(|row| row["status"] == "diverged" && row["score"].is_empty()));
    let source = &rows.iter().find(|row| row["task"] == "mrpc").unwrap()["run"];
    for target in rows.iter().filter(|row| row["task"] != "mrpc") {
        assert_eq!(target["reason"], format!("not trained: run {source} that it starts from diverged"));
    }
    workplace.run(&["--set", "train.learning_rate=1e30", "--only", "method=vanilla"]).with_code(1);
    assert_eq!(workplace.rows("results.csv").len(), 3);
}

#[test]
fn stages_may_follow_stages() {
    let workplace = Workplace::new();
    let then = "then: {task: rte, method: {child_tuning_f: {p: 0.5}}, then: {task: cola}}\n";
    workplace.experiment(&format!("task: mrpc\n{then}"));
    workplace.run(&[]).with_code(0);
    let row = &workplace.rows("results.csv")[2];
    assert_eq!((row["task"].as_str(), row["method"].as_str()), ("cola", "vanilla"));
    assert_eq!(
        (row["source_task"].as_str(), row["source_method"].as_str()),
        ("mrpc>rte", "vanilla>child_tuning_f")
    );
    let text = workplace.call(&["compare", "results.csv"]).with_code(0).stdout;
    assert!(text.contains("mrpc > rte > cola (dev)"), "{text}");
}

#[test]
fn a_run_is_scored_on_other_tasks_as_its_model_would_be() {
    let workplace = Workplace::new();
    let evaluate = "evaluate: [mnli, scitail, sick, rte, {task: snli, split: test}, snli]";
    workplace.experiment(&format!("task: snli\n{evaluate}\nsave: kept\n"));
    workplace.run(&[]).with_code(0);
    let rows = workplace.rows("results.csv");
    let places: Vec<_> = rows.iter().map(|row| format!("{} {}", row["evaluated_on"], row["split"])).collect();
    assert_eq!(places, ["snli dev", "mnli dev", "scitail dev", "sick dev", "rte dev", "snli test"]);
    assert!(rows.iter().all(|row| row["run"] == rows[0]["run"] && row["task"] == "snli"));

    // The kept model, scored by itself, gives the same numbers.
    let model = format!("kept/{}", rows[0]["run"]);
    let data = crate::support::project("data");
    let further = ["--data", data.to_str().unwrap(), "--max-length", "32", "--threads", "1"];
    for row in &rows {
        let (task, split) = (row["evaluated_on"].as_str(), row["split"].as_str());
        let call =
            [&["evaluate", "--model", &model, "--task", task, "--split", split][..], &further].concat();
        let text = workplace.call(&call).with_code(0).stdout;
        let values: HashMap<&str, f64> = text
            .lines()
            .skip(1)
            .map(|line| {
                let cells: Vec<&str> = line.split(',').collect();
                assert_eq!((cells[0], cells[1], cells[2]), (task, split, row["examples_evaluated"].as_str()));
                (cells[3], cells[4].parse().unwrap())
            })
            .collect();
        assert_eq!(values["accuracy"], number(row, "accuracy"), "{task} {split}");
        assert!((values["loss"] - number(row, "loss")).abs() < 1e-9, "{task} {split}");
    }
    // Names are looked at before anything is scored; what has been scored before data that cannot be read is told.
    let tasks = |tasks: &str| {
        let call =
            [&["evaluate", "--model", &model, "--task", tasks, "--split", "dev"][..], &further].concat();
        workplace.call(&call).with_code(2)
    };
    let answer = tasks("mnli,card.yaml");
    assert!(answer.stdout.is_empty() && answer.stderr.contains("card.yaml"), "{answer:?}");
    let answer = tasks("mnli,ax");
    assert!(
        answer.stdout.lines().count() >= 3 && answer.stderr.contains("`ax` has no dev data"),
        "{answer:?}"
    );

    // A further data set costs no second row of those that are there.
    workplace.run(&["--set", "evaluate=[mnli, qnli]"]).with_code(0);
    let rows = workplace.rows("results.csv");
    assert_eq!((rows.len(), rows[6]["evaluated_on"].as_str()), (7, "qnli"));
}

#[test]
fn what_cannot_be_compared_is_refused_before_anything_trains() {
    let workplace = Workplace::new();
    let cases = [
        (
            "task: stsb\nevaluate: rte\n",
            "a model of task `stsb` cannot be scored on `rte`: one predicts classes",
        ),
        (
            "task: cola\nevaluate: snli\n",
            "its label `unacceptable` is none of entailment, neutral, contradiction",
        ),
        (
            "task: rte\nevaluate: {task: rte, split: test}\n",
            "the test split of `rte` has no labels to score with",
        ),
        ("task: rte\nevaluate: {task: rte, spilt: test}\n", "unknown field `spilt`"),
        (
            "then: {freeze: encoder, task: cola, method: child_tuning_d}\n",
            "goes with vanilla, not with child_tuning_d",
        ),
        ("then: {task: cola}\nselect: {by: dev, on_seeds: 7}\n", "`select` and `then` exclude each other"),
        (
            "seeds: [1, 2]\nselect: {by: dev, on_seeds: [2, 3]}\n",
            "seed 2 would both choose the settings and be reported",
        ),
        ("init_from: nowhere\n", "nowhere: init_from: no such model folder"),
        (
            "task: rte\nevaluate: {task: namesake.yaml}\n",
            "evaluate: two data sets are called `rte`; give one of them another `name`",
        ),
    ];
    workplace.write("own/namesake.csv", "a,b,c\none,two,entailment\n");
    let card = "name: rte\ntext: [a, b]\nlabel: c\nlabels: [entailment, not_entailment]\ndev: namesake.csv\n";
    workplace.write("namesake.yaml", card);
    for (text, message) in cases {
        workplace.experiment(text);
        workplace.run(&[]).refused(2, &[message]);
        assert!(!workplace.path("results.csv").exists());
    }
}

#[test]
fn runs_start_from_those_of_another_experiment() {
    let workplace = Workplace::new();
    let text = "task: mrpc\nmethod: [vanilla, child_tuning_f]\nseeds: [1, 2]\nsave: kept\nresults: a.csv\n";
    workplace.experiment(text);
    workplace.run(&[]).with_code(0);
    let from = |columns: &str| {
        format!("task: cola\nseeds: [1, 2]\ninit_from: {{results: a.csv, models: kept{columns}}}\n")
    };
    workplace.experiment(&from(""));
    workplace
        .run(&[])
        .refused(2, &["init_from: a.csv: 2 runs (", "with seed=1; name further columns under `where:`"]);
    workplace.experiment(&from(", where: {metod: vanilla}"));
    workplace.run(&[]).refused(2, &["a.csv has no column `metod`; did you mean `method`?"]);
    workplace.experiment(&from(", where: {method: child_tuning_d}"));
    workplace.run(&[]).refused(2, &["no run of bert_pair that ended ok with method=child_tuning_d, seed=1"]);
    workplace.experiment(&from(", where: {method: child_tuning_f, epochs: 1}"));
    workplace.run(&["--set", "seeds=[1, 2]"]).with_code(0);
    let sources = workplace.rows("a.csv");
    for row in workplace.rows("results.csv") {
        let source = sources.iter().find(|source| source["run"] == row["source_run"]).unwrap();
        assert_eq!((&source["seed"], source["method"].as_str()), (&row["seed"], "child_tuning_f"));
        assert_eq!((row["source_task"].as_str(), &row["source_config"]), ("mrpc", &source["method_config"]));
    }
}

/// Neither what is kept in memory nor an id goes by weights alone.
#[test]
fn folders_of_equal_weights_have_configs_of_their_own() {
    let workplace = Workplace::new();
    workplace.copy_model("bert_pair", "other");
    let config: serde_json::Value = serde_json::from_str(&workplace.read("other/config.json")).unwrap();
    let mut changed = config.clone();
    changed["hidden_dropout_prob"] = 0.6.into();
    workplace.write("other/config.json", changed.to_string());
    let losses = |models: &str, results: &str| -> Vec<(String, String)> {
        let settings = [format!("model={models}"), format!("results={results}")];
        workplace.run(&["--set", &settings[0], "--set", &settings[1]]).with_code(0);
        workplace.rows(results).iter().map(|row| (row["run"].clone(), row["loss"].clone())).collect()
    };
    workplace.experiment("task: rte\n");
    let both = losses("[bert_pair, other]", "both.csv");
    assert_eq!(both[1], losses("other", "alone.csv")[0]);
    assert_ne!(both[0].1, both[1].1);

    // What starts from a folder trains with its config.
    workplace.experiment("task: rte\ninit_from: other\n");
    let answer = workplace.run(&["--set", "results=from.csv"]).with_code(0);
    let note = "init_from: other has other dropout than bert_pair, and runs train with it: ";
    let line = answer.stderr.lines().find(|line| line.contains(note));
    assert!(line.is_some_and(|line| line.contains("hidden_dropout_prob: 0.6")), "{}", answer.stderr);
    workplace.write("other/config.json", config.to_string());
    let answer = workplace.run(&["--set", "results=from.csv"]).with_code(0);
    assert!(
        !answer.stderr.contains("other dropout") && answer.stdout.contains("1 runs done"),
        "{}",
        answer.stdout
    );

    // Where trials choose the runs, too.
    workplace.write("other/config.json", changed.to_string());
    workplace.experiment("task: rte\ninit_from: other\nselect: {by: dev, on_seeds: 7}\n");
    let answer = workplace.call(&["plan", "experiment.yaml"]).with_code(0);
    assert!([&answer.stdout, &answer.stderr].iter().any(|text| text.contains(note)), "{}", answer.stderr);
}

/// Of each stage its own: what one leaves out is not taken from the stage before.
#[test]
fn more_examples_than_there_are_are_told_of_in_every_stage() {
    let workplace = Workplace::new();
    workplace.experiment(
        "task: rte\ntrain: {examples: 4, max_length: 32}\nthen: {task: mrpc, then: {task: cola, train: {examples: [5, 100000]}}}\n",
    );
    let answer = workplace.call(&["plan", "experiment.yaml"]).with_code(0);
    let said = format!("{}{}", answer.stdout, answer.stderr);
    let note = "`train.examples` asks for more than there are, and takes all: 100000 for the ";
    let line = said.lines().find(|line| line.contains(note)).expect("nothing is said");
    assert!(line.ends_with(" of cola"), "{line}");
}

#[test]
fn chains_are_named_whole_wherever_they_go_on() {
    let workplace = Workplace::new();
    let stages = "task: mrpc\nmethod: {child_tuning_f: {p: 0.5}}\nthen: {task: rte, method: vanilla}\n";
    workplace.experiment(&format!("{stages}save: kept\nresults: a.csv\n"));
    workplace.run(&[]).with_code(0);
    let from = "init_from: {results: a.csv, models: kept, where: {task: rte}}\n";
    workplace.experiment(&format!("task: cola\n{from}then: {{task: stsb}}\n"));
    workplace.run(&[]).with_code(0);
    let options = &workplace.rows("a.csv")[0]["method_config"];
    let rows = workplace.rows("results.csv");
    let names =
        |row: &Row| ["source_task", "source_method", "source_config"].map(|column| row[column].clone());
    assert_eq!(names(&rows[0]), ["mrpc>rte".into(), "child_tuning_f>vanilla".into(), format!("{options}>")]);
    assert_eq!(
        names(&rows[1]),
        ["mrpc>rte>cola".into(), "child_tuning_f>vanilla>vanilla".into(), format!("{options}>>")]
    );

    // A folder of unknown making stays known by its weights.
    workplace.experiment("task: cola\ninit_from: bert_pair\nthen: {task: stsb}\nresults: folder.csv\n");
    workplace.run(&[]).with_code(0);
    let rows = workplace.rows("folder.csv");
    assert_eq!(rows[1]["source_config"], format!("start={}", rows[0]["source_run"]));
}

#[test]
fn two_tasks_of_one_name_must_have_the_same_data() {
    let workplace = Workplace::new();
    let task = |file: &str| {
        format!("{{custom: {{name: claims, text: claim, label: verdict, train: {file}, dev: {file}}}}}")
    };
    workplace.write("a.csv", "claim,verdict\nsun,true\nrain,false\n");
    workplace.write("b.csv", "claim,verdict\nsnow,true\nwind,false\n");
    workplace.experiment(&format!("task: [{}, {}]\n", task("a.csv"), task("b.csv")));
    workplace.run(&[]).refused(2, &["task: two tasks with different data are called `claims`"]);
}

#[test]
fn wrong_training_labels_are_counted_and_do_harm() {
    let workplace = Workplace::new();
    workplace.experiment(
        "train: {epochs: 1, batch_size: 16, max_length: 32, examples: 64, label_noise: [0, 0.5]}",
    );
    workplace.run(&[]).with_code(0);
    let rows = workplace.rows("results.csv");
    assert_eq!([&rows[0]["label_noise"], &rows[1]["label_noise"]], ["0.0", "0.5"]);
    assert_ne!(rows[0]["loss"], rows[1]["loss"]);
    workplace
        .run(&["--set", "train.label_noise=1"])
        .refused(2, &["label_noise", "at least 0 and below 1, not 1"]);
}

#[test]
fn a_model_that_numbers_its_labels_otherwise_is_scored_by_name() {
    let workplace = Workplace::new();
    workplace.copy_model("bert_pair", "permuted");
    // Label 0 becomes 2, 1 becomes 0, 2 becomes 1, in the config and in the rows of the head.
    let order = [1, 2, 0];
    let names = ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"];
    let mut config: serde_json::Value =
        serde_json::from_str(&workplace.read("permuted/config.json")).unwrap();
    for (id, old) in order.into_iter().enumerate() {
        config["id2label"][id.to_string()] = names[old].into();
    }
    workplace.write("permuted/config.json", config.to_string());
    let bytes = std::fs::read(workplace.path("permuted/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let permuted: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(name, view)| {
            let rows: Vec<&[u8]> = view.data().chunks(view.data().len() / view.shape()[0]).collect();
            let data = match name.starts_with("classifier.") {
                true => order.map(|row| rows[row]).concat(),
                false => view.data().to_vec(),
            };
            (name.to_owned(), view.shape().to_vec(), data)
        })
        .collect();
    let views = permuted.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    workplace.write("permuted/model.safetensors", safetensors::serialize(views, None).unwrap());

    let data = crate::support::project("data");
    let output = |model: &str| {
        let tasks =
            ["--task", "snli,mnli,scitail,rte", "--data", data.to_str().unwrap(), "--max-length", "32"];
        let scores =
            workplace.call(&[&["evaluate", "--model", model][..], &tasks].concat()).with_code(0).stdout;
        let input = data.join("SciTail/tsv_format/scitail_1.0_dev.tsv");
        let files = ["--input", input.to_str().unwrap(), "--output", "p.csv", "--max-length", "32"];
        let predict = [&["predict", "--model", model, "--task", "scitail", "--logits"][..], &files].concat();
        workplace.call(&predict).with_code(0);
        (scores, workplace.read("p.csv"))
    };
    let (scores, predictions) = output("permuted");
    assert_eq!((&scores, &predictions), (&output("bert_pair").0, &output("bert_pair").1));
    assert_eq!(scores.lines().count(), 1 + 4 * 2);
    assert!(predictions.contains(",entails,") && predictions.contains(",neutral,"), "one class only");

    // Training goes on from its head, which is kept in the task's order.
    workplace.experiment("model: [bert_pair, permuted]\ntask: snli\n");
    workplace.run(&[]).with_code(0);
    let scores = workplace.column("results.csv", "loss");
    assert_eq!(scores[0], scores[1]);
}

#[test]
fn settings_of_a_source_are_in_the_rows_of_its_targets() {
    let workplace = Workplace::new();
    let stages =
        STAGES.replace("learning_rate: 1e-3", "learning_rate: [1e-3, 3e-3]").replace("[cola, stsb]", "cola");
    workplace.experiment(&stages);
    workplace.run(&[]).with_code(0);
    let rows = workplace.rows("results.csv");
    let targets: Vec<&Row> = rows.iter().filter(|row| row["task"] == "cola").collect();
    assert_eq!(targets.len(), 4);
    for target in targets {
        let source = rows.iter().find(|row| row["run"] == target["source_run"]).unwrap();
        let settings: Vec<&str> = target["source_settings"].split(' ').collect();
        for column in ["learning_rate", "batch_size", "label_noise", "freeze", "examples_train"] {
            let value = match source[column].as_str() {
                "0.0" => "0",
                value => value,
            };
            assert!(settings.contains(&format!("{column}={value}").as_str()), "{column}: {settings:?}");
        }
    }
    let text = workplace.call(&["compare", "results.csv"]).with_code(0).stdout;
    assert!(text.contains("vanilla>vanilla  stage1.learning_rate=0.001"), "{text}");
    assert_eq!(text.matches(": difference from vanilla").count(), 2, "one for each task: {text}");
}
