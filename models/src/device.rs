//! Where tensors live and in which dtype. The only file of this crate that asks which backend was compiled in.

use candle_core::{DType, Device};

use crate::error::{Error, Result};

/// A device by name: `cpu`, `cuda:0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceSpec {
    /// The host processor.
    #[default]
    Cpu,
}

impl std::str::FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "cpu" => Ok(Self::Cpu),
            _ => Err(Error::Device(format!("`{name}` is not a device of this build; it knows: cpu"))),
        }
    }
}

impl std::fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
        }
    }
}

/// In which dtype weight matrices are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightDtype {
    /// As the checkpoint publishes them.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl std::str::FromStr for WeightDtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            _ => Err(Error::Device(format!("`{name}` is not a dtype; allowed: auto, f32, bf16, f16"))),
        }
    }
}

/// An opened device and the dtypes to use on it.
#[derive(Debug, Clone)]
pub struct Placement {
    /// The device.
    pub device: Device,
    /// Dtype of activations, norms, biases and convolution kernels. On the CPU always f32: the matrix kernels there
    /// read 16-bit weights and widen them in registers, so that nothing is gained by rounding activations.
    pub compute_dtype: DType,
    /// Dtype of weight matrices.
    pub weight_dtype: WeightDtype,
}

impl Placement {
    /// Opens the device. Call on the thread that will use it.
    pub fn open(device: DeviceSpec, weight_dtype: WeightDtype) -> Result<Self> {
        match device {
            DeviceSpec::Cpu => Ok(Self { device: Device::Cpu, compute_dtype: DType::F32, weight_dtype }),
        }
    }

    /// Dtype in which a matrix published as `published` is kept.
    pub fn matrix_dtype(&self, published: DType) -> DType {
        match (self.weight_dtype, published) {
            (WeightDtype::F32, _) => DType::F32,
            (WeightDtype::Bf16, _) => DType::BF16,
            (WeightDtype::F16, _) => DType::F16,
            (WeightDtype::Auto, DType::F16 | DType::BF16) => published,
            (WeightDtype::Auto, _) => DType::F32,
        }
    }
}
