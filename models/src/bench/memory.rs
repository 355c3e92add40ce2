//! The most memory that a piece of work has taken.

use crate::device::Placement;
use crate::error::Result;

/// Forgets the peak of the host's memory, so that [`peak_bytes`] is of what comes from now on (see proc(5),
/// `clear_refs`). A GPU's peak is that of the process and cannot be forgotten.
pub(super) fn forget_peak(placement: &Placement) {
    if placement.device.is_cpu()
        && let Err(error) = std::fs::write("/proc/self/clear_refs", "5")
    {
        tracing::warn!(%error, "peaks of memory include what came before");
    }
}

/// On the CPU the most resident memory of this process since [`forget_peak`]. On a GPU what this process and its
/// neighbours there have taken so far: freed blocks stay with the process, so that what is in use now is the peak.
pub(super) fn peak_bytes(placement: &Placement) -> Result<usize> {
    Ok(match placement.memory()? {
        Some(memory) => memory.total_bytes - memory.free_bytes,
        None => resident_peak_bytes(&std::fs::read_to_string("/proc/self/status").unwrap_or_default()),
    })
}

/// 0 where the system does not say.
fn resident_peak_bytes(status: &str) -> usize {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches("kB").trim().parse::<usize>().map_or(0, |kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{DeviceSpec, WeightDtype};

    #[test]
    fn a_peak_is_read_and_forgotten() {
        assert_eq!(resident_peak_bytes("VmPeak:\t 7 kB\nVmHWM:\t   12 kB\n"), 12 << 10);
        assert_eq!(resident_peak_bytes("nonsense"), 0);
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
        let large = std::hint::black_box(vec![1u8; 256 << 20]);
        let with_it = peak_bytes(&placement).expect("Linux says");
        drop(large);
        forget_peak(&placement);
        let without = peak_bytes(&placement).expect("Linux says");
        // Other tests may run in this process.
        assert!(with_it >= 256 << 20 && without < with_it, "{with_it} {without}");
    }
}
