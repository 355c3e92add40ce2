//! The effective parameters of a picture: what answers echo, and what a PNG file remembers of how it was made.
//!
//! As JSON they are a body that `POST /v1/images/generations` takes as it is and answers with the same picture. One list
//! for the answer, the file and the way back, so that none of them can forget a field.

use serde::{Deserialize, Serialize};
use tale_models::card::DiffusionOptions;
use tale_models::diffusion::{Acceleration, DiffusionRequest};
use tale_models::lora::LoraOption;
use tale_models::solver::names::Spacing;

/// Keyword of the PNG text that holds them.
pub const KEYWORD: &str = "parameters";

/// Everything that decides what a picture looks like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct PictureParameters {
    /// The name under which the model was served; on the command line the name of its folder.
    pub model: String,
    pub prompt: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    pub width: usize,
    pub height: usize,
    pub num_inference_steps: usize,
    pub guidance_scale: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub true_cfg_scale: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance_interval: Option<[f64; 2]>,
    #[serde(default)]
    pub acceleration: Acceleration,
    pub scheduler: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestep_spacing: Option<Spacing>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<f64>,
    pub max_sequence_length: usize,
    pub vae_tiling: bool,
    /// Of a picture that was made from another one, which has to be given again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
    /// Of a picture that followed reference pictures, which have to be given again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_adapter_scale: Option<f64>,
    /// Of a picture that a refiner has finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denoising_end: Option<f64>,
    pub seed: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<LoraParameter>,
}

/// One LoRA of a picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraParameter {
    /// Its file without `.safetensors`.
    pub name: String,
    /// 1 is what its author meant.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

impl From<LoraParameter> for LoraOption {
    fn from(LoraParameter { name, weight }: LoraParameter) -> Self {
        Self { name, weight }
    }
}

impl PictureParameters {
    /// Of a request to the model of this name.
    pub fn new(model: &str, request: &DiffusionRequest) -> Self {
        Self {
            model: model.to_owned(),
            prompt: request.prompt.text.clone(),
            negative_prompt: request
                .guidance
                .negative_prompt
                .as_ref()
                .and_then(|prompt| prompt.text())
                .map(str::to_owned),
            width: request.canvas.width,
            height: request.canvas.height,
            num_inference_steps: request.sampling.num_inference_steps,
            guidance_scale: request.guidance.guidance_scale,
            true_cfg_scale: request.guidance.true_cfg_scale,
            // Without a negative prediction there is no part of the steps to speak of.
            guidance_interval: request.guidance.negative_prompt.is_some().then_some(request.guidance.interval),
            acceleration: request.acceleration,
            scheduler: request.sampling.scheduler.name.to_owned(),
            timestep_spacing: request.sampling.timestep_spacing,
            eta: request.sampling.eta,
            max_sequence_length: request.prompt.max_sequence_length,
            vae_tiling: request.vae_tiling,
            strength: request.edit.as_ref().map(|edit| edit.strength),
            ip_adapter_scale: request.references.as_ref().map(|references| references.scale),
            denoising_end: request.refinement.map(|refinement| refinement.denoising_end),
            seed: request.sampling.seed,
            loras: request.loras.iter().map(|l| LoraParameter { name: l.name.clone(), weight: l.weight }).collect(),
        }
    }

    /// The same for one picture of several.
    pub fn with_seed(&self, seed: u64) -> Self {
        Self { seed, ..self.clone() }
    }

    /// What a client would say to have the same picture again.
    pub fn into_options(self) -> DiffusionOptions {
        DiffusionOptions {
            prompt: self.prompt,
            negative_prompt: self.negative_prompt,
            width: Some(self.width),
            height: Some(self.height),
            num_frames: None,
            fps: None,
            num_inference_steps: Some(self.num_inference_steps),
            guidance_scale: Some(self.guidance_scale),
            true_cfg_scale: self.true_cfg_scale,
            guidance_interval: self.guidance_interval,
            acceleration: Some(self.acceleration),
            scheduler: Some(self.scheduler),
            timestep_spacing: self.timestep_spacing,
            eta: self.eta,
            seed: Some(self.seed),
            max_sequence_length: Some(self.max_sequence_length),
            vae_tiling: Some(self.vae_tiling),
            reference_images: Vec::new(),
            ip_adapter_scale: self.ip_adapter_scale,
            loras: self.loras.into_iter().map(LoraOption::from).collect(),
            partial_images: None,
            image: None,
            mask: None,
            strength: self.strength,
            denoising_end: self.denoising_end,
        }
    }

    /// The text of a PNG file.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers and text are always JSON: this is a bug")
    }
}
