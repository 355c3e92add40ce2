//! Previews of whole checkpoints: how many there are, that they know the VAE's colours, that they change nothing.

use candle_core::{Device, Tensor};
use tale_models::diffusion::parameters::{HEIGHT, NUM_INFERENCE_STEPS, PARTIAL_IMAGES, PROMPT, WIDTH};
use tale_models::parameter::Options;

use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::family::LoadOptions;
use tale_models::request::Frame;
use tale_models::rng::TorchGenerator;
use tale_models::vae::kl::{KlConfig, KlDecoder};
use tale_models::weights::Weights;
use tale_models::{Event, Events, ModelCard, Request, SessionId};

use crate::support::case_dir;

/// Previews by number, and the picture.
fn make(case: &str, partial_images: usize) -> (Vec<Frame>, Frame) {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let folder = case_dir(case).join("checkpoint");
    let loaded = tale_models::load(&folder, &placement, &LoadOptions::default(), &mut |_| ()).unwrap();
    let ModelCard::Diffusion(card) = loaded.card else { panic!("{case} makes pictures") };
    let options = Options::default()
        .with(&PROMPT, "A boat".to_owned())
        .with(&WIDTH, 64)
        .with(&HEIGHT, 96)
        .with(&NUM_INFERENCE_STEPS, 8)
        .with(&PARTIAL_IMAGES, partial_images);
    let (mut runner, mut events) = (loaded.runner, Events::default());
    runner.submit(SessionId(0), Request::Diffusion(card.resolve(&options, 5).unwrap())).unwrap();
    let (mut previews, mut picture) = (Vec::new(), None);
    while runner.next().is_some() {
        runner.step(&mut events).unwrap();
        for (_, event) in events.drain() {
            match event {
                Event::Preview { index, frame } => {
                    assert_eq!(index, previews.len());
                    previews.push(frame);
                }
                Event::Frames(mut frames) => picture = frames.pop(),
                Event::Failed(error) => panic!("{case}: {error}"),
                _ => (),
            }
        }
    }
    (previews, picture.unwrap())
}

/// How alike two pictures are, 1 at most; the mean colour of each is taken out.
pub fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let centred = |values: &[f32]| -> Vec<f64> {
        let sum = |c: usize| values.iter().skip(c).step_by(3).map(|value| f64::from(*value)).sum::<f64>();
        let mean = |c: usize| sum(c) / (values.len() / 3) as f64;
        let means = [mean(0), mean(1), mean(2)];
        values.iter().enumerate().map(|(i, value)| f64::from(*value) - means[i % 3]).collect()
    };
    let (a, b) = (centred(a), centred(b));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}

#[test]
fn previews_change_nothing_in_the_picture() {
    for (case, scale) in [("sdxl-a", 8), ("sdxl-b", 4), ("flux-dev", 8)] {
        let (previews, picture) = make(case, 3);
        assert_eq!(previews.len(), 3, "{case}");
        for preview in &previews {
            assert_eq!((preview.width, preview.height), (picture.width / scale, picture.height / scale), "{case}");
        }
        assert!(previews[0] != previews[2], "{case}: previews move on");
        let (none, plain) = make(case, 0);
        assert_eq!((none.len(), plain), (0, picture), "{case}");
    }
}

/// Of latents that were not fitted. The tiny VAEs have random weights and are far from linear, so that previews and
/// pictures are only roughly alike; nothing but the fit knows their colours.
#[test]
fn previews_have_the_colours_of_the_models_own_vae() {
    for case in ["sdxl-a", "sdxl-b", "flux-dev"] {
        let folder = case_dir(case).join("checkpoint/vae");
        let config: KlConfig = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
        let vae = KlDecoder::load(&Weights::open(&folder, &placement).unwrap(), &config).unwrap();
        let values = TorchGenerator::new(77).randn(config.latent_channels * 64);
        let patches = Tensor::from_vec(values, (1, config.latent_channels, 8, 8), &Device::Cpu).unwrap();
        let latents = patches.upsample_nearest2d(16, 16).unwrap();
        let (width, height, rgb) = vae.preview(&latents).unwrap();
        let scale = config.vae_scale_factor();
        let pixels = vae.decode(&latents).unwrap().reshape((3, height, scale, width, scale)).unwrap();
        let pixels = pixels.mean((2, 4)).unwrap().permute((1, 2, 0)).unwrap().flatten_all().unwrap();
        let found = correlation(&rgb, &pixels.to_vec1::<f32>().unwrap());
        println!("{case}: {found:.2}");
        assert!(found > 0.2, "{case}: {found:.2}");
    }
}
