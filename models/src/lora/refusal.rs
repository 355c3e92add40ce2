//! Why a LoRA file cannot be used.
//!
//! Owns: the words. Does not know: who refuses.

/// Why a file cannot be used.
#[derive(Debug)]
pub enum Refusal {
    /// It cannot be read, or is no safetensors file.
    Unreadable(String),
    /// It is for another model, or no LoRA.
    Mismatch(Mismatch),
}

/// Why a file is not for this model, in words that name tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch(pub String);
