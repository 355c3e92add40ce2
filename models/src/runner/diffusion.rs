//! The diffusion runner: text encoding, batched denoising, chunked VAE decoding, for any [`DiffusionModel`].
//!
//! Owns: sessions, batching by shape, the denoising loop, guidance, conversion to RGB bytes. Does not know: any
//! architecture, solver or VAE.

use candle_core::Tensor;

use crate::card::DiffusionCard;
use crate::error::Result;
use crate::request::DiffusionRequest;
use crate::rng::TorchGenerator;
use crate::solver::Solver;

/// What a picture or video family supplies; the runner does the rest.
pub trait DiffusionModel: Send {
    /// What the transformer needs of one prompt (one guidance branch).
    type Conditioning: Send;
    /// State of a decode between two chunks.
    type Decoding: Send;

    /// Limits and defaults.
    fn card(&self) -> &DiffusionCard;

    /// Bytes that one session needs at its peak beside the weights (latents, conditioning, activations, decode).
    fn footprint_bytes(&self, request: &DiffusionRequest) -> usize;

    /// Encodes one prompt: the positive or the negative one.
    fn encode(&self, prompt: &str, request: &DiffusionRequest) -> Result<Self::Conditioning>;

    /// Initial noise `[1, ...]` in f32, drawn in the order in which the diffusers pipeline draws it, already in the
    /// shape that `predict` takes.
    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor>;

    /// The solver of one session, its timesteps set.
    fn solver(&self, request: &DiffusionRequest) -> Result<Box<dyn Solver>>;

    /// One forward pass over a batch of rows that share a shape but nothing else: row i has latents `[1, ...]`, its own
    /// timestep (in the solver's unit), its own conditioning and request. Returns the prediction of each row, f32.
    fn predict(&self, rows: &[DenoiseRow<'_, Self::Conditioning>]) -> Result<Vec<Tensor>>;

    /// Begins to turn final latents into pixels.
    fn begin_decode(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<Self::Decoding>;

    /// How many calls of [`DiffusionModel::decode_next`] a request takes.
    fn num_decode_steps(&self, request: &DiffusionRequest) -> usize;

    /// The next chunk: f32 pixels `[frames, 3, height, width]` in -1..=1 (not yet clamped).
    fn decode_next(&self, decoding: &mut Self::Decoding) -> Result<Tensor>;
}

/// One row of a denoising batch.
pub struct DenoiseRow<'a, C> {
    /// `[1, ...]` f32.
    pub latents: &'a Tensor,
    /// In the solver's unit (0..1000 for the flow-matching families).
    pub timestep: f64,
    /// Of this row's prompt.
    pub conditioning: &'a C,
    /// Of this row's session.
    pub request: &'a DiffusionRequest,
}
