//! Every family from vocabulary to predictions: trained, saved, and predicted with, here and by transformers.

use child_tuning::data::TokenEncoder;
use child_tuning::model::{Classifier, FAMILIES, Labels};
use child_tuning::verify::family_config;
use serde_json::{Value, json};
use tch::Device;

use crate::interpreter::python_with;
use crate::support::{Workplace, project};

/// The files of each family's tokenizer among the fixtures.
const TOKENIZERS: &[(&str, &[&str])] = &[
    ("bert", &["tokenizers/vocab.txt"]),
    ("distilbert", &["tokenizers/vocab.txt"]),
    ("electra", &["tokenizers/vocab.txt"]),
    ("roberta", &["tokenizers/vocab.json", "tokenizers/merges.txt"]),
    ("deberta-v2", &["tokenizers/spm.model"]),
    ("modernbert", &["bert_pair/tokenizer.json", "bert_pair/tokenizer_config.json"]),
    ("xlnet", &["tokenizers/spiece.model"]),
];

/// Makes a folder with a family's tokenizer and a model with random weights.
fn make_model(workplace: &Workplace, family: &str, files: &[&str]) {
    for file in files.iter().map(|file| project("tests/fixtures").join(file)) {
        let name = file.file_name().unwrap().to_str().unwrap();
        workplace.write(&format!("start/{name}"), std::fs::read(&file).unwrap());
    }
    workplace.write("start/config.json", json!({"model_type": family}).to_string());
    let encoder = TokenEncoder::from_folder(&workplace.path("start")).unwrap();
    let config = family_config(family, encoder.vocabulary_size() as u32, [0.1; 2]);
    let labels = Labels::Classes(vec!["a".into(), "b".into(), "c".into()]);
    let mut model = Classifier::untrained(config, labels, Device::Cpu).unwrap();
    model.reset(1).unwrap();
    model.save(&workplace.path("start"), &encoder).unwrap();
}

/// Loads folders and computes the logits of the examples in a file, a line of JSON for each folder.
const REFERENCE: &str = "
import inspect, json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
pairs = [line.rstrip('\\n').split('\\t')[1:3] for line in open(sys.argv[1], encoding='utf-8')][1:]
model, info = AutoModelForSequenceClassification.from_pretrained(sys.argv[2], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
known = inspect.signature(model.forward).parameters
def logits_of(pair):
    # XLNet's tokenizer leaves token types out in transformers 5 unless it is asked for them.
    tokens = tokenizer(*pair, truncation=True, max_length=40, return_tensors='pt', return_token_type_ids=True)
    return model.eval()(**{name: values for name, values in tokens.items() if name in known}).logits[0].tolist()
with torch.no_grad():
    logits = [logits_of(pair) for pair in pairs]
bad = sum((sorted(map(str, info[kind])) for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), [])
print(json.dumps({'logits': logits, 'bad_keys': bad}))
";

/// Asks transformers; `None`, with the reason printed, where it or what it reads vocabularies with is not installed.
fn transformers(workplace: &Workplace, examples: &str, folder: &str) -> Option<Value> {
    let mut command = python_with("transformers, sentencepiece, google.protobuf")?;
    command.args(["-c", REFERENCE, examples, folder]).current_dir(workplace.path("."));
    let output = command.env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(output.status.success(), "{folder}: {}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn every_family_trains_from_its_own_vocabulary_and_predicts_what_transformers_does() {
    assert_eq!(TOKENIZERS.len(), FAMILIES.len());
    for (name, files) in TOKENIZERS {
        let workplace = Workplace::with_models(&[]);
        make_model(&workplace, name, files);
        workplace.experiment(
            "model: start\nmethod: [vanilla, child_tuning_f, {child_tuning_d: {p: 0.2}}]\nsave: saved\n\
             train: {epochs: 1, batch_size: 8, examples: 32, max_length: 40, learning_rate: 1e-3}",
        );
        workplace.run(&[]).with_code(0);
        let rows = workplace.rows("results.csv");
        assert_eq!(rows.len(), 3, "{name}");
        assert!(rows.iter().all(|row| row["status"] == "ok"), "{name}: {rows:?}");
        // Moments for the child network only.
        let bytes = |row: usize| rows[row]["optimizer_state_mb"].parse::<f64>().unwrap();
        assert!(bytes(2) < bytes(0), "{name}: {} and {}", bytes(2), bytes(0));

        let saved = format!("saved/{}", rows[2]["run"]);
        let data = project("data/RTE/dev.tsv");
        let examples: Vec<String> =
            std::fs::read_to_string(data).unwrap().lines().take(13).map(|line| format!("{line}\n")).collect();
        workplace.write("examples.tsv", examples.concat());
        let model = ["predict", "--model", &saved, "--task", "rte", "--input", "examples.tsv", "--logits"];
        let rest = ["--output", "predictions.csv", "--max-length", "40", "--threads", "1"];
        workplace.call(&[&model[..], &rest].concat()).with_code(0);
        let Some(reference) = transformers(&workplace, "examples.tsv", &saved) else { continue };
        assert_eq!(reference["bad_keys"], json!([]), "{name}");
        let predictions = workplace.rows("predictions.csv");
        assert_eq!(predictions.len(), 12);
        for (number, row) in predictions.iter().enumerate() {
            for (label, column) in ["logit_0", "logit_1"].into_iter().enumerate() {
                let expected = reference["logits"][number][label].as_f64().unwrap();
                let found: f64 = row[column].parse().unwrap();
                assert!((found - expected).abs() < 1e-5, "{name} {number}: {found} is not {expected}");
            }
        }
    }
}
