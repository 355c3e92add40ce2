//! One file per model family.

pub mod flux;
pub mod llama;
pub mod qwen2;
pub mod wan;
