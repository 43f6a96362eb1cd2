//! Models that a run saved, and what `predict` makes of them.

use serde_json::{Value, json};

use crate::support::{Row, Workplace, number, project};

/// Trains one run, whose model is kept in `saved/`; returns its folder and its row.
fn saved(workplace: &Workplace, task: &str) -> (String, Row) {
    workplace.experiment(&format!("task: {task}\nsave: saved"));
    workplace.run(&["--set", "train.learning_rate=1e-3"]).with_code(0);
    let row = workplace.row("results.csv");
    (format!("saved/{}", row["run"]), row)
}

/// Predicts a file to `predictions.csv`.
fn predict(workplace: &Workplace, model: &str, task: &str, input: &str, further: &[&str]) -> Vec<Row> {
    let model = ["predict", "--model", model, "--task", task, "--input", input];
    let rest = ["--output", "predictions.csv", "--max-length", "32", "--threads", "1"];
    workplace.call(&[&model[..], &rest, further].concat()).with_code(0);
    let rows = workplace.rows("predictions.csv");
    for (index, row) in rows.iter().enumerate() {
        assert_eq!(row["index"], index.to_string());
    }
    rows
}

/// A miniature file, and the cells of one of its columns behind `skip` header rows.
fn gold(path: &str, column: usize, skip: usize) -> (String, Vec<String>) {
    let path = project("data").join(path);
    let text = std::fs::read_to_string(&path).unwrap();
    let cell = |line: &str| line.split('\t').nth(column).unwrap().to_owned();
    (path.to_str().unwrap().to_owned(), text.lines().skip(skip).map(cell).collect())
}

#[test]
fn what_has_ended_before_is_not_kept_and_a_model_is_not_written_over() {
    let workplace = Workplace::new();
    workplace.experiment("task: rte\n");
    workplace.run(&[]).with_code(0);
    let answer = workplace.run(&["--set", "save=saved"]).with_code(0);
    assert!(
        answer.stderr.contains("note: 1 runs that had ended before have no model in saved"),
        "{}",
        answer.stderr
    );
    let fixed = ["--set", "method=[vanilla, child_tuning_d]", "--set", "masks=null"];
    workplace.run(&fixed).with_code(0);
    let answer = workplace.run(&[&fixed[..2], &["--set", "masks=masks"]].concat()).with_code(0);
    assert!(
        answer.stderr.contains("note: 1 runs that had ended before have no mask in masks"),
        "{}",
        answer.stderr
    );
    let answer = workplace.run(&["--set", "save=saved", "--set", "results=other.csv"]).with_code(0);
    assert!(!answer.stderr.contains("have no model"), "{}", answer.stderr);

    // A metric that is asked for later.
    let custom =
        "task={custom: {name: own, train: train.csv, dev: train.csv, text: a, label: b, metrics: [METRICS]}}";
    workplace.write("train.csv", "a,b\n".to_owned() + &"one,x\ntwo,y\n".repeat(8));
    let with = |metrics: &str| {
        let task = custom.replace("METRICS", metrics);
        workplace.run(&["--set", &task, "--set", "results=own.csv"]).with_code(0)
    };
    let answer = with("accuracy");
    assert!(!answer.stderr.contains("have no"), "{}", answer.stderr);
    let answer = with("accuracy, f1, matthews");
    let note =
        "note: 1 runs that had ended before have no f1, matthews on own, which the task did not have then";
    assert!(answer.stderr.contains(note), "{}", answer.stderr);

    // Of trials none is kept, but of what they chose.
    let tuned = ["--set", "select={by: dev, on_seeds: [7, 8]}", "--set", "results=tuned.csv"];
    workplace.run(&tuned).with_code(0);
    let answer = workplace.run(&[&tuned[..], &["--set", "save=chosen"]].concat()).with_code(0);
    let note = "note: 1 runs that had ended before have no model in chosen";
    assert!(answer.stderr.contains(note), "{}", answer.stderr);

    let model = format!("saved/{}", workplace.row("other.csv")["run"]);
    let before = workplace.read(&format!("{model}/config.json"));
    let output = format!("{model}/config.json");
    let (input, _) = gold("RTE/test.tsv", 0, 1);
    let call = ["predict", "--model", &model, "--task", "rte", "--input", &input, "--output", &output];
    workplace.call(&call).refused(2, &["--output", "is the input"]);
    assert_eq!(workplace.read(&output), before);
}

#[test]
fn predictions_of_a_saved_classifier_reproduce_its_score() {
    let workplace = Workplace::new();
    let (folder, row) = saved(&workplace, "rte");
    let files = [
        "child_tuning.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ];
    assert_eq!(workplace.files(&folder), files);
    let config: Value = serde_json::from_str(&workplace.read(&format!("{folder}/config.json"))).unwrap();
    assert_eq!(config["id2label"], json!({"0": "entailment", "1": "not_entailment"}));
    assert_eq!(config["label2id"], json!({"entailment": 0, "not_entailment": 1}));
    assert_eq!(config["problem_type"], "single_label_classification");

    let (dev, labels) = gold("RTE/dev.tsv", 3, 1);
    let predictions = predict(&workplace, &folder, "rte", &dev, &["--logits"]);
    assert_eq!(predictions.len(), labels.len());
    let mut right = 0;
    for (prediction, label) in predictions.iter().zip(&labels) {
        assert_eq!(prediction.len(), 4, "{prediction:?}");
        let first = number(prediction, "logit_0") >= number(prediction, "logit_1");
        assert_eq!(prediction["prediction"], if first { "entailment" } else { "not_entailment" });
        right += usize::from(prediction["prediction"] == *label);
    }
    assert_eq!(number(&row, "score"), right as f64 / labels.len() as f64);
    let different: std::collections::HashSet<&str> =
        predictions.iter().map(|row| row["logit_0"].as_str()).collect();
    assert!(different.len() > 100, "examples are told apart: {}", different.len());

    // Without --logits and without labels: the test file.
    let predictions = predict(&workplace, &folder, "rte", &gold("RTE/test.tsv", 0, 1).0, &[]);
    assert_eq!(workplace.read("predictions.csv").lines().next(), Some("index,prediction"));
    assert_eq!(predictions.len(), 40);

    let input = gold("RTE/test.tsv", 0, 1).0;
    let call = ["predict", "--model", &folder, "--task", "rte", "--input", &input, "--output", "-"];
    let answer =
        workplace.call(&[&call[..], &["--max-length", "32", "--threads", "1"]].concat()).with_code(0);
    assert_eq!(answer.stdout, workplace.read("predictions.csv"));
    assert!(!workplace.path("-").exists());
}

#[test]
fn predictions_of_a_saved_regression_reproduce_its_score() {
    let workplace = Workplace::new();
    let (folder, row) = saved(&workplace, "stsb");
    let config: Value = serde_json::from_str(&workplace.read(&format!("{folder}/config.json"))).unwrap();
    assert_eq!(
        (&config["id2label"], &config["problem_type"]),
        (&json!({"0": "LABEL_0"}), &json!("regression"))
    );

    let (dev, scores) = gold("STS-B/dev.tsv", 9, 1);
    let predictions = predict(&workplace, &folder, "stsb", &dev, &["--logits"]);
    assert!(predictions.iter().all(|row| row.len() == 3 && row["prediction"] == row["logit_0"]));
    let found: Vec<f64> = predictions.iter().map(|row| number(row, "prediction")).collect();
    let gold: Vec<f64> = scores.iter().map(|score| score.parse().unwrap()).collect();
    assert_eq!(found.len(), gold.len());
    let expected = correlation(&found, &gold);
    assert!((number(&row, "pearson") - expected).abs() < 1e-6, "{} is not {expected}", row["pearson"]);
}

/// Pearson's correlation.
fn correlation(left: &[f64], right: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let centred = |values: &[f64]| values.iter().map(|value| value - mean(values)).collect::<Vec<_>>();
    let product = |left: &[f64], right: &[f64]| left.iter().zip(right).map(|(a, b)| a * b).sum::<f64>();
    let (left, right) = (centred(left), centred(right));
    product(&left, &right) / (product(&left, &left) * product(&right, &right)).sqrt()
}

#[test]
fn quotation_marks_are_ordinary_characters() {
    let workplace = Workplace::with_models(&["bert_single"]);
    let (dev, sentences) = gold("CoLA/dev.tsv", 3, 0);
    let quoted = |sentence: &String| sentence.matches('"').count() % 2 == 1;
    assert!(sentences.iter().any(quoted), "the file has a quotation mark without its partner");
    assert_eq!(predict(&workplace, "bert_single", "cola", &dev, &[]).len(), sentences.len());

    // The same sentence is the same example, wherever a quotation mark stands before it.
    workplace.write(
        "sentences.tsv",
        "index\tsentence\n0\tthe cat sits\n1\ta 19\" mat\n2\tthe cat sits\n3\ta \"mat\n",
    );
    let logits = predict(&workplace, "bert_single", "cola", "sentences.tsv", &["--logits"]);
    assert_eq!((logits.len(), &logits[0]["logit_0"]), (4, &logits[2]["logit_0"]));
    assert_ne!(logits[0]["logit_0"], logits[1]["logit_0"]);
}

#[test]
fn labels_of_the_input_do_not_matter() {
    let workplace = Workplace::with_models(&["bert_single"]);
    workplace.write("known.tsv", "index\tsentence\tlabel\n0\tthe cat sits\t1\n1\ta mat\t0\n");
    workplace.write("unknown.tsv", "index\tsentence\tlabel\n0\tthe cat sits\t?\n1\ta mat\tgood\n");
    let [known, unknown] =
        ["known.tsv", "unknown.tsv"].map(|input| predict(&workplace, "bert_single", "cola", input, &[]));
    assert_eq!(known, unknown);
}

#[test]
fn every_row_has_an_answer() {
    let workplace = Workplace::with_models(&["bert_single"]);
    workplace.write("input.tsv", "index\tsentence\n0\tthe cat sits\n1\t\n2\t  \n3\ta mat\n");
    let rows = predict(&workplace, "bert_single", "cola", "input.tsv", &["--logits"]);
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[1]["logit_0"], rows[2]["logit_0"]);
}

#[test]
fn inputs_longer_than_the_model_are_refused() {
    let workplace = Workplace::with_models(&["bert_single"]);
    let test = gold("CoLA/test.tsv", 1, 1).0;
    let arguments =
        ["predict", "--model", "bert_single", "--task", "cola", "--input", &test, "--output", "out.csv"];
    workplace.call(&arguments).refused(2, &["max_length is 128", "positions for 40 tokens", "--max-length"]);
}

#[test]
fn a_model_without_a_head_for_the_task_is_refused() {
    let workplace = Workplace::with_models(&["bert_pair", "bert_single"]);
    let refused = |model: &str, task: &str, input: &str, code: i32, parts: &[&str]| {
        let model = ["predict", "--model", model, "--task", task, "--input", input];
        let rest = ["--output", "predictions.csv", "--max-length", "32"];
        workplace.call(&[&model[..], &rest].concat()).refused(code, parts);
        assert!(!workplace.path("predictions.csv").exists());
    };
    let dev = gold("RTE/dev.tsv", 3, 1).0;
    let own = "(its own are entailment, neutral, contradiction)";
    let pairs = gold("MRPC/dev.tsv", 0, 1).0;
    refused("bert_pair", "mrpc", &pairs, 2, &["bert_pair: has no head", "task mrpc", own, "fine-tune it"]);
    refused("bert_single", "rte", &dev, 2, &["bert_single: has no head", "task rte", "fine-tune it"]);
    refused("bert_single", "colla", &dev, 2, &["unknown task `colla`", "did you mean `cola`?"]);
    let foreign = gold("STS-B/dev.tsv", 9, 1).0;
    refused(
        "bert_single",
        "cola",
        &foreign,
        2,
        &["STS-B/dev.tsv:1: does not look like task `cola`", "sentence"],
    );
    refused("bert_single", "cola", "absent.tsv", 2, &["absent.tsv: there is no such file"]);
    refused("absent", "rte", &dev, 2, &["absent: no such model folder"]);
}
