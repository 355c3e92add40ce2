//! `tale bench serve-mix`: how long a token stream waits beside an image and a video on one device, or on each of several at once.
//!
//! Owns: the load and the figures. Everything is random weights in published shapes, through the engine that serves; HTTP
//! and encoders of files are left out. The step of the text alone is the unit: what is beside it differs from machine to
//! machine, the ratio says what the scheduler does.

use std::fmt::{self, Display};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use clap::Args;
use tale_models::checkpoint::LoadFormat;
use tale_models::device::{DeviceSpec, WeightDtype};
use tale_models::diffusion::parameters::{HEIGHT, NUM_FRAMES, NUM_INFERENCE_STEPS, PROMPT, WIDTH};
use tale_models::family::TextEncoders;
use tale_models::parameter::Options;
use tale_models::presets::{Configurations, Preset};
use tale_models::text_parameters::{IGNORE_EOS, MAX_TOKENS, TEMPERATURE};
use tale_models::{ClientId, Event, ModelCard, Request};

use super::print_line;
use super::step::parse_preset;
use crate::cli::{CliError, progress};
use crate::config::ByteSize;
use crate::engine::{Engine, EngineOptions, ModelSpec, Session};

/// Tokens of the stream's prompt.
const PROMPT_TOKENS: u32 = 16;
/// Denoising steps of each image and video: enough for all kinds of steps to meet.
const DENOISE_STEPS: usize = 4;
/// What is to be shown; the weights are random.
const SUBJECT: &str = "a lighthouse in the fog, and waves below it";

#[derive(Debug, Args)]
pub struct ServeMixArgs {
    /// Language model of the stream, a preset
    #[arg(long, value_name = "NAME", default_value = "llama-3.1-8b", value_parser = parse_preset)]
    text: &'static Preset,

    /// Model of the images, a preset
    #[arg(long, value_name = "NAME", default_value = "flux.1-schnell", value_parser = parse_preset)]
    image: &'static Preset,

    /// Model of the videos, a preset
    #[arg(long, value_name = "NAME", default_value = "wan2.1-t2v-1.3b", value_parser = parse_preset)]
    video: &'static Preset,

    /// Keep at most N layers of each kind in each network
    #[arg(long, value_name = "N")]
    layers: Option<NonZeroUsize>,

    /// Devices that compute, with commas between them: cpu, cpu:PART/PARTS for a share of its cores, or cuda:N for an NVIDIA GPU. Each
    /// has models, streams, images and videos of its own, all at the same time
    #[arg(long, value_name = "NAME", default_value = "cpu", value_delimiter = ',')]
    device: Vec<DeviceSpec>,

    /// Dtype of weight matrices, on a GPU also of what is computed: auto (as published, on a GPU bf16), f32, bf16, f16
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: WeightDtype,

    /// Memory that the bench may take on each device, such as 24GiB [default: most of what it has]
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,

    /// Pixels on each side of images and videos [default: the models' own]
    #[arg(long, value_name = "N")]
    side: Option<usize>,

    /// Frames of a video [default: the model's own]
    #[arg(long, value_name = "N")]
    num_frames: Option<usize>,

    /// Tokens of the stream in each part of the bench
    #[arg(long, value_name = "N", default_value = "200")]
    tokens: NonZeroUsize,
}

pub fn run(args: &ServeMixArgs) -> Result<(), CliError> {
    let mut alone = None;
    for (text_encoders, said) in [
        (TextEncoders::Resident, "beside images and videos"),
        (TextEncoders::OnDemand, "the same, text encoders on demand"),
    ] {
        let mix = Mix::load(args, text_encoders)?;
        let alone = match &mut alone {
            Some(alone) => alone,
            None => {
                let gaps = mix.on_each(|device| Ok(Gaps::new(mix.stream(device, args.tokens.get())?)))?;
                for (device, gaps) in mix.devices.iter().zip(&gaps) {
                    print_line(format!("{}{:<34} {gaps}", mix.of(*device), "text alone"))?;
                }
                alone.insert(gaps.iter().map(Gaps::median).collect::<Vec<_>>())
            }
        };
        let beside = mix.on_each(|device| mix.stream_beside(device, args))?;
        for ((device, (gaps, made)), alone) in mix.devices.iter().zip(beside).zip(alone) {
            let times = gaps.percentile(99).as_secs_f64() / alone.as_secs_f64();
            let of = mix.of(*device);
            let figures = format!("{gaps}, p99 {times:.1} times the step alone; {made} images and videos made");
            print_line(format!("{of}{said:<34} {figures}"))?;
        }
    }
    Ok(())
}

/// One engine with the three models on each device, whose names say on which.
struct Mix {
    engine: Engine,
    devices: Vec<DeviceSpec>,
    /// Text encoders on demand are read from them again.
    _folders: Vec<Configurations>,
}

impl Mix {
    fn load(args: &ServeMixArgs, text_encoders: TextEncoders) -> Result<Self, CliError> {
        let presets = [("text", args.text), ("image", args.image), ("video", args.video)];
        let mut folders = Vec::with_capacity(presets.len());
        for (_, preset) in presets {
            let folder = Configurations::of_preset(preset)?;
            if let Some(layers) = args.layers {
                folder.keep_layers(layers.get())?;
            }
            folders.push(folder);
        }
        let on = |device: &DeviceSpec| {
            let named = presets.iter().zip(&folders);
            let spec = |((kind, _), folder): (&(&str, _), &Configurations)| {
                let spec = ModelSpec::new(name(kind, *device), folder.path());
                ModelSpec { devices: vec![*device], ..spec }
            };
            named.map(spec).collect::<Vec<_>>()
        };
        let models: Vec<ModelSpec> = args.device.iter().flat_map(on).collect();
        let mut options = EngineOptions {
            devices: args.device.clone(),
            weight_dtype: args.dtype,
            memory_bytes: args.memory.map(|size| size.0),
            text_encoders: Some(text_encoders),
            ..EngineOptions::default()
        };
        options.load.load_format = LoadFormat::Dummy;
        let bar = progress::loading();
        let told = bar.clone();
        let engine = Engine::load(models, options, move |model, component| {
            told.set_message(format!("{model} {component}"));
        });
        bar.finish_and_clear();
        Ok(Self { engine: engine?, devices: args.device.clone(), _folders: folders })
    }

    /// Which device a line is about, where there are several.
    fn of(&self, device: DeviceSpec) -> String {
        if self.devices.len() > 1 { format!("{:<8} ", device.to_string()) } else { String::new() }
    }

    /// What `work` gives for each device, at the same time on all.
    fn on_each<T: Send>(&self, work: impl Fn(DeviceSpec) -> Result<T, CliError> + Sync) -> Result<Vec<T>, CliError> {
        let work = &work;
        std::thread::scope(|scope| {
            let threads: Vec<_> = self.devices.iter().map(|device| scope.spawn(move || work(*device))).collect();
            threads.into_iter().map(|thread| thread.join().map_err(|_| CliError::EngineGone)?).collect()
        })
    }

    /// When each of so many tokens came.
    fn stream(&self, device: DeviceSpec, tokens: usize) -> Result<Vec<Instant>, CliError> {
        let model = name("text", device);
        let card = self.card(&model);
        let ModelCard::Text(card) = &*card else {
            return Err(CliError::Argument("--text: is no language model".into()));
        };
        let options = Options::default().with(&MAX_TOKENS, tokens + 1).with(&TEMPERATURE, 0.0).with(&IGNORE_EOS, true);
        let request = card.resolve((0..PROMPT_TOKENS).collect(), &options, 0)?;
        let mut session = self.engine.submit(&model, ClientId::default(), Request::Text(request))?;
        let mut times = Vec::with_capacity(tokens + 1);
        loop {
            match session.blocking_recv() {
                Some(Event::Text { tokens, .. }) => times.extend(tokens.iter().map(|_| Instant::now())),
                Some(Event::Finished { .. }) => return Ok(times),
                Some(Event::Failed(error)) => return Err(error.into()),
                Some(_) => (),
                None => return Err(CliError::EngineGone),
            }
        }
    }

    /// The same while images and videos are made, one after the other of each.
    fn stream_beside(&self, device: DeviceSpec, args: &ServeMixArgs) -> Result<(Gaps, usize), CliError> {
        let is_over = AtomicBool::new(false);
        let made = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let make = |kind: &'static str| {
                let (is_over, made) = (&is_over, &made);
                scope.spawn(move || self.make(kind, device, args, is_over, made))
            };
            let makers = ["image", "video"].map(make);
            let times = self.stream(device, args.tokens.get());
            is_over.store(true, Relaxed);
            for maker in makers {
                maker.join().map_err(|_| CliError::EngineGone)??;
            }
            Ok((Gaps::new(times?), made.load(Relaxed)))
        })
    }

    fn make(
        &self,
        kind: &str,
        device: DeviceSpec,
        args: &ServeMixArgs,
        is_over: &AtomicBool,
        made: &AtomicUsize,
    ) -> Result<(), CliError> {
        let model = name(kind, device);
        let card = self.card(&model);
        let ModelCard::Diffusion(card) = &*card else {
            return Err(CliError::Argument(format!("--{kind}: is a language model")));
        };
        let frames = args.num_frames.filter(|_| card.canvas.frames.is_some());
        for seed in 0.. {
            // Another prompt each time, as requests have: none is encoded already.
            let options = card
                .plainest()
                .with(&PROMPT, format!("{SUBJECT}, number {seed}"))
                .with(&WIDTH, args.side)
                .with(&HEIGHT, args.side)
                .with(&NUM_FRAMES, frames)
                .with(&NUM_INFERENCE_STEPS, DENOISE_STEPS);
            let request = Request::Diffusion(card.resolve(&options, seed)?);
            let session = self.engine.submit(&model, ClientId::default(), request)?;
            if !finish(session, is_over)? {
                return Ok(());
            }
            made.fetch_add(1, Relaxed);
        }
        Ok(())
    }

    fn card(&self, model: &str) -> std::sync::Arc<ModelCard> {
        self.engine.card(model).expect("it was just loaded under this name: this is a bug")
    }
}

/// Of a model on a device.
fn name(kind: &str, device: DeviceSpec) -> String {
    format!("{kind} on {device}")
}

/// Whether the session came to its end before `is_over`; else it is dropped, which cancels it.
fn finish(mut session: Session, is_over: &AtomicBool) -> Result<bool, CliError> {
    while !is_over.load(Relaxed) {
        match session.blocking_recv() {
            Some(Event::Finished { .. }) => return Ok(true),
            Some(Event::Failed(error)) => return Err(error.into()),
            Some(_) => (),
            None => return Err(CliError::EngineGone),
        }
    }
    Ok(false)
}

/// Times between the tokens of one stream, in ascending order.
struct Gaps(Vec<Duration>);

impl Gaps {
    fn new(times: Vec<Instant>) -> Self {
        let mut gaps: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        gaps.sort_unstable();
        Self(gaps)
    }

    fn median(&self) -> Duration {
        self.percentile(50)
    }

    /// The nearest rank.
    fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }
}

impl Display for Gaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |percent| self.percentile(percent).as_secs_f64() * 1e3;
        write!(f, "between tokens: p50 {:.1} ms, p99 {:.1} ms, most {:.1} ms", ms(50), ms(99), ms(100))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let gaps = Gaps((1..=200).map(Duration::from_millis).collect());
        assert_eq!(gaps.percentile(50), Duration::from_millis(100));
        assert_eq!(gaps.percentile(99), Duration::from_millis(198));
        assert_eq!(gaps.percentile(100), Duration::from_millis(200));
        let start = Instant::now();
        let times = [0, 5, 6, 16].map(|ms| start + Duration::from_millis(ms));
        assert_eq!(Gaps::new(times.to_vec()).0, [1, 5, 10].map(Duration::from_millis));
    }
}
