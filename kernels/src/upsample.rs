//! Nearest-neighbour upsampling of pictures, for where no convolution follows that could read them upsampled.

use candle_core::{Result, Tensor};

#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each};
use crate::view::{View, tensor};

#[cfg(gpu)]
mod launch;

/// Nearest-neighbour upsampling by 2 of `x [b, c, h, w]`.
pub fn upsample_nearest2d(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::upsample_nearest2d(x);
    }
    let x = x.contiguous()?;
    let view = View::contiguous("upsample_nearest2d", &x)?;
    let from = view.f32()?;
    let mut y = vec![0f32; 4 * from.len()];
    let (work, shared) = (y.len(), Shared::new(&mut y));
    for_each(b * c, work, |plane| {
        // SAFETY: every task has its own plane.
        let to = unsafe { shared.slice(plane * 4 * h * w, 4 * h * w) };
        for row in 0..h {
            let from = &from[(plane * h + row) * w..][..w];
            let (first, second) = to[row * 4 * w..(row + 1) * 4 * w].split_at_mut(2 * w);
            for (pair, value) in first.chunks_exact_mut(2).zip(from) {
                pair.fill(*value);
            }
            second.copy_from_slice(first);
        }
    });
    tensor(y, (b, c, 2 * h, 2 * w))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{On, bits, for_each_device, random};

    for_each_device!(every_value_is_repeated_four_times, |on: &On| {
        for dims in [[2, 3, 5, 7], [1, 2, 3, 8], [3, 1, 1, 1], [1, 1, 2, 260]] {
            let x = on.rounded(&random(&dims, 1));
            let expected = x.upsample_nearest2d(2 * dims[2], 2 * dims[3]).unwrap();
            let x = on.tensor(&x);
            assert_eq!(bits(&on.run(|| upsample_nearest2d(&x))), bits(&expected));
        }
    });
}
