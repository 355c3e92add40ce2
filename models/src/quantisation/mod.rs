//! `quantization_config` of a language model's `config.json`: in which format its matrices are kept, and which are not.
//!
//! Owns: reading the field, each format's in its own file, and the names of formats that are not read. Does not know: how a
//! matrix is loaded (`layers/projection`), tensors. Activations are never quantised, whatever the field says of them: products are
//! with the dequantised weights.
//!
//! Source: transformers `utils/quantization_config.py` and `quantizers/`; AutoAWQ; GPTQModel; compressed-tensors.

use crate::config::Fields;
use crate::error::Result;

mod compressed;
mod float8;
mod kept;
mod weight_only;

pub use compressed::{Compressed, Kind, Span};
pub use float8::Float8;
pub use weight_only::{Awq, Gptq};

use kept::Kept;

/// The field of `config.json`.
pub const FIELD: &str = "quantization_config";

/// Largest `group_size`, and side of a block.
const MAX_GROUP: usize = 1 << 20;

/// How the matrices of a checkpoint are kept.
#[derive(Debug, Clone)]
pub struct Quantisation {
    formats: Vec<(Covers, Format)>,
    kept: Kept,
}

/// The format of a matrix.
#[derive(Debug, Clone, PartialEq)]
pub enum Format {
    /// GPTQ, as AutoGPTQ and GPTQModel save it.
    Gptq(Gptq),
    /// AWQ, as AutoAWQ saves it.
    Awq(Awq),
    /// As `compressed-tensors` saves it.
    Compressed(Compressed),
    /// Eight-bit floats, as transformers, AutoFP8 and FBGEMM save them.
    Float8(Float8),
}

/// Which layers have a format.
#[derive(Debug, Clone)]
enum Covers {
    /// All that are not kept.
    All,
    /// Those that one of these patterns of compressed-tensors names.
    Targets(Vec<kept::Target>),
}

impl Quantisation {
    /// Of the fields of a `config.json`; `None` where its matrices are plain.
    pub fn read(config: &Fields) -> Result<Option<Self>> {
        let Some(fields) = config.object(FIELD)? else { return Ok(None) };
        let method: String = match fields.nullable_or("quant_method", None)? {
            Some(method) => method,
            None => return Err(fields.error("quant_method", "is absent")),
        };
        let single = |format: Format, kept: Kept| Self { formats: vec![(Covers::All, format)], kept };
        Ok(Some(match method.as_str() {
            "gptq" => single(Format::Gptq(Gptq::read(&fields)?), Kept::of_gptq(&fields)?),
            "awq" => single(Format::Awq(Awq::read(&fields)?), Kept::of_transformers(&fields, kept::Default::Always)?),
            "fp8" => single(
                Format::Float8(Float8::read(&fields)?),
                Kept::of_transformers(&fields, kept::Default::WhereNoneIsNamed)?,
            ),
            "fbgemm_fp8" => single(
                Format::Float8(Float8::CHANNELS),
                Kept::of_transformers(&fields, kept::Default::WhereNoneIsNamed)?,
            ),
            "compressed-tensors" => {
                let groups = compressed::read(&fields)?.into_iter();
                let formats = groups.map(|(targets, format)| (Covers::Targets(targets), Format::Compressed(format)));
                Self { formats: formats.collect(), kept: Kept::of_compressed_tensors(&fields)? }
            }
            other => {
                let problem = format!(
                    "`{other}` is not read; read are gptq, awq, compressed-tensors, fp8 and fbgemm_fp8, and GGUF files"
                );
                return Err(fields.error("quant_method", problem));
            }
        }))
    }

    /// The format of the matrix of a layer, by its name in the files; `None` of those that are plain.
    pub fn of_layer(&self, layer: &str) -> Option<&Format> {
        if self.kept.has(layer) {
            return None;
        }
        let covers = |covers: &Covers| match covers {
            Covers::All => true,
            Covers::Targets(targets) => targets.iter().any(|target| target.is_of_linear(layer)),
        };
        self.formats.iter().find(|(of, _)| covers(of)).map(|(_, format)| format)
    }
}

/// Bits of a whole number that are read.
fn bits(fields: &Fields, field: &str, default: usize, read: &[usize]) -> Result<usize> {
    let bits: usize = fields.or(field, default)?;
    if read.contains(&bits) {
        return Ok(bits);
    }
    let read = read.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    Err(fields.error(field, format!("{bits} bits are not read; read are {read}")))
}

/// Columns of a group; `None` of a row that is one.
fn group_size(fields: &Fields, default: i64) -> Result<Option<usize>> {
    match fields.or("group_size", default)? {
        -1 => Ok(None),
        size if size > 0 && size as usize <= MAX_GROUP => Ok(Some(size as usize)),
        size => Err(fields.error("group_size", format!("is {size}; it is -1 or 1 to {MAX_GROUP}"))),
    }
}

#[cfg(test)]
mod tests;
