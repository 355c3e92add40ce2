//! HunyuanVideo, from text alone and from a picture: a language model and CLIP read the prompt, a transformer over space-time
//! patches, a causal video VAE.
//!
//! Owns: what a checkpoint of either pipeline must look like, limits and defaults. Does not know: the denoising loop, guidance,
//! batching, RGB bytes. Source: diffusers `pipelines/hunyuan_video/pipeline_hunyuan_video.py`,
//! `pipeline_hunyuan_video_image2video.py`.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;

use self::config::{HunyuanVideoConfig, ImageCondition};
use self::original::{ComfyNames, HunyuanVideoNames};
use self::text::{TextConfigs, TextEncoders, TextWeights};
use self::transformer::HunyuanVideoTransformer;
use crate::checkpoint::{CONFIG, MODEL_INDEX, Manifest, OpenWeights};
use crate::device::Placement;
use crate::diffusion::acceleration::CacheSupport;
use crate::diffusion::acceleration::published::HUNYUAN_VIDEO;
use crate::diffusion::canvas::{CanvasSupport, FrameSupport, SizeRule};
use crate::diffusion::guidance::{GuidanceKind, GuidanceSupport};
use crate::diffusion::keyframes::KeyframeSupport;
use crate::diffusion::prompt::Prompts;
use crate::diffusion::sampling::SamplingSupport;
use crate::diffusion::{Canvas, DiffusionCard, DiffusionRequest};
use crate::error::{Error, Result};
use crate::families::lcm;
use crate::families::loading::{self, Dequantised, Parts};
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::lora::{Adapters, LoraNames, LoraSupport, NetworkNames, Sites};
use crate::memory::MemoryPlan;
use crate::request::Phase;
use crate::solver::schedulers::{Schedulers, Training};
use crate::vae::hunyuan_video::encoder::HunyuanVaeEncoder;
use crate::vae::hunyuan_video::{HunyuanVaeConfig, HunyuanVaeDecoder};
use crate::vae::original::KlNames;
use crate::weights::Weights;

pub mod config;
mod llava;
pub mod original;
pub mod pipeline;
mod refiner;
pub mod text;
pub mod transformer;

/// The published model was trained up to 720p and 129 frames; past these bounds time and memory grow and quality falls.
/// 1280x720 and its neighbours in multiples of 16.
const MAX_PIXELS: usize = 1280 * 768;
const MAX_SIDE: usize = 1536;
/// More than ten seconds at the model's 24 frames per second.
const MAX_FRAMES: usize = 257;
/// The pipeline refuses other sizes whatever the patches are.
const PIPELINE_SIZE_MULTIPLE: usize = 16;
/// Defaults of `HunyuanVideoPipeline.__call__`.
const DEFAULT_WIDTH: usize = 1280;
const DEFAULT_HEIGHT: usize = 720;
const DEFAULT_FRAMES: usize = 129;
const DEFAULT_STEPS: usize = 50;
const DEFAULT_GUIDANCE_SCALE: f64 = 6.0;
/// That of `HunyuanVideoImageToVideoPipeline.__call__`. Its other defaults are the same, but that here a clip without a size has
/// the aspect of its picture, as with Wan.
const DEFAULT_GUIDANCE_SCALE_OF_PICTURES: f64 = 1.0;
const DEFAULT_SEQUENCE_LENGTH: usize = 256;
/// Four times as many tokens as the transformer was trained with.
const MAX_SEQUENCE_LENGTH: usize = 1024;
/// The rate at which the model was trained and its own example saves videos.
const DEFAULT_FPS: usize = 24;

/// Copies of its latents that a session holds while it decodes them, at most.
const LATENT_COPIES: usize = 3;

/// Pipelines of diffusers that make videos from text, and from a picture.
const PIPELINES: [&str; 2] = ["HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"];

/// HunyuanVideo: text to video, image to video.
pub struct HunyuanVideo;

impl Family for HunyuanVideo {
    fn name(&self) -> &'static str {
        "hunyuan_video"
    }

    fn makes(&self) -> &'static str {
        "video"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        PIPELINES.contains(&manifest.architecture())
    }

    fn licence_note(&self) -> Option<&'static str> {
        Some(
            "the licence of HunyuanVideo (Tencent Hunyuan Community License) does not extend to the European Union, the United \
             Kingdom and South Korea",
        )
    }

    fn text_encoders(&self) -> &'static [&'static str] {
        TextEncoders::COMPONENTS
    }

    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel> {
        loading::load(build, manifest, open, options, |model| Parts {
            card: &mut model.card,
            adapters: &model.adapters,
            fixed_bytes: 0,
        })
    }
}

fn build(manifest: &Manifest, open: &mut OpenWeights<'_>) -> Result<HunyuanVideoModel> {
    let placement = open.placement().clone();
    HunyuanVideoModel::load(manifest, &placement, &mut |component| open.component(manifest, component))
}

/// Everything of either pipeline that the diffusion runner drives.
pub struct HunyuanVideoModel {
    card: DiffusionCard,
    sizes: Sizes,
    placement: Placement,
    dequantised: Dequantised,
    text_encoders: TextEncoders,
    transformer: HunyuanVideoTransformer,
    vae: HunyuanVaeDecoder,
    /// Of models that take a picture.
    vae_encoder: Option<HunyuanVaeEncoder>,
    adapters: Adapters,
}

/// The configurations of a checkpoint, read and found to fit together.
struct Sizes {
    text: TextConfigs,
    transformer: HunyuanVideoConfig,
    vae: HunyuanVaeConfig,
    /// Of models that take a picture.
    image_condition: Option<ImageCondition>,
}

impl HunyuanVideoModel {
    /// Reads and checks all configurations first, then the weights that `open` gives for each component. Those that are not
    /// dry are at `placement`.
    pub fn load(
        manifest: &Manifest,
        placement: &Placement,
        open: &mut dyn FnMut(&str) -> Result<Weights>,
    ) -> Result<Self> {
        check_pipeline(manifest)?;
        let sizes = Sizes::read(manifest)?;
        let schedulers = Schedulers::read(manifest, Training::FlowLinear)?;
        let text = TextWeights::open(manifest, &sizes.text, open)?;
        let text_encoders = TextEncoders::load(manifest, &sizes.text, DEFAULT_SEQUENCE_LENGTH, &text)?;
        // Text encoders take no terms, as in diffusers.
        let sites = Arc::<Sites>::default();
        let names = HunyuanVideoNames::new(&sizes.transformer);
        let weights = open("transformer")?.or_named(names).or_named(ComfyNames::published(names));
        let weights = weights.or_named(ComfyNames::of_today(names)).noting(&sites);
        let transformer = HunyuanVideoTransformer::load(&weights, &sizes.transformer)?;
        let lora_names = NetworkNames::denoiser(&sites, &names, []).or_named(&ComfyNames::of_today(names));
        let lora_names = LoraNames::new(vec![lora_names]);
        let vae = open("vae")?.or_named(KlNames::new(sizes.vae.block_out_channels.len()));
        let vae_encoder = match sizes.image_condition {
            Some(_) => Some(HunyuanVaeEncoder::load(&vae, &sizes.vae)?),
            None => None,
        };
        if vae_encoder.is_none() {
            vae.ignore_below("encoder");
            vae.ignore_below("quant_conv");
        }
        Ok(Self {
            card: sizes.card(schedulers, placement.compute_dtype),
            placement: placement.clone(),
            dequantised: Dequantised {
                text_encoder: text.dequantised_bytes(),
                transformer: weights.dequantised_bytes(),
            },
            text_encoders,
            transformer,
            vae: HunyuanVaeDecoder::load(&vae, &sizes.vae)?,
            vae_encoder,
            adapters: Adapters::new(lora_names, placement),
            sizes,
        })
    }
}

/// Refuses pipelines that share the class name and have other networks than this family.
fn check_pipeline(manifest: &Manifest) -> Result<()> {
    let reader = if takes_a_picture(manifest) { "LlavaForConditionalGeneration" } else { "LlamaModel" };
    let classes = [
        ("text_encoder", reader),
        ("text_encoder_2", "CLIPTextModel"),
        ("transformer", "HunyuanVideoTransformer3DModel"),
        ("vae", "AutoencoderKLHunyuanVideo"),
    ];
    for (component, supported) in classes {
        let found = manifest.class_of(component).unwrap_or("absent");
        if found != supported {
            let problem = format!("`{component}` is {found}; supported is {supported}");
            return Err(Error::checkpoint(manifest.path("", MODEL_INDEX), problem));
        }
    }
    Ok(())
}

fn takes_a_picture(manifest: &Manifest) -> bool {
    manifest.architecture() == PIPELINES[1]
}

impl Sizes {
    fn read(manifest: &Manifest) -> Result<Self> {
        let text = TextConfigs::read(manifest, takes_a_picture(manifest))?;
        let transformer: HunyuanVideoConfig = manifest.component("transformer")?.config()?;
        let vae: HunyuanVaeConfig = manifest.component("vae")?.config()?;
        let path = manifest.path("transformer", CONFIG);
        transformer.check(&path)?;
        vae.check(&manifest.path("vae", CONFIG))?;
        let image_condition = transformer.image_condition(&path)?;
        if image_condition.is_some() != takes_a_picture(manifest) {
            let kind = &transformer.image_condition_type;
            let problem = format!("`image_condition_type` is {kind:?}, and the pipeline {}", manifest.architecture());
            return Err(Error::checkpoint(path, problem));
        }
        let sizes = Self { text, transformer, vae, image_condition };
        sizes.check(&path)?;
        Ok(sizes)
    }

    /// Refuses parts that do not fit together; `path` is the transformer's file.
    fn check(&self, path: &Path) -> Result<()> {
        let Self { text, transformer, vae, .. } = self;
        let latents = ("the VAE's `latent_channels`", vae.latent_channels);
        let seen = ("what fits the VAE and the pipeline", vae.latent_channels + self.concatenated_channels());
        let pairs = [
            ("in_channels", transformer.in_channels, seen),
            ("out_channels", transformer.predicted_channels(), latents),
            (
                "text_embed_dim",
                transformer.text_embed_dim,
                ("the text encoder's `hidden_size`", text.llama().hidden_size),
            ),
            (
                "pooled_projection_dim",
                transformer.pooled_projection_dim,
                ("the second text encoder's `hidden_size`", text.clip.hidden_size),
            ),
        ];
        for (field, found, (of, wanted)) in pairs {
            if found != wanted {
                return Err(Error::checkpoint(path, format!("`{field}` is {found}, {of} is {wanted}")));
            }
        }
        Ok(())
    }

    /// Channels behind those of the noisy latents: of the picture, and a mask.
    fn concatenated_channels(&self) -> usize {
        match self.image_condition {
            Some(ImageCondition::LatentConcat) => self.vae.latent_channels + 1,
            Some(ImageCondition::TokenReplace) | None => 0,
        }
    }

    /// Frames at the beginning of what is decoded that are no part of the clip: with a picture beside the latents there is a
    /// latent frame more.
    fn skipped_frames(&self) -> usize {
        match self.image_condition {
            Some(ImageCondition::LatentConcat) => self.vae.temporal_compression_ratio,
            Some(ImageCondition::TokenReplace) | None => 0,
        }
    }

    fn card(&self, schedulers: Schedulers, dtype: DType) -> DiffusionCard {
        let prompts = Prompts::Plain { default_length: DEFAULT_SEQUENCE_LENGTH, max_length: MAX_SEQUENCE_LENGTH };
        let canvas = CanvasSupport {
            default_width: DEFAULT_WIDTH,
            default_height: DEFAULT_HEIGHT,
            size_multiple: lcm(
                PIPELINE_SIZE_MULTIPLE,
                self.vae.spatial_compression_ratio * self.transformer.patch_size,
            ),
            max_side: MAX_SIDE,
            max_pixels: MAX_PIXELS,
            sizes: SizeRule::AspectOfPicture,
            frames: Some(FrameSupport {
                default_num_frames: DEFAULT_FRAMES,
                default_fps: DEFAULT_FPS,
                multiple: self.vae.temporal_compression_ratio,
                max_frames: MAX_FRAMES,
                trained_frames: DEFAULT_FRAMES,
                has_one_length: false,
            }),
        };
        let sampling = SamplingSupport { default_steps: DEFAULT_STEPS, schedulers };
        let default_scale = match self.image_condition {
            None => DEFAULT_GUIDANCE_SCALE,
            Some(_) => DEFAULT_GUIDANCE_SCALE_OF_PICTURES,
        };
        let guidance = match self.transformer.guidance_embeds {
            true => GuidanceSupport::constant(GuidanceKind::Embedded, default_scale).of_flow(),
            false => GuidanceSupport::constant(GuidanceKind::None, 0.0).of_flow(),
        };
        let latent_frames = self.vae.latent_frames(MAX_FRAMES + self.skipped_frames());
        DiffusionCard {
            tiling: self.vae.vae_tiling(dtype, latent_frames, LATENT_COPIES),
            acceleration: self.cache_support(),
            loras: LoraSupport::NoFolder,
            keyframes: self.image_condition.map(|_| KeyframeSupport::First),
            ..DiffusionCard::new(HunyuanVideo.name(), prompts, canvas, sampling, guidance)
        }
    }

    /// None where there is no second block. Figures are for the published model from text alone.
    fn cache_support(&self) -> Option<CacheSupport> {
        let HunyuanVideoConfig { num_layers, num_single_layers, in_channels, guidance_embeds, .. } = self.transformer;
        let sizes = (num_layers, num_single_layers, self.transformer.dim(), in_channels);
        let is_published = sizes == (20, 40, 3072, 16) && guidance_embeds && self.image_condition.is_none();
        let can_skip = num_layers > 0 && num_layers + num_single_layers > 1;
        can_skip.then(|| CacheSupport { published: is_published.then_some(&HUNYUAN_VIDEO) })
    }

    /// Shape of a request's latents: `[1, channels, frames, height, width]`.
    fn latent_shape(&self, request: &DiffusionRequest) -> [usize; 5] {
        let spatial = self.vae.spatial_compression_ratio;
        let frames = self.vae.latent_frames(request.canvas.num_frames + self.skipped_frames());
        [1, self.vae.latent_channels, frames, request.canvas.height / spatial, request.canvas.width / spatial]
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
        let (length, dtype) = (request.prompt.max_sequence_length, placement.compute_dtype);
        let told = self.told_length(request);
        let text = told * self.transformer.text_embed_dim + self.transformer.pooled_projection_dim;
        // Of each row what was encoded, and once more among the rows of a step.
        let conditioning = 2 * rows * text * dtype.size_in_bytes();
        // What lies behind the channels, and what was encoded of the picture.
        let known = latents / self.vae.latent_channels * self.concatenated_channels() + latents / frames;
        // The sample and what the solver computes of it; of each row what the model sees and predicts.
        let solver = (latents + known) * (3 + 4 * rows);
        let positions = frames * height * width;
        let copies = request.cache.as_ref().map_or(0, |cache| cache.stream_copies(true));
        let caches = copies * self.transformer.stream_bytes_of_row(positions, dtype);
        let work =
            branches_at_once * self.transformer.peak_bytes_of_row(positions, told, dtype) + dequantised.transformer;
        // A clean sample, and what the first one is shown with.
        let (shown, preview) = match request.partial_images {
            0 => (0, 0),
            _ => (latents, self.vae.preview_bytes(dtype)),
        };
        let denoise = work.max(preview) + shown + rows * caches + self.transformer.rotation_bytes(positions, told);
        let sizes = [frames, height, width];
        let decode = self.vae.peak_decode_bytes(sizes, request.vae_tiling, dtype);
        let of_picture = self.image_condition.map(|_| {
            let Canvas { height, width, .. } = request.canvas;
            let work = self.vae.peak_encode_bytes((height, width), request.vae_tiling, dtype);
            (Phase::VaeEncode, conditioning + known + work)
        });
        let phases = [
            (Phase::Encode, conditioning + self.text.forward_bytes(rows, length, dtype) + dequantised.text_encoder),
            (Phase::Denoise, conditioning + solver + denoise),
            (Phase::VaeDecode, LATENT_COPIES * latents + decode),
        ];
        MemoryPlan::new(phases.into_iter().chain(of_picture))
    }
}
