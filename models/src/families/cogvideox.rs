//! CogVideoX (2B, 5B, 1.5) from text alone and from a picture: T5 text, a diffusion transformer over patches, a causal video
//! VAE.
//!
//! Owns: what a checkpoint of either pipeline must look like, limits and defaults. Does not know: the denoising loop,
//! guidance, batching, RGB bytes.
//! Source: diffusers `pipelines/cogvideo/pipeline_cogvideox.py`, `pipeline_cogvideox_image2video.py`. Noise is drawn in f32,
//! as diffusers does for an f32 pipeline.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;

use self::config::CogVideoXConfig;
use self::transformer::CogVideoXTransformer;
use crate::checkpoint::{CONFIG, MODEL_INDEX, Manifest, OpenWeights};
use crate::device::Placement;
use crate::diffusion::acceleration::CacheSupport;
use crate::diffusion::acceleration::published::{
    COGVIDEOX_1_5, COGVIDEOX_1_5_I2V, COGVIDEOX_2B, COGVIDEOX_5B, Published,
};
use crate::diffusion::canvas::{CanvasSupport, FrameSupport, SizeRule};
use crate::diffusion::guidance::{GuidanceKind, GuidanceSupport};
use crate::diffusion::keyframes::KeyframeSupport;
use crate::diffusion::prompt::Prompts;
use crate::diffusion::sampling::SamplingSupport;
use crate::diffusion::{Canvas, DiffusionCard, DiffusionRequest};
use crate::encoders::t5::{T5Config, T5Encoder, T5Kind};
use crate::error::{Error, Result};
use crate::families::loading::{self, Dequantised, Parts};
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::lora::{Adapters, LoraNames, LoraSupport, NetworkNames, Sites};
use crate::memory::MemoryPlan;
use crate::request::Phase;
use crate::solver::schedulers::{Schedulers, Training};
use crate::tokenizer::Tokenizer;
use crate::vae::cogvideox::encoder::CogVideoXVaeEncoder;
use crate::vae::cogvideox::{CogVideoXVaeConfig, CogVideoXVaeDecoder};
use crate::weights::Weights;

pub mod config;
pub mod pipeline;
pub mod positions;
pub mod transformer;

/// The largest size that a model of the family was trained on (1.5), which is also what it makes unless told otherwise.
const LARGE: [usize; 2] = [1360, 768];
/// Frames on which the models with patches over time were trained; the others' are in their configurations.
const TRAINED_FRAMES: usize = 161;
/// Most frames of models whose positions are computed: 20 seconds at 8 frames per second, 10 at 16.
const MAX_FRAMES: usize = 161;
/// Tokens that the pipelines pad prompts to.
const SEQUENCE_LENGTH: usize = 226;
/// Defaults of both pipelines.
const DEFAULT_STEPS: usize = 50;
const DEFAULT_GUIDANCE_SCALE: f64 = 6.0;
/// Rates of the published examples, without patches over time and with them.
const DEFAULT_FPS: [usize; 2] = [8, 16];

/// Copies of its latents that a session holds while it decodes them: with the model's scale and without it.
const LATENT_COPIES: usize = 2;

/// Pipelines of diffusers that make videos from text, and from pictures.
const PIPELINES: [&str; 2] = ["CogVideoXPipeline", "CogVideoXImageToVideoPipeline"];

/// CogVideoX: text to video, image to video.
pub struct CogVideoX;

impl Family for CogVideoX {
    fn name(&self) -> &'static str {
        "cogvideox"
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

fn build(manifest: &Manifest, open: &mut OpenWeights<'_>) -> Result<CogVideoXModel> {
    let placement = open.placement().clone();
    CogVideoXModel::load(manifest, &placement, &mut |component| open.component(manifest, component))
}

/// Everything of either pipeline that the diffusion runner drives.
pub struct CogVideoXModel {
    card: DiffusionCard,
    sizes: Sizes,
    placement: Placement,
    tokenizer: Tokenizer,
    dequantised: Dequantised,
    text_encoder: T5Encoder,
    transformer: CogVideoXTransformer,
    vae: CogVideoXVaeDecoder,
    /// Of models that begin from a picture.
    vae_encoder: Option<CogVideoXVaeEncoder>,
    adapters: Adapters,
}

/// The configurations of a checkpoint, read and found to fit together.
struct Sizes {
    text_encoder: T5Config,
    transformer: CogVideoXConfig,
    vae: CogVideoXVaeConfig,
    takes_picture: bool,
}

impl CogVideoXModel {
    /// Reads and checks all configurations first, then the weights that `open` gives for each component. Those that are not
    /// dry are at `placement`.
    pub fn load(
        manifest: &Manifest,
        placement: &Placement,
        open: &mut dyn FnMut(&str) -> Result<Weights>,
    ) -> Result<Self> {
        check_pipeline(manifest)?;
        let sizes = Sizes::read(manifest)?;
        let schedulers = Schedulers::read(manifest, Training::Shifted)?;
        let vocab_size = sizes.text_encoder.vocab_size;
        let length = sizes.prompts().default_length();
        let tokenizer = manifest.component("tokenizer")?.tokenizer_of_encoder(vocab_size, length)?;
        let text_encoder = T5Encoder::load(&open("text_encoder")?, &sizes.text_encoder)?;
        // The text encoder takes no terms, as in diffusers, which knows no other names of the layers either.
        let sites = Arc::<Sites>::default();
        let weights = open("transformer")?.noting(&sites);
        let transformer = CogVideoXTransformer::load(&weights, &sizes.transformer)?;
        let names = LoraNames::new(vec![NetworkNames::under_own_names(&sites)]);
        let vae = open("vae")?;
        let load_encoder = || CogVideoXVaeEncoder::load(&vae, &sizes.vae);
        Ok(Self {
            card: sizes.card(schedulers, placement.compute_dtype),
            tokenizer,
            placement: placement.clone(),
            dequantised: Dequantised {
                text_encoder: text_encoder.dequantised_bytes(),
                transformer: weights.dequantised_bytes(),
            },
            text_encoder,
            transformer,
            vae_encoder: sizes.takes_picture.then(load_encoder).transpose()?,
            vae: CogVideoXVaeDecoder::load(&vae, &sizes.vae)?,
            adapters: Adapters::new(names, placement),
            sizes,
        })
    }
}

/// Refuses components of other classes.
fn check_pipeline(manifest: &Manifest) -> Result<()> {
    for (component, supported) in [
        ("text_encoder", "T5EncoderModel"),
        ("transformer", "CogVideoXTransformer3DModel"),
        ("vae", "AutoencoderKLCogVideoX"),
    ] {
        let found = manifest.class_of(component).unwrap_or("absent");
        if found != supported {
            let problem = format!("`{component}` is {found}; supported is {supported}");
            return Err(Error::checkpoint(manifest.path("", MODEL_INDEX), problem));
        }
    }
    Ok(())
}

impl Sizes {
    fn read(manifest: &Manifest) -> Result<Self> {
        let text_encoder = T5Config::read(&manifest.component("text_encoder")?.fields(CONFIG)?, T5Kind::T5)?;
        let transformer: CogVideoXConfig = manifest.component("transformer")?.config()?;
        let vae: CogVideoXVaeConfig = manifest.component("vae")?.config()?;
        let path = manifest.path("transformer", CONFIG);
        transformer.check(&path)?;
        vae.check(&manifest.path("vae", CONFIG))?;
        let takes_picture = manifest.architecture() == PIPELINES[1];
        let sizes = Self { text_encoder, transformer, vae, takes_picture };
        sizes.check(&path)?;
        Ok(sizes)
    }

    /// Refuses parts that do not fit together; `path` is the transformer's file.
    fn check(&self, path: &Path) -> Result<()> {
        let Self { text_encoder, transformer, vae, takes_picture } = self;
        let channels = vae.latent_channels;
        // Beside the noisy latents those of the picture.
        let in_channels = channels * (1 + usize::from(*takes_picture));
        let pairs = [
            ("out_channels", transformer.out_channels, "the VAE's `latent_channels`", channels),
            ("in_channels", transformer.in_channels, "what fits the VAE and the pipeline", in_channels),
            ("text_embed_dim", transformer.text_embed_dim, "the text encoder's `d_model`", text_encoder.d_model),
        ];
        // Positions alone depend on it.
        let of_time =
            ("temporal_compression_ratio", transformer.temporal_compression_ratio, "that of the VAE", vae.temporal());
        let pairs = pairs.into_iter().chain(transformer.has_positions().then_some(of_time));
        for (field, found, whose, wanted) in pairs {
            if found != wanted {
                return Err(Error::checkpoint(path, format!("`{field}` is {found}, {whose} is {wanted}")));
            }
        }
        if transformer.ofs_embed_dim.is_some() && !takes_picture {
            return Err(Error::checkpoint(path, "`ofs_embed_dim` is of a model that begins from a picture"));
        }
        Ok(())
    }

    /// Either is of models without patches over time, and with them.
    fn of_version<T: Copy>(&self, either: [T; 2]) -> T {
        either[usize::from(self.transformer.patch_size_t.is_some())]
    }

    fn prompts(&self) -> Prompts {
        match self.transformer.has_positions() {
            true => Prompts::Fixed { length: self.transformer.max_text_seq_length },
            false => Prompts::Plain {
                default_length: SEQUENCE_LENGTH,
                max_length: SEQUENCE_LENGTH.max(self.transformer.max_text_seq_length),
            },
        }
    }

    fn canvas(&self) -> CanvasSupport {
        let (transformer, spatial) = (&self.transformer, self.vae.spatial());
        let own = [transformer.sample_width, transformer.sample_height].map(|side| side * spatial);
        let size_multiple = spatial * transformer.patch_size;
        let fitting = own.map(|side| side - side % size_multiple);
        let is_made = own[0] * own[1] <= LARGE[0] * LARGE[1] || transformer.use_learned_positional_embeddings;
        // No larger than the positions reach.
        let large = [0, 1].map(|axis| LARGE[axis].min(own[axis])).map(|side| side - side % size_multiple);
        let [default_width, default_height] = if is_made { fitting } else { large };
        // Frames come in pairs of latent frames, the first of all by itself.
        let multiple = 2 * self.vae.temporal() * transformer.patch_frames();
        let own_frames = ((transformer.sample_frames - 1) / multiple).max(1) * multiple + 1;
        let has_one_length = transformer.use_learned_positional_embeddings;
        CanvasSupport {
            default_width,
            default_height,
            size_multiple,
            max_side: LARGE[0].max(default_width).max(default_height),
            max_pixels: (LARGE[0] * LARGE[1]).max(default_width * default_height),
            sizes: if transformer.use_learned_positional_embeddings {
                SizeRule::OnlyDefault
            } else if transformer.patch_size_t.is_some() {
                // There are no positions beyond.
                SizeRule::Within { width: own[0], height: own[1] }
            } else {
                SizeRule::Within { width: usize::MAX, height: usize::MAX }
            },
            frames: Some(FrameSupport {
                default_num_frames: own_frames,
                default_fps: self.of_version(DEFAULT_FPS),
                multiple,
                max_frames: if has_one_length { own_frames } else { MAX_FRAMES.max(own_frames) },
                trained_frames: self.of_version([own_frames, TRAINED_FRAMES.max(own_frames)]),
                has_one_length,
            }),
        }
    }

    fn card(&self, schedulers: Schedulers, dtype: DType) -> DiffusionCard {
        let canvas = self.canvas();
        let sampling = SamplingSupport { default_steps: DEFAULT_STEPS, schedulers };
        let guidance = GuidanceSupport::constant(GuidanceKind::ClassifierFree, DEFAULT_GUIDANCE_SCALE);
        let guidance = GuidanceSupport { has_dynamic_cfg: true, ..guidance };
        let max_frames = canvas.frames.map_or(1, |frames| frames.max_frames);
        DiffusionCard {
            tiling: self.vae.vae_tiling(dtype, self.held_bytes_per_pixel(max_frames)),
            acceleration: self.cache_support(),
            loras: LoraSupport::NoFolder,
            keyframes: self.takes_picture.then_some(KeyframeSupport::First),
            ..DiffusionCard::new(CogVideoX.name(), self.prompts(), canvas, sampling, guidance)
        }
    }

    /// None where there is no second block.
    fn cache_support(&self) -> Option<CacheSupport> {
        (self.transformer.num_layers > 1).then(|| CacheSupport { published: self.published() })
    }

    /// The published checkpoint that has these sizes.
    fn published(&self) -> Option<&'static Published> {
        let CogVideoXConfig { num_layers, use_rotary_positional_embeddings, patch_size_t, .. } = self.transformer;
        match (num_layers, self.transformer.dim(), use_rotary_positional_embeddings, patch_size_t) {
            (42, 3072, true, Some(2)) if self.takes_picture => Some(&COGVIDEOX_1_5_I2V),
            (42, 3072, true, Some(2)) => Some(&COGVIDEOX_1_5),
            (42, 3072, true, None) => Some(&COGVIDEOX_5B),
            (30, 1920, false, None) if !self.takes_picture => Some(&COGVIDEOX_2B),
            _ => None,
        }
    }

    /// Latent frames of a request's video.
    fn latent_frames(&self, request: &DiffusionRequest) -> usize {
        (request.canvas.num_frames - 1) / self.vae.temporal() + 1
    }

    /// Bytes of latents that a session holds while it decodes, for each pixel of a video of so many frames.
    fn held_bytes_per_pixel(&self, num_frames: usize) -> usize {
        let frames = ((num_frames - 1) / self.vae.temporal() + 1).next_multiple_of(self.transformer.patch_frames());
        let latents = frames * self.vae.latent_channels * size_of::<f32>();
        (LATENT_COPIES * latents).div_ceil(self.vae.spatial().pow(2))
    }

    /// Shape of a request's latents, which have as many frames as whole patches have: `[1, frames, channels, height,
    /// width]`.
    fn latent_shape(&self, request: &DiffusionRequest) -> [usize; 5] {
        let frames = self.latent_frames(request).next_multiple_of(self.transformer.patch_frames());
        let [height, width] = [request.canvas.height, request.canvas.width].map(|side| side / self.vae.spatial());
        [1, frames, self.vae.latent_channels, height, width]
    }

    /// Most bytes that one session keeps alive in each phase.
    fn plan(
        &self,
        request: &DiffusionRequest,
        branches_at_once: usize,
        placement: &Placement,
        dequantised: Dequantised,
    ) -> MemoryPlan {
        let dtype = placement.compute_dtype;
        let rows = request.guidance.num_branches();
        let [_, frames, _, height, width] = self.latent_shape(request);
        let latents = self.latent_shape(request).iter().product::<usize>() * size_of::<f32>();
        let text = request.prompt.max_sequence_length;
        let conditioning = rows * text * self.transformer.text_embed_dim * dtype.size_in_bytes();
        // The picture's latents, and in each row once more as the transformer's input.
        let picture = usize::from(self.takes_picture) * latents;
        // The sample, the noise of a step and of the one that it is made instead of, the last clean sample and what is
        // being computed; of each row its input and prediction.
        let solver = latents * (7 + 4 * rows) + (1 + rows) * picture;
        let sizes = [frames, height, width];
        let copies = request.cache.as_ref().map_or(0, |cache| cache.stream_copies(false));
        let caches = copies * self.transformer.stream_bytes_of_row(sizes, dtype);
        let work = branches_at_once * self.transformer.peak_bytes_of_row(sizes, text, dtype) + dequantised.transformer;
        // A clean sample, and what the first one is shown with.
        let (shown, preview) = match request.partial_images {
            0 => (0, 0),
            _ => (latents, self.vae.preview_bytes(dtype)),
        };
        let denoise = work.max(preview) + shown + rows * caches + self.transformer.rotation_bytes(sizes, text);
        let decode =
            self.vae.peak_decode_bytes(self.latent_frames(request), (height, width), request.vae_tiling, dtype);
        let encode = self.text_encoder.forward_bytes(rows, text, placement) + dequantised.text_encoder;
        let of_picture = self.takes_picture.then(|| {
            let Canvas { height, width, .. } = request.canvas;
            let work = self.vae.peak_encode_bytes((height, width), request.vae_tiling, dtype);
            // As above.
            (Phase::VaeEncode, conditioning + (2 * latents + picture).max(work))
        });
        let phases = [
            // The last step of it draws the noise.
            (Phase::Encode, conditioning + encode.max(2 * latents + picture)),
            (Phase::Denoise, conditioning + solver + denoise),
            (Phase::VaeDecode, LATENT_COPIES * latents + decode),
        ];
        MemoryPlan::new(phases.into_iter().chain(of_picture))
    }
}
