//! Denoising steps of small pictures as recordings: the UNet is some two thousand kernels, and for a small picture a GPU
//! computes them faster than the host launches them.
//!
//! Owns: recordings by the shape of a step, and which steps are recorded. Does not know: sessions, what is computed.

use std::cell::RefCell;
use std::collections::VecDeque;

use candle_core::{DType, Tensor};
use tale_kernels::{Recording, can_record, copy_into};

use super::unet::{PreparedInput, UNet, UNetInput};
use crate::error::Result;

/// Most recordings of one model; the one used longest ago goes first. Each keeps the memory of its step's activations.
pub const MAX_RECORDINGS: usize = 4;
/// Most latent positions, over all rows, of a step that is recorded: two rows of a picture of 512x512. The published UNet
/// then has 3.4 TFLOP to compute, under ten milliseconds of a Hopper GPU, about what its launches take.
pub const MAX_POSITIONS: usize = 2 * 64 * 64;

/// The recorded steps of one UNet.
#[derive(Debug, Default)]
pub struct DenoiseRecordings {
    /// The one used last comes last.
    recordings: RefCell<VecDeque<Recorded>>,
}

#[derive(Debug)]
struct Recorded {
    /// Its tensors have the addresses that were recorded.
    input: PreparedInput,
    prediction: Tensor,
    recording: Recording,
}

impl DenoiseRecordings {
    /// As [`UNet::forward`]: recorded where that is possible and pays.
    pub fn forward(&self, unet: &UNet, input: &UNetInput<'_>) -> Result<Tensor> {
        let (rows, _, height, width) = input.latents.dims4()?;
        if !can_record(input.latents) || rows * height * width > MAX_POSITIONS {
            return unet.forward(input);
        }
        let prepared = unet.prepare(input)?;
        let mut recordings = self.recordings.borrow_mut();
        let place = recordings.iter().position(|recorded| recorded.has_shapes_of(&prepared));
        let recorded = match place.and_then(|place| recordings.remove(place)) {
            Some(recorded) => {
                recorded.replay(&prepared)?;
                recorded
            }
            None => Recorded::new(unet, &prepared)?,
        };
        // A copy: the next step writes where this one's prediction lies.
        let prediction = recorded.prediction.copy()?.to_dtype(DType::F32)?;
        if recordings.len() == MAX_RECORDINGS {
            recordings.pop_front();
        }
        recordings.push_back(recorded);
        Ok(prediction)
    }

    /// How many steps are recorded.
    pub fn len(&self) -> usize {
        self.recordings.borrow().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Recorded {
    /// Computes the step, which loads every kernel that it needs, and records it for the next ones. Its inputs are copies:
    /// those of a lone row are the caller's own tensors, and a replay writes where the recorded ones lie.
    fn new(unet: &UNet, input: &PreparedInput) -> Result<Self> {
        let input = input.copy()?;
        let prediction = unet.compute(&input)?.copy()?;
        let recording = Recording::of(&prediction, || {
            let again = unet.compute(&input).map_err(candle_core::Error::wrap)?;
            copy_into(&again, &prediction)
        })?;
        Ok(Self { input, prediction, recording })
    }

    fn has_shapes_of(&self, other: &PreparedInput) -> bool {
        self.input.tensors().iter().map(|ours| ours.dims()).eq(other.tensors().iter().map(|theirs| theirs.dims()))
    }

    fn replay(&self, with: &PreparedInput) -> Result<()> {
        for (to, from) in self.input.tensors().iter().zip(with.tensors()) {
            copy_into(from, to)?;
        }
        Ok(self.recording.replay()?)
    }
}
