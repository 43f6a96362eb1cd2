//! XLNet's tokenizer from `spiece.model`, as transformers' `XLNetTokenizer`.

use std::path::Path;

use tokenizers::Tokenizer;
use tokenizers::normalizers::{Lowercase, NFKD, NormalizerWrapper, Replace, Sequence, StripAccents};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;

use super::sentencepiece::SentencePiece;
use super::settings::Settings;
use super::special_tokens::SpecialTokens;
use crate::error::{Error, Result};

const SPECIAL_TOKENS: [(&str, &str); 7] = [
    ("bos_token", "<s>"),
    ("eos_token", "</s>"),
    ("unk_token", "<unk>"),
    ("sep_token", "<sep>"),
    ("pad_token", "<pad>"),
    ("cls_token", "<cls>"),
    ("mask_token", "<mask>"),
];

/// Builds XLNet's tokenizer.
///
/// As in transformers 5, accents are stripped and white space is folded whatever `keep_accents` and `remove_space` say,
/// and pieces such as `9,` have the score that the file gives them.
///
/// # Errors
///
/// [`Error::Model`] if the file is no Unigram model of SentencePiece, or lacks a special token that is needed.
pub(super) fn build(folder: &Path, settings: &Settings) -> Result<Tokenizer> {
    let path = folder.join("spiece.model");
    let fault = |error: tokenizers::Error| Error::model(&path, error.to_string());
    let file = SentencePiece::read(&path)?;
    let mut special = SpecialTokens::read(folder, settings, &SPECIAL_TOKENS)?;
    special.mask_takes_blanks_before();
    special.take_extra_unless_given(file.added_tokens());
    let mut normalizers: Vec<NormalizerWrapper> = vec![
        Replace::new("``", "\"").map_err(fault)?.into(),
        Replace::new("''", "\"").map_err(fault)?.into(),
        NFKD.into(),
        StripAccents.into(),
    ];
    if settings.flag("do_lower_case", false)? {
        normalizers.push(Lowercase.into());
    }
    normalizers.extend(file.character_map()?.map(NormalizerWrapper::from));
    let pre_tokenizers: Vec<PreTokenizerWrapper> =
        vec![WhitespaceSplit.into(), Metaspace::new('▁', PrependScheme::Always, true).into()];
    let mut tokenizer = Tokenizer::new(file.unigram(file.unknown())?);
    tokenizer
        .with_normalizer(Some(Sequence::new(normalizers)))
        .with_pre_tokenizer(Some(PreTokenizers::new(pre_tokenizers)));
    special.add_to(&mut tokenizer, &path)?;
    let template =
        special.template(&tokenizer, "$A:0 {sep}:0 {cls}:2", "$A:0 {sep}:0 $B:1 {sep}:1 {cls}:2")?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}
