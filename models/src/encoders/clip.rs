//! The CLIP text encoder: token ids to hidden states of any layer and to the pooled vector.
//!
//! Owns: the causal text transformer and the projection behind its pooled vector. Does not know: tokenizers, padding.
//! Source: transformers `models/clip/modeling_clip.py`, `CLIPTextModel` and `CLIPTextModelWithProjection`.

use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::config::bounds::{MAX_HEADS, MAX_INNER_WIDTH, MAX_LAYERS, MAX_LEARNED_POSITIONS, MAX_VOCABULARY, MAX_WIDTH};
use crate::config::{Bound, Bounded, Fields};
use crate::encoders::clip_layer::{ClipActivation, ClipLayer, ClipLayerConfig};
use crate::error::{Error, Result};
use crate::layers::{Embedding, LayerNorm, Linear};
use crate::weights::Weights;

/// `config.json` of a CLIP text encoder. Defaults are those of transformers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct ClipTextConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    pub hidden_act: ClipActivation,
    pub layer_norm_eps: f64,
    pub eos_token_id: u32,
    /// Width of `text_embeds`, where a projection is asked for.
    pub projection_dim: usize,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49_408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49_407,
            projection_dim: 512,
        }
    }
}

impl Bounded for ClipTextConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("vocab_size", MAX_VOCABULARY),
        Bound::size("hidden_size", MAX_WIDTH),
        Bound::size("intermediate_size", MAX_INNER_WIDTH),
        Bound::whole("num_hidden_layers", 0, MAX_LAYERS),
        Bound::size("num_attention_heads", MAX_HEADS),
        // A prompt has a start, an end and at least one token between them.
        Bound::whole("max_position_embeddings", 3, MAX_LEARNED_POSITIONS),
        Bound::eps("layer_norm_eps"),
        Bound::whole("eos_token_id", 0, MAX_VOCABULARY),
        Bound::size("projection_dim", MAX_WIDTH),
    ];
}

impl ClipTextConfig {
    /// Reads the file at `path`, where the configuration of a whole CLIP has that of its text encoder as one field.
    pub fn read(fields: Fields) -> Result<Self> {
        let fields = fields.below("text_config")?;
        let config: Self = fields.all()?;
        config.check(fields.path())?;
        Ok(config)
    }

    /// Refuses sizes that contradict each other. `path` is named in the error.
    fn check(&self, path: &Path) -> Result<()> {
        self.layer().check(path)?;
        if self.eos_token_id as usize >= self.vocab_size {
            let problem = format!("eos_token_id: is {}; vocab_size is {}", self.eos_token_id, self.vocab_size);
            return Err(Error::checkpoint(path, problem));
        }
        Ok(())
    }

    /// Of each of its layers.
    fn layer(&self) -> ClipLayerConfig {
        ClipLayerConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_attention_heads: self.num_attention_heads,
            hidden_act: self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
            causal: true,
        }
    }

    /// Bytes that encoding `l` ids needs at its peak in `dtype`.
    pub fn forward_bytes(&self, l: usize, dtype: DType) -> usize {
        self.layer().forward_bytes(l, dtype)
    }
}

/// A text transformer whose layers are run as far as the caller wants.
#[derive(Debug, Clone)]
pub struct ClipTextEncoder {
    config: ClipTextConfig,
    token_embedding: Embedding,
    /// `[max_position_embeddings, hidden_size]`.
    position_embedding: Tensor,
    layers: Vec<ClipLayer>,
    final_layer_norm: LayerNorm,
    /// `[projection_dim, hidden_size]` of a `CLIPTextModelWithProjection`.
    text_projection: Option<Linear>,
}

impl ClipTextEncoder {
    /// As [`ClipTextEncoder::load`], with the projection `text_projection.*` of a `CLIPTextModelWithProjection`.
    pub fn load_with_projection(weights: &Weights, config: ClipTextConfig) -> Result<Self> {
        let text_projection = load_projection(weights, &config)?;
        let encoder = Self::load(weights, config)?;
        Ok(Self { text_projection: Some(text_projection), ..encoder })
    }

    /// Tensors `embeddings.*`, `encoder.layers.*`, `final_layer_norm.*`, below `text_model.` or bare.
    pub fn load(weights: &Weights, config: ClipTextConfig) -> Result<Self> {
        let weights = if weights.contains_below("text_model") { weights.pp("text_model") } else { weights.clone() };
        let embeddings = weights.pp("embeddings");
        // Positions 0, 1, 2, ... as a buffer: old checkpoints carry it.
        embeddings.ignore("position_ids");
        let (hidden, layers) = (config.hidden_size, weights.pp("encoder").pp("layers"));
        let position_shape = [config.max_position_embeddings, hidden];
        Ok(Self {
            token_embedding: Embedding::load(&embeddings.pp("token_embedding"), config.vocab_size, hidden)?,
            position_embedding: embeddings.pp("position_embedding").get(&position_shape, "weight")?,
            layers: (0..config.num_hidden_layers)
                .map(|layer| ClipLayer::load(&layers.pp(layer), &config.layer()))
                .collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::load(&weights.pp("final_layer_norm"), hidden, config.layer_norm_eps)?,
            text_projection: None,
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ClipTextConfig {
        &self.config
    }

    /// `hidden_states[0]` `[b, l, hidden_size]` of b rows of equally many ids, at most `max_position_embeddings`.
    pub fn embed(&self, rows: &[&[u32]]) -> Result<Tensor> {
        let (b, l) = (rows.len(), rows.first().map_or(0, |ids| ids.len()));
        assert!(rows.iter().all(|ids| ids.len() == l), "rows are padded to one length: this is a bug");
        let positions = self.position_embedding.narrow(0, 0, l)?;
        let ids = Tensor::from_vec(rows.concat(), b * l, self.position_embedding.device())?;
        Ok(self.token_embedding.forward(&ids)?.reshape((b, l, ()))?.broadcast_add(&positions)?)
    }

    /// Runs some of the layers: from `hidden_states[range.start]` to `hidden_states[range.end]`, without the final
    /// norm.
    pub fn run(&self, hidden_states: Tensor, range: Range<usize>) -> Result<Tensor> {
        self.layers[range].iter().try_fold(hidden_states, |x, layer| layer.forward(&x))
    }

    /// `pooler_output` `[b, hidden_size]` from the last layer's hidden states: the end-of-sequence tokens, normed.
    pub fn pool(&self, last_hidden_states: &Tensor, rows: &[&[u32]]) -> Result<Tensor> {
        let mut ends = Vec::with_capacity(rows.len());
        for (row, ids) in rows.iter().enumerate() {
            ends.push(last_hidden_states.narrow(0, row, 1)?.narrow(1, self.end_position(ids), 1)?.squeeze(1)?);
        }
        self.final_layer_norm.forward(&Tensor::cat(&ends, 0)?.contiguous()?)
    }

    /// `pooler_output` `[b, hidden_size]` of b rows of equally many ids.
    pub fn pooled(&self, rows: &[&[u32]]) -> Result<Tensor> {
        let last = self.run(self.embed(rows)?, 0..self.layers.len())?;
        self.pool(&last, rows)
    }

    /// `hidden_states[-2]` `[b, l, hidden_size]`: what the last but one layer leaves, without the final norm.
    pub fn penultimate(&self, rows: &[&[u32]]) -> Result<Tensor> {
        self.run(self.embed(rows)?, 0..self.layers.len() - 1)
    }

    /// `hidden_states[-2]` as above and `text_embeds` `[b, projection_dim]`: the pooled vectors, projected where the
    /// encoder was loaded with a projection.
    pub fn penultimate_and_text_embeds(&self, rows: &[&[u32]]) -> Result<(Tensor, Tensor)> {
        let layers = self.layers.len();
        let penultimate = self.penultimate(rows)?;
        let pooled = self.pool(&self.run(penultimate.clone(), layers - 1..layers)?, rows)?;
        let text_embeds = match &self.text_projection {
            Some(projection) => projection.forward(&pooled)?,
            None => pooled,
        };
        Ok((penultimate, text_embeds))
    }

    /// Configurations that say 2 are older than the rule that the end token is the one they name: there it is the
    /// highest id. A sequence without an end token is pooled at its start.
    fn end_position(&self, ids: &[u32]) -> usize {
        let end = match self.config.eos_token_id {
            2 => ids.iter().max().copied(),
            id => Some(id),
        };
        ids.iter().position(|id| Some(*id) == end).unwrap_or(0)
    }
}

/// OpenCLIP keeps the matrix transposed and calls it by its bare name.
fn load_projection(weights: &Weights, config: &ClipTextConfig) -> Result<Linear> {
    let (hidden, projected) = (config.hidden_size, config.projection_dim);
    // What CLIP was trained to compare with: files of OpenCLIP carry it.
    weights.ignore("logit_scale");
    if weights.contains("text_projection") {
        let transposed = weights.matrix(hidden, projected, "text_projection")?;
        return Linear::named(transposed.t()?.contiguous()?, None, &weights.pp("text_projection"));
    }
    Linear::load_no_bias(&weights.pp("text_projection"), hidden, projected)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// An encoder without layers, whose embeddings do not matter.
    fn encoder(eos_token_id: u32) -> ClipTextEncoder {
        let config = serde_json::json!({
            "vocab_size": 10, "hidden_size": 2, "intermediate_size": 4, "num_hidden_layers": 0,
            "num_attention_heads": 1, "max_position_embeddings": 8, "eos_token_id": eos_token_id,
        });
        let config: ClipTextConfig = serde_json::from_value(config).expect("a whole configuration");
        let dir = tempfile::tempdir().expect("a temporary folder");
        let tensor = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).expect("zeros");
        let tensors = std::collections::HashMap::from([
            ("embeddings.token_embedding.weight", tensor(&[10, 2])),
            ("embeddings.position_embedding.weight", tensor(&[8, 2])),
            ("final_layer_norm.weight", tensor(&[2])),
            ("final_layer_norm.bias", tensor(&[2])),
        ]);
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).expect("save");
        let placement = crate::device::Placement::open(Default::default(), Default::default()).expect("the CPU");
        let weights = Weights::open(dir.path(), &placement).expect("open");
        ClipTextEncoder::load(&weights, config).expect("load")
    }

    fn check(eos_token_id: u32, ids: &[u32], expected: usize) {
        assert_eq!(encoder(eos_token_id).end_position(ids), expected, "{eos_token_id} in {ids:?}");
    }

    /// `CLIPTextTransformer.forward`: `argmax` over ids, or over `ids == eos_token_id`; both take the first of equals.
    #[test]
    fn pooled_token_is_the_first_end() {
        check(2, &[7, 3, 9, 9, 9], 2);
        check(2, &[7, 2, 9, 0, 0], 2);
        check(9, &[8, 3, 9, 9, 9], 2);
        check(6, &[8, 3, 6, 9, 9], 2);
        check(6, &[8, 3, 4], 0);
    }

    #[test]
    fn absent_fields_take_transformers_defaults() {
        let config = serde_json::json!({
            "vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1,
            "num_attention_heads": 1, "max_position_embeddings": 1,
        });
        let config: ClipTextConfig = serde_json::from_value(config).expect("the rest has defaults");
        assert_eq!(config.hidden_act, ClipActivation::QuickGelu);
        assert_eq!(config.eos_token_id, 49407);
        assert_eq!(config.layer_norm_eps, 1e-5);
    }
}
