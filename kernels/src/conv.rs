//! Convolutions and upsampling of the VAEs.

use candle_core::{Result, Tensor};

/// `x [b, in, h, w]`, `weight [out, in, kh, kw]`, `bias [out]`, stride 1, zero padding on all four sides.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, padding: usize) -> Result<Tensor> {
    let y = x.contiguous()?.conv2d(weight, padding, 1, 1, 1)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
        None => Ok(y),
    }
}

/// `x [b, in, t, h, w]`, `weight [out, in, kt, kh, kw]`, `bias [out]`, stride 1, zero padding in space, none in time:
/// `[b, out, t - kt + 1, h', w']`.
pub fn conv3d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, padding: usize) -> Result<Tensor> {
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

/// Nearest-neighbour upsampling by 2 of `x [b, c, h, w]`.
pub fn upsample_nearest2d(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    x.upsample_nearest2d(h * 2, w * 2)
}
