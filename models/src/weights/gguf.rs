//! The header of a GGUF file: its metadata; names, types and places of its tensors. Nothing in it is believed: counts,
//! lengths, offsets and sizes are held against the file before anything is taken from them.
//!
//! Source of the format: ggml `docs/gguf.md` (versions 2 and 3, little-endian). Dimensions are listed from the innermost
//! on, the other way round than everywhere else. ComfyUI-GGUF goes beyond it in two ways, which are read too: kernels of
//! three-dimensional convolutions have five dimensions (`tools/fix_5d_tensors.py`), and a tensor whose rows are no whole
//! blocks lies as rows of 256 values, its shape in the metadata (`tools/convert.py`, `get_orig_shape` of `loader.py`).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

use super::mapped::Located;
use super::metadata::{Metadata, MetadataValue};
use super::stored::Stored;
use crate::error::{Error, Result};

pub(super) const MAGIC: &[u8] = b"GGUF";
const DEFAULT_ALIGNMENT: usize = 32;
/// ggml's own tensors have four at most, those of convolutions over time, height and width have five.
const MAX_DIMENSIONS: u32 = 5;
/// In front of a tensor's name: the key of the shape that it has, outermost first, where the file keeps it in another.
const ORIGINAL_SHAPE: &str = "comfy.gguf.orig_shape.";
/// Lists of lists, of which the format allows any depth and nobody needs any.
const MAX_DEPTH: usize = 4;
/// Values of all metadata together, those in lists included: the largest vocabularies, with scores, types and merges, have
/// a million.
const MAX_VALUES: usize = 8 << 20;
/// Most bytes of a header; the largest vocabularies have some 30 MB with their scores and merges. A file may be longer
/// than there is memory, and all of it one text.
const MAX_HEADER_BYTES: usize = 128 << 20;
/// Most tensors; the largest published files have some thousand.
pub(super) const MAX_TENSORS: usize = 1 << 20;
/// Least bytes of a metadata entry (length of its key, type, a value), of a tensor's (length of its name, number of
/// dimensions, type, offset) and of a value in a list.
const MIN_ENTRY_BYTES: usize = 13;
const MIN_TENSOR_BYTES: usize = 24;
const MIN_VALUE_BYTES: usize = 1;

/// Types by their numbers in files.
const TYPES: [(u32, Stored); 13] = [
    (0, Stored::Plain(Dtype::F32)),
    (1, Stored::Plain(Dtype::F16)),
    (2, Stored::Blocks(GgmlDType::Q4_0)),
    (3, Stored::Blocks(GgmlDType::Q4_1)),
    (6, Stored::Blocks(GgmlDType::Q5_0)),
    (7, Stored::Blocks(GgmlDType::Q5_1)),
    (8, Stored::Blocks(GgmlDType::Q8_0)),
    (10, Stored::Blocks(GgmlDType::Q2K)),
    (11, Stored::Blocks(GgmlDType::Q3K)),
    (12, Stored::Blocks(GgmlDType::Q4K)),
    (13, Stored::Blocks(GgmlDType::Q5K)),
    (14, Stored::Blocks(GgmlDType::Q6K)),
    (30, Stored::Plain(Dtype::BF16)),
];

/// Types that are not read, by their numbers, for messages. Source: gguf-py `constants.py`, `GGMLQuantizationType`.
const UNREAD_TYPES: [(u32, &str); 21] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

/// What a header says.
pub(super) struct Header {
    pub metadata: Metadata,
    pub tensors: Vec<(String, Located)>,
}

/// Reads and checks the header of the file at `path`, which is mapped as `bytes`; `file` is its position among the
/// component's files.
pub(super) fn read_header(path: &Path, bytes: &[u8], file: usize) -> Result<Header> {
    let unsound = |problem| Error::checkpoint(path, format!("is not a sound GGUF file: {problem}"));
    let mut header = read(bytes).map_err(unsound)?;
    header.tensors.iter_mut().for_each(|(_, located)| located.file = file);
    Ok(header)
}

type Checked<T> = Result<T, String>;

fn read(bytes: &[u8]) -> Checked<Header> {
    let header = &bytes[..bytes.len().min(MAX_HEADER_BYTES)];
    let mut reader = Reader { bytes: header, at: MAGIC.len(), num_values: 0 };
    match reader.u32()? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => return Err("it is big-endian".to_owned()),
        version => return Err(format!("its version is {version}; read are 2 and 3")),
    }
    let num_tensors = reader.count(MIN_TENSOR_BYTES, "tensors")?;
    if num_tensors > MAX_TENSORS {
        return Err(format!("it claims {num_tensors} tensors; at most {MAX_TENSORS}"));
    }
    let num_entries = reader.count(MIN_ENTRY_BYTES, "metadata entries")?;
    let mut metadata = Metadata::new();
    for _ in 0..num_entries {
        let key = reader.string()?.to_owned();
        if metadata.contains_key(&key) {
            return Err(format!("its metadata has `{key}` twice"));
        }
        let value = reader.value()?;
        metadata.insert(key, value);
    }
    let alignment = metadata.get("general.alignment").and_then(MetadataValue::as_integer);
    let alignment = alignment.map_or(DEFAULT_ALIGNMENT, |bytes| usize::try_from(bytes).unwrap_or(0));
    if !alignment.is_power_of_two() || alignment < 8 {
        return Err(format!("general.alignment is {alignment}; it must be a power of two from 8 on"));
    }
    let claims: Vec<Claim<'_>> = (0..num_tensors).map(|_| reader.tensor()).collect::<Checked<_>>()?;
    let data = reader.at.checked_next_multiple_of(alignment).ok_or("its header never ends")?;
    let original_shapes = original_shapes(&metadata)?;
    let mut tensors = Vec::with_capacity(claims.len());
    for claim in &claims {
        let (name, mut located) = claim.locate(data, alignment, bytes.len())?;
        if let Some(shape) = original_shapes.get(claim.name) {
            located.shape = claim.reshaped(shape)?;
        }
        tensors.push((name, located));
    }
    check_apart(&tensors)?;
    Ok(Header { metadata, tensors })
}

/// Shapes by the names of their tensors, outermost dimension first.
fn original_shapes(metadata: &Metadata) -> Checked<BTreeMap<&str, Vec<usize>>> {
    let mut shapes = BTreeMap::new();
    for (key, value) in metadata {
        if let Some(tensor) = key.strip_prefix(ORIGINAL_SHAPE) {
            shapes.insert(tensor, shape_of(value).map_err(|problem| format!("`{key}` {problem}"))?);
        }
    }
    Ok(shapes)
}

fn shape_of(value: &MetadataValue) -> Checked<Vec<usize>> {
    let list = value.as_list().ok_or("is no list")?;
    if list.len() > MAX_DIMENSIONS as usize {
        return Err(format!("has {} dimensions; at most {MAX_DIMENSIONS} are possible", list.len()));
    }
    let dimension = |value: &MetadataValue| {
        let dimension = value.as_integer().ok_or("is no list of whole numbers")?;
        usize::try_from(dimension).map_err(|_| "has a negative dimension".to_owned())
    };
    list.iter().map(dimension).collect()
}

/// What a header claims of one tensor.
struct Claim<'a> {
    name: &'a str,
    /// Innermost first.
    dimensions: Vec<usize>,
    stored: Stored,
    /// From the start of the data.
    offset: usize,
}

impl Claim<'_> {
    fn locate(&self, data: usize, alignment: usize, file_len: usize) -> Checked<(String, Located)> {
        let Self { name, stored, offset, .. } = self;
        if !offset.is_multiple_of(alignment) {
            return Err(format!("tensor `{name}` starts at {offset}, which is no multiple of {alignment}"));
        }
        let shape: Vec<usize> = self.dimensions.iter().rev().copied().collect();
        let size =
            self.size().ok_or_else(|| format!("tensor `{name}` {shape:?} does not come in blocks of {stored}"))?;
        let end = data.checked_add(*offset).and_then(|start| start.checked_add(size));
        match end {
            Some(end) if end <= file_len => {
                Ok((name.to_string(), Located { file: 0, stored: *stored, shape, bytes: end - size..end }))
            }
            _ => Err(format!(
                "tensor `{name}` {shape:?} of {stored} needs {size} bytes at {offset}, the file ends before"
            )),
        }
    }

    /// The shape that the metadata gives, which has as many values as the file has.
    fn reshaped(&self, shape: &[usize]) -> Checked<Vec<usize>> {
        let elements = |shape: &[usize]| shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
        if elements(shape) == elements(&self.dimensions) {
            return Ok(shape.to_vec());
        }
        let Self { name, dimensions, .. } = self;
        let found: Vec<usize> = dimensions.iter().rev().copied().collect();
        Err(format!(
            "tensor `{name}` {found:?} has not as many values as the shape {shape:?} of `{ORIGINAL_SHAPE}{name}`"
        ))
    }

    /// Bytes; rows are whole blocks.
    fn size(&self) -> Option<usize> {
        let (block_values, block_bytes) = self.stored.block();
        let columns = self.dimensions.first().copied().unwrap_or(1);
        let rows = self.dimensions.iter().skip(1).try_fold(1usize, |rows, dim| rows.checked_mul(*dim))?;
        let is_whole = columns.is_multiple_of(block_values);
        (columns / block_values).checked_mul(block_bytes)?.checked_mul(rows).filter(|_| is_whole)
    }
}

/// No name twice, no byte in two tensors.
fn check_apart(tensors: &[(String, Located)]) -> Checked<()> {
    let mut names = BTreeSet::new();
    if let Some((twice, _)) = tensors.iter().find(|(name, _)| !names.insert(name)) {
        return Err(format!("tensor `{twice}` is there twice"));
    }
    let mut spans: Vec<(&Range<usize>, &str)> = tensors
        .iter()
        .map(|(name, located)| (&located.bytes, name.as_str()))
        .filter(|(span, _)| !span.is_empty())
        .collect();
    spans.sort_unstable_by_key(|(span, _)| span.start);
    match spans.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
        Some(pair) => Err(format!("tensors `{}` and `{}` overlap", pair[0].1, pair[1].1)),
        None => Ok(()),
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Metadata values read so far.
    num_values: usize,
}

impl<'a> Reader<'a> {
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

    fn u32(&mut self) -> Checked<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn size(&mut self) -> Checked<usize> {
        let size = self.array().map(u64::from_le_bytes)?;
        usize::try_from(size).map_err(|_| format!("{size} is no size"))
    }

    /// The number of things of at least `min_bytes` bytes each, which the rest of the file can hold.
    fn count(&mut self, min_bytes: usize, things: &str) -> Checked<usize> {
        let count = self.size()?;
        let rest = self.bytes.len() - self.at;
        if count > rest / min_bytes {
            return Err(format!("it claims {count} {things}, for which {rest} bytes are too few"));
        }
        Ok(count)
    }

    fn string(&mut self) -> Checked<&'a str> {
        let len = self.size()?;
        std::str::from_utf8(self.take(len)?).map_err(|error| format!("a name in it is not text: {error}"))
    }

    fn value(&mut self) -> Checked<MetadataValue> {
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

    fn tensor(&mut self) -> Checked<Claim<'a>> {
        let name = self.string()?;
        let num_dimensions = self.u32()?;
        if num_dimensions > MAX_DIMENSIONS {
            return Err(format!(
                "tensor `{name}` has {num_dimensions} dimensions; at most {MAX_DIMENSIONS} are possible"
            ));
        }
        let dimensions = (0..num_dimensions).map(|_| self.size()).collect::<Checked<_>>()?;
        let number = self.u32()?;
        let stored = TYPES.iter().find(|(known, _)| *known == number).map(|(_, stored)| *stored).ok_or_else(|| {
            let known = TYPES.map(|(_, stored)| stored.to_string()).join(", ");
            let called = UNREAD_TYPES.iter().find(|(unread, _)| *unread == number).map(|(_, called)| *called);
            let found = called.map_or_else(|| format!("type {number} of ggml"), |called| format!("type {called}"));
            format!("tensor `{name}` has {found}; read are {known}")
        })?;
        Ok(Claim { name, dimensions, stored, offset: self.size()? })
    }
}

#[cfg(test)]
mod tests {
    use tale_kernels::QuantisedMatrix;

    use super::*;

    /// A file with two tensors, `a` [2, 32] in Q8_0 and `b` [3] in F32, and some metadata.
    struct Made {
        version: u32,
        alignment: u32,
        num_tensors: u64,
        num_entries: u64,
        /// Name, dimensions (innermost first), type, offset.
        tensors: Vec<(&'static str, Vec<u64>, u32, u64)>,
        data_len: usize,
        /// Further metadata entries, as they are written.
        more: Vec<Vec<u8>>,
    }

    impl Default for Made {
        fn default() -> Self {
            let tensors = vec![("a", vec![32, 2], 8, 0), ("b", vec![3], 0, 128)];
            Self { version: 3, alignment: 64, num_tensors: 2, num_entries: 4, tensors, data_len: 140, more: Vec::new() }
        }
    }

    impl Made {
        fn bytes(&self) -> Vec<u8> {
            let mut bytes = MAGIC.to_vec();
            let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
            bytes.extend(self.version.to_le_bytes());
            bytes.extend(self.num_tensors.to_le_bytes());
            bytes.extend((self.num_entries + self.more.len() as u64).to_le_bytes());
            bytes.extend([string("general.architecture"), 8u32.to_le_bytes().into(), string("flux")].concat());
            bytes.extend(
                [&string("general.alignment")[..], &4u32.to_le_bytes(), &self.alignment.to_le_bytes()].concat(),
            );
            // Lists of strings and of numbers.
            bytes.extend([&string("list")[..], &[9, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]].concat());
            bytes.extend([string("x"), string("yz")].concat());
            bytes.extend(
                [&string("n")[..], &[9, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]].concat(),
            );
            bytes.extend(self.more.concat());
            for (name, dimensions, kind, offset) in &self.tensors {
                bytes.extend(string(name));
                bytes.extend((dimensions.len() as u32).to_le_bytes());
                dimensions.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
                bytes.extend([&kind.to_le_bytes()[..], &offset.to_le_bytes()].concat());
            }
            bytes.resize(bytes.len().next_multiple_of(64) + self.data_len, 0);
            bytes
        }
    }

    #[test]
    fn tensors_are_found_where_they_lie() {
        let bytes = Made::default().bytes();
        let header = read(&bytes).expect("is sound");
        assert_eq!(header.metadata["general.architecture"].as_text(), Some("flux"));
        let data = bytes.len() - 140;
        let found: Vec<_> = header.tensors.iter().map(|(name, t)| (&name[..], &t.shape[..], t.bytes.clone())).collect();
        assert_eq!(found, [("a", &[2, 32][..], data..data + 68), ("b", &[3][..], data + 128..data + 140)]);
        assert_eq!(header.tensors[0].1.stored, Stored::Blocks(GgmlDType::Q8_0));
    }

    #[track_caller]
    fn check(made: Made, expected: &str) {
        let error = read(&made.bytes()).map(|_| ()).expect_err("is refused");
        assert!(error.contains(expected), "expected `{expected}` in: {error}");
    }

    #[test]
    fn lies_are_found_out() {
        let sound = Made::default;
        let with = |index: usize, tensor: (&'static str, Vec<u64>, u32, u64)| {
            let mut made = sound();
            made.tensors[index] = tensor;
            made
        };
        check(Made { version: 1, ..sound() }, "its version is 1");
        check(Made { version: 3 << 24, ..sound() }, "big-endian");
        check(Made { num_tensors: u64::MAX, ..sound() }, "claims 18446744073709551615 tensors");
        check(Made { num_entries: 1 << 40, ..sound() }, "metadata entries");
        check(Made { alignment: 0, ..sound() }, "general.alignment is 0");
        check(Made { alignment: 24, ..sound() }, "general.alignment is 24");
        check(Made { data_len: 139, ..sound() }, "tensor `b` [3] of F32 needs 12 bytes at 128");
        check(with(0, ("a", vec![32, 2], 8, 1 << 62)), "the file ends before");
        check(with(0, ("a", vec![32, 2], 8, u64::MAX - 63)), "the file ends before");
        check(with(0, ("a", vec![32, 2], 8, 8)), "no multiple of 64");
        check(with(0, ("a", vec![31, 2], 8, 0)), "does not come in blocks of Q8_0");
        check(with(0, ("a", vec![32, 1 << 62], 8, 0)), "does not come in blocks");
        check(with(0, ("a", vec![1; 6], 8, 0)), "6 dimensions");
        check(with(0, ("a", vec![256], 23, 0)), "has type IQ4_XS; read are F32, F16, Q4_0");
        check(with(0, ("a", vec![256], 99, 0)), "has type 99 of ggml; read are F32, F16, Q4_0");
        check(with(1, ("b", vec![3], 0, 64)), "tensors `a` and `b` overlap");
        check(with(1, ("a", vec![3], 0, 128)), "tensor `a` is there twice");
    }

    /// `comfy.gguf.orig_shape.<tensor>` as a list of i32, which is what gguf-py makes of Python's integers.
    fn original_shape(tensor: &str, shape: &[i32]) -> Vec<u8> {
        let key = format!("comfy.gguf.orig_shape.{tensor}");
        let mut entry = [&(key.len() as u64).to_le_bytes()[..], key.as_bytes(), &[9, 0, 0, 0, 5, 0, 0, 0]].concat();
        entry.extend((shape.len() as u64).to_le_bytes());
        shape.iter().for_each(|dim| entry.extend(dim.to_le_bytes()));
        entry
    }

    /// A metadata entry `x` of the type with this number.
    fn entry(kind: u32, value: &[u8]) -> Vec<u8> {
        [&1u64.to_le_bytes()[..], b"x", &kind.to_le_bytes(), value].concat()
    }

    #[test]
    fn a_key_stands_once() {
        let twice = vec![entry(0, &[1]), entry(0, &[2])];
        check(Made { more: twice, ..Made::default() }, "its metadata has `x` twice");
    }

    #[test]
    fn metadata_is_kept_with_its_types() {
        let header = read(&Made::default().bytes()).expect("is sound");
        let text = |text: &str| MetadataValue::Text(text.to_owned());
        assert_eq!(header.metadata["general.alignment"].as_integer(), Some(64));
        assert_eq!(header.metadata["list"].as_list(), Some(&[text("x"), text("yz")][..]));
        let numbers = [0x0201, 0x0403, 0x0605].map(MetadataValue::Integer);
        assert_eq!(header.metadata["n"].as_list(), Some(&numbers[..]));

        let value = |kind: u32, bytes: &[u8]| {
            let made = Made { more: vec![entry(kind, bytes)], ..Made::default() };
            read(&made.bytes()).expect("is sound").metadata.remove("x").expect("is kept")
        };
        assert_eq!(value(0, &[200]), MetadataValue::Integer(200));
        assert_eq!(value(1, &[200]), MetadataValue::Integer(-56));
        assert_eq!(value(2, &[0, 200]), MetadataValue::Integer(51_200));
        assert_eq!(value(5, &(-7i32).to_le_bytes()), MetadataValue::Integer(-7));
        assert_eq!(value(6, &0.5f32.to_le_bytes()), MetadataValue::Float(0.5));
        assert_eq!(value(7, &[1]), MetadataValue::Flag(true));
        assert_eq!(value(10, &u64::MAX.to_le_bytes()), MetadataValue::Integer(u64::MAX.into()));
        assert_eq!(value(11, &i64::MIN.to_le_bytes()), MetadataValue::Integer(i64::MIN.into()));
        assert_eq!(value(12, &1e300f64.to_le_bytes()), MetadataValue::Float(1e300));
        // A list with one list that has one flag.
        let nested = [&[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][..], &[7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!(value(9, &nested), MetadataValue::List(vec![MetadataValue::List(vec![MetadataValue::Flag(false)])]));
    }

    #[test]
    fn metadata_is_bounded() {
        let with = |kind: u32, value: &[u8]| Made { more: vec![entry(kind, value)], ..Made::default() };
        check(with(13, &[0]), "unknown type 13");
        let long = [&[0, 0, 0, 0][..], &(1u64 << 40).to_le_bytes()].concat();
        check(with(9, &long), "claims 1099511627776 values of a list");
        let many = [&[0, 0, 0, 0][..], &(MAX_VALUES as u64).to_le_bytes(), &vec![0; MAX_VALUES]].concat();
        check(with(9, &many), "more than 8388608 values");
        let deep = [9u32, 1, 0].map(u32::to_le_bytes).concat().repeat(6);
        check(with(9, &deep), "unknown type 9");
    }

    #[test]
    fn tensors_may_have_five_dimensions() {
        let tensors = vec![("a", vec![2, 2, 1, 4, 2], 0, 0), ("b", vec![3], 0, 128)];
        let header = read(&Made { tensors, ..Made::default() }.bytes()).expect("is sound");
        assert_eq!(header.tensors[0].1.shape, [2, 4, 1, 2, 2]);
    }

    #[test]
    fn the_original_shape_of_a_tensor_is_in_the_metadata() {
        let with_shape = |shape: &[i32]| Made { more: vec![original_shape("a", shape)], ..Made::default() };
        let header = read(&with_shape(&[4, 1, 2, 2, 4]).bytes()).expect("is sound");
        assert_eq!(header.tensors[0].1.shape, [4, 1, 2, 2, 4]);
        assert_eq!(header.tensors[0].1.bytes.len(), 68);
        assert_eq!(header.tensors[1].1.shape, [3]);
        check(with_shape(&[4, 1, 2, 2, 3]), "tensor `a` [2, 32] has not as many values as the shape [4, 1, 2, 2, 3]");
        check(with_shape(&[-8, -8]), "`comfy.gguf.orig_shape.a` has a negative dimension");
        check(with_shape(&[64, 1, 1, 1, 1, 1]), "has 6 dimensions");
        let mut of_floats = original_shape("a", &[2, 32]);
        let kind = of_floats.len() - 20;
        assert_eq!(of_floats[kind], 5);
        of_floats[kind] = 6;
        check(Made { more: vec![of_floats], ..Made::default() }, "is no list of whole numbers");
    }

    /// Q8_0 rows of 32 values that are rows of 4 in the network: values are read block by block.
    #[test]
    fn blocks_may_be_longer_than_rows() {
        use crate::device::{DeviceSpec, Placement, WeightDtype};
        use crate::weights::single::{PartOfFile, WeightFile};

        let tensors = vec![("a.weight", vec![32, 2], 8, 0)];
        let more = vec![original_shape("a.weight", &[16, 4])];
        let mut bytes = Made { num_tensors: 1, tensors, more, ..Made::default() }.bytes();
        let data = bytes.len() - 140;
        for block in 0..2 {
            // A scale of 1 in f16, then whole numbers.
            bytes[data + 34 * block..][..2].copy_from_slice(&0x3c00u16.to_le_bytes());
            (0..32).for_each(|i| bytes[data + 34 * block + 2 + i] = (32 * block + i) as u8);
        }
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, bytes).expect("write");
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU is always there");
        let part = PartOfFile { beginning: String::new(), must_fit: false };
        let weights = WeightFile::open(&path).expect("is sound").weights(&part, |_| true, &placement, false);
        let values: Vec<f32> = (0..64).map(|i| i as f32).collect();
        let flat = |tensor: candle_core::Tensor| tensor.flatten_all().expect("flat").to_vec1::<f32>().expect("f32");
        assert_eq!(flat(weights.get(&[16, 4], "a.weight").expect("a table")), values);
        let linear = crate::layers::Linear::load_no_bias(&weights.pp("a"), 4, 16).expect("a matrix");
        let x = candle_core::Tensor::eye(4, candle_core::DType::F32, &candle_core::Device::Cpu).expect("eye");
        let product = linear.forward(&x).expect("product");
        assert_eq!(flat(product.t().expect("of two dimensions")), values);
    }

    /// Wherever a file is cut, that is an error and no more.
    #[test]
    fn a_file_may_end_anywhere() {
        let bytes = Made::default().bytes();
        for len in MAGIC.len()..bytes.len() {
            assert!(read(&bytes[..len]).is_err(), "cut at {len}");
        }
        for at in MAGIC.len()..bytes.len() - 140 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0xff;
            // Either an error or a header that is sound in itself; no panic, no memory without end.
            let _ = read(&damaged);
        }
    }

    #[test]
    fn every_type_of_blocks_can_be_multiplied_with() {
        for (_, stored) in TYPES {
            if let Stored::Blocks(dtype) = stored {
                assert!(QuantisedMatrix::takes(dtype), "{stored}");
            }
        }
    }
}
