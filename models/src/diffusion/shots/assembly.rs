//! One video of several parts: what each part is made with, and which of its frames the video has.
//!
//! Pure: frames of a part go in as they come, frames of the video come out. Owns: the cross-fade, what is held back for it,
//! and the requests of the parts. Does not know: who makes a part, nor what becomes of the frames.

use std::sync::Arc;

use crate::diffusion::DiffusionRequest;
use crate::diffusion::keyframes::{Keyframe, Keyframes};
use crate::frame::Frame;

use super::{Shot, ShotMethod};

/// A video under way.
#[derive(Debug)]
pub struct Assembly {
    /// Of the whole video.
    request: DiffusionRequest,
    shot: Shot,
    /// The part that is being made.
    part: usize,
    /// Frames of it that have come.
    num_come: usize,
    /// Frames of the video that have been there, whether given out or not.
    num_passed: usize,
    /// Frames of the video that nobody wants, at its beginning.
    num_skipped: usize,
    /// The end of the part before, which this part's first frames are faded into.
    before: Vec<Frame>,
    /// The end of this part, for the next one.
    held: Vec<Frame>,
}

impl Assembly {
    /// Of the video that `request` asks for, as [`DiffusionCard::resolve`](crate::diffusion::DiffusionCard::resolve) has
    /// made it.
    pub fn new(request: DiffusionRequest) -> Self {
        let num_frames = request.canvas.num_frames;
        let shot = request.shot.clone().unwrap_or_else(|| Shot {
            method: ShotMethod::SinglePass,
            overlap_frames: 1,
            parts: vec![num_frames],
            num_frames,
            trained_frames: num_frames,
        });
        Self {
            request,
            shot,
            part: 0,
            num_come: 0,
            num_passed: 0,
            num_skipped: 0,
            before: Vec::new(),
            held: Vec::new(),
        }
    }

    /// Of a video that goes on from another one, with whose last frame it begins: without that frame, which is there
    /// already.
    pub fn going_on(request: DiffusionRequest) -> Self {
        Self { num_skipped: 1, ..Self::new(request) }
    }

    /// Number of the part that is being made, from 0, and of all parts.
    pub fn position(&self) -> (usize, usize) {
        (self.part, self.shot.parts.len())
    }

    /// What the part is made with. Parts after the first draw other noise: their seeds count up from the request's.
    pub fn part_request(&self) -> DiffusionRequest {
        let part = self.part;
        let mut request = self.request.with_seed(self.request.sampling.seed.wrapping_add(part as u64));
        request.shot = None;
        request.canvas.num_frames = self.shot.parts[part];
        match self.shot.method {
            ShotMethod::SinglePass => (),
            ShotMethod::Continue => {
                if let Some(frame) = self.before.first() {
                    request.keyframes = Some(Keyframes::from_first(Keyframe::exact(Arc::new(frame.clone()))));
                }
            }
            ShotMethod::Chain => {
                request.keyframes = self.request.keyframes.as_ref().and_then(|keyframes| keyframes.part(part));
            }
        }
        request
    }

    /// Takes the next frames of the part, and gives those of the video that are certain now.
    pub fn push(&mut self, frames: Vec<Frame>) -> Vec<Frame> {
        let length = self.shot.parts[self.part];
        let has_next = self.part + 1 < self.shot.parts.len();
        let shared_from = if has_next { length.saturating_sub(self.shot.overlap_frames) } else { length };
        let mut certain = Vec::with_capacity(frames.len());
        for frame in frames {
            let index = self.num_come;
            self.num_come += 1;
            let frame = match self.before.get(index) {
                Some(before) => cross_fade(before, frame, index, self.before.len()),
                None => frame,
            };
            if index >= shared_from {
                self.held.push(frame);
                continue;
            }
            let is_wanted = (self.num_skipped..self.shot.num_frames).contains(&self.num_passed);
            self.num_passed += 1;
            if is_wanted {
                certain.push(frame);
            }
        }
        certain
    }

    /// The part has ended: what the next one is made with, if there is one.
    pub fn next_part(&mut self) -> Option<DiffusionRequest> {
        if self.part + 1 == self.shot.parts.len() {
            return None;
        }
        self.part += 1;
        self.num_come = 0;
        self.before = std::mem::take(&mut self.held);
        Some(self.part_request())
    }
}

/// Frame `index` of the `count` frames that two parts share: all of `before` first, then evenly more of `after`.
fn cross_fade(before: &Frame, mut after: Frame, index: usize, count: usize) -> Frame {
    let weight = index as f32 / count.max(1) as f32;
    for (after, before) in after.rgb.iter_mut().zip(&before.rgb) {
        let (from, to) = (f32::from(*before), f32::from(*after));
        *after = (from + (to - from) * weight).round() as u8;
    }
    after
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{Canvas, Prompt, Sampling};
    use crate::solver::names::Scheduler;

    fn grey(value: u8) -> Frame {
        Frame { width: 1, height: 1, rgb: vec![value; 3] }
    }

    fn request(method: ShotMethod, overlap_frames: usize, parts: &[usize], num_frames: usize) -> DiffusionRequest {
        let canvas = Canvas { width: 1, height: 1, num_frames, fps: 8 };
        let prompt = Prompt { text: "x".into(), max_sequence_length: 8 };
        let scheduler = Scheduler::named("flow_euler").expect("known");
        let mut request = DiffusionRequest::new(prompt, canvas, Sampling::new(scheduler, 4, 7));
        let parts = parts.to_vec();
        request.shot = Some(Shot { method, overlap_frames, parts, num_frames, trained_frames: 9 });
        request
    }

    /// All frames of the video where frame `i` of part `p` has the value `value(p, i)`, and the first pictures of the parts.
    fn assembled(mut assembly: Assembly, value: impl Fn(usize, usize) -> u8) -> (Vec<u8>, Vec<u8>) {
        let (mut out, mut first) = (Vec::new(), Vec::new());
        let mut request = Some(assembly.part_request());
        while let Some(of_part) = request {
            let (part, parts) = assembly.position();
            assert_eq!(of_part.sampling.seed, 7 + part as u64);
            first.extend(of_part.keyframes.iter().map(|keyframes| keyframes.first.fitted.rgb[0]));
            let frames: Vec<Frame> = (0..of_part.canvas.num_frames).map(|index| grey(value(part, index))).collect();
            for some in frames.chunks(3) {
                out.extend(assembly.push(some.to_vec()).iter().map(|frame| frame.rgb[0]));
            }
            request = assembly.next_part();
            assert_eq!(request.is_none(), part + 1 == parts);
        }
        assert_eq!(out.len(), assembly.shot.num_frames - assembly.num_skipped);
        (out, first)
    }

    #[test]
    fn a_part_begins_with_the_last_frame_of_the_part_before_which_is_shown_once() {
        let assembly = Assembly::new(request(ShotMethod::Continue, 1, &[5, 5, 5], 12));
        let (out, first) = assembled(assembly, |part, index| (10 * (part + 1) + index) as u8);
        assert_eq!(out, [10, 11, 12, 13, 14, 21, 22, 23, 24, 31, 32, 33]);
        assert_eq!(first, [14, 24]);
    }

    #[test]
    fn shared_frames_are_faded_from_the_part_before_to_the_next() {
        let assembly = Assembly::new(request(ShotMethod::Continue, 4, &[9, 9], 14));
        let (out, first) = assembled(assembly, |part, _| if part == 0 { 0 } else { 100 });
        assert_eq!(out, [0, 0, 0, 0, 0, 0, 25, 50, 75, 100, 100, 100, 100, 100]);
        assert_eq!(first, [0]);
    }

    #[test]
    fn a_video_that_goes_on_from_another_lacks_the_frame_that_is_there_already() {
        let assembly = Assembly::going_on(request(ShotMethod::SinglePass, 1, &[5], 5));
        assert_eq!(assembled(assembly, |_, index| index as u8).0, [1, 2, 3, 4]);
    }

    #[test]
    fn a_chain_goes_from_picture_to_picture() {
        let mut request = request(ShotMethod::Chain, 1, &[5, 5], 9);
        let [first, middle, last] = [1, 2, 3].map(|value| Keyframe::exact(Arc::new(grey(value))));
        request.keyframes = Some(Keyframes { first, middle: vec![middle], last: Some(last) });
        let mut assembly = Assembly::new(request);
        let ends = |request: &DiffusionRequest| {
            let keyframes = request.keyframes.as_ref().expect("two pictures");
            assert!(keyframes.middle.is_empty());
            [&keyframes.first, keyframes.last.as_ref().expect("there")].map(|picture| picture.fitted.rgb[0])
        };
        assert_eq!(ends(&assembly.part_request()), [1, 2]);
        assembly.push((0..5).map(grey).collect());
        assert_eq!(ends(&assembly.next_part().expect("two parts")), [2, 3]);
        let rest = assembly.push((10..15).map(grey).collect());
        // The frame of the picture in the middle is the last of the first part.
        assert_eq!(rest.iter().map(|frame| frame.rgb[0]).collect::<Vec<_>>(), [4, 11, 12, 13, 14]);
    }
}
