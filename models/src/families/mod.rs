//! One file per model family.

pub mod causal_lm;
pub mod flux;
pub mod llama;
pub mod qwen2;
pub mod sdxl;
pub mod wan;
