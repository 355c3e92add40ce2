//! What a header claims of a tensor, held against the file.
//!
//! Owns: the types of tensors, and where one of them lies. Does not know: other tensors.

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

use super::reader::{Checked, Reader};
use crate::weights::mapped::Located;
use crate::weights::stored::Stored;

/// ggml's own tensors have four at most, those of convolutions over time, height and width have five.
pub(super) const MAX_DIMENSIONS: u32 = 5;
/// In front of a tensor's name: the key of the shape that it has, outermost first, where the file keeps it in another.
pub(super) const ORIGINAL_SHAPE: &str = "comfy.gguf.orig_shape.";

/// Types by their numbers in files.
pub(super) const TYPES: [(u32, Stored); 13] = [
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

/// What a header claims of one tensor.
pub(super) struct Claim<'a> {
    pub(super) name: &'a str,
    /// Innermost first.
    dimensions: Vec<usize>,
    stored: Stored,
    /// From the start of the data.
    offset: usize,
}

impl<'a> Claim<'a> {
    /// What stands next in a header.
    pub(super) fn read(reader: &mut Reader<'a>) -> Checked<Self> {
        let name = reader.string()?;
        let num_dimensions = reader.u32()?;
        if num_dimensions > MAX_DIMENSIONS {
            return Err(format!(
                "tensor `{name}` has {num_dimensions} dimensions; at most {MAX_DIMENSIONS} are possible"
            ));
        }
        let dimensions = (0..num_dimensions).map(|_| reader.size()).collect::<Checked<_>>()?;
        let number = reader.u32()?;
        let stored = TYPES.iter().find(|(known, _)| *known == number).map(|(_, stored)| *stored).ok_or_else(|| {
            let known = TYPES.map(|(_, stored)| stored.to_string()).join(", ");
            let called = UNREAD_TYPES.iter().find(|(unread, _)| *unread == number).map(|(_, called)| *called);
            let found = called.map_or_else(|| format!("type {number} of ggml"), |called| format!("type {called}"));
            format!("tensor `{name}` has {found}; read are {known}")
        })?;
        Ok(Self { name, dimensions, stored, offset: reader.size()? })
    }

    /// Its name and where it lies, in a file of so many bytes whose data begin at `data`.
    pub(super) fn locate(&self, data: usize, alignment: usize, file_len: usize) -> Checked<(String, Located)> {
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
    pub(super) fn reshaped(&self, shape: &[usize]) -> Checked<Vec<usize>> {
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
