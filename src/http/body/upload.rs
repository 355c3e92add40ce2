//! A file in a body: a part of a form, or text in JSON.

use std::fmt;

use axum::body::Bytes;
use base64::alphabet::STANDARD;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::{DecodeError, Engine as _};
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A file's bytes: as they are in a form, and in JSON as base64, alone or in a data URL.
pub(in crate::http) struct Upload(pub(in crate::http) Bytes);

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
        let bytes = base64_of(text).map_err(str::to_owned).and_then(decode);
        let bytes = bytes.map_err(|reason| E::custom(format!("must be a file, base64 or a data URL; {reason}")))?;
        Ok(Upload(bytes.into()))
    }
}

/// Base64 as programs write it: either alphabet, with or without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// The base64 of a text that is nothing else, or of a data URL (`data:image/png;charset=utf-8;base64,...`, RFC 2397).
fn base64_of(text: &str) -> Result<&str, &'static str> {
    let text = text.trim();
    let Some(scheme) = text.get(..5).filter(|start| start.eq_ignore_ascii_case("data:")) else {
        let is_url = text.get(..8).is_some_and(|start| start.contains("://"));
        return if is_url { Err("this is the address of a file") } else { Ok(text) };
    };
    let Some((header, data)) = text[scheme.len()..].split_once(',') else {
        return Err("this is a data URL without a comma, behind which its data would be");
    };
    let is_base64 = header.rsplit(';').next().is_some_and(|last| last.trim().eq_ignore_ascii_case("base64"));
    if is_base64 { Ok(data) } else { Err("this is a data URL whose data are not base64") }
}

/// Decodes base64 that may be broken into lines.
fn decode(base64: &str) -> Result<Vec<u8>, String> {
    let symbols: Vec<u8> = base64.bytes().filter(|byte| !byte.is_ascii_whitespace()).map(standard_symbol).collect();
    if symbols.is_empty() {
        return Err("this is empty".to_owned());
    }
    BASE64.decode(&symbols).map_err(|error| match error {
        DecodeError::InvalidByte(at, b'=') => format!("this is base64 with padding inside, at character {}", at + 1),
        DecodeError::InvalidByte(at, _) => {
            format!("character {} is none of base64", at + 1)
        }
        DecodeError::InvalidLength(_) | DecodeError::InvalidLastSymbol(..) | DecodeError::InvalidPadding => {
            "this is base64 that ends early".to_owned()
        }
    })
}

/// The symbol of the standard alphabet for one of the alphabet for URLs.
fn standard_symbol(byte: u8) -> u8 {
    match byte {
        b'-' => b'+',
        b'_' => b'/',
        other => other,
    }
}

/// One value, or a list of them.
#[derive(Debug)]
pub(in crate::http) struct OneOrMany<T>(pub(in crate::http) Vec<T>);

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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<u8>, String> {
        let upload: Result<Upload, serde::de::value::Error> = UploadVisitor.visit_str(text);
        upload.map(|Upload(bytes)| bytes.to_vec()).map_err(|error| error.to_string())
    }

    /// Bytes whose base64 has both symbols in which the alphabets differ, and padding.
    const BYTES: &[u8] = &[0xfb, 0xff, 0xfe, 0x3e, 0x00, 0x3f, 0xff];
    const TEXT: &str = "+//+PgA//w==";

    #[test]
    fn base64_is_taken_as_programs_write_it() {
        let lines = |end: &str| format!("+//+{end}PgA/{end}/w=={end}");
        for text in [
            TEXT.to_owned(),
            TEXT.trim_end_matches('=').to_owned(),
            TEXT.trim_end_matches("==").to_owned() + "=",
            "-__-PgA__w==".to_owned(),
            "-__-PgA__w".to_owned(),
            format!(" \n{TEXT}\t "),
            lines("\n"),
            lines("\r\n"),
            format!("data:image/png;base64,{TEXT}"),
            format!("data:image/png;charset=utf-8;base64,{TEXT}"),
            format!("data:;base64,{TEXT}"),
            format!("DATA:image/png;BASE64,\n{}", lines("\n")),
        ] {
            assert_eq!(read(&text), Ok(BYTES.to_vec()), "{text:?}");
        }
    }

    #[test]
    fn what_is_refused_is_told_why_and_not_repeated() {
        for (text, problem) in [
            ("", "this is empty"),
            ("data:image/png;base64,", "this is empty"),
            ("https://example.org/s3cret.png", "this is the address of a file"),
            ("data:image/png", "this is a data URL without a comma"),
            ("data:image/svg+xml,<svg/>", "this is a data URL whose data are not base64"),
            ("QUJD!s3cret", "character 5 is none of base64"),
            ("s3cret.png", "character 7 is none of base64"),
            ("QQ==QUJD", "this is base64 with padding inside"),
            ("QUJDR", "this is base64 that ends early"),
        ] {
            let error = read(text).expect_err(text);
            let expected = format!("must be a file, base64 or a data URL; {problem}");
            assert!(error.starts_with(&expected) && !error.contains("s3cret"), "{text}: {error}");
        }
    }
}
