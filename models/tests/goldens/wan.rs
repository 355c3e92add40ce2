//! Wan2.1 text-to-video and its solver, stage by stage.

use candle_core::Tensor;
use tale_models::solver::Solver;
use tale_models::solver::unipc::{UniPc, UniPcConfig};

use crate::support::{assert_close, golden_json, golden_tensors};

/// Coefficients are f64 here and f32 in the reference, whose third-order terms cancel to a few digits over 50 steps.
const THIRD_ORDER_TOLERANCE: f64 = 5e-5;

#[test]
fn unipc_takes_the_steps_of_the_reference() {
    let golden = golden_json("solvers");
    let tensors = golden_tensors("solvers");
    let dir = tempfile::tempdir().unwrap();
    let mut checked = 0;
    for case in golden["cases"].as_array().unwrap() {
        if case["class"] != "UniPCMultistepScheduler" {
            continue;
        }
        let path = dir.path().join("scheduler_config.json");
        std::fs::write(&path, case["config"].to_string()).unwrap();
        let num_steps = case["num_inference_steps"].as_u64().unwrap() as usize;
        let mut solver = UniPc::new(&UniPcConfig::read(&path).unwrap(), num_steps);
        let tolerance = if case["config"]["solver_order"] == 3 { THIRD_ORDER_TOLERANCE } else { 1e-5 };
        let name = case["name"].as_str().unwrap();
        let tensor = |what: &str| &tensors[&format!("{name}.{what}")];

        assert_close(&format!("{name} timesteps"), &row(solver.timesteps()), tensor("timesteps"), 0.0);
        assert_close(&format!("{name} sigmas"), &row(solver.sigmas()), tensor("sigmas"), 1e-7);
        let mut sample = tensor("sample").clone();
        // With `bh1` the reference ends in NaN (infinity times zero), so that its last step is not recorded.
        for step in 0..tensor("samples").dim(0).unwrap() {
            sample = solver.step(step, &tensor("outputs").get(step).unwrap(), &sample).unwrap();
            assert_close(&format!("{name} step {step}"), &sample, &tensor("samples").get(step).unwrap(), tolerance);
        }
        checked += 1;
    }
    assert!(checked > 0, "the golden has cases of this solver");
}

fn row(values: &[f64]) -> Tensor {
    let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    Tensor::new(values, &candle_core::Device::Cpu).expect("values make a row")
}
