//! Eight-bit floats with scales, as transformers and AutoFP8 publish them.

use super::MAX_GROUP;
use crate::config::Fields;
use crate::error::Result;

/// What `quantization_config` says of the scales of eight-bit floats.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Float8 {
    /// Rows and columns of a block with one scale, of `weight_scale_inv`; `None` where all of a matrix has one. A layer with
    /// `weight_scale` has it for all or for each row, as its shape says.
    pub block: Option<[usize; 2]>,
}

impl Float8 {
    /// One scale for each row.
    pub(super) const CHANNELS: Self = Self { block: None };
    /// What transformers assumes.
    const DEFAULT_BLOCK: [usize; 2] = [128, 128];

    pub(super) fn read(fields: &Fields) -> Result<Self> {
        let scheme: String = fields.or("activation_scheme", "dynamic".to_owned())?;
        if !["dynamic", "static"].contains(&scheme.to_lowercase().as_str()) {
            return Err(fields.error("activation_scheme", format!("`{scheme}` is not known")));
        }
        match fields.or("scale_fmt", "float".to_owned())?.as_str() {
            "float" => {}
            other => return Err(fields.error("scale_fmt", format!("`{other}` is not read; float is"))),
        }
        match fields.nullable_or::<String>("fmt", None)?.as_deref() {
            None | Some("e4m3") => {}
            Some(other) => return Err(fields.error("fmt", format!("`{other}` is not read; e4m3 is"))),
        }
        if fields.nullable_or::<Vec<String>>("modules_to_convert", None)?.is_some_and(|more| !more.is_empty()) {
            return Err(fields.error("modules_to_convert", "tables of embeddings in eight bits are not read"));
        }
        let block = fields.nullable_or("weight_block_size", Some(Self::DEFAULT_BLOCK))?;
        if block.is_some_and(|block| block.iter().any(|side| !(1..=MAX_GROUP).contains(side))) {
            return Err(fields.error("weight_block_size", format!("its sides are 1 to {MAX_GROUP}")));
        }
        Ok(Self { block })
    }
}
