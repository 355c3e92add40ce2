//! The CLIP vision encoder: a picture to the hidden states of its patches, and to one projected vector.
//!
//! Owns: patches, positions, the transformer, and the projection of the class token. Does not know: files, resizing.
//! Source: transformers `models/clip/modeling_clip.py`, `CLIPVisionModel` and `CLIPVisionModelWithProjection`. Shapes: `b`
//! pictures, `n` patches.

use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::config::bounds::{MAX_HEADS, MAX_INNER_WIDTH, MAX_LAYERS, MAX_PATCH, MAX_SIDE, MAX_WIDTH};
use crate::config::{Bound, Bounded, Fields};
use crate::encoders::clip_layer::{ClipActivation, ClipLayer, ClipLayerConfig};
use crate::error::{Error, Result};
use crate::layers::{LayerNorm, Linear};
use crate::weights::Weights;

mod original;

use original::VisualNames;

/// Most patches of a picture. Published are 1,025 at most.
const MAX_PATCHES: usize = 1 << 16;
/// Red, green and blue.
const CHANNELS: usize = 3;

/// `config.json` of a CLIP vision encoder. Defaults are those of transformers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct ClipVisionConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_channels: usize,
    pub image_size: usize,
    pub patch_size: usize,
    pub hidden_act: ClipActivation,
    pub layer_norm_eps: f64,
    /// Width of `image_embeds`, where a projection is asked for.
    pub projection_dim: usize,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: CHANNELS,
            image_size: 224,
            patch_size: 32,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            projection_dim: 512,
        }
    }
}

impl Bounded for ClipVisionConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("hidden_size", MAX_WIDTH),
        Bound::size("intermediate_size", MAX_INNER_WIDTH),
        Bound::size("num_hidden_layers", MAX_LAYERS),
        Bound::size("num_attention_heads", MAX_HEADS),
        Bound::size("image_size", MAX_SIDE),
        Bound::size("patch_size", MAX_PATCH),
        Bound::eps("layer_norm_eps"),
        Bound::size("projection_dim", MAX_WIDTH),
    ];
}

impl ClipVisionConfig {
    /// Reads the file at `path`, where the configuration of a whole CLIP has that of its vision encoder as one field.
    pub fn read(fields: Fields) -> Result<Self> {
        let fields = fields.below("vision_config")?;
        let config: Self = fields.all()?;
        config.check(fields.path())?;
        Ok(config)
    }

    /// Refuses sizes that contradict each other. `path` is named in the error.
    fn check(&self, path: &Path) -> Result<()> {
        self.layer().check(path)?;
        let refuse = |problem: String| Err(Error::checkpoint(path, problem));
        let (image, patch) = (self.image_size, self.patch_size);
        if self.num_channels != CHANNELS {
            return refuse(format!("num_channels is {}; supported are {CHANNELS}", self.num_channels));
        }
        if patch > image || self.num_positions() > MAX_PATCHES {
            return refuse(format!(
                "image_size {image} and patch_size {patch} give no patches, or more than {MAX_PATCHES}"
            ));
        }
        Ok(())
    }

    /// Vectors of one picture: a class token and one per patch.
    pub fn num_positions(&self) -> usize {
        1 + self.patches_per_side().pow(2)
    }

    /// What is left at the right and below is not looked at.
    fn patches_per_side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Values of one patch.
    fn patch_values(&self) -> usize {
        CHANNELS * self.patch_size.pow(2)
    }

    fn layer(&self) -> ClipLayerConfig {
        ClipLayerConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_attention_heads: self.num_attention_heads,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
            causal: false,
        }
    }

    /// Bytes that one picture needs at its peak in `dtype`.
    pub fn forward_bytes(&self, dtype: DType) -> usize {
        let pixels = 2 * CHANNELS * self.image_size.pow(2) * DType::F32.size_in_bytes();
        pixels + self.layer().forward_bytes(self.num_positions(), dtype)
    }
}

/// A vision transformer with as many of its layers as its output needs.
#[derive(Debug, Clone)]
pub struct ClipVisionEncoder {
    config: ClipVisionConfig,
    compute_dtype: DType,
    /// `[hidden_size]`.
    class_embedding: Tensor,
    /// A convolution without overlap is a matrix: `[hidden_size, 3 * patch_size²]`.
    patch_embedding: Linear,
    /// `[num_positions, hidden_size]`.
    position_embedding: Tensor,
    /// Misspelt in the checkpoints.
    pre_layrnorm: LayerNorm,
    layers: Vec<ClipLayer>,
    /// Norm and projection of the class token, where `image_embeds` are asked for.
    head: Option<(LayerNorm, Linear)>,
}

impl ClipVisionEncoder {
    /// For [`ClipVisionEncoder::penultimate`]: tensors `embeddings.*`, `pre_layrnorm.*`, `encoder.layers.*` but the last
    /// layer, below `vision_model.` or bare, or under the names of Wan2.1's original. `config` has been checked.
    pub fn load(weights: &Weights, config: ClipVisionConfig) -> Result<Self> {
        let weights = &weights.clone().or_named(VisualNames);
        let model = vision_model(weights);
        let last = config.num_hidden_layers - 1;
        let encoder = Self::load_layers(&model, config, last)?;
        model.pp("encoder.layers").ignore_below(&last.to_string());
        model.ignore_below("post_layernorm");
        weights.ignore("visual_projection.weight");
        Ok(encoder)
    }

    /// For [`ClipVisionEncoder::image_embeds`]: all layers, `post_layernorm.*` and `visual_projection.weight`.
    pub fn load_with_projection(weights: &Weights, config: ClipVisionConfig) -> Result<Self> {
        let model = vision_model(weights);
        let (hidden, projected, eps) = (config.hidden_size, config.projection_dim, config.layer_norm_eps);
        let layers = config.num_hidden_layers;
        let encoder = Self::load_layers(&model, config, layers)?;
        let post_layernorm = LayerNorm::load(&model.pp("post_layernorm"), hidden, eps)?;
        let visual_projection = Linear::load_no_bias(&weights.pp("visual_projection"), hidden, projected)?;
        let head = Some((post_layernorm, visual_projection));
        Ok(Self { head, ..encoder })
    }

    fn load_layers(weights: &Weights, config: ClipVisionConfig, num_layers: usize) -> Result<Self> {
        let (hidden, patch) = (config.hidden_size, config.patch_size);
        let (embeddings, layers) = (weights.pp("embeddings"), weights.pp("encoder").pp("layers"));
        // Positions 0, 1, 2, ... as a buffer: old checkpoints carry it.
        embeddings.ignore("position_ids");
        let kernel = embeddings.pp("patch_embedding").get(&[hidden, CHANNELS, patch, patch], "weight")?;
        let positions = [config.num_positions(), hidden];
        Ok(Self {
            compute_dtype: weights.placement().compute_dtype,
            class_embedding: embeddings.get(&[hidden], "class_embedding")?,
            patch_embedding: Linear::new(kernel.reshape((hidden, config.patch_values()))?, None),
            position_embedding: embeddings.pp("position_embedding").get(&positions, "weight")?,
            pre_layrnorm: LayerNorm::load(&weights.pp("pre_layrnorm"), hidden, config.layer_norm_eps)?,
            layers: (0..num_layers)
                .map(|layer| ClipLayer::load(&layers.pp(layer), &config.layer()))
                .collect::<Result<_>>()?,
            head: None,
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ClipVisionConfig {
        &self.config
    }

    /// `image_embeds [b, projection_dim]` of `pixel_values [b, 3, image_size, image_size]` (f32), of an encoder that was
    /// loaded with its projection.
    pub fn image_embeds(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let (post_layernorm, visual_projection) =
            self.head.as_ref().expect("the encoder was loaded with its projection: this is a bug");
        let hidden_states = self.run(pixel_values, self.layers.len())?;
        let class = hidden_states.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?; // [b, hidden]
        visual_projection.forward(&post_layernorm.forward(&class)?)
    }

    /// `hidden_states[-2] [b, 1 + n, hidden_size]`: what the last but one layer leaves.
    pub fn penultimate(&self, pixel_values: &Tensor) -> Result<Tensor> {
        self.run(pixel_values, self.config.num_hidden_layers - 1)
    }

    fn run(&self, pixel_values: &Tensor, layers: usize) -> Result<Tensor> {
        let x = self.pre_layrnorm.forward(&self.embed(pixel_values)?)?;
        self.layers[..layers].iter().try_fold(x, |x, layer| layer.forward(&x))
    }

    /// `[b, 1 + n, hidden_size]`: the class token and the patches in rows, each with its position.
    fn embed(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let (b, hidden) = (pixel_values.dim(0)?, self.config.hidden_size);
        let patches = self.patch_embedding.forward(&self.patches(pixel_values)?)?;
        let class = self.class_embedding.reshape((1, 1, hidden))?.broadcast_as((b, 1, hidden))?;
        Ok(Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.position_embedding)?)
    }

    /// `[b, n, 3 * patch_size²]`: the values of each patch in the order of the kernel's.
    fn patches(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let (b, patch, side) = (pixel_values.dim(0)?, self.config.patch_size, self.config.patches_per_side());
        let seen = pixel_values.narrow(2, 0, side * patch)?.narrow(3, 0, side * patch)?.contiguous()?;
        let patches = seen.reshape(vec![b, CHANNELS, side, patch, side, patch])?.permute(vec![0, 2, 4, 1, 3, 5])?;
        Ok(patches.contiguous()?.reshape((b, side * side, self.config.patch_values()))?.to_dtype(self.compute_dtype)?)
    }
}

fn vision_model(weights: &Weights) -> Weights {
    if weights.contains_below("vision_model") { weights.pp("vision_model") } else { weights.clone() }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tale_kernels::work::{count, dry};

    use super::*;
    use crate::device::{DeviceSpec, Placement, WeightDtype};

    fn config(fields: Value) -> ClipVisionConfig {
        serde_json::from_value(fields).expect("the rest has defaults")
    }

    #[test]
    fn absent_fields_take_transformers_defaults() {
        let config = config(json!({}));
        assert_eq!((config.image_size, config.patch_size, config.num_positions()), (224, 32, 50));
        assert_eq!((config.hidden_act, config.projection_dim), (ClipActivation::QuickGelu, 512));
    }

    /// ViT-bigG/14 of 224 pixels: 257 positions, which its 48 layers take 0.97 TFLOP for.
    #[test]
    fn the_published_network_has_the_operations_of_its_size() {
        let config = config(json!({
            "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16,
            "patch_size": 14, "hidden_act": "gelu", "projection_dim": 1280,
        }));
        let placement = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
        let weights = Weights::dummy_dry(Path::new("image_encoder"), DType::F16, &placement);
        let encoder = ClipVisionEncoder::load_with_projection(&weights, config).expect("fits");
        let pixels = Tensor::zeros((1, CHANNELS, 224, 224), DType::F32, &placement.device).expect("zeros");
        let (embeds, counted) = count(|| dry(|| encoder.image_embeds(&pixels)));
        assert_eq!(embeds.expect("is counted").dims(), [1, 1280]);
        let flops = counted.total().flops;
        assert!((0.93e12..0.98e12).contains(&flops), "{flops}");
    }

    #[test]
    fn impossible_sizes_are_refused_by_name() {
        let check = |fields: Value, expected: &str| {
            let fields = Fields::of("config.json".into(), fields.to_string().as_bytes()).expect("an object");
            let error = ClipVisionConfig::read(fields).expect_err("is refused").to_string();
            assert!(error.contains(expected), "expected `{expected}` in: {error}");
        };
        check(json!({"num_channels": 4}), "num_channels is 4");
        check(json!({"patch_size": 0}), "patch_size: is 0");
        check(json!({"image_size": 16}), "image_size 16");
        check(json!({"image_size": 8000, "patch_size": 1}), "more than 65536");
        check(json!({"num_hidden_layers": 0}), "num_hidden_layers");
        check(json!({"num_attention_heads": 7}), "7 heads");
        check(json!({"projection_dim": 0}), "projection_dim: is 0");
    }
}
