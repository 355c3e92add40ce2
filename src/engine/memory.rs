//! How much memory this machine has, for the ledger's default capacity.

/// Share of the physical memory that models and sessions may take when nothing is configured.
const DEFAULT_SHARE: f64 = 0.9;

/// [`DEFAULT_SHARE`] of the machine's memory, or of the control group's limit where that is lower; no bound at all where
/// the system does not say.
pub(super) fn default_capacity_bytes() -> usize {
    let limits = [meminfo_bytes(), cgroup_bytes()];
    let physical = limits.into_iter().flatten().min();
    physical.map_or(usize::MAX, |bytes| (bytes as f64 * DEFAULT_SHARE) as usize)
}

fn meminfo_bytes() -> Option<usize> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_meminfo(text: &str) -> Option<usize> {
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: usize = total.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Control groups v2: the limit of the group that a container sees as its root; `max` means none.
fn cgroup_bytes() -> Option<usize> {
    std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_total_of_meminfo() {
        assert_eq!(parse_meminfo("MemTotal:       16316412 kB\nMemFree: 1 kB\n"), Some(16_316_412 * 1024));
        assert_eq!(parse_meminfo("nonsense"), None);
    }
}
