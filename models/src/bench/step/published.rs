//! What the steps of published models do, held against counts that were made elsewhere.
//!
//! The steps are those that `tale bench step` measures, dry: weights take no memory and nothing is computed, so that the
//! largest models are counted in seconds.

use serde_json::Value;
use tale_kernels::work::dry;

use super::*;
use crate::config::read_json;
use crate::presets::{Configurations, Preset};

const T: f64 = 1e12;
/// Pixels of a side of a latent.
const PIXELS: usize = 8;

fn preset(name: &str) -> Configurations {
    Configurations::of_preset(name.parse::<&Preset>().expect("is in the table")).expect("can be written")
}

/// Of one picture or clip, or of a language model's prompt alone.
fn options(prompt_tokens: usize) -> StepOptions {
    let (width, height, num_frames) = (None, None, None);
    let (load_format, prompt_tokens, batches) = (LoadFormat::Dummy, Some(prompt_tokens), vec![1]);
    StepOptions { load_format, prompt_tokens, batches, width, height, num_frames, cache: None, repeat: 1 }
}

/// A bench over weights that take no memory; its steps are counted within [`dry`].
fn dry_bench(folder: &Configurations, options: &StepOptions) -> LoadedBench {
    let placement = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
    let plan = StepBench::plan(folder.path(), DeviceSpec::Cpu, WeightDtype::Auto, options).expect("is sound");
    let (_, model) = plan_model(folder.path(), &placement, &plan.load).expect("is sound");
    LoadedBench {
        plan,
        placement,
        model,
        roofs: Roofs { bytes_per_second: 1.0, flops_per_second: 1.0 },
        load_seconds: 0.0,
        load_peak_bytes: 0,
        events: Events::default(),
        next: 0,
    }
}

/// Operations of one request, in TFLOP.
#[derive(Debug, Clone, Copy)]
struct Counts {
    /// Of one step.
    denoise: f64,
    /// Of all chunks.
    decode: f64,
}

fn counts(folder: &Configurations, options: &StepOptions) -> Counts {
    let mut bench = dry_bench(folder, options);
    let samples = dry(|| bench.submit(1, 0).and_then(|()| bench.drain())).expect("is counted");
    let of = |phase| total(&samples, phase).work.flops / T;
    Counts { denoise: of(Phase::Denoise) / DENOISE_STEPS as f64, decode: of(Phase::VaeDecode) }
}

/// To the digits that are given.
#[track_caller]
fn check(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance, "{found} TFLOP, expected {expected}");
}

/// What a model does for pictures or clips of any size, from what it does for small ones: operations are a polynomial of
/// second degree in the positions of latents, since nothing but attention grows faster than they do, and three sizes say
/// which. At full size the tensors that candle writes between our operations would take seconds and gigabytes.
struct Model {
    /// Of latents of each size, in [`Model::SIZES`].
    frame: [Counts; 3],
    /// As above, of a clip of two latent frames; of pictures the same again.
    two_frames: [Counts; 3],
}

impl Model {
    /// Height and width of latents.
    const SIZES: [(usize, usize); 3] = [(4, 8), (8, 8), (8, 16)];

    fn of_pictures(folder: &Configurations, prompt_tokens: usize) -> Self {
        let frame = Self::SIZES.map(|size| counts(folder, &sized(size, None, prompt_tokens)));
        Self { frame, two_frames: frame }
    }

    /// Of clips of one frame.
    fn of_pictures_in_clips(folder: &Configurations, prompt_tokens: usize) -> Self {
        let frame = Self::SIZES.map(|size| counts(folder, &sized(size, Some(1), prompt_tokens)));
        Self { frame, two_frames: frame }
    }

    fn of_clips(name: &str, prompt_tokens: usize) -> Self {
        let folder = preset(name);
        set(&folder, "text_encoder", "num_layers", 1);
        let of = |frames| Self::SIZES.map(|size| counts(&folder, &sized(size, Some(frames), prompt_tokens)));
        Self { frame: of(1), two_frames: of(5) }
    }

    /// Of a step over so many positions, in all frames together: attention does not know one frame from the next.
    fn denoise(&self, positions: usize) -> f64 {
        at(positions, self.frame.map(|counts| counts.denoise))
    }

    /// Of latent frames of so many positions each.
    fn decode(&self, frames: usize, positions: usize) -> f64 {
        let first = at(positions, self.frame.map(|counts| counts.decode));
        let both = at(positions, self.two_frames.map(|counts| counts.decode));
        first + (frames - 1) as f64 * (both - first)
    }
}

fn sized((height, width): (usize, usize), num_frames: Option<usize>, prompt_tokens: usize) -> StepOptions {
    let (height, width) = (Some(height * PIXELS), Some(width * PIXELS));
    StepOptions { height, width, num_frames, ..options(prompt_tokens) }
}

/// The value at `positions` of the polynomial that has `values` at [`Model::SIZES`] (Lagrange).
fn at(positions: usize, values: [f64; 3]) -> f64 {
    let areas = Model::SIZES.map(|(height, width)| (height * width) as f64);
    let weight = |i: usize| -> f64 {
        let others = areas.iter().filter(|area| **area != areas[i]);
        others.map(|area| (positions as f64 - area) / (areas[i] - area)).product()
    };
    values.iter().enumerate().map(|(i, value)| weight(i) * value).sum()
}

/// Of layers there need to be no more than tell what one does; what was there before.
fn set(folder: &Configurations, component: &str, field: &str, layers: usize) -> usize {
    let path = folder.path().join(component).join("config.json");
    let mut config: Value = read_json(&path).expect("is there");
    let whole = config.get("text_config").is_none();
    let fields = if whole { &mut config } else { &mut config["text_config"] };
    let before = fields[field].as_u64().expect("is published") as usize;
    fields[field] = layers.into();
    std::fs::write(&path, config.to_string()).expect("written");
    before
}

/// Of a step of FLUX.1 for 1024 x 1024 pixels, from networks of one and of two blocks of each kind.
fn flux_step(name: &str, prompt_tokens: usize) -> f64 {
    let folder = preset(name);
    set(&folder, "text_encoder_2", "num_layers", 1);
    let double = set(&folder, "transformer", "num_layers", 1);
    let single = set(&folder, "transformer", "num_single_layers", 1);
    let step = || Model::of_pictures(&folder, prompt_tokens).denoise(128 * 128);
    let one_of_each = step();
    set(&folder, "transformer", "num_layers", 2);
    let of_double = step() - one_of_each;
    set(&folder, "transformer", "num_layers", 1);
    set(&folder, "transformer", "num_single_layers", 2);
    let of_single = step() - one_of_each;
    one_of_each + (double - 1) as f64 * of_double + (single - 1) as f64 * of_single
}

#[test]
fn flux_has_the_operations_of_its_size() {
    check(flux_step("flux.1-dev", 512), 74.4, 0.05);
    check(flux_step("flux.1-schnell", 256), 69.5, 0.05);
}

#[test]
fn parts_of_flux_have_the_operations_of_their_sizes() {
    let folder = preset("flux.1-dev");
    let mut bench = dry_bench(&folder, &options(512));
    dry(|| bench.submit(1, 0)).expect("is accepted");
    // CLIP, then T5.
    let encoded: f64 = (0..2)
        .map(|_| {
            let step = dry(|| bench.step()).expect("is counted").expect("a step");
            assert_eq!(step.phase, Phase::Encode);
            step.work.flops / T
        })
        .sum();
    check(encoded, 5.0, 0.5);
    folder.keep_layers(1).expect("cut");
    check(Model::of_pictures(&folder, 8).decode(1, 128 * 128), 10.47, 0.05);
}

#[test]
fn sdxl_has_the_operations_of_its_size() {
    let sdxl = Model::of_pictures(&preset("sdxl"), 77);
    check(sdxl.denoise(128 * 128), 6.76, 0.02);
    check(sdxl.denoise(96 * 96), 3.64, 0.02);
    check(sdxl.decode(1, 128 * 128), 10.47, 0.05);
}

/// What stands for full sizes is what they do.
#[test]
fn larger_pictures_do_what_small_ones_say() {
    let sdxl = Model::of_pictures(&preset("sdxl"), 77);
    let found = counts(&preset("sdxl"), &sized((16, 24), None, 77));
    check(sdxl.denoise(16 * 24), found.denoise, 1e-9);
    check(sdxl.decode(1, 16 * 24), found.decode, 1e-9);
}

#[test]
fn wan_has_the_operations_of_its_size() {
    // 480 x 832 is 60 x 104 latents; 81 frames are 21.
    let small = Model::of_clips("wan2.1-t2v-1.3b", 512);
    check(small.denoise(21 * 60 * 104), 283.0, 0.5);
    check(small.denoise(2 * 8 * 8), small.two_frames[1].denoise, 1e-9);
    let large = Model::of_clips("wan2.1-t2v-14b", 512);
    check(large.denoise(21 * 60 * 104), 1678.0, 1.0);
    check(large.denoise(21 * 90 * 160), 6523.0, 1.5);
    check(large.decode(21, 60 * 104), 275.0, 2.0);
    check(large.decode(21, 90 * 160), 639.0, 5.0);
    check(large.decode(33, 60 * 104), 438.0, 3.0);
}

/// Of a step of HunyuanVideo over so many latent positions, from networks of one and of two blocks of each kind.
fn hunyuan_step(name: &str, positions: &[usize]) -> Vec<f64> {
    let folder = preset(name);
    set(&folder, "text_encoder", "num_hidden_layers", 2);
    let kinds = ["num_layers", "num_single_layers"];
    let published = kinds.map(|kind| set(&folder, "transformer", kind, 1));
    let model = || Model::of_pictures_in_clips(&folder, 256);
    let one_of_each = model();
    let with_two = kinds.map(|kind| {
        set(&folder, "transformer", kind, 2);
        let model = model();
        set(&folder, "transformer", kind, 1);
        model
    });
    let of = |positions: &usize| {
        let base = one_of_each.denoise(*positions);
        let more = with_two.iter().zip(published);
        base + more.map(|(model, count)| (count - 1) as f64 * (model.denoise(*positions) - base)).sum::<f64>()
    };
    positions.iter().map(of).collect()
}

/// Counted by torch's `FlopCounterMode` over diffusers' classes, less what the VAE's attention leaves out of a masked product,
/// and less a last stretch of one frame, of which nothing is kept.
#[test]
fn hunyuanvideo_has_the_operations_of_its_size() {
    let positions = [33 * 90 * 160, 33 * 68 * 120, 16 * 40 * 64];
    for (found, expected) in hunyuan_step("hunyuanvideo", &positions).into_iter().zip([12_068.6, 4285.3, 224.0]) {
        check(found, expected, expected * 1e-4);
    }
    // Told of 144 patches and 252 tokens.
    for (found, expected) in hunyuan_step("hunyuanvideo-i2v", &positions).into_iter().zip([12_095.16, 4301.25, 228.156])
    {
        check(found, expected, expected * 1e-4);
    }
    let folder = preset("hunyuanvideo");
    folder.keep_layers(2).expect("cut");
    for (frames, positions, expected) in [(129, 90 * 160, 2956.2), (129, 68 * 120, 1658.9), (61, 40 * 64, 233.47)] {
        let decode = Model::SIZES.map(|size| counts(&folder, &sized(size, Some(frames), 8)).decode);
        check(at(positions, decode), expected, expected * 1e-4);
    }
}

/// Against counts of diffusers' transformers on torch's meta device (`FlopCounterMode`).
#[test]
fn cogvideox_has_the_operations_of_its_size() {
    let step = |name: &str, positions: usize| {
        let folder = preset(name);
        set(&folder, "text_encoder", "num_layers", 1);
        Model::of_pictures_in_clips(&folder, 226).denoise(positions)
    };
    // 480 x 720 is 60 x 90 latents; 49 frames are 13.
    check(step("cogvideox-2b", 13 * 60 * 90), 120.0, 0.05);
    check(step("cogvideox-5b", 13 * 60 * 90), 332.2, 0.1);
    // 768 x 1360 is 96 x 170 latents; 81 frames are 21, filled up to 22, of which two are a patch as one is alone.
    check(step("cogvideox1.5-5b", 11 * 96 * 170), 1479.2, 0.5);
}

#[test]
fn a_token_takes_two_operations_for_each_parameter() {
    let folder = preset("llama-3.1-8b");
    // 8.03 B parameters, of which the embedding is looked up.
    let read = 8.030e9 - 0.525e9;
    let mut bench = dry_bench(&folder, &options(1));
    let token = dry(|| bench.submit(1, 3).and_then(|()| bench.decode_together(1))).expect("is counted")[0];
    assert_eq!(token.phase, Phase::Decode);
    check(token.work.flops / T, 2.0 * read / T, 1e-5);
    // In bf16. A token of context has 128 KiB of keys and values in f32.
    assert!((token.work.bytes / (2.0 * read) - 1.0).abs() < 1e-3, "{} bytes", token.work.bytes);
    // A prompt of 2048 tokens: 30.7 TFLOP is the count for 7.5 B and no attention; ours has no logits but one.
    let mut bench = dry_bench(&folder, &options(2048));
    let samples = dry(|| bench.submit(1, 1).and_then(|()| bench.drain())).expect("is counted");
    let attention = 32.0 * 4.0 * (2048.0 * 2049.0 / 2.0) * 4096.0 / T;
    check(total(&samples, Phase::Prefill).work.flops / T - attention, 2.0 * 2048.0 * 6.98e-3, 0.01);
}
