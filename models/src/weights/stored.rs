//! How a file keeps the values of a tensor.

use std::fmt::{self, Display};

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

use super::float8::Float8;

/// The type of a tensor in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// One number per value.
    Plain(Dtype),
    /// One byte per value, perhaps with a scale.
    Float8(Float8),
    /// Blocks of a row's values with common scales, of a type that `tale_kernels` multiplies with.
    Blocks(GgmlDType),
}

impl Stored {
    /// A tensor's values as the dtype says; those of eight bits with what it takes to read them.
    pub(super) fn of(dtype: Dtype) -> Self {
        Float8::of(dtype).map_or(Self::Plain(dtype), Self::Float8)
    }

    /// Values that lie together, and the bytes that they take.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::Plain(dtype) => (1, dtype.bitsize() / 8),
            Self::Float8(_) => (1, 1),
            Self::Blocks(dtype) => (dtype.block_size(), dtype.type_size()),
        }
    }

    /// The dtype that a tensor has which is kept as published, the narrowest that is computed with and has its values.
    /// Blocks are dequantised where more is done with them than to multiply.
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::Plain(Dtype::F16) => DType::F16,
            Self::Plain(Dtype::BF16) => DType::BF16,
            Self::Float8(float8) if !float8.is_scaled() => DType::BF16,
            Self::Plain(_) | Self::Float8(_) | Self::Blocks(_) => DType::F32,
        }
    }
}

/// As people call the type: `BF16`, `Q4_K`.
impl Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Plain(dtype) => format!("{dtype:?}"),
            Self::Float8(float8) => return f.write_str(float8.name()),
            Self::Blocks(dtype) => format!("{dtype:?}"),
        };
        match name.strip_suffix('K') {
            Some(bits) => write!(f, "{bits}_K"),
            None => f.write_str(&name),
        }
    }
}
