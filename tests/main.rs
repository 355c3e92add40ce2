#![allow(missing_docs)] // a test binary has no readers of its docs
//! The server over real HTTP: one binary, so that it is linked once.

mod bodies;
mod browsers;
mod cancel;
mod cli;
mod clients;
mod connections;
mod durable;
mod edits;
mod frames;
mod images;
mod layering;
mod lifecycle;
mod logprobs;
mod model_management;
mod openapi;
mod playback;
mod posters;
mod process;
mod published;
mod references;
mod refusals;
mod responses;
mod shots;
mod storage;
mod structured;
mod support;
mod text;
mod tokens;
mod videos;
