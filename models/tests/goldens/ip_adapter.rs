//! IP-Adapter against diffusers, stage by stage, from the reference pictures' bytes to the final picture.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use tale_models::diffusion::parameters::{
    GUIDANCE_SCALE, HEIGHT, IP_ADAPTER_SCALE, NEGATIVE_PROMPT, NUM_INFERENCE_STEPS, PROMPT, REFERENCE_IMAGES, SEED,
    WIDTH,
};
use tale_models::parameter::Options;

use candle_core::{Device, Tensor};

use tale_kernels::work::count;
use tale_models::checkpoint::{Folder, Manifest};
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionCard;
use tale_models::diffusion::DiffusionRequest;
use tale_models::encoders::image_processor::ClipImageProcessor;
use tale_models::families::sdxl::SdxlModel;
use tale_models::families::sdxl::ip_adapter::{IpAdapter, IpAdapterFiles, ReferenceEncoding, ReferenceTokens};
use tale_models::families::sdxl::pipeline::SdxlConditioning;
use tale_models::family::LoadOptions;
use tale_models::loading;
use tale_models::request::{Frame, Phase};
use tale_models::runner::Runner;
use tale_models::runner::diffusion::course::FIRST_EXPERT;
use tale_models::runner::diffusion::{DenoiseRow, DiffusionModel};
use tale_models::weights::Weights;
use tale_models::{Event, Events, ModelCard, ModelSource, Request, SessionId};

use crate::support::{assert_close, case_dir, conditioning, golden_json, golden_tensors, psnr, relative_error};

const MIN_PSNR: f64 = 50.0;
const CASE: &str = "ip-adapter";
const ADAPTERS: [(&str, usize); 2] = [("base", 30), ("plus", 28)];
/// Width of the text of the UNet that the adapters are for.
const TEXT_DIM: usize = 64;

/// Resizing rounds to bytes as Pillow does; the rest is the same arithmetic in f32.
#[test]
fn pictures_are_processed_to_the_bit() {
    let tensors = golden_tensors(CASE);
    for (adapter, image_size) in ADAPTERS {
        let folder = case_dir(CASE).join(adapter).join("image_encoder");
        let processor = ClipImageProcessor::read_or_default(Folder::new(&folder).whole(), image_size).unwrap();
        for (i, picture) in pictures(&tensors).iter().enumerate() {
            let found = processor.pixel_values(picture, &Device::Cpu).unwrap();
            let name = format!("{adapter}.pixel_values{i}");
            assert_close(&name, &found, &tensors[&name], 0.0);
        }
    }
}

#[test]
fn tokens_of_both_branches_are_the_reference_ones() {
    let (tensors, golden) = (golden_tensors(CASE), golden_json(CASE));
    let pictures = pictures(&tensors);
    for (run, facts) in golden["runs"].as_array().unwrap().iter().enumerate() {
        let adapter = open_adapter(facts["adapter"].as_str().unwrap());
        let references: Vec<Arc<Frame>> = indices(&facts["references"]).map(|i| pictures[i].clone()).collect();
        let found = encode_references(&adapter, &references, true);
        assert_eq!(found.positive.dim(1).unwrap(), references.len() * adapter.num_tokens());
        assert_close(&format!("run {run} tokens"), &found.positive, &tensors[&format!("run{run}.tokens")], 1e-5);
        let negative = found.negative.unwrap();
        assert_close(&format!("run {run} negative"), &negative, &tensors[&format!("run{run}.negative_tokens")], 1e-5);
        assert!(encode_references(&adapter, &references, false).negative.is_none());
    }
}

fn encode_references(adapter: &IpAdapter, images: &[Arc<Frame>], guided: bool) -> ReferenceTokens {
    let mut encoding = ReferenceEncoding::new(images.to_vec(), guided);
    let steps = IpAdapter::num_encode_steps(images.len(), guided);
    let mut results: Vec<_> = (0..steps).map(|_| adapter.encode_next(&mut encoding).unwrap()).collect();
    let last = results.pop().unwrap();
    assert!(results.iter().all(Option::is_none));
    last.expect("all tokens come with the last step")
}

fn indices(value: &serde_json::Value) -> impl Iterator<Item = usize> {
    value.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as usize)
}

fn open_adapter(name: &str) -> IpAdapter {
    let files = IpAdapterFiles::find(&case_dir(CASE).join(name), None).unwrap();
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let open = |path: &PathBuf| Weights::open(path, &placement).unwrap();
    let (adapter, encoder) = (open(&files.adapter), open(&files.image_encoder));
    IpAdapter::load(&files, Folder::new(&files.image_encoder).whole(), &adapter, &encoder, TEXT_DIM).unwrap()
}

fn pictures(tensors: &HashMap<String, Tensor>) -> Vec<Arc<Frame>> {
    let picture = |tensor: &Tensor| {
        let (height, width, _) = tensor.dims3().unwrap();
        Arc::new(Frame { width, height, rgb: tensor.flatten_all().unwrap().to_vec1().unwrap() })
    };
    (0..).map_while(|i| tensors.get(&format!("picture{i}"))).map(picture).collect()
}

/// The whole way through the runner, from the request to the bytes.
#[test]
fn pictures_are_the_reference_ones() {
    let tensors = golden_tensors(CASE);
    for (run, (adapter, options)) in runs(&tensors).into_iter().enumerate() {
        let (card, mut runner) = load_runner(&adapter, 4);
        let picture = &crate::support::pictures(&mut *runner, &[card.resolve(&options, 0).unwrap()])[0];
        let expected: Vec<u8> = tensors[&format!("run{run}.image")].flatten_all().unwrap().to_vec1().unwrap();
        let found = psnr(&picture.rgb, &expected);
        println!("run {run}: {found:.1} dB");
        assert!(found >= MIN_PSNR, "run {run} ({adapter}): {found:.1} dB");
    }
}

/// The network's first answer, from the reference's tokens, and the rows of a batch each with their own scale.
#[test]
fn predictions_are_the_reference_ones() {
    let tensors = golden_tensors(CASE);
    for (run, (adapter, options)) in runs(&tensors).into_iter().enumerate() {
        let model = open_model(&adapter);
        let request = model.card().resolve(&options, 0).unwrap();
        let mut other = request.clone();
        other.references.as_mut().unwrap().scale = 0.1;
        let tokens = tensors[&format!("run{run}.tokens")].clone();
        let conditioning = SdxlConditioning { references: Some(tokens), ..conditioning(&model, &request).remove(0) };
        let solver = model.course(&request).unwrap().solver;
        let noise = (&tensors[&format!("run{run}.noise")] * solver.init_noise_sigma()).unwrap();
        let latents = solver.scale_model_input(0, &noise).unwrap();
        let row = |request| {
            let (latents, timestep, conditioning) = (&latents, solver.timesteps()[0], &conditioning);
            DenoiseRow { latents, timestep, conditioning, request }
        };
        let found = model.predict(FIRST_EXPERT, &[row(&other), row(&request)]).unwrap();
        assert_close(&format!("run {run}"), &found[1], &tensors[&format!("run{run}.prediction0")], 1e-4);
        let apart = relative_error(&found[0], &found[1]);
        assert!(apart > 1e-2, "run {run}: the scale of a row changes nothing ({apart:.1e})");
    }
}

/// Sessions of other scales, pictures and seeds in shared forward passes, beside some with more pictures or none.
#[test]
fn batched_sessions_give_the_pictures_of_lone_ones() {
    let tensors = golden_tensors(CASE);
    for (adapter, _) in ADAPTERS {
        let (card, mut runner) = load_runner(adapter, 4);
        let references = [vec![0], vec![1], vec![], vec![2, 3], vec![0]];
        let variants: Vec<DiffusionRequest> = references
            .into_iter()
            .enumerate()
            .map(|(i, references)| {
                let options = small(2 + i)
                    .with(&PROMPT, "A boat".to_owned())
                    .with(&IP_ADAPTER_SCALE, (!references.is_empty()).then_some(1.0 - 0.2 * i as f64))
                    .with(
                        &REFERENCE_IMAGES,
                        references.iter().map(|k| pictures(&tensors)[*k].clone()).collect::<Vec<_>>(),
                    )
                    .with(&GUIDANCE_SCALE, if i == 1 { 1.0 } else { 4.0 });
                card.resolve(&options, i as u64).unwrap()
            })
            .collect();
        let alone: Vec<Frame> = variants
            .iter()
            .map(|request| crate::support::pictures(&mut *runner, std::slice::from_ref(request)).remove(0))
            .collect();
        for (i, (together, alone)) in crate::support::pictures(&mut *runner, &variants).iter().zip(&alone).enumerate() {
            let found = psnr(&together.rgb, &alone.rgb);
            assert!(found >= MIN_PSNR, "{adapter} session {i}: {found:.1} dB against itself alone");
        }
    }
}

#[test]
fn scale_zero_and_no_picture_are_no_adapter() {
    let tensors = golden_tensors(CASE);
    let picture = |adapter: Option<&str>, scale: Option<f64>| {
        let (card, mut runner) = match adapter {
            Some(adapter) => load_runner(adapter, 2),
            None => load(ModelSource::at(case_dir("sdxl-a").join("checkpoint")), 2).unwrap(),
        };
        let reference_images: Vec<_> = scale.iter().map(|_| pictures(&tensors)[0].clone()).collect();
        let options = small(2).with(&REFERENCE_IMAGES, reference_images).with(&IP_ADAPTER_SCALE, scale);
        crate::support::pictures(&mut *runner, &[card.resolve(&options, 1).unwrap()]).remove(0)
    };
    let plain = picture(None, None);
    for (adapter, _) in ADAPTERS {
        assert_eq!(picture(Some(adapter), None), plain, "{adapter} without a picture");
        assert_eq!(picture(Some(adapter), Some(0.0)), plain, "{adapter} at scale 0");
        assert!(psnr(&picture(Some(adapter), Some(0.5)).rgb, &plain.rgb) < 45.0, "{adapter} at scale 0.5");
    }
}

/// Equal pictures are encoded once, and each step does something.
#[test]
fn pictures_are_encoded_in_a_step_of_their_own() {
    let tensors = golden_tensors(CASE);
    let (card, mut runner) = load_runner("plus", 4);
    for (id, picture) in [(0, 0), (1, 0), (2, 1)] {
        // Equal bytes, not the same ones.
        let reference_images = vec![Arc::new(Frame::clone(&pictures(&tensors)[picture]))];
        let request = card.resolve(&small(1).with(&REFERENCE_IMAGES, reference_images), id).unwrap();
        runner.submit(SessionId(id), Request::Diffusion(request)).unwrap();
    }
    let mut events = Events::default();
    let mut steps = Vec::new();
    while runner.next().is_some_and(|plan| plan.phase == Phase::Encode) {
        let (plan, counted) = count(|| runner.step(&mut events).unwrap());
        assert!(counted.total().flops > 0.0);
        steps.push(plan.sessions);
    }
    // Two text encoders; then of each picture its own tokens and those of the negative branch.
    assert_eq!(steps, [3, 3, 2, 1, 2, 1], "prompts of all, the shared picture, the other one");
    let progress: Vec<(usize, usize)> = events
        .drain()
        .filter_map(|(id, event)| match event {
            Event::Progress { done, total, .. } if id == SessionId(1) => Some((done, total)),
            _ => None,
        })
        .collect();
    assert_eq!(progress, [(1, 4), (2, 4), (3, 4), (4, 4)]);
}

#[test]
fn adapters_that_do_not_fit_are_refused_with_both_numbers() {
    let check = |source: ModelSource, expected: &[&str]| {
        let error = load(source, 1).err().expect("does not fit").to_string();
        assert!(expected.iter().all(|part| error.contains(part)), "expected {expected:?} in: {error}");
    };
    let file = |adapter: &str| case_dir(CASE).join(adapter).join("ip-adapter_sdxl.safetensors");
    let encoder = |adapter: &str| Some(case_dir(CASE).join(adapter).join("image_encoder"));
    let over = |case: &str, adapter: PathBuf, image_encoder: Option<PathBuf>| ModelSource {
        ip_adapter: Some(adapter),
        image_encoder,
        ..ModelSource::at(case_dir(case).join("checkpoint"))
    };
    check(over("sdxl-a", file("base"), encoder("plus")), &["image_embeds of 20 values", "projection_dim", "is 12"]);
    check(over("sdxl-a", file("plus"), encoder("base")), &["hidden states of 16 values", "hidden_size", "is 24"]);
    check(over("sdxl-b", file("base"), None), &["tokens of 64 values", "cross_attention_dim of the UNet is 48"]);
    check(over("flux-schnell", file("base"), None), &["family flux take no IP-Adapter"]);
    let alone =
        ModelSource { image_encoder: encoder("base"), ..ModelSource::at(case_dir("sdxl-a").join("checkpoint")) };
    check(alone, &["without an `ip_adapter`"]);
    let not_one = case_dir("sdxl-a").join("checkpoint/vae/diffusion_pytorch_model.safetensors");
    check(over("sdxl-a", not_one, encoder("base")), &["neither a base nor a plus adapter"]);
}

/// What takes memory is counted: both files, the vision encoder's activations, the tokens.
#[test]
fn an_adapter_is_part_of_the_memory_plan() {
    let tensors = golden_tensors(CASE);
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::F32).unwrap();
    let inspect = |source: ModelSource| loading::inspect(source, &placement, &LoadOptions::default()).unwrap();
    let (plain, with) = (inspect(ModelSource::at(case_dir("sdxl-a").join("checkpoint"))), inspect(source("base")));
    assert!(with.problem.is_none(), "{:?}", with.problem);
    for (component, report) in &with.components {
        assert!(report.problems.is_empty() && report.unused.is_empty(), "{component}: {report:?}");
    }
    let elements = |name: &str| {
        let report = &with.components.iter().find(|(component, _)| component == name).expect("is listed").1;
        report.num_parameters
    };
    // The golden's encoder is used as a whole: its projection is asked for.
    assert_eq!(
        with.resident_bytes() - plain.resident_bytes(),
        4 * (elements("ip_adapter") + elements("image_encoder"))
    );
    let (card, runner) = load_runner("plus", 4);
    let bytes = |images: usize| {
        let reference_images = vec![pictures(&tensors)[0].clone(); images];
        let options = small(2).with(&REFERENCE_IMAGES, reference_images);
        let plan = runner.plan(&Request::Diffusion(card.resolve(&options, 1).unwrap()));
        [Phase::Encode, Phase::Denoise].map(|wanted| plan.phases().iter().find(|of| of.phase == wanted).unwrap().bytes)
    };
    let (none, one, eight) = (bytes(0), bytes(1), bytes(8));
    assert!(one[1] > none[1] && eight[1] > one[1] && eight[0] > none[0], "{none:?} {one:?} {eight:?}");
}

/// Adapter and options of each run.
fn runs(tensors: &HashMap<String, Tensor>) -> Vec<(String, Options)> {
    let golden = golden_json(CASE);
    let run = |facts: &serde_json::Value| {
        let options = small(0)
            .with(&PROMPT, facts["prompt"].as_str().unwrap().to_owned())
            .with(&NEGATIVE_PROMPT, facts["negative_prompt"].as_str().map(str::to_owned))
            .with(&NUM_INFERENCE_STEPS, facts["num_inference_steps"].as_u64().map(|steps| steps as usize))
            .with(&GUIDANCE_SCALE, facts["guidance_scale"].as_f64())
            .with(&SEED, facts["seed"].as_u64())
            .with(
                &REFERENCE_IMAGES,
                indices(&facts["references"]).map(|i| pictures(tensors)[i].clone()).collect::<Vec<_>>(),
            )
            .with(&IP_ADAPTER_SCALE, facts["scale"].as_f64());
        (facts["adapter"].as_str().unwrap().to_owned(), options)
    };
    golden["runs"].as_array().unwrap().iter().map(run).collect()
}

fn small(steps: usize) -> Options {
    let side = Some(64);
    Options::default().with(&WIDTH, side).with(&HEIGHT, side).with(&NUM_INFERENCE_STEPS, steps)
}

pub fn source(adapter: &str) -> ModelSource {
    let ip_adapter = Some(case_dir(CASE).join(adapter));
    ModelSource { ip_adapter, ..ModelSource::at(case_dir("sdxl-a").join("checkpoint")) }
}

fn load_runner(adapter: &str, max_denoise_rows: usize) -> (DiffusionCard, Box<dyn Runner>) {
    load(source(adapter), max_denoise_rows).unwrap()
}

fn load(source: ModelSource, max_denoise_rows: usize) -> tale_models::Result<(DiffusionCard, Box<dyn Runner>)> {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto)?;
    let options = LoadOptions { max_denoise_rows, ..LoadOptions::default() };
    let loaded = tale_models::load(source, &placement, &options, &mut |_| ())?;
    let ModelCard::Diffusion(card) = loaded.card else { panic!("makes pictures") };
    Ok((card, loaded.runner))
}

fn open_model(adapter: &str) -> SdxlModel {
    let manifest = Manifest::read(source(adapter)).unwrap();
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let open = |path: &PathBuf| Weights::open(path, &placement).unwrap();
    let model =
        SdxlModel::load(&manifest, &placement, &mut |component| manifest.component(component)?.weights(&placement))
            .unwrap();
    let files = IpAdapterFiles::find(&case_dir(CASE).join(adapter), None).unwrap();
    model.with_ip_adapter(&files, &manifest, &open(&files.adapter), &open(&files.image_encoder)).unwrap()
}
