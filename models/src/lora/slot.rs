//! Where a layer looks for its low-rank term, and the register of a network's layers that have such a place.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::Tensor;
use tale_kernels::{ConvOptions, conv2d, linear};

use crate::error::Result;

/// `scale · up(down(x))`, the term that adapters add to a layer's result.
#[derive(Debug, Clone)]
pub struct Delta {
    /// `[rank, in]`, of a convolution `[rank, in, kernel, kernel]`.
    pub down: Tensor,
    /// `[out, rank]`, of a convolution `[out, rank, 1, 1]`.
    pub up: Tensor,
    /// What the inner vector is multiplied with.
    pub scale: f64,
}

impl Delta {
    /// `x [..., in]` to `[..., out]`.
    fn linear(&self, x: &Tensor) -> Result<Tensor> {
        Ok(linear(&self.scaled(linear(x, &self.down, None)?)?, &self.up, None)?)
    }

    /// `x [b, in, h, w]` to `[b, out, h', w']`: the first convolution walks as the layer's own does.
    fn conv2d(&self, x: &Tensor, options: ConvOptions) -> Result<Tensor> {
        let inner = self.scaled(conv2d(x, &self.down, None, options)?)?;
        Ok(conv2d(&inner, &self.up, None, ConvOptions::default())?)
    }

    /// The inner vector is the smallest thing that can be scaled.
    fn scaled(&self, inner: Tensor) -> Result<Tensor> {
        if self.scale == 1.0 { Ok(inner) } else { Ok((inner * self.scale)?) }
    }
}

/// One layer's place for a term. The layer and the register share it; one thread drives a model, so that nobody ever
/// waits for the lock.
#[derive(Debug, Default)]
pub struct Slot(Mutex<Option<Arc<Delta>>>);

impl Slot {
    /// From now on the layer adds this term, or none.
    pub fn set(&self, delta: Option<Arc<Delta>>) {
        *self.lock() = delta;
    }

    /// A linear layer's result `y` for `x`, with the term.
    pub fn add_linear(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        match self.active() {
            Some(delta) => Ok((y + delta.linear(x)?)?),
            None => Ok(y),
        }
    }

    /// A convolution's result `y` for `x`, with the term.
    pub fn add_conv2d(&self, y: Tensor, x: &Tensor, options: ConvOptions) -> Result<Tensor> {
        match self.active() {
            Some(delta) => Ok((y + delta.conv2d(x, options)?)?),
            None => Ok(y),
        }
    }

    fn active(&self) -> Option<Arc<Delta>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Delta>>> {
        self.0.lock().expect("no code panics while it holds a slot: this is a bug")
    }
}

/// What a layer maps from and to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LayerShape {
    Linear { in_features: usize, out_features: usize },
    Conv2d { in_channels: usize, out_channels: usize, kernel: usize },
}

impl LayerShape {
    /// Columns of the weight, taken as a matrix of one row per output.
    pub fn inputs(&self) -> usize {
        match self {
            Self::Linear { in_features, .. } => *in_features,
            Self::Conv2d { in_channels, .. } => *in_channels,
        }
    }

    /// Rows of the weight.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Linear { out_features, .. } => *out_features,
            Self::Conv2d { out_channels, .. } => *out_channels,
        }
    }
}

/// The layers of one network that take terms, by the names of their tensors without `.weight`. Layers enter themselves
/// as they load ([`crate::weights::Weights::noting`]); one that loads again finds its slot again.
#[derive(Debug, Default)]
pub struct Sites(Mutex<BTreeMap<String, Site>>);

#[derive(Debug, Clone)]
struct Site {
    shape: LayerShape,
    slot: Arc<Slot>,
}

impl Sites {
    /// The slot of the layer with this name.
    pub fn enter(&self, layer: &str, shape: LayerShape) -> Arc<Slot> {
        let mut sites = self.lock();
        let site = sites.entry(layer.to_owned()).or_insert_with(|| Site { shape, slot: Arc::default() });
        site.slot.clone()
    }

    /// The slot of a layer, if there is such a layer.
    pub fn slot(&self, layer: &str) -> Option<Arc<Slot>> {
        self.lock().get(layer).map(|site| site.slot.clone())
    }

    /// All layers with their shapes, in the order of their names.
    pub fn layers(&self) -> Vec<(String, LayerShape)> {
        self.lock().iter().map(|(layer, site)| (layer.clone(), site.shape)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Site>> {
        self.0.lock().expect("no code panics while it holds the register: this is a bug")
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use tale_kernels::conv_weight;

    use super::*;
    use crate::device::{DeviceSpec, Placement, WeightDtype};
    use crate::layers::{Conv2d, Linear};
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

    /// `weight + 0.5 up down`, as matrices of one row per output.
    fn merged(weight: &Tensor, delta: &Delta) -> Tensor {
        let product = delta.up.flatten_from(1).and_then(|up| up.matmul(&delta.down.flatten_from(1)?));
        let product = product.and_then(|product| (product * delta.scale)?.reshape(weight.shape()));
        (weight + product.expect("a product")).expect("a sum")
    }

    #[test]
    fn a_linear_layer_with_a_term_is_the_one_with_merged_weights() {
        let (weight, bias, x) = (tensor(&[7, 5]), tensor(&[7]), tensor(&[2, 3, 5]));
        let (weights, sites) = weights(&weight, &bias);
        let layer = Linear::load(&weights.pp("layer"), 5, 7).expect("a layer");
        let plain = layer.forward(&x).expect("a result");
        let delta = Delta { down: tensor(&[2, 5]), up: tensor(&[7, 2]), scale: 0.5 };
        let slot = sites.slot("layer").expect("the layer has entered itself");
        slot.set(Some(Arc::new(delta.clone())));
        let expected = Linear::new(merged(&weight, &delta), Some(bias)).forward(&x).expect("a result");
        assert_close(&layer.clone().forward(&x).expect("a clone shares the slot"), &expected);
        slot.set(None);
        assert_eq!(values(&layer.forward(&x).expect("a result")), values(&plain));
        // Loading it again finds the same slot.
        let again = Linear::load(&weights.pp("layer"), 5, 7).expect("a layer");
        slot.set(Some(Arc::new(delta)));
        assert_close(&again.forward(&x).expect("a result"), &expected);
    }

    #[test]
    fn a_convolution_with_a_term_is_the_one_with_merged_weights() {
        let walks: [fn(Conv2d) -> Conv2d; 3] = [|conv| conv, Conv2d::halving, Conv2d::upsampling];
        for (kernel, padding) in [(1, 0), (3, 1)] {
            for walk in walks {
                let (weight, bias, x) = (tensor(&[6, 4, kernel, kernel]), tensor(&[6]), tensor(&[2, 4, 7, 5]));
                let load = |weight: &Tensor| {
                    let (weights, sites) = weights(weight, &bias);
                    (walk(Conv2d::load(&weights.pp("layer"), 4, 6, kernel, padding).expect("a layer")), sites)
                };
                let (layer, sites) = load(&weight);
                let down = conv_weight(&tensor(&[3, 4, kernel, kernel])).expect("a weight");
                let delta = Delta { down, up: tensor(&[6, 3, 1, 1]), scale: 0.5 };
                sites.slot("layer").expect("the layer has entered itself").set(Some(Arc::new(delta.clone())));
                let expected = load(&merged(&weight, &delta)).0.forward(&x).expect("a result");
                assert_close(&layer.forward(&x).expect("a result"), &expected);
            }
        }
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
