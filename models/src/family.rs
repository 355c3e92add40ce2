//! What a family of models is to everybody else: how it is recognised, and how one of its models is built.

use crate::card::ModelCard;
use crate::checkpoint::{LoadFormat, Manifest, OpenWeights};
use crate::device::DeviceSpec;
use crate::error::Result;
use crate::kv::{KvCacheDtype, PrefixCache};
use crate::runner::Runner;
use crate::runner::text::lookup::PromptLookup;
use crate::tools::ToolFormat;

/// Everything about one family of models. One unit struct per family, one line in [`FAMILIES`](crate::families::FAMILIES).
pub trait Family: Sync {
    /// Name in messages, metrics and docs.
    fn name(&self) -> &'static str;

    /// What it makes, for the table in the docs: `text`, `image`, `video`.
    fn makes(&self) -> &'static str;

    /// Whether the checkpoint is of this family.
    fn detects(&self, manifest: &Manifest) -> bool;

    /// What people should know of the licence of its published weights before they use them, if it is out of the ordinary.
    /// The log says so when a model is loaded, and an inspection does.
    fn licence_note(&self) -> Option<&'static str> {
        None
    }

    /// Components that work on prompts alone and may be away from the device in between, if there are such.
    fn text_encoders(&self) -> &'static [&'static str] {
        &[]
    }

    /// Builds the model from the weights that `open` gives for each component (`""` for a whole-folder model).
    /// `inspect` calls it with dry weights, `load` with real ones.
    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel>;
}

/// Where text encoders are while no prompt is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TextEncoders {
    /// On the device.
    #[default]
    Resident,
    /// Nowhere: they are read for the steps that encode prompts, whose sessions have reserved their bytes.
    OnDemand,
}

/// Where weights come from, and sizes of what a runner allocates beside them.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Bytes of the paged KV cache of a language model.
    pub kv_cache_bytes: usize,
    /// How keys and values are kept there.
    pub kv_cache_dtype: KvCacheDtype,
    /// Which requests share what the KV cache has of prompts that begin alike.
    pub prefix_cache: PrefixCache,
    /// How language models guess tokens from what came before; `None` where they do not.
    pub prompt_lookup: Option<PromptLookup>,
    /// Most tokens (decode and prefill together) of one text step.
    pub max_batch_tokens: usize,
    /// Most sequences of one text step.
    pub max_batch_sequences: usize,
    /// Most rows (sessions times guidance branches) of one denoising step.
    pub max_denoise_rows: usize,
    /// Bytes of device memory for LoRA files that no request uses, for each model that has a folder of them.
    pub lora_cache_bytes: usize,
    /// Where the text encoders of a model that makes pictures or clips are while no prompt is encoded.
    pub text_encoders: TextEncoders,
    /// How language models write calls of tools, where their templates are not to decide.
    pub tool_call_parser: Option<ToolFormat>,
    /// The devices that share a language model, from the one on whose thread it is loaded on; empty where one has it. Each has its
    /// part of the weights, and `kv_cache_bytes` for its part of keys and values.
    pub tensor_parallel: Vec<DeviceSpec>,
    /// The two devices that predict the guidance branches of pictures and clips, from the one on whose thread the model is loaded on;
    /// empty where one does. Each has the whole model.
    pub guidance_devices: Vec<DeviceSpec>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            load_format: LoadFormat::Auto,
            kv_cache_bytes: 1 << 30,
            kv_cache_dtype: KvCacheDtype::Auto,
            prefix_cache: PrefixCache::PerClient,
            prompt_lookup: None,
            max_batch_tokens: 512,
            max_batch_sequences: 64,
            max_denoise_rows: 4,
            lora_cache_bytes: 1 << 30,
            text_encoders: TextEncoders::Resident,
            tool_call_parser: None,
            tensor_parallel: Vec::new(),
            guidance_devices: Vec::new(),
        }
    }
}

/// A model ready to serve: its card for everybody, its runner for the device thread.
pub struct LoadedModel {
    /// Limits, defaults, tokenizer.
    pub card: ModelCard,
    /// Drives its sessions.
    pub runner: Box<dyn Runner>,
    /// Bytes that the weights and fixed caches take on the device, and what any step may take for a moment.
    pub resident_bytes: usize,
    /// The latter: what a product with the largest quantised matrix widens, where no plan of a session has it.
    pub widened_bytes: usize,
}
