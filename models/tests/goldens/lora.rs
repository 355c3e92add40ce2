//! LoRA in every dialect, against diffusers' pictures with the same files at the same weights.

use std::collections::HashMap;
use std::path::PathBuf;
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, LORAS, NEGATIVE_PROMPT, NUM_INFERENCE_STEPS, PROMPT, SEED, WIDTH,
};
use tale_models::parameter::Options;

use candle_core::{Device, Tensor};
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::DiffusionRequest;
use tale_models::family::LoadOptions;
use tale_models::lora::LoraOption;
use tale_models::request::Frame;
use tale_models::runner::Runner;
use tale_models::{Error, ModelCard, ModelSource, Request};

use crate::support::{case_dir, golden_json, golden_tensors, pictures, psnr};

const CASE: &str = "lora";
const MIN_PSNR: f64 = 50.0;
/// What a file changes is more than this, in dB.
const MOVED: f64 = 35.0;

#[test]
fn pictures_are_the_reference_ones() {
    let tensors = golden_tensors(CASE);
    let mut models: HashMap<String, Loaded> = HashMap::new();
    for (index, run) in runs().iter().enumerate() {
        let model = models.entry(run.checkpoint.clone()).or_insert_with(|| Loaded::new(&run.checkpoint, &run.files));
        let image: Vec<u8> =
            tensors[&format!("run{}.image", run.image.unwrap_or(index))].flatten_all().unwrap().to_vec1().unwrap();
        let request = model.card.resolve(&run.options(), 0).unwrap();
        let found = psnr(&pictures(&mut *model.runner, &[request])[0].rgb, &image);
        println!("{} {:?}: {found:.1} dB", run.files, run.loras);
        assert!(found >= MIN_PSNR, "{} {:?}: {found:.1} dB", run.files, run.loras);
    }
}

/// Sessions with other files, other weights and none, all under way at once: each has its own picture.
#[test]
fn sessions_with_different_files_do_not_mix() {
    for (checkpoint, files) in [("sdxl-a", "sdxl"), ("flux-dev", "flux")] {
        let mut model = Loaded::new(checkpoint, files);
        let run = runs().into_iter().find(|run| run.files == files).unwrap();
        let sets: [&[(&str, f64)]; 6] = [
            &[("peft", 1.0)],
            &[],
            &[("kohya", 1.0)],
            &[("peft", 1.0)],
            &[("kohya", 0.5), ("peft", -0.5)],
            &[("peft", 0.0)],
        ];
        let requests: Vec<DiffusionRequest> = sets
            .iter()
            .enumerate()
            .map(|(i, set)| {
                let options = run.options().with(&LORAS, options_of(set)).with(&NUM_INFERENCE_STEPS, 2 + i % 2);
                model.card.resolve(&options, 0).unwrap()
            })
            .collect();
        let alone: Vec<Frame> = requests
            .iter()
            .map(|request| pictures(&mut *model.runner, std::slice::from_ref(request)).remove(0))
            .collect();
        let together = pictures(&mut *model.runner, &requests);
        for (i, (together, alone)) in together.iter().zip(&alone).enumerate() {
            let found = psnr(&together.rgb, &alone.rgb);
            assert!(found >= MIN_PSNR, "{checkpoint} session {i}: {found:.1} dB against itself alone");
        }
        // Sessions 1 and 5, 0 and 2 have one count of steps.
        assert_eq!(alone[1].rgb, alone[5].rgb, "{checkpoint}: a weight of 0 is nothing");
        assert!(psnr(&alone[0].rgb, &alone[2].rgb) < MOVED, "{checkpoint}: the files make the same picture");
        // Nothing is left in the layers.
        let again = pictures(&mut *model.runner, &requests[1..2]).remove(0);
        assert_eq!(again.rgb, alone[1].rgb, "{checkpoint}: another picture after the others");
    }
}

/// The footprint counts the terms, and what is not the model's is refused with names and shapes.
#[test]
fn what_does_not_fit_is_refused_with_names_and_shapes() {
    let flux = Loaded::new("flux-dev", "sdxl");
    let refused = |card: &DiffusionCard, loras: &[(&str, f64)]| {
        let options = Options::default().with(&PROMPT, "x".to_owned()).with(&LORAS, options_of(loras));
        match card.resolve(&options, 0) {
            Err(Error::InvalidRequest { field, problem }) => format!("{field} {problem}"),
            other => panic!("{loras:?}: {other:?}"),
        }
    };
    let check = |found: String, expected: &[&str]| {
        assert!(expected.iter().all(|part| found.contains(part)), "{expected:?} in: {found}");
    };
    check(
        refused(&flux.card, &[("peft", 1.0)]),
        &["loras[0].name", "`peft` is not for this model", "text_encoder_2.", "158 of its 194", "more"],
    );
    check(refused(&flux.card, &[("kohya", 1.0)]), &["tensors belong to no layer of this model: lora_te2_", "more"]);

    let dir = tempfile::tempdir().unwrap();
    let tensor = |dims: &[usize]| Tensor::zeros(dims, candle_core::DType::F32, &Device::Cpu).unwrap();
    let save = |name: &str, tensors: &[(&str, &[usize])]| {
        let tensors: HashMap<_, _> = tensors.iter().map(|(name, dims)| (*name, tensor(dims))).collect();
        candle_core::safetensors::save(&tensors, dir.path().join(format!("{name}.safetensors"))).unwrap();
    };
    let block = "transformer.transformer_blocks.0.attn.to_q";
    let (down, up) = (&*format!("{block}.lora_A.weight"), &*format!("{block}.lora_B.weight"));
    save("sound", &[(down, &[2, 36]), (up, &[36, 2])]);
    save("narrow", &[(down, &[2, 32]), (up, &[36, 2])]);
    save("ranks", &[(down, &[2, 36]), (up, &[36, 3])]);
    save("half", &[(down, &[2, 36])]);
    save("deep", &[("transformer.transformer_blocks.7.attn.to_q.lora_A.weight", &[2, 36])]);
    save("dora", &[(down, &[2, 36]), (up, &[36, 2]), (&format!("{block}.dora_scale"), &[36])]);
    save("loha", &[("lora_unet_double_blocks_0_img_attn_proj.hada_w1_a", &[36, 2])]);
    save("lokr", &[("lora_unet_double_blocks_0_img_attn_proj.lokr_w1", &[4, 4])]);
    save("diff", &[("diffusion_model.double_blocks.0.img_attn.proj.diff", &[36, 35])]);
    save("bias", &[(down, &[2, 36]), (up, &[36, 2]), (&format!("{block}.lora_B.bias"), &[35])]);
    save("modulation", &[("diffusion_model.double_blocks.0.diff_m", &[1, 6, 36])]);
    let fused = "lora_unet_double_blocks_0_img_attn_qkv";
    let (fused_down, fused_up) = (format!("{fused}.lora_down.weight"), format!("{fused}.lora_up.weight"));
    save("twice", &[(down, &[2, 36]), (up, &[36, 2]), (&fused_down, &[2, 36]), (&fused_up, &[108, 2])]);
    save("alpha", &[(down, &[2, 36]), (up, &[36, 2]), (&format!("{block}.alpha"), &[2])]);
    save("other", &[("model.layers.0.weight", &[2, 2])]);
    for (name, alpha) in [("infinite", f32::INFINITY), ("loud", 1e30)] {
        let alpha = Tensor::new(alpha, &Device::Cpu).unwrap();
        let tensors = [(down, tensor(&[2, 36])), (up, tensor(&[36, 2])), (&*format!("{block}.alpha"), alpha)];
        let tensors: HashMap<&str, Tensor> = tensors.into_iter().collect();
        candle_core::safetensors::save(&tensors, dir.path().join(format!("{name}.safetensors"))).unwrap();
    }
    let spoiled = |name: &str, dtype: candle_core::DType, value: f32| {
        let mut values = vec![0f32; 2 * 36];
        values[71] = value;
        let spoiled = Tensor::from_vec(values, (2, 36), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let tensors: HashMap<&str, Tensor> = [(down, spoiled), (up, tensor(&[36, 2]))].into_iter().collect();
        candle_core::safetensors::save(&tensors, dir.path().join(format!("{name}.safetensors"))).unwrap();
    };
    spoiled("nan", candle_core::DType::F32, f32::NAN);
    spoiled("nan_bf16", candle_core::DType::BF16, f32::NAN);
    spoiled("inf_f16", candle_core::DType::F16, f32::NEG_INFINITY);
    spoiled("large", candle_core::DType::F16, 65504.0);
    std::fs::write(dir.path().join("short.safetensors"), b"\xff\0\0\0").unwrap();
    std::fs::write(dir.path().join("text.txt"), "no LoRA").unwrap();
    let source =
        ModelSource { loras: Some(dir.path().into()), ..ModelSource::at(case_dir("flux-dev").join("checkpoint")) };
    let model = Loaded::from(source, LoadOptions::default());
    for (name, expected) in [
        ("narrow", [down, "[2, 32]", "[2, 36]"]),
        ("ranks", [up, "[36, 3]", "[36, 2]"]),
        ("half", [block, "lora_B", "has no"]),
        ("deep", ["1 of its 1 tensors belong to no layer", "blocks.7.attn", "`deep`"]),
        ("dora", ["DoRA", "dora_scale", "only LoRA"]),
        ("loha", ["LoHa", "hada_w", "only LoRA"]),
        ("lokr", ["LoKr", "lokr_w", "only LoRA"]),
        ("diff", ["img_attn.proj.diff", "[36, 35]", "attn.to_out.0 of this model takes [36, 36]"]),
        ("bias", ["lora_B.bias", "[35]", "[36]"]),
        ("modulation", ["1 of its 1 tensors belong to no layer", "double_blocks.0.diff_m", "`modulation`"]),
        ("twice", ["two terms for layer transformer_blocks.0.attn.to_q", "qkv", block]),
        ("alpha", ["alpha", "[2]", "one number"]),
        ("infinite", ["alpha", "is not a finite number", "`infinite`"]),
        ("loud", [down, "allowed: -10000 to 10000", "`loud`"]),
        ("nan", ["`nan` cannot be used", down, "holds a value that is not finite"]),
        ("nan_bf16", ["`nan_bf16` cannot be used", down, "holds a value that is not finite"]),
        ("inf_f16", ["`inf_f16` cannot be used", down, "holds a value that is not finite"]),
        ("other", ["1 of its 1 tensors are not LoRA's", "model.layers.0.weight", "`other`"]),
        ("short", ["cannot be used", "not a sound safetensors file", "`short`"]),
        ("nobody", ["is not known", "there are: alpha, bias,", "more"]),
        ("text", ["is not known", "there are", "more"]),
        ("../flux-dev", ["is not known", "there are", "more"]),
        ("", ["is not known", "there are", "more"]),
    ] {
        let found = refused(&model.card, &[(name, 1.0)]);
        check(found.clone(), &expected);
        assert!(!found.contains("nobody") && !found.contains(".."), "repeats what the client wrote: {found}");
    }
    for weight in [f64::NAN, f64::INFINITY, 10.5, -11.0] {
        check(refused(&model.card, &[("sound", 1.0), ("sound", weight)]), &["loras[1].weight", "-10 to 10"]);
    }
    check(refused(&model.card, &[("sound", 1.0), ("sound", 2.0)]), &["loras[1].name", "twice"]);
    check(refused(&model.card, &[("sound", 1.0); 17]), &["loras", "has 17; at most 16"]);
    let plain = Loaded::from(ModelSource::at(case_dir("flux-dev").join("checkpoint")), LoadOptions::default());
    check(refused(&plain.card, &[("sound", 1.0)]), &["loras", "no folder"]);

    let footprint = |loras: &[(&str, f64)]| {
        let options = Options::default().with(&PROMPT, "x".to_owned()).with(&LORAS, options_of(loras));
        model.runner.plan(&Request::Diffusion(model.card.resolve(&options, 0).unwrap())).peak_bytes()
    };
    assert_eq!(footprint(&[("sound", 1.0)]) - footprint(&[]), 2 * 2 * 36 * 4);
    assert_eq!(footprint(&[("sound", 0.0)]), footprint(&[]));
    footprint(&[("large", 1.0)]);
}

/// Files are read when they are asked for, and again when they have changed.
#[test]
fn files_may_come_and_change_while_the_model_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let source =
        ModelSource { loras: Some(dir.path().into()), ..ModelSource::at(case_dir("sdxl-a").join("checkpoint")) };
    // A cache that holds nothing: files are read again by each session, and stay as long as it needs them.
    let mut model = Loaded::from(source, LoadOptions { lora_cache_bytes: 0, ..LoadOptions::default() });
    let run = runs().into_iter().find(|run| run.files == "sdxl").unwrap();
    let options = || run.options().with(&LORAS, options_of(&[("style", 1.0)]));
    assert!(model.card.resolve(&options(), 0).unwrap_err().to_string().contains("the folder of LoRA files is empty"));
    let mut picture_with = |file: &str| {
        let new = dir.path().join("style.new");
        std::fs::copy(case_dir(CASE).join(format!("sdxl/{file}.safetensors")), &new).unwrap();
        std::fs::rename(new, dir.path().join("style.safetensors")).unwrap();
        let request = model.card.resolve(&options(), 0).unwrap();
        (pictures(&mut *model.runner, std::slice::from_ref(&request)).remove(0).rgb, request)
    };
    let (peft, of_peft) = picture_with("peft");
    let (kohya, of_kohya) = picture_with("kohya");
    assert!(psnr(&peft, &kohya) < MOVED);
    assert_ne!(of_peft, of_kohya);
    // Who was accepted before the file changed has the file of then.
    let both = pictures(&mut *model.runner, &[of_peft, of_kohya]);
    assert!(psnr(&both[0].rgb, &peft) >= MIN_PSNR && psnr(&both[1].rgb, &kohya) >= MIN_PSNR);
}

#[test]
fn a_folder_that_is_not_there_and_a_family_without_lora_are_refused() {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let load = |case: &str, folder: PathBuf| {
        let source = ModelSource { loras: Some(folder), ..ModelSource::at(case_dir(case).join("checkpoint")) };
        tale_models::load(&source, &placement, &LoadOptions::default(), &mut |_| ()).err().expect("refused").to_string()
    };
    assert!(load("sdxl-a", "/no/such/folder".into()).starts_with("/no/such/folder: LoRA folder: "));
    assert!(load("qwen2", case_dir(CASE)).contains("models of family qwen2 take no LoRA"));
}

/// One picture of the golden.
struct Run {
    checkpoint: String,
    files: String,
    loras: Vec<LoraOption>,
    arguments: serde_json::Value,
    /// The run whose picture it is, where that is another.
    image: Option<usize>,
}

fn runs() -> Vec<Run> {
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let lora =
        |lora: &serde_json::Value| LoraOption { name: text(&lora["name"]), weight: lora["weight"].as_f64().unwrap() };
    let run = |run: &serde_json::Value| Run {
        checkpoint: text(&run["checkpoint"]),
        files: text(&run["files"]),
        loras: run["loras"].as_array().unwrap().iter().map(lora).collect(),
        arguments: run.clone(),
        image: run["image_of_run"].as_u64().map(|run| run as usize),
    };
    golden_json(CASE)["runs"].as_array().unwrap().iter().map(run).collect()
}

impl Run {
    fn options(&self) -> Options {
        let size = |name: &str| self.arguments[name].as_u64().map(|value| value as usize);
        Options::default()
            .with(&PROMPT, self.arguments["prompt"].as_str().unwrap().to_owned())
            .with(&NEGATIVE_PROMPT, self.arguments["negative_prompt"].as_str().map(str::to_owned))
            .with(&WIDTH, size("width"))
            .with(&HEIGHT, size("height"))
            .with(&NUM_INFERENCE_STEPS, size("num_inference_steps"))
            .with(&GUIDANCE_SCALE, self.arguments["guidance_scale"].as_f64())
            .with(&SEED, self.arguments["seed"].as_u64())
            .with(&LORAS, self.loras.clone())
    }
}

fn options_of(loras: &[(&str, f64)]) -> Vec<LoraOption> {
    loras.iter().map(|(name, weight)| LoraOption { name: (*name).to_owned(), weight: *weight }).collect()
}

struct Loaded {
    card: DiffusionCard,
    runner: Box<dyn Runner>,
}

impl Loaded {
    /// The checkpoint of a case with the files of a family.
    fn new(checkpoint: &str, files: &str) -> Self {
        let loras = Some(case_dir(CASE).join(files));
        let source = ModelSource { loras, ..ModelSource::at(case_dir(checkpoint).join("checkpoint")) };
        Self::from(source, LoadOptions { max_denoise_rows: 4, ..LoadOptions::default() })
    }

    fn from(source: ModelSource, options: LoadOptions) -> Self {
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
        let loaded = tale_models::load(&source, &placement, &options, &mut |_| ()).unwrap();
        let ModelCard::Diffusion(card) = loaded.card else { panic!("makes pictures") };
        Self { card, runner: loaded.runner }
    }
}
