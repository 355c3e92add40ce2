//! Launches recorded once and repeated as one: CUDA graphs.
//!
//! A step of small kernels costs the host more time to launch than the GPU to run. Recorded, it is one launch. What is
//! recorded are addresses: inputs and outputs live in tensors that outlast the recording, and whoever replays it writes
//! new inputs into them before. Everything in between is launched by this crate, nothing by candle: on the emulator,
//! where only launches are recorded, anything else would show as a stale result.

use candle_core::{Result, Tensor, bail};

#[cfg(gpu)]
use crate::gpu;
use crate::work::{self, Counted};

/// A sequence of launches with the addresses that they had.
pub struct Recording {
    /// What one replay does.
    work: Counted,
    #[cfg(gpu)]
    inner: gpu::Recorded,
    /// No build without kernels has one.
    #[cfg(not(gpu))]
    never: std::convert::Infallible,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recording")
    }
}

/// Whether operations on this tensor are launches that can be recorded.
pub fn can_record(tensor: &Tensor) -> bool {
    #[cfg(gpu)]
    return gpu::runs_here(tensor);
    #[cfg(not(gpu))]
    {
        let _ = tensor;
        false
    }
}

impl Recording {
    /// Records what `body` launches on the device of `on`; nothing of it runs yet, nor is counted. Kernels and matrix
    /// products must have run once before with the same shapes, so that nothing is loaded meanwhile. `body` neither reads
    /// results nor uploads anything, and keeps no tensor that it makes: their memory belongs to the recording.
    pub fn of(on: &Tensor, body: impl FnOnce() -> Result<()>) -> Result<Self> {
        if !can_record(on) {
            bail!("recording: operations on {:?} are not launches", on.device());
        }
        #[cfg(gpu)]
        {
            let (inner, work) = work::count(|| gpu::Recorded::of(on, body));
            Ok(Self { work, inner: inner? })
        }
        #[cfg(not(gpu))]
        {
            drop(body);
            bail!("recording: this build launches no kernels")
        }
    }

    /// Runs everything again, after what was launched before, and counts it again.
    pub fn replay(&self) -> Result<()> {
        work::add(self.work);
        #[cfg(gpu)]
        return self.inner.replay();
        #[cfg(not(gpu))]
        match self.never {}
    }
}

/// Copies `from` into the memory of `to`, of the same shape and dtype, both contiguous.
pub fn copy_into(from: &Tensor, to: &Tensor) -> Result<()> {
    if from.dims() != to.dims() || from.dtype() != to.dtype() || !from.is_contiguous() || !to.is_contiguous() {
        bail!("copy_into: {:?} {:?} does not fit {:?} {:?}", from.layout(), from.dtype(), to.layout(), to.dtype());
    }
    #[cfg(gpu)]
    if gpu::runs_here(from) {
        return crate::activation::copy_into(from, to);
    }
    to.slice_set(from, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{On, for_each_device, random, values};
    use crate::{linear, rms_norm};

    for_each_device!(a_recording_repeats_its_launches_on_new_inputs, |on: &On| {
        let (x, weight, norm) =
            (on.tensor(&random(&[3, 40], 1)), on.tensor(&random(&[8, 40], 2)), on.tensor(&random(&[8], 3)));
        let step = || rms_norm(&linear(&x, &weight, None)?, &norm, 1e-6);
        on.run(|| {
            let out = step()?.zeros_like()?;
            if !can_record(&x) {
                assert!(Recording::of(&x, || Ok(())).is_err());
                return Ok(());
            }
            let recording = Recording::of(&x, || copy_into(&step()?, &out))?;
            assert!(
                values(&out.to_device(&candle_core::Device::Cpu)?).iter().all(|value| *value == 0.0),
                "it has run already"
            );
            for seed in [4, 5] {
                x.slice_set(&on.tensor(&random(&[3, 40], seed)), 0, 0)?;
                recording.replay()?;
                let (found, expected) =
                    (out.to_device(&candle_core::Device::Cpu)?, step()?.to_device(&candle_core::Device::Cpu)?);
                assert_eq!(values(&found), values(&expected), "seed {seed}");
            }
            Ok(())
        });
    });

    #[test]
    fn copies_fit_their_places() {
        let (from, to) = (random(&[2, 3], 1), random(&[2, 3], 2));
        copy_into(&from, &to).unwrap();
        assert_eq!(values(&from), values(&to));
        assert!(copy_into(&from.t().unwrap(), &to).unwrap_err().to_string().contains("copy_into"));
    }
}
