//! How a file keeps the values of a tensor.

use std::fmt::{self, Display};

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

/// The type of a tensor in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// One number per value.
    Plain(Dtype),
    /// Blocks of a row's values with common scales, of a type that `tale_kernels` multiplies with.
    Blocks(GgmlDType),
}

impl Stored {
    /// The dtype that a tensor has which is kept as published. Blocks are dequantised where more is done with them than
    /// to multiply.
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::Plain(Dtype::F16) => DType::F16,
            Self::Plain(Dtype::BF16) => DType::BF16,
            Self::Plain(_) | Self::Blocks(_) => DType::F32,
        }
    }
}

/// As people call the type: `BF16`, `Q4_K`.
impl Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Plain(dtype) => format!("{dtype:?}"),
            Self::Blocks(dtype) => format!("{dtype:?}"),
        };
        match name.strip_suffix('K') {
            Some(bits) => write!(f, "{bits}_K"),
            None => f.write_str(&name),
        }
    }
}
