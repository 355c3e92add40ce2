//! How much of the denoising may be left out, and by which method.
//!
//! Owns: `acceleration` and the `cache_*` parameters, what they mean for a model, a size, a length and a schedule, and the
//! refusal of what no figure supports. Does not know: what is published of which checkpoint ([`published`]), how blocks are
//! skipped ([`block_cache`](crate::runner::diffusion::block_cache)).

use std::ops::Range;

use super::Canvas;
use super::sampling::{MAX_INFERENCE_STEPS, Sampling};
use crate::error::{Error, Result};
use crate::parameter::{Declaration, Options, Parameter, ParameterType, Value};

use self::published::{Figure, Profile, Published, Run, Setting};

pub mod published;

/// See [`Acceleration`].
pub static ACCELERATION: Parameter<Acceleration> = Parameter::choice(
    "acceleration",
    &Acceleration::NAMES,
    "How much of the denoising may be left out where it hardly changes the result; none when absent.",
);

/// See [`CacheMethod`].
pub static CACHE_METHOD: Parameter<CacheMethod> = Parameter::choice(
    "cache_method",
    &CacheMethod::NAMES,
    "How blocks are skipped, for those who know the model, instead of `acceleration`; needs `cache_threshold`.",
);

/// See [`Rule`].
pub static CACHE_THRESHOLD: Parameter<f64> = Parameter::number(
    "cache_threshold",
    0.0,
    MAX_THRESHOLD,
    "Change or error below which `cache_method` skips blocks; 0 skips none.",
);

/// See [`Cache::max_skips`].
pub static CACHE_MAX_SKIPS: Parameter<usize> = Parameter::integer(
    "cache_max_skips",
    1,
    MAX_INFERENCE_STEPS,
    "Most steps in a row of which `cache_method` skips blocks; 3 when absent.",
);

/// See [`Cache::steps`].
pub static CACHE_INTERVAL: Parameter<[f64; 2]> = Parameter::interval(
    "cache_interval",
    "Part of the steps of which `cache_method` may skip blocks: of n those from round(start * n) up to round(end * n).",
);

/// See [`Rule::MagCache`].
pub static CACHE_RATIOS: Parameter<Vec<f64>> = Parameter::numbers(
    "cache_ratios",
    MAX_INFERENCE_STEPS,
    0.0,
    MAX_RATIO,
    "Magnitude ratios of `magcache`, one per step or spread over them; those that are published when absent.",
);

/// See [`Rule::TeaCache`].
pub static CACHE_COEFFICIENTS: Parameter<Vec<f64>> = Parameter::numbers(
    "cache_coefficients",
    MAX_COEFFICIENTS,
    -MAX_COEFFICIENT,
    MAX_COEFFICIENT,
    "Polynomial of `teacache`, highest power first; the one that is published when absent.",
);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[
    &ACCELERATION.declaration,
    &CACHE_METHOD.declaration,
    &CACHE_THRESHOLD.declaration,
    &CACHE_MAX_SKIPS.declaration,
    &CACHE_INTERVAL.declaration,
    &CACHE_RATIOS.declaration,
    &CACHE_COEFFICIENTS.declaration,
];

/// Published thresholds are below 1.
const MAX_THRESHOLD: f64 = 100.0;
/// Published ratios are below 1.3.
const MAX_RATIO: f64 = 10.0;
/// A polynomial of the seventh degree; published are those of the fourth.
const MAX_COEFFICIENTS: usize = 8;
/// Published are some 300,000.
const MAX_COEFFICIENT: f64 = 1e9;
/// Most skips in a row where nobody says another number, so that a long loop of small steps cannot drift on one old answer.
pub const DEFAULT_MAX_SKIPS: usize = 3;
/// Part of the steps that MagCache computes first where nobody says another one; that of all published settings for clips.
const FIRST_PART_OF_MAGCACHE: f64 = 0.2;

/// How much of the denoising may be left out. What it means is a matter of the checkpoint, the size and the steps
/// ([`Published`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Acceleration {
    /// Everything is computed.
    #[default]
    None,
    /// Where hardly anybody sees it.
    Safe,
    /// Where it shows in details.
    Fast,
}

impl Acceleration {
    const ALL: [Self; 3] = [Self::None, Self::Safe, Self::Fast];
    const NAMES: [&'static str; 3] = ["none", "safe", "fast"];

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|acceleration| acceleration.as_str() == name)
    }

    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

impl ParameterType for Acceleration {
    fn from_value(value: &Value) -> Option<Self> {
        Self::named(&String::from_value(value)?)
    }

    fn into_value(self) -> Value {
        Value::Text(self.as_str().to_owned())
    }
}

/// What tells that a pass through the blocks may be answered from what the last one has added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheMethod {
    /// That what the first block adds has hardly changed since the last computed pass. Source: diffusers
    /// `hooks/first_block_cache.py`.
    FirstBlock,
    /// That known ratios of magnitudes from step to step have multiplied to about 1. Source: arXiv 2506.09045; diffusers
    /// `hooks/mag_cache.py`.
    MagCache,
    /// That what the blocks are told of the timestep has hardly changed, as a polynomial weighs it. Source: arXiv 2411.19108.
    TeaCache,
}

impl CacheMethod {
    const ALL: [Self; 3] = [Self::FirstBlock, Self::MagCache, Self::TeaCache];
    /// Of all methods.
    pub const NAMES: [&'static str; 3] = ["first_block", "magcache", "teacache"];

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.as_str() == name)
    }

    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

impl ParameterType for CacheMethod {
    fn from_value(value: &Value) -> Option<Self> {
        Self::named(&String::from_value(value)?)
    }

    fn into_value(self) -> Value {
        Value::Text(self.as_str().to_owned())
    }
}

/// By which rule the passes of a request skip blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct Cache {
    /// What is looked at.
    pub rule: Rule,
    /// Most skips in a row.
    pub max_skips: usize,
    /// Steps of the schedule, counted from 0, whose passes may skip.
    pub steps: Range<usize>,
    /// What the request said of it itself; `None` where it said a word of [`Acceleration`].
    given: Option<Given>,
}

/// A method with all that it needs. A threshold of 0 skips nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// See [`CacheMethod::FirstBlock`].
    FirstBlock {
        /// Mean absolute change over mean absolute value.
        threshold: f64,
    },
    /// See [`CacheMethod::MagCache`].
    MagCache {
        /// Error that may add up.
        threshold: f64,
        /// For each step of the schedule, of the prompt and of the negative one.
        ratios: [Vec<f64>; 2],
    },
    /// See [`CacheMethod::TeaCache`].
    TeaCache {
        /// Weighed change that may add up.
        threshold: f64,
        /// Highest power first.
        coefficients: Vec<f64>,
    },
}

/// Parameters as a request gave them.
#[derive(Debug, Clone, PartialEq)]
struct Given {
    interval: Option<[f64; 2]>,
    ratios: Option<Vec<f64>>,
    coefficients: Option<Vec<f64>>,
}

impl Cache {
    /// Without a request.
    pub fn new(rule: Rule, max_skips: usize, steps: Range<usize>) -> Self {
        Self { rule, max_skips, steps, given: None }
    }

    /// What is looked at.
    pub fn method(&self) -> CacheMethod {
        match self.rule {
            Rule::FirstBlock { .. } => CacheMethod::FirstBlock,
            Rule::MagCache { .. } => CacheMethod::MagCache,
            Rule::TeaCache { .. } => CacheMethod::TeaCache,
        }
    }

    /// Below it blocks are skipped.
    pub fn threshold(&self) -> f64 {
        let (Rule::FirstBlock { threshold } | Rule::MagCache { threshold, .. } | Rule::TeaCache { threshold, .. }) =
            self.rule;
        threshold
    }

    /// Tensors of the size of the stream that a row holds because of it: of the last computed pass what its blocks added and
    /// what is compared, and while blocks are computed what went into them and what will be compared. `wide_signal` says
    /// whether TeaCache looks at something as wide as the stream.
    pub fn stream_copies(&self, wide_signal: bool) -> usize {
        match self.method() {
            CacheMethod::FirstBlock => 3,
            CacheMethod::TeaCache if wide_signal => 4,
            CacheMethod::MagCache | CacheMethod::TeaCache => 2,
        }
    }
}

/// What a model lets a request skip.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CacheSupport {
    /// What is published of a checkpoint of this configuration, if anything is.
    pub published: Option<&'static Published>,
}

/// `support` is `None` for models that can skip nothing; `canvas` has the frames that are denoised at once.
pub(super) fn resolve(
    support: Option<&CacheSupport>,
    options: &Options,
    canvas: &Canvas,
    sampling: &Sampling,
) -> Result<(Acceleration, Option<Cache>)> {
    let asked = options.get(&ACCELERATION).unwrap_or_default();
    check_alone(options, asked)?;
    let Some(method) = options.get(&CACHE_METHOD) else {
        let cache = (asked != Acceleration::None).then(|| of_word(support, asked, canvas, sampling)).transpose()?;
        return Ok((asked, cache));
    };
    let Some(support) = support else {
        return Err(Error::invalid("cache_method", "this model can skip no blocks; leave it out"));
    };
    let profile = support.published.and_then(|published| published.profile(canvas.width * canvas.height));
    Ok((asked, Some(of_method(method, profile, options, sampling.num_inference_steps)?)))
}

/// Refuses what has no effect: parts of an expert's rule without a method, or of another one, and a rule beside a word.
fn check_alone(options: &Options, asked: Acceleration) -> Result<()> {
    let method = options.get(&CACHE_METHOD);
    if method.is_some() && asked != Acceleration::None {
        return Err(Error::invalid("cache_method", "acceleration says already what is skipped; leave one of them out"));
    }
    let parts: [(_, bool, &[CacheMethod]); 5] = [
        ("cache_threshold", options.has(&CACHE_THRESHOLD), &CacheMethod::ALL),
        ("cache_max_skips", options.has(&CACHE_MAX_SKIPS), &CacheMethod::ALL),
        ("cache_interval", options.has(&CACHE_INTERVAL), &CacheMethod::ALL),
        ("cache_ratios", options.has(&CACHE_RATIOS), &[CacheMethod::MagCache]),
        ("cache_coefficients", options.has(&CACHE_COEFFICIENTS), &[CacheMethod::TeaCache]),
    ];
    for (field, is_given, methods) in parts {
        if is_given && !method.is_some_and(|method| methods.contains(&method)) {
            let names: Vec<&str> = methods.iter().map(|method| method.as_str()).collect();
            let problem = format!("has no effect unless cache_method is {}; leave it out", names.join(" or "));
            return Err(Error::invalid(field, problem));
        }
    }
    Ok(())
}

/// The published setting that a word means.
fn of_word(support: Option<&CacheSupport>, asked: Acceleration, canvas: &Canvas, sampling: &Sampling) -> Result<Cache> {
    let refuse = |problem: String| Err(Error::invalid("acceleration", format!("{problem}; allowed: none")));
    let Some(support) = support else {
        return refuse("this model can skip no blocks".to_owned());
    };
    let Some(published) = support.published else {
        return refuse("nothing is published about skipping blocks of a checkpoint of this configuration".to_owned());
    };
    let run = Run { size: [canvas.width, canvas.height], frames: canvas.num_frames, sampling };
    let Some(figure) = published.figures.iter().find(|figure| figure.supports(asked, &run)) else {
        let (name, word, places) = (published.name, asked.as_str(), published.where_supported(asked));
        return refuse(format!("no figure supports {word} of {name} at {run}, but {places}"));
    };
    Ok(of_figure(figure, published.profile(canvas.width * canvas.height), sampling.num_inference_steps))
}

fn of_figure(figure: &Figure, profile: Option<&Profile>, steps: usize) -> Cache {
    const HAS_PROFILE: &str = "a setting has what it needs in its profile: this is a bug of the table";
    let ratios = || profile.and_then(|profile| profile.ratios).expect(HAS_PROFILE);
    let polynomial = || profile.and_then(|profile| profile.polynomial.as_ref()).expect(HAS_PROFILE);
    let (rule, max_skips, steps) = match figure.setting {
        Setting::FirstBlock(threshold) => (Rule::FirstBlock { threshold }, DEFAULT_MAX_SKIPS, 0..steps),
        Setting::MagCache(threshold, max_skips) => {
            let rule = Rule::MagCache { threshold, ratios: ratios().map(|ratios| spread(ratios, steps)) };
            (rule, max_skips, rounded(FIRST_PART_OF_MAGCACHE, steps)..steps)
        }
        Setting::TeaCache(threshold) => {
            let rule = Rule::TeaCache { threshold, coefficients: polynomial().coefficients.to_vec() };
            (rule, DEFAULT_MAX_SKIPS, polynomial().first_steps..steps - 1)
        }
    };
    Cache::new(rule, max_skips, steps)
}

/// What a request says itself; `profile` has what is published for what it leaves out.
fn of_method(method: CacheMethod, profile: Option<&Profile>, options: &Options, steps: usize) -> Result<Cache> {
    let Some(threshold) = options.get(&CACHE_THRESHOLD) else {
        return Err(Error::invalid("cache_threshold", "cache_method needs one"));
    };
    let given = Given {
        interval: options.get(&CACHE_INTERVAL),
        ratios: options.get(&CACHE_RATIOS),
        coefficients: options.get(&CACHE_COEFFICIENTS),
    };
    let needed = |field: &str| {
        Error::invalid(field, format!("{} needs them, and none are published for this model", method.as_str()))
    };
    let (rule, usual) = match method {
        CacheMethod::FirstBlock => (Rule::FirstBlock { threshold }, 0..steps),
        CacheMethod::MagCache => {
            let published = || profile.and_then(|profile| profile.ratios);
            let ratios = match &given.ratios {
                Some(ratios) => [ratios.as_slice(); 2],
                None => published().ok_or_else(|| needed("cache_ratios"))?,
            };
            let ratios = ratios.map(|ratios| spread(ratios, steps));
            (Rule::MagCache { threshold, ratios }, rounded(FIRST_PART_OF_MAGCACHE, steps)..steps)
        }
        CacheMethod::TeaCache => {
            let published = profile.and_then(|profile| profile.polynomial.as_ref());
            let (coefficients, first_steps) = match (&given.coefficients, published) {
                (Some(coefficients), _) => (coefficients.clone(), 1),
                (None, Some(polynomial)) => (polynomial.coefficients.to_vec(), polynomial.first_steps),
                (None, None) => return Err(needed("cache_coefficients")),
            };
            (Rule::TeaCache { threshold, coefficients }, first_steps..steps - 1)
        }
    };
    let steps = match given.interval {
        Some([start, end]) => rounded(start, steps)..rounded(end, steps),
        None => usual,
    };
    if given.interval.is_some() && steps.is_empty() {
        return Err(Error::invalid("cache_interval", "holds none of the steps"));
    }
    let max_skips = options.get(&CACHE_MAX_SKIPS).unwrap_or(DEFAULT_MAX_SKIPS);
    Ok(Cache { rule, max_skips, steps, given: Some(given) })
}

/// As the reference rounds: halves up.
fn rounded(part: f64, steps: usize) -> usize {
    (part * steps as f64 + 0.5).floor() as usize
}

/// One value for each step: that of the nearest place. Source: diffusers `hooks/mag_cache.py`, `nearest_interp`.
fn spread(values: &[f64], steps: usize) -> Vec<f64> {
    let last = values.len() - 1;
    if steps == 1 {
        return vec![values[last]];
    }
    let scale = last as f64 / (steps - 1) as f64;
    (0..steps).map(|step| values[((step as f64 * scale).round_ties_even() as usize).min(last)]).collect()
}

pub(super) fn echo(acceleration: Acceleration, cache: Option<&Cache>, options: &mut Options) {
    options.set(&ACCELERATION, acceleration);
    let Some((cache, given)) = cache.and_then(|cache| Some((cache, cache.given.as_ref()?))) else { return };
    options.set(&CACHE_METHOD, cache.method());
    options.set(&CACHE_THRESHOLD, cache.threshold());
    options.set(&CACHE_MAX_SKIPS, cache.max_skips);
    options.set(&CACHE_INTERVAL, given.interval);
    options.set(&CACHE_RATIOS, given.ratios.clone());
    options.set(&CACHE_COEFFICIENTS, given.coefficients.clone());
}

#[cfg(test)]
mod tests {
    use super::published::{COGVIDEOX_5B, WAN_I2V_14B, WAN_T2V_1_3B};
    use super::*;
    use crate::solver::names::{Given, Scheduler};

    const STEPS: usize = 50;
    const CANVAS: Canvas = Canvas { width: 832, height: 480, num_frames: 81, fps: 16 };

    /// A way that figures of Wan2.1 stand behind.
    fn sampling(num_inference_steps: usize) -> Sampling {
        let unipc = Scheduler::named("unipc").expect("a name");
        Sampling { flow_shift: Some(5.0), ..Sampling::new(unipc, num_inference_steps, 0) }
    }

    fn of(published: Option<&'static Published>, options: &Options, steps: usize) -> Result<Option<Cache>> {
        resolve(Some(&CacheSupport { published }), options, &CANVAS, &sampling(steps)).map(|(_, cache)| cache)
    }

    #[track_caller]
    fn refused(found: Result<Option<Cache>>, expected: &str) {
        let error = found.expect_err(expected).to_string();
        assert!(error.contains(expected), "expected {expected:?} in: {error}");
    }

    fn word(acceleration: Acceleration) -> Options {
        Options::default().with(&ACCELERATION, acceleration)
    }

    fn method(method: CacheMethod, threshold: f64) -> Options {
        Options::default().with(&CACHE_METHOD, method).with(&CACHE_THRESHOLD, threshold)
    }

    #[test]
    fn a_word_means_the_published_setting_or_is_refused() {
        let cache = of(Some(&WAN_T2V_1_3B), &word(Acceleration::Fast), STEPS).expect("allowed").expect("a cache");
        assert_eq!((cache.method(), cache.threshold(), cache.max_skips), (CacheMethod::MagCache, 0.12, 4));
        assert_eq!(cache.steps, 10..50);
        let Rule::MagCache { ratios: [prompt, negative], .. } = cache.rule else { panic!("MagCache") };
        assert_eq!((prompt.len(), prompt[1], negative[1], prompt[49]), (50, 1.0124, 1.02213, 0.81838));
        for published in [None, Some(&WAN_T2V_1_3B)] {
            assert_eq!(of(published, &word(Acceleration::None), STEPS).expect("allowed"), None);
        }
        refused(of(None, &word(Acceleration::Safe), STEPS), "nothing is published");
        refused(
            of(Some(&WAN_T2V_1_3B), &word(Acceleration::Safe), 20),
            "at 832x480 and 81 frames with unipc and flow_shift 5 in 20 steps, but about 832x480 and 81 frames with unipc and \
             flow_shift 2.5 to 16 from 50 steps on",
        );
        refused(of(Some(&COGVIDEOX_5B), &word(Acceleration::Safe), STEPS), "but nowhere");
        let large = Canvas { width: 1280, height: 720, ..CANVAS };
        let support = CacheSupport { published: Some(&WAN_T2V_1_3B) };
        assert!(resolve(Some(&support), &word(Acceleration::Safe), &large, &sampling(STEPS)).is_err());
        let none = resolve(None, &word(Acceleration::Safe), &CANVAS, &sampling(STEPS)).map(|(_, cache)| cache);
        refused(none, "acceleration: this model can skip no blocks; allowed: none");
    }

    /// A figure says nothing of other schedules and lengths than those that it was measured with.
    #[test]
    fn a_word_is_refused_for_another_schedule_or_length() {
        let resolved = |published, num_frames, sampling: &Sampling| {
            let canvas = Canvas { num_frames, ..CANVAS };
            let support = CacheSupport { published: Some(published) };
            resolve(Some(&support), &word(Acceleration::Safe), &canvas, sampling).map(|(_, cache)| cache)
        };
        for num_frames in [41, 81, 101] {
            assert!(resolved(&WAN_T2V_1_3B, num_frames, &sampling(STEPS)).is_ok(), "{num_frames}");
        }
        for num_frames in [1, 37, 105, 161] {
            refused(resolved(&WAN_T2V_1_3B, num_frames, &sampling(STEPS)), "no figure supports safe");
        }
        let with = |name: &str, flow_shift: f64| {
            let scheduler = Scheduler::named(name).expect("a name");
            Sampling { scheduler, flow_shift: Some(flow_shift), ..sampling(STEPS) }
        };
        assert!(resolved(&WAN_T2V_1_3B, 81, &with("UniPCMultistepScheduler", 3.0)).is_ok());
        refused(resolved(&WAN_T2V_1_3B, 81, &with("flow_euler", 5.0)), "81 frames with flow_euler and flow_shift 5 in");
        refused(resolved(&WAN_T2V_1_3B, 81, &with("unipc", 1.0)), "with unipc and flow_shift 1 in 50 steps");
        refused(resolved(&WAN_I2V_14B, 81, &with("unipc", 12.0)), "with unipc and flow_shift 12 in 50 steps");
        let given = Some(Given::Sigmas(vec![1.0; STEPS].into()));
        let own_sigmas = Sampling { given, ..sampling(STEPS) };
        refused(resolved(&WAN_T2V_1_3B, 81, &own_sigmas), "and its own sigmas, but about 832x480");
        // What somebody who knows the model asks for is not held to figures.
        let asked = method(CacheMethod::FirstBlock, 0.1);
        let support = CacheSupport { published: Some(&WAN_T2V_1_3B) };
        assert!(resolve(Some(&support), &asked, &CANVAS, &own_sigmas).is_ok());
    }

    #[test]
    fn experts_give_what_is_not_published() {
        let ratios = vec![1.0, 1.1, 0.9];
        let asked = method(CacheMethod::MagCache, 0.5).with(&CACHE_RATIOS, ratios.clone());
        let cache = of(None, &asked, 5).expect("allowed").expect("a cache");
        let expected = vec![1.0, 1.0, 1.1, 0.9, 0.9];
        assert_eq!(cache.rule, Rule::MagCache { threshold: 0.5, ratios: [expected.clone(), expected] });
        assert_eq!((cache.steps.clone(), cache.max_skips), (1..5, DEFAULT_MAX_SKIPS));
        refused(of(None, &method(CacheMethod::MagCache, 0.5), 5), "cache_ratios: magcache needs them");
        refused(of(Some(&COGVIDEOX_5B), &method(CacheMethod::MagCache, 0.5), 5), "cache_ratios: magcache needs them");
        refused(of(None, &method(CacheMethod::TeaCache, 0.5), 5), "cache_coefficients: teacache needs them");
        let published = of(Some(&WAN_I2V_14B), &method(CacheMethod::TeaCache, 0.2), 40).expect("allowed").expect("one");
        assert_eq!(published.steps, 5..39);
        let part = method(CacheMethod::FirstBlock, 0.1).with(&CACHE_INTERVAL, [0.25, 0.5]).with(&CACHE_MAX_SKIPS, 7);
        let cache = of(None, &part, 10).expect("allowed").expect("a cache");
        assert_eq!((cache.steps.clone(), cache.max_skips), (3..5, 7));
        let mut echo = Options::default();
        super::echo(Acceleration::None, Some(&cache), &mut echo);
        assert_eq!(of(None, &echo, 10).expect("allowed"), Some(cache));
    }

    #[test]
    fn what_has_no_effect_is_refused() {
        let first = || method(CacheMethod::FirstBlock, 0.1);
        refused(of(None, &first().with(&CACHE_RATIOS, vec![1.0]), 5), "unless cache_method is magcache");
        refused(of(None, &first().with(&CACHE_COEFFICIENTS, vec![1.0]), 5), "unless cache_method is teacache");
        refused(of(None, &Options::default().with(&CACHE_MAX_SKIPS, 2), 5), "cache_max_skips: has no effect unless");
        refused(of(None, &first().with(&ACCELERATION, Acceleration::Safe), 5), "leave one of them out");
        refused(of(None, &Options::default().with(&CACHE_METHOD, CacheMethod::FirstBlock), 5), "cache_threshold");
        refused(of(None, &first().with(&CACHE_INTERVAL, [0.01, 0.02]), 5), "cache_interval: holds none");
        let none = resolve(None, &first(), &CANVAS, &sampling(5)).map(|(_, cache)| cache);
        refused(none, "cache_method: this model can skip no blocks");
    }

    /// As torch's `nearest_interp` picks them.
    #[test]
    fn values_are_spread_to_the_nearest_places() {
        let picked = |len: usize, steps| {
            let values: Vec<f64> = (0..len).map(|value| value as f64).collect();
            spread(&values, steps).into_iter().map(|value| value as usize).collect::<Vec<_>>()
        };
        assert_eq!(picked(5, 5), [0, 1, 2, 3, 4]);
        assert_eq!(picked(5, 1), [4]);
        assert_eq!(picked(2, 5), [0, 0, 0, 1, 1]);
        assert_eq!(picked(7, 4), [0, 2, 4, 6]);
        assert_eq!(picked(4, 7), [0, 0, 1, 2, 2, 2, 3]);
        assert_eq!(picked(1, 3), [0, 0, 0]);
    }
}
