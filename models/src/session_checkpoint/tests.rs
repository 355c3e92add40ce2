use candle_core::{DType, Device, Tensor};
use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::error::Error;

fn identity() -> Identity {
    Identity { weights: [1; 32], device: "cpu f32".to_owned() }
}

const REQUEST: Digest = [2; 32];

fn tensor() -> Tensor {
    Tensor::new(&[[0.5f32, f32::NAN], [-0.0, 3.0]], &Device::Cpu).expect("a tensor")
}

fn state() -> Writer {
    let mut state = Writer::default();
    state.count(7);
    state.number(0.1);
    state.tensor(&tensor()).expect("f32");
    let count = |writer: &mut Writer, value| {
        writer.count(value);
        Ok(())
    };
    state.option(Some(3), count).expect("written");
    state.option(None, count).expect("written");
    state
}

/// What [`state`] wrote, or why not.
fn read(mut reader: Reader<'_>) -> crate::error::Result<()> {
    assert_eq!((reader.count()?, reader.number()?), (7, 0.1));
    let tensor = reader.tensor(&Device::Cpu)?;
    assert_eq!(tensor.dims(), [2, 2]);
    assert_eq!(reader.option(|reader| Ok(reader.count()?))?, Some(3));
    assert_eq!(reader.option(|reader| Ok(reader.count()?))?, None);
    Ok(reader.end()?)
}

fn sealed() -> SessionCheckpoint {
    SessionCheckpoint::seal(&identity(), REQUEST, 5, &state())
}

#[test]
fn what_was_written_is_read_with_all_its_bits() {
    let bytes = sealed().as_bytes().to_vec();
    let back = SessionCheckpoint::from_bytes(bytes).expect("as it was written");
    assert!(back == sealed());
    assert_eq!(back.frames_done(), 5);
    let mut reader = back.state_for(&identity(), REQUEST).expect("its own");
    read(back.state_for(&identity(), REQUEST).expect("its own")).expect("the state");
    assert_eq!((reader.count().expect("a count"), reader.number().expect("a number")), (7, 0.1));
    let bits = |tensor: Tensor| -> Vec<u32> {
        tensor.flatten_all().and_then(|all| all.to_vec1::<f32>()).expect("f32").into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(bits(reader.tensor(&Device::Cpu).expect("a tensor")), bits(tensor()));
}

#[test]
fn narrow_tensors_and_views_keep_their_values() {
    let values: Vec<bf16> = (0..12).map(|value| bf16::from_f32(value as f32 / 8.0)).collect();
    let whole = Tensor::from_vec(values, (2, 6), &Device::Cpu).expect("a tensor");
    for tensor in [whole.clone(), whole.t().expect("a view"), whole.to_dtype(DType::F16).expect("f16")] {
        let mut writer = Writer::default();
        writer.tensor(&tensor).expect("written");
        let back = Reader::new(writer.as_bytes()).tensor_like(&tensor).expect("read");
        let difference = (back.to_dtype(DType::F32).expect("f32") - tensor.to_dtype(DType::F32).expect("f32"))
            .and_then(|difference| difference.abs()?.sum_all()?.to_scalar::<f32>());
        assert_eq!(difference.expect("a number"), 0.0);
        let other = tensor.narrow(0, 0, 1).expect("a row");
        assert!(Reader::new(writer.as_bytes()).tensor_like(&other).is_err());
    }
    assert!(Writer::default().tensor(&whole.to_dtype(DType::F64).expect("f64")).is_err());
}

#[test]
fn each_refusal_is_one_line_that_says_what_is_wrong() {
    let whole = sealed().as_bytes().to_vec();
    let with = |at: usize, byte: u8| {
        let mut bytes = whole.clone();
        bytes[at] = byte;
        bytes
    };
    let refused = |bytes: Vec<u8>| SessionCheckpoint::from_bytes(bytes).expect_err("it is not as it was").to_string();
    assert_eq!(refused(Vec::new()), "is no checkpoint of a session");
    assert_eq!(refused(with(0, b'X')), "is no checkpoint of a session");
    assert_eq!(refused(with(8, 9)), "has format 9, this program reads 1");
    assert_eq!(refused(whole[..9].to_vec()), "says that it has 52 bytes and has 9");
    let (len, less) = (whole.len(), whole.len() - 1);
    assert_eq!(refused(whole[..less].to_vec()), format!("says that it has {len} bytes and has {less}"));
    let largest = [&whole[..12], &[255; 8], &whole[20..]].concat();
    assert_eq!(refused(largest), format!("says that it has {} bytes and has {len}", u64::MAX));
    assert_eq!(refused(with(less, 7)), "is damaged: its checksum is another one");

    let refused =
        |identity: Identity, request| sealed().state_for(&identity, request).err().expect("another one").to_string();
    assert_eq!(refused(Identity { weights: [3; 32], ..identity() }, REQUEST), "was made with other weights");
    let elsewhere = Identity { device: "cuda bf16".to_owned(), ..identity() };
    assert_eq!(refused(elsewhere, REQUEST), "was made on cpu f32, this is cuda bf16");
    assert_eq!(refused(identity(), [3; 32]), "was made for another request");
    let mut older = sealed();
    older.head.version = "0.0.1".to_owned();
    let refused = older.state_for(&identity(), REQUEST).err().expect("another one");
    assert!(refused.to_string().starts_with("was made by version 0.0.1, this is "));
    assert_eq!(Error::from(Refusal::Request).to_string(), "the checkpoint was made for another request");
}

/// Bytes that say more than there is are refused before anything of that size is there: a buffer of theirs would end the test.
#[test]
fn sizes_are_held_against_the_bytes_that_are_there() {
    for dims in [vec![usize::MAX], vec![1 << 40, 1 << 40], vec![1 << 45], vec![0, usize::MAX, 2]] {
        let mut writer = Writer::default();
        writer.flag(false);
        writer.count(dims.len());
        dims.iter().for_each(|dim| writer.count(*dim));
        assert!(Reader::new(writer.as_bytes()).tensor(&Device::Cpu).is_err(), "{dims:?}");
    }
    let mut writer = Writer::default();
    writer.count(usize::MAX);
    assert!(Reader::new(writer.as_bytes()).bytes().is_err());
    writer.flag(false);
    writer.count(1 << 60);
    assert!(Reader::new(&writer.as_bytes()[8..]).tensor(&Device::Cpu).is_err());
}

proptest! {
    #[test]
    fn no_byte_can_be_another_one(at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let mut bytes = sealed().as_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(SessionCheckpoint::from_bytes(bytes).is_err());
    }

    #[test]
    fn none_is_shorter_or_longer(len in 0..400usize) {
        let whole = sealed();
        let mut bytes = whole.as_bytes().to_vec();
        bytes.resize(len, 0);
        prop_assert_eq!(SessionCheckpoint::from_bytes(bytes).is_ok(), len == whole.as_bytes().len());
    }

    /// As a forger has it, who makes the checksum fit: errors, no panics, nothing larger than the bytes.
    #[test]
    fn forged_states_are_read_to_an_error_or_to_their_end(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        len in any::<prop::sample::Index>(),
    ) {
        let mut bytes = state().as_bytes().to_vec();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(1 + len.index(bytes.len()));
        let mut reader = Reader::new(&bytes);
        let _ = (reader.count(), reader.number());
        if let Ok(tensor) = reader.tensor(&Device::Cpu) {
            prop_assert!(tensor.elem_count() * tensor.dtype().size_in_bytes() <= bytes.len());
        }
        let _ = reader.option(|reader| Ok(reader.text()?.to_owned()));
        let _ = reader.end();
    }
}
