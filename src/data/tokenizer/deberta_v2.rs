//! The tokenizer of DeBERTa v2 and v3 from `spm.model`, as transformers' `DebertaV2Tokenizer`.

use std::path::Path;

use tokenizers::Tokenizer;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, NormalizerWrapper, Replace, Sequence, Strip};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;

use super::sentencepiece::SentencePiece;
use super::settings::Settings;
use super::special_tokens::SpecialTokens;
use crate::error::{Error, Result};

const SPECIAL_TOKENS: [(&str, &str); 7] = [
    ("bos_token", "[CLS]"),
    ("eos_token", "[SEP]"),
    ("unk_token", "[UNK]"),
    ("sep_token", "[SEP]"),
    ("pad_token", "[PAD]"),
    ("cls_token", "[CLS]"),
    ("mask_token", "[MASK]"),
];

/// Builds DeBERTa's tokenizer.
///
/// As in transformers 5, the character map of the file is not used: characters are put into normal form C, and runs of
/// white space, tabs and line ends become one blank.
///
/// # Errors
///
/// [`Error::Model`] if the file is no Unigram model of SentencePiece, or lacks a special token that is needed.
pub(super) fn build(folder: &Path, settings: &Settings) -> Result<Tokenizer> {
    let path = folder.join("spm.model");
    let fault = |error: tokenizers::Error| Error::model(&path, error.to_string());
    let file = SentencePiece::read(&path)?;
    let mut special = SpecialTokens::read(folder, settings, &SPECIAL_TOKENS)?;
    special.take_extra_unless_given(file.added_tokens());
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if settings.flag("do_lower_case", false)? {
        normalizers.push(Lowercase.into());
    }
    let white_space = ReplacePattern::Regex(r"\s{2,}|[\n\r\t]".to_owned());
    normalizers.extend([
        NormalizerWrapper::from(Replace::new(white_space, " ").map_err(fault)?),
        NFC.into(),
        Strip::new(false, true).into(),
    ]);
    let mut pre_tokenizers: Vec<PreTokenizerWrapper> = Vec::new();
    if settings.flag("split_by_punct", false)? {
        pre_tokenizers.push(Punctuation::new(SplitDelimiterBehavior::Isolated).into());
    }
    let blank_before = match settings.flag("add_prefix_space", true)? {
        true => PrependScheme::Always,
        false => PrependScheme::First,
    };
    pre_tokenizers.push(Metaspace::new('▁', blank_before, true).into());
    // The unknown token is the piece of that name, where it has no score.
    let named = file.unscored(special.content("unk_token")?);
    let mut tokenizer = Tokenizer::new(file.unigram(named.or(file.unknown()))?);
    tokenizer
        .with_normalizer(Some(Sequence::new(normalizers)))
        .with_pre_tokenizer(Some(PreTokenizers::new(pre_tokenizers)));
    special.add_to(&mut tokenizer, &path)?;
    let template =
        special.template(&tokenizer, "{cls}:0 $A:0 {sep}:0", "{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1")?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}
