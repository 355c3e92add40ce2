//! Linear combinations of a sample and a multistep solver's latest predictions.

use std::collections::VecDeque;

use candle_core::Tensor;

use crate::error::Result;

/// The next sample: so much of the sample, and so much of each of the latest predictions, newest first.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Update {
    pub(super) sample: f64,
    pub(super) predictions: Vec<f64>,
}

impl Update {
    pub(super) fn apply(&self, sample: &Tensor, predictions: &VecDeque<Tensor>) -> Result<Tensor> {
        let mut sum = (sample * self.sample)?;
        for (weight, prediction) in self.predictions.iter().zip(predictions) {
            sum = (sum + (prediction * *weight)?)?;
        }
        Ok(sum)
    }
}
