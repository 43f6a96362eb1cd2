//! WordPiece from `vocab.txt`, as transformers' `BertTokenizer`.

use std::path::Path;

use tokenizers::Tokenizer;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;

use super::settings::Settings;
use super::special_tokens::SpecialTokens;
use crate::error::{Error, Result};

const SPECIAL_TOKENS: [(&str, &str); 5] = [
    ("unk_token", "[UNK]"),
    ("sep_token", "[SEP]"),
    ("pad_token", "[PAD]"),
    ("cls_token", "[CLS]"),
    ("mask_token", "[MASK]"),
];

/// Builds BERT's tokenizer.
///
/// # Errors
///
/// [`Error::Model`] if the vocabulary lacks a special token that is needed, or a setting is of the wrong type.
pub(super) fn build(folder: &Path, settings: &Settings) -> Result<Tokenizer> {
    let path = folder.join("vocab.txt");
    let fault = |error: tokenizers::Error| Error::model(&path, error.to_string());
    let special = SpecialTokens::read(folder, settings, &SPECIAL_TOKENS)?;
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let model = WordPiece::builder()
        .vocab(WordPiece::read_bytes(&bytes).map_err(fault)?)
        .unk_token(special.content("unk_token")?.to_owned())
        .build()
        .map_err(fault)?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(BertNormalizer::new(
            true,
            settings.flag("tokenize_chinese_chars", true)?,
            settings.open_flag("strip_accents")?,
            settings.flag("do_lower_case", true)?,
        )))
        .with_pre_tokenizer(Some(BertPreTokenizer));
    special.add_to(&mut tokenizer, &path)?;
    let template =
        special.template(&tokenizer, "{cls}:0 $A:0 {sep}:0", "{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1")?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}
