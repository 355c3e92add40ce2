//! The header of a GGUF file: names, types and places of its tensors. Nothing in it is believed: counts, lengths, offsets
//! and sizes are held against the file before anything is taken from them.
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
/// Least bytes of a metadata entry (length of its key, type, a value) and of a tensor's (length of its name, number of
/// dimensions, type, offset).
const MIN_ENTRY_BYTES: usize = 13;
const MIN_TENSOR_BYTES: usize = 24;

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

/// What a header says.
pub(super) struct Header {
    /// `general.architecture`.
    pub architecture: Option<String>,
    pub tensors: Vec<(String, Located)>,
}

/// Reads and checks the header of the file at `path`, which is mapped as `bytes`.
pub(super) fn read_header(path: &Path, bytes: &[u8]) -> Result<Header> {
    read(bytes).map_err(|problem| Error::checkpoint(path, format!("is not a sound GGUF file: {problem}")))
}

type Checked<T> = Result<T, String>;

fn read(bytes: &[u8]) -> Checked<Header> {
    let mut reader = Reader { bytes, at: MAGIC.len() };
    match reader.u32()? {
        2 | 3 => {}
        version if matches!(version.swap_bytes(), 1..=3) => return Err("it is big-endian".to_owned()),
        version => return Err(format!("its version is {version}; read are 2 and 3")),
    }
    let num_tensors = reader.count(MIN_TENSOR_BYTES, "tensors")?;
    let num_entries = reader.count(MIN_ENTRY_BYTES, "metadata entries")?;
    let metadata = (0..num_entries).try_fold(Metadata::default(), |metadata, _| metadata.and_entry(&mut reader))?;
    let alignment = metadata.alignment.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment < 8 {
        return Err(format!("general.alignment is {alignment}; it must be a power of two from 8 on"));
    }
    let claims: Vec<Claim<'_>> = (0..num_tensors).map(|_| reader.tensor()).collect::<Checked<_>>()?;
    let data = reader.at.checked_next_multiple_of(alignment).ok_or("its header never ends")?;
    let mut tensors = Vec::with_capacity(claims.len());
    for claim in &claims {
        let (name, mut located) = claim.locate(data, alignment, bytes.len())?;
        if let Some(shape) = metadata.original_shapes.get(claim.name) {
            located.shape = claim.reshaped(shape)?;
        }
        tensors.push((name, located));
    }
    check_apart(&tensors)?;
    Ok(Header { architecture: metadata.architecture.map(str::to_owned), tensors })
}

/// What of the metadata is asked for.
#[derive(Default)]
struct Metadata<'a> {
    architecture: Option<&'a str>,
    alignment: Option<usize>,
    /// By the name of the tensor, outermost dimension first.
    original_shapes: BTreeMap<&'a str, Vec<usize>>,
}

impl<'a> Metadata<'a> {
    /// Together with the entry that `reader` is at.
    fn and_entry(mut self, reader: &mut Reader<'a>) -> Checked<Self> {
        let key = reader.string()?;
        if let Some(tensor) = key.strip_prefix(ORIGINAL_SHAPE) {
            let shape = reader.shape().map_err(|problem| format!("`{key}` {problem}"))?;
            self.original_shapes.insert(tensor, shape);
            return Ok(self);
        }
        match (key, reader.value()?) {
            ("general.architecture", Value::String(name)) => self.architecture = Some(name),
            ("general.alignment", Value::U32(bytes)) => self.alignment = Some(bytes as usize),
            _ => {}
        }
        Ok(self)
    }
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
        let (block_values, block_bytes) = match self.stored {
            Stored::Plain(dtype) => (1, dtype.bitsize() / 8),
            Stored::Blocks(dtype) => (dtype.block_size(), dtype.type_size()),
        };
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

/// A metadata value, as far as it is asked for.
enum Value<'a> {
    String(&'a str),
    U32(u32),
    Other,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Checked<&'a [u8]> {
        let taken =
            self.bytes[self.at..].get(..len).ok_or_else(|| format!("it ends within its header, at {}", self.at))?;
        self.at += len;
        Ok(taken)
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
            return Err(format!("it claims {count} {things}, for which its {rest} bytes are too few"));
        }
        Ok(count)
    }

    fn string(&mut self) -> Checked<&'a str> {
        let len = self.size()?;
        std::str::from_utf8(self.take(len)?).map_err(|error| format!("a name in it is not text: {error}"))
    }

    /// A metadata value that is a list of sizes, in any of the integer types that writers choose for one.
    fn shape(&mut self) -> Checked<Vec<usize>> {
        const LIST: u32 = 9;
        if self.u32()? != LIST {
            return Err("is no list".to_owned());
        }
        let kind = self.u32()?;
        let len = self.size()?;
        if len > MAX_DIMENSIONS as usize {
            return Err(format!("has {len} dimensions; at most {MAX_DIMENSIONS} are possible"));
        }
        let mut dimension = || -> Checked<Option<usize>> {
            Ok(match kind {
                4 => usize::try_from(self.u32()?).ok(),
                5 => self.array().map(i32::from_le_bytes)?.try_into().ok(),
                10 => self.array().map(u64::from_le_bytes)?.try_into().ok(),
                11 => self.array().map(i64::from_le_bytes)?.try_into().ok(),
                _ => return Err("is no list of whole numbers".to_owned()),
            })
        };
        (0..len).map(|_| dimension()?.ok_or_else(|| "has a negative dimension".to_owned())).collect()
    }

    fn value(&mut self) -> Checked<Value<'a>> {
        match self.u32()? {
            4 => self.u32().map(Value::U32),
            8 => self.string().map(Value::String),
            kind => self.skip(kind, MAX_DEPTH).map(|()| Value::Other),
        }
    }

    fn skip(&mut self, kind: u32, depth: usize) -> Checked<()> {
        if let Some(len) = fixed_len(kind) {
            return self.take(len).map(drop);
        }
        match kind {
            8 => self.string().map(drop),
            9 if depth > 0 => {
                let kind = self.u32()?;
                let len = self.size()?;
                match fixed_len(kind) {
                    Some(each) => self.take(len.saturating_mul(each)).map(drop),
                    None => (0..len).try_for_each(|_| self.skip(kind, depth - 1)),
                }
            }
            _ => Err(format!("a metadata value has the unknown type {kind}")),
        }
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
            format!("tensor `{name}` has type {number} of ggml; read are {known}")
        })?;
        Ok(Claim { name, dimensions, stored, offset: self.size()? })
    }
}

/// Bytes of a metadata value of a type that always has as many.
fn fixed_len(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
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
        assert_eq!(header.architecture.as_deref(), Some("flux"));
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
        check(with(0, ("a", vec![256], 23, 0)), "type 23 of ggml; read are F32, F16, Q4_0");
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
        let part = PartOfFile { beginning: String::new(), is_original: false, must_fit: false };
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
