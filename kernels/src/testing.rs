//! What the tests of this crate share: random tensors, comparisons, pools of a given size.

use candle_core::{DType, Device, Result, Tensor};

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

/// Where the same body of a test runs: the CPU in f32; with the feature `emulator` the kernels on the emulator, and with
/// the feature `cuda` on the first GPU, both in every dtype of activations.
#[derive(Debug, Clone)]
pub(crate) struct On {
    device: Device,
    pub(crate) dtype: DType,
    #[cfg(feature = "emulator")]
    emulated: bool,
}

impl On {
    /// The CPU.
    pub(crate) fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            #[cfg(feature = "emulator")]
            emulated: false,
        }
    }

    /// A tensor of the test's oracle in the dtype and on the device under test.
    pub(crate) fn tensor(&self, tensor: &Tensor) -> Tensor {
        let moved = tensor.to_dtype(self.dtype).and_then(|tensor| tensor.to_device(&self.device));
        moved.expect("tensors can be converted")
    }

    /// Whether operations run on the CPU in f32, with nothing in between.
    pub(crate) fn is_host(&self) -> bool {
        #[cfg(feature = "emulator")]
        if self.emulated {
            return false;
        }
        self.device.is_cpu()
    }

    /// A tensor that keeps its dtype: rotation tables, ids.
    pub(crate) fn as_is(&self, tensor: &Tensor) -> Tensor {
        tensor.to_device(&self.device).expect("tensors can be moved")
    }

    /// A result, in f32 on the CPU.
    pub(crate) fn as_is_on_cpu(&self, tensor: &Tensor) -> Tensor {
        let moved = tensor.to_device(&Device::Cpu).and_then(|tensor| tensor.to_dtype(DType::F32));
        moved.expect("tensors can be moved")
    }

    /// A tensor rounded to the dtype under test, in f32 on the CPU: what the oracle computes with.
    pub(crate) fn rounded(&self, tensor: &Tensor) -> Tensor {
        tensor.to_dtype(self.dtype).and_then(|tensor| tensor.to_dtype(DType::F32)).expect("tensors can be converted")
    }

    /// Runs the operation under test.
    #[track_caller]
    pub(crate) fn run<T>(&self, operation: impl FnOnce() -> Result<T>) -> T {
        #[cfg(feature = "emulator")]
        if self.emulated {
            return crate::emulated(operation).expect("the operation works");
        }
        operation().expect("the operation works")
    }

    /// Holds a result against the oracle's, which is in f32 on the CPU. `terms` is how many products or additions a value
    /// sums up: rounding grows with its root.
    #[track_caller]
    pub(crate) fn assert_close(&self, found: &Tensor, expected: &Tensor, terms: usize) {
        assert_eq!(found.dtype(), self.dtype, "results have the dtype of activations");
        let found = found.to_device(&Device::Cpu).expect("tensors can be moved");
        assert_close(&found, expected, tolerance(self.dtype, terms));
    }
}

/// What rounding explains, relative to the largest value: some units in the last place of the dtype for the result, and
/// the error of f32 sums.
pub(crate) fn tolerance(dtype: DType, terms: usize) -> f32 {
    let unit = match dtype {
        DType::BF16 => 2f32.powi(-8),
        DType::F16 => 2f32.powi(-11),
        _ => 2f32.powi(-24),
    };
    2.0 * unit + 2f32.powi(-22) * (terms as f32).sqrt().max(1.0)
}

/// Calls `body` for every dtype on one kind of device. Says so when there is no such device.
pub(crate) fn on_cpu(body: impl Fn(&On)) {
    body(&On::cpu());
}

#[cfg(feature = "emulator")]
pub(crate) fn on_emulator(body: impl Fn(&On)) {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        body(&On { device: Device::Cpu, dtype, emulated: true });
    }
}

#[cfg(feature = "cuda")]
pub(crate) fn on_cuda(body: impl Fn(&On)) {
    match Device::new_cuda_with_stream(0) {
        Ok(device) => {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let device = device.clone();
                body(&On {
                    device,
                    dtype,
                    #[cfg(feature = "emulator")]
                    emulated: false,
                });
            }
        }
        Err(error) => eprintln!("NOT RUN: this test found no CUDA device ({error})"),
    }
}

/// One test per kind of device over the same body: `for_each_device!(name, |on: &On| { ... });`.
macro_rules! for_each_device {
    ($name:ident, $body:expr) => {
        mod $name {
            use super::*;

            #[test]
            fn cpu() {
                $crate::testing::on_cpu($body);
            }

            #[cfg(feature = "emulator")]
            #[test]
            fn emulator() {
                $crate::testing::on_emulator($body);
            }

            #[cfg(feature = "cuda")]
            #[test]
            fn cuda() {
                $crate::testing::on_cuda($body);
            }
        }
    };
}
pub(crate) use for_each_device;
