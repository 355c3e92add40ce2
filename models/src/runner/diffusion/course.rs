//! The way of a request through its denoising steps: which solver moves the latents, and which of a model's denoisers
//! (experts) predicts in which step.
//!
//! A model with one denoiser has one stretch. Two experts by noise level that share a schedule (Wan2.2) are two stretches
//! of one solver; a refiner (SDXL) is a second stretch with a solver of its own. Pure.

use std::collections::VecDeque;
use std::ops::Range;

use crate::solver::Solver;

/// Number of a denoiser of a model. What it is conditioned on, predicts and decodes with is the family's affair.
pub type Expert = usize;

/// The denoiser of a model that has no other, and the first of those that have.
pub const FIRST_EXPERT: Expert = 0;

/// Steps in a row that one expert makes with one solver.
pub struct Stretch {
    /// Who predicts.
    pub expert: Expert,
    /// Of the solver's timesteps.
    pub steps: Range<usize>,
    /// Takes the place of the solver of the stretches before; without it that goes on, with all that it remembers.
    pub solver: Option<Box<dyn Solver>>,
}

/// All steps of a request.
pub struct Course {
    /// Of the first stretch.
    pub solver: Box<dyn Solver>,
    /// In their order, at least one.
    pub stretches: VecDeque<Stretch>,
}

impl Course {
    /// All steps of `solver`, by the first expert.
    pub fn of(solver: Box<dyn Solver>) -> Self {
        let stretch = Stretch { expert: FIRST_EXPERT, steps: 0..solver.timesteps().len(), solver: None };
        Self { solver, stretches: VecDeque::from([stretch]) }
    }

    /// All steps of `solver`: those at timesteps of at least `boundary` by the first expert, the others by `second`.
    pub fn with_boundary(solver: Box<dyn Solver>, boundary: f64, second: Expert) -> Self {
        let steps = solver.timesteps().len();
        let first_below = solver.timesteps().iter().position(|timestep| *timestep < boundary).unwrap_or(steps);
        let stretch = |expert, steps: Range<usize>| Stretch { expert, steps, solver: None };
        let both = [stretch(FIRST_EXPERT, 0..first_below), stretch(second, first_below..steps)];
        Self { solver, stretches: both.into_iter().filter(|stretch| !stretch.steps.is_empty()).collect() }
    }

    /// The same course up to step `end` of its only stretch; then `expert` goes on with steps of its own solver, from
    /// `first_step` on.
    pub fn handing_over(mut self, end: usize, expert: Expert, solver: Box<dyn Solver>, first_step: usize) -> Self {
        self.stretches[0].steps.end = end;
        let steps = first_step..solver.timesteps().len();
        self.stretches.push_back(Stretch { expert, steps, solver: Some(solver) });
        self
    }

    /// The same course without the steps before `first_step` of the first solver.
    pub fn starting_at(mut self, first_step: usize) -> Self {
        while self.stretches.len() > 1
            && self.stretches[1].solver.is_none()
            && self.stretches[0].steps.end <= first_step
        {
            self.stretches.pop_front();
        }
        self.stretches[0].steps.start = first_step.max(self.stretches[0].steps.start);
        self
    }

    /// Steps in all.
    pub fn num_steps(&self) -> usize {
        self.stretches.iter().map(|stretch| stretch.steps.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::error::Result;
    use crate::rng::TorchGenerator;

    /// Timesteps and nothing else.
    struct Timesteps(Vec<f64>);

    impl Solver for Timesteps {
        fn timesteps(&self) -> &[f64] {
            &self.0
        }

        fn add_noise(&self, _: usize, sample: &Tensor, _: &Tensor) -> Result<Tensor> {
            Ok(sample.clone())
        }

        fn predict_clean(&self, _: usize, _: &Tensor, sample: &Tensor) -> Result<Tensor> {
            Ok(sample.clone())
        }

        fn step(&mut self, _: usize, _: &Tensor, sample: &Tensor, _: &mut TorchGenerator) -> Result<Tensor> {
            Ok(sample.clone())
        }
    }

    fn solver(timesteps: &[f64]) -> Box<dyn Solver> {
        Box::new(Timesteps(timesteps.to_vec()))
    }

    fn check(course: &Course, expected: &[(Expert, Range<usize>)]) {
        let found: Vec<_> = course.stretches.iter().map(|stretch| (stretch.expert, stretch.steps.clone())).collect();
        assert_eq!(found, expected);
        assert_eq!(course.num_steps(), expected.iter().map(|(_, steps)| steps.len()).sum::<usize>());
    }

    #[test]
    fn a_boundary_parts_the_steps_by_noise() {
        let with = |boundary| Course::with_boundary(solver(&[1000.0, 900.0, 875.0, 500.0]), boundary, 1);
        check(&with(875.0), &[(0, 0..3), (1, 3..4)]);
        check(&with(876.0), &[(0, 0..2), (1, 2..4)]);
        check(&with(1001.0), &[(1, 0..4)]);
        check(&with(0.0), &[(0, 0..4)]);
    }

    #[test]
    fn left_out_steps_may_leave_out_an_expert() {
        let with =
            |first_step| Course::with_boundary(solver(&[1000.0, 900.0, 800.0]), 850.0, 1).starting_at(first_step);
        check(&with(0), &[(0, 0..2), (1, 2..3)]);
        check(&with(1), &[(0, 1..2), (1, 2..3)]);
        check(&with(2), &[(1, 2..3)]);
        check(&Course::of(solver(&[3.0, 2.0, 1.0])).starting_at(2), &[(0, 2..3)]);
    }

    #[test]
    fn a_refiner_has_steps_of_its_own() {
        let course = Course::of(solver(&[3.0, 2.0, 1.0])).handing_over(2, 1, solver(&[4.0, 3.0, 2.0, 1.0]), 3);
        check(&course, &[(0, 0..2), (1, 3..4)]);
        assert!(course.stretches[1].solver.is_some());
    }
}
