//! Where a layer looks for what adapters add to it.
//!
//! Owns: how an answer or a weight changes by what is added. Does not know: where that comes from.

use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::Tensor;
use tale_kernels::{ConvOptions, conv2d, linear};

use crate::error::Result;

/// What adapters add to one layer.
#[derive(Debug, Clone, Default)]
pub struct Delta {
    /// To the result.
    pub low_rank: Option<LowRank>,
    /// To the weight: of a linear layer `[out, in]`, of a convolution as the layer keeps its own, otherwise in the shape
    /// of the weight.
    pub weight: Option<Scaled>,
    /// To the bias, `[out]`.
    pub bias: Option<Scaled>,
}

/// `scale · up(down(x))`.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, in]`, of a convolution `[rank, in, kernel, kernel]`.
    pub down: Tensor,
    /// `[out, rank]`, of a convolution `[out, rank, 1, 1]`.
    pub up: Tensor,
    /// What the inner vector is multiplied with.
    pub scale: f64,
}

/// `scale · values`.
#[derive(Debug, Clone)]
pub struct Scaled {
    /// See [`Delta`].
    pub values: Tensor,
    /// See [`Scaled`].
    pub scale: f64,
}

impl LowRank {
    /// `x [..., in]` to `[..., out]`.
    fn linear(&self, x: &Tensor) -> Result<Tensor> {
        // The inner vector is the smallest thing that can be scaled.
        Ok(linear(&scaled(linear(x, &self.down, None)?, self.scale)?, &self.up, None)?)
    }

    /// `x [b, in, h, w]` to `[b, out, h', w']`: the first convolution walks as the layer's own does.
    fn conv2d(&self, x: &Tensor, options: ConvOptions) -> Result<Tensor> {
        let inner = scaled(conv2d(x, &self.down, None, options)?, self.scale)?;
        Ok(conv2d(&inner, &self.up, None, ConvOptions::default())?)
    }
}

impl Scaled {
    /// The same with a scale of 1.
    pub fn applied(self) -> Result<Self> {
        Ok(Self { values: self.values()?, scale: 1.0 })
    }

    fn values(&self) -> Result<Tensor> {
        scaled(self.values.clone(), self.scale)
    }
}

fn scaled(x: Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 { Ok(x) } else { Ok((x * scale)?) }
}

/// One layer's place for a delta. The layer and the register share it; one thread drives a model, so that nobody ever
/// waits for the lock.
#[derive(Debug, Default)]
pub struct Slot(Mutex<Option<Arc<Delta>>>);

impl Slot {
    /// From now on the layer adds this, or nothing.
    pub fn set(&self, delta: Option<Arc<Delta>>) {
        *self.lock() = delta;
    }

    /// A linear layer's result `y [..., out]` for `x [..., in]`, with what is added.
    pub fn add_linear(&self, mut y: Tensor, x: &Tensor) -> Result<Tensor> {
        let Some(delta) = self.active() else { return Ok(y) };
        if let Some(low_rank) = &delta.low_rank {
            y = (y + low_rank.linear(x)?)?;
        }
        if let Some(weight) = &delta.weight {
            y = (y + scaled(linear(x, &weight.values, None)?, weight.scale)?)?;
        }
        if let Some(bias) = &delta.bias {
            y = y.broadcast_add(&bias.values()?)?;
        }
        Ok(y)
    }

    /// A convolution's result `y` for `x`, with what is added.
    pub fn add_conv2d(&self, mut y: Tensor, x: &Tensor, options: ConvOptions) -> Result<Tensor> {
        let Some(delta) = self.active() else { return Ok(y) };
        if let Some(low_rank) = &delta.low_rank {
            y = (y + low_rank.conv2d(x, options)?)?;
        }
        if let Some(weight) = &delta.weight {
            y = (y + scaled(conv2d(x, &weight.values, None, options)?, weight.scale)?)?;
        }
        if let Some(bias) = &delta.bias {
            y = y.broadcast_add(&bias.values()?.reshape((1, (), 1, 1))?)?;
        }
        Ok(y)
    }

    /// A norm's factors or a table, with what is added; a clone of `own` where nothing is.
    pub fn weight(&self, own: &Tensor) -> Result<Tensor> {
        self.sum(own, |delta| delta.weight.as_ref())
    }

    /// What a norm adds, with what is added to it.
    pub fn bias(&self, own: &Tensor) -> Result<Tensor> {
        self.sum(own, |delta| delta.bias.as_ref())
    }

    fn sum(&self, own: &Tensor, part: impl Fn(&Delta) -> Option<&Scaled>) -> Result<Tensor> {
        match self.active().as_deref().and_then(part) {
            Some(added) => Ok((own + added.values()?)?),
            None => Ok(own.clone()),
        }
    }

    fn active(&self) -> Option<Arc<Delta>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Delta>>> {
        self.0.lock().expect("no code panics while it holds a slot: this is a bug")
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use tale_kernels::conv_weight;

    use super::*;
    use crate::device::{DeviceSpec, Placement, WeightDtype};
    use crate::layers::{Conv2d, LayerNorm, Linear, RmsNorm};
    use crate::lora::{LayerShape, Sites};
    use crate::weights::Weights;

    fn tensor(dims: &[usize]) -> Tensor {
        Tensor::rand(-1f32, 1f32, dims, &Device::Cpu).expect("a tensor")
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().and_then(|x| x.to_vec1()).expect("values")
    }

    fn assert_close(found: &Tensor, expected: &Tensor) {
        assert_eq!(found.dims(), expected.dims());
        let off = values(found).iter().zip(values(expected)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-4, "off by {off}");
    }

    /// Weights with `layer.weight` and `layer.bias`, and their register.
    fn weights(weight: &Tensor, bias: &Tensor) -> (Weights, Arc<Sites>) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let tensors = std::collections::HashMap::from([("layer.weight", weight.clone()), ("layer.bias", bias.clone())]);
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).expect("save");
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
        let sites = Arc::default();
        (Weights::open(dir.path(), &placement).expect("open").noting(&sites), sites)
    }

    fn scaled(dims: &[usize], scale: f64) -> Scaled {
        Scaled { values: tensor(dims), scale }
    }

    /// What is added to the weight of a layer whose inputs have these dimensions, each part with a scale of its own.
    fn delta(out: usize, inner: &[usize]) -> Delta {
        let ones = vec![1; inner.len() - 1];
        Delta {
            low_rank: Some(LowRank {
                down: tensor(&[&[2], inner].concat()),
                up: tensor(&[&[out, 2], &ones[..]].concat()),
                scale: 0.5,
            }),
            weight: Some(scaled(&[&[out], inner].concat(), -0.75)),
            bias: Some(scaled(&[out], 1.5)),
        }
    }

    /// The weight and the bias with what is added.
    fn merged(weight: &Tensor, bias: &Tensor, delta: &Delta) -> (Tensor, Tensor) {
        let sums = || -> Result<(Tensor, Tensor)> {
            let (mut weight, mut bias) = (weight.clone(), bias.clone());
            if let Some(LowRank { down, up, scale }) = &delta.low_rank {
                let product = up.flatten_from(1)?.matmul(&down.flatten_from(1)?)?;
                weight = (&weight + (product * *scale)?.reshape(weight.shape())?)?;
            }
            if let Some(Scaled { values, scale }) = &delta.weight {
                weight = (weight + (values * *scale)?)?;
            }
            if let Some(Scaled { values, scale }) = &delta.bias {
                bias = (bias + (values * *scale)?)?;
            }
            Ok((weight, bias))
        };
        sums().expect("sums")
    }

    /// The delta, and each of its parts alone.
    fn parts(delta: &Delta) -> [Delta; 4] {
        let Delta { low_rank, weight, bias } = delta.clone();
        let none = Delta::default;
        [delta.clone(), Delta { low_rank, ..none() }, Delta { weight, ..none() }, Delta { bias, ..none() }]
    }

    #[test]
    fn a_linear_layer_with_a_delta_is_the_one_with_merged_weights() {
        let (weight, bias, x) = (tensor(&[7, 5]), tensor(&[7]), tensor(&[2, 3, 5]));
        let (weights, sites) = weights(&weight, &bias);
        let layer = Linear::load(&weights.pp("layer"), 5, 7).expect("a layer");
        let plain = layer.forward(&x).expect("a result");
        let slot = sites.slot("layer").expect("the layer has entered itself");
        let delta = delta(7, &[5]);
        for delta in parts(&delta) {
            slot.set(Some(Arc::new(delta.clone())));
            let (weight, bias) = merged(&weight, &bias, &delta);
            let expected = Linear::new(weight, Some(bias)).forward(&x).expect("a result");
            assert_close(&layer.clone().forward(&x).expect("a clone shares the slot"), &expected);
        }
        slot.set(None);
        assert_eq!(values(&layer.forward(&x).expect("a result")), values(&plain));
        // Loading it again finds the same slot.
        let again = Linear::load(&weights.pp("layer"), 5, 7).expect("a layer");
        let (weight, bias) = merged(&weight, &bias, &delta);
        slot.set(Some(Arc::new(delta)));
        let expected = Linear::new(weight, Some(bias)).forward(&x).expect("a result");
        assert_close(&again.forward(&x).expect("a result"), &expected);
    }

    #[test]
    fn a_convolution_with_a_delta_is_the_one_with_merged_weights() {
        let walks: [fn(Conv2d) -> Conv2d; 3] = [|conv| conv, Conv2d::halving, Conv2d::upsampling];
        for (kernel, padding) in [(1, 0), (3, 1)] {
            for walk in walks {
                let (weight, bias, x) = (tensor(&[6, 4, kernel, kernel]), tensor(&[6]), tensor(&[2, 4, 7, 5]));
                let load = |weight: &Tensor, bias: &Tensor| {
                    let (weights, sites) = weights(weight, bias);
                    (walk(Conv2d::load(&weights.pp("layer"), 4, 6, kernel, padding).expect("a layer")), sites)
                };
                let (layer, sites) = load(&weight, &bias);
                for delta in parts(&delta(6, &[4, kernel, kernel])) {
                    let (weight, bias) = merged(&weight, &bias, &delta);
                    let kept = |x: Tensor| conv_weight(&x).expect("a weight");
                    let placed = Delta {
                        low_rank: delta.low_rank.map(|low| LowRank { down: kept(low.down), up: kept(low.up), ..low }),
                        weight: delta.weight.map(|of| Scaled { values: kept(of.values), ..of }),
                        ..delta
                    };
                    sites.slot("layer").expect("the layer has entered itself").set(Some(Arc::new(placed)));
                    let expected = load(&weight, &bias).0.forward(&x).expect("a result");
                    assert_close(&layer.forward(&x).expect("a result"), &expected);
                }
            }
        }
    }

    #[test]
    fn norms_with_a_delta_are_those_with_other_weights() {
        let (weight, bias, x) = (tensor(&[5]), tensor(&[5]), tensor(&[2, 3, 5]));
        let delta = Delta { low_rank: None, weight: Some(scaled(&[5], 0.5)), bias: Some(scaled(&[5], -2.0)) };
        let norm = |weights: &Weights| {
            let (layer, root) = (LayerNorm::load(weights, 5, 1e-5), RmsNorm::load(weights, 5, 1e-5));
            (layer.expect("a norm"), root.expect("a norm"))
        };
        let (weights, sites) = weights(&weight, &bias);
        let (layer, _) = norm(&weights.pp("layer"));
        let plain = layer.forward(&x).expect("a result");
        let slot = sites.slot("layer").expect("the norm has entered itself");
        slot.set(Some(Arc::new(delta.clone())));
        let (weight, bias) = merged(&weight, &bias, &delta);
        let (others, _) = self::weights(&weight, &bias);
        let (expected_layer, expected_root) = norm(&others.pp("layer"));
        assert_close(&layer.forward(&x).expect("a result"), &expected_layer.forward(&x).expect("a result"));
        slot.set(None);
        assert_eq!(values(&layer.forward(&x).expect("a result")), values(&plain));

        let (weights, sites) = self::weights(&tensor(&[5]), &bias);
        let root = RmsNorm::load(&weights.pp("layer"), 5, 1e-5).expect("a norm");
        let own = weights.get(&[5], "layer.weight").expect("a vector");
        let to_the_other = Scaled { values: (&weight - own).expect("a difference"), scale: 1.0 };
        let delta = Delta { weight: Some(to_the_other), ..Delta::default() };
        sites.slot("layer").expect("the norm has entered itself").set(Some(Arc::new(delta)));
        assert_close(&root.forward(&x).expect("a result"), &expected_root.forward(&x).expect("a result"));
        let summed = root.forward_sum(&x, &x).expect("a result").1;
        assert_close(&summed, &expected_root.forward_sum(&x, &x).expect("a result").1);
    }

    #[test]
    fn networks_that_take_no_adapters_have_no_slots() {
        let (weights, sites) = weights(&tensor(&[2, 2]), &tensor(&[2]));
        let shape = LayerShape::Linear { in_features: 2, out_features: 2 };
        assert!(weights.pp("layer").slot(shape).is_some());
        assert_eq!(sites.layers(), [("layer".to_owned(), shape)]);
        let plain = Weights::dummy(std::path::Path::new("/nowhere"), DType::F32, weights.placement());
        assert!(plain.slot(shape).is_none());
    }
}
