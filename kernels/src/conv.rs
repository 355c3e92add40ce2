//! Convolutions of pictures and clips.
//!
//! Owns: which results there are, and which value of a picture or of past frames each of them reads. How they are
//! computed is a matter of the device: `cpu.rs`, and `conv.cu` on GPUs. Every result is one chain of sums in an order that
//! depends on the kernel alone, so that a picture has the same bits alone and in a batch.

use candle_core::{Result, Tensor, bail};

#[cfg(gpu)]
use crate::gpu;
use crate::work::{self, Work};

mod cpu;
#[cfg(gpu)]
mod launch;

/// How a convolution walks over a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvOptions {
    /// Zeros before the first and after the last row, and as many before the first and after the last column.
    pub padding: [usize; 2],
    /// Distance between the places of two results, down and across.
    pub stride: usize,
    /// How often every row and column is repeated before all else: 1, or 2 for nearest-neighbour upsampling.
    pub upsample: usize,
}

impl Default for ConvOptions {
    fn default() -> Self {
        Self { padding: [0, 0], stride: 1, upsample: 1 }
    }
}

impl ConvOptions {
    /// Every place of a picture that has `padding` zeros on all four sides.
    pub fn padded(padding: usize) -> Self {
        Self { padding: [padding, padding], ..Self::default() }
    }
}

/// What a causal convolution sees where there is nothing to see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CausalPadding {
    /// Zeros before the first frame and around every frame (diffusers `WanCausalConv3d`).
    Zeros,
    /// The first frame again before it, zeros around every frame (diffusers `CogVideoXCausalConv3d`).
    FirstFrame,
    /// The nearest value of the clip, in time and in space (diffusers `HunyuanVideoCausalConv3d`).
    Replicate,
}

/// How a causal convolution walks over a clip. In space it pads half of its kernel on every side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CausalOptions {
    /// What stands around the clip.
    pub padding: CausalPadding,
    /// Distance between two results: in frames, and in rows and columns.
    pub stride: [usize; 2],
    /// As in [`ConvOptions`]; frames are not repeated.
    pub upsample: usize,
}

impl CausalOptions {
    /// Every place of the clip.
    pub fn new(padding: CausalPadding) -> Self {
        Self { padding, stride: [1, 1], upsample: 1 }
    }
}

/// `x [b, in, h, w]`, `weight [out, in, kh, kw]`, `bias [out]` to `[b, out, h', w']`.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, options: ConvOptions) -> Result<Tensor> {
    if x.rank() != 4 || weight.rank() != 4 {
        bail!("conv2d: x {:?} and weight {:?} must have 4 dimensions", x.shape(), weight.shape());
    }
    let operands = Operands { x: &x.unsqueeze(2)?, past: None, weight: &weight.unsqueeze(2)?, bias };
    convolve("conv2d", &operands, &Shape::plain("conv2d", &operands, options)?)?.squeeze(2)
}

/// `x [b, in, t, h, w]`, `weight [out, in, kt, kh, kw]`, `bias [out]`, options in space; without padding and stride in
/// time: `[b, out, t - kt + 1, h', w']`.
pub fn conv3d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, options: ConvOptions) -> Result<Tensor> {
    let operands = Operands { x, past: None, weight, bias };
    convolve("conv3d", &operands, &Shape::plain("conv3d", &operands, options)?)
}

/// `x [b, in, t, h, w]`, `weight [out, in, kt, kh, kw]`, `bias [out]` to `[b, out, t', h', w']`: a result sees the frame at
/// its place and the `kt - 1` before it. `past [b, in, p, h, w]` are the frames before x, oldest first; where there are
/// fewer than `kt - 1`, its first frame is the first of the clip.
pub fn causal_conv3d(
    x: &Tensor,
    past: Option<&Tensor>,
    weight: &Tensor,
    bias: Option<&Tensor>,
    options: CausalOptions,
) -> Result<Tensor> {
    let operands = Operands { x, past, weight, bias };
    convolve("causal_conv3d", &operands, &Shape::causal("causal_conv3d", &operands, options)?)
}

/// A convolution's weight as its device reads it fastest, to be kept instead of it: the same values in the same shape,
/// `[out, in, kh, kw]` or `[out, in, kt, kh, kw]`, in another order in memory on a GPU. Every other order is changed to
/// this one at each call.
pub fn conv_weight(weight: &Tensor) -> Result<Tensor> {
    #[cfg(gpu)]
    if gpu::runs_here(weight) {
        return match weight.rank() {
            4 => launch::laid_out(&weight.unsqueeze(2)?)?.squeeze(2),
            _ => launch::laid_out(weight),
        };
    }
    Ok(weight.clone())
}

/// What a convolution reads: x and past with five dimensions, and its weight.
struct Operands<'a> {
    x: &'a Tensor,
    past: Option<&'a Tensor>,
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
}

fn convolve(op: &'static str, operands: &Operands<'_>, shape: &Shape) -> Result<Tensor> {
    if let Some(bias) = operands.bias
        && bias.dims() != [shape.out]
    {
        bail!("{op}: bias must have shape [{}], got {:?}", shape.out, bias.shape());
    }
    work::add_dense(|| Work {
        flops: work::product_flops(shape.result().iter().product(), shape.inner * shape.taps()),
        bytes: work::weight_bytes(operands.weight, operands.bias) as f64,
    });
    if work::is_dry() {
        return work::zeros(&shape.result()[..], operands.x);
    }
    #[cfg(gpu)]
    if gpu::runs_here(operands.x) {
        return launch::convolve(op, operands, shape);
    }
    cpu::convolve(op, operands, shape)
}

/// Sizes of a convolution, and where its results read. A picture is a clip of one frame.
#[derive(Debug, Clone, Copy)]
struct Shape {
    b: usize,
    inner: usize,
    out: usize,
    /// Frames of x, and of the past before it.
    t: usize,
    past: usize,
    h: usize,
    w: usize,
    kt: usize,
    kh: usize,
    kw: usize,
    /// Distance between results in time and in space.
    stride_t: usize,
    stride: usize,
    /// Frames that the first result sees before the first of x.
    lead: usize,
    /// Rows and columns of padding before the first one, and after the last one.
    before: [usize; 2],
    after: [usize; 2],
    upsample: usize,
    padding: CausalPadding,
}

/// A frame that a result sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Frame {
    Zeros,
    OfX(usize),
    OfPast(usize),
}

impl Shape {
    fn plain(op: &str, operands: &Operands<'_>, options: ConvOptions) -> Result<Self> {
        let [before, after] = options.padding.map(|rows| [rows, rows]);
        let (stride, upsample) = (options.stride, options.upsample);
        Self { stride, upsample, before, after, ..Self::unpadded(operands)? }.checked(op, operands)
    }

    fn causal(op: &str, operands: &Operands<'_>, options: CausalOptions) -> Result<Self> {
        let shape = Self::unpadded(operands)?;
        let half = [shape.kh / 2, shape.kw / 2];
        let [stride_t, stride] = options.stride;
        let (upsample, padding, lead) = (options.upsample, options.padding, shape.kt.max(1) - 1);
        Self { stride_t, stride, upsample, padding, lead, before: half, after: half, ..shape }.checked(op, operands)
    }

    fn unpadded(operands: &Operands<'_>) -> Result<Self> {
        let ((b, inner, t, h, w), (out, _, kt, kh, kw)) = (operands.x.dims5()?, operands.weight.dims5()?);
        let past = operands.past.map_or(Ok(0), |past| past.dim(2))?;
        let (nothing, padding) = ([0, 0], CausalPadding::Zeros);
        let (stride_t, stride, upsample, lead) = (1, 1, 1, 0);
        let (before, after) = (nothing, nothing);
        Ok(Self { b, inner, out, t, past, h, w, kt, kh, kw, stride_t, stride, lead, before, after, upsample, padding })
    }

    fn checked(self, op: &str, operands: &Operands<'_>) -> Result<Self> {
        let Self { b, inner, h, w, kt, kh, kw, upsample, .. } = self;
        let [padded_h, padded_w] = self.padded();
        let covers = kt <= self.t + self.lead && kh <= padded_h && kw <= padded_w;
        if operands.weight.dim(1)? != inner || !covers || kt * kh * kw == 0 || h * w == 0 {
            let (x, weight, padding) = (operands.x.shape(), operands.weight.shape(), [self.before, self.after]);
            bail!("{op}: x {x:?} with padding {padding:?} does not fit weight {weight:?}");
        }
        if self.stride_t * self.stride == 0 || !(1..=2).contains(&upsample) {
            bail!("{op}: strides are at least 1 and pictures upsampled 1 or 2 times, not {upsample}");
        }
        if let Some(past) = operands.past
            && (past.dims() != [b, inner, self.past, h, w] || past.dtype() != operands.x.dtype())
        {
            bail!("{op}: the past {:?} does not fit x {:?}", past.shape(), operands.x.shape());
        }
        Ok(self)
    }

    /// Rows and columns as the kernel sees them.
    fn padded(&self) -> [usize; 2] {
        let [top, left] = self.before;
        let [bottom, right] = self.after;
        [self.h * self.upsample + top + bottom, self.w * self.upsample + left + right]
    }

    fn frames_out(&self) -> usize {
        (self.t + self.lead - self.kt) / self.stride_t + 1
    }

    fn h_out(&self) -> usize {
        (self.padded()[0] - self.kh) / self.stride + 1
    }

    fn w_out(&self) -> usize {
        (self.padded()[1] - self.kw) / self.stride + 1
    }

    /// `[b, out, t', h', w']`.
    fn result(&self) -> [usize; 5] {
        [self.b, self.out, self.frames_out(), self.h_out(), self.w_out()]
    }

    fn taps(&self) -> usize {
        self.kt * self.kh * self.kw
    }

    /// What tap `dt` of result `frame` sees.
    fn frame(&self, frame: usize, dt: usize) -> Frame {
        let place = frame * self.stride_t + dt;
        match (place.checked_sub(self.lead), (place + self.past).checked_sub(self.lead)) {
            (Some(of_x), _) => Frame::OfX(of_x),
            (None, Some(of_past)) => Frame::OfPast(of_past),
            (None, None) if self.padding == CausalPadding::Zeros => Frame::Zeros,
            (None, None) if self.past > 0 => Frame::OfPast(0),
            (None, None) => Frame::OfX(0),
        }
    }

    /// The row (axis 0) or column (axis 1) of the picture at `padded`; `None` among zeros.
    fn place(&self, axis: usize, padded: usize) -> Option<usize> {
        let len = [self.h, self.w][axis] * self.upsample;
        let place = match padded.checked_sub(self.before[axis]) {
            Some(place) if place < len => place,
            _ if self.padding != CausalPadding::Replicate => return None,
            Some(_) => len - 1,
            None => 0,
        };
        Some(place / self.upsample)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{On, assert_close, bits, for_each_device, random, threads};

    mod oracle {
        use super::*;

        /// Everything written out: frames before, upsampling, padding, then one frame's products after the other.
        pub(super) fn convolve(operands: &Operands<'_>, shape: &Shape) -> Result<Tensor> {
            let clip = edges(&upsampled(&whole_clip(operands, shape)?, shape.upsample)?, shape)?;
            let mut frames = Vec::new();
            for frame in 0..shape.frames_out() {
                let mut sum: Option<Tensor> = None;
                for dt in 0..shape.kt {
                    let seen = clip.narrow(2, frame * shape.stride_t + dt, 1)?.squeeze(2)?.contiguous()?;
                    let kernel = operands.weight.narrow(2, dt, 1)?.squeeze(2)?.contiguous()?;
                    let y = seen.conv2d(&kernel, 0, shape.stride, 1, 1)?;
                    sum = Some(match sum {
                        Some(sum) => (sum + y)?,
                        None => y,
                    });
                }
                frames.extend(sum);
            }
            let y = Tensor::stack(&frames, 2)?;
            match operands.bias {
                Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1, 1))?),
                None => Ok(y),
            }
        }

        /// Past frames and those that stand for frames before the clip, then x.
        fn whole_clip(operands: &Operands<'_>, shape: &Shape) -> Result<Tensor> {
            let clip = match operands.past {
                Some(past) => Tensor::cat(&[past, operands.x], 2)?,
                None => operands.x.clone(),
            };
            let missing = shape.lead.saturating_sub(shape.past);
            let clip = clip.narrow(2, shape.past.saturating_sub(shape.lead), shape.t + shape.past.min(shape.lead))?;
            match shape.padding {
                CausalPadding::Zeros => clip.pad_with_zeros(2, missing, 0),
                CausalPadding::FirstFrame | CausalPadding::Replicate => clip.pad_with_same(2, missing, 0),
            }
        }

        fn upsampled(x: &Tensor, times: usize) -> Result<Tensor> {
            let (b, c, t, h, w) = x.dims5()?;
            let frames = x.transpose(1, 2)?.contiguous()?.reshape((b * t, c, h, w))?;
            let frames = frames.upsample_nearest2d(times * h, times * w)?;
            frames.reshape((b, t, c, times * h, times * w))?.transpose(1, 2)?.contiguous()
        }

        fn edges(x: &Tensor, shape: &Shape) -> Result<Tensor> {
            let ([top, left], [bottom, right]) = (shape.before, shape.after);
            match shape.padding {
                CausalPadding::Replicate => x.pad_with_same(3, top, bottom)?.pad_with_same(4, left, right),
                _ => x.pad_with_zeros(3, top, bottom)?.pad_with_zeros(4, left, right),
            }
        }
    }

    fn expected_conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, options: ConvOptions) -> Tensor {
        let operands =
            Operands { x: &x.unsqueeze(2).unwrap(), past: None, weight: &weight.unsqueeze(2).unwrap(), bias };
        let shape = Shape::plain("conv2d", &operands, options).unwrap();
        oracle::convolve(&operands, &shape).unwrap().squeeze(2).unwrap()
    }

    fn expected_causal(operands: &Operands<'_>, options: CausalOptions) -> Tensor {
        oracle::convolve(operands, &Shape::causal("causal_conv3d", operands, options).unwrap()).unwrap()
    }

    /// [b, in, h, w], [out, kh, kw] and how: one value; odd sizes over several tiles; channels past a slab and past a
    /// block of results; every stride and padding of the networks, with and without upsampling.
    const PICTURES: [([usize; 4], [usize; 3], ConvOptions); 10] = [
        ([1, 1, 1, 1], [1, 1, 1], ConvOptions { padding: [0, 0], stride: 1, upsample: 1 }),
        ([2, 5, 9, 17], [3, 3, 3], ConvOptions { padding: [1, 1], stride: 1, upsample: 1 }),
        ([1, 37, 5, 18], [40, 1, 1], ConvOptions { padding: [0, 0], stride: 1, upsample: 1 }),
        ([1, 70, 8, 16], [33, 3, 3], ConvOptions { padding: [1, 1], stride: 1, upsample: 1 }),
        ([1, 16, 9, 7], [100, 3, 3], ConvOptions { padding: [1, 1], stride: 1, upsample: 1 }),
        ([1, 8, 3, 3], [130, 2, 3], ConvOptions { padding: [1, 1], stride: 1, upsample: 1 }),
        ([2, 12, 17, 21], [20, 3, 3], ConvOptions { padding: [1, 1], stride: 2, upsample: 1 }),
        ([1, 9, 18, 34], [34, 3, 3], ConvOptions { padding: [0, 1], stride: 2, upsample: 1 }),
        ([1, 35, 5, 9], [33, 3, 3], ConvOptions { padding: [1, 1], stride: 1, upsample: 2 }),
        ([1, 3, 6, 5], [2, 5, 4], ConvOptions { padding: [3, 2], stride: 2, upsample: 2 }),
    ];

    for_each_device!(pictures_equal_their_specification, |on: &On| {
        for ([b, inner, h, w], [out, kh, kw], options) in PICTURES {
            let (x, weight, bias) = (random(&[b, inner, h, w], 1), random(&[out, inner, kh, kw], 2), random(&[out], 3));
            let (x32, weight32, bias32) = (on.rounded(&x), on.rounded(&weight), on.rounded(&bias));
            let expected = expected_conv2d(&x32, &weight32, Some(&bias32), options);
            let (x, weight, bias) = (on.tensor(&x), on.tensor(&weight), on.tensor(&bias));
            let found = on.run(|| conv2d(&x, &weight, Some(&bias), options));
            on.assert_close(&found, &expected, inner * kh * kw);
            let kept = on.run(|| conv_weight(&weight));
            assert_eq!(bits(&kept), bits(&weight));
            let again = on.run(|| conv2d(&x, &kept, Some(&bias), options));
            assert_eq!(bits(&again), bits(&found), "the weight is read by its strides");
        }
    });

    /// Channels in and out, kernel, strides, upsampling; and past frames: none, the first one only, all that the kernel
    /// sees, more.
    type Clip = ([usize; 2], [usize; 3], [usize; 2], usize, &'static [usize]);
    const CLIPS: [Clip; 5] = [
        ([5, 7], [3, 3, 3], [1, 1], 1, &[0, 1, 2, 3]),
        ([40, 34], [3, 3, 3], [1, 1], 1, &[1]),
        ([33, 40], [3, 1, 1], [1, 1], 1, &[0, 1, 2]),
        ([4, 3], [3, 3, 3], [2, 2], 1, &[0, 2]),
        ([4, 33], [2, 3, 3], [1, 1], 2, &[0]),
    ];

    for_each_device!(clips_equal_their_specification, |on: &On| {
        for ([inner, out], [kt, kh, kw], stride, upsample, pasts) in CLIPS {
            for padding in [CausalPadding::Zeros, CausalPadding::FirstFrame, CausalPadding::Replicate] {
                for past in pasts.iter().copied() {
                    let options = CausalOptions { padding, stride, upsample };
                    let (x, weight) = (random(&[1, inner, 3, 5, 6], 1), random(&[out, inner, kt, kh, kw], 2));
                    let (past, bias) = ((past > 0).then(|| random(&[1, inner, past, 5, 6], 3)), random(&[out], 4));
                    let (x32, weight32, bias32) = (on.rounded(&x), on.rounded(&weight), on.rounded(&bias));
                    let past32 = past.as_ref().map(|past| on.rounded(past));
                    let operands = Operands { x: &x32, past: past32.as_ref(), weight: &weight32, bias: Some(&bias32) };
                    let expected = expected_causal(&operands, options);
                    let (x, weight, bias) = (on.tensor(&x), on.tensor(&weight), on.tensor(&bias));
                    let past = past.map(|past| on.tensor(&past));
                    let found = on.run(|| causal_conv3d(&x, past.as_ref(), &weight, Some(&bias), options));
                    on.assert_close(&found, &expected, inner * kt * kh * kw);
                }
            }
        }
    });

    for_each_device!(a_clip_in_chunks_is_the_clip_at_once, |on: &On| {
        let (x, weight) = (on.tensor(&random(&[2, 3, 5, 4, 9], 1)), on.tensor(&random(&[4, 3, 3, 3, 3], 2)));
        for padding in [CausalPadding::Zeros, CausalPadding::FirstFrame] {
            let options = CausalOptions::new(padding);
            let whole = on.run(|| causal_conv3d(&x, None, &weight, None, options));
            for first in [1, 2, 3] {
                let (past, rest) = (x.narrow(2, 0, first).unwrap(), x.narrow(2, first, 5 - first).unwrap());
                let head = on.run(|| causal_conv3d(&past, None, &weight, None, options));
                let tail = on.run(|| causal_conv3d(&rest, Some(&past), &weight, None, options));
                assert_eq!(bits(&Tensor::cat(&[head, tail], 2).unwrap()), bits(&whole));
            }
        }
    });

    for_each_device!(clips_without_causality_see_only_their_frames, |on: &On| {
        let (x, weight) = (random(&[2, 9, 4, 6, 5], 1), random(&[5, 9, 3, 3, 3], 2));
        let (x32, weight32) = (on.rounded(&x), on.rounded(&weight));
        let operands = Operands { x: &x32, past: None, weight: &weight32, bias: None };
        let shape = Shape::plain("conv3d", &operands, ConvOptions::padded(1)).unwrap();
        let expected = oracle::convolve(&operands, &shape).unwrap();
        assert_eq!(expected.dims(), [2, 5, 2, 6, 5]);
        let (x, weight) = (on.tensor(&x), on.tensor(&weight));
        on.assert_close(&on.run(|| conv3d(&x, &weight, None, ConvOptions::padded(1))), &expected, 243);
    });

    for_each_device!(strided_inputs_are_read_by_their_strides, |on: &On| {
        let (x, weight) = (random(&[2, 8, 7, 3], 1).permute((0, 3, 1, 2)).unwrap(), random(&[4, 3, 3, 3], 2));
        let expected = expected_conv2d(&on.rounded(&x), &on.rounded(&weight), None, ConvOptions::padded(1));
        let (x, weight) = (on.tensor(&x), on.tensor(&weight));
        on.assert_close(&on.run(|| conv2d(&x, &weight, None, ConvOptions::padded(1))), &expected, 27);
        // A part of wider tensors, from an odd place on.
        let (x, weight) = (random(&[1, 5, 4, 4], 1), random(&[4, 5, 3, 3], 2));
        let (x, weight) = (on.tensor(&x), on.tensor(&weight));
        let (x, weight) = (x.narrow(1, 1, 3).unwrap(), weight.narrow(1, 1, 3).unwrap());
        let f32s = |x: &Tensor| x.to_device(&candle_core::Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        let expected = expected_conv2d(&f32s(&x), &f32s(&weight), None, ConvOptions::padded(1));
        on.assert_close(&on.run(|| conv2d(&x, &weight, None, ConvOptions::padded(1))), &expected, 27);
    });

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn conv2d_equals_the_specification(
            (b, inner, out) in (1usize..3, 1usize..70, 1usize..20), (h, w) in (1usize..30, 1usize..30),
            (kh, kw) in (1usize..4, 1usize..4), padding in [0usize..3, 0usize..3], stride in 1usize..4,
            upsample in 1usize..3, biased: bool,
        ) {
            let pad: usize = padding.iter().sum();
            prop_assume!(kh <= upsample * h + pad && kw <= upsample * w + pad);
            let (x, weight, bias) = (random(&[b, inner, h, w], 1), random(&[out, inner, kh, kw], 2), random(&[out], 3));
            let bias = biased.then_some(&bias);
            let options = ConvOptions { padding, stride, upsample };
            let expected = expected_conv2d(&x, &weight, bias, options);
            assert_close(&conv2d(&x, &weight, bias, options).unwrap(), &expected, 5e-6);
        }

        #[test]
        fn causal_conv3d_equals_the_specification(
            (b, inner, out) in (1usize..3, 1usize..20, 1usize..20), (t, h, w) in (1usize..6, 1usize..14, 1usize..14),
            kt in 1usize..4, k in prop_oneof![Just(1usize), Just(3)], past in 0usize..4, stride in [1usize..3, 1usize..3],
            padding in prop_oneof![
                Just(CausalPadding::Zeros), Just(CausalPadding::FirstFrame), Just(CausalPadding::Replicate)
            ],
            upsample in 1usize..3,
        ) {
            let (x, weight) = (random(&[b, inner, t, h, w], 1), random(&[out, inner, kt, k, k], 2));
            let past = (past > 0).then(|| random(&[b, inner, past, h, w], 3));
            let options = CausalOptions { padding, stride, upsample };
            let operands = Operands { x: &x, past: past.as_ref(), weight: &weight, bias: None };
            let expected = expected_causal(&operands, options);
            let found = causal_conv3d(&x, past.as_ref(), &weight, None, options).unwrap();
            assert_close(&found, &expected, 5e-6);
        }
    }

    #[test]
    fn wide_pictures_and_many_channels_are_cut_into_tiles() {
        let options = ConvOptions::padded(1);
        let (x, weight, bias) = (random(&[1, 5, 9, 1100], 1), random(&[200, 5, 3, 3], 2), random(&[200], 3));
        let expected = expected_conv2d(&x, &weight, Some(&bias), options);
        let found = threads(2, || conv2d(&x, &weight, Some(&bias), options).unwrap());
        assert_close(&found, &expected, 5e-6);
        assert_eq!(bits(&threads(1, || conv2d(&x, &weight, Some(&bias), options).unwrap())), bits(&found));
        let (x, weight) = (random(&[1, 130, 70, 40], 1), random(&[8, 130, 3, 3], 2));
        let expected = expected_conv2d(&x, &weight, None, options);
        assert_close(&conv2d(&x, &weight, None, options).unwrap(), &expected, 5e-6);
    }

    #[test]
    fn misfits_name_the_operation_and_both_shapes() {
        let error = |result: Result<Tensor>| result.unwrap_err().to_string();
        let found = error(conv2d(&random(&[1, 3, 4, 4], 1), &random(&[2, 5, 3, 3], 1), None, ConvOptions::padded(1)));
        assert!(
            found.contains("conv2d") && found.contains("[1, 3, 1, 4, 4]") && found.contains("[2, 5, 1, 3, 3]"),
            "{found}"
        );
        let (x, weight) = (random(&[1, 3, 2, 4, 4], 1), random(&[2, 3, 3, 3, 3], 1));
        let found = error(conv3d(&x, &weight, None, ConvOptions::padded(1)));
        assert!(found.contains("conv3d") && found.contains("[2, 3, 3, 3, 3]"), "{found}");
        let options = CausalOptions::new(CausalPadding::Zeros);
        let found = error(causal_conv3d(&x, Some(&random(&[1, 3, 2, 4, 5], 1)), &weight, None, options));
        assert!(found.contains("causal_conv3d: the past [1, 3, 2, 4, 5]"), "{found}");
        let found = error(causal_conv3d(&x, None, &weight, Some(&random(&[3], 1)), options));
        assert!(found.contains("causal_conv3d: bias must have shape [2], got [3]"), "{found}");
        let (x, options) = (random(&[1, 3, 3, 4, 4], 1), ConvOptions { upsample: 3, ..ConvOptions::padded(1) });
        let found = error(conv3d(&x, &weight, None, options));
        assert!(found.contains("conv3d") && found.contains("upsampled 1 or 2 times, not 3"), "{found}");
    }
}
