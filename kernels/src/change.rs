//! How much a tensor has changed between two steps, for caches of features that hardly do.

use candle_core::{Result, Tensor, bail};

#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each};
use crate::view::{View, tensor};

#[cfg(gpu)]
mod launch;

/// Values of a partial sum: as many on every machine, so that the same values have the same sum.
const PART: usize = 1 << 13;

/// `mean |a - b| / mean |b|` of two tensors of one shape and dtype, as a scalar (f32) on their device: a GPU is not waited
/// for. 0 where nothing has changed, infinite where something has come from nothing (first-block cache, diffusers
/// `hooks/first_block_cache.py`).
pub fn relative_l1(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() || a.dtype() != b.dtype() {
        let (a, b, a_dtype, b_dtype) = (a.shape(), b.shape(), a.dtype(), b.dtype());
        bail!("relative_l1: {a:?} {a_dtype:?} does not fit {b:?} {b_dtype:?}");
    }
    #[cfg(gpu)]
    if gpu::runs_here(a) {
        return launch::relative_l1(a, b);
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let views = (View::contiguous("relative_l1", &a)?, View::contiguous("relative_l1", &b)?);
    let (a, b) = (views.0.f32()?, views.1.f32()?);
    let mut sums = vec![[0f64; 2]; a.len().div_ceil(PART)];
    let (tasks, shared) = (sums.len(), Shared::new(&mut sums));
    for_each(tasks, 2 * a.len(), |task| {
        let range = task * PART..a.len().min((task + 1) * PART);
        // SAFETY: every task has its own sums.
        let to = unsafe { shared.slice(task, 1) };
        for (a, b) in a[range.clone()].iter().zip(&b[range]) {
            to[0][0] += f64::from((a - b).abs());
            to[0][1] += f64::from(b.abs());
        }
    });
    let [change, size] = sums.iter().fold([0.0; 2], |total, sums| [total[0] + sums[0], total[1] + sums[1]]);
    tensor(vec![if change == 0.0 { 0.0 } else { (change / size) as f32 }], ())
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::testing::{On, for_each_device, random};

    for_each_device!(changes_are_relative_to_what_was, |on: &On| {
        for len in [1, 7, 1000, 4099, 20_000] {
            let (a, b) = (random(&[len], 1), random(&[len], 2));
            let difference: f32 =
                (on.rounded(&a) - on.rounded(&b)).unwrap().abs().unwrap().sum_all().unwrap().to_scalar().unwrap();
            let size: f32 = on.rounded(&b).abs().unwrap().sum_all().unwrap().to_scalar().unwrap();
            let (a, b) = (on.tensor(&a), on.tensor(&b));
            let found: f32 = on.run(|| relative_l1(&a, &b)).to_scalar().unwrap();
            assert!((found * size / difference - 1.0).abs() < 1e-4, "{found} is not {}", difference / size);
            assert_eq!(on.run(|| relative_l1(&b, &b)).to_scalar::<f32>().unwrap(), 0.0);
            let nothing = b.zeros_like().unwrap();
            assert_eq!(on.run(|| relative_l1(&b, &nothing)).to_scalar::<f32>().unwrap(), f32::INFINITY);
        }
    });

    #[test]
    fn misfits_name_the_operation() {
        let (a, b) = (random(&[3], 1), random(&[4], 1));
        assert!(relative_l1(&a, &b).unwrap_err().to_string().contains("relative_l1"));
        assert!(relative_l1(&a, &a.to_dtype(DType::F16).unwrap()).is_err());
    }
}
