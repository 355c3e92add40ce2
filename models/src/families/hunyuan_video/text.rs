//! What HunyuanVideo is told of a prompt: hidden states of a language model that has read it within a template, and CLIP's
//! pooled vector of the bare prompt.
//!
//! Owns: the template, the crop, the steps of both encoders. Does not know: the transformer, requests. Source: diffusers
//! `pipelines/hunyuan_video/pipeline_hunyuan_video.py` (`_get_llama_prompt_embeds`, `_get_clip_prompt_embeds`).

use candle_core::{DType, Tensor};

use crate::checkpoint::{CONFIG, Manifest};
use crate::encoders::clip::{ClipTextConfig, ClipTextEncoder};
use crate::encoders::{rows_of, slices};
use crate::error::{Error, Result};
use crate::families::llama;
use crate::layers::decoder::{Decoder, DecoderConfig, DenseInput};
use crate::prompt::plain_text;
use crate::tokenizer::{Padded, Tokenizer};
use crate::weights::Weights;

/// What stands around a prompt.
const BEFORE_PROMPT: &str = "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following \
                             aspects: 1. The main content and theme of the video.2. The color, shape, size, texture, \
                             quantity, text, and spatial relationships of the objects.3. Actions, events, behaviors \
                             temporal relationships, physical movement changes of the objects.4. background environment, \
                             light, style and atmosphere.5. camera angles, movements, and transitions used in the \
                             video:<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n";
const BEHIND_PROMPT: &str = "<|eot_id|>";
/// Tokens before the prompt, of the published tokenizer; the transformer is not told of them.
const CROP_START: usize = 95;
/// Layers whose work is left out, the final norm with them (`num_hidden_layers_to_skip`).
const LAYERS_TO_SKIP: usize = 2;
/// Tokens that CLIP reads, as the pipeline says it.
const CLIP_LENGTH: usize = 77;
/// The tokenizer pads behind the prompt unless its file says otherwise.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The configurations of both encoders.
pub(super) struct TextConfigs {
    pub(super) llama: DecoderConfig,
    pub(super) clip: ClipTextConfig,
}

impl TextConfigs {
    pub(super) fn read(manifest: &Manifest) -> Result<Self> {
        let llama = manifest.component("text_encoder")?.fields(CONFIG)?;
        let path = llama.path().to_owned();
        let llama = llama::config_of(&llama)?;
        if llama.num_hidden_layers < LAYERS_TO_SKIP {
            let problem = format!("num_hidden_layers: is {}; at least {LAYERS_TO_SKIP}", llama.num_hidden_layers);
            return Err(Error::checkpoint(path, problem));
        }
        let clip = ClipTextConfig::read(manifest.component("text_encoder_2")?.fields(CONFIG)?)?;
        Ok(Self { llama, clip })
    }

    /// Bytes that encoding so many prompts takes at its peak, in `dtype`.
    pub(super) fn forward_bytes(&self, rows: usize, length: usize, dtype: DType) -> usize {
        let llama = self.llama.dense_bytes(rows * (CROP_START + length), dtype);
        llama.max(rows * self.clip.forward_bytes(self.clip_length(), dtype))
    }

    fn clip_length(&self) -> usize {
        CLIP_LENGTH.min(self.clip.max_position_embeddings)
    }
}

/// Both encoders with their tokenizers.
pub(super) struct TextEncoders {
    tokenizer: Tokenizer,
    llama: Decoder,
    tokenizer_2: Tokenizer,
    clip: ClipTextEncoder,
    clip_length: usize,
    compute_dtype: DType,
}

/// What the transformer needs of one prompt.
#[derive(Debug, Clone)]
pub struct HunyuanVideoText {
    /// `[1, max_sequence_length, text_embed_dim]` in the compute dtype, zeros past the prompt.
    pub prompt_embeds: Tensor,
    /// Tokens of it that are not padding, from the front.
    pub num_tokens: usize,
    /// Of CLIP, `[1, pooled_projection_dim]`.
    pub pooled_prompt_embeds: Tensor,
}

/// Prompts between two steps: CLIP first, then the language model.
pub struct TextEncoding {
    clip_ids: Vec<Vec<u32>>,
    padded: Vec<Padded>,
    /// Tokens of the prompts' embeddings.
    length: usize,
    /// What CLIP has said of each row, once it has.
    pooled: Option<Vec<Tensor>>,
}

impl TextEncoders {
    /// The components that encode prompts; the steps of an encoding are as many.
    pub(super) const COMPONENTS: &'static [&'static str] = &["text_encoder", "text_encoder_2"];

    /// With the weights that `open` gives for each of them, and prompts of up to `max_length` tokens.
    pub(super) fn load(
        manifest: &Manifest,
        configs: &TextConfigs,
        max_length: usize,
        llama: &Weights,
        clip: &Weights,
    ) -> Result<Self> {
        check_padding(manifest)?;
        let (vocab_size, clip_length) = (configs.llama.vocab_size, configs.clip_length());
        let tokenizer = manifest.component("tokenizer")?;
        let tokenizer_2 = manifest.component("tokenizer_2")?;
        Ok(Self {
            tokenizer: tokenizer.tokenizer_of_encoder(vocab_size, CROP_START + max_length)?,
            tokenizer_2: tokenizer_2.tokenizer_of_encoder(configs.clip.vocab_size, clip_length)?,
            compute_dtype: llama.placement().compute_dtype,
            llama: Decoder::load(llama, configs.llama.clone())?,
            clip: ClipTextEncoder::load(clip, configs.clip.clone())?,
            clip_length,
        })
    }

    /// Before the first step over these prompts, padded or cut to `length` tokens.
    pub(super) fn begin(&self, length: usize, prompts: &[&str]) -> Result<TextEncoding> {
        let mut clip_ids = Vec::with_capacity(prompts.len());
        let mut padded = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let prompt = plain_text("prompt", prompt)?;
            clip_ids.push(self.tokenizer_2.encode_padded(&prompt, self.clip_length)?.ids);
            let templated = format!("{BEFORE_PROMPT}{prompt}{BEHIND_PROMPT}");
            let tokens = self.tokenizer.encode_padded(&templated, CROP_START + length)?;
            if tokens.num_tokens <= CROP_START {
                let problem =
                    format!("has {} tokens with its template; more than {CROP_START} are needed", tokens.num_tokens);
                return Err(Error::invalid("prompt", problem));
            }
            padded.push(tokens);
        }
        Ok(TextEncoding { clip_ids, padded, length, pooled: None })
    }

    /// The next step; what became of each prompt once that was the last.
    pub(super) fn encode_next(&self, encoding: &mut TextEncoding) -> Result<Option<Vec<HunyuanVideoText>>> {
        let Some(pooled) = encoding.pooled.take() else {
            encoding.pooled = Some(rows_of(&self.clip.pooled(&slices(&encoding.clip_ids))?)?);
            return Ok(None);
        };
        let texts = self.read(encoding)?.into_iter().zip(pooled);
        let texts = texts.map(|((prompt_embeds, num_tokens), pooled)| HunyuanVideoText {
            prompt_embeds,
            num_tokens,
            pooled_prompt_embeds: pooled,
        });
        Ok(Some(texts.collect()))
    }

    /// Of each prompt its hidden states behind the crop, filled up with zeros, and how many there are.
    fn read(&self, encoding: &TextEncoding) -> Result<Vec<(Tensor, usize)>> {
        let TextEncoding { padded, length, .. } = encoding;
        // What is padding in all rows is not computed.
        let longest = padded.iter().map(|row| row.num_tokens).max().unwrap_or(0);
        let rows: Vec<&[u32]> = padded.iter().map(|row| &row.ids[..longest]).collect();
        let counted: Vec<_> = padded.iter().map(|row| 0..row.num_tokens).collect();
        let wanted = self.llama.config().num_hidden_layers - LAYERS_TO_SKIP;
        let states = self.llama.hidden_states(&DenseInput::new(&rows, &counted), &[wanted])?.remove(0);
        let states = states.to_dtype(self.compute_dtype)?; // [b, longest, hidden_size]
        let mut read = Vec::with_capacity(padded.len());
        for (row, Padded { num_tokens, .. }) in padded.iter().enumerate() {
            let count = num_tokens - CROP_START;
            let states = states.narrow(0, row, 1)?.narrow(1, CROP_START, count)?;
            // Filled up or copied: a view would keep the whole batch alive.
            let states = match length - count {
                0 => states.force_contiguous()?,
                missing => states.pad_with_zeros(1, 0, missing)?.contiguous()?,
            };
            read.push((states, count));
        }
        Ok(read)
    }
}

/// Refuses a tokenizer that says it pads before the prompt: the pipeline's masks then hide the prompt and not the padding.
fn check_padding(manifest: &Manifest) -> Result<()> {
    let component = manifest.component("tokenizer")?;
    let Some(config) = component.json_if_present::<serde_json::Value>(TOKENIZER_CONFIG)? else { return Ok(()) };
    match config["padding_side"].as_str() {
        None | Some("right") => Ok(()),
        Some(side) => {
            let problem = format!("`padding_side` is {side:?}; only \"right\" is supported");
            Err(Error::checkpoint(component.path(TOKENIZER_CONFIG), problem))
        }
    }
}
