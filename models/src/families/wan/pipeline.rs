//! The way of a request through Wan: prompts and pictures to what the transformer is told, prediction, decoding.
//!
//! Owns: what a request has encoded and in which steps. Does not know: sessions, batching, guidance.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::pictures::{FramesEncoding, KnownFrames, Pictures, VisionEncoding};
use super::transformer::{Rope, WanInput as TransformerInput};
use super::{Dequantised, WanModel};
use crate::diffusion::{DiffusionCard, DiffusionRequest};
use crate::encoders::prompt_clean::prompt_clean;
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
use crate::tokenizer::Padded;
use crate::vae::Pixels;
use crate::vae::wan::WanDecoding;

/// What a request has encoded.
#[derive(Debug, Clone, PartialEq)]
pub enum WanInput {
    /// A prompt, positive or negative.
    Text(String),
    /// Pictures for the vision encoder, in any sizes.
    Pictures(Vec<Arc<Frame>>),
    /// The frames that are known, for the VAE.
    Frames(KnownFrames),
}

/// State of a pass between two steps.
pub enum WanEncoding {
    /// The prompts' tokens.
    Texts(Vec<Padded>),
    /// Picture by picture.
    Pictures(VisionEncoding),
    /// Latent frame by latent frame.
    Frames(Box<FramesEncoding>),
}

/// What became of an input.
#[derive(Debug)]
pub enum WanEncoded {
    /// `[1, max_sequence_length, text_dim]` in the compute dtype, zeros past the prompt.
    Text(Tensor),
    /// `[1, tokens, image_dim]` in the compute dtype.
    Pictures(Tensor),
    /// A mask and latents, f32 `[1, temporal + z, frames, height, width]`.
    Frames(Tensor),
}

/// What the transformer needs of one guidance branch.
#[derive(Debug, Clone)]
pub struct WanConditioning {
    /// As [`WanEncoded::Text`].
    pub text: Tensor,
    /// As [`WanEncoded::Pictures`], of models that take some.
    pub pictures: Option<Tensor>,
    /// As [`WanEncoded::Frames`], of models that take pictures.
    pub frames: Option<Tensor>,
    /// Of all tokens; made once for all steps.
    pub rope: Arc<Rope>,
}

impl WanModel {
    fn pictures(&self) -> &Pictures {
        self.pictures.as_ref().expect("pictures were refused without encoders for them: this is a bug")
    }

    fn begin_texts(&self, length: usize, texts: &[&String]) -> Result<Vec<Padded>> {
        let clean = |prompt: &str| -> Result<String> { Ok(prompt_clean(&plain_text("prompt", prompt)?)) };
        texts.iter().map(|prompt| self.tokenizer.encode_padded(&clean(prompt)?, length)).collect()
    }

    /// Of each prompt its hidden states, filled up with zeros.
    fn encode_texts(&self, padded: &[Padded]) -> Result<Vec<Tensor>> {
        let tokens: Vec<&[u32]> = padded.iter().map(|padded| &padded.ids[..padded.num_tokens]).collect();
        let hidden = self.text_encoder.forward(&tokens)?; // each [1, num_tokens, text_dim]
        let hidden = hidden.iter().zip(padded);
        hidden.map(|(x, padded)| Ok(x.pad_with_zeros(1, 0, padded.ids.len() - padded.num_tokens)?)).collect()
    }
}

impl DiffusionModel for WanModel {
    type Input = WanInput;
    type Encoding = WanEncoding;
    type Encoded = WanEncoded;
    type Conditioning = WanConditioning;
    type Decoding = WanDecoding;

    fn card(&self) -> &DiffusionCard {
        &self.card
    }

    fn plan(&self, request: &DiffusionRequest, branches_at_once: usize) -> MemoryPlan {
        let dequantised = Dequantised {
            text_encoder: self.text_encoder.dequantised_bytes(),
            transformer: self.transformer.dequantised_bytes(),
        };
        self.sizes.plan(request, branches_at_once, &self.placement, dequantised)
    }

    fn inputs(&self, request: &DiffusionRequest) -> Vec<Inputs<WanInput>> {
        let pass = |components, sequence_length, max_rows| Pass {
            phase: Phase::Encode,
            components,
            sequence_length,
            loras: None,
            max_rows,
        };
        let texts = branch_texts(request).into_iter().map(WanInput::Text).collect();
        let texts = Inputs {
            pass: pass(&["text_encoder"], request.prompt.max_sequence_length, MAX_TEXTS_PER_PASS),
            rows: texts,
        };
        let of_keyframes = request.keyframes.as_ref().map(|keyframes| {
            let given = keyframes.iter().map(|keyframe| keyframe.given.clone()).collect();
            let frames = KnownFrames::new(keyframes, request);
            [
                Inputs { pass: pass(&["image_encoder"], 0, 1), rows: vec![WanInput::Pictures(given)] },
                Inputs { pass: Pass::of_image(), rows: vec![WanInput::Frames(frames)] },
            ]
        });
        std::iter::once(texts).chain(of_keyframes.into_iter().flatten()).collect()
    }

    fn num_encode_steps(&self, inputs: &Inputs<WanInput>) -> usize {
        match &inputs.rows[0] {
            WanInput::Text(_) => 1,
            WanInput::Pictures(pictures) => pictures.len(),
            WanInput::Frames(frames) => frames.num_encode_steps(&self.sizes.vae),
        }
    }

    fn begin_encode(&self, pass: &Pass, rows: &[&WanInput]) -> Result<WanEncoding> {
        match rows[0] {
            WanInput::Text(_) => {
                let texts =
                    rows.iter().filter_map(|row| if let WanInput::Text(text) = row { Some(text) } else { None });
                self.begin_texts(pass.sequence_length, &texts.collect::<Vec<_>>()).map(WanEncoding::Texts)
            }
            WanInput::Pictures(pictures) => Ok(WanEncoding::Pictures(VisionEncoding::new(pictures.clone()))),
            WanInput::Frames(frames) => {
                Ok(WanEncoding::Frames(Box::new(self.pictures().begin_frames(frames.clone(), &self.sizes.vae))))
            }
        }
    }

    fn encode_next(&self, encoding: &mut WanEncoding) -> Result<Option<Vec<WanEncoded>>> {
        match encoding {
            WanEncoding::Texts(padded) => {
                Ok(Some(self.encode_texts(padded)?.into_iter().map(WanEncoded::Text).collect()))
            }
            WanEncoding::Pictures(encoding) => {
                Ok(self.pictures().see_next(encoding)?.map(|seen| vec![WanEncoded::Pictures(seen)]))
            }
            WanEncoding::Frames(encoding) => {
                let known = self.pictures().encode_next(encoding, &self.sizes.vae)?;
                Ok(known.map(|known| vec![WanEncoded::Frames(known)]))
            }
        }
    }

    fn conditioning(
        &self,
        _expert: Expert,
        encoded: &[Arc<WanEncoded>],
        request: &DiffusionRequest,
    ) -> Result<Vec<WanConditioning>> {
        let (mut texts, mut pictures, mut frames) = (Vec::new(), None, None);
        for encoded in encoded {
            match &**encoded {
                WanEncoded::Text(text) => texts.push(text.clone()),
                WanEncoded::Pictures(seen) => pictures = Some(seen.clone()),
                WanEncoded::Frames(known) => frames = Some(known.clone()),
            }
        }
        let [_, _, depth, height, width] = self.sizes.latent_shape(request);
        let rope = Arc::new(self.transformer.rope([depth, height, width])?);
        let of_branch =
            |text| WanConditioning { text, pictures: pictures.clone(), frames: frames.clone(), rope: rope.clone() };
        Ok(texts.into_iter().map(of_branch).collect())
    }

    fn shape(&self, conditioning: &WanConditioning) -> Vec<usize> {
        conditioning.text.dims().to_vec()
    }

    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor> {
        let shape = self.sizes.latent_shape(request);
        Ok(Tensor::from_vec(generator.randn(shape.iter().product()), shape.to_vec(), self.transformer.device())?)
    }

    fn course(&self, request: &DiffusionRequest) -> Result<Course> {
        let the_loop = request.sampling.denoising_loop(None);
        Ok(Course::of(self.card.sampling.schedulers.start(request.sampling.scheduler, &the_loop)))
    }

    fn predict(&self, _expert: Expert, rows: &[DenoiseRow<'_, WanConditioning>]) -> Result<Vec<Tensor>> {
        let rows = Rows::new(rows, self.placement.compute_dtype)?;
        split_rows(&self.transformer.forward(&rows.input())?)
    }

    fn begin_decode(&self, _expert: Expert, latents: &Tensor, request: &DiffusionRequest) -> Result<WanDecoding> {
        self.vae.begin(latents, request.vae_tiling)
    }

    fn num_decode_steps(&self, _expert: Expert, request: &DiffusionRequest) -> usize {
        let [_, _, frames, height, width] = self.sizes.latent_shape(request);
        self.sizes.vae.num_decode_steps(frames, (height, width), request.vae_tiling)
    }

    fn frames_under_way(&self, request: &DiffusionRequest) -> usize {
        let [_, _, frames, height, width] = self.sizes.latent_shape(request);
        self.sizes.vae.frames_under_way(frames, (height, width), request.vae_tiling)
    }

    fn decode_next(&self, decoding: &mut WanDecoding) -> Result<Pixels> {
        decoding.next(&self.vae)
    }

    fn adapters(&self) -> Option<&Adapters> {
        Some(&self.adapters)
    }

    fn cached_prediction(&self) -> Option<&dyn CachedPrediction<WanConditioning>> {
        Some(self)
    }

    fn previews(&self) -> Option<&dyn Previews> {
        Some(self)
    }

    fn narrow_networks(&self) -> Option<&dyn NarrowNetworks> {
        Some(self)
    }
}

impl CachedPrediction<WanConditioning> for WanModel {
    fn predict_cached(
        &self,
        _expert: Expert,
        rows: &[DenoiseRow<'_, WanConditioning>],
        caches: &mut [RowCache<'_>],
    ) -> Result<Vec<Tensor>> {
        let rows = Rows::new(rows, self.placement.compute_dtype)?;
        split_rows(&self.transformer.forward_cached(&rows.input(), caches)?)
    }
}

impl Previews for WanModel {
    fn preview(&self, latents: &Tensor, _request: &DiffusionRequest) -> Result<Frame> {
        Ok(rough_frame(self.vae.preview(latents)?))
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
struct Rows {
    latents: Tensor,
    timesteps: Vec<f32>,
    text: Tensor,
    image: Option<Tensor>,
    rope: Arc<Rope>,
}

impl Rows {
    /// `dtype`: of the transformer; the text has another one only where another model has encoded it.
    fn new(rows: &[DenoiseRow<'_, WanConditioning>], dtype: DType) -> Result<Self> {
        let latents = |row: &DenoiseRow<'_, WanConditioning>| match &row.conditioning.frames {
            Some(frames) => Tensor::cat(&[row.latents, frames], 1),
            None => Ok(row.latents.clone()),
        };
        let text: Vec<&Tensor> = rows.iter().map(|row| &row.conditioning.text).collect();
        // Either all rows have pictures or none.
        let image: Option<Vec<&Tensor>> = rows.iter().map(|row| row.conditioning.pictures.as_ref()).collect();
        Ok(Self {
            latents: Tensor::cat(&rows.iter().map(latents).collect::<candle_core::Result<Vec<_>>>()?, 0)?,
            timesteps: rows.iter().map(|row| row.timestep as f32).collect(),
            text: Tensor::cat(&text, 0)?.to_dtype(dtype)?,
            image: image.map(|image| Tensor::cat(&image, 0)?.to_dtype(dtype)).transpose()?,
            // Rows of one step stand alike.
            rope: rows[0].conditioning.rope.clone(),
        })
    }

    fn input(&self) -> TransformerInput<'_> {
        let Self { latents, timesteps, text, image, rope } = self;
        TransformerInput { latents, timesteps, text, image: image.as_ref(), rope }
    }
}
