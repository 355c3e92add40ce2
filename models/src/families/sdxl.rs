//! SDXL base 1.0, its fine-tunes and its refiner: two CLIP prompts, a UNet, steps along a discrete noise schedule, KL-VAE.
//!
//! Owns: how the parts fit together, limits and defaults; the way of a request is in `pipeline`. Does not know: sessions,
//! guidance, batching. Source: diffusers `pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py` and its
//! siblings for image to image and inpainting. Noise is drawn in f32, as diffusers does for an f32 pipeline.

use crate::diffusion::canvas::{CanvasSupport, SizeRule};
use crate::diffusion::edit::{EditDefaults, EditSupport, StepRounding};
use crate::diffusion::guidance::{GuidanceKind, GuidanceSupport};
use crate::diffusion::prompt::Prompts;
use crate::diffusion::sampling::SamplingSupport;
use crate::diffusion::{DiffusionCard, DiffusionRequest};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use serde::Deserialize;

use crate::checkpoint::{CONFIG, Folder, MODEL_INDEX, Manifest, OpenWeights};
use crate::device::Placement;
use crate::encoders::clip::{ClipTextConfig, ClipTextEncoder};
use crate::encoders::clip_chunks::{self, ChunkRule};
use crate::error::{Error, Result};
use crate::families::loading::{self, Parts};
use crate::family::{Family, LoadOptions, LoadedModel};
use crate::lora::{Adapters, LoraNames, LoraSupport, NetworkNames, Sites};
use crate::memory::MemoryPlan;
use crate::request::Phase;
use crate::solver::schedulers::{Schedulers, Training};
use crate::tokenizer::Tokenizer;
use crate::vae::kl::{KlConfig, KlDecoder, KlEncoder};
use crate::vae::original::KlNames;
use crate::weights::Weights;

pub mod config;
pub mod ip_adapter;
pub mod original;
pub mod pipeline;
pub mod recorded;
pub mod unet;

use config::{SCORE_TIME_IDS, SIZE_TIME_IDS, UNetConfig};
use ip_adapter::{IpAdapter, IpAdapterFiles};
use original::{OpenClipNames, UNetNames};
use recorded::DenoiseRecordings;
use unet::UNet;

const PIPELINE: &str = "StableDiffusionXLPipeline";
/// As whose the refiner is published. It has the second text encoder alone.
const IMAGE_PIPELINE: &str = "StableDiffusionXLImg2ImgPipeline";
/// Of `StableDiffusionXLImg2ImgPipeline.__call__`: how pleasing the picture is to be, and what the negative prompt is told.
const AESTHETIC_SCORE: f32 = 6.0;
const NEGATIVE_AESTHETIC_SCORE: f32 = 2.5;
/// Latents on each side of a picture of default size where the UNet's `sample_size` is absent.
const DEFAULT_SAMPLE_SIZE: usize = 128;
/// Defaults of `StableDiffusionXLPipeline.__call__`.
const DEFAULT_STEPS: usize = 50;
const DEFAULT_GUIDANCE_SCALE: f64 = 5.0;
/// Those of `StableDiffusionXLImg2ImgPipeline.__call__` and `StableDiffusionXLInpaintPipeline.__call__`.
const EDITS: EditSupport = EditSupport {
    image_to_image: Some(EditDefaults { strength: 0.3, guidance_scale: 5.0 }),
    inpainting: Some(EditDefaults { strength: 0.9999, guidance_scale: 7.5 }),
    rounding: StepRounding::Taken,
    is_needed: false,
};
const MAX_SIDE: usize = 4096;
/// Four times the area that the model was made for; beyond it pictures fall apart.
const MAX_PIXELS: usize = 2048 * 2048;
/// Copies of the latents in f32: the sample, what the model sees of it, what a step makes of them, two predictions of the
/// model, and up to four that a multistep solver remembers.
const LATENT_COPIES: usize = 10;

/// SDXL.
pub struct Sdxl;

impl Family for Sdxl {
    fn name(&self) -> &'static str {
        "sdxl"
    }

    fn makes(&self) -> &'static str {
        "image"
    }

    fn detects(&self, manifest: &Manifest) -> bool {
        [PIPELINE, IMAGE_PIPELINE].contains(&manifest.architecture())
    }

    fn text_encoders(&self) -> &'static [&'static str] {
        &["text_encoder", "text_encoder_2", "refiner/text_encoder_2"]
    }

    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel> {
        loading::load(build, manifest, open, options, |model| {
            let fixed_bytes = model.recordings_bytes();
            Parts { card: &mut model.card, adapters: &model.adapters, fixed_bytes }
        })
    }
}

fn build(manifest: &Manifest, open: &mut OpenWeights<'_>) -> Result<SdxlModel> {
    let placement = open.placement().clone();
    let mut model = SdxlModel::load(manifest, &placement, &mut |component| open.component(manifest, component))?;
    if open.is_partial() {
        model.recordings = None;
    }
    let model = with_ip_adapter(model, manifest, open)?;
    match open.source().refiner.clone() {
        None => Ok(model),
        Some(folder) => model.with_refiner(build_refiner(&Manifest::read(&folder)?, open)?, &folder),
    }
}

/// Its components are reported as lying in a folder `refiner`.
fn build_refiner(manifest: &Manifest, open: &mut OpenWeights<'_>) -> Result<SdxlModel> {
    let is_file = open.source().refiner.as_deref().is_some_and(Path::is_file);
    if is_file || !Sdxl.detects(manifest) {
        let problem = format!("is no folder of a {IMAGE_PIPELINE} (or {PIPELINE}), as a refiner must be");
        return Err(Error::checkpoint(manifest.root(), problem));
    }
    let placement = open.placement().clone();
    let beside = &mut |name: &str| open.component_beside(&of_refiner(name), manifest, name);
    let mut model = SdxlModel::load(manifest, &placement, beside)?;
    if open.is_partial() {
        model.recordings = None;
    }
    Ok(model)
}

fn of_refiner(component: &str) -> String {
    format!("refiner/{component}")
}

fn with_ip_adapter(model: SdxlModel, manifest: &Manifest, open: &mut OpenWeights<'_>) -> Result<SdxlModel> {
    let Some(path) = open.source().ip_adapter.clone() else { return Ok(model) };
    let files = IpAdapterFiles::find(&path, open.source().image_encoder.as_deref())?;
    let adapter = open.beside("ip_adapter", &files.adapter)?;
    let image_encoder = open.beside("image_encoder", &files.image_encoder)?;
    model.with_ip_adapter(&files, manifest, &adapter, &image_encoder)
}

/// All parts of an SDXL checkpoint. Immutable once loaded, but for steps that were recorded.
#[derive(Debug)]
pub struct SdxlModel {
    card: DiffusionCard,
    sizes: Sizes,
    /// The refiner has none.
    first: Option<(Tokenizer, ClipTextEncoder)>,
    tokenizer_2: Tokenizer,
    text_encoder_2: ClipTextEncoder,
    unet: UNet,
    /// None in a model that lives for a few steps.
    recordings: Option<DenoiseRecordings>,
    vae: KlDecoder,
    ip_adapter: Option<IpAdapter>,
    /// What takes the latents over where a request says so.
    refiner: Option<Box<SdxlModel>>,
    adapters: Adapters,
    vae_encoder: KlEncoder,
    placement: Placement,
}

/// The configurations of a checkpoint, read and found to fit together.
#[derive(Debug, Clone)]
struct Sizes {
    text_encoder: Option<ClipTextConfig>,
    text_encoder_2: ClipTextConfig,
    unet: UNetConfig,
    vae: KlConfig,
    /// Whether an absent negative prompt is zeros instead of the encoded empty text.
    force_zeros_for_empty_prompt: bool,
    /// Whether the UNet is told an aesthetic score in place of the size that is wanted.
    requires_aesthetics_score: bool,
}

impl SdxlModel {
    /// Reads every component; `open` gives the weights of the component in the folder that it is called with. Those that
    /// are not dry are at `placement`.
    pub fn load(
        manifest: &Manifest,
        placement: &Placement,
        open: &mut dyn FnMut(&str) -> Result<Weights>,
    ) -> Result<Self> {
        let sizes = Sizes::read(manifest)?;
        let schedulers = Schedulers::read(manifest, Training::Discrete)?;
        let tokenizer = |name: &str, config: &ClipTextConfig| {
            let (component, positions) = (manifest.component(name)?, config.max_position_embeddings);
            let tokenizer = component.tokenizer_of_encoder(config.vocab_size, positions)?;
            clip_chunks::check(&tokenizer).map_err(|problem| Error::checkpoint(component.path(""), problem))?;
            Ok::<_, Error>(tokenizer)
        };
        let [one, two, net] = [Arc::<Sites>::default(), Arc::default(), Arc::default()];
        let first = match &sizes.text_encoder {
            None => None,
            Some(config) => {
                let encoder = ClipTextEncoder::load(&open("text_encoder")?.noting(&one), config.clone())?;
                Some((tokenizer("tokenizer", config)?, encoder))
            }
        };
        let tokenizer_2 = tokenizer("tokenizer_2", &sizes.text_encoder_2)?;
        let weights = open("text_encoder_2")?.or_named(OpenClipNames).noting(&two);
        let text_encoder_2 = ClipTextEncoder::load_with_projection(&weights, sizes.text_encoder_2.clone())?;
        let weights = open("unet")?.or_named(UNetNames::new(&sizes.unet)).noting(&net);
        let unet = UNet::load(&weights, sizes.unet.clone())?;
        let names = LoraNames::new(vec![
            NetworkNames::denoiser(&net, &UNetNames::new(&sizes.unet), []),
            NetworkNames::first_text_encoder(&one),
            NetworkNames::second_text_encoder(&two),
        ]);
        let vae = open("vae")?.or_named(KlNames::new(sizes.vae.block_out_channels.len()));
        let tokenizers = first.iter().map(|(tokenizer, _)| tokenizer).chain([&tokenizer_2]).cloned().collect();
        Ok(Self {
            card: sizes.card(schedulers, tokenizers, placement.compute_dtype),
            first,
            tokenizer_2,
            adapters: Adapters::new(names, placement),
            placement: placement.clone(),
            text_encoder_2,
            unet,
            recordings: Some(DenoiseRecordings::default()),
            vae: KlDecoder::load(&vae, &sizes.vae)?,
            vae_encoder: KlEncoder::load(&vae, &sizes.vae)?,
            ip_adapter: None,
            refiner: None,
            sizes,
        })
    }

    /// With the refiner that was read from `folder`, which must be able to go on with the latents of this model.
    pub fn with_refiner(mut self, refiner: Self, folder: &Path) -> Result<Self> {
        let of = |sizes: &Sizes| {
            let positions = sizes.text_encoder_2.max_position_embeddings;
            [
                ("latent_channels", sizes.vae.latent_channels),
                ("pixels of the VAE per latent", sizes.vae.vae_scale_factor()),
                ("max_position_embeddings", positions),
            ]
        };
        for ((what, own), (_, its)) in of(&self.sizes).into_iter().zip(of(&refiner.sizes)) {
            if own != its {
                let problem = format!("is no refiner of this model: {what}: {its}, and {own} of the model");
                return Err(Error::checkpoint(folder, problem));
            }
        }
        self.card.refiner = Some(refiner.card.sampling.schedulers.clone());
        if let Prompts::Chunked(rule) = &mut self.card.prompts {
            // No prompt may be cut by it that is whole for the model.
            rule.tokenizers.push(refiner.tokenizer_2.clone());
        }
        self.refiner = Some(Box::new(refiner));
        Ok(self)
    }

    /// With the adapter in `files`, whose weights `adapter` and `image_encoder` are. Pictures are processed as the
    /// pipeline's own `feature_extractor` says, or else as the image encoder's folder does.
    pub fn with_ip_adapter(
        self,
        files: &IpAdapterFiles,
        manifest: &Manifest,
        adapter: &Weights,
        image_encoder: &Weights,
    ) -> Result<Self> {
        let beside = Folder::new(&files.image_encoder);
        let preprocessor = match manifest.has_component("feature_extractor") {
            true => manifest.component("feature_extractor")?,
            false => beside.whole(),
        };
        let text_dim = self.sizes.unet.text_dim();
        let ip_adapter = IpAdapter::load(files, preprocessor, adapter, image_encoder, text_dim)?;
        let unet = self.unet.with_image_attention(&adapter.pp("ip_adapter"), &files.adapter)?;
        let card = DiffusionCard { has_ip_adapter: true, ..self.card };
        Ok(Self { card, unet, ip_adapter: Some(ip_adapter), ..self })
    }
}

impl SdxlModel {
    /// Most bytes that recorded steps keep.
    fn recordings_bytes(&self) -> usize {
        if !self.placement.is_gpu() {
            return 0;
        }
        let one = self.sizes.unet.forward_bytes(recorded::MAX_POSITIONS, self.placement.compute_dtype);
        let of_refiner = self.refiner.as_ref().map_or(0, |refiner| refiner.recordings_bytes());
        recorded::MAX_RECORDINGS * one + of_refiner
    }
}

/// The fields of `model_index.json` that are no components.
#[derive(Deserialize)]
struct PipelineConfig {
    #[serde(default = "yes")]
    force_zeros_for_empty_prompt: bool,
    #[serde(default)]
    requires_aesthetics_score: bool,
}

fn yes() -> bool {
    true
}

impl Sizes {
    fn read(manifest: &Manifest) -> Result<Self> {
        let pipeline: PipelineConfig = manifest.whole().json(MODEL_INDEX)?;
        let sizes = Self {
            text_encoder: match manifest.class_of("text_encoder").is_some() {
                true => Some(ClipTextConfig::read(manifest.component("text_encoder")?.fields(CONFIG)?)?),
                false => None,
            },
            text_encoder_2: ClipTextConfig::read(manifest.component("text_encoder_2")?.fields(CONFIG)?)?,
            unet: manifest.component("unet")?.config()?,
            vae: manifest.component("vae")?.config()?,
            force_zeros_for_empty_prompt: pipeline.force_zeros_for_empty_prompt,
            requires_aesthetics_score: pipeline.requires_aesthetics_score,
        };
        sizes.check(&|component| manifest.path(component, CONFIG))?;
        Ok(sizes)
    }

    /// Each part alone, and then whether they belong to each other. `path` names a component's configuration.
    fn check(&self, path: &dyn Fn(&str) -> PathBuf) -> Result<()> {
        let first = self.text_encoder.iter().map(|config| ("text_encoder", config));
        for (component, config) in first.chain([("text_encoder_2", &self.text_encoder_2)]) {
            if config.num_hidden_layers == 0 {
                return Err(Error::checkpoint(path(component), "num_hidden_layers is 0; at least 1 is needed"));
            }
        }
        self.unet.check(&path("unet"))?;
        self.vae.check(&path("vae"))?;
        let (one, two, unet) = (self.text_encoder.as_ref(), &self.text_encoder_2, &self.unet);
        let text_dim = one.map_or(0, |one| one.hidden_size) + two.hidden_size;
        let pairs = [
            ("text encoders", "hidden_size", text_dim, "cross_attention_dim", unet.text_dim()),
            ("vae", "latent_channels", self.vae.latent_channels, "in_channels", unet.in_channels),
            ("vae", "latent_channels", self.vae.latent_channels, "out_channels", unet.out_channels),
        ];
        let refuse = |problem: String| Err(Error::checkpoint(path("unet"), problem));
        for (component, field, found, wanted_by, wanted) in pairs {
            if found != wanted {
                return refuse(format!("{wanted_by} is {wanted}, but {field} of the {component} is {found}"));
            }
        }
        let time_ids = if self.requires_aesthetics_score { SCORE_TIME_IDS } else { SIZE_TIME_IDS };
        if unet.pooled_dim(time_ids) != Some(two.projection_dim) {
            let problem = format!(
                "projection_class_embeddings_input_dim must be {time_ids} times addition_time_embed_dim and the second"
            );
            return refuse(format!("{problem} text encoder's projection_dim ({})", two.projection_dim));
        }
        if one.is_some_and(|one| one.max_position_embeddings != two.max_position_embeddings) {
            return refuse("the text encoders have different max_position_embeddings".to_owned());
        }
        Ok(())
    }

    /// `dtype` is that of activations.
    fn card(&self, schedulers: Schedulers, tokenizers: Vec<Tokenizer>, dtype: DType) -> DiffusionCard {
        let side = self.unet.sample_size.unwrap_or(DEFAULT_SAMPLE_SIZE) * self.vae.vae_scale_factor();
        let chunks = ChunkRule { tokenizers, positions: self.text_encoder_2.max_position_embeddings };
        let prompts = Prompts::Chunked(chunks);
        let canvas = CanvasSupport {
            default_width: side,
            default_height: side,
            size_multiple: self.vae.vae_scale_factor(),
            max_side: MAX_SIDE,
            max_pixels: MAX_PIXELS,
            sizes: SizeRule::AspectOfPicture,
            frames: None,
        };
        let sampling = SamplingSupport { default_steps: DEFAULT_STEPS, schedulers };
        let guidance = GuidanceSupport::constant(GuidanceKind::ClassifierFree, DEFAULT_GUIDANCE_SCALE);
        DiffusionCard {
            loras: LoraSupport::NoFolder,
            tiling: self.vae.vae_tiling(dtype, LATENT_COPIES),
            edits: Some(EditSupport { is_needed: self.requires_aesthetics_score, ..EDITS }),
            ..DiffusionCard::new(Sdxl.name(), prompts, canvas, sampling, guidance)
        }
    }

    /// Shape of a request's latents: `[1, channels, height, width]`.
    fn latent_shape(&self, request: &DiffusionRequest) -> (usize, usize, usize, usize) {
        let pixels = self.vae.vae_scale_factor();
        (1, self.vae.latent_channels, request.canvas.height / pixels, request.canvas.width / pixels)
    }

    /// What a session keeps of its prompts and reference pictures.
    fn conditioning_bytes(&self, request: &DiffusionRequest, ip_adapter: Option<&IpAdapter>, dtype: DType) -> usize {
        let rows = 1 + usize::from(request.guidance.negative_prompt.is_some());
        let pictures = request.references.as_ref().map_or(0, |references| references.images.len());
        let tokens = request.prompt.max_sequence_length + pictures * ip_adapter.map_or(0, IpAdapter::num_tokens);
        rows * (tokens * self.unet.text_dim() + self.text_encoder_2.projection_dim) * dtype.size_in_bytes()
    }

    /// Most bytes that one session keeps alive in each phase.
    fn plan(
        &self,
        request: &DiffusionRequest,
        branches_at_once: usize,
        ip_adapter: Option<&IpAdapter>,
        dtype: DType,
    ) -> MemoryPlan {
        let rows = request.guidance.num_branches();
        let text = request.prompt.max_sequence_length;
        let (_, channels, height, width) = self.latent_shape(request);
        let pictures = request.references.as_ref().map_or(0, |references| references.images.len());
        let conditioning = self.conditioning_bytes(request, ip_adapter, dtype);
        let latents = LATENT_COPIES * channels * height * width * size_of::<f32>();
        let first = self.text_encoder.as_ref().map_or(0, |one| one.forward_bytes(text, dtype));
        let encode = first.max(self.text_encoder_2.forward_bytes(text, dtype));
        let encode = encode.max(ip_adapter.filter(|_| pictures > 0).map_or(0, IpAdapter::encode_bytes));
        let denoise = branches_at_once * self.unet.forward_bytes(height * width, dtype);
        let decode = self.vae.peak_decode_bytes((height, width), request.vae_tiling, dtype);
        let preview = if request.partial_images > 0 { self.vae.preview_bytes(dtype) } else { 0 };
        let (picture, begin) = match &request.edit {
            // Its latents, its noise, its mask.
            Some(_) => (
                latents,
                self.vae.peak_encode_bytes((request.canvas.height, request.canvas.width), request.vae_tiling, dtype),
            ),
            None => (0, 0),
        };
        let phases = [
            (Phase::Encode, 2 * conditioning + rows * encode),
            (Phase::VaeEncode, 2 * conditioning + latents + begin),
            // Of each prompt, and of all rows side by side.
            (Phase::Denoise, 2 * conditioning + latents + picture + denoise.max(preview)),
            (Phase::VaeDecode, latents + decode),
        ];
        MemoryPlan::new(phases.into_iter().filter(|(phase, _)| *phase != Phase::VaeEncode || request.edit.is_some()))
    }
}
