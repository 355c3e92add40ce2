//! candle's tensors as slices: what every operation checks before it computes.
//!
//! Owns: access to CPU storage, dtype checks. Does not know: operations.

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, StorageRef, Tensor, bail};
use half::{bf16, f16};

/// A tensor's storage, borrowed for reading.
pub(crate) struct View<'a> {
    storage: StorageRef<'a>,
    op: &'static str,
    start: usize,
    len: usize,
}

/// Values of a weight or a cache.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl<'a> View<'a> {
    /// The values of a contiguous tensor, for operation `op`.
    pub(crate) fn contiguous(op: &'static str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("{op}: {:?} must be contiguous, its strides are {:?}", tensor.shape(), tensor.stride())
        };
        Ok(Self { storage, op, start, len: end - start })
    }

    /// Everything from the first value of a tensor to the last, for access by its strides.
    pub(crate) fn strided(op: &'static str, tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        let span = |(dim, stride): (&usize, &usize)| dim.saturating_sub(1) * stride;
        let last: usize = layout.dims().iter().zip(layout.stride()).map(span).sum();
        let len = if tensor.elem_count() == 0 { 0 } else { last + 1 };
        Self { start: layout.start_offset(), storage, op, len }
    }

    fn cpu(&self) -> Result<&CpuStorage> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(storage),
            _ => bail!("{}: this function computes on the CPU, the tensor is elsewhere", self.op),
        }
    }

    /// The values, if they are f32.
    pub(crate) fn f32(&self) -> Result<&[f32]> {
        match self.cpu()? {
            CpuStorage::F32(values) => Ok(&values[self.start..self.start + self.len]),
            _ => bail!("{}: activations are f32, got {:?}", self.op, self.storage.dtype()),
        }
    }

    /// The values, if they are u32.
    pub(crate) fn u32(&self) -> Result<&[u32]> {
        match self.cpu()? {
            CpuStorage::U32(values) => Ok(&values[self.start..self.start + self.len]),
            _ => bail!("{}: ids are u32, got {:?}", self.op, self.storage.dtype()),
        }
    }

    /// The values, if they are bytes.
    pub(crate) fn u8(&self) -> Result<&[u8]> {
        match self.cpu()? {
            CpuStorage::U8(values) => Ok(&values[self.start..self.start + self.len]),
            _ => bail!("{}: codes are bytes, got {:?}", self.op, self.storage.dtype()),
        }
    }

    /// Integers of 8 bits with a sign, which tensors hold as u8.
    pub(crate) fn i8(&self) -> Result<&[i8]> {
        match self.cpu()? {
            CpuStorage::U8(values) => {
                let values = &values[self.start..self.start + self.len];
                // SAFETY: the same bytes, borrowed as long; every byte is an i8.
                Ok(unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) })
            }
            _ => bail!("{}: integers are u8, got {:?}", self.op, self.storage.dtype()),
        }
    }

    /// The values, if they are of a dtype that weights may have.
    pub(crate) fn values(&self) -> Result<Values<'_>> {
        let range = self.start..self.start + self.len;
        match self.cpu()? {
            CpuStorage::F32(values) => Ok(Values::F32(&values[range])),
            CpuStorage::BF16(values) => Ok(Values::Bf16(&values[range])),
            CpuStorage::F16(values) => Ok(Values::F16(&values[range])),
            _ => bail!("{}: weights are f32, bf16 or f16, got {:?}", self.op, self.storage.dtype()),
        }
    }
}

/// Calls `$body` with `$values` bound to the typed slice.
macro_rules! with_values {
    ($view:expr, |$values:ident| $body:expr) => {
        match $view {
            $crate::view::Values::F32($values) => $body,
            $crate::view::Values::Bf16($values) => $body,
            $crate::view::Values::F16($values) => $body,
        }
    };
}
pub(crate) use with_values;

/// A new tensor on the CPU, in the memory of `values`.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// `tensor` as contiguous f32: norm weights and biases may be published in 16 bits.
pub(crate) fn vector(op: &'static str, name: &str, tensor: &Tensor, len: usize) -> Result<Tensor> {
    if tensor.dims() != [len] {
        bail!("{op}: {name} must have shape [{len}], got {:?}", tensor.shape());
    }
    tensor.to_dtype(DType::F32)?.contiguous()
}
