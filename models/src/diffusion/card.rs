//! What a model of images or videos can do: one part for each capability.
//!
//! Owns: the card, and the order in which a request is validated. What each parameter means stands with its capability.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::frame::Frame;
use crate::lora::LoraSupport;
use crate::parameter::{IMAGES, Options, VIDEOS};
use crate::solver::schedulers::Schedulers;

use super::acceleration::{self, CacheSupport};
use super::canvas::CanvasSupport;
use super::edit::{self, EditSupport, IMAGE};
use super::guidance::GuidanceSupport;
use super::keyframes::{self, INPUT_REFERENCE, KeyframeSupport, LAST_IMAGE};
use super::loras;
use super::parameters::PARAMETERS;
use super::previews::PARTIAL_IMAGES;
use super::prompt::Prompts;
use super::references::References;
use super::refinement::Refinement;
use super::sampling::{SCHEDULER, SamplingSupport};
use super::shots;
use super::tiling::VaeTiling;
use super::{Canvas, DiffusionRequest};

/// Card of an image or video model.
#[derive(Debug, Clone)]
pub struct DiffusionCard {
    /// Family name, as in the table of families.
    pub family: &'static str,
    /// What the text encoders make of prompts.
    pub prompts: Prompts,
    /// Sizes and lengths.
    pub canvas: CanvasSupport,
    /// Steps and schedulers.
    pub sampling: SamplingSupport,
    /// How guidance enters.
    pub guidance: GuidanceSupport,
    /// What `acceleration` means; `None` where nothing can be skipped.
    pub acceleration: Option<CacheSupport>,
    /// Which LoRAs there are to choose from.
    pub loras: LoraSupport,
    /// When the VAE works in tiles; `None` where it has none.
    pub tiling: Option<VaeTiling>,
    /// How it makes images from images; `None` where it does not.
    pub edits: Option<EditSupport>,
    /// Which pictures its videos begin and end with; `None` where it makes them from text alone.
    pub keyframes: Option<KeyframeSupport>,
    /// Whether it follows reference images.
    pub has_ip_adapter: bool,
    /// The solvers of its refiner, where it is served with one.
    pub refiner: Option<Schedulers>,
}

/// What a diffusion model makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// One frame.
    Image,
    /// Frames in time.
    Video,
}

impl DiffusionCard {
    /// A model that begins from noise and has no optional capability.
    pub fn new(
        family: &'static str,
        prompts: Prompts,
        canvas: CanvasSupport,
        sampling: SamplingSupport,
        guidance: GuidanceSupport,
    ) -> Self {
        Self {
            family,
            prompts,
            canvas,
            sampling,
            guidance,
            acceleration: None,
            loras: LoraSupport::Unsupported,
            tiling: None,
            edits: None,
            keyframes: None,
            has_ip_adapter: false,
            refiner: None,
        }
    }

    /// What it makes.
    pub fn medium(&self) -> Medium {
        match self.canvas.frames {
            None => Medium::Image,
            Some(_) => Medium::Video,
        }
    }

    /// What the plainest request asks for: nothing but what the model cannot do without, which is a scheduler where it has
    /// none of its own, and pictures (black ones of its default size) where it takes some.
    pub fn plainest(&self) -> Options {
        let schedulers = &self.sampling.schedulers;
        let first = schedulers.iter().next().filter(|_| schedulers.own().is_none());
        let CanvasSupport { default_width, default_height, .. } = self.canvas;
        let picture = || Arc::new(Frame::black(default_width, default_height));
        let begins_from_one = self.edits.is_some_and(|edits| edits.is_needed);
        Options::default()
            .with(&SCHEDULER, first.map(|scheduler| scheduler.name.to_owned()))
            .with(&IMAGE, begins_from_one.then(picture))
            .with(&INPUT_REFERENCE, self.keyframes.map(|_| picture()))
            .with(&LAST_IMAGE, (self.keyframes == Some(KeyframeSupport::FirstAndLast)).then(picture))
    }

    /// The card on a device that has so many bytes for work beside all weights.
    pub fn with_room(mut self, room_bytes: usize) -> Self {
        self.tiling = self.tiling.map(|tiling| VaeTiling { room_bytes: Some(room_bytes), ..tiling });
        self
    }

    /// Validates everything and fills in defaults. `fallback_seed` is used when the client gave none. Resizes an input
    /// image, which takes time.
    pub fn resolve(&self, options: &Options, fallback_seed: u64) -> Result<DiffusionRequest> {
        options.check(PARAMETERS.iter().copied())?;
        self.check_medium(options)?;
        let prompt = self.prompts.resolve(options)?;
        let edit = edit::asked(self.edits.as_ref(), options)?;
        let keyframes = keyframes::asked(self.keyframes, options)?;
        let sampling = self.sampling.resolve(options, fallback_seed)?;
        let references = References::resolve(self.has_ip_adapter, options)?;
        let loras = loras::resolve(&self.loras, options)?;
        let of_edit = edit.as_ref().map(|edit| (IMAGE.declaration.name, edit.image_size()));
        let of_keyframes =
            keyframes.as_ref().map(|keyframes| (INPUT_REFERENCE.declaration.name, keyframes.own_size(&self.canvas)));
        let num_pictures = keyframes.as_ref().map_or(0, |keyframes| keyframes.count());
        let shot = self.canvas.frames.map(|frames| shots::resolve(&frames, self.keyframes, num_pictures, options));
        let shot = shot.transpose()?;
        let num_frames = shot.as_ref().map_or(1, |shot| shot.num_frames);
        let canvas = self.canvas.resolve(options, of_edit.or(of_keyframes), num_frames)?;
        let keyframes = keyframes.map(|keyframes| keyframes.resolve(&canvas)).transpose()?;
        let guidance = self.guidance.resolve(options, edit.as_ref().map(|edit| edit.guidance_scale))?;
        let num_frames = shot.as_ref().map_or(1, |shot| shot.longest_part());
        let at_once = Canvas { num_frames, ..canvas };
        let (acceleration, cache) = acceleration::resolve(self.acceleration.as_ref(), options, &at_once, &sampling)?;
        let edit = edit.map(|edit| edit.resolve(&canvas, sampling.num_inference_steps)).transpose()?;
        let own = &self.sampling.schedulers;
        let refinement = Refinement::resolve(options, &sampling, own, self.refiner.as_ref(), edit.is_some())?;
        let held_bytes = self.loras.footprint_bytes(&loras);
        let vae_tiling = VaeTiling::resolve(self.tiling.as_ref(), options, &at_once, held_bytes)?;
        let partial_images = options.get(&PARTIAL_IMAGES).unwrap_or(0);
        let request = DiffusionRequest {
            prompt,
            canvas,
            sampling,
            guidance,
            acceleration,
            cache: cache.map(Arc::new),
            loras,
            vae_tiling,
            partial_images,
            edit,
            references,
            keyframes,
            shot,
            refinement,
        };
        self.guidance.check_steps(&request.guidance, request.steps_made())?;
        Ok(request)
    }

    /// Refuses parameters that are for the other medium.
    fn check_medium(&self, options: &Options) -> Result<()> {
        let (tasks, makes) = match self.medium() {
            Medium::Image => (IMAGES, "images"),
            Medium::Video => (VIDEOS, "videos"),
        };
        let is_other = |tasks_of: &[_]| !tasks.iter().any(|task| tasks_of.contains(task));
        let other = PARAMETERS.iter().find(|of| options.value(of).is_some() && is_other(of.tasks));
        match other {
            None => Ok(()),
            Some(other) => Err(Error::invalid(other.name, format!("this model makes {makes}; leave it out"))),
        }
    }
}
