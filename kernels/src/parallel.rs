//! Work on all cores, and the scratch memory of each.
//!
//! Owns: when an operation is worth splitting, shared writes to disjoint parts of a result, per-thread scratch. Does
//! not know: what is computed. Threads are those of rayon's pool that the caller runs in (the global one by default);
//! a thread that computes step after step should itself be inside the pool (`ThreadPool::install`), because entering
//! it from outside costs a thread switch per operation.

use std::cell::Cell;
use std::marker::PhantomData;

use rayon::prelude::*;

use crate::work::is_dry;

/// Operations of less work than this (multiply-adds, or values read) stay on the calling thread: waking another core
/// takes longer.
const MIN_WORK: usize = 1 << 16;

/// Calls `task(0..tasks)`, on all cores if `work` (multiply-adds or values read, of all tasks together) is worth it;
/// in a dry run not at all, so that the zeros that an operation begins with are its result.
pub(crate) fn for_each(tasks: usize, work: usize, task: impl Fn(usize) + Sync) {
    if is_dry() {
        return;
    }
    if tasks <= 1 || work < MIN_WORK || rayon::current_num_threads() == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(&task);
    }
}

/// Into how many tasks to cut `work`: a few per core, so that a core that is taken away costs little, and none too small.
pub(crate) fn tasks_for(work: usize) -> usize {
    (work / (MIN_WORK / 4)).clamp(1, 8 * rayon::current_num_threads())
}

/// A mutable slice that tasks write disjoint parts of.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice` and `as_ptr`, whose users promise disjoint writes.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Takes the slice for as long as tasks write to it.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }

    /// The part that one task writes.
    ///
    /// # Safety
    /// No two tasks may hold overlapping parts at one time.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a task's part lies inside the result: this is a bug");
        // SAFETY: inside the slice (checked above), disjoint from other parts (the caller's promise).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// The start of the slice, for parts that are not contiguous.
    pub(crate) fn as_ptr(&self) -> *mut T {
        self.start
    }
}

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Lends `len` f32 of this thread's scratch memory, 64-byte aligned, with whatever they held before.
pub(crate) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    const LINE: usize = 16;
    let mut scratch = SCRATCH.take();
    if scratch.len() < len + LINE {
        scratch = vec![0.0; len + LINE];
    }
    let start = scratch.as_ptr().align_offset(64).min(LINE);
    let result = body(&mut scratch[start..start + len]);
    SCRATCH.set(scratch);
    result
}
