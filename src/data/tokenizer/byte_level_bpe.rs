//! Byte-level BPE from `vocab.json` and `merges.txt`, as transformers' `RobertaTokenizer`.

use std::path::Path;

use tokenizers::Tokenizer;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::roberta::RobertaProcessing;

use super::settings::Settings;
use super::special_tokens::SpecialTokens;
use crate::error::{Error, Result};

const SPECIAL_TOKENS: [(&str, &str); 7] = [
    ("bos_token", "<s>"),
    ("eos_token", "</s>"),
    ("unk_token", "<unk>"),
    ("sep_token", "</s>"),
    ("pad_token", "<pad>"),
    ("cls_token", "<s>"),
    ("mask_token", "<mask>"),
];

/// Builds RoBERTa's tokenizer. `trim_offsets` makes no difference to the tokens, so it is not asked for.
///
/// # Errors
///
/// [`Error::Model`] if a file cannot be understood, the two do not fit together, or the vocabulary lacks a special token
/// that is needed.
pub(super) fn build(folder: &Path, settings: &Settings) -> Result<Tokenizer> {
    let (vocabulary, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    let special = SpecialTokens::read(folder, settings, &SPECIAL_TOKENS)?;
    // Neither message of the library says which of the two files is at fault.
    let fault = |error: tokenizers::Error| {
        Error::model(&vocabulary, format!("with merges.txt beside it is no byte-level BPE: {error}"))
    };
    let text = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| Error::model(path, "the name is no Unicode text"))
    };
    let (tokens, pairs) = BPE::read_file(&text(&vocabulary)?, &text(&merges)?).map_err(fault)?;
    let mut tokenizer =
        Tokenizer::new(BPE::builder().vocab_and_merges(tokens, pairs).build().map_err(fault)?);
    let add_prefix_space = settings.flag("add_prefix_space", false)?;
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(add_prefix_space, true, true)));
    special.add_to(&mut tokenizer, &vocabulary)?;
    let separator = special.identified(&tokenizer, "sep_token")?;
    let classifier = special.identified(&tokenizer, "cls_token")?;
    tokenizer.with_post_processor(Some(RobertaProcessing::new(separator, classifier)));
    Ok(tokenizer)
}
