//! Convolutions and upsampling of the VAEs.
//!
//! A convolution is a product of the kernel `[out, in · taps]` with shifted views of the padded picture: if rows keep
//! their padding, the view of every tap starts at a fixed distance in one flat row of positions, so the picture is
//! copied once per tile (not once per tap, as im2col does). A task computes up to [`OUT_BLOCK`] channels of a tile of
//! positions in its own scratch memory: [`SLAB_ROWS`] / taps input channels at a time with their margin, and the sums;
//! together about 1 MiB. The positions that lie in the padding between rows are computed and dropped.

use candle_core::{Result, Tensor, bail};

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

/// `x [b, in, h, w]`, `weight [out, in, kh, kw]`, `bias [out]`, stride 1, zero padding on all four sides.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, padding: usize) -> Result<Tensor> {
    let (x5, weight5) = match (x.rank(), weight.rank()) {
        (4, 4) => (x.unsqueeze(2)?, weight.unsqueeze(2)?),
        _ => bail!("conv2d: x {:?} and weight {:?} must have 4 dimensions", x.shape(), weight.shape()),
    };
    convolve("conv2d", &x5, &weight5, bias, padding)?.squeeze(2)
}

/// `x [b, in, t, h, w]`, `weight [out, in, kt, kh, kw]`, `bias [out]`, stride 1, zero padding in space, none in time:
/// `[b, out, t - kt + 1, h', w']`.
pub fn conv3d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, padding: usize) -> Result<Tensor> {
    convolve("conv3d", x, weight, bias, padding)
}

fn convolve(op: &'static str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, padding: usize) -> Result<Tensor> {
    let shape = Shape::new(op, x, weight, padding)?;
    let bias = bias.map(|bias| vector(op, "bias", bias, shape.out)).transpose()?;
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let views = (View::contiguous(op, &x)?, View::contiguous(op, &weight)?);
    let bias = bias.as_ref().map(|bias| View::contiguous(op, bias)).transpose()?;
    let bias = bias.as_ref().map(View::f32).transpose()?;
    let y = Convolution { shape, x: views.0.f32()?, weight: views.1.f32()?, bias }.compute();
    tensor(y, (shape.b, shape.out, shape.frames_out(), shape.h_out(), shape.w_out()))
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    b: usize,
    inner: usize,
    out: usize,
    t: usize,
    h: usize,
    w: usize,
    kt: usize,
    kh: usize,
    kw: usize,
    padding: usize,
}

impl Shape {
    fn new(op: &str, x: &Tensor, weight: &Tensor, padding: usize) -> Result<Self> {
        let ((b, inner, t, h, w), (out, weight_inner, kt, kh, kw)) = (x.dims5()?, weight.dims5()?);
        let covers = kt <= t && kh <= h + 2 * padding && kw <= w + 2 * padding;
        if inner != weight_inner || !covers || kt * kh * kw == 0 {
            bail!("{op}: x {:?} with padding {padding} does not fit weight {:?}", x.shape(), weight.shape());
        }
        Ok(Self { b, inner, out, t, h, w, kt, kh, kw, padding })
    }

    fn frames_out(&self) -> usize {
        self.t - self.kt + 1
    }

    fn h_out(&self) -> usize {
        self.h + 2 * self.padding - self.kh + 1
    }

    fn w_out(&self) -> usize {
        self.w + 2 * self.padding - self.kw + 1
    }

    fn taps(&self) -> usize {
        self.kt * self.kh * self.kw
    }
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
        let rows = (TILE_POSITIONS / columns).clamp(1, shape.h_out());
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
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
}

impl Convolution<'_> {
    fn compute(&self) -> Vec<f32> {
        let shape = &self.shape;
        let mut y = vec![0f32; shape.b * shape.out * shape.frames_out() * shape.h_out() * shape.w_out()];
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

    /// Width of a padded row.
    fn width(&self, shape: &Shape) -> usize {
        self.columns.1 + shape.kw - 1
    }

    /// Values of one frame of one channel in the slab.
    fn frame_len(&self, shape: &Shape) -> usize {
        (self.rows.1 + shape.kh - 1) * self.width(shape)
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
    /// `[channels, kt, rows + kh - 1, width]`: part of the picture, padded.
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
        let shape = &self.convolution.shape;
        let (frame, width) = (self.tile.frame_len(shape), self.tile.width(shape));
        let mut offsets = Vec::with_capacity(self.tile.channels * shape.taps());
        for channel in 0..self.tile.channels {
            for dt in 0..shape.kt {
                for dy in 0..shape.kh {
                    offsets.extend((0..shape.kw).map(|dx| (channel * shape.kt + dt) * frame + dy * width + dx));
                }
            }
        }
        offsets
    }

    /// Copies the part of an input channel that the tile sees. What lies in the padding was zero from the start, and
    /// every channel leaves it so.
    #[inline(always)]
    fn load_channel(&mut self, channel: usize, slot: usize) {
        let shape = &self.convolution.shape;
        let (frame, width) = (self.tile.frame_len(shape), self.tile.width(shape));
        // Picture columns of the tile: from `left` on, at `gap` in the padded row.
        let gap = shape.padding.saturating_sub(self.tile.columns.0);
        let left = (self.tile.columns.0 + gap) - shape.padding;
        let len = (width - gap.min(width)).min(shape.w.saturating_sub(left));
        for dt in 0..shape.kt {
            let picture = ((self.tile.b * shape.inner + channel) * shape.t + self.tile.frame + dt) * shape.h;
            for row in 0..self.tile.rows.1 + shape.kh - 1 {
                let padded = self.tile.rows.0 + row;
                if padded < shape.padding || padded - shape.padding >= shape.h || len == 0 {
                    continue;
                }
                let from = &self.convolution.x[(picture + padded - shape.padding) * shape.w + left..][..len];
                let to = (slot * shape.kt + dt) * frame + row * width + gap;
                self.slab[to..to + len].copy_from_slice(from);
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

/// Nearest-neighbour upsampling by 2 of `x [b, c, h, w]`.
pub fn upsample_nearest2d(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
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
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{assert_close, bits, random, threads};

    mod oracle {
        use super::*;

        pub(super) fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, padding: usize) -> Result<Tensor> {
            let y = x.contiguous()?.conv2d(weight, padding, 1, 1, 1)?;
            match bias {
                Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
                None => Ok(y),
            }
        }

        pub(super) fn conv3d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, padding: usize) -> Result<Tensor> {
            let (_, _, t, _, _) = x.dims5()?;
            let (_, _, kt, _, _) = weight.dims5()?;
            let mut frames = Vec::with_capacity(t - kt + 1);
            for first in 0..=t - kt {
                let mut sum: Option<Tensor> = None;
                for dt in 0..kt {
                    let frame = x.narrow(2, first + dt, 1)?.squeeze(2)?;
                    let kernel = weight.narrow(2, dt, 1)?.squeeze(2)?.contiguous()?;
                    let y = conv2d(&frame, &kernel, None, padding)?;
                    sum = Some(match sum {
                        Some(sum) => (sum + y)?,
                        None => y,
                    });
                }
                frames.extend(sum);
            }
            let y = Tensor::stack(&frames, 2)?;
            match bias {
                Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1, 1))?),
                None => Ok(y),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn conv2d_equals_the_specification(
            b in 1usize..3, inner in 1usize..70, out in 1usize..20, h in 1usize..30, w in 1usize..30,
            kh in 1usize..4, kw in 1usize..4, padding in 0usize..3, biased: bool,
        ) {
            prop_assume!(kh <= h + 2 * padding && kw <= w + 2 * padding);
            let (x, weight, bias) = (random(&[b, inner, h, w], 1), random(&[out, inner, kh, kw], 2), random(&[out], 3));
            let bias = biased.then_some(&bias);
            let expected = oracle::conv2d(&x, &weight, bias, padding).unwrap();
            assert_close(&conv2d(&x, &weight, bias, padding).unwrap(), &expected, 5e-6);
        }

        #[test]
        fn conv3d_equals_the_specification(
            b in 1usize..3, inner in 1usize..20, out in 1usize..20, t in 1usize..6, h in 1usize..14, w in 1usize..14,
            kt in 1usize..4, k in prop_oneof![Just(1usize), Just(3)], padding in 0usize..2, biased: bool,
        ) {
            prop_assume!(kt <= t && k <= h + 2 * padding && k <= w + 2 * padding);
            let (x, weight) = (random(&[b, inner, t, h, w], 1), random(&[out, inner, kt, k, k], 2));
            let bias = random(&[out], 3);
            let bias = biased.then_some(&bias);
            let expected = oracle::conv3d(&x, &weight, bias, padding).unwrap();
            assert_close(&conv3d(&x, &weight, bias, padding).unwrap(), &expected, 5e-6);
        }
    }

    #[test]
    fn wide_pictures_and_many_channels_are_cut_into_tiles() {
        let (x, weight, bias) = (random(&[1, 5, 9, 1100], 1), random(&[200, 5, 3, 3], 2), random(&[200], 3));
        let expected = oracle::conv2d(&x, &weight, Some(&bias), 1).unwrap();
        let found = threads(2, || conv2d(&x, &weight, Some(&bias), 1).unwrap());
        assert_close(&found, &expected, 5e-6);
        assert_eq!(bits(&threads(1, || conv2d(&x, &weight, Some(&bias), 1).unwrap())), bits(&found));
        let (x, weight) = (random(&[1, 130, 70, 40], 1), random(&[8, 130, 3, 3], 2));
        assert_close(&conv2d(&x, &weight, None, 1).unwrap(), &oracle::conv2d(&x, &weight, None, 1).unwrap(), 5e-6);
    }

    #[test]
    fn strided_inputs_are_read_by_their_strides() {
        let (x, weight) = (random(&[2, 8, 7, 3], 1).permute((0, 3, 1, 2)).unwrap(), random(&[4, 3, 3, 3], 2));
        assert_close(&conv2d(&x, &weight, None, 1).unwrap(), &oracle::conv2d(&x, &weight, None, 1).unwrap(), 5e-6);
    }

    #[test]
    fn scratch_stays_small_whatever_the_picture() {
        for (inner, out, h, w, k) in [(512, 512, 4096, 4096, 3), (128, 3, 64, 64, 3), (96, 96, 1, 100_000, 1)] {
            let shape = Shape { b: 1, inner, out, t: 3, h, w, kt: k, kh: k, kw: k, padding: k / 2 };
            let tile = Tile::of_task(&shape, Cut::new(&shape), 0);
            assert!(4 * (tile.slab_len(&shape) + tile.sums_len(&shape)) <= 3 << 19);
        }
    }

    #[test]
    fn upsampling_repeats_every_value_four_times() {
        let x = random(&[2, 3, 5, 7], 1);
        let expected = x.upsample_nearest2d(10, 14).unwrap();
        assert_eq!(bits(&upsample_nearest2d(&x).unwrap()), bits(&expected));
    }

    #[test]
    fn misfits_name_the_operation_and_both_shapes() {
        let error = conv2d(&random(&[1, 3, 4, 4], 1), &random(&[2, 5, 3, 3], 1), None, 1).unwrap_err().to_string();
        assert!(
            error.contains("conv2d") && error.contains("[1, 3, 1, 4, 4]") && error.contains("[2, 5, 1, 3, 3]"),
            "{error}"
        );
        let error =
            conv3d(&random(&[1, 3, 2, 4, 4], 1), &random(&[2, 3, 3, 3, 3], 1), None, 1).unwrap_err().to_string();
        assert!(error.contains("conv3d") && error.contains("[2, 3, 3, 3, 3]"), "{error}");
    }
}
