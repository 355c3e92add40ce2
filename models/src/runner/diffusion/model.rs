//! What a picture or video family supplies to the runner.
//!
//! Owns: the traits of families, a row of their prediction. Does not know: any architecture, sessions, steps.

use candle_core::Tensor;

use super::batcher::PictureInput;
use super::block_cache::BlockCache;
use super::references::ReferenceModel;
use crate::diffusion::DiffusionCard;
use crate::diffusion::DiffusionRequest;
use crate::error::Result;
use crate::lora::Adapters;
use crate::memory::MemoryPlan;
use crate::request::{Frame, Mask, Phase};
use crate::rng::TorchGenerator;
use crate::solver::Solver;
use crate::vae::Posterior;

/// What a picture or video family supplies; the runner does the rest.
pub trait DiffusionModel: Send {
    /// What the transformer needs of one prompt (one guidance branch). Sessions with the same prompt share it.
    type Conditioning: Send + Sync;
    /// State of a decode between two chunks.
    type Decoding: Send;

    /// Limits and defaults.
    fn card(&self) -> &DiffusionCard;

    /// The layers that take LoRA, where the family has any. The runner activates those of a step before it, and counts
    /// their bytes.
    fn adapters(&self) -> Option<&Adapters> {
        None
    }

    /// Bytes that one session needs beside the weights in each phase (latents, conditioning, activations, pixels).
    fn plan(&self, request: &DiffusionRequest) -> MemoryPlan;

    /// Encodes prompts, positive or negative ones of several sessions, in one forward pass whose rows know nothing of each
    /// other. Of the request only `max_sequence_length` may matter, since sessions that agree in it share the pass.
    fn encode(&self, prompts: &[&str], request: &DiffusionRequest) -> Result<Vec<Self::Conditioning>>;

    /// Whether a negative prompt that the client did not give is the empty text.
    fn absent_is_empty(&self) -> bool {
        true
    }

    /// What stands for an absent negative prompt where that is not the empty text; computes next to nothing.
    fn encode_absent(&self, _request: &DiffusionRequest) -> Result<Self::Conditioning> {
        unreachable!("the family says that an absent prompt is the empty one: this is a bug")
    }

    /// Standard normal noise `[1, ...]` in f32, drawn in the order in which the diffusers pipeline draws it, already in the
    /// shape that `predict` takes.
    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor>;

    /// The solver of one session, its timesteps set.
    fn solver(&self, request: &DiffusionRequest) -> Result<Box<dyn Solver>>;

    /// One forward pass over a batch of rows that share a shape but nothing else: row i has latents `[1, ...]`, its own
    /// timestep (in the solver's unit), its own conditioning and request. Returns the prediction of each row, f32.
    fn predict(&self, rows: &[DenoiseRow<'_, Self::Conditioning>]) -> Result<Vec<Tensor>>;

    /// As [`DiffusionModel::predict`], with the first-block cache of each row. Asked only of models whose card has
    /// thresholds for it.
    fn predict_cached(
        &self,
        _rows: &[DenoiseRow<'_, Self::Conditioning>],
        _caches: &mut [&mut BlockCache],
    ) -> Result<Vec<Tensor>> {
        unreachable!("the card allows no acceleration: this is a bug")
    }

    /// From now on nothing is kept that only later steps would profit from: this model lives for one.
    fn record_nothing(&mut self) {}

    /// Components of the checkpoint whose networks do the work of `phase` in fewer than 32 bits, so that f32 may help where
    /// it is not finite; none where it computes in f32 anyway.
    fn narrow_components(&self, _phase: Phase) -> &'static [&'static str] {
        &[]
    }

    /// A rough picture of latents on their way, cheap beside a step and as small as it likes; `None` where a family knows
    /// none, as for clips.
    fn preview(&self, _latents: &Tensor, _request: &DiffusionRequest) -> Result<Option<Frame>> {
        Ok(None)
    }

    /// Begins to turn final latents into pixels.
    fn begin_decode(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<Self::Decoding>;

    /// How many calls of [`DiffusionModel::decode_next`] a request takes.
    fn num_decode_steps(&self, request: &DiffusionRequest) -> usize;

    /// The next chunk: f32 pixels `[frames, 3, height, width]` in -1..=1 (not yet clamped); `None` where whole frames need
    /// further calls, as a tile of a picture does.
    fn decode_next(&self, decoding: &mut Self::Decoding) -> Result<Option<Tensor>>;

    /// What it adds to begin from pictures, if it does.
    fn picture_model(&self) -> Option<&dyn PictureModel> {
        None
    }

    /// The model that takes the latents over from it where a request says so, if it has one: that has conditioning,
    /// solver and VAE of its own, and shares the shape of latents and the lengths of prompts.
    fn refiner(&self) -> Option<&Self> {
        None
    }

    /// What it adds to follow reference pictures, if it does.
    fn reference_model(&self) -> Option<&dyn ReferenceModel> {
        None
    }
}

/// What a family adds whose loop may begin from a picture. Requests with an [`crate::diffusion::Edit`] are for it alone.
pub trait PictureModel {
    /// The pictures that a request has encoded, in this order.
    fn pictures(&self, request: &DiffusionRequest) -> Vec<PictureInput> {
        let tiled = request.vae_tiling;
        let pictures = request.edit.iter().map(|edit| edit.image.clone());
        pictures.map(|picture| PictureInput { picture, blanked: None, tiled }).collect()
    }

    /// What the VAE says of one of them.
    fn encode_picture(&self, input: &PictureInput) -> Result<Posterior>;

    /// A sample of a posterior as `predict` takes latents: scaled, and packed where the family packs.
    fn picture_latents(&self, sample: &Tensor, request: &DiffusionRequest) -> Result<Tensor>;

    /// The mask, for each value of the latents that `predict` takes: 1 where it is made anew, else 0.
    fn mask_latents(&self, mask: &Mask, request: &DiffusionRequest) -> Result<Tensor>;
}

/// One row of a denoising batch.
pub struct DenoiseRow<'a, C> {
    /// `[1, ...]` f32, scaled as the solver wants the model to see them.
    pub latents: &'a Tensor,
    /// In the solver's unit (0..1000 for the flow-matching families).
    pub timestep: f64,
    /// Of this row's prompt.
    pub conditioning: &'a C,
    /// Whether that is the negative one.
    pub is_negative: bool,
    /// What this row sees of the session's reference pictures, `[1, tokens, width]`; rows of one batch have equally many.
    pub references: Option<&'a Tensor>,
    /// Of this row's session.
    pub request: &'a DiffusionRequest,
}
