//! LoRA: terms that requests add to the layers of a loaded model, of low rank or not.
//!
//! Weights are never changed. A layer that may take terms has a [`Slot`] beside its weights ([`slot`]) and enters itself in
//! a register ([`sites`]); before a step the runner puts the terms of that step's requests into the slots ([`adapters`]),
//! and the layer adds `scale · B(A x)` to its result, and differences to what its weights give. No network's code knows of
//! it. Files are found by name in a folder ([`library`]), their tensors' names are taken for layers in whichever dialect
//! they are written ([`names`]), they are checked against the model before a request is accepted ([`mod@file`]), and read
//! in bounded steps ([`reading`]).
//!
//! Deliberately does not know: any architecture. What a family's layers are called elsewhere is the family's to say.

pub mod adapters;
pub mod file;
pub mod library;
mod metadata;
pub mod names;
pub mod reading;
mod refusal;
pub mod sites;
pub mod slot;

pub use adapters::{AdapterSet, Adapters, Making};
pub use file::LoraFile;
pub use library::{LoraKey, LoraLibrary, LoraOption, LoraSupport, LoraUse};
pub use names::{Alias, LoraNames, NetworkNames, Part};
pub use sites::{LayerShape, Sites};
pub use slot::{Delta, LowRank, Scaled, Slot};
