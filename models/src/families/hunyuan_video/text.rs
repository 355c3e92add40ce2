//! What HunyuanVideo is told of a prompt: hidden states of a language model that has read it within a template, with a
//! picture or without, and CLIP's pooled vector of the bare prompt.
//!
//! Owns: the templates, the crop, the steps of the encoders. Does not know: the transformer, requests, what a picture becomes.
//! Source: diffusers `pipelines/hunyuan_video/pipeline_hunyuan_video.py` and `pipeline_hunyuan_video_image2video.py`
//! (`_get_llama_prompt_embeds`, `_get_clip_prompt_embeds`).

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::llava::{self, Arrangement, LlavaConfig, LlavaWeights, Sight};
use crate::checkpoint::{CONFIG, Manifest};
use crate::encoders::clip::{ClipTextConfig, ClipTextEncoder};
use crate::encoders::{rows_of, slices};
use crate::error::{Error, Result};
use crate::families::llama;
use crate::layers::decoder::{Decoder, DecoderConfig, DenseInput, LlamaGgufNames};
use crate::prompt::plain_text;
use crate::request::Frame;
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
/// The same where the prompt is one of a picture.
const BEFORE_PICTURED_PROMPT: &str = "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the \
                                      following aspects according to the reference image: 1. The main content and theme \
                                      of the video.2. The color, shape, size, texture, quantity, text, and spatial \
                                      relationships of the objects.3. Actions, events, behaviors temporal relationships, \
                                      physical movement changes of the objects.4. background environment, light, style \
                                      and atmosphere.5. camera angles, movements, and transitions used in the \
                                      video:<|eot_id|>\n\n<|start_header_id|>user<|end_header_id|>\n\n";
const BEHIND_PICTURED_PROMPT: &str = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n";
/// Tokens before the prompt, of the published tokenizer; the transformer is not told of them.
const CROP_START: usize = 95;
/// Layers that are neither loaded nor computed, the final norm with them (`num_hidden_layers_to_skip`).
const LAYERS_TO_SKIP: usize = 2;
/// Tokens that CLIP reads, as the pipeline says it.
const CLIP_LENGTH: usize = 77;
/// The tokenizer pads behind the prompt unless its file says otherwise.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The folder of what sees pictures, where that is not among the language model's files.
const SIGHT: &str = "image_encoder";

/// The weights of the encoders.
pub(super) struct TextWeights {
    /// Of the language model, with what sees pictures where there is no `sight`.
    reader: Weights,
    clip: Weights,
    sight: Option<Weights>,
}

impl TextWeights {
    /// `open` gives those of a component.
    pub(super) fn open(
        manifest: &Manifest,
        configs: &TextConfigs,
        open: &mut dyn FnMut(&str) -> Result<Weights>,
    ) -> Result<Self> {
        let has_sight = matches!(configs.reader, ReaderConfig::Pictured(_)) && manifest.has_component(SIGHT);
        let sight = has_sight.then(|| open(SIGHT)).transpose()?;
        Ok(Self { reader: open("text_encoder")?, clip: open("text_encoder_2")?, sight })
    }

    /// See [`Weights::dequantised_bytes`].
    pub(super) fn dequantised_bytes(&self) -> usize {
        self.reader.dequantised_bytes().max(self.clip.dequantised_bytes())
    }
}

/// The configurations of the encoders.
pub(super) struct TextConfigs {
    reader: ReaderConfig,
    pub(super) clip: ClipTextConfig,
}

/// Of what reads a prompt.
enum ReaderConfig {
    Text(DecoderConfig),
    Pictured(Box<LlavaConfig>),
}

impl TextConfigs {
    /// `has_pictures`: prompts come with a picture each.
    pub(super) fn read(manifest: &Manifest, has_pictures: bool) -> Result<Self> {
        let fields = manifest.component("text_encoder")?.fields(CONFIG)?;
        let path = fields.path().to_owned();
        let reader = match has_pictures {
            true => ReaderConfig::Pictured(Box::new(LlavaConfig::read(fields)?)),
            false => ReaderConfig::Text(llama::config_of(&fields)?),
        };
        let clip = ClipTextConfig::read(manifest.component("text_encoder_2")?.fields(CONFIG)?)?;
        let configs = Self { reader, clip };
        let layers = configs.llama().num_hidden_layers;
        if layers < LAYERS_TO_SKIP {
            let problem = format!("num_hidden_layers: is {layers}; at least {LAYERS_TO_SKIP}");
            return Err(Error::checkpoint(path, problem));
        }
        Ok(configs)
    }

    /// Of the language model.
    pub(super) fn llama(&self) -> &DecoderConfig {
        match &self.reader {
            ReaderConfig::Text(llama) => llama,
            ReaderConfig::Pictured(llava) => &llava.text,
        }
    }

    /// Bytes that encoding so many prompts takes at its peak, in `dtype`.
    pub(super) fn forward_bytes(&self, rows: usize, length: usize, dtype: DType) -> usize {
        let (tokens, sight) = match &self.reader {
            ReaderConfig::Text(_) => (CROP_START + length, 0),
            ReaderConfig::Pictured(llava) => (LlavaConfig::read_length(length), rows * llava.sight_bytes(dtype)),
        };
        let llama = self.llama().dense_bytes(rows * tokens, dtype) + sight;
        llama.max(rows * self.clip.forward_bytes(self.clip_length(), dtype))
    }

    fn clip_length(&self) -> usize {
        CLIP_LENGTH.min(self.clip.max_position_embeddings)
    }
}

/// The encoders with their tokenizers.
pub(super) struct TextEncoders {
    tokenizer: Tokenizer,
    llama: Decoder,
    /// Of models whose prompts come with a picture.
    sight: Option<Sight>,
    tokenizer_2: Tokenizer,
    clip: ClipTextEncoder,
    clip_length: usize,
    compute_dtype: DType,
}

/// What is encoded of a guidance branch.
#[derive(Debug, Clone, PartialEq)]
pub struct HunyuanVideoPrompt {
    /// As the client wrote it.
    pub text: String,
    /// What it is about, of models that take pictures.
    pub picture: Option<PromptPicture>,
    /// Vectors that the transformer is told of, padding included.
    pub told_length: usize,
}

/// The picture of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptPicture {
    /// Of any size.
    pub picture: Arc<Frame>,
    /// The transformer is told of every so many of its patches.
    pub interleave: usize,
}

/// What the transformer needs of one prompt.
#[derive(Debug, Clone)]
pub struct HunyuanVideoText {
    /// `[1, told_length, text_embed_dim]` in the compute dtype, zeros past the prompt. Without a picture these are as many as
    /// `max_sequence_length` says.
    pub prompt_embeds: Tensor,
    /// Vectors of it that are not padding, from the front.
    pub num_tokens: usize,
    /// Of CLIP, `[1, pooled_projection_dim]`.
    pub pooled_prompt_embeds: Tensor,
}

/// Prompts between two steps.
pub struct TextEncoding {
    clip_ids: Vec<Vec<u32>>,
    rows: Vec<Row>,
    /// What CLIP has said of each row, once it has.
    pooled: Option<Vec<Tensor>>,
}

/// One prompt of an encoding.
struct Row {
    tokens: Padded,
    told_length: usize,
    pictured: Option<Pictured>,
}

struct Pictured {
    picture: Arc<Frame>,
    arrangement: Arrangement,
    /// Once it is seen.
    patches: Option<Tensor>,
}

impl HunyuanVideoPrompt {
    /// Vectors that the transformer is told of a text that is padded or cut to `length` tokens, and of every so many patches of
    /// its picture where it has one.
    pub(super) fn length_told(length: usize, interleave: Option<usize>) -> usize {
        interleave.map_or(length, |interleave| LlavaConfig::told_length(length, interleave))
    }
}

impl TextEncoders {
    /// The components that encode prompts. Checkpoints of diffusers have none of the last name: it is what sees pictures,
    /// where the language model has files of its own.
    pub(super) const COMPONENTS: &'static [&'static str] = &["text_encoder", "text_encoder_2", SIGHT];

    /// The tokenizer is tried with prompts of `max_length` tokens.
    pub(super) fn load(
        manifest: &Manifest,
        configs: &TextConfigs,
        max_length: usize,
        weights: &TextWeights,
    ) -> Result<Self> {
        let TextWeights { reader, clip, sight } = weights;
        check_padding(manifest)?;
        let (vocab_size, clip_length) = (configs.llama().vocab_size, configs.clip_length());
        let tokenizer = manifest.component("tokenizer")?;
        let tokenizer = tokenizer.tokenizer_of_encoder(vocab_size, CROP_START + max_length)?;
        let tokenizer_2 = manifest.component("tokenizer_2")?;
        let (llama, sight) = match &configs.reader {
            ReaderConfig::Text(llama) => (load_lowest(&LlamaGgufNames::trunk(reader, llama), llama)?, None),
            ReaderConfig::Pictured(llava) => {
                let weights = LlavaWeights::of(reader, sight.as_ref(), llava);
                let sight = Sight::load(manifest, &weights, llava, &tokenizer)?;
                (load_lowest(&weights.language_model, &llava.text)?, Some(sight))
            }
        };
        Ok(Self {
            tokenizer,
            tokenizer_2: tokenizer_2.tokenizer_of_encoder(configs.clip.vocab_size, clip_length)?,
            compute_dtype: reader.placement().compute_dtype,
            llama,
            sight,
            clip: ClipTextEncoder::load(clip, configs.clip.clone())?,
            clip_length,
        })
    }

    /// Steps of an encoding: CLIP first, then whoever sees pictures, then the language model.
    pub(super) fn num_steps(&self) -> usize {
        2 + usize::from(self.sight.is_some())
    }

    /// Before the first step over these prompts, padded or cut to `length` tokens.
    pub(super) fn begin(&self, length: usize, prompts: &[&HunyuanVideoPrompt]) -> Result<TextEncoding> {
        let mut clip_ids = Vec::with_capacity(prompts.len());
        let mut rows = Vec::with_capacity(prompts.len());
        for HunyuanVideoPrompt { text, picture, told_length } in prompts {
            let text = plain_text("prompt", text)?;
            clip_ids.push(self.tokenizer_2.encode_padded(&text, self.clip_length)?.ids);
            rows.push(self.row(&text, picture.as_ref(), *told_length, length)?);
        }
        Ok(TextEncoding { clip_ids, rows, pooled: None })
    }

    fn row(&self, text: &str, picture: Option<&PromptPicture>, told_length: usize, length: usize) -> Result<Row> {
        let Some((sight, PromptPicture { picture, interleave })) = self.sight.as_ref().zip(picture) else {
            let text = format!("{BEFORE_PROMPT}{text}{BEHIND_PROMPT}");
            let tokens = self.tokenizer.encode_padded(&text, CROP_START + length)?;
            if tokens.num_tokens <= CROP_START {
                let found = tokens.num_tokens;
                let problem = format!("has {found} tokens with its template; more than {CROP_START} are needed");
                return Err(Error::invalid("prompt", problem));
            }
            return Ok(Row { tokens, told_length, pictured: None });
        };
        let text = format!("{BEFORE_PICTURED_PROMPT}{text}{BEHIND_PICTURED_PROMPT}");
        let tokens = self.tokenizer.encode_padded(&text, llava::CROP_START + length)?;
        let arrangement = sight.arrange(&tokens, *interleave)?;
        let pictured = Some(Pictured { picture: picture.clone(), arrangement, patches: None });
        Ok(Row { tokens, told_length, pictured })
    }

    /// The next step; what became of each prompt once that was the last.
    pub(super) fn encode_next(&self, encoding: &mut TextEncoding) -> Result<Option<Vec<HunyuanVideoText>>> {
        if encoding.pooled.is_none() {
            encoding.pooled = Some(rows_of(&self.clip.pooled(&slices(&encoding.clip_ids))?)?);
            return Ok(None);
        }
        if let Some(sight) = &self.sight
            && encoding.rows.iter().any(Row::is_unseen)
        {
            for pictured in encoding.rows.iter_mut().filter_map(|row| row.pictured.as_mut()) {
                pictured.patches = Some(sight.see(&pictured.picture)?);
            }
            return Ok(None);
        }
        let pooled = encoding.pooled.take().into_iter().flatten();
        let texts = self.read(&encoding.rows)?.into_iter().zip(pooled);
        let texts = texts.map(|((prompt_embeds, num_tokens), pooled_prompt_embeds)| HunyuanVideoText {
            prompt_embeds,
            num_tokens,
            pooled_prompt_embeds,
        });
        Ok(Some(texts.collect()))
    }

    /// Of each prompt the states that the transformer is told of, filled up with zeros, and how many there are.
    fn read(&self, rows: &[Row]) -> Result<Vec<(Tensor, usize)>> {
        // What is padding in all rows is not computed.
        let longest = rows.iter().map(Row::len).max().unwrap_or(0);
        let counted: Vec<_> = rows.iter().map(|row| 0..row.len()).collect();
        let ids: Vec<Vec<u32>> = rows.iter().map(|row| row.ids(longest)).collect();
        let input = DenseInput::new(&slices(&ids), &counted);
        let wanted = [num_layers_read(self.llama.config())];
        let states = match self.sight {
            None => self.llama.hidden_states(&input, &wanted)?,
            Some(_) => {
                let vectors = rows.iter().map(|row| self.vectors(row, longest)).collect::<Result<Vec<_>>>()?;
                self.llama.hidden_states_of(Tensor::cat(&vectors, 0)?, &input, &wanted)?
            }
        };
        let states = states[0].to_dtype(self.compute_dtype)?; // [b, longest, hidden_size]
        let mut read = Vec::with_capacity(rows.len());
        for (index, row) in rows.iter().enumerate() {
            let states = states.narrow(0, index, 1)?;
            let told = match &row.pictured {
                None => states.narrow(1, CROP_START, row.len() - CROP_START)?,
                Some(Pictured { arrangement, .. }) => {
                    let places = Tensor::new(arrangement.told.as_slice(), states.device())?;
                    states.contiguous()?.index_select(&places, 1)?
                }
            };
            let count = told.dim(1)?;
            // Filled up or copied: a view would keep the whole batch alive.
            let told = match row.told_length - count {
                0 => told.force_contiguous()?,
                missing => told.pad_with_zeros(1, 0, missing)?.contiguous()?,
            };
            read.push((told, count));
        }
        Ok(read)
    }

    /// Of tokens and patches, `[length, hidden_size]`, with zeros behind them.
    fn vectors(&self, row: &Row, length: usize) -> Result<Tensor> {
        let Pictured { arrangement, patches, .. } = row.pictured.as_ref().expect(HAS_PICTURE);
        let patches = patches.as_ref().expect(HAS_PICTURE).clone();
        let vectors = [self.llama.embedded(&arrangement.before)?, patches, self.llama.embedded(&arrangement.behind)?];
        Ok(Tensor::cat(&vectors, 0)?.pad_with_zeros(0, 0, length - row.len())?.contiguous()?)
    }
}

const HAS_PICTURE: &str = "prompts come with pictures that were seen before: this is a bug";

impl Row {
    fn is_unseen(&self) -> bool {
        self.pictured.as_ref().is_some_and(|pictured| pictured.patches.is_none())
    }

    /// Tokens and patches that count.
    fn len(&self) -> usize {
        self.pictured.as_ref().map_or(self.tokens.num_tokens, |pictured| pictured.arrangement.len())
    }

    /// As many as `length`; where patches are among them nobody reads the ids.
    fn ids(&self, length: usize) -> Vec<u32> {
        match self.pictured {
            None => self.tokens.ids[..length].to_vec(),
            Some(_) => vec![0; length],
        }
    }
}

/// Layers of the language model that are computed.
fn num_layers_read(config: &DecoderConfig) -> usize {
    config.num_hidden_layers - LAYERS_TO_SKIP
}

fn load_lowest(weights: &Weights, config: &DecoderConfig) -> Result<Decoder> {
    Decoder::load_lowest(weights, num_layers_read(config), config.clone())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets::{Configurations, Preset};

    /// What stands in for the published tokenizer counts the template as that does.
    #[test]
    fn a_presets_template_has_the_published_number_of_tokens() {
        let preset: &Preset = "hunyuanvideo-i2v".parse().expect("is in the table");
        let folder = Configurations::of_preset(preset).expect("can be written");
        let tokenizer = Tokenizer::from_dir(&folder.path().join("tokenizer")).expect("sound");
        let ids = tokenizer.encode(BEFORE_PICTURED_PROMPT, true).expect("encoded");
        assert_eq!(ids.len(), llava::CROP_START);
        assert_eq!(ids[5], 128_257);
        assert_eq!(tokenizer.encode(BEHIND_PICTURED_PROMPT, false).expect("encoded").len(), 5);
    }
}
