//! Convolutions on the CPU.
//!
//! A convolution is a product of the kernel `[out, in · taps]` with shifted views of the padded picture: if rows keep
//! their padding, the view of every tap starts at a fixed distance in one flat row of positions, so the picture is
//! copied once per tile (not once per tap, as im2col does). A task computes up to [`OUT_BLOCK`] channels of a tile of
//! positions in its own scratch memory: [`SLAB_ROWS`] / taps input channels at a time with their margin, and the sums;
//! together about 1 MiB. The positions that lie in the padding between rows are computed and dropped.
//!
//! With stride 2 the slab holds the even and the odd rows and columns apart: within each the views are as dense as with
//! stride 1. Upsampling, repeated edges and past frames are a matter of where a row is copied from.

use candle_core::{Result, Tensor};

use super::{CausalPadding, Frame, Operands, Shape};
use crate::dot::Rows;
use crate::outer::{Outer, Start};
use crate::parallel::{Shared, for_each, with_scratch};
use crate::row;
use crate::simd::{MAX_LANES, Op, Simd, dispatch};
use crate::view::{View, tensor, vector};

/// Output channels that a task sums at a time.
const OUT_BLOCK: usize = 96;

/// Products per sum and pass: input channels of a pass times taps of the kernel.
const SLAB_ROWS: usize = 288;

/// Most input channels of a pass, for kernels of few taps.
const SLAB_CHANNELS: usize = 64;

/// Positions of a tile, margins left aside.
const TILE_POSITIONS: usize = 1536;

/// Columns of a tile.
const TILE_COLUMNS: usize = 512;

pub(super) fn convolve(op: &'static str, operands: &Operands<'_>, shape: &Shape) -> Result<Tensor> {
    let bias = operands.bias.map(|bias| vector(op, "bias", bias, shape.out)).transpose()?;
    let past = operands.past.map(Tensor::contiguous).transpose()?;
    let (x, weight) = (operands.x.contiguous()?, operands.weight.contiguous()?);
    let views = (View::contiguous(op, &x)?, View::contiguous(op, &weight)?);
    let past = past.as_ref().map(|past| View::contiguous(op, past)).transpose()?;
    let bias = bias.as_ref().map(|bias| View::contiguous(op, bias)).transpose()?;
    let convolution = Convolution {
        shape: *shape,
        x: views.0.f32()?,
        past: past.as_ref().map_or(Ok(&[][..]), View::f32)?,
        weight: views.1.f32()?,
        bias: bias.as_ref().map(View::f32).transpose()?,
    };
    tensor(convolution.compute(), &shape.result()[..])
}

/// How results are cut into tasks.
#[derive(Clone, Copy)]
struct Cut {
    /// Rows and columns of results in a tile.
    rows: usize,
    columns: usize,
    /// Input channels of a pass.
    channels: usize,
    /// Tiles down and across, blocks of output channels.
    down: usize,
    across: usize,
    blocks: usize,
}

impl Cut {
    fn new(shape: &Shape) -> Self {
        let columns = shape.w_out().min(TILE_COLUMNS);
        // The slab holds every row and column that results are taken from, the sums only those.
        let rows = (TILE_POSITIONS / shape.stride / columns).clamp(1, shape.h_out());
        Self {
            rows,
            columns,
            channels: (SLAB_ROWS / shape.taps()).clamp(1, SLAB_CHANNELS),
            down: shape.h_out().div_ceil(rows),
            across: shape.w_out().div_ceil(columns),
            blocks: shape.out.div_ceil(OUT_BLOCK),
        }
    }

    fn tasks(&self, shape: &Shape) -> usize {
        shape.b * shape.frames_out() * self.down * self.across * self.blocks
    }
}

struct Convolution<'a> {
    shape: Shape,
    x: &'a [f32],
    /// Frames before x; empty if there are none.
    past: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
}

impl Convolution<'_> {
    fn compute(&self) -> Vec<f32> {
        let shape = &self.shape;
        let mut y = vec![0f32; shape.result().iter().product()];
        if y.is_empty() {
            return y;
        }
        let cut = Cut::new(shape);
        let work = y.len() * shape.inner * shape.taps();
        let shared = Shared::new(&mut y);
        for_each(cut.tasks(shape), work, |task| {
            let tile = Tile::of_task(shape, cut, task);
            with_scratch(tile.slab_len(shape) + tile.sums_len(shape), |scratch| {
                let (slab, sums) = scratch.split_at_mut(tile.slab_len(shape));
                dispatch(TileTask { convolution: self, tile, slab, sums, y: &shared });
            });
        });
        y
    }
}

/// A tile of results of one frame, for one block of output channels.
#[derive(Clone, Copy)]
struct Tile {
    b: usize,
    frame: usize,
    /// First and number of rows, columns and output channels.
    rows: (usize, usize),
    columns: (usize, usize),
    outs: (usize, usize),
    /// Input channels of a pass.
    channels: usize,
}

impl Tile {
    /// Blocks of output channels follow one another, so that neighbours in time read the same part of the picture.
    fn of_task(shape: &Shape, cut: Cut, task: usize) -> Self {
        let part = |index: usize, size: usize, total: usize| (index * size, size.min(total - index * size));
        let (block, task) = (task % cut.blocks, task / cut.blocks);
        let (across, task) = (task % cut.across, task / cut.across);
        let (down, task) = (task % cut.down, task / cut.down);
        Self {
            b: task / shape.frames_out(),
            frame: task % shape.frames_out(),
            rows: part(down, cut.rows, shape.h_out()),
            columns: part(across, cut.columns, shape.w_out()),
            outs: part(block, OUT_BLOCK, shape.out),
            channels: cut.channels,
        }
    }

    /// Width of a padded row, every `stride`th column of it.
    fn width(&self, shape: &Shape) -> usize {
        self.columns.1 + (shape.kw - 1) / shape.stride
    }

    /// Values of every `stride`th row and column of one frame of one channel.
    fn phase_len(&self, shape: &Shape) -> usize {
        (self.rows.1 + (shape.kh - 1) / shape.stride) * self.width(shape)
    }

    /// Values of one frame of one channel in the slab.
    fn frame_len(&self, shape: &Shape) -> usize {
        shape.stride * shape.stride * self.phase_len(shape)
    }

    /// Flat positions from the first result to the last, padding included.
    fn positions(&self, shape: &Shape) -> usize {
        (self.rows.1 - 1) * self.width(shape) + self.columns.1
    }

    /// Length of the slab: the last vector of the last tap may read past the last frame.
    fn slab_len(&self, shape: &Shape) -> usize {
        (self.channels * shape.kt * self.frame_len(shape) + MAX_LANES).next_multiple_of(MAX_LANES)
    }

    fn sums_stride(&self, shape: &Shape) -> usize {
        self.positions(shape).next_multiple_of(MAX_LANES)
    }

    fn sums_len(&self, shape: &Shape) -> usize {
        self.outs.1 * self.sums_stride(shape)
    }
}

struct TileTask<'a> {
    convolution: &'a Convolution<'a>,
    tile: Tile,
    /// `[channels, kt, stride, stride, rows + (kh - 1) / stride, width]`: part of the picture, padded.
    slab: &'a mut [f32],
    /// `[outs, positions]`.
    sums: &'a mut [f32],
    y: &'a Shared<'a, f32>,
}

impl Op for TileTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let shape = &self.convolution.shape;
        let offsets = self.offsets();
        self.slab.fill(0.0);
        if shape.inner == 0 {
            self.sums.fill(0.0);
        }
        let mut channel = 0;
        while channel < shape.inner {
            let count = self.tile.channels.min(shape.inner - channel);
            for i in 0..count {
                self.load_channel(channel + i, i);
            }
            let start = if channel == 0 { Start::Zero } else { Start::Found };
            self.add_products(s, channel, &offsets[..count * shape.taps()], start);
            channel += count;
        }
        self.write(s);
    }
}

impl TileTask<'_> {
    /// Where the view of every channel and tap starts in the slab, in the order of the kernel.
    fn offsets(&self) -> Vec<usize> {
        let (shape, tile) = (&self.convolution.shape, &self.tile);
        let (phase, width, stride) = (tile.phase_len(shape), tile.width(shape), shape.stride);
        let mut offsets = Vec::with_capacity(tile.channels * shape.taps());
        for frame in 0..tile.channels * shape.kt {
            for dy in 0..shape.kh {
                let row = frame * tile.frame_len(shape) + dy % stride * stride * phase + dy / stride * width;
                offsets.extend((0..shape.kw).map(|dx| row + dx % stride * phase + dx / stride));
            }
        }
        offsets
    }

    /// Copies the part of an input channel that the tile sees. What lies among zeros was zero from the start, and every
    /// channel leaves it so.
    #[inline(always)]
    fn load_channel(&mut self, channel: usize, slot: usize) {
        let shape = &self.convolution.shape;
        let (stride, width, phase) = (shape.stride, self.tile.width(shape), self.tile.phase_len(shape));
        for dt in 0..shape.kt {
            let (values, frame) = match shape.frame(self.tile.frame, dt) {
                Frame::Zeros => continue,
                Frame::OfX(i) => (self.convolution.x, (self.tile.b * shape.inner + channel) * shape.t + i),
                Frame::OfPast(i) => (self.convolution.past, (self.tile.b * shape.inner + channel) * shape.past + i),
            };
            let to = (slot * shape.kt + dt) * self.tile.frame_len(shape);
            for row in 0..stride * (phase / width) {
                let Some(place) = shape.place(0, self.tile.rows.0 * stride + row) else { continue };
                let from = &values[(frame * shape.h + place) * shape.w..][..shape.w];
                for column in 0..stride {
                    let to = to + (row % stride * stride + column) * phase + row / stride * width;
                    let to = &mut self.slab[to..to + width];
                    load_row(shape, from, to, self.tile.columns.0 * stride + column);
                }
            }
        }
    }

    /// Adds the products of the input channels in the slab, `channel` the first of them.
    #[inline(always)]
    fn add_products<S: Simd>(&mut self, s: S, channel: usize, offsets: &[usize], start: Start) {
        let shape = &self.convolution.shape;
        let inner = shape.inner * shape.taps();
        let weight = &self.convolution.weight[self.tile.outs.0 * inner + channel * shape.taps()..];
        let product = Outer {
            a: Rows { start: weight.as_ptr(), stride: inner },
            rows: self.tile.outs.1,
            b: self.slab.as_ptr(),
            offsets,
            c: self.sums.as_mut_ptr(),
            c_stride: self.tile.sums_stride(shape),
            columns: self.tile.positions(shape),
            start,
        };
        // SAFETY: the kernel has `outs` rows with `offsets.len()` values from here on; the view of the last tap ends
        // with the slab but for the vector that `slab_len` adds; sums are padded to whole vectors.
        unsafe { product.run(s) };
    }

    /// Writes the results, without the positions between rows, plus the bias.
    #[inline(always)]
    fn write<S: Simd>(&self, s: S) {
        let shape = &self.convolution.shape;
        let (stride, width) = (self.tile.sums_stride(shape), self.tile.width(shape));
        for i in 0..self.tile.outs.1 {
            let out = self.tile.outs.0 + i;
            let bias = self.convolution.bias.map_or(0.0, |bias| bias[out]);
            let frame = (self.tile.b * shape.out + out) * shape.frames_out() + self.tile.frame;
            for row in 0..self.tile.rows.1 {
                let from = &self.sums[i * stride + row * width..][..self.tile.columns.1];
                let place = (frame * shape.h_out() + self.tile.rows.0 + row) * shape.w_out() + self.tile.columns.0;
                // SAFETY: every task has its own rows, columns and channels.
                let to = unsafe { self.y.slice(place, self.tile.columns.1) };
                row::map(s, AddBias(bias), from, to);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct AddBias(f32);

impl row::Function for AddBias {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.add(x, s.splat(self.0))
    }
}

/// Every `stride`th column of a row of the picture from the padded column `first` on.
#[inline(always)]
fn load_row(shape: &Shape, from: &[f32], to: &mut [f32], first: usize) {
    let left = shape.before[1];
    // Places of `to` before the first column of the picture, and before the first one after the last.
    let gap = left.saturating_sub(first).div_ceil(shape.stride).min(to.len());
    let end = (shape.w * shape.upsample + left).saturating_sub(first).div_ceil(shape.stride).clamp(gap, to.len());
    let start = (first + gap * shape.stride).saturating_sub(left);
    if shape.stride == 1 && shape.upsample == 1 {
        to[gap..end].copy_from_slice(&from[start.min(from.len())..][..end - gap]);
    } else {
        // Upsampling is by 1 or 2: no division in this loop.
        let halved = shape.upsample - 1;
        for (i, value) in to[gap..end].iter_mut().enumerate() {
            *value = from[(start + i * shape.stride) >> halved];
        }
    }
    if shape.padding == CausalPadding::Replicate {
        to[..gap].fill(from[0]);
        to[end..].fill(from[from.len() - 1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_stays_small_whatever_the_picture() {
        for (inner, out, h, w, k) in [(512, 512, 4096, 4096, 3), (128, 3, 64, 64, 3), (96, 96, 1, 100_000, 1)] {
            for stride in [1, 2] {
                let (half, padding) = ([k / 2, k / 2], CausalPadding::Zeros);
                let (t, past, lead, upsample, stride_t) = (3, 0, 0, 1, 1);
                let (b, kt, kh, kw, before, after) = (1, k, k, k, half, half);
                let shape = Shape {
                    b,
                    inner,
                    out,
                    t,
                    past,
                    h,
                    w,
                    kt,
                    kh,
                    kw,
                    stride_t,
                    stride,
                    lead,
                    before,
                    after,
                    upsample,
                    padding,
                };
                let tile = Tile::of_task(&shape, Cut::new(&shape), 0);
                let bytes = 4 * (tile.slab_len(&shape) + tile.sums_len(&shape));
                assert!(bytes <= 3 << 19, "{bytes} bytes");
            }
        }
    }
}
