//! Files that are broken, cut off, too large, or of a kind that is not read: each ends in one error that names the file.
//! `CHILD_TUNING_MUTATIONS=1000000 cargo test --test tokenizers broken` tries that many.

use std::path::Path;

use child_tuning::data::TokenEncoder;
use proptest::prelude::*;

use crate::support::{fixtures, folder};

/// What a folder is refused with, in one line that names a file of it.
fn refused(folder: &Path, file: &str) -> String {
    let error =
        TokenEncoder::from_folder(folder).err().unwrap_or_else(|| panic!("{file} was taken")).to_string();
    let start = format!("{}: ", folder.join(file).display());
    assert!(error.starts_with(&start) && !error.contains('\n'), "{error}");
    error[start.len()..].to_owned()
}

/// What a vocabulary of one file is refused with.
fn refused_bytes(name: &str, bytes: &[u8]) -> String {
    let folder = folder(&[], &[]);
    std::fs::write(folder.path().join(name), bytes).unwrap();
    refused(folder.path(), name)
}

/// A field of bytes in a protobuf message, shorter than 128.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(content.len()).unwrap()], content].concat()
}

/// A piece with a score and a type.
fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
    field(1, &[&field(1, text.as_bytes())[..], &[0x15], &score.to_le_bytes(), &[0x18, kind]].concat())
}

/// The pieces that XLNet needs, and `more`.
fn model(more: &[u8]) -> Vec<u8> {
    let pieces = [
        ("<unk>", 2),
        ("<s>", 3),
        ("</s>", 3),
        ("<cls>", 3),
        ("<sep>", 3),
        ("<pad>", 3),
        ("<mask>", 3),
        ("▁a", 1),
    ];
    let pieces = pieces.map(|(text, kind)| piece(text, 0.0, kind)).concat();
    [&pieces[..], more].concat()
}

#[test]
fn a_sentencepiece_file_that_is_none_or_not_unigram_is_refused() {
    let folder = folder(&[], &[]);
    std::fs::write(folder.path().join("spiece.model"), model(&[])).unwrap();
    let made = TokenEncoder::from_folder(folder.path()).unwrap().encode("a", Some("b"), 8).unwrap();
    // The unknown letter comes after a mark of its own.
    assert_eq!(made.ids, [7, 4, 0, 4, 3]);
    let message = |more: &[u8]| refused_bytes("spiece.model", &model(more));
    assert!(message(&field(2, &[0x18, 2])).contains("type BPE; only Unigram models are read"));
    assert!(message(&field(2, &[0x18, 3])).contains("type WORD"));
    assert!(message(&field(2, &[0x18, 9])).contains("type unknown"));
    assert!(message(&field(2, &[0xc0, 2, 100])).contains("unk_id is 100, which is no piece"));
    let minus_one = [&[0xc0, 2][..], &[0xff; 9], &[1]].concat();
    assert!(message(&field(2, &minus_one)).contains("unk_id is -1, which is no piece"));
    assert!(message(&field(2, &[0x1a, 0])).contains("a number of trainer_spec is none"));
    assert!(message(&field(3, &[0x10, 0])).contains("precompiled_charsmap is no text"));
    assert!(message(&field(3, &field(2, &[1]))).contains("character map is cut off"));
    assert!(message(&piece("", 0.0, 1)).contains("piece 8: it has 0 bytes"));
    assert!(message(&piece("b", f32::NAN, 1)).contains("piece 8: its score is NaN"));
    assert!(message(&piece("b", 0.0, 7)).contains("piece 8: its type is 7"));
    assert!(message(&field(1, &field(1, &[0xff]))).contains("piece 8: it is no UTF-8"));
    assert!(message(&field(1, &[0x08, 1])).contains("piece 8: a field is of the wrong type"));
    assert!(message(&[0x0b]).contains("a field has the wire type 3"));
    assert!(message(&[0x02, 0]).contains("a field has the number 0"));
    assert!(message(&[0x08; 1]).contains("it is cut off"));
    assert!(message(&[0xff; 11]).contains("an integer has more than ten bytes"));
    assert!(
        message(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]).contains("it is cut off")
    );
    assert!(refused_bytes("spm.model", &[]).contains("it has no pieces"));
    assert!(refused_bytes("spm.model", &model(&[])).contains("lacks the special token [SEP]"));
}

#[test]
fn a_sentencepiece_file_larger_than_any_is_refused_unread() {
    let folder = folder(&[], &[]);
    let file = std::fs::File::create(folder.path().join("spiece.model")).unwrap();
    file.set_len(1 << 40).unwrap();
    assert!(refused(folder.path(), "spiece.model").contains("no SentencePiece model has so many"));
}

#[test]
fn a_byte_level_bpe_whose_files_do_not_fit_together_is_refused() {
    let message = |vocabulary: &str, merges: &str| {
        let folder = folder(&[], &[("vocab.json", vocabulary), ("merges.txt", merges)]);
        refused(folder.path(), "vocab.json")
    };
    let vocabulary = r#"{"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}"#;
    assert!(message(vocabulary, "#version: 0.2\na b\n").contains("is no byte-level BPE"));
    assert!(message(vocabulary, "#version: 0.2\na\n").contains("is no byte-level BPE"));
    assert!(message("{", "").contains("is no byte-level BPE"));
    assert!(message("{\"a\": 0}", "").contains("lacks the special token </s>"));
}

#[test]
fn settings_and_special_tokens_that_make_no_sense_are_refused() {
    let message = |name: &str, content: &str| {
        let folder = folder(&[fixtures().join("vocab.txt")], &[(name, content)]);
        refused(folder.path(), name)
    };
    let config = |content| message("tokenizer_config.json", content);
    assert!(config("{").contains("EOF"));
    assert!(config("[]").contains("expected a map"));
    assert_eq!(config(r#"{"do_lower_case": 1}"#), "`do_lower_case` must be true or false, but is 1");
    assert_eq!(
        config(r#"{"truncation_side": "top"}"#),
        "`truncation_side` must be \"left\" or \"right\", but is \"top\""
    );
    assert_eq!(config(r#"{"cls_token": null}"#), "`cls_token` is null, but is needed");
    assert_eq!(
        config(r#"{"mask_token": {"content": "x"}}"#),
        "`mask_token` describes no token: {\"content\":\"x\"}"
    );
    assert_eq!(
        config(r#"{"additional_special_tokens": "x"}"#),
        "`extra_special_tokens` describes no token: \"x\""
    );
    assert!(config(r#"{"added_tokens_decoder": {"0": {"text": "x"}}}"#).contains("unknown field `text`"));
    assert!(
        config(r#"{"added_tokens_decoder": {"x": {"content": "x"}}}"#).contains("describes no token: \"x\"")
    );
    let other_id = config(r#"{"added_tokens_decoder": {"999": {"content": "x"}}}"#);
    assert!(
        other_id.starts_with("gives the token \"x\" the id 999, which after the vocabulary would be "),
        "{other_id}"
    );
    assert_eq!(message("added_tokens.json", r#"{"x": -1}"#), "`x` describes no token: -1");
}

/// A change of a file: bytes put in place of some at a place, mostly of as many, which leaves its frame whole.
#[derive(Clone, Debug)]
struct Change {
    place: prop::sample::Index,
    removed: Option<usize>,
    added: Vec<u8>,
}

fn change() -> impl Strategy<Value = Change> {
    let byte = prop_oneof![any::<u8>(), Just(0), Just(0x7f), Just(0x80), Just(0xff)];
    let removed = prop_oneof![4 => Just(None), 1 => (0..6usize).prop_map(Some)];
    (any::<prop::sample::Index>(), removed, prop::collection::vec(byte, 0..6))
        .prop_map(|(place, removed, added)| Change { place, removed, added })
}

const TEXT: &str = "The ﬁne ＡＢＣ™ café\u{301} … resume\u{301} <mask> (again) - ＡＡ\u{7}b 🙂 ẞ日本";

/// Loads a vocabulary of these bytes: it makes tokens that the vocabulary has, or is refused by name.
fn load_or_refuse(folder: &Path, name: &str, bytes: &[u8]) -> Result<bool, TestCaseError> {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    match TokenEncoder::from_folder(folder) {
        Ok(encoder) => {
            let made = encoder.encode(TEXT, Some("boat"), 40);
            let ids = made.map_err(|error| TestCaseError::fail(error.to_string()))?.ids;
            prop_assert!(ids.iter().all(|id| (*id as usize) < encoder.vocabulary_size()));
            Ok(true)
        }
        Err(error) => {
            let message = error.to_string();
            prop_assert!(
                message.starts_with(&path.display().to_string()) && !message.contains('\n'),
                "{message}"
            );
            Ok(false)
        }
    }
}

fn mutate(name: &str) {
    let original = std::fs::read(fixtures().join(name)).unwrap();
    let folder = folder(&[], &[]);
    let mut loaded = 0;
    for length in 0..original.len() {
        loaded += usize::from(load_or_refuse(folder.path(), name, &original[..length]).unwrap());
    }
    // A file cut off between its parts may still be whole.
    assert!(loaded < original.len() / 4, "{loaded} of {} beginnings are taken", original.len());
    let cases = std::env::var("CHILD_TUNING_MUTATIONS").map_or(3000, |count| count.parse().unwrap());
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() },
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let result = runner.run(&prop::collection::vec(change(), 1..4), |changes| {
        let mut bytes = original.clone();
        for Change { place, removed, added } in changes {
            let start = place.index(bytes.len());
            let end = (start + removed.unwrap_or(added.len())).min(bytes.len());
            bytes.splice(start..end, added);
            prop_assume!(!bytes.is_empty());
        }
        load_or_refuse(folder.path(), name, &bytes).map(drop)
    });
    result.unwrap();
}

#[test]
fn thousands_of_broken_spiece_files_load_or_are_refused() {
    mutate("spiece.model");
}

#[test]
fn thousands_of_broken_spm_files_load_or_are_refused() {
    mutate("spm.model");
}

/// A `tokenizer.json` with a post-processor and a model.
fn tokenizer(post_processor: &str, model: &str) -> String {
    format!(
        "{{\"version\": \"1.0\", \"truncation\": null, \"padding\": null, \"added_tokens\": [], \"normalizer\": null, \
         \"pre_tokenizer\": {{\"type\": \"Whitespace\"}}, \"post_processor\": {post_processor}, \"decoder\": null, \
         \"model\": {model}}}"
    )
}

/// The crate `tokenizers` panics there, which must end one command with an error and not the process.
#[test]
fn a_tokenizer_that_contradicts_itself_is_damaged() {
    let model = "{\"type\": \"WordLevel\", \"vocab\": {\"a\": 0, \"[UNK]\": 1}, \"unk_token\": \"[UNK]\"}";
    let second = "{\"Sequence\": {\"id\": \"B\", \"type_id\": 0}}";
    let template = format!(
        "{{\"type\": \"TemplateProcessing\", \"single\": [{second}], \"pair\": [{second}], \"special_tokens\": {{}}}}"
    );
    let folder = folder(&[], &[]);
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer(&template, model)).unwrap();
    let error = TokenEncoder::from_folder(folder.path()).and_then(|encoder| encoder.encode("a", None, 8));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("its files may be damaged"), "{error}");
}

#[test]
fn merges_that_are_dropped_at_random_are_refused() {
    let folder = folder(&[], &[]);
    let model = |dropout: &str| {
        let model =
            format!("{{\"type\": \"BPE\", \"dropout\": {dropout}, \"vocab\": {{\"a\": 0}}, \"merges\": []}}");
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer("null", &model)).unwrap();
        TokenEncoder::from_folder(folder.path())
    };
    assert!(model("null").is_ok() && model("0.0").is_ok());
    let error = model("0.5").err().unwrap().to_string();
    assert!(error.contains("drops merges at random (`dropout: 0.5`)"), "{error}");
}
