//! Products with matrices whose rows are blocks of small integers with common scales, as GGUF files have them.
//!
//! Activations are not rounded: a product is, bit for bit on the CPU, that of the dequantised matrix. On the CPU a slab
//! of rows is dequantised at a time, into memory that the cache holds, and multiplied as any other matrix; what that costs
//! is shared by the rows of `x`. With one row every core widens a few rows at a time, which its nearest cache holds. On a GPU the whole matrix is dequantised into the dtype of the activations (candle's
//! kernels) before cuBLAS multiplies it, which is what diffusers does too.

use std::sync::Arc;

use candle_core::quantized::k_quants::{BlockQ2K, BlockQ3K, BlockQ5_0, BlockQ5_1, BlockQ5K};
use candle_core::quantized::{GgmlDType, GgmlType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor, bail};

use super::blocks::Widen;
use super::widened::{Product, by_slabs};
use crate::dot::{MatVec, TILE_OUTS};
use crate::parallel::{Shared, for_each, tasks_for, with_scratch};
use crate::simd::dispatch;
use crate::view::{View, tensor};
use crate::work;

/// Values of the rows that are multiplied with one row at a time: 16 KiB in f32, or four rows that are longer.
const PANEL_VALUES: usize = 4 << 10;

/// A matrix `[out, in]` of quantised rows. Cheap to clone.
#[derive(Debug, Clone)]
pub struct QuantisedMatrix {
    tensor: Arc<QTensor>,
    rows: usize,
    columns: usize,
}

impl QuantisedMatrix {
    /// Whether matrices of this type can be multiplied with. (Q8_1 and Q8K are types of activations, not of files.)
    pub fn takes(dtype: GgmlDType) -> bool {
        !matches!(dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_1 | GgmlDType::Q8K)
    }

    /// From blocks as they lie in a file, row by row.
    pub fn new(blocks: &[u8], dtype: GgmlDType, (rows, columns): (usize, usize), device: &Device) -> Result<Self> {
        let (block_values, block_bytes) = (dtype.block_size(), dtype.type_size());
        if !Self::takes(dtype) {
            bail!("quantised matrix: type {dtype:?} is not one of quantised weights");
        }
        let needed = (columns / block_values).checked_mul(block_bytes).and_then(|row| row.checked_mul(rows));
        if !columns.is_multiple_of(block_values) || needed != Some(blocks.len()) {
            let len = blocks.len();
            bail!(
                "quantised matrix: {len} bytes are not [{rows}, {columns}] in blocks of {block_values} {dtype:?} values"
            );
        }
        // Scales are f16, so that blocks have to lie at even addresses.
        let words: Vec<u16>;
        let blocks = if blocks.as_ptr().addr().is_multiple_of(align_of::<u16>()) {
            blocks
        } else {
            words = blocks.as_chunks().0.iter().map(|word| u16::from_ne_bytes(*word)).collect();
            // SAFETY: every u16 is two bytes.
            unsafe { words.align_to().1 }
        };
        let storage = QStorage::from_data(blocks.into(), device, dtype)?;
        Ok(Self { tensor: Arc::new(QTensor::new(storage, (rows, columns))?), rows, columns })
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Bytes of the blocks.
    pub fn size_in_bytes(&self) -> usize {
        self.tensor.storage_size_in_bytes()
    }

    /// All values `[out, in]` in `dtype`, where the matrix is.
    pub fn dequantise(&self, dtype: DType) -> Result<Tensor> {
        let device = self.tensor.device();
        match (dtype, &device) {
            // Half the memory on the way: what the blocks hold is an f16 times a small integer.
            (DType::F16 | DType::BF16, Device::Cuda(_)) => self.tensor.dequantize_f16(&device)?.to_dtype(dtype),
            _ => self.tensor.dequantize(&device)?.to_dtype(dtype),
        }
    }
}

/// `x [..., in]` (f32, on a GPU in any dtype) times `weight [out, in]` transposed, plus `bias [out]`: `[..., out]`.
pub fn linear_quantised(x: &Tensor, weight: &QuantisedMatrix, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims();
    let product = Product { x, bias, dims: weight.dims(), size_in_bytes: weight.size_in_bytes() };
    let multiply = |x: &[f32], y: &mut [f32]| {
        if x.len() == inner {
            return one_row(x, weight, y);
        }
        let (blocks, dtype) = (weight.tensor.data()?, weight.tensor.dtype());
        let row_bytes = blocks.len() / out;
        by_slabs(x, (out, inner), 1, y, |first, slab| {
            dequantise_rows(dtype, &blocks[first * row_bytes..][..slab.len() / inner * row_bytes], inner, slab);
            Ok(())
        })
    };
    product.compute(|dtype| weight.dequantise(dtype), multiply)
}

/// Rows `[l, in]` (f32) of `table [out, in]` by their ids `[l]` (u32). Of a table in host memory; a GPU's is dequantised when
/// it is loaded.
pub fn embedding_quantised(ids: &Tensor, table: &QuantisedMatrix) -> Result<Tensor> {
    let (num, dim) = table.dims();
    let len = ids.dims1()?;
    if work::is_dry() {
        return Tensor::zeros((len, dim), DType::F32, ids.device());
    }
    let ids = ids.contiguous()?;
    let ids = View::contiguous("embedding", &ids)?;
    let ids = ids.u32()?;
    if let Some(id) = ids.iter().find(|id| **id as usize >= num) {
        bail!("embedding: id {id} lies outside the table [{num}, {dim}]");
    }
    let (blocks, dtype) = (table.tensor.data()?, table.tensor.dtype());
    let row_bytes = blocks.len() / num;
    let mut rows = vec![0f32; len * dim];
    for (row, id) in rows.chunks_exact_mut(dim).zip(ids) {
        dequantise_blocks(dtype, &blocks[*id as usize * row_bytes..][..row_bytes], row);
    }
    tensor(rows, (len, dim))
}

/// One row: every task widens a few rows of `w` at a time, into memory that the nearest cache holds.
fn one_row(x: &[f32], weight: &QuantisedMatrix, y: &mut [f32]) -> Result<()> {
    let (out, inner) = weight.dims();
    let (blocks, dtype) = (weight.tensor.data()?, weight.tensor.dtype());
    let blocks: &[u8] = &blocks;
    let row_bytes = blocks.len() / out;
    let panel_rows = (PANEL_VALUES / inner).max(1).next_multiple_of(TILE_OUTS);
    let task_rows = out.div_ceil(tasks_for(out * inner)).next_multiple_of(panel_rows);
    let y = Shared::new(y);
    for_each(out.div_ceil(task_rows), out * inner, |task| {
        let rows = task * task_rows..out.min((task + 1) * task_rows);
        with_scratch(panel_rows * inner, |panel| {
            for first in rows.clone().step_by(panel_rows) {
                let len = panel_rows.min(rows.end - first);
                let panel = &mut panel[..len * inner];
                dequantise_blocks(dtype, &blocks[first * row_bytes..][..len * row_bytes], panel);
                // SAFETY: every task has its own outputs.
                let out = unsafe { y.slice(first, len) };
                dispatch(MatVec { x, w: panel, out });
            }
        });
    });
    Ok(())
}

fn dequantise_rows(dtype: GgmlDType, blocks: &[u8], inner: usize, values: &mut [f32]) {
    let rows = values.len() / inner;
    let row_bytes = blocks.len() / rows;
    let len = values.len();
    let values = Shared::new(values);
    for_each(rows, len, |row| {
        let blocks = &blocks[row * row_bytes..][..row_bytes];
        // SAFETY: every task has its own row.
        let values = unsafe { values.slice(row * inner, inner) };
        dequantise_blocks(dtype, blocks, values);
    });
}

/// Whole blocks, of one row or several.
fn dequantise_blocks(dtype: GgmlDType, blocks: &[u8], values: &mut [f32]) {
    if Widen::takes(dtype) {
        return dispatch(Widen { dtype, blocks, values });
    }
    match dtype {
        GgmlDType::Q5_0 => to_float::<BlockQ5_0>(blocks, values),
        GgmlDType::Q5_1 => to_float::<BlockQ5_1>(blocks, values),
        GgmlDType::Q2K => to_float::<BlockQ2K>(blocks, values),
        GgmlDType::Q3K => to_float::<BlockQ3K>(blocks, values),
        GgmlDType::Q5K => to_float::<BlockQ5K>(blocks, values),
        other => unreachable!("`new` refuses {other:?}: this is a bug"),
    }
}

fn to_float<B: GgmlType>(blocks: &[u8], values: &mut [f32]) {
    // SAFETY: a block is numbers without padding, for which all bits are valid.
    let (before, blocks, after) = unsafe { blocks.align_to::<B>() };
    assert!(before.is_empty() && after.is_empty(), "candle keeps whole, aligned blocks: this is a bug");
    B::to_float(blocks, values);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::widened::SLAB_VALUES;
    use crate::testing::{On, bits, for_each_device, random};
    use crate::{embedding, linear};

    const TYPES: [GgmlDType; 10] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];

    fn quantised(dtype: GgmlDType, rows: usize, columns: usize, device: &Device) -> QuantisedMatrix {
        let made = QTensor::quantize(&random(&[rows, columns], 2), dtype).expect("quantised");
        QuantisedMatrix::new(&made.data().expect("on the CPU"), dtype, (rows, columns), device).expect("is sound")
    }

    #[test]
    fn products_are_those_of_the_dequantised_matrix_bit_for_bit() {
        for dtype in TYPES {
            let weight = quantised(dtype, 37, 512, &Device::Cpu);
            let dense = weight.dequantise(DType::F32).expect("dequantised");
            let bias = random(&[37], 3);
            for rows in [1, 7, 70] {
                let x = random(&[rows, 512], 1);
                let found = linear_quantised(&x, &weight, Some(&bias)).expect("computed");
                assert_eq!(bits(&found), bits(&linear(&x, &dense, Some(&bias)).expect("computed")), "{dtype:?}");
            }
        }
    }

    #[test]
    fn rows_are_those_of_the_dequantised_table() {
        for dtype in TYPES {
            let table = quantised(dtype, 5, 256, &Device::Cpu);
            let ids = Tensor::new(&[4u32, 0, 4], &Device::Cpu).expect("ids");
            let dense = table.dequantise(DType::F32).expect("dequantised");
            let found = embedding_quantised(&ids, &table).expect("looked up");
            assert_eq!(bits(&found), bits(&embedding(&ids, &dense).expect("looked up")), "{dtype:?}");
            let beyond = Tensor::new(&[5u32], &Device::Cpu).expect("ids");
            let error = embedding_quantised(&beyond, &table).expect_err("no such row").to_string();
            assert!(error.contains("id 5 lies outside the table [5, 256]"), "{error}");
        }
    }

    #[test]
    fn more_rows_than_a_slab_holds_come_in_their_order() {
        let columns = SLAB_VALUES / 64;
        let weight = quantised(GgmlDType::Q8_0, 150, columns, &Device::Cpu);
        let dense = weight.dequantise(DType::F32).expect("dequantised");
        let x = random(&[3, columns], 1);
        let found = linear_quantised(&x, &weight, None).expect("computed");
        assert_eq!(bits(&found), bits(&linear(&x, &dense, None).expect("computed")));
    }

    #[test]
    fn blocks_at_odd_addresses_are_read() {
        let made = QTensor::quantize(&random(&[2, 64], 2), GgmlDType::Q8_0).expect("quantised");
        let blocks = made.data().expect("on the CPU");
        let mut odd = vec![0u8; blocks.len() + 2];
        let start = odd.as_ptr().align_offset(2) + 1;
        odd[start..start + blocks.len()].copy_from_slice(&blocks);
        let odd = &odd[start..start + blocks.len()];
        let read = |blocks| QuantisedMatrix::new(blocks, GgmlDType::Q8_0, (2, 64), &Device::Cpu).expect("is sound");
        let values = |matrix: QuantisedMatrix| bits(&matrix.dequantise(DType::F32).expect("dequantised"));
        assert_eq!(values(read(odd)), values(read(&blocks)));
    }

    for_each_device!(a_device_multiplies_with_what_it_dequantises, |on: &On| {
        for dtype in [GgmlDType::Q8_0, GgmlDType::Q4K] {
            let x = random(&[5, 256], 1);
            let dense = quantised(dtype, 24, 256, &Device::Cpu).dequantise(DType::F32).expect("dequantised");
            let expected = linear(&on.rounded(&x), &on.rounded(&dense), None).expect("computed");
            let x = on.tensor(&x);
            let weight = quantised(dtype, 24, 256, x.device());
            on.assert_close(&on.run(|| linear_quantised(&x, &weight, None)), &expected, 256);
        }
    });

    #[test]
    fn what_does_not_fit_is_refused() {
        let error = |blocks: &[u8], dtype, dims| {
            QuantisedMatrix::new(blocks, dtype, dims, &Device::Cpu).expect_err("does not fit").to_string()
        };
        assert!(error(&[0; 34], GgmlDType::Q8_0, (1, 33)).contains("[1, 33] in blocks of 32 Q8_0 values"));
        assert!(error(&[0; 33], GgmlDType::Q8_0, (1, 32)).contains("33 bytes are not [1, 32]"));
        assert!(error(&[0; 34], GgmlDType::Q8_0, (usize::MAX, 32)).contains("34 bytes"));
        assert!(error(&[0; 4], GgmlDType::F32, (1, 1)).contains("F32"));
        let weight = quantised(GgmlDType::Q8_0, 4, 64, &Device::Cpu);
        let error = linear_quantised(&random(&[2, 32], 1), &weight, None).unwrap_err().to_string();
        assert!(error.contains("[2, 32]") && error.contains("[4, 64]"), "{error}");
    }
}
