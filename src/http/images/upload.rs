//! A file in a body: a part of a form, or text in JSON.

use std::fmt;

use axum::body::Bytes;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A file's bytes: as they are in a form, and in JSON as base64, alone or in a data URL.
pub(super) struct Upload(pub(super) Bytes);

// Bodies are printed; files are not.
impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Upload({} bytes)", self.0.len())
    }
}

impl<'de> Deserialize<'de> for Upload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UploadVisitor)
    }
}

struct UploadVisitor;

impl Visitor<'_> for UploadVisitor {
    type Value = Upload;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a file, base64 or a data URL")
    }

    fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Upload, E> {
        Ok(Upload(bytes.into()))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Upload, E> {
        let base64 = match text.strip_prefix("data:") {
            Some(url) => url.split_once(";base64,").map(|(_, base64)| base64),
            None => Some(text),
        };
        let bytes = base64.and_then(|base64| BASE64.decode(base64).ok());
        bytes.map(|bytes| Upload(bytes.into())).ok_or_else(|| E::custom("must be a file, base64 or a data URL"))
    }
}

/// One value, or a list of them.
#[derive(Debug)]
pub(super) struct OneOrMany<T>(pub(super) Vec<T>);

impl<'de> Deserialize<'de> for OneOrMany<Upload> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor;

        impl<'de> Visitor<'de> for ListVisitor {
            type Value = OneOrMany<Upload>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                UploadVisitor.expecting(f)
            }

            fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Self::Value, E> {
                UploadVisitor.visit_byte_buf(bytes).map(|one| OneOrMany(vec![one]))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                UploadVisitor.visit_str(text).map(|one| OneOrMany(vec![one]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, values: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(values)).map(OneOrMany)
            }
        }

        deserializer.deserialize_any(ListVisitor)
    }
}
