//! Open-weight models as runners of bounded steps.
//!
//! Owns: reading checkpoints, one file per model family, samplers and solvers, paged KV blocks, and the runners that
//! turn sessions into steps. Deliberately does not know: HTTP, JSON wire types, async runtimes, databases. No tensor
//! leaves this crate: what crosses the [`runner::Runner`] boundary is tokens, text and RGB bytes.

pub mod bench;
pub mod cancel;
pub mod card;
pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod device;
pub mod diffusion;
pub mod encoders;
pub mod error;
pub mod families;
pub mod family;
pub mod files;
pub mod frame;
pub mod grammar;
pub mod kv;
pub mod layers;
pub mod lfs;
mod linspace;
pub mod loading;
pub mod lora;
pub mod memory;
pub mod parallel;
pub mod parameter;
pub mod phase;
pub mod presets;
pub mod prompt;
pub mod quantisation;
mod quietly;
pub mod request;
pub mod resample;
pub mod rng;
pub mod runner;
pub mod sampler;
pub mod session_checkpoint;
pub mod single_file;
pub mod solver;
pub mod source;
pub mod testing;
pub mod text_parameters;
pub mod text_stream;
pub mod tokenizer;
pub mod tools;
pub mod unpanicked;
pub mod vae;
pub mod weights;

pub use card::{Encoding, ModelCard, TextCard};
pub use diffusion::DiffusionCard;
pub use error::{Error, Result};
pub use family::LoadedModel;
pub use loading::load;
pub use request::{ClientId, Event, Events, Request, SessionId};
pub use runner::Runner;
pub use session_checkpoint::SessionCheckpoint;
pub use source::ModelSource;
