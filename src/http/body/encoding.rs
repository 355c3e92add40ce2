//! Compressed bodies: `Content-Encoding` gzip and deflate, decoded up to the bound that holds for all bodies.

use std::io::Read;

use axum::body::Bytes;
use axum::http::{HeaderMap, header};
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use tale_models::cancel::CancelToken;

use super::memory::Held;
use crate::http::error::ApiError;

/// Bytes that are decoded at once; memory is taken for so many.
const CHUNK_BYTES: usize = 64 << 10;

/// How a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Gzip,
    /// The zlib format as HTTP says, or the bare stream that some clients send.
    Deflate,
}

/// Encodings that have a name and are not decoded here.
const OTHERS: [&str; 5] = ["br", "zstd", "compress", "dcb", "dcz"];

/// What the headers say; `None` is a body as it is.
pub(super) fn of(headers: &HeaderMap) -> Result<Option<Encoding>, ApiError> {
    let mut encoding = None;
    for value in headers.get_all(header::CONTENT_ENCODING) {
        for name in value.to_str().unwrap_or("?").split(',') {
            let name = name.trim().to_ascii_lowercase();
            let found = match &*name {
                "" | "identity" => continue,
                "gzip" | "x-gzip" => Encoding::Gzip,
                "deflate" => Encoding::Deflate,
                other => return Err(ApiError::encoding(OTHERS.into_iter().find(|known| *known == other))),
            };
            if encoding.replace(found).is_some() {
                return Err(ApiError::encoding(None));
            }
        }
    }
    Ok(encoding)
}

/// The body behind `bytes`. No more than `max_bytes` of it are decoded, and their memory is taken as they come; ends early
/// when nobody waits for it.
pub(super) fn decode(
    encoding: Encoding,
    bytes: &[u8],
    max_bytes: usize,
    held: &mut Held,
    cancelled: &CancelToken,
) -> Result<Bytes, ApiError> {
    let (decoder, name): (Box<dyn Read + '_>, _) = match encoding {
        Encoding::Gzip => (Box::new(MultiGzDecoder::new(bytes)), "gzip"),
        Encoding::Deflate if is_zlib(bytes) => (Box::new(ZlibDecoder::new(bytes)), "deflate"),
        Encoding::Deflate => (Box::new(DeflateDecoder::new(bytes)), "deflate"),
    };
    read(decoder, max_bytes, name, held, cancelled)
}

/// Whether `bytes` begin as RFC 1950 says: method 8, and a check that makes 16 bits a multiple of 31.
fn is_zlib(bytes: &[u8]) -> bool {
    matches!(*bytes, [cmf, flags, ..] if cmf & 0x0f == 8 && u16::from_be_bytes([cmf, flags]).is_multiple_of(31))
}

fn read(
    decoder: impl Read,
    max_bytes: usize,
    name: &str,
    held: &mut Held,
    cancelled: &CancelToken,
) -> Result<Bytes, ApiError> {
    let mut decoded = Vec::new();
    let mut decoder = decoder.take(max_bytes as u64 + 1);
    while !cancelled.is_cancelled() {
        if decoded.capacity() - decoded.len() < CHUNK_BYTES {
            let more = decoded.capacity().max(CHUNK_BYTES);
            held.add(more)?;
            decoded.reserve_exact(more);
        }
        let read = decoder.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut decoded);
        if read.map_err(|_| ApiError::malformed(format!("the body is not valid {name}")))? == 0 {
            break;
        }
        if decoded.len() > max_bytes {
            return Err(ApiError::too_large(max_bytes));
        }
    }
    Ok(decoded.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use axum::response::IntoResponse;
    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};

    use tale_models::ClientId;

    use super::super::memory::BodyMemory;
    use super::*;

    fn decode(encoding: Encoding, bytes: &[u8], max_bytes: usize) -> Result<Bytes, ApiError> {
        super::decode(
            encoding,
            bytes,
            max_bytes,
            &mut BodyMemory::new(1 << 30).hold(ClientId(0)),
            &CancelToken::default(),
        )
    }

    const TEXT: &[u8] = b"{\"model\": \"words\", \"prompt\": \"words words words\"}";

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes).expect("into memory");
        encoder.finish().expect("into memory")
    }

    #[test]
    fn every_format_of_the_two_names_is_decoded() {
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::fast());
        let mut bare = DeflateEncoder::new(Vec::new(), Compression::fast());
        zlib.write_all(TEXT).and_then(|()| bare.write_all(TEXT)).expect("into memory");
        for (encoding, bytes) in [
            (Encoding::Gzip, gzip(TEXT)),
            (Encoding::Gzip, [gzip(&TEXT[..9]), gzip(&TEXT[9..])].concat()),
            (Encoding::Deflate, zlib.finish().expect("into memory")),
            (Encoding::Deflate, bare.finish().expect("into memory")),
        ] {
            assert_eq!(decode(encoding, &bytes, TEXT.len()).expect("fits"), TEXT);
            assert_eq!(
                decode(encoding, &bytes, TEXT.len() - 1).expect_err("does not fit").into_response().status(),
                413
            );
        }
    }

    #[test]
    fn damage_is_named_and_bombs_are_not_inflated() {
        let whole = gzip(TEXT);
        for damaged in [&whole[..whole.len() - 1], &whole[..12], b"not gzip", &[&whole[..], b"tail"].concat()] {
            let error = decode(Encoding::Gzip, damaged, 1 << 20).expect_err("damaged");
            assert_eq!(error.into_response().status(), 400);
        }
        let bomb = gzip(&vec![0; 64 << 20]);
        assert!(bomb.len() < 1 << 17);
        assert_eq!(decode(Encoding::Gzip, &bomb, 1 << 20).expect_err("too large").into_response().status(), 413);
        let mut held = BodyMemory::new(1 << 20).hold(ClientId(0));
        let refused = super::decode(Encoding::Gzip, &bomb, 32 << 20, &mut held, &CancelToken::default());
        assert_eq!(refused.expect_err("no memory").into_response().status(), 503);
    }

    #[test]
    fn other_encodings_are_named() {
        let headers = |value: &str| HeaderMap::from_iter([(header::CONTENT_ENCODING, value.parse().expect("ASCII"))]);
        assert_eq!(of(&HeaderMap::new()).expect("none"), None);
        assert_eq!(of(&headers("identity")).expect("none"), None);
        assert_eq!(of(&headers("GZIP")).expect("known"), Some(Encoding::Gzip));
        for (value, message) in [
            ("br", "the content encoding br is not supported; must be gzip or deflate"),
            ("s3cret", "the content encoding is not supported; must be gzip or deflate"),
            ("gzip, gzip", "the content encoding is not supported; must be gzip or deflate"),
        ] {
            let error = of(&headers(value)).expect_err(value);
            assert_eq!(serde_json::to_value(error.body()).expect("serializes")["message"], message);
            let response = error.into_response();
            assert_eq!(response.status(), 415);
            assert_eq!(response.headers()[header::ACCEPT_ENCODING], "gzip, deflate");
        }
    }
}
