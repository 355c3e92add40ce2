//! What one rendering may take: bytes that it makes, and time.
//!
//! Owns: the account of the rendering that runs on this thread, which functions, filters and methods charge before they make
//! something larger than what they were given. minijinja's own fuel pays for instructions and for what its operators make;
//! here is what it cannot see. Outside of a rendering everything is free.

use std::cell::RefCell;
use std::fmt;
use std::time::{Duration, Instant};

use minijinja::{Error, ErrorKind};

/// Most bytes that functions, filters and methods make in one rendering, all together, whether or not they are kept.
pub(super) const MAX_MADE_BYTES: usize = 128 << 20;
/// Longest time of one rendering. A long conversation takes some milliseconds.
pub(super) const MAX_TIME: Duration = Duration::from_secs(2);
/// What a rendering may take in all.
pub(super) const MOST: Allowance = Allowance { bytes: MAX_MADE_BYTES, time: MAX_TIME };
/// What one may take that must not take long: the slowest of our methods make a KiB in some microseconds. The time is for
/// what charges nothing as it goes.
pub(super) const LITTLE: Allowance = Allowance { bytes: 16 << 10, time: Duration::from_millis(5) };
/// Bytes that a value in a list takes, with what it takes to grow the list.
pub(super) const ITEM_BYTES: usize = 48;
/// The clock is read once for so many charges.
const CHARGES_PER_LOOK: usize = 64;

thread_local! {
    static ACCOUNT: RefCell<Option<Account>> = const { RefCell::new(None) };
}

/// Bytes that functions, filters and methods may make, and time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    bytes: usize,
    time: Duration,
}

struct Account {
    /// What was exceeded first: from then on nothing can be paid.
    exceeded: Option<Exceeded>,
    bytes_left: usize,
    charges: usize,
    deadline: Instant,
}

/// Which bound a rendering went over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exceeded {
    Bytes,
    Time,
    Depth,
    Values,
}

/// Deepest nesting of lists and dictionaries in a value that is kept.
pub(super) const MAX_DEPTH: usize = 100;
/// Most values in one value that is kept, those of its lists and dictionaries at all depths; one that stands in several
/// places counts there.
pub(super) const MAX_VALUES: usize = 250_000;

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes => write!(f, "it makes more than {MAX_MADE_BYTES} bytes"),
            Self::Time => write!(f, "it takes longer than {} s", MAX_TIME.as_secs()),
            Self::Depth => write!(f, "it nests lists and dictionaries deeper than {MAX_DEPTH}"),
            Self::Values => write!(f, "it keeps a list or dictionary of more than {MAX_VALUES} values"),
        }
    }
}

impl std::error::Error for Exceeded {}

impl From<Exceeded> for Error {
    fn from(exceeded: Exceeded) -> Self {
        Error::new(ErrorKind::InvalidOperation, exceeded.to_string()).with_source(exceeded)
    }
}

/// The bound that ended a rendering, if one did.
pub(super) fn exceeded(error: &Error) -> Option<Exceeded> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(exceeded) = cause.downcast_ref() {
            return Some(*exceeded);
        }
        source = cause.source();
    }
    None
}

/// Runs a rendering with an account of its own.
pub(super) fn within<T>(allowance: Allowance, work: impl FnOnce() -> T) -> T {
    /// However the rendering ends, the thread's next one begins anew.
    struct Closing;
    impl Drop for Closing {
        fn drop(&mut self) {
            ACCOUNT.set(None);
        }
    }
    let Allowance { bytes, time } = allowance;
    let account = Account { exceeded: None, bytes_left: bytes, charges: 0, deadline: Instant::now() + time };
    ACCOUNT.set(Some(account));
    let _closing = Closing;
    work()
}

/// Pays for bytes that are about to be made.
pub(super) fn charge(bytes: usize) -> Result<(), Exceeded> {
    ACCOUNT.with_borrow_mut(|account| account.as_mut().map_or(Ok(()), |account| account.charge(bytes)))
}

/// Whether nothing has been exceeded so far. Code that cannot fail stops early when it cannot pay; whoever called it asks here.
pub(super) fn check() -> Result<(), Exceeded> {
    charge(0)
}

/// Ends the rendering: from now on nothing can be paid.
pub(super) fn exceed(bound: Exceeded) {
    ACCOUNT.with_borrow_mut(|account| {
        if let Some(account) = account {
            account.exceeded.get_or_insert(bound);
        }
    });
}

/// Pays for so many values in a list.
pub(super) fn charge_items(count: usize) -> Result<(), Exceeded> {
    charge(count.saturating_mul(ITEM_BYTES))
}

impl Account {
    fn charge(&mut self, bytes: usize) -> Result<(), Exceeded> {
        self.charges += 1;
        let is_due = self.charges.is_multiple_of(CHARGES_PER_LOOK) || bytes > ITEM_BYTES * CHARGES_PER_LOOK;
        match self.bytes_left.checked_sub(bytes) {
            None => drop(self.exceeded.get_or_insert(Exceeded::Bytes)),
            Some(_) if is_due && Instant::now() > self.deadline => drop(self.exceeded.get_or_insert(Exceeded::Time)),
            Some(left) => self.bytes_left = left,
        }
        self.exceeded.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rendering_has_an_account_of_its_own() {
        assert_eq!(charge(usize::MAX), Ok(()));
        for _ in 0..2 {
            within(MOST, || {
                assert_eq!(charge(MAX_MADE_BYTES), Ok(()));
                assert_eq!(charge(1), Err(Exceeded::Bytes));
                assert_eq!(charge_items(usize::MAX), Err(Exceeded::Bytes));
            });
        }
        let panicked = std::panic::catch_unwind(|| within(MOST, || std::panic::resume_unwind(Box::new(()))));
        assert!(panicked.is_err() && charge(usize::MAX).is_ok());
    }
}
