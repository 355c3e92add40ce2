//! Videos of any family held against a reference, step by step and frame by frame.

use candle_core::Tensor;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionRequest;
use tale_models::family::LoadOptions;
use tale_models::loading::inspect;
use tale_models::request::{Event, Events, Frame, Phase, Request, SessionId};
use tale_models::rng::TorchGenerator;
use tale_models::runner::diffusion::course::FIRST_EXPERT;
use tale_models::runner::diffusion::{DenoiseRow, DiffusionModel, DiffusionRunner};
use tale_models::runner::{Runner, RunnerStatus};

use crate::support::{assert_close, case_dir, golden_tensors, psnr};

/// Guidance multiplies what two predictions differ by, step after step.
const LATENTS_TOLERANCE: f64 = 1e-4;

/// From the noise to the last latents, every step that of the reference. `tensor` is what was recorded of the run.
pub fn check_denoising<'a, M: DiffusionModel>(
    name: &str,
    model: &M,
    request: &DiffusionRequest,
    branches: &[M::Conditioning],
    tensor: &impl Fn(&str) -> &'a Tensor,
) -> Tensor {
    let mut generator = TorchGenerator::new(request.sampling.seed);
    let latents = model.initial_latents(request, &mut generator).unwrap();
    assert_close(&format!("{name} noise"), &latents, tensor("noise"), 0.0);
    check_steps(name, model, request, branches, (latents, generator), tensor)
}

/// As [`check_denoising`] from what the loop begins from, with the generator that drew the noise. The branches of guidance are
/// predicted one by one, and in one pass, of which the last latents are.
pub fn check_steps<'a, M: DiffusionModel>(
    name: &str,
    model: &M,
    request: &DiffusionRequest,
    branches: &[M::Conditioning],
    begin: (Tensor, TorchGenerator),
    tensor: &impl Fn(&str) -> &'a Tensor,
) -> Tensor {
    if branches.len() > 1 {
        check_steps_of(&format!("{name}, one by one,"), model, request, (branches, 1), begin.clone(), tensor);
    }
    check_steps_of(name, model, request, (branches, branches.len()), begin, tensor)
}

/// With so many branches in one pass.
fn check_steps_of<'a, M: DiffusionModel>(
    name: &str,
    model: &M,
    request: &DiffusionRequest,
    (branches, at_once): (&[M::Conditioning], usize),
    (mut latents, mut generator): (Tensor, TorchGenerator),
    tensor: &impl Fn(&str) -> &'a Tensor,
) -> Tensor {
    let close = |what: &str, found: &Tensor, tolerance: f64| {
        assert_close(&format!("{name} {what}"), found, tensor(what), tolerance);
    };
    let mut solver = model.course(request).unwrap().solver;
    close("timesteps", &row(solver.timesteps()), 0.0);
    for (step, timestep) in solver.timesteps().to_vec().into_iter().enumerate() {
        let passes = branches.chunks(at_once);
        let predictions: Vec<Tensor> =
            passes.flat_map(|branches| predict(model, request, &latents, timestep, branches)).collect();
        if step == 0 {
            close("prediction0", &predictions[0], 1e-4);
        }
        let scale = request.guidance.cfg_scale_at(timestep, request.sampling.num_inference_steps);
        let prediction = guided(&predictions, scale);
        latents = solver.step(step, &prediction, &latents, &mut generator).unwrap();
        close(&format!("latents{step}"), &latents, LATENTS_TOLERANCE);
    }
    latents
}

/// Every frame of these runs of a case is that of the reference.
pub fn check_frames<M: DiffusionModel>(case: &str, model: M, requests: Vec<(usize, DiffusionRequest)>) {
    let tensors = golden_tensors(case);
    let mut runner = DiffusionRunner::new(model, 4);
    for (run, request) in requests {
        let frames = make_clips(&mut runner, std::slice::from_ref(&request)).remove(0);
        let expected = &tensors[&format!("run{run}.frames")];
        assert_eq!(expected.dims(), [frames.len(), request.canvas.height, request.canvas.width, 3]);
        for (index, frame) in frames.iter().enumerate() {
            let expected: Vec<u8> = expected.get(index).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let psnr = psnr(&frame.rgb, &expected);
            assert!(psnr >= 50.0, "{case} run {run} frame {index}: {psnr:.1} dB");
        }
    }
}

/// Two requests of one shape that share steps make what each makes alone.
pub fn check_together<M: DiffusionModel>(case: &str, model: M, requests: [DiffusionRequest; 2]) {
    let mut runner = DiffusionRunner::new(model, 4);
    let together = make_clips(&mut runner, &requests);
    let alone = requests.map(|request| make_clips(&mut runner, &[request]).remove(0));
    assert!(together[0] == alone[0] && together[1] == alone[1], "{case}: a clip depends on its company");
    assert!(alone[0] != alone[1], "{case}: the requests differ");
}

/// A cancellation after any number of steps leaves nothing, of whatever kind the next step is; there are steps of all `phases`.
pub fn check_cancelled<M: DiffusionModel>(case: &str, model: M, request: &DiffusionRequest, phases: &[Phase]) {
    let mut runner = DiffusionRunner::new(model, 4);
    let mut found = Vec::new();
    for steps in 0.. {
        runner.submit(SessionId(steps), Request::Diffusion(request.clone())).unwrap();
        let mut events = Events::default();
        for _ in 0..steps {
            runner.step(&mut events).unwrap();
        }
        let Some(next) = runner.next() else { break };
        found.push(next.phase);
        runner.cancel(SessionId(steps));
        assert_eq!(runner.status(), RunnerStatus::default(), "{case} after {steps} steps");
        assert!(runner.next().is_none());
    }
    for phase in phases {
        assert!(found.contains(phase), "{case}: {phase:?} of {found:?}");
    }
}

/// Of a checkpoint of the `family`, which has so many `components`, every tensor is read.
pub fn check_tensors(case: &str, family: &str, components: usize) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let inspection = inspect(&case_dir(case).join("checkpoint"), &placement, &LoadOptions::default()).unwrap();
    assert!(inspection.family == family && inspection.problem.is_none(), "{case}: {:?}", inspection.problem);
    assert_eq!(inspection.components.len(), components);
    for (component, report) in inspection.components {
        assert!(report.problems.is_empty(), "{case} {component}: {:?}", report.problems);
        assert!(report.unused.is_empty(), "{case} {component}: {:?}", report.unused);
    }
}

fn predict<M: DiffusionModel>(
    model: &M,
    request: &DiffusionRequest,
    latents: &Tensor,
    timestep: f64,
    branches: &[M::Conditioning],
) -> Vec<Tensor> {
    let row = |conditioning| DenoiseRow { latents, timestep, conditioning, request };
    model.predict(FIRST_EXPERT, &branches.iter().map(row).collect::<Vec<_>>()).expect("a prediction")
}

/// Classifier-free guidance, when there is a negative branch.
fn guided(predictions: &[Tensor], scale: f64) -> Tensor {
    match predictions {
        [positive, negative] => {
            let step = || -> candle_core::Result<Tensor> { negative + ((positive - negative)? * scale)? };
            step().expect("same shapes")
        }
        _ => predictions[0].clone(),
    }
}

/// Pixels of all frames, `[frames, 3, height, width]`.
pub fn decode<M: DiffusionModel>(model: &M, request: &DiffusionRequest, latents: &Tensor) -> Tensor {
    let mut decoding = model.begin_decode(FIRST_EXPERT, latents, request).expect("decoding begins");
    let chunk = |_| model.decode_next(&mut decoding).expect("a chunk").values;
    let chunks: Vec<Tensor> = (0..model.num_decode_steps(FIRST_EXPERT, request)).map(chunk).collect();
    // As the reference's decoder, which cuts what is rounded to a byte anyway.
    Tensor::cat(&chunks, 0).and_then(|pixels| pixels.clamp(-1f32, 1f32)).expect("chunks of one size")
}

/// Runs all requests to their end; the frames of each, in order.
fn make_clips<M: DiffusionModel>(runner: &mut DiffusionRunner<M>, requests: &[DiffusionRequest]) -> Vec<Vec<Frame>> {
    for (index, request) in requests.iter().enumerate() {
        runner.submit(SessionId(index as u64), Request::Diffusion(request.clone())).expect("is accepted");
    }
    let mut clips = vec![Vec::new(); requests.len()];
    let mut events = Events::default();
    while runner.next().is_some() {
        runner.step(&mut events).expect("a step");
        for (session, event) in events.drain() {
            match event {
                Event::Frames(frames) => clips[session.0 as usize].extend(frames),
                Event::Failed(error) => panic!("session {}: {error}", session.0),
                _ => (),
            }
        }
    }
    assert_eq!(runner.status(), RunnerStatus::default());
    clips
}

/// As a tensor of one dimension.
pub fn row(values: &[f64]) -> Tensor {
    let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    Tensor::new(values, &candle_core::Device::Cpu).expect("values make a row")
}
