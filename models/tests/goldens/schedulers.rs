//! Every name of a scheduler: its timesteps and steps for files of many kinds, and the pictures of an SDXL checkpoint.

use std::collections::HashMap;
use std::path::Path;
use tale_models::diffusion::parameters::{
    ETA, GUIDANCE_SCALE, HEIGHT, NEGATIVE_PROMPT, NUM_INFERENCE_STEPS, PROMPT, SCHEDULER, SEED, TIMESTEP_SPACING, WIDTH,
};
use tale_models::parameter::Options;

use candle_core::{Device, Tensor};
use serde_json::Value;

use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionRequest;
use tale_models::family::LoadOptions;
use tale_models::rng::TorchGenerator;
use tale_models::runner::Runner;
use tale_models::solver::Solver;
use tale_models::solver::config::SchedulerConfig;
use tale_models::solver::names::{Loop, SCHEDULERS, Scheduler};
use tale_models::solver::schedulers::{Asked, Chosen, Schedulers, Training};
use tale_models::{DiffusionCard, ModelCard};

use crate::support::{assert_close, case_dir, copy_folder, golden_json, golden_tensors, pictures, psnr};

const STEPS: &str = "schedulers";
const PICTURES: &str = "sdxl-schedulers";
const SIZE: usize = 16;
/// f32 on both sides; coefficients are f64 here and f32 there, where differences of logarithms cost digits.
const TOLERANCE: f64 = 3e-5;
/// With zero SNR a loop begins at sigma 4096, from which the first step takes all but a few bits.
const ZERO_SNR_TOLERANCE: f64 = 1e-4;
const MIN_PSNR: f64 = 50.0;

#[test]
fn every_name_takes_the_steps_of_the_reference() {
    let (golden, tensors) = (golden_json(STEPS), golden_tensors(STEPS));
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        Case::new(&golden["base"], case, &tensors).check();
    }
    let covered: Vec<&str> = cases.iter().map(|case| case["name"].as_str().unwrap()).collect();
    // CogVideoX's two have steps of their own golden, by their classes.
    let of_cogvideox = golden_json("cogvideox-solvers");
    let classes: Vec<&str> =
        of_cogvideox["cases"].as_array().unwrap().iter().flat_map(|case| case["class"].as_str()).collect();
    for class in ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"] {
        assert!(classes.contains(&class), "the golden has cases of {class}");
    }
    // Euler's own group has its steps; a class name is its short one, but for DPM-Solver.
    let short = SCHEDULERS.iter().map(|scheduler| scheduler.name).filter(|name| !name.ends_with("Scheduler"));
    for name in short
        .filter(|name| !name.starts_with("cogvideox"))
        .chain(["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
    {
        assert!(covered.contains(&name), "the golden has cases of {name}");
    }
}

/// A checkpoint's file, the name under which it is sampled, and a loop.
struct Case<'a> {
    what: String,
    seed: u64,
    schedulers: Schedulers,
    scheduler: &'static Scheduler,
    steps: usize,
    eta: Option<f64>,
    tolerance: f64,
    noise: Tensor,
    model: Tensor,
    generator: TorchGenerator,
    tensors: &'a HashMap<String, Tensor>,
}

impl<'a> Case<'a> {
    fn new(base: &Value, case: &Value, tensors: &'a HashMap<String, Tensor>) -> Self {
        let (name, own) = (case["name"].as_str().unwrap(), case["own"].as_str().unwrap());
        let what = format!("{name} of {own} {} in {}, eta {}", case["change"], case["steps"], case["eta"]);
        let change = &case["change"];
        let training = match change["use_flow_sigmas"] == true || own == "FlowMatchEulerDiscreteScheduler" {
            true => Training::Flow,
            false => Training::Discrete,
        };
        let file = file(if case["base"] == true { base } else { &Value::Null }, change);
        let schedulers = Schedulers::new(Scheduler::named(own).unwrap(), &file, training).unwrap();
        let (seed, steps) = (case["seed"].as_u64().unwrap(), case["steps"].as_u64().unwrap() as usize);
        let chosen = schedulers
            .choose(Asked { scheduler: Some(name), ..Asked::default() })
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        let Chosen { scheduler, max_steps, .. } = chosen;
        assert!(steps <= max_steps, "{what}: {max_steps} steps");
        let mut generator = TorchGenerator::new(seed);
        let noise = Tensor::from_vec(generator.randn(SIZE), (1, SIZE), &Device::Cpu).unwrap();
        let model = TorchGenerator::new(seed + 1000).randn(steps * SIZE);
        Self {
            what,
            seed,
            schedulers,
            scheduler,
            steps,
            eta: case["eta"].as_f64(),
            tolerance: if change["rescale_betas_zero_snr"] == true { ZERO_SNR_TOLERANCE } else { TOLERANCE },
            noise,
            model: Tensor::from_vec(model, (steps, SIZE), &Device::Cpu).unwrap(),
            generator,
            tensors,
        }
    }

    fn start(&self) -> Box<dyn Solver> {
        self.schedulers.start(self.scheduler, &Loop { steps: self.steps, eta: self.eta, ..Loop::default() })
    }

    /// The whole loop, and one that is entered in the middle.
    fn check(&self) {
        let solver = self.start();
        let timesteps: Vec<f32> = solver.timesteps().iter().map(|timestep| *timestep as f32).collect();
        let timesteps = Tensor::new(timesteps, &Device::Cpu).unwrap();
        assert_close(&format!("{} timesteps", self.what), &timesteps, self.get("timesteps"), 1e-6);
        let start = (&self.noise * solver.init_noise_sigma()).unwrap();
        self.check_steps(solver, "samples", 0, start, &mut self.generator.clone());
        if self.steps > 2 {
            let (solver, begin) = (self.start(), self.steps / 2);
            let start = solver.add_noise(begin, &self.model.narrow(0, 0, 1).unwrap(), &self.noise).unwrap();
            self.check_steps(solver, "late", begin, start, &mut TorchGenerator::new(self.seed + 2000));
        }
    }

    /// `which` holds the sample at `begin` and after every step; each step sets out from the reference's sample.
    fn check_steps(
        &self,
        mut solver: Box<dyn Solver>,
        which: &str,
        begin: usize,
        start: Tensor,
        generator: &mut TorchGenerator,
    ) {
        let expected = |row: usize| self.get(which).narrow(0, row, 1).unwrap();
        assert_close(&format!("{} {which} start", self.what), &start, &expected(0), self.tolerance);
        for index in begin..self.steps {
            let sample = expected(index - begin);
            let input = solver.scale_model_input(index, &sample).unwrap();
            let output = ((input * 0.3).unwrap() + self.model.narrow(0, index, 1).unwrap()).unwrap();
            let next = solver.step(index, &output, &sample, generator).unwrap();
            let what = format!("{} {which} {index}", self.what);
            assert_close(&what, &next, &expected(index + 1 - begin), self.tolerance);
        }
    }

    fn get(&self, what: &str) -> &Tensor {
        &self.tensors[&format!("{}.{what}", self.seed)]
    }
}

/// `base` with the fields of `change`, as a checkpoint has them.
fn file(base: &Value, change: &Value) -> SchedulerConfig {
    let mut fields = base.as_object().cloned().unwrap_or_default();
    fields.extend(change.as_object().unwrap().clone());
    SchedulerConfig::parse(Path::new("scheduler_config.json"), Value::Object(fields).to_string().into()).unwrap()
}

#[test]
fn every_name_makes_the_picture_of_the_reference() {
    let (golden, tensors) = (golden_json(PICTURES), golden_tensors(PICTURES));
    for (i, run) in golden["runs"].as_array().unwrap().iter().enumerate() {
        let (card, mut runner) = load(run);
        let request = request(&golden["request"], run, &card);
        let expected: Vec<u8> = tensors[&format!("run{i}.image")].flatten_all().unwrap().to_vec1().unwrap();
        let found = psnr(&pictures(&mut *runner, &[request]).remove(0).rgb, &expected);
        println!("{} of {}: {found:.1} dB", run["scheduler"], run["own"]);
        assert!(found >= MIN_PSNR, "{run}: {found:.1} dB");
    }
}

/// Sessions of every scheduler, each entered one step after the one before, in shared forward passes.
#[test]
fn sessions_of_different_schedulers_share_passes_and_equal_the_lone_ones() {
    let golden = golden_json(PICTURES);
    let runs: Vec<&Value> = golden["runs"].as_array().unwrap().iter().filter(|run| run["own"].is_null()).collect();
    let (card, mut runner) = load(runs[0]);
    let requests: Vec<_> = runs.iter().map(|run| request(&golden["request"], run, &card)).collect();
    let together = pictures(&mut *runner, &requests);
    for (request, together) in requests.iter().zip(&together) {
        let alone = pictures(&mut *runner, std::slice::from_ref(request)).remove(0);
        let found = psnr(&together.rgb, &alone.rgb);
        assert!(found >= MIN_PSNR, "{}: {found:.1} dB against itself alone", request.sampling.scheduler.name);
    }
}

#[test]
fn a_checkpoint_offers_what_its_configuration_makes_sense_under() {
    let names = |json: Value, own: &str, training: Training| -> Vec<&str> {
        let schedulers = Schedulers::new(Scheduler::named(own).unwrap(), &file(&Value::Null, &json), training);
        schedulers.unwrap().iter().map(|scheduler| scheduler.name).filter(|name| !name.ends_with("Scheduler")).collect()
    };
    let discrete = [
        "euler",
        "euler_a",
        "ddim",
        "dpmpp_2m",
        "dpmpp_2m_karras",
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_karras",
        "unipc",
        "lcm",
        "tcd",
    ];
    assert_eq!(names(serde_json::json!({}), "EulerDiscreteScheduler", Training::Discrete), discrete);
    // Only these know what the fields ask for, or do not look at them.
    let sample = serde_json::json!({"prediction_type": "sample", "thresholding": true});
    assert_eq!(names(sample, "EulerDiscreteScheduler", Training::Discrete), ["euler", "tcd"]);
    let flow = serde_json::json!({"use_flow_sigmas": true, "prediction_type": "flow_prediction"});
    assert_eq!(names(flow, "UniPCMultistepScheduler", Training::Flow), ["unipc", "flow_euler"]);
    let dynamic = serde_json::json!({"use_dynamic_shifting": true});
    assert_eq!(names(dynamic, "FlowMatchEulerDiscreteScheduler", Training::FlowWithMu), ["flow_euler"]);
}

/// The checkpoint of the pictures, its scheduler replaced by that of the run, if it has one.
fn load(run: &Value) -> (DiffusionCard, Box<dyn Runner>) {
    let checkpoint = case_dir("sdxl-a").join("checkpoint");
    let changed = tempfile::tempdir().unwrap();
    let path = match run["own"].as_str() {
        None => checkpoint,
        Some(own) => {
            copy_folder(&checkpoint, changed.path());
            let index = changed.path().join("model_index.json");
            let mut fields: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
            fields["scheduler"] = serde_json::json!(["diffusers", own]);
            std::fs::write(index, fields.to_string()).unwrap();
            let config = changed.path().join("scheduler/scheduler_config.json");
            std::fs::write(config, run["config"].to_string()).unwrap();
            changed.path().to_owned()
        }
    };
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let options = LoadOptions { max_denoise_rows: 6, ..Default::default() };
    let loaded = tale_models::load(&path, &placement, &options, &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = loaded.card else { panic!("the checkpoint makes pictures") };
    (card, loaded.runner)
}

fn request(base: &Value, run: &Value, card: &DiffusionCard) -> DiffusionRequest {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let size = |value: &Value| value.as_u64().map(|value| value as usize);
    let options = Options::default()
        .with(&PROMPT, text(&base["prompt"]).unwrap())
        .with(&NEGATIVE_PROMPT, text(&base["negative_prompt"]))
        .with(&WIDTH, size(&base["width"]))
        .with(&HEIGHT, size(&base["height"]))
        .with(&GUIDANCE_SCALE, base["guidance_scale"].as_f64())
        .with(&NUM_INFERENCE_STEPS, size(&run["num_inference_steps"]))
        .with(&SCHEDULER, text(&run["scheduler"]))
        .with(&TIMESTEP_SPACING, run["timestep_spacing"].as_str().map(|spacing| spacing.parse().unwrap()))
        .with(&ETA, run["eta"].as_f64())
        .with(&SEED, run["seed"].as_u64());
    let request = card.resolve(&options, 0).unwrap();
    let own = run["own"].as_str().unwrap_or("EulerDiscreteScheduler");
    assert_eq!(request.sampling.scheduler.name, run["scheduler"].as_str().unwrap_or(own), "the effective name");
    request
}

/// A file of a class without a solver and with a field of nobody, as the checkpoint's own: requests name another one, and
/// get the picture that it makes of a file of its own.
#[test]
fn a_checkpoint_of_a_class_without_a_solver_is_served() {
    let picture_of = |class_name: &str, options: Options| {
        let dir = tempfile::tempdir().unwrap();
        copy_folder(&case_dir("sdxl-a").join("checkpoint"), dir.path());
        let edit = |file: &str, change: &dyn Fn(&mut Value)| {
            let path = dir.path().join(file);
            let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            change(&mut json);
            std::fs::write(path, json.to_string()).unwrap();
        };
        edit("model_index.json", &|index| index["scheduler"][1] = class_name.into());
        edit("scheduler/scheduler_config.json", &|file| file["noise_sampler_seed"] = Value::Null);
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
        let mut model = tale_models::load(dir.path(), &placement, &LoadOptions::default(), &mut |_| ()).unwrap();
        let ModelCard::Diffusion(card) = &model.card else { panic!("makes pictures") };
        let request = card.resolve(&options, 7)?;
        Ok::<_, tale_models::Error>(pictures(&mut *model.runner, &[request]).remove(0).rgb)
    };
    let options = |scheduler: Option<&str>| {
        Options::default()
            .with(&PROMPT, "a paper boat".to_owned())
            .with(&WIDTH, 64)
            .with(&HEIGHT, 64)
            .with(&NUM_INFERENCE_STEPS, 2)
            .with(&SCHEDULER, scheduler.map(str::to_owned))
    };
    let expected = picture_of("EulerDiscreteScheduler", options(None)).unwrap();
    for class_name in ["PNDMScheduler", "HeunDiscreteScheduler", "DDPMScheduler", "DPMSolverSDEScheduler"] {
        assert!(picture_of(class_name, options(Some("euler"))).unwrap() == expected, "{class_name}");
        let error = picture_of(class_name, options(None)).unwrap_err().to_string();
        assert!(error.starts_with("scheduler: is needed") && error.contains(class_name), "{error}");
        assert!(error.contains("allowed: euler, euler_a, ddim"), "{error}");
    }
}
