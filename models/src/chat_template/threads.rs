//! Threads on which templates are compiled and rendered.
//!
//! Owns: how deep their stacks are, those threads that are its own and their reuse, and what happens to work that does not end
//! in time. Deliberately does not know: templates.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Bytes of stack. What is compiled and rendered is bounded in depth so that a fraction of it is used.
pub const STACK_BYTES: usize = 32 << 20;
/// The same of threads that render little. Less is used of it, too, but a system's usual stack is not too much.
pub const LITTLE_STACK_BYTES: usize = 8 << 20;
/// Threads that wait for the next piece of work. Others end with theirs.
const MAX_IDLE: usize = 4;
/// Pieces of work of one owner that may be over their time at once; before they have ended it gets no further threads.
pub(super) const MAX_OVERDUE: usize = 2;

thread_local! {
    static RENDERS_HERE: Cell<Here> = const { Cell::new(Here::Nothing) };
}

/// What is rendered on a thread that asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Here {
    Nothing,
    Little,
    All,
}

/// From now on templates are rendered on this thread where it asks for it: the way to another one takes longer than most
/// renderings. Whoever started it gave it [`STACK_BYTES`]. A rendering then ends by its own deadline alone, which bounds
/// all that a template does which was rendered in time when it was loaded.
pub fn render_on_this_thread() {
    RENDERS_HERE.set(Here::All);
}

/// From now on what takes little is rendered on this thread where it asks for that. Whoever started it gave it
/// [`LITTLE_STACK_BYTES`].
pub fn render_little_on_this_thread() {
    RENDERS_HERE.set(Here::Little);
}

type Work = Box<dyn FnOnce() + Send>;

/// Threads that wait.
static IDLE: Mutex<Vec<SyncSender<Work>>> = Mutex::new(Vec::new());

/// Why there is no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// The work goes on, for nobody.
    #[error("it does not end in time")]
    Overdue,
    /// Too much of the same owner's work is overdue, so that nothing was begun.
    #[error("earlier renderings of it have not ended yet")]
    Refused,
    /// The work panicked.
    #[error("the template engine panicked")]
    Panicked,
    /// The system gives no thread.
    #[error("the system gives no thread for it")]
    NoThread,
}

/// Counts the work of one owner that is over its time.
#[derive(Debug, Default)]
pub(super) struct Overdue(Arc<AtomicUsize>);

impl Overdue {
    /// Does `work` on a thread with a deep stack: this one, if it renders itself, else another one, for which it waits at most
    /// `time`.
    pub(super) fn run<T: Send + 'static>(
        &self,
        time: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Failure> {
        if self.0.load(Relaxed) >= MAX_OVERDUE {
            return Err(Failure::Refused);
        }
        if RENDERS_HERE.get() == Here::All {
            return caught(work);
        }
        let (result, receiver) = sync_channel(1);
        let (late, is_late) = (self.0.clone(), Arc::new(AtomicUsize::new(0)));
        let seen_late = is_late.clone();
        hand_over(Box::new(move || {
            let done = catch_unwind(AssertUnwindSafe(work));
            // Nobody takes what comes too late.
            let _ = result.send(done);
            if is_late.fetch_add(1, Relaxed) > 0 {
                late.fetch_sub(1, Relaxed);
            }
        }))?;
        match receiver.recv_timeout(time) {
            Ok(done) => done.map_err(|_| Failure::Panicked),
            Err(RecvTimeoutError::Disconnected) => Err(Failure::Panicked),
            Err(RecvTimeoutError::Timeout) => {
                self.0.fetch_add(1, Relaxed);
                if seen_late.fetch_add(1, Relaxed) > 0 {
                    // It has just ended after all.
                    self.0.fetch_sub(1, Relaxed);
                }
                Err(Failure::Overdue)
            }
        }
    }
}

/// Does `work` that takes little on this thread; `None` where none is done, or it panicked.
pub(super) fn run_little<T>(work: impl FnOnce() -> T) -> Option<T> {
    if RENDERS_HERE.get() == Here::Nothing { None } else { caught(work).ok() }
}

fn caught<T>(work: impl FnOnce() -> T) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| Failure::Panicked)
}

/// Gives work to a thread that waits, or to a new one.
fn hand_over(mut work: Work) -> Result<(), Failure> {
    while let Some(thread) = idle(|threads| threads.pop()) {
        match thread.send(work) {
            Ok(()) => return Ok(()),
            Err(unsent) => work = unsent.0,
        }
    }
    let thread = std::thread::Builder::new().name("template".to_owned()).stack_size(STACK_BYTES);
    thread.spawn(move || serve(work)).map(drop).map_err(|_| Failure::NoThread)
}

fn serve(first: Work) {
    first();
    loop {
        let (sender, receiver) = sync_channel::<Work>(1);
        let waits = idle(|threads| {
            let waits = threads.len() < MAX_IDLE;
            threads.extend(waits.then_some(sender));
            waits
        });
        match receiver.recv() {
            Ok(work) if waits => work(),
            _ => return,
        }
    }
}

fn idle<T>(change: impl FnOnce(&mut Vec<SyncSender<Work>>) -> T) -> T {
    change(&mut IDLE.lock().expect("no code panics while it holds the threads: this is a bug"))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_thread_that_renders_itself_hands_nothing_over() {
        let rendering = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(|| {
            render_on_this_thread();
            let overdue = Overdue::default();
            let own = std::thread::current().id();
            assert_eq!(overdue.run(LONG, || std::thread::current().id()), Ok(own));
            assert_eq!(overdue.run(LONG, || -> u8 { panic!("on purpose") }), Err(Failure::Panicked));
        });
        rendering.expect("starts").join().expect("holds");
        let own = std::thread::current().id();
        assert_ne!(Overdue::default().run(LONG, || std::thread::current().id()), Ok(own));
    }

    #[test]
    fn a_thread_that_renders_little_hands_the_rest_over() {
        assert_eq!(run_little(|| 1), None);
        let rendering = std::thread::spawn(|| {
            render_little_on_this_thread();
            let own = std::thread::current().id();
            assert_eq!(run_little(|| std::thread::current().id()), Some(own));
            assert_eq!(run_little(|| -> u8 { panic!("on purpose") }), None);
            assert_ne!(Overdue::default().run(LONG, || std::thread::current().id()), Ok(own));
        });
        rendering.join().expect("holds");
    }

    #[test]
    fn work_has_a_deep_stack_and_its_panics_are_failures() {
        #[inline(never)]
        fn deep(levels: usize) -> usize {
            let bytes = std::hint::black_box([1u8; 1024]);
            if levels == 0 { 0 } else { deep(levels - 1) + usize::from(std::hint::black_box(bytes)[levels % 1024]) }
        }
        let overdue = Overdue::default();
        // A usual thread has 2 MiB.
        assert_eq!(overdue.run(LONG, || deep(10_000)), Ok(10_000));
        let panics = overdue.run(LONG, || std::panic::resume_unwind(Box::new("script")));
        assert_eq!(panics, Err::<(), _>(Failure::Panicked));
        assert_eq!(overdue.run(LONG, || 1), Ok(1));
    }

    #[test]
    fn work_that_does_not_end_holds_two_threads_at_most() {
        let overdue = Overdue::default();
        let (end, ends) = channel::<()>();
        let ends = Arc::new(Mutex::new(ends));
        for _ in 0..MAX_OVERDUE {
            let ends = ends.clone();
            let endless = move || drop(ends.lock().map(|ends| ends.recv()));
            assert_eq!(overdue.run(Duration::from_millis(1), endless), Err(Failure::Overdue));
        }
        assert_eq!(overdue.run(LONG, || 1), Err(Failure::Refused));
        assert_eq!(Overdue::default().run(LONG, || 1), Ok(1), "others are not held up");
        drop(end);
        while overdue.0.load(Relaxed) > 0 {
            std::thread::yield_now();
        }
        assert_eq!(overdue.run(LONG, || 1), Ok(1));
    }
}
