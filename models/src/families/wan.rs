//! Wan2.1 text-to-video: UMT5 text, a diffusion transformer over space-time patches, a causal video VAE.
//!
//! Owns: the transformer, what a `WanPipeline` checkpoint must look like, limits and defaults. Does not know: the
//! denoising loop, guidance, batching, RGB bytes.
//! Source: diffusers `models/transformers/transformer_wan.py`, `pipelines/wan/pipeline_wan.py`.

use crate::diffusion::acceleration::CacheThresholds;
use crate::diffusion::canvas::{CanvasSupport, FrameSupport};
use crate::diffusion::guidance::{GuidanceKind, GuidanceSupport};
use crate::diffusion::prompt::Prompts;
use crate::diffusion::sampling::SamplingSupport;
use crate::diffusion::{Acceleration, DiffusionCard, DiffusionRequest};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;
use tale_kernels::{
    AttentionOptions, RopeLayout, attention, gated_sum, gelu_tanh, modulated_layer_norm, norm_rope, silu,
};

use crate::card::ModelCard;
use crate::checkpoint::{CONFIG, MODEL_INDEX, Manifest, OpenWeights};
use crate::config::bounds::{
    MAX_CHANNELS, MAX_HEAD_DIM, MAX_HEADS, MAX_INNER_WIDTH, MAX_LAYERS, MAX_LEARNED_POSITIONS, MAX_PATCH, MAX_WIDTH,
    check_product,
};
use crate::config::{Bound, Bounded};
use crate::device::Placement;
use crate::encoders::t5::{T5Config, T5Encoder, T5Kind};
use crate::error::{Error, Result};
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::layers::timesteps::{ConditionEmbedder, sinusoidal};
use crate::layers::{LayerNorm, Linear, RmsNorm};
use crate::memory::MemoryPlan;
use crate::request::Phase;
use crate::runner::diffusion::DiffusionRunner;
use crate::runner::diffusion::block_cache::{BlockCache, select, through_blocks};
use crate::runner::diffusion::on_demand::OnDemand;
use crate::runner::diffusion::retry::reread_in_f32;
use crate::solver::schedulers::{Schedulers, Training};
use crate::tokenizer::Tokenizer;
use crate::vae::wan::{WanVaeConfig, WanVaeDecoder};
use crate::weights::Weights;

pub mod pipeline;

/// The published model was trained on 480p and 720p and 81 frames; past these bounds time and memory grow and quality
/// falls. 1280x720 and its neighbours in multiples of 16.
const MAX_PIXELS: usize = 1280 * 768;
const MAX_SIDE: usize = 1536;
/// 16 seconds at the model's 16 frames per second.
const MAX_FRAMES: usize = 257;
/// Tokens on which the transformer was trained.
const MAX_SEQUENCE_LENGTH: usize = 512;
/// The pipeline refuses other sizes whatever the patches are.
const PIPELINE_SIZE_MULTIPLE: usize = 16;
/// Defaults of `WanPipeline.__call__`.
const DEFAULT_WIDTH: usize = 832;
const DEFAULT_HEIGHT: usize = 480;
const DEFAULT_FRAMES: usize = 81;
const DEFAULT_STEPS: usize = 50;
const DEFAULT_GUIDANCE_SCALE: f64 = 5.0;
/// The rate at which its example saves the video.
const DEFAULT_FPS: usize = 16;

/// Measured by the author of github.com/testdummyvt/diffsynth-wan-cache, whose README has the clips: 1.13 and 1.36 times as
/// fast for the 1.3B model, which falls apart at 0.06; the 14B one is a little more patient.
const CACHE_THRESHOLDS: CacheThresholds = CacheThresholds { safe: 0.03, fast: 0.04 };
/// What a cache keeps of each token, in vectors as wide as the stream: what the first block and what the others added;
/// and, while the others are computed, what came out of the first.
const CACHED_WIDTHS: usize = 3;

/// Base of the rotary frequencies.
const ROPE_THETA: f64 = 10_000.0;

/// Wan2.1 text-to-video.
pub struct Wan;

impl Family for Wan {
    fn name(&self) -> &'static str {
        "wan"
    }

    fn makes(&self) -> &'static str {
        "video"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.architecture() == "WanPipeline"
    }

    fn text_encoders(&self) -> &'static [&'static str] {
        &["text_encoder"]
    }

    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel> {
        let model = build(manifest, open)?;
        let card = model.card.clone();
        let runner = DiffusionRunner::new(model, options.max_denoise_rows)
            .with_text_encoders(open.lent().map(|parts| OnDemand::new(parts, build)))
            .retrying(reread_in_f32(open.reread(), build));
        Ok(LoadedModel { card: ModelCard::Diffusion(card), resident_bytes: 0, runner: Box::new(runner) })
    }
}

fn build(manifest: &Manifest, open: &mut OpenWeights<'_>) -> Result<WanModel> {
    let placement = open.placement().clone();
    WanModel::load(manifest, &placement, &mut |component| open.component(manifest, component))
}

/// `transformer/config.json`. Defaults are those of diffusers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct WanConfig {
    pub patch_size: [usize; 3],
    pub num_attention_heads: usize,
    pub attention_head_dim: usize,
    pub in_channels: usize,
    pub out_channels: usize,
    pub text_dim: usize,
    pub freq_dim: usize,
    pub ffn_dim: usize,
    pub num_layers: usize,
    pub cross_attn_norm: bool,
    pub qk_norm: Option<String>,
    pub eps: f64,
    pub image_dim: Option<usize>,
    pub added_kv_proj_dim: Option<usize>,
    pub pos_embed_seq_len: Option<usize>,
    pub rope_max_seq_len: usize,
}

impl Default for WanConfig {
    fn default() -> Self {
        Self {
            patch_size: [1, 2, 2],
            num_attention_heads: 40,
            attention_head_dim: 128,
            in_channels: 16,
            out_channels: 16,
            text_dim: 4096,
            freq_dim: 256,
            ffn_dim: 13_824,
            num_layers: 40,
            cross_attn_norm: true,
            qk_norm: Some(QK_NORM.to_owned()),
            eps: 1e-6,
            image_dim: None,
            added_kv_proj_dim: None,
            pos_embed_seq_len: None,
            rope_max_seq_len: 1024,
        }
    }
}

impl Bounded for WanConfig {
    const BOUNDS: &'static [Bound] = &[
        Bound::size("patch_size", MAX_PATCH),
        Bound::size("num_attention_heads", MAX_HEADS),
        Bound::size("attention_head_dim", MAX_HEAD_DIM),
        Bound::size("in_channels", MAX_CHANNELS),
        Bound::size("out_channels", MAX_CHANNELS),
        Bound::size("text_dim", MAX_WIDTH),
        Bound::size("freq_dim", MAX_WIDTH),
        Bound::size("ffn_dim", MAX_INNER_WIDTH),
        Bound::size("num_layers", MAX_LAYERS),
        Bound::eps("eps"),
        Bound::size("rope_max_seq_len", MAX_LEARNED_POSITIONS),
    ];
}

/// The only value of `qk_norm` that is computed.
const QK_NORM: &str = "rms_norm_across_heads";

impl WanConfig {
    /// Width of the transformer.
    fn dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    fn check(&self, path: &Path) -> Result<()> {
        let (heads, head_dim) = (self.num_attention_heads, self.attention_head_dim);
        check_product(path, ("num_attention_heads", heads), ("attention_head_dim", head_dim), MAX_WIDTH)?;
        let image = "image conditioning is not supported yet; supported is text-to-video";
        let problem = if self.image_dim.is_some() {
            format!("`image_dim`: {image}")
        } else if self.added_kv_proj_dim.is_some() {
            format!("`added_kv_proj_dim`: {image}")
        } else if self.pos_embed_seq_len.is_some() {
            format!("`pos_embed_seq_len`: {image}")
        } else if self.in_channels != self.out_channels {
            format!("`in_channels` is {}, `out_channels` {}: {image}", self.in_channels, self.out_channels)
        } else if self.qk_norm.as_deref() != Some(QK_NORM) {
            format!("`qk_norm` is {:?}; only {QK_NORM:?} is supported", self.qk_norm)
        } else if self.patch_size[0] != 1 {
            format!("`patch_size` is {:?}; patches over time are not supported", self.patch_size)
        } else if !head_dim.is_multiple_of(2) || !self.freq_dim.is_multiple_of(2) {
            "`attention_head_dim` and `freq_dim` must be even".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::checkpoint(path, problem))
    }
}

/// Everything of a `WanPipeline` that the diffusion runner drives.
pub struct WanModel {
    card: DiffusionCard,
    sizes: Sizes,
    placement: Placement,
    tokenizer: Tokenizer,
    text_encoder: T5Encoder,
    transformer: WanTransformer,
    vae: WanVaeDecoder,
}

/// The configurations of a checkpoint, read and found to fit together.
struct Sizes {
    text_encoder: T5Config,
    transformer: WanConfig,
    vae: WanVaeConfig,
}

impl WanModel {
    /// Reads and checks all configurations first, then the weights that `open` gives for each component. Those that are not
    /// dry are at `placement`.
    pub fn load(
        manifest: &Manifest,
        placement: &Placement,
        open: &mut dyn FnMut(&str) -> Result<Weights>,
    ) -> Result<Self> {
        check_pipeline(manifest)?;
        let sizes = Sizes::read(manifest)?;
        let schedulers = Schedulers::read(manifest, Training::Flow)?;
        let vocab_size = sizes.text_encoder.vocab_size;
        let tokenizer = manifest.component("tokenizer")?.tokenizer_of_encoder(vocab_size, MAX_SEQUENCE_LENGTH)?;
        Ok(Self {
            card: sizes.card(schedulers),
            tokenizer,
            placement: placement.clone(),
            text_encoder: T5Encoder::load(&open("text_encoder")?, &sizes.text_encoder)?,
            transformer: WanTransformer::load(&open("transformer")?, &sizes.transformer)?,
            vae: WanVaeDecoder::load(&open("vae")?, &sizes.vae)?,
            sizes,
        })
    }
}

/// Refuses pipelines that share the class name and need more than this family has.
fn check_pipeline(manifest: &Manifest) -> Result<()> {
    let index_path = manifest.path("", MODEL_INDEX);
    let index: Value = manifest.whole().json(MODEL_INDEX)?;
    if manifest.class_of("transformer_2").is_some() || !index["boundary_ratio"].is_null() {
        let problem = "`transformer_2` and `boundary_ratio` (Wan2.2) are not supported; supported is Wan2.1";
        return Err(Error::checkpoint(index_path, problem));
    }
    if index["expand_timesteps"].as_bool() == Some(true) {
        return Err(Error::checkpoint(index_path, "`expand_timesteps` (Wan2.2) is not supported"));
    }
    let classes =
        [("text_encoder", "UMT5EncoderModel"), ("transformer", "WanTransformer3DModel"), ("vae", "AutoencoderKLWan")];
    for (component, supported) in classes {
        let found = manifest.class_of(component).unwrap_or("absent");
        if found != supported {
            let problem = format!("`{component}` is {found}; supported is {supported}");
            return Err(Error::checkpoint(index_path, problem));
        }
    }
    Ok(())
}

impl Sizes {
    fn read(manifest: &Manifest) -> Result<Self> {
        let text_encoder = T5Config::read(&manifest.component("text_encoder")?.fields(CONFIG)?, T5Kind::Umt5)?;
        let transformer: WanConfig = manifest.component("transformer")?.config()?;
        let vae: WanVaeConfig = manifest.component("vae")?.config()?;
        let path = manifest.path("transformer", CONFIG);
        transformer.check(&path)?;
        vae.check(&manifest.path("vae", CONFIG))?;
        if transformer.in_channels != vae.z_dim {
            let problem = format!("`in_channels` is {}, the VAE's `z_dim` {}", transformer.in_channels, vae.z_dim);
            return Err(Error::checkpoint(path, problem));
        }
        if transformer.text_dim != text_encoder.d_model {
            let (text_dim, d_model) = (transformer.text_dim, text_encoder.d_model);
            let problem = format!("`text_dim` is {text_dim}, the text encoder's `d_model` {d_model}");
            return Err(Error::checkpoint(path, problem));
        }
        Ok(Self { text_encoder, transformer, vae })
    }

    fn card(&self, schedulers: Schedulers) -> DiffusionCard {
        let [_, patch_height, patch_width] = self.transformer.patch_size;
        let (spatial, temporal) = (self.vae.scale_factor_spatial, self.vae.scale_factor_temporal);
        let positions = self.transformer.rope_max_seq_len;
        let prompts = Prompts::Plain { default_length: MAX_SEQUENCE_LENGTH, max_length: MAX_SEQUENCE_LENGTH };
        let canvas = CanvasSupport {
            default_width: DEFAULT_WIDTH,
            default_height: DEFAULT_HEIGHT,
            size_multiple: lcm(PIPELINE_SIZE_MULTIPLE, lcm(spatial * patch_height, spatial * patch_width)),
            max_side: MAX_SIDE.min(positions * spatial * patch_height.min(patch_width)),
            max_pixels: MAX_PIXELS,
            frames: Some(FrameSupport {
                default_num_frames: DEFAULT_FRAMES,
                default_fps: DEFAULT_FPS,
                multiple: temporal,
                max_frames: MAX_FRAMES.min((positions - 1) * temporal + 1),
            }),
        };
        let sampling = SamplingSupport { default_steps: DEFAULT_STEPS, schedulers };
        let guidance = GuidanceSupport { kind: GuidanceKind::ClassifierFree, default_scale: DEFAULT_GUIDANCE_SCALE };
        DiffusionCard {
            acceleration: (self.transformer.num_layers > 1).then_some(CACHE_THRESHOLDS),
            ..DiffusionCard::new(Wan.name(), prompts, canvas, sampling, guidance)
        }
    }

    /// Shape of a request's latents: `[1, channels, frames, height, width]`.
    fn latent_shape(&self, request: &DiffusionRequest) -> [usize; 5] {
        let spatial = self.vae.scale_factor_spatial;
        let frames = (request.canvas.num_frames - 1) / self.vae.scale_factor_temporal + 1;
        [1, self.transformer.in_channels, frames, request.canvas.height / spatial, request.canvas.width / spatial]
    }

    /// Most bytes that one session keeps alive in each phase.
    fn plan(&self, request: &DiffusionRequest, placement: &Placement) -> MemoryPlan {
        let rows = 1 + usize::from(request.guidance.negative_prompt.is_some());
        let [_, _, frames, height, width] = self.latent_shape(request);
        let latents = self.latent_shape(request).iter().product::<usize>() * size_of::<f32>();
        let (text, dtype) = (request.prompt.max_sequence_length, placement.compute_dtype);
        let conditioning = rows * text * self.transformer.text_dim * dtype.size_in_bytes();
        // The sample, the solver's past (predictions, last sample, what it is computing) and the rows' predictions.
        let solver = latents * (6 + 2 * rows);
        let (pixels, cached) = (frames * height * width, request.acceleration != Acceleration::None);
        let caches = usize::from(cached) * self.transformer.cache_bytes_of_row(pixels, dtype);
        let denoise = rows * (self.transformer.peak_bytes_of_row(pixels, text, dtype) + caches);
        let decode = latents + self.vae.peak_values(height, width) * dtype.size_in_bytes();
        MemoryPlan::new([
            (Phase::Encode, conditioning + self.text_encoder.forward_bytes(rows, text, placement)),
            (Phase::Denoise, conditioning + solver + denoise),
            (Phase::VaeDecode, latents + decode),
        ])
    }
}

impl WanConfig {
    /// What the first-block cache of one branch holds, and what it takes while a pass is computed.
    fn cache_bytes_of_row(&self, latent_pixels: usize, dtype: DType) -> usize {
        let tokens = latent_pixels / self.patch_size.iter().product::<usize>();
        CACHED_WIDTHS * tokens * self.dim() * dtype.size_in_bytes()
    }

    /// Activations of one row of one forward pass, at the widest of the places below.
    fn peak_bytes_of_row(&self, latent_pixels: usize, text: usize, dtype: DType) -> usize {
        let tokens = latent_pixels / self.patch_size.iter().product::<usize>();
        let dim = self.dim();
        // x, its norm, q, k, v, the rotated q and k, the attention's answer.
        let self_attention = 8 * tokens * dim;
        // x, its norm, the hidden layer before and after its activation.
        let feed_forward = tokens * (2 * dim + 2 * self.ffn_dim);
        let rope = tokens * self.attention_head_dim * size_of::<f32>();
        // The embedded text between its layers, as keys before and after their norm, and as values; measured: 340 values more.
        let embedded = text * (6 * dim + 340);
        (self_attention.max(feed_forward) + embedded) * dtype.size_in_bytes() + rope
    }
}

fn lcm(a: usize, b: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    a / gcd(a, b) * b
}

/// `WanTransformer3DModel` without image conditioning.
pub struct WanTransformer {
    patch_embedding: PatchEmbedding,
    time_embedder: ConditionEmbedder,
    time_proj: Linear,
    /// The same two layers as for time, with a GELU between them.
    text_embedder: [Linear; 2],
    blocks: Vec<Block>,
    /// `[1, 2, dim]`: shift and scale of the last norm.
    scale_shift_table: Tensor,
    proj_out: Linear,
    compute_dtype: DType,
    config: WanConfig,
}

impl WanTransformer {
    /// Tensors as diffusers names them.
    pub fn load(weights: &Weights, config: &WanConfig) -> Result<Self> {
        let dim = config.dim();
        let condition = weights.pp("condition_embedder");
        let text = condition.pp("text_embedder");
        let mut blocks = Vec::with_capacity(config.num_layers);
        for layer in 0..config.num_layers {
            blocks.push(Block::load(&weights.pp("blocks").pp(layer), config)?);
        }
        let patch_values = config.out_channels * config.patch_size.iter().product::<usize>();
        Ok(Self {
            patch_embedding: PatchEmbedding::load(&weights.pp("patch_embedding"), config)?,
            time_embedder: ConditionEmbedder::load(&condition.pp("time_embedder"), config.freq_dim, dim)?,
            time_proj: Linear::load(&condition.pp("time_proj"), dim, 6 * dim)?,
            text_embedder: [
                Linear::load(&text.pp("linear_1"), config.text_dim, dim)?,
                Linear::load(&text.pp("linear_2"), dim, dim)?,
            ],
            blocks,
            scale_shift_table: weights.get(&[1, 2, dim], "scale_shift_table")?,
            proj_out: Linear::load(&weights.pp("proj_out"), dim, patch_values)?,
            compute_dtype: weights.placement().compute_dtype,
            config: config.clone(),
        })
    }

    /// f32 `latents [n, channels, frames, height, width]` at `timesteps` (0..1000, one per row) with `text [n, s,
    /// text_dim]` in the compute dtype: the predicted flow, f32 in the shape of the latents.
    pub fn forward(&self, latents: &Tensor, timesteps: &[f32], text: &Tensor) -> Result<Tensor> {
        self.forward_through(latents, timesteps, text, None)
    }

    /// As [`WanTransformer::forward`], where the rows that their caches let go skip all blocks but the first.
    pub fn forward_cached(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        text: &Tensor,
        caches: &mut [&mut BlockCache],
    ) -> Result<Tensor> {
        self.forward_through(latents, timesteps, text, Some(caches))
    }

    fn forward_through(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        text: &Tensor,
        caches: Option<&mut [&mut BlockCache]>,
    ) -> Result<Tensor> {
        let (n, _, frames, height, width) = latents.dims5()?;
        let [_, patch_height, patch_width] = self.config.patch_size;
        let grid = [frames, height / patch_height, width / patch_width];
        let rope = Rope::new(grid, self.config.attention_head_dim, self.device())?;
        let [text_1, text_2] = &self.text_embedder;
        let text = text_2.forward(&gelu_tanh(&text_1.forward(text)?)?)?; // [n, s, dim]
        let time = sinusoidal(timesteps, self.config.freq_dim, self.device())?;
        let time = self.time_embedder.forward(&time)?; // [n, dim]
        let modulation = self.time_proj.forward(&silu(&time)?)?.reshape((n, 6, ()))?; // [n, 6, dim]

        let through = |blocks: &[Block], x: Tensor, text: &Tensor, modulation: &Tensor| {
            blocks.iter().try_fold(x, |x, block| block.forward(&x, text, modulation, &rope))
        };
        let x = self.patch_embedding.forward(&latents.to_dtype(self.compute_dtype)?)?; // [n, l, dim]
        let x = match caches {
            None => through(&self.blocks, x, &text, &modulation)?,
            Some(caches) => {
                let after = self.blocks[0].forward(&x, &text, &modulation, &rope)?;
                through_blocks(caches, &x, &after, |rows| {
                    let others = &self.blocks[1..];
                    through(others, select(&after, rows)?, &select(&text, rows)?, &select(&modulation, rows)?)
                })?
            }
        };
        let last = self.scale_shift_table.broadcast_add(&time.unsqueeze(1)?)?; // [n, 2, dim]
        let x = modulated_layer_norm(&x, &last.narrow(1, 0, 1)?, &last.narrow(1, 1, 1)?, self.config.eps)?;
        self.unpatchify(&self.proj_out.forward(&x)?.to_dtype(DType::F32)?, grid)
    }

    /// `[n, l, patch_height * patch_width * channels]` to `[n, channels, frames, height, width]`.
    fn unpatchify(&self, x: &Tensor, [frames, rows, columns]: [usize; 3]) -> Result<Tensor> {
        let (n, [_, ph, pw], channels) = (x.dim(0)?, self.config.patch_size, self.config.out_channels);
        let x = x.reshape(vec![n, frames, rows, columns, ph, pw, channels])?;
        let x = x.permute(vec![0, 6, 1, 2, 4, 3, 5])?.contiguous()?; // [n, channels, frames, rows, ph, columns, pw]
        Ok(x.reshape((n, channels, frames, rows * ph, columns * pw))?)
    }

    fn device(&self) -> &Device {
        self.scale_shift_table.device()
    }
}

/// A convolution whose stride is its kernel, which is a matrix product over patches.
struct PatchEmbedding {
    linear: Linear,
    patch_size: [usize; 3],
}

impl PatchEmbedding {
    fn load(weights: &Weights, config: &WanConfig) -> Result<Self> {
        let (dim, channels, [pt, ph, pw]) = (config.dim(), config.in_channels, config.patch_size);
        let kernel = weights.get(&[dim, channels, pt, ph, pw], "weight")?;
        let linear = Linear::new(kernel.reshape((dim, channels * pt * ph * pw))?, Some(weights.get(&[dim], "bias")?));
        Ok(Self { linear, patch_size: config.patch_size })
    }

    /// `[n, channels, frames, height, width]` to `[n, l, dim]`, tokens in the order frame, row, column.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let ((n, channels, frames, height, width), [_, ph, pw]) = (x.dims5()?, self.patch_size);
        let (rows, columns) = (height / ph, width / pw);
        let x = x.reshape(vec![n, channels, frames, rows, ph, columns, pw])?;
        let x = x.permute(vec![0, 2, 3, 5, 1, 4, 6])?.contiguous()?; // [n, frames, rows, columns, channels, ph, pw]
        self.linear.forward(&x.reshape((n, frames * rows * columns, channels * ph * pw))?)
    }
}

/// Rotations of the tokens of a grid; a third of each head turns with time, height and width.
struct Rope {
    /// f32 `[l, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// `grid` is frames, rows, columns. Angles in f64, as in the reference.
    fn new(grid: [usize; 3], head_dim: usize, device: &Device) -> Result<Self> {
        let side = 2 * (head_dim / 6);
        let dims = [head_dim - 2 * side, side, side];
        // One per pair of values that turns together.
        let frequencies = dims.map(|dim| {
            let exponents = (0..dim / 2).map(|pair| 2.0 * pair as f64 / dim as f64);
            exponents.map(|exponent| 1.0 / ROPE_THETA.powf(exponent)).collect::<Vec<_>>()
        });
        let [frames, rows, columns] = grid;
        let mut angles = Vec::with_capacity(frames * rows * columns * head_dim / 2);
        for frame in 0..frames {
            for row in 0..rows {
                for column in 0..columns {
                    for (axis, position) in [frame, row, column].into_iter().enumerate() {
                        angles.extend(frequencies[axis].iter().map(|frequency| position as f64 * frequency));
                    }
                }
            }
        }
        let table = |function: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|angle| function(*angle) as f32).collect();
            Tensor::from_vec(values, (frames * rows * columns, head_dim / 2), device)
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }
}

struct Block {
    attn1: Attention,
    /// Before the cross attention; the other norms have no weights.
    norm2: Option<LayerNorm>,
    attn2: Attention,
    ffn: [Linear; 2],
    /// `[1, 6, dim]`: shift, scale and gate of the self attention, then of the feed-forward layers.
    scale_shift_table: Tensor,
    eps: f64,
}

impl Block {
    fn load(weights: &Weights, config: &WanConfig) -> Result<Self> {
        let (dim, net) = (config.dim(), weights.pp("ffn").pp("net"));
        let norm2 = || LayerNorm::load(&weights.pp("norm2"), dim, config.eps);
        Ok(Self {
            attn1: Attention::load(&weights.pp("attn1"), config)?,
            norm2: config.cross_attn_norm.then(norm2).transpose()?,
            attn2: Attention::load(&weights.pp("attn2"), config)?,
            ffn: [
                Linear::load(&net.pp(0).pp("proj"), dim, config.ffn_dim)?,
                Linear::load(&net.pp(2), config.ffn_dim, dim)?,
            ],
            scale_shift_table: weights.get(&[1, 6, dim], "scale_shift_table")?,
            eps: config.eps,
        })
    }

    /// `x [n, l, dim]`, `text [n, s, dim]`, `modulation [n, 6, dim]`.
    fn forward(&self, x: &Tensor, text: &Tensor, modulation: &Tensor, rope: &Rope) -> Result<Tensor> {
        let modulation = self.scale_shift_table.broadcast_add(modulation)?;
        let part = |i: usize| modulation.narrow(1, i, 1); // [n, 1, dim]
        let y = modulated_layer_norm(x, &part(0)?, &part(1)?, self.eps)?;
        let y = self.attn1.forward(&y, &y, Some(rope))?;
        let x = gated_sum(x, &part(2)?, &y)?;

        let y = match &self.norm2 {
            Some(norm) => norm.forward(&x)?,
            None => x.clone(),
        };
        let x = (x + self.attn2.forward(&y, text, None)?)?;

        let y = modulated_layer_norm(&x, &part(3)?, &part(4)?, self.eps)?;
        // Two statements: the widest tensor of the block is freed before the second product.
        let hidden = gelu_tanh(&self.ffn[0].forward(&y)?)?;
        let y = self.ffn[1].forward(&hidden)?;
        Ok(gated_sum(&x, &part(5)?, &y)?)
    }
}

/// Attention of `x` over itself or over the text, with q and k normalised across all heads at once.
struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    num_heads: usize,
}

impl Attention {
    fn load(weights: &Weights, config: &WanConfig) -> Result<Self> {
        let dim = config.dim();
        let linear = |name: &str| Linear::load(&weights.pp(name), dim, dim);
        // Some conversions carry the norm of a query that image conditioning does not have either.
        weights.ignore("norm_added_q.weight");
        Ok(Self {
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: Linear::load(&weights.pp("to_out").pp(0), dim, dim)?,
            norm_q: RmsNorm::load(&weights.pp("norm_q"), dim, config.eps)?,
            norm_k: RmsNorm::load(&weights.pp("norm_k"), dim, config.eps)?,
            num_heads: config.num_attention_heads,
        })
    }

    /// `x [n, l, dim]` looks at `context [n, s, dim]`; with `rope` both are turned.
    fn forward(&self, x: &Tensor, context: &Tensor, rope: Option<&Rope>) -> Result<Tensor> {
        let q = self.normed(&self.to_q.forward(x)?, &self.norm_q, rope)?;
        let k = self.normed(&self.to_k.forward(context)?, &self.norm_k, rope)?;
        let v = self.heads(&self.to_v.forward(context)?)?;
        let y = attention(&q, &k, &v, &AttentionOptions::default())?; // [n, l, heads, head_dim]
        self.to_out.forward(&y.flatten_from(2)?)
    }

    /// `[n, l, dim]` to `[n, l, heads, head_dim]`, normed and turned.
    fn normed(&self, x: &Tensor, norm: &RmsNorm, rope: Option<&Rope>) -> Result<Tensor> {
        match rope {
            Some(Rope { cos, sin }) => {
                let norm = norm.of_queries_or_keys();
                Ok(norm_rope(&self.heads(x)?, Some(&norm), cos, sin, RopeLayout::Interleaved)?)
            }
            None => self.heads(&norm.forward(x)?),
        }
    }

    /// `[n, l, dim]` to `[n, l, heads, head_dim]`.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (n, l, _) = x.dims3()?;
        Ok(x.reshape((n, l, self.num_heads, ()))?)
    }
}
