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

/// The tensors of codes: in words, and one in a byte.
const PACKED: &str = "weight_packed";
const PLAIN: &str = "weight";

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
    let name = if matches!(kind, Kind::Packed { .. }) { PACKED } else { PLAIN };
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
    let matrix = Matrix { plan, beside: Beside { scales, zeros: None, order }, scale_bytes, scale_shape: shape };
    match kind {
        Kind::Packed { bits, is_symmetric } => matrix.packed(weights, bits, is_symmetric, span),
        Kind::Int8 { is_symmetric } => matrix.int8(weights, is_symmetric),
        Kind::Float8 => matrix.float8(weights),
    }
    .map(Some)
}

/// A matrix whose scales and order are read.
struct Matrix {
    plan: Plan,
    /// Without zeros yet.
    beside: Beside,
    scale_bytes: usize,
    /// Of the scales in the files, and of zeros in bytes.
    scale_shape: Vec<usize>,
}

impl Matrix {
    /// The input of each column of the codes.
    fn input_of(&self) -> impl Fn(usize) -> usize + Send + Sync + 'static {
        let order = self.beside.order.clone();
        move |column| order.as_ref().map_or(column, |order| order[column] as usize)
    }

    /// The same zero for every scale; of a dry view none.
    fn same_zeros(&self, zero: u8) -> Option<Vec<u8>> {
        self.beside.scales.as_ref().map(|scales| vec![zero; scales.elem_count()])
    }

    fn packed(self, weights: &Weights, bits: usize, is_symmetric: bool, span: Span) -> Result<Arc<dyn Projection>> {
        const ZEROS: &str = "weight_zero_point";
        let (out_features, in_features) = self.plan.dims;
        let (scale_rows, groups) = self.plan.scale_dims();
        let per_word = WORD_BITS / bits;
        let mask = (1u32 << bits) - 1;
        check_shape(weights, out_features, in_features)?;
        check_dtype(weights, PACKED, &[Dtype::I32])?;
        let zeros = match is_symmetric {
            true => self.same_zeros(1 << (bits - 1)),
            false if span == Span::Tensor => return Err(weights.error(ZEROS, "of a whole matrix is not read")),
            false => words(weights, &[out_features.div_ceil(per_word), groups], ZEROS)?.map(|words| {
                let places = (0..scale_rows).flat_map(|row| (0..groups).map(move |group| (row, group)));
                let word = |row: usize, group: usize| words[row / per_word * groups + group];
                places.map(|(row, group)| (word(row, group) >> (row % per_word * bits) & mask) as u8).collect()
            }),
        };
        let row_words = in_features.div_ceil(per_word);
        let input_of = self.input_of();
        let code_at = move |bytes: &[u8], row: usize, column: usize| {
            let input = input_of(column);
            (word_at(bytes, row * row_words + input / per_word) >> (input % per_word * bits) & mask) as u8
        };
        let beside = Beside { zeros, ..self.beside };
        load_packed(weights, (PACKED, &[out_features, row_words]), self.plan, beside, self.scale_bytes + 1, code_at)
    }

    /// Integers from -128 to 127 as codes from 0 to 255.
    fn int8(self, weights: &Weights, is_symmetric: bool) -> Result<Arc<dyn Projection>> {
        let (out_features, in_features) = self.plan.dims;
        check_dtype(weights, PLAIN, &[Dtype::I8])?;
        let zeros = match is_symmetric {
            true => self.same_zeros(128),
            false => {
                check_dtype(weights, "weight_zero_point", &[Dtype::I8])?;
                let read = |bytes: &[u8], _: &_| Ok(bytes.iter().map(|zero| zero ^ 0x80).collect());
                weights.coded(&self.scale_shape, "weight_zero_point", Coded::default(), read)?
            }
        };
        let input_of = self.input_of();
        let code_at = move |bytes: &[u8], row: usize, column: usize| bytes[row * in_features + input_of(column)] ^ 0x80;
        let beside = Beside { zeros, ..self.beside };
        load_packed(weights, (PLAIN, &[out_features, in_features]), self.plan, beside, self.scale_bytes + 1, code_at)
    }

    fn float8(self, weights: &Weights) -> Result<Arc<dyn Projection>> {
        let (out_features, in_features) = self.plan.dims;
        super::float8::check_is_e4m3(weights, PLAIN)?;
        let input_of = self.input_of();
        let code_at = move |bytes: &[u8], row: usize, column: usize| bytes[row * in_features + input_of(column)];
        load_packed(weights, (PLAIN, &[out_features, in_features]), self.plan, self.beside, self.scale_bytes, code_at)
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
