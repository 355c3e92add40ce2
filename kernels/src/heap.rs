//! What the C library does with memory of results that are no longer needed.
//!
//! By itself glibc takes every large block from the system and gives it back when it is freed, so that each result of some
//! megabytes costs a page fault per 4 KiB and zeros for all of it: a tenth of a denoising step, and more of a VAE. A
//! model's steps ask for the same sizes again and again; a heap that keeps them costs nothing.
//!
//! Owns: the allocator's settings. Does not know: who allocates, and when there is nothing to do.

/// All threads that begin from now on share the heap of the first one: those of their own hold no block over 64 MiB, and take
/// larger ones from the system each time. For the begin of `main`.
pub fn share_one_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: as below.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// From now on freed blocks of up to 1 GiB stay with the process, and up to 2 GiB of them at the end of the heap. What is
/// allocated already, such as weights, is not touched. Nothing where the C library is another one.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const GROWTH: libc::c_int = 64 << 20;
        // SAFETY: sets numbers of the allocator, under its lock; 0 is the answer to one that it does not take, and then all
        // is as before.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
            libc::mallopt(libc::M_TOP_PAD, GROWTH);
        }
    }
}

/// Gives freed memory to the system: when a network has gone, or nothing is left to do for a while.
pub fn give_back_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: touches free memory only, under the allocator's locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::*;

    /// Page faults of this process that needed no reading.
    fn faults() -> u64 {
        let stat = std::fs::read_to_string("/proc/self/stat").expect("the kernel says it");
        // `minflt`, the tenth field; the second one is a name in parentheses.
        let mut fields = stat.rsplit(") ").next().expect("a name in parentheses").split(' ');
        fields.nth(7).and_then(|field| field.parse().ok()).expect("a number")
    }

    fn resident_bytes() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").expect("the kernel says it");
        statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("a number") * 4096
    }

    /// In a process of its own, whose threads share a heap from the beginning as those of `main` do.
    #[test]
    fn pages_are_kept_until_they_are_given_back() {
        let child = std::process::Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "heap::tests::in_one_heap", "--ignored"])
            .env("MALLOC_ARENA_MAX", "1")
            .output()
            .expect("runs");
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains("1 passed"), "{said}");
    }

    /// Results of 96 MiB, one after the other: only the first one's pages are new. They leave when they are asked to.
    #[test]
    #[ignore = "a part of the test above"]
    fn in_one_heap() {
        const BYTES: usize = 96 << 20;
        let touch = || std::hint::black_box(vec![1u8; BYTES]).len();
        keep_freed_memory();
        assert_eq!(touch(), BYTES);
        let before = faults();
        (0..8).for_each(|_| assert_eq!(touch(), BYTES));
        assert!(faults() - before < (BYTES / 4096) as u64, "pages of one result at most, not of eight");
        let kept = resident_bytes();
        give_back_freed_memory();
        assert!(resident_bytes() + BYTES / 2 < kept, "{kept} bytes before, {} after", resident_bytes());
    }
}
