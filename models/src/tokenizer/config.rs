//! `tokenizer_config.json` and `special_tokens_map.json`: the tokens that a tokenizer has beside its vocabulary file.
//!
//! Reads them as transformers' `PreTrainedTokenizerBase._from_pretrained` does. Deliberately does not know what the
//! tokens mean.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::SpecialTokens;
use crate::config::read_json;
use crate::error::{Error, Result};

/// Names of special tokens, in the order in which transformers adds them.
const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The fields of both files as one object.
#[derive(Debug)]
pub(super) struct TokenizerConfig {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl TokenizerConfig {
    /// Absent files are empty ones. The older file wins where the newer one does not list its added tokens by id.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer_config.json");
        let mut fields = read_object(&path)?;
        let newer_is_complete = fields.contains_key("added_tokens_decoder");
        for (name, value) in read_object(&dir.join("special_tokens_map.json"))? {
            if !newer_is_complete || !fields.contains_key(&name) {
                fields.insert(name, value);
            }
        }
        Ok(Self { path, fields })
    }

    /// Any field, `null` as absent.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// `tokenizer_class` without the `Fast` that only says which implementation is meant.
    pub(super) fn class(&self) -> Option<&str> {
        let class = self.get("tokenizer_class")?.as_str()?;
        Some(class.strip_suffix("Fast").unwrap_or(class))
    }

    /// Special tokens by name; `defaults` are those of the tokenizer's class.
    pub(super) fn special_tokens(&self, defaults: &[(&str, &str)]) -> SpecialTokens {
        let default = |name| defaults.iter().find(|d| d.0 == name).map(|d| AddedToken::from(d.1, true));
        let token = |name: &'static str| match self.fields.get(name) {
            Some(Value::Null) => None,
            Some(value) => special_token(value).map(|token| (name, token)),
            None => default(name).map(|token| (name, token)),
        };
        SPECIAL_NAMES.into_iter().filter_map(token).collect()
    }

    /// Adds what the tokenizer does not have as an added token yet: tokens by id, then `special` ones, then additional
    /// ones. Spellings that are in the vocabulary keep their id.
    pub(super) fn add_tokens_to(&self, tokenizer: &mut tokenizers::Tokenizer, special: &SpecialTokens) -> Result<()> {
        for (id, token) in self.added_tokens()? {
            let spelling = token.content.clone();
            self.add(tokenizer, token)?;
            if tokenizer.token_to_id(&spelling) != Some(id) {
                let found = tokenizer.token_to_id(&spelling);
                let problem = format!("added token {spelling:?} should have id {id} and gets {found:?}");
                return Err(Error::checkpoint(&self.path, problem));
            }
        }
        let named = SPECIAL_NAMES.iter().filter_map(|name| special.get(name).cloned());
        for token in named.chain(self.additional().filter_map(special_token)) {
            self.add(tokenizer, token)?;
        }
        Ok(())
    }

    /// Special tokens without a name, as transformers 5 or 4 spells the field.
    pub(super) fn additional(&self) -> impl Iterator<Item = &Value> {
        let fields = ["extra_special_tokens", "additional_special_tokens"];
        let lists = fields.into_iter().filter_map(|name| self.get(name)?.as_array());
        lists.flatten()
    }

    fn add(&self, tokenizer: &mut tokenizers::Tokenizer, token: AddedToken) -> Result<()> {
        let added = tokenizer.get_added_vocabulary().get_vocab().contains_key(&token.content);
        if !added {
            tokenizer.add_tokens([token]).map_err(|e| Error::checkpoint(&self.path, e))?;
        }
        Ok(())
    }

    /// `added_tokens_decoder` in order of id.
    fn added_tokens(&self) -> Result<Vec<(u32, AddedToken)>> {
        let entries = self.get("added_tokens_decoder").and_then(Value::as_object);
        let mut tokens = Vec::new();
        for (key, value) in entries.into_iter().flatten() {
            let special = value.get("special").and_then(Value::as_bool).unwrap_or(false);
            match (key.parse(), added_token(value, special)) {
                (Ok(id), Some(token)) => tokens.push((id, token)),
                _ => return Err(Error::checkpoint(&self.path, format!("added_tokens_decoder: bad entry {key:?}"))),
            }
        }
        tokens.sort_by_key(|(id, _)| *id);
        Ok(tokens)
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    read_json(path)
}

fn special_token(value: &Value) -> Option<AddedToken> {
    added_token(value, true)
}

/// A token spelled as text or as an object with `content` and how it matches.
fn added_token(value: &Value, special: bool) -> Option<AddedToken> {
    if let Some(content) = value.as_str() {
        return Some(AddedToken::from(content, special));
    }
    let token = AddedToken::from(value.get("content")?.as_str()?, special);
    let flag = |name, default| value.get(name).and_then(Value::as_bool).unwrap_or(default);
    Some(
        token
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special)),
    )
}
