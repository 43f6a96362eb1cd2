//! A test for each form in which a task is handed out, with the quirks of the real files.

use std::path::Path;

use super::super::label::Label;
use super::super::reader::{Dataset, read_file, read_split};
use super::super::table::{Column, write};
use super::super::task::{Split, TaskCard};
use super::*;

/// Lays files under a folder, as the publisher's archive does.
fn lay(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = root.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    root
}

fn card(task: &str) -> TaskCard {
    TaskCard::builtin(task).unwrap()
}

fn split(task: &str, root: &Path, split: Split) -> Dataset {
    read_split(&card(task), &[root.to_path_buf()], split).unwrap()
}

/// Shows each example as its texts, a missing one being left out, and its label.
fn show(dataset: &Dataset) -> Vec<String> {
    let label = |label| match label {
        Some(Label::Class(id)) => id.to_string(),
        Some(Label::Score(score)) => score.to_string(),
        None => "-".to_string(),
    };
    let texts = |first: &str, second: Option<&str>| {
        second.map_or(first.to_string(), |second| format!("{first}|{second}"))
    };
    let line = |example: &super::super::sheet::Example| {
        format!("{} {}", texts(&example.first, example.second.as_deref()), label(example.label))
    };
    dataset.examples.iter().map(line).collect()
}

/// Reads the dev file of a task, laid under a name.
fn dev(task: &str, name: &str, content: impl AsRef<[u8]>) -> Vec<String> {
    let root = lay(&[(name, content.as_ref())]);
    show(&split(task, root.path(), Split::Dev))
}

#[test]
fn glue_files_go_by_their_headers() {
    let header = "index\tsentence1\tsentence2\tlabel\n";
    let wnli = format!("{header}0\tThe \"cup\t it \t1\n1\tc\td\t0");
    assert_eq!(dev("wnli", "WNLI/dev.tsv", wnli), ["The \"cup| it  1", "c|d 0"]);
    let rte = format!("{header}0\ta\tb\tentailment\r\n1\tc\td\tnot_entailment\r\n");
    assert_eq!(dev("rte", "RTE/dev.tsv", rte), ["a|b 0", "c|d 1"]);
    let qnli = "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n";
    assert_eq!(dev("qnli", "QNLI/dev.tsv", qnli), ["Who?|He. 1"]);
    // SST-2 keeps a space behind every phrase.
    assert_eq!(dev("sst2", "SST-2/dev.tsv", "sentence\tlabel\nso good \t1\n"), ["so good  1"]);
    let mnli = "index\tpromptID\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n\
                0\t9\t(ROOT \"\ta \"b\tc\tneutral\tcontradiction\n";
    assert_eq!(dev("mnli", "MNLI/dev_matched.tsv", mnli), ["a \"b|c 2"]);
    assert_eq!(dev("mnli_mm", "MNLI/dev_mismatched.tsv", mnli), ["a \"b|c 2"]);
}

#[test]
fn test_files_without_labels_are_read_and_matched_to_their_task() {
    let unlabelled = b"index\tsentence1\tsentence2\n0\ta\tb\n";
    let root = lay(&[
        ("MNLI/test_matched.tsv", unlabelled),
        ("MNLI/test_mismatched.tsv", b"index\tsentence1\tsentence2\n0\tc\td\n"),
        ("SST-2/test.tsv", b"index\tsentence\n0\tfine .\n"),
        ("AX/diagnostic.tsv", unlabelled),
    ]);
    for (task, expected) in [("mnli", "a|b -"), ("mnli_mm", "c|d -"), ("sst2", "fine . -"), ("ax", "a|b -")] {
        assert_eq!(show(&split(task, root.path(), Split::Test)), [expected], "{task}");
    }
}

#[test]
fn the_full_diagnostic_file_has_labels() {
    let full = "Lexical Semantics\tDomain\tPremise\tHypothesis\tLabel\n\tNews\tThe cat\tA cat\tneutral\n";
    let plain = "index\tsentence1\tsentence2\n0\tThe cat\tA cat\n";
    let root = lay(&[
        ("diagnostic/diagnostic.tsv", plain.as_bytes()),
        ("diagnostic/diagnostic-full.tsv", full.as_bytes()),
    ]);
    assert_eq!(show(&split("ax", root.path(), Split::Test)), ["The cat|A cat 1"]);
}

#[test]
fn torn_rows_of_question_pairs_are_left_out_and_counted() {
    let header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n";
    let rows = format!("{header}1\t2\t3\tWhy?\tHow?\t0\n4\t5\t6\t\"Who\n\tis he?\t1\n7\t8\t9\tWhere?\t\t1\n");
    let root = lay(&[("QQP/train.tsv", rows.as_bytes())]);
    let train = split("qqp", root.path(), Split::Train);
    assert_eq!((show(&train), train.dropped), (vec!["Why?|How? 0".to_string(), "Where?| 1".to_string()], 2));
    // A prediction owes an answer to each row.
    let message = read_file(&card("qqp"), &train.path).unwrap_err().to_string();
    assert!(message.contains("train.tsv:3: expected 6 columns, found 4"), "{message}");
    let long = format!("{header}1\t2\t3\tWhy?\tHow?\t0\t0\n");
    let root = lay(&[("QQP/train.tsv", long.as_bytes())]);
    let error = read_split(&card("qqp"), &[root.path().into()], Split::Train).unwrap_err();
    assert!(error.to_string().contains("train.tsv:2: expected 6 columns, found 7"), "{error}");
}

const SNLI_HEADER: &str = "gold_label\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t\
    sentence2_parse\tsentence1\tsentence2\tcaptionID\tpairID\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\n";

#[test]
fn original_inference_files_drop_pairs_without_consensus() {
    let row = |label: &str, second: &str| {
        format!("{label}\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tSay \"a\t{second}\t1.jpg\t1r\t{label}\t\t\t\t\n")
    };
    let rows = SNLI_HEADER.to_string() + &row("neutral", "b") + &row("-", "c") + &row("contradiction", "d");
    let root = lay(&[
        ("snli_1.0/snli_1.0_dev.txt", rows.as_bytes()),
        ("snli_1.0/snli_1.0_test.txt", rows.as_bytes()),
    ]);
    for part in [Split::Dev, Split::Test] {
        let found = split("snli", root.path(), part);
        assert_eq!(
            (show(&found), found.dropped),
            (vec!["Say \"a|b 1".to_string(), "Say \"a|d 2".to_string()], 1)
        );
    }
    // A prediction owes an answer to each row.
    let all = read_file(&card("snli"), &root.path().join("snli_1.0/snli_1.0_dev.txt")).unwrap();
    assert_eq!((show(&all)[1].as_str(), all.examples.len(), all.dropped), ("Say \"a|c -", 3, 0));
    let multi = dev("mnli_mm", "multinli_1.0/multinli_1.0_dev_mismatched.txt", rows);
    assert_eq!(multi, ["Say \"a|b 1", "Say \"a|d 2"]);
}

#[test]
fn original_inference_files_may_be_json_lines() {
    let rows = r#"{"annotator_labels": ["neutral", "-"], "gold_label": "-", "sentence1": "a", "sentence2": "b"}
{"annotator_labels": ["entailment"], "gold_label": "entailment", "sentence1": "a\tb", "sentence1_parse": "(a)", "sentence2": "c"}
"#;
    assert_eq!(dev("snli", "SNLI/snli_1.0_dev.jsonl", rows), ["a\tb|c 0"]);
    assert_eq!(dev("mnli", "multinli_1.0/multinli_1.0_dev_matched.jsonl", rows), ["a\tb|c 0"]);
    let raw = "{\"premise\": \"a\", \"hypothesis\": \"b \", \"label\": \"contradiction\"}\n";
    assert_eq!(dev("snli", "SNLI/raw_text/dev.jsonl", raw), ["a|b  2"]);
    assert_eq!(dev("mnli", "MNLI/raw_text/dev_matched.jsonl", raw), ["a|b  2"]);
}

#[test]
fn quoted_subset_and_counterfactual_files_of_inference_are_told_apart() {
    let quoted = "premise\thypothesis\tlabel\n\"a \"\"b\"\"\"\tc\t0\nd\te\t2\n";
    assert_eq!(dev("snli", "SNLI/quoted_tsv/validation.tsv", quoted), ["a \"b\"|c 0", "d|e 2"]);
    let subset = "1\t1\ta, b\tc\n2\t2\td\t\"e\n3\t3\tf\tg\n";
    let root = lay(&[("SNLI/train_subset/train.csv", subset.as_bytes())]);
    assert_eq!(show(&split("snli", root.path(), Split::Train)), ["a, b|c 1", "d|\"e 2", "f|g 0"]);
    let root = lay(&[("revised.tsv", b"sentence1\tsentence2\tgold_label\na\tb\tneutral\n")]);
    assert_eq!(show(&read_file(&card("snli"), &root.path().join("revised.tsv")).unwrap()), ["a|b 1"]);
}

#[test]
fn science_pairs_come_in_five_text_forms() {
    let tsv = "say \"a\tb\"\tentails\nc\td\tneutral";
    let expected = ["say \"a|b\" 0", "c|d 1"];
    assert_eq!(dev("scitail", "SciTailV1.1/tsv_format/scitail_1.0_dev.tsv", tsv), expected);
    let tokenised = "say \"a\tb\"\t0\nc\td\t1\n";
    assert_eq!(dev("scitail", "SciTail/tokenised/dev.txt", tokenised), expected);
    let row = |first: &str, second: &str, label: &str| {
        format!(
            "{{\"sentence1_parse\": \"\", \"sentence1\": {first:?}, \"sentence2\": {second:?}, \"gold_label\": \"{label}\", \"answer\": \"x\"}}\n"
        )
    };
    let objects = row("say \"a", "b\"", "entails") + &row("c", "d", "neutral");
    assert_eq!(dev("scitail", "SciTailV1.1/snli_format/scitail_1.0_dev.txt", &objects), expected);
    let name = "SciTailV1.1/predictor_format/scitail_1.0_structure_dev.jsonl";
    assert_eq!(dev("scitail", name, &objects), expected);
    let raw = "{\"premise\": \"a\", \"hypothesis\": \"b\", \"label\": \"not_entailment\", \"tag\": \"\"}\n";
    assert_eq!(dev("scitail", "SciTail/raw_text/dev.jsonl", raw), ["a|b 1"]);
}

#[test]
fn the_last_column_splits_the_knowledge_set() {
    let rows = "pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score\tSemEval_set\r\n\
        1\ta\tb \tNEUTRAL\t4.5\tTRAIN\r\n2\tc\td\tENTAILMENT\t5\tTRIAL\r\n3\te\tf\tCONTRADICTION\t1\tTEST";
    let root = lay(&[("SICK/SICK.txt", rows.as_bytes())]);
    let expected = [
        (Split::Train, "a|b  1", "a|b  4.5"),
        (Split::Dev, "c|d 0", "c|d 5"),
        (Split::Test, "e|f 2", "e|f 1"),
    ];
    for (part, class, score) in expected {
        assert_eq!(show(&split("sick", root.path(), part)), [class]);
        assert_eq!(show(&split("sick_r", root.path(), part)), [score]);
    }
    let all = read_file(&card("sick"), &root.path().join("SICK/SICK.txt")).unwrap();
    assert_eq!(all.examples.len(), 3);
    let workshop =
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n1\ta\tb\t3.3\tNEUTRAL\n";
    assert_eq!(dev("sick", "SICK/semeval2014/SICK_trial.txt", workshop), ["a|b 1"]);
    assert_eq!(dev("sick_r", "sick/SICK_trial.txt", workshop), ["a|b 3.3"]);
    let message = {
        let root = lay(&[("SICK/SICK.txt", b"sentence_A\tsentence_B\tentailment_label\na\tb\tNEUTRAL\n")]);
        read_split(&card("sick"), &[root.path().into()], Split::Dev).unwrap_err().to_string()
    };
    assert!(message.contains("SICK.txt:1: has no column `SemEval_set`"), "{message}");
}

#[test]
fn the_hubs_parquet_files_go_by_its_columns() {
    let one = |task: &str, name: &str, texts: &[&str], label: i64| {
        let texts: Vec<Column> = texts.iter().map(|column| Column::Text(column, &[Some("a \"b")])).collect();
        let labels = [label];
        let columns: Vec<Column> = texts.into_iter().chain([Column::Integer("label", &labels)]).collect();
        dev(task, name, write(&columns))
    };
    let file = "validation-00000-of-00001.parquet";
    assert_eq!(one("cola", &format!("glue/cola/{file}"), &["sentence"], 1), ["a \"b 1"]);
    assert_eq!(one("sst2", &format!("glue/sst2/{file}"), &["sentence"], 0), ["a \"b 0"]);
    let pairs = [
        ("rte", "glue/rte", ["sentence1", "sentence2"]),
        ("wnli", "glue/wnli", ["sentence1", "sentence2"]),
        ("mrpc", "glue/mrpc", ["sentence1", "sentence2"]),
        ("qqp", "glue/qqp", ["question1", "question2"]),
        ("qnli", "glue/qnli", ["question", "sentence"]),
        ("snli", "snli/plain_text", ["premise", "hypothesis"]),
        ("sick", "sick", ["sentence_A", "sentence_B"]),
    ];
    for (task, folder, columns) in pairs {
        assert_eq!(one(task, &format!("{folder}/{file}"), &columns, 1), ["a \"b|a \"b 1"], "{task}");
    }
    let columns = ["premise", "hypothesis"];
    let name = "glue/mnli/validation_matched-00000-of-00001.parquet";
    assert_eq!(one("mnli", name, &columns, 2), ["a \"b|a \"b 2"]);
    let name = "multi_nli/data/validation_mismatched-00000-of-00001.parquet";
    assert_eq!(one("mnli_mm", name, &columns, 0), ["a \"b|a \"b 0"]);
}

#[test]
fn the_hubs_scores_names_and_minus_ones_are_understood() {
    let pair = |first: &'static str| {
        [Column::Text(first, &[Some("a"), Some("b")]), Column::Text("sentence2", &[Some("c"), Some("d")])]
    };
    let scores = write(
        &pair("sentence1").into_iter().chain([Column::Float("label", &[3.8, 5.0])]).collect::<Vec<_>>(),
    );
    assert_eq!(dev("stsb", "glue/stsb/validation-00000-of-00001.parquet", scores), ["a|c 3.8", "b|d 5"]);
    let science = write(
        &pair("sentence1")
            .into_iter()
            .chain([Column::Text("gold_label", &[Some("neutral"), Some("entails")])])
            .collect::<Vec<_>>(),
    );
    assert_eq!(
        dev("scitail", "scitail/snli_format/validation-00000-of-00001.parquet", science),
        ["a|c 1", "b|d 0"]
    );
    // -1 is no consensus in SNLI, and a withheld label in GLUE.
    let labels = |task: &str, name: &str| {
        let content = write(&[
            Column::Text("premise", &[Some("a"), Some("b")]),
            Column::Text("hypothesis", &[Some("c"), Some("d")]),
            Column::Integer("label", &[-1, 2]),
        ]);
        let found = split(task, lay(&[(name, &content)]).path(), Split::Test);
        (show(&found).join(", "), found.dropped)
    };
    let snli = labels("snli", "snli/plain_text/test-00000-of-00001.parquet");
    assert_eq!(snli, ("b|d 2".to_string(), 1));
    let mnli = labels("mnli", "glue/mnli/test_matched-00000-of-00001.parquet");
    assert_eq!(mnli, ("a|c -, b|d 2".to_string(), 0));
}

#[test]
fn shards_are_read_in_order_and_all_of_them() {
    let shard = |text: &'static str| {
        write(&[Column::Text("sentence", &[Some(text)]), Column::Integer("label", &[1])])
    };
    let (first, second) = (shard("a"), shard("b"));
    let names = ["glue/cola/train-00000-of-00002.parquet", "glue/cola/train-00001-of-00002.parquet"];
    let root = lay(&[(names[1], &second), (names[0], &first)]);
    let train = split("cola", root.path(), Split::Train);
    assert_eq!(
        (show(&train), train.path),
        (vec!["a 1".to_string(), "b 1".to_string()], root.path().join(names[0]))
    );
    let root = lay(&[(names[1], &second)]);
    let error = read_split(&card("cola"), &[root.path().into()], Split::Train).unwrap_err();
    assert!(error.to_string().contains("1 files are there of 2"), "{error}");
}

#[test]
fn a_choice_of_rows_has_one_source_of_keys() {
    let filter = |list: Option<&str>, values: &[&str], columns: &[&str]| RowFilter {
        keep: Keep::Listed,
        columns: columns.iter().map(|column| column.to_string()).collect(),
        list: list.map(PathBuf::from),
        values: values.iter().map(|value| value.to_string()).collect(),
    };
    assert_eq!(filter(Some("ids"), &[], &["a", "b"]).objection(), None);
    assert_eq!(filter(None, &["TRAIN"], &["set"]).objection(), None);
    assert!(filter(None, &[], &["set"]).objection().unwrap().contains("needs"));
    assert!(filter(Some("ids"), &["TRAIN"], &["set"]).objection().unwrap().contains("not both"));
    assert!(filter(None, &["TRAIN"], &["a", "b"]).objection().unwrap().contains("one column"));
}
