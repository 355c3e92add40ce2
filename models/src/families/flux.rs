//! FLUX.1 (dev and schnell): CLIP and T5 prompts, one transformer, flow-matching Euler, KL-VAE.
//!
//! Owns: how the parts fit together, packing of latents, limits and defaults; the way of a request is in `pipeline`. Does
//! not know: sessions, batching.
//! Source: diffusers `pipelines/flux/pipeline_flux.py` and its siblings for image to image and inpainting. Noise is drawn
//! in f32, as diffusers does for an f32 pipeline.

use crate::diffusion::acceleration::CacheSupport;
use crate::diffusion::canvas::{CanvasSupport, SizeRule};
use crate::diffusion::edit::{EditDefaults, EditSupport, StepRounding};
use crate::diffusion::guidance::{GuidanceKind, GuidanceSupport};
use crate::diffusion::prompt::Prompts;
use crate::diffusion::sampling::SamplingSupport;
use crate::diffusion::{DiffusionCard, DiffusionRequest};
use std::sync::Arc;

use candle_core::Tensor;

use crate::checkpoint::{CONFIG, Manifest, OpenWeights};
use crate::device::Placement;
use crate::encoders::clip::{ClipTextConfig, ClipTextEncoder};
use crate::encoders::t5::{T5Config, T5Encoder, T5Kind};
use crate::error::{Error, Result};
use crate::families::loading::{self, Parts};
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::lora::{Adapters, LoraSupport, Sites};
use crate::runner::diffusion::DenoiseRow;
use crate::solver::schedulers::{Schedulers, Training};
use crate::tokenizer::Tokenizer;
use crate::vae::kl::{KlConfig, KlDecoder, KlEncoder};
use crate::vae::original::KlNames;
use crate::weights::Weights;

mod lora;
pub mod original;
pub mod pipeline;
pub mod transformer;

use original::FluxNames;
use transformer::{FluxTransformer, FluxTransformerConfig, PACK, TransformerInput};

/// Latent positions on each side of a picture of default size (`default_sample_size` of the pipeline).
const DEFAULT_SAMPLE_SIZE: usize = 128;
const MAX_SIDE: usize = 4096;
/// Four times the area that the model was made for; beyond it pictures fall apart.
const MAX_PIXELS: usize = 2048 * 2048;

/// Tokens of a prompt of schnell; dev takes twice as many.
const SHORT_PROMPT: usize = 256;

/// Copies of the latents in f32 that a session with two branches holds: the sample; of each branch what the model sees of
/// it and predicts, in the batch and by itself.
const LATENT_COPIES: usize = 7;

/// FLUX.1.
pub struct Flux;

impl Family for Flux {
    fn name(&self) -> &'static str {
        "flux"
    }

    fn makes(&self) -> &'static str {
        "image"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        manifest.architecture() == "FluxPipeline"
    }

    fn text_encoders(&self) -> &'static [&'static str] {
        &["text_encoder", "text_encoder_2"]
    }

    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel> {
        loading::load(build, manifest, open, options, |model| Parts {
            card: &mut model.card,
            adapters: &model.adapters,
            fixed_bytes: 0,
        })
    }
}

fn build(manifest: &Manifest, open: &mut OpenWeights<'_>) -> Result<FluxModel> {
    let placement = open.placement().clone();
    FluxModel::load(manifest, &placement, &mut |component| open.component(manifest, component))
}

/// All parts of a FLUX.1 checkpoint. Immutable once loaded.
#[derive(Debug)]
pub struct FluxModel {
    card: DiffusionCard,
    tokenizer: Tokenizer,
    text_encoder: ClipTextEncoder,
    tokenizer_2: Tokenizer,
    text_encoder_2: T5Encoder,
    t5_config: T5Config,
    transformer: FluxTransformer,
    vae: KlDecoder,
    vae_encoder: KlEncoder,
    vae_config: KlConfig,
    adapters: Adapters,
    placement: Placement,
}

/// What the transformer needs of one prompt.
#[derive(Debug, Clone)]
pub struct FluxConditioning {
    /// Of T5, `[1, max_sequence_length, joint_attention_dim]`.
    pub prompt_embeds: Tensor,
    /// Of CLIP, `[1, pooled_projection_dim]`.
    pub pooled_prompt_embeds: Tensor,
}

impl FluxModel {
    /// Reads every component; `open` gives the weights of the component in the folder that it is called with. Those that
    /// are not dry are at `placement`.
    pub fn load(
        manifest: &Manifest,
        placement: &Placement,
        open: &mut dyn FnMut(&str) -> Result<Weights>,
    ) -> Result<Self> {
        let component = |name| manifest.component(name);
        let clip_config = ClipTextConfig::read(component("text_encoder")?.fields(CONFIG)?)?;
        let t5_config = T5Config::read(&component("text_encoder_2")?.fields(CONFIG)?, T5Kind::T5)?;
        let transformer_config: FluxTransformerConfig = component("transformer")?.config()?;
        let vae_config: KlConfig = component("vae")?.config()?;
        transformer_config.check(&manifest.path("transformer", CONFIG))?;
        vae_config.check(&manifest.path("vae", CONFIG))?;
        check_parts_fit(manifest, &clip_config, &t5_config, &transformer_config, &vae_config)?;

        let (clip_vocab, clip_len) = (clip_config.vocab_size, clip_config.max_position_embeddings);
        let tokenizer = component("tokenizer")?.tokenizer_of_encoder(clip_vocab, clip_len)?;
        let tokenizer_2 = component("tokenizer_2")?.tokenizer_of_encoder(t5_config.vocab_size, SHORT_PROMPT)?;
        let [transformer_sites, clip_sites] = [Arc::<Sites>::default(), Arc::default()];
        let clip = open("text_encoder")?.noting(&clip_sites);
        let text_encoder = ClipTextEncoder::load(&clip, clip_config)?;
        let text_encoder_2 = T5Encoder::load(&open("text_encoder_2")?, &t5_config)?;
        let transformer_weights = open("transformer")?.or_named(FluxNames).noting(&transformer_sites);
        let transformer = FluxTransformer::load(&transformer_weights, transformer_config)?;
        let vae = open("vae")?.or_named(KlNames::new(vae_config.block_out_channels.len()));
        Ok(Self {
            card: card(transformer.config(), &vae_config, Schedulers::read(manifest, Training::FlowWithMu)?, placement),
            tokenizer,
            tokenizer_2,
            adapters: Adapters::new(lora::names(&transformer_sites, &clip_sites), placement),
            placement: placement.clone(),
            text_encoder,
            text_encoder_2,
            transformer,
            vae: KlDecoder::load(&vae, &vae_config)?,
            vae_encoder: KlEncoder::load(&vae, &vae_config)?,
            t5_config,
            vae_config,
        })
    }

    /// Rows and columns of image tokens.
    fn grid(&self, request: &DiffusionRequest) -> (usize, usize) {
        let pixels_per_token = self.vae_config.vae_scale_factor() * PACK;
        (request.canvas.height / pixels_per_token, request.canvas.width / pixels_per_token)
    }

    /// Height and width of the latents.
    fn latents(&self, request: &DiffusionRequest) -> (usize, usize) {
        let (rows, columns) = self.grid(request);
        (rows * PACK, columns * PACK)
    }

    /// The rows side by side, as the transformer takes them.
    fn with_input<T>(
        &self,
        rows: &[DenoiseRow<'_, FluxConditioning>],
        forward: impl FnOnce(&TransformerInput<'_>) -> Result<T>,
    ) -> Result<T> {
        // Of another dtype only where another model has encoded the prompt.
        let dtype = self.placement.compute_dtype;
        let stack = |part: fn(&DenoiseRow<'_, FluxConditioning>) -> Tensor| {
            Tensor::cat(&rows.iter().map(part).collect::<Vec<_>>(), 0)
        };
        let timesteps: Vec<f32> = rows.iter().map(|row| row.timestep as f32).collect();
        let guidance_scales: Vec<f32> = rows.iter().map(|row| row.request.guidance.guidance_scale as f32).collect();
        forward(&TransformerInput {
            latents: &stack(|row| row.latents.clone())?,
            prompt_embeds: &stack(|row| row.conditioning.prompt_embeds.clone())?.to_dtype(dtype)?,
            pooled_prompt_embeds: &stack(|row| row.conditioning.pooled_prompt_embeds.clone())?.to_dtype(dtype)?,
            timesteps: &timesteps,
            guidance_scales: &guidance_scales,
            grid: self.grid(rows[0].request),
        })
    }

    /// Latents `[1, c, h, w]` as tokens `[1, (h/2)(w/2), 4c]`: a square of four positions is one token, channel by
    /// channel.
    fn pack(&self, latents: &Tensor, (rows, columns): (usize, usize)) -> Result<Tensor> {
        let channels = latents.dim(1)?;
        let squares = latents.reshape((channels, rows, PACK, columns, PACK))?.permute((1, 3, 0, 2, 4))?;
        Ok(squares.reshape((1, rows * columns, channels * PACK * PACK))?)
    }

    /// The way back.
    fn unpack(&self, tokens: &Tensor, (rows, columns): (usize, usize)) -> Result<Tensor> {
        let channels = tokens.dim(2)? / (PACK * PACK);
        let squares = tokens.reshape((rows, columns, channels, PACK, PACK))?.permute((2, 0, 3, 1, 4))?;
        Ok(squares.reshape((1, channels, rows * PACK, columns * PACK))?)
    }
}

/// Each part may be sound and yet not belong to the others.
fn check_parts_fit(
    manifest: &Manifest,
    clip: &ClipTextConfig,
    t5: &T5Config,
    transformer: &FluxTransformerConfig,
    vae: &KlConfig,
) -> Result<()> {
    let pairs = [
        ("text_encoder", "hidden_size", clip.hidden_size, "pooled_projection_dim", transformer.pooled_projection_dim),
        ("text_encoder_2", "d_model", t5.d_model, "joint_attention_dim", transformer.joint_attention_dim),
        ("vae", "latent_channels", vae.latent_channels, "in_channels / 4", transformer.latent_channels()),
    ];
    for (component, field, found, wanted_by, wanted) in pairs {
        if found != wanted {
            let problem = format!("{field} is {found}, but the transformer's {wanted_by} is {wanted}");
            return Err(Error::checkpoint(manifest.path(component, CONFIG), problem));
        }
    }
    Ok(())
}

/// Defaults of `FluxPipeline.__call__` for dev; those of the model card for schnell, which was distilled without
/// guidance and with shorter prompts.
fn card(
    transformer: &FluxTransformerConfig,
    vae: &KlConfig,
    schedulers: Schedulers,
    placement: &Placement,
) -> DiffusionCard {
    let (default_steps, default_scale, max_length, kind) = match transformer.guidance_embeds {
        true => (28, 3.5, 512, GuidanceKind::Embedded),
        false => (4, 0.0, SHORT_PROMPT, GuidanceKind::None),
    };
    // Of `FluxImg2ImgPipeline.__call__` and `FluxInpaintPipeline.__call__`.
    let edit_guidance_scale = if kind == GuidanceKind::None { 0.0 } else { 7.0 };
    let edit = Some(EditDefaults { strength: 0.6, guidance_scale: edit_guidance_scale });
    let side = DEFAULT_SAMPLE_SIZE * vae.vae_scale_factor();
    let prompts = Prompts::Plain { default_length: max_length, max_length };
    let canvas = CanvasSupport {
        default_width: side,
        default_height: side,
        size_multiple: vae.vae_scale_factor() * PACK,
        max_side: MAX_SIDE,
        max_pixels: MAX_PIXELS,
        sizes: SizeRule::AspectOfPicture,
        frames: None,
    };
    let sampling = SamplingSupport { default_steps, schedulers };
    let guidance = GuidanceSupport::constant(kind, default_scale).of_flow();
    DiffusionCard {
        acceleration: transformer.can_skip_blocks().then(|| CacheSupport { published: transformer.published() }),
        loras: LoraSupport::NoFolder,
        tiling: vae.vae_tiling(placement.compute_dtype, LATENT_COPIES),
        edits: Some(EditSupport {
            image_to_image: edit,
            inpainting: edit,
            rounding: StepRounding::LeftOut,
            is_needed: false,
        }),
        ..DiffusionCard::new(Flux.name(), prompts, canvas, sampling, guidance)
    }
}

/// Vectors as wide as the stream that are alive at once for every token: in a single block the residual (1), its normed
/// copy (1), query, key and value before and after rotation (5), the attended values (1), the feed-forward before and
/// after its activation (8) and both side by side (5); and what the kernels hold besides. Measured on one block of each
/// kind: 24 with 1280 tokens, 20 with 4608.
const LIVE_WIDTHS: usize = 24;
