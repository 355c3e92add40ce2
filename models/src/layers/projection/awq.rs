//! AWQ's integers, as AutoAWQ saves them (`gemm.py`, `packing_utils.py`).
//!
//! `qweight [in, out / 8]` and `qzeros [groups, out / 8]` have eight neighbouring outputs in a word, the even ones in its lower half.

use std::sync::Arc;

use safetensors::Dtype;
use tale_kernels::Code;

use super::Projection;
use super::packed::{Beside, Plan, check_divides, check_dtype, load as load_packed, made_up, scales, word_at, words};
use crate::error::Result;
use crate::quantisation::{Awq, Format};
use crate::weights::Weights;

/// Outputs in a word.
const PER_WORD: usize = 8;

/// Tensors `qweight`, `qzeros` and `scales` of a matrix in this format.
pub(super) fn load(weights: &Weights, out_features: usize, in_features: usize) -> Result<Option<Arc<dyn Projection>>> {
    let Some(Format::Awq(format)) = weights.format() else { return Ok(None) };
    let Awq { bits, group_size } = *format;
    let plan = Plan {
        code: Code::Bits4,
        dims: (out_features, in_features),
        kept: match group_size {
            Some(size) => format!("AWQ {bits} bits, groups of {size}"),
            None => format!("AWQ {bits} bits, whole rows"),
        },
        group_size: group_size.unwrap_or(in_features),
        rows_per_scale: 1,
        says_order: false,
    };
    if weights.is_dummy() {
        return made_up(weights, "qweight", plan, true).map(Some);
    }
    check_divides(weights, "qweight", "outputs", out_features, PER_WORD)?;
    check_dtype(weights, "qweight", &[Dtype::I32])?;
    let (_, groups) = plan.scale_dims();
    let (scales, scale_bytes) = scales(weights, &[groups, out_features], "scales")?;
    let scales = scales.map(|scales| scales.t()?.contiguous()).transpose()?;
    let row_words = out_features / PER_WORD;
    let zeros = words(weights, &[groups, row_words], "qzeros")?.map(|words| {
        let places = (0..out_features).flat_map(|row| (0..groups).map(move |group| (row, group)));
        places.map(|(row, group)| code(words[group * row_words + row / PER_WORD], row)).collect()
    });
    let code_at =
        move |bytes: &[u8], row: usize, column: usize| code(word_at(bytes, column * row_words + row / PER_WORD), row);
    let beside = Beside { scales, zeros, order: None };
    load_packed(weights, ("qweight", &[in_features, row_words]), plan, beside, scale_bytes + 1, code_at).map(Some)
}

/// Of an output in the word that has it: nibbles are outputs 0, 2, 4, 6, 1, 3, 5, 7.
fn code(word: u32, output: usize) -> u8 {
    let nibble = output % PER_WORD / 2 + output % 2 * (PER_WORD / 2);
    (word >> (4 * nibble) & 15) as u8
}

#[cfg(test)]
mod tests {
    use super::code;

    #[test]
    fn nibbles_are_even_outputs_and_then_odd_ones() {
        let word = 0x7654_3210;
        let found: Vec<u8> = (8..16).map(|output| code(word, output)).collect();
        assert_eq!(found, [0, 4, 1, 5, 2, 6, 3, 7]);
    }
}
