//! How a video comes to be longer than what a model makes at once.
//!
//! Owns: `shot_method` and `overlap_frames`, the ways there are, which of them a model can go, how many frames each part of
//! a video has, and what is to be said of a length that a model was not trained on. How frames of parts become those of one
//! video is [`assembly`]'s affair. Does not know: networks, sessions, files.
//!
//! - [`ShotMethod::SinglePass`] makes all frames at once, up to the model's limit. Beyond the length that it was trained
//!   on the answer warns.
//! - [`ShotMethod::Continue`] begins the next part with one of the last frames of the part before; the frames that both
//!   have are cross-faded in pixels. For models that begin from a picture; each hand-over may lose some detail.
//! - [`ShotMethod::Chain`] goes from each key picture to the next. For models that go from a first picture to a last one;
//!   nothing is handed over, so nothing drifts.

pub mod assembly;

use crate::error::{Error, Result};
use crate::parameter::{Declaration, Options, Parameter, ParameterType, VIDEOS, Value};

use super::canvas::{FrameSupport, NUM_FRAMES};
use super::keyframes::{KeyframeSupport, MAX_KEY_IMAGES};

/// Most parts of a video.
pub const MAX_PARTS: usize = MAX_KEY_IMAGES + 1;
/// Most frames that two parts share.
const MAX_OVERLAP: usize = 32;

/// See [`ShotMethod`].
pub static SHOT_METHOD: Parameter<ShotMethod> = Parameter::choice(
    "shot_method",
    &ShotMethod::NAMES,
    "How a video comes to its length: all frames in one pass; parts that continue from the last frames of the part before \
     (models that begin from a picture, whose way it is beyond the length that they were trained on); or a chain of parts \
     from each of the pictures to the next (models that go between two, whose way it is where there are key_images).",
)
.only_for(VIDEOS);

/// See [`Shot::overlap_frames`].
pub static OVERLAP_FRAMES: Parameter<usize> = Parameter::integer(
    "overlap_frames",
    1,
    MAX_OVERLAP,
    "Of parts that continue: frames that two of them share, from the one that the next part begins with on. They are \
     cross-faded; 1, when absent, is a plain cut on the same picture.",
)
.only_for(VIDEOS);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&SHOT_METHOD.declaration, &OVERLAP_FRAMES.declaration];

/// How a video comes to its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShotMethod {
    /// All frames at once.
    SinglePass,
    /// Each part begins with one of the last frames of the part before.
    Continue,
    /// Each part goes from one picture to the next.
    Chain,
}

impl ShotMethod {
    const ALL: [Self; 3] = [Self::SinglePass, Self::Continue, Self::Chain];
    const NAMES: [&'static str; 3] = ["single_pass", "continue", "chain"];

    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

impl ParameterType for ShotMethod {
    fn from_value(value: &Value) -> Option<Self> {
        let name = String::from_value(value)?;
        Self::ALL.into_iter().find(|method| method.as_str() == name)
    }

    fn into_value(self) -> Value {
        Value::Text(self.as_str().to_owned())
    }
}

/// The parts of a video.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shot {
    /// How it comes to its length.
    pub method: ShotMethod,
    /// Frames that two parts share.
    pub overlap_frames: usize,
    /// Frames that each part is made with, in order of time; at least one part.
    pub parts: Vec<usize>,
    /// Frames of the whole video.
    pub num_frames: usize,
    /// Frames that the model was trained on.
    trained_frames: usize,
}

impl Shot {
    /// Frames of its longest part.
    pub fn longest_part(&self) -> usize {
        self.parts.iter().copied().max().unwrap_or(self.num_frames)
    }

    /// What whoever ordered it should know.
    pub fn warnings(&self) -> Vec<String> {
        let frames = self.longest_part();
        let trained = self.trained_frames;
        let warning = || {
            format!(
                "num_frames: {frames} frames are made in one pass, and the model was trained on {trained}: motion may \
                 repeat or drift"
            )
        };
        (frames > trained).then(warning).into_iter().collect()
    }

    pub(super) fn echo(&self, options: &mut Options) {
        options.set(&SHOT_METHOD, self.method);
        options.set(&OVERLAP_FRAMES, (self.method == ShotMethod::Continue).then_some(self.overlap_frames));
    }
}

/// The parts of the video that is asked for. `num_pictures` are those that the request brings.
pub(super) fn resolve(
    frames: &FrameSupport,
    keyframes: Option<KeyframeSupport>,
    num_pictures: usize,
    options: &Options,
) -> Result<Shot> {
    let asked = options.get(&NUM_FRAMES);
    let is_long = asked.is_some_and(|num_frames| num_frames > frames.trained_frames);
    let method = method(keyframes, num_pictures > 2, is_long, options)?;
    let overlap = options.get(&OVERLAP_FRAMES);
    if overlap.is_some() && method != ShotMethod::Continue {
        return Err(Error::invalid("overlap_frames", "are for shot_method continue; leave it out"));
    }
    let overlap_frames = overlap.unwrap_or(1);
    let trained_frames = frames.trained_frames;
    let (default, max) = match method {
        ShotMethod::SinglePass => (frames.default_num_frames, frames.max_frames),
        ShotMethod::Continue => {
            let new = trained_frames.saturating_sub(overlap_frames);
            (frames.default_num_frames, trained_frames + (MAX_PARTS - 1) * (new - new % frames.multiple))
        }
        ShotMethod::Chain => {
            let of = |frames: usize| (num_pictures - 1) * (frames - 1) + 1;
            (of(frames.default_num_frames), of(frames.max_frames))
        }
    };
    let num_frames = asked.unwrap_or(default);
    frames.check(num_frames, max)?;
    let parts = match method {
        ShotMethod::SinglePass => vec![num_frames],
        ShotMethod::Continue => continued(num_frames, overlap_frames, frames)?,
        ShotMethod::Chain => chained(num_frames, num_pictures - 1, frames)?,
    };
    Ok(Shot { method, overlap_frames, parts, num_frames, trained_frames })
}

/// The way that is asked for, or the model's own to a video that `is_long`.
fn method(
    keyframes: Option<KeyframeSupport>,
    has_key_images: bool,
    is_long: bool,
    options: &Options,
) -> Result<ShotMethod> {
    use KeyframeSupport::{First, FirstAndLast};
    let refuse = |field: &str, problem: String| Err(Error::invalid(field, problem));
    let method = options.get(&SHOT_METHOD).unwrap_or(match keyframes {
        Some(FirstAndLast) if has_key_images => ShotMethod::Chain,
        Some(First) if is_long => ShotMethod::Continue,
        _ => ShotMethod::SinglePass,
    });
    match (method, keyframes) {
        (ShotMethod::SinglePass, _) if has_key_images => {
            refuse("key_images", "are for shot_method chain; leave one of them out".into())
        }
        (ShotMethod::Chain, Some(FirstAndLast)) if !has_key_images => {
            refuse("key_images", "are missing; a chain goes through them".into())
        }
        (ShotMethod::SinglePass, _) | (ShotMethod::Continue, Some(First)) | (ShotMethod::Chain, Some(FirstAndLast)) => {
            Ok(method)
        }
        _ => {
            let ways = match keyframes {
                None => "single_pass, since this model makes videos from text alone",
                Some(First) => "single_pass, continue",
                Some(FirstAndLast) => "single_pass, chain",
            };
            refuse("shot_method", format!("is {}; allowed: {ways}", method.as_str()))
        }
    }
}

/// Equal parts, as few and as short as there can be, each no longer than the model was trained on. Their frames may be more
/// than those of the video, whose end is cut then.
fn continued(num_frames: usize, overlap: usize, frames: &FrameSupport) -> Result<Vec<usize>> {
    let FrameSupport { trained_frames, multiple, has_one_length, .. } = *frames;
    if num_frames <= trained_frames {
        return Ok(vec![num_frames]);
    }
    let most = trained_frames / 2;
    if overlap > most {
        let problem = format!("is {overlap}; allowed: 1 to {most}, half of the {trained_frames} frames of a part");
        return Err(Error::invalid("overlap_frames", problem));
    }
    let count = (num_frames - overlap).div_ceil(trained_frames - overlap);
    let least = (num_frames - overlap).div_ceil(count) + overlap;
    let even = (least - 1).next_multiple_of(multiple) + 1;
    // No part has less than its two ends that others share.
    let shortest = (2 * overlap - 1).next_multiple_of(multiple) + 1;
    let length = if has_one_length { trained_frames } else { even.max(shortest).min(trained_frames) };
    Ok(vec![length; count])
}

/// Parts that differ by one group of frames at most, the longer ones first; each has its first picture's frame, which is
/// also the last of the part before.
fn chained(num_frames: usize, count: usize, frames: &FrameSupport) -> Result<Vec<usize>> {
    let groups = (num_frames - 1) / frames.multiple;
    if groups < count {
        let least = count * frames.multiple + 1;
        let problem = format!("is {num_frames}; a chain through these pictures has at least {least} frames");
        return Err(Error::invalid("num_frames", problem));
    }
    let of = |part: usize| groups / count + usize::from(part < groups % count);
    Ok((0..count).map(|part| of(part) * frames.multiple + 1).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WAN: FrameSupport = FrameSupport {
        default_num_frames: 81,
        default_fps: 16,
        multiple: 4,
        max_frames: 257,
        trained_frames: 81,
        has_one_length: false,
    };

    fn shot(keyframes: Option<KeyframeSupport>, num_pictures: usize, options: &Options) -> Result<Shot> {
        resolve(&WAN, keyframes, num_pictures, options)
    }

    fn frames(num_frames: usize) -> Options {
        Options::default().with(&NUM_FRAMES, num_frames)
    }

    #[test]
    fn a_model_goes_its_own_way_to_a_length_it_was_not_trained_on() {
        use KeyframeSupport::{First, FirstAndLast};
        for (keyframes, num_pictures, options, method, parts, warns) in [
            (None, 0, frames(81), ShotMethod::SinglePass, vec![81], false),
            (None, 0, frames(129), ShotMethod::SinglePass, vec![129], true),
            (Some(First), 1, frames(81), ShotMethod::SinglePass, vec![81], false),
            (Some(First), 1, frames(129), ShotMethod::Continue, vec![65, 65], false),
            (Some(First), 1, frames(129).with(&OVERLAP_FRAMES, 9), ShotMethod::Continue, vec![69, 69], false),
            (
                Some(First),
                1,
                frames(129).with(&SHOT_METHOD, ShotMethod::SinglePass),
                ShotMethod::SinglePass,
                vec![129],
                true,
            ),
            (Some(FirstAndLast), 2, frames(129), ShotMethod::SinglePass, vec![129], true),
            (Some(FirstAndLast), 3, frames(129), ShotMethod::Chain, vec![65, 65], false),
            (Some(FirstAndLast), 4, frames(129), ShotMethod::Chain, vec![45, 45, 41], false),
            (Some(FirstAndLast), 9, Options::default(), ShotMethod::Chain, vec![81; 8], false),
        ] {
            let options = if options.has(&OVERLAP_FRAMES) { options.with(&SHOT_METHOD, method) } else { options };
            let shot = shot(keyframes, num_pictures, &options).expect("valid");
            assert_eq!((shot.method, &shot.parts, !shot.warnings().is_empty()), (method, &parts, warns));
        }
    }

    #[test]
    fn what_a_model_cannot_do_is_refused_by_name() {
        use KeyframeSupport::{First, FirstAndLast};
        let by = |method: ShotMethod| Options::default().with(&SHOT_METHOD, method);
        for (keyframes, num_pictures, options, expected) in [
            (None, 0, by(ShotMethod::Continue), "shot_method: is continue; allowed: single_pass, since"),
            (Some(First), 1, by(ShotMethod::Chain), "shot_method: is chain; allowed: single_pass, continue"),
            (Some(FirstAndLast), 2, by(ShotMethod::Continue), "shot_method: is continue; allowed: single_pass, chain"),
            (Some(FirstAndLast), 2, by(ShotMethod::Chain), "key_images: are missing"),
            (Some(FirstAndLast), 3, by(ShotMethod::SinglePass), "key_images: are for shot_method chain"),
            (Some(FirstAndLast), 4, frames(9), "num_frames: is 9; a chain through these pictures has at least 13"),
            (None, 0, frames(261), "num_frames: is 261; allowed: 4k+1 from 1 to 257"),
            (Some(First), 1, frames(1301), "num_frames: is 1301; allowed: 4k+1 from 1 to 1281"),
            (
                Some(First),
                1,
                Options::default().with(&OVERLAP_FRAMES, 2),
                "overlap_frames: are for shot_method continue",
            ),
        ] {
            let refusal = shot(keyframes, num_pictures, &options).expect_err("refused").to_string();
            assert!(refusal.starts_with(expected), "{refusal}");
        }
    }

    #[test]
    fn a_model_of_one_length_makes_parts_of_that() {
        let support = FrameSupport { multiple: 8, trained_frames: 49, max_frames: 49, has_one_length: true, ..WAN };
        let shot = resolve(&support, Some(KeyframeSupport::First), 1, &frames(65)).expect("valid");
        assert_eq!(shot.parts, [49, 49]);
    }

    proptest! {
        #[test]
        fn parts_are_long_enough_and_no_longer_than_trained(k in 0usize..320, overlap in 1usize..=32) {
            let options = frames(4 * k + 1).with(&OVERLAP_FRAMES, overlap).with(&SHOT_METHOD, ShotMethod::Continue);
            let Ok(shot) = shot(Some(KeyframeSupport::First), 1, &options) else { return Ok(()) };
            let made: usize = shot.parts.iter().sum::<usize>() - (shot.parts.len() - 1) * overlap;
            prop_assert!(made >= shot.num_frames);
            prop_assert!(shot.parts.len() <= MAX_PARTS);
            for part in &shot.parts {
                prop_assert!(*part <= 81 && part % 4 == 1);
                prop_assert!(shot.parts.len() == 1 || *part >= 2 * overlap);
            }
        }
    }
}
