//! compressed-tensors (`compressors/pack_quantized`, `compressors/naive_quantized`): packed integers, integers in bytes, and
//! eight-bit floats.
//!
//! `weight_packed [out, in / n]` has n codes of neighbouring inputs in a word, more by half of their range than the integers that they
//! are; `weight_zero_point [out / n, groups]` likewise of neighbouring outputs. Scales lie by rows.

use std::sync::Arc;

use safetensors::Dtype;
use tale_kernels::Code;

use super::Projection;
use super::packed::{
    Beside, Plan, WORD_BITS, check_dtype, load as load_packed, made_up, order_of_groups, read_words, scales, word_at,
    words,
};
use crate::error::Result;
use crate::quantisation::{Compressed, Format, Kind, Span};
use crate::weights::{Coded, Weights};

/// The parts of a matrix in this format.
pub(super) fn load(weights: &Weights, out_features: usize, in_features: usize) -> Result<Option<Arc<dyn Projection>>> {
    let Some(Format::Compressed(format)) = weights.format() else { return Ok(None) };
    let Compressed { kind, span } = *format;
    let (group_size, rows_per_scale) = match span {
        Span::Tensor => (in_features, out_features),
        Span::Channel => (in_features, 1),
        Span::Group(size) => (size, 1),
        Span::Block([rows, columns]) => (columns, rows),
    };
    let (what, code) = match kind {
        Kind::Packed { bits: 4, .. } => ("4 bits", Code::Bits4),
        Kind::Packed { .. } | Kind::Int8 { .. } => ("8 bits", Code::Bits8),
        Kind::Float8 => ("fp8", Code::Float8),
    };
    let what = format!("compressed-tensors {what}");
    let plan = Plan {
        code,
        dims: (out_features, in_features),
        kept: match span {
            Span::Tensor => format!("{what}, whole matrices"),
            Span::Channel => format!("{what}, whole rows"),
            Span::Group(size) => format!("{what}, groups of {size}"),
            Span::Block([rows, columns]) => format!("{what}, blocks of {rows}x{columns}"),
        },
        group_size,
        rows_per_scale,
        says_order: weights.contains("weight_g_idx"),
    };
    let name = if matches!(kind, Kind::Packed { .. }) { "weight_packed" } else { "weight" };
    if weights.is_dummy() {
        return made_up(weights, name, plan, code != Code::Float8).map(Some);
    }
    // For products of quantised activations, which are not computed here.
    for name in ["input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale"] {
        weights.ignore_beside(name);
    }
    let dims = plan.scale_dims();
    let shape: Vec<usize> = match (span, weights.rank("weight_scale")) {
        (Span::Tensor, Some(0)) => vec![],
        (Span::Tensor, Some(1)) => vec![1],
        (Span::Channel, Some(1)) => vec![out_features],
        _ => vec![dims.0, dims.1],
    };
    let (scales, scale_bytes) = scales(weights, &shape, "weight_scale")?;
    let scales = scales.map(|scales| scales.reshape(dims)).transpose()?;
    let order = order(weights, in_features, group_size, dims.1)?;
    match kind {
        Kind::Packed { bits, is_symmetric } => {
            let per_word = WORD_BITS / bits;
            let row_words = in_features.div_ceil(per_word);
            check_shape(weights, out_features, in_features)?;
            check_dtype(weights, name, &[Dtype::I32])?;
            let mask = (1u32 << bits) - 1;
            let middle = 1u8 << (bits - 1);
            let zeros = match (is_symmetric, span) {
                (true, _) | (false, Span::Tensor) => scales.as_ref().map(|_| vec![middle; dims.0 * dims.1]),
                (false, _) => {
                    words(weights, &[out_features.div_ceil(per_word), dims.1], "weight_zero_point")?.map(|words| {
                        let places = (0..dims.0).flat_map(|row| (0..dims.1).map(move |group| (row, group)));
                        let zero = |(row, group): (usize, usize)| {
                            (words[row / per_word * dims.1 + group] >> (row % per_word * bits) & mask) as u8
                        };
                        places.map(zero).collect()
                    })
                }
            };
            if !is_symmetric && span == Span::Tensor {
                return Err(weights.error("weight_zero_point", "of a whole matrix is not read"));
            }
            let input_of = order.clone();
            let code_at = move |bytes: &[u8], row: usize, column: usize| {
                let input = input_of.as_ref().map_or(column, |order| order[column] as usize);
                (word_at(bytes, row * row_words + input / per_word) >> (input % per_word * bits) & mask) as u8
            };
            let beside = Beside { scales, zeros, order };
            load_packed(weights, (name, &[out_features, row_words]), plan, beside, scale_bytes + 1, code_at).map(Some)
        }
        Kind::Int8 { is_symmetric } => {
            check_dtype(weights, name, &[Dtype::I8])?;
            // Integers from -128 to 127 as codes from 0 to 255.
            let zeros = match is_symmetric {
                true => scales.as_ref().map(|_| vec![128; dims.0 * dims.1]),
                false => {
                    check_dtype(weights, "weight_zero_point", &[Dtype::I8])?;
                    let read = |bytes: &[u8], _: &_| Ok(bytes.iter().map(|zero| zero ^ 0x80).collect());
                    weights.coded(&shape, "weight_zero_point", Coded::default(), read)?
                }
            };
            let input_of = order.clone();
            let code_at = move |bytes: &[u8], row: usize, column: usize| {
                let input = input_of.as_ref().map_or(column, |order| order[column] as usize);
                bytes[row * in_features + input] ^ 0x80
            };
            let beside = Beside { scales, zeros, order };
            load_packed(weights, (name, &[out_features, in_features]), plan, beside, scale_bytes + 1, code_at).map(Some)
        }
        Kind::Float8 => {
            super::float8::check_is_e4m3(weights, name)?;
            let code_at = move |bytes: &[u8], row: usize, column: usize| bytes[row * in_features + column];
            let beside = Beside { scales, zeros: None, order: None };
            load_packed(weights, (name, &[out_features, in_features]), plan, beside, scale_bytes, code_at).map(Some)
        }
    }
}

/// The order that `weight_g_idx` makes, where it says something.
fn order(weights: &Weights, in_features: usize, size: usize, groups: usize) -> Result<Option<Vec<u32>>> {
    if !weights.contains("weight_g_idx") {
        return Ok(None);
    }
    let group_of = words(weights, &[in_features], "weight_g_idx")?;
    // Nothing was reordered.
    let Some(group_of) = group_of.filter(|groups| groups.iter().any(|group| *group as i32 != -1)) else {
        return Ok(None);
    };
    order_of_groups(weights, "weight_g_idx", &group_of, (size, groups))
}

/// Refuses a matrix that was another before it was packed.
fn check_shape(weights: &Weights, out_features: usize, in_features: usize) -> Result<()> {
    check_dtype(weights, "weight_shape", &[Dtype::I64, Dtype::I32])?;
    let read = |bytes: &[u8], _: &_| {
        let words: Vec<u32> = read_words(bytes).collect();
        // Of i64 the lower halves.
        Ok(if words.len() == 4 { vec![words[0], words[2]] } else { words })
    };
    let found: Option<Vec<u32>> = weights.coded(&[2], "weight_shape", Coded::default(), read)?;
    match found {
        Some(found) if found != [out_features as u32, in_features as u32] => {
            let what = format!("is {found:?}; the configuration has [{out_features}, {in_features}]");
            Err(weights.error("weight_shape", what))
        }
        _ => Ok(()),
    }
}
