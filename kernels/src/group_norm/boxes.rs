//! Which value of a smaller clip a value of a larger one goes with: the nearest, as torch's `interpolate` has it where the
//! sizes divide, but for a first frame that has one to itself. Pure.

use candle_core::{Result, Tensor, bail};

/// Frames, rows and columns of a clip, and of the smaller one whose values its boxes share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Boxes {
    pub(super) large: [usize; 3],
    pub(super) small: [usize; 3],
}

impl Boxes {
    /// Of x `[batch, channels, t, h, w]`, and of what is smaller.
    pub(super) fn new(x: &Tensor, factor: &Tensor, term: &Tensor) -> Result<Self> {
        let ((b, c, t, h, w), (small_b, small_c, small_t, small_h, small_w)) = (x.dims5()?, factor.dims5()?);
        let boxes = Self { large: [t, h, w], small: [small_t, small_h, small_w] };
        let fits = [b, c] == [small_b, small_c] && factor.dims() == term.dims() && boxes.divide();
        match fits {
            true => Ok(boxes),
            false => {
                let (x, factor, term) = (x.shape(), factor.shape(), term.shape());
                bail!("spatial_norm: x {x:?} does not fit the factor {factor:?} and the term {term:?}")
            }
        }
    }

    /// Whether every value of the smaller clip has boxes of one size.
    fn divide(&self) -> bool {
        let lead = self.lead();
        let [t, h, w] = self.large;
        let [small_t, small_h, small_w] = self.small;
        let divides = |small: usize, large: usize| small > 0 && large.is_multiple_of(small);
        small_t >= lead && divides(small_t - lead, t - lead) && divides(small_h, h) && divides(small_w, w)
    }

    /// Frames that have one to themselves.
    pub(super) fn lead(&self) -> usize {
        usize::from(self.large[0] > 1 && self.large[0] % 2 == 1)
    }

    /// Values of a channel of the smaller clip.
    pub(super) fn small_positions(&self) -> usize {
        self.small.iter().product()
    }

    /// The smaller clip's frame of frame `frame`.
    pub(super) fn small_frame(&self, frame: usize) -> usize {
        let lead = self.lead();
        match frame.checked_sub(lead) {
            None => 0,
            Some(later) => lead + later / ((self.large[0] - lead) / (self.small[0] - lead)),
        }
    }
}
