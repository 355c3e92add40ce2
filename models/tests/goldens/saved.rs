//! Sessions that are interrupted and go on in another process over the same files: the same bytes, whatever the family, the
//! solver and what the request asks for.

use std::collections::BTreeMap;
use std::sync::Arc;

use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::acceleration::CacheMethod;
use tale_models::diffusion::canvas::SizeRule;
use tale_models::diffusion::guidance::GuidanceKind;
use tale_models::diffusion::parameters::{
    CACHE_COEFFICIENTS, CACHE_METHOD, CACHE_RATIOS, CACHE_THRESHOLD, DENOISING_END, ETA, GUIDANCE_SCALE, HEIGHT, IMAGE,
    INPUT_REFERENCE, KEY_IMAGES, LAST_IMAGE, LORAS, MASK, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS,
    OVERLAP_FRAMES, PARTIAL_IMAGES, PROMPT, REFERENCE_IMAGES, SCHEDULER, SHOT_METHOD, STRENGTH, TRUE_CFG_SCALE, WIDTH,
};
use tale_models::diffusion::shots::ShotMethod;
use tale_models::diffusion::shots::assembly::Assembly;
use tale_models::diffusion::{DiffusionCard, DiffusionRequest, Medium};
use tale_models::family::{LoadOptions, TextEncoders};
use tale_models::lora::LoraOption;
use tale_models::parameter::Options;
use tale_models::request::{ClientId, Frame, Mask, Phase};
use tale_models::runner::Runner;
use tale_models::session_checkpoint::Refusal;
use tale_models::solver::names::SCHEDULERS;
use tale_models::{Error, Event, Events, ModelCard, ModelSource, Request, SessionCheckpoint, SessionId};

use crate::ip_adapter;
use crate::support::{case_dir, copy_folder, edit_tensors};

const ID: SessionId = SessionId(1);

/// One model, loaded twice, as by two processes.
pub struct Twice {
    pub card: DiffusionCard,
    runners: [Box<dyn Runner>; 2],
}

/// What a session has said.
#[derive(Default, PartialEq)]
struct Said {
    frames: Vec<Frame>,
    previews: Vec<(usize, Frame)>,
    /// Passes from caches, once it has ended.
    skipped_passes: Option<usize>,
}

impl Said {
    fn hear(&mut self, event: Event) {
        match event {
            Event::Frames(frames) => self.frames.extend(frames),
            Event::Preview { index, frame } => self.previews.push((index, frame)),
            Event::Finished { usage, .. } => self.skipped_passes = Some(usage.skipped_passes),
            Event::Failed(error) => panic!("{error}"),
            _ => (),
        }
    }
}

fn load(source: &ModelSource, text_encoders: TextEncoders) -> (DiffusionCard, Box<dyn Runner>) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let options = LoadOptions { max_denoise_rows: 4, text_encoders, ..Default::default() };
    let loaded = tale_models::load(source.clone(), &placement, &options, &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = loaded.card else { panic!("makes pictures or clips") };
    (card, loaded.runner)
}

fn source(case: &str) -> ModelSource {
    ModelSource::at(case_dir(case).join("checkpoint"))
}

fn step(runner: &mut dyn Runner, mut hear: impl FnMut(SessionId, Event)) -> Phase {
    let mut events = Events::default();
    let phase = runner.step(&mut events).unwrap().phase;
    events.drain().for_each(|(id, event)| hear(id, event));
    phase
}

fn resume(
    runner: &mut dyn Runner,
    id: SessionId,
    request: &DiffusionRequest,
    checkpoint: &SessionCheckpoint,
) -> Result<(), Error> {
    let stored = SessionCheckpoint::from_bytes(checkpoint.as_bytes().to_vec()).unwrap();
    runner.resume_for(ClientId::default(), id, Request::Diffusion(request.clone()), Arc::new(stored))
}

impl Twice {
    fn new(source: &ModelSource) -> Self {
        // The second one reads its text encoders when it needs them, which changes nothing.
        let (card, first) = load(source, TextEncoders::Resident);
        let (_, second) = load(source, TextEncoders::OnDemand);
        Self::of(card, [first, second])
    }

    pub fn of(card: DiffusionCard, runners: [Box<dyn Runner>; 2]) -> Self {
        Self { card, runners }
    }

    /// A small request: what `options` leave out is the plainest.
    pub fn request(&self, options: Options) -> DiffusionRequest {
        let canvas = &self.card.canvas;
        let num_frames = canvas.frames.map(|frames| match frames.has_one_length {
            true => frames.default_num_frames,
            false => frames.multiple + 1,
        });
        let (width, height) = match self.card.medium() {
            Medium::Image => (64, 64),
            Medium::Video if canvas.sizes == SizeRule::OnlyDefault => (canvas.default_width, canvas.default_height),
            Medium::Video => (canvas.size_multiple.max(32), canvas.size_multiple.max(32)),
        };
        let small = Options::default()
            .with(&PROMPT, "A boat".to_owned())
            .with(&WIDTH, width)
            .with(&HEIGHT, height)
            .with(&NUM_FRAMES, num_frames)
            .with(&NUM_INFERENCE_STEPS, 3);
        self.card.resolve(&options.or(small).or(self.card.plainest()), 5).unwrap()
    }

    /// Interrupted after every number of steps: the bytes of what it says before and after are those of one that is not.
    /// How many checkpoints there were.
    pub fn check(&mut self, what: &str, request: &DiffusionRequest) -> usize {
        let [first, second] = &mut self.runners;
        let mut whole = Said::default();
        let mut phases = Vec::new();
        first.submit(ID, Request::Diffusion(request.clone())).unwrap();
        while first.next().is_some() {
            phases.push(step(&mut **first, |_, event| whole.hear(event)));
        }
        let mut checkpoints = 0;
        for steps in 0..phases.len() {
            let mut said = Said::default();
            first.submit(ID, Request::Diffusion(request.clone())).unwrap();
            for _ in 0..steps {
                step(&mut **first, |_, event| said.hear(event));
            }
            let checkpoint = first.checkpoint(ID).unwrap();
            first.cancel(ID);
            let is_before = matches!(phases[steps], Phase::Load | Phase::Encode | Phase::VaeEncode);
            assert_eq!(checkpoint.is_none(), is_before, "{what} after {steps} steps of {phases:?}");
            let Some(checkpoint) = checkpoint else { continue };
            checkpoints += 1;
            assert_eq!(checkpoint.frames_done(), said.frames.len(), "{what}");
            resume(&mut **second, ID, request, &checkpoint).unwrap_or_else(|error| panic!("{what}: {error}"));
            let mut left = 0;
            while second.next().is_some() {
                let phase = step(&mut **second, |_, event| said.hear(event));
                left += usize::from(phase == Phase::Denoise);
            }
            let expected = phases[steps..].iter().filter(|phase| **phase == Phase::Denoise).count();
            assert_eq!(left, expected, "{what}: no step is made twice");
            assert!(said == whole, "{what}: other bytes after {steps} steps of {phases:?}");
        }
        checkpoints
    }

    /// Several sessions at once, each submitted one step after the one before, all of them interrupted together.
    fn check_together(&mut self, what: &str, requests: &[DiffusionRequest], steps: usize) {
        let [first, second] = &mut self.runners;
        let mut alone = BTreeMap::new();
        for (id, request) in requests.iter().enumerate() {
            let said: &mut Said = alone.entry(SessionId(id as u64)).or_default();
            first.submit(ID, Request::Diffusion(request.clone())).unwrap();
            while first.next().is_some() {
                step(&mut **first, |_, event| said.hear(event));
            }
        }
        let mut said: BTreeMap<SessionId, Said> = BTreeMap::new();
        let mut hear = |id, event| said.entry(id).or_default().hear(event);
        for (id, request) in requests.iter().enumerate() {
            first.submit(SessionId(id as u64), Request::Diffusion(request.clone())).unwrap();
            step(&mut **first, &mut hear);
        }
        for _ in 0..steps {
            step(&mut **first, &mut hear);
        }
        for (id, request) in requests.iter().enumerate() {
            let id = SessionId(id as u64);
            let checkpoint = first.checkpoint(id).unwrap().expect("all have begun to denoise");
            resume(&mut **second, id, request, &checkpoint).unwrap();
            first.cancel(id);
        }
        while second.next().is_some() {
            step(&mut **second, &mut hear);
        }
        assert!(said == alone, "{what}: other bytes");
    }
}

#[test]
fn every_solver_goes_on() {
    let mut models = ["sdxl-b", "wan-b", "cogvideox-a"].map(|case| Twice::new(&source(case)));
    let is_guided = Options::default().with(&NEGATIVE_PROMPT, "Rain".to_owned()).with(&GUIDANCE_SCALE, 3.0);
    for scheduler in &SCHEDULERS {
        let mut checked = 0;
        for model in &mut models {
            let of =
                |options: Options| options.with(&SCHEDULER, scheduler.name.to_owned()).with(&NUM_INFERENCE_STEPS, 5);
            let with_eta = of(is_guided.clone()).with(&ETA, 0.7);
            let num_frames = model.card.canvas.frames.map(|_| 1);
            let takes = |options: &Options| {
                let options = options.clone().with(&PROMPT, "x".to_owned()).or(model.card.plainest());
                model.card.resolve(&options, 0).is_ok()
            };
            let Some(options) = [with_eta, of(is_guided.clone())].into_iter().find(|options| takes(options)) else {
                continue;
            };
            let request = model.request(options.with(&NUM_FRAMES, num_frames));
            checked += model.check(scheduler.name, &request);
        }
        assert!(checked >= 5, "{}: no model takes it", scheduler.name);
    }
}

fn picture(width: usize, height: usize, seed: usize) -> Arc<Frame> {
    let rgb = (0..3 * width * height).map(|i| (i * 7 + i / 31 + seed * 50) as u8).collect();
    Arc::new(Frame { width, height, rgb })
}

/// Guided, with previews, and from pictures where the model takes some.
fn whole(model: &Twice) -> DiffusionRequest {
    let card = &model.card;
    let is_true = card.guidance.kind != GuidanceKind::ClassifierFree;
    let takes_last = card.keyframes.is_some_and(|keyframes| keyframes.takes_last());
    let options = Options::default()
        .with(&NEGATIVE_PROMPT, "Rain".to_owned())
        .with(&TRUE_CFG_SCALE, is_true.then_some(3.0))
        .with(&GUIDANCE_SCALE, (!is_true).then_some(3.0))
        .with(&PARTIAL_IMAGES, 1)
        .with(&INPUT_REFERENCE, card.keyframes.map(|_| picture(48, 48, 1)))
        .with(&LAST_IMAGE, takes_last.then(|| picture(48, 48, 2)));
    model.request(options)
}

#[test]
fn every_family_goes_on() {
    for case in [
        "sdxl-a",
        "flux-dev",
        "flux-schnell",
        "wan-a",
        "wan-b",
        "wan-i2v",
        "wan-flf2v",
        "cogvideox-a",
        "cogvideox-1.5",
        "cogvideox-i2v",
        "cogvideox-1.5-i2v",
        "hunyuan-video-a",
        "hunyuan-video-i2v",
        "hunyuan-video-i2v-33ch",
    ] {
        let mut model = Twice::new(&source(case));
        let request = whole(&model);
        assert!(model.check(case, &request) > 3, "{case}");
    }
}

/// Some in their first steps, others in their last ones.
#[test]
fn sessions_of_one_batch_go_on_together() {
    for case in ["sdxl-a", "wan-b", "cogvideox-a", "hunyuan-video-a"] {
        let mut model = Twice::new(&source(case));
        let plain = |seed: u64| DiffusionRequest { partial_images: 0, ..whole(&model) }.with_seed(seed);
        let requests: Vec<DiffusionRequest> = (0..3).map(plain).collect();
        model.check_together(case, &requests, 3);
    }
}

#[test]
fn a_refiner_goes_on_from_either_side() {
    let refiner = Some(case_dir("edits/sdxl-refiner").join("checkpoint"));
    let mut model = Twice::new(&ModelSource { refiner, ..source("sdxl-a") });
    for scheduler in ["euler", "dpmpp_2m", "unipc"] {
        let options = Options::default()
            .with(&NUM_INFERENCE_STEPS, 6)
            .with(&GUIDANCE_SCALE, 3.0)
            .with(&SCHEDULER, scheduler.to_owned())
            .with(&DENOISING_END, 0.5);
        let request = model.request(options);
        assert!(model.check(scheduler, &request) >= 6);
    }
}

#[test]
fn edits_and_references_go_on() {
    for case in ["sdxl-a", "flux-dev"] {
        let mut model = Twice::new(&source(case));
        let grey = (0..64 * 64).map(|i| if i % 64 < 32 { 255 } else { 0 }).collect();
        let mask = Arc::new(Mask { width: 64, height: 64, grey });
        for mask in [None, Some(mask)] {
            let options = Options::default()
                .with(&IMAGE, picture(64, 64, 3))
                .with(&MASK, mask.clone())
                .with(&STRENGTH, 0.75)
                .with(&NUM_INFERENCE_STEPS, 4);
            let request = model.request(options);
            assert!(model.check(case, &request) > 2, "{case}");
        }
    }
    let mut model = Twice::new(&ip_adapter::source("base"));
    let request = model.request(Options::default().with(&REFERENCE_IMAGES, vec![picture(40, 40, 4)]));
    assert!(model.check("references", &request) > 2);
}

fn lora_source(case: &str, files: &str) -> ModelSource {
    ModelSource { loras: Some(case_dir("lora").join(files)), ..source(case) }
}

fn loras(names: &[(&str, f64)]) -> Vec<LoraOption> {
    names.iter().map(|(name, weight)| LoraOption { name: (*name).to_owned(), weight: *weight }).collect()
}

#[test]
fn lora_files_go_on() {
    for (case, files) in [("sdxl-a", "sdxl"), ("flux-dev", "flux")] {
        let mut model = Twice::new(&lora_source(case, files));
        let request = model.request(Options::default().with(&LORAS, loras(&[("kohya", 0.5), ("peft", -0.5)])));
        assert!(model.check(case, &request) > 2);
    }
}

#[test]
fn skipped_blocks_go_on() {
    for case in ["flux-dev", "wan-b", "cogvideox-b", "hunyuan-video-a"] {
        let mut model = Twice::new(&source(case));
        for (method, threshold) in
            [(CacheMethod::FirstBlock, 10.0), (CacheMethod::MagCache, 0.3), (CacheMethod::TeaCache, 10.0)]
        {
            let options = Options::default()
                .with(&CACHE_METHOD, method)
                .with(&CACHE_THRESHOLD, threshold)
                .with(&CACHE_RATIOS, (method == CacheMethod::MagCache).then(|| vec![1.0, 1.02, 0.97]))
                .with(&CACHE_COEFFICIENTS, (method == CacheMethod::TeaCache).then(|| vec![1.0, 0.1]))
                .with(&NUM_INFERENCE_STEPS, 6);
            let request = model.request(options);
            model.check(&format!("{case} {method:?}"), &request);
            // The last of the pair, so that what was skipped before the interruption counts too.
            let mut skipped = None;
            let [first, _] = &mut model.runners;
            first.submit(ID, Request::Diffusion(request)).unwrap();
            while first.next().is_some() {
                step(&mut **first, |_, event| {
                    if let Event::Finished { usage, .. } = event {
                        skipped = Some(usage.skipped_passes);
                    }
                });
            }
            assert!(skipped.is_some_and(|skipped| (1..12).contains(&skipped)), "{case} {method:?}: {skipped:?}");
        }
    }
}

/// Each part is a session of its own. One that is interrupted in the middle of its second part.
#[test]
fn videos_of_several_parts_go_on() {
    for (case, method, options) in [
        ("wan-i2v", ShotMethod::Continue, Options::default().with(&OVERLAP_FRAMES, 2)),
        ("wan-flf2v", ShotMethod::Chain, Options::default()),
    ] {
        let mut model = Twice::new(&source(case));
        let trained = model.card.canvas.frames.expect("a video model").trained_frames;
        let num_frames = if method == ShotMethod::Continue { trained + 4 } else { 9 };
        let pictures = [1, 2, 3].map(|seed| picture(48, 48, seed));
        let options = options
            .with(&SHOT_METHOD, method)
            .with(&NUM_FRAMES, num_frames)
            .with(&NUM_INFERENCE_STEPS, 2)
            .with(&INPUT_REFERENCE, Some(pictures[0].clone()));
        let options = match method {
            ShotMethod::Chain => {
                options.with(&KEY_IMAGES, vec![pictures[1].clone()]).with(&LAST_IMAGE, Some(pictures[2].clone()))
            }
            _ => options,
        };
        let request = model.request(options);
        let uninterrupted = video(&mut model, &request, None);
        assert_eq!(uninterrupted.len(), num_frames);
        assert!(video(&mut model, &request, Some(1)) == uninterrupted, "{case}: other frames");
    }
}

/// All frames; the part of number `interrupted` goes on in the other runner, once from the middle of its loop and once from
/// the middle of its frames.
fn video(model: &mut Twice, request: &DiffusionRequest, interrupted: Option<usize>) -> Vec<Frame> {
    let mut assembly = Assembly::new(request.clone());
    let mut frames = Vec::new();
    loop {
        let part = assembly.part_request();
        let (number, _) = assembly.position();
        let [first, second] = &mut model.runners;
        let mut said = Said::default();
        first.submit(ID, Request::Diffusion(part.clone())).unwrap();
        let mut on: [&mut Box<dyn Runner>; 2] = [first, second];
        let mut denoised = 0;
        while on[0].next().is_some() {
            let frames_before = said.frames.len();
            let phase = step(&mut **on[0], |_, event| said.hear(event));
            denoised += usize::from(phase == Phase::Denoise);
            let is_middle_of_loop = phase == Phase::Denoise && denoised == 1;
            let is_first_chunk = frames_before == 0 && !said.frames.is_empty() && said.skipped_passes.is_none();
            if interrupted == Some(number) && (is_middle_of_loop || is_first_chunk) {
                let checkpoint = on[0].checkpoint(ID).unwrap().expect("it has begun");
                on[0].cancel(ID);
                on.swap(0, 1);
                resume(&mut **on[0], ID, &part, &checkpoint).unwrap();
            }
        }
        frames.extend(assembly.push(said.frames));
        let Some(_) = assembly.next_part() else { break };
    }
    frames
}

#[test]
fn what_is_of_other_files_is_refused_by_name() {
    let (card, mut first) = load(&source("sdxl-b"), TextEncoders::Resident);
    let options = Options::default().with(&PROMPT, "x".to_owned()).with(&WIDTH, 64).with(&HEIGHT, 64);
    let request = card.resolve(&options.or(card.plainest()), 5).unwrap();
    first.submit(ID, Request::Diffusion(request.clone())).unwrap();
    while step(&mut *first, |_, _| ()) != Phase::Denoise {}
    let checkpoint = first.checkpoint(ID).unwrap().expect("it has begun");
    let refused = |source: &ModelSource, request: &DiffusionRequest| {
        let (_, mut runner) = load(source, TextEncoders::Resident);
        match resume(&mut *runner, ID, request, &checkpoint) {
            Err(Error::NotResumable(refusal)) => refusal,
            other => panic!("{other:?}"),
        }
    };
    let copy = || {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&case_dir("sdxl-b").join("checkpoint"), dir.path());
        dir
    };
    let same = copy();
    let (_, mut runner) = load(&ModelSource::at(same.path()), TextEncoders::Resident);
    resume(&mut *runner, ID, &request, &checkpoint).expect("the same files in another place");
    for component in ["unet", "vae", "text_encoder"] {
        let other = copy();
        edit_tensors(&other.path().join(component), "", |tensor| (tensor * 1.001).unwrap());
        assert_eq!(refused(&ModelSource::at(other.path()), &request), Refusal::Weights, "{component}");
    }
    let other = copy();
    let config = other.path().join("scheduler/scheduler_config.json");
    let changed = std::fs::read_to_string(&config).unwrap().replacen('{', "{\n  \"sigma_max\": null,", 1);
    std::fs::write(&config, changed).unwrap();
    assert_eq!(refused(&ModelSource::at(other.path()), &request), Refusal::Weights, "another schedule, perhaps");
    assert_eq!(refused(&source("sdxl-a"), &request), Refusal::Weights);
    assert_eq!(refused(&source("sdxl-b"), &request.with_seed(6)), Refusal::Request);
}

/// The name is the same, and what is in the file is not.
#[test]
fn a_lora_file_is_known_by_what_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&case_dir("lora").join("sdxl"), folder.path());
    let source = ModelSource { loras: Some(folder.path().to_owned()), ..source("sdxl-a") };
    let mut model = Twice::new(&source);
    let options = || Options::default().with(&LORAS, loras(&[("peft", 1.0)]));
    let request = model.request(options());
    let [first, second] = &mut model.runners;
    first.submit(ID, Request::Diffusion(request.clone())).unwrap();
    while step(&mut **first, |_, _| ()) != Phase::Denoise {}
    let checkpoint = first.checkpoint(ID).unwrap().expect("it has begun");
    resume(&mut **second, ID, &request, &checkpoint).expect("the same file");
    second.cancel(ID);
    let file = folder.path().join("peft.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
    let name = tensors.keys().max().unwrap().clone();
    let louder = (&tensors[&name] * 1.5).unwrap();
    tensors.insert(name, louder);
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let (card, mut runner) = load(&source, TextEncoders::Resident);
    let renewed = Twice::of(card, [load(&source, TextEncoders::Resident).1, load(&source, TextEncoders::Resident).1]);
    let refused = resume(&mut *runner, ID, &renewed.request(options()), &checkpoint).expect_err("another file");
    assert!(matches!(refused, Error::NotResumable(Refusal::Request)), "{refused}");
}
