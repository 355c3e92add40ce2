//! `tale bench kernels`.

use clap::Args;
use tale_models::bench::kernels;
use tale_models::device::{DeviceSpec, Placement, WeightDtype, on_threads_of};

use super::{print_line, roofs_in_words};
use crate::cli::CliError;

#[derive(Debug, Args)]
pub struct KernelArgs {
    /// Device that computes: cpu, cpu:PART/PARTS for a share of its cores, or cuda:N for an NVIDIA GPU
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: DeviceSpec,

    /// Dtype of what is computed on a GPU: auto (bf16), f32, bf16, f16; the CPU computes in f32
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: WeightDtype,

    /// Only operations whose name contains this
    #[arg(default_value = "")]
    filter: String,
}

pub fn run(args: &KernelArgs) -> Result<(), CliError> {
    on_threads_of(args.device, || measure(args))?
}

fn measure(args: &KernelArgs) -> Result<(), CliError> {
    let placement = Placement::open(args.device, args.dtype)?;
    let mut printed = Ok(());
    kernels::run(&placement, &args.filter, &mut |line| {
        if printed.is_ok() {
            printed = match line {
                kernels::Line::Roofs(roofs) => {
                    print_line(roofs_in_words(roofs.bytes_per_second, roofs.flops_per_second))
                }
                kernels::Line::Operation(measured) => print_line(measured),
            };
        }
    })?;
    printed
}
