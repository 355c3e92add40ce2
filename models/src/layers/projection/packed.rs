//! Codes with scales: what the formats of quantised language models have in common.
//!
//! Owns: reading the parts of a quantised matrix, and the matrix in the one layout that all of these formats get. Does not know:
//! how any of them packs its codes.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use tale_kernels::{Code, CodeScales, PackedMatrix};

use super::{Dense, Projection};
use crate::error::{Error, Result};
use crate::weights::{Axis, Coded, Share, Stored, Weights};

/// Bits of a word of the files.
pub(super) const WORD_BITS: usize = 32;

#[derive(Debug)]
struct Packed(PackedMatrix);

impl Projection for Packed {
    fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        Ok(tale_kernels::linear_packed(x, &self.0, bias)?)
    }
}

/// A quantised matrix, before its codes are read.
pub(super) struct Plan {
    /// What a code is.
    pub(super) code: Code,
    /// Rows and columns.
    pub(super) dims: (usize, usize),
    /// The format with its settings, for people.
    pub(super) kept: String,
    /// Columns, and rows, with one scale.
    pub(super) group_size: usize,
    pub(super) rows_per_scale: usize,
    /// Whether the files say in which order columns are; its memory is counted whether it is another than theirs or not.
    pub(super) says_order: bool,
}

impl Plan {
    /// Rows and columns of the scales.
    pub(super) fn scale_dims(&self) -> (usize, usize) {
        (self.dims.0.div_ceil(self.rows_per_scale), self.dims.1.div_ceil(self.group_size))
    }

    /// The share of the matrix that the view is given, and where it begins in the whole.
    fn own(self, weights: &Weights, name: &str) -> Result<Own> {
        let (rows, columns) = self.dims;
        let scale_dims = self.scale_dims();
        let Some(share) = weights.share() else {
            return Ok(Own { plan: self, at: (0, 0), scales: ((0, scale_dims.0), (0, scale_dims.1)) });
        };
        let (size, per_scale) = match share.axis {
            Axis::Rows => (rows, self.rows_per_scale),
            Axis::Columns => (columns, self.group_size),
        };
        let (range, of_scales, per_scale) = shared_out(share, size, per_scale)
            .ok_or_else(|| weights.error(name, self.cannot_share(share, size, per_scale)))?;
        Ok(match share.axis {
            Axis::Rows => Own {
                plan: Self { dims: (range.len(), columns), rows_per_scale: per_scale, ..self },
                at: (range.start, 0),
                scales: ((of_scales.start, of_scales.len()), (0, scale_dims.1)),
            },
            Axis::Columns => Own {
                plan: Self { dims: (rows, range.len()), group_size: per_scale, ..self },
                at: (0, range.start),
                scales: ((0, scale_dims.0), (of_scales.start, of_scales.len())),
            },
        })
    }

    fn cannot_share(&self, share: Share, size: usize, per_scale: usize) -> String {
        let (what, of) = (if share.axis == Axis::Rows { "outputs" } else { "inputs" }, share.of);
        format!("({}) has a scale for {per_scale} of its {size} {what}, which {of} ranks cannot share out", self.kept)
    }
}

/// Of rows or columns, so many of which have a scale, those of a share, their scales, and how many have one: a scale of all is one
/// of each share.
fn shared_out(share: Share, size: usize, per_scale: usize) -> Option<(Range<usize>, Range<usize>, usize)> {
    let range = share.range(size)?;
    if per_scale >= size {
        return Some((range.clone(), 0..1, range.len()));
    }
    let is_whole = range.len().is_multiple_of(per_scale);
    is_whole.then(|| (range.clone(), range.start / per_scale..range.end / per_scale, per_scale))
}

/// What a view is given of a matrix: a share of it, or the whole.
struct Own {
    plan: Plan,
    /// The first row and column.
    at: (usize, usize),
    /// The first row of the scales and how many rows, and likewise of columns.
    scales: ((usize, usize), (usize, usize)),
}

impl Own {
    /// Of what stands beside all codes that which stands beside its own.
    fn beside(&self, beside: Beside, all_groups: usize) -> Result<Beside> {
        let ((first_row, rows), (first_group, groups)) = self.scales;
        let scales = beside.scales.map(|scales| {
            Ok::<_, Error>(scales.narrow(0, first_row, rows)?.narrow(1, first_group, groups)?.contiguous()?)
        });
        let place = |row: usize, group: usize| (first_row + row) * all_groups + first_group + group;
        let zeros = beside.zeros.map(|zeros| {
            let places = (0..rows).flat_map(|row| (0..groups).map(move |group| (row, group)));
            places.map(|(row, group)| zeros[place(row, group)]).collect()
        });
        Ok(Beside { scales: scales.transpose()?, zeros, order: beside.order })
    }

    /// Number of its scales.
    fn num_scales(&self) -> usize {
        self.scales.0.1.saturating_mul(self.scales.1.1)
    }
}

/// What stands beside the codes of a matrix. All of a dry view are absent.
#[derive(Default)]
pub(super) struct Beside {
    /// `[scale rows, groups]`.
    pub(super) scales: Option<Tensor>,
    /// By rows of the scales.
    pub(super) zeros: Option<Vec<u8>>,
    /// The column of the matrix for each of the codes, where that is another.
    pub(super) order: Option<Vec<u32>>,
}

/// Makes the matrix of the codes in tensor `name`, of this shape in the files, that `code_at` finds in its bytes by row and
/// column of the codes; of a share those of it. All that is given is of the whole matrix. `scale_bytes`: of each scale, and of its
/// zero.
pub(super) fn load(
    weights: &Weights,
    (name, shape): (&str, &[usize]),
    plan: Plan,
    beside: Beside,
    scale_bytes: usize,
    code_at: impl Fn(&[u8], usize, usize) -> u8 + Send + Sync + 'static,
) -> Result<Arc<dyn Projection>> {
    let (of_rows, of_columns) = plan.dims;
    let values = of_rows.saturating_mul(of_columns);
    let (_, all_groups) = plan.scale_dims();
    let own = plan.own(weights, name)?;
    let beside = own.beside(beside, all_groups)?;
    let Own { plan, at: (first_row, first_column), .. } = &own;
    let (rows, columns) = plan.dims;
    if beside.order.is_some() && columns != of_columns {
        return Err(weights.error(name, "has its inputs in an order of its own, in which ranks cannot share them out"));
    }
    let resident_bytes = PackedMatrix::bytes_of(plan.code, plan.dims, own.num_scales(), scale_bytes, plan.says_order);
    let said = Coded { kept: plan.kept.clone(), values, resident_bytes };
    weights.note_dequantised(weights.placement().widened_bytes(rows.saturating_mul(columns)));
    let Beside { scales: Some(scales), zeros, order } = beside else {
        weights.coded(shape, name, said, |_, _| Ok(()))?;
        return Ok(Arc::new(Dense(weights.placeholder(&[rows, columns])?)));
    };
    let layer = weights.layer().to_owned();
    let scales = CodeScales { scales, zeros, group_size: plan.group_size, rows_per_scale: plan.rows_per_scale };
    let (code, dims, first_row, first_column) = (plan.code, plan.dims, *first_row, *first_column);
    let made = weights.coded(shape, name, said, move |bytes, device| {
        let code_at = |row, column| code_at(bytes, first_row + row, first_column + column);
        let made = PackedMatrix::new(code, dims, scales, order, device, code_at);
        made.map_err(|error| Error::checkpoint(&layer, error))
    })?;
    Ok(match made {
        Some(matrix) => Arc::new(Packed(matrix)),
        None => Arc::new(Dense(weights.placeholder(&[rows, columns])?)),
    })
}

/// A matrix of the plan in place of files.
pub(super) fn made_up(weights: &Weights, name: &str, plan: Plan, has_zeros: bool) -> Result<Arc<dyn Projection>> {
    let (of_rows, of_columns) = plan.dims;
    let values = of_rows.saturating_mul(of_columns);
    let Own { plan, at: (first_row, first_column), .. } = plan.own(weights, name)?;
    let ((rows, columns), (scale_rows, groups)) = (plan.dims, plan.scale_dims());
    let scale_bytes = size_of::<f16>() + usize::from(has_zeros);
    let resident_bytes = PackedMatrix::bytes_of(plan.code, plan.dims, scale_rows * groups, scale_bytes, false);
    weights.note_dequantised(weights.placement().widened_bytes(rows.saturating_mul(columns)));
    weights.note_made_up(name, Coded { kept: plan.kept, values, resident_bytes });
    if weights.is_dry() {
        return Ok(Arc::new(Dense(weights.placeholder(&[rows, columns])?)));
    }
    // Codes around the middle, of which rows with inputs of size 1 make outputs of about that size.
    let scale =
        Tensor::full(0.25 / (of_columns as f32).sqrt(), (scale_rows, groups), &Device::Cpu)?.to_dtype(DType::F16)?;
    let (middle, mask) = match plan.code {
        Code::Bits4 => (8, 0x0f),
        Code::Bits8 => (128, 0x0f),
        Code::Float8 => (0, 0xb8),
    };
    let zeros = has_zeros.then(|| vec![middle; scale_rows * groups]);
    let scales = CodeScales { scales: scale, zeros, group_size: plan.group_size, rows_per_scale: plan.rows_per_scale };
    let code_at = |row: usize, column: usize| {
        let (row, column) = (first_row + row, first_column + column);
        let mixed = (row.wrapping_mul(0x9e37_79b1) ^ column.wrapping_mul(0x85eb_ca77)).wrapping_mul(0xc2b2_ae3d) >> 15;
        let code = mixed as u8 & mask;
        if plan.code == Code::Bits8 { middle - 8 + code } else { code }
    };
    let matrix = PackedMatrix::new(plan.code, plan.dims, scales, None, &weights.placement().device, code_at)?;
    Ok(Arc::new(Packed(matrix)))
}

/// Words of 32 bits, in the order of the file; of a dry view `None`.
pub(super) fn words(weights: &Weights, shape: &[usize], name: &str) -> Result<Option<Vec<u32>>> {
    check_dtype(weights, name, &[Dtype::I32])?;
    weights.coded(shape, name, Coded::default(), |bytes, _| Ok(read_words(bytes).collect()))
}

/// One number for each scale, in the dtype of the file; of a dry view `None`. And the bytes of one.
pub(super) fn scales(weights: &Weights, shape: &[usize], name: &str) -> Result<(Option<Tensor>, usize)> {
    check_dtype(weights, name, &[Dtype::F16, Dtype::BF16, Dtype::F32])?;
    let dtype = match weights.stored(name) {
        Some(Stored::Plain(Dtype::BF16)) => DType::BF16,
        Some(Stored::Plain(Dtype::F32)) => DType::F32,
        _ => DType::F16,
    };
    let dims = shape.to_vec();
    let read = weights.coded(shape, name, Coded::default(), move |bytes, _| {
        let halves = || bytes.as_chunks().0.iter().map(|half| u16::from_le_bytes(*half));
        Ok(match dtype {
            DType::BF16 => Tensor::from_vec(halves().map(bf16::from_bits).collect(), dims, &Device::Cpu)?,
            DType::F16 => Tensor::from_vec(halves().map(f16::from_bits).collect(), dims, &Device::Cpu)?,
            _ => Tensor::from_vec(read_words(bytes).map(f32::from_bits).collect(), dims, &Device::Cpu)?,
        })
    })?;
    if let Some(scales) = &read {
        let largest = scales.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        let sum = scales.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?;
        if !largest.is_finite() || !sum.is_finite() {
            return Err(weights.error(name, "holds scales that are not finite"));
        }
    }
    Ok((read, dtype.size_in_bytes()))
}

/// Refuses a part of another dtype.
pub(super) fn check_dtype(weights: &Weights, name: &str, read: &[Dtype]) -> Result<()> {
    match weights.stored(name) {
        Some(Stored::Plain(dtype)) if read.contains(&dtype) => Ok(()),
        // That it is missing whoever reads it says.
        None => Ok(()),
        Some(other) => {
            let read = read.iter().map(|dtype| format!("{dtype:?}")).collect::<Vec<_>>().join(", ");
            Err(weights.error(name, format!("is of {other}; read is {read}")))
        }
    }
}

/// Refuses sizes that words do not divide.
pub(super) fn check_divides(weights: &Weights, name: &str, what: &str, size: usize, per_word: usize) -> Result<()> {
    match size.is_multiple_of(per_word) {
        true => Ok(()),
        false => Err(weights.error(name, format!("has {per_word} {what} in a word, which do not divide {size}"))),
    }
}

/// The word at this place of a tensor of words.
pub(super) fn word_at(bytes: &[u8], index: usize) -> u32 {
    let at = index * size_of::<u32>();
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn read_words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word))
}

/// The order of columns in which those of a group lie side by side, from the group of each column; `None` where they do.
pub(super) fn order_of_groups(
    weights: &Weights,
    name: &str,
    group_of: &[u32],
    (group_size, groups): (usize, usize),
) -> Result<Option<Vec<u32>>> {
    // As Python counts from the end.
    let group = |value: u32| match value as i32 {
        value if value < 0 => (groups as i64 + i64::from(value)) as usize,
        value => value as usize,
    };
    let groups_of: Vec<usize> = group_of.iter().map(|value| group(*value)).collect();
    let mut order: Vec<u32> = (0..group_of.len() as u32).collect();
    order.sort_by_key(|column| groups_of[*column as usize]);
    let is_whole = order.iter().enumerate().all(|(at, column)| groups_of[*column as usize] == at / group_size);
    if !is_whole {
        let what = format!("names other groups than {groups} of {group_size} columns each");
        return Err(weights.error(name, what));
    }
    let is_sorted = order.iter().enumerate().all(|(at, column)| at == *column as usize);
    Ok((!is_sorted).then_some(order))
}
