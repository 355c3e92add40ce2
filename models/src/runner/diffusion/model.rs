//! What an image or video family supplies to the runner.
//!
//! Owns: the trait of families. What only some families can do is a trait of its own, in the
//! module that owns it: to begin from an image ([`super::start`]), to skip blocks ([`super::block_cache`]), to show
//! previews ([`super::previews`]), to be computed once more in f32 ([`super::narrow`]). Does not know: any architecture,
//! sessions, steps.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::Tensor;

use super::block_cache::CachedPrediction;
use super::course::{Course, Expert};
use super::inputs::{Inputs, Pass};
use super::narrow::NarrowNetworks;
use super::previews::Previews;
use super::row::DenoiseRow;
use super::start::{ImageStart, PictureStart};
use crate::diffusion::DiffusionCard;
use crate::diffusion::DiffusionRequest;
use crate::error::Result;
use crate::lora::Adapters;
use crate::memory::MemoryPlan;
use crate::rng::TorchGenerator;
use crate::vae::Pixels;

/// What an image or video family supplies; the runner does the rest.
pub trait DiffusionModel: Send {
    /// Something that is encoded before the first denoising step. Equal ones of several sessions are encoded once.
    type Input: Clone + PartialEq + Debug + Send;
    /// State of a pass through an encoder between two steps.
    type Encoding: Send;
    /// What became of an input.
    type Encoded: Send + Sync;
    /// What a denoiser needs for one guidance branch beside latents and timestep.
    type Conditioning: Send + Sync;
    /// State of a decode between two chunks.
    type Decoding: Send;

    /// Limits and defaults.
    fn card(&self) -> &DiffusionCard;

    /// Bytes that one session needs beside the weights in each phase (latents, conditioning, activations, pixels), where its
    /// guidance branches go through the denoiser so many at once: all of them, or one after the other.
    fn plan(&self, request: &DiffusionRequest, branches_at_once: usize) -> MemoryPlan;

    /// All that a request has encoded, in this order, pass by pass.
    fn inputs(&self, request: &DiffusionRequest) -> Vec<Inputs<Self::Input>>;

    /// Calls of [`DiffusionModel::encode_next`] that these inputs take.
    fn num_encode_steps(&self, inputs: &Inputs<Self::Input>) -> usize;

    /// Begins a pass over different inputs of one or several sessions, whose rows know nothing of each other.
    fn begin_encode(&self, pass: &Pass, rows: &[&Self::Input]) -> Result<Self::Encoding>;

    /// The next bounded part of a pass; with the last one what became of each row.
    fn encode_next(&self, encoding: &mut Self::Encoding) -> Result<Option<Vec<Self::Encoded>>>;

    /// What `expert` is conditioned on for each guidance branch, the positive one first, of what became of the request's
    /// inputs. Computes next to nothing.
    fn conditioning(
        &self,
        expert: Expert,
        encoded: &[Arc<Self::Encoded>],
        request: &DiffusionRequest,
    ) -> Result<Vec<Self::Conditioning>>;

    /// The sizes of a conditioning that rows of one batch must agree in.
    fn shape(&self, conditioning: &Self::Conditioning) -> Vec<usize>;

    /// Standard normal noise `[1, ...]` in f32, drawn in the order in which the diffusers pipeline draws it, already in the
    /// shape that `predict` takes.
    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor>;

    /// The steps of one session.
    fn course(&self, request: &DiffusionRequest) -> Result<Course>;

    /// One forward pass of `expert` over a batch of rows that share a shape but nothing else: row i has latents `[1, ...]`,
    /// its own timestep (in the solver's unit), its own conditioning and request. Returns the prediction of each row, f32.
    fn predict(&self, expert: Expert, rows: &[DenoiseRow<'_, Self::Conditioning>]) -> Result<Vec<Tensor>>;

    /// Begins to turn final latents, which `expert` made, into pixels.
    fn begin_decode(&self, expert: Expert, latents: &Tensor, request: &DiffusionRequest) -> Result<Self::Decoding>;

    /// How many calls of [`DiffusionModel::decode_next`] a request takes whose latents `expert` made.
    fn num_decode_steps(&self, expert: Expert, request: &DiffusionRequest) -> usize;

    /// Most frames of a request of which some pixels are there and others are not, between two such calls or in one.
    fn frames_under_way(&self, request: &DiffusionRequest) -> usize;

    /// The next pixels: whole frames, or a part of some. Every place comes once, and frames become whole in their order.
    fn decode_next(&self, decoding: &mut Self::Decoding) -> Result<Pixels>;

    /// The layers that take LoRA, where the family has any. The runner activates those of a step before it, and counts
    /// their bytes.
    fn adapters(&self) -> Option<&Adapters> {
        None
    }

    /// How it begins from an image, if it does.
    fn image_start(&self) -> Option<&dyn ImageStart<Self::Encoded>> {
        None
    }

    /// How its videos begin with a picture that is among their latents, if they do.
    fn picture_start(&self) -> Option<&dyn PictureStart<Self::Encoded>> {
        None
    }

    /// How it predicts where blocks may be skipped, if it does. Its card then says what it lets requests skip.
    fn cached_prediction(&self) -> Option<&dyn CachedPrediction<Self::Conditioning>> {
        None
    }

    /// How it shows previews, if it does.
    fn previews(&self) -> Option<&dyn Previews> {
        None
    }

    /// Its networks that compute in fewer than 32 bits, if there are any.
    fn narrow_networks(&self) -> Option<&dyn NarrowNetworks> {
        None
    }
}
