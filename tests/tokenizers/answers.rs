//! The tokens that transformers made of odd texts with small vocabularies.

use std::collections::BTreeMap;

use child_tuning::data::TokenEncoder;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::support::{encoded, fixtures, folder};

#[derive(Deserialize)]
struct Texts {
    max_lengths: Vec<usize>,
    texts: Vec<(String, Option<String>)>,
}

/// A folder and its tokens; see scripts/make_tokenizer_fixtures.py.
#[derive(Deserialize)]
struct Case {
    name: String,
    vocabulary: Vec<String>,
    files: BTreeMap<String, serde_json::Value>,
    encodings: Vec<Vec<(Vec<u32>, String)>>,
}

fn read<T: DeserializeOwned>(name: &str) -> T {
    serde_json::from_slice(&std::fs::read(fixtures().join(name)).unwrap()).unwrap()
}

/// Compares every case of a vocabulary, and a copy of its folder that the tokenizer saved.
fn compare(cases: &str, expected: usize) {
    let Texts { max_lengths, texts } = read("texts.json");
    let cases: Vec<Case> = read(cases);
    assert_eq!(cases.len(), expected);
    let mut wrong = Vec::new();
    for case in cases {
        let copied: Vec<_> = case.vocabulary.iter().map(|name| fixtures().join(name)).collect();
        let files: Vec<_> = case.files.iter().map(|(name, content)| (name, content.to_string())).collect();
        let written: Vec<_> = files.iter().map(|(name, content)| (name.as_str(), content.as_str())).collect();
        let folder = folder(&copied, &written);
        let encoder = TokenEncoder::from_folder(folder.path()).unwrap();
        let saved = tempfile::tempdir().unwrap();
        // A model's config is saved by the model.
        std::fs::copy(folder.path().join("config.json"), saved.path().join("config.json")).unwrap();
        encoder.save(saved.path()).unwrap();
        let again = TokenEncoder::from_folder(saved.path()).unwrap();
        assert_eq!(encoder.vocabulary_size(), again.vocabulary_size());
        for (&max_length, answers) in max_lengths.iter().zip(&case.encodings) {
            assert_eq!(answers.len(), texts.len());
            for (pair, answer) in texts.iter().zip(answers) {
                let made = encoded(&encoder, pair, max_length);
                assert_eq!(made, encoded(&again, pair, max_length));
                if made != *answer {
                    wrong.push(format!(
                        "{} at {max_length}: {pair:?}\n  is     {made:?}\n  not    {answer:?}",
                        case.name
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn wordpiece_makes_the_tokens_of_transformers() {
    compare("vocab_txt_cases.json", 4);
}

#[test]
fn byte_level_bpe_makes_the_tokens_of_transformers() {
    compare("vocab_json_cases.json", 3);
}

#[test]
fn xlnets_unigram_makes_the_tokens_of_transformers() {
    compare("spiece_model_cases.json", 3);
}

#[test]
fn deberta_v2s_unigram_makes_the_tokens_of_transformers() {
    compare("spm_model_cases.json", 3);
}
