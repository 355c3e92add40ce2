//! Numbers, texts and metadata values of a header, one after the other.
//!
//! Owns: how each is written, and that none goes beyond the file or takes more than a header may. Does not know: what they mean.

use crate::weights::metadata::MetadataValue;

/// Lists of lists, of which the format allows any depth and nobody needs any.
const MAX_DEPTH: usize = 4;
/// Values of all metadata together, those in lists included: the largest vocabularies, with scores, types and merges, have
/// a million.
pub(super) const MAX_VALUES: usize = 8 << 20;
/// Most bytes of a header; the largest vocabularies have some 30 MB with their scores and merges. A file may be longer
/// than there is memory, and all of it one text.
const MAX_HEADER_BYTES: usize = 128 << 20;
/// Least bytes of a value in a list.
const MIN_VALUE_BYTES: usize = 1;

/// What was read, or what is wrong with it.
pub(super) type Checked<T> = Result<T, String>;

/// A header and the place up to which it is read.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Metadata values read so far.
    num_values: usize,
}

impl<'a> Reader<'a> {
    /// From this place of a file on, as far as a header may go.
    pub(super) fn new(file: &'a [u8], at: usize) -> Self {
        Self { bytes: &file[..file.len().min(MAX_HEADER_BYTES)], at, num_values: 0 }
    }

    /// How many bytes stand before what is read next.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    fn take(&mut self, len: usize) -> Checked<&'a [u8]> {
        let taken = self.bytes[self.at..].get(..len).ok_or_else(|| self.ends_early())?;
        self.at += len;
        Ok(taken)
    }

    fn ends_early(&self) -> String {
        match self.bytes.len() {
            MAX_HEADER_BYTES => format!("its header has more than {MAX_HEADER_BYTES} bytes"),
            _ => format!("it ends within its header, at {}", self.at),
        }
    }

    fn array<const N: usize>(&mut self) -> Checked<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many bytes as were taken: this is a bug"))
    }

    pub(super) fn u32(&mut self) -> Checked<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn size(&mut self) -> Checked<usize> {
        let size = self.array().map(u64::from_le_bytes)?;
        usize::try_from(size).map_err(|_| format!("{size} is no size"))
    }

    /// The number of things of at least `min_bytes` bytes each, which the rest of the file can hold.
    pub(super) fn count(&mut self, min_bytes: usize, things: &str) -> Checked<usize> {
        let count = self.size()?;
        let rest = self.bytes.len() - self.at;
        if count > rest / min_bytes {
            return Err(format!("it claims {count} {things}, for which {rest} bytes are too few"));
        }
        Ok(count)
    }

    pub(super) fn string(&mut self) -> Checked<&'a str> {
        let len = self.size()?;
        std::str::from_utf8(self.take(len)?).map_err(|error| format!("a name in it is not text: {error}"))
    }

    pub(super) fn value(&mut self) -> Checked<MetadataValue> {
        let kind = self.u32()?;
        self.value_of(kind, MAX_DEPTH)
    }

    /// A value of the type with this number, with lists in it down to `depth`.
    fn value_of(&mut self, kind: u32, depth: usize) -> Checked<MetadataValue> {
        self.num_values += 1;
        if self.num_values > MAX_VALUES {
            return Err(format!("its metadata has more than {MAX_VALUES} values"));
        }
        Ok(match kind {
            0 => MetadataValue::Integer(u8::from_le_bytes(self.array()?).into()),
            1 => MetadataValue::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => MetadataValue::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => MetadataValue::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => MetadataValue::Integer(self.u32()?.into()),
            5 => MetadataValue::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => MetadataValue::Float(f32::from_le_bytes(self.array()?).into()),
            7 => MetadataValue::Flag(self.array()? != [0]),
            8 => MetadataValue::Text(self.string()?.to_owned()),
            9 if depth > 0 => MetadataValue::List(self.list(depth - 1)?),
            10 => MetadataValue::Integer(u64::from_le_bytes(self.array()?).into()),
            11 => MetadataValue::Integer(i64::from_le_bytes(self.array()?).into()),
            12 => MetadataValue::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(format!("a metadata value has the unknown type {kind}")),
        })
    }

    fn list(&mut self, depth: usize) -> Checked<Vec<MetadataValue>> {
        let kind = self.u32()?;
        let len = self.count(MIN_VALUE_BYTES, "values of a list")?;
        (0..len).map(|_| self.value_of(kind, depth)).collect()
    }
}
