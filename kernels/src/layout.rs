//! Values in another order: tensors side by side, matrices transposed. On a GPU candle uploads the strides of what it
//! copies, which costs an allocation and a transfer per call and cannot be recorded; these are plain launches.

use candle_core::{Result, Tensor};

#[cfg(gpu)]
use crate::gpu;

#[cfg(gpu)]
mod launch;

/// The tensors side by side along `dim`, contiguous. They have one dtype and agree in all other dimensions. Of one tensor:
/// a contiguous copy of a view along `dim`.
pub fn cat(parts: &[&Tensor], dim: usize) -> Result<Tensor> {
    #[cfg(gpu)]
    if parts.first().is_some_and(|part| gpu::runs_here(part)) {
        return launch::cat(parts, dim);
    }
    Tensor::cat(parts, dim)?.contiguous()
}

/// `x [..., m, n]` as `[..., n, m]`, contiguous.
pub fn transpose(x: &Tensor) -> Result<Tensor> {
    let rank = x.rank();
    if rank < 2 {
        candle_core::bail!("transpose: {:?} holds no matrices", x.shape());
    }
    #[cfg(gpu)]
    if gpu::runs_here(x) {
        return launch::transpose(x);
    }
    x.transpose(rank - 2, rank - 1)?.contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{On, bits, for_each_device, random};

    for_each_device!(parts_lie_side_by_side, |on: &On| {
        // Lengths that packs of 16 bytes fill and that they do not, along each dimension.
        for (dims, others, dim) in [
            ([2, 3, 4, 5], [7, 1], 1),
            ([1, 8, 4, 8], [8, 16], 1),
            ([3, 2, 5, 1], [2, 9], 0),
            ([2, 1, 3, 7], [1, 33], 3),
        ] {
            let part = |len: usize, seed: u64| {
                let mut dims = dims;
                dims[dim] = len;
                on.rounded(&random(&dims, seed))
            };
            let parts = [part(dims[dim], 1), part(others[0], 2), part(others[1], 3)];
            let expected = Tensor::cat(&parts, dim).unwrap();
            let parts = parts.map(|part| on.tensor(&part));
            let found = on.run(|| cat(&parts.each_ref(), dim));
            assert_eq!(found.dims(), expected.dims());
            assert!(found.is_contiguous());
            assert_eq!(bits(&found), bits(&expected), "{dims:?} {dim}");
        }
    });

    for_each_device!(views_are_read_where_they_lie, |on: &On| {
        let x = on.rounded(&random(&[3, 5, 6], 1));
        for (dim, start, len) in [(0, 1, 2), (1, 2, 3), (2, 1, 4)] {
            let expected = x.narrow(dim, start, len).unwrap();
            let expected = Tensor::cat(&[&expected, &expected], 1).unwrap();
            let view = on.tensor(&x).narrow(dim, start, len).unwrap();
            assert_eq!(bits(&on.run(|| cat(&[&view, &view], 1))), bits(&expected), "{dim}");
            let expected = view.transpose(1, 2).unwrap().force_contiguous().unwrap();
            assert_eq!(bits(&on.run(|| transpose(&view))), bits(&expected), "{dim}");
        }
    });

    for_each_device!(matrices_are_transposed, |on: &On| {
        for dims in [[1, 1, 1], [2, 33, 31], [1, 64, 96], [3, 5, 70], [1, 200, 1]] {
            let x = on.rounded(&random(&dims, 1));
            let expected = x.transpose(1, 2).unwrap().contiguous().unwrap();
            let x = on.tensor(&x);
            let found = on.run(|| transpose(&x));
            assert_eq!(found.dims(), expected.dims());
            assert_eq!(bits(&found), bits(&expected), "{dims:?}");
        }
    });

    #[test]
    fn misfits_are_refused() {
        let (a, b) = (random(&[2, 3], 1), random(&[3, 3], 1));
        assert!(cat(&[&a, &b], 1).is_err());
        assert!(transpose(&random(&[3], 1)).unwrap_err().to_string().contains("transpose"));
    }
}
