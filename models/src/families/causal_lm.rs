//! What every language family does to become a loaded model, once its `config.json` is understood: the head on the
//! decoder, KV pool, tokenizer, chat template, end-of-sequence tokens, sampling defaults.

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::Tensor;
use serde::Deserialize;
use serde_json::Value;

use crate::card::{ModelCard, SamplingDefaults, TextCard};
use crate::chat_template::ChatTemplate;
use crate::checkpoint::OpenWeights;
use crate::config::read_json_if_present;
use crate::error::{Error, Result};
use crate::family::{LoadOptions, LoadedModel};
use crate::kv::{BLOCK_SIZE, KvCaches, KvShape, blocks_for};
use crate::layers::Linear;
use crate::layers::decoder::{Decoder, DecoderConfig, DecoderInput, PreparedInput, StepSizes};
use crate::manifest::Manifest;
use crate::runner::text::TextRunner;
use crate::runner::text::batcher::Limits;
use crate::runner::text::model::{CausalLm, LanguageModel};
use crate::tokenizer::Tokenizer;
use crate::weights::{Tie, Weights};
use crate::work::StepWork;

/// A decoder whose last hidden states are projected to logits.
#[derive(Debug)]
pub struct DecoderLm {
    decoder: Decoder,
    lm_head: Linear,
}

impl DecoderLm {
    /// Tensors `model.*` and `lm_head.weight`. Where the configuration ties the embeddings, the head may be absent or
    /// take the embeddings' place; where it is there and differs from them, it is used all the same.
    pub fn load(weights: &Weights, config: DecoderConfig) -> Result<Self> {
        let (model, head) = (weights.pp("model"), weights.pp("lm_head"));
        let (vocab_size, hidden_size) = (config.vocab_size, config.hidden_size);
        let tie = match config.tie_word_embeddings {
            true => weights.tie("model.embed_tokens.weight", "lm_head.weight")?,
            false => Tie::Two,
        };
        let decoder = match tie {
            Tie::OneUnderSecond => Decoder::load_with_table(&model, &head, config)?,
            Tie::One | Tie::Two => Decoder::load(&model, config)?,
        };
        let lm_head = match tie {
            Tie::One | Tie::OneUnderSecond => decoder.tied_head(),
            Tie::Two => Linear::load_no_bias(&head, hidden_size, vocab_size)?,
        };
        Ok(Self { decoder, lm_head })
    }

    /// What gives the hidden states.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Logits `[..., vocab_size]` of last hidden states `[..., hidden_size]`.
    pub fn head(&self, states: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(states)
    }
}

impl CausalLm for DecoderLm {
    fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    fn context_len(&self) -> usize {
        self.decoder.config().context_len()
    }

    fn kv_shape(&self) -> KvShape {
        self.decoder.config().kv_shape()
    }

    fn prepare<'a>(&self, input: &'a DecoderInput, caches: &KvCaches) -> Result<PreparedInput<'a>> {
        self.decoder.prepare(input, caches)
    }

    fn logits(&self, input: &PreparedInput<'_>, caches: &KvCaches) -> Result<Option<Tensor>> {
        let states = self.decoder.paged(input, caches)?;
        states.map(|states| self.head(&states)).transpose()
    }

    fn work(&self, sizes: &StepSizes) -> StepWork {
        let head_bytes = if sizes.logit_rows > 0 { self.lm_head.weight_bytes() } else { 0 };
        StepWork {
            flops: self.decoder.config().flops(sizes),
            bytes: (self.decoder.step_bytes(sizes) + head_bytes) as f64,
        }
    }
}

/// Loads the decoder that `config` describes, and everything around it.
pub fn load(
    family: &'static str,
    config: DecoderConfig,
    manifest: &Manifest,
    open: &mut OpenWeights<'_>,
    options: &LoadOptions,
) -> Result<LoadedModel> {
    let dir = &manifest.root;
    let placement = open.placement().clone();
    let block_bytes = config.kv_shape().block_bytes(placement.compute_dtype);
    let num_blocks = num_kv_blocks(&config, block_bytes, options)?;
    let resident_bytes = num_blocks * block_bytes;
    let network = DecoderLm::load(&open.component(manifest, "")?, config)?;
    let kv_shape = network.kv_shape();
    let caches = match open.is_dry() {
        true => KvCaches::dry(kv_shape, num_blocks, &placement)?,
        false => KvCaches::new(kv_shape, num_blocks, &placement)?,
    };
    let tokenizer = Tokenizer::from_dir(dir)?;
    let eos_token_ids = eos_token_ids(dir, &tokenizer)?;
    if eos_token_ids.is_empty() {
        tracing::warn!(path = %dir.display(), "no end-of-sequence token is named; answers end at max_tokens");
    }

    let vocab_size = network.vocab_size();
    let model = LanguageModel { network, tokenizer: tokenizer.clone(), eos_token_ids };
    let limits =
        Limits { max_batch_tokens: options.max_batch_tokens, max_batch_sequences: options.max_batch_sequences };
    let runner = TextRunner::new(model, caches, limits);
    let card = TextCard {
        family,
        max_context: runner.max_context(),
        kv_bytes_per_token: block_bytes / BLOCK_SIZE,
        vocab_size,
        tokenizer,
        chat_template: ChatTemplate::from_dir(dir)?,
        defaults: SamplingDefaults::read(&dir.join("generation_config.json"))?,
    };
    Ok(LoadedModel { card: ModelCard::Text(card), runner: Box::new(runner), resident_bytes })
}

/// Blocks that the configured bytes pay for, but no more than all sequences of a step can fill.
fn num_kv_blocks(config: &DecoderConfig, block_bytes: usize, options: &LoadOptions) -> Result<usize> {
    let affordable = options.kv_cache_bytes / block_bytes;
    if affordable == 0 {
        return Err(Error::OutOfMemory { phase: None, needed_bytes: block_bytes, free_bytes: options.kv_cache_bytes });
    }
    let useful = options.max_batch_sequences.saturating_mul(blocks_for(config.context_len()));
    Ok(affordable.min(useful))
}

/// `eos_token_id` of `config.json` and `generation_config.json`.
#[derive(Deserialize)]
struct EosField {
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// The tokens that end an answer: those of `generation_config.json`, or else of `config.json` (as in transformers'
/// `generate`), and the tokenizer's own, with which chat templates close a message.
fn eos_token_ids(dir: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut ids = BTreeSet::new();
    for file_name in ["generation_config.json", "config.json"] {
        let field: Option<EosField> = read_json_if_present(&dir.join(file_name))?;
        if let Some(given) = field.and_then(|field| field.eos_token_id) {
            ids.extend(given.into_vec());
            break;
        }
    }
    let tokenizer_config: Option<Value> = read_json_if_present(&dir.join("tokenizer_config.json"))?;
    let eos_token = tokenizer_config.as_ref().map_or(&Value::Null, |config| &config["eos_token"]);
    // Either the token, or an object that describes it.
    let spelling = eos_token.as_str().or_else(|| eos_token["content"].as_str());
    ids.extend(spelling.and_then(|spelling| tokenizer.token_id(spelling)));
    Ok(ids.into_iter().collect())
}
