//! Previews of videos of whole checkpoints: that they show the middle in the VAE's colours, and change nothing.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use tale_models::diffusion::parameters::{
    HEIGHT, INPUT_REFERENCE, LAST_IMAGE, NUM_FRAMES, NUM_INFERENCE_STEPS, PARTIAL_IMAGES, PROMPT, VAE_TILING, WIDTH,
};
use tale_models::diffusion::{DiffusionCard, DiffusionRequest};
use tale_models::parameter::Options;
use tale_models::request::{Event, Frame};
use tale_models::rng::TorchGenerator;
use tale_models::runner::diffusion::{DiffusionModel, DiffusionRunner};

use crate::clips::decode;
use crate::previews::correlation;
use crate::support::{case_dir, copy_folder, run_to_end};
use crate::{cogvideox, hunyuan_video, wan};

/// Checkpoints of each family, with width, height and frames of a video.
const WAN: [(&str, [usize; 3]); 4] =
    [("wan-a", [256, 192, 49]), ("wan-b", [256, 192, 49]), ("wan-i2v", [256, 192, 49]), ("wan-flf2v", [256, 192, 49])];
const COGVIDEOX: [(&str, [usize; 3]); 5] = [
    ("cogvideox-a", [256, 192, 49]),
    ("cogvideox-b", [128, 96, 49]),
    ("cogvideox-1.5", [64, 56, 49]),
    ("cogvideox-i2v", [48, 32, 49]),
    ("cogvideox-1.5-i2v", [56, 56, 49]),
];
const HUNYUAN_VIDEO: [(&str, [usize; 3]); 4] = [
    ("hunyuan-video-a", [256, 192, 49]),
    ("hunyuan-video-b", [256, 192, 49]),
    ("hunyuan-video-i2v", [256, 192, 49]),
    ("hunyuan-video-i2v-33ch", [256, 192, 49]),
];
/// Frames that a latent frame stands for, in all of them.
const FRAMES_OF_LATENT: usize = 4;

/// A request for a video of this size, from black pictures where the model takes some.
fn request(card: &DiffusionCard, [width, height, num_frames]: [usize; 3], more: Options) -> DiffusionRequest {
    let picture = || Arc::new(Frame::black(width, height));
    let takes_last = card.keyframes.is_some_and(|keyframes| keyframes.takes_last());
    let options = more
        .with(&PROMPT, "A boat".to_owned())
        .with(&WIDTH, width)
        .with(&HEIGHT, height)
        .with(&NUM_FRAMES, num_frames)
        .with(&INPUT_REFERENCE, card.keyframes.map(|_| picture()))
        .with(&LAST_IMAGE, takes_last.then(picture));
    card.resolve(&options, 5).unwrap()
}

/// Three previews as small as the latents, and the frames of a request that asks for none.
fn check_that_nothing_changes<M: DiffusionModel>(case: &str, model: M, size: [usize; 3], tiled: Option<bool>) {
    let (card, mut runner) = (model.card().clone(), DiffusionRunner::new(model, 4));
    let mut make = |partial_images: usize| {
        let options = Options::default()
            .with(&NUM_INFERENCE_STEPS, 5)
            .with(&PARTIAL_IMAGES, partial_images)
            .with(&VAE_TILING, tiled);
        let (mut previews, mut frames) = (Vec::new(), Vec::new());
        run_to_end(&mut runner, &[request(&card, size, options)], |_, _, event| match event {
            Event::Preview { index, frame } => {
                assert_eq!(index, previews.len(), "{case}");
                previews.push(frame);
            }
            Event::Frames(some) => frames.extend(some),
            _ => (),
        });
        (previews, frames)
    };
    let (previews, frames) = make(3);
    assert_eq!((previews.len(), frames.len()), (3, size[2]), "{case}");
    let shrunk_by = frames[0].width / previews[0].width;
    assert!(shrunk_by == 4 || shrunk_by == 8, "{case}: {shrunk_by}");
    for preview in &previews {
        assert_eq!((preview.width * shrunk_by, preview.height * shrunk_by), (size[0], size[1]), "{case}");
    }
    assert!(previews[0] != previews[2], "{case}: previews move on");
    let (none, plain) = make(0);
    assert!(none.is_empty() && plain == frames, "{case}: previews change nothing");
}

#[test]
fn previews_change_nothing_in_the_video() {
    let short = |[width, height, _]: [usize; 3]| [width.min(128), height.min(96), 17];
    for (case, size) in WAN {
        check_that_nothing_changes(case, wan::open_model(case), short(size), None);
    }
    for (case, size) in COGVIDEOX {
        check_that_nothing_changes(case, cogvideox::open_model(case), short(size), None);
    }
    for (case, size) in HUNYUAN_VIDEO {
        check_that_nothing_changes(case, hunyuan_video::open_model(case), short(size), None);
    }
    check_that_nothing_changes("wan-a", wan::open_model("wan-a"), [288, 64, 5], Some(true));
    let model = hunyuan_video::open_model("hunyuan-video-a");
    check_that_nothing_changes("hunyuan-video-a", model, [288, 64, 5], Some(true));
}

/// Where a family has the frames of its latents, and where the channels.
#[derive(Clone, Copy)]
struct Layout {
    frames: usize,
    channels: usize,
}

/// Latent positions on a side of a patch of one colour.
const PATCH: usize = 4;

const FRAMES_FIRST: Layout = Layout { frames: 1, channels: 2 };
const CHANNELS_FIRST: Layout = Layout { frames: 2, channels: 1 };

/// Latents of a request that are a still picture of large patches, but for their ends, which are another.
fn two_pictures<M: DiffusionModel>(model: &M, request: &DiffusionRequest, layout: Layout) -> Tensor {
    let noise = model.initial_latents(request, &mut TorchGenerator::new(0)).unwrap();
    let (channels, frames) = (noise.dim(layout.channels).unwrap(), noise.dim(layout.frames).unwrap());
    let (height, width) = (noise.dim(3).unwrap(), noise.dim(4).unwrap());
    let still = |seed: u64| {
        let (rows, columns) = (height.div_ceil(PATCH), width.div_ceil(PATCH));
        let values = TorchGenerator::new(seed).randn(channels * rows * columns);
        let patches = Tensor::from_vec(values, (1, channels, rows, columns), noise.device()).unwrap();
        let still = patches.upsample_nearest2d(PATCH * rows, PATCH * columns).unwrap();
        still.narrow(2, 0, height).unwrap().narrow(3, 0, width).unwrap().unsqueeze(layout.frames).unwrap()
    };
    let (middle, ends) = (still(77), still(78));
    let frames = (0..frames).map(|index| if (2..frames - 2).contains(&index) { &middle } else { &ends });
    Tensor::cat(&frames.collect::<Vec<_>>(), layout.frames).unwrap().contiguous().unwrap()
}

/// The mean of frames of f32 pixels `[frames, 3, h, w]` in the size of a preview, RGB by RGB.
fn shrunk(pixels: &Tensor, frames: Range<usize>, preview: &Frame) -> Vec<f32> {
    let mean = pixels.narrow(0, frames.start, frames.len()).unwrap().mean(0).unwrap();
    let (width, height) = (preview.width, preview.height);
    let scale = mean.dim(1).unwrap() / height;
    let means = mean.reshape((3, height, scale, width, scale)).unwrap().mean((2, 4)).unwrap();
    means.permute((1, 2, 0)).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A preview of the last latents is like the frames that the one in the middle stands for, and not like the first frame.
fn check_likeness<M: DiffusionModel>(case: &str, model: &M, size: [usize; 3], layout: Layout) {
    let request = request(model.card(), size, Options::default());
    let latents = two_pictures(model, &request, layout);
    let preview = model.previews().expect("has previews").preview(&latents, &request).unwrap();
    let rgb: Vec<f32> = preview.rgb.iter().map(|byte| f32::from(*byte)).collect();
    let pixels = decode(model, &request, &latents);
    let middle = size[2] / 2 + 1 - FRAMES_OF_LATENT..size[2] / 2 + 1;
    let like = |frames| correlation(&rgb, &shrunk(&pixels, frames, &preview));
    let (middle, first) = (like(middle), like(0..1));
    println!("{case}: {middle:.2} in the middle, {first:.2} at the beginning");
    assert!(middle > 0.2 && middle > first + 0.15, "{case}: {middle:.2} in the middle, {first:.2} at the beginning");
}

/// A copy of a checkpoint whose decoder is about linear: without what its blocks add, and with small values where the last
/// activation bends them. Decoders of random weights are anything but that, other than trained ones.
fn nearly_linear(case: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_folder(&case_dir(case).join("checkpoint"), copy.path());
    for entry in std::fs::read_dir(copy.path().join("vae")).unwrap() {
        let file = entry.unwrap().path();
        if file.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        for (name, tensor) in tensors.iter_mut().filter(|(name, _)| name.starts_with("decoder.")) {
            let factor = match name {
                _ if [".conv2.", ".proj.", ".to_out."].iter().any(|part| name.contains(part)) => 0.0,
                _ if name.contains("norm_out.") => 0.2,
                _ => continue,
            };
            *tensor = (&*tensor * factor).unwrap();
        }
        candle_core::safetensors::save(&tensors, &file).unwrap();
    }
    copy
}

#[test]
fn previews_show_the_middle_in_the_colours_of_the_models_own_vae() {
    for (case, size) in WAN {
        let checkpoint = nearly_linear(case);
        check_likeness(case, &wan::try_open(checkpoint.path()).unwrap(), size, CHANNELS_FIRST);
    }
    for (case, size) in COGVIDEOX {
        let checkpoint = nearly_linear(case);
        check_likeness(case, &cogvideox::try_open(checkpoint.path()).unwrap(), size, FRAMES_FIRST);
    }
    for (case, size) in HUNYUAN_VIDEO {
        let checkpoint = nearly_linear(case);
        check_likeness(case, &hunyuan_video::try_open(checkpoint.path()).unwrap(), size, CHANNELS_FIRST);
    }
}
