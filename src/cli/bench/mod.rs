//! `tale bench`: what this build does on this machine, beside what the machine can do.

mod kernels;
mod prefix;
mod serve_mix;
mod step;

use std::fmt::Display;
use std::io::{Write, stdout};

use clap::{Args, Subcommand};
use tale_models::device::{DeviceSpec, WeightDtype};
use tracing_subscriber::filter::LevelFilter;

use super::logs::{self, Libraries};
use super::{CliError, threads};
use crate::config::{ByteSize, LogFormat};
use crate::engine::EngineOptions;

pub use step::parse_preset;

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Every kind of step of one model: encode, prefill, decode, denoise, VAE decode
    Step(step::StepArgs),
    /// Every operation at the shapes of published models (smaller ones on the CPU)
    Kernels(kernels::KernelArgs),
    /// How long a token stream waits beside an image and a video on one device, or on each of several
    ServeMix(serve_mix::ServeMixArgs),
    /// How long a second question behind one system prompt waits for its first token
    Prefix(prefix::PrefixArgs),
}

/// Where a bench runs a model.
#[derive(Debug, Args)]
struct DeviceArgs {
    /// Device that computes: cpu, cpu:PART/PARTS for a share of its cores, or cuda:N for an NVIDIA GPU
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: DeviceSpec,

    /// Dtype of weight matrices, on a GPU also of what is computed: auto (as published, on a GPU bf16), f32, bf16, f16
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: WeightDtype,

    /// Memory that the bench may take, such as 24GiB [default: most of what the device has]
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
}

impl DeviceArgs {
    /// An engine there.
    fn engine_options(&self) -> EngineOptions {
        EngineOptions {
            devices: vec![self.device],
            weight_dtype: self.dtype,
            memory_bytes: self.memory.map(|size| size.0),
            ..EngineOptions::default()
        }
    }
}

pub fn run(args: BenchArgs) -> Result<(), CliError> {
    logs::init(LogFormat::Text, LevelFilter::WARN, Libraries::Quiet);
    threads::check()?;
    match args.what {
        What::Step(args) => step::run(&args),
        What::Kernels(args) => kernels::run(&args),
        What::ServeMix(args) => serve_mix::run(&args),
        What::Prefix(args) => prefix::run(&args),
    }
}

/// One line on stdout, at once: a bench takes minutes and people watch it.
fn print_line(line: impl Display) -> Result<(), CliError> {
    let mut out = stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(CliError::stdout)
}

/// A rate of operations, in the unit in which its roof is a number of few digits.
fn flops_unit(roof: f64) -> (&'static str, f64) {
    if roof >= 1e13 { ("TFLOP/s", 1e12) } else { ("GFLOP/s", 1e9) }
}

/// The limits of a device, as measured.
fn roofs_in_words(bytes_per_second: f64, flops_per_second: f64) -> String {
    let (unit, scale) = flops_unit(flops_per_second);
    format!("roofs: memory {:.1} GB/s, products {:.1} {unit}", bytes_per_second / 1e9, flops_per_second / scale)
}
