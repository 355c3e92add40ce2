//! Launches of `group_norm.cu`.

use candle_core::{DType, Result, Tensor, bail};

use super::boxes::Boxes;
use super::{Planes, SpatialNorm, Then};
use crate::gpu::{Launch, MAX_WAVES_BLOCKS, address, by_dtype, module, output};

module!(GROUP_NORM, "group_norm");

/// `THREADS`, `STATS_PACKS` and `LINE_THREADS` of the file.
const THREADS: usize = 256;
const STATS_PACKS: usize = 4;
const LINE_THREADS: usize = 8;

/// `affine`: weight and bias `[channels]`; the caller has checked the groups.
pub(super) fn group_norm(
    x: &Tensor,
    planes: Planes,
    num_groups: usize,
    [weight, bias]: [&Tensor; 2],
    (eps, then): (f64, Then),
) -> Result<Tensor> {
    let (weight, bias) = (vector("group_norm", x, planes, weight)?, vector("group_norm", x, planes, bias)?);
    let x = aligned(x)?;
    let cut = Cut::new(&x, planes, num_groups)?;
    let y = output(x.shape(), x.dtype(), &x)?;
    let partials = cut.statistics(&x)?;
    Launch::new(&GROUP_NORM, by_dtype!("group_norm", x.dtype()), [cut.blocks(), 1, 1], THREADS)?
        .tensor(&x)?
        .tensor(&partials)?
        .tensor(&weight)?
        .tensor(&bias)?
        .tensor(&y)?
        .i64(cut.len)
        .i64(cut.span)
        .i64(cut.parts)
        .i64(planes.positions)
        .i64(num_groups)
        .f32(eps as f32)
        .i32(i32::from(then == Then::Silu))
        .i32(cut.vector)
        .run(&x)?;
    Ok(y)
}

/// The caller has checked the groups, and that `boxes` are of x, factor and term.
pub(super) fn spatial_norm(x: &Tensor, planes: Planes, norm: &SpatialNorm<'_>, boxes: Boxes) -> Result<Tensor> {
    let [weight, bias] = [norm.weight, norm.bias].map(|of| vector("spatial_norm", x, planes, of));
    let [factor, term] = [norm.factor, norm.term].map(|of| of.to_dtype(x.dtype())?.contiguous());
    let (weight, bias, factor, term) = (weight?, bias?, factor?, term?);
    let x = aligned(x)?;
    let cut = Cut::new(&x, planes, norm.num_groups)?;
    let y = output(x.shape(), x.dtype(), &x)?;
    let partials = cut.statistics(&x)?;
    let ([frames, rows, columns], [small_frames, small_rows, small_columns]) = (boxes.large, boxes.small);
    let lead = boxes.lead();
    Launch::new(&GROUP_NORM, by_dtype!("spatial_norm", x.dtype()), [cut.blocks(), 1, 1], THREADS)?
        .tensor(&x)?
        .tensor(&partials)?
        .tensor(&weight)?
        .tensor(&bias)?
        .tensor(&factor)?
        .tensor(&term)?
        .tensor(&y)?
        .i64(cut.len)
        .i64(cut.span)
        .i64(cut.parts)
        .i64(planes.positions)
        .i64(norm.num_groups)
        .i32(rows as i32)
        .i32(columns as i32)
        .i32(lead as i32)
        .i32(small_frames as i32)
        .i32(small_rows as i32)
        .i32(small_columns as i32)
        .i32(((frames - lead) / (small_frames - lead)) as i32)
        .f32(norm.eps as f32)
        .i32(cut.vector)
        .run(&x)?;
    Ok(y)
}

pub(super) fn rms_norm_channels(x: &Tensor, planes: Planes, weight: &Tensor, then: Then) -> Result<Tensor> {
    let weight = vector("rms_norm_channels", x, planes, weight)?;
    let x = aligned(x)?;
    let y = output(x.shape(), x.dtype(), &x)?;
    let pack = 16 / x.dtype().size_in_bytes();
    let lines = if planes.channels == 0 { 0 } else { planes.positions.div_ceil(pack * LINE_THREADS) };
    Launch::new(&GROUP_NORM, by_dtype!("rms_norm_channels", x.dtype()), [lines, planes.batch, 1], THREADS)?
        .tensor(&x)?
        .tensor(&weight)?
        .tensor(&y)?
        .i64(planes.channels)
        .i64(planes.positions)
        .i32(i32::from(then == Then::Silu))
        .i32(i32::from(planes.positions.is_multiple_of(pack)))
        .run(&x)?;
    Ok(y)
}

/// How the groups of all batch rows are cut into blocks.
struct Cut {
    groups: usize,
    /// Values of a group.
    len: usize,
    /// Values of a part: whole rounds of a block, so that all parts but the last begin aligned if the group does.
    span: usize,
    parts: usize,
    vector: i32,
}

impl Cut {
    fn new(x: &Tensor, planes: Planes, num_groups: usize) -> Result<Self> {
        let pack = 16 / x.dtype().size_in_bytes();
        let (groups, len) = (planes.batch * num_groups, planes.channels / num_groups * planes.positions);
        // A block merges one part per thread.
        let most_parts = (MAX_WAVES_BLOCKS / groups.max(1)).clamp(1, THREADS);
        let span = len.div_ceil(most_parts).next_multiple_of(THREADS * STATS_PACKS * pack);
        if planes.positions + span > u32::MAX as usize {
            bail!("group_norm: {:?} has more positions than its kernel counts", x.shape());
        }
        Ok(Self { groups, len, span, parts: len.div_ceil(span), vector: i32::from(len % pack == 0) })
    }

    fn blocks(&self) -> usize {
        self.groups * self.parts
    }

    /// Of each part its count, mean and sum of squared differences.
    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        let partials = output((self.blocks(), 3), DType::F32, x)?;
        Launch::new(&GROUP_NORM, by_dtype!("group_stats", x.dtype()), [self.blocks(), 1, 1], THREADS)?
            .tensor(x)?
            .tensor(&partials)?
            .i64(self.len)
            .i64(self.span)
            .i64(self.parts)
            .i32(self.vector)
            .run(x)?;
        Ok(partials)
    }
}

/// Contiguous, from an address that packs may be read at. A fresh tensor is so; a view may begin anywhere.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    if address(&x)? % 16 == 0 { Ok(x) } else { x.force_contiguous() }
}

/// A factor or term of each channel, in the dtype of x.
fn vector(op: &str, x: &Tensor, planes: Planes, vector: &Tensor) -> Result<Tensor> {
    if vector.dims() != [planes.channels] {
        bail!("{op}: weights must have shape [{}], got {:?}", planes.channels, vector.shape());
    }
    vector.to_dtype(x.dtype())?.contiguous()
}
