//! The way of a request through CogVideoX: prompts and a picture to what the transformer is told, prediction, decoding.
//!
//! Owns: what a request has encoded and in which steps, the order in which its generator is drawn from. Does not know:
//! sessions, batching, guidance. Latents have frames before channels, as in the reference, until they are decoded.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::CogVideoXModel;
use super::positions::Rotations;
use super::transformer::CogVideoXInput as TransformerInput;
use crate::diffusion::{DiffusionCard, DiffusionRequest};
use crate::encoders::slices;
use crate::error::Result;
use crate::families::split_rows;
use crate::lora::Adapters;
use crate::memory::MemoryPlan;
use crate::prompt::plain_text;
use crate::request::{Frame, Phase};
use crate::rng::TorchGenerator;
use crate::runner::diffusion::block_cache::{CachedPrediction, RowCache};
use crate::runner::diffusion::course::{Course, Expert};
use crate::runner::diffusion::inputs::{Inputs, MAX_TEXTS_PER_PASS, Pass, branch_texts};
use crate::runner::diffusion::narrow::NarrowNetworks;
use crate::runner::diffusion::previews::{Previews, rough_frame};
use crate::runner::diffusion::{DenoiseRow, DiffusionModel};
use crate::vae::cogvideox::CogVideoXDecoding;
use crate::vae::cogvideox::encoder::CogVideoXVaeEncoder;
use crate::vae::picture_tiles::PictureEncoding;
use crate::vae::{Pixels, Posterior};

/// What a request has encoded.
#[derive(Debug, Clone, PartialEq)]
pub enum CogVideoXInput {
    /// A prompt, positive or negative.
    Text(String),
    /// The picture to begin from.
    Picture {
        /// In the size of the video.
        picture: Arc<Frame>,
        /// Whether it is encoded in tiles, where it is larger than one.
        tiled: bool,
    },
}

/// A pass between two steps.
pub enum CogVideoXPass {
    /// The prompts' tokens, before the only step.
    Texts(Vec<Vec<u32>>),
    /// Of a picture.
    Picture(PictureEncoding),
}

/// What became of an input.
#[derive(Debug)]
pub enum CogVideoXEncoded {
    /// `[1, max_sequence_length, text_embed_dim]` in the compute dtype; padding is not masked.
    Text(Tensor),
    /// What the latents of the picture may be, `[1, latent_channels, 1, height, width]`.
    Picture(Posterior),
}

/// What the transformer needs of one guidance branch.
#[derive(Debug, Clone)]
pub struct CogVideoXConditioning {
    /// As [`CogVideoXEncoded::Text`].
    pub text: Tensor,
    /// Of models that begin from a picture: its latents and zeros for all later frames, f32 `[1, frames, channels, height,
    /// width]`.
    pub picture: Option<Tensor>,
    /// Of all tokens, where any are turned; made once for all steps.
    pub rotations: Option<Arc<Rotations>>,
}

impl CogVideoXModel {
    fn vae_encoder(&self) -> &CogVideoXVaeEncoder {
        self.vae_encoder.as_ref().expect("pictures were refused without an encoder: this is a bug")
    }

    /// The latents of a picture, drawn from what they may be before anything else is drawn.
    fn picture_latents(&self, posterior: &Posterior, request: &DiffusionRequest) -> Result<Tensor> {
        let sample = posterior.sample(&mut TorchGenerator::new(request.sampling.seed))?;
        let scale = self.sizes.vae.scaling_factor;
        // Some models were trained on latents that were divided where they should have been multiplied.
        let scale = if self.sizes.vae.invert_scale_latents { 1.0 / scale } else { scale };
        let first = (sample.transpose(1, 2)? * scale)?; // [1, 1, channels, height, width]
        let [_, frames, ..] = self.sizes.latent_shape(request);
        Ok(first.pad_with_zeros(1, 0, frames - 1)?)
    }

    /// The latents of the video alone, as the VAE has them, `[1, channels, frames, height, width]`.
    fn decoded_latents(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<Tensor> {
        // Frames that only fill a patch come first.
        let frames = self.sizes.latent_frames(request);
        Ok(latents.narrow(1, latents.dim(1)? - frames, frames)?.transpose(1, 2)?)
    }

    /// The rows side by side, as the transformer takes them, and the prediction of each.
    fn with_input(
        &self,
        rows: &[DenoiseRow<'_, CogVideoXConditioning>],
        forward: impl FnOnce(&TransformerInput<'_>) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let latents = |row: &DenoiseRow<'_, CogVideoXConditioning>| match &row.conditioning.picture {
            Some(picture) => Tensor::cat(&[row.latents, picture], 2),
            None => Ok(row.latents.clone()),
        };
        let text: Vec<&Tensor> = rows.iter().map(|row| &row.conditioning.text).collect();
        let latents = rows.iter().map(latents).collect::<candle_core::Result<Vec<_>>>()?;
        let timesteps: Vec<f32> = rows.iter().map(|row| row.timestep as f32).collect();
        split_rows(&forward(&TransformerInput {
            latents: &Tensor::cat(&latents, 0)?,
            timesteps: &timesteps,
            // Of another dtype only where another model has encoded the prompt.
            text: &Tensor::cat(&text, 0)?.to_dtype(self.placement.compute_dtype)?,
            // Rows of one step stand alike.
            rotations: rows[0].conditioning.rotations.as_deref(),
        })?)
    }
}

impl DiffusionModel for CogVideoXModel {
    type Input = CogVideoXInput;
    type Encoding = CogVideoXPass;
    type Encoded = CogVideoXEncoded;
    type Conditioning = CogVideoXConditioning;
    type Decoding = CogVideoXDecoding;

    fn card(&self) -> &DiffusionCard {
        &self.card
    }

    fn plan(&self, request: &DiffusionRequest, branches_at_once: usize) -> MemoryPlan {
        self.sizes.plan(request, branches_at_once, &self.placement, self.dequantised)
    }

    fn inputs(&self, request: &DiffusionRequest) -> Vec<Inputs<CogVideoXInput>> {
        let texts = Inputs {
            pass: Pass {
                phase: Phase::Encode,
                components: &["text_encoder"],
                sequence_length: request.prompt.max_sequence_length,
                loras: None,
                max_rows: MAX_TEXTS_PER_PASS,
            },
            rows: branch_texts(request).into_iter().map(CogVideoXInput::Text).collect(),
        };
        let picture = request.keyframes.as_ref().map(|keyframes| Inputs {
            pass: Pass::of_image(),
            rows: vec![CogVideoXInput::Picture { picture: keyframes.first.fitted.clone(), tiled: request.vae_tiling }],
        });
        std::iter::once(texts).chain(picture).collect()
    }

    fn num_encode_steps(&self, inputs: &Inputs<CogVideoXInput>) -> usize {
        match &inputs.rows[0] {
            CogVideoXInput::Text(_) => 1,
            CogVideoXInput::Picture { picture, tiled } => {
                self.sizes.vae.num_encode_steps((picture.height, picture.width), *tiled)
            }
        }
    }

    fn begin_encode(&self, pass: &Pass, rows: &[&CogVideoXInput]) -> Result<CogVideoXPass> {
        if let [CogVideoXInput::Picture { picture, tiled }] = rows {
            return Ok(CogVideoXPass::Picture(self.vae_encoder().begin(picture.clone(), *tiled)));
        }
        let texts = rows.iter().filter_map(|row| match row {
            CogVideoXInput::Text(text) => Some(plain_text("prompt", text)),
            CogVideoXInput::Picture { .. } => None,
        });
        let texts = texts.collect::<Result<Vec<_>>>()?;
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        // The padding is not masked: the model was trained to see it.
        Ok(CogVideoXPass::Texts(self.tokenizer.encode_padded_rows(&texts, pass.sequence_length)?))
    }

    fn encode_next(&self, pass: &mut CogVideoXPass) -> Result<Option<Vec<CogVideoXEncoded>>> {
        match pass {
            CogVideoXPass::Texts(ids) => {
                let hidden = self.text_encoder.forward(&slices(ids))?;
                Ok(Some(hidden.into_iter().map(CogVideoXEncoded::Text).collect()))
            }
            CogVideoXPass::Picture(encoding) => {
                let posterior = self.vae_encoder().encode_next(encoding)?;
                Ok(posterior.map(|posterior| vec![CogVideoXEncoded::Picture(posterior)]))
            }
        }
    }

    fn conditioning(
        &self,
        _expert: Expert,
        encoded: &[Arc<CogVideoXEncoded>],
        request: &DiffusionRequest,
    ) -> Result<Vec<CogVideoXConditioning>> {
        let (mut texts, mut picture) = (Vec::new(), None);
        for encoded in encoded {
            match &**encoded {
                CogVideoXEncoded::Text(text) => texts.push(text.clone()),
                CogVideoXEncoded::Picture(posterior) => picture = Some(self.picture_latents(posterior, request)?),
            }
        }
        let [_, frames, _, height, width] = self.sizes.latent_shape(request);
        let length = request.prompt.max_sequence_length;
        let rotations = self.transformer.rotations([frames, height, width], length)?.map(Arc::new);
        let of_branch = |text| CogVideoXConditioning { text, picture: picture.clone(), rotations: rotations.clone() };
        Ok(texts.into_iter().map(of_branch).collect())
    }

    fn shape(&self, conditioning: &CogVideoXConditioning) -> Vec<usize> {
        conditioning.text.dims().to_vec()
    }

    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor> {
        let shape = self.sizes.latent_shape(request);
        if request.keyframes.is_some() {
            // The latents of the picture were drawn first, by a generator of the same seed.
            let [_, _, channels, height, width] = shape;
            generator.randn(channels * height * width);
        }
        let noise = generator.randn(shape.iter().product());
        Ok(Tensor::from_vec(noise, shape.to_vec(), &self.placement.device)?)
    }

    fn course(&self, request: &DiffusionRequest) -> Result<Course> {
        let the_loop = request.sampling.denoising_loop(None);
        Ok(Course::of(self.card.sampling.schedulers.start(request.sampling.scheduler, &the_loop)))
    }

    fn predict(&self, _expert: Expert, rows: &[DenoiseRow<'_, CogVideoXConditioning>]) -> Result<Vec<Tensor>> {
        self.with_input(rows, |input| self.transformer.forward(input))
    }

    fn begin_decode(&self, _expert: Expert, latents: &Tensor, request: &DiffusionRequest) -> Result<CogVideoXDecoding> {
        self.vae.begin(&self.decoded_latents(latents, request)?, request.vae_tiling)
    }

    fn num_decode_steps(&self, _expert: Expert, request: &DiffusionRequest) -> usize {
        let [_, _, _, height, width] = self.sizes.latent_shape(request);
        self.sizes.vae.num_decode_steps(self.sizes.latent_frames(request), (height, width), request.vae_tiling)
    }

    fn frames_under_way(&self, request: &DiffusionRequest) -> usize {
        let [_, _, _, height, width] = self.sizes.latent_shape(request);
        self.sizes.vae.frames_under_way(self.sizes.latent_frames(request), (height, width), request.vae_tiling)
    }

    fn decode_next(&self, decoding: &mut CogVideoXDecoding) -> Result<Pixels> {
        decoding.next(&self.vae)
    }

    fn adapters(&self) -> Option<&Adapters> {
        Some(&self.adapters)
    }

    fn cached_prediction(&self) -> Option<&dyn CachedPrediction<CogVideoXConditioning>> {
        Some(self)
    }

    fn previews(&self) -> Option<&dyn Previews> {
        Some(self)
    }

    fn narrow_networks(&self) -> Option<&dyn NarrowNetworks> {
        Some(self)
    }
}

impl CachedPrediction<CogVideoXConditioning> for CogVideoXModel {
    fn predict_cached(
        &self,
        _expert: Expert,
        rows: &[DenoiseRow<'_, CogVideoXConditioning>],
        caches: &mut [RowCache<'_>],
    ) -> Result<Vec<Tensor>> {
        self.with_input(rows, |input| self.transformer.forward_cached(input, caches))
    }
}

impl Previews for CogVideoXModel {
    fn preview(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<Frame> {
        Ok(rough_frame(self.vae.preview(&self.decoded_latents(latents, request)?)?))
    }
}

impl NarrowNetworks for CogVideoXModel {
    fn components(&self, phase: Phase, _expert: Expert) -> &'static [&'static str] {
        match phase {
            _ if self.placement.compute_dtype == DType::F32 => &[],
            Phase::Denoise => &["transformer"],
            Phase::VaeDecode => &["vae"],
            _ => &[],
        }
    }
}
