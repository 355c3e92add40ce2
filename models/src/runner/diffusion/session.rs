//! One session of the runner: its request, what it has become so far, and what its next step is.
//!
//! Owns: the stages and the way from one to the next. Does not know: other sessions, and when its steps are taken; what
//! happens between two denoising steps (`denoising`).

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Tensor;

use super::batcher::{Layers, MendKey, ShapeKey, StepKey, canvas_key};
use super::course::{Expert, FIRST_EXPERT};
use super::denoising::{Advanced, Denoising};
use super::inputs::Inputs;
use super::model::DiffusionModel;
use super::passes::{Finished, PassId};
use super::pixels::FramesUnderWay;
use crate::diffusion::DiffusionRequest;
use crate::error::Result;
use crate::lora::{AdapterSet, LoraKey};
use crate::request::{ClientId, Frame, Phase, SessionId};
use crate::session_checkpoint::{Digest, SessionCheckpoint};

/// The sets of terms that a session holds.
pub(super) type Held = Vec<(Layers, Arc<AdapterSet>)>;

pub(super) struct Session<M: DiffusionModel> {
    pub(super) client: ClientId,
    pub(super) request: DiffusionRequest,
    pub(super) started: bool,
    /// Left out of steps, and of the queue for them.
    pub(super) is_paused: bool,
    /// Guidance branches that go through the denoiser in one pass, as planned.
    pub(super) branches_at_once: usize,
    /// Predictions that came from caches, once denoising is done.
    pub(super) skipped_passes: usize,
    /// The terms of its request that are on the device, by whose layers they are for.
    pub(super) adapters: Held,
    pub(super) stage: Stage<M>,
    /// The phase whose last result is to be made once more, in f32.
    pub(super) mending: Option<Phase>,
    /// Chunks whose frames are out, where decoding began once more.
    pub(super) told: usize,
    /// Frames that are out.
    pub(super) frames_done: usize,
    /// Where its denoising goes on from, once everything is encoded.
    pub(super) resumed: Option<Arc<SessionCheckpoint>>,
    /// What its request is known by, once somebody has asked.
    pub(super) digest: Option<Digest>,
}

pub(super) enum Stage<M: DiffusionModel> {
    Encode(Encode<M>),
    Denoise(Denoising<M::Conditioning>),
    /// Final ones; decoding has not begun.
    Latents(Latents),
    Decode {
        latents: Latents,
        decoding: M::Decoding,
        frames: FramesUnderWay,
        done: usize,
    },
}

/// What a session still has to encode, and what it has.
pub(super) struct Encode<M: DiffusionModel> {
    /// At least one.
    inputs: VecDeque<Inputs<M::Input>>,
    /// The pass over the first of them, once it is under way.
    under_way: Option<PassId>,
    encoded: Vec<Arc<M::Encoded>>,
    /// Steps done, and steps in all, of each kind.
    progress: Vec<(Phase, usize, usize)>,
}

/// Final latents, and who made them.
#[derive(Clone)]
pub(super) struct Latents {
    pub(super) values: Tensor,
    pub(super) expert: Expert,
}

impl<M: DiffusionModel> Session<M> {
    pub(super) fn new(client: ClientId, request: DiffusionRequest, branches_at_once: usize, model: &M) -> Self {
        let stage = Stage::Encode(Encode::new(model, &request));
        Self {
            client,
            request,
            started: false,
            is_paused: false,
            branches_at_once,
            adapters: Held::new(),
            skipped_passes: 0,
            stage,
            mending: None,
            told: 0,
            frames_done: 0,
            resumed: None,
            digest: None,
        }
    }

    pub(super) fn step_key(&self, id: SessionId, model: &M) -> StepKey<M::Input> {
        match &self.stage {
            Stage::Encode(encode) => match encode.under_way {
                Some(pass) => StepKey::GoOnEncoding(pass, encode.next().pass.phase),
                None => StepKey::Encode(encode.next().clone()),
            },
            Stage::Denoise(denoising) => StepKey::Denoise(ShapeKey {
                canvas: canvas_key(&self.request.canvas),
                conditioning: model.shape(&denoising.conditioning()[0]),
                cache: self.request.cache.as_ref().map(|cache| cache.method()),
                loras: LoraKey::of(&self.request.loras),
                expert: denoising.expert(),
            }),
            Stage::Latents(_) | Stage::Decode { .. } => StepKey::VaeDecode(id),
        }
    }

    /// Who denoises in the next step, or made the latents; the first expert before that.
    pub(super) fn expert(&self) -> Expert {
        match &self.stage {
            Stage::Encode(_) => FIRST_EXPERT,
            Stage::Denoise(denoising) => denoising.expert(),
            Stage::Latents(latents) | Stage::Decode { latents, .. } => latents.expert,
        }
    }

    /// The networks in f32 that it is mended with.
    pub(super) fn mend_key(&self) -> Option<MendKey> {
        self.mending.map(|phase| (self.expert(), phase))
    }

    /// From now on the last result of `phase` is made once more. All chunks are decoded again: one depends on those before
    /// it, which were narrow too.
    pub(super) fn begin_mending(&mut self, phase: Phase) {
        self.mending = Some(phase);
        if let Stage::Decode { latents, done, .. } = &self.stage {
            self.told = done - 1;
            self.stage = Stage::Latents(latents.clone());
        }
    }

    /// Its prediction has been made once more.
    pub(super) fn end_mending(&mut self) {
        self.mending = None;
        self.adapters.retain(|(layers, _)| !matches!(layers, Layers::InF32(_)));
    }

    /// What it encodes next, or is encoding.
    pub(super) fn next_inputs(&self) -> Option<&Inputs<M::Input>> {
        match &self.stage {
            Stage::Encode(encode) => Some(encode.next()),
            _ => None,
        }
    }

    /// The pass that it takes part in.
    pub(super) fn pass_under_way(&self) -> Option<PassId> {
        match &self.stage {
            Stage::Encode(encode) => encode.under_way,
            _ => None,
        }
    }

    pub(super) fn encode_mut(&mut self) -> &mut Encode<M> {
        let Stage::Encode(encode) = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        encode
    }

    /// Begins to denoise if everything is encoded.
    pub(super) fn finish_encoding(&mut self, model: &M) -> Result<()> {
        let Stage::Encode(encode) = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        if encode.inputs.is_empty() {
            let encoded = std::mem::take(&mut encode.encoded);
            let begun = Denoising::begin(model, &self.request, &encoded)?;
            self.stage = Stage::Denoise(self.gone_on(begun)?);
            // The encoders may go now, and what is in their layers with them.
            self.adapters.retain(|(layers, _)| *layers != Layers::OfLentEncoders);
        }
        Ok(())
    }

    pub(super) fn denoising(&self) -> &Denoising<M::Conditioning> {
        let Stage::Denoise(denoising) = &self.stage else { unreachable!("{STAGE_FITS}") };
        denoising
    }

    pub(super) fn denoising_mut(&mut self) -> &mut Denoising<M::Conditioning> {
        let Stage::Denoise(denoising) = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        denoising
    }

    /// Rows that the next step adds to a denoising batch; none where it is of another kind.
    pub(super) fn num_rows(&self) -> usize {
        match &self.stage {
            Stage::Denoise(denoising) => denoising.num_rows(&self.request),
            _ => 0,
        }
    }

    /// Moves the latents one timestep on: steps done, and steps in all. After the last one only the latents are kept.
    pub(super) fn advance(&mut self, prediction: &Tensor) -> Result<(usize, usize)> {
        let denoising = self.denoising_mut();
        let expert = denoising.expert();
        let advanced = denoising.advance(prediction)?;
        let progress = denoising.progress();
        if let Advanced::ToTheEnd(values) = advanced {
            self.skipped_passes = denoising.skipped_passes();
            self.stage = Stage::Latents(Latents { values, expert });
        }
        Ok(progress)
    }

    /// The frames that are whole with the next pixels, `None` where one of these is not finite, and how many chunks are done with
    /// them.
    pub(super) fn decode_next(&mut self, model: &M) -> Result<(Option<Vec<Frame>>, usize)> {
        if let Stage::Latents(latents) = &self.stage {
            let latents = latents.clone();
            let decoding = model.begin_decode(latents.expert, &latents.values, &self.request)?;
            let frames = FramesUnderWay::new(&self.request.canvas);
            self.stage = Stage::Decode { latents, decoding, frames, done: 0 };
        }
        let Stage::Decode { decoding, frames, done, .. } = &mut self.stage else { unreachable!("{STAGE_FITS}") };
        let whole = frames.take(&model.decode_next(decoding)?)?;
        *done += 1;
        Ok((whole, *done))
    }
}

impl<M: DiffusionModel> Encode<M> {
    fn new(model: &M, request: &DiffusionRequest) -> Self {
        let inputs = VecDeque::from(model.inputs(request));
        assert!(!inputs.is_empty(), "a family encodes a prompt at least: this is a bug of the family");
        let mut progress: Vec<(Phase, usize, usize)> = Vec::new();
        for of_pass in &inputs {
            let (phase, steps) = (of_pass.pass.phase, model.num_encode_steps(of_pass));
            match progress.iter_mut().find(|(of, ..)| *of == phase) {
                Some((.., total)) => *total += steps,
                None => progress.push((phase, 0, steps)),
            }
        }
        Self { inputs, under_way: None, encoded: Vec::new(), progress }
    }

    fn next(&self) -> &Inputs<M::Input> {
        self.inputs.front().expect("denoising begins with the last input: this is a bug")
    }

    /// After a step of the pass over its next inputs: steps done and steps in all of that kind. `finished` is what the
    /// pass has made, if that was its last step.
    pub(super) fn advance(&mut self, pass: PassId, finished: Option<&Finished<M>>) -> (usize, usize) {
        let phase = self.next().pass.phase;
        self.under_way = Some(pass);
        if let Some(finished) = finished {
            let inputs = self.inputs.pop_front().expect(STAGE_FITS);
            self.encoded.extend(inputs.rows.iter().map(|row| finished.of(row)));
            self.under_way = None;
        }
        let (_, done, total) =
            self.progress.iter_mut().find(|(of, ..)| *of == phase).expect("counted at the beginning: this is a bug");
        *done += 1;
        (*done, *total)
    }
}

pub(super) const STAGE_FITS: &str = "a session is in the stage that its step key names: this is a bug";
