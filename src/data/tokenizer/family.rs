//! Which family's tokenizer a folder without `tokenizer.json` holds.

use std::path::Path;

use serde_json::{Map, Value};

use super::settings::{Settings, read_object};
use crate::error::{Error, Result};

/// The families whose tokenizers are built from their vocabulary files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// WordPiece, as `BertTokenizer`; ELECTRA and DistilBERT have the same.
    Bert,
    /// Byte-level BPE, as `RobertaTokenizer`.
    Roberta,
    /// A SentencePiece Unigram model, as `XLNetTokenizer`.
    XlNet,
    /// A SentencePiece Unigram model, as `DebertaV2Tokenizer`; DeBERTa v3 has the same.
    DebertaV2,
}

impl Family {
    const ALL: [Family; 4] = [Family::Bert, Family::Roberta, Family::XlNet, Family::DebertaV2];

    /// The files that hold the vocabulary, all of them needed.
    pub const fn files(self) -> &'static [&'static str] {
        match self {
            Family::Bert => &["vocab.txt"],
            Family::Roberta => &["vocab.json", "merges.txt"],
            Family::XlNet => &["spiece.model"],
            Family::DebertaV2 => &["spm.model"],
        }
    }

    /// Returns the family of a folder: that of `tokenizer_class`, else that of `model_type`, else the one whose files
    /// are there.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the family named is none of these, or its files are not there.
    pub fn of(folder: &Path, settings: &Settings) -> Result<Family> {
        let config = folder.join("config.json");
        let model = read_object(&config)?.unwrap_or_default();
        let classes = [(settings.path(), settings.keys()), (config.as_path(), &model)];
        let named = classes.iter().find_map(|(path, keys)| {
            name(path, keys, "tokenizer_class")
                .map(|class| class.and_then(|class| Family::known(path, "tokenizer_class", class, of_class)))
        });
        let named = named.or_else(|| {
            name(&config, &model, "model_type")
                .map(|kind| kind.and_then(|kind| Family::known(&config, "model_type", kind, of_model_type)))
        });
        let is_there = |family: &Family| family.files().iter().all(|name| folder.join(name).is_file());
        let (family, wanted) = match named.transpose()? {
            Some(family) => (Some(family).filter(is_there), family.files().join(" with ")),
            None => (
                Family::ALL.into_iter().find(is_there),
                "vocab.txt, vocab.json with merges.txt, spiece.model or spm.model".to_owned(),
            ),
        };
        family.ok_or_else(|| {
            Error::model(folder, format!("has neither tokenizer.json nor {wanted}; {WRITE_TOKENIZER_JSON}"))
        })
    }

    fn known(path: &Path, key: &str, name: &str, find: fn(&str) -> Option<Family>) -> Result<Family> {
        find(name).ok_or_else(|| {
            Error::model(
                path,
                format!(
                    "`{key}` is `{name}`, whose tokenizer is read from tokenizer.json alone, and the folder has none; \
                     {WRITE_TOKENIZER_JSON}"
                ),
            )
        })
    }
}

const WRITE_TOKENIZER_JSON: &str =
    "in Python, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json";

/// Returns what a key names, if it names anything.
fn name<'a>(path: &Path, keys: &'a Map<String, Value>, key: &str) -> Option<Result<&'a str>> {
    let value = keys.get(key).filter(|value| !value.is_null())?;
    Some(value.as_str().ok_or_else(|| Error::model(path, format!("`{key}` must be a name, but is {value}"))))
}

fn of_class(name: &str) -> Option<Family> {
    match name.strip_suffix("Fast").unwrap_or(name) {
        "BertTokenizer" | "ElectraTokenizer" | "DistilBertTokenizer" => Some(Family::Bert),
        "RobertaTokenizer" => Some(Family::Roberta),
        "XLNetTokenizer" => Some(Family::XlNet),
        "DebertaV2Tokenizer" => Some(Family::DebertaV2),
        _ => None,
    }
}

fn of_model_type(name: &str) -> Option<Family> {
    match name {
        "bert" | "electra" | "distilbert" => Some(Family::Bert),
        "roberta" => Some(Family::Roberta),
        "xlnet" => Some(Family::XlNet),
        "deberta-v2" => Some(Family::DebertaV2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn family(files: &[(&str, &str)]) -> Result<Family> {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        Family::of(folder.path(), &Settings::read(folder.path())?)
    }

    const EVERY_FILE: [(&str, &str); 5] =
        [("vocab.txt", ""), ("vocab.json", ""), ("merges.txt", ""), ("spiece.model", ""), ("spm.model", "")];

    #[test]
    fn the_tokenizer_class_goes_before_the_model_type_and_both_before_the_files() {
        let of = |tokenizer: &str, model: &str| {
            let named = [("tokenizer_config.json", tokenizer), ("config.json", model)];
            family(&[&EVERY_FILE[..], &named].concat()).unwrap()
        };
        let xlnet = r#"{"model_type": "xlnet"}"#;
        assert_eq!(of(r#"{"tokenizer_class": "DebertaV2TokenizerFast"}"#, xlnet), Family::DebertaV2);
        let both = r#"{"model_type": "xlnet", "tokenizer_class": "RobertaTokenizer"}"#;
        assert_eq!(of("{}", both), Family::Roberta);
        assert_eq!(of(r#"{"tokenizer_class": null}"#, xlnet), Family::XlNet);
        assert_eq!(of("{}", "{}"), Family::Bert);
        for (number, expected) in [(1, Family::Roberta), (3, Family::XlNet), (4, Family::DebertaV2)] {
            assert_eq!(family(&EVERY_FILE[number..]).unwrap(), expected);
        }
    }

    #[test]
    fn a_family_that_is_not_known_or_lacks_its_files_is_refused_by_name() {
        let message = |files: &[(&str, &str)]| family(files).unwrap_err().to_string();
        let modern = message(&[("config.json", r#"{"model_type": "modernbert"}"#), ("vocab.json", "{}")]);
        assert!(
            modern.contains("config.json: `model_type` is `modernbert`, whose tokenizer is read from"),
            "{modern}"
        );
        let albert = message(&[("tokenizer_config.json", r#"{"tokenizer_class": "AlbertTokenizer"}"#)]);
        assert!(albert.contains("tokenizer_config.json: `tokenizer_class` is `AlbertTokenizer`"), "{albert}");
        let half = message(&[("config.json", r#"{"model_type": "roberta"}"#), ("vocab.json", "{}")]);
        assert!(
            half.contains("has neither tokenizer.json nor vocab.json with merges.txt; in Python"),
            "{half}"
        );
        assert!(
            message(&[]).contains("nor vocab.txt, vocab.json with merges.txt, spiece.model or spm.model")
        );
        let number = message(&[("config.json", r#"{"model_type": 3}"#)]);
        assert!(number.contains("`model_type` must be a name, but is 3"), "{number}");
    }
}
