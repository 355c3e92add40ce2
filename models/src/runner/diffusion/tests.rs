//! The runner's rules, on a toy model.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Tensor;

use super::loading::Loading;
use super::retry::ReadInF32;
use super::session::Stage;
use super::*;
use crate::diffusion::{Canvas, Edit, NegativePrompt, Prompt, Sampling, ZeroStar};
use crate::request::{Frame, Mask, TextRequest};
use crate::rng::TorchGenerator;
use crate::solver::names::Scheduler;

mod beside;
mod experts;
mod failures;
mod inputs;
mod loading;
mod saving;
mod steps;
mod toy;

use toy::{Arriving, Toy};

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
        Stage::Latents(latents) => values(&latents.values),
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
        Event::Text { .. } | Event::Prompt(_) | Event::Checkpoint(_) => "of another".into(),
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
