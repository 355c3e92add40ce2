//! What a runner says that a session needs is what it takes at its peak: measured with a counting allocator, in a
//! binary of its own so that nothing else allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::acceleration::CacheMethod;
use tale_models::diffusion::parameters::{
    CACHE_COEFFICIENTS, CACHE_METHOD, CACHE_RATIOS, CACHE_THRESHOLD, HEIGHT, IMAGE, INPUT_REFERENCE, LAST_IMAGE, MASK,
    MAX_SEQUENCE_LENGTH, NEGATIVE_PROMPT, NUM_FRAMES, NUM_INFERENCE_STEPS, PARTIAL_IMAGES, PROMPT, STRENGTH,
    TRUE_CFG_SCALE, VAE_TILING, WIDTH,
};
use tale_models::parameter::Options;

use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use serde_json::{Value, json};

use tale_models::checkpoint::LoadFormat;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::family::{LoadOptions, TextEncoders};
use tale_models::memory::{MemoryPlan, PhaseBytes};
use tale_models::presets::Configurations;
use tale_models::request::{Event, Events, Frame, Mask, Phase, Request, SessionId};
use tale_models::runner::{Runner, StepPlan};
use tale_models::testing::repository;
use tale_models::tokenizer::{MEMORY_PER_BYTE, Tokenizer};
use tale_models::{ModelCard, load};

/// Bytes allocated now, and the most since the last reset.
static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; the counters are only counters.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is also the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `alloc` above with this layout, that is from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Strings, queues and thread bookkeeping, which nobody plans for.
const SMALL_CHANGE_BYTES: usize = 1 << 20;

/// One run, so that the counters belong to it.
#[test]
fn sessions_take_at_most_their_footprint() {
    // Scratch memory belongs to threads, not to sessions: with two of them it is small change on every machine.
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global().expect("the first use of the pool");
    let options = |width, height, num_frames| {
        Options::default()
            .with(&PROMPT, "A cat".to_owned())
            .with(&WIDTH, width)
            .with(&HEIGHT, height)
            .with(&NUM_FRAMES, num_frames)
            .with(&NUM_INFERENCE_STEPS, 3)
    };
    let golden = |case: &str| repository().join("tests/goldens").join(case).join("checkpoint");
    for (case, options) in [
        ("wan-a", options(256, 160, Some(5))),
        ("wan-b", options(128, 128, Some(13))),
        ("wan-b", options(64, 64, Some(49))),
        ("wan-i2v", options(256, 160, Some(9)).with(&INPUT_REFERENCE, picture())),
        ("wan-flf2v", options(128, 128, Some(13)).with(&INPUT_REFERENCE, picture()).with(&LAST_IMAGE, picture())),
        ("hunyuan-video-i2v", options(256, 160, Some(9)).with(&INPUT_REFERENCE, picture())),
        ("hunyuan-video-i2v-33ch", options(128, 128, Some(13)).with(&INPUT_REFERENCE, picture())),
        ("hunyuan-video-a", options(256, 160, Some(21))),
        ("hunyuan-video-a", options(128, 128, Some(5)).with(&MAX_SEQUENCE_LENGTH, 1024)),
        (
            "hunyuan-video-b",
            options(192, 128, Some(29)).with(&TRUE_CFG_SCALE, 2.0).with(&NEGATIVE_PROMPT, "x".to_owned()),
        ),
        ("wan-a", options(512, 288, Some(17)).with(&VAE_TILING, true)),
        ("wan-i2v", options(512, 288, Some(9)).with(&INPUT_REFERENCE, picture()).with(&VAE_TILING, true)),
        ("hunyuan-video-a", options(512, 288, Some(21)).with(&VAE_TILING, true)),
        ("hunyuan-video-i2v", options(512, 288, Some(9)).with(&INPUT_REFERENCE, picture()).with(&VAE_TILING, true)),
        ("cogvideox-a", options(256, 160, Some(9))),
        ("cogvideox-a", options(128, 128, Some(25))),
        ("cogvideox-b", options(192, 128, Some(17))),
        ("cogvideox-b", options(64, 64, Some(49))),
        ("cogvideox-i2v", options(48, 32, Some(49)).with(&INPUT_REFERENCE, picture())),
        ("cogvideox-1.5-i2v", options(56, 56, Some(33)).with(&INPUT_REFERENCE, picture())),
        ("flux-dev", options(256, 192, None)),
        ("sdxl-a", options(256, 192, None)),
        ("sdxl-b", options(128, 160, None)),
        ("flux-dev", options(768, 512, None).with(&VAE_TILING, true)),
        // The first preview is most of what the steps of such small videos take.
        ("wan-b", options(32, 32, Some(5)).with(&PARTIAL_IMAGES, 2)),
        ("cogvideox-b", options(32, 32, Some(9)).with(&PARTIAL_IMAGES, 2)),
        ("hunyuan-video-a", options(32, 32, Some(5)).with(&PARTIAL_IMAGES, 2)),
        ("wan-a", options(256, 160, Some(5)).with(&PARTIAL_IMAGES, 2)),
        ("wan-b", cached(options(128, 128, Some(49)), CacheMethod::MagCache)),
        ("cogvideox-b", cached(options(192, 128, Some(17)), CacheMethod::FirstBlock)),
        ("hunyuan-video-a", cached(options(256, 160, Some(21)), CacheMethod::TeaCache)),
    ] {
        if !options.has(&NUM_FRAMES) {
            let edit = from_a_picture(&options);
            check(&format!("{case} from a picture"), &golden(case), &LoadOptions::default(), edit);
        }
        check(case, &golden(case), &LoadOptions::default(), options);
    }
    // Of a VAE that was made for another size, so that the overlaps of its tiles are whole latents.
    for (case, sample, options) in [
        ("cogvideox-a", [96, 160], options(256, 192, Some(25))),
        ("cogvideox-b", [96, 80], options(128, 128, Some(49))),
        ("cogvideox-1.5-i2v", [48, 40], options(56, 56, Some(33)).with(&INPUT_REFERENCE, picture())),
    ] {
        let copy = made_for(&golden(case), sample);
        let options = options.with(&VAE_TILING, true);
        check(&format!("{case} in tiles"), copy.path(), &LoadOptions::default(), options);
    }
    let apart = LoadOptions { max_denoise_rows: 1, ..LoadOptions::default() };
    for (case, options) in [
        ("wan-a", options(256, 160, Some(5))),
        ("cogvideox-b", options(192, 128, Some(17))),
        (
            "hunyuan-video-b",
            options(192, 128, Some(29)).with(&TRUE_CFG_SCALE, 2.0).with(&NEGATIVE_PROMPT, "x".to_owned()),
        ),
        ("sdxl-a", options(256, 192, None)),
    ] {
        check(&format!("{case}, branch by branch"), &golden(case), &apart, options);
    }
    let wide = wide_sdxl();
    let dummy = LoadOptions { load_format: LoadFormat::Dummy, ..LoadOptions::default() };
    check("wide SDXL", wide.path(), &dummy, options(512, 512, None));
    // The encoders of this one are most of what a small picture takes.
    let on_demand = LoadOptions { text_encoders: TextEncoders::OnDemand, ..dummy };
    check("wide SDXL with encoders on demand", wide.path(), &on_demand, options(64, 64, None));
    check_tokenising();
    check_loading_codes();
}

/// A model in four bits is loaded beside one of its matrices at a time, and what is said of its memory is what it takes.
fn check_loading_codes() {
    let folder = four_bits();
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
    // What stays of the first time belongs to no model.
    drop(load(folder.path(), &placement, &LoadOptions::default(), &mut |_| ()).expect("a sound checkpoint"));
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let model = load(folder.path(), &placement, &LoadOptions::default(), &mut |_| ()).expect("a sound checkpoint");
    let (peak, kept) = (PEAK.load(Relaxed) - before, NOW.load(Relaxed) - before);
    let said = model.resident_bytes;
    eprintln!("four bits: {said} bytes said, {kept} kept, {peak} at the peak");
    let share = |bytes: usize| bytes as f64 / said as f64;
    assert!((0.95..1.05).contains(&share(kept)), "{said} bytes said, {kept} kept");
    assert!(share(peak) <= 1.1, "{said} bytes said, {peak} at the peak");
}

/// Llama with matrices of 4 Mi values in GPTQ's words, and the tokenizer of a golden.
fn four_bits() -> tempfile::TempDir {
    const LAYERS: usize = 6;
    let (hidden, inner, vocabulary, group) = (1024usize, 4096usize, 492usize, 128usize);
    let folder = tempfile::tempdir().expect("a folder");
    let tokenizer = repository().join("tests/goldens/llama-untied/checkpoint");
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(tokenizer.join(file), folder.path().join(file)).expect("copied");
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": vocabulary,
        "max_position_embeddings": 64, "eos_token_id": null,
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": true, "desc_act": false},
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    let zeros = vec![0u8; hidden * inner];
    let mut tensors = Vec::new();
    let mut put = |name: String, dtype: Dtype, shape: Vec<usize>| {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let view = TensorView::new(dtype, shape, &zeros[..bytes]).expect("as many bytes");
        tensors.push((name, view));
    };
    for layer in 0..LAYERS {
        for (name, inputs, outputs) in [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden, hidden / 4),
            ("self_attn.v_proj", hidden, hidden / 4),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ] {
            let name = format!("model.layers.{layer}.{name}");
            put(format!("{name}.qweight"), Dtype::I32, vec![inputs / 8, outputs]);
            put(format!("{name}.qzeros"), Dtype::I32, vec![inputs / group, outputs / 8]);
            put(format!("{name}.scales"), Dtype::F16, vec![inputs / group, outputs]);
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            put(format!("model.layers.{layer}.{norm}.weight"), Dtype::F16, vec![hidden]);
        }
    }
    put("model.norm.weight".to_owned(), Dtype::F16, vec![hidden]);
    for table in ["model.embed_tokens", "lm_head"] {
        put(format!("{table}.weight"), Dtype::F16, vec![vocabulary, hidden]);
    }
    serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).expect("written");
    folder
}

/// The same with blocks that are skipped in some steps.
fn cached(options: Options, method: CacheMethod) -> Options {
    options
        .with(&CACHE_METHOD, method)
        .with(&CACHE_THRESHOLD, 0.5)
        .with(&CACHE_RATIOS, (method == CacheMethod::MagCache).then(|| vec![1.0]))
        .with(&CACHE_COEFFICIENTS, (method == CacheMethod::TeaCache).then(|| vec![1.0, 0.0]))
}

/// What a byte of text takes while it is tokenised at once is what callers count for it.
fn check_tokenising() {
    const BYTES: usize = 128 << 10;
    for folder in ["llama", "qwen2", "clip", "umt5"] {
        let dir = repository().join("tests/goldens/tokenizers").join(folder);
        let tokenizer = Tokenizer::from_dir(&dir).expect("a sound tokenizer");
        for part in ["1", "a", " ", "a ", "ab\n", "é", "日", "<|endoftext|>"] {
            let text = part.repeat(BYTES / part.len());
            // The caches of words and threads are there after the first time.
            tokenizer.encode(&text, true).expect("encodes");
            let before = NOW.load(Relaxed);
            PEAK.store(before, Relaxed);
            let tokens = tokenizer.encode(&text, true).expect("encodes").len();
            let taken = (PEAK.load(Relaxed) - before) / text.len();
            eprintln!("{folder} {part:?}: {taken} bytes at the peak for each byte, {tokens} tokens");
            assert!(
                taken <= MEMORY_PER_BYTE,
                "{folder} {part:?}: {taken} bytes for each byte, {MEMORY_PER_BYTE} counted"
            );
        }
    }
}

fn picture() -> Option<Arc<Frame>> {
    Some(Arc::new(Frame { width: 90, height: 60, rgb: vec![99; 90 * 60 * 3] }))
}

/// The same from a part of a picture.
fn from_a_picture(options: &Options) -> Options {
    let width = options.get(&WIDTH).unwrap_or(0);
    let height = options.get(&HEIGHT).unwrap_or(0);
    let image = Some(Arc::new(Frame { width, height, rgb: vec![99; width * height * 3] }));
    let mask = Some(Arc::new(Mask { width, height, grey: vec![200; width * height] }));
    options.clone().with(&IMAGE, image).with(&MASK, mask).with(&STRENGTH, 0.9)
}

/// Every phase takes at most what the plan says, and the greediest one not much less.
fn check(case: &str, checkpoint: &Path, load_options: &LoadOptions, options: Options) {
    let (plan, peaks) = run(case, checkpoint, load_options, options);
    for PhaseBytes { phase, bytes } in plan.phases() {
        let peak = peaks[phase];
        eprintln!("{case} {}: {bytes} bytes planned, {peak} at the peak", phase.as_str());
        assert!(peak <= bytes + SMALL_CHANGE_BYTES, "{case} {phase:?}: {peak} bytes at the peak, {bytes} planned");
    }
    assert_eq!(plan.phases().len(), peaks.len(), "{case}: a phase is not planned");
    let (footprint, peak) = (plan.peak_bytes(), peaks.values().copied().max().unwrap_or(0));
    assert!(footprint <= 3 * peak + SMALL_CHANGE_BYTES, "{case}: {footprint} planned, {peak} bytes at the peak");
}

/// The plan of one session, and what each of its phases takes at its peak, in bytes.
fn run(
    case: &str,
    checkpoint: &Path,
    load_options: &LoadOptions,
    options: Options,
) -> (MemoryPlan, HashMap<Phase, usize>) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
    let mut model = load(checkpoint, &placement, load_options, &mut |_| ()).expect("a sound checkpoint");
    let ModelCard::Diffusion(card) = &model.card else { panic!("{case} makes pictures or clips") };
    let request = card.resolve(&options, 1).expect("a valid request");
    let without_previews = Request::Diffusion(DiffusionRequest { partial_images: 0, ..request.clone() });
    let request = Request::Diffusion(request);
    let plan = model.runner.plan(&request);

    // What threads keep for their work belongs to no session: it is there after the first one. The first preview takes most.
    peaks_of(&mut *model.runner, without_previews);
    (plan, peaks_of(&mut *model.runner, request))
}

fn peaks_of(runner: &mut dyn Runner, request: Request) -> HashMap<Phase, usize> {
    let before = NOW.load(Relaxed);
    runner.submit(SessionId(1), request).expect("is accepted");
    let (mut events, mut peaks) = (Events::default(), HashMap::new());
    while let Some(StepPlan { phase, .. }) = runner.next() {
        PEAK.store(NOW.load(Relaxed), Relaxed);
        runner.step(&mut events).expect("a step");
        let taken = PEAK.load(Relaxed).saturating_sub(before);
        // Frames are the client's once they are out.
        assert!(!events.drain().any(|(_, event)| matches!(event, Event::Failed(_))), "the session fails");
        let peak = peaks.entry(phase).or_insert(0);
        *peak = taken.max(*peak);
    }
    peaks
}

/// A copy of a checkpoint of CogVideoX whose VAE was made for this height and width.
fn made_for(checkpoint: &Path, sample: [usize; 2]) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    for component in std::fs::read_dir(checkpoint).expect("a folder") {
        let component = component.expect("readable");
        let target = copy.path().join(component.file_name());
        if component.file_type().expect("readable").is_file() {
            std::fs::copy(component.path(), target).expect("copied");
            continue;
        }
        std::fs::create_dir(&target).expect("made");
        for file in std::fs::read_dir(component.path()).expect("a folder") {
            let file = file.expect("readable");
            std::fs::copy(file.path(), target.join(file.file_name())).expect("copied");
        }
    }
    let path = copy.path().join("vae/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    [config["sample_height"], config["sample_width"]] = sample.map(Value::from);
    std::fs::write(&path, config.to_string()).expect("written");
    copy
}

/// SDXL's kinds of blocks with heads of 64 values as published, a fifth as wide, with one transformer layer everywhere.
fn wide_sdxl() -> Configurations {
    let folder = Configurations::of_preset("sdxl".parse().expect("is in the table")).expect("is written");
    folder.keep_layers(1).expect("cut");
    let edit = |component: &str, fields: Value| {
        let path = folder.path().join(component).join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
        config.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        std::fs::write(&path, config.to_string()).expect("written");
    };
    let encoder = json!({"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "projection_dim": 64});
    edit("text_encoder", encoder.clone());
    edit("text_encoder_2", encoder);
    edit("vae", json!({"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 8}));
    edit(
        "unet",
        json!({
            "block_out_channels": [32, 256, 256], "attention_head_dim": [1, 4, 4], "cross_attention_dim": 128,
            "projection_class_embeddings_input_dim": 6 * 256 + 64,
        }),
    );
    folder
}
