//! `tale bench kernels`: the table of `tale-kernels` for an opened device.

use candle_core::Device;
use tale_kernels::bench::{Bench, Measured, Roofs, Sizes};

use crate::device::Placement;
use crate::error::Result;

/// What is reported.
pub enum Line<'a> {
    /// The limits of the device; first.
    Roofs(Roofs),
    /// An operation beside them.
    Operation(&'a Measured),
}

/// Measures every operation whose name contains `filter`. A CPU gets smaller inputs than the published sizes, which
/// would take it minutes.
pub fn run(placement: &Placement, filter: &str, report: &mut dyn FnMut(Line<'_>)) -> Result<()> {
    let sizes = match placement.device {
        Device::Cpu => Sizes::Small,
        _ => Sizes::Published,
    };
    let roofs = tale_kernels::bench::roofs(&placement.device, placement.compute_dtype)?;
    report(Line::Roofs(roofs));
    let mut print = |measured: &Measured| report(Line::Operation(measured));
    let mut bench = Bench::new(&placement.device, placement.compute_dtype, sizes, filter, &mut print)?;
    Ok(bench.run()?)
}
