//! The way of a request through Wan: prompts to what the transformer is told, prediction, decoding.
//!
//! Owns: what a request has encoded and in which steps. Does not know: sessions, batching, guidance.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::WanModel;
use crate::diffusion::{DiffusionCard, DiffusionRequest};
use crate::encoders::prompt_clean::prompt_clean;
use crate::error::Result;
use crate::families::split_rows;
use crate::memory::MemoryPlan;
use crate::prompt::plain_text;
use crate::request::Phase;
use crate::rng::TorchGenerator;
use crate::runner::diffusion::block_cache::{BlockCache, CachedPrediction};
use crate::runner::diffusion::course::{Course, Expert};
use crate::runner::diffusion::inputs::{Inputs, MAX_TEXTS_PER_PASS, Pass, branch_texts};
use crate::runner::diffusion::narrow::NarrowNetworks;
use crate::runner::diffusion::{DenoiseRow, DiffusionModel};
use crate::tokenizer::Padded;
use crate::vae::wan::WanDecoding;

impl DiffusionModel for WanModel {
    /// A prompt, positive or negative.
    type Input = String;
    /// The prompts' tokens.
    type Encoding = Vec<Padded>;
    /// `[1, max_sequence_length, text_dim]` in the compute dtype, zeros past the prompt.
    type Encoded = Tensor;
    type Conditioning = Tensor;
    type Decoding = WanDecoding;

    fn card(&self) -> &DiffusionCard {
        &self.card
    }

    fn plan(&self, request: &DiffusionRequest) -> MemoryPlan {
        self.sizes.plan(request, &self.placement)
    }

    fn inputs(&self, request: &DiffusionRequest) -> Vec<Inputs<String>> {
        let pass = Pass {
            phase: Phase::Encode,
            components: &["text_encoder"],
            sequence_length: request.prompt.max_sequence_length,
            loras: None,
            max_rows: MAX_TEXTS_PER_PASS,
        };
        vec![Inputs { pass, rows: branch_texts(request) }]
    }

    fn num_encode_steps(&self, _inputs: &Inputs<String>) -> usize {
        1
    }

    fn begin_encode(&self, pass: &Pass, rows: &[&String]) -> Result<Vec<Padded>> {
        let clean = |prompt: &str| -> Result<String> { Ok(prompt_clean(&plain_text("prompt", prompt)?)) };
        rows.iter().map(|prompt| self.tokenizer.encode_padded(&clean(prompt)?, pass.sequence_length)).collect()
    }

    fn encode_next(&self, padded: &mut Vec<Padded>) -> Result<Option<Vec<Tensor>>> {
        let tokens: Vec<&[u32]> = padded.iter().map(|padded| &padded.ids[..padded.num_tokens]).collect();
        let hidden = self.text_encoder.forward(&tokens)?; // each [1, num_tokens, text_dim]
        let hidden = hidden.iter().zip(padded);
        let filled_up = hidden.map(|(x, padded)| Ok(x.pad_with_zeros(1, 0, padded.ids.len() - padded.num_tokens)?));
        filled_up.collect::<Result<Vec<_>>>().map(Some)
    }

    fn conditioning(
        &self,
        _expert: Expert,
        encoded: &[Arc<Tensor>],
        _request: &DiffusionRequest,
    ) -> Result<Vec<Tensor>> {
        Ok(encoded.iter().map(|text| Tensor::clone(text)).collect())
    }

    fn shape(&self, text: &Tensor) -> Vec<usize> {
        text.dims().to_vec()
    }

    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor> {
        let shape = self.sizes.latent_shape(request);
        Ok(Tensor::from_vec(generator.randn(shape.iter().product()), shape.to_vec(), self.transformer.device())?)
    }

    fn course(&self, request: &DiffusionRequest) -> Result<Course> {
        let the_loop = request.sampling.denoising_loop(None);
        Ok(Course::of(self.card.sampling.schedulers.start(request.sampling.scheduler, &the_loop)))
    }

    fn predict(&self, _expert: Expert, rows: &[DenoiseRow<'_, Tensor>]) -> Result<Vec<Tensor>> {
        let TransformerInput { latents, timesteps, text } = TransformerInput::new(rows, self.placement.compute_dtype)?;
        split_rows(&self.transformer.forward(&latents, &timesteps, &text)?)
    }

    fn begin_decode(&self, _expert: Expert, latents: &Tensor, _request: &DiffusionRequest) -> Result<WanDecoding> {
        self.vae.begin(latents)
    }

    fn num_decode_steps(&self, _expert: Expert, request: &DiffusionRequest) -> usize {
        self.sizes.latent_shape(request)[2]
    }

    fn decode_next(&self, decoding: &mut WanDecoding) -> Result<Option<Tensor>> {
        self.vae.decode_next(decoding).map(Some)
    }

    fn cached_prediction(&self) -> Option<&dyn CachedPrediction<Tensor>> {
        Some(self)
    }

    fn narrow_networks(&self) -> Option<&dyn NarrowNetworks> {
        Some(self)
    }
}

impl CachedPrediction<Tensor> for WanModel {
    fn predict_cached(
        &self,
        _expert: Expert,
        rows: &[DenoiseRow<'_, Tensor>],
        caches: &mut [&mut BlockCache],
    ) -> Result<Vec<Tensor>> {
        let TransformerInput { latents, timesteps, text } = TransformerInput::new(rows, self.placement.compute_dtype)?;
        split_rows(&self.transformer.forward_cached(&latents, &timesteps, &text, caches)?)
    }
}

impl NarrowNetworks for WanModel {
    fn components(&self, phase: Phase, _expert: Expert) -> &'static [&'static str] {
        match phase {
            _ if self.placement.compute_dtype == DType::F32 => &[],
            Phase::Denoise => &["transformer"],
            Phase::VaeDecode => &["vae"],
            _ => &[],
        }
    }
}

/// Rows side by side, as the transformer takes them.
struct TransformerInput {
    latents: Tensor,
    timesteps: Vec<f32>,
    text: Tensor,
}

impl TransformerInput {
    /// `dtype`: of the transformer; the text has another one only where another model has encoded it.
    fn new(rows: &[DenoiseRow<'_, Tensor>], dtype: DType) -> Result<Self> {
        Ok(Self {
            latents: Tensor::cat(&rows.iter().map(|row| row.latents).collect::<Vec<_>>(), 0)?,
            timesteps: rows.iter().map(|row| row.timestep as f32).collect(),
            text: Tensor::cat(&rows.iter().map(|row| row.conditioning).collect::<Vec<_>>(), 0)?.to_dtype(dtype)?,
        })
    }
}
