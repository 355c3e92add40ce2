//! Eight-bit floats with scales beside them, as transformers, AutoFP8 and FBGEMM save them.
//!
//! `weight [out, in]` is multiplied with `weight_scale`, of all of it or of each row, or with `weight_scale_inv`, of blocks: its name
//! notwithstanding, values are multiplied with it (transformers `integrations/finegrained_fp8.py`).

use std::sync::Arc;

use tale_kernels::Code;

use super::Projection;
use super::packed::{Beside, Plan, load as load_packed, made_up, scales};
use crate::error::Result;
use crate::quantisation::{Float8, Format};
use crate::weights::Weights;

/// Tensors `weight` and its scales of a matrix in this format.
pub(super) fn load(weights: &Weights, out_features: usize, in_features: usize) -> Result<Option<Arc<dyn Projection>>> {
    let Some(Format::Float8(Float8 { block })) = weights.format() else { return Ok(None) };
    let has_blocks = weights.contains("weight_scale_inv") || weights.is_dummy() && block.is_some();
    let name = if has_blocks { "weight_scale_inv" } else { "weight_scale" };
    let values = weights.shape(name).map(|shape| shape.iter().product::<usize>());
    let (group_size, rows_per_scale, kept) = match (has_blocks, block, values) {
        (true, Some([rows, columns]), _) => (*columns, *rows, format!("fp8, blocks of {rows}x{columns}")),
        (_, _, Some(1)) => (in_features, out_features, "fp8, whole matrices".to_owned()),
        _ => (in_features, 1, "fp8, whole rows".to_owned()),
    };
    let dims = (out_features, in_features);
    let plan = Plan { code: Code::Float8, dims, kept, group_size, rows_per_scale, says_order: false };
    if weights.is_dummy() {
        return made_up(weights, "weight", plan, false).map(Some);
    }
    // For products of quantised activations, which are not computed here.
    for name in ["input_scale", "activation_scale", "input_scale_ub"] {
        weights.ignore_beside(name);
    }
    check_is_e4m3(weights, "weight")?;
    let scale_dims = plan.scale_dims();
    let shape = match (values, weights.shape(name)) {
        // One number of any rank; of rows with or without a column.
        (Some(1), Some(shape)) => shape.to_vec(),
        (_, Some(shape)) if scale_dims.1 == 1 && shape == [scale_dims.0] => shape.to_vec(),
        _ => vec![scale_dims.0, scale_dims.1],
    };
    let (scales, scale_bytes) = scales(weights, &shape, name)?;
    let scales = scales.map(|scales| scales.reshape(scale_dims)).transpose()?;
    let code_at = move |bytes: &[u8], row: usize, column: usize| bytes[row * in_features + column];
    let beside = Beside { scales, ..Beside::default() };
    load_packed(weights, ("weight", &[out_features, in_features]), plan, beside, scale_bytes, code_at).map(Some)
}

/// Refuses a weight of another dtype.
pub(super) fn check_is_e4m3(weights: &Weights, name: &str) -> Result<()> {
    const READ: &str = "F8_E4M3";
    match weights.stored(name) {
        Some(stored) if stored.to_string() != READ => {
            Err(weights.error(name, format!("is of {stored}; read is {READ}")))
        }
        _ => Ok(()),
    }
}
