//! Tokenizers against transformers' own: with small vocabularies whose tokens are on file, and, where Python is there,
//! with real vocabularies and real sentences.

mod answers;
#[path = "../common/interpreter.rs"]
mod interpreter;
mod python;
mod refusals;
mod support;
