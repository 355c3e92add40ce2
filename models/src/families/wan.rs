//! Wan2.1, from text alone and from pictures: UMT5 text, a CLIP vision encoder, a diffusion transformer over space-time
//! patches, a causal video VAE.
//!
//! Owns: what a checkpoint of either pipeline must look like, limits and defaults. Does not know: the denoising loop,
//! guidance, batching, RGB bytes.
//! Source: diffusers `pipelines/wan/pipeline_wan.py`, `pipeline_wan_i2v.py`.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use serde::Deserialize;
use serde_json::Value;

use self::original::WanNames;
use self::pictures::Pictures;
use self::transformer::WanTransformer;
use crate::checkpoint::{CONFIG, MODEL_INDEX, Manifest, OpenWeights};
use crate::config::bounds::{
    MAX_CHANNELS, MAX_HEAD_DIM, MAX_HEADS, MAX_INNER_WIDTH, MAX_LAYERS, MAX_LEARNED_POSITIONS, MAX_PATCH, MAX_WIDTH,
    check_product,
};
use crate::config::{Bound, Bounded};
use crate::device::Placement;
use crate::diffusion::acceleration::CacheSupport;
use crate::diffusion::acceleration::published::{Published, WAN_I2V_14B, WAN_T2V_1_3B, WAN_T2V_14B};
use crate::diffusion::canvas::{CanvasSupport, FrameSupport, SizeRule};
use crate::diffusion::guidance::{GuidanceKind, GuidanceSupport};
use crate::diffusion::keyframes::KeyframeSupport;
use crate::diffusion::prompt::Prompts;
use crate::diffusion::sampling::SamplingSupport;
use crate::diffusion::{Canvas, DiffusionCard, DiffusionRequest};
use crate::encoders::clip_vision::{ClipVisionConfig, ClipVisionEncoder};
use crate::encoders::t5::{T5Config, T5Encoder, T5Kind};
use crate::error::{Error, Result};
use crate::families::lcm;
use crate::families::loading::{self, Dequantised, Parts};
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::lora::{Adapters, LoraNames, LoraSupport, NetworkNames, Sites};
use crate::memory::MemoryPlan;
use crate::request::Phase;
use crate::solver::schedulers::{Schedulers, Training};
use crate::tokenizer::Tokenizer;
use crate::vae::wan::original::WanVaeNames;
use crate::vae::wan::{WanVaeConfig, WanVaeDecoder};
use crate::weights::Weights;

pub mod original;
pub mod pictures;
pub mod pipeline;
pub mod transformer;

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

/// Pipelines of diffusers that make videos from text, and from pictures.
const PIPELINES: [&str; 2] = ["WanPipeline", "WanImageToVideoPipeline"];
/// What a picture's encoder may be called; a projection is not used.
const IMAGE_ENCODERS: [&str; 2] = ["CLIPVisionModel", "CLIPVisionModelWithProjection"];

/// Wan2.1: text to video, image to video, first and last image to video.
pub struct Wan;

impl Family for Wan {
    fn name(&self) -> &'static str {
        "wan"
    }

    fn makes(&self) -> &'static str {
        "video"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        PIPELINES.contains(&manifest.architecture())
    }

    fn text_encoders(&self) -> &'static [&'static str] {
        &["text_encoder"]
    }

    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel> {
        loading::load(build, manifest, open, options, |model| Parts {
            card: &mut model.card,
            adapters: &model.adapters,
            fixed_bytes: 0,
        })
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
        Bound::size("image_dim", MAX_WIDTH),
        Bound::size("added_kv_proj_dim", MAX_WIDTH),
        Bound::size("pos_embed_seq_len", MAX_LEARNED_POSITIONS),
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
        let dim = self.dim();
        let problem = if self.added_kv_proj_dim != self.image_dim.map(|_| dim) {
            format!("`added_kv_proj_dim` is {:?}; {dim} with `image_dim`, and null without it", self.added_kv_proj_dim)
        } else if self.image_dim.is_none() && self.pos_embed_seq_len.is_some() {
            "`pos_embed_seq_len` is of a model with `image_dim`".to_owned()
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
    pictures: Option<Pictures>,
    adapters: Adapters,
}

/// The configurations of a checkpoint, read and found to fit together.
struct Sizes {
    text_encoder: T5Config,
    transformer: WanConfig,
    vae: WanVaeConfig,
    /// Of models that take pictures.
    image_encoder: Option<ClipVisionConfig>,
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
        let text_encoder = T5Encoder::load(&open("text_encoder")?, &sizes.text_encoder)?;
        let vision = match &sizes.image_encoder {
            Some(config) => Some(ClipVisionEncoder::load(&open("image_encoder")?, config.clone())?),
            None => None,
        };
        // Text encoders take no terms, as in diffusers.
        let sites = Arc::<Sites>::default();
        let transformer =
            WanTransformer::load(&open("transformer")?.or_named(WanNames).noting(&sites), &sizes.transformer)?;
        let names = LoraNames::new(vec![NetworkNames::denoiser(&sites, &WanNames, [])]);
        let vae = open("vae")?.or_named(WanVaeNames::new(&sizes.vae));
        let pictures = vision.map(|vision| Pictures::load(manifest, vision, &vae, &sizes.vae)).transpose()?;
        Ok(Self {
            card: sizes.card(schedulers, placement.compute_dtype),
            tokenizer,
            placement: placement.clone(),
            text_encoder,
            transformer,
            vae: WanVaeDecoder::load(&vae, &sizes.vae)?,
            pictures,
            adapters: Adapters::new(names, placement),
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
    let classes: [(&str, &[&str]); 3] = [
        ("text_encoder", &["UMT5EncoderModel"]),
        ("transformer", &["WanTransformer3DModel"]),
        ("vae", &["AutoencoderKLWan"]),
    ];
    let of_pictures: (&str, &[&str]) = ("image_encoder", &IMAGE_ENCODERS);
    let of_pictures = takes_pictures(manifest).then_some(of_pictures);
    for (component, supported) in classes.into_iter().chain(of_pictures) {
        let found = manifest.class_of(component).unwrap_or("absent");
        if !supported.contains(&found) {
            let problem = format!("`{component}` is {found}; supported is {}", supported.join(" or "));
            return Err(Error::checkpoint(index_path, problem));
        }
    }
    Ok(())
}

fn takes_pictures(manifest: &Manifest) -> bool {
    manifest.architecture() == PIPELINES[1]
}

impl Sizes {
    fn read(manifest: &Manifest) -> Result<Self> {
        let text_encoder = T5Config::read(&manifest.component("text_encoder")?.fields(CONFIG)?, T5Kind::Umt5)?;
        let transformer: WanConfig = manifest.component("transformer")?.config()?;
        let vae: WanVaeConfig = manifest.component("vae")?.config()?;
        let path = manifest.path("transformer", CONFIG);
        transformer.check(&path)?;
        vae.check(&manifest.path("vae", CONFIG))?;
        let image_encoder = match takes_pictures(manifest) {
            true => Some(ClipVisionConfig::read(manifest.component("image_encoder")?.fields(CONFIG)?)?),
            false => None,
        };
        let sizes = Self { text_encoder, transformer, vae, image_encoder };
        sizes.check(&path)?;
        Ok(sizes)
    }

    /// Refuses parts that do not fit together; `path` is the transformer's file.
    fn check(&self, path: &Path) -> Result<()> {
        let Self { text_encoder, transformer, vae, image_encoder } = self;
        if transformer.out_channels != vae.z_dim {
            let problem = format!("`out_channels` is {}, the VAE's `z_dim` {}", transformer.out_channels, vae.z_dim);
            return Err(Error::checkpoint(path, problem));
        }
        // Beside the noisy latents a mask of the known frames, and their latents.
        let of_pictures = image_encoder.as_ref().map_or(0, |_| vae.scale_factor_temporal + vae.z_dim);
        if transformer.in_channels != vae.z_dim + of_pictures {
            let problem = format!(
                "`in_channels` is {}; {} fit the VAE and the pipeline",
                transformer.in_channels,
                vae.z_dim + of_pictures
            );
            return Err(Error::checkpoint(path, problem));
        }
        if transformer.image_dim != image_encoder.as_ref().map(|config| config.hidden_size) {
            let problem =
                format!("`image_dim` is {:?}, which is not the width of the image encoder", transformer.image_dim);
            return Err(Error::checkpoint(path, problem));
        }
        if let (Some(length), Some(encoder)) = (transformer.pos_embed_seq_len, image_encoder)
            && length != 2 * encoder.num_positions()
        {
            let problem =
                format!("`pos_embed_seq_len` is {length}; two pictures have {} positions", 2 * encoder.num_positions());
            return Err(Error::checkpoint(path, problem));
        }
        if transformer.text_dim != text_encoder.d_model {
            let (text_dim, d_model) = (transformer.text_dim, text_encoder.d_model);
            let problem = format!("`text_dim` is {text_dim}, the text encoder's `d_model` {d_model}");
            return Err(Error::checkpoint(path, problem));
        }
        Ok(())
    }

    /// Vectors that the transformer is told of pictures.
    fn image_tokens(&self) -> usize {
        let of_one = self.image_encoder.as_ref().map_or(0, ClipVisionConfig::num_positions);
        self.transformer.pos_embed_seq_len.unwrap_or(of_one)
    }

    fn card(&self, schedulers: Schedulers, dtype: DType) -> DiffusionCard {
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
            sizes: SizeRule::AspectOfPicture,
            frames: Some(FrameSupport {
                default_num_frames: DEFAULT_FRAMES,
                default_fps: DEFAULT_FPS,
                multiple: temporal,
                max_frames: MAX_FRAMES.min((positions - 1) * temporal + 1),
                trained_frames: DEFAULT_FRAMES.min((positions - 1) * temporal + 1),
                has_one_length: false,
            }),
        };
        let sampling = SamplingSupport { default_steps: DEFAULT_STEPS, schedulers };
        let guidance = GuidanceSupport::constant(GuidanceKind::ClassifierFree, DEFAULT_GUIDANCE_SCALE).of_flow();
        DiffusionCard {
            tiling: self.vae.vae_tiling(dtype),
            acceleration: self.cache_support(),
            loras: LoraSupport::NoFolder,
            keyframes: self.image_encoder.as_ref().map(|_| match self.transformer.pos_embed_seq_len {
                Some(_) => KeyframeSupport::FirstAndLast,
                None => KeyframeSupport::First,
            }),
            ..DiffusionCard::new(Wan.name(), prompts, canvas, sampling, guidance)
        }
    }

    /// None where there is no second block.
    fn cache_support(&self) -> Option<CacheSupport> {
        (self.transformer.num_layers > 1).then(|| CacheSupport { published: self.transformer.published() })
    }

    /// Shape of a request's latents: `[1, channels, frames, height, width]`.
    fn latent_shape(&self, request: &DiffusionRequest) -> [usize; 5] {
        let spatial = self.vae.scale_factor_spatial;
        let frames = (request.canvas.num_frames - 1) / self.vae.scale_factor_temporal + 1;
        [1, self.transformer.out_channels, frames, request.canvas.height / spatial, request.canvas.width / spatial]
    }

    /// Most bytes that one session keeps alive in each phase.
    fn plan(
        &self,
        request: &DiffusionRequest,
        branches_at_once: usize,
        placement: &Placement,
        dequantised: Dequantised,
    ) -> MemoryPlan {
        let rows = request.guidance.num_branches();
        let [_, _, frames, height, width] = self.latent_shape(request);
        let latents = self.latent_shape(request).iter().product::<usize>() * size_of::<f32>();
        let (text, dtype) = (request.prompt.max_sequence_length, placement.compute_dtype);
        let image = self.image_tokens();
        let seen = image * self.transformer.image_dim.unwrap_or(0) * dtype.size_in_bytes();
        // Of the pictures beside the noisy latents; each row has them once more as the transformer's input.
        let known =
            latents / self.transformer.out_channels * (self.transformer.in_channels - self.transformer.out_channels);
        let conditioning = rows * text * self.transformer.text_dim * dtype.size_in_bytes() + seen + known;
        // The sample, the solver's past (predictions, last sample, what it is computing) and the rows' predictions.
        let solver = latents * (6 + 2 * rows) + rows * known;
        // Of each row: the input, its patches; the answer in patches, in the latents' order, and apart from other rows.
        let ends = rows * (2 * known + 5 * latents);
        let pixels = frames * height * width;
        let copies = request.cache.as_ref().map_or(0, |cache| cache.stream_copies(false));
        let caches = copies * self.transformer.stream_bytes_of_row(pixels, dtype);
        let work = branches_at_once * self.transformer.peak_bytes_of_row(pixels, text + image, dtype)
            + dequantised.transformer;
        // A clean sample, and what the first one is shown with.
        let (shown, preview) = match request.partial_images {
            0 => (0, 0),
            _ => (latents, self.vae.preview_bytes(dtype)),
        };
        let denoise = work.max(preview) + shown + rows * caches + self.transformer.rope_bytes(pixels);
        let decode = latents + self.vae.peak_decode_bytes(frames, (height, width), request.vae_tiling, dtype);
        let text_pass = self.text_encoder.forward_bytes(rows, text, placement) + dequantised.text_encoder;
        let vision_pass = self.image_encoder.as_ref().map_or(0, |config| config.forward_bytes(dtype));
        let of_pictures = self.image_encoder.as_ref().map(|_| {
            let Canvas { height, width, .. } = request.canvas;
            let pixels = 2 * self.vae.scale_factor_temporal * 3 * height * width * size_of::<f32>();
            let work = self.vae.peak_encode_bytes(height, width, request.vae_tiling, dtype);
            (Phase::VaeEncode, conditioning + known + pixels + work)
        });
        let phases = [
            (Phase::Encode, conditioning + text_pass.max(vision_pass)),
            (Phase::Denoise, conditioning + solver + ends + denoise),
            (Phase::VaeDecode, latents + decode),
        ];
        MemoryPlan::new(phases.into_iter().chain(of_pictures))
    }
}

impl WanConfig {
    /// The published checkpoint that has these sizes. Those between two pictures have no figure.
    fn published(&self) -> Option<&'static Published> {
        let sizes = (self.num_layers, self.dim(), self.ffn_dim);
        match (sizes, self.in_channels, self.image_dim, self.pos_embed_seq_len) {
            ((30, 1536, 8960), 16, None, None) => Some(&WAN_T2V_1_3B),
            ((40, 5120, 13_824), 16, None, None) => Some(&WAN_T2V_14B),
            ((40, 5120, 13_824), 36, Some(1280), None) => Some(&WAN_I2V_14B),
            _ => None,
        }
    }

    /// The tokens of one row once, as they go from block to block.
    fn stream_bytes_of_row(&self, latent_pixels: usize, dtype: DType) -> usize {
        let tokens = latent_pixels / self.patch_size.iter().product::<usize>();
        tokens * self.dim() * dtype.size_in_bytes()
    }

    /// Activations of one row of one forward pass, at the widest of the places below.
    fn peak_bytes_of_row(&self, latent_pixels: usize, text: usize, dtype: DType) -> usize {
        let tokens = latent_pixels / self.patch_size.iter().product::<usize>();
        let dim = self.dim();
        // x, its norm, q, k, v, the rotated q and k, the attention's answer.
        let self_attention = 8 * tokens * dim;
        // x, its norm, the hidden layer before and after its activation.
        let feed_forward = tokens * (2 * dim + 2 * self.ffn_dim);
        // The embedded text between its layers, as keys before and after their norm, and as values; measured: 340 values more.
        let embedded = text * (6 * dim + 340);
        (self_attention.max(feed_forward) + embedded) * dtype.size_in_bytes()
    }

    /// What a session keeps of where tokens stand.
    fn rope_bytes(&self, latent_pixels: usize) -> usize {
        let tokens = latent_pixels / self.patch_size.iter().product::<usize>();
        tokens * self.attention_head_dim * size_of::<f32>()
    }
}
