//! LoRA: low-rank terms that are added to the layers of a loaded model.
//!
//! Weights are never changed. A layer that may take a term has a [`Slot`] beside its weights; while a term is in it, the
//! layer adds `scale · B(A x)` to its result. No network's code knows of it.
//!
//! Deliberately does not know: any architecture.

pub mod slot;

pub use slot::{Delta, LayerShape, Sites, Slot};
