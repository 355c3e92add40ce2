//! Calling libraries that panic on what they are given.
//!
//! Owns: a call whose panic is an error with the library's words, and no line on standard error. Does not know: which
//! library. A panic of our own is a bug, and is neither caught nor silenced here.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::Once;

thread_local! {
    /// Calls of [`unpanicked`] that this thread is in.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// What the last panic in one of them said.
    static SAID: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// What `work` gives, or what it said when it panicked. `work` must leave nothing half done that is used afterwards; what
/// panics in threads that it starts is not silenced.
pub fn unpanicked<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    install_hook();
    DEPTH.set(DEPTH.get() + 1);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    DEPTH.set(DEPTH.get() - 1);
    result.map_err(|_| SAID.take().unwrap_or_else(|| UNKNOWN.to_owned()))
}

const UNKNOWN: &str = "no reason given";
/// Longer messages are cut: some repeat what the library was given.
const MAX_MESSAGE_CHARS: usize = 200;

/// Keeps the message of a panic in [`unpanicked`]; every other panic goes to the hook that was there before.
fn install_hook() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| panic::set_hook(hook_before(panic::take_hook())));
}

type Hook = Box<dyn Fn(&PanicHookInfo<'_>) + Send + Sync>;

fn hook_before(other: Hook) -> Hook {
    Box::new(move |info| match DEPTH.get() {
        0 => other(info),
        _ => SAID.set(Some(message(info.payload()))),
    })
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    let line = text.and_then(|text| text.lines().next()).unwrap_or(UNKNOWN);
    line.chars().take(MAX_MESSAGE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    /// In panics of this test.
    const MARK: &str = "of a test of unpanicked";

    #[test]
    fn a_panic_is_an_error_with_its_words_and_no_line() {
        static SHOWN: AtomicUsize = AtomicUsize::new(0);
        assert_eq!(unpanicked(|| 3), Ok(3));
        let before = panic::take_hook();
        panic::set_hook(hook_before(Box::new(move |info| match message(info.payload()).contains(MARK) {
            true => _ = SHOWN.fetch_add(1, Relaxed),
            false => before(info),
        })));
        fn library(number: i32) {
            panic!("{number} {MARK}\nand more");
        }
        assert_eq!(unpanicked(|| library(7)), Err(format!("7 {MARK}")));
        let nested = unpanicked(|| {
            assert_eq!(unpanicked(|| library(8)), Err(format!("8 {MARK}")));
            library(9);
        });
        assert_eq!(nested, Err(format!("9 {MARK}")));
        let long = unpanicked(|| panic!("{}", "x".repeat(10_000)));
        assert_eq!(long.expect_err("panicked").len(), MAX_MESSAGE_CHARS);
        assert_eq!(SHOWN.load(Relaxed), 0);
        // Outside of it, panics are shown as ever.
        assert!(std::thread::spawn(|| library(10)).join().is_err());
        assert_eq!(SHOWN.load(Relaxed), 1);
    }
}
