//! Text encoders that are there only while prompts are encoded, beside the same model that keeps them.

use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::parameters::{
    DENOISING_END, HEIGHT, LORAS, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, WIDTH,
};
use tale_models::diffusion::{DiffusionCard, Medium};
use tale_models::family::{LoadOptions, TextEncoders};
use tale_models::loading;
use tale_models::lora::LoraOption;
use tale_models::parameter::Options;
use tale_models::request::Phase;
use tale_models::{Event, Events, LoadedModel, ModelCard, ModelSource, Request, SessionId};

use crate::support::{case_dir, copy_folder, edit_tensors, pictures};

fn checkpoint(case: &str) -> ModelSource {
    ModelSource::at(case_dir(case).join("checkpoint"))
}

fn with_loras(case: &str, files: &str) -> ModelSource {
    ModelSource { loras: Some(case_dir("lora").join(files)), ..checkpoint(case) }
}

fn load(source: &ModelSource, text_encoders: TextEncoders) -> LoadedModel {
    let options = LoadOptions { text_encoders, lora_cache_bytes: 0, max_denoise_rows: 4, ..LoadOptions::default() };
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let loaded = loading::load(source, &placement, &options, &mut |_| ()).unwrap();
    let inspection = loading::inspect(source, &placement, &options).unwrap();
    assert_eq!(inspection.resident_bytes(), loaded.resident_bytes);
    loaded
}

fn card(model: &LoadedModel) -> &DiffusionCard {
    let ModelCard::Diffusion(card) = &model.card else { panic!("makes pictures or clips") };
    card
}

fn options(prompt: &str) -> Options {
    let side = Some(64);
    let num_inference_steps = Some(2);
    Options::default()
        .with(&PROMPT, prompt.to_owned())
        .with(&WIDTH, side)
        .with(&HEIGHT, side)
        .with(&NUM_INFERENCE_STEPS, num_inference_steps)
}

/// Requests that come one step after the other, so that prompts are encoded between other sessions' steps: with a
/// negative prompt, with other adapters, with a refiner.
fn requests(card: &DiffusionCard, loras: &[&str], refined: bool) -> Vec<DiffusionRequest> {
    let num_frames = (card.medium() == Medium::Video).then_some(1);
    let lora = |name: &&str| vec![LoraOption { name: (*name).to_owned(), weight: 1.0 }];
    let mut all = vec![options("A lighthouse"), options("Seven ships"), options("A lighthouse")];
    if refined {
        all.push(options("A harbour").with(&DENOISING_END, 0.5));
    }
    all.extend(loras.iter().map(|name| options("A lighthouse").with(&LORAS, lora(name))));
    let all = all.into_iter().map(|options| options.with(&NUM_FRAMES, num_frames)).enumerate();
    all.map(|(seed, options)| card.resolve(&options, seed as u64).unwrap()).collect()
}

#[test]
fn pictures_are_the_same_bit_for_bit() {
    let refined = ModelSource { refiner: Some(checkpoint("edits/sdxl-refiner").path), ..checkpoint("sdxl-a") };
    for (source, loras, is_refined, components) in [
        (with_loras("flux-dev", "flux"), &["peft", "kohya"][..], false, &["text_encoder", "text_encoder_2"][..]),
        (with_loras("sdxl-a", "sdxl"), &["peft", "kohya"], false, &["text_encoder", "text_encoder_2"]),
        (refined, &[], true, &["text_encoder", "text_encoder_2", "refiner/text_encoder_2"]),
        (checkpoint("wan-a"), &[], false, &["text_encoder"]),
        (checkpoint("hunyuan-video-a"), &[], false, &["text_encoder", "text_encoder_2"]),
    ] {
        let case = source.path.display().to_string();
        let (mut keeps, mut lends) = (load(&source, TextEncoders::Resident), load(&source, TextEncoders::OnDemand));
        let placement = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
        let reports = loading::inspect(&source, &placement, &LoadOptions::default()).unwrap().components;
        let encoders = reports.iter().filter(|(name, _)| components.contains(&name.as_str()));
        let encoder_bytes = encoders.map(|(_, report)| report.resident_bytes).sum::<usize>();
        assert!(encoder_bytes > 0 && keeps.resident_bytes - lends.resident_bytes == encoder_bytes, "{case}");

        let requests = requests(card(&keeps), loras, is_refined);
        for request in &requests {
            let plan = |model: &LoadedModel| model.runner.plan(&Request::Diffusion(request.clone()));
            let expected = plan(&keeps).holding_in(Phase::Encode, encoder_bytes).after(Phase::Load, encoder_bytes);
            assert_eq!(plan(&lends), expected, "{case}");
        }
        let (kept, lent) = (pictures(&mut *keeps.runner, &requests), pictures(&mut *lends.runner, &requests));
        assert!(kept == lent, "{case}");
        assert!(kept[0] != kept[1], "{case}: prompts and seeds matter");
    }
}

/// A checkpoint that is another one by now has no encoders for this model; what is encoded goes on.
#[test]
fn a_checkpoint_that_has_changed_lends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&case_dir("flux-dev").join("checkpoint"), dir.path());
    let mut model = load(&ModelSource::at(dir.path()), TextEncoders::OnDemand);
    let request = |prompt| Request::Diffusion(card(&model).resolve(&options(prompt), 1).unwrap());
    let (first, second) = (request("A lighthouse"), request("Seven ships"));
    let runner = &mut model.runner;
    let mut events = Events::default();
    runner.submit(SessionId(1), first).unwrap();
    while runner.next().is_some_and(|plan| plan.phase != Phase::Denoise) {
        runner.step(&mut events).unwrap();
    }
    edit_tensors(&dir.path().join("text_encoder"), "", |x| (x * 2.0).unwrap());
    runner.submit(SessionId(2), second).unwrap();
    let mut failed = Vec::new();
    while runner.next().is_some() {
        if let Err(error) = runner.step(&mut events) {
            failed.push((runner.evict_step(), error.to_string()));
        }
    }
    let [(sessions, error)] = &failed[..] else { panic!("one step fails: {failed:?}") };
    assert_eq!(sessions[..], [SessionId(2)]);
    assert!(error.contains("has changed since the model was loaded"), "{error}");
    assert!(events.drain().any(|(id, event)| id == SessionId(1) && matches!(event, Event::Finished { .. })));
}

#[test]
fn what_an_encoder_lacks_is_reported_wherever_it_will_be() {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&case_dir("wan-a").join("checkpoint"), dir.path());
    let path = dir.path().join("text_encoder/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["num_layers"] = (config["num_layers"].as_u64().unwrap() + 1).into();
    std::fs::write(&path, config.to_string()).unwrap();
    let placement = Placement::in_host_memory(DeviceSpec::Cpu, WeightDtype::Auto);
    for text_encoders in [TextEncoders::Resident, TextEncoders::OnDemand] {
        let options = LoadOptions { text_encoders, ..LoadOptions::default() };
        let inspection = loading::inspect(dir.path(), &placement, &options).unwrap();
        let (_, report) = inspection.components.iter().find(|(name, _)| name == "text_encoder").unwrap();
        assert!(!report.problems.is_empty(), "{text_encoders:?}");
    }
}
