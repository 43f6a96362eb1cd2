//! `export`: folders that transformers loads, from checkpoints in any of their usual forms; and `model inspect`.

use std::process::Command;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

use crate::interpreter::python_with;
use crate::support::Workplace;

const SENTENCES: [&str; 3] =
    ["the cat sits on the mat.", "dogs, sitting?", "a small model reads two sentences near it"];

/// Loads a folder and prints what did not fit, and the logits of the sentences.
const REFERENCE: &str = "
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, sentences = sys.argv[1], sys.argv[2:]
model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = [model.eval()(**tokenizer(text, return_tensors='pt')).logits[0].tolist() for text in sentences]
print(json.dumps({
    'bad_keys': sum((sorted(map(str, info[kind])) for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), []),
    'labels': [model.config.id2label[number] for number in range(model.config.num_labels)],
    'logits': logits,
}))
";

/// Asks transformers; `None`, with the reason printed, where it is not installed.
fn transformers(workplace: &Workplace, folder: &str) -> Option<Value> {
    let mut command = python_with("transformers")?;
    command.args(["-c", REFERENCE, folder]).args(SENTENCES).current_dir(workplace.path("."));
    let output = command.env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// The logits of the sentences by this program.
fn predicted(workplace: &Workplace, folder: &str) -> Vec<[f64; 2]> {
    let lines: Vec<String> =
        SENTENCES.iter().enumerate().map(|(id, text)| format!("{id}\t{text}\n")).collect();
    workplace.write("sentences.tsv", format!("index\tsentence\n{}", lines.concat()));
    let model = ["predict", "--model", folder, "--task", "cola", "--input", "sentences.tsv"];
    let rest = ["--output", "predictions.csv", "--max-length", "32", "--threads", "1", "--logits"];
    workplace.call(&[&model[..], &rest].concat()).with_code(0);
    let rows = workplace.rows("predictions.csv");
    rows.iter().map(|row| ["logit_0", "logit_1"].map(|column| row[column].parse().unwrap())).collect()
}

/// A tokenizer.json that stayed would be read before all else.
#[test]
fn nothing_of_another_models_tokenizer_stays_in_a_folder() {
    let workplace = Workplace::with_models(&["bert_single", "bert_pair"]);
    std::fs::remove_file(workplace.path("bert_pair/tokenizer.json")).unwrap();
    for model in ["bert_single", "bert_pair"] {
        workplace.call(&["export", "--model", model, "--output", "exported"]).with_code(0);
    }
    workplace.call(&["export", "--model", "bert_pair", "--output", "fresh"]).with_code(0);
    assert_eq!(workplace.files("exported"), workplace.files("fresh"));
}

#[test]
fn transformers_computes_the_same_logits_from_an_exported_folder() {
    let workplace = Workplace::with_models(&["bert_single"]);
    workplace.call(&["export", "--model", "bert_single", "--output", "exported"]).with_code(0);
    let logits = predicted(&workplace, "exported");
    assert_eq!(logits, predicted(&workplace, "bert_single"));
    let Some(reference) = transformers(&workplace, "exported") else { return };
    assert_eq!(reference["bad_keys"], serde_json::json!([]));
    assert_eq!(reference["labels"], serde_json::json!(["unacceptable", "acceptable"]));
    for (example, logits) in logits.iter().enumerate() {
        for (label, found) in logits.iter().enumerate() {
            let expected = reference["logits"][example][label].as_f64().unwrap();
            assert!(
                (found - expected).abs() < 1e-5,
                "sentence {example}, label {label}: {found} is not {expected}"
            );
        }
    }
}

/// Writes a model's weights anew, each under the name that is made of its own, where there is one.
fn rename(workplace: &Workplace, weights: &str, further: &[&str], name: impl Fn(&str) -> Option<String>) {
    let bytes = std::fs::read(workplace.path(weights)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let zeros = [0u8; 16];
    let mut tensors: Vec<(String, TensorView)> =
        file.iter().filter_map(|(old, view)| Some((name(old)?, view))).collect();
    for name in further {
        tensors.push(((*name).to_owned(), TensorView::new(Dtype::F32, vec![4], &zeros).unwrap()));
    }
    workplace.write(weights, safetensors::serialize(tensors, None).unwrap());
}

#[test]
fn a_limit_of_file_sizes_is_an_error_and_leaves_nothing_in_part() {
    let workplace = Workplace::with_models(&["bert_pair"]);
    let program = assert_cmd::cargo::cargo_bin!("child-tuning");
    let script =
        format!("ulimit -f 16; exec {program:?} export --model bert_pair --task rte --output exported");
    let output = Command::new("sh").args(["-c", &script]).current_dir(workplace.path(".")).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.contains("error: cannot write exported/model.safetensors: ") && text.contains("File too large"),
        "{text}"
    );
    assert_eq!(workplace.files("exported"), ["config.json"]);
}

/// As checkpoints of DeBERTa are, and encoders that were saved without their pooler: what is new has to train, whatever a method
/// or the experiment keeps from training.
#[test]
fn a_pooler_that_the_checkpoint_lacks_trains_with_the_head() {
    let workplace = Workplace::with_models(&["bert_pair"]);
    rename(&workplace, "bert_pair/model.safetensors", &[], |name| {
        (!name.starts_with("bert.pooler.")).then(|| name.to_owned())
    });
    // A model that was fine-tuned has one, which counts as pretrained from there on, for plan and results alike.
    workplace.experiment("then: {task: cola, method: bitfit}");
    let plan = workplace.call(&["plan", "experiment.yaml"]).with_code(0).stdout;
    let planned = plan.lines().find(|line| line.starts_with(" bitfit")).unwrap();
    let planned = planned.split_whitespace().nth(2).unwrap().to_owned();
    workplace.run(&[]).with_code(0);
    assert_eq!(workplace.column("results.csv", "trainable_parameters").pop(), Some(planned));
    std::fs::remove_file(workplace.path("results.csv")).unwrap();
    let task = ["--task", "rte", "--seed", "1", "--output", "start"];
    workplace.call(&[&["export", "--model", "bert_pair"][..], &task].concat()).with_code(0);
    let start = workplace.tensors("start/model.safetensors");
    let (pooler, layer) = ("bert.pooler.dense.weight", "bert.encoder.layer.0.output.dense.weight");
    for (method, freeze) in [
        ("lora", "nothing"),
        ("bitfit", "nothing"),
        ("vanilla", "encoder"),
        ("{child_tuning_d: {p: 0.0001}}", "nothing"),
    ] {
        workplace.experiment(&format!("method: {method}\nfreeze: {freeze}\nsave: models"));
        let answer = workplace.run(&[]).with_code(0);
        let note = "bert_pair: has no pooler, so a new one trains with the head";
        assert!(answer.stderr.contains(note), "{}", answer.stderr);
        let run = workplace.column("results.csv", "run").pop().unwrap();
        let trained = workplace.tensors(&format!("models/{run}/model.safetensors"));
        assert_ne!(trained[pooler], start[pooler], "{method}");
        if freeze == "encoder" || method == "bitfit" {
            assert_eq!(trained[layer], start[layer], "{method}");
        }
    }
}

#[test]
fn a_checkpoint_of_the_bare_encoder_gets_a_new_head() {
    let workplace = Workplace::with_models(&["bert_single"]);
    let original = workplace.tensors("bert_single/model.safetensors");
    rename(&workplace, "bert_single/model.safetensors", &[], |name| {
        name.strip_prefix("bert.").map(str::to_owned)
    });
    let export = |seed: &str, output: &str| {
        let model =
            ["export", "--model", "bert_single", "--task", "cola", "--seed", seed, "--output", output];
        let answer = workplace.call(&model).with_code(0);
        assert!(
            answer.stderr.contains("new, from the seed: classifier.weight, classifier.bias"),
            "{}",
            answer.stderr
        );
        workplace.tensors(&format!("{output}/model.safetensors"))
    };
    let exported = export("1", "first");
    assert_eq!(exported.len(), original.len());
    for (name, bytes) in original.iter().filter(|(name, _)| name.starts_with("bert.")) {
        assert_eq!(exported[name], *bytes, "{name}");
    }
    assert_ne!(exported["classifier.weight"], original["classifier.weight"]);
    assert_eq!(exported, export("1", "again"));
    assert_ne!(exported["classifier.weight"], export("2", "other")["classifier.weight"]);
}

#[test]
fn heads_of_pretraining_are_left_out_and_named() {
    let workplace = Workplace::with_models(&["bert_single"]);
    let weights = "bert_single/model.safetensors";
    let original = workplace.tensors(weights);
    let further = ["cls.predictions.bias", "cls.seq_relationship.weight", "stray.weight"];
    rename(&workplace, weights, &further, |name| Some(name.to_owned()));
    let answer = workplace.call(&["export", "--model", "bert_single", "--output", "exported"]).with_code(0);
    for line in [
        "left out, of pretraining: cls.predictions.bias, cls.seq_relationship.weight\n",
        "left out, not used by the model: stray.weight\n",
    ] {
        assert!(answer.stderr.contains(line), "{}", answer.stderr);
    }
    assert!(!answer.stderr.contains("new, from the seed"), "{}", answer.stderr);
    assert_eq!(workplace.tensors("exported/model.safetensors"), original);
}

#[test]
fn what_a_model_is_left_without_is_said_once_whatever_trains() {
    let workplace = Workplace::new();
    let weights = "bert_pair/model.safetensors";
    rename(&workplace, weights, &["cls.predictions.bias", "lm_head.bias", "stray"], |name| {
        Some(name.to_owned())
    });
    workplace.experiment("task: [rte, mrpc]\nseeds: [1, 2]");
    let note = "note: bert_pair: left out 2 tensors of pretraining (such as cls.predictions.bias), and 1 tensors that the \
                model does not use (such as stray)\n";
    for further in [&[][..], &["--jobs", "2", "--set", "results=two.csv"]] {
        let answer = workplace.run(further).with_code(0);
        assert_eq!(answer.stderr.matches("left out").count(), 1, "{}", answer.stderr);
        assert!(answer.stderr.contains(note), "{}", answer.stderr);
    }
}

#[test]
fn exports_that_make_no_sense_are_refused() {
    let workplace = Workplace::with_models(&["bert_single"]);
    let before = workplace.tensors("bert_single/model.safetensors");
    let refused = |output: &str, code: i32, parts: &[&str]| {
        workplace.call(&["export", "--model", "bert_single", "--output", output]).refused(code, parts);
    };
    refused("bert_single", 2, &["--output is the folder of --model"]);
    refused("bert_single/config.json/below", 3, &["bert_single/config.json/below"]);
    workplace.edit("bert_single/config.json", "\"id2label\"", "\"id2name\"");
    workplace.edit("bert_single/config.json", "\"label2id\"", "\"name2id\"");
    refused("exported", 2, &["bert_single: ", "no labels in config.json", "--task"]);
    workplace.edit("bert_single/config.json", "\"id2name\"", "\"id2label\"");
    workplace.edit("bert_single/config.json", "\"0\":", "\"7\":");
    refused("exported", 2, &["config.json: `id2label` must name", "by the numbers from 0 on"]);
    assert_eq!(workplace.tensors("bert_single/model.safetensors"), before);
}

#[test]
fn inspecting_a_model_counts_its_weights_and_names_what_does_not_fit() {
    let workplace = Workplace::with_models(&["bert_single"]);
    let weights = "bert_single/model.safetensors";
    let all: usize = workplace.tensors(weights).values().map(|bytes| bytes.len() / 4).sum();
    let inspect = |further: &[&str]| {
        workplace.call(&[&["model", "inspect", "bert_single"], further].concat()).with_code(0).stdout
    };
    let last_of = |text: &str, start: &str| -> usize {
        let line = text.lines().find(|line| line.trim().starts_with(start)).unwrap();
        line.split_whitespace().last().unwrap().parse().unwrap()
    };
    let text = inspect(&[]);
    assert!(text.contains("labels        unacceptable, acceptable\n") && !text.contains("new:"), "{text}");
    // The parts add up to the file's weights, and their sum stands below them; a mask reaches all, or all but the head.
    let parts = text.split("\n\n").nth(1).unwrap().lines().skip(1).map(|line| last_of(line, ""));
    assert_eq!(parts.sum::<usize>(), 2 * all, "{text}");
    assert_eq!(last_of(&text, "all "), all);
    let scopes = text.split("scope of a mask").nth(1).unwrap();
    assert_eq!(last_of(scopes, "all "), all);
    assert_eq!(last_of(scopes, "backbone "), all - last_of(&text, "head "));
    assert!(inspect(&["--tensors"]).contains("bert.encoder.layer.0.output.dense.weight"));

    let text = inspect(&["--task", "mnli"]);
    assert!(text.contains("new: classifier.weight, classifier.bias\n"), "{text}");
    assert!(text.contains("labels        entailment, neutral, contradiction\n"), "{text}");

    rename(&workplace, weights, &["stray.weight"], |name| Some(name.to_owned()));
    assert!(inspect(&[]).contains("left out, not used by the model: stray.weight\n"));
    workplace.call(&["model", "inspect", "absent"]).with_code(2);
}
