//! Text as token ids, as transformers' tokenizers give them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tokenizers::utils::truncation::{
    TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings,
};
use tokenizers::{Encoding, PostProcessor, Tokenizer};

use super::sheet::Example;
use super::tokenizer::{FILES, load};
use crate::error::{Error, Result};
use crate::files::copy_whole;
use crate::libtorch::panic_message;

/// How many examples are in work at once: whole encodings carry far more than their ids.
const CHUNK: usize = 1024;

/// The token ids of one example, special tokens included, never padded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids, `[tokens]`.
    pub ids: Vec<u32>,
    /// Which text each token belongs to, `[tokens]`, numbered as the tokenizer's family does.
    pub token_types: Vec<u32>,
}

/// The tokenizer of a model folder.
pub struct TokenEncoder {
    tokenizer: Tokenizer,
    /// At which end a text is cut that is too long.
    cut: TruncationDirection,
    folder: PathBuf,
    vocabulary_size: usize,
}

impl TokenEncoder {
    /// Reads the tokenizer of a Hugging Face folder: its `tokenizer.json`, or else a WordPiece vocabulary in `vocab.txt`,
    /// a byte-level BPE in `vocab.json` and `merges.txt`, or a SentencePiece model in `spiece.model` (XLNet) or `spm.model`
    /// (DeBERTa v2 and v3), with the settings and special tokens of the files beside it. Truncation and padding stored in
    /// the first are dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the folder lacks a file that its family needs, or has one that cannot be understood.
    pub fn from_folder(folder: &Path) -> Result<TokenEncoder> {
        let loaded = guarded(folder, || load(folder))?;
        let largest = loaded.tokenizer.get_vocab(true).into_values().max();
        let vocabulary_size = largest.map_or(0, |id| id as usize + 1);
        Ok(TokenEncoder {
            tokenizer: loaded.tokenizer,
            cut: loaded.cut,
            folder: folder.to_path_buf(),
            vocabulary_size,
        })
    }

    /// Returns the largest token id plus one.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    /// Encodes a text or a pair in at most `max_length` tokens, special tokens counted.
    ///
    /// Tokens are cut off at the end of the longer text first, or at its start if the folder's `truncation_side` says so,
    /// as with transformers' `truncation="longest_first"`.
    ///
    /// # Errors
    ///
    /// [`Error::Configuration`] if `max_length` leaves no room for a token of text.
    pub fn encode(&self, first: &str, second: Option<&str>, max_length: usize) -> Result<Encoded> {
        let tokens = |text| self.tokenizer.encode_fast(text, false).map_err(|error| self.fault(error));
        guarded(&self.folder, || self.assemble(tokens(first)?, second.map(tokens).transpose()?, max_length))
    }

    /// Encodes every example, in order, on all cores; see [`TokenEncoder::encode`].
    ///
    /// # Errors
    ///
    /// As for [`TokenEncoder::encode`].
    pub fn encode_dataset(&self, examples: &[Example], max_length: usize) -> Result<Vec<Encoded>> {
        guarded(&self.folder, || self.encode_examples(examples, max_length))
    }

    fn encode_examples(&self, examples: &[Example], max_length: usize) -> Result<Vec<Encoded>> {
        let batch = |texts: Vec<&str>| {
            self.tokenizer.encode_batch_fast(texts, false).map_err(|error| self.fault(error))
        };
        let mut encoded = Vec::with_capacity(examples.len());
        for chunk in examples.chunks(CHUNK) {
            let firsts = batch(chunk.iter().map(|example| example.first.as_str()).collect())?;
            let seconds = batch(chunk.iter().filter_map(|example| example.second.as_deref()).collect())?;
            let mut seconds = seconds.into_iter();
            for (example, first) in chunk.iter().zip(firsts) {
                let second = example.second.as_ref().and_then(|_| seconds.next());
                encoded.push(self.assemble(first, second, max_length)?);
            }
        }
        Ok(encoded)
    }

    /// Returns the tokenizer's files in its folder, whichever there are.
    pub fn files(&self) -> Vec<PathBuf> {
        FILES.iter().map(|name| self.folder.join(name)).filter(|path| path.is_file()).collect()
    }

    /// Copies the tokenizer's files into another model folder, which must exist.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if a file cannot be copied.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let target = folder.canonicalize().map_err(Error::io("find", folder))?;
        if self.folder.canonicalize().is_ok_and(|source| source == target) {
            // Copying a file onto itself would empty it.
            return Ok(());
        }
        for (name, source) in FILES.iter().map(|name| (name, self.folder.join(name))) {
            if source.is_file() {
                copy_whole(&source, &target.join(name))?;
            } else if let Err(error) = std::fs::remove_file(target.join(name))
                && error.kind() != std::io::ErrorKind::NotFound
            {
                // That of another model would be read with this one's.
                return Err(Error::io("remove", target.join(name))(error));
            }
        }
        Ok(())
    }

    /// Cuts the texts to size and joins them with the special tokens.
    fn assemble(&self, first: Encoding, second: Option<Encoding>, max_length: usize) -> Result<Encoded> {
        let special = self.tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(second.is_some()));
        if max_length <= special {
            return Err(Error::configuration(format!(
                "max_length {max_length} leaves no room for text: the tokenizer adds {special} special tokens"
            )));
        }
        let limit = TruncationParams {
            max_length: max_length - special,
            strategy: TruncationStrategy::LongestFirst,
            direction: self.cut,
            stride: 0,
        };
        let (first, second) = truncate_encodings(first, second, &limit).map_err(|error| self.fault(error))?;
        let joined = self.tokenizer.post_process(first, second, true).map_err(|error| self.fault(error))?;
        Ok(Encoded { ids: joined.get_ids().to_vec(), token_types: joined.get_type_ids().to_vec() })
    }

    fn fault(&self, error: impl std::fmt::Display) -> Error {
        Error::model(&self.folder, format!("the tokenizer failed: {error}"))
    }
}

/// Runs what the crate `tokenizers` panics in where a file contradicts itself, such as a normaliser that leads out of its own table.
fn guarded<T>(folder: &Path, work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic_message(panic.as_ref());
        Err(Error::model(
            folder,
            format!("the tokenizer failed ({text}); its files may be damaged: download or save them again"),
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCABULARY: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\nsat\n##s\nCat\ncafe\n,\ncafé\n";
    const THE: u32 = 5;
    const CAT: u32 = 6;
    const SAT: u32 = 7;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    fn encoder(files: &[(&str, &str)]) -> TokenEncoder {
        TokenEncoder::from_folder(folder(files).path()).unwrap()
    }

    #[test]
    fn a_vocabulary_alone_makes_a_lower_casing_bert_tokenizer() {
        let encoder = encoder(&[("vocab.txt", VOCABULARY)]);
        assert_eq!(encoder.vocabulary_size(), 13);
        let single = encoder.encode("The Cats sat, CAFÉ xyz", None, 16).unwrap();
        assert_eq!(single.ids, [2, THE, CAT, 8, SAT, 11, 10, 1, 3]);
        assert_eq!(single.token_types, [0; 9]);
        let pair = encoder.encode("the cat", Some("sat"), 16).unwrap();
        assert_eq!(pair.ids, [2, THE, CAT, 3, SAT, 3]);
        assert_eq!(pair.token_types, [0, 0, 0, 0, 1, 1]);
    }

    #[test]
    fn the_tokenizer_config_decides_about_case_and_accents() {
        let cased = r#"{"do_lower_case": false, "model_max_length": 512}"#;
        let encoder_cased = encoder(&[("vocab.txt", VOCABULARY), ("tokenizer_config.json", cased)]);
        assert_eq!(encoder_cased.encode("Cat café", None, 8).unwrap().ids, [2, 9, 12, 3]);
        let accents = r#"{"do_lower_case": true, "strip_accents": false}"#;
        let encoder_accents = encoder(&[("vocab.txt", VOCABULARY), ("tokenizer_config.json", accents)]);
        assert_eq!(encoder_accents.encode("CAFÉ", None, 8).unwrap().ids, [2, 12, 3]);
    }

    #[test]
    fn the_longer_text_is_cut_first_and_special_tokens_count() {
        let encoder = encoder(&[("vocab.txt", VOCABULARY)]);
        let long = "the the the the the the";
        let cut = |first, second, length| encoder.encode(first, second, length).unwrap().ids;
        assert_eq!(cut(long, Some("cat sat"), 8), [2, THE, THE, THE, 3, CAT, SAT, 3]);
        assert_eq!(cut("cat sat", Some(long), 8), [2, CAT, SAT, 3, THE, THE, THE, 3]);
        assert_eq!(cut(long, Some(long), 8), [2, THE, THE, 3, THE, THE, THE, 3]);
        assert_eq!(cut(long, None, 4), [2, THE, THE, 3]);
    }

    #[test]
    fn a_length_without_room_for_text_is_refused() {
        let encoder = encoder(&[("vocab.txt", VOCABULARY)]);
        assert_eq!(encoder.encode("the cat", None, 3).unwrap().ids, [2, THE, 3]);
        let message = encoder.encode("the", Some("cat"), 3).unwrap_err().to_string();
        assert_eq!(message, "max_length 3 leaves no room for text: the tokenizer adds 3 special tokens");
    }

    #[test]
    fn a_data_set_is_encoded_like_its_examples_one_by_one() {
        let encoder = encoder(&[("vocab.txt", VOCABULARY)]);
        let example = |index: usize| Example {
            first: "cat ".repeat(index % 7 + 1),
            second: (!index.is_multiple_of(3)).then(|| "sat ".repeat(index % 5 + 1)),
            label: None,
        };
        let examples: Vec<_> = (0..CHUNK + 30).map(example).collect();
        let encoded = encoder.encode_dataset(&examples, 9).unwrap();
        assert_eq!(encoded.len(), examples.len());
        for (example, encoded) in examples.iter().zip(&encoded) {
            assert_eq!(*encoded, encoder.encode(&example.first, example.second.as_deref(), 9).unwrap());
        }
    }

    #[test]
    fn truncation_and_padding_stored_in_tokenizer_json_are_switched_off() {
        let plain = encoder(&[("vocab.txt", VOCABULARY)]);
        let mut stored = plain.tokenizer.clone();
        stored.with_padding(Some(tokenizers::PaddingParams {
            strategy: tokenizers::PaddingStrategy::Fixed(12),
            ..Default::default()
        }));
        let limit = TruncationParams { max_length: 4, ..Default::default() };
        stored.with_truncation(Some(limit)).unwrap();
        let json = stored.to_string(false).unwrap();
        assert!(json.contains("\"Fixed\":12") && json.contains("\"max_length\":4"));
        let encoder = encoder(&[("tokenizer.json", &json)]);
        let text = "the cat sat , the cat";
        assert_eq!(encoder.encode(text, None, 64).unwrap(), plain.encode(text, None, 64).unwrap());
        assert_eq!(encoder.vocabulary_size(), plain.vocabulary_size());
    }

    #[test]
    fn saving_copies_the_files_that_exist_and_spares_its_own_folder() {
        let source = folder(&[("vocab.txt", VOCABULARY), ("config.json", "{}")]);
        let encoder = TokenEncoder::from_folder(source.path()).unwrap();
        assert_eq!(encoder.files(), [source.path().join("vocab.txt")]);
        let target = tempfile::tempdir().unwrap();
        encoder.save(target.path()).unwrap();
        assert_eq!(std::fs::read_to_string(target.path().join("vocab.txt")).unwrap(), VOCABULARY);
        assert_eq!(std::fs::read_dir(target.path()).unwrap().count(), 1);
        encoder.save(source.path()).unwrap();
        assert_eq!(std::fs::read_to_string(source.path().join("vocab.txt")).unwrap(), VOCABULARY);
        assert!(encoder.save(&target.path().join("none")).is_err());
    }

    #[test]
    fn folders_without_a_usable_tokenizer_are_refused() {
        let message = |files: &[(&str, &str)]| {
            TokenEncoder::from_folder(folder(files).path()).err().unwrap().to_string()
        };
        assert!(message(&[("config.json", "{}")]).contains("neither tokenizer.json nor vocab.txt"));
        assert!(message(&[("vocab.txt", "the\ncat\n")]).contains("lacks the special token [SEP]"));
        assert!(message(&[("tokenizer.json", "{")]).contains("tokenizer.json"));
        let broken = [("vocab.txt", VOCABULARY), ("tokenizer_config.json", "{\"do_lower_case\": 3}")];
        assert!(message(&broken).contains("tokenizer_config.json"));
    }
}
