//! One component of a checkpoint: the checkpoint with a name.

use std::path::PathBuf;

use serde::de::DeserializeOwned;

use super::{CONFIG, Checkpoint, Mode};
use crate::chat_template::ChatTemplates;
use crate::config::{Bounded, Fields, parse_json};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// A network, tokenizer or scheduler of a checkpoint, not loaded.
#[derive(Debug, Clone, Copy)]
pub struct Component<'a> {
    checkpoint: &'a dyn Checkpoint,
    name: &'a str,
}

impl<'a> Component<'a> {
    pub(super) fn new(checkpoint: &'a dyn Checkpoint, name: &'a str) -> Self {
        Self { checkpoint, name }
    }

    /// Where a file of it lies, for messages.
    pub fn path(&self, file: &str) -> PathBuf {
        self.checkpoint.path(self.name, file)
    }

    /// Where its `config.json` lies, for messages.
    pub fn config_path(&self) -> PathBuf {
        self.path(CONFIG)
    }

    /// Parses its `config.json`, whose fields are within the bounds of `T`.
    pub fn config<T: Bounded>(&self) -> Result<T> {
        self.fields(CONFIG)?.all()
    }

    /// The fields of a JSON file of it, where what an absent field means depends on who reads it.
    pub fn fields(&self, file: &str) -> Result<Fields> {
        Fields::of(self.path(file), &self.bytes(file)?)
    }

    /// As [`Component::fields`]; `None` where there is no such file.
    pub fn fields_if_present(&self, file: &str) -> Result<Option<Fields>> {
        let bytes = self.checkpoint.file(self.name, file)?;
        bytes.map(|bytes| Fields::of(self.path(file), &bytes)).transpose()
    }

    /// Parses another JSON file of it.
    pub fn json<T: DeserializeOwned>(&self, file: &str) -> Result<T> {
        parse_json(&self.path(file), &self.bytes(file)?)
    }

    /// As [`Component::json`]; `None` where there is no such file.
    pub fn json_if_present<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>> {
        let bytes = self.checkpoint.file(self.name, file)?;
        bytes.map(|bytes| parse_json(&self.path(file), &bytes)).transpose()
    }

    /// The content of a file that it must have.
    pub fn bytes(&self, file: &str) -> Result<Vec<u8>> {
        let missing = || Error::checkpoint(self.path(file), "there is no such file");
        self.checkpoint.file(self.name, file)?.ok_or_else(missing)
    }

    /// The tokenizer that it is or has.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.checkpoint.tokenizer(self.name)
    }

    /// The tokenizer that it is or has, for an encoder with embeddings for so many ids, whose prompts are filled up to
    /// `length` ids. Refused where that encoder could not take what it gives.
    pub fn tokenizer_of_encoder(&self, vocab_size: usize, length: usize) -> Result<Tokenizer> {
        let tokenizer = self.tokenizer()?;
        if let Some(id) = tokenizer.id_beyond(vocab_size, true) {
            let problem = format!("has a token with id {id}; the text encoder's vocab_size is {vocab_size}");
            return Err(Error::checkpoint(self.path(""), problem));
        }
        let tried = tokenizer.encode_padded("", length);
        tried.map_err(|error| Error::checkpoint(self.path(""), format!("makes no prompts: {error}")))?;
        Ok(tokenizer)
    }

    /// Its chat templates, if it has any.
    pub fn chat_template(&self) -> Result<Option<ChatTemplates>> {
        self.checkpoint.chat_template(self.name)
    }

    /// Its weights, to compute with.
    pub fn weights(&self, placement: &Placement) -> Result<Weights> {
        self.open(Mode::Load, placement)
    }

    pub(super) fn open(&self, mode: Mode, placement: &Placement) -> Result<Weights> {
        self.checkpoint.weights(self.name, mode, placement)
    }
}
