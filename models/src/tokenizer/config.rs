//! The one rule for special tokens: what `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say
//! beside the vocabulary file, and which of them counts.
//!
//! Source: transformers 5, `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`. A configuration
//! with `added_tokens_decoder` is complete, and the two older files are not read. Without it, what
//! `special_tokens_map.json` has replaces what the configuration has. Tokenizers, chat templates and end-of-sequence
//! ids all ask here. Deliberately does not know what the tokens mean.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::SpecialTokens;
use super::outline::{MAX_ADDED_TOKENS, count_problem, piece_problem};
use crate::config::read_json_if_present;
use crate::error::{Error, Result};

/// Names of special tokens that every tokenizer has a place for, in the order in which transformers adds them.
const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The fields of the files as one object, and the tokens that have ids.
#[derive(Debug)]
pub(crate) struct TokenizerConfig {
    path: PathBuf,
    fields: Map<String, Value>,
    added: BTreeMap<u32, AddedToken>,
}

impl TokenizerConfig {
    /// Reads what there is in `dir`; absent files are empty ones.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer_config.json");
        let fields = read_object(&path)?;
        let mut config = Self { path, fields, added: BTreeMap::new() };
        match config.fields.get("added_tokens_decoder").cloned() {
            Some(Value::Object(entries)) => config.read_added_tokens(&entries)?,
            Some(_) => return Err(Error::checkpoint(&config.path, "added_tokens_decoder is no object")),
            None => config.read_older_files(dir)?,
        }
        Ok(config)
    }

    fn read_added_tokens(&mut self, entries: &Map<String, Value>) -> Result<()> {
        for (key, value) in entries {
            let special = value.get("special").and_then(Value::as_bool).unwrap_or(false);
            match (key.parse(), added_token(value, special)) {
                (Ok(id), Some(token)) => drop(self.added.insert(id, token)),
                _ => return Err(Error::checkpoint(&self.path, format!("added_tokens_decoder: bad entry {key:?}"))),
            }
        }
        Ok(())
    }

    fn read_older_files(&mut self, dir: &Path) -> Result<()> {
        for (name, value) in read_object(&dir.join("special_tokens_map.json"))? {
            let merged = match (name.as_str(), self.fields.get(&name), value) {
                // The one field that is joined.
                ("extra_special_tokens", Some(Value::Array(own)), Value::Array(others)) => {
                    let known: BTreeSet<String> = own.iter().map(Value::to_string).collect();
                    let new = others.into_iter().filter(|token| !known.contains(&token.to_string()));
                    Value::Array(own.iter().cloned().chain(new).collect())
                }
                (_, _, value) => value,
            };
            self.fields.insert(name, merged);
        }
        let path = dir.join("added_tokens.json");
        let named = self.special_tokens(&[]).into_values();
        let special = named.chain(self.additional().filter_map(special_token)).map(|token| token.content);
        let special: BTreeSet<String> = special.collect();
        let mut added = BTreeMap::new();
        for (spelling, id) in read_object(&path)? {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| Error::checkpoint(&path, format!("{spelling:?} has no id")))?;
            let special = special.contains(&spelling);
            added.insert(id, AddedToken::from(spelling, special));
        }
        self.added = added;
        Ok(())
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

    /// Special tokens by name; `defaults` are those of the tokenizer's class. A token that has an id matches as the
    /// entry with the id says.
    pub(super) fn special_tokens(&self, defaults: &[(&str, &str)]) -> SpecialTokens {
        let default = |name: &str| defaults.iter().find(|d| d.0 == name).map(|d| AddedToken::from(d.1, true));
        let mut listed: BTreeMap<&str, &AddedToken> = BTreeMap::new();
        for token in self.added.values() {
            listed.entry(&token.content).or_insert(token);
        }
        let as_added = |token: AddedToken| match listed.get(token.content.as_str()) {
            Some(added) => (*added).clone().special(true),
            None => token,
        };
        let mut tokens = SpecialTokens::new();
        for name in SPECIAL_NAMES {
            let token = match self.fields.get(name) {
                Some(value) => special_token(value),
                None => default(name),
            };
            tokens.extend(token.map(|token| (name.to_owned(), as_added(token))));
        }
        for (name, value) in self.model_specific() {
            tokens.extend(special_token(value).map(|token| (name.clone(), as_added(token))));
        }
        tokens
    }

    /// Spellings of the special tokens by the names under which chat templates find them.
    pub(crate) fn spellings(&self) -> BTreeMap<String, String> {
        self.special_tokens(&[]).into_iter().map(|(name, token)| (name, token.content)).collect()
    }

    /// Tokens with names of the model's own (`image_token`).
    fn model_specific(&self) -> impl Iterator<Item = (&String, &Value)> {
        let own = self.fields.iter().filter(|(name, value)| {
            name.ends_with("_token")
                && !SPECIAL_NAMES.contains(&name.as_str())
                && (value.is_string() || value.is_object())
        });
        own.chain(self.get("extra_special_tokens").and_then(Value::as_object).into_iter().flatten())
    }

    /// Adds tokens by id, then `special` ones, then additional ones. Spellings that are in the vocabulary keep their
    /// id; a token that the tokenizer has matches from now on as its entry by id says.
    pub(super) fn add_tokens_to(&self, tokenizer: &mut tokenizers::Tokenizer, special: &SpecialTokens) -> Result<()> {
        let named: BTreeSet<&str> = special.values().map(|token| token.content.as_str()).collect();
        let is_there = |tokenizer: &tokenizers::Tokenizer, token: &AddedToken| {
            tokenizer.get_added_vocabulary().get_vocab().contains_key(&token.content)
        };
        // `added_tokens.json` has no flags: where the tokenizer has the token too, its own count.
        let has_flags = self.fields.contains_key("added_tokens_decoder");
        let by_id = self.added.values().filter(|token| has_flags || !is_there(tokenizer, token));
        let by_id = by_id.map(|token| token.clone().special(token.special || named.contains(token.content.as_str())));
        self.add(tokenizer, by_id.collect())?;
        for (id, token) in &self.added {
            let found = tokenizer.token_to_id(&token.content);
            if found != Some(*id) {
                let problem = format!("added token {:?} should have id {id} and gets {found:?}", token.content);
                return Err(Error::checkpoint(&self.path, problem));
            }
        }
        let others = special.iter().filter(|(name, _)| !SPECIAL_NAMES.contains(&name.as_str()));
        let named = SPECIAL_NAMES.iter().filter_map(|name| special.get(*name)).chain(others.map(|(_, token)| token));
        let mut new = Vec::new();
        let mut spellings = BTreeSet::new();
        for token in named.cloned().chain(self.additional().filter_map(special_token)) {
            if !is_there(tokenizer, &token) && spellings.insert(token.content.clone()) {
                new.push(token);
            }
        }
        self.add(tokenizer, new)
    }

    /// Special tokens without a name, as transformers 5 or 4 spells the field.
    pub(super) fn additional(&self) -> impl Iterator<Item = &Value> {
        let fields = ["extra_special_tokens", "additional_special_tokens"];
        let lists = fields.into_iter().filter_map(|name| self.get(name)?.as_array());
        lists.flatten()
    }

    /// Adds tokens, all at once: the library builds its search anew each time.
    fn add(&self, tokenizer: &mut tokenizers::Tokenizer, tokens: Vec<AddedToken>) -> Result<()> {
        let longest = tokens.iter().map(|token| token.content.len()).max().unwrap_or(0);
        let problem = count_problem("added tokens", tokens.len(), MAX_ADDED_TOKENS).or_else(|| piece_problem(longest));
        if let Some(problem) = problem {
            return Err(Error::checkpoint(&self.path, problem));
        }
        if !tokens.is_empty() {
            tokenizer.add_tokens(tokens).map_err(|e| Error::checkpoint(&self.path, e))?;
        }
        Ok(())
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    Ok(read_json_if_present(path)?.unwrap_or_default())
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
