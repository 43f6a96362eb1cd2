//! Special and added tokens: what the files name, and how transformers adds it to a vocabulary.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use super::settings::{Settings, read_object};
use crate::error::{Error, Result};

/// The keys of special tokens that every family has, in the order in which tokens that are new get their ids.
const KEYS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Special tokens without which no input can be made.
const NEEDED: [&str; 3] = ["sep_token", "cls_token", "unk_token"];

const EXTRA: &str = "extra_special_tokens";
/// What [`EXTRA`] was called before transformers 5.
const ADDITIONAL: &str = "additional_special_tokens";

/// A token that is found in a text before the text is split, as the files describe it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Token {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    /// Whether it is looked for in the normalised text; where the file does not say, unless it is special.
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Token {
    /// Makes a token that is looked for in the text as it stands.
    pub fn plain(content: impl Into<String>, special: bool) -> Token {
        let (content, normalized) = (content.into(), Some(false));
        Token { content, single_word: false, lstrip: false, rstrip: false, normalized, special }
    }

    fn into_added(self, special: bool) -> AddedToken {
        AddedToken {
            content: self.content,
            single_word: self.single_word,
            lstrip: self.lstrip,
            rstrip: self.rstrip,
            normalized: self.normalized.unwrap_or(!special),
            special,
        }
    }
}

/// A special token with a name such as `sep_token`.
struct Named {
    key: String,
    token: Token,
    /// Whether the file gives no more than its text.
    is_text: bool,
}

/// The special and added tokens of a folder, from `tokenizer_config.json`, `special_tokens_map.json` and
/// `added_tokens.json`; the latter two do not count where the first has `added_tokens_decoder`.
pub(super) struct SpecialTokens {
    settings: PathBuf,
    named: Vec<Named>,
    /// What [`EXTRA`] lists, if the files have that key.
    extra: Option<Vec<Token>>,
    /// What counts in its place otherwise.
    additional: Vec<Token>,
    /// Tokens with their ids.
    added: BTreeMap<u32, Token>,
    /// The file that names those ids.
    added_in: PathBuf,
}

impl SpecialTokens {
    /// Reads what the files of a folder name; a key that none has is as in `defaults`.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if a file does not describe tokens as transformers writes them.
    pub fn read(folder: &Path, settings: &Settings, defaults: &[(&str, &str)]) -> Result<SpecialTokens> {
        let path = settings.path();
        let mut keys = settings.keys().clone();
        if !keys.get(EXTRA).is_some_and(has_entries)
            && let Some(tokens) = keys.shift_remove(ADDITIONAL)
        {
            keys.insert(EXTRA.to_owned(), tokens);
        }
        let mut added = BTreeMap::new();
        let mut added_in = path.to_path_buf();
        if let Some(decoder) = keys.get("added_tokens_decoder") {
            let decoder = decoder.as_object().ok_or_else(|| wrong(path, "added_tokens_decoder", decoder))?;
            for (id, token) in decoder {
                let id =
                    id.parse().map_err(|_| wrong(path, "added_tokens_decoder", &Value::from(id.as_str())))?;
                added.insert(id, token_of(path, "added_tokens_decoder", token)?);
            }
        } else {
            overlay(&mut keys, &folder.join("special_tokens_map.json"))?;
            added_in = folder.join("added_tokens.json");
            let special = special_texts(&keys);
            for (content, id) in read_object(&added_in)?.unwrap_or_default() {
                let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
                let number = number.ok_or_else(|| wrong(&added_in, &content, &id))?;
                let special = special.contains(&content);
                let token = Token { normalized: Some(!special), ..Token::plain(content, special) };
                added.insert(number, token);
            }
        }
        let mut tokens = SpecialTokens {
            settings: path.to_path_buf(),
            named: Vec::new(),
            extra: None,
            additional: tokens_of(path, ADDITIONAL, keys.get(ADDITIONAL))?,
            added,
            added_in,
        };
        tokens.read_named(&keys, defaults)?;
        match keys.get(EXTRA) {
            Some(Value::Object(_)) | None => {}
            some => tokens.extra = Some(tokens_of(path, EXTRA, some)?),
        }
        Ok(tokens)
    }

    /// Reads the tokens that have names: the usual ones, and then those of the model alone.
    fn read_named(&mut self, keys: &Map<String, Value>, defaults: &[(&str, &str)]) -> Result<()> {
        let path = self.settings.clone();
        for key in KEYS {
            let default = defaults.iter().find(|(name, _)| *name == key);
            let default = default.map(|(_, content)| Value::from(*content));
            if let Some(value) = keys.get(key).or(default.as_ref()).filter(|value| !value.is_null()) {
                let token = token_of(&path, key, value)?;
                self.named.push(Named { key: key.to_owned(), token, is_text: value.is_string() });
            }
        }
        let own = keys.iter().filter(|(key, _)| key.ends_with("_token") && !KEYS.contains(&key.as_str()));
        let extra = keys.get(EXTRA).and_then(Value::as_object);
        let own =
            own.filter(|(_, value)| value.is_string() || is_typed(value)).chain(extra.into_iter().flatten());
        // Those described in full come first.
        let (texts, described): (Vec<_>, Vec<_>) = own.partition(|(_, value)| value.is_string());
        for (key, value) in described.into_iter().chain(texts) {
            let token = token_of(&path, key, value)?;
            self.named.push(Named { key: key.clone(), token, is_text: value.is_string() });
        }
        Ok(())
    }

    /// Lets the mask token take the blanks before it, unless a file describes it in full.
    pub fn mask_takes_blanks_before(&mut self) {
        for named in self.named.iter_mut().filter(|named| named.key == "mask_token" && named.is_text) {
            named.token.lstrip = true;
        }
    }

    /// Takes tokens of a vocabulary's own for special, unless the files list [`EXTRA`].
    pub fn take_extra_unless_given(&mut self, tokens: Vec<Token>) {
        self.additional = tokens;
    }

    /// Returns the text of a special token.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if the settings say that there is none.
    pub fn content(&self, key: &str) -> Result<&str> {
        let named = self.named.iter().find(|named| named.key == key);
        let named =
            named.ok_or_else(|| Error::model(&self.settings, format!("`{key}` is null, but is needed")))?;
        Ok(&named.token.content)
    }

    /// Returns the text of a special token and its id.
    ///
    /// # Errors
    ///
    /// As for [`SpecialTokens::content`].
    pub fn identified(&self, tokenizer: &Tokenizer, key: &str) -> Result<(String, u32)> {
        let content = self.content(key)?;
        let id = tokenizer.token_to_id(content);
        let id =
            id.ok_or_else(|| Error::model(&self.settings, format!("`{key}` is no token: {content:?}")))?;
        Ok((content.to_owned(), id))
    }

    /// Adds the tokens to a tokenizer: those with ids in the order of these, the named ones, the others. Those that the
    /// vocabulary does not have get the ids after its last, as in transformers.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if a token that is needed is neither in the vocabulary nor among those with ids, or a token does
    /// not get the id that the files name.
    pub fn add_to(&self, tokenizer: &mut Tokenizer, vocabulary: &Path) -> Result<()> {
        for key in NEEDED {
            let content = self.content(key)?;
            let is_added = self.added.values().any(|token| token.content == content);
            if !is_added && tokenizer.token_to_id(content).is_none() {
                return Err(Error::model(vocabulary, format!("lacks the special token {content}")));
            }
        }
        let names: HashSet<&str> = self.named.iter().map(|named| named.token.content.as_str()).collect();
        let extra = self.extra.as_ref().unwrap_or(&self.additional);
        let named = self.named.iter().map(|named| &named.token);
        let mut seen = HashSet::new();
        let tokens: Vec<AddedToken> = (self.added.values().chain(named).chain(extra))
            .filter(|token| seen.insert(token.content.as_str()))
            .map(|token| {
                let special = token.special || names.contains(token.content.as_str());
                token.clone().into_added(special)
            })
            .collect();
        tokenizer.add_tokens(&tokens);
        for (id, Token { content, .. }) in &self.added {
            let given = tokenizer.token_to_id(content);
            if given != Some(*id) {
                let given = given.map_or("none".to_owned(), |id| id.to_string());
                return Err(Error::model(
                    &self.added_in,
                    format!(
                        "gives the token {content:?} the id {id}, which after the vocabulary would be {given}"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Makes the post-processor that puts `{cls}` and `{sep}` around texts.
    ///
    /// # Errors
    ///
    /// [`Error::Model`] if one of these tokens cannot stand in a template.
    pub fn template(&self, tokenizer: &Tokenizer, single: &str, pair: &str) -> Result<TemplateProcessing> {
        let fault = |error: String| Error::model(&self.settings, error);
        let special = [self.identified(tokenizer, "cls_token")?, self.identified(tokenizer, "sep_token")?];
        let filled =
            |template: &str| template.replace("{cls}", &special[0].0).replace("{sep}", &special[1].0);
        TemplateProcessing::builder()
            .try_single(filled(single))
            .map_err(fault)?
            .try_pair(filled(pair))
            .map_err(fault)?
            .special_tokens(special.to_vec())
            .build()
            .map_err(|error| fault(error.to_string()))
    }
}

/// Puts what `special_tokens_map.json` says in place of the settings.
fn overlay(keys: &mut Map<String, Value>, path: &Path) -> Result<()> {
    for (key, mut value) in read_object(path)?.unwrap_or_default() {
        if key == EXTRA {
            let more = value.as_array().cloned();
            if let Some(mut more) = more {
                let mut all = keys.get(EXTRA).and_then(Value::as_array).cloned().unwrap_or_default();
                more.iter_mut().for_each(mark_special);
                all.extend(more);
                value = all.into();
            }
        } else {
            mark_special(&mut value);
        }
        keys.insert(key, value);
    }
    Ok(())
}

/// Marks the description of a token as that of a special one.
fn mark_special(value: &mut Value) {
    if let Some(token) = value.as_object_mut() {
        token.insert("__type".to_owned(), "AddedToken".into());
        token.insert("special".to_owned(), true.into());
    }
}

/// Returns the texts of the tokens that the settings name as special.
fn special_texts(keys: &Map<String, Value>) -> HashSet<String> {
    let named = KEYS.iter().filter_map(|key| keys.get(*key));
    let extra = keys.get(EXTRA).and_then(Value::as_array);
    named.chain(extra.into_iter().flatten()).filter_map(text_of).map(str::to_owned).collect()
}

fn text_of(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

fn has_entries(value: &Value) -> bool {
    value.as_array().is_some_and(|list| !list.is_empty())
        || value.as_object().is_some_and(|map| !map.is_empty())
}

fn is_typed(value: &Value) -> bool {
    value.get("__type").is_some_and(|kind| kind == "AddedToken")
}

/// Reads a list of tokens; none if there is none.
fn tokens_of(path: &Path, key: &str, value: Option<&Value>) -> Result<Vec<Token>> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(|token| token_of(path, key, token)).collect(),
        Some(other) => Err(wrong(path, key, other)),
    }
}

/// Reads a token: a text, or its description in full.
fn token_of(path: &Path, key: &str, value: &Value) -> Result<Token> {
    match value {
        Value::String(content) => Ok(Token::plain(content.as_str(), true)),
        Value::Object(fields) if is_typed(value) || key == "added_tokens_decoder" => {
            let mut fields = fields.clone();
            fields.shift_remove("__type");
            serde_json::from_value(fields.into())
                .map_err(|error| Error::model(path, format!("`{key}` describes no token: {error}")))
        }
        other => Err(wrong(path, key, other)),
    }
}

fn wrong(path: &Path, key: &str, value: &Value) -> Error {
    Error::model(path, format!("`{key}` describes no token: {value}"))
}
