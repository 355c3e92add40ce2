//! A file in a body: a part of a form, text in JSON, or a frame of a video that this server has made.

use std::fmt;

use axum::body::Bytes;
use base64::alphabet::STANDARD;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::{DecodeError, Engine as _};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// An image that a request brings.
pub(in crate::http) enum Upload {
    /// A file's bytes: as they are in a form, and in JSON as base64, alone or in a data URL.
    File(Bytes),
    /// One that lies here already.
    Frame(FrameOf),
}

/// A frame of a video.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::http) struct FrameOf {
    pub(in crate::http) video_id: String,
    pub(in crate::http) end: End,
}

/// Which frame of a video.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::http) enum End {
    First,
    Last,
}

/// A file that is spelled as one.
struct File(Bytes);

impl<'de> Deserialize<'de> for File {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Upload::deserialize(deserializer)? {
            Upload::File(bytes) => Ok(Self(bytes)),
            Upload::Frame(_) => Err(D::Error::custom("must be base64 or a data URL")),
        }
    }
}

/// An image that is not spelled as a file. `image_url` is OpenAI's.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    image_url: Option<File>,
    file_id: Option<IgnoredAny>,
    video_id: Option<String>,
    frame: Option<End>,
}

impl Reference {
    fn into_upload<E: Error>(self) -> Result<Upload, E> {
        match self {
            Self { file_id: Some(_), .. } => {
                Err(E::custom("has a file_id; no files are kept here, give image_url or video_id"))
            }
            Self { image_url: Some(File(bytes)), video_id: None, frame: None, .. } => Ok(Upload::File(bytes)),
            Self { image_url: None, video_id: Some(video_id), frame: Some(end), .. } => {
                Ok(Upload::Frame(FrameOf { video_id, end }))
            }
            Self { image_url: None, video_id: Some(_), frame: None, .. } => {
                Err(E::custom("has a video_id without frame, which is first or last"))
            }
            _ => Err(E::custom("must have either image_url alone or video_id and frame")),
        }
    }
}

impl Upload {
    /// The file's bytes; `None` for a frame.
    pub(in crate::http) fn file(&self) -> Option<&Bytes> {
        match self {
            Self::File(bytes) => Some(bytes),
            Self::Frame(_) => None,
        }
    }

    /// The bytes of a file.
    ///
    /// # Panics
    ///
    /// For a frame, in whose place its file has to be put before.
    pub(in crate::http) fn into_file(self) -> Bytes {
        match self {
            Self::File(bytes) => bytes,
            Self::Frame(_) => unreachable!("frames are fetched before files are decoded: this is a bug"),
        }
    }
}

// Bodies are printed; files are not.
impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(bytes) => write!(f, "Upload({} bytes)", bytes.len()),
            Self::Frame(frame) => write!(f, "Upload({frame:?})"),
        }
    }
}

impl<'de> Deserialize<'de> for Upload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UploadVisitor)
    }
}

struct UploadVisitor;

impl<'de> Visitor<'de> for UploadVisitor {
    type Value = Upload;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a file, base64, a data URL or a frame of a video")
    }

    fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Upload, E> {
        Ok(Upload::File(bytes.into()))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Upload, E> {
        let bytes = base64_of(text).map_err(str::to_owned).and_then(decode);
        let bytes = bytes.map_err(|reason| E::custom(format!("must be a file, base64 or a data URL; {reason}")))?;
        Ok(Upload::File(bytes.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Upload, A::Error> {
        Reference::deserialize(MapAccessDeserializer::new(fields))?.into_upload()
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

            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Self::Value, A::Error> {
                UploadVisitor.visit_map(fields).map(|one| OneOrMany(vec![one]))
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
        match upload {
            Ok(Upload::File(bytes)) => Ok(bytes.to_vec()),
            Ok(Upload::Frame(_)) => unreachable!("a text is a file"),
            Err(error) => Err(error.to_string()),
        }
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

    #[test]
    fn a_frame_of_a_video_is_named_by_its_end() {
        let read = |json: &str| serde_json::from_str::<OneOrMany<Upload>>(json).map_err(|error| error.to_string());
        let frame = |end| FrameOf { video_id: "video_1".to_owned(), end };
        for (word, end) in [("first", End::First), ("last", End::Last)] {
            let OneOrMany(uploads) =
                read(&format!(r#"{{"video_id": "video_1", "frame": "{word}"}}"#)).expect("a frame");
            assert!(matches!(&uploads[..], [Upload::Frame(found)] if *found == frame(end)), "{uploads:?}");
        }
        let url = format!(r#"[{{"image_url": "data:;base64,{TEXT}"}}, "{TEXT}"]"#);
        let OneOrMany(files) = read(&url).expect("two files");
        assert!(files.iter().all(|file| matches!(file, Upload::File(bytes) if bytes == BYTES)), "{files:?}");
        for (json, problem) in [
            (r#"{"file_id": "file_1"}"#, "has a file_id; no files are kept here"),
            (r#"{"video_id": "video_1"}"#, "has a video_id without frame"),
            (r#"{"frame": "last"}"#, "must have either image_url alone"),
            (r#"{"video_id": "video_1", "frame": "last", "image_url": "QUJD"}"#, "must have either image_url alone"),
            (r#"{"video_id": "video_1", "frame": "third"}"#, "unknown variant"),
            (r#"{"url": "x"}"#, "unknown field"),
        ] {
            let error = read(json).expect_err(json);
            assert!(error.starts_with(problem), "{json}: {error}");
        }
    }
}
