//! The models held against the reference libraries: tiny checkpoints and recorded answers under `tests/goldens`, made
//! by `scripts/goldens`.

// Every file here is a test; clippy takes their helper functions for something else.
#![allow(clippy::unwrap_used)]

mod caches;
mod chats;
mod clip_previews;
mod clip_tiling;
mod clips;
mod cogvideox;
mod cogvideox_files;
mod cogvideox_lora;
mod cogvideox_pictures;
mod configs;
mod edits;
mod files;
mod flux;
mod given_steps;
mod gpu;
mod guidance;
mod guidance_devices;
mod held;
mod hidden_states;
mod hunyuan_video;
mod hunyuan_video_files;
mod hunyuan_video_lora;
mod hunyuan_video_pictures;
mod ip_adapter;
mod kv_formats;
mod language_gguf;
mod logprobs;
mod lora;
mod mutations;
mod noise_solvers;
mod not_finite;
mod on_demand;
mod overflow;
mod pointers;
mod prefix_cache;
mod previews;
mod quantised;
mod refined;
mod rng;
mod saved;
mod schedulers;
mod sdxl;
mod sdxl_prompts;
mod single_files;
mod speculation;
mod support;
mod templates;
mod tensor_parallel;
mod text;
mod text_configs;
mod tiling;
mod tokenizers;
mod wan;
mod wan_files;
mod wan_lora;
mod wan_pictures;
