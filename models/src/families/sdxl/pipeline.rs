//! The way of a request through SDXL and its refiner: prompts, reference images and an image to what the UNet is told,
//! prediction, decoding.
//!
//! Owns: what a request has encoded and in which steps, what stands for an absent negative prompt, which of the two models
//! (experts) does what. Does not know: sessions, batching, guidance.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::ip_adapter::{IpAdapter, ReferenceEncoding, ReferenceTokens};
use super::unet::{ReferenceInput, UNetInput};
use super::{AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE, SdxlModel};
use crate::diffusion::{DiffusionCard, DiffusionRequest, NegativePrompt};
use crate::encoders::clip_chunks::{Chunk, chunks, ids, weigh};
use crate::encoders::rows_of;
use crate::error::Result;
use crate::families::split_rows;
use crate::lora::{Adapters, LoraKey};
use crate::memory::MemoryPlan;
use crate::prompt::Prompt;
use crate::request::{Frame, Mask, Phase};
use crate::rng::TorchGenerator;
use crate::runner::diffusion::course::{Course, Expert, FIRST_EXPERT};
use crate::runner::diffusion::inputs::{Inputs, MAX_TEXTS_PER_PASS, Pass};
use crate::runner::diffusion::narrow::NarrowNetworks;
use crate::runner::diffusion::previews::{Previews, rough_frame};
use crate::runner::diffusion::start::ImageStart;
use crate::runner::diffusion::{DenoiseRow, DiffusionModel};
use crate::solver::Solver;
use crate::tokenizer::Tokenizer;
use crate::vae::kl::KlDecoding;
use crate::vae::picture_tiles::PictureEncoding;
use crate::vae::{Pixels, Posterior};

/// The model that takes the latents over.
const REFINER: Expert = 1;

/// What a request has encoded.
#[derive(Debug, Clone, PartialEq)]
pub enum SdxlInput {
    /// A prompt, positive or negative, for one of the two models.
    Text(Expert, String),
    /// All reference images.
    References {
        /// In any sizes.
        images: Vec<Arc<Frame>>,
        /// Whether there is a negative branch.
        guided: bool,
    },
    /// The image to begin from.
    Image {
        /// In the size of the request.
        image: Arc<Frame>,
        /// Whether the VAE works on it in tiles, where it is larger than one.
        tiled: bool,
    },
}

/// State of a pass between two steps.
#[derive(Debug)]
pub enum SdxlEncoding {
    /// Encoder by encoder of one of the two models.
    Texts(Expert, TextEncoding),
    /// Image by image.
    References(ReferenceEncoding),
    /// Tile by tile.
    Image(PictureEncoding),
}

/// Prompts on their way through the text encoders.
#[derive(Debug)]
pub struct TextEncoding {
    prompts: usize,
    length: usize,
    /// For the first encoder, until it is done; the refiner has none.
    first: Option<Vec<Chunk>>,
    second: Vec<Chunk>,
    /// Of the first encoder, `[prompts, length, hidden]`.
    hidden: Vec<Tensor>,
}

/// What became of an input.
#[derive(Debug)]
pub enum SdxlEncoded {
    /// Of a prompt.
    Text(Expert, PromptEmbeds),
    /// Of all reference images.
    References(ReferenceTokens),
    /// Of the image to begin from.
    Image(Posterior),
}

/// What the text encoders say of one prompt.
#[derive(Debug, Clone)]
pub struct PromptEmbeds {
    /// The last but one hidden states of the encoders side by side, `[1, max_sequence_length, cross_attention_dim]`.
    pub prompt_embeds: Tensor,
    /// `text_embeds` of the second encoder, `[1, projection_dim]`.
    pub pooled_prompt_embeds: Tensor,
}

/// What the UNet needs of one guidance branch.
#[derive(Debug, Clone)]
pub struct SdxlConditioning {
    /// Of its prompt.
    pub text: PromptEmbeds,
    /// Sizes, and what else the UNet is told in numbers.
    pub time_ids: Vec<f32>,
    /// What it sees of the reference images, `[1, tokens, width]`.
    pub references: Option<Tensor>,
}

/// State of a decode between two tiles.
#[derive(Debug)]
pub struct SdxlDecoding {
    expert: Expert,
    decoding: KlDecoding,
}

impl SdxlModel {
    fn expert(&self, expert: Expert) -> &Self {
        match (&self.refiner, expert) {
            (Some(refiner), REFINER) => refiner,
            _ => self,
        }
    }

    /// The experts that a request needs, in their order.
    fn experts(request: &DiffusionRequest) -> impl Iterator<Item = Expert> {
        std::iter::once(FIRST_EXPERT).chain(request.refinement.map(|_| REFINER))
    }

    /// The prompts of a request for one of its experts, whose model this is.
    fn texts(&self, expert: Expert, request: &DiffusionRequest) -> Inputs<SdxlInput> {
        let negative = match &request.guidance.negative_prompt {
            Some(NegativePrompt::Text(text)) => Some(text.clone()),
            Some(NegativePrompt::Absent) if !self.sizes.force_zeros_for_empty_prompt => Some(String::new()),
            Some(NegativePrompt::Absent) | None => None,
        };
        let components: &[&str] = match expert {
            REFINER => &["refiner/text_encoder_2"],
            _ => &["text_encoder", "text_encoder_2"],
        };
        let pass = Pass {
            phase: Phase::Encode,
            components,
            sequence_length: request.prompt.max_sequence_length,
            loras: Some(LoraKey::of(&request.loras)),
            max_rows: MAX_TEXTS_PER_PASS,
        };
        let texts = std::iter::once(request.prompt.text.clone()).chain(negative);
        Inputs { pass, rows: texts.map(|text| SdxlInput::Text(expert, text)).collect() }
    }

    fn begin_texts(&self, length: usize, prompts: &[&str]) -> Result<TextEncoding> {
        let positions = self.sizes.text_encoder_2.max_position_embeddings;
        let parsed = prompts.iter().map(|prompt| Prompt::parse("prompt", prompt)).collect::<Result<Vec<_>>>()?;
        let chunks_of = |tokenizer: &Tokenizer| -> Result<Vec<Chunk>> {
            let chunks = parsed.iter().map(|prompt| chunks(tokenizer, prompt, positions, length));
            Ok(chunks.collect::<Result<Vec<_>>>()?.concat())
        };
        Ok(TextEncoding {
            prompts: prompts.len(),
            length,
            first: self.first.as_ref().map(|(tokenizer, _)| chunks_of(tokenizer)).transpose()?,
            second: chunks_of(&self.tokenizer_2)?,
            hidden: Vec::with_capacity(2),
        })
    }

    /// The next encoder's part; what all of them say of each prompt once that was the last.
    fn next_texts(&self, encoding: &mut TextEncoding) -> Result<Option<Vec<PromptEmbeds>>> {
        let TextEncoding { prompts, length, first, second, hidden } = encoding;
        let rows = |chunks: &[Chunk], hidden: Tensor| -> Result<Tensor> {
            Ok(weigh(hidden, chunks)?.reshape((*prompts, *length, ()))?)
        };
        if let (Some(chunks), Some((_, encoder))) = (first.take(), &self.first) {
            hidden.push(rows(&chunks, encoder.penultimate(&ids(&chunks))?)?);
            return Ok(None);
        }
        let (last, pooled) = self.text_encoder_2.penultimate_and_text_embeds(&ids(second))?;
        hidden.push(rows(second, last)?);
        // The first chunk speaks for the whole prompt where one vector has to (as in compel and ComfyUI; the community
        // pipeline takes the last one, which may be all padding).
        let pooled = rows_of(&pooled)?.into_iter().step_by(second.len() / *prompts);
        let parts = rows_of(&Tensor::cat(hidden, 2)?)?.into_iter().zip(pooled);
        let embeds =
            parts.map(|(prompt_embeds, pooled_prompt_embeds)| PromptEmbeds { prompt_embeds, pooled_prompt_embeds });
        Ok(Some(embeds.collect()))
    }

    /// What stands for an absent negative prompt where that is not the empty text.
    fn zeros(&self, request: &DiffusionRequest) -> Result<PromptEmbeds> {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, self.placement.compute_dtype, &self.placement.device);
        Ok(PromptEmbeds {
            prompt_embeds: zeros(&[1, request.prompt.max_sequence_length, self.sizes.unet.text_dim()])?,
            pooled_prompt_embeds: zeros(&[1, self.sizes.text_encoder_2.projection_dim])?,
        })
    }

    /// Original size, crop and target size or aesthetic score as the pipelines fill them in: the image's own size, not
    /// cropped.
    fn time_ids(&self, request: &DiffusionRequest, is_negative: bool) -> Vec<f32> {
        let (height, width) = (request.canvas.height as f32, request.canvas.width as f32);
        let mut ids = vec![height, width, 0.0, 0.0];
        match (self.sizes.requires_aesthetics_score, is_negative) {
            (false, _) => ids.extend([height, width]),
            (true, false) => ids.push(AESTHETIC_SCORE),
            (true, true) => ids.push(NEGATIVE_AESTHETIC_SCORE),
        }
        ids
    }

    fn solver(&self, request: &DiffusionRequest) -> Box<dyn Solver> {
        self.card.sampling.schedulers.start(request.sampling.scheduler, &request.sampling.denoising_loop(None))
    }

    /// The prediction of this model alone.
    fn predict_rows(&self, rows: &[DenoiseRow<'_, SdxlConditioning>]) -> Result<Vec<Tensor>> {
        // Of another dtype only where another model has encoded the prompt.
        let dtype = self.placement.compute_dtype;
        let stack = |part: fn(&DenoiseRow<'_, SdxlConditioning>) -> Tensor| {
            Tensor::cat(&rows.iter().map(part).collect::<Vec<_>>(), 0)
        };
        let timesteps: Vec<f32> = rows.iter().map(|row| row.timestep as f32).collect();
        let time_ids: Vec<Vec<f32>> = rows.iter().map(|row| row.conditioning.time_ids.clone()).collect();
        // The rows of a batch have equally many, or none.
        let tokens: Option<Vec<&Tensor>> = rows.iter().map(|row| row.conditioning.references.as_ref()).collect();
        let tokens = tokens.map(|tokens| Tensor::cat(&tokens, 0)?.to_dtype(dtype)).transpose()?;
        let scales = rows.iter().filter_map(|row| row.request.references.as_ref());
        let scales: Vec<f32> = scales.map(|references| references.scale as f32).collect();
        let input = UNetInput {
            latents: &stack(|row| row.latents.clone())?,
            timesteps: &timesteps,
            prompt_embeds: &stack(|row| row.conditioning.text.prompt_embeds.clone())?.to_dtype(dtype)?,
            pooled_prompt_embeds: &stack(|row| row.conditioning.text.pooled_prompt_embeds.clone())?.to_dtype(dtype)?,
            time_ids: &time_ids,
            references: tokens.as_ref().map(|tokens| ReferenceInput { tokens, scales: &scales }),
        };
        // A recording holds the layers as they were, without terms.
        let prediction = match &self.recordings {
            Some(recordings) if !self.adapters.is_active() => recordings.forward(&self.unet, &input)?,
            _ => self.unet.forward(&input)?,
        };
        split_rows(&prediction)
    }
}

impl DiffusionModel for SdxlModel {
    type Input = SdxlInput;
    type Encoding = SdxlEncoding;
    type Encoded = SdxlEncoded;
    type Conditioning = SdxlConditioning;
    type Decoding = SdxlDecoding;

    fn card(&self) -> &DiffusionCard {
        &self.card
    }

    fn plan(&self, request: &DiffusionRequest, branches_at_once: usize) -> MemoryPlan {
        let (ip_adapter, dtype) = (self.ip_adapter.as_ref(), self.placement.compute_dtype);
        let plan = self.sizes.plan(request, branches_at_once, ip_adapter, dtype);
        let (Some(refiner), Some(_)) = (&self.refiner, request.refinement) else { return plan };
        // While one of them works, what the other has encoded is there too.
        let own = self.sizes.conditioning_bytes(request, ip_adapter, dtype);
        let others = refiner.sizes.conditioning_bytes(request, None, dtype);
        plan.or(&refiner.sizes.plan(request, branches_at_once, None, dtype)).holding(own.max(others))
    }

    fn inputs(&self, request: &DiffusionRequest) -> Vec<Inputs<SdxlInput>> {
        let texts = Self::experts(request).map(|expert| self.expert(expert).texts(expert, request));
        let references = request.references.as_ref().map(|references| {
            let guided = request.guidance.negative_prompt.is_some();
            let pass = Pass {
                phase: Phase::Encode,
                components: &["image_encoder", "ip_adapter"],
                sequence_length: 0,
                loras: None,
                max_rows: 1,
            };
            Inputs { pass, rows: vec![SdxlInput::References { images: references.images.clone(), guided }] }
        });
        let image = request.edit.as_ref().map(|edit| Inputs {
            pass: Pass::of_image(),
            rows: vec![SdxlInput::Image { image: edit.image.clone(), tiled: request.vae_tiling }],
        });
        texts.chain(references).chain(image).collect()
    }

    fn num_encode_steps(&self, inputs: &Inputs<SdxlInput>) -> usize {
        match &inputs.rows[0] {
            SdxlInput::Text(expert, _) => 1 + usize::from(self.expert(*expert).first.is_some()),
            SdxlInput::References { images, guided } => IpAdapter::num_encode_steps(images.len(), *guided),
            SdxlInput::Image { image, tiled } => self.vae_encoder.num_encode_steps((image.height, image.width), *tiled),
        }
    }

    fn begin_encode(&self, pass: &Pass, rows: &[&SdxlInput]) -> Result<SdxlEncoding> {
        match rows[0] {
            SdxlInput::Text(expert, _) => {
                let texts = rows.iter().filter_map(|row| match row {
                    SdxlInput::Text(_, text) => Some(text.as_str()),
                    _ => None,
                });
                let model = self.expert(*expert);
                let encoding = model.begin_texts(pass.sequence_length, &texts.collect::<Vec<_>>())?;
                Ok(SdxlEncoding::Texts(*expert, encoding))
            }
            SdxlInput::References { images, guided } => {
                Ok(SdxlEncoding::References(ReferenceEncoding::new(images.clone(), *guided)))
            }
            SdxlInput::Image { image, tiled } => Ok(SdxlEncoding::Image(self.vae_encoder.begin(image.clone(), *tiled))),
        }
    }

    fn encode_next(&self, encoding: &mut SdxlEncoding) -> Result<Option<Vec<SdxlEncoded>>> {
        match encoding {
            SdxlEncoding::Texts(expert, encoding) => {
                let embeds = self.expert(*expert).next_texts(encoding)?;
                let of_prompt = |embeds| SdxlEncoded::Text(*expert, embeds);
                Ok(embeds.map(|embeds| embeds.into_iter().map(of_prompt).collect()))
            }
            SdxlEncoding::References(encoding) => {
                let adapter = self.ip_adapter.as_ref().expect("references were refused without one: this is a bug");
                let tokens = adapter.encode_next(encoding)?;
                Ok(tokens.map(|tokens| vec![SdxlEncoded::References(tokens)]))
            }
            SdxlEncoding::Image(encoding) => {
                let posterior = self.vae_encoder.encode_next(encoding)?;
                Ok(posterior.map(|posterior| vec![SdxlEncoded::Image(posterior)]))
            }
        }
    }

    fn conditioning(
        &self,
        expert: Expert,
        encoded: &[Arc<SdxlEncoded>],
        request: &DiffusionRequest,
    ) -> Result<Vec<SdxlConditioning>> {
        let model = self.expert(expert);
        let texts = encoded.iter().filter_map(|encoded| match &**encoded {
            SdxlEncoded::Text(of, embeds) if *of == expert => Some(embeds.clone()),
            _ => None,
        });
        let mut texts: Vec<PromptEmbeds> = texts.collect();
        if request.guidance.negative_prompt.is_some() && texts.len() == 1 {
            texts.push(model.zeros(request)?);
        }
        // The refiner follows none.
        let references = encoded.iter().find_map(|encoded| match &**encoded {
            SdxlEncoded::References(tokens) if expert == FIRST_EXPERT => Some(tokens),
            _ => None,
        });
        let branches = texts.into_iter().enumerate();
        let conditioning = branches.map(|(branch, text)| SdxlConditioning {
            text,
            time_ids: model.time_ids(request, branch > 0),
            references: references.map(|tokens| tokens.of_branch(branch).clone()),
        });
        Ok(conditioning.collect())
    }

    fn shape(&self, conditioning: &SdxlConditioning) -> Vec<usize> {
        let SdxlConditioning { text, references, .. } = conditioning;
        let references = references.iter().flat_map(|tokens| tokens.dims());
        text.prompt_embeds.dims().iter().chain(references).copied().collect()
    }

    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor> {
        let shape = self.sizes.latent_shape(request);
        let noise = generator.randn(shape.1 * shape.2 * shape.3);
        Ok(Tensor::from_vec(noise, shape, &self.placement.device)?)
    }

    fn course(&self, request: &DiffusionRequest) -> Result<Course> {
        let course = Course::of(self.solver(request));
        let Some(refined) = request.refinement else { return Ok(course) };
        let refiner = self.expert(REFINER).solver(request);
        Ok(course.handing_over(refined.steps_before, REFINER, refiner, refined.first_step_after))
    }

    fn predict(&self, expert: Expert, rows: &[DenoiseRow<'_, SdxlConditioning>]) -> Result<Vec<Tensor>> {
        self.expert(expert).predict_rows(rows)
    }

    fn begin_decode(&self, expert: Expert, latents: &Tensor, request: &DiffusionRequest) -> Result<SdxlDecoding> {
        Ok(SdxlDecoding { expert, decoding: self.expert(expert).vae.begin(latents, request.vae_tiling)? })
    }

    fn num_decode_steps(&self, expert: Expert, request: &DiffusionRequest) -> usize {
        let (_, _, height, width) = self.sizes.latent_shape(request);
        self.expert(expert).sizes.vae.num_decode_steps((height, width), request.vae_tiling)
    }

    fn frames_under_way(&self, _request: &DiffusionRequest) -> usize {
        1
    }

    fn decode_next(&self, SdxlDecoding { expert, decoding }: &mut SdxlDecoding) -> Result<Pixels> {
        self.expert(*expert).vae.decode_next(decoding)
    }

    fn adapters(&self) -> Option<&Adapters> {
        Some(&self.adapters)
    }

    fn image_start(&self) -> Option<&dyn ImageStart<SdxlEncoded>> {
        Some(self)
    }

    fn previews(&self) -> Option<&dyn Previews> {
        Some(self)
    }

    fn narrow_networks(&self) -> Option<&dyn NarrowNetworks> {
        Some(self)
    }
}

impl NarrowNetworks for SdxlModel {
    fn components(&self, phase: Phase, expert: Expert) -> &'static [&'static str] {
        let model = self.expert(expert);
        let dtype = model.placement.compute_dtype;
        match (phase, expert) {
            (Phase::Denoise, _) if dtype == DType::F32 => &[],
            (Phase::Denoise, REFINER) => &["refiner/unet"],
            (Phase::Denoise, _) => &["unet", "ip_adapter"],
            (Phase::VaeDecode, _) if model.sizes.vae.own_dtype(dtype) == DType::F32 => &[],
            (Phase::VaeDecode, REFINER) => &["refiner/vae"],
            (Phase::VaeDecode, _) => &["vae"],
            _ => &[],
        }
    }
}

impl Previews for SdxlModel {
    fn preview(&self, latents: &Tensor, _request: &DiffusionRequest) -> Result<Frame> {
        Ok(rough_frame(self.vae.preview(latents)?))
    }
}

impl ImageStart<SdxlEncoded> for SdxlModel {
    fn posterior<'a>(&self, encoded: &'a [Arc<SdxlEncoded>]) -> &'a Posterior {
        let image = encoded.iter().find_map(|encoded| match &**encoded {
            SdxlEncoded::Image(posterior) => Some(posterior),
            _ => None,
        });
        image.expect("an edit's image is one of the inputs: this is a bug")
    }

    fn image_latents(&self, sample: &Tensor, _request: &DiffusionRequest) -> Result<Tensor> {
        self.vae_encoder.scaled(sample)
    }

    fn mask_latents(&self, mask: &Mask, request: &DiffusionRequest) -> Result<Tensor> {
        let mask = self.vae_encoder.latent_mask(mask)?;
        Ok(mask.broadcast_as(self.sizes.latent_shape(request))?.contiguous()?)
    }
}
