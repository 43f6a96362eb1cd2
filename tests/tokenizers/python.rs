//! Real vocabularies and real sentences, tokenised by transformers at the same time.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use child_tuning::data::{Split, TaskCard, TokenEncoder, read_split};

use crate::interpreter::python_with;
use crate::support::{encoded, folder, project};

type Pair = (String, Option<String>);
/// Ids and token types.
type Tokens = (Vec<u32>, Vec<u32>);

const PAIRS: usize = 1000;
const MAX_LENGTHS: [usize; 3] = [24, 33, 128];

/// Texts that real data sets seldom have.
const ODD: [(&str, Option<&str>); 9] = [
    ("", Some("")),
    ("  \t blanks \u{a0} of\u{3000}all\nkinds\r\n", Some(" ")),
    ("🙂 👩‍👩‍👧 ✈️ cafe\u{301} ﬁ ＡＢＣ ™ … ½ \u{200b}x\u{feff}y\u{ad}z", None),
    ("``quoted'' “text” ‘so’ ''' ```", Some("東京タワー 日本語 한국어 ภาษาไทย हिन्दी العربية")),
    (
        "<s> a </s> <sep> b <cls> <mask>c <pad><unk>",
        Some("[CLS] a [SEP] b [MASK] c [PAD][UNK] <eop>.(-)<eod>"),
    ),
    ("THE QUICK BROWN FOX İ ẞ Σ", Some("x9,8 1,000,000 £5 €6 3.14 a-b–c—d")),
    (
        "unbelievablyunbelievablyunbelievablyunbelievablyunbelievablyunbelievablyunbelievablyunbelievablyunbelievably",
        None,
    ),
    ("\u{7}bell\u{0}nul\u{7f}del\u{85}next\u{2028}line\u{fffd}", None),
    ("the same length of both texts", Some("the same length of both texts")),
];

/// Returns a real file, or says why the test that needs it is skipped.
fn shared(name: &str) -> Option<PathBuf> {
    let path = project().join("../shared").join(name);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
    }
    path.exists().then_some(path)
}

/// Returns sentence pairs of RTE, MRPC and SICK, whichever are there, and odd texts.
fn pairs() -> Option<Vec<Pair>> {
    let data = shared("data")?;
    let mut pairs: Vec<Pair> =
        ODD.iter().map(|(first, second)| (first.to_string(), second.map(str::to_owned))).collect();
    for task in ["rte", "mrpc", "sick"] {
        let card = TaskCard::builtin(task).unwrap();
        let Ok(examples) = read_split(&card, std::slice::from_ref(&data), Split::Train) else { continue };
        let examples = examples.examples.into_iter().take(PAIRS.div_ceil(3));
        pairs.extend(examples.map(|example| (example.first, example.second)));
    }
    if pairs.len() < PAIRS {
        println!("skipped: {} has only {} of {PAIRS} sentence pairs", data.display(), pairs.len());
        return None;
    }
    Some(pairs)
}

/// Returns what transformers makes of pairs at every length; `None`, with the reason printed, where Python lacks a module.
fn transformers(folder: &Path, pairs: &[Pair], modules: &str) -> Option<Vec<Vec<Tokens>>> {
    let mut command = python_with(modules)?;
    let question = serde_json::json!({"folder": folder, "pairs": pairs, "max_lengths": MAX_LENGTHS});
    let mut child = command
        .arg(project().join("scripts/tokenizer_reference.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(question.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

/// Compares the tokens of a folder with transformers' on the same folder, or on the copy that the tokenizer saves.
fn compare(files: &[PathBuf], written: &[(&str, &str)], modules: &str) {
    let Some(pairs) = pairs() else { return };
    let folder = folder(files, written);
    let encoder = TokenEncoder::from_folder(folder.path()).unwrap();
    let saved = tempfile::tempdir().unwrap();
    std::fs::copy(folder.path().join("config.json"), saved.path().join("config.json")).unwrap();
    encoder.save(saved.path()).unwrap();
    let Some(expected) = transformers(saved.path(), &pairs, modules) else { return };
    let mut wrong = Vec::new();
    for (max_length, answers) in MAX_LENGTHS.into_iter().zip(expected) {
        assert_eq!(answers.len(), pairs.len());
        for (pair, (ids, token_types)) in pairs.iter().zip(answers) {
            let answer = (ids, token_types.iter().map(u32::to_string).collect::<String>());
            let made = encoded(&encoder, pair, max_length);
            if made != answer {
                wrong.push(format!("{pair:?} at {max_length}\n  is  {made:?}\n  not {answer:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
}

const SENTENCEPIECE: &str = "transformers, sentencepiece, google.protobuf";

#[test]
fn real_wordpiece() {
    let path = project().join("models/minilm-l6/vocab.txt");
    if !path.exists() {
        println!("skipped: {} is not there; `make setup` installs it", path.display());
        return;
    }
    for settings in ["{}", r#"{"do_lower_case": false, "tokenize_chinese_chars": false}"#] {
        let written = [("config.json", r#"{"model_type": "bert"}"#), ("tokenizer_config.json", settings)];
        compare(std::slice::from_ref(&path), &written, "transformers");
    }
}

#[test]
fn real_byte_level_bpe() {
    let names = ["models/tokenizers/roberta-base/vocab.json", "models/tokenizers/roberta-base/merges.txt"];
    let [Some(vocabulary), Some(merges)] = names.map(shared) else { return };
    compare(&[vocabulary, merges], &[("config.json", r#"{"model_type": "roberta"}"#)], "transformers");
}

#[test]
fn real_unigram_from_tokenizer_json() {
    let names = [
        "models/tokenizers/xlnet-base-cased/tokenizer.json",
        "models/tokenizers/xlnet-base-cased/config.json",
    ];
    let [Some(tokenizer), Some(config)] = names.map(shared) else { return };
    compare(&[tokenizer, config], &[], "transformers");
}

#[test]
fn real_unigram_from_sentencepiece() {
    let Some(path) = shared("models/tokenizers/xlnet-base-cased/spiece.model") else { return };
    for settings in ["{}", r#"{"do_lower_case": true, "additional_special_tokens": ["<eop>", "<eod>"]}"#] {
        let written = [("config.json", r#"{"model_type": "xlnet"}"#), ("tokenizer_config.json", settings)];
        compare(std::slice::from_ref(&path), &written, SENTENCEPIECE);
    }
}

#[test]
fn real_unigram_under_debertas_rules() {
    // No vocabulary of DeBERTa's is at hand: that of XLNet, with the names of its special tokens.
    let Some(path) = shared("models/tokenizers/xlnet-base-cased/spiece.model") else { return };
    let names = r#""unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>", "pad_token": "<pad>""#;
    for more in ["", r#", "do_lower_case": true, "split_by_punct": true"#] {
        let settings = format!("{{{names}{more}}}");
        let model = folder(&[], &[]);
        let copy = model.path().join("spm.model");
        std::fs::copy(&path, &copy).unwrap();
        let written =
            [("config.json", r#"{"model_type": "deberta-v2"}"#), ("tokenizer_config.json", &settings)];
        compare(&[copy], &written, SENTENCEPIECE);
    }
}
