//! Looks at a connection again at once when it is called while it is being looked at.
//!
//! hyper, a handler and the wire call one another several times in a request, mostly from within the task that drives all
//! three. tokio would put that task behind others each time, and wake a second thread to take it from there, which costs
//! more than everything else that a short request needs. Does not know: what is looked at.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Looks in one turn, at most; then other tasks have theirs. A request whose body has come with its head needs three.
const MAX_LOOKS: usize = 8;

/// Stands between a task and what it polls.
#[derive(Debug)]
pub(super) struct Rousing {
    calls: Arc<Calls>,
    /// Of `calls`.
    waker: Waker,
}

#[derive(Debug, Default)]
struct Calls(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The task looks, and will see a call.
    is_looking: bool,
    /// There was one since it began to.
    is_called: bool,
    task: Option<Waker>,
}

impl Rousing {
    pub(super) fn new() -> Self {
        let calls = Arc::new(Calls::default());
        Self { waker: Waker::from(calls.clone()), calls }
    }

    /// What `look` comes to, which is asked again for as long as its waker is called meanwhile.
    pub(super) fn poll<T>(
        &self,
        context: &mut Context<'_>,
        mut look: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        self.calls.begin(context.waker());
        for _ in 0..MAX_LOOKS {
            if let Poll::Ready(result) = look(&mut Context::from_waker(&self.waker)) {
                return Poll::Ready(result);
            }
            if self.calls.may_rest() {
                return Poll::Pending;
            }
        }
        self.calls.state().is_looking = false;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Calls {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, task: &Waker) {
        let mut state = self.state();
        state.is_looking = true;
        // What called before is seen by the first look.
        state.is_called = false;
        match &mut state.task {
            Some(known) => known.clone_from(task),
            none => *none = Some(task.clone()),
        }
    }

    /// Whether nobody has called since this was asked last; then calls wake the task from now on.
    fn may_rest(&self) -> bool {
        let mut state = self.state();
        state.is_looking = std::mem::take(&mut state.is_called);
        !state.is_looking
    }
}

impl Wake for Calls {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut state = self.state();
        if state.is_looking {
            state.is_called = true;
            return;
        }
        let task = state.task.clone();
        drop(state);
        if let Some(task) = task {
            task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[derive(Default)]
    struct Counted(AtomicUsize);

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    /// How often was looked, of `calls` looks that call themselves, and how often the task was woken.
    fn looks(calls: usize) -> (usize, usize) {
        let task = Arc::new(Counted::default());
        let waker = Waker::from(task.clone());
        let mut looks = 0;
        let polled = Rousing::new().poll(&mut Context::from_waker(&waker), |context| {
            looks += 1;
            if looks <= calls {
                context.waker().wake_by_ref();
            }
            Poll::<()>::Pending
        });
        assert!(polled.is_pending());
        (looks, task.0.load(Relaxed))
    }

    #[test]
    fn calls_from_within_are_followed_at_once_and_wake_nobody() {
        assert_eq!(looks(0), (1, 0));
        assert_eq!(looks(2), (3, 0));
        assert_eq!(looks(MAX_LOOKS - 1), (MAX_LOOKS, 0));
    }

    #[test]
    fn one_that_calls_itself_for_ever_lets_others_have_their_turn() {
        assert_eq!(looks(usize::MAX), (MAX_LOOKS, 1));
    }

    #[test]
    fn calls_from_outside_wake_the_task() {
        let task = Arc::new(Counted::default());
        let waker = Waker::from(task.clone());
        let rousing = Rousing::new();
        let mut kept = None;
        for woken in 1..=2 {
            let polled = rousing.poll(&mut Context::from_waker(&waker), |context| {
                kept = Some(context.waker().clone());
                Poll::<()>::Pending
            });
            assert!(polled.is_pending());
            kept.take().expect("it was looked").wake();
            assert_eq!(task.0.load(Relaxed), woken);
        }
    }

    #[test]
    fn a_call_from_another_thread_is_never_lost() {
        let rousing = Rousing::new();
        for _ in 0..2000 {
            let task = Arc::new(Counted::default());
            let waker = Waker::from(task.clone());
            let news = Arc::new(AtomicUsize::new(0));
            let mut caller = None;
            let mut look = |context: &mut Context<'_>| {
                let (news, waker) = (news.clone(), context.waker().clone());
                if caller.is_none() {
                    let told = news.clone();
                    caller = Some(std::thread::spawn(move || {
                        told.store(1, Relaxed);
                        waker.wake();
                    }));
                }
                if news.load(Relaxed) == 1 { Poll::Ready(()) } else { Poll::Pending }
            };
            let mut polled = rousing.poll(&mut Context::from_waker(&waker), &mut look);
            while polled.is_pending() {
                while task.0.swap(0, Relaxed) == 0 {
                    std::thread::yield_now();
                }
                polled = rousing.poll(&mut Context::from_waker(&waker), &mut look);
            }
            caller.expect("it was looked").join().expect("it calls");
        }
    }
}
