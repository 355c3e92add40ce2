//! The same goldens computed by the GPU kernels: on a GPU if this build and machine have one, and with the feature
//! `emulator` on the CPU, thread by thread. f32 must be the reference, 16 bits near it.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Tensor};
use tale_kernels::work::count;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::parameters::{NUM_FRAMES, NUM_INFERENCE_STEPS, VAE_TILING};
use tale_models::families::sdxl::recorded::DenoiseRecordings;
use tale_models::families::sdxl::unet::{ReferenceInput, UNet, UNetInput};
use tale_models::family::{LoadOptions, LoadedModel};
use tale_models::kv::{BlockPool, BlockTable, KvCacheDtype, KvCaches, KvFormat, PrefixCache};
use tale_models::layers::decoder::DecoderInput;
use tale_models::loading;
use tale_models::parameter::Options;
use tale_models::request::{Event, Events, Frame, Request, SessionId, TextRequest};
use tale_models::rng::TorchGenerator;
use tale_models::runner::text::lookup::PromptLookup;
use tale_models::runner::text::model::CausalLm;
use tale_models::runner::text::recorded::DecodeRecordings;
use tale_models::weights::Weights;
use tale_models::{DiffusionCard, ModelCard};

use crate::saved::Twice;
use crate::support::{assert_close, case_dir, golden_tensors, psnr};
use crate::{
    clip_tiling, cogvideox, cogvideox_pictures, flux, hunyuan_video, hunyuan_video_pictures, language_gguf, logprobs,
    quantised, sdxl, text, wan, wan_pictures,
};

/// Of pictures in f32, as on the CPU.
const MIN_PSNR_F32: f64 = 50.0;
/// Of pictures in 16 bits, whose mantissa is rounded at every layer of every step.
const MIN_PSNR_16_BITS: f64 = 30.0;

#[test]
fn flux_pictures_are_the_reference_ones() {
    on_every_gpu(|gpu| {
        for case in gpu.some_of(&["flux-schnell", "flux-dev"]) {
            let golden = golden_tensors(case);
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            for (run, request) in flux::requests(case, diffusion_card(&model)).into_iter().enumerate() {
                let expected: Vec<u8> = golden[&format!("run{run}.image")].flatten_all().unwrap().to_vec1().unwrap();
                let frames = gpu.run(|| frames(&mut model, request));
                gpu.assert_picture(&format!("{case} run {run}"), &frames[0].rgb, &expected);
            }
        }
    });
}

/// In f16 too, where the VAE computes in f32.
#[test]
fn sdxl_pictures_are_the_reference_ones() {
    on_every_gpu_in(&[WeightDtype::F32, WeightDtype::Bf16, WeightDtype::F16], |gpu| {
        for case in gpu.some_of(&["sdxl-b", "sdxl-a"]) {
            let golden = golden_tensors(case);
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            let mut requests: Vec<_> = sdxl::requests(case, diffusion_card(&model)).into_iter().enumerate().collect();
            // The least work first.
            requests.sort_by_key(|(_, request)| {
                request.canvas.width * request.canvas.height * request.sampling.num_inference_steps
            });
            for (run, request) in gpu.some_of(&requests).iter().cloned() {
                let expected: Vec<u8> = golden[&format!("run{run}.image")].flatten_all().unwrap().to_vec1().unwrap();
                let frames = gpu.run(|| frames(&mut model, request));
                gpu.assert_picture(&format!("{case} run {run}"), &frames[0].rgb, &expected);
            }
        }
    });
}

#[test]
fn wan_clips_are_the_reference_ones() {
    on_every_gpu(|gpu| {
        for case in gpu.some_of(&["wan-b", "wan-a"]) {
            let golden = golden_tensors(case);
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            let requests = wan::requests(case, diffusion_card(&model));
            check_videos(gpu, case, &golden, &mut model, requests);
        }
    });
}

#[test]
fn wan_videos_from_pictures_are_the_reference_ones() {
    on_every_gpu(|gpu| {
        for case in gpu.some_of(&["wan-flf2v", "wan-i2v"]) {
            let golden = golden_tensors(case);
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            let requests = wan_pictures::requests(case, diffusion_card(&model));
            check_videos(gpu, case, &golden, &mut model, requests);
        }
    });
}

#[test]
fn hunyuan_videos_are_the_reference_ones() {
    on_every_gpu(|gpu| {
        for case in gpu.some_of(&["hunyuan-video-b", "hunyuan-video-a"]) {
            let golden = golden_tensors(case);
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            let requests = hunyuan_video::requests(case, diffusion_card(&model));
            check_videos(gpu, case, &golden, &mut model, requests);
        }
    });
}

#[test]
fn cogvideox_videos_are_the_reference_ones() {
    on_every_gpu(|gpu| {
        for case in ["cogvideox-b", "cogvideox-a"] {
            let golden = golden_tensors(case);
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            let requests = cogvideox::requests(case, diffusion_card(&model));
            check_videos(gpu, case, &golden, &mut model, requests);
        }
    });
}

#[test]
fn cogvideox_videos_from_pictures_are_the_reference_ones() {
    on_every_gpu(|gpu| {
        for case in ["cogvideox-i2v", "cogvideox-1.5-i2v"] {
            let golden = golden_tensors(case);
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            let requests = cogvideox_pictures::requests(case, diffusion_card(&model));
            check_videos(gpu, case, &golden, &mut model, requests);
        }
    });
}

#[test]
fn hunyuan_videos_from_pictures_are_the_reference_ones() {
    on_every_gpu(|gpu| {
        for case in gpu.some_of(&["hunyuan-video-i2v", "hunyuan-video-i2v-33ch"]) {
            let golden = golden_tensors(case);
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            let requests = hunyuan_video_pictures::requests(case, diffusion_card(&model));
            check_videos(gpu, case, &golden, &mut model, requests);
        }
    });
}

/// The first run of each family that begins from a picture, which is encoded in tiles too.
#[test]
fn clips_in_tiles_are_the_reference_ones() {
    on_every_gpu(|gpu| {
        for case in clip_tiling::CASES {
            let golden = golden_tensors(case);
            let runs: Vec<_> = clip_tiling::runs(case).into_iter().enumerate().collect();
            let from_pictures: Vec<_> = runs.iter().filter(|(_, run)| run["encoder_calls"] != 0).collect();
            for (run, facts) in gpu.some_of(&from_pictures) {
                let mut model = gpu.load(clip_tiling::Checkpoint::of(facts).path());
                let bytes = |name: &str| -> Vec<u8> {
                    golden[&format!("run{run}.{name}")].flatten_all().unwrap().to_vec1().unwrap()
                };
                let options = clip_tiling::options(facts, Some(bytes("input"))).with(&VAE_TILING, true);
                let request = diffusion_card(&model).resolve(&options, 0).expect("a valid request");
                let frames = gpu.run(|| frames(&mut model, request));
                let expected = bytes("frames");
                assert_eq!(expected.len(), frames.iter().map(|frame| frame.rgb.len()).sum::<usize>());
                for (index, frame) in frames.iter().enumerate() {
                    let expected = &expected[index * frame.rgb.len()..][..frame.rgb.len()];
                    gpu.assert_picture(&format!("{case} run {run} frame {index}"), &frame.rgb, expected);
                }
            }
        }
    });
}

/// The smallest videos come first.
fn check_videos(
    gpu: &Gpu,
    case: &str,
    golden: &HashMap<String, Tensor>,
    model: &mut LoadedModel,
    mut requests: Vec<(usize, DiffusionRequest)>,
) {
    requests.sort_by_key(|(_, request)| request.canvas.width * request.canvas.height * request.canvas.num_frames);
    for (run, request) in gpu.some_of(&requests).iter().cloned() {
        let expected = &golden[&format!("run{run}.frames")];
        let frames = gpu.run(|| frames(model, request));
        assert_eq!(expected.dim(0).unwrap(), frames.len());
        for (index, frame) in frames.iter().enumerate() {
            let expected: Vec<u8> = expected.get(index).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            gpu.assert_picture(&format!("{case} run {run} frame {index}"), &frame.rgb, &expected);
        }
    }
}

/// In 16 bits two tokens of a random model may be as good as equal, so only f32 must say the same words.
/// The same bytes, on whatever computes them.
#[test]
fn sessions_that_are_interrupted_go_on() {
    on_every_gpu_in(&[WeightDtype::Bf16], |gpu| {
        let path = case_dir("wan-b").join("checkpoint");
        let [first, second] = [gpu.load(&path), gpu.load(&path)];
        let card = diffusion_card(&first).clone();
        let mut model = Twice::of(card, [first.runner, second.runner]);
        let request = model.request(Options::default().with(&NUM_FRAMES, 1).with(&NUM_INFERENCE_STEPS, 2));
        assert_eq!(gpu.run(|| model.check(&gpu.name, &request)), 3);
    });
}

#[test]
fn greedy_tokens_are_the_reference_ones() {
    const TOKENS: usize = 12;
    on_every_gpu(|gpu| {
        for case in text::CASES {
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            for (index, prompt) in text::prompts(case).into_iter().enumerate() {
                let expected = text::golden_ids(case, &format!("greedy.{index}"));
                let found = gpu.run(|| greedy_tokens(&mut model, prompt, TOKENS));
                let same = found.iter().zip(&expected).take_while(|(found, expected)| found == expected).count();
                let wanted = if gpu.dtype == WeightDtype::F32 { TOKENS } else { 1 };
                assert!(same >= wanted, "{} {case} prompt {index}: {found:?} is not {expected:?}", gpu.name);
            }
        }
    });
}

/// Against the reference's logits, with a prompt that is longer than what is there of it at a time.
#[test]
fn tokens_are_as_likely_as_the_reference_says() {
    on_every_gpu(|gpu| {
        for case in gpu.some_of(&text::CASES) {
            let mut model = gpu.load(&case_dir(case).join("checkpoint"));
            for (index, prompt) in text::prompts(case).into_iter().enumerate() {
                let request =
                    TextRequest { logprobs: Some(3), prompt_logprobs: Some(3), ..TextRequest::greedy(prompt, 1) };
                let mut told = Vec::new();
                for event in gpu.run(|| events(&mut model, Request::Text(request))) {
                    match event {
                        Event::Prompt(of_prompt) => told.extend(of_prompt),
                        Event::Text { logprobs, .. } => told.extend(logprobs.into_iter().map(|placed| placed.logprobs)),
                        _ => (),
                    }
                }
                // In 16 bits the network itself moves logits that spread over tens: what is held there is that rows and tokens
                // belong together.
                let tolerance = if gpu.dtype == WeightDtype::F32 { logprobs::TOLERANCE } else { 2.0 };
                let error = logprobs::greatest_error(case, index, &told);
                assert!(error < tolerance, "{} {case} prompt {index}: {error:.1e}", gpu.name);
            }
        }
    });
}

/// Blocks are dequantised where they are multiplied with, tables when they are loaded.
#[test]
fn greedy_tokens_of_gguf_files_are_the_reference_ones() {
    const TOKENS: usize = 6;
    on_every_gpu(|gpu| {
        for case in language_gguf::CASES {
            let mut model = gpu.load(&language_gguf::file(case));
            let prompts: Vec<_> = language_gguf::prompts(case).into_iter().enumerate().collect();
            for (index, prompt) in gpu.some_of(&prompts).iter().cloned() {
                let expected = text::golden_ids(&language_gguf::named(case), &format!("greedy.{index}"));
                let found = gpu.run(|| greedy_tokens(&mut model, prompt, TOKENS));
                let same = found.iter().zip(&expected).take_while(|(found, expected)| found == expected).count();
                let wanted = if gpu.dtype == WeightDtype::F32 { TOKENS } else { 1 };
                assert!(same >= wanted, "{} {case} prompt {index}: {found:?} is not {expected:?}", gpu.name);
            }
        }
    });
}

/// Matrices in the formats of quantised checkpoints: packed integers of four and eight bits in any order, and floats in blocks.
#[test]
fn quantised_models_say_the_words_of_the_reference() {
    on_every_gpu(|gpu| {
        let golden = golden_tensors(quantised::CASE);
        for name in ["gptq-4-asym-act", "awq", "gptq-8-v2-act", "ct-fp8-block"] {
            let folder = quantised::checkpoint(name);
            let mut model = gpu.load(folder.path());
            let expected = golden[&format!("{name}.greedy")].to_dtype(DType::U32).unwrap();
            let expected: Vec<u32> = expected.to_vec1().unwrap();
            let prompt = quantised::prompt(&golden, name);
            let found = gpu.run(|| greedy_tokens(&mut model, prompt, expected.len()));
            let same = found.iter().zip(&expected).take_while(|(found, expected)| found == expected).count();
            let wanted = if gpu.dtype == WeightDtype::F32 { expected.len() } else { 1 };
            assert!(same >= wanted, "{} {name}: {found:?} is not {expected:?}", gpu.name);
        }
    });
}

/// In f32, as above: the second time the prompt's first block is in the cache, and a guess is checked in most steps.
#[test]
fn greedy_tokens_are_the_same_with_guesses_and_cached_prompts() {
    const TOKENS: usize = 8;
    on_every_gpu_in(&[WeightDtype::F32], |gpu| {
        let path = case_dir("qwen2").join("checkpoint");
        for kv_cache_dtype in [KvCacheDtype::Auto, KvCacheDtype::Int8, KvCacheDtype::Fp8] {
            let plain = LoadOptions { kv_cache_dtype, prefix_cache: PrefixCache::Off, ..LoadOptions::default() };
            let lookup = PromptLookup { num_speculative_tokens: 3, prompt_lookup_min: 1, prompt_lookup_max: 3 };
            let guessing = LoadOptions { kv_cache_dtype, prompt_lookup: Some(lookup), ..LoadOptions::default() };
            let [mut plain, mut guessing] = [plain, guessing].map(|options| gpu.load_with(&path, &options));
            let prompt: Vec<u32> = text::prompts("qwen2")[0].iter().copied().cycle().take(40).collect();
            let expected = gpu.run(|| greedy_tokens(&mut plain, prompt.clone(), TOKENS));
            for _ in 0..2 {
                let found = gpu.run(|| greedy_tokens(&mut guessing, prompt.clone(), TOKENS));
                assert_eq!(found, expected, "{} {kv_cache_dtype}", gpu.name);
            }
        }
    });
}

/// Decode steps of two sessions are recorded and replayed; a third and fourth make other buckets while they run.
#[test]
fn sessions_that_come_and_go_say_what_they_say_alone() {
    on_every_gpu(|gpu| {
        let case = "llama-tied";
        let mut model = gpu.load(&case_dir(case).join("checkpoint"));
        let prompts: Vec<Vec<u32>> = text::prompts(case).into_iter().take(2).collect();
        let alone: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| gpu.run(|| greedy_tokens(&mut model, prompt.clone(), 8))).collect();
        let mut together: Vec<Vec<u32>> = vec![Vec::new(); 4];
        gpu.run(|| {
            let mut waiting = (0..4u64).map(|id| (id, greedy(prompts[id as usize % 2].clone(), 8)));
            let mut events = Events::default();
            while let Some(id) = waiting.next().map(|(id, request)| {
                model.runner.submit(SessionId(id), request).expect("accepted");
                id
            }) {
                // Later ones begin when the earlier ones are in the middle of their answers.
                let steps = if id == 3 { usize::MAX } else { 2 };
                for _ in 0..steps {
                    if model.runner.next().is_none() {
                        break;
                    }
                    model.runner.step(&mut events).expect("a step");
                }
                for (session, event) in events.drain() {
                    if let Event::Text { tokens, .. } = event {
                        together[session.0 as usize].extend(tokens);
                    }
                }
            }
        });
        for (id, tokens) in together.iter().enumerate() {
            assert_eq!(tokens, &alone[id % 2], "{} session {id}", gpu.name);
        }
    });
}

/// Three sequences of one token each, step after step: what is replayed has the bits of what is computed, and counts as
/// much, whatever it was filled up with and however long contexts were when it was recorded.
#[test]
fn recorded_steps_compute_what_steps_compute() {
    let check = |gpu: &Gpu, format: KvFormat| {
        gpu.run(|| {
            let network = text::network_at("llama-tied", &gpu.placement);
            let caches = || KvCaches::new(network.kv_shape(), format, 5, &gpu.placement).expect("allocated");
            let (recorded, computed) = (caches(), caches());
            let mut pool = BlockPool::new(4);
            let mut tables: [BlockTable; 3] = Default::default();
            tables.iter_mut().for_each(|table| assert!(pool.grow(table, 8)));
            let mut recordings = DecodeRecordings::new(BlockTable::outside_of_pools(4));
            for step in 0..6 {
                // The third sequence joins late: another bucket of rows.
                let mut input = DecoderInput::default();
                for (sequence, table) in tables.iter().enumerate().take(if step < 3 { 2 } else { 3 }) {
                    let start = if sequence == 2 { step - 3 } else { step };
                    input.push(&[(7 * step + sequence) as u32], start, table);
                    input.want_logits_of_last_row();
                }
                assert!(DecodeRecordings::takes(&input));
                let (expected, work) = count(|| network.forward(&input, &computed).expect("computed"));
                let (found, recorded_work) =
                    count(|| recordings.forward(&network, input, &recorded).expect("computed"));
                let expected = expected.expect("logits were asked for");
                assert_close(&format!("{} step {step}", gpu.name), &found, &expected, 0.0);
                for (found, expected) in [(recorded_work.dense, work.dense), (recorded_work.paged, work.paged)] {
                    assert!((found.flops / expected.flops - 1.0).abs() < 1e-9, "{found:?}, expected {expected:?}");
                    assert!((found.bytes / expected.bytes - 1.0).abs() < 1e-9, "{found:?}, expected {expected:?}");
                }
                assert_eq!(recordings.len(), if step < 3 { 1 } else { 2 });
            }
        });
    };
    on_every_gpu(|gpu| {
        check(gpu, KvFormat::computed(&gpu.placement));
        check(gpu, KvFormat::INT8);
        check(gpu, KvFormat::FP8);
    });
}

/// Three denoising steps of one shape, then one of another, then two with reference pictures, whose tokens and scales go
/// with the step: what is replayed has the bits of what is computed.
#[test]
fn recorded_denoising_steps_compute_what_steps_compute() {
    on_every_gpu(|gpu| {
        gpu.run(|| {
            let unet = unet_with_heads_of_eight(&gpu.placement);
            let (text, pooled) = (unet.config().text_dim(), unet.config().pooled_dim(6).unwrap());
            let recordings = DenoiseRecordings::default();
            let shapes = [(4, 6, 0), (4, 6, 0), (4, 6, 0), (5, 3, 0), (4, 6, 3), (4, 6, 3)];
            for (step, (height, width, tokens)) in shapes.into_iter().enumerate() {
                let mut generator = TorchGenerator::new(step as u64);
                let mut noise = |dims: &[usize]| {
                    let values = generator.randn(dims.iter().product());
                    Tensor::from_vec(values, dims, &gpu.placement.device).unwrap()
                };
                let tokens = (tokens > 0).then(|| noise(&[2, tokens, text]));
                let scales = [0.125 * step as f32, 1.0];
                let input = UNetInput {
                    latents: &noise(&[2, 4, height, width]),
                    timesteps: &[900.0 - step as f32, 1.0 + step as f32],
                    prompt_embeds: &noise(&[2, 7, text]),
                    pooled_prompt_embeds: &noise(&[2, pooled]),
                    time_ids: &[vec![64.0, 64.0, 0.0, 0.0, 64.0, 64.0], vec![32.0, 32.0, 0.0, step as f32, 32.0, 32.0]],
                    references: tokens.as_ref().map(|tokens| ReferenceInput { tokens, scales: &scales }),
                };
                let (found, recorded_work) = count(|| recordings.forward(&unet, &input).unwrap());
                let (expected, work) = count(|| unet.forward(&input).unwrap());
                assert_eq!(recorded_work, work);
                assert_close(&format!("{} step {step}", gpu.name), &found, &expected, 0.0);
                assert_eq!(recordings.len(), [1, 1, 1, 2, 3, 3][step]);
            }
        });
    });
}

/// The rows of a guided picture one after the other: the recorded step keeps nothing of the first one's that the second
/// could overwrite.
#[test]
fn recorded_steps_leave_their_callers_tensors_alone() {
    on_every_gpu(|gpu| {
        gpu.run(|| {
            let unet = unet_with_heads_of_eight(&gpu.placement);
            let (text, pooled) = (unet.config().text_dim(), unet.config().pooled_dim(6).unwrap());
            let mut generator = TorchGenerator::new(1);
            let mut noise = |dims: &[usize]| {
                let values = generator.randn(dims.iter().product());
                let noise = Tensor::from_vec(values, dims, &gpu.placement.device).unwrap();
                noise.to_dtype(gpu.placement.compute_dtype).unwrap()
            };
            let rows = [(); 2].map(|()| [noise(&[1, 4, 2, 3]), noise(&[1, 5, text]), noise(&[1, pooled])]);
            let kept = rows.each_ref().map(|row| row.each_ref().map(|tensor| tensor.copy().unwrap()));
            let recordings = DenoiseRecordings::default();
            for [latents, prompt_embeds, pooled_prompt_embeds] in &rows {
                let input = UNetInput {
                    latents,
                    timesteps: &[500.0],
                    prompt_embeds,
                    pooled_prompt_embeds,
                    time_ids: &[vec![16.0, 24.0, 0.0, 0.0, 16.0, 24.0]],
                    references: None,
                };
                recordings.forward(&unet, &input).unwrap();
            }
            assert_eq!(recordings.len(), 1);
            for (row, kept) in rows.iter().flatten().zip(kept.iter().flatten()) {
                assert_close(&gpu.name, row, kept, 0.0);
            }
        });
    });
}

/// A golden's UNet with random weights and heads that 16-byte chunks fill: others are attended in f32, to which candle
/// converts, and no tape records that.
fn unet_with_heads_of_eight(placement: &Placement) -> UNet {
    let folder = case_dir("sdxl-b").join("checkpoint/unet");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    config["block_out_channels"] = [16, 32].into();
    // The field holds numbers of heads, as in the published configuration.
    config["attention_head_dim"] = [2, 4].into();
    let weights = || Weights::dummy(&folder, DType::BF16, placement);
    let unet = UNet::load(&weights(), serde_json::from_value(config).unwrap()).unwrap();
    unet.with_image_attention(&weights().pp("ip_adapter"), &folder).unwrap()
}

/// A GPU or its emulator, in one dtype.
struct Gpu {
    name: String,
    placement: Placement,
    dtype: WeightDtype,
    is_emulated: bool,
}

fn on_every_gpu(body: impl Fn(&Gpu)) {
    on_every_gpu_in(&[WeightDtype::F32, WeightDtype::Bf16], body);
}

fn on_every_gpu_in(dtypes: &[WeightDtype], body: impl Fn(&Gpu)) {
    if cfg!(feature = "emulator") {
        for dtype in dtypes.iter().copied() {
            let placement = Placement::in_host_memory(DeviceSpec::Cuda(0), dtype);
            body(&Gpu { name: format!("emulator {dtype:?}"), placement, dtype, is_emulated: true });
        }
    }
    for dtype in dtypes.iter().copied() {
        match Placement::open(DeviceSpec::Cuda(0), dtype) {
            Ok(placement) => body(&Gpu { name: format!("cuda:0 {dtype:?}"), placement, dtype, is_emulated: false }),
            Err(problem) => eprintln!("NOT RUN on a GPU: {problem}"),
        }
    }
}

impl Gpu {
    fn load(&self, path: &Path) -> LoadedModel {
        self.load_with(path, &LoadOptions::default())
    }

    fn load_with(&self, path: &Path, options: &LoadOptions) -> LoadedModel {
        self.run(|| loading::load(path, &self.placement, options, &mut |_| ()).expect("loaded"))
    }

    fn run<R>(&self, body: impl FnOnce() -> R) -> R {
        if self.is_emulated { emulated(body) } else { body() }
    }

    /// All on a GPU; the first one on the emulator, which takes seconds for what a GPU does in microseconds.
    fn some_of<'a, T>(&self, all: &'a [T]) -> &'a [T] {
        if self.is_emulated { &all[..1] } else { all }
    }

    #[track_caller]
    fn assert_picture(&self, what: &str, found: &[u8], expected: &[u8]) {
        let wanted = if self.dtype == WeightDtype::F32 { MIN_PSNR_F32 } else { MIN_PSNR_16_BITS };
        let found = psnr(found, expected);
        println!("{} {what}: {found:.1} dB", self.name);
        assert!(found >= wanted, "{} {what}: {found:.1} dB, wanted are {wanted}", self.name);
    }
}

#[cfg(feature = "emulator")]
pub fn emulated<R>(body: impl FnOnce() -> R) -> R {
    tale_kernels::emulated(body)
}

#[cfg(not(feature = "emulator"))]
pub fn emulated<R>(_: impl FnOnce() -> R) -> R {
    unreachable!("nothing is emulated in this build")
}

fn diffusion_card(model: &LoadedModel) -> &DiffusionCard {
    match &model.card {
        ModelCard::Diffusion(card) => card,
        ModelCard::Text(_) => panic!("the case makes pictures"),
    }
}

/// All frames of one request.
fn frames(model: &mut LoadedModel, request: DiffusionRequest) -> Vec<Frame> {
    let mut all = Vec::new();
    for event in events(model, Request::Diffusion(request)) {
        if let Event::Frames(frames) = event {
            all.extend(frames);
        }
    }
    all
}

fn greedy_tokens(model: &mut LoadedModel, prompt: Vec<u32>, max_tokens: usize) -> Vec<u32> {
    let mut all = Vec::new();
    for event in events(model, greedy(prompt, max_tokens)) {
        if let Event::Text { tokens, .. } = event {
            all.extend(tokens);
        }
    }
    all
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request::Text(TextRequest { ignore_eos: true, ..TextRequest::greedy(prompt, max_tokens) })
}

/// Everything that one session tells until its end.
fn events(model: &mut LoadedModel, request: Request) -> Vec<Event> {
    model.runner.submit(SessionId(1), request).expect("accepted");
    let (mut events, mut all) = (Events::default(), Vec::new());
    while model.runner.next().is_some() {
        model.runner.step(&mut events).expect("a step");
        for (_, event) in events.drain() {
            if let Event::Failed(error) = event {
                panic!("the session failed: {error}");
            }
            all.push(event);
        }
    }
    all
}
