//! Overwrites memory as it is freed, so that prompts, answers and pictures do not outlive their use.
//!
//! Texts pass through many hands: the HTTP library's buffers, JSON, templates, tokenizers. Only the allocator sees them all, but for
//! what FFmpeg copies: it takes memory from the C library itself.
//!
//! Owns: the process's allocator. Does not know: who allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::arch::asm;

/// Blocks of numbers up to this size are overwritten, too: the token ids of 131,072 tokens, doubled by a vector that grew.
/// Larger ones are tensors.
const MAX_BYTES_OF_NUMBERS: usize = 1 << 20;

/// `A`, but what could be text, tokens or pictures is overwritten with zeros before it goes back.
pub struct WipeOnFree<A>(A);

/// For the binary, its tests and its benches.
#[global_allocator]
static ALLOCATOR: WipeOnFree<System> = WipeOnFree(System);

/// Bytes, of any length, or few enough numbers.
fn is_wiped(layout: Layout) -> bool {
    layout.align() == 1 || layout.size() <= MAX_BYTES_OF_NUMBERS
}

/// Zeros that the compiler does not leave out although nobody reads them.
///
/// # Safety
///
/// `pointer` can be written for `size` bytes.
unsafe fn wipe(pointer: *mut u8, size: usize) {
    // SAFETY: the caller's promise. The empty assembly could read what `pointer` points to, as far as the compiler knows.
    unsafe {
        pointer.write_bytes(0, size);
        asm!("/* {} */", in(reg) pointer, options(nostack, preserves_flags, readonly));
    }
}

// SAFETY: every block comes from `A` and goes back to it with its layout; between the two only its own bytes are written.
unsafe impl<A: GlobalAlloc> GlobalAlloc for WipeOnFree<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`, which is also `A`'s.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as for `alloc`.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` is a block of this layout, which the caller gives up.
        unsafe {
            if is_wiped(layout) {
                wipe(pointer, layout.size());
            }
            self.0.dealloc(pointer, layout);
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !is_wiped(layout) {
            // SAFETY: the caller keeps the contract of `realloc`, which is also `A`'s.
            return unsafe { self.0.realloc(pointer, layout, new_size) };
        }
        // `A` would not overwrite the block that it moves from, nor the end that it cuts off.
        // SAFETY: the caller promises that the new layout is valid and not empty; the two blocks are different ones.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(new_size, layout.align()));
            if !new.is_null() {
                new.copy_from_nonoverlapping(pointer, layout.size().min(new_size));
                self.dealloc(pointer, layout);
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// The system's allocator, which remembers whether the blocks that came back were zeros.
    struct Watched(RefCell<Vec<bool>>);

    // SAFETY: blocks come from the system's allocator and go back to it.
    unsafe impl GlobalAlloc for Watched {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            // SAFETY: the caller's contract.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: the block is still the caller's, and was written whole by the test.
            let bytes = unsafe { std::slice::from_raw_parts(pointer, layout.size()) };
            self.0.borrow_mut().push(bytes.iter().all(|byte| *byte == 0));
            // SAFETY: the caller's contract.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    /// What came back of a block of this size and alignment, which is resized once where `new_size` says so.
    fn freed(size: usize, align: usize, new_size: Option<usize>) -> Vec<bool> {
        let allocator = WipeOnFree(Watched(RefCell::default()));
        let layout = |size| Layout::from_size_align(size, align).expect("a power of two");
        // SAFETY: the blocks are not empty, are written within their size, and go back with their layout.
        unsafe {
            let mut block = allocator.alloc(layout(size));
            block.write_bytes(7, size);
            let mut last = size;
            if let Some(new_size) = new_size {
                block = allocator.realloc(block, layout(size), new_size);
                let kept = std::slice::from_raw_parts(block, size.min(new_size));
                assert!(kept.iter().all(|byte| *byte == 7), "contents move with the block");
                block.write_bytes(7, new_size);
                last = new_size;
            }
            allocator.dealloc(block, layout(last));
        }
        allocator.0.0.take()
    }

    #[test]
    fn text_of_any_length_and_short_lists_of_numbers_are_overwritten() {
        for (size, align) in [(1, 1), (24, 1), (8 << 20, 1), (4, 4), (1 << 20, 4), (4096, 64)] {
            assert_eq!(freed(size, align, None), [true], "{size} bytes aligned to {align}");
        }
    }

    #[test]
    fn what_is_left_behind_by_growing_and_shrinking_is_overwritten() {
        for (size, new_size) in [(16, 32), (32, 16), (1 << 20, 8 << 20), (8 << 20, 5)] {
            assert_eq!(freed(size, 1, Some(new_size)), [true, true], "{size} to {new_size} bytes");
        }
    }

    #[test]
    fn tensors_are_not() {
        assert_eq!(freed((1 << 20) + 4, 4, None), [false]);
    }
}
