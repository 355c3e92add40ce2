//! Tale: one native process that serves text, pictures and clips from open weights on a private network.
//!
//! Owns: HTTP, jobs, scheduling across models, media encoding, the command line. Does not know: tensors.

pub mod cli;
mod compute;
pub mod config;
pub mod engine;
pub mod http;
pub mod job;
pub mod media;
pub mod parameters;
pub mod places;
pub mod telemetry;
mod wipe;
