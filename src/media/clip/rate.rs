//! Another number of frames per second: which frames of a file show which of those that come in.
//!
//! Owns: the choice. A frame of the file shows what is on display at its time, so that motion keeps its speed and nothing
//! is invented between two frames: frames are shown again, or left out. Does not know: pixels.

/// A conversion under way.
#[derive(Debug)]
pub(super) struct Rate {
    fps: usize,
    output_fps: usize,
    /// Frames that have come in.
    num_pushed: usize,
}

impl Rate {
    /// `num_pushed` frames have come in before.
    pub(super) fn new(fps: usize, output_fps: usize, num_pushed: usize) -> Self {
        Self { fps, output_fps, num_pushed }
    }

    /// How many frames of the file show the frame that comes in now.
    ///
    /// Frame k of the file is at k / `output_fps`, when frame floor(k fps / output_fps) is on display. So those of frame i
    /// begin with ceil(i output_fps / fps), and a clip lasts as long as its frames do, or less than one frame of the file
    /// longer.
    pub(super) fn shown(&mut self) -> usize {
        let first = |index: usize| (index * self.output_fps).div_ceil(self.fps);
        let shown = first(self.num_pushed + 1) - first(self.num_pushed);
        self.num_pushed += 1;
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(fps: usize, output_fps: usize, expected: &[usize]) {
        let mut rate = Rate::new(fps, output_fps, 0);
        let found: Vec<usize> = expected.iter().map(|_| rate.shown()).collect();
        assert_eq!(found, expected, "{fps} to {output_fps}");
    }

    #[test]
    fn frames_are_shown_again_or_left_out_evenly() {
        check(16, 16, &[1, 1, 1, 1]);
        check(8, 24, &[3, 3, 3]);
        check(16, 24, &[2, 1, 2, 1, 2]);
        check(16, 8, &[1, 0, 1, 0, 1]);
        check(24, 16, &[1, 1, 0, 1, 1, 0]);
        check(16, 1, &[1, 0, 0, 0]);
    }

    #[test]
    fn a_clip_lasts_as_long_as_its_frames() {
        for fps in 1..=60 {
            for output_fps in 1..=60 {
                let mut rate = Rate::new(fps, output_fps, 0);
                let mut frames = 0;
                for pushed in 1..=100 {
                    frames += rate.shown();
                    let longer = frames as f64 / output_fps as f64 - pushed as f64 / fps as f64;
                    assert!((-1e-9..1.0 / output_fps as f64).contains(&longer), "{pushed} of {fps} to {output_fps}");
                }
            }
        }
    }
}
