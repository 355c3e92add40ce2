//! The register of a network's layers that take terms, and what kind of layer each is.
//!
//! Owns: the register. Does not know: files, and what is added.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::slot::Slot;

/// What a layer's own weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LayerShape {
    Linear {
        in_features: usize,
        out_features: usize,
    },
    Conv2d {
        in_channels: usize,
        out_channels: usize,
        kernel: usize,
    },
    /// A matrix over the values of space-time patches, in files a convolution of three dimensions.
    Patches {
        /// Those of the input.
        channels: usize,
        /// The first of them, which a network of the same family has that takes no pictures.
        bare_channels: usize,
        /// Frames, rows, columns.
        patch: [usize; 3],
        out_features: usize,
    },
    /// A vector of factors, and perhaps one of what is added.
    Norm {
        dim: usize,
        has_bias: bool,
    },
    /// A tensor that something is added to.
    Table {
        dims: [usize; 3],
    },
}

impl LayerShape {
    /// Columns of the weight, taken as a matrix of one row per output.
    pub fn inputs(&self) -> usize {
        match self {
            Self::Linear { in_features, .. } => *in_features,
            Self::Conv2d { in_channels, .. } => *in_channels,
            Self::Patches { channels, patch, .. } => channels * patch.iter().product::<usize>(),
            Self::Norm { .. } => 1,
            Self::Table { dims: [_, rows, columns] } => rows * columns,
        }
    }

    /// Rows of the weight.
    pub fn outputs(&self) -> usize {
        match self {
            Self::Linear { out_features, .. } | Self::Patches { out_features, .. } => *out_features,
            Self::Conv2d { out_channels, .. } => *out_channels,
            Self::Norm { dim, .. } => *dim,
            Self::Table { dims: [first, ..] } => *first,
        }
    }

    /// Whether something is multiplied with the weight as with a matrix.
    pub(super) fn is_product(&self) -> bool {
        !matches!(self, Self::Norm { .. } | Self::Table { .. })
    }

    /// Whether there is something to which a difference of a bias is added.
    pub(super) fn takes_bias(&self) -> bool {
        self.is_product() || matches!(self, Self::Norm { has_bias: true, .. })
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
