//! The runner's rules, on a model of four latent values that can be told to fail.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{Device, Tensor};

use super::batcher::PictureInput;
use super::*;
use crate::diffusion::DiffusionCard;
use crate::diffusion::canvas::{CanvasSupport, FrameSupport};
use crate::diffusion::guidance::{GuidanceKind, GuidanceSupport};
use crate::diffusion::prompt::Prompts;
use crate::diffusion::sampling::SamplingSupport;
use crate::diffusion::{Canvas, Prompt, Sampling};
use crate::diffusion::{Edit, NegativePrompt};
use crate::request::{Frame, Mask, SamplingParams, TextRequest};
use crate::rng::TorchGenerator;
use crate::solver::Solver;
use crate::solver::names::Scheduler;
use crate::testing::flow_schedulers;

/// Prediction: `conditioning - latents * timestep / 1000`. The prompt's length is its conditioning. A prompt that
/// contains one of `encode`, `denoise`, `decode` goes wrong in that phase, in the way that it also contains: `error`,
/// `panic`, `nan`, or `overflow`, which is NaN where the model is not wide. A `late` wrong is that of the last chunk alone.
struct Toy {
    card: DiffusionCard,
    /// Conditioning and decoding values alive.
    alive: Arc<AtomicUsize>,
    /// Rows of each forward pass.
    passes: Arc<Mutex<Vec<usize>>>,
    /// Prompts, and pictures as `picture` and the first value.
    encoded: Arc<Mutex<Vec<String>>>,
    takes_pictures: bool,
    absent_is_empty: bool,
    is_wide: bool,
}

struct Counted {
    value: f32,
    prompt: String,
    alive: Arc<AtomicUsize>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Toy {
    fn new() -> Self {
        let prompts = Prompts::Plain { default_length: 8, max_length: 8 };
        let canvas = CanvasSupport {
            default_width: 2,
            default_height: 2,
            size_multiple: 1,
            max_side: 8,
            max_pixels: 64,
            frames: Some(FrameSupport { default_num_frames: 1, default_fps: 1, multiple: 1, max_frames: 8 }),
        };
        let sampling = SamplingSupport { default_steps: 3, schedulers: flow_schedulers() };
        let guidance = GuidanceSupport { kind: GuidanceKind::ClassifierFree, default_scale: 1.0 };
        let card = DiffusionCard::new("toy", prompts, canvas, sampling, guidance);
        Self {
            card,
            alive: Arc::default(),
            passes: Arc::default(),
            encoded: Arc::default(),
            takes_pictures: true,
            absent_is_empty: true,
            is_wide: false,
        }
    }

    fn wide() -> Self {
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
    type Conditioning = Counted;
    type Decoding = (Counted, usize);

    fn card(&self) -> &DiffusionCard {
        &self.card
    }

    fn plan(&self, request: &DiffusionRequest) -> MemoryPlan {
        MemoryPlan::new([(Phase::Denoise, request.canvas.width * request.canvas.height * 4)])
    }

    fn encode(&self, prompts: &[&str], _request: &DiffusionRequest) -> Result<Vec<Counted>> {
        self.encoded.lock().expect("lock").push(prompts.join(", "));
        let encode = |prompt: &&str| {
            let value = factor(prompt, "encode")? * prompt.len() as f64;
            Ok(self.counted(value as f32, prompt))
        };
        prompts.iter().map(encode).collect()
    }

    fn absent_is_empty(&self) -> bool {
        self.absent_is_empty
    }

    fn encode_absent(&self, _request: &DiffusionRequest) -> Result<Counted> {
        Ok(self.counted(-1.0, "absent"))
    }

    fn initial_latents(&self, request: &DiffusionRequest, generator: &mut TorchGenerator) -> Result<Tensor> {
        let (h, w) = (request.canvas.height, request.canvas.width);
        Ok(Tensor::from_vec(generator.randn(h * w), (1, 1, h, w), &Device::Cpu)?)
    }

    fn solver(&self, request: &DiffusionRequest) -> Result<Box<dyn Solver>> {
        let steps = request.sampling.num_inference_steps;
        Ok(Box::new(Halving((0..steps).map(|i| 1000.0 - i as f64 * 1000.0 / steps as f64).collect())))
    }

    fn predict(&self, rows: &[DenoiseRow<'_, Counted>]) -> Result<Vec<Tensor>> {
        self.passes.lock().expect("lock").push(rows.len());
        let predict = |row: &DenoiseRow<'_, Counted>| -> Result<Tensor> {
            let wanted = self.factor(&row.conditioning.prompt, "denoise")? * f64::from(row.conditioning.value);
            Ok(((row.latents * (-row.timestep / 1000.0))? + wanted)?)
        };
        rows.iter().map(predict).collect()
    }

    fn narrow_components(&self, _phase: Phase) -> &'static [&'static str] {
        if self.is_wide { &[] } else { &["net"] }
    }

    /// One pixel: the mean of the latents times ten.
    fn preview(&self, latents: &Tensor, _request: &DiffusionRequest) -> Result<Option<Frame>> {
        let mean = latents.mean_all()?.to_scalar::<f32>()?;
        Ok(Some(Frame { width: 1, height: 1, rgb: vec![(mean * 10.0).round() as u8; 3] }))
    }

    fn begin_decode(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<(Counted, usize)> {
        let mean = latents.mean_all()?.to_scalar::<f32>()?;
        Ok((self.counted(mean, &request.prompt.text), request.canvas.num_frames))
    }

    fn num_decode_steps(&self, request: &DiffusionRequest) -> usize {
        request.canvas.num_frames
    }

    fn decode_next(&self, (mean, left): &mut (Counted, usize)) -> Result<Option<Tensor>> {
        *left = left.checked_sub(1).expect("no more chunks than promised");
        let is_right = mean.prompt.contains("late") && *left > 0;
        let factor = if is_right { 1.0 } else { self.factor(&mean.prompt, "decode")? };
        let value = f64::from(mean.value) * 0.01 * factor;
        if mean.prompt.contains("tiles") && *left > 0 {
            return Ok(None);
        }
        Ok(Some((Tensor::ones((1, 3, 2, 2), candle_core::DType::F32, &Device::Cpu)? * value)?))
    }

    fn picture_model(&self) -> Option<&dyn PictureModel> {
        self.takes_pictures.then_some(self as &dyn PictureModel)
    }
}

/// Latents are the red values, give or take half; packed they are twice that.
impl PictureModel for Toy {
    fn encode_picture(&self, input: &PictureInput) -> Result<Posterior> {
        let Frame { width, height, rgb } = &*input.picture;
        self.encoded.lock().expect("lock").push(format!("picture {}", rgb[0]));
        let red: Vec<f32> = rgb.iter().step_by(3).map(|value| f32::from(*value)).collect();
        let mean = Tensor::from_vec(red, (1, 1, *height, *width), &Device::Cpu)?;
        Ok(Posterior { std: mean.ones_like()?.affine(0.5, 0.0)?, mean })
    }

    fn picture_latents(&self, sample: &Tensor, _request: &DiffusionRequest) -> Result<Tensor> {
        Ok((sample * 2.0)?)
    }

    fn mask_latents(&self, mask: &Mask, _request: &DiffusionRequest) -> Result<Tensor> {
        let values: Vec<f32> = mask.grey.iter().map(|value| f32::from(u8::from(*value >= 128))).collect();
        Ok(Tensor::from_vec(values, (1, 1, mask.height, mask.width), &Device::Cpu)?)
    }
}

/// From a picture of four red values, without the first of three steps.
fn edit(red: [u8; 4], mask: Option<[u8; 4]>, seed: u64) -> DiffusionRequest {
    let rgb = red.iter().flat_map(|value| [*value, 0, 0]).collect();
    let image = Arc::new(Frame { width: 2, height: 2, rgb });
    let mask = mask.map(|grey| Arc::new(Mask { width: 2, height: 2, grey: grey.to_vec() }));
    with(request("one", seed), |request| request.edit = Some(Edit { image, mask, strength: 0.7, first_step: 1 }))
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|x| x.to_vec1()).expect("values")
}

/// `latents` of a session after its inputs are encoded and so many denoising steps.
fn latents_after(request: &DiffusionRequest, denoise_steps: usize) -> Vec<f32> {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, request.clone());
    (0..2 + denoise_steps).for_each(|_| drop(step(&mut runner)));
    match &runner.session(SessionId(1)).stage {
        Stage::Denoise(denoising) => values(&denoising.latents),
        Stage::Latents(latents) => values(latents),
        _ => panic!("denoising has begun and pixels have not"),
    }
}

fn request(prompt: &str, seed: u64) -> DiffusionRequest {
    let prompt = Prompt { text: prompt.into(), max_sequence_length: 8 };
    let canvas = Canvas { width: 2, height: 2, num_frames: 2, fps: 1 };
    let scheduler = Scheduler::named("flow_euler").expect("known");
    DiffusionRequest::new(prompt, canvas, Sampling::new(scheduler, 3, seed))
}

/// A request with some changes.
fn with(mut request: DiffusionRequest, change: impl FnOnce(&mut DiffusionRequest)) -> DiffusionRequest {
    change(&mut request);
    request
}

fn guided(prompt: &str, negative: &str) -> DiffusionRequest {
    let negative = NegativePrompt::Text(negative.into());
    with(request(prompt, 1), |request| {
        request.guidance.negative_prompt = Some(negative);
        request.guidance.guidance_scale = 3.0;
    })
}

fn submit(runner: &mut DiffusionRunner<Toy>, id: u64, request: DiffusionRequest) {
    runner.submit(SessionId(id), Request::Diffusion(request)).expect("there is room");
}

/// Steps as a device worker does: a failing step's sessions get `Failed`, the others go on.
fn step(runner: &mut DiffusionRunner<Toy>) -> Vec<(u64, String)> {
    let mut events = Events::default();
    let plan = runner.next();
    let outcome = catch_unwind(AssertUnwindSafe(|| runner.step(&mut events)));
    match outcome {
        Ok(Ok(done)) => assert_eq!(Some(done), plan),
        Ok(Err(_)) | Err(_) => {
            for id in runner.evict_step() {
                events.emit(id, Event::Failed(Error::Panicked("evicted".into())));
            }
        }
    }
    events.drain().map(|(id, event)| (id.0, describe(&event))).collect()
}

fn describe(event: &Event) -> String {
    match event {
        Event::Started => "started".into(),
        Event::Progress { phase, done, total } => format!("{} {done}/{total}", phase.as_str()),
        Event::Preview { index, frame } => format!("preview {index} of {}", frame.rgb[0]),
        Event::Frames(frames) => format!("frames {:?}", frames.iter().map(|f| f.rgb[0]).collect::<Vec<_>>()),
        Event::Finished { .. } => "finished".into(),
        Event::Failed(error) => format!("failed: {error}"),
        Event::Text { .. } => "text".into(),
    }
}

/// Events of each session until nothing is left to do.
fn run(runner: &mut DiffusionRunner<Toy>) -> HashMap<u64, Vec<String>> {
    let mut all = HashMap::<u64, Vec<String>>::new();
    while runner.next().is_some() {
        for (id, event) in step(runner) {
            all.entry(id).or_default().push(event);
        }
    }
    assert_empty(runner);
    all
}

fn assert_empty(runner: &DiffusionRunner<Toy>) {
    assert_eq!(runner.status(), RunnerStatus::default());
    assert_eq!(runner.next(), None);
    assert_eq!(runner.model().alive.load(Ordering::Relaxed), 0, "conditioning or decode state is left");
}

fn alone(request: DiffusionRequest) -> Vec<String> {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, request);
    run(&mut runner).remove(&1).expect("the session had events")
}

#[test]
fn session_tells_its_whole_story_in_order() {
    let events = alone(guided("a fox", "rain"));
    let story: Vec<&str> = events.iter().map(|event| event.split(" [").next().unwrap_or_default()).collect();
    let expected = [
        "started",
        "encode 1/1",
        "denoise 1/3",
        "denoise 2/3",
        "denoise 3/3",
        "frames",
        "vae_decode 1/2",
        "frames",
        "vae_decode 2/2",
        "finished",
    ];
    assert_eq!(story, expected);
}

/// A picture in tiles: every tile is a step that is told, the pixels come with the last one.
#[test]
fn tiles_are_steps_and_the_picture_comes_last() {
    let events = alone(with(request("in tiles", 1), |request| {
        request.canvas.num_frames = 3;
        request.sampling.num_inference_steps = 1;
    }));
    let decoding: Vec<&str> = events[3..].iter().map(|event| event.split(" [").next().unwrap_or_default()).collect();
    assert_eq!(decoding, ["vae_decode 1/3", "vae_decode 2/3", "frames", "vae_decode 3/3", "finished"]);
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, with(request("in tiles", 1), |request| request.canvas.num_frames = 3));
    while !step(&mut runner).iter().any(|(_, event)| event == "vae_decode 1/3") {}
    runner.cancel(SessionId(1));
    assert_empty(&runner);
}

#[test]
fn guidance_extrapolates_from_the_negative_prediction() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, with(guided("123456", "12"), |request| request.sampling.num_inference_steps = 1));
    (0..2).for_each(|_| drop(step(&mut runner)));
    let Stage::Latents(found) = &runner.session(SessionId(1)).stage else { panic!("denoising is done") };
    // At timestep 1000 the branches predict 6 - x and 2 - x; 2 - x + 3 * 4 = 14 - x; x + (14 - x) / 2.
    let noise = TorchGenerator::new(1).randn(4);
    let found = found.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("read");
    for (found, noise) in found.iter().zip(noise) {
        assert!((found - (noise + 14.0) / 2.0).abs() < 1e-5);
    }
}

/// The steps outside of the interval take the positive prediction alone, and no row is computed for more.
#[test]
fn outside_of_its_interval_guidance_costs_nothing_and_does_nothing() {
    let steps = 4;
    let request = with(guided("123456", "12"), |request| {
        request.guidance.interval = [0.25, 0.75];
        request.sampling.num_inference_steps = steps;
    });
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, request);
    step(&mut runner);
    (0..steps).for_each(|_| drop(step(&mut runner)));
    assert_eq!(*runner.model().passes.lock().expect("lock"), [1, 2, 2, 1]);
    let Stage::Latents(found) = &runner.session(SessionId(1)).stage else { panic!("denoising is done") };
    let expected = TorchGenerator::new(1).randn(4).into_iter().map(|mut x| {
        for (index, timestep) in [1.0, 0.75, 0.5, 0.25].into_iter().enumerate() {
            let (positive, negative) = (6.0 - x * timestep, 2.0 - x * timestep);
            let guided = (1..3).contains(&index);
            x += 0.5 * if guided { negative + 3.0 * (positive - negative) } else { positive };
        }
        x
    });
    let found = found.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("read");
    assert!(found.into_iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-5));
}

#[test]
fn sessions_at_different_timesteps_share_a_pass_and_equal_the_lone_ones() {
    let requests = [
        request("one", 1),
        with(request("two two", 2), |request| request.sampling.num_inference_steps = 5),
        guided("three", "no"),
        guided("four four", "never"),
        with(request("five", 3), |request| request.canvas.num_frames = 1),
        with(request("two two", 4), |request| request.sampling.num_inference_steps = 7),
        with(guided("six", "no"), |request| {
            request.guidance.interval = [0.0, 0.5];
            request.sampling.num_inference_steps = 6;
        }),
        with(guided("seven", "no"), |request| request.guidance.true_cfg_scale = Some(2.0)),
    ];
    for max_rows in 1..6 {
        let mut runner = DiffusionRunner::new(Toy::new(), max_rows);
        let mut found = HashMap::<u64, Vec<String>>::new();
        for (id, request) in requests.iter().enumerate() {
            submit(&mut runner, id as u64, request.clone());
            for (id, event) in step(&mut runner) {
                found.entry(id).or_default().push(event);
            }
        }
        for (id, events) in run(&mut runner) {
            found.entry(id).or_default().extend(events);
        }
        let passes = runner.model().passes.lock().expect("lock").clone();
        assert!(passes.iter().all(|rows| *rows <= max_rows), "{passes:?}");
        assert!(max_rows == 1 || passes.iter().any(|rows| *rows > 1), "{passes:?}");
        for (id, request) in requests.iter().enumerate() {
            assert_eq!(found[&(id as u64)], alone(request.clone()), "{max_rows} rows, session {id}");
        }
    }
}

#[test]
fn one_prompt_of_many_sessions_is_encoded_once() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    (0..4).for_each(|seed| submit(&mut runner, seed, request("same", seed)));
    run(&mut runner);
    assert_eq!(*runner.model().encoded.lock().expect("lock"), ["same"]);
}

/// Positive and negative ones of all that wait, up to the bound; an absent one is the empty text unless the family says
/// otherwise, and other lengths wait for a pass of their own.
#[test]
fn prompts_that_wait_are_encoded_in_one_pass() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 0, guided("a fox", "rain"));
    submit(&mut runner, 1, with(request("shorter", 1), |request| request.prompt.max_sequence_length = 7));
    submit(&mut runner, 2, guided("rain", "a fox"));
    submit(
        &mut runner,
        3,
        with(guided("a boat", ""), |request| request.guidance.negative_prompt = Some(NegativePrompt::Absent)),
    );
    submit(&mut runner, 4, guided("", "a boat"));
    (5..10).for_each(|id| submit(&mut runner, id, request(&format!("number {id}"), id)));
    let all = run(&mut runner);
    let expected = ["a fox, rain, a boat, , number 5, number 6, number 7, number 8", "shorter", "number 9"];
    assert_eq!(*runner.model().encoded.lock().expect("lock"), expected);
    assert_eq!(all[&2], alone(guided("rain", "a fox")));
}

#[test]
fn a_family_may_have_its_own_idea_of_an_absent_prompt() {
    let toy = Toy { absent_is_empty: false, ..Toy::new() };
    let mut runner = DiffusionRunner::new(toy, 4);
    submit(
        &mut runner,
        1,
        with(guided("a boat", ""), |request| request.guidance.negative_prompt = Some(NegativePrompt::Absent)),
    );
    run(&mut runner);
    assert_eq!(*runner.model().encoded.lock().expect("lock"), ["a boat"]);
}

#[test]
fn a_picture_is_encoded_after_the_prompts_and_left_out_steps_are_not_counted() {
    let events = alone(edit([9; 4], None, 1));
    let story: Vec<&str> = events.iter().map(|event| event.split(" [").next().unwrap_or_default()).take(5).collect();
    assert_eq!(story, ["started", "encode 1/1", "vae_encode 1/1", "denoise 1/2", "denoise 2/2"]);
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, edit([9; 4], None, 1));
    step(&mut runner);
    assert_eq!(runner.next().map(|plan| plan.phase), Some(Phase::VaeEncode));
}

#[test]
fn one_picture_of_many_sessions_is_encoded_once_and_sampled_by_each() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    (0..4).for_each(|seed| submit(&mut runner, seed, edit([9; 4], None, seed)));
    submit(&mut runner, 9, edit([8; 4], None, 0));
    run(&mut runner);
    assert_eq!(*runner.model().encoded.lock().expect("lock"), ["one", "picture 9", "picture 8"]);
    assert_ne!(latents_after(&edit([9; 4], None, 1), 0), latents_after(&edit([9; 4], None, 2), 0));
}

/// The first draw is the posterior's, the second one the noise; at the second of three timesteps two thirds of it.
#[test]
fn the_loop_begins_from_the_noisy_picture() {
    let mut generator = TorchGenerator::new(5);
    let (sampled, noise) = (generator.randn(4), generator.randn(4));
    let found = latents_after(&edit([1, 2, 3, 4], None, 5), 0);
    for (i, found) in found.iter().enumerate() {
        let expected = 2.0 * (1.0 + i as f32 + 0.5 * sampled[i]) + noise[i] * 2.0 / 3.0;
        assert!((found - expected).abs() < 1e-4, "{found}, {expected}");
    }
}

/// Between steps the kept part is as noisy as the loop, after the last one it is the picture; the rest is the loop's.
#[test]
fn what_the_mask_leaves_out_stays_the_picture() {
    let mask = Some([127, 128, 0, 255]);
    let mut generator = TorchGenerator::new(5);
    let (sampled, noise) = (generator.randn(4), generator.randn(4));
    let picture = |i: usize| 2.0 * (1.0 + i as f32 + 0.5 * sampled[i]);
    let (whole, after_one) = (edit([1, 2, 3, 4], None, 5), latents_after(&edit([1, 2, 3, 4], mask, 5), 1));
    let after_all = latents_after(&edit([1, 2, 3, 4], mask, 5), 2);
    for i in [0, 2] {
        assert!((after_one[i] - picture(i) - noise[i] / 3.0).abs() < 1e-4, "{after_one:?}");
        assert!((after_all[i] - picture(i)).abs() < 1e-4, "{after_all:?}");
    }
    let free = latents_after(&whole, 2);
    for i in [1, 3] {
        assert_eq!(after_all[i], free[i]);
    }
}

/// A mask at full strength begins from noise alone; without a mask the picture still shines through.
#[test]
fn a_mask_at_full_strength_begins_from_noise() {
    let whole = |mask| {
        let mut request = edit([200; 4], mask, 5);
        request.edit = request.edit.map(|edit| Edit { strength: 1.0, first_step: 0, ..edit });
        latents_after(&request, 0)
    };
    let mut generator = TorchGenerator::new(5);
    let (_, noise) = (generator.randn(4), generator.randn(4));
    assert_eq!(whole(Some([255; 4])), noise);
    assert!(whole(None).iter().all(|value| *value > 300.0));
}

#[test]
fn pictures_are_refused_where_none_are_taken() {
    let mut runner = DiffusionRunner::new(Toy { takes_pictures: false, ..Toy::new() }, 4);
    let refused = runner.submit(SessionId(1), Request::Diffusion(edit([9; 4], None, 1)));
    assert!(matches!(refused, Err(Error::InvalidRequest { field, .. }) if field == "image"));
    assert_empty(&runner);
}

#[test]
fn cancel_at_any_step_leaves_nothing() {
    for steps in 0..7 {
        let mut runner = DiffusionRunner::new(Toy::new(), 4);
        submit(&mut runner, 1, guided("a fox", "rain"));
        (0..steps).for_each(|_| drop(step(&mut runner)));
        assert_eq!(runner.status().running + runner.status().waiting, usize::from(steps < 6));
        runner.cancel(SessionId(1));
        assert_empty(&runner);
    }
}

#[test]
fn cancelled_session_takes_no_further_part() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    (1..=3).for_each(|id| submit(&mut runner, id, request("same", id)));
    (0..2).for_each(|_| drop(step(&mut runner)));
    runner.cancel(SessionId(2));
    runner.cancel(SessionId(99));
    let rest = run(&mut runner);
    assert!(!rest.contains_key(&2));
    assert_eq!(rest[&1].last().map(String::as_str), Some("finished"));
    assert_eq!(rest[&3].last().map(String::as_str), Some("finished"));
}

/// A step that fails takes its own sessions with it and no others.
#[test]
fn failing_step_fails_its_own_sessions() {
    for how in ["error", "panic"] {
        for (phase, others_in_the_step) in [("encode", true), ("denoise", true), ("decode", false)] {
            let mut runner = DiffusionRunner::new(Toy::new(), 2);
            submit(&mut runner, 1, request(&format!("{how} in {phase}"), 1));
            submit(&mut runner, 2, request("beside it", 2));
            // Its prompts have another length, and so a pass of their own.
            let other = with(guided("else", "where"), |request| {
                request.prompt.max_sequence_length = 7;
                request.sampling.num_inference_steps = 6;
            });
            submit(&mut runner, 3, other);
            let all = run(&mut runner);
            let ends = |id: u64| all[&id].last().map(String::as_str).unwrap_or_default().to_owned();
            assert!(ends(1).starts_with("failed"), "{how} {phase}: {all:?}");
            assert_eq!(ends(2).starts_with("failed"), others_in_the_step, "{how} {phase}: {all:?}");
            assert_eq!(
                all[&3],
                alone(with(guided("else", "where"), |request| request.sampling.num_inference_steps = 6))
            );
            let terminal = |event: &&String| event.starts_with("failed") || *event == "finished";
            assert!(all.values().all(|events| events.iter().filter(terminal).count() == 1));
        }
    }
}

#[test]
fn values_that_are_not_finite_fail_that_session_alone() {
    for (prompt, phase) in
        [("nan in encode", "denoise"), ("nan in denoise", "denoise"), ("nan in decode", "vae_decode")]
    {
        let mut runner = DiffusionRunner::new(Toy::new(), 4);
        submit(&mut runner, 1, request(prompt, 1));
        submit(&mut runner, 2, request("beside it", 2));
        let all = run(&mut runner);
        let last = all[&1].last().expect("events");
        assert!(last.contains("not finite") && last.contains(phase), "{last}");
        assert!(!all[&1].iter().any(|event| event.starts_with("frames")));
        assert_eq!(all[&2], alone(request("beside it", 2)));
    }
}

/// A session that overflows is what it would be if it did not, one that is not finite in f32 either fails, and whoever
/// shares their steps hears nothing of it.
#[test]
fn what_overflows_is_done_once_more_in_f32() {
    for (wrong, phase, reads) in
        [("denoise", Phase::Denoise, 3), ("decode", Phase::VaeDecode, 1), ("late decode", Phase::VaeDecode, 1)]
    {
        let read = Arc::new(AtomicUsize::new(0));
        let count = read.clone();
        let mut runner = DiffusionRunner::new(Toy::new(), 4).retrying(Box::new(move |components, of, _| {
            assert_eq!((components, of), (&["net"][..], phase));
            count.fetch_add(1, Ordering::Relaxed);
            Ok(Toy::wide())
        }));
        let overflowing = format!("overflow in {wrong}");
        submit(&mut runner, 1, request(&overflowing, 1));
        submit(&mut runner, 2, request("beside it", 2));
        let all = run(&mut runner);
        let mut wide = DiffusionRunner::new(Toy::wide(), 4);
        submit(&mut wide, 1, request(&overflowing, 1));
        assert_eq!(all[&1], run(&mut wide)[&1], "{wrong}");
        assert_eq!(all[&2], alone(request("beside it", 2)), "{wrong}");
        assert_eq!(read.load(Ordering::Relaxed), reads, "{wrong}: one for each step that needs it");
        submit(&mut runner, 3, request(&format!("nan in {wrong}"), 3));
        submit(&mut runner, 4, request("beside it", 2));
        let all = run(&mut runner);
        let last = all[&3].last().expect("events");
        assert!(last.contains("not finite") && last.contains(phase.as_str()), "{last}");
        assert_eq!(all[&4], alone(request("beside it", 2)), "{wrong}");
    }
}

#[test]
fn without_the_memory_for_f32_a_session_fails_with_the_figures() {
    for wrong in ["denoise", "decode"] {
        let mut runner = DiffusionRunner::new(Toy::new(), 4).retrying(Box::new(|_, phase, _| {
            Err(Error::OutOfMemory { phase: Some(phase), needed_bytes: 77, free_bytes: 66 })
        }));
        submit(&mut runner, 1, request(&format!("overflow in {wrong}"), 1));
        submit(&mut runner, 2, request("beside it", 2));
        let all = run(&mut runner);
        let last = all[&1].last().expect("events");
        assert!(last.contains("77 bytes needed") && last.contains("66 free"), "{last}");
        assert_eq!(all[&2], alone(request("beside it", 2)), "{wrong}");
    }
}

#[test]
fn text_requests_and_too_many_sessions_are_refused() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    let text = TextRequest {
        prompt: vec![1],
        max_tokens: 1,
        sampling: SamplingParams::greedy(),
        stop: Vec::new(),
        ignore_eos: false,
    };
    let refused = runner.submit(SessionId(0), Request::Text(text));
    assert!(matches!(refused, Err(Error::InvalidRequest { .. })));
    (0..MAX_SESSIONS as u64).for_each(|id| submit(&mut runner, id, request("one", id)));
    let refused = runner.submit(SessionId(9999), Request::Diffusion(request("one", 0)));
    assert!(matches!(refused, Err(Error::TooManySessions { limit: MAX_SESSIONS })));
}

#[test]
fn bytes_round_as_numpy_does() {
    // 0.5 / 255 is halfway between 0 and 1, and 1.5 / 255 between 1 and 2: both go to the even one.
    for (value, byte) in [(-7.0, 0), (-1.0, 0), (1.0, 255), (3.0, 255), (0.0, 128), (-1.0 + 1.2 / 127.5, 1)] {
        assert_eq!(to_byte(value), byte, "{value}");
    }
}

#[test]
fn previews_show_where_the_steps_lead_and_change_nothing() {
    let plain = alone(request("twelve chars", 3));
    let with = alone(with(request("twelve chars", 3), |request| request.partial_images = 2));
    let previews: Vec<&String> = with.iter().filter(|event| event.starts_with("preview")).collect();
    assert_eq!(previews.len(), 2);
    let place = |wanted: &str| with.iter().position(|event| event.starts_with(wanted)).expect("it is there");
    assert_eq!(place("preview 0"), place("denoise 1/3") + 1);
    assert_eq!(place("preview 1"), place("denoise 2/3") + 1);
    let others: Vec<String> = with.iter().filter(|event| !event.starts_with("preview")).cloned().collect();
    assert_eq!(others, plain);
    // The toy's clean sample after its first step: the wanted value, whatever the noise was.
    assert_eq!(previews[0], "preview 0 of 120");
}

/// A session beside it that asks for none pays nothing and gets none.
#[test]
fn only_those_that_ask_get_previews() {
    let mut runner = DiffusionRunner::new(Toy::new(), 4);
    submit(&mut runner, 1, with(request("one", 1), |request| request.partial_images = 1));
    submit(&mut runner, 2, request("one", 2));
    let events = run(&mut runner);
    let previews = |id: u64| events[&id].iter().filter(|event| event.starts_with("preview")).count();
    assert_eq!((previews(1), previews(2)), (1, 0));
}
