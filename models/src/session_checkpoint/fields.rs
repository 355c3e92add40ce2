//! The fields of a checkpoint, one after the other: numbers, texts, bytes and tensors.
//!
//! Owns: how they are written, and that nothing is read, allocated or multiplied that the bytes do not have. Does not know: what
//! they mean.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::Digest;
use super::refusal::Refusal;
use crate::error::{Error, Result};

/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;

/// Fields that are being written.
#[derive(Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// As if these had been written.
    #[cfg(test)]
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// What was written so far.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// A number of things, or a place among them.
    pub fn count(&mut self, count: usize) {
        self.0.extend((count as u64).to_le_bytes());
    }

    /// A number with all its bits.
    pub fn number(&mut self, number: f64) {
        self.0.extend(number.to_le_bytes());
    }

    /// Yes or no.
    pub fn flag(&mut self, flag: bool) {
        self.0.push(u8::from(flag));
    }

    /// UTF-8.
    pub fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    /// Bytes, with their number.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.extend_from_slice(bytes);
    }

    /// Whether there is something, and then that.
    pub fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T) -> Result<()>) -> Result<()> {
        self.flag(value.is_some());
        value.map_or(Ok(()), |value| write(self, value))
    }

    /// A tensor of f32, bf16 or f16, whatever device it lies on: it is put in order in the memory of the host, so that the
    /// device needs none for it.
    pub fn tensor(&mut self, tensor: &Tensor) -> Result<()> {
        let on_host = tensor.to_device(&Device::Cpu)?.flatten_all()?;
        let code = code_of(tensor.dtype()).ok_or(Refusal::State("a tensor of an unknown dtype"))?;
        self.0.push(code);
        self.count(tensor.rank());
        tensor.dims().iter().for_each(|dim| self.count(*dim));
        match tensor.dtype() {
            DType::F32 => self.values(&on_host.to_vec1()?, f32::to_le_bytes),
            DType::BF16 => self.values(&on_host.to_vec1()?, bf16::to_le_bytes),
            _ => self.values(&on_host.to_vec1()?, f16::to_le_bytes),
        }
        Ok(())
    }

    fn values<T: Copy, const N: usize>(&mut self, values: &[T], bytes_of: impl Fn(T) -> [u8; N]) {
        let begin = self.0.len();
        self.0.resize(begin + values.len() * N, 0);
        for (bytes, value) in self.0[begin..].chunks_exact_mut(N).zip(values) {
            bytes.copy_from_slice(&bytes_of(*value));
        }
    }
}

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn code_of(dtype: DType) -> Option<u8> {
    DTYPES.iter().position(|known| *known == dtype).map(|code| code as u8)
}

/// Fields that are being read.
pub struct Reader<'a>(&'a [u8]);

/// The bytes end before a field does.
const ENDS: Refusal = Refusal::State("it ends too early");

impl<'a> Reader<'a> {
    /// From the first one on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Bytes that were not read.
    pub fn left(&self) -> usize {
        self.0.len()
    }

    /// Refuses what follows the last field.
    pub fn end(&self) -> Result<(), Refusal> {
        match self.0 {
            [] => Ok(()),
            _ => Err(Refusal::State("it goes on after its end")),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Refusal> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(ENDS)?;
        self.0 = rest;
        Ok(taken)
    }

    /// As many bytes as the array has.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        self.take(N)?.try_into().map_err(|_| ENDS)
    }

    /// See [`Writer::count`].
    pub fn count(&mut self) -> Result<usize, Refusal> {
        usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|_| ENDS)
    }

    /// As [`Reader::count`], of at most so many.
    pub fn count_up_to(&mut self, most: usize) -> Result<usize, Refusal> {
        self.count()
            .and_then(|count| if count <= most { Ok(count) } else { Err(Refusal::State("more than there can be")) })
    }

    /// See [`Writer::number`].
    pub fn number(&mut self) -> Result<f64, Refusal> {
        Ok(f64::from_le_bytes(self.array()?))
    }

    /// See [`Writer::flag`].
    pub fn flag(&mut self) -> Result<bool, Refusal> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(Refusal::State("a flag is neither 0 nor 1")),
        }
    }

    /// See [`Writer::text`].
    pub fn text(&mut self) -> Result<&'a str, Refusal> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Refusal::State("a text is not UTF-8"))
    }

    /// See [`Writer::bytes`].
    pub fn bytes(&mut self) -> Result<&'a [u8], Refusal> {
        let len = self.count()?;
        self.take(len)
    }

    /// What was written as bytes.
    pub fn digest(&mut self) -> Result<Digest, Refusal> {
        self.bytes()?.try_into().map_err(|_| Refusal::State("a digest has another length"))
    }

    /// See [`Writer::option`].
    pub fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<Option<T>> {
        self.flag()?.then(|| read(self)).transpose()
    }

    /// See [`Writer::tensor`]; on this device.
    pub fn tensor(&mut self, device: &Device) -> Result<Tensor> {
        let [code] = self.array()?;
        let dtype = *DTYPES.get(usize::from(code)).ok_or(Refusal::State("a tensor of an unknown dtype"))?;
        let rank = self.count_up_to(MAX_DIMS)?;
        let dims = (0..rank).map(|_| self.count()).collect::<Result<Vec<usize>, Refusal>>()?;
        if dims.contains(&0) {
            return Err(Refusal::State("a tensor of nothing").into());
        }
        let len = dims.iter().try_fold(dtype.size_in_bytes(), |product, dim| product.checked_mul(*dim)).ok_or(ENDS)?;
        Ok(Tensor::from_raw_buffer(self.take(len)?, dtype, &dims, device)?)
    }

    /// As [`Reader::tensor`], which has the shape and the dtype of `like`, and lies where that does.
    pub fn tensor_like(&mut self, like: &Tensor) -> Result<Tensor> {
        let tensor = self.tensor(like.device())?;
        match tensor.dims() == like.dims() && tensor.dtype() == like.dtype() {
            true => Ok(tensor),
            false => Err(Refusal::State("a tensor of another shape").into()),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::NotResumable(refusal)
    }
}
