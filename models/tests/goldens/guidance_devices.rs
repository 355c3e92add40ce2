//! Guidance branches on two devices: the pixels of one, alone, together and beside sessions that one device computes.

use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::diffusion::DiffusionRequest;
use tale_models::family::{LoadOptions, LoadedModel};
use tale_models::request::{Event, Events, Frame, Request, SessionId};
use tale_models::runner::Runner;
use tale_models::{DiffusionCard, ModelCard, loading};

use crate::support::{case_dir, psnr};
use crate::{cogvideox, sdxl, wan, wan_pictures};

const MIN_PSNR: f64 = 60.0;

fn load(case: &str, num_devices: usize) -> LoadedModel {
    let guidance_devices = match num_devices {
        1 => Vec::new(),
        of => (0..of).map(|part| DeviceSpec::CpuPart { part, of }).collect(),
    };
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("a CPU");
    let options = LoadOptions { guidance_devices, ..LoadOptions::default() };
    loading::load(&case_dir(case).join("checkpoint"), &placement, &options, &mut |_| ()).expect("loaded")
}

fn card(model: &LoadedModel) -> &DiffusionCard {
    let ModelCard::Diffusion(card) = &model.card else { panic!("a pipeline was loaded") };
    card
}

/// The pixels of each request, all of which are worked on at once.
fn pixels(runner: &mut dyn Runner, requests: &[DiffusionRequest]) -> Vec<Vec<u8>> {
    for (index, request) in requests.iter().enumerate() {
        runner.submit(SessionId(index as u64), Request::Diffusion(request.clone())).expect("accepted");
    }
    let mut frames: Vec<Vec<Frame>> = vec![Vec::new(); requests.len()];
    let mut events = Events::default();
    while runner.next().is_some() {
        runner.step(&mut events).expect("computed");
        for (SessionId(index), event) in events.drain() {
            match event {
                Event::Frames(more) => frames[index as usize].extend(more),
                Event::Failed(error) => panic!("{error}"),
                _ => (),
            }
        }
    }
    frames.into_iter().map(|frames| frames.into_iter().flat_map(|frame| frame.rgb.to_vec()).collect()).collect()
}

#[test]
fn pixels_are_those_of_one_device() {
    let second = |(_, request): (usize, DiffusionRequest)| request;
    let requests = |case: &str, card: &DiffusionCard| -> Vec<DiffusionRequest> {
        match case {
            "wan-b" => wan::requests(case, card).into_iter().map(second).collect(),
            "wan-i2v" => wan_pictures::requests(case, card).into_iter().map(second).collect(),
            "cogvideox-b" => cogvideox::requests(case, card).into_iter().map(second).collect(),
            _ => sdxl::requests(case, card),
        }
    };
    for case in ["wan-b", "wan-i2v", "cogvideox-b", "sdxl-b"] {
        let (mut one, mut two) = (load(case, 1), load(case, 2));
        let requests = requests(case, card(&one));
        let guided = requests.iter().filter(|request| request.guidance.num_branches() > 1).count();
        assert!(guided > 0, "{case}: nothing is guided");
        let expected = pixels(&mut *one.runner, &requests);
        let together = pixels(&mut *two.runner, &requests);
        for (index, (found, expected)) in together.iter().zip(&expected).enumerate() {
            let found = psnr(found, expected);
            println!("{case} {index}: {found:.1} dB");
            assert!(found >= MIN_PSNR, "{case} {index}: {found} dB");
        }
        assert!(two.runner.problem().is_none());
        assert_eq!(two.resident_bytes, one.resident_bytes, "{case}: each has the whole model");
    }
}

#[test]
fn what_has_no_branches_is_refused() {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("a CPU");
    let refused = |case: &str, of: usize, words: &str| {
        let guidance_devices = (0..of).map(|part| DeviceSpec::CpuPart { part, of }).collect();
        let options = LoadOptions { guidance_devices, ..LoadOptions::default() };
        let loaded = loading::load(&case_dir(case).join("checkpoint"), &placement, &options, &mut |_| ());
        let error = loaded.err().expect("refused").to_string();
        assert!(error.contains(words), "{error}");
    };
    refused("qwen2", 2, "models of family qwen2 have no guidance branches");
    refused("wan-b", 3, "guidance has two branches, which 3 devices cannot share");
}
