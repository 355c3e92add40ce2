//! Products with matrices whose rows are blocks of small integers with common scales, as GGUF files have them.
//!
//! Activations are not rounded: a product is, bit for bit on the CPU, that of the dequantised matrix. On the CPU one row of
//! `x` is multiplied with blocks that are widened in registers; of more rows they are widened into the panels of any other
//! product ([`super::panels`]). Both add in the one order of [`crate::dot`]. On a GPU the whole matrix is dequantised into the
//! dtype of the activations (candle's kernels) before cuBLAS multiplies it, which is what diffusers does too.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Result, Tensor, bail};

use self::kernel::{Blocks, multiply_row, widen_row};
use super::blocks::{Format, with_format};
use super::for_outputs;
use super::panels::many_rows;
use super::widened::Product;
use crate::dot::TILE_OUTS;
use crate::view::{View, tensor};
use crate::work;

mod kernel;

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
        let bytes = weight.tensor.data()?;
        with_format!(weight.tensor.dtype(), F => {
            let blocks = Blocks::<F>::new(&bytes, inner);
            if x.len() == inner { one_row(x, blocks, y) } else { many_rows(x, &blocks, (x.len() / inner, out, inner), y) }
        });
        Ok(())
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
    let bytes = table.tensor.data()?;
    let mut rows = vec![0f32; len * dim];
    with_format!(table.tensor.dtype(), F => {
        let blocks = Blocks::<F>::new(&bytes, dim);
        for (row, id) in rows.chunks_exact_mut(dim).zip(ids) {
            widen_row(blocks, *id as usize, row);
        }
    });
    tensor(rows, (len, dim))
}

/// Every core reads its share of the blocks once.
fn one_row<F: Format>(x: &[f32], blocks: Blocks<'_, F>, y: &mut [f32]) {
    for_outputs(y, x.len(), TILE_OUTS, |first, y| multiply_row(blocks.rows_from(first, y.len()), x, y));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{On, bits, for_each_device, random, threads};
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

    /// Blocks of any bits, but for scales that are not finite.
    fn of_any_bits(dtype: GgmlDType, rows: usize, columns: usize, seed: u64) -> QuantisedMatrix {
        let (block, values) = (dtype.type_size(), dtype.block_size());
        let scales: &[usize] = match dtype {
            GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
            GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
            GgmlDType::Q2K => &[80, 82],
            GgmlDType::Q3K => &[108],
            _ => &[208],
        };
        let mut state = seed;
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let mut bytes: Vec<u8> = (0..rows * columns / values * block).map(|_| byte()).collect();
        for block in bytes.chunks_exact_mut(block) {
            for scale in scales {
                block[scale + 1] &= 0xbf;
            }
        }
        QuantisedMatrix::new(&bytes, dtype, (rows, columns), &Device::Cpu).expect("is sound")
    }

    /// Outputs and columns that fill no tile, rows beside all paths of the dense product.
    #[test]
    fn products_are_those_of_the_dequantised_matrix_bit_for_bit() {
        for dtype in TYPES {
            for blocks in [1, 3, 21] {
                let columns = blocks * dtype.block_size();
                let weight = of_any_bits(dtype, 37, columns, blocks as u64);
                let dense = weight.dequantise(DType::F32).expect("dequantised");
                let bias = random(&[37], 3);
                for rows in [1, 2, 3, 7, 24, 25, 70] {
                    let x = random(&[rows, columns], 1);
                    let found = linear_quantised(&x, &weight, Some(&bias)).expect("computed");
                    let expected = linear(&x, &dense, Some(&bias)).expect("computed");
                    assert_eq!(bits(&found), bits(&expected), "{dtype:?} {blocks} {rows}");
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_company() {
        for dtype in TYPES {
            let (outs, columns) = (1030, 768);
            let weight = quantised(dtype, outs, columns, &Device::Cpu);
            let x = random(&[90, columns], 1);
            let all = linear_quantised(&x, &weight, None).expect("computed");
            for (first, rows) in [(0, 1), (89, 1), (5, 2), (7, 17), (20, 66)] {
                let expected = bits(&all.narrow(0, first, rows).expect("inside"));
                let x = x.narrow(0, first, rows).expect("inside");
                for count in [1, 2, 3] {
                    let found = threads(count, || linear_quantised(&x, &weight, None).expect("computed"));
                    assert_eq!(bits(&found), expected, "{dtype:?}: {rows} from {first}, {count} threads");
                }
            }
        }
    }

    /// What candle makes of the blocks, which follows ggml value by value.
    #[test]
    fn every_bit_of_a_block_counts() {
        for dtype in TYPES {
            let table = of_any_bits(dtype, 64, 256, 7);
            let ids = Tensor::arange(0u32, 64, &Device::Cpu).expect("ids");
            let found = embedding_quantised(&ids, &table).expect("looked up");
            assert_eq!(bits(&found), bits(&table.dequantise(DType::F32).expect("dequantised")), "{dtype:?}");
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
