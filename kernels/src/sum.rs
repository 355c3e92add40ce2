//! Sums of two tensors, as networks need them around their blocks.

use candle_core::{Result, Tensor, bail};

#[cfg(gpu)]
use crate::gpu;

#[cfg(gpu)]
mod launch;

/// `a + b` of one shape.
pub fn sum(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dims() != b.dims() || a.dtype() != b.dtype() {
        bail!("sum: {:?} {:?} does not fit {:?} {:?}", a.shape(), a.dtype(), b.shape(), b.dtype());
    }
    #[cfg(gpu)]
    if gpu::runs_here(a) {
        return launch::sum(a, b);
    }
    a + b
}

/// `x [b, c, h, w]` plus one value per channel, `channels [b, c]`.
pub fn sum_channels(x: &Tensor, channels: &Tensor) -> Result<Tensor> {
    let (b, c, _, _) = x.dims4()?;
    if channels.dims() != [b, c] || channels.dtype() != x.dtype() {
        let (x_dtype, dtype) = (x.dtype(), channels.dtype());
        bail!("sum_channels: {:?} {dtype:?} does not fit {:?} {x_dtype:?}", channels.shape(), x.shape());
    }
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::sum_channels(x, channels);
    }
    x.broadcast_add(&channels.reshape((b, c, 1, 1))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{On, for_each_device, random};

    for_each_device!(values_are_added, |on: &On| {
        for dims in [vec![1], vec![7, 5], vec![2, 3, 8, 8], vec![4099]] {
            let (a, b) = (on.rounded(&random(&dims, 1)), on.rounded(&random(&dims, 2)));
            let expected = (&a + &b).unwrap();
            let (a, b) = (on.tensor(&a), on.tensor(&b));
            on.assert_close(&on.run(|| sum(&a, &b)), &expected, 1);
        }
        // A view that begins in the middle of a pack.
        let x = on.rounded(&random(&[3, 5], 3));
        let expected = (x.narrow(0, 1, 2).unwrap() * 2.0).unwrap();
        let view = on.tensor(&x).narrow(0, 1, 2).unwrap();
        on.assert_close(&on.run(|| sum(&view, &view)), &expected, 1);
    });

    for_each_device!(a_value_per_channel_is_added, |on: &On| {
        for [b, c, h, w] in [[1, 1, 1, 1], [2, 3, 5, 7], [1, 4, 8, 8]] {
            let (x, channels) = (on.rounded(&random(&[b, c, h, w], 1)), on.rounded(&random(&[b, c], 2)));
            let expected = x.broadcast_add(&channels.reshape((b, c, 1, 1)).unwrap()).unwrap();
            let (x, channels) = (on.tensor(&x), on.tensor(&channels));
            on.assert_close(&on.run(|| sum_channels(&x, &channels)), &expected, 1);
        }
    });

    #[test]
    fn misfits_name_the_operation() {
        let (a, b) = (random(&[2, 3], 1), random(&[3, 2], 1));
        assert!(sum(&a, &b).unwrap_err().to_string().contains("sum"));
        let x = random(&[2, 3, 4, 4], 1);
        assert!(sum_channels(&x, &b).unwrap_err().to_string().contains("sum_channels"));
    }
}
