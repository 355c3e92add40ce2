//! Random weights for a checkpoint of which only the configurations exist (`--load-format dummy`): for benches and load
//! tests, which need sizes and not sense.
//!
//! Matrices and kernels are uniform with mean 0 and variance `1 / columns`, biases within 0.1 of 0 and other vectors
//! (norms) within 0.1 of 1, so that activations neither vanish nor grow.

use std::ops::Range;

use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;

use super::share::Share;
use crate::error::Result;

/// Values that a GPU draws at a time: 64 MiB of f32 beside the tensor itself, whatever its size is.
const PIECE_VALUES: usize = 16 << 20;
/// Values that one thread of the host draws at least.
const MIN_VALUES_PER_TASK: usize = 1 << 14;

/// The range of a tensor's uniform values.
#[derive(Debug, Clone, Copy)]
struct Uniform {
    centre: f32,
    /// Half of the range's width.
    spread: f32,
}

impl Uniform {
    fn of(name: &str, shape: &[usize]) -> Self {
        let columns = shape.iter().skip(1).product::<usize>();
        match columns {
            // Also kernels of one value per channel, as Wan's norms have.
            0 | 1 if name.ends_with("bias") => Self { centre: 0.0, spread: 0.1 },
            0 | 1 => Self { centre: 1.0, spread: 0.1 },
            // A uniform variable on -a..a has variance a² / 3.
            _ => Self { centre: 0.0, spread: (3.0 / columns as f32).sqrt() },
        }
    }
}

/// A tensor of random values, made where it will live. On the CPU the same name and shape give the same values; a GPU
/// draws from its own generator.
pub(super) fn tensor(name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    let count = shape.iter().product::<usize>();
    Ok(part(name, shape, 0..count, dtype, device)?.reshape(shape)?)
}

/// The values of such a tensor at `places`, counted from its first one, as a vector.
pub(super) fn part(name: &str, shape: &[usize], places: Range<usize>, dtype: DType, device: &Device) -> Result<Tensor> {
    let uniform = Uniform::of(name, shape);
    match (device, dtype) {
        (Device::Cpu, DType::F32) => on_host(name, places, uniform, |value| value),
        (Device::Cpu, DType::BF16) => on_host(name, places, uniform, bf16::from_f32),
        (Device::Cpu, DType::F16) => on_host(name, places, uniform, f16::from_f32),
        _ => on_device(places.len(), uniform, dtype, device),
    }
}

/// Of such a tensor a share, which has a shape of its own. A GPU, whose values are others each time, draws no more than that.
pub(super) fn share(
    name: &str,
    (shape, own_shape): (&[usize], &[usize]),
    share: Share,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let own: usize = own_shape.iter().product();
    let values = match share.values_of(shape).as_deref() {
        Some([one]) => part(name, shape, one.clone(), dtype, device)?,
        Some(_) if device.is_cpu() => {
            let dimension = share.dimension(shape.len()).expect("values are shared out by it: this is a bug");
            let first = share.index * own_shape[dimension];
            let whole = tensor(name, shape, dtype, device)?;
            whole.narrow(dimension, first, own_shape[dimension])?.contiguous()?
        }
        _ => part(name, shape, 0..own, dtype, device)?,
    };
    Ok(values.reshape(own_shape)?)
}

/// By all threads; which of them draws a value changes nothing, since a value depends on its place alone.
fn on_host<T: WithDType>(name: &str, places: Range<usize>, uniform: Uniform, round: fn(f32) -> T) -> Result<Tensor> {
    let seed = fnv1a(name);
    let value = |place: usize| round(uniform.centre + uniform.spread * noise(seed, place));
    let count = places.len();
    let values: Vec<T> = places.into_par_iter().with_min_len(MIN_VALUES_PER_TASK).map(value).collect();
    Ok(Tensor::from_vec(values, count, &Device::Cpu)?)
}

/// Piece by piece: candle draws f32 only, and the largest tables would be twice as large again in it.
fn on_device(count: usize, uniform: Uniform, dtype: DType, device: &Device) -> Result<Tensor> {
    let (low, high) = (uniform.centre - uniform.spread, uniform.centre + uniform.spread);
    let draw = |count: usize| Tensor::rand(low, high, count, device)?.to_dtype(dtype);
    if count <= PIECE_VALUES {
        return Ok(draw(count)?);
    }
    let all = Tensor::zeros(count, dtype, device)?;
    for start in (0..count).step_by(PIECE_VALUES) {
        all.slice_set(&draw(PIECE_VALUES.min(count - start))?, 0, start)?;
    }
    Ok(all)
}

/// Uniform in -1..1: the finaliser of SplitMix64 over a counter.
fn noise(seed: u64, place: usize) -> f32 {
    let mut bits = seed.wrapping_add((place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((bits ^ (bits >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean and variance.
    fn moments(tensor: &Tensor) -> (f64, f64) {
        let values = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        (mean, values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64)
    }

    #[track_caller]
    fn check(tensor: &Tensor, mean: f64, variance: f64) {
        let (found_mean, found_variance) = moments(tensor);
        let sigma = (variance / tensor.elem_count() as f64).sqrt();
        assert!((found_mean - mean).abs() < 5.0 * sigma, "mean {found_mean}, expected {mean}");
        assert!((found_variance / variance - 1.0).abs() < 0.05, "variance {found_variance}, expected {variance}");
    }

    #[test]
    fn matrices_keep_the_size_of_what_they_multiply() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let matrix = tensor("q.weight", &[300, 400], dtype, &Device::Cpu).unwrap();
            assert_eq!((matrix.dtype(), matrix.dims()), (dtype, &[300, 400][..]));
            check(&matrix, 0.0, 1.0 / 400.0);
        }
        check(&tensor("conv.weight", &[96, 32, 3, 3], DType::F32, &Device::Cpu).unwrap(), 0.0, 1.0 / 288.0);
        check(&tensor("norm.weight", &[4096], DType::F32, &Device::Cpu).unwrap(), 1.0, 0.01 / 3.0);
        check(&tensor("norm.gamma", &[4096, 1, 1], DType::F32, &Device::Cpu).unwrap(), 1.0, 0.01 / 3.0);
        check(&tensor("q.bias", &[4096], DType::F32, &Device::Cpu).unwrap(), 0.0, 0.01 / 3.0);
    }

    /// The way of a GPU, whose generator is candle's; here on the CPU, in one piece and in several.
    #[test]
    fn a_device_draws_the_same_distribution() {
        let uniform = Uniform::of("q.weight", &[1000, 100]);
        let one_piece = on_device(100_000, uniform, DType::BF16, &Device::Cpu).unwrap();
        assert_eq!((one_piece.dtype(), one_piece.dims()), (DType::BF16, &[100_000][..]));
        check(&one_piece, 0.0, 0.01);
        let count = PIECE_VALUES + 40_000;
        let several = on_device(count, uniform, DType::BF16, &Device::Cpu).unwrap();
        check(&several, 0.0, 0.01);
        check(&several.narrow(0, count - 20_000, 20_000).unwrap().contiguous().unwrap(), 0.0, 0.01);
    }

    #[test]
    fn a_name_has_its_own_values_and_always_the_same() {
        let values = |name: &str| {
            tensor(name, &[64, 64], DType::F32, &Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(values("a.weight"), values("a.weight"));
        assert_ne!(values("a.weight"), values("b.weight"));
    }
}
