//! Launches of `packed.cu`.

use candle_core::{DType, Result, Tensor, bail};

use super::tiles::{COLUMNS, PLANE_WORDS, ROWS};
use super::{Code, PackedMatrix};
use crate::gpu::{Launch, by_dtype, module, output};

module!(PACKED, "packed");

/// All values `[out, in]` in `dtype`.
pub(super) fn dequantise(matrix: &PackedMatrix, dtype: DType) -> Result<Tensor> {
    let PackedMatrix { code, rows, columns, group_size, rows_per_scale, words, scales, zeros, order, .. } = matrix;
    let y = output((*rows, *columns), dtype, words)?;
    let scale_dtype = match scales.dtype() {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        other => bail!("packed matrix: scales are f32, f16 or bf16, got {other:?}"),
    };
    let code = match code {
        Code::Bits4 => 0,
        Code::Bits8 => 1,
        Code::Float8 => 2,
    };
    let grid = [columns.div_ceil(COLUMNS), rows.div_ceil(ROWS), 1];
    Launch::new(&PACKED, by_dtype!("dequantise", dtype), grid, PLANE_WORDS)?
        .tensor(words)?
        .tensor(scales)?
        .optional(zeros.as_ref())?
        .optional(order.as_ref())?
        .tensor(&y)?
        .i64(*rows)
        .i64(*columns)
        .i64(*group_size)
        .i64(*rows_per_scale)
        .i32(code)
        .i32(scale_dtype)
        .run(words)?;
    Ok(y)
}
