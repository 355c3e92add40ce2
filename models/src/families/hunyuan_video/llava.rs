//! What HunyuanVideo's language model sees of a picture: patches of a CLIP vision encoder in its own width, which stand in a
//! prompt where `<image>` does.
//!
//! Owns: the configuration of the whole, the vision encoder and what projects its patches, where they stand among the
//! tokens, and which states the transformer is told of. Does not know: the transformer, CLIP's text encoder. Source:
//! diffusers `pipelines/hunyuan_video/pipeline_hunyuan_video_image2video.py` (`_expand_input_ids_with_image_tokens`,
//! `_get_llama_prompt_embeds`), transformers `models/llava/modeling_llava.py`.

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tale_kernels::gelu_erf;

use crate::checkpoint::Manifest;
use crate::config::Fields;
use crate::encoders::clip_vision::{ClipVisionConfig, ClipVisionEncoder};
use crate::encoders::image_processor::ClipImageProcessor;
use crate::error::{Error, Result};
use crate::families::llama;
use crate::layers::Linear;
use crate::layers::decoder::{DecoderConfig, LlamaGgufNames};
use crate::request::Frame;
use crate::tokenizer::{Padded, Tokenizer};
use crate::weights::Weights;

/// Patches of a picture, and the place of the first among the tokens, as the pipeline's template has them.
const NUM_PATCHES: usize = 576;
const FIRST_PATCH: usize = 5;
/// Tokens before the prompt, of the published tokenizer and with one for the picture; the transformer is not told of them.
pub(super) const CROP_START: usize = 103;
/// Tokens between the prompt and what the assistant would say, up to its header's end.
const ASSISTANT_TOKENS: usize = 4;
/// Ends each of the three headers of the template.
const END_OF_HEADER: &str = "<|end_header_id|>";
/// What transformers takes where a file has no token for a picture.
const DEFAULT_IMAGE_TOKEN: u32 = 32_000;

/// `config.json` of a `LlavaForConditionalGeneration`.
pub(super) struct LlavaConfig {
    pub(super) text: DecoderConfig,
    pub(super) vision: ClipVisionConfig,
    image_token: u32,
    pad_token: u32,
    projector_bias: bool,
}

impl LlavaConfig {
    pub(super) fn read(fields: Fields) -> Result<Self> {
        let only = |field: &str, supported: Value| match fields.get(field) {
            Some(found) if *found != supported => {
                Err(fields.error(field, format!("is {found}; only {supported} is supported")))
            }
            _ => Ok(()),
        };
        only("vision_feature_layer", json!(-2))?;
        only("vision_feature_select_strategy", json!("default"))?;
        only("projector_hidden_act", json!("gelu"))?;
        let image_token = fields.or("image_token_index", DEFAULT_IMAGE_TOKEN)?;
        let pad_token = fields.nullable_or::<u32>("pad_token_id", None)?;
        let pad_token = pad_token.ok_or_else(|| fields.error("pad_token_id", "is missing"))?;
        let projector_bias = fields.flag("multimodal_projector_bias", true)?;
        for part in ["vision_config", "text_config"] {
            if !fields.get(part).is_some_and(Value::is_object) {
                return Err(fields.error(part, "is missing"));
            }
        }
        let path = fields.path().to_owned();
        let text = llama::config_of(&fields.clone().below("text_config")?)?;
        let vision = ClipVisionConfig::read(fields)?;
        let patches = vision.num_positions() - 1;
        if patches != NUM_PATCHES {
            let problem = format!("vision_config: makes {patches} patches of a picture; {NUM_PATCHES} are supported");
            return Err(Error::checkpoint(path, problem));
        }
        for (field, token) in [("image_token_index", image_token), ("pad_token_id", pad_token)] {
            if token as usize >= text.vocab_size {
                let problem = format!("{field}: is {token}; the vocab_size of text_config is {}", text.vocab_size);
                return Err(Error::checkpoint(path, problem));
            }
        }
        Ok(Self { text, vision, image_token, pad_token, projector_bias })
    }

    /// Bytes that seeing a picture takes at its peak, in `dtype`.
    pub(super) fn sight_bytes(&self, dtype: DType) -> usize {
        self.vision.forward_bytes(dtype) + 3 * NUM_PATCHES * self.text.hidden_size * dtype.size_in_bytes()
    }

    /// Vectors of a prompt that is padded or cut to `length` tokens, of whose picture every `interleave`th patch is told.
    pub(super) fn told_length(length: usize, interleave: usize) -> usize {
        NUM_PATCHES.div_ceil(interleave) + length.saturating_sub(ASSISTANT_TOKENS)
    }

    /// Tokens that the language model reads of a prompt.
    pub(super) fn read_length(length: usize) -> usize {
        CROP_START + length + NUM_PATCHES - 1
    }
}

/// The tensors of the language model and those beside it, in whichever layout the files are.
pub(super) struct LlavaWeights {
    pub(super) language_model: Weights,
    vision_tower: Weights,
    projector: Weights,
}

impl LlavaWeights {
    /// Transformers 4 published `language_model.model.*` beside `vision_tower.*` and `multi_modal_projector.*`; 5 writes all
    /// three below `model.`. The head says words, which nobody wants here. Where the language model is shared by itself, as
    /// ComfyUI and llama.cpp have it, what sees pictures is in `beside`: `vision_model.*` and `multi_modal_projector.*`.
    pub(super) fn of(weights: &Weights, beside: Option<&Weights>, config: &LlavaConfig) -> Self {
        if let Some(beside) = beside {
            return Self {
                language_model: LlamaGgufNames::trunk(weights, &config.text),
                vision_tower: beside.clone(),
                projector: beside.pp("multi_modal_projector"),
            };
        }
        let root = if weights.contains_below("model") { weights.pp("model") } else { weights.clone() };
        let language_model = root.pp("language_model");
        for head in [weights.clone(), language_model.clone()] {
            head.ignore_below("lm_head");
        }
        let language_model =
            if language_model.contains_below("model") { language_model.pp("model") } else { language_model };
        Self { language_model, vision_tower: root.pp("vision_tower"), projector: root.pp("multi_modal_projector") }
    }
}

/// Sees pictures for the language model.
pub(super) struct Sight {
    processor: ClipImageProcessor,
    vision: ClipVisionEncoder,
    linear_1: Linear,
    linear_2: Linear,
    device: Device,
    tokens: TemplateTokens,
}

impl Sight {
    pub(super) fn load(
        manifest: &Manifest,
        weights: &LlavaWeights,
        config: &LlavaConfig,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let (seen, read) = (config.vision.hidden_size, config.text.hidden_size);
        let linear = |name: &str, inputs: usize| match config.projector_bias {
            true => Linear::load(&weights.projector.pp(name), inputs, read),
            false => Linear::load_no_bias(&weights.projector.pp(name), inputs, read),
        };
        let end_of_header = tokenizer.token_id(END_OF_HEADER).ok_or_else(|| {
            Error::checkpoint(manifest.path("tokenizer", ""), format!("has no token {END_OF_HEADER}"))
        })?;
        let processor = manifest.component("image_processor")?;
        Ok(Self {
            processor: ClipImageProcessor::read_or_default(processor, config.vision.image_size)?,
            vision: ClipVisionEncoder::load(&weights.vision_tower, config.vision.clone())?,
            linear_1: linear("linear_1", seen)?,
            linear_2: linear("linear_2", read)?,
            device: weights.projector.placement().device.clone(),
            tokens: TemplateTokens { image: config.image_token, pad: config.pad_token, end_of_header },
        })
    }

    /// Which tokens a prompt has, and which of their states the transformer is told of.
    pub(super) fn arrange(&self, prompt: &Padded, interleave: usize) -> Result<Arrangement> {
        Arrangement::of(prompt, &self.tokens, interleave)
    }

    /// Of a picture of any size, `[patches, width of the language model]` in the compute dtype.
    pub(super) fn see(&self, picture: &Frame) -> Result<Tensor> {
        let pixel_values = self.processor.pixel_values(picture, &self.device)?;
        let patches = self.vision.penultimate(&pixel_values)?; // [1, 1 + patches, hidden_size]
        let patches = patches.narrow(1, 1, NUM_PATCHES)?.squeeze(0)?.contiguous()?;
        self.linear_2.forward(&gelu_erf(&self.linear_1.forward(&patches)?)?)
    }
}

/// Tokens with a meaning for the arrangement.
#[derive(Debug, Clone, Copy)]
struct TemplateTokens {
    image: u32,
    pad: u32,
    end_of_header: u32,
}

/// A prompt as the language model reads it: what its masks hide is left out, and all else keeps its order and its position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Arrangement {
    /// Tokens before the picture, whose patches stand in one row.
    pub(super) before: Vec<u32>,
    /// Tokens behind it.
    pub(super) behind: Vec<u32>,
    /// Of what the transformer is told, in its order, the places in the row of tokens and patches.
    pub(super) told: Vec<u32>,
}

impl Arrangement {
    fn of(prompt: &Padded, tokens: &TemplateTokens, interleave: usize) -> Result<Self> {
        let refuse = |problem: &str| Err(Error::invalid("prompt", problem));
        let ids = &prompt.ids;
        let mut images = ids.iter().enumerate().filter(|(_, id)| **id == tokens.image);
        let (Some((image, _)), None) = (images.next(), images.next()) else {
            return refuse("holds the token that stands for a picture, or its template is cut before that");
        };
        // Where each token stands once the picture has as many places as patches; patches stand where the template wants
        // them, whatever stands there.
        if image >= CROP_START {
            return refuse("has its picture behind its template");
        }
        let patches = FIRST_PATCH..FIRST_PATCH + NUM_PATCHES;
        let place = |token: usize| if token < image { token } else { token + NUM_PATCHES - 1 };
        let is_read = |token: &usize| *token != image && ids[*token] != tokens.pad && !patches.contains(&place(*token));
        let (before, behind): (Vec<usize>, Vec<usize>) =
            (0..ids.len()).filter(is_read).partition(|token| place(*token) < patches.start);
        let row_of = |token: usize| match place(token) < patches.start {
            true => before.binary_search(&token).ok(),
            false => behind.binary_search(&token).ok().map(|index| before.len() + NUM_PATCHES + index),
        };
        let end = last_header_end(ids, tokens.end_of_header)? + 1;
        // Before that the text would have more tokens than its length says.
        if end < CROP_START + ASSISTANT_TOKENS {
            return refuse(
                "leaves no room for the headers of its template, or ends a header of its own where it begins",
            );
        }
        let text = (CROP_START..end - ASSISTANT_TOKENS).chain(end..ids.len());
        let mut told: Vec<u32> = (0..NUM_PATCHES).step_by(interleave).map(|i| (before.len() + i) as u32).collect();
        for token in text.filter(|token| *token < prompt.num_tokens) {
            match row_of(token) {
                Some(row) => told.push(row as u32),
                None => return refuse("holds the token that the language model is padded with"),
            }
        }
        let of = |tokens: &[usize]| tokens.iter().map(|token| ids[*token]).collect();
        Ok(Self { before: of(&before), behind: of(&behind), told })
    }

    /// Tokens and patches.
    pub(super) fn len(&self) -> usize {
        self.before.len() + NUM_PATCHES + self.behind.len()
    }
}

/// Where the last header ends. A prompt that is cut has lost the third one, and ends instead of it.
fn last_header_end(ids: &[u32], end_of_header: u32) -> Result<usize> {
    let mut ends: Vec<usize> = (0..ids.len()).filter(|place| ids[*place] == end_of_header).collect();
    if ends.len() == 2 {
        ends.push(ids.len() - 1);
    }
    ends.pop().ok_or_else(|| Error::invalid("prompt", "leaves no room for the headers of its template"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: TemplateTokens = TemplateTokens { image: 1, pad: 0, end_of_header: 2 };

    /// A template with its picture at place `image`, headers that end at these places, and padding behind `num_tokens`.
    fn prompt(image: usize, ends: &[usize], num_tokens: usize, len: usize) -> Padded {
        let id = |place: usize| match place {
            _ if place == image => TOKENS.image,
            _ if ends.contains(&place) => TOKENS.end_of_header,
            _ if place < num_tokens => 10 + place as u32,
            _ => TOKENS.pad,
        };
        Padded { ids: (0..len).map(id).collect(), num_tokens }
    }

    /// Places in the row of tokens and patches: the patches, then the prompt without the assistant's header.
    #[test]
    fn the_transformer_is_told_of_patches_and_prompt() {
        // As published: the picture at place 5; the assistant's header ends at 118, with one token behind it.
        let arranged = Arrangement::of(&prompt(5, &[3, 101, 118], 120, 130), &TOKENS, 4).expect("arranged");
        assert_eq!((arranged.before.len(), arranged.behind.len()), (5, 114));
        assert_eq!(arranged.told[..144], (0..144).map(|i| 5 + 4 * i).collect::<Vec<u32>>()[..]);
        // Tokens 103 to 114, and 119.
        let text: Vec<u32> = (103..115).chain([119]).map(|token| token + 575).collect();
        assert_eq!(arranged.told[144..], text[..]);
        assert_eq!(arranged.len(), 5 + 576 + 114);
    }

    /// The patches stand at place 5 wherever the picture does; what is masked in between is left out.
    #[test]
    fn tokens_under_the_patches_are_not_read() {
        let arranged = Arrangement::of(&prompt(9, &[3, 101, 118], 120, 130), &TOKENS, 2).expect("arranged");
        assert_eq!(arranged.before, [10, 11, 12, 2, 14]);
        assert_eq!(arranged.behind[..2], [20, 21]);
        assert_eq!(arranged.told.len(), 288 + 13);
        assert_eq!(arranged.told[288], 5 + 576 + (103 - 10));
    }

    #[test]
    fn a_prompt_that_is_cut_loses_its_end_instead_of_a_header() {
        let arranged = Arrangement::of(&prompt(5, &[3, 101], 130, 130), &TOKENS, 4).expect("arranged");
        assert_eq!(arranged.told.len(), 144 + (130 - 4 - 103));
    }

    #[test]
    fn prompts_that_cannot_be_arranged_are_refused() {
        let mut twice = prompt(5, &[3, 101, 118], 120, 130);
        twice.ids[110] = TOKENS.image;
        let mut padded = prompt(5, &[3, 101, 118], 120, 130);
        padded.ids[105] = TOKENS.pad;
        for prompt in [
            twice,
            padded,
            prompt(200, &[3], 120, 130),
            prompt(5, &[], 120, 130),
            prompt(104, &[3], 120, 130),
            prompt(5, &[3, 101, 103], 130, 130),
        ] {
            let error = Arrangement::of(&prompt, &TOKENS, 4).expect_err("refused").to_string();
            assert!(error.contains("prompt"), "{error}");
        }
    }
}
