//! Threads that compute for requests, so that those that wait for sockets never do.
//!
//! Owns: the threads, their two queues and the bound of these, and what becomes of work whose request has gone. Does not
//! know: what is computed. Work that waits for files or for a device does not belong here.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use tale_models::cancel::CancelToken;
use tale_models::chat_template::threads::{STACK_BYTES, render_on_this_thread};
use tokio::sync::oneshot;

/// Work on so many bytes is done at once where it is asked for: the way to another thread takes longer.
const MAX_INLINE_BYTES: usize = 8 << 10;
/// Work on more bytes is long: it leaves a thread free for short work, and short work goes first.
const MAX_SHORT_BYTES: usize = 256 << 10;
/// Fewest threads: one is always there for short work.
const MIN_THREADS: usize = 2;

/// The threads. Cheap to clone; they end with the last clone.
#[derive(Debug, Clone)]
pub struct Compute(Arc<Owner>);

#[derive(Debug)]
struct Owner(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queues: Mutex<Queues>,
    work_came: Condvar,
    /// Most threads that do long work at once.
    max_long: usize,
    max_waiting: usize,
}

#[derive(Default)]
struct Queues {
    short: VecDeque<Box<dyn Work>>,
    long: VecDeque<Box<dyn Work>>,
    /// Threads that do long work now.
    running_long: usize,
    is_closed: bool,
}

impl std::fmt::Debug for Queues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Queues({} short, {} long)", self.short.len(), self.long.len())
    }
}

/// Why there is no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ComputeError {
    /// Too much waits already.
    #[error("{limit} pieces of work wait to be computed")]
    Full {
        /// The bound.
        limit: usize,
    },
    /// The work panicked; the panic has been logged.
    #[error("the work panicked")]
    Panicked,
}

impl Compute {
    /// Starts so many threads, two at least. More than `max_waiting` pieces of work at a time are refused.
    pub fn new(threads: usize, max_waiting: usize) -> io::Result<Self> {
        let threads = threads.max(MIN_THREADS);
        let queues = Mutex::new(Queues::default());
        let shared = Arc::new(Shared { queues, work_came: Condvar::new(), max_long: threads - 1, max_waiting });
        // Before the first thread, so that those that started end where a later one cannot.
        let compute = Self(Arc::new(Owner(shared.clone())));
        for _ in 0..threads {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name("tale-compute".into()).stack_size(STACK_BYTES);
            thread.spawn(move || {
                render_on_this_thread();
                shared.work();
            })?;
        }
        Ok(compute)
    }

    /// The result of `work` on `bytes` bytes, computed here where that is little, else on a thread of the pool.
    pub async fn run_sized<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&CancelToken) -> T + Send + 'static,
    ) -> Result<T, ComputeError> {
        if bytes <= MAX_INLINE_BYTES {
            return Ok(work(&CancelToken::default()));
        }
        self.run(bytes, work).await
    }

    /// The result of `work` on `bytes` bytes, computed on a thread of the pool. Work that has not begun when the future is
    /// dropped never does; what has begun is told by its token, for which long work looks now and then.
    pub async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&CancelToken) -> T + Send + 'static,
    ) -> Result<T, ComputeError> {
        let (sender, result) = oneshot::channel();
        let cancelled = CancelToken::default();
        // The client's leaving drops this function.
        let _waits = cancelled.cancel_on_drop();
        self.0.0.push(bytes > MAX_SHORT_BYTES, Box::new(Task { work, sender, cancelled }))?;
        result.await.map_err(|_| ComputeError::Panicked)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.work_came.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().expect("no code panics while it holds the queues: this is a bug")
    }

    fn push(&self, is_long: bool, work: Box<dyn Work>) -> Result<(), ComputeError> {
        let mut queues = self.lock();
        if queues.len() >= self.max_waiting {
            queues.forget_unwanted();
        }
        if queues.len() >= self.max_waiting {
            return Err(ComputeError::Full { limit: self.max_waiting });
        }
        if is_long {
            queues.long.push_back(work)
        } else {
            queues.short.push_back(work)
        }
        drop(queues);
        self.work_came.notify_one();
        Ok(())
    }

    /// What a thread does until the pool is dropped.
    fn work(&self) {
        let mut queues = self.lock();
        loop {
            if let Some((work, is_long)) = queues.next(self.max_long) {
                queues.running_long += usize::from(is_long);
                drop(queues);
                work.run();
                queues = self.lock();
                queues.running_long -= usize::from(is_long);
            } else if queues.is_closed {
                return;
            } else {
                queues = self.work_came.wait(queues).expect("no code panics while it holds the queues: this is a bug");
            }
        }
    }
}

impl Queues {
    fn len(&self) -> usize {
        self.short.len() + self.long.len()
    }

    /// The next piece of work, and whether it is long.
    fn next(&mut self, max_long: usize) -> Option<(Box<dyn Work>, bool)> {
        if let Some(work) = self.short.pop_front() {
            return Some((work, false));
        }
        let may_be_long = self.running_long < max_long;
        self.long.pop_front_if(|_| may_be_long).map(|work| (work, true))
    }

    fn forget_unwanted(&mut self) {
        self.short.retain(|work| work.is_wanted());
        self.long.retain(|work| work.is_wanted());
    }
}

/// A piece of work in a queue.
trait Work: Send {
    fn is_wanted(&self) -> bool;

    /// Computes and hands over the result, unless nobody waits for it. Never panics.
    fn run(self: Box<Self>);
}

struct Task<T, F> {
    work: F,
    sender: oneshot::Sender<T>,
    cancelled: CancelToken,
}

impl<T: Send, F: FnOnce(&CancelToken) -> T + Send> Work for Task<T, F> {
    fn is_wanted(&self) -> bool {
        !self.cancelled.is_cancelled()
    }

    fn run(self: Box<Self>) {
        if !self.is_wanted() {
            return;
        }
        let Self { work, sender, cancelled } = *self;
        // A sender that is dropped without a result says that there was a panic.
        if let Ok(result) = catch_unwind(AssertUnwindSafe(|| work(&cancelled))) {
            // Nobody may wait any more.
            let _ = sender.send(result);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::task::{Context, Poll, Waker};

    use super::*;

    const LONG: usize = MAX_SHORT_BYTES + 1;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().expect("starts").block_on(future)
    }

    /// Starts `future`, which then waits for its result.
    fn start<T>(future: &mut std::pin::Pin<Box<dyn Future<Output = T> + '_>>) {
        assert!(matches!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Pending));
    }

    #[test]
    fn little_work_stays_on_its_thread_and_more_does_not() {
        let compute = Compute::new(2, 9).expect("starts");
        let thread = |bytes| block_on(compute.run_sized(bytes, |_| std::thread::current().id()));
        assert_eq!(thread(MAX_INLINE_BYTES), Ok(std::thread::current().id()));
        assert_ne!(thread(MAX_INLINE_BYTES + 1), Ok(std::thread::current().id()));
    }

    #[test]
    fn a_panic_is_an_error_and_its_thread_lives() {
        let compute = Compute::new(2, 9).expect("starts");
        for _ in 0..5 {
            assert_eq!(block_on(compute.run(0, |_| panic!("on purpose"))), Err::<(), _>(ComputeError::Panicked));
        }
        assert_eq!(block_on(compute.run(0, |_| 7)), Ok(7));
    }

    #[test]
    fn long_work_leaves_a_thread_for_short_work() {
        let compute = Compute::new(2, 9).expect("starts");
        let (go, wait) = mpsc::channel::<()>();
        let mut first: std::pin::Pin<Box<dyn Future<Output = _>>> = Box::pin(compute.run(LONG, move |_| wait.recv()));
        let mut second: std::pin::Pin<Box<dyn Future<Output = _>>> = Box::pin(compute.run(LONG, |_| "long"));
        start(&mut first);
        start(&mut second);
        assert_eq!(block_on(compute.run(0, |_| "short")), Ok("short"));
        go.send(()).expect("the first waits for it");
        assert_eq!(block_on(second), Ok("long"));
        assert!(block_on(first).expect("no panic").is_ok());
    }

    #[test]
    fn work_of_requests_that_have_gone_is_never_begun_and_makes_room() {
        let compute = Compute::new(2, 2).expect("starts");
        let (go, wait) = mpsc::channel::<()>();
        let mut running: std::pin::Pin<Box<dyn Future<Output = _>>> = Box::pin(compute.run(LONG, move |cancelled| {
            wait.recv().expect("sent");
            !cancelled.is_cancelled()
        }));
        start(&mut running);
        while !compute.0.0.lock().long.is_empty() {
            std::thread::yield_now();
        }
        let begun = Arc::new(Mutex::new(Vec::new()));
        let note = |name: &'static str| {
            let begun = begun.clone();
            move |_: &CancelToken| begun.lock().expect("sound").push(name)
        };
        let mut gone: std::pin::Pin<Box<dyn Future<Output = _>>> = Box::pin(compute.run(LONG, note("gone")));
        let mut stays: std::pin::Pin<Box<dyn Future<Output = _>>> = Box::pin(compute.run(LONG, note("stays")));
        start(&mut gone);
        start(&mut stays);
        assert_eq!(block_on(compute.run(LONG, |_| ())), Err(ComputeError::Full { limit: 2 }));
        drop(gone);
        let mut late: std::pin::Pin<Box<dyn Future<Output = _>>> = Box::pin(compute.run(LONG, note("late")));
        start(&mut late);
        go.send(()).expect("it runs");
        assert_eq!(block_on(async { (stays.await, late.await) }), (Ok(()), Ok(())));
        assert_eq!(*begun.lock().expect("sound"), ["stays", "late"]);
        assert_eq!(block_on(running), Ok(true));
    }
}
