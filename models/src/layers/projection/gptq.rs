//! GPTQ's integers, as AutoGPTQ and GPTQModel save them (`qlinear/__init__.py`).
//!
//! `qweight [in / n, out]` has n codes of neighbouring inputs in a word, `qzeros [groups, out / n]` those of neighbouring outputs,
//! each from the lowest bits on. With `desc_act` inputs of a group are not neighbours: `g_idx [in]` says the group of each.

use std::sync::Arc;

use tale_kernels::Code;

use super::Projection;
use super::packed::{
    Beside, Plan, WORD_BITS, check_divides, check_dtype, load as load_packed, made_up, order_of_groups, scales,
    word_at, words,
};
use crate::error::Result;
use crate::quantisation::{Format, Gptq};
use crate::weights::Weights;
use safetensors::Dtype;

/// Tensors `qweight`, `qzeros`, `scales` and perhaps `g_idx` of a matrix in this format.
pub(super) fn load(weights: &Weights, out_features: usize, in_features: usize) -> Result<Option<Arc<dyn Projection>>> {
    let Some(Format::Gptq(format)) = weights.format() else { return Ok(None) };
    let Gptq { bits, group_size, zeros_less_one } = *format;
    let per_word = WORD_BITS / bits;
    let size = group_size.unwrap_or(in_features);
    let plan = Plan {
        code: if bits == 4 { Code::Bits4 } else { Code::Bits8 },
        dims: (out_features, in_features),
        kept: match group_size {
            Some(size) => format!("GPTQ {bits} bits, groups of {size}"),
            None => format!("GPTQ {bits} bits, whole rows"),
        },
        group_size: size,
        rows_per_scale: 1,
        says_order: weights.contains("g_idx"),
    };
    if weights.is_dummy() {
        return made_up(weights, "qweight", plan, true).map(Some);
    }
    check_divides(weights, "qweight", "inputs", in_features, per_word)?;
    check_divides(weights, "qzeros", "outputs", out_features, per_word)?;
    check_dtype(weights, "qweight", &[Dtype::I32])?;
    let (_, groups) = plan.scale_dims();
    let (scales, scale_bytes) = scales(weights, &[groups, out_features], "scales")?;
    let scales = scales.map(|scales| scales.t()?.contiguous()).transpose()?;
    let zeros = words(weights, &[groups, out_features / per_word], "qzeros")?;
    let mask = (1u32 << bits) - 1;
    let zeros = zeros.map(|words| {
        let zero = |row: usize, group: usize| {
            let word = words[group * (out_features / per_word) + row / per_word];
            // One more, without a carry.
            (word >> (row % per_word * bits)).wrapping_add(u32::from(zeros_less_one)) & mask
        };
        (0..out_features)
            .flat_map(|row| (0..groups).map(move |group| (row, group)))
            .map(|(row, group)| zero(row, group) as u8)
            .collect()
    });
    let order = match plan.says_order {
        true => words(weights, &[in_features], "g_idx")?
            .map(|group_of| order_of_groups(weights, "g_idx", &group_of, (size, groups)))
            .transpose()?
            .flatten(),
        false => None,
    };
    let input_of = order.clone();
    let code_at = move |bytes: &[u8], row: usize, column: usize| {
        let input = input_of.as_ref().map_or(column, |order| order[column] as usize);
        (word_at(bytes, input / per_word * out_features + row) >> (input % per_word * bits) & mask) as u8
    };
    let shape = [in_features / per_word, out_features];
    let beside = Beside { scales, zeros, order };
    load_packed(weights, ("qweight", &shape), plan, beside, scale_bytes + 1, code_at).map(Some)
}
