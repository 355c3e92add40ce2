//! Launches of `conv.cu`.

use candle_core::{DType, Result, Tensor, bail};

use super::{CausalPadding, Operands, Shape};
use crate::gpu::{Launch, address, by_dtype, module, output};

module!(CONV, "conv");

/// `THREADS`, `TILE_ROWS`, `TILE_COLUMNS`, `LINE` and `STAGES` of the file.
const THREADS: usize = 128;
const TILE: [usize; 2] = [8, 16];
const LINE_BYTES: usize = 64;
const STAGES: usize = 3;

/// Of a block on GPUs of compute capability 8.6 and 8.9.
const MAX_SHARED_BYTES: usize = 99 << 10;

pub(super) fn convolve(op: &'static str, operands: &Operands<'_>, shape: &Shape) -> Result<Tensor> {
    let x = operands.x.contiguous()?;
    let past = operands.past.map(Tensor::contiguous).transpose()?;
    let weight = operands.weight.to_dtype(x.dtype())?;
    let weight = if pitch(&weight)?.is_some() { weight } else { laid_out(&weight)? };
    let Some(pitch) = pitch(&weight)? else { bail!("{op}: {:?} cannot be laid out", weight.shape()) };
    let bias = operands.bias.map(|bias| bias.to_dtype(x.dtype())?.contiguous()).transpose()?;
    let (kernel, channels) = kernel(&x, shape)?;
    let (frames, [h, w]) = (shape.frames_out(), [shape.h_out(), shape.w_out()]);
    let y = output((shape.b, shape.out, frames, h, w), x.dtype(), &x)?;
    let tiles = shape.b * frames * h.div_ceil(TILE[0]) * w.div_ceil(TILE[1]);
    let launch = Launch::new(&CONV, kernel, [tiles * shape.out.div_ceil(channels), 1, 1], THREADS)?
        .shared(shared_bytes(op, shape, channels)?)
        .tensor(&x)?
        .optional(past.as_ref())?
        .tensor(&weight)?
        .optional(bias.as_ref())?
        .tensor(&y)?;
    sizes(op, shape, pitch)?.into_iter().fold(launch, Launch::i32).run(&x)?;
    Ok(y)
}

/// The kernel's parameters from `inner` on.
fn sizes(op: &str, shape: &Shape, pitch: usize) -> Result<Vec<i32>> {
    let Shape { inner, out, t, past, h, w, kt, kh, kw, stride_t, stride, lead, before, upsample, padding, .. } = *shape;
    let [top, left] = before;
    let (repeat_frame, repeat_edge) =
        (usize::from(padding != CausalPadding::Zeros), usize::from(padding == CausalPadding::Replicate));
    let results = [shape.frames_out(), shape.h_out(), shape.w_out()];
    let input = [inner, out, t, past, h, w];
    let walk = [kt, kh, kw, stride_t, stride, lead, top, left, upsample, repeat_frame, repeat_edge, pitch];
    let fits = |value: usize| i32::try_from(value).ok();
    // A frame's positions are counted as 32-bit numbers too.
    let all: Option<Vec<i32>> = input.iter().chain(&results).chain(&walk).map(|value| fits(*value)).collect();
    match (all, fits(h * w * upsample * upsample)) {
        (Some(all), Some(_)) => Ok(all),
        _ => bail!("{op}: {shape:?} is larger than its kernel counts"),
    }
}

/// The kernel, and how many output channels its blocks compute: as few as possible in vain.
fn kernel(x: &Tensor, shape: &Shape) -> Result<(&'static str, usize)> {
    let padded = |channels: usize| shape.out.next_multiple_of(channels);
    Ok(match x.dtype() {
        _ if shape.out <= 32 => (by_dtype!("conv_32", x.dtype()), 32),
        DType::F16 if padded(128) <= padded(96) => ("conv_128_f16", 128),
        DType::BF16 if padded(128) <= padded(96) => ("conv_128_bf16", 128),
        dtype => (by_dtype!("conv_96", dtype), 96),
    })
}

/// Weights of three steps, two slabs, a table of one frame's positions.
fn shared_bytes(op: &str, shape: &Shape, channels: usize) -> Result<usize> {
    let side = |tile: usize, kernel: usize| (tile - 1) * shape.stride + kernel;
    let plane = side(TILE[0], shape.kh) * side(TILE[1], shape.kw);
    let frames = if shape.kh * shape.kw == 1 { shape.kt } else { 1 };
    let bytes = STAGES * channels * LINE_BYTES + 2 * frames * plane * LINE_BYTES + plane * size_of::<i32>();
    if bytes > MAX_SHARED_BYTES {
        bail!("{op}: a kernel of {:?} with stride {} is too large", [shape.kt, shape.kh, shape.kw], shape.stride);
    }
    Ok(bytes)
}

/// `[out, in, kt, kh, kw]` with the input channels of one tap and output channel side by side, from aligned places on:
/// in memory `[kt, kh, kw, out, in]`, the last dimension filled up to 16 bytes.
pub(super) fn laid_out(weight: &Tensor) -> Result<Tensor> {
    if pitch(weight)?.is_some() {
        return Ok(weight.clone());
    }
    let (inner, pack) = (weight.dim(1)?, 16 / weight.dtype().size_in_bytes());
    let taps_first = weight.permute((2, 3, 4, 0, 1))?.force_contiguous()?; // [kt, kh, kw, out, in]
    let filled = taps_first.pad_with_zeros(4, 0, inner.next_multiple_of(pack) - inner)?;
    filled.narrow(4, 0, inner)?.permute((3, 4, 0, 1, 2))
}

/// The distance between output channels, if the weight is laid out as the kernel reads it.
fn pitch(weight: &Tensor) -> Result<Option<usize>> {
    let (out, inner, _, kh, kw) = weight.dims5()?;
    let (size, stride) = (weight.dtype().size_in_bytes(), weight.stride());
    let pitch = if out > 1 { stride[0] } else { inner.next_multiple_of(16 / size) };
    let expected = [pitch, 1, kh * kw * out * pitch, kw * out * pitch, out * pitch];
    let fits = |axis: usize| weight.dims()[axis] == 1 || stride[axis] == expected[axis];
    let is_laid_out = (0..5).all(fits) && pitch >= inner && pitch * size % 16 == 0 && address(weight)? % 16 == 0;
    Ok(is_laid_out.then_some(pitch))
}
