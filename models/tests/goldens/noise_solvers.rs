//! The solvers of models with a discrete noise schedule, step by step.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value;
use tale_models::rng::TorchGenerator;
use tale_models::solver::Solver;
use tale_models::solver::config::SchedulerConfig;
use tale_models::solver::euler::{Euler, EulerConfig};

use crate::support::{assert_close, golden_json, golden_tensors};

const SIZE: usize = 16;
/// f32 on both sides; coefficients are f64 here and f32 there.
const TOLERANCE: f64 = 1e-5;
/// With zero SNR the loop begins at sigma 4096, from which the first step takes all but a few bits.
const ZERO_SNR_TOLERANCE: f64 = 1e-4;

#[test]
fn euler_takes_the_steps_of_the_reference() {
    check("EulerDiscreteScheduler", |file, steps| Box::new(Euler::new(&EulerConfig::new(file).unwrap(), steps)));
}

/// Every case of the scheduler `class`: timesteps, the start, each step from the sample that the reference had before
/// it, and a loop that is entered in the middle.
fn check(class: &str, solver: impl Fn(&SchedulerConfig, usize) -> Box<dyn Solver>) {
    let (golden, tensors) = (golden_json("noise-solvers"), golden_tensors("noise-solvers"));
    let mut checked = 0;
    for case in golden["cases"].as_array().unwrap().iter().filter(|case| case["class"] == class) {
        let case = Case::new(&golden["base"], case, &tensors);
        let new = || solver(&case.config, case.num_steps);
        case.check_whole_loop(new());
        if case.num_steps > 2 {
            case.check_late_loop(new());
        }
        checked += 1;
    }
    assert!(checked > 0, "the golden has cases of {class}");
}

struct Case<'a> {
    what: String,
    name: String,
    seed: u64,
    config: SchedulerConfig,
    num_steps: usize,
    tolerance: f64,
    /// Drawn by the session itself: the start, the model's noise, the noise of the steps.
    noise: Tensor,
    model: Tensor,
    generator: TorchGenerator,
    tensors: &'a HashMap<String, Tensor>,
}

impl<'a> Case<'a> {
    fn new(base: &Value, case: &Value, tensors: &'a HashMap<String, Tensor>) -> Self {
        let number = |field: &str| case[field].as_u64().unwrap();
        let (num_steps, seed) = (number("num_inference_steps") as usize, number("seed"));
        let mut generator = TorchGenerator::new(seed);
        let row = |values: Vec<f32>| Tensor::from_vec(values, (1, SIZE), &Device::Cpu).unwrap();
        let noise = row(generator.randn(SIZE));
        let model = TorchGenerator::new(seed + 1000).randn(num_steps * SIZE);
        Self {
            what: format!("{} {} in {num_steps}", case["class"], case["change"]),
            name: case["name"].as_str().unwrap().to_owned(),
            config: config(base, &case["change"]),
            seed,
            num_steps,
            tolerance: if case["change"]["rescale_betas_zero_snr"] == true { ZERO_SNR_TOLERANCE } else { TOLERANCE },
            noise,
            model: Tensor::from_vec(model, (num_steps, SIZE), &Device::Cpu).unwrap(),
            generator,
            tensors,
        }
    }

    fn check_whole_loop(&self, solver: Box<dyn Solver>) {
        let timesteps: Vec<f32> = solver.timesteps().iter().map(|timestep| *timestep as f32).collect();
        let timesteps = Tensor::new(timesteps, &Device::Cpu).unwrap();
        assert_close(&format!("{} timesteps", self.what), &timesteps, self.get("timesteps"), 1e-6);
        let start = (&self.noise * solver.init_noise_sigma()).unwrap();
        self.check_steps(solver, "samples", 0, start, &mut self.generator.clone());
    }

    fn check_late_loop(&self, solver: Box<dyn Solver>) {
        let (begin, picture) = (self.num_steps / 2, self.model.narrow(0, 0, 1).unwrap());
        let start = solver.add_noise(begin, &picture, &self.noise).unwrap();
        self.check_steps(solver, "late", begin, start, &mut TorchGenerator::new(self.seed + 2000));
    }

    /// `which` holds the sample at `begin` and after every step.
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
        for index in begin..self.num_steps {
            let sample = expected(index - begin);
            let input = solver.scale_model_input(index, &sample).unwrap();
            let output = ((input * 0.3).unwrap() + self.model.narrow(0, index, 1).unwrap()).unwrap();
            let next = solver.step(index, &output, &sample, generator).unwrap();
            assert_close(
                &format!("{} {which} {index}", self.what),
                &next,
                &expected(index + 1 - begin),
                self.tolerance,
            );
        }
    }

    fn get(&self, what: &str) -> &Tensor {
        &self.tensors[&format!("{}.{what}", self.name)]
    }
}

/// `base` with the fields of `change`, as a checkpoint has them.
fn config(base: &Value, change: &Value) -> SchedulerConfig {
    let mut fields = base.as_object().unwrap().clone();
    fields.extend(change.as_object().unwrap().clone());
    SchedulerConfig::parse(Path::new("scheduler_config.json"), Value::Object(fields).to_string().into()).unwrap()
}
