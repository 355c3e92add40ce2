//! A model of four latent values that can be told to fail.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};

use super::super::course::{Course, Expert};
use super::super::inputs::{Inputs, MAX_TEXTS_PER_PASS, Pass};
use super::super::loading::Loading;
use super::super::narrow::NarrowNetworks;
use super::super::previews::Previews;
use super::super::start::ImageStart;
use super::super::{DenoiseRow, DiffusionModel};
use crate::diffusion::Canvas;
use crate::diffusion::canvas::{CanvasSupport, FrameSupport, SizeRule};
use crate::diffusion::guidance::{GuidanceKind, GuidanceSupport};
use crate::diffusion::prompt::Prompts;
use crate::diffusion::sampling::SamplingSupport;
use crate::diffusion::{DiffusionCard, DiffusionRequest};
use crate::error::{Error, Result};
use crate::lora::LoraKey;
use crate::memory::MemoryPlan;
use crate::request::{Frame, Mask, Phase};
use crate::rng::TorchGenerator;
use crate::solver::Solver;
use crate::testing::flow_schedulers;
use crate::vae::tiling::Window;
use crate::vae::{Pixels, Posterior};

/// Prediction: `conditioning - latents * timestep / 1000`. The prompt's length is its conditioning. A prompt that
/// contains one of `encode`, `denoise`, `decode` goes wrong in that phase, in the way that it also contains: `error`,
/// `panic`, `nan`, or `overflow`, which is NaN where the model is not wide. A `late` wrong is that of the last chunk alone.
pub(super) struct Toy {
    pub(super) card: DiffusionCard,
    /// Encoded, conditioning and decoding values alive.
    pub(super) alive: Arc<AtomicUsize>,
    /// Expert and rows of each forward pass.
    pub(super) passes: Arc<Mutex<Vec<(Expert, usize)>>>,
    /// Prompts, and images as `picture` and the first value.
    pub(super) encoded: Arc<Mutex<Vec<String>>>,
    pub(super) takes_pictures: bool,
    pub(super) absent_is_empty: bool,
    pub(super) is_wide: bool,
    /// Steps of each pass over prompts.
    pub(super) encode_steps: usize,
    /// The timestep below which a second expert predicts: the negative of what the first one would.
    pub(super) boundary: Option<f64>,
    /// Of a model that was lent.
    pub(super) _held: Option<Held>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum ToyInput {
    Text(String),
    Image(Arc<Frame>),
}

pub(super) enum ToyEncoded {
    Text(Counted),
    Image(Posterior),
}

/// A pass with so many steps to go.
pub(super) struct ToyEncoding {
    rows: Vec<ToyInput>,
    steps_left: usize,
    _alive: Counted,
}

/// So many chunks of a clip of one colour are done.
pub(super) struct ToyDecoding {
    mean: Counted,
    canvas: Canvas,
    done: usize,
}

pub(super) struct Counted {
    pub(super) value: f32,
    prompt: String,
    alive: Arc<AtomicUsize>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Toy {
    pub(super) fn new() -> Self {
        let prompts = Prompts::Plain { default_length: 8, max_length: 8 };
        let canvas = CanvasSupport {
            default_width: 2,
            default_height: 2,
            size_multiple: 1,
            max_side: 8,
            max_pixels: 64,
            sizes: SizeRule::AspectOfPicture,
            frames: Some(FrameSupport {
                default_num_frames: 1,
                default_fps: 1,
                multiple: 1,
                max_frames: 8,
                trained_frames: 8,
                has_one_length: false,
            }),
        };
        let sampling = SamplingSupport { default_steps: 3, schedulers: flow_schedulers() };
        let guidance = GuidanceSupport::constant(GuidanceKind::ClassifierFree, 1.0);
        let card = DiffusionCard::new("toy", prompts, canvas, sampling, guidance);
        Self {
            card,
            alive: Arc::default(),
            passes: Arc::default(),
            encoded: Arc::default(),
            takes_pictures: true,
            absent_is_empty: true,
            is_wide: false,
            encode_steps: 1,
            boundary: None,
            _held: None,
        }
    }

    pub(super) fn wide() -> Self {
        Self { is_wide: true, ..Self::new() }
    }

    /// 1, or what the prompt wants to go wrong in this phase.
    fn factor(&self, prompt: &str, phase: &'static str) -> Result<f64> {
        match prompt.contains(phase) && prompt.contains("overflow") {
            true => Ok(if self.is_wide { 1.0 } else { f64::NAN }),
            false => factor(prompt, phase),
        }
    }

    fn counted(&self, value: f32, prompt: &str) -> Counted {
        self.alive.fetch_add(1, Ordering::Relaxed);
        Counted { value, prompt: prompt.to_owned(), alive: self.alive.clone() }
    }
}

/// 1, or what the prompt wants to go wrong in this phase.
fn factor(prompt: &str, phase: &'static str) -> Result<f64> {
    if !prompt.contains(phase) {
        return Ok(1.0);
    }
    match prompt {
        p if p.contains("error") => Err(Error::Device(format!("{phase} was told to fail"))),
        p if p.contains("panic") => panic!("{phase} was told to panic"),
        p if p.contains("nan") => Ok(f64::NAN),
        _ => Ok(1.0),
    }
}

struct Halving(Vec<f64>);

impl Solver for Halving {
    fn timesteps(&self) -> &[f64] {
        &self.0
    }

    fn add_noise(&self, index: usize, sample: &Tensor, noise: &Tensor) -> Result<Tensor> {
        Ok((sample + (noise * (self.0[index] / 1000.0))?)?)
    }

    fn predict_clean(&self, _: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        Ok((sample + model_output)?)
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, _: &mut TorchGenerator) -> Result<Tensor> {
        assert!(index < self.0.len());
        Ok((sample + (model_output * 0.5)?)?)
    }
}

impl DiffusionModel for Toy {
    type Input = ToyInput;
    type Encoding = ToyEncoding;
    type Encoded = ToyEncoded;
    type Conditioning = Counted;
    type Decoding = ToyDecoding;

    fn card(&self) -> &DiffusionCard {
        &self.card
    }

    fn plan(&self, request: &DiffusionRequest, branches_at_once: usize) -> MemoryPlan {
        MemoryPlan::new([(Phase::Denoise, branches_at_once * request.canvas.width * request.canvas.height * 4)])
    }

    fn inputs(&self, request: &DiffusionRequest) -> Vec<Inputs<ToyInput>> {
        let absent = self.absent_is_empty.then(String::new);
        let negative = request.guidance.negative_prompt.as_ref();
        let negative = negative.and_then(|negative| negative.text().map(str::to_owned).or(absent));
        let texts = std::iter::once(request.prompt.text.clone()).chain(negative);
        let pass = Pass {
            phase: Phase::Encode,
            components: &["text_encoder"],
            sequence_length: request.prompt.max_sequence_length,
            loras: Some(LoraKey::default()),
            max_rows: MAX_TEXTS_PER_PASS,
        };
        let texts = Inputs { pass, rows: texts.map(ToyInput::Text).collect() };
        let image = request
            .edit
            .as_ref()
            .map(|edit| Inputs { pass: Pass::of_image(), rows: vec![ToyInput::Image(edit.image.clone())] });
        std::iter::once(texts).chain(image).collect()
    }

    fn num_encode_steps(&self, inputs: &Inputs<ToyInput>) -> usize {
        match inputs.rows[0] {
            ToyInput::Text(_) => self.encode_steps,
            ToyInput::Image(_) => 1,
        }
    }

    fn begin_encode(&self, pass: &Pass, rows: &[&ToyInput]) -> Result<ToyEncoding> {
        let steps_left = if pass.phase == Phase::Encode { self.encode_steps } else { 1 };
        let rows = rows.iter().copied().cloned().collect();
        Ok(ToyEncoding { rows, steps_left, _alive: self.counted(0.0, "a pass") })
    }

    fn encode_next(&self, ToyEncoding { rows, steps_left, .. }: &mut ToyEncoding) -> Result<Option<Vec<ToyEncoded>>> {
        *steps_left = steps_left.checked_sub(1).expect("no more steps than promised");
        if *steps_left > 0 {
            return Ok(None);
        }
        let names = rows.iter().map(|row| match row {
            ToyInput::Text(prompt) => prompt.clone(),
            ToyInput::Image(image) => format!("picture {}", image.rgb[0]),
        });
        self.encoded.lock().expect("lock").push(names.collect::<Vec<_>>().join(", "));
        rows.iter().map(|row| self.encoded(row)).collect::<Result<Vec<_>>>().map(Some)
    }

    fn conditioning(
        &self,
        _expert: Expert,
        encoded: &[Arc<ToyEncoded>],
        request: &DiffusionRequest,
    ) -> Result<Vec<Counted>> {
        let texts = encoded.iter().filter_map(|encoded| match &**encoded {
            ToyEncoded::Text(Counted { value, prompt, .. }) => Some(self.counted(*value, prompt)),
            ToyEncoded::Image(_) => None,
        });
        let mut branches: Vec<Counted> = texts.collect();
        if request.guidance.negative_prompt.is_some() && branches.len() == 1 {
            branches.push(self.counted(-1.0, "absent"));
        }
        Ok(branches)
    }

    fn shape(&self, _: &Counted) -> Vec<usize> {
        Vec::new()
    }

    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor> {
        let (h, w) = (request.canvas.height, request.canvas.width);
        Ok(Tensor::from_vec(generator.randn(h * w), (1, 1, h, w), &Device::Cpu)?)
    }

    fn course(&self, request: &DiffusionRequest) -> Result<Course> {
        let steps = request.sampling.num_inference_steps;
        let timesteps = (0..steps).map(|i| 1000.0 - i as f64 * 1000.0 / steps as f64).collect();
        let solver = Box::new(Halving(timesteps));
        Ok(match self.boundary {
            Some(boundary) => Course::with_boundary(solver, boundary, 1),
            None => Course::of(solver),
        })
    }

    fn predict(&self, expert: Expert, rows: &[DenoiseRow<'_, Counted>]) -> Result<Vec<Tensor>> {
        self.passes.lock().expect("lock").push((expert, rows.len()));
        let sign = if expert == 0 { 1.0 } else { -1.0 };
        let predict = |row: &DenoiseRow<'_, Counted>| -> Result<Tensor> {
            let wanted = self.factor(&row.conditioning.prompt, "denoise")? * f64::from(row.conditioning.value);
            Ok((((row.latents * (-row.timestep / 1000.0))? + wanted)? * sign)?)
        };
        rows.iter().map(predict).collect()
    }

    fn begin_decode(&self, _expert: Expert, latents: &Tensor, request: &DiffusionRequest) -> Result<ToyDecoding> {
        let mean = self.counted(latents.mean_all()?.to_scalar::<f32>()?, &request.prompt.text);
        Ok(ToyDecoding { mean, canvas: request.canvas, done: 0 })
    }

    fn num_decode_steps(&self, _expert: Expert, request: &DiffusionRequest) -> usize {
        request.canvas.num_frames
    }

    fn frames_under_way(&self, request: &DiffusionRequest) -> usize {
        if request.prompt.text.contains("tiles") { request.canvas.num_frames } else { 1 }
    }

    fn decode_next(&self, ToyDecoding { mean, canvas, done }: &mut ToyDecoding) -> Result<Pixels> {
        let step = *done;
        *done += 1;
        assert!(*done <= canvas.num_frames, "no more chunks than promised");
        let is_right = mean.prompt.contains("late") && *done < canvas.num_frames;
        let factor = if is_right { 1.0 } else { self.factor(&mean.prompt, "decode")? };
        let value = f64::from(mean.value) * 0.01 * factor;
        let pixels = |frames: usize, height: usize, width: usize| {
            Tensor::ones((frames, 3, height, width), DType::F32, &Device::Cpu)? * value
        };
        if !mean.prompt.contains("tiles") {
            return Pixels::of_whole_frames(pixels(1, canvas.height, canvas.width)?, step);
        }
        assert_eq!(canvas.width, canvas.num_frames, "a column of all frames in each step");
        let window = Window { top: 0, left: step, height: canvas.height, width: 1 };
        Ok(Pixels { values: pixels(canvas.num_frames, canvas.height, 1)?, first_frame: 0, window })
    }

    fn image_start(&self) -> Option<&dyn ImageStart<ToyEncoded>> {
        self.takes_pictures.then_some(self as &dyn ImageStart<ToyEncoded>)
    }

    fn previews(&self) -> Option<&dyn Previews> {
        Some(self)
    }

    fn narrow_networks(&self) -> Option<&dyn NarrowNetworks> {
        Some(self)
    }
}

impl Toy {
    fn encoded(&self, input: &ToyInput) -> Result<ToyEncoded> {
        match input {
            ToyInput::Text(prompt) => {
                let value = factor(prompt, "encode")? * prompt.len() as f64;
                Ok(ToyEncoded::Text(self.counted(value as f32, prompt)))
            }
            ToyInput::Image(image) => {
                let Frame { width, height, rgb } = &**image;
                let red: Vec<f32> = rgb.iter().step_by(3).map(|value| f32::from(*value)).collect();
                let mean = Tensor::from_vec(red, (1, 1, *height, *width), &Device::Cpu)?;
                Ok(ToyEncoded::Image(Posterior { std: mean.ones_like()?.affine(0.5, 0.0)?, mean }))
            }
        }
    }
}

impl NarrowNetworks for Toy {
    fn components(&self, _phase: Phase, _expert: Expert) -> &'static [&'static str] {
        if self.is_wide { &[] } else { &["net"] }
    }
}

impl Previews for Toy {
    /// One pixel: the mean of the latents times ten.
    fn preview(&self, latents: &Tensor, _request: &DiffusionRequest) -> Result<Frame> {
        let mean = latents.mean_all()?.to_scalar::<f32>()?;
        Ok(Frame { width: 1, height: 1, rgb: vec![(mean * 10.0).round() as u8; 3] })
    }
}

/// Latents are the red values, give or take half; packed they are twice that.
impl ImageStart<ToyEncoded> for Toy {
    fn posterior<'a>(&self, encoded: &'a [Arc<ToyEncoded>]) -> &'a Posterior {
        let image = encoded.iter().find_map(|encoded| match &**encoded {
            ToyEncoded::Image(posterior) => Some(posterior),
            ToyEncoded::Text(_) => None,
        });
        image.expect("the image was encoded")
    }

    fn image_latents(&self, sample: &Tensor, _request: &DiffusionRequest) -> Result<Tensor> {
        Ok((sample * 2.0)?)
    }

    fn mask_latents(&self, mask: &Mask, _request: &DiffusionRequest) -> Result<Tensor> {
        let values: Vec<f32> = mask.grey.iter().map(|value| f32::from(u8::from(*value >= 128))).collect();
        Ok(Tensor::from_vec(values, (1, 1, mask.height, mask.width), &Device::Cpu)?)
    }
}

/// A model that arrives after so many steps.
pub(super) struct Arriving {
    model: Option<Toy>,
    total: usize,
    done: usize,
    /// The step that fails, from 1 on.
    fails_at: Option<usize>,
    held: Option<Held>,
}

/// Counts itself while it is there.
pub(super) struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Arriving {
    pub(super) fn new(model: Toy, total: usize) -> Self {
        Self { model: Some(model), total, done: 0, fails_at: None, held: None }
    }

    /// While it arrives, and while its model is there.
    pub(super) fn counted_in(mut self, held: &Arc<AtomicUsize>) -> Self {
        held.fetch_add(1, Ordering::Relaxed);
        self.held = Some(Held(held.clone()));
        self
    }
}

impl Arriving {
    pub(super) fn failing_at(self, step: Option<usize>) -> Self {
        Self { fails_at: step, ..self }
    }
}

impl Loading<Toy> for Arriving {
    fn num_steps(&self) -> usize {
        self.total
    }

    fn advance(&mut self) -> Result<Option<Toy>> {
        self.done += 1;
        if self.fails_at == Some(self.done) {
            return Err(Error::Device("a load was told to fail".into()));
        }
        if self.done < self.total {
            return Ok(None);
        }
        let model = self.model.take().expect("no more steps than promised");
        Ok(Some(Toy { _held: self.held.take(), ..model }))
    }
}
