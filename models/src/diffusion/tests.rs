//! The card's rules: what is refused, and what absent parameters become.

use std::sync::Arc;

use super::acceleration::published::WAN_T2V_1_3B;
use super::acceleration::{CacheMethod, CacheSupport};
use super::canvas::{CanvasSupport, FrameSupport, SizeRule};
use super::edit::{EditDefaults, EditSupport, StepRounding};
use super::guidance::{GuidanceKind, GuidanceSupport};
use super::parameters::*;
use super::prompt::{MAX_PROMPT_BYTES, Prompts};
use super::references::MAX_REFERENCE_IMAGES;
use super::sampling::SamplingSupport;
use super::shots::ShotMethod;
use super::tiling::VaeTiling;
use super::*;
use crate::error::{Error, Result};
use crate::request::{Frame, Mask};

fn clip_card() -> DiffusionCard {
    let prompts = Prompts::Plain { default_length: 512, max_length: 512 };
    let canvas = CanvasSupport {
        default_width: 832,
        default_height: 480,
        size_multiple: 16,
        max_side: 2048,
        max_pixels: 1280 * 720,
        sizes: SizeRule::AspectOfPicture,
        frames: Some(FrameSupport {
            default_num_frames: 81,
            default_fps: 16,
            multiple: 4,
            max_frames: 161,
            trained_frames: 81,
            has_one_length: false,
        }),
    };
    let sampling = SamplingSupport { default_steps: 50, schedulers: crate::testing::flow_schedulers() };
    let guidance = GuidanceSupport::constant(GuidanceKind::ClassifierFree, 5.0);
    let acceleration = Some(CacheSupport { published: Some(&WAN_T2V_1_3B) });
    DiffusionCard { acceleration, ..DiffusionCard::new("wan", prompts, canvas, sampling, guidance) }
}

fn picture_card(kind: GuidanceKind) -> DiffusionCard {
    let mut card = clip_card();
    card.canvas.frames = None;
    card.guidance = GuidanceSupport::constant(kind, 0.0);
    card
}

#[test]
fn absent_fields_take_the_models_defaults() {
    let request = clip_card().resolve(&Options::default(), 7).expect("defaults are valid");
    assert_eq!(
        (request.canvas.width, request.canvas.height, request.canvas.num_frames, request.canvas.fps),
        (832, 480, 81, 16)
    );
    assert_eq!((request.sampling.seed, request.guidance.negative_prompt), (7, Some(NegativePrompt::Absent)));
}

#[track_caller]
fn check(card: DiffusionCard, options: Options, field: &str, allowed: &str) {
    match card.resolve(&options, 0) {
        Err(Error::InvalidRequest { field: found, problem }) => {
            assert_eq!(found, field);
            assert!(problem.contains(allowed), "expected `{allowed}` in: {problem}");
        }
        other => panic!("{field}: {other:?}"),
    }
}

#[test]
fn what_is_out_of_range_is_named_with_what_is_allowed() {
    let options = Options::default;
    check(clip_card(), options().with(&WIDTH, 100), "width", "multiples of 16 from 16 to 2048");
    check(clip_card(), options().with(&HEIGHT, 0), "height", "multiples of 16");
    let large = options().with(&WIDTH, 2048).with(&HEIGHT, 2048);
    check(clip_card(), large, "size", "at most 921600");
    check(clip_card(), options().with(&NUM_FRAMES, 80), "num_frames", "4k+1 from 1 to 161");
    check(clip_card(), options().with(&NUM_FRAMES, 165), "num_frames", "4k+1 from 1 to 161");
    check(clip_card(), options().with(&FPS, 0), "fps", "1 to 120");
    check(clip_card(), options().with(&NUM_INFERENCE_STEPS, 0), "num_inference_steps", "1 to");
    let (most, more) = ("(".repeat(MAX_PROMPT_BYTES), "(".repeat(MAX_PROMPT_BYTES + 1));
    assert!(clip_card().resolve(&options().with(&PROMPT, most), 0).is_ok());
    check(clip_card(), options().with(&PROMPT, more.clone()), "prompt", "at most 65536");
    let negative = options().with(&NEGATIVE_PROMPT, more);
    check(clip_card(), negative, "negative_prompt", "at most 65536");
    let nan = options().with(&GUIDANCE_SCALE, f64::NAN);
    check(clip_card(), nan, "guidance_scale", "0 to 100");
    let long = options().with(&MAX_SEQUENCE_LENGTH, 513);
    check(clip_card(), long, "max_sequence_length", "1 to 512");
    let clip_fields = options().with(&NUM_FRAMES, 5);
    check(picture_card(GuidanceKind::Embedded), clip_fields, "num_frames", "leave it out");
    check(picture_card(GuidanceKind::Embedded), options().with(&FPS, 8), "fps", "leave it out");
    let scale = options().with(&GUIDANCE_SCALE, 3.5);
    check(picture_card(GuidanceKind::None), scale, "guidance_scale", "only 0");
}

/// In tiles what is asked for, else what has no room as a whole; the same request always in the same way.
#[test]
fn tiles_are_chosen_by_the_room_there_is() {
    let tiling = VaeTiling::new([64, 64], 10, 1);
    let card = |room_bytes| DiffusionCard {
        tiling: Some(VaeTiling { room_bytes, ..tiling }),
        ..picture_card(GuidanceKind::Embedded)
    };
    let resolved = |card: DiffusionCard, side, vae_tiling| {
        let size = Some(side);
        let options = Options::default().with(&WIDTH, size).with(&HEIGHT, size).with(&VAE_TILING, vae_tiling);
        card.resolve(&options, 0).map(|request| request.vae_tiling)
    };
    for (room, side, asked, expected) in [
        (None, 128, None, false),
        (Some(128 * 128 * 10), 128, None, false),
        (Some(128 * 128 * 10 - 1), 128, None, true),
        (Some(0), 64, None, false),
        (None, 128, Some(true), true),
        (Some(0), 128, Some(false), false),
    ] {
        let found = resolved(card(room), side, asked).expect("valid");
        assert_eq!(found, expected, "{room:?} bytes, {side} pixels, {asked:?}");
    }
    let error = resolved(picture_card(GuidanceKind::Embedded), 64, Some(true)).expect_err("refused").to_string();
    assert!(error.starts_with("vae_tiling: "), "{error}");
}

fn picture(width: usize, height: usize) -> Option<Arc<Frame>> {
    Some(Arc::new(Frame { width, height, rgb: vec![77; width * height * 3] }))
}

fn mask(width: usize, height: usize) -> Option<Arc<Mask>> {
    Some(Arc::new(Mask { width, height, grey: vec![255; width * height] }))
}

fn edit_card(rounding: StepRounding) -> DiffusionCard {
    let defaults = |strength, guidance_scale| Some(EditDefaults { strength, guidance_scale });
    let (image_to_image, inpainting) = (defaults(0.3, 2.0), defaults(0.9999, 7.5));
    let edits = Some(EditSupport { image_to_image, inpainting, rounding, is_needed: false });
    DiffusionCard { edits, ..picture_card(GuidanceKind::ClassifierFree) }
}

#[test]
fn a_picture_brings_its_size_and_its_defaults() {
    let card = edit_card(StepRounding::Taken);
    let request = card.resolve(&Options::default().with(&IMAGE, picture(70, 95)), 0).expect("valid");
    let edit = request.edit.as_ref().expect("an edit");
    assert_eq!((request.canvas.width, request.canvas.height, request.guidance.guidance_scale), (64, 80, 2.0));
    assert_eq!((edit.image.width, edit.image.height, edit.strength, edit.first_step), (64, 80, 0.3, 35));
    let (image, mask) = (picture(70, 95), mask(70, 95));
    let masked = Options::default().with(&IMAGE, image).with(&MASK, mask).with(&WIDTH, 32);
    let request = card.resolve(&masked, 0).expect("valid");
    let edit = request.edit.as_ref().expect("an edit");
    assert_eq!((request.canvas.width, request.canvas.height, request.guidance.guidance_scale), (32, 80, 7.5));
    let mask = edit.mask.as_ref().expect("a mask");
    assert_eq!((mask.width, mask.height, edit.strength, edit.first_step), (32, 80, 0.9999, 1));
}

#[test]
fn pictures_that_cannot_be_edited_are_refused_by_field() {
    let options = || Options::default().with(&IMAGE, picture(64, 64));
    let card = || edit_card(StepRounding::Taken);
    check(card(), Options::default().with(&MASK, mask(64, 64)), "mask", "without image");
    check(card(), Options::default().with(&STRENGTH, 0.5), "strength", "without image");
    check(card(), options().with(&MASK, mask(64, 48)), "mask", "is 64x48, but image is 64x64");
    for strength in [-0.1, 1.01, f64::NAN] {
        check(card(), options().with(&STRENGTH, strength), "strength", "0 to 1");
    }
    let weak = options().with(&STRENGTH, 0.3).with(&NUM_INFERENCE_STEPS, 3);
    check(card(), weak, "strength", "leaves no step of num_inference_steps (3)");
    for (width, height) in [(15, 64), (4000, 64), (2048, 2048)] {
        let options = Options::default().with(&IMAGE, picture(width, height));
        check(card(), options, "image", "give width and height");
    }
    check(picture_card(GuidanceKind::ClassifierFree), options(), "image", "does not begin from an image");
    let with = |change: fn(&mut EditSupport)| {
        let mut card = card();
        card.edits.as_mut().map(change);
        card
    };
    let whole = with(|edits| edits.inpainting = None);
    check(whole, options().with(&MASK, mask(64, 64)), "mask", "does not fill in parts");
    let needed = with(|edits| edits.is_needed = true);
    check(needed, Options::default(), "image", "only makes images from images");
    let masked = with(|edits| edits.image_to_image = None);
    check(masked, options(), "mask", "is missing");
}

#[test]
fn another_models_scheduler_is_refused_with_those_of_this_one() {
    let ask = |name: &str| Options::default().with(&SCHEDULER, name.to_owned());
    let request = clip_card().resolve(&Options::default(), 0).expect("the checkpoint's own");
    assert_eq!(request.sampling.scheduler.name, "FlowMatchEulerDiscreteScheduler");
    assert_eq!(clip_card().resolve(&ask("unipc"), 0).expect("offered").sampling.scheduler.name, "unipc");
    for name in ["euler", "EulerDiscreteScheduler", "UNIPC", "flux", ""] {
        let error = clip_card().resolve(&ask(name), 0).expect_err(name).to_string();
        assert!(error.contains("scheduler") && error.contains("unipc, flow_euler"), "{error}");
    }
}

#[test]
fn a_scheduler_limits_the_steps_and_says_whether_there_is_an_eta() {
    let mut card = picture_card(GuidanceKind::ClassifierFree);
    card.sampling.schedulers = crate::testing::discrete_schedulers();
    let resolve = |name: &str, steps: usize, eta: Option<f64>| {
        let options = Options::default().with(&SCHEDULER, name.to_owned()).with(&NUM_INFERENCE_STEPS, steps);
        card.resolve(&options.with(&ETA, eta), 0)
    };
    assert_eq!(resolve("lcm", 50, None).expect("as many as there are").sampling.eta, None);
    assert_eq!(resolve("ddim", 1000, None).expect("as many as there are").sampling.eta, Some(0.0));
    assert_eq!(resolve("TCDScheduler", 4, Some(0.3)).expect("it has one").sampling.eta, Some(0.3));
    for (name, steps, eta, expected) in [
        ("lcm", 51, None, "num_inference_steps"),
        ("TCDScheduler", 51, None, "num_inference_steps"),
        ("dpmpp_2m", 1000, None, "1 to 999"),
        ("euler", 4, Some(0.5), "eta"),
        ("ddim", 4, Some(1.5), "eta"),
        ("ddim", 4, Some(f64::NAN), "eta"),
    ] {
        let error = resolve(name, steps, eta).expect_err(name).to_string();
        assert!(error.contains(expected), "{name} {steps} {eta:?}: {error}");
    }
}

#[test]
fn reference_pictures_are_for_models_with_an_adapter() {
    let check = |has_ip_adapter: bool, images: usize, ip_adapter_scale: Option<f64>| {
        let card = DiffusionCard { has_ip_adapter, ..picture_card(GuidanceKind::Embedded) };
        let picture = Arc::new(Frame { width: 1, height: 1, rgb: vec![0; 3] });
        let options =
            Options::default().with(&REFERENCE_IMAGES, vec![picture; images]).with(&IP_ADAPTER_SCALE, ip_adapter_scale);
        let scale = card.resolve(&options, 0).map(|request| request.references.map(|references| references.scale));
        scale.map_err(|error| error.to_string())
    };
    let refused = |found: Result<Option<f64>, String>, expected: &str| {
        assert!(found.as_ref().is_err_and(|error| error.starts_with(expected)), "{expected}: {found:?}");
    };
    assert_eq!(check(true, 2, None), Ok(Some(1.0)));
    assert_eq!(check(true, 1, Some(0.0)), Ok(Some(0.0)));
    assert_eq!(check(true, 0, None), Ok(None));
    assert_eq!(check(false, 0, None), Ok(None));
    refused(check(false, 1, None), "reference_images: this model is served without an IP-Adapter");
    refused(check(false, 0, Some(1.0)), "ip_adapter_scale: this model is served without");
    refused(check(true, 0, Some(1.0)), "ip_adapter_scale: has no effect without reference_images");
    refused(check(true, 1, Some(1.5)), "ip_adapter_scale: is 1.5; allowed: 0 to 1");
    refused(check(true, 1, Some(f64::NAN)), "ip_adapter_scale");
    refused(check(true, MAX_REFERENCE_IMAGES + 1, None), "reference_images: are 9; allowed: 1 to 8");
}

#[test]
fn previews_are_of_pictures_and_clips_and_three_at_most() {
    let ask = |partial_images| Options::default().with(&PARTIAL_IMAGES, partial_images);
    let pictures = picture_card(GuidanceKind::None);
    assert_eq!(pictures.resolve(&ask(3), 0).expect("allowed").partial_images, 3);
    assert!(pictures.resolve(&ask(4), 0).expect_err("too many").to_string().contains("0 to 3"));
    assert_eq!(clip_card().resolve(&ask(2), 0).expect("allowed").partial_images, 2);
}

#[test]
fn weights_are_refused_where_encoders_know_none() {
    let ask = |prompt: &str, negative: &str| {
        let negative_prompt = Some(negative.to_owned());
        let options = Options::default().with(&PROMPT, prompt.to_owned()).with(&NEGATIVE_PROMPT, negative_prompt);
        clip_card().resolve(&options, 0)
    };
    assert_eq!(ask("a (b) \\(16:9\\)", "").expect("text").prompt.text, "a (b) \\(16:9\\)");
    assert!(ask("a (b:1.2)", "").expect_err("weighed").to_string().contains("prompt"));
    assert!(ask("a", "(b:1.2)").expect_err("weighed").to_string().contains("negative_prompt"));
}

#[test]
fn a_negative_prompt_without_effect_is_refused() {
    let options = || Options::default().with(&NEGATIVE_PROMPT, "blur".to_owned());
    let unguided = options().with(&GUIDANCE_SCALE, 1.0);
    assert!(clip_card().resolve(&unguided, 0).is_err());
    assert!(clip_card().resolve(&options(), 0).is_ok());
    let unguided = Options::default().with(&GUIDANCE_SCALE, 1.0);
    assert_eq!(clip_card().resolve(&unguided, 0).expect("valid").guidance.negative_prompt, None);
    let scale = options().with(&TRUE_CFG_SCALE, 4.0);
    check(clip_card(), scale.clone(), "true_cfg_scale", "guided by guidance_scale");
    let mut card = picture_card(GuidanceKind::ClassifierFree);
    card.guidance.default_scale = 5.0;
    check(card, scale, "true_cfg_scale", "guided by guidance_scale");
}

/// FLUX.1: `guidance_scale` says nothing about the negative prompt, and an absent one is no empty one.
#[test]
fn true_guidance_takes_a_scale_and_a_negative_prompt() {
    for guidance in [GuidanceKind::None, GuidanceKind::Embedded] {
        let of = |scale, negative: Option<&str>| {
            Options::default().with(&TRUE_CFG_SCALE, scale).with(&NEGATIVE_PROMPT, negative.map(str::to_owned))
        };
        check(picture_card(guidance), of(None, Some("blur")), "negative_prompt", "true_cfg_scale is above 1");
        check(picture_card(guidance), of(Some(1.0), Some("")), "negative_prompt", "true_cfg_scale is above 1");
        check(picture_card(guidance), of(Some(4.0), None), "true_cfg_scale", "without a negative_prompt");
        check(picture_card(guidance), of(Some(0.5), None), "true_cfg_scale", "1 to 100");
        let resolve = |options| picture_card(guidance).resolve(&options, 0).expect("valid");
        let guided = resolve(of(Some(4.0), Some("")));
        assert_eq!(
            (guided.guidance.cfg_scale(), guided.guidance.negative_prompt),
            (4.0, Some(NegativePrompt::Text(String::new())))
        );
        assert_eq!(resolve(of(None, None)).guidance.true_cfg_scale, Some(1.0));
    }
    assert_eq!(clip_card().resolve(&Options::default(), 0).expect("valid").guidance.cfg_scale(), 5.0);
}

/// As Python computes `1 + g * (1 - cos(pi * ((n - t) / n) ** 5.0)) / 2`.
#[test]
fn a_dynamic_scale_is_made_of_the_timestep() {
    let card =
        || DiffusionCard { guidance: GuidanceSupport { has_dynamic_cfg: true, ..clip_card().guidance }, ..clip_card() };
    let of = |scale, dynamic| Options::default().with(&GUIDANCE_SCALE, scale).with(&USE_DYNAMIC_CFG, dynamic);
    let guidance = card().resolve(&of(6.0, Some(true)), 0).expect("valid").guidance;
    for (timestep, expected) in
        [(999.0, 2.291487174551452), (979.0, 2.5435028667646318), (39.0, 1.000003932038104), (19.0, 1.123397939968981)]
    {
        let found = guidance.cfg_scale_at(timestep, 50);
        assert!((found - expected).abs() < 1e-6, "{timestep}: {found}, not {expected}");
    }
    for dynamic in [None, Some(false)] {
        let request = card().resolve(&of(6.0, dynamic), 0).expect("valid");
        assert_eq!(request.guidance.cfg_scale_at(999.0, 50), 6.0);
        assert_eq!(request.echo().get(&USE_DYNAMIC_CFG), Some(false));
    }
    check(card(), of(1.0, Some(true)), "use_dynamic_cfg", "guidance_scale is above 1");
    check(clip_card(), of(6.0, Some(true)), "use_dynamic_cfg", "never changes");
    let other = clip_card().resolve(&of(6.0, Some(false)), 0).expect("as it is");
    assert_eq!(other.echo().get(&USE_DYNAMIC_CFG), None);
}

#[test]
fn zero_star_is_for_flows_that_are_guided() {
    let card = || DiffusionCard { guidance: clip_card().guidance.of_flow(), ..clip_card() };
    let of = |asked, steps| Options::default().with(&CFG_ZERO_STAR, asked).with(&ZERO_INIT_STEPS, steps);
    let resolve = |options: &Options| card().resolve(options, 0).expect("valid");
    for (asked, steps, expected) in
        [(None, None, None), (Some(false), None, None), (Some(true), None, Some(1)), (Some(true), Some(0), Some(0))]
    {
        let request = resolve(&of(asked, steps));
        assert_eq!(request.guidance.zero_star.map(|zero_star| zero_star.zero_init_steps), expected);
        let echo = request.echo();
        assert_eq!((echo.get(&CFG_ZERO_STAR), echo.get(&ZERO_INIT_STEPS)), (expected.map(|_| true), expected));
        assert_eq!(resolve(&echo), request);
    }
    check(card(), of(None, Some(1)), "zero_init_steps", "without cfg_zero_star");
    check(card(), of(Some(true), Some(50)), "zero_init_steps", "0 to 49");
    check(card(), of(Some(true), None).with(&GUIDANCE_SCALE, 1.0), "cfg_zero_star", "guidance_scale is above 1");
    check(clip_card(), of(Some(true), None), "cfg_zero_star", "no flow");
    let all_zero = of(Some(true), Some(5)).with(&GUIDANCE_INTERVAL, [0.0, 0.1]);
    check(card(), all_zero, "guidance_interval", "holds none");
}

#[test]
fn a_model_may_make_one_size_alone() {
    let card = |sizes| DiffusionCard { canvas: CanvasSupport { sizes, ..clip_card().canvas }, ..clip_card() };
    let of = |width, height| Options::default().with(&WIDTH, width).with(&HEIGHT, height);
    let only = || card(SizeRule::OnlyDefault);
    check(only(), of(816, 480), "width", "allowed: 832");
    check(only(), of(832, 464), "height", "allowed: 480");
    assert!(only().resolve(&of(832, 480), 0).is_ok());
    let within = || card(SizeRule::Within { width: 640, height: 320 });
    check(within(), of(656, 320), "width", "from 16 to 640");
    check(within(), of(640, 336), "height", "from 16 to 320");
    assert!(within().resolve(&of(640, 320), 0).is_ok());
}

#[test]
fn acceleration_is_off_unless_asked_for_and_refused_where_there_is_none() {
    let options = |acceleration| {
        let scheduler = Options::default().with(&SCHEDULER, "unipc".to_owned()).with(&FLOW_SHIFT, 5.0);
        scheduler.with(&ACCELERATION, acceleration)
    };
    let (card, without) = (clip_card(), DiffusionCard { acceleration: None, ..clip_card() });
    for (acceleration, max_skips) in
        [(None, None), (Some(Acceleration::Safe), Some(2)), (Some(Acceleration::Fast), Some(4))]
    {
        let request = card.resolve(&options(acceleration), 0).expect("valid");
        assert_eq!(request.acceleration, acceleration.unwrap_or(Acceleration::None));
        assert_eq!(request.cache.as_ref().map(|cache| cache.max_skips), max_skips);
        assert_eq!(request.echo().get(&CACHE_METHOD), None);
        assert_eq!(card.resolve(&request.echo(), 0).expect("as echoed"), request);
    }
    let few = options(Some(Acceleration::Safe)).with(&NUM_INFERENCE_STEPS, 20);
    check(card.clone(), few, "acceleration", "from 50 steps on");
    // A clip of two parts is two clips of their lengths.
    let frames = |count| options(Some(Acceleration::Safe)).with(&NUM_FRAMES, count);
    check(card.clone(), frames(161), "acceleration", "161 frames with unipc");
    let expert = options(None).with(&CACHE_METHOD, CacheMethod::FirstBlock).with(&CACHE_THRESHOLD, 0.1);
    let request = card.resolve(&expert, 0).expect("valid");
    assert_eq!(card.resolve(&request.echo(), 0).expect("as echoed"), request);
    check(without.clone(), options(Some(Acceleration::Safe)), "acceleration", "allowed: none");
    assert!(without.resolve(&options(Some(Acceleration::None)), 0).is_ok());
}

#[test]
fn an_interval_holds_the_steps_from_its_start_to_before_its_end() {
    let resolve = |interval, num_inference_steps| {
        let (guidance_interval, num_inference_steps) = (Some(interval), Some(num_inference_steps));
        clip_card().resolve(
            &Options::default()
                .with(&GUIDANCE_INTERVAL, guidance_interval)
                .with(&NUM_INFERENCE_STEPS, num_inference_steps),
            0,
        )
    };
    for (interval, steps, guided) in [
        ([0.0, 1.0], 4, vec![0, 1, 2, 3]),
        ([0.0, 0.5], 4, vec![0, 1]),
        ([0.25, 0.75], 4, vec![1, 2]),
        ([0.24, 0.51], 4, vec![1, 2]),
        ([0.3, 0.4], 10, vec![3]),
        ([0.7, 1.0], 10, vec![7, 8, 9]),
        ([0.0, 1e-9], 1, vec![0]),
    ] {
        let request = resolve(interval, steps).expect("holds steps");
        let found: Vec<usize> = (0..steps).filter(|step| request.guidance.is_guided_at(*step, steps)).collect();
        assert_eq!(found, guided, "{interval:?} of {steps}");
    }
    let refused = |interval, steps| match resolve(interval, steps) {
        Err(Error::InvalidRequest { field, problem }) => format!("{field}: {problem}"),
        other => panic!("{interval:?} of {steps}: {other:?}"),
    };
    for interval in [[0.5, 0.5], [0.6, 0.5], [-0.1, 1.0], [0.0, 1.1], [f64::NAN, 1.0], [0.0, f64::NAN]] {
        assert!(refused(interval, 4).contains("0 <= start < end <= 1"));
    }
    assert!(refused([0.3, 0.4], 4).contains("holds none of the 4 steps"));
    let unguided = Options::default().with(&GUIDANCE_SCALE, 1.0).with(&GUIDANCE_INTERVAL, [0.0, 0.5]);
    check(clip_card(), unguided, "guidance_interval", "guidance_scale is above 1");
    let interval = Options::default().with(&GUIDANCE_INTERVAL, [0.0, 0.5]);
    check(picture_card(GuidanceKind::Embedded), interval, "guidance_interval", "true_cfg_scale is above 1");
}

#[test]
fn what_belongs_to_a_value_that_is_replaced_is_not_taken_over() {
    let base = || {
        Options::default()
            .with(&CACHE_METHOD, CacheMethod::MagCache)
            .with(&CACHE_RATIOS, vec![1.0])
            .with(&ZERO_INIT_STEPS, 2)
            .with(&VAE_TILING, true)
            .with(&SHOT_METHOD, ShotMethod::SinglePass)
    };
    let over = |options: Options| {
        let over = options_over(options, base());
        [
            over.has(&CACHE_METHOD),
            over.has(&CACHE_RATIOS),
            over.has(&ZERO_INIT_STEPS),
            over.has(&VAE_TILING),
            over.has(&SHOT_METHOD),
        ]
    };
    assert_eq!(over(Options::default()), [true; 5]);
    assert_eq!(over(Options::default().with(&ACCELERATION, Acceleration::Safe)), [false, false, true, true, true]);
    assert_eq!(over(Options::default().with(&CFG_ZERO_STAR, false)), [true, true, false, true, true]);
    assert_eq!(over(Options::default().with(&WIDTH, 64)), [true, true, true, false, true]);
    assert_eq!(over(Options::default().with(&NUM_FRAMES, 9)), [true, true, true, false, false]);
}
