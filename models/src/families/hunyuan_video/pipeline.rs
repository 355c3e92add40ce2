//! The way of a request through HunyuanVideo: prompts and a picture to what the transformer is told, prediction, decoding.
//!
//! Owns: what a request has encoded and in which steps, how a picture enters. Does not know: sessions, batching, guidance.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::config::ImageCondition;
use super::text::{HunyuanVideoPrompt, HunyuanVideoText, PromptPicture, TextEncoders, TextEncoding};
use super::transformer::HunyuanVideoInput as TransformerInput;
use super::{HunyuanVideoModel, Sizes};
use crate::diffusion::{DiffusionCard, DiffusionRequest};
use crate::error::Result;
use crate::families::split_rows;
use crate::layers::joint::Rotations;
use crate::lora::Adapters;
use crate::memory::MemoryPlan;
use crate::request::{Frame, Phase};
use crate::rng::TorchGenerator;
use crate::runner::diffusion::block_cache::{CachedPrediction, RowCache};
use crate::runner::diffusion::course::{Course, Expert};
use crate::runner::diffusion::inputs::{Inputs, MAX_TEXTS_PER_PASS, Pass, branch_texts};
use crate::runner::diffusion::narrow::NarrowNetworks;
use crate::runner::diffusion::previews::{Previews, rough_frame};
use crate::runner::diffusion::start::PictureStart;
use crate::runner::diffusion::{DenoiseRow, DiffusionModel};
use crate::vae::Pixels;
use crate::vae::hunyuan_video::HunyuanVaeDecoding;
use crate::vae::hunyuan_video::encoder::HunyuanVaeEncoder;
use crate::vae::picture_tiles::PictureEncoding;

/// Most prompts with a picture of one pass, each of which has hundreds of tokens more.
const MAX_PICTURES_PER_PASS: usize = 2;
/// Of the initial latents the part that is noise (`prepare_latents`); the rest is the picture, in every frame.
const NOISE: f32 = 0.999;

/// What a request has encoded.
#[derive(Debug, Clone, PartialEq)]
pub enum HunyuanVideoInput {
    /// Of a guidance branch.
    Prompt(HunyuanVideoPrompt),
    /// The picture that the clip begins with.
    Picture {
        /// In the size of the video.
        picture: Arc<Frame>,
        /// Whether it is encoded in tiles, where it is larger than one.
        tiled: bool,
    },
}

/// State of a pass between two steps.
pub enum HunyuanVideoEncoding {
    /// Encoder by encoder.
    Prompts(TextEncoding),
    /// As a whole or tile by tile.
    Picture(PictureEncoding),
}

/// What became of an input.
#[derive(Debug)]
pub enum HunyuanVideoEncoded {
    /// Of a prompt.
    Prompt(HunyuanVideoText),
    /// Latents of the picture, f32 `[1, z, 1, h, w]`.
    Picture(Tensor),
}

/// What the transformer needs of one guidance branch.
#[derive(Debug, Clone)]
pub struct HunyuanVideoConditioning {
    /// Of its prompt.
    pub text: HunyuanVideoText,
    /// Latents of the picture and a mask, for the channels behind those of the clip, f32 `[1, z + 1, f, h, w]`, of models
    /// that take it there.
    pub behind: Option<Tensor>,
    /// Of all tokens; made once for all steps.
    pub rotations: Arc<Rotations>,
}

/// The latents of the picture, of models that take one.
fn picture_of(encoded: &[Arc<HunyuanVideoEncoded>]) -> Option<&Tensor> {
    encoded.iter().find_map(|encoded| match &**encoded {
        HunyuanVideoEncoded::Picture(latents) => Some(latents),
        HunyuanVideoEncoded::Prompt(_) => None,
    })
}

/// `latents [1, c, 1, h, w]` as the first of `frames` frames, the others being zeros.
fn first_of(latents: &Tensor, frames: usize) -> Result<Tensor> {
    Ok(latents.pad_with_zeros(2, 0, frames - 1)?.contiguous()?)
}

impl Sizes {
    /// The prompts of the guidance branches, the positive one first, which alone is about the picture.
    fn prompts(&self, request: &DiffusionRequest) -> Vec<HunyuanVideoPrompt> {
        let told_length = self.told_length(request);
        let prompt = |(branch, text): (usize, String)| {
            let keyframes = request.keyframes.as_ref();
            let picture = self.interleave(branch).zip(keyframes).map(|(interleave, keyframes)| PromptPicture {
                picture: match branch {
                    0 => keyframes.first.given.clone(),
                    _ => Arc::new(Frame::black(request.canvas.width, request.canvas.height)),
                },
                interleave,
            });
            // Rows of one step are as long as the longest.
            HunyuanVideoPrompt { text, picture, told_length }
        };
        branch_texts(request).into_iter().enumerate().map(prompt).collect()
    }

    /// Of every how many patches of its picture a branch is told: the pipeline asks for less only of the positive one.
    fn interleave(&self, branch: usize) -> Option<usize> {
        let condition = self.image_condition?;
        Some(if condition == ImageCondition::TokenReplace && branch == 0 { 4 } else { 2 })
    }

    /// Vectors that each branch is told of its prompt, padding included.
    pub(super) fn told_length(&self, request: &DiffusionRequest) -> usize {
        let branches = 1 + usize::from(request.guidance.negative_prompt.is_some());
        let length = request.prompt.max_sequence_length;
        let told = |branch| HunyuanVideoPrompt::length_told(length, self.interleave(branch));
        (0..branches).map(told).max().unwrap_or(length)
    }
}

impl HunyuanVideoModel {
    fn vae_encoder(&self) -> &HunyuanVaeEncoder {
        self.vae_encoder.as_ref().expect("pictures were refused without an encoder for them: this is a bug")
    }
}

impl DiffusionModel for HunyuanVideoModel {
    type Input = HunyuanVideoInput;
    type Encoding = HunyuanVideoEncoding;
    type Encoded = HunyuanVideoEncoded;
    type Conditioning = HunyuanVideoConditioning;
    type Decoding = HunyuanVaeDecoding;

    fn card(&self) -> &DiffusionCard {
        &self.card
    }

    fn plan(&self, request: &DiffusionRequest, branches_at_once: usize) -> MemoryPlan {
        self.sizes.plan(request, branches_at_once, &self.placement, self.dequantised)
    }

    fn inputs(&self, request: &DiffusionRequest) -> Vec<Inputs<HunyuanVideoInput>> {
        let pass = Pass {
            phase: Phase::Encode,
            components: TextEncoders::COMPONENTS,
            sequence_length: request.prompt.max_sequence_length,
            loras: None,
            max_rows: if self.vae_encoder.is_some() { MAX_PICTURES_PER_PASS } else { MAX_TEXTS_PER_PASS },
        };
        let prompts = self.sizes.prompts(request).into_iter().map(HunyuanVideoInput::Prompt).collect();
        let picture = request.keyframes.as_ref().map(|keyframes| Inputs {
            pass: Pass::of_image(),
            rows: vec![HunyuanVideoInput::Picture {
                picture: keyframes.first.fitted.clone(),
                tiled: request.vae_tiling,
            }],
        });
        std::iter::once(Inputs { pass, rows: prompts }).chain(picture).collect()
    }

    fn num_encode_steps(&self, inputs: &Inputs<HunyuanVideoInput>) -> usize {
        match &inputs.rows[0] {
            HunyuanVideoInput::Prompt(_) => self.text_encoders.num_steps(),
            HunyuanVideoInput::Picture { picture, tiled } => {
                self.sizes.vae.num_encode_steps((picture.height, picture.width), *tiled)
            }
        }
    }

    fn begin_encode(&self, pass: &Pass, rows: &[&HunyuanVideoInput]) -> Result<HunyuanVideoEncoding> {
        if let [HunyuanVideoInput::Picture { picture, tiled }] = rows {
            return Ok(HunyuanVideoEncoding::Picture(self.vae_encoder().begin(picture.clone(), *tiled)));
        }
        let prompts = rows.iter().filter_map(|row| match row {
            HunyuanVideoInput::Prompt(prompt) => Some(prompt),
            HunyuanVideoInput::Picture { .. } => None,
        });
        let prompts: Vec<&HunyuanVideoPrompt> = prompts.collect();
        self.text_encoders.begin(pass.sequence_length, &prompts).map(HunyuanVideoEncoding::Prompts)
    }

    fn encode_next(&self, encoding: &mut HunyuanVideoEncoding) -> Result<Option<Vec<HunyuanVideoEncoded>>> {
        match encoding {
            HunyuanVideoEncoding::Prompts(encoding) => {
                let texts = self.text_encoders.encode_next(encoding)?;
                Ok(texts.map(|texts| texts.into_iter().map(HunyuanVideoEncoded::Prompt).collect()))
            }
            HunyuanVideoEncoding::Picture(encoding) => {
                let latents = self.vae_encoder().encode_next(encoding)?;
                Ok(latents.map(|latents| vec![HunyuanVideoEncoded::Picture(latents)]))
            }
        }
    }

    fn conditioning(
        &self,
        _expert: Expert,
        encoded: &[Arc<HunyuanVideoEncoded>],
        request: &DiffusionRequest,
    ) -> Result<Vec<HunyuanVideoConditioning>> {
        let [_, _, frames, height, width] = self.sizes.latent_shape(request);
        let told_length = self.sizes.told_length(request);
        let rotations = Arc::new(self.transformer.rotations([frames, height, width], told_length)?);
        let behind = match (self.sizes.image_condition, picture_of(encoded)) {
            (Some(ImageCondition::LatentConcat), Some(latents)) => {
                let mask = latents.narrow(1, 0, 1)?.ones_like()?;
                Some(Tensor::cat(&[first_of(latents, frames)?, first_of(&mask, frames)?], 1)?)
            }
            _ => None,
        };
        let texts = encoded.iter().filter_map(|encoded| match &**encoded {
            HunyuanVideoEncoded::Prompt(text) => {
                let rotations = rotations.clone();
                Some(HunyuanVideoConditioning { text: text.clone(), behind: behind.clone(), rotations })
            }
            HunyuanVideoEncoded::Picture(_) => None,
        });
        Ok(texts.collect())
    }

    fn shape(&self, conditioning: &HunyuanVideoConditioning) -> Vec<usize> {
        conditioning.text.prompt_embeds.dims().to_vec()
    }

    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor> {
        let shape = self.sizes.latent_shape(request);
        Ok(Tensor::from_vec(generator.randn(shape.iter().product()), shape.to_vec(), self.transformer.device())?)
    }

    fn course(&self, request: &DiffusionRequest) -> Result<Course> {
        let the_loop = request.sampling.denoising_loop(None);
        Ok(Course::of(self.card.sampling.schedulers.start(request.sampling.scheduler, &the_loop)))
    }

    fn predict(&self, _expert: Expert, rows: &[DenoiseRow<'_, HunyuanVideoConditioning>]) -> Result<Vec<Tensor>> {
        self.with_input(rows, |input| self.transformer.forward(input))
    }

    fn begin_decode(
        &self,
        _expert: Expert,
        latents: &Tensor,
        request: &DiffusionRequest,
    ) -> Result<HunyuanVaeDecoding> {
        self.vae.begin(latents, self.sizes.skipped_frames(), request.vae_tiling)
    }

    fn num_decode_steps(&self, _expert: Expert, request: &DiffusionRequest) -> usize {
        let [_, _, frames, height, width] = self.sizes.latent_shape(request);
        self.sizes.vae.num_decode_steps([frames, height, width], request.vae_tiling)
    }

    fn frames_under_way(&self, request: &DiffusionRequest) -> usize {
        let [_, _, frames, _, _] = self.sizes.latent_shape(request);
        self.sizes.vae.frames_under_way(frames)
    }

    fn decode_next(&self, decoding: &mut HunyuanVaeDecoding) -> Result<Pixels> {
        self.vae.decode_next(decoding)
    }

    fn adapters(&self) -> Option<&Adapters> {
        Some(&self.adapters)
    }

    fn picture_start(&self) -> Option<&dyn PictureStart<HunyuanVideoEncoded>> {
        self.vae_encoder.as_ref().map(|_| self as _)
    }

    fn cached_prediction(&self) -> Option<&dyn CachedPrediction<HunyuanVideoConditioning>> {
        Some(self)
    }

    fn previews(&self) -> Option<&dyn Previews> {
        Some(self)
    }

    fn narrow_networks(&self) -> Option<&dyn NarrowNetworks> {
        Some(self)
    }
}

impl HunyuanVideoModel {
    /// The rows side by side, as the transformer takes them, and the prediction of each.
    fn with_input(
        &self,
        rows: &[DenoiseRow<'_, HunyuanVideoConditioning>],
        forward: impl FnOnce(&TransformerInput<'_>) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        // Of another dtype only where another model has encoded the prompt.
        let dtype = self.placement.compute_dtype;
        let stack = |part: fn(&DenoiseRow<'_, HunyuanVideoConditioning>) -> candle_core::Result<Tensor>| {
            Tensor::cat(&rows.iter().map(part).collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        let timesteps: Vec<f32> = rows.iter().map(|row| row.timestep as f32).collect();
        let guidance_scales: Vec<f32> = rows.iter().map(|row| row.request.guidance.guidance_scale as f32).collect();
        let text_lens: Vec<usize> = rows.iter().map(|row| row.conditioning.text.num_tokens).collect();
        let first_is_clean = self.sizes.image_condition == Some(ImageCondition::TokenReplace);
        let flow = forward(&TransformerInput {
            latents: &stack(|row| match &row.conditioning.behind {
                Some(behind) => Tensor::cat(&[row.latents, behind], 1),
                None => Ok(row.latents.clone()),
            })?,
            timesteps: &timesteps,
            text: &stack(|row| Ok(row.conditioning.text.prompt_embeds.clone()))?.to_dtype(dtype)?,
            text_lens: &text_lens,
            pooled: &stack(|row| Ok(row.conditioning.text.pooled_prompt_embeds.clone()))?.to_dtype(dtype)?,
            guidance_scales: &guidance_scales,
            first_is_clean,
            // Rows of one step stand alike.
            rotations: &rows[0].conditioning.rotations,
        })?;
        split_rows(&if first_is_clean { standing_first(&flow)? } else { flow })
    }
}

impl CachedPrediction<HunyuanVideoConditioning> for HunyuanVideoModel {
    fn predict_cached(
        &self,
        _expert: Expert,
        rows: &[DenoiseRow<'_, HunyuanVideoConditioning>],
        caches: &mut [RowCache<'_>],
    ) -> Result<Vec<Tensor>> {
        self.with_input(rows, |input| self.transformer.forward_cached(input, caches))
    }
}

impl PictureStart<HunyuanVideoEncoded> for HunyuanVideoModel {
    fn begin(&self, noise: Tensor, encoded: &[Arc<HunyuanVideoEncoded>]) -> Result<Tensor> {
        let picture = picture_of(encoded).expect("a clip's picture is one of the inputs: this is a bug");
        let rest = f64::from(1.0 - NOISE);
        let latents = (noise * f64::from(NOISE))?.broadcast_add(&(picture * rest)?)?;
        match self.sizes.image_condition {
            // The solver leaves this frame as it is.
            Some(ImageCondition::TokenReplace) => {
                let others = latents.dim(2)? - 1;
                Ok(Tensor::cat(&[picture, &latents.narrow(2, 1, others)?], 2)?.contiguous()?)
            }
            Some(ImageCondition::LatentConcat) | None => Ok(latents),
        }
    }
}

/// A flow `[n, c, f, h, w]` that leaves the first frame where it is.
fn standing_first(flow: &Tensor) -> Result<Tensor> {
    let first = flow.narrow(2, 0, 1)?.zeros_like()?;
    let others = flow.narrow(2, 1, flow.dim(2)? - 1)?;
    Ok(Tensor::cat(&[&first, &others], 2)?.contiguous()?)
}

impl Previews for HunyuanVideoModel {
    fn preview(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<Frame> {
        // Without what comes before the clip.
        let frames = self.sizes.vae.latent_frames(request.canvas.num_frames);
        let latents = latents.narrow(2, latents.dim(2)? - frames, frames)?;
        Ok(rough_frame(self.vae.preview(&latents)?))
    }
}

impl NarrowNetworks for HunyuanVideoModel {
    fn components(&self, phase: Phase, _expert: Expert) -> &'static [&'static str] {
        match phase {
            _ if self.placement.compute_dtype == DType::F32 => &[],
            Phase::Denoise => &["transformer"],
            Phase::VaeDecode => &["vae"],
            _ => &[],
        }
    }
}
