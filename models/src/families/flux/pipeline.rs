//! The way of a request through FLUX.1: prompts and an image to what the transformer is told, prediction, decoding.
//!
//! Owns: what a request has encoded and in which steps. Does not know: sessions, batching, guidance.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::transformer::PACK;
use super::{FluxConditioning, FluxModel, LIVE_WIDTHS};
use crate::diffusion::{DiffusionCard, DiffusionRequest};
use crate::encoders::{rows_of, slices};
use crate::error::Result;
use crate::families::split_rows;
use crate::lora::{Adapters, LoraKey};
use crate::memory::MemoryPlan;
use crate::prompt::plain_text;
use crate::request::{Frame, Mask, Phase};
use crate::rng::TorchGenerator;
use crate::runner::diffusion::block_cache::{CachedPrediction, RowCache};
use crate::runner::diffusion::course::{Course, Expert};
use crate::runner::diffusion::inputs::{Inputs, MAX_TEXTS_PER_PASS, Pass, branch_texts};
use crate::runner::diffusion::narrow::NarrowNetworks;
use crate::runner::diffusion::previews::{Previews, rough_frame};
use crate::runner::diffusion::start::ImageStart;
use crate::runner::diffusion::{DenoiseRow, DiffusionModel};
use crate::vae::kl::KlDecoding;
use crate::vae::picture_tiles::PictureEncoding;
use crate::vae::{Pixels, Posterior};

/// What a request has encoded.
#[derive(Debug, Clone, PartialEq)]
pub enum FluxInput {
    /// A prompt, positive or negative.
    Text(String),
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
pub enum FluxEncoding {
    /// CLIP first, then T5.
    Texts {
        /// For CLIP, row by row.
        clip_ids: Vec<Vec<u32>>,
        /// For T5.
        t5_ids: Vec<Vec<u32>>,
        /// What CLIP has said of each row, once it has.
        pooled: Option<Vec<Tensor>>,
    },
    /// Tile by tile.
    Image(PictureEncoding),
}

/// What became of an input.
#[derive(Debug)]
pub enum FluxEncoded {
    /// Of a prompt.
    Text(FluxConditioning),
    /// Of an image.
    Image(Posterior),
}

const TEXT_ENCODERS: &[&str] = &["text_encoder", "text_encoder_2"];

impl FluxModel {
    /// Of latents and all that a request holds beside them, in each phase.
    fn memory_plan(&self, request: &DiffusionRequest, branches_at_once: usize) -> MemoryPlan {
        let (rows, columns) = self.grid(request);
        let (text_len, image_len) = (request.prompt.max_sequence_length, rows * columns);
        let (transformer, dtype) = (self.transformer.config(), self.placement.compute_dtype);
        let branches = request.guidance.num_branches();
        let conditioning = branches * text_len * transformer.joint_attention_dim * dtype.size_in_bytes();
        // The sample; of each branch what the model sees of it and predicts, in the batch and by itself.
        let latents = (1 + 3 * branches) * image_len * transformer.in_channels * size_of::<f32>();
        let t5_pass = self.t5_config.forward_bytes(branches, text_len, &self.placement);
        let encode = t5_pass + self.text_encoder_2.dequantised_bytes();
        let of_branch = (text_len + image_len) * transformer.inner_dim() * LIVE_WIDTHS * dtype.size_in_bytes();
        let denoise = branches_at_once * of_branch;
        let decode = self.vae_config.peak_decode_bytes(self.latents(request), request.vae_tiling, dtype);
        let copies = request.cache.as_ref().map_or(0, |cache| cache.stream_copies(true));
        let caches = branches * copies * image_len * transformer.inner_dim() * dtype.size_in_bytes();
        let preview = if request.partial_images > 0 { self.vae_config.preview_bytes(dtype) } else { 0 };
        let size = (request.canvas.height, request.canvas.width);
        let (picture, begin) = match &request.edit {
            // Its latents, its noise, its mask.
            Some(_) => (3 * latents, self.vae_config.peak_encode_bytes(size, request.vae_tiling, dtype)),
            None => (0, 0),
        };
        let denoising = (denoise + caches + self.transformer.dequantised_bytes()).max(preview);
        let phases = [
            (Phase::Encode, conditioning + encode),
            (Phase::VaeEncode, conditioning + latents + begin),
            (Phase::Denoise, conditioning + latents + picture + denoising),
            (Phase::VaeDecode, latents + decode),
        ];
        MemoryPlan::new(phases.into_iter().filter(|(phase, _)| *phase != Phase::VaeEncode || request.edit.is_some()))
    }

    fn begin_texts(&self, pass: &Pass, prompts: &[&str]) -> Result<FluxEncoding> {
        let clip_len = self.text_encoder.config().max_position_embeddings;
        let plain = prompts.iter().map(|prompt| plain_text("prompt", prompt)).collect::<Result<Vec<_>>>()?;
        let prompts: Vec<&str> = plain.iter().map(String::as_str).collect();
        Ok(FluxEncoding::Texts {
            clip_ids: self.tokenizer.encode_padded_rows(&prompts, clip_len)?,
            // The padding is not masked: the model was trained to see it.
            t5_ids: self.tokenizer_2.encode_padded_rows(&prompts, pass.sequence_length)?,
            pooled: None,
        })
    }
}

impl DiffusionModel for FluxModel {
    type Input = FluxInput;
    type Encoding = FluxEncoding;
    type Encoded = FluxEncoded;
    type Conditioning = FluxConditioning;
    type Decoding = KlDecoding;

    fn card(&self) -> &DiffusionCard {
        &self.card
    }

    fn plan(&self, request: &DiffusionRequest, branches_at_once: usize) -> MemoryPlan {
        self.memory_plan(request, branches_at_once)
    }

    fn inputs(&self, request: &DiffusionRequest) -> Vec<Inputs<FluxInput>> {
        let texts = Inputs {
            pass: Pass {
                phase: Phase::Encode,
                components: TEXT_ENCODERS,
                sequence_length: request.prompt.max_sequence_length,
                loras: Some(LoraKey::of(&request.loras)),
                max_rows: MAX_TEXTS_PER_PASS,
            },
            rows: branch_texts(request).into_iter().map(FluxInput::Text).collect(),
        };
        let image = request.edit.as_ref().map(|edit| Inputs {
            pass: Pass::of_image(),
            rows: vec![FluxInput::Image { image: edit.image.clone(), tiled: request.vae_tiling }],
        });
        std::iter::once(texts).chain(image).collect()
    }

    fn num_encode_steps(&self, inputs: &Inputs<FluxInput>) -> usize {
        match &inputs.rows[0] {
            FluxInput::Text(_) => TEXT_ENCODERS.len(),
            FluxInput::Image { image, tiled } => self.vae_encoder.num_encode_steps((image.height, image.width), *tiled),
        }
    }

    fn begin_encode(&self, pass: &Pass, rows: &[&FluxInput]) -> Result<FluxEncoding> {
        if let [FluxInput::Image { image, tiled }] = rows {
            return Ok(FluxEncoding::Image(self.vae_encoder.begin(image.clone(), *tiled)));
        }
        let texts = rows.iter().filter_map(|row| match row {
            FluxInput::Text(text) => Some(text.as_str()),
            FluxInput::Image { .. } => None,
        });
        self.begin_texts(pass, &texts.collect::<Vec<_>>())
    }

    fn encode_next(&self, encoding: &mut FluxEncoding) -> Result<Option<Vec<FluxEncoded>>> {
        match encoding {
            FluxEncoding::Texts { clip_ids, pooled: pooled @ None, .. } => {
                *pooled = Some(rows_of(&self.text_encoder.pooled(&slices(clip_ids))?)?);
                Ok(None)
            }
            FluxEncoding::Texts { t5_ids, pooled: Some(pooled), .. } => {
                let prompt_embeds = self.text_encoder_2.forward(&slices(t5_ids))?;
                let parts = prompt_embeds.into_iter().zip(std::mem::take(pooled));
                let conditioning = parts.map(|(prompt_embeds, pooled_prompt_embeds)| FluxConditioning {
                    prompt_embeds,
                    pooled_prompt_embeds,
                });
                Ok(Some(conditioning.map(FluxEncoded::Text).collect()))
            }
            FluxEncoding::Image(encoding) => {
                let posterior = self.vae_encoder.encode_next(encoding)?;
                Ok(posterior.map(|posterior| vec![FluxEncoded::Image(posterior)]))
            }
        }
    }

    fn conditioning(
        &self,
        _expert: Expert,
        encoded: &[Arc<FluxEncoded>],
        _request: &DiffusionRequest,
    ) -> Result<Vec<FluxConditioning>> {
        let texts = encoded.iter().filter_map(|encoded| match &**encoded {
            FluxEncoded::Text(conditioning) => Some(conditioning.clone()),
            FluxEncoded::Image(_) => None,
        });
        Ok(texts.collect())
    }

    fn shape(&self, conditioning: &FluxConditioning) -> Vec<usize> {
        conditioning.prompt_embeds.dims().to_vec()
    }

    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor> {
        let (rows, columns) = self.grid(request);
        let shape = (1, self.vae_config.latent_channels, rows * PACK, columns * PACK);
        let noise = generator.randn(shape.1 * shape.2 * shape.3);
        self.pack(&Tensor::from_vec(noise, shape, &self.placement.device)?, (rows, columns))
    }

    fn course(&self, request: &DiffusionRequest) -> Result<Course> {
        let (rows, columns) = self.grid(request);
        let the_loop = request.sampling.denoising_loop(Some(rows * columns));
        Ok(Course::of(self.card.sampling.schedulers.start(request.sampling.scheduler, &the_loop)))
    }

    fn predict(&self, _expert: Expert, rows: &[DenoiseRow<'_, FluxConditioning>]) -> Result<Vec<Tensor>> {
        split_rows(&self.with_input(rows, |input| self.transformer.forward(input))?)
    }

    fn begin_decode(&self, _expert: Expert, latents: &Tensor, request: &DiffusionRequest) -> Result<KlDecoding> {
        self.vae.begin(&self.unpack(latents, self.grid(request))?, request.vae_tiling)
    }

    fn num_decode_steps(&self, _expert: Expert, request: &DiffusionRequest) -> usize {
        self.vae_config.num_decode_steps(self.latents(request), request.vae_tiling)
    }

    fn frames_under_way(&self, _request: &DiffusionRequest) -> usize {
        1
    }

    fn decode_next(&self, decoding: &mut KlDecoding) -> Result<Pixels> {
        self.vae.decode_next(decoding)
    }

    fn adapters(&self) -> Option<&Adapters> {
        Some(&self.adapters)
    }

    fn image_start(&self) -> Option<&dyn ImageStart<FluxEncoded>> {
        Some(self)
    }

    fn cached_prediction(&self) -> Option<&dyn CachedPrediction<FluxConditioning>> {
        Some(self)
    }

    fn previews(&self) -> Option<&dyn Previews> {
        Some(self)
    }

    fn narrow_networks(&self) -> Option<&dyn NarrowNetworks> {
        Some(self)
    }
}

impl CachedPrediction<FluxConditioning> for FluxModel {
    fn predict_cached(
        &self,
        _expert: Expert,
        rows: &[DenoiseRow<'_, FluxConditioning>],
        caches: &mut [RowCache<'_>],
    ) -> Result<Vec<Tensor>> {
        split_rows(&self.with_input(rows, |input| self.transformer.forward_cached(input, caches))?)
    }
}

impl NarrowNetworks for FluxModel {
    fn components(&self, phase: Phase, _expert: Expert) -> &'static [&'static str] {
        let dtype = self.placement.compute_dtype;
        match phase {
            Phase::Denoise if dtype != DType::F32 => &["transformer"],
            Phase::VaeDecode if self.vae_config.own_dtype(dtype) != DType::F32 => &["vae"],
            _ => &[],
        }
    }
}

impl Previews for FluxModel {
    fn preview(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<Frame> {
        Ok(rough_frame(self.vae.preview(&self.unpack(latents, self.grid(request))?)?))
    }
}

impl ImageStart<FluxEncoded> for FluxModel {
    fn posterior<'a>(&self, encoded: &'a [Arc<FluxEncoded>]) -> &'a Posterior {
        let image = encoded.iter().find_map(|encoded| match &**encoded {
            FluxEncoded::Image(posterior) => Some(posterior),
            FluxEncoded::Text(_) => None,
        });
        image.expect("an edit's image is one of the inputs: this is a bug")
    }

    fn image_latents(&self, sample: &Tensor, request: &DiffusionRequest) -> Result<Tensor> {
        self.pack(&self.vae_encoder.scaled(sample)?, self.grid(request))
    }

    fn mask_latents(&self, mask: &Mask, request: &DiffusionRequest) -> Result<Tensor> {
        let (grid, channels) = (self.grid(request), self.vae_config.latent_channels);
        let mask = self.vae_encoder.latent_mask(mask)?.broadcast_as((1, channels, grid.0 * PACK, grid.1 * PACK))?;
        self.pack(&mask.contiguous()?, grid)
    }
}
