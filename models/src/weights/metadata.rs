//! What the header of a file says beside its tensors, by key. GGUF files have values of many types; those of safetensors
//! files are all texts.

use std::collections::BTreeMap;

/// All entries of a header.
pub type Metadata = BTreeMap<String, MetadataValue>;

/// A value, whatever number of bits the file spends on it.
#[derive(Debug, Clone, PartialEq)]
pub enum MetadataValue {
    /// Of any width, with or without a sign.
    Integer(i128),
    /// Of 32 or 64 bits.
    Float(f64),
    /// True or false.
    Flag(bool),
    /// UTF-8.
    Text(String),
    /// Of values of one type.
    List(Vec<MetadataValue>),
}

impl MetadataValue {
    /// The text that it is, if it is one.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The integer that it is, if it is one.
    pub fn as_integer(&self) -> Option<i128> {
        match self {
            Self::Integer(value) => Some(*value),
            _ => None,
        }
    }

    /// The list that it is, if it is one.
    pub fn as_list(&self) -> Option<&[MetadataValue]> {
        match self {
            Self::List(values) => Some(values),
            _ => None,
        }
    }
}
