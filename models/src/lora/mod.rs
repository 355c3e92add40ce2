//! LoRA: low-rank terms that requests add to the layers of a loaded model.
//!
//! Weights are never changed. A layer that may take a term has a [`Slot`] beside its weights ([`slot`]); before a step
//! the runner puts the terms of that step's requests into the slots ([`adapters`]), and the layer adds `scale · B(A x)`
//! to its result. No network's code knows of it. Files are found by name in a folder ([`library`]), their tensors'
//! names are taken for layers in whichever dialect they are written ([`names`]), and they are checked against the model
//! before a request is accepted ([`mod@file`]).
//!
//! Deliberately does not know: any architecture. What a family's layers are called elsewhere is the family's to say.

pub mod adapters;
pub mod file;
pub mod library;
pub mod names;
pub mod slot;

pub use adapters::{AdapterSet, Adapters, Making};
pub use file::LoraFile;
pub use library::{LoraKey, LoraLibrary, LoraOption, LoraSupport, LoraUse};
pub use names::{Alias, LoraNames, NetworkNames, Part};
pub use slot::{Delta, LayerShape, Sites, Slot};
