//! How a decoder is shared out among ranks: heads and inner vectors by their layers' outputs, what follows them by its inputs, the
//! vocabulary by tokens.
//!
//! Owns: which share of each layer a rank has, what cannot be shared out, embedding with a share of the table. Does not know: how
//! ranks reach each other, how a share is read. Source: Shoeybi et al. 2019, "Megatron-LM", section 3.
//!
//! The head and the table of tokens are shared out too: of a model of 70 billion values in bf16 they are 4 GB, which four devices of
//! 40 GB would rather keep for keys and values.

use candle_core::{Device, Tensor};

use super::DecoderConfig;
use crate::error::{Error, Result};
use crate::kv::KvShape;
use crate::layers::{Embedding, Linear};
use crate::parallel::Rank;
use crate::weights::{Axis, Share, Weights};

impl DecoderConfig {
    /// Says which field has a size that so many ranks cannot share out, if one has.
    pub fn check_split(&self, of: usize) -> Result<(), String> {
        let refuse = |field: &str, size: usize| Err(format!("{field}: {of} ranks cannot share out {size}"));
        for (field, size) in [
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("vocab_size", self.vocab_size),
        ] {
            if !size.is_multiple_of(of) {
                return refuse(field, size);
            }
        }
        let kv_heads = self.num_key_value_heads;
        match kv_heads.is_multiple_of(of) || of.is_multiple_of(kv_heads) {
            true => Ok(()),
            false => refuse("num_key_value_heads", kv_heads),
        }
    }

    /// What the KV cache of one token consists of on each of so many ranks: heads fewer than ranks are on several.
    pub fn kv_shape_of(&self, of: usize) -> KvShape {
        let num_key_value_heads = (self.num_key_value_heads / of).max(1);
        KvShape { num_key_value_heads, ..self.kv_shape() }
    }
}

/// What a rank has of each layer; all of it where there is one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Split<'a>(pub(super) Option<&'a Rank>);

impl Split<'_> {
    pub(super) fn of(self) -> usize {
        self.0.map_or(1, Rank::of)
    }

    /// A layer's view, of whose outputs each rank has some.
    pub(super) fn outputs(self, weights: Weights) -> Weights {
        weights.shared_out(self.share(Axis::Rows))
    }

    /// A layer's view, to whose inputs each rank has some, and some of its outputs' sums.
    pub(super) fn inputs(self, weights: Weights) -> Weights {
        weights.shared_out(self.share(Axis::Columns))
    }

    /// A layer's view, whose outputs are heads of keys or values.
    pub(super) fn kv_heads(self, weights: Weights, kv_heads: usize) -> Weights {
        let share = self.share(Axis::Rows).map(|share| match kv_heads < share.of {
            // Each head is on several ranks, side by side.
            true => Share { index: share.index * kv_heads / share.of, of: kv_heads, ..share },
            false => share,
        });
        weights.shared_out(share)
    }

    fn share(self, axis: Axis) -> Option<Share> {
        self.0.map(|rank| Share { axis, index: rank.index(), of: rank.of() })
    }
}

/// A layer of whose inputs a rank may have a share: then all ranks get the sum of what each has.
#[derive(Debug)]
pub(super) struct Summed {
    linear: Linear,
    rank: Option<Rank>,
}

impl Summed {
    pub(super) fn new(linear: Linear, split: Split<'_>) -> Self {
        Self { linear, rank: split.0.cloned() }
    }

    /// `[l, inputs]` to `[l, outputs]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.linear.forward(x)?;
        match &self.rank {
            Some(rank) => rank.sum(&y),
            None => Ok(y),
        }
    }
}

/// Vectors `[l, hidden_size]` of tokens, where each rank has the table of some: the others' are zero, and all are added up.
pub(super) fn embed(
    table: &Embedding,
    tokens: &[u32],
    vocab_size: usize,
    rank: &Rank,
    device: &Device,
) -> Result<Tensor> {
    let own = vocab_size / rank.of();
    let first = (rank.index() * own) as u32;
    let place = |token: &u32| token.checked_sub(first).filter(|place| (*place as usize) < own);
    let places: Vec<u32> = tokens.iter().map(|token| place(token).unwrap_or(0)).collect();
    let is_own: Vec<u8> = tokens.iter().map(|token| u8::from(place(token).is_some())).collect();
    let vectors = table.forward(&Tensor::new(places, device)?)?;
    // Not a product: what is not finite must not reach the rows of others.
    let is_own = Tensor::from_vec(is_own, (tokens.len(), 1), device)?.broadcast_as(vectors.shape())?;
    rank.sum(&is_own.where_cond(&vectors, &vectors.zeros_like()?)?)
}

/// Refuses tokens that no rank has.
pub(super) fn check_tokens(tokens: &[u32], vocab_size: usize) -> Result<()> {
    match tokens.iter().find(|token| **token as usize >= vocab_size) {
        None => Ok(()),
        Some(token) => Err(Error::Device(format!("token {token} is outside of the vocabulary of {vocab_size}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::DType;
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
    use proptest::prelude::*;

    use super::*;
    use crate::config::Fields;
    use crate::device::{DeviceSpec, Placement, WeightDtype};
    use crate::layers::decoder::LlamaGgufNames;
    use crate::weights::single::{PartOfFile, WeightFile};

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().expect("flat").to_vec1().expect("f32")
    }

    fn close(found: &[f32], expected: &[f32]) -> bool {
        found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4)
    }

    proptest! {
        /// A layer whose outputs are shared out has them side by side, and one whose inputs are has their sum.
        #[test]
        fn shares_of_a_layer_make_the_layer(of in 1..5usize, out in 1..9usize, inner in 1..40usize, rows in 1..4usize) {
            let (out_features, in_features) = (of * out, of * inner);
            let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::F32).expect("a CPU");
            let weights = Weights::dummy(Path::new("nowhere"), DType::F32, &placement).pp("layer");
            let x = Tensor::randn(0f32, 1.0, (rows, in_features), &Device::Cpu).expect("values");
            let whole = Linear::load(&weights, in_features, out_features).expect("made").forward(&x).expect("computed");
            let (mut beside, mut sum) = (Vec::new(), vec![0f32; rows * out_features]);
            for index in 0..of {
                let rank = Rank::dry(index, of);
                let split = Split(Some(&rank));
                let outputs = Linear::load(&split.outputs(weights.clone()), in_features, out_features).expect("made");
                beside.push(outputs.forward(&x).expect("computed"));
                let inputs = Linear::load(&split.inputs(weights.clone()), in_features, out_features).expect("made");
                let own = x.narrow(1, index * inner, inner).expect("columns").contiguous().expect("copied");
                let part = values(&inputs.forward(&own).expect("computed"));
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
            let beside = values(&Tensor::cat(&beside, 1).expect("side by side"));
            prop_assert!(close(&beside, &values(&whole)), "outputs of {of}");
            prop_assert!(close(&sum, &values(&whole)), "inputs of {of}");
        }
    }

    /// Shares of blocks, and of rows that the file has in another order, are those of the matrix; none begins within a block.
    #[test]
    fn shares_of_a_gguf_file_are_those_of_its_matrices() {
        const Q: &str = "model.layers.0.self_attn.q_proj";
        const DOWN: &str = "model.layers.0.mlp.down_proj";
        let sizes = serde_json::json!({"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "intermediate_size": 512});
        let fields = Fields::of("config.json".into(), sizes.to_string().as_bytes()).expect("fields");
        let config = crate::families::llama::config_of(&fields).expect("a configuration");
        let folder = tempfile::tempdir().expect("a folder");
        for blocks in [GgmlDType::Q4K, GgmlDType::Q8_0] {
            let path = folder.path().join(format!("{blocks:?}.gguf"));
            let matrix = |rows: usize, columns: usize| {
                let values = Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).expect("values");
                QTensor::quantize(&values, blocks).expect("blocks")
            };
            let (q, down) = (matrix(256, 256), matrix(256, 512));
            let tensors = [("blk.0.attn_q.weight", &q), ("blk.0.ffn_down.weight", &down)];
            let mut file = std::fs::File::create(&path).expect("created");
            gguf_file::write(&mut file, &[], &tensors).expect("written");
            let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("a CPU");
            let all = PartOfFile { beginning: String::new(), must_fit: false };
            let weights = WeightFile::open(&path).expect("a file").weights(&all, |_| true, &placement, false);
            let weights = weights.or_named(LlamaGgufNames::new(&config));
            let x = Tensor::randn(0f32, 1.0, (3, 512), &Device::Cpu).expect("values");
            let columns =
                |first: usize, count: usize| x.narrow(1, first, count).expect("some").contiguous().expect("copied");
            let load = |layer: &str, split: Split<'_>, axis: Axis, dims: (usize, usize)| {
                let layer = weights.pp(layer);
                let layer = if axis == Axis::Rows { split.outputs(layer) } else { split.inputs(layer) };
                Linear::load_no_bias(&layer, dims.0, dims.1)
            };
            let whole = |layer: &str, x: &Tensor, dims: (usize, usize)| {
                values(&load(layer, Split(None), Axis::Rows, dims).expect("read").forward(x).expect("computed"))
            };
            let (mut beside, mut sum) = (Vec::new(), vec![0f32; 3 * 256]);
            for index in 0..2 {
                let rank = Rank::dry(index, 2);
                let outputs = load(Q, Split(Some(&rank)), Axis::Rows, (256, 256)).expect("read");
                beside.push(outputs.forward(&columns(0, 256)).expect("computed"));
                let inputs = load(DOWN, Split(Some(&rank)), Axis::Columns, (512, 256)).expect("read");
                let part = values(&inputs.forward(&columns(256 * index, 256)).expect("computed"));
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
            let beside = values(&Tensor::cat(&beside, 1).expect("side by side"));
            assert!(close(&beside, &whole(Q, &columns(0, 256), (256, 256))), "{blocks:?}");
            assert!(close(&sum, &whole(DOWN, &x, (512, 256))), "{blocks:?}");
            let quarter = Rank::dry(1, 4);
            let refused = load(DOWN, Split(Some(&quarter)), Axis::Columns, (512, 256));
            assert_eq!(refused.is_err(), blocks == GgmlDType::Q4K, "quarters are half blocks of 256 values");
        }
    }

    #[test]
    fn heads_fewer_than_ranks_are_on_several() {
        let share = |index: usize, of: usize, kv_heads: usize| {
            let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::F32).expect("a CPU");
            let weights = Weights::dummy(Path::new("nowhere"), DType::F32, &placement);
            let rank = Rank::dry(index, of);
            let share = Split(Some(&rank)).kv_heads(weights, kv_heads).share().expect("a share");
            (share.index, share.of)
        };
        assert_eq!([0, 1, 2, 3].map(|index| share(index, 4, 2)), [(0, 2), (0, 2), (1, 2), (1, 2)]);
        assert_eq!([0, 1].map(|index| share(index, 2, 8)), [(0, 2), (1, 2)]);
    }
}
