//! What one step of each family costs beside the machine's roofs: `cargo bench --bench steps [-- text|flux|wan ...]`.
//!
//! Configurations of published widths and few layers get random weights (`LoadFormat::Dummy`) and are driven through
//! their runners. Reading roof: all threads sum an array as large as the weights of a decode step, at most
//! 2 GiB. Compute roof: all threads multiply-add in registers. Both are measured in the same run.
#![allow(missing_docs)] // a bench has no readers of its docs

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use tale_models::card::{DiffusionOptions, TextOptions};
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::family::{self, LoadFormat, LoadOptions, LoadedModel};
use tale_models::request::Phase;
use tale_models::{Events, ModelCard, Request, SessionId};

/// A plain read of more than this would need as much memory again as the model.
const MAX_READ_BYTES: usize = 2 << 30;

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |name: &str| chosen.is_empty() || chosen.iter().any(|choice| choice == name);
    let gflops = peak_gflops();
    println!("{} threads; compute roof {gflops:.0} GFLOP/s", rayon::current_num_threads());
    if wanted("text") {
        for dtype in [WeightDtype::F16, WeightDtype::Bf16, WeightDtype::F32] {
            text(dtype, gflops);
        }
    }
    if wanted("flux") {
        flux(gflops);
    }
    if wanted("wan") {
        wan(gflops);
    }
}

// --- text: a Llama of 1.1 B parameters ---------------------------------------------------------------------------

const HIDDEN: usize = 2048;
const LAYERS: usize = 22;
const FFN: usize = 5632;
const VOCAB: usize = 32000;
const KV_WIDTH: usize = 4 * 64;
const PREFILL: usize = 256;
const STREAMS: usize = 16;

fn text(dtype: WeightDtype, gflops: f64) {
    let checkpoint = Checkpoint::of("llama-untied");
    checkpoint.edit("config.json", |config| {
        *config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS, "intermediate_size": FFN, "vocab_size": VOCAB, "num_attention_heads": 32,
            "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0});
    });
    let before = reset_peak_rss();
    let (mut bench, bytes) = Bench::load(&checkpoint, dtype);
    let grown = peak_rss_bytes().saturating_sub(before);
    println!(
        "\nllama 1.1B {dtype:?}: {:.2} GB of weights; peak memory while loading {:.2} times that",
        gb(bytes),
        grown as f64 / bytes as f64
    );

    let matrices = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_WIDTH + 3 * HIDDEN * FFN);
    let read_bytes = (matrices + VOCAB * HIDDEN) * if dtype == WeightDtype::F32 { 4 } else { 2 };
    // The memory of a shared machine is not equally fast at all times: the roof is taken on both sides of the step.
    let roof_before = read_gb_per_s(read_bytes);
    let one = bench.decode_seconds(1);
    let roof = (roof_before + read_gb_per_s(read_bytes)) / 2.0;
    rate("decode, 1 stream", one, gb(read_bytes) / one, roof, "GB/s");
    let many = bench.decode_seconds(STREAMS);
    let flops = 2.0 * (matrices + VOCAB * HIDDEN) as f64 * STREAMS as f64;
    rate("decode, 16 streams", many, flops / many / 1e9, gflops, "GFLOP/s");
    println!(
        "  {:.1} tok/s alone, {:.1} tok/s with {STREAMS} streams: {:.1} times",
        1.0 / one,
        STREAMS as f64 / many,
        STREAMS as f64 * one / many
    );
    let prefill = bench.prefill_seconds();
    let flops = 2.0 * matrices as f64 * PREFILL as f64;
    rate("prefill, 256 tokens", prefill, flops / prefill / 1e9, gflops, "GFLOP/s");
    println!("  {:.0} tok/s", PREFILL as f64 / prefill);
}

// --- flux: published width of heads and VAE, fewer heads and layers -------------------------------------------------

fn flux(gflops: f64) {
    const SIDE: usize = 256;
    const HEADS: usize = 12;
    const BLOCKS: usize = 2 + 4;
    let checkpoint = Checkpoint::of("flux-schnell");
    checkpoint.edit("transformer/config.json", |config| {
        merge(
            config,
            json!({"num_attention_heads": HEADS, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56],
            "num_layers": 2, "num_single_layers": 4}),
        );
    });
    checkpoint.edit("vae/config.json", |config| {
        let (down, up) = (vec!["DownEncoderBlock2D"; 4], vec!["UpDecoderBlock2D"; 4]);
        merge(
            config,
            json!({"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32,
            "down_block_types": down, "up_block_types": up}),
        );
    });
    let (mut bench, bytes) = Bench::load(&checkpoint, WeightDtype::Bf16);
    let text_tokens = 256;
    let options = DiffusionOptions {
        prompt: "a lighthouse".into(),
        width: Some(SIDE),
        height: Some(SIDE),
        max_sequence_length: Some(text_tokens),
        ..Default::default()
    };
    println!("\nflux, {HEADS} heads of 128, {BLOCKS} blocks, {SIDE}x{SIDE}, bf16: {:.2} GB of weights", gb(bytes));
    let times = bench.diffusion(options);
    let (tokens, width) = ((text_tokens + (SIDE / 16).pow(2)) as f64, (HEADS * 128) as f64);
    let flops = BLOCKS as f64 * (2.0 * 12.0 * width * width * tokens + 4.0 * tokens * tokens * width);
    rate("denoise", times.denoise, flops / times.denoise / 1e9, gflops, "GFLOP/s");
    // 10.47 TFLOP for 1024x1024, nearly all of it in convolutions.
    let flops = 10.47e12 * (SIDE * SIDE) as f64 / (1024.0 * 1024.0);
    rate("VAE decode", times.vae_decode, flops / times.vae_decode / 1e9, gflops, "GFLOP/s");
}

// --- wan: the width of the 1.3B model and its VAE, fewer layers -------------------------------------------------------

fn wan(gflops: f64) {
    const SIDE: usize = 128;
    const FRAMES: usize = 9;
    const LAYERS: usize = 4;
    const FFN: usize = 8960;
    let checkpoint = Checkpoint::of("wan-a");
    checkpoint.edit("transformer/config.json", |config| {
        let sizes = json!({"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": LAYERS, "ffn_dim": FFN});
        merge(config, sizes);
    });
    checkpoint.edit("vae/config.json", |config| merge(config, json!({"base_dim": 96})));
    let (mut bench, bytes) = Bench::load(&checkpoint, WeightDtype::Bf16);
    let text_tokens = 64;
    let options = DiffusionOptions {
        prompt: "waves".into(),
        width: Some(SIDE),
        height: Some(SIDE),
        num_frames: Some(FRAMES),
        guidance_scale: Some(1.0),
        max_sequence_length: Some(text_tokens),
        ..Default::default()
    };
    println!(
        "\nwan, 12 heads of 128, {LAYERS} layers, {SIDE}x{SIDE}, {FRAMES} frames, bf16: {:.2} GB of weights",
        gb(bytes)
    );
    let times = bench.diffusion(options);
    let (tokens, width, text) = ((FRAMES.div_ceil(4) * (SIDE / 16).pow(2)) as f64, 12.0 * 128.0, text_tokens as f64);
    let linear = 2.0 * tokens * (6.0 * width * width + 2.0 * width * FFN as f64) + 4.0 * text * width * width;
    let attention = 4.0 * tokens * width * (tokens + text);
    let flops = LAYERS as f64 * (linear + attention);
    rate("denoise", times.denoise, flops / times.denoise / 1e9, gflops, "GFLOP/s");
    // 275 TFLOP for 81 frames of 832x480; the first latent frame gives one frame, the others give four.
    let latent_frames = FRAMES.div_ceil(4) as f64;
    let flops = 275e12 * latent_frames / 21.0 * (SIDE * SIDE) as f64 / (832.0 * 480.0);
    let chunk = times.vae_decode;
    rate("VAE decode, 4 frames", chunk, flops / latent_frames / chunk / 1e9, gflops, "GFLOP/s");
}

// --- a checkpoint on disk and its runner ------------------------------------------------------------------------------

/// A copy of a golden checkpoint without its weights.
struct Checkpoint(tempfile::TempDir);

impl Checkpoint {
    fn of(case: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(case).join("checkpoint");
        copy_without_weights(&from, dir.path());
        Self(dir)
    }

    fn path(&self) -> PathBuf {
        self.0.path().to_path_buf()
    }

    fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let path = self.path().join(file);
        let mut config = serde_json::from_slice(&std::fs::read(&path).expect("the file is there")).expect("is JSON");
        change(&mut config);
        std::fs::write(path, config.to_string()).expect("can be written");
    }
}

fn copy_without_weights(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("can be made");
    for entry in std::fs::read_dir(from).expect("goldens are there") {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).expect("readable");
        if path.is_dir() {
            copy_without_weights(&path, &to.join(name));
        } else if !name.to_string_lossy().contains("safetensors") {
            std::fs::copy(&path, to.join(name)).expect("can be copied");
        }
    }
}

fn merge(config: &mut Value, changes: Value) {
    for (field, value) in changes.as_object().expect("an object") {
        config[field] = value.clone();
    }
}

struct Bench {
    model: LoadedModel,
    events: Events,
    next: u64,
}

#[derive(Default)]
struct DiffusionTimes {
    denoise: f64,
    vae_decode: f64,
}

impl Bench {
    /// Also the bytes of the weights.
    fn load(checkpoint: &Checkpoint, dtype: WeightDtype) -> (Self, usize) {
        let placement = Placement::open(DeviceSpec::Cpu, dtype).expect("a CPU");
        let options = LoadOptions { load_format: LoadFormat::Dummy, ..LoadOptions::default() };
        let inspection = family::inspect(&checkpoint.path(), &placement, &options).expect("a sound configuration");
        let model = family::load(&checkpoint.path(), &placement, &options, &mut |_| ()).expect("loads");
        let bytes = inspection.resident_bytes() - inspection.cache_bytes;
        (Self { model, events: Events::default(), next: 0 }, bytes)
    }

    fn submit(&mut self, request: Request) {
        self.next += 1;
        self.model.runner.submit(SessionId(self.next), request).expect("is accepted");
    }

    fn submit_text(&mut self, prompt_tokens: usize, max_tokens: usize) {
        let ModelCard::Text(card) = &self.model.card else { panic!("a language model") };
        let prompt = (0..prompt_tokens as u32).map(|i| i * 7 % VOCAB as u32).collect();
        let options = TextOptions {
            max_tokens: Some(max_tokens),
            temperature: Some(0.0),
            ignore_eos: true,
            ..Default::default()
        };
        let request = card.resolve(prompt, options, 0).expect("is valid");
        self.submit(Request::Text(request));
    }

    /// One step: its phase and seconds.
    fn step(&mut self) -> Option<(Phase, f64)> {
        self.model.runner.next()?;
        let start = Instant::now();
        let plan = self.model.runner.step(&mut self.events).expect("steps");
        let seconds = start.elapsed().as_secs_f64();
        self.events.drain().for_each(drop);
        Some((plan.phase, seconds))
    }

    /// Median seconds of the steps of one phase until nothing is left to do.
    fn run(&mut self, phase: Phase) -> f64 {
        let mut times = Vec::new();
        while let Some((found, seconds)) = self.step() {
            if found == phase {
                times.push(seconds);
            }
        }
        median(times)
    }

    fn decode_seconds(&mut self, streams: usize) -> f64 {
        for _ in 0..streams {
            self.submit_text(16, 9);
        }
        self.run(Phase::Decode)
    }

    fn prefill_seconds(&mut self) -> f64 {
        let times = (0..3).map(|_| {
            self.submit_text(PREFILL, 1);
            self.run(Phase::Prefill)
        });
        median(times.collect())
    }

    fn diffusion(&mut self, options: DiffusionOptions) -> DiffusionTimes {
        let ModelCard::Diffusion(card) = &self.model.card else { panic!("a diffusion model") };
        let options = DiffusionOptions { num_inference_steps: Some(4), ..options };
        let request = card.resolve(options, 0).expect("is valid");
        self.submit(Request::Diffusion(request));
        let (mut denoise, mut vae_decode) = (Vec::new(), Vec::new());
        while let Some((phase, seconds)) = self.step() {
            match phase {
                Phase::Denoise => denoise.push(seconds),
                Phase::VaeDecode => vae_decode.push(seconds),
                _ => (),
            }
        }
        DiffusionTimes { denoise: median(denoise), vae_decode: median(vae_decode) }
    }
}

// --- figures and roofs ------------------------------------------------------------------------------------------------

fn rate(step: &str, seconds: f64, rate: f64, roof: f64, unit: &str) {
    let percent = 100.0 * rate / roof;
    println!("  {step:<22} {:>9.1} ms {rate:>8.1} {unit:<8} {percent:>4.0} % of {roof:.1}", seconds * 1e3);
}

fn gb(bytes: usize) -> f64 {
    bytes as f64 / 1e9
}

fn median(mut times: Vec<f64>) -> f64 {
    assert!(!times.is_empty(), "the phase has steps");
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// `work` on every thread at once; median seconds of five calls after one to warm up.
fn on_all_threads(work: impl Fn(usize) + Sync) -> f64 {
    let time = || {
        let start = Instant::now();
        rayon::broadcast(|thread| work(thread.index()));
        start.elapsed().as_secs_f64()
    };
    time();
    median((0..5).map(|_| time()).collect())
}

fn read_gb_per_s(bytes: usize) -> f64 {
    let values = vec![1f32; bytes.min(MAX_READ_BYTES) / 4];
    let part = values.len().div_ceil(rayon::current_num_threads());
    let parts: Vec<&[f32]> = values.chunks(part).collect();
    let seconds = on_all_threads(|thread| {
        black_box(tale_kernels::bench::read(parts[thread]));
    });
    gb(4 * values.len()) / seconds
}

fn peak_gflops() -> f64 {
    const STEPS: usize = 1_000_000;
    let seconds = on_all_threads(|_| {
        black_box(tale_kernels::bench::fma_loop(STEPS));
    });
    (rayon::current_num_threads() * tale_kernels::bench::fma_loop(0) * STEPS) as f64 / seconds / 1e9
}

/// The most resident memory that the process has had since [`reset_peak_rss`].
fn peak_rss_bytes() -> usize {
    status_bytes("VmHWM:")
}

/// Forgets the peak (see proc(5), `clear_refs`); returns what is resident now.
fn reset_peak_rss() -> usize {
    if let Err(error) = std::fs::write("/proc/self/clear_refs", "5") {
        println!("the peak of memory includes what came before: {error}");
    }
    status_bytes("VmRSS:")
}

fn status_bytes(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<usize>().map_or(0, |kib| kib << 10)
}
