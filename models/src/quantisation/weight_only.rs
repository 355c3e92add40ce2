//! GPTQ and AWQ: integers with scales and zeros for groups of inputs.

use super::{bits, group_size};
use crate::config::Fields;
use crate::error::Result;

/// What `quantization_config` says of GPTQ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gptq {
    /// 4 or 8.
    pub bits: usize,
    /// Inputs of a group; `None` of all.
    pub group_size: Option<usize>,
    /// Whether zeros are kept less one (`gptq`) or as they are (`gptq_v2`).
    pub zeros_less_one: bool,
}

impl Gptq {
    pub(super) fn read(fields: &Fields) -> Result<Self> {
        if fields.flag("is_marlin_format", false)? {
            return Err(fields.error("is_marlin_format", "matrices packed for Marlin are not read"));
        }
        // Its name has changed.
        const NAMES: [&str; 2] = ["checkpoint_format", "format"];
        let mut zeros_less_one = true;
        for name in NAMES {
            let Some(format) = fields.nullable_or::<String>(name, None)? else { continue };
            zeros_less_one = match format.to_lowercase().as_str() {
                "gptq" => true,
                "gptq_v2" => false,
                _ => return Err(fields.error(name, format!("`{format}` is not read; read are gptq and gptq_v2"))),
            };
            break;
        }
        if fields.object("dynamic")?.is_some_and(|dynamic| dynamic.names().next().is_some()) {
            return Err(fields.error("dynamic", "layers of different settings are not read"));
        }
        match fields.or("pack_dtype", "int32".to_owned())?.as_str() {
            "int32" => {}
            other => return Err(fields.error("pack_dtype", format!("`{other}` is not read; int32 is"))),
        }
        Ok(Self { bits: bits(fields, "bits", 4, &[4, 8])?, group_size: group_size(fields, 128)?, zeros_less_one })
    }
}

/// What `quantization_config` says of AWQ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Awq {
    /// 4.
    pub bits: usize,
    /// Inputs of a group; `None` of all.
    pub group_size: Option<usize>,
}

impl Awq {
    pub(super) fn read(fields: &Fields) -> Result<Self> {
        for name in ["version", "format"] {
            let Some(version) = fields.nullable_or::<String>(name, None)? else { continue };
            if !version.eq_ignore_ascii_case("gemm") {
                return Err(fields.error(name, format!("`{version}` is not read; gemm is")));
            }
        }
        if !fields.flag("zero_point", true)? {
            return Err(fields.error("zero_point", "matrices without zeros are not read"));
        }
        Ok(Self { bits: bits(fields, "bits", 4, &[4])?, group_size: group_size(fields, 128)? })
    }
}
