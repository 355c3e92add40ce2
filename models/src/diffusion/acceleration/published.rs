//! What is published about skipping blocks of a model: the one table that says which method serves which checkpoint, at which
//! size and from how many steps on.
//!
//! Owns: magnitude ratios (MagCache), polynomials (TeaCache), the settings that figures stand behind, and their sources. Does
//! not know: which checkpoint a family has found, requests, how blocks are skipped. Figures are those of the sources, of
//! their machines and clips; none is ours.
//!
//! Sources: MagCache is arXiv 2506.09045 and github.com/Zehong-Ma/MagCache (`MagCache4Wan2.1`, `MagCache4HunyuanVideo`,
//! `MagCache4FLUX`), whose names of settings are threshold, most skips in a row and part of the steps that is computed first
//! (E012K4R02: 0.12, 4, 0.2). TeaCache is arXiv 2411.19108 and github.com/ali-vilab/TeaCache (`TeaCache4Wan2.1` with
//! `use_ret_steps`, `TeaCache4CogVideoX1.5`, `TeaCache4HunyuanVideo`, `TeaCache4FLUX`, `eval/teacache/experiments/cogvideox.py`).
//! ParaAttention is `optimization/para_attn` of diffusers' documentation.

use std::fmt::{self, Display, Formatter};

use super::Acceleration;
use crate::diffusion::sampling::Sampling;

/// A checkpoint that something is published about.
#[derive(Debug, PartialEq)]
pub struct Published {
    /// For people.
    pub name: &'static str,
    /// What was measured of the network, for each size.
    pub profiles: &'static [Profile],
    /// Settings that figures stand behind; of several that fit a request the first counts.
    pub figures: &'static [Figure],
}

/// What was measured of a network at one size.
#[derive(Debug, PartialEq)]
pub struct Profile {
    /// Width and height.
    pub size: [usize; 2],
    /// MagCache: by how much what the blocks add grows from step to step, for the prompt and for the negative one.
    pub ratios: Option<[&'static [f64]; 2]>,
    /// TeaCache.
    pub polynomial: Option<Polynomial>,
}

/// From how far the signal of a step has moved to how far the answer has.
#[derive(Debug, PartialEq)]
pub struct Polynomial {
    /// Highest power first.
    pub coefficients: &'static [f64],
    /// Steps at the beginning that were always computed; so was the last one.
    pub first_steps: usize,
}

/// A setting, and what it was measured with.
#[derive(Debug, PartialEq)]
pub struct Figure {
    /// The word that means it.
    pub word: Acceleration,
    /// Width and height.
    pub size: [usize; 2],
    /// Denoising steps: with more of them two neighbours are no less alike.
    pub steps: usize,
    /// What else it was measured with.
    pub course: Course,
    /// What it is.
    pub setting: Setting,
    /// How many times as fast, as published; `None` of a setting that is gentler than one with a figure.
    pub gain: Option<f64>,
}

/// How the clips or pictures of a figure were made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Course {
    /// Frames; 1 of a picture.
    pub frames: usize,
    /// Schedulers, by any of their names.
    pub schedulers: &'static [&'static str],
    /// The least and the largest shift of the sigmas, of flow matching with a constant one.
    pub flow_shift: Option<[f64; 2]>,
}

/// What a request would do.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// Width and height.
    pub size: [usize; 2],
    /// Frames that are denoised at once; 1 of a picture.
    pub frames: usize,
    /// Steps, and how they are made.
    pub sampling: &'a Sampling,
}

/// A method and its thresholds; ratios and polynomials are those of the profile.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Setting {
    /// How much of what the first block adds may be new.
    FirstBlock(f64),
    /// Error that may add up, most skips in a row. A fifth of the steps is computed first.
    MagCache(f64, usize),
    /// Change that may add up.
    TeaCache(f64),
}

/// How much fewer or more pixels than a figure's a request may have.
const SIZE_CLASS: [f64; 2] = [0.75, 1.25];
/// As [`SIZE_CLASS`], of frames: a clip beyond the length of the training is another matter, a shorter one less so.
const LENGTH_CLASS: [f64; 2] = [0.5, 1.25];
/// As [`SIZE_CLASS`], of shifts below the least and above the largest.
const SHIFT_CLASS: [f64; 2] = [0.5, 2.0];

impl Figure {
    /// Whether it says something about such a request. Sigmas or timesteps of one's own are another schedule than any figure's.
    pub fn supports(&self, word: Acceleration, run: &Run) -> bool {
        let Run { size, frames, sampling } = *run;
        let is_in = |[least, most]: [f64; 2], value: usize, of: usize| {
            let share = value as f64 / of as f64;
            (least..=most).contains(&share)
        };
        self.word == word
            && sampling.given.is_none()
            && sampling.num_inference_steps >= self.steps
            && is_in(SIZE_CLASS, pixels_of(size), pixels_of(self.size))
            && is_in(LENGTH_CLASS, frames, self.course.frames)
            && self.course.has(sampling)
    }
}

/// For people.
impl Display for Run<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { size: [width, height], frames, sampling } = self;
        write!(f, "{width}x{height}")?;
        if *frames > 1 {
            write!(f, " and {frames} frames")?;
        }
        write!(f, " with {}", sampling.scheduler.name)?;
        if let Some(shift) = sampling.flow_shift {
            write!(f, " and flow_shift {shift}")?;
        }
        match &sampling.given {
            Some(given) => write!(f, " and its own {}", given.field()),
            None => write!(f, " in {} steps", sampling.num_inference_steps),
        }
    }
}

impl Course {
    /// Whether the latents move so.
    fn has(&self, sampling: &Sampling) -> bool {
        let has_shift = match (self.flow_shift, sampling.flow_shift) {
            (Some([least, most]), Some(shift)) => (SHIFT_CLASS[0] * least..=SHIFT_CLASS[1] * most).contains(&shift),
            _ => true,
        };
        has_shift && self.schedulers.iter().any(|name| sampling.scheduler.is_class_of(name))
    }

    /// For people: what a request needs beside size and steps.
    fn in_words(&self) -> String {
        let frames = match self.frames {
            1 => String::new(),
            frames => format!(" and {frames} frames"),
        };
        let shift = match self.flow_shift {
            Some([least, most]) => {
                format!(" and flow_shift {} to {}", SHIFT_CLASS[0] * least, SHIFT_CLASS[1] * most)
            }
            None => String::new(),
        };
        format!("{frames} with {}{shift}", self.schedulers.join(" or "))
    }
}

impl Published {
    /// What was measured closest to so many pixels of a frame.
    pub fn profile(&self, pixels: usize) -> Option<&'static Profile> {
        let distance = |profile: &Profile| (pixels as f64 / pixels_of(profile.size) as f64).ln().abs();
        self.profiles.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)))
    }

    /// Where there are figures for a word: sizes, lengths, from how many steps on, and with which scheduler.
    pub fn where_supported(&self, word: Acceleration) -> String {
        let figures = self.figures.iter().filter(|figure| figure.word == word);
        let places: Vec<String> = figures
            .map(|figure| format!("{}{} from {} steps on", size(figure), figure.course.in_words(), figure.steps))
            .collect();
        if places.is_empty() { "nowhere".to_owned() } else { places.join(", ") }
    }
}

fn size(figure: &Figure) -> String {
    let [width, height] = figure.size;
    format!("about {width}x{height}")
}

fn pixels_of([width, height]: [usize; 2]) -> usize {
    width * height
}

use Acceleration::{Fast, Safe};

const P480: [usize; 2] = [832, 480];
const P544: [usize; 2] = [960, 544];
const P720: [usize; 2] = [1280, 720];
const SQUARE: [usize; 2] = [1024, 1024];
const COGVIDEOX_1_5_SIZE: [usize; 2] = [1360, 768];
const COGVIDEOX_SIZE: [usize; 2] = [720, 480];

/// Settings of MagCache.
const E012K2: Setting = Setting::MagCache(0.12, 2);
const E012K4: Setting = Setting::MagCache(0.12, 4);
const E024K6: Setting = Setting::MagCache(0.24, 6);

/// MagCache's runs of Wan2.1 (`magcache_generate.py`): T2V 1.3B with the shifts of its command and of its evaluation, the others
/// with those of their sizes.
const WAN_1_3B: Course = Course { frames: 81, schedulers: &["unipc"], flow_shift: Some([5.0, 8.0]) };
const WAN_480P: Course = Course { flow_shift: Some([3.0, 3.0]), ..WAN_1_3B };
const WAN_720P: Course = Course { flow_shift: Some([5.0, 5.0]), ..WAN_1_3B };
const HUNYUAN: Course = Course { frames: 129, schedulers: &["flow_euler"], flow_shift: Some([7.0, 7.0]) };
/// The script takes the checkpoint's own scheduler, and speaks of the other one.
const COGVIDEOX: Course = Course { frames: 81, schedulers: &["cogvideox_dpm", "cogvideox_ddim"], flow_shift: None };
/// The shift is by the size.
const FLUX: Course = Course { frames: 1, schedulers: &["flow_euler"], flow_shift: None };

const fn figure(
    course: Course,
    word: Acceleration,
    size: [usize; 2],
    steps: usize,
    setting: Setting,
    gain: f64,
) -> Figure {
    Figure { word, size, steps, course, setting, gain: Some(gain) }
}

const fn tea(coefficients: &'static [f64], first_steps: usize) -> Option<Polynomial> {
    Some(Polynomial { coefficients, first_steps })
}

/// An A800 takes 189 s, 87 s and 68 s.
pub static WAN_T2V_1_3B: Published = Published {
    name: "Wan2.1 T2V 1.3B",
    profiles: &[Profile {
        size: P480,
        ratios: Some([&T2V_1_3B, &T2V_1_3B_NEGATIVE]),
        polynomial: tea(&[-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2], 5),
    }],
    figures: &[figure(WAN_1_3B, Safe, P480, 50, E012K2, 2.2), figure(WAN_1_3B, Fast, P480, 50, E012K4, 2.8)],
};

/// An A800 takes 60:04 and with the second setting 21:40; the first one is gentler than that, and published for the models
/// from pictures.
pub static WAN_T2V_14B: Published = Published {
    name: "Wan2.1 T2V 14B",
    profiles: &[Profile {
        size: P720,
        ratios: Some([&T2V_14B, &T2V_14B_NEGATIVE]),
        polynomial: tea(&[-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1], 5),
    }],
    figures: &[
        Figure { gain: None, ..figure(WAN_720P, Safe, P720, 50, E012K4, 1.0) },
        figure(WAN_720P, Fast, P720, 50, E024K6, 2.8),
    ],
};

/// The two published checkpoints have one configuration, and are told apart by what is asked of them. At 480p an A800 takes
/// 13:20, 4:43 and 4:23; at 720p 30:40, 11:35 and 10:03.
pub static WAN_I2V_14B: Published = Published {
    name: "Wan2.1 I2V 14B",
    profiles: &[
        Profile {
            size: P480,
            ratios: Some([&I2V_480P, &I2V_480P_NEGATIVE]),
            polynomial: tea(&[2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1], 5),
        },
        Profile {
            size: P720,
            ratios: Some([&I2V_720P, &I2V_720P_NEGATIVE]),
            polynomial: tea(&[8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2], 5),
        },
    ],
    figures: &[
        figure(WAN_480P, Safe, P480, 40, E012K4, 2.8),
        figure(WAN_480P, Fast, P480, 40, E024K6, 3.0),
        figure(WAN_720P, Safe, P720, 40, E012K4, 2.6),
        figure(WAN_720P, Fast, P720, 40, E024K6, 3.0),
    ],
};

/// At 544p an A800 takes 20:10, 8:50 and 7:17; at 720p 54:05, 23:50 and 19:33. The first-block cache is ParaAttention's, on an
/// L20.
pub static HUNYUAN_VIDEO: Published = Published {
    name: "HunyuanVideo",
    profiles: &[
        Profile {
            size: P544,
            ratios: Some([&HUNYUAN_VIDEO_544P, &HUNYUAN_VIDEO_544P]),
            polynomial: tea(&HUNYUAN_VIDEO_POLYNOMIAL, 1),
        },
        Profile {
            size: P720,
            ratios: Some([&HUNYUAN_VIDEO_720P, &HUNYUAN_VIDEO_720P]),
            polynomial: tea(&HUNYUAN_VIDEO_POLYNOMIAL, 1),
        },
    ],
    figures: &[
        figure(HUNYUAN, Safe, P544, 50, E012K4, 2.3),
        figure(HUNYUAN, Fast, P544, 50, E024K6, 2.8),
        figure(HUNYUAN, Safe, P720, 50, E012K4, 2.3),
        figure(HUNYUAN, Fast, P720, 50, E024K6, 2.8),
        figure(HUNYUAN, Safe, P720, 30, Setting::FirstBlock(0.06), 1.6),
    ],
};

/// ParaAttention. The ratios are those of diffusers too (`FLUX_MAG_RATIOS`).
pub static FLUX_1_DEV: Published = Published {
    name: "FLUX.1 dev",
    profiles: &[Profile {
        size: SQUARE,
        ratios: Some([&FLUX_DEV, &FLUX_DEV]),
        polynomial: tea(&[4.98651651e2, -2.83781631e2, 5.58554382e1, -3.82021401, 2.64230861e-1], 1),
    }],
    figures: &[
        figure(FLUX, Safe, SQUARE, 28, Setting::FirstBlock(0.08), 1.55),
        figure(FLUX, Fast, SQUARE, 28, Setting::FirstBlock(0.12), 1.9),
    ],
};

/// An H100 takes 465 s, 322 s and 260 s.
pub static COGVIDEOX_1_5: Published = Published {
    name: "CogVideoX1.5 5B",
    profiles: &[Profile {
        size: COGVIDEOX_1_5_SIZE,
        ratios: None,
        polynomial: tea(&[2.50210439e2, -1.65061612e2, 3.57804877e1, -7.81551492e-1, 3.58559703e-2], 1),
    }],
    figures: &[
        figure(COGVIDEOX, Safe, COGVIDEOX_1_5_SIZE, 50, Setting::TeaCache(0.1), 1.4),
        figure(COGVIDEOX, Fast, COGVIDEOX_1_5_SIZE, 50, Setting::TeaCache(0.2), 1.8),
    ],
};

/// An H100 takes 475 s, 316 s and 239 s.
pub static COGVIDEOX_1_5_I2V: Published = Published {
    name: "CogVideoX1.5 5B I2V",
    profiles: &[Profile {
        size: COGVIDEOX_1_5_SIZE,
        ratios: None,
        polynomial: tea(&[1.22842302e2, -1.04088754e2, 2.62981677e1, -3.06009921e-1, 3.71213220e-2], 1),
    }],
    figures: &[
        figure(COGVIDEOX, Safe, COGVIDEOX_1_5_SIZE, 50, Setting::TeaCache(0.1), 1.5),
        figure(COGVIDEOX, Fast, COGVIDEOX_1_5_SIZE, 50, Setting::TeaCache(0.2), 2.0),
    ],
};

/// A polynomial without a figure of what it gains.
pub static COGVIDEOX_2B: Published = Published {
    name: "CogVideoX 2B",
    profiles: &[Profile {
        size: COGVIDEOX_SIZE,
        ratios: None,
        polynomial: tea(&[-3.10658903e1, 2.54732368e1, -5.92380459, 1.75769064, -3.61568434e-3], 1),
    }],
    figures: &[],
};

/// A polynomial without a figure of what it gains; from text and from a picture.
pub static COGVIDEOX_5B: Published = Published {
    name: "CogVideoX 5B",
    profiles: &[Profile {
        size: COGVIDEOX_SIZE,
        ratios: None,
        polynomial: tea(&[-1.53880483e3, 8.43202495e2, -1.34363087e2, 7.97131516, -5.23162339e-2], 1),
    }],
    figures: &[],
};

/// At all sizes.
static HUNYUAN_VIDEO_POLYNOMIAL: [f64; 5] = [7.33226126e2, -4.01131952e2, 6.75869174e1, -3.14987800, 9.61237896e-2];

/// Of Wan2.1 T2V 1.3B, for the prompt.
static T2V_1_3B: [f64; 50] = [
    1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957, 0.99511, 0.99535, 0.99552,
    0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415, 0.99419, 0.99396, 0.99388, 0.99349, 0.99309, 0.9927,
    0.99228, 0.99171, 0.99137, 0.99068, 0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504, 0.9836, 0.98202, 0.97977,
    0.97717, 0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241, 0.86821, 0.81838,
];

/// Of Wan2.1 T2V 1.3B, for the negative prompt.
static T2V_1_3B_NEGATIVE: [f64; 50] = [
    1.0, 1.02213, 1.0041, 1.00061, 0.99762, 0.99685, 0.99586, 0.99422, 0.99575, 0.99563, 0.99506, 0.99531, 0.99549,
    0.99539, 0.99536, 0.99485, 0.99514, 0.99478, 0.99479, 0.99413, 0.99416, 0.99393, 0.99386, 0.99349, 0.99304, 0.9927,
    0.99226, 0.9917, 0.99135, 0.99063, 0.99003, 0.98942, 0.98849, 0.98757, 0.98643, 0.98503, 0.98359, 0.98201, 0.97978,
    0.97718, 0.97411, 0.97002, 0.96541, 0.95933, 0.95089, 0.94019, 0.92414, 0.9026, 0.86868, 0.81939,
];

/// Of Wan2.1 T2V 14B, for the prompt.
static T2V_14B: [f64; 50] = [
    1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533, 0.99468, 0.99438,
    0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418, 0.99271, 0.99313, 0.99215, 0.99218,
    0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177, 0.98037,
    0.97678, 0.97546, 0.97184, 0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796, 0.86111,
];

/// Of Wan2.1 T2V 14B, for the negative prompt.
static T2V_14B_NEGATIVE: [f64; 50] = [
    1.0, 1.03017, 1.00251, 0.99962, 0.99771, 0.99658, 0.99476, 0.99451, 0.99656, 0.99431, 0.99545, 0.99465, 0.99434,
    0.99517, 0.9938, 0.99401, 0.99516, 0.99408, 0.99426, 0.99343, 0.99416, 0.99269, 0.99311, 0.99215, 0.99215, 0.99217,
    0.99161, 0.99135, 0.9898, 0.98995, 0.98866, 0.9877, 0.98765, 0.9857, 0.98498, 0.98376, 0.98173, 0.98035, 0.97677,
    0.97543, 0.97183, 0.96708, 0.96345, 0.95625, 0.94929, 0.93961, 0.92504, 0.90678, 0.87945, 0.86189,
];

/// Of Wan2.1 I2V 14B 480P, for the prompt.
static I2V_480P: [f64; 40] = [
    1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383, 0.98857, 0.99065, 0.98845,
    0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721, 0.98571, 0.98543, 0.98157, 0.98411, 0.97952,
    0.98149, 0.9774, 0.97825, 0.97355, 0.97085, 0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973, 0.93217, 0.91878,
    0.90955, 0.92617,
];

/// Of Wan2.1 I2V 14B 480P, for the negative prompt.
static I2V_480P_NEGATIVE: [f64; 40] = [
    1.0, 0.98993, 0.97593, 0.98319, 0.98225, 0.98878, 0.98759, 0.98971, 0.99043, 0.99384, 0.9886, 0.99068, 0.98847,
    0.99057, 0.98961, 0.9861, 0.98823, 0.98759, 0.98814, 0.98724, 0.98572, 0.98544, 0.98165, 0.98413, 0.97953, 0.9815,
    0.97742, 0.97826, 0.97361, 0.97087, 0.97055, 0.96587, 0.96124, 0.95681, 0.94969, 0.93988, 0.93224, 0.91896,
    0.90954, 0.92616,
];

/// Of Wan2.1 I2V 14B 720P, for the prompt.
static I2V_720P: [f64; 40] = [
    1.0, 0.99428, 0.98588, 0.98273, 0.99018, 0.98911, 0.98646, 0.99454, 0.9891, 0.99124, 0.99102, 0.99215, 0.99515,
    0.99576, 0.99068, 0.99097, 0.99166, 0.99041, 0.99201, 0.99101, 0.98599, 0.98845, 0.98848, 0.98862, 0.98718,
    0.98497, 0.98264, 0.98389, 0.97938, 0.97535, 0.97498, 0.973, 0.96827, 0.96261, 0.95335, 0.94649, 0.93397, 0.91636,
    0.89088, 0.8679,
];

/// Of Wan2.1 I2V 14B 720P, for the negative prompt.
static I2V_720P_NEGATIVE: [f64; 40] = [
    1.0, 0.99498, 0.98621, 0.98281, 0.99023, 0.98917, 0.98652, 0.99456, 0.98909, 0.99127, 0.99103, 0.99212, 0.99515,
    0.99572, 0.99072, 0.99097, 0.99169, 0.99042, 0.99198, 0.99101, 0.98603, 0.98844, 0.98851, 0.98857, 0.98719,
    0.98497, 0.98263, 0.98393, 0.9794, 0.97536, 0.97499, 0.97301, 0.96828, 0.96263, 0.9534, 0.94655, 0.93414, 0.9165,
    0.89109, 0.86768,
];

/// Of HunyuanVideo at 960x544.
static HUNYUAN_VIDEO_544P: [f64; 50] = [
    1.0, 1.06971, 1.29073, 1.11245, 1.09596, 1.05233, 1.01415, 1.05672, 1.00848, 1.03632, 1.02974, 1.00984, 1.03028,
    1.00681, 1.06614, 1.05022, 1.02592, 1.01776, 1.02985, 1.00726, 1.03727, 1.01502, 1.00992, 1.03371, 0.9976, 1.02742,
    1.0093, 1.01869, 1.00815, 1.01461, 1.01152, 1.03082, 1.0061, 1.02162, 1.01999, 0.99063, 1.01186, 1.0217, 0.99947,
    1.01711, 0.9904, 1.00258, 1.00878, 0.97039, 0.97686, 0.94315, 0.97728, 0.91154, 0.86139, 0.76592,
];

/// Of HunyuanVideo at 1280x720.
static HUNYUAN_VIDEO_720P: [f64; 50] = [
    1.0, 1.0754, 1.27807, 1.11596, 1.09504, 1.05188, 1.00844, 1.05779, 1.00657, 1.04142, 1.03101, 1.00679, 1.02556,
    1.00908, 1.06949, 1.05438, 1.02214, 1.02321, 1.03019, 1.00779, 1.03381, 1.01886, 1.01161, 1.02968, 1.00544,
    1.02822, 1.00689, 1.02119, 1.0105, 1.01044, 1.01572, 1.02972, 1.0094, 1.02368, 1.0226, 0.98965, 1.01588, 1.02146,
    1.0018, 1.01687, 0.99436, 1.00283, 1.01139, 0.97122, 0.98251, 0.94513, 0.97656, 0.90943, 0.85703, 0.75456,
];

/// Of FLUX.1 dev at 1024x1024.
static FLUX_DEV: [f64; 28] = [
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
    0.89062,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::names::Scheduler;

    static ALL: [&Published; 9] = [
        &WAN_T2V_1_3B,
        &WAN_T2V_14B,
        &WAN_I2V_14B,
        &HUNYUAN_VIDEO,
        &FLUX_1_DEV,
        &COGVIDEOX_1_5,
        &COGVIDEOX_1_5_I2V,
        &COGVIDEOX_2B,
        &COGVIDEOX_5B,
    ];

    #[test]
    fn every_setting_finds_in_its_profile_what_it_needs() {
        for published in ALL {
            for figure in published.figures {
                let profile = published.profile(pixels_of(figure.size)).expect("a profile");
                let is_there = match figure.setting {
                    Setting::FirstBlock(_) => true,
                    Setting::MagCache(..) => profile.ratios.is_some() && profile.size == figure.size,
                    Setting::TeaCache(_) => profile.polynomial.is_some() && profile.size == figure.size,
                };
                assert!(
                    is_there && figure.word != Acceleration::None && figure.gain.is_none_or(|gain| gain > 1.0),
                    "{}: {figure:?}",
                    published.name
                );
            }
            for profile in published.profiles {
                // The first ratio has no step before it; the second ones are not copied from the first.
                let ratios = profile.ratios.iter().flatten();
                assert!(ratios.clone().all(|ratios| ratios[0] == 1.0 && ratios.iter().all(|x| (0.5..1.5).contains(x))));
                let lens: Vec<usize> = ratios.map(|ratios| ratios.len()).collect();
                assert!(lens.windows(2).all(|pair| pair[0] == pair[1]), "{}: {lens:?}", published.name);
            }
        }
    }

    #[test]
    fn the_documentation_has_every_figure_and_no_other() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/models.md");
        let text = std::fs::read_to_string(path).expect("docs/models.md is there");
        let row = |name: &str, figure: &Figure| {
            let setting = match figure.setting {
                Setting::FirstBlock(threshold) => format!("first block {threshold}"),
                Setting::MagCache(threshold, max_skips) => format!("MagCache {threshold}, {max_skips} in a row"),
                Setting::TeaCache(threshold) => format!("TeaCache {threshold}"),
            };
            let ([width, height], word) = (figure.size, figure.word.as_str());
            let gain = figure.gain.map_or("none".to_owned(), |gain| gain.to_string());
            format!("| {name} | `{word}` | {width}x{height} | {} | {setting} | {gain} |", figure.steps)
        };
        let rows: Vec<String> =
            ALL.iter().flat_map(|of| of.figures.iter().map(|figure| row(of.name, figure))).collect();
        for row in &rows {
            assert!(text.lines().any(|line| line.starts_with(row)), "docs/models.md lacks a row:\n{row}");
        }
        let words = ["| `safe` |", "| `fast` |"];
        let found = text.lines().filter(|line| words.iter().any(|word| line.contains(word))).count();
        assert_eq!(found, rows.len(), "rows of docs/models.md");
    }

    #[test]
    fn sizes_and_steps_decide_which_figure_counts() {
        let setting = |published: &Published, word, [width, height]: [usize; 2], steps| {
            let course = published.figures[0].course;
            let scheduler = Scheduler::named(course.schedulers[0]).expect("a name of the table");
            let sampling = Sampling::new(scheduler, steps, 0);
            let run = Run { size: [width, height], frames: course.frames, sampling: &sampling };
            published.figures.iter().find(|figure| figure.supports(word, &run)).map(|figure| figure.setting)
        };
        assert_eq!(setting(&WAN_T2V_1_3B, Safe, [480, 832], 50), Some(E012K2));
        assert_eq!(setting(&WAN_T2V_1_3B, Fast, [624, 624], 60), Some(E012K4));
        assert_eq!(setting(&WAN_T2V_1_3B, Fast, [832, 480], 49), None);
        assert_eq!(setting(&WAN_T2V_1_3B, Fast, [1280, 720], 50), None);
        assert_eq!(setting(&HUNYUAN_VIDEO, Safe, [1280, 720], 30), Some(Setting::FirstBlock(0.06)));
        assert_eq!(setting(&HUNYUAN_VIDEO, Safe, [1280, 720], 50), Some(E012K4));
        assert_eq!(setting(&HUNYUAN_VIDEO, Fast, [1280, 720], 30), None);
        assert_eq!(WAN_I2V_14B.profile(640 * 480).expect("one").size, P480);
        assert_eq!(WAN_I2V_14B.profile(1104 * 832).expect("one").size, P720);
        assert_eq!(COGVIDEOX_5B.where_supported(Safe), "nowhere");
        assert_eq!(
            WAN_T2V_14B.where_supported(Fast),
            "about 1280x720 and 81 frames with unipc and flow_shift 2.5 to 10 from 50 steps on"
        );
        assert_eq!(FLUX_1_DEV.where_supported(Fast), "about 1024x1024 with flow_euler from 28 steps on");
        let figures = ALL.iter().flat_map(|published| published.figures);
        let mut names = figures.flat_map(|figure| figure.course.schedulers);
        assert!(names.all(|name| Scheduler::named(name).is_some()), "schedulers are names of the table");
    }
}
