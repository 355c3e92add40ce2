//! The threads of the ranks that follow, and how the one that leads works with them.
//!
//! Owns: a thread for each rank but the first, from its start to its end; commands; the end of the group when a rank fails. Does
//! not know: what a command asks for.
//!
//! The leading rank does not wait for the others between commands: it meets them where they add something up. A rank that fails or
//! panics ends the group with its cause: half of a step is computed on every device, so that what is there can serve nothing more.

use std::any::Any;
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use super::exchange::{Exchange, MemoryLink};
use super::{Rank, check_devices};
use crate::device::{DeviceSpec, on_threads_of};
use crate::error::{Error, Result};

/// A rank's place in its group, before it has a device.
#[derive(Debug, Clone)]
pub struct Seat {
    exchange: Arc<Exchange>,
    index: usize,
    of: usize,
    spec: DeviceSpec,
}

impl Seat {
    /// The device that it is for.
    pub fn spec(&self) -> DeviceSpec {
        self.spec
    }

    /// The rank, on the thread of its device.
    pub fn rank(&self) -> Rank {
        Rank::new(self.index, self.of, Arc::new(MemoryLink::new(&self.exchange, self.index)))
    }

    fn fail(&self, error: &Error) {
        self.exchange.fail(format!("{}: {error}", self.spec));
    }
}

/// What a rank that follows does with a command.
pub type Follow<C> = Box<dyn FnMut(C) -> Result<()>>;

/// The ranks that follow. Dropping them ends their threads.
#[derive(Debug)]
pub struct Followers<C> {
    leader: Seat,
    threads: Vec<Follower<C>>,
}

#[derive(Debug)]
struct Follower<C> {
    /// The commands in it are those of steps that the leading rank has not ended, and one.
    commands: Option<Sender<C>>,
    is_ready: Receiver<Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl<C: Debug + Clone + Send + 'static> Followers<C> {
    /// Starts a thread for each of the devices but the first, each of which makes with `make` what it needs; [`Followers::ready`]
    /// waits for them. The seat is that of the leading rank.
    pub fn start(
        devices: &[DeviceSpec],
        make: impl Fn(Seat) -> Result<Follow<C>> + Clone + Send + 'static,
    ) -> Result<(Seat, Self)> {
        check_devices(devices)?;
        let of = devices.len();
        let exchange = Exchange::new(of);
        let seat = |index: usize| Seat { exchange: exchange.clone(), index, of, spec: devices[index] };
        let mut followers = Self { leader: seat(0), threads: Vec::with_capacity(of - 1) };
        for index in 1..of {
            followers.threads.push(Follower::start(seat(index), make.clone())?);
        }
        Ok((seat(0), followers))
    }

    /// Waits until all of them are ready; the error of the first that is not.
    pub fn ready(&self) -> Result<()> {
        let ended = |_| Error::Device("the thread of a rank has ended".into());
        self.threads.iter().try_for_each(|thread| thread.is_ready.recv().map_err(ended)?)
    }

    /// Has all ranks do what `command` says, the leading one by `lead`. An error or a panic of any rank ends the group; it is said
    /// now and from now on.
    pub fn together<T>(&self, command: &C, lead: impl FnOnce() -> Result<T>) -> Result<T> {
        self.tell(command)?;
        guarded(lead).map_err(|error| {
            self.leader.fail(&error);
            self.problem().unwrap_or(error)
        })
    }

    /// Has the ranks that follow do what `command` says, and does not wait for it.
    pub fn tell(&self, command: &C) -> Result<()> {
        if let Some(problem) = self.problem() {
            return Err(problem);
        }
        for follower in &self.threads {
            // An error means that its thread has ended, which the exchange knows.
            let _ = follower.commands.as_ref().map(|commands| commands.send(command.clone()));
        }
        Ok(())
    }

    /// Why the group computes nothing any more, if so.
    pub fn problem(&self) -> Option<Error> {
        self.leader.exchange.problem()
    }

    /// The same of a group that is known to end: waits until the rank that ends it has said why.
    pub fn wait_for_problem(&self) -> Error {
        self.leader.exchange.wait_for_problem()
    }
}

impl<C: Send + 'static> Follower<C> {
    fn start(seat: Seat, make: impl FnOnce(Seat) -> Result<Follow<C>> + Send + 'static) -> Result<Self> {
        let (commands, receiver) = channel();
        let (tell, is_ready) = channel();
        let spec = seat.spec;
        let work = move || {
            let end = End(seat.clone());
            let ran = on_threads_of(spec, move || run(&seat, make, &receiver, &tell));
            if let Err(error) = ran {
                end.0.fail(&error);
            }
        };
        let thread = Builder::new().name(format!("rank-{spec}")).spawn(work);
        let thread = thread.map_err(|error| Error::Device(format!("{spec}: {error}")))?;
        Ok(Self { commands: Some(commands), is_ready, thread: Some(thread) })
    }
}

/// Ends the group with its thread, however that ends; a cause that was said before stays.
struct End(Seat);

impl Drop for End {
    fn drop(&mut self) {
        self.0.exchange.fail(format!("{}: its thread has ended", self.0.spec));
    }
}

/// Follows until nobody leads any more, or until something fails.
fn run<C>(
    seat: &Seat,
    make: impl FnOnce(Seat) -> Result<Follow<C>>,
    commands: &Receiver<C>,
    tell: &Sender<Result<()>>,
) {
    let mut follow = match guarded(|| make(seat.clone())) {
        Ok(follow) => follow,
        Err(error) => {
            seat.fail(&error);
            drop(tell.send(Err(error)));
            return;
        }
    };
    // The receiver is gone only when the leading rank is.
    let _ = tell.send(Ok(()));
    while let Ok(command) = commands.recv() {
        if let Err(error) = guarded(|| follow(command)) {
            tracing::error!(device = %seat.spec, %error, "a rank failed; its group is ended");
            return seat.fail(&error);
        }
    }
}

impl<C> Drop for Followers<C> {
    fn drop(&mut self) {
        self.leader.exchange.fail("the group has been ended");
        self.threads.iter_mut().for_each(|follower| drop(follower.commands.take()));
        for thread in self.threads.iter_mut().filter_map(|follower| follower.thread.take()) {
            if thread.join().is_err() {
                tracing::error!("the thread of a rank had panicked");
            }
        }
    }
}

/// Runs what a rank does; a panic becomes an error. What the rank has is not used afterwards.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| Err(Error::Panicked(said(&*payload))))
}

fn said(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    const DEVICES: [DeviceSpec; 2] = [DeviceSpec::CpuPart { part: 0, of: 2 }, DeviceSpec::CpuPart { part: 1, of: 2 }];

    /// Each rank gives its index and what the command says; a follower fails and panics where it says so.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Ask {
        Sum(f32),
        Fail,
        Panic,
    }

    fn sum(rank: &Rank, value: f32) -> Result<f32> {
        let own = Tensor::new(&[value * (1 + rank.index()) as f32], &Device::Cpu)?;
        Ok(rank.sum(&own)?.to_vec1()?[0])
    }

    fn group() -> (Rank, Followers<Ask>) {
        let make = |seat: Seat| {
            let rank = seat.rank();
            let follow = move |ask| match ask {
                Ask::Sum(value) => sum(&rank, value).map(drop),
                Ask::Fail => Err(Error::Device("a cause".into())),
                Ask::Panic => panic!("a panic of a test of ranks"),
            };
            Ok(Box::new(follow) as Follow<Ask>)
        };
        let (seat, followers) = Followers::start(&DEVICES, make).expect("started");
        followers.ready().expect("ready");
        (seat.rank(), followers)
    }

    #[test]
    fn all_ranks_do_what_one_is_asked_for() {
        let (rank, followers) = group();
        for value in [1.0, 2.5] {
            let found = followers.together(&Ask::Sum(value), || sum(&rank, value)).expect("computed");
            assert_eq!(found, 3.0 * value);
        }
        assert!(followers.problem().is_none());
    }

    #[test]
    fn a_rank_that_fails_or_panics_ends_its_group_with_its_cause() {
        for (ask, cause) in [(Ask::Fail, "cpu:1/2: device: a cause"), (Ask::Panic, "a panic of a test of ranks")] {
            let (rank, followers) = group();
            // The leading rank waits for a sum to which the other does not come.
            let error = followers.together(&ask, || sum(&rank, 1.0)).expect_err("it failed").to_string();
            assert!(error.contains(cause), "{error}");
            let error = followers.together(&Ask::Sum(1.0), || sum(&rank, 1.0)).expect_err("it has ended").to_string();
            assert!(error.contains(cause), "{error}");
        }
    }

    #[test]
    fn a_leader_that_fails_or_panics_ends_its_group_too() {
        let leads: [fn() -> Result<()>; 2] = [|| Err(Error::Device("a cause".into())), || panic!("a cause")];
        for lead in leads {
            let (_rank, followers) = group();
            // The other one waits for a sum; dropping the group waits for its thread.
            let error = followers.together(&Ask::Sum(1.0), lead).expect_err("it failed").to_string();
            assert!(error.contains("cpu:0/2: ") && error.contains("a cause"), "{error}");
        }
    }

    #[test]
    fn a_rank_that_cannot_begin_says_why() {
        let make = |_seat: Seat| Err::<Follow<Ask>, _>(Error::Device("no such thing".into()));
        let (_, followers) = Followers::start(&DEVICES, make).expect("started");
        assert!(followers.ready().expect_err("not ready").to_string().contains("no such thing"));
        assert!(Followers::<Ask>::start(&DEVICES[..1], |_| Ok(Box::new(|_| Ok(())) as Follow<Ask>)).is_err());
    }
}
