//! The scales that lie in a file beside tensors of eight bits.
//!
//! Owns: which tensors are scales. Does not know: how eight bits are widened.
//!
//! Source of the convention: ComfyUI `comfy/ops.py` (`scaled_fp8_ops`). A layer's `weight` is multiplied with its
//! `scale_weight`; `scale_input` is for products of eight-bit activations, which are not computed here; `scaled_fp8` marks
//! the file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::Dtype;

use super::mapped::Located;
use super::stored::Stored;
use crate::error::{Error, Result};

/// What lies beside the weight of a layer.
const SCALE: &str = "scale_weight";
const INPUT_SCALE: &str = "scale_input";
/// Scales of other conventions, which a model's configuration speaks of: of blocks or channels.
pub(super) const OTHER_SCALES: [&str; 2] = ["weight_scale", "weight_scale_inv"];
/// A tensor that says that there are scales.
const MARKER: &str = "scaled_fp8";

/// Gives the tensors of eight bits their scales, and takes from `tensors` what is no weight.
pub(super) fn take_scales(files: &[(PathBuf, Mmap)], tensors: &mut BTreeMap<String, Located>) -> Result<()> {
    let is_narrow = |located: &Located| matches!(located.stored, Stored::Float8(_));
    tensors.retain(|name, located| !(is_narrow(located) && name.rsplit('.').next() == Some(MARKER)));
    let narrow: Vec<String> =
        tensors.iter().filter(|(_, located)| is_narrow(located)).map(|(name, _)| name.clone()).collect();
    for name in narrow {
        let Some(layer) = name.strip_suffix("weight") else { continue };
        tensors.remove(&format!("{layer}{INPUT_SCALE}"));
        let scale_name = format!("{layer}{SCALE}");
        let Some(scale) = tensors.remove(&scale_name) else { continue };
        let (path, bytes) = &files[scale.file];
        let value = one_number(&scale, bytes).ok_or_else(|| {
            let (shape, stored) = (&scale.shape, scale.stored);
            let problem = format!("tensor `{scale_name}` of {stored} {shape:?} is not one finite number");
            Error::checkpoint(path, problem)
        })?;
        if let Some(Located { stored: Stored::Float8(float8), .. }) = tensors.get_mut(&name) {
            *float8 = float8.scaled_by(value);
        }
    }
    Ok(())
}

fn one_number(located: &Located, file: &[u8]) -> Option<f32> {
    let bytes = &file[located.bytes.clone()];
    let value = match located.stored {
        Stored::Plain(Dtype::F32) => f32::from_le_bytes(bytes.try_into().ok()?),
        Stored::Plain(Dtype::F16) => f16::from_le_bytes(bytes.try_into().ok()?).to_f32(),
        Stored::Plain(Dtype::BF16) => bf16::from_le_bytes(bytes.try_into().ok()?).to_f32(),
        _ => return None,
    };
    value.is_finite().then_some(value)
}
