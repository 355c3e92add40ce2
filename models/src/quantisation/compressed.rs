//! compressed-tensors: groups of layers, each with a format.

use super::kept::Target;
use super::{MAX_GROUP, bits};
use crate::config::Fields;
use crate::error::Result;

/// Most groups of a configuration.
const MAX_GROUPS: usize = 1 << 10;

/// The format of a group of layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compressed {
    /// What a value is.
    pub kind: Kind,
    /// What has one scale.
    pub span: Span,
}

/// What a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Integers of so many bits, 4 or 8, in words (`pack-quantized`).
    Packed {
        /// 4 or 8.
        bits: usize,
        /// Whether the middle is zero everywhere.
        is_symmetric: bool,
    },
    /// Integers of eight bits, one in a byte (`int-quantized`).
    Int8 {
        /// Whether zero is zero everywhere.
        is_symmetric: bool,
    },
    /// `float8_e4m3fn` (`float-quantized`).
    Float8,
}

/// What has one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// A matrix.
    Tensor,
    /// A row.
    Channel,
    /// So many values of a row.
    Group(usize),
    /// Rows and columns.
    Block([usize; 2]),
}

/// The groups of `quantization_config`, each with its targets.
pub(super) fn read(fields: &Fields) -> Result<Vec<(Vec<Target>, Compressed)>> {
    let status: Option<String> = fields.nullable_or("quantization_status", None)?;
    if let Some(status) = status.filter(|status| !["compressed", "frozen"].contains(&status.as_str())) {
        return Err(fields.error("quantization_status", format!("`{status}` is not read; compressed is")));
    }
    if let Some(sparsity) = fields.object("sparsity_config")? {
        let format: Option<String> = sparsity.nullable_or("format", None)?;
        if let Some(format) = format.filter(|format| format != "dense") {
            return Err(sparsity.error("format", format!("`{format}` is not read (sparse matrices, such as 2:4)")));
        }
    }
    if fields.object("transform_config")?.is_some_and(|transforms| transforms.names().next().is_some()) {
        return Err(fields.error("transform_config", "transforms of weights and activations are not computed"));
    }
    let common: Option<String> = fields.nullable_or("format", None)?;
    let Some(groups) = fields.object("config_groups")? else {
        return Err(fields.error("config_groups", "is absent"));
    };
    let names: Vec<String> = groups.names().take(MAX_GROUPS + 1).map(str::to_owned).collect();
    if names.is_empty() || names.len() > MAX_GROUPS {
        return Err(fields.error("config_groups", format!("has 1 to {MAX_GROUPS} groups")));
    }
    let read = |name: &String| {
        let Some(group) = groups.object(name)? else { return Err(groups.error(name, "is null")) };
        let targets: Vec<String> = group.or("targets", Vec::new())?;
        let targets =
            targets.iter().map(|target| Target::read(&group, "targets", target)).collect::<Result<Vec<_>>>()?;
        let format = group.nullable_or("format", common.clone())?;
        Ok((targets, Compressed::read(&group, format.as_deref())?))
    };
    names.iter().map(read).collect()
}

impl Compressed {
    fn read(group: &Fields, format: Option<&str>) -> Result<Self> {
        let Some(weights) = group.object("weights")? else {
            return Err(group.error("weights", "is absent: nothing is quantised"));
        };
        let kind: String = weights.or("type", "int".to_owned())?;
        let is_symmetric = weights.flag("symmetric", true)?;
        let kind = match (format, kind.as_str()) {
            (Some("pack-quantized"), "int") => {
                Kind::Packed { bits: bits(&weights, "num_bits", 8, &[4, 8])?, is_symmetric }
            }
            (Some("int-quantized" | "naive-quantized"), "int") => {
                bits(&weights, "num_bits", 8, &[8])?;
                Kind::Int8 { is_symmetric }
            }
            (Some("float-quantized" | "naive-quantized"), "float") => {
                bits(&weights, "num_bits", 8, &[8])?;
                if !is_symmetric {
                    return Err(weights.error("symmetric", "floats with zeros are not read"));
                }
                Kind::Float8
            }
            (format, kind) => {
                let format = format.unwrap_or("nothing");
                let problem = format!(
                    "`{format}` of {kind} is not read; read are pack-quantized and int-quantized of int, and float-quantized \
                     of float"
                );
                return Err(group.error("format", problem));
            }
        };
        let span = span(&weights)?;
        if matches!(kind, Kind::Packed { .. }) && matches!(span, Span::Block(_)) {
            return Err(weights.error("strategy", "`block` of packed integers is not read"));
        }
        Ok(Self { kind, span })
    }
}

fn span(weights: &Fields) -> Result<Span> {
    let group_size: Option<i64> = weights.nullable_or("group_size", None)?;
    // As the class completes what is absent.
    let default = match group_size {
        None => "tensor",
        Some(-1) => "channel",
        Some(_) => "group",
    };
    let strategy: Option<String> = weights.nullable_or("strategy", None)?;
    match (strategy.as_deref().unwrap_or(default), group_size) {
        ("tensor", _) => Ok(Span::Tensor),
        ("channel", _) => Ok(Span::Channel),
        ("group", Some(size)) if size > 0 && size as usize <= MAX_GROUP => Ok(Span::Group(size as usize)),
        ("group", size) => {
            let size = size.map_or("absent".to_owned(), |size| size.to_string());
            Err(weights.error("group_size", format!("is {size}; it is 1 to {MAX_GROUP}")))
        }
        ("block", _) => match weights.nullable_or::<[usize; 2]>("block_structure", None)? {
            Some(block) if block.iter().all(|side| (1..=MAX_GROUP).contains(side)) => Ok(Span::Block(block)),
            _ => Err(weights.error("block_structure", format!("is two sides of 1 to {MAX_GROUP}"))),
        },
        (other, _) => {
            Err(weights.error("strategy", format!("`{other}` is not read; read are tensor, channel, group and block")))
        }
    }
}
