//! Products with matrices of small codes, which rows and groups of columns scale: integers of four and eight bits, and
//! floats of eight.
//!
//! One layout ([`tiles`]) for all formats that keep weights so (AWQ, GPTQ, compressed-tensors, fp8). A value is
//! `(code - zero) * scale` in f32, which is exact where the scale has 16 bits. Activations are not rounded. On the CPU one row of
//! `x` is multiplied with codes that are widened in registers; of more rows they are widened into the panels of any other
//! product ([`super::panels`]). Both add in the one order of [`crate::dot`], over columns in the order of the tiles, so that a
//! row has the same bits in either. On a GPU the whole matrix is widened into the dtype of the activations (`packed.cu`) before
//! cuBLAS multiplies it.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use candle_core::{DType, Device, Result, Tensor, bail};

use self::kernel::{E4m3, Groups, Int4, Int8, Tiles, multiply_row, widen_row};
use super::for_outputs;
use super::panels::many_rows;
use super::widened::Product;
#[cfg(gpu)]
use crate::gpu;
use crate::parallel::{Shared, for_each, with_scratch};
use crate::view::{View, tensor, with_values};

mod kernel;
#[cfg(gpu)]
mod launch;
mod tiles;

/// A column that is only there to fill a tile.
const NO_COLUMN: u32 = u32::MAX;

/// What a code is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// An integer from 0 to 15.
    Bits4,
    /// An integer from 0 to 255.
    Bits8,
    /// A float of eight bits, four of them of the exponent and no infinities (`torch.float8_e4m3fn`).
    Float8,
}

impl Code {
    /// Planes of nibbles.
    fn planes(self) -> usize {
        match self {
            Self::Bits4 => 1,
            Self::Bits8 | Self::Float8 => 2,
        }
    }
}

/// What codes are multiplied with, and what is taken from them before.
#[derive(Debug, Clone)]
pub struct CodeScales {
    /// `[ceil(rows / rows_per_scale), ceil(columns / group_size)]`, f32, bf16 or f16.
    pub scales: Tensor,
    /// The codes of zero, as many, by rows; 0 of all if absent. Floats have none.
    pub zeros: Option<Vec<u8>>,
    /// Columns in a row with one scale.
    pub group_size: usize,
    /// Rows below one another with one scale.
    pub rows_per_scale: usize,
}

/// A matrix `[out, in]` of codes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    code: Code,
    rows: usize,
    columns: usize,
    /// u32, by tiles.
    words: Tensor,
    /// `[scale rows, groups]`.
    scales: Tensor,
    /// u8, of the same shape.
    zeros: Option<Tensor>,
    group_size: usize,
    rows_per_scale: usize,
    /// u32: the column of `x` that each column of the codes is multiplied with, where that is another.
    order: Option<Tensor>,
    /// The column of `x` for each position of the tiles in the order in which rows are added, or [`NO_COLUMN`].
    places: Arc<Vec<u32>>,
    groups: Arc<Groups>,
}

impl PackedMatrix {
    /// Of `code_at(row, column)`, in the order of the groups; `order` says which column of the matrix is where, if that is another.
    pub fn new(
        code: Code,
        (rows, columns): (usize, usize),
        scales: CodeScales,
        order: Option<Vec<u32>>,
        device: &Device,
        code_at: impl Fn(usize, usize) -> u8 + Sync,
    ) -> Result<Self> {
        let CodeScales { scales, zeros, group_size, rows_per_scale } = scales;
        if group_size == 0 || rows_per_scale == 0 {
            bail!("packed matrix: groups have columns and rows, got {group_size} and {rows_per_scale}");
        }
        let expected = [rows.div_ceil(rows_per_scale), columns.div_ceil(group_size)];
        if scales.dims() != expected {
            bail!("packed matrix: scales of [{rows}, {columns}] are {expected:?}, got {:?}", scales.shape());
        }
        if zeros.as_ref().is_some_and(|zeros| zeros.len() != scales.elem_count()) {
            bail!("packed matrix: there are as many zeros as scales, got {:?}", zeros.map(|zeros| zeros.len()));
        }
        if code == Code::Float8 && zeros.is_some() {
            bail!("packed matrix: floats have no zeros");
        }
        if let Some(order) = &order {
            check_order(order, columns)?;
        }
        let Some(words) = packed(code, (rows, columns), &code_at) else {
            bail!("packed matrix: a float of eight bits is NaN");
        };
        let of_column = |column: usize| match &order {
            _ if column >= columns => NO_COLUMN,
            Some(order) => order[column],
            None => column as u32,
        };
        let positions = columns.next_multiple_of(tiles::COLUMNS);
        let place = |at: usize| of_column(at / tiles::COLUMNS * tiles::COLUMNS + tiles::column(at % tiles::COLUMNS));
        let len = words.len();
        Ok(Self {
            code,
            rows,
            columns,
            words: Tensor::from_vec(words, len, device)?,
            zeros: zeros.map(|zeros| Tensor::from_vec(zeros, scales.dims(), device)).transpose()?,
            scales: scales.contiguous()?.to_device(device)?,
            group_size,
            rows_per_scale,
            places: Arc::new((0..positions).map(place).collect()),
            groups: Arc::new(Groups::new(columns, group_size)),
            order: order.map(|order| Tensor::from_vec(order, columns, device)).transpose()?,
        })
    }

    /// Rows and columns.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Bytes of codes, scales, zeros and order.
    pub fn size_in_bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let more = [&self.zeros, &self.order].into_iter().flatten();
        bytes(&self.words) + bytes(&self.scales) + more.map(bytes).sum::<usize>()
    }

    /// What [`PackedMatrix::size_in_bytes`] says of a matrix with so many scales, each with a zero or none, of so many bytes.
    pub fn bytes_of(
        code: Code,
        (rows, columns): (usize, usize),
        scales: usize,
        scale_bytes: usize,
        has_order: bool,
    ) -> usize {
        let tiles = rows.div_ceil(tiles::ROWS).saturating_mul(columns.div_ceil(tiles::COLUMNS));
        let codes = tiles.saturating_mul(code.planes() * tiles::PLANE_WORDS * size_of::<u32>());
        let order = if has_order { columns * size_of::<u32>() } else { 0 };
        codes.saturating_add(scales.saturating_mul(scale_bytes)).saturating_add(order)
    }

    /// All values `[out, in]` in `dtype`, where the matrix is.
    pub fn dequantise(&self, dtype: DType) -> Result<Tensor> {
        #[cfg(gpu)]
        if gpu::runs_here(&self.words) {
            return launch::dequantise(self, dtype);
        }
        let mut values = vec![0f32; self.rows * self.columns];
        self.with_tiles(Dequantise { places: &self.places, columns: self.columns, values: &mut values })?;
        tensor(values, (self.rows, self.columns))?.to_dtype(dtype)
    }

    /// Calls `body` with the tiles of whichever type.
    fn with_tiles<B: WithTiles>(&self, body: B) -> Result<B::Output> {
        let (words, scales) = (View::contiguous("linear", &self.words)?, View::contiguous("linear", &self.scales)?);
        let zeros = self.zeros.as_ref().map(|zeros| View::contiguous("linear", zeros)).transpose()?;
        let words = words.u32()?;
        let zeros = zeros.as_ref().map(View::u8).transpose()?;
        Ok(with_values!(scales.values()?, |scales| {
            let tiles = Tiles {
                words,
                scales,
                zeros,
                groups: &self.groups,
                rows: self.rows,
                columns: self.columns,
                group_size: self.group_size,
                rows_per_scale: self.rows_per_scale,
                format: PhantomData,
            };
            match self.code {
                Code::Bits4 => body.call(&Tiles { format: PhantomData::<Int4>, ..tiles }),
                Code::Bits8 => body.call(&tiles.of::<Int8>()),
                Code::Float8 => body.call(&tiles.of::<E4m3>()),
            }
        }))
    }
}

/// Something that is done with tiles.
trait WithTiles {
    type Output;
    fn call<T: crate::simd::Element, F: kernel::Format>(self, tiles: &Tiles<'_, T, F>) -> Self::Output;
}

/// All values, each in the column of its place.
struct Dequantise<'a> {
    places: &'a [u32],
    columns: usize,
    values: &'a mut [f32],
}

impl WithTiles for Dequantise<'_> {
    type Output = ();

    fn call<T: crate::simd::Element, F: kernel::Format>(self, tiles: &Tiles<'_, T, F>) {
        let Self { places, columns, values } = self;
        let (rows, len) = (tiles.rows, values.len());
        let values = Shared::new(values);
        for_each(rows, len, |row| {
            // SAFETY: every task has its own row.
            let to = unsafe { values.slice(row * columns, columns) };
            with_scratch(places.len(), |widened| {
                widen_row(tiles, row, widened);
                for (place, value) in places.iter().zip(widened).filter(|(place, _)| **place != NO_COLUMN) {
                    to[*place as usize] = *value;
                }
            });
        });
    }
}

/// Several rows of `x`, in the order of the tiles.
struct ManyRows<'a> {
    x: &'a [f32],
    dims: (usize, usize, usize),
    y: &'a mut [f32],
}

impl WithTiles for ManyRows<'_> {
    type Output = ();

    fn call<T: crate::simd::Element, F: kernel::Format>(self, tiles: &Tiles<'_, T, F>) {
        many_rows(self.x, tiles, self.dims, self.y);
    }
}

/// One row of `x`, in the order of the tiles.
struct OneRow<'a> {
    x: &'a [f32],
    y: &'a mut [f32],
}

impl WithTiles for OneRow<'_> {
    type Output = ();

    fn call<T: crate::simd::Element, F: kernel::Format>(self, tiles: &Tiles<'_, T, F>) {
        let Self { x, y } = self;
        for_outputs(y, x.len(), tiles::ROWS, |first, y| multiply_row(tiles, x, first / tiles::ROWS, y));
    }
}

/// `x [..., in]` (f32, on a GPU in any dtype) times `weight [out, in]` transposed, plus `bias [out]`: `[..., out]`.
pub fn linear_packed(x: &Tensor, weight: &PackedMatrix, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, _) = weight.dims();
    let product = Product { x, bias, dims: weight.dims(), size_in_bytes: weight.size_in_bytes() };
    let multiply = |x: &[f32], y: &mut [f32]| {
        let x = in_order_of_tiles(x, weight);
        if y.len() == out {
            return weight.with_tiles(OneRow { x: &x, y });
        }
        let inner = weight.places.len();
        weight.with_tiles(ManyRows { x: &x, dims: (x.len() / inner, out, inner), y })
    };
    product.compute(|dtype| weight.dequantise(dtype), multiply)
}

/// Rows of `x` as rows of the matrix are added: `[m, places]`, 0 where a tile has more columns than the matrix.
fn in_order_of_tiles(x: &[f32], weight: &PackedMatrix) -> Vec<f32> {
    let places = &weight.places[..];
    let mut ordered = vec![0f32; x.len() / weight.columns * places.len()];
    let rows = x.len() / weight.columns;
    let to = Shared::new(&mut ordered);
    for_each(rows, rows * places.len(), |row| {
        let x = &x[row * weight.columns..][..weight.columns];
        // SAFETY: every task has its own row.
        let to = unsafe { to.slice(row * places.len(), places.len()) };
        for (to, place) in to.iter_mut().zip(places).filter(|(_, place)| **place != NO_COLUMN) {
            *to = x[*place as usize];
        }
    });
    ordered
}

/// Refuses what is not every column once.
fn check_order(order: &[u32], columns: usize) -> Result<()> {
    let mut seen = vec![false; columns];
    for column in order {
        match seen.get_mut(*column as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => bail!("packed matrix: column {column} of {columns} is not there once"),
        }
    }
    if order.len() != columns {
        bail!("packed matrix: an order of {} columns, there are {columns}", order.len());
    }
    Ok(())
}

/// The words of all tiles; `None` where a float is NaN, which products would take for a number.
fn packed(
    code: Code,
    (rows, columns): (usize, usize),
    code_at: &(impl Fn(usize, usize) -> u8 + Sync),
) -> Option<Vec<u32>> {
    let has_nan = AtomicBool::new(false);
    let (row_tiles, column_tiles) = (rows.div_ceil(tiles::ROWS), columns.div_ceil(tiles::COLUMNS));
    let tile_words = code.planes() * tiles::PLANE_WORDS;
    let mut words = vec![0u32; row_tiles * column_tiles * tile_words];
    let to = Shared::new(&mut words);
    for_each(row_tiles, rows * columns, |row_tile| {
        let first_row = row_tile * tiles::ROWS;
        for column_tile in 0..column_tiles {
            let first_column = column_tile * tiles::COLUMNS;
            // SAFETY: every task has its own row of tiles.
            let words = unsafe { to.slice((row_tile * column_tiles + column_tile) * tile_words, tile_words) };
            for row in first_row..rows.min(first_row + tiles::ROWS) {
                for column in first_column..columns.min(first_column + tiles::COLUMNS) {
                    let value = u32::from(code_at(row, column));
                    if code == Code::Float8 && value & 0x7f == 0x7f {
                        has_nan.store(true, Relaxed);
                    }
                    let (word, bit) = tiles::place(row - first_row, column - first_column);
                    words[word] |= (value & 15) << bit;
                    if tile_words > tiles::PLANE_WORDS {
                        words[tiles::PLANE_WORDS + word] |= (value >> 4) << bit;
                    }
                }
            }
        }
    });
    (!has_nan.into_inner()).then_some(words)
}

#[cfg(test)]
mod tests;
