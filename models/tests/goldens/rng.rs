//! torch's CPU generator held against torch: every bit.

use tale_models::rng::TorchGenerator;

use crate::support::{golden_json, golden_tensors};

fn numbers(value: &serde_json::Value) -> Vec<u64> {
    serde_json::from_value(value.clone()).expect("a list of numbers")
}

fn assert_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: value {i} is {a}, torch says {b}");
    }
}

#[test]
fn single_draws_have_the_bits_of_torch() {
    let (golden, tensors) = (golden_json("rng"), golden_tensors("rng"));
    for seed in numbers(&golden["seeds"]) {
        for size in numbers(&golden["sizes"]) {
            let name = format!("seed{seed}.n{size}");
            let expected: Vec<f32> = tensors[&name].to_vec1().expect("one axis of f32");
            assert_bits(&name, &TorchGenerator::new(seed).randn(size as usize), &expected);
        }
    }
}

#[test]
fn draws_that_continue_one_generator_have_the_bits_of_torch() {
    let (golden, tensors) = (golden_json("rng"), golden_tensors("rng"));
    let sequences = golden["sequences"].as_array().expect("sequences");
    for (i, sequence) in sequences.iter().enumerate() {
        let seed = sequence["seed"].as_u64().expect("seed");
        let nth = sequences[..i].iter().filter(|earlier| earlier["seed"] == sequence["seed"]).count();
        let mut generator = TorchGenerator::new(seed);
        let found: Vec<f32> =
            numbers(&sequence["sizes"]).iter().flat_map(|size| generator.randn(*size as usize)).collect();
        let name = format!("seed{seed}.seq{nth}");
        let expected: Vec<f32> = tensors[&name].to_vec1().expect("one axis of f32");
        assert_bits(&name, &found, &expected);
    }
}
