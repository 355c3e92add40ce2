//! Previews: after which denoising steps a session shows how far it has come, and how.

use candle_core::Tensor;

use super::to_byte;
use crate::diffusion::DiffusionRequest;
use crate::error::Result;
use crate::request::Frame;
use crate::vae::preview::RoughPicture;

/// What a family adds that can show latents on their way.
pub trait Previews {
    /// A rough image of them, of a video of its middle, cheap beside a step and as small as it likes.
    fn preview(&self, latents: &Tensor, request: &DiffusionRequest) -> Result<Frame>;
}

/// The frame of a rough picture.
pub(crate) fn rough_frame((width, height, rgb): RoughPicture) -> Frame {
    Frame { width, height, rgb: rgb.into_iter().map(to_byte).collect() }
}

/// Most previews of one request.
pub const MAX_PREVIEWS: usize = 3;

/// The number, from 0, of the preview that is due after step `done` of `total`, where `previews` were asked for: they are
/// spread evenly between the first and the last step, neither of which has one of its own where there are others to
/// choose. A loop of few steps gives fewer.
pub fn due_preview(done: usize, total: usize, previews: usize) -> Option<usize> {
    let mut steps: Vec<usize> = (1..=previews).map(|preview| preview * total / (previews + 1)).collect();
    steps.retain(|step| (1..total).contains(step));
    steps.dedup();
    steps.iter().position(|step| *step == done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(total: usize, previews: usize, expected: &[usize]) {
        let due: Vec<_> = (1..=total).filter_map(|done| Some((due_preview(done, total, previews)?, done))).collect();
        let numbered: Vec<_> = expected.iter().copied().enumerate().collect();
        assert_eq!(due, numbered, "{previews} in {total} steps");
    }

    #[test]
    fn previews_are_spread_over_the_steps_between() {
        check(28, 0, &[]);
        check(28, 1, &[14]);
        check(30, 2, &[10, 20]);
        check(50, 3, &[12, 25, 37]);
        check(4, 3, &[1, 2, 3]);
        check(3, 3, &[1, 2]);
        check(2, 3, &[1]);
        check(1, 3, &[]);
    }
}
