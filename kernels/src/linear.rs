//! Matrix products with weights as published (`[out, in]`), and table look-ups.
//!
//! One row is bound by memory: every core reads its share of the weights once ([`MatVec`]). More rows share what was
//! read: a panel of weights is widened into scratch memory that the cache holds, and tiles of six rows by four outputs
//! pass over it; a few rows read plain weights where they lie. All compute the sum that [`crate::dot`] defines, so a row has the
//! same bits in each.

use candle_core::{DType, Result, Tensor, bail};

use self::panels::{Cut, Weights, many_rows, pack_rows, store};
use self::widened::Product;
use crate::dot::{K_BLOCK, MatVec, PACKED_STRIDE, Pack, Rows, TILE_OUTS, TILE_ROWS, block_sums, next_block};
#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each, tasks_for};
use crate::simd::{Element, Op, Simd, dispatch};
use crate::view::{View, tensor, with_values};
use crate::work;

mod blocks;
#[cfg(gpu)]
mod launch;
mod packed;
mod panels;
mod quantised;
mod widened;

pub use packed::{Code, CodeScales, PackedMatrix, linear_packed};
pub use quantised::{QuantisedMatrix, embedding_quantised, linear_quantised};

/// `x [..., in]` (f32) times `weight [out, in]` (f32, bf16 or f16) transposed, plus `bias [out]`: `[..., out]`. On a
/// GPU x has the dtype of the weight.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let product = Product { x, bias, dims: (out, inner), size_in_bytes: work::weight_bytes(weight, None) };
    let multiply = |x: &[f32], y: &mut [f32]| {
        let weight = weight.contiguous()?;
        let weight = View::contiguous("linear", &weight)?;
        with_values!(weight.values()?, |weight| matmul_transposed(x, weight, inner, y));
        Ok(())
    };
    product.compute(|_| Ok(weight.clone()), multiply)
}

/// Rows of `weight [num, dim]` at `ids [l]` (u32): `[l, dim]` in f32, on a GPU in the weight's dtype.
pub fn embedding(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (num, dim) = weight.dims2()?;
    let len = ids.dims1()?;
    if work::is_dry() {
        return Tensor::zeros((len, dim), DType::F32, weight.device());
    }
    #[cfg(gpu)]
    if gpu::runs_here(weight) {
        return launch::embedding(ids, weight);
    }
    let (ids, weight) = (ids.contiguous()?, weight.contiguous()?);
    let (ids, weight) = (View::contiguous("embedding", &ids)?, View::contiguous("embedding", &weight)?);
    let ids = ids.u32()?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= num) {
        bail!("embedding: id {id} lies outside the table [{num}, {dim}]");
    }
    let mut y = Vec::with_capacity(len * dim);
    with_values!(weight.values()?, |table| {
        for id in ids {
            y.extend(table[*id as usize * dim..][..dim].iter().map(|value| value.widen()));
        }
    });
    tensor(y, (len, dim))
}

/// `y [m, n] = x [m, k] · w [n, k]ᵀ`.
fn matmul_transposed<T: Element>(x: &[f32], w: &[T], k: usize, y: &mut [f32]) {
    let (m, n) = (x.len() / k, w.len() / k);
    match m {
        1 => one_row(x, w, y),
        2..=DIRECT_ROWS => few_rows(x, w, (m, n, k), y),
        _ => many_rows(x, &Dense { w, k }, (m, n, k), y),
    }
}

fn one_row<T: Element>(x: &[f32], w: &[T], y: &mut [f32]) {
    let k = x.len();
    for_outputs(y, k, TILE_OUTS, |first, out| {
        dispatch(MatVec { x, w: &w[first * k..(first + out.len()) * k], out });
    });
}

/// Gives each task its share of the outputs `y` of one row of `k` columns, and the place of the first: a whole `multiple` of them,
/// but for the last.
fn for_outputs(y: &mut [f32], k: usize, multiple: usize, task: impl Fn(usize, &mut [f32]) + Sync) {
    let n = y.len();
    let outs = n.div_ceil(tasks_for(n * k)).next_multiple_of(multiple);
    let y = Shared::new(y);
    for_each(n.div_ceil(outs), n * k, |index| {
        let first = index * outs;
        // SAFETY: every task has its own outputs.
        task(first, unsafe { y.slice(first, outs.min(n - first)) });
    });
}

/// Up to this many rows, weights are read straight from where they lie; widening them anew for every six rows is then
/// cheaper than a panel.
const DIRECT_ROWS: usize = 24;

fn few_rows<T: Element>(x: &[f32], w: &[T], dims: (usize, usize, usize), y: &mut [f32]) {
    let cut = Cut::new(dims);
    let x = &pack_rows(x, &cut);
    let Cut { m, n, k, .. } = cut;
    let outs = n.div_ceil(tasks_for(n * k)).next_multiple_of(TILE_OUTS);
    let y = Shared::new(y);
    for_each(n.div_ceil(outs), m * n * k, |task| {
        let outs = (task * outs, outs.min(n - task * outs));
        dispatch(DirectTask { cut, x, w, outs, y: y.as_ptr() });
    });
}

/// Outputs `outs`, given as (first, number), of all rows.
struct DirectTask<'a, T> {
    cut: Cut,
    /// What [`pack_rows`] made.
    x: &'a [f32],
    w: &'a [T],
    outs: (usize, usize),
    y: *mut f32,
}

impl<T: Element> Op for DirectTask<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut out = 0;
        while out < self.outs.1 {
            let mut column = 0;
            while column < self.cut.k {
                if S::LANES == 16 {
                    self.block::<S, TILE_ROWS>(s, out, column);
                } else {
                    self.block::<S, { TILE_ROWS / 2 }>(s, out, column);
                }
                column += K_BLOCK;
            }
            out += TILE_OUTS;
        }
    }
}

impl<T: Element> DirectTask<'_, T> {
    /// Adds one block of K to four outputs of every row.
    #[inline(always)]
    fn block<S: Simd, const MR: usize>(&self, s: S, out: usize, column: usize) {
        let len = K_BLOCK.min(self.cut.k - column);
        let (first, outs) = (self.outs.0 + out, TILE_OUTS.min(self.outs.1 - out));
        let whole = outs == TILE_OUTS;
        let x = &self.x[column / K_BLOCK * self.cut.padded_rows() * PACKED_STRIDE..];
        let mut row = 0;
        while row < self.cut.m {
            let x = Rows { start: x[row * PACKED_STRIDE..].as_ptr(), stride: PACKED_STRIDE };
            let mut done = 0;
            while done < outs {
                // The last rows repeat one row instead of reading past the end.
                let stride = if whole { self.cut.k } else { 0 };
                let w = Rows { start: self.w[(first + done) * self.cut.k + column..].as_ptr(), stride };
                let valid = if whole { TILE_OUTS } else { 1 };
                let ahead = (row == 0).then(|| next_block(w, column, self.cut.k));
                // SAFETY: `x` is padded to whole tiles of rows; four rows of `w`, or one four times, are there.
                let sums = unsafe { block_sums::<S, T, MR>(s, x, w, len, ahead) };
                // SAFETY: no other task has these outputs.
                unsafe {
                    store(
                        self.y,
                        self.cut.n,
                        &sums,
                        (row, MR.min(self.cut.m - row)),
                        (first + done, valid),
                        column == 0,
                    )
                };
                done += valid;
            }
            row += MR;
        }
    }
}

/// Rows of weights as published.
struct Dense<'a, T> {
    w: &'a [T],
    k: usize,
}

impl<T: Element> Weights for Dense<'_, T> {
    #[inline(always)]
    fn widen<S: Simd>(&self, s: S, row: usize, first: usize, len: usize, to: &mut [f32]) {
        let from = Rows { start: self.w[row * self.k + first..][..len].as_ptr(), stride: self.k };
        // SAFETY: `len` values of one row.
        unsafe { Pack { from, rows: 1, len, to }.run(s) };
    }
}

/// Adds `bias [n]` to every row of `y [m, n]`.
fn add_to_rows(y: &mut [f32], bias: &[f32]) {
    let rows = y.len() / bias.len().max(1);
    let len = bias.len();
    let shared = Shared::new(y);
    for_each(rows, rows * len, |row| {
        // SAFETY: every task has its own row.
        let row = unsafe { shared.slice(row * len, len) };
        for (value, bias) in row.iter_mut().zip(bias) {
            *value += bias;
        }
    });
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{On, assert_close, bits, for_each_device, random, threads, values};

    fn oracle(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let (out, inner) = weight.dims2().unwrap();
        let mut shape = x.dims().to_vec();
        shape.pop();
        shape.push(out);
        let weight = weight.to_dtype(DType::F64).unwrap().t().unwrap().contiguous().unwrap();
        let x = x.contiguous().unwrap().reshape(((), inner)).unwrap().to_dtype(DType::F64).unwrap();
        let y = x.matmul(&weight).unwrap().to_dtype(DType::F32).unwrap();
        let y = match bias {
            Some(bias) => y.broadcast_add(bias).unwrap(),
            None => y,
        };
        y.reshape(shape).unwrap()
    }

    fn dtypes() -> impl Strategy<Value = DType> {
        prop_oneof![Just(DType::F32), Just(DType::BF16), Just(DType::F16)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_the_product(m in 1usize..40, n in 1usize..150, k in 1usize..1200, dtype in dtypes(), biased: bool) {
            let (x, weight) = (random(&[m, k], 1), random(&[n, k], 2).to_dtype(dtype).unwrap());
            let bias = random(&[n], 3);
            let bias = biased.then_some(&bias);
            assert_close(&linear(&x, &weight, bias).unwrap(), &oracle(&x, &weight, bias), 2e-5);
        }
    }

    for_each_device!(products_have_their_bias_in_the_dtype_of_activations, |on: &On| {
        for (m, n, k) in [(1, 1, 1), (3, 7, 33), (2, 64, 40), (5, 24, 129)] {
            let (x, weight, bias) = (random(&[2, m, k], 1), random(&[n, k], 2), random(&[n], 3));
            let expected = oracle(&on.rounded(&x), &on.rounded(&weight), Some(&on.rounded(&bias)));
            let (x, weight, bias) = (on.tensor(&x), on.tensor(&weight), on.tensor(&bias));
            // The product is rounded before the bias comes to it.
            on.assert_close(&on.run(|| linear(&x, &weight, Some(&bias))), &expected, k);
        }
    });

    for_each_device!(look_ups_copy_rows, |on: &On| {
        for dim in [1, 7, 64] {
            let (table, ids) =
                (random(&[9, dim], 1), Tensor::new(&[8u32, 0, 3, 3], &candle_core::Device::Cpu).unwrap());
            let expected = on.rounded(&table).index_select(&ids, 0).unwrap();
            let (table, ids) = (on.tensor(&table), on.as_is(&ids));
            assert_eq!(values(&on.run(|| embedding(&ids, &table))), values(&expected));
        }
    });

    #[test]
    fn large_products_use_square_panels() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let (x, weight) = (random(&[2, 131, 1031], 1), random(&[203, 1031], 2).to_dtype(dtype).unwrap());
            assert_close(&linear(&x, &weight, None).unwrap(), &oracle(&x, &weight, None), 3e-5);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_whatever_comes_with_it() {
        for (n, k) in [(203, 1031), (64, 512), (5, 7), (1024, 2048)] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let (x, weight) = (random(&[300, k], 1), random(&[n, k], 2).to_dtype(dtype).unwrap());
                let bias = random(&[n], 3);
                let whole = linear(&x, &weight, Some(&bias)).unwrap();
                let alone = threads(1, || linear(&x.narrow(0, 131, 1).unwrap(), &weight, Some(&bias)).unwrap());
                let some = threads(2, || linear(&x.narrow(0, 120, 17).unwrap(), &weight, Some(&bias)).unwrap());
                assert_eq!(bits(&whole.narrow(0, 131, 1).unwrap()), bits(&alone), "{n}x{k} {dtype:?}");
                assert_eq!(bits(&whole.narrow(0, 120, 17).unwrap()), bits(&some), "{n}x{k} {dtype:?}");
            }
        }
    }

    #[test]
    fn strided_operands_are_read_by_their_strides() {
        let (x, weight) = (random(&[70, 9], 1).t().unwrap(), random(&[70, 33], 2).t().unwrap());
        assert_close(&linear(&x, &weight, None).unwrap(), &oracle(&x, &weight, None), 1e-5);
        let part = random(&[4, 200], 1).narrow(1, 50, 70).unwrap();
        assert_close(&linear(&part, &weight, None).unwrap(), &oracle(&part, &weight, None), 1e-5);
    }

    #[test]
    fn misfits_name_the_operation_and_both_shapes() {
        let error = linear(&random(&[2, 3], 1), &random(&[4, 5], 2), None).unwrap_err().to_string();
        assert!(error.contains("linear") && error.contains("[2, 3]") && error.contains("[4, 5]"), "{error}");
        let error = linear(&random(&[2, 5], 1), &random(&[4, 5], 2), Some(&random(&[3], 1))).unwrap_err().to_string();
        assert!(error.contains("linear: bias") && error.contains("[4]"), "{error}");
    }

    #[test]
    fn embedding_widens_rows() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let table = random(&[11, 7], 1).to_dtype(dtype).unwrap();
            let ids = Tensor::new(&[3u32, 0, 10, 3], table.device()).unwrap();
            let expected = table.index_select(&ids, 0).unwrap().to_dtype(DType::F32).unwrap();
            assert_eq!(bits(&embedding(&ids, &table).unwrap()), bits(&expected));
            let ids = Tensor::new(&[11u32], table.device()).unwrap();
            assert!(embedding(&ids, &table).unwrap_err().to_string().contains("id 11"));
        }
    }
}
