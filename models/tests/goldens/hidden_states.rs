//! Language models as text encoders: hidden states of padded batches without a cache.

use std::ops::Range;

use candle_core::{DType, Tensor};
use tale_models::layers::decoder::{DecoderInput, DenseInput};
use tale_models::runner::text::model::CausalLm;

use crate::support::{assert_close, golden_tensors};
use crate::text::{CASES, SharedCaches, network};

const TOLERANCE: f64 = 1e-4;

/// A batch of the golden: token ids of each row, and which of them count.
struct Batch {
    rows: Vec<Vec<u32>>,
    counted: Vec<Range<usize>>,
}

impl Batch {
    fn read(case: &str, side: &str) -> Self {
        let golden = golden_tensors("hidden-states");
        let table = |name: &str| -> Vec<Vec<u32>> {
            golden[&format!("{case}.{side}.{name}")].to_dtype(DType::U32).unwrap().to_vec2().unwrap()
        };
        let counted = table("mask").into_iter().map(|mask| {
            let start = mask.iter().position(|bit| *bit == 1).unwrap();
            start..start + mask.iter().sum::<u32>() as usize
        });
        Self { rows: table("ids"), counted: counted.collect() }
    }

    fn input(&self) -> DenseInput {
        DenseInput::new(&self.rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), &self.counted)
    }

    /// Of `[b, l, n]` the tokens that count, one row after the other.
    fn packed(&self, states: &Tensor) -> Tensor {
        let rows = self.counted.iter().enumerate();
        let rows = rows.map(|(row, range)| states.get(row).unwrap().narrow(0, range.start, range.len()).unwrap());
        Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap()
    }
}

#[test]
fn hidden_states_of_every_layer_equal_the_reference() {
    let golden = golden_tensors("hidden-states");
    for case in CASES {
        let network = network(case);
        let layers = network.decoder().config().num_hidden_layers;
        for side in ["right", "left"] {
            let batch = Batch::read(case, side);
            let wanted: Vec<usize> = (0..=layers).collect();
            let states = network.decoder().hidden_states(&batch.input(), &wanted).unwrap();
            for (number, found) in states.iter().enumerate() {
                let expected = &golden[&format!("{case}.{side}.state{number}")];
                let what = format!("{case} {side} state {number}");
                assert_close(&what, &batch.packed(found), &batch.packed(expected), TOLERANCE);
                // Padding after the tokens looks at them in the reference too; before them it looks at nothing.
                if side == "right" {
                    assert_close(&what, found, expected, TOLERANCE);
                }
            }
        }
    }
}

/// As a text encoder does it that wants the state before the last two layers.
#[test]
fn a_pass_ends_at_the_last_wanted_layer() {
    for case in CASES {
        let network = network(case);
        let before_last = network.decoder().config().num_hidden_layers - 2;
        let input = Batch::read(case, "right").input();
        let states = |wanted: &[usize]| network.decoder().hidden_states(&input, wanted).unwrap();
        let (all, one) = (states(&[0, before_last, before_last + 2]), states(&[before_last]));
        assert_close(case, &one[0], &all[1], 0.0);
        let again = states(&[before_last + 2, before_last, before_last]);
        assert_close(case, &again[0], &all[2], 0.0);
        assert_close(case, &again[2], &all[1], 0.0);
    }
}

#[test]
fn the_last_state_has_the_logits_of_the_paged_decoder() {
    for case in CASES {
        let network = network(case);
        let last = network.decoder().config().num_hidden_layers;
        for side in ["right", "left"] {
            let batch = Batch::read(case, side);
            let states = network.decoder().hidden_states(&batch.input(), &[last]).unwrap();
            let found = network.head(&batch.packed(&states[0])).unwrap();
            let mut shared = SharedCaches::new(&network, 64 * batch.rows.len());
            let mut input = DecoderInput::default();
            for (row, counted) in batch.rows.iter().zip(&batch.counted) {
                input.push(&row[counted.clone()], 0, &shared.table(counted.len()));
            }
            input.want_all_logits();
            let expected = network.forward(&input, shared.caches()).unwrap().unwrap();
            assert_close(&format!("{case} {side}"), &found, &expected, TOLERANCE);
        }
    }
}
