//! Headers as they should be, and ones that lie.

use candle_core::quantized::GgmlDType;
use tale_kernels::QuantisedMatrix;

use super::claim::TYPES;
use super::reader::MAX_VALUES;
use super::*;
use crate::weights::Stored;

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
        bytes.extend([&string("general.alignment")[..], &4u32.to_le_bytes(), &self.alignment.to_le_bytes()].concat());
        // Lists of strings and of numbers.
        bytes.extend([&string("list")[..], &[9, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]].concat());
        bytes.extend([string("x"), string("yz")].concat());
        bytes.extend([&string("n")[..], &[9, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]].concat());
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
