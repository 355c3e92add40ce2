//! Nodes, clients and a keeper over a store's real code, in virtual time: everything that happens follows from a seed.
//!
//! Every call of a store has a point before and one behind at which others go on, at which its caller may be dropped as a crash
//! drops it, or stand still for longer than its leases last. What the store answers is held against books of what may be
//! ([`books`]). A schedule that fails prints its seed; `TALE_SIMULATION_SEED=N cargo test simulation` runs that one.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::clock::Hand;
use super::conformance::{Kind, Rig, open};
use super::*;

mod actors;
mod books;

use books::Books;

/// Random numbers that a seed gives (SplitMix64; Steele, Lea and Flood, 2014).
#[derive(Debug)]
struct Dice(Cell<u64>);

impl Dice {
    fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to below `end`.
    fn below(&self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in so many times.
    fn once_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// Up to so long.
    fn up_to(&self, longest: Duration) -> Duration {
        Duration::from_micros(self.below(longest.as_micros() as u64))
    }
}

/// How calls of a store are waited for: the one in memory never waits.
type Drive = dyn Fn(Pin<Box<dyn Future<Output = ()> + '_>>);

/// What all tasks of a schedule share.
struct World {
    dice: Dice,
    /// Microseconds since 1970, of the store's clock.
    now: Cell<i64>,
    /// When the task that runs wants to go on.
    wake: Cell<i64>,
    /// Whether things still go wrong.
    is_rough: Cell<bool>,
    rig: Rig,
    books: RefCell<Books>,
    drive: Box<Drive>,
}

/// Gives others their turn once.
#[derive(Default)]
struct Turn(bool);

impl Future for Turn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl World {
    async fn sleep(&self, time: Duration) {
        self.wake.set(self.now.get() + time.as_micros() as i64);
        Turn::default().await;
    }

    /// A point at which others go on.
    async fn point(&self) {
        self.sleep(Duration::ZERO).await;
    }

    /// Makes a call of the store, which happens in a moment, and notes in the books what came of it. It may get lost on its way there, or its answer on the
    /// way back.
    async fn call<T>(
        &self,
        call: impl AsyncFnOnce(&dyn JobStore) -> Result<T, StoreError>,
        note: impl FnOnce(&mut Books, &Result<T, StoreError>),
    ) -> Result<T, StoreError> {
        let lost = || Err(StoreError::Unavailable("lost".to_owned()));
        self.point().await;
        if self.is_rough.get() && self.dice.once_in(40) {
            return lost();
        }
        let mut answer = None;
        (self.drive)(Box::pin(async { answer = Some(call(&*self.rig.store).await) }));
        let answer = answer.expect("the call was waited for");
        note(&mut self.books.borrow_mut(), &answer);
        self.point().await;
        if self.is_rough.get() && self.dice.once_in(40) {
            return lost();
        }
        answer
    }

    fn advance_to(&self, now: i64) {
        self.rig.advance(Duration::from_micros((now - self.now.get()) as u64));
        self.now.set(now);
        self.books.borrow_mut().now = now;
    }
}

/// Something that goes on by itself.
struct Task {
    /// Which node it is, if it is one: those crash and stand still.
    node: Option<u32>,
    wake: i64,
    future: Pin<Box<dyn Future<Output = ()>>>,
}

/// How large schedules are.
#[derive(Clone, Copy)]
struct Size {
    nodes: u32,
    jobs: u32,
    rough_seconds: u64,
}

const START: i64 = 1_700_000_000_000_000;

/// Runs the schedule of a seed; panics where it breaks a promise.
fn run(seed: u64, size: Size, rig: Rig, drive: Box<Drive>) {
    let dice = Dice(Cell::new(seed));
    rig.stop_clock(START);
    let world = Rc::new(World {
        dice,
        now: Cell::new(START),
        wake: Cell::new(0),
        is_rough: Cell::new(true),
        rig,
        books: RefCell::new(Books { now: START, ..Books::default() }),
        drive,
    });
    let mut tasks = vec![
        Task { node: None, wake: START, future: Box::pin(actors::client(world.clone(), size.jobs)) },
        Task { node: None, wake: START, future: Box::pin(actors::keeper(world.clone())) },
        Task { node: None, wake: START, future: Box::pin(actors::postman(world.clone())) },
    ];
    let start = |node, wake| Task { node: Some(node), wake, future: Box::pin(actors::node(world.clone(), node)) };
    tasks.extend((0..size.nodes).map(|node| start(node, START)));
    let calm_at = START + (size.rough_seconds * 1_000_000) as i64;
    let give_up_at = calm_at + 3_600_000_000;
    let mut context = Context::from_waker(Waker::noop());
    while !(world.now.get() > calm_at && world.books.borrow().is_done()) {
        let now = world.now.get();
        assert!(now < give_up_at, "not all ends: {:?}", world.books.borrow());
        world.is_rough.set(now < calm_at);
        let ready: Vec<_> = (0..tasks.len()).filter(|at| tasks[*at].wake <= now).collect();
        if ready.is_empty() {
            world.advance_to(tasks.iter().map(|task| task.wake).min().expect("the keeper never ends"));
            continue;
        }
        let at = ready[world.dice.below(ready.len() as u64) as usize];
        if let Some(node) = tasks[at].node.filter(|_| world.is_rough.get()) {
            if world.dice.once_in(150) {
                let wake = now + world.dice.up_to(Duration::from_secs(20)).as_micros() as i64;
                tasks[at] = start(node, wake);
                continue;
            }
            if world.dice.once_in(150) {
                tasks[at].wake = now + world.dice.up_to(Duration::from_secs(90)).as_micros() as i64;
                continue;
            }
        }
        if world.is_rough.get() && world.dice.once_in(500) {
            // People's clocks are put right, or wrong.
            let step = world.dice.up_to(Duration::from_secs(2 * 86400)).as_micros() as i64 - 86_400_000_000;
            world.rig.turn(&|hand: &Hand| hand.step_wall(step));
        }
        let task = &mut tasks[at];
        match task.future.as_mut().poll(&mut context) {
            Poll::Pending => task.wake = world.wake.get(),
            Poll::Ready(()) => drop(tasks.swap_remove(at)),
        }
    }
    drop(tasks);
    actors::audit(&world);
}

/// Polls a call that is done at once.
fn at_once(mut call: Pin<Box<dyn Future<Output = ()> + '_>>) {
    let mut context = Context::from_waker(Waker::noop());
    assert!(call.as_mut().poll(&mut context).is_ready(), "a store in memory waits for nothing");
}

/// A store in memory with few places, so that some orders find none.
fn memory() -> Rig {
    let mut rig = None;
    let retention = Retention { max_active_jobs: 6, ..Retention::default() };
    at_once(Box::pin(async { rig = open(Kind::Memory, retention).await }));
    rig.expect("memory is there")
}

/// Says which seed it was when a schedule fails.
fn with_seed(seed: u64, schedule: impl FnOnce()) {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(schedule));
    if let Err(panic) = result {
        eprintln!("seed {seed}: TALE_SIMULATION_SEED={seed} runs it again");
        std::panic::resume_unwind(panic);
    }
}

fn seed_asked_for() -> Option<u64> {
    std::env::var("TALE_SIMULATION_SEED").ok().map(|seed| seed.parse().expect("a seed is a number"))
}

/// The first of new seeds; each run of the tests has others.
fn fresh_seed() -> u64 {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    clock.as_nanos() as u64
}

#[test]
fn schedules_in_memory_keep_every_promise() {
    let size = |seed: u64| Size { nodes: 2 + (seed % 3) as u32, jobs: 4 + (seed % 5) as u32, rough_seconds: 120 };
    if let Some(seed) = seed_asked_for() {
        return with_seed(seed, || run(seed, size(seed), memory(), Box::new(|call| at_once(call))));
    }
    const SCHEDULES: u64 = 10_000;
    let first = fresh_seed();
    std::thread::scope(|scope| {
        for part in 0..2 {
            scope.spawn(move || {
                for seed in (0..SCHEDULES / 2).map(|at| first.wrapping_add(2 * at + part)) {
                    with_seed(seed, || run(seed, size(seed), memory(), Box::new(|call| at_once(call))));
                }
            });
        }
    });
}

#[test]
fn a_seed_gives_the_same_schedule_again() {
    let told = |seed| {
        let size = Size { nodes: 3, jobs: 6, rough_seconds: 100 };
        let calls = Rc::new(Cell::new(0));
        let counted = calls.clone();
        let drive = move |call: Pin<Box<dyn Future<Output = ()> + '_>>| {
            counted.set(counted.get() + 1);
            at_once(call);
        };
        run(seed, size, memory(), Box::new(drive));
        calls.get()
    };
    assert_eq!(told(7), told(7));
    assert_ne!(told(7), told(8));
}

#[test]
fn schedules_in_a_file_keep_every_promise() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("threads");
    let runtime = Rc::new(runtime);
    let seeds = seed_asked_for().map_or_else(
        || {
            let first = fresh_seed();
            (0..40).map(|at| first.wrapping_add(at)).collect()
        },
        |seed| vec![seed],
    );
    for seed in seeds {
        let retention = Retention { max_active_jobs: 6, ..Retention::default() };
        let rig = runtime.block_on(open(Kind::Sqlite, retention)).expect("a file");
        let waits = runtime.clone();
        let size = Size { nodes: 3, jobs: 5, rough_seconds: 60 };
        with_seed(seed, || run(seed, size, rig, Box::new(move |call| waits.block_on(call))));
    }
}
