//! The SentencePiece model file, a protobuf message, read as untrusted data.
//!
//! Of SentencePiece's `ModelProto` these fields count, as in transformers: the pieces, `trainer_spec.model_type`,
//! `trainer_spec.unk_id` and `normalizer_spec.precompiled_charsmap`.

use std::path::{Path, PathBuf};

use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;

use super::character_map;
use super::special_tokens::Token;
use crate::error::{Error, Result};

/// More than any published vocabulary takes.
const LARGEST_FILE: u64 = 16 << 20;
/// SentencePiece's trainer makes pieces of at most 16 characters; symbols of the user's own may be longer.
const LONGEST_PIECE: usize = 1024;

/// A Unigram vocabulary with what surrounds it.
pub(super) struct SentencePiece {
    path: PathBuf,
    pieces: Vec<Piece>,
    unknown: i32,
    character_map: Vec<u8>,
}

struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

/// Kinds of pieces: what never comes out of a text, and what is always kept whole.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
/// Kinds are numbered from 1 to this.
const LAST_KIND: u64 = 6;

impl SentencePiece {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if it is no SentencePiece model, is larger than any, or is not a Unigram one.
    pub fn read(path: &Path) -> Result<SentencePiece> {
        let size = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
        if size > LARGEST_FILE {
            return Err(Error::model(path, format!("has {size} bytes; no SentencePiece model has so many")));
        }
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let mut model = SentencePiece {
            path: path.to_path_buf(),
            pieces: Vec::new(),
            unknown: 0,
            character_map: Vec::new(),
        };
        let mut kind = UNIGRAM;
        model.parse(&bytes, &mut kind).map_err(|message| model.fault(&message))?;
        match kind {
            UNIGRAM => Ok(model),
            other => {
                let name = ["BPE", "WORD", "CHAR"].get(other.wrapping_sub(2) as usize).unwrap_or(&"unknown");
                Err(Error::model(
                    path,
                    format!("is a SentencePiece model of type {name}; only Unigram models are read"),
                ))
            }
        }
    }

    fn parse(&mut self, bytes: &[u8], kind: &mut u64) -> Result<(), String> {
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => {
                    let number = self.pieces.len();
                    let piece =
                        Piece::parse(piece).map_err(|message| format!("piece {number}: {message}"))?;
                    self.pieces.push(piece);
                }
                (2, Value::Bytes(trainer)) => {
                    for field in Fields(trainer) {
                        match field? {
                            (3, Value::Integer(value)) => *kind = value,
                            // An int32, which protobuf extends to 64 bits.
                            (40, Value::Integer(value)) => self.unknown = value as i32,
                            (3 | 40, _) => return Err("a number of trainer_spec is none".to_owned()),
                            _ => {}
                        }
                    }
                }
                (3, Value::Bytes(normalizer)) => {
                    for field in Fields(normalizer) {
                        match field? {
                            (2, Value::Bytes(map)) => self.character_map = map.to_vec(),
                            (2, _) => return Err("precompiled_charsmap is no text".to_owned()),
                            _ => {}
                        }
                    }
                }
                (1..=3, _) => return Err("a part of it is no message".to_owned()),
                _ => {}
            }
        }
        if self.pieces.is_empty() {
            return Err("it has no pieces".to_owned());
        }
        if !self.character_map.is_empty() {
            character_map::check(&self.character_map)?;
        }
        Ok(())
    }

    /// Returns the place of the unknown token that the file names; nothing if that is not among the pieces.
    pub fn unknown(&self) -> Option<usize> {
        usize::try_from(self.unknown).ok().filter(|&place| place < self.pieces.len())
    }

    /// Returns the place of a piece, if it is there with a score of zero.
    pub fn unscored(&self, text: &str) -> Option<usize> {
        self.pieces.iter().position(|piece| piece.text == text && piece.score == 0.0)
    }

    /// Returns the pieces that are found in a text before it is split: control symbols, which are special, and those of
    /// the user's own, which are not.
    pub fn added_tokens(&self) -> Vec<Token> {
        let added = self.pieces.iter().filter(|piece| matches!(piece.kind, CONTROL | USER_DEFINED));
        added.map(|piece| Token::plain(piece.text.as_str(), piece.kind == CONTROL)).collect()
    }

    /// Returns the normaliser that replaces characters, if the file has one.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the library does not understand it.
    pub fn character_map(&self) -> Result<Option<Precompiled>> {
        if self.character_map.is_empty() {
            return Ok(None);
        }
        Precompiled::from(&self.character_map).map(Some).map_err(|error| self.fault(&error.to_string()))
    }

    /// Makes the model that splits texts.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if there is no unknown token.
    pub fn unigram(&self, unknown: Option<usize>) -> Result<Unigram> {
        let unknown =
            unknown.ok_or_else(|| self.fault(&format!("unk_id is {}, which is no piece", self.unknown)))?;
        let scored = self.pieces.iter().map(|piece| (piece.text.clone(), f64::from(piece.score)));
        Unigram::from(scored.collect(), Some(unknown), false).map_err(|error| self.fault(&error.to_string()))
    }

    fn fault(&self, message: &str) -> Error {
        Error::model(&self.path, format!("is no SentencePiece model that can be read: {message}"))
    }
}

const UNIGRAM: u64 = 1;

impl Piece {
    fn parse(bytes: &[u8]) -> Result<Piece, String> {
        let (mut text, mut score, mut kind) = (None, 0.0, 1);
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(bytes)) => text = Some(bytes),
                (2, Value::Float(value)) => score = value,
                (3, Value::Integer(value)) => kind = value,
                (1..=3, _) => return Err("a field is of the wrong type".to_owned()),
                _ => {}
            }
        }
        let text = text.unwrap_or_default();
        if text.is_empty() || text.len() > LONGEST_PIECE {
            return Err(format!("it has {} bytes, not 1 to {LONGEST_PIECE}", text.len()));
        }
        let text = std::str::from_utf8(text).map_err(|_| "it is no UTF-8")?.to_owned();
        if !score.is_finite() {
            return Err(format!("its score is {score}"));
        }
        if !(1..=LAST_KIND).contains(&kind) {
            return Err(format!("its type is {kind}"));
        }
        Ok(Piece { text, score, kind })
    }
}

/// The fields of a protobuf message, in order.
struct Fields<'a>(&'a [u8]);

/// The value of a field, by its wire type.
enum Value<'a> {
    Integer(u64),
    Float(f32),
    Bytes(&'a [u8]),
    /// A number of eight bytes, which none of the fields that count has.
    Double,
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<(u64, Value<'a>), String> {
        let key = self.integer()?;
        let value = match key & 7 {
            0 => Value::Integer(self.integer()?),
            1 => self.take(8).map(|_| Value::Double)?,
            2 => {
                let length = self.integer()?;
                Value::Bytes(self.take(usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            5 => {
                let bytes = self.take(4)?;
                Value::Float(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            other => return Err(format!("a field has the wire type {other}")),
        };
        match key >> 3 {
            0 => Err("a field has the number 0".to_owned()),
            number => Ok((number, value)),
        }
    }

    /// Reads an integer of seven bits a byte, the lowest first.
    fn integer(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for place in 0..10 {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("an integer has more than ten bytes".to_owned())
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or("it is cut off")?;
        self.0 = rest;
        Ok(taken)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        (!self.0.is_empty()).then(|| self.field())
    }
}
