//! How keys and values are kept.
//!
//! Owns: the names by which configurations choose, and the bytes that follow. Does not know: how they are read and written
//! ([`tale_kernels::PagedCache`]).

use std::fmt;
use std::str::FromStr;

use candle_core::DType;
use tale_kernels::{ByteFormat, PagedCache};

use crate::device::Placement;
use crate::error::{Error, Result};

/// `kv_cache_dtype` of a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheDtype {
    /// As they are computed: the compute dtype.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// The upper halves of 32-bit floats.
    Bf16,
    /// 16-bit floats.
    F16,
    /// Integers of 8 bits with a scale for each head of each key and value.
    Int8,
    /// Floats of 8 bits (e4m3) with such scales.
    Fp8,
}

/// The first name of a dtype is the one that is written.
const NAMES: [(&str, KvCacheDtype); 7] = [
    ("auto", KvCacheDtype::Auto),
    ("f32", KvCacheDtype::F32),
    ("bf16", KvCacheDtype::Bf16),
    ("f16", KvCacheDtype::F16),
    ("int8", KvCacheDtype::Int8),
    ("fp8", KvCacheDtype::Fp8),
    // As vLLM calls it as well.
    ("fp8_e4m3", KvCacheDtype::Fp8),
];

impl FromStr for KvCacheDtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, dtype)) => Ok(*dtype),
            None => {
                let known = NAMES.map(|(known, _)| known).join(", ");
                Err(Error::Device(format!("`{name}` is not a dtype of a KV cache; allowed: {known}")))
            }
        }
    }
}

impl fmt::Display for KvCacheDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, _) = NAMES.iter().find(|(_, dtype)| dtype == self).expect("every dtype has a name: this is a bug");
        f.write_str(name)
    }
}

/// What a cache's tensors hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvFormat {
    /// Floats.
    Floats(DType),
    /// Numbers of 8 bits with scales.
    Bytes(ByteFormat),
}

impl KvCacheDtype {
    /// Where a model computes. A GPU's kernels read floats of the compute dtype alone.
    pub fn at(self, placement: &Placement) -> Result<KvFormat> {
        let compute = placement.compute_dtype;
        let dtype = match self {
            Self::Int8 => return Ok(KvFormat::INT8),
            Self::Fp8 => return Ok(KvFormat::FP8),
            Self::Auto => return Ok(KvFormat::computed(placement)),
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        };
        if dtype != compute && placement.is_gpu() {
            let computes = compute.as_str();
            return Err(Error::Device(format!(
                "a KV cache of {self} cannot be read where {computes} is computed; allowed: auto, {computes}, int8, fp8"
            )));
        }
        Ok(KvFormat::Floats(dtype))
    }
}

impl KvFormat {
    /// Integers with scales.
    pub const INT8: Self = Self::Bytes(ByteFormat::Int8);
    /// Floats of e4m3 with scales.
    pub const FP8: Self = Self::Bytes(ByteFormat::E4m3);

    /// As a model computes there.
    pub fn computed(placement: &Placement) -> Self {
        Self::Floats(placement.compute_dtype)
    }

    /// Bytes of one head of `head_dim` values of one key, or of one value.
    pub fn head_bytes(self, head_dim: usize) -> usize {
        PagedCache::head_bytes(head_dim, self.dtype())
    }

    /// Of the tensors of keys and values.
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::Floats(dtype) => dtype,
            Self::Bytes(_) => DType::U8,
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Floats(dtype) => f.write_str(dtype.as_str()),
            Self::Bytes(ByteFormat::Int8) => f.write_str("int8"),
            Self::Bytes(ByteFormat::E4m3) => f.write_str("fp8"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{DeviceSpec, WeightDtype};

    #[test]
    fn names_are_read_as_they_are_written() {
        for (name, dtype) in NAMES {
            let written = if name == "fp8_e4m3" { "fp8" } else { name };
            assert_eq!((name.parse::<KvCacheDtype>().expect(name), dtype.to_string()), (dtype, written.to_owned()));
        }
        let error = "fp8_e5m2".parse::<KvCacheDtype>().expect_err("not supported").to_string();
        assert!(error.contains("`fp8_e5m2`") && error.contains("auto, f32, bf16, f16, int8, fp8, fp8_e4m3"), "{error}");
    }

    #[test]
    fn a_gpu_reads_floats_of_the_compute_dtype_alone() {
        let cpu = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
        let gpu = Placement::in_host_memory(DeviceSpec::Cuda(0), WeightDtype::Auto);
        assert_eq!(KvCacheDtype::Auto.at(&cpu).expect("on the CPU"), KvFormat::Floats(DType::F32));
        assert_eq!(KvCacheDtype::F16.at(&cpu).expect("on the CPU"), KvFormat::Floats(DType::F16));
        assert_eq!(KvCacheDtype::Auto.at(&gpu).expect("on a GPU"), KvFormat::Floats(DType::BF16));
        for placement in [&cpu, &gpu] {
            assert_eq!(KvCacheDtype::Int8.at(placement).expect("everywhere"), KvFormat::INT8);
            assert_eq!(KvCacheDtype::Fp8.at(placement).expect("everywhere"), KvFormat::FP8);
        }
        let error = KvCacheDtype::F16.at(&gpu).expect_err("another one").to_string();
        assert!(error.contains("allowed: auto, bf16, int8, fp8"), "{error}");
    }
}
