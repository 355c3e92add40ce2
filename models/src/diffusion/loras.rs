//! LoRA files of a request.
//!
//! Owns: `loras` as a parameter. What files there are, and how they are checked, is [`LoraSupport`]'s affair.

use crate::error::Result;
use crate::lora::{LoraOption, LoraSupport, LoraUse};
use crate::parameter::{Declaration, Options, Parameter};

/// Terms that are added to the model's layers for one request alone.
pub static LORAS: Parameter<Vec<LoraOption>> = Parameter::loras(
    "loras",
    "LoRA files of the model's folder, each by its name without .safetensors and with a weight (1 when absent).",
)
.flag("lora");

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&LORAS.declaration];

pub(super) fn resolve(support: &LoraSupport, options: &Options) -> Result<Vec<LoraUse>> {
    support.resolve(&options.get(&LORAS).unwrap_or_default())
}

pub(super) fn echo(loras: &[LoraUse], options: &mut Options) {
    let loras: Vec<LoraOption> =
        loras.iter().map(|lora| LoraOption { name: lora.name.clone(), weight: lora.weight }).collect();
    options.set(&LORAS, (!loras.is_empty()).then_some(loras));
}
