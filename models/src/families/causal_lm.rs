//! What every language family does to become a loaded model, once its `config.json` is understood: the head on the
//! decoder, KV pool, tokenizer, chat template, end-of-sequence tokens, sampling defaults.

use std::collections::BTreeSet;

use candle_core::Tensor;
use serde::Deserialize;

use crate::card::{ModelCard, SamplingDefaults, TextCard};
use crate::checkpoint::{CONFIG, Component, Manifest, OpenWeights};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::family::{LoadOptions, LoadedModel};
use crate::grammar::Grammars;
use crate::kv::{BLOCK_SIZE, KvCaches, KvFormat, KvShape, blocks_for};
use crate::layers::Linear;
use crate::layers::decoder::{ConfigClass, Decoder, DecoderConfig, DecoderInput, LlamaGgufNames, PreparedInput};
use crate::parallel::{Rank, check_devices};
use crate::runner::text::batcher::Limits;
use crate::runner::text::model::{CausalLm, LanguageModel};
use crate::runner::text::{RunnerOptions, TextRunner};
use crate::tokenizer::Tokenizer;
use crate::weights::{Tie, Weights};

mod sharded;

use sharded::{Parts, Sharded};

/// The file with the ways in which a model's author generates.
const GENERATION_CONFIG: &str = "generation_config.json";

/// Divisors of the rotation's frequencies, of which llama.cpp's converter makes a tensor (Llama 3.1 and later).
const ROPE_FREQS: &str = "rope_freqs.weight";

/// A decoder whose last hidden states are projected to logits.
#[derive(Debug)]
pub struct DecoderLm {
    decoder: Decoder,
    lm_head: Linear,
    /// Where it is a part of one that several devices share.
    rank: Option<Rank>,
    placement: Placement,
    /// Whether it computes by nothing but launches.
    is_recordable: bool,
}

impl DecoderLm {
    /// Tensors `model.*` and `lm_head.weight`, or those of llama.cpp's names. Where the configuration ties the embeddings, the
    /// head may be absent or take the embeddings' place; where it is there and differs from them, it is used all the same.
    pub fn load(weights: &Weights, config: DecoderConfig) -> Result<Self> {
        Self::load_part(weights, config, None)
    }

    /// As [`DecoderLm::load`]; of a rank its part, of a configuration that [`DecoderConfig::check_split`] has found right.
    pub fn load_part(weights: &Weights, mut config: DecoderConfig, rank: Option<&Rank>) -> Result<Self> {
        let weights = &weights.clone().or_named(LlamaGgufNames::new(&config));
        if weights.contains(ROPE_FREQS)
            && let Some(divisors) = weights.values(&[config.head_dim / 2], ROPE_FREQS)?
        {
            config.rope = config.rope.divided_by(&divisors).map_err(|problem| weights.error(ROPE_FREQS, problem))?;
        }
        let quantised = weights.quantised(config.quantisation.as_ref());
        let (model, head) = (quantised.pp("model"), quantised.pp("lm_head"));
        let tie = match config.tie_word_embeddings {
            true => weights.tie("model.embed_tokens.weight", "lm_head.weight")?,
            false => Tie::Two,
        };
        let decoder = match tie {
            Tie::OneUnderSecond => Decoder::load_with_table(&model, &head, config, rank)?,
            Tie::One | Tie::Two => Decoder::load_with_table(&model, &model.pp("embed_tokens"), config, rank)?,
        };
        let lm_head = match tie {
            Tie::One | Tie::OneUnderSecond => decoder.tied_head(),
            Tie::Two => decoder.load_head(&head)?,
        };
        // A GPU dequantises blocks by candle's kernels, which are in no recording, and ranks wait for each other.
        let is_recordable = weights.dequantised_bytes() == 0 && rank.is_none();
        Ok(Self { decoder, lm_head, rank: rank.cloned(), placement: weights.placement().clone(), is_recordable })
    }

    /// As [`CausalLm::head`] on the rank that leads, of so many states, which this one gets from there.
    fn follow_head(&self, rows: usize) -> Result<()> {
        let rank = self.rank.as_ref().expect("only a rank follows: this is a bug");
        let placement = &self.placement;
        let shape = [rows, self.decoder.config().hidden_size];
        let states = rank.of_leader(None, &shape, placement.compute_dtype, &placement.device)?;
        rank.columns(&self.lm_head.forward(&states)?).map(drop)
    }

    /// What gives the hidden states.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
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
        self.decoder.kv_shape()
    }

    fn is_recordable(&self) -> bool {
        self.is_recordable
    }

    fn prepare<'a>(&self, input: &'a DecoderInput, caches: &KvCaches) -> Result<PreparedInput<'a>> {
        self.decoder.prepare(input, caches)
    }

    fn states(&self, input: &PreparedInput<'_>, caches: &KvCaches) -> Result<Option<Tensor>> {
        self.decoder.paged(input, caches)
    }

    fn head(&self, states: &Tensor) -> Result<Tensor> {
        match &self.rank {
            None => self.lm_head.forward(states),
            Some(rank) => {
                let states = rank.of_leader(Some(states), states.dims(), states.dtype(), states.device())?;
                rank.columns(&self.lm_head.forward(&states)?)
            }
        }
    }
}

/// Loads the decoder that `config.json` describes to `class`, and everything around it.
pub fn load(
    family: &'static str,
    class: &ConfigClass,
    manifest: &Manifest,
    open: &mut OpenWeights<'_>,
    options: &LoadOptions,
) -> Result<LoadedModel> {
    let checkpoint = manifest.whole();
    let config = DecoderConfig::read(&checkpoint.fields(CONFIG)?, class)?;
    if !options.tensor_parallel.is_empty() {
        check_devices(&options.tensor_parallel)?;
    }
    let num_ranks = options.tensor_parallel.len().max(1);
    config.check_split(num_ranks).map_err(|problem| Error::checkpoint(checkpoint.config_path(), problem))?;
    let kv_format = options.kv_cache_dtype.at(open.placement())?;
    let block_bytes = config.kv_shape_of(num_ranks).block_bytes(kv_format);
    let num_blocks = num_kv_blocks(&config, block_bytes, options)?;
    let around = Around { family, class, manifest, options, kv_format, num_blocks };
    let weights = open.component(manifest, "")?;
    match (num_ranks, open.is_dry()) {
        (1, _) => around.load(DecoderLm::load(&weights, config)?, &weights),
        // All ranks take as much, but for biases that the first one adds.
        (_, true) => around.load(DecoderLm::load_part(&weights, config, Some(&Rank::dry(0, num_ranks)))?, &weights),
        (_, false) => {
            let parts = Parts {
                source: open.source().clone(),
                format: options.load_format,
                class: *class,
                kv_format,
                num_blocks,
                dtypes: weights.placement().in_memory_of_the_host(),
            };
            let load_own = |rank: &Rank| DecoderLm::load_part(&weights, config, Some(rank));
            around.load(Sharded::load(&options.tensor_parallel, parts, load_own)?, &weights)
        }
    }
}

/// What a network becomes a model with.
struct Around<'a> {
    family: &'static str,
    class: &'a ConfigClass,
    manifest: &'a Manifest,
    options: &'a LoadOptions,
    kv_format: KvFormat,
    num_blocks: usize,
}

impl Around<'_> {
    fn load<M: CausalLm + 'static>(self, network: M, weights: &Weights) -> Result<LoadedModel> {
        let Self { family, class, manifest, options, kv_format, num_blocks } = self;
        let checkpoint = manifest.whole();
        let kv_shape = network.kv_shape();
        let placement = weights.placement();
        let caches = match weights.is_dry() {
            true => KvCaches::dry(kv_shape, kv_format, num_blocks, placement)?,
            false => {
                let bytes = num_blocks * kv_shape.block_bytes(kv_format);
                tracing::info!(tokens = num_blocks * BLOCK_SIZE, dtype = %kv_format, bytes, "KV cache");
                KvCaches::new(kv_shape, kv_format, num_blocks, placement)?
            }
        };
        let cache_bytes = caches.bytes();
        let tokenizer = checked_tokenizer(checkpoint, network.vocab_size(), network.context_len())?;
        tokenizer.prepare_for_long_texts();
        let eos_token_ids = eos_token_ids(checkpoint, class, tokenizer.eos_token_id(), network.vocab_size())?;
        if eos_token_ids.is_empty() {
            tracing::warn!(path = %manifest.root().display(), "no end-of-sequence token is named; answers end at max_tokens");
        }

        let vocab_size = network.vocab_size();
        let grammars = Grammars::new(tokenizer.clone(), vocab_size, &eos_token_ids);
        let model = LanguageModel { network, tokenizer: tokenizer.clone(), eos_token_ids };
        let limits =
            Limits { max_batch_tokens: options.max_batch_tokens, max_batch_sequences: options.max_batch_sequences };
        let how = RunnerOptions { prefix_cache: options.prefix_cache, prompt_lookup: options.prompt_lookup };
        let runner = TextRunner::new(model, caches, limits, how);
        let card = TextCard {
            family,
            max_context: runner.max_context(),
            kv_bytes_per_token: kv_shape.token_bytes(kv_format),
            kv_shape,
            vocab_size,
            tokenizer,
            chat_template: checkpoint.chat_template()?,
            defaults: match checkpoint.fields_if_present(GENERATION_CONFIG)? {
                Some(fields) => SamplingDefaults::read(&fields)?,
                None => SamplingDefaults::default(),
            },
            grammars,
            tool_format: options.tool_call_parser,
        };
        let widened_bytes = weights.dequantised_bytes();
        let resident_bytes = cache_bytes.saturating_add(widened_bytes);
        Ok(LoadedModel { card: ModelCard::Text(card), runner: Box::new(runner), resident_bytes, widened_bytes })
    }
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

/// The tokenizer, of whose tokens every one has an embedding and leaves room in the context.
fn checked_tokenizer(checkpoint: Component<'_>, vocab_size: usize, context_len: usize) -> Result<Tokenizer> {
    let tokenizer = checkpoint.tokenizer()?;
    if let Some(id) = tokenizer.id_beyond(vocab_size, false) {
        let problem = format!("the tokenizer has a token with id {id}; vocab_size in {CONFIG} is {vocab_size}");
        return Err(Error::checkpoint(checkpoint.path(""), problem));
    }
    if let Some(id) = tokenizer.pad_token_id().filter(|id| *id as usize >= vocab_size) {
        let path = checkpoint.path("");
        tracing::warn!(path = %path.display(), id, "the padding token has no embedding; prompts that spell it are refused");
    }
    let around = tokenizer.encode("", true)?.len();
    if around + 1 >= context_len {
        let problem = format!("the tokenizer puts {around} tokens around every text; {context_len} fit the context");
        return Err(Error::checkpoint(checkpoint.path(""), problem));
    }
    Ok(tokenizer)
}

/// `eos_token_id`. Python's -1 is no token.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

impl OneOrMany {
    fn ids(&self) -> &[i64] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }

    fn tokens(&self) -> impl Iterator<Item = u32> {
        self.ids().iter().filter_map(|id| u32::try_from(*id).ok())
    }
}

/// The tokens that end an answer: those of `generation_config.json`, or else of `config.json` (as in transformers'
/// `generate`), and the tokenizer's own, with which chat templates close a message.
fn eos_token_ids(
    checkpoint: Component<'_>,
    class: &ConfigClass,
    of_tokenizer: Option<u32>,
    vocab_size: usize,
) -> Result<Vec<u32>> {
    const FIELD: &str = "eos_token_id";
    let mut given: Option<OneOrMany> = None;
    let mut file = GENERATION_CONFIG;
    if let Some(fields) = checkpoint.fields_if_present(GENERATION_CONFIG)? {
        given = fields.nullable_or(FIELD, None)?;
    }
    if given.is_none() {
        let of_class = class.eos_token_id.map(|id| OneOrMany::One(id.into()));
        (given, file) = (checkpoint.fields(CONFIG)?.nullable_or(FIELD, of_class)?, CONFIG);
    }
    if let Some(id) = given.iter().flat_map(OneOrMany::ids).find(|id| **id >= vocab_size as i64) {
        let problem = format!("{FIELD}: is {id}; vocab_size in {CONFIG} is {vocab_size}");
        return Err(Error::checkpoint(checkpoint.path(file), problem));
    }
    let mut ids: BTreeSet<u32> = given.iter().flat_map(OneOrMany::tokens).collect();
    ids.extend(of_tokenizer);
    Ok(ids.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Folder;
    use crate::layers::decoder::{Biases, GgufRows};

    const CLASS: ConfigClass = ConfigClass {
        vocab_size: 1,
        hidden_size: 1,
        intermediate_size: 1,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: None,
        max_position_embeddings: 1,
        eos_token_id: Some(2),
        biases: Biases::AsStated,
        knows_windows: false,
        gguf_rows: GgufRows::AsPublished,
    };

    const VOCAB_SIZE: usize = 10;

    /// Of a folder with these two files, whose tokenizer names no end.
    fn ends(config: &str, generation: Option<&str>) -> Result<Vec<u32>> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("config.json"), config).expect("written");
        if let Some(generation) = generation {
            std::fs::write(dir.path().join("generation_config.json"), generation).expect("written");
        }
        eos_token_ids(Folder::new(dir.path()).whole(), &CLASS, None, VOCAB_SIZE)
    }

    #[test]
    fn an_answer_ends_as_the_files_say_or_else_the_class() {
        let check = |config: &str, generation: Option<&str>, expected: &[u32]| {
            assert_eq!(ends(config, generation).expect("read"), expected, "{config} {generation:?}");
        };
        check("{}", None, &[2]);
        check(r#"{"eos_token_id": null}"#, None, &[]);
        check(r#"{"eos_token_id": -1}"#, None, &[]);
        check(r#"{"eos_token_id": [9, 7.0, -1]}"#, None, &[7, 9]);
        check(r#"{"eos_token_id": 9}"#, Some(r#"{"eos_token_id": 5}"#), &[5]);
        check(r#"{"eos_token_id": 9}"#, Some(r#"{"temperature": 0.5}"#), &[9]);
        check("{}", Some("{}"), &[2]);
        for (config, generation, file) in [
            (r#"{"eos_token_id": "</s>"}"#, None, "config.json"),
            (r#"{"eos_token_id": 10}"#, None, "config.json"),
            ("{}", Some(r#"{"eos_token_id": [3, 9007199254740991]}"#), "generation_config.json"),
        ] {
            let error = ends(config, generation).expect_err("no token").to_string();
            assert!(error.contains(&format!("/{file}: eos_token_id: ")), "{error}");
        }
    }
}
