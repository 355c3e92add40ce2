//! The way of a request through HunyuanVideo: prompts to what the transformer is told, prediction, decoding.
//!
//! Owns: what a request has encoded and in which steps. Does not know: sessions, batching, guidance.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::HunyuanVideoModel;
use super::text::{HunyuanVideoText, TextEncoders, TextEncoding};
use super::transformer::HunyuanVideoInput as TransformerInput;
use crate::diffusion::{DiffusionCard, DiffusionRequest};
use crate::error::Result;
use crate::families::split_rows;
use crate::memory::MemoryPlan;
use crate::request::Phase;
use crate::rng::TorchGenerator;
use crate::runner::diffusion::course::{Course, Expert};
use crate::runner::diffusion::inputs::{Inputs, MAX_TEXTS_PER_PASS, Pass, branch_texts};
use crate::runner::diffusion::narrow::NarrowNetworks;
use crate::runner::diffusion::{DenoiseRow, DiffusionModel};
use crate::vae::hunyuan_video::HunyuanVaeDecoding;

impl DiffusionModel for HunyuanVideoModel {
    /// A prompt, positive or negative.
    type Input = String;
    type Encoding = TextEncoding;
    type Encoded = HunyuanVideoText;
    type Conditioning = HunyuanVideoText;
    type Decoding = HunyuanVaeDecoding;

    fn card(&self) -> &DiffusionCard {
        &self.card
    }

    fn plan(&self, request: &DiffusionRequest) -> MemoryPlan {
        self.sizes.plan(request, &self.placement)
    }

    fn inputs(&self, request: &DiffusionRequest) -> Vec<Inputs<String>> {
        let pass = Pass {
            phase: Phase::Encode,
            components: TextEncoders::COMPONENTS,
            sequence_length: request.prompt.max_sequence_length,
            loras: None,
            max_rows: MAX_TEXTS_PER_PASS,
        };
        vec![Inputs { pass, rows: branch_texts(request) }]
    }

    fn num_encode_steps(&self, _inputs: &Inputs<String>) -> usize {
        TextEncoders::COMPONENTS.len()
    }

    fn begin_encode(&self, pass: &Pass, rows: &[&String]) -> Result<TextEncoding> {
        let prompts: Vec<&str> = rows.iter().map(|prompt| prompt.as_str()).collect();
        self.text_encoders.begin(pass.sequence_length, &prompts)
    }

    fn encode_next(&self, encoding: &mut TextEncoding) -> Result<Option<Vec<HunyuanVideoText>>> {
        self.text_encoders.encode_next(encoding)
    }

    fn conditioning(
        &self,
        _expert: Expert,
        encoded: &[Arc<HunyuanVideoText>],
        _request: &DiffusionRequest,
    ) -> Result<Vec<HunyuanVideoText>> {
        Ok(encoded.iter().map(|text| HunyuanVideoText::clone(text)).collect())
    }

    fn shape(&self, conditioning: &HunyuanVideoText) -> Vec<usize> {
        conditioning.prompt_embeds.dims().to_vec()
    }

    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor> {
        let shape = self.sizes.latent_shape(request);
        Ok(Tensor::from_vec(generator.randn(shape.iter().product()), shape.to_vec(), self.transformer.device())?)
    }

    fn course(&self, request: &DiffusionRequest) -> Result<Course> {
        let the_loop = request.sampling.denoising_loop(None);
        Ok(Course::of(self.card.sampling.schedulers.start(request.sampling.scheduler, &the_loop)))
    }

    fn predict(&self, _expert: Expert, rows: &[DenoiseRow<'_, HunyuanVideoText>]) -> Result<Vec<Tensor>> {
        // Of another dtype only where another model has encoded the prompt.
        let dtype = self.placement.compute_dtype;
        let stack = |part: fn(&DenoiseRow<'_, HunyuanVideoText>) -> Tensor| {
            Tensor::cat(&rows.iter().map(part).collect::<Vec<_>>(), 0)
        };
        let timesteps: Vec<f32> = rows.iter().map(|row| row.timestep as f32).collect();
        let guidance_scales: Vec<f32> = rows.iter().map(|row| row.request.guidance.guidance_scale as f32).collect();
        let text_lens: Vec<usize> = rows.iter().map(|row| row.conditioning.num_tokens).collect();
        let flow = self.transformer.forward(&TransformerInput {
            latents: &stack(|row| row.latents.clone())?,
            timesteps: &timesteps,
            text: &stack(|row| row.conditioning.prompt_embeds.clone())?.to_dtype(dtype)?,
            text_lens: &text_lens,
            pooled: &stack(|row| row.conditioning.pooled_prompt_embeds.clone())?.to_dtype(dtype)?,
            guidance_scales: &guidance_scales,
        })?;
        split_rows(&flow)
    }

    fn begin_decode(
        &self,
        _expert: Expert,
        latents: &Tensor,
        _request: &DiffusionRequest,
    ) -> Result<HunyuanVaeDecoding> {
        self.vae.begin(latents)
    }

    fn num_decode_steps(&self, _expert: Expert, request: &DiffusionRequest) -> usize {
        self.sizes.vae.num_decode_steps(self.sizes.latent_shape(request)[2])
    }

    fn decode_next(&self, decoding: &mut HunyuanVaeDecoding) -> Result<Option<Tensor>> {
        self.vae.decode_next(decoding).map(Some)
    }

    fn narrow_networks(&self) -> Option<&dyn NarrowNetworks> {
        Some(self)
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
