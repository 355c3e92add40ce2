use super::*;

fn clip_card() -> DiffusionCard {
    DiffusionCard {
        family: "wan",
        medium: Medium::Clip,
        defaults: DiffusionDefaults {
            width: 832,
            height: 480,
            num_frames: 81,
            fps: 16,
            num_inference_steps: 50,
            guidance_scale: 5.0,
            max_sequence_length: 512,
        },
        size_multiple: 16,
        max_side: 2048,
        max_pixels: 1280 * 720,
        max_frames: 161,
        frames_multiple: 4,
        max_sequence_length: 512,
        prompts: Prompts::Plain,
        guidance: Guidance::ClassifierFree,
        loras: LoraSupport::Unsupported,
        schedulers: crate::testing::flow_schedulers(),
        vae_tiling: None,
        has_ip_adapter: false,
        refiner: None,
        room_bytes: usize::MAX,
        acceleration: Some(CacheThresholds { safe: 0.1, fast: 0.2 }),
        edits: Edits::default(),
    }
}

fn picture_card(guidance: Guidance) -> DiffusionCard {
    let defaults = DiffusionDefaults { num_frames: 1, fps: 0, guidance_scale: 0.0, ..clip_card().defaults };
    DiffusionCard { medium: Medium::Picture, frames_multiple: 1, max_frames: 1, guidance, defaults, ..clip_card() }
}

#[test]
fn absent_fields_take_the_models_defaults() {
    let request = clip_card().resolve(DiffusionOptions::default(), 7).expect("defaults are valid");
    assert_eq!(
        (request.canvas.width, request.canvas.height, request.canvas.num_frames, request.canvas.fps),
        (832, 480, 81, 16)
    );
    assert_eq!((request.sampling.seed, request.guidance.negative_prompt), (7, Some(NegativePrompt::Absent)));
}

#[track_caller]
fn check(card: DiffusionCard, options: DiffusionOptions, field: &str, allowed: &str) {
    match card.resolve(options, 0) {
        Err(Error::InvalidRequest { field: found, problem }) => {
            assert_eq!(found, field);
            assert!(problem.contains(allowed), "expected `{allowed}` in: {problem}");
        }
        other => panic!("{field}: {other:?}"),
    }
}

#[test]
fn what_is_out_of_range_is_named_with_what_is_allowed() {
    let options = DiffusionOptions::default;
    check(clip_card(), DiffusionOptions { width: Some(100), ..options() }, "width", "multiples of 16 from 16 to 2048");
    check(clip_card(), DiffusionOptions { height: Some(0), ..options() }, "height", "multiples of 16");
    let large = DiffusionOptions { width: Some(2048), height: Some(2048), ..options() };
    check(clip_card(), large, "size", "at most 921600");
    check(clip_card(), DiffusionOptions { num_frames: Some(80), ..options() }, "num_frames", "4k+1 from 1 to 161");
    check(clip_card(), DiffusionOptions { num_frames: Some(165), ..options() }, "num_frames", "4k+1 from 1 to 161");
    check(clip_card(), DiffusionOptions { fps: Some(0), ..options() }, "fps", "1 to 120");
    check(clip_card(), DiffusionOptions { num_inference_steps: Some(0), ..options() }, "num_inference_steps", "1 to");
    let (most, more) = ("(".repeat(MAX_PROMPT_BYTES), "(".repeat(MAX_PROMPT_BYTES + 1));
    assert!(clip_card().resolve(DiffusionOptions { prompt: most, ..options() }, 0).is_ok());
    check(clip_card(), DiffusionOptions { prompt: more.clone(), ..options() }, "prompt", "at most 65536");
    let negative = DiffusionOptions { negative_prompt: Some(more), ..options() };
    check(clip_card(), negative, "negative_prompt", "at most 65536");
    let nan = DiffusionOptions { guidance_scale: Some(f64::NAN), ..options() };
    check(clip_card(), nan, "guidance_scale", "0 to 100");
    let long = DiffusionOptions { max_sequence_length: Some(513), ..options() };
    check(clip_card(), long, "max_sequence_length", "1 to 512");
    let clip_fields = DiffusionOptions { num_frames: Some(5), ..options() };
    check(picture_card(Guidance::Embedded), clip_fields, "num_frames", "leave it out");
    check(picture_card(Guidance::Embedded), DiffusionOptions { fps: Some(8), ..options() }, "fps", "leave it out");
    let scale = DiffusionOptions { guidance_scale: Some(3.5), ..options() };
    check(picture_card(Guidance::None), scale, "guidance_scale", "only 0");
}

/// In tiles what is asked for, else what has no room as a whole; the same request always in the same way.
#[test]
fn tiles_are_chosen_by_the_room_there_is() {
    let tiling = VaeTiling { tile_side: 64, bytes_per_pixel: 10 };
    let card = |room_bytes| DiffusionCard { vae_tiling: Some(tiling), room_bytes, ..picture_card(Guidance::Embedded) };
    let resolved = |card: DiffusionCard, side, vae_tiling| {
        let size = Some(side);
        let options = DiffusionOptions { width: size, height: size, vae_tiling, ..DiffusionOptions::default() };
        card.resolve(options, 0).map(|request| request.vae_tiling)
    };
    for (room, side, asked, expected) in [
        (usize::MAX, 128, None, false),
        (128 * 128 * 10, 128, None, false),
        (128 * 128 * 10 - 1, 128, None, true),
        (0, 64, None, false),
        (usize::MAX, 128, Some(true), true),
        (0, 128, Some(false), false),
    ] {
        let found = resolved(card(room), side, asked).expect("valid");
        assert_eq!(found, expected, "{room} bytes, {side} pixels, {asked:?}");
    }
    let error = resolved(picture_card(Guidance::Embedded), 64, Some(true)).expect_err("refused").to_string();
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
    let edits = Edits { image_to_image, inpainting, rounding, is_needed: false };
    DiffusionCard { edits, ..picture_card(Guidance::ClassifierFree) }
}

#[test]
fn a_picture_brings_its_size_and_its_defaults() {
    let card = edit_card(StepRounding::Taken);
    let request = card.resolve(DiffusionOptions { image: picture(70, 95), ..Default::default() }, 0).expect("valid");
    let edit = request.edit.as_ref().expect("an edit");
    assert_eq!((request.canvas.width, request.canvas.height, request.guidance.guidance_scale), (64, 80, 2.0));
    assert_eq!((edit.image.width, edit.image.height, edit.strength, edit.first_step), (64, 80, 0.3, 35));
    let (image, mask) = (picture(70, 95), mask(70, 95));
    let masked = DiffusionOptions { image, mask, width: Some(32), ..Default::default() };
    let request = card.resolve(masked, 0).expect("valid");
    let edit = request.edit.as_ref().expect("an edit");
    assert_eq!((request.canvas.width, request.canvas.height, request.guidance.guidance_scale), (32, 80, 7.5));
    let mask = edit.mask.as_ref().expect("a mask");
    assert_eq!((mask.width, mask.height, edit.strength, edit.first_step), (32, 80, 0.9999, 1));
}

/// diffusers: `int(4 * 0.6)` steps are taken, or `int(4 - 4 * 0.6)` are left out.
#[test]
fn strength_is_a_share_of_the_steps() {
    for (rounding, steps, strength, expected) in [
        (StepRounding::Taken, 4, 0.6, 2),
        (StepRounding::LeftOut, 4, 0.6, 1),
        (StepRounding::Taken, 10, 1.0, 0),
        (StepRounding::LeftOut, 10, 1.0, 0),
        // 0.7 * 10 is not quite 7 as a product of doubles, nor is 0.29 * 100.
        (StepRounding::Taken, 100, 0.29, 72),
        (StepRounding::LeftOut, 1, 0.01, 0),
    ] {
        assert_eq!(rounding.first_step(steps, strength), expected, "{rounding:?} {steps} {strength}");
    }
}

#[test]
fn pictures_that_cannot_be_edited_are_refused_by_field() {
    let options = || DiffusionOptions { image: picture(64, 64), ..Default::default() };
    let card = || edit_card(StepRounding::Taken);
    check(card(), DiffusionOptions { mask: mask(64, 64), ..Default::default() }, "mask", "without image");
    check(card(), DiffusionOptions { strength: Some(0.5), ..Default::default() }, "strength", "without image");
    check(card(), DiffusionOptions { mask: mask(64, 48), ..options() }, "mask", "is 64x48, but image is 64x64");
    for strength in [-0.1, 1.01, f64::NAN] {
        check(card(), DiffusionOptions { strength: Some(strength), ..options() }, "strength", "0 to 1");
    }
    let weak = DiffusionOptions { strength: Some(0.3), num_inference_steps: Some(3), ..options() };
    check(card(), weak, "strength", "leaves no step of num_inference_steps (3)");
    for (width, height) in [(15, 64), (4000, 64), (2048, 2048)] {
        let options = DiffusionOptions { image: picture(width, height), ..Default::default() };
        check(card(), options, "image", "give width and height");
    }
    check(picture_card(Guidance::ClassifierFree), options(), "image", "does not begin from a picture");
    let whole = card();
    let whole = DiffusionCard { edits: Edits { inpainting: None, ..whole.edits }, ..whole };
    check(whole, DiffusionOptions { mask: mask(64, 64), ..options() }, "mask", "does not fill in parts");
    let needed = card();
    let needed = DiffusionCard { edits: Edits { is_needed: true, ..needed.edits }, ..needed };
    check(needed, DiffusionOptions::default(), "image", "only makes pictures from pictures");
    let masked = card();
    let masked = DiffusionCard { edits: Edits { image_to_image: None, ..masked.edits }, ..masked };
    check(masked, options(), "mask", "is missing");
}

#[test]
fn another_models_scheduler_is_refused_with_those_of_this_one() {
    let ask = |name: &str| DiffusionOptions { scheduler: Some(name.to_owned()), ..DiffusionOptions::default() };
    let request = clip_card().resolve(DiffusionOptions::default(), 0).expect("the checkpoint's own");
    assert_eq!(request.sampling.scheduler.name, "FlowMatchEulerDiscreteScheduler");
    assert_eq!(clip_card().resolve(ask("unipc"), 0).expect("offered").sampling.scheduler.name, "unipc");
    for name in ["euler", "EulerDiscreteScheduler", "UNIPC", "flux", ""] {
        let error = clip_card().resolve(ask(name), 0).expect_err(name).to_string();
        assert!(error.contains("scheduler") && error.contains("unipc, flow_euler"), "{error}");
    }
}

#[test]
fn a_scheduler_limits_the_steps_and_says_whether_there_is_an_eta() {
    let card =
        DiffusionCard { schedulers: crate::testing::discrete_schedulers(), ..picture_card(Guidance::ClassifierFree) };
    let resolve = |name: &str, num_inference_steps: usize, eta: Option<f64>| {
        let (scheduler, num_inference_steps) = (Some(name.to_owned()), Some(num_inference_steps));
        card.resolve(DiffusionOptions { scheduler, num_inference_steps, eta, ..DiffusionOptions::default() }, 0)
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
        let card = DiffusionCard { has_ip_adapter, ..picture_card(Guidance::Embedded) };
        let picture = Arc::new(Frame { width: 1, height: 1, rgb: vec![0; 3] });
        let options = DiffusionOptions {
            reference_images: vec![picture; images],
            ip_adapter_scale,
            ..DiffusionOptions::default()
        };
        let scale = card.resolve(options, 0).map(|request| request.references.map(|references| references.scale));
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
fn previews_are_of_pictures_and_three_at_most() {
    let ask = |partial_images| DiffusionOptions { partial_images: Some(partial_images), ..DiffusionOptions::default() };
    let pictures = picture_card(Guidance::None);
    assert_eq!(pictures.resolve(ask(3), 0).expect("allowed").partial_images, 3);
    assert!(pictures.resolve(ask(4), 0).expect_err("too many").to_string().contains("0 to 3"));
    assert!(clip_card().resolve(ask(1), 0).expect_err("a clip").to_string().contains("partial_images"));
    assert_eq!(clip_card().resolve(ask(0), 0).expect("none").partial_images, 0);
}

#[test]
fn weights_are_refused_where_encoders_know_none() {
    let ask = |prompt: &str, negative: &str| {
        let negative_prompt = Some(negative.to_owned());
        let options = DiffusionOptions { prompt: prompt.to_owned(), negative_prompt, ..DiffusionOptions::default() };
        clip_card().resolve(options, 0)
    };
    assert_eq!(ask("a (b) \\(16:9\\)", "").expect("text").prompt.text, "a (b) \\(16:9\\)");
    assert!(ask("a (b:1.2)", "").expect_err("weighed").to_string().contains("prompt"));
    assert!(ask("a", "(b:1.2)").expect_err("weighed").to_string().contains("negative_prompt"));
}

#[test]
fn a_negative_prompt_without_effect_is_refused() {
    let options = || DiffusionOptions { negative_prompt: Some("blur".into()), ..DiffusionOptions::default() };
    let unguided = DiffusionOptions { guidance_scale: Some(1.0), ..options() };
    assert!(clip_card().resolve(unguided, 0).is_err());
    assert!(clip_card().resolve(options(), 0).is_ok());
    let unguided = DiffusionOptions { guidance_scale: Some(1.0), ..DiffusionOptions::default() };
    assert_eq!(clip_card().resolve(unguided, 0).expect("valid").guidance.negative_prompt, None);
    let scale = DiffusionOptions { true_cfg_scale: Some(4.0), ..options() };
    check(clip_card(), scale, "true_cfg_scale", "guided by guidance_scale");
}

/// FLUX.1: `guidance_scale` says nothing about the negative prompt, and an absent one is no empty one.
#[test]
fn true_guidance_takes_a_scale_and_a_negative_prompt() {
    for guidance in [Guidance::None, Guidance::Embedded] {
        let of = |scale, negative: Option<&str>| DiffusionOptions {
            true_cfg_scale: scale,
            negative_prompt: negative.map(str::to_owned),
            ..DiffusionOptions::default()
        };
        check(picture_card(guidance), of(None, Some("blur")), "negative_prompt", "true_cfg_scale is above 1");
        check(picture_card(guidance), of(Some(1.0), Some("")), "negative_prompt", "true_cfg_scale is above 1");
        check(picture_card(guidance), of(Some(4.0), None), "true_cfg_scale", "without a negative_prompt");
        check(picture_card(guidance), of(Some(0.5), None), "true_cfg_scale", "1 to 100");
        let resolve = |options| picture_card(guidance).resolve(options, 0).expect("valid");
        let guided = resolve(of(Some(4.0), Some("")));
        assert_eq!(
            (guided.guidance.cfg_scale(), guided.guidance.negative_prompt),
            (4.0, Some(NegativePrompt::Text(String::new())))
        );
        assert_eq!(resolve(of(None, None)).guidance.true_cfg_scale, Some(1.0));
    }
    assert_eq!(clip_card().resolve(DiffusionOptions::default(), 0).expect("valid").guidance.cfg_scale(), 5.0);
}

#[test]
fn acceleration_is_off_unless_asked_for_and_refused_where_there_is_none() {
    let options = |acceleration| DiffusionOptions { acceleration, ..DiffusionOptions::default() };
    let (card, without) = (clip_card(), DiffusionCard { acceleration: None, ..clip_card() });
    let asked = [(None, None), (Some(Acceleration::Safe), Some(0.1)), (Some(Acceleration::Fast), Some(0.2))];
    for (acceleration, threshold) in asked {
        let request = card.resolve(options(acceleration), 0).expect("valid");
        assert_eq!(request.acceleration, acceleration.unwrap_or(Acceleration::None));
        assert_eq!(card.cache_threshold(&request), threshold);
    }
    check(without.clone(), options(Some(Acceleration::Safe)), "acceleration", "allowed: none");
    assert!(without.resolve(options(Some(Acceleration::None)), 0).is_ok());
}

#[test]
fn an_interval_holds_the_steps_from_its_start_to_before_its_end() {
    let resolve = |interval, num_inference_steps| {
        let (guidance_interval, num_inference_steps) = (Some(interval), Some(num_inference_steps));
        clip_card().resolve(DiffusionOptions { guidance_interval, num_inference_steps, ..Default::default() }, 0)
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
    let unguided = DiffusionOptions {
        guidance_scale: Some(1.0),
        guidance_interval: Some([0.0, 0.5]),
        ..DiffusionOptions::default()
    };
    check(clip_card(), unguided, "guidance_interval", "guidance_scale is above 1");
    let interval = DiffusionOptions { guidance_interval: Some([0.0, 0.5]), ..DiffusionOptions::default() };
    check(picture_card(Guidance::Embedded), interval, "guidance_interval", "true_cfg_scale is above 1");
}
