//! The tokenizer of a Hugging Face folder, from whichever files it has, as transformers builds it.

mod byte_level_bpe;
mod character_map;
mod deberta_v2;
mod family;
mod sentencepiece;
mod settings;
mod special_tokens;
mod wordpiece;
mod xlnet;

use std::path::Path;

use tokenizers::Tokenizer;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::utils::truncation::TruncationDirection;

use crate::error::{Error, Result};
use family::Family;
use settings::Settings;

/// Every file that a tokenizer of the supported families may bring along.
pub(crate) const FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "spm.model",
];

/// The sets of files each of which is enough to make tokens, in the order in which they are looked for.
pub(crate) const VOCABULARIES: [&[&str]; 5] = [
    &["tokenizer.json"],
    Family::Bert.files(),
    Family::Roberta.files(),
    Family::XlNet.files(),
    Family::DebertaV2.files(),
];

/// A tokenizer, and at which end it cuts texts that are too long.
pub(super) struct Loaded {
    pub tokenizer: Tokenizer,
    pub cut: TruncationDirection,
}

/// Reads the tokenizer of a folder: its `tokenizer.json`, or else what its family makes of the other files. Truncation
/// and padding stored in the former are dropped.
///
/// # Errors
///
/// [`Error::Model`] if the folder lacks a file that its family needs, or has one that cannot be understood.
pub(super) fn load(folder: &Path) -> Result<Loaded> {
    let settings = Settings::read(folder)?;
    let json = folder.join("tokenizer.json");
    let mut tokenizer = if json.exists() {
        Tokenizer::from_file(&json).map_err(|error| Error::model(&json, error.to_string()))?
    } else {
        match Family::of(folder, &settings)? {
            Family::Bert => wordpiece::build(folder, &settings)?,
            Family::Roberta => byte_level_bpe::build(folder, &settings)?,
            Family::XlNet => xlnet::build(folder, &settings)?,
            Family::DebertaV2 => deberta_v2::build(folder, &settings)?,
        }
    };
    if let ModelWrapper::BPE(BPE { dropout: Some(dropout), .. }) = tokenizer.get_model()
        && *dropout > 0.0
    {
        return Err(Error::model(
            folder,
            format!(
                "its tokenizer drops merges at random (`dropout: {dropout}`), so that a text has other tokens each time; set it to null"
            ),
        ));
    }
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| Error::model(folder, error.to_string()))?;
    tokenizer.set_encode_special_tokens(settings.flag("split_special_tokens", false)?);
    Ok(Loaded { tokenizer, cut: settings.truncation_side()? })
}
