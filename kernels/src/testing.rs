//! What the tests of this crate share: random tensors, comparisons, pools of a given size.

use candle_core::{DType, Device, Tensor};

/// Values between -1 and 1, the same for the same seed.
pub(crate) fn random(dims: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32) / (1u32 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..dims.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).expect("as many values as the shape says")
}

/// All values of a tensor, f32.
pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    let flat = tensor.to_dtype(DType::F32).and_then(|tensor| tensor.flatten_all());
    flat.and_then(|tensor| tensor.to_vec1()).expect("a tensor on the CPU")
}

/// All values of a tensor, as bits.
pub(crate) fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

/// Same shape, and every difference within `tolerance` of the largest expected value (at least 1).
#[track_caller]
pub(crate) fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (values(found), values(expected));
    let scale = expected.iter().fold(1f32, |max, value| max.max(value.abs()));
    for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let same = found == expected || (found - expected).abs() <= tolerance * scale;
        assert!(same, "value {index}: {found} is not {expected} (tolerance {tolerance}, scale {scale})");
    }
}

/// Runs `body` in a pool of `count` threads.
pub(crate) fn threads<R: Send>(count: usize, body: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(count).build().expect("a pool of threads").install(body)
}
