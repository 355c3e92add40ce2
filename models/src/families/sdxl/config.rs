//! `unet/config.json`: what decides about an SDXL UNet, and what must be as SDXL has it.
//!
//! Source: diffusers `models/unets/unet_2d_condition.py`, whose field names and defaults these are.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config::bounds::{MAX_BLOCKS, MAX_CHANNELS, MAX_HEADS, MAX_LEVELS, MAX_PATCH, MAX_SIDE, MAX_WIDTH};
use crate::config::{Bound, Bounded};
use crate::error::{Error, Result};

/// Most transformer blocks of one layer. SDXL has 10.
const MAX_DEPTH: u64 = 64;
/// Most transformer blocks on the way down, or up. SDXL has 24 and 36.
const MAX_TRANSFORMERS: usize = 1 << 12;
/// Numbers in `time_ids`: original size, crop, target size.
pub const SIZE_TIME_IDS: usize = 6;
/// Numbers in `time_ids` of a refiner: original size, crop, aesthetic score.
pub const SCORE_TIME_IDS: usize = 5;

/// One number for all levels, or one per level.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum PerLevel<T> {
    /// From the largest pictures to the smallest. First, so that a list is one per level also where each entry may be a
    /// list again.
    Each(Vec<T>),
    /// The same everywhere.
    All(T),
}

impl<T> PerLevel<T> {
    fn at(&self, level: usize) -> &T {
        match self {
            Self::All(value) => value,
            Self::Each(values) => &values[level],
        }
    }

    fn fits(&self, levels: usize) -> bool {
        match self {
            Self::All(_) => true,
            Self::Each(values) => values.len() == levels,
        }
    }

    fn values(&self) -> &[T] {
        match self {
            Self::All(value) => std::slice::from_ref(value),
            Self::Each(values) => values,
        }
    }
}

impl PerLevel<usize> {
    /// Of so many entries.
    fn total(&self, entries: usize) -> usize {
        match self {
            Self::All(value) => value * entries,
            Self::Each(values) => values.iter().sum(),
        }
    }
}

/// What decides about the network. Fields that must have one value are checked in [`UNetConfig::check`].
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct UNetConfig {
    pub sample_size: Option<usize>,
    pub in_channels: usize,
    pub out_channels: usize,
    pub down_block_types: Vec<String>,
    pub mid_block_type: Option<String>,
    pub up_block_types: Vec<String>,
    pub block_out_channels: Vec<usize>,
    pub layers_per_block: PerLevel<usize>,
    pub norm_num_groups: usize,
    pub norm_eps: f64,
    pub cross_attention_dim: PerLevel<usize>,
    /// Of each transformer of a level; a list in a list has one entry per layer.
    pub transformer_layers_per_block: PerLevel<PerLevel<usize>>,
    /// The same for the way up, whose levels then are listed from the smallest pictures.
    pub reverse_transformer_layers_per_block: Option<Vec<PerLevel<usize>>>,
    /// Despite its name the number of heads.
    pub attention_head_dim: PerLevel<usize>,
    pub use_linear_projection: bool,
    pub addition_time_embed_dim: usize,
    pub projection_class_embeddings_input_dim: usize,
    pub time_embedding_dim: Option<usize>,
    pub conv_in_kernel: usize,
    pub conv_out_kernel: usize,
    /// Everything else.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Bounded for UNetConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("sample_size", MAX_SIDE),
        Bound::size("in_channels", MAX_CHANNELS),
        Bound::size("out_channels", MAX_CHANNELS),
        Bound::list("down_block_types", MAX_LEVELS),
        Bound::list("up_block_types", MAX_LEVELS),
        Bound::size("block_out_channels", MAX_CHANNELS).entries(MAX_LEVELS),
        Bound::size("layers_per_block", MAX_BLOCKS).entries(MAX_LEVELS),
        Bound::size("norm_num_groups", MAX_CHANNELS),
        Bound::eps("norm_eps"),
        Bound::size("cross_attention_dim", MAX_WIDTH).entries(MAX_LEVELS),
        Bound::whole("transformer_layers_per_block", 0, MAX_DEPTH),
        Bound::whole("reverse_transformer_layers_per_block", 0, MAX_DEPTH),
        Bound::size("attention_head_dim", MAX_HEADS).entries(MAX_LEVELS),
        Bound::whole("addition_time_embed_dim", 0, MAX_WIDTH),
        Bound::whole("projection_class_embeddings_input_dim", 0, MAX_WIDTH),
        Bound::size("time_embedding_dim", MAX_WIDTH),
        Bound::size("conv_in_kernel", MAX_PATCH),
        Bound::size("conv_out_kernel", MAX_PATCH),
    ];
}

const DOWN_BLOCKS: [&str; 2] = ["DownBlock2D", "CrossAttnDownBlock2D"];
const UP_BLOCKS: [&str; 2] = ["UpBlock2D", "CrossAttnUpBlock2D"];
const MID_BLOCK: &str = "UNetMidBlock2DCrossAttn";

impl Default for UNetConfig {
    fn default() -> Self {
        let names = |names: [&str; 4]| names.map(str::to_owned).to_vec();
        let ([down, cross_down], [up, cross_up]) = (DOWN_BLOCKS, UP_BLOCKS);
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            down_block_types: names([cross_down, cross_down, cross_down, down]),
            mid_block_type: Some(MID_BLOCK.to_owned()),
            up_block_types: names([up, cross_up, cross_up, cross_up]),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerLevel::All(2),
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: PerLevel::All(1280),
            transformer_layers_per_block: PerLevel::All(PerLevel::All(1)),
            reverse_transformer_layers_per_block: None,
            attention_head_dim: PerLevel::All(8),
            use_linear_projection: false,
            addition_time_embed_dim: 0,
            projection_class_embeddings_input_dim: 0,
            time_embedding_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            others: Map::new(),
        }
    }
}

/// Fields that this network computes with one value only, which is also what it takes them for when they are absent.
/// (`upcast_attention` and `dropout` may say anything: scores are summed in f32 always, and nothing is dropped.)
fn fixed_fields() -> [(&'static str, Value); 20] {
    [
        ("addition_embed_type", json!("text_time")),
        ("center_input_sample", json!(false)),
        ("flip_sin_to_cos", json!(true)),
        ("freq_shift", json!(0)),
        ("only_cross_attention", json!(false)),
        ("downsample_padding", json!(1)),
        ("mid_block_scale_factor", json!(1)),
        ("act_fn", json!("silu")),
        ("encoder_hid_dim_type", Value::Null),
        ("num_attention_heads", Value::Null),
        ("dual_cross_attention", json!(false)),
        ("class_embed_type", Value::Null),
        ("resnet_time_scale_shift", json!("default")),
        ("time_embedding_type", json!("positional")),
        ("time_embedding_act_fn", Value::Null),
        ("timestep_post_act", Value::Null),
        ("time_cond_proj_dim", Value::Null),
        ("attention_type", json!("default")),
        ("class_embeddings_concat", json!(false)),
        ("cross_attention_norm", Value::Null),
    ]
}

/// Whether a field's value means the wanted one: numbers may be spelled as integers or not, null is false for Python, and
/// silu has two names.
fn says_the_same(found: &Value, wanted: &Value) -> bool {
    let numbers = found.as_f64().zip(wanted.as_f64());
    found == wanted
        || numbers.is_some_and(|(found, wanted)| found == wanted)
        || (found.is_null() && *wanted == json!(false))
        || (found == "swish" && wanted == "silu")
}

impl UNetConfig {
    /// Refuses what this network does not compute, and sizes that contradict each other. `path` is named in the error.
    pub fn check(&self, path: &Path) -> Result<()> {
        match self.problem() {
            Some(problem) => Err(Error::checkpoint(path, problem)),
            None => Ok(()),
        }
    }

    fn problem(&self) -> Option<String> {
        if !self.others.contains_key("addition_embed_type") {
            return Some("has no `addition_embed_type`; SDXL's is \"text_time\"".to_owned());
        }
        for (field, wanted) in fixed_fields() {
            let found = self.others.get(field).unwrap_or(&wanted);
            if !says_the_same(found, &wanted) {
                return Some(format!("`{field}` is {found}; only {wanted} is supported"));
            }
        }
        self.block_problem().or_else(|| self.size_problem()).or_else(|| self.attention_problem())
    }

    fn block_problem(&self) -> Option<String> {
        let levels = self.levels();
        let lists = [("down_block_types", &self.down_block_types), ("up_block_types", &self.up_block_types)];
        for ((field, found), known) in lists.into_iter().zip([DOWN_BLOCKS, UP_BLOCKS]) {
            if let Some(other) = found.iter().find(|block| !known.contains(&block.as_str())) {
                return Some(format!("`{field}`: {other} is not supported; supported: {}", known.join(", ")));
            }
            if found.len() != levels {
                return Some(format!("`{field}` needs one entry per level of `block_out_channels`"));
            }
        }
        match &self.mid_block_type {
            Some(other) if other != MID_BLOCK => {
                Some(format!("`mid_block_type`: only {MID_BLOCK} or null, not {other}"))
            }
            _ => None,
        }
    }

    fn size_problem(&self) -> Option<String> {
        let (levels, groups) = (self.levels(), self.norm_num_groups);
        let kernels = [self.conv_in_kernel, self.conv_out_kernel];
        if levels == 0 {
            return Some(format!("`block_out_channels` needs 1 to {MAX_LEVELS} levels"));
        }
        if !self.layers_per_block.fits(levels) {
            return Some("`layers_per_block` needs one entry per level of `block_out_channels`".to_owned());
        }
        if kernels.iter().any(|kernel| kernel.is_multiple_of(2)) {
            return Some("`conv_in_kernel` and `conv_out_kernel` must be odd".to_owned());
        }
        if self.block_out_channels.iter().any(|channels| !channels.is_multiple_of(groups)) {
            return Some(format!("`block_out_channels` must be multiples of `norm_num_groups` ({groups})"));
        }
        let time_dim = self.addition_time_embed_dim;
        if !self.block_out_channels[0].is_multiple_of(2) || time_dim == 0 || !time_dim.is_multiple_of(2) {
            return Some(
                "widths of sinusoids (`block_out_channels`, `addition_time_embed_dim`) must be even and above 0"
                    .to_owned(),
            );
        }
        None
    }

    fn attention_problem(&self) -> Option<String> {
        let levels = self.levels();
        let per_level = [
            ("attention_head_dim", self.attention_head_dim.fits(levels)),
            ("cross_attention_dim", self.cross_attention_dim.fits(levels)),
            ("transformer_layers_per_block", self.transformer_layers_per_block.fits(levels)),
        ];
        if let Some((field, _)) = per_level.into_iter().find(|(_, fits)| !fits) {
            return Some(format!("`{field}` needs one entry, or one per level of `block_out_channels`"));
        }
        for (level, channels) in self.block_out_channels.iter().enumerate() {
            let heads = *self.attention_head_dim.at(level);
            if !channels.is_multiple_of(heads) {
                return Some(format!(
                    "{channels} channels cannot be parted among {heads} heads (`attention_head_dim`)"
                ));
            }
        }
        if self.cross_attention_dim.values().iter().any(|dim| *dim != self.text_dim()) {
            return Some("`cross_attention_dim` must be the same for all levels".to_owned());
        }
        self.depth_problem()
    }

    /// Whether every layer has its number of transformer blocks.
    fn depth_problem(&self) -> Option<String> {
        let levels = self.levels();
        let reverse = self.reverse_transformer_layers_per_block.as_deref();
        let listed =
            self.transformer_layers_per_block.values().iter().any(|layers| matches!(layers, PerLevel::Each(_)));
        if listed && reverse.is_none() {
            return Some("`reverse_transformer_layers_per_block` is needed beside lists per layer".to_owned());
        }
        let down = (0..levels).all(|level| self.transformer_layers_per_block.at(level).fits(self.layers(level)));
        let up = reverse.is_none_or(|blocks| {
            let fits = |(block, layers): (usize, &PerLevel<usize>)| layers.fits(self.layers(levels - 1 - block) + 1);
            blocks.len() == levels && blocks.iter().enumerate().all(fits)
        });
        if !down || !up {
            return Some("`transformer_layers_per_block` does not fit `layers_per_block`".to_owned());
        }
        let down = (0..levels).map(|level| self.transformer_layers_per_block.at(level).total(self.layers(level)));
        let up = (0..levels).map(|block| {
            let level = levels - 1 - block;
            let layers = reverse.map_or_else(|| self.transformer_layers_per_block.at(level), |blocks| &blocks[block]);
            layers.total(self.layers(level) + 1)
        });
        let most = down.sum::<usize>().max(up.sum());
        (most > MAX_TRANSFORMERS)
            .then(|| format!("`transformer_layers_per_block` are {most} in all; at most {MAX_TRANSFORMERS}"))
    }

    /// Sizes of pictures, each half of the one before.
    pub fn levels(&self) -> usize {
        self.block_out_channels.len()
    }

    /// Width of the text.
    pub fn text_dim(&self) -> usize {
        *self.cross_attention_dim.at(0)
    }

    /// Width of the pooled text, which is what so many `time_ids` leave of the added embedding's input.
    pub fn pooled_dim(&self, time_ids: usize) -> Option<usize> {
        self.projection_class_embeddings_input_dim.checked_sub(time_ids * self.addition_time_embed_dim)
    }

    /// Width of the time embedding.
    pub fn time_embed_dim(&self) -> usize {
        self.time_embedding_dim.unwrap_or(4 * self.block_out_channels.first().copied().unwrap_or(0))
    }

    /// Residual blocks of a level on the way down; on the way up there is one more.
    pub(super) fn layers(&self, level: usize) -> usize {
        *self.layers_per_block.at(level)
    }

    /// The transformer of a layer on the way down.
    pub(super) fn down_transformer(&self, level: usize, layer: usize) -> Option<TransformerShape> {
        let depth = *self.transformer_layers_per_block.at(level).at(layer);
        (self.down_block_types[level] == DOWN_BLOCKS[1]).then(|| self.transformer(level, depth))
    }

    /// The transformer of a layer on the way up, whose blocks are counted from the smallest pictures.
    pub(super) fn up_transformer(&self, block: usize, layer: usize) -> Option<TransformerShape> {
        let level = self.levels() - 1 - block;
        let layers = match &self.reverse_transformer_layers_per_block {
            Some(blocks) => &blocks[block],
            None => self.transformer_layers_per_block.at(level),
        };
        (self.up_block_types[block] == UP_BLOCKS[1]).then(|| self.transformer(level, *layers.at(layer)))
    }

    /// The transformer in the middle.
    pub(super) fn mid_transformer(&self) -> Option<TransformerShape> {
        let level = self.levels() - 1;
        let depth = *self.transformer_layers_per_block.at(level).at(0);
        self.mid_block_type.is_some().then(|| self.transformer(level, depth))
    }

    fn transformer(&self, level: usize, layers: usize) -> TransformerShape {
        TransformerShape {
            channels: self.block_out_channels[level],
            heads: *self.attention_head_dim.at(level),
            cross_attention_dim: self.text_dim(),
            layers,
        }
    }

    /// Channels of the skips in the order in which the way down leaves them.
    pub(super) fn skip_channels(&self) -> Vec<usize> {
        let mut skips = vec![self.block_out_channels[0]];
        for (level, channels) in self.block_out_channels.iter().enumerate() {
            let halved = usize::from(level + 1 < self.levels());
            skips.extend(std::iter::repeat_n(*channels, self.layers(level) + halved));
        }
        skips
    }

    /// Bytes of activations of one row over `latents` positions in `dtype`: the skips, and beside them the widest of what
    /// the levels compute.
    pub fn forward_bytes(&self, latents: usize, dtype: candle_core::DType) -> usize {
        let area = |level: usize| latents.div_ceil(1 << (2 * level)).max(1);
        let mut skips = self.block_out_channels[0] * latents;
        let mut widest = 0;
        for (level, channels) in self.block_out_channels.iter().enumerate() {
            let halved = if level + 1 < self.levels() { area(level + 1) } else { 0 };
            skips += channels * (self.layers(level) * area(level) + halved);
            // The first layer on the way up still has the channels of the level below.
            let joined = channels + self.block_out_channels[(level + 1).min(self.levels() - 1)];
            let has_transformer = self.down_transformer(level, 0).is_some()
                || self.up_transformer(self.levels() - 1 - level, 0).is_some();
            let live = if has_transformer {
                (LIVE_JOINED * joined).max(LIVE_WIDTHS * channels + LIVE_VALUES)
            } else {
                LIVE_JOINED * joined
            };
            widest = widest.max(live * area(level));
        }
        (skips + widest) * dtype.size_in_bytes()
    }
}

/// Sizes of one transformer.
#[derive(Debug, Clone, Copy)]
pub(super) struct TransformerShape {
    pub channels: usize,
    pub heads: usize,
    pub cross_attention_dim: usize,
    pub layers: usize,
}

impl TransformerShape {}

/// Tensors as wide as a transformer's stream that are alive at once in its feed-forward network: the picture, the stream
/// and its normed copy (3), values and gates (8), both halves copied (8), their products (4), and what the kernels hold
/// besides. Measured: 29 with 256 and 512 channels in heads of 64 and 128 values.
const LIVE_WIDTHS: usize = 30;
/// Values of each position beside them, whatever the width: measured with 20 channels in heads of ten values.
const LIVE_VALUES: usize = 330;
/// Tensors as wide as a picture beside its skip that are alive at once in a residual block: both joined, normed, their
/// parts, the convolution's working copy.
const LIVE_JOINED: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn published() -> Value {
        json!({
            "act_fn": "silu", "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "center_input_sample": false,
            "cross_attention_dim": 2048, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "downsample_padding": 1, "freq_shift": 0, "flip_sin_to_cos": true, "in_channels": 4, "layers_per_block": 2,
            "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05,
            "norm_num_groups": 32, "out_channels": 4, "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128, "transformer_layers_per_block": [1, 2, 10], "upcast_attention": null,
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": true,
        })
    }

    fn problem(field: &str, value: Value) -> String {
        let mut config = published();
        config[field] = value;
        let config: UNetConfig = serde_json::from_value(config).expect("fields of the right types");
        config.problem().unwrap_or_default()
    }

    #[test]
    fn the_published_configuration_is_read_whole() {
        let config: UNetConfig = serde_json::from_value(published()).expect("the published configuration");
        assert_eq!(config.problem(), None);
        assert_eq!(
            (config.pooled_dim(SIZE_TIME_IDS), config.time_embed_dim(), config.text_dim()),
            (Some(1280), 1280, 2048)
        );
        assert_eq!(config.skip_channels(), [320, 320, 320, 320, 640, 640, 640, 1280, 1280]);
        assert!(config.down_transformer(0, 0).is_none() && config.up_transformer(2, 0).is_none());
        let deepest = config.up_transformer(0, 2).expect("the smallest pictures have transformers");
        assert_eq!((deepest.channels, deepest.heads, deepest.layers), (1280, 20, 10));
    }

    #[test]
    fn lists_per_layer_and_an_absent_middle_are_read() {
        let mut config = published();
        config["mid_block_type"] = Value::Null;
        config["transformer_layers_per_block"] = json!([0, [1, 2], [4, 3]]);
        config["reverse_transformer_layers_per_block"] = json!([[4, 3, 2], [2, 1, 1], 0]);
        let config: UNetConfig = serde_json::from_value(config).expect("lists of lists");
        assert_eq!(config.problem(), None);
        assert!(config.mid_transformer().is_none());
        let depth = |shape: Option<TransformerShape>| shape.map(|shape| shape.layers);
        assert_eq!(depth(config.down_transformer(2, 1)), Some(3));
        assert_eq!(depth(config.up_transformer(0, 2)), Some(2));
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (field, value) in [
            ("addition_embed_type", json!("text")),
            ("addition_embed_type", Value::Null),
            ("class_embed_type", json!("timestep")),
            ("time_cond_proj_dim", json!(256)),
            ("act_fn", json!("gelu")),
            ("downsample_padding", json!(0)),
            ("resnet_time_scale_shift", json!("scale_shift")),
            ("down_block_types", json!(["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"])),
            ("up_block_types", json!(["UpBlock2D"])),
            ("mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
            ("layers_per_block", json!([2, 2])),
            ("norm_num_groups", json!(7)),
            ("addition_time_embed_dim", json!(0)),
            ("attention_head_dim", json!([5, 10, 7])),
            ("attention_head_dim", json!([5, 10])),
            ("cross_attention_dim", json!([2048, 2048, 1024])),
            ("transformer_layers_per_block", json!([1, 2])),
            ("conv_in_kernel", json!(4)),
        ] {
            let found = problem(field, value.clone());
            let named = if field == "attention_head_dim" { "attention_head_dim" } else { field };
            assert!(found.contains(named), "{field} {value}: {found}");
        }
        let deep = json!([64, 64, 64]);
        assert!(!problem("transformer_layers_per_block", deep.clone()).contains("in all"));
        let mut config = published();
        (config["transformer_layers_per_block"], config["layers_per_block"]) = (deep, json!(64));
        let config: UNetConfig = serde_json::from_value(config).expect("fields of the right types");
        assert!(config.problem().is_some_and(|problem| problem.contains("12480 in all")));
        assert!(problem("transformer_layers_per_block", json!([1, [2, 2], 1])).contains("reverse"));
    }
}
