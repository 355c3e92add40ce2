//! Where a head ends and where a body ends, in the bytes of a connection. Does not know: what any of it means.
//!
//! hyper reads heads and bodies. This runs ahead of it only as far as is needed to hand it one head at a time and to
//! refuse at once what could never arrive. The same parser finds the head's end ([`httparse`]), and the states of a
//! chunked body are hyper's (`proto/h1/decode.rs`), so that the two never differ on a message that hyper takes.

use super::limits::{MAX_CHUNK_BYTES, MAX_HEAD_BYTES, MAX_HEADERS};
use super::refusal::Refusal;

/// Length of the head that `bytes` begin with; `None` when more must come.
pub(super) fn head_length(bytes: &[u8]) -> Result<Option<usize>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    match httparse::Request::new(&mut headers).parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length > MAX_HEAD_BYTES => Err(Refusal::HeadTooLarge),
        Ok(httparse::Status::Complete(length)) => Ok(Some(length)),
        Ok(httparse::Status::Partial) if bytes.len() >= MAX_HEAD_BYTES => Err(Refusal::HeadTooLarge),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(httparse::Error::TooManyHeaders) => Err(Refusal::TooManyHeaders),
        Err(problem) => Err(Refusal::Malformed(match problem {
            httparse::Error::HeaderName => "the name of a header has a character that names cannot have",
            httparse::Error::HeaderValue => "the value of a header has a character that values cannot have",
            httparse::Error::NewLine => "a line of the head does not end as lines of HTTP do",
            httparse::Error::Version => "the version is not HTTP/1.1 or HTTP/1.0",
            _ => "the first line is not a method, a path and a version",
        })),
    }
}

/// What is left of a request's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// This many bytes.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked(Chunk),
}

/// Where in a chunked body the next byte belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chunk {
    /// The digits of a chunk's size.
    Size(u64),
    /// The rest of the line that a size stands on.
    Extension(u64),
    /// Bytes of the chunk.
    Data(u64),
    /// The line end behind a chunk.
    DataEnd,
    /// The beginning of a trailer's line, or of the empty line at the end.
    LineStart,
    /// Within a trailer.
    Trailer,
    /// The LF behind a trailer.
    TrailerLf,
    /// The LF of the empty line at the end.
    EndLf,
    /// Behind the body.
    End,
}

impl Framing {
    /// The body is whole.
    pub(super) fn is_done(self) -> bool {
        matches!(self, Self::Length(0) | Self::Chunked(Chunk::End))
    }

    /// How many of `bytes` belong to the body; they count as taken.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<usize, Refusal> {
        match self {
            Self::Length(left) => {
                let taken = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= taken as u64;
                Ok(taken)
            }
            Self::Chunked(chunk) => take_chunks(chunk, bytes),
        }
    }
}

fn take_chunks(chunk: &mut Chunk, bytes: &[u8]) -> Result<usize, Refusal> {
    let mut taken = 0;
    while taken < bytes.len() && *chunk != Chunk::End {
        if let Chunk::Data(left) = chunk {
            let part = (bytes.len() - taken).min(usize::try_from(*left).unwrap_or(usize::MAX));
            taken += part;
            *left -= part as u64;
            if *left == 0 {
                *chunk = Chunk::DataEnd;
            }
            continue;
        }
        *chunk = chunk.after(bytes[taken])?;
        taken += 1;
    }
    Ok(taken)
}

impl Chunk {
    /// What comes behind this byte. What is no body at all hyper says itself: it sees the same bytes.
    fn after(self, byte: u8) -> Result<Self, Refusal> {
        Ok(match (self, byte) {
            (Self::Size(size) | Self::Extension(size), b'\n') if size == 0 => Self::LineStart,
            (Self::Size(size) | Self::Extension(size), b'\n') => Self::Data(size),
            (Self::Size(size), digit) => match (digit as char).to_digit(16) {
                Some(digit) => Self::Size(larger(size, digit)?),
                None => Self::Extension(size),
            },
            (Self::DataEnd, b'\n') => Self::Size(0),
            (Self::LineStart, b'\r') => Self::EndLf,
            (Self::LineStart, _) => Self::Trailer,
            (Self::Trailer, b'\r') => Self::TrailerLf,
            (Self::TrailerLf, _) => Self::LineStart,
            (Self::EndLf, _) => Self::End,
            (same, _) => same,
        })
    }
}

fn larger(size: u64, digit: u32) -> Result<u64, Refusal> {
    let size = size.saturating_mul(16).saturating_add(digit.into());
    if size > MAX_CHUNK_BYTES { Err(Refusal::ChunkTooLarge) } else { Ok(size) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_end_where_they_end() {
        let head = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        assert_eq!(head_length(format!("{head}GET /b").as_bytes()), Ok(Some(head.len())));
        for length in 0..head.len() {
            assert_eq!(head_length(&head.as_bytes()[..length]), Ok(None), "{length}");
        }
    }

    #[test]
    fn what_will_never_be_a_head_is_refused_before_its_end() {
        let many = format!("GET / HTTP/1.1\r\n{}", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert_eq!(head_length(many.as_bytes()), Err(Refusal::TooManyHeaders));
        let large = format!("GET / HTTP/1.1\r\na: {}", "b".repeat(MAX_HEAD_BYTES));
        assert_eq!(head_length(large.as_bytes()), Err(Refusal::HeadTooLarge));
        assert_eq!(head_length(format!("{large}\r\n\r\n").as_bytes()), Err(Refusal::HeadTooLarge));
        for malformed in ["G\0T", "GET / HTTP/3.0\r\n", "GET / HTTP/1.1\r\na b: c\r\n", "GET / HTTP/1.1\r\na: \x01\r\n"]
        {
            assert!(matches!(head_length(malformed.as_bytes()), Err(Refusal::Malformed(_))), "{malformed:?}");
        }
    }

    /// Takes `body` in pieces of each size, with bytes of the next request behind it.
    fn check_chunked(body: &str) {
        let next = format!("{body}GET / HTTP/1.1\r\n");
        for piece in 1..=next.len() {
            let mut framing = Framing::Chunked(Chunk::Size(0));
            let mut taken = 0;
            while !framing.is_done() {
                let end = next.len().min(taken + piece);
                let part = framing.take(&next.as_bytes()[taken..end]).expect("sound");
                assert!(part > 0, "{body:?} in pieces of {piece}: {framing:?}");
                taken += part;
            }
            assert_eq!(taken, body.len(), "{body:?} in pieces of {piece}");
        }
    }

    #[test]
    fn chunked_bodies_end_where_hyper_says() {
        check_chunked("0\r\n\r\n");
        check_chunked("3\r\nabc\r\n0\r\n\r\n");
        check_chunked("00A ; name=\"0\"\r\n0123456789\r\n1\r\n\n\r\n0;x\r\nt: 1\r\nu: \n2\r\n\r\n");
    }

    #[test]
    fn a_chunk_that_cannot_come_is_refused() {
        for size in ["FFFFFFFFFFFFFFFF", "FFFFFFFFFFFFFFFFFFFFFFFF", "4000001"] {
            let mut framing = Framing::Chunked(Chunk::Size(0));
            assert_eq!(framing.take(format!("1\r\na\r\n{size}\r\n").as_bytes()), Err(Refusal::ChunkTooLarge), "{size}");
        }
        let mut framing = Framing::Chunked(Chunk::Size(0));
        assert_eq!(framing.take(b"4000000\r\nab"), Ok(11));
        assert_eq!(framing, Framing::Chunked(Chunk::Data(MAX_CHUNK_BYTES - 2)));
    }

    #[test]
    fn a_length_is_counted() {
        let mut framing = Framing::Length(5);
        assert_eq!((framing.take(b"abc"), framing.is_done()), (Ok(3), false));
        assert_eq!((framing.take(b"defg"), framing.is_done()), (Ok(2), true));
    }
}
