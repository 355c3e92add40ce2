//! What a runner says that a session needs is what it takes at its peak: measured with a counting allocator, in a
//! binary of its own so that nothing else allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tale_models::card::DiffusionOptions;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::family::LoadOptions;
use tale_models::request::{Event, Events, Request, SessionId};
use tale_models::testing::repository;
use tale_models::{ModelCard, load};

/// Bytes allocated now, and the most since the last reset.
static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; the counters are only counters.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is also the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `alloc` above with this layout, that is from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Strings, queues and thread bookkeeping, which nobody plans for.
const SMALL_CHANGE_BYTES: usize = 1 << 20;

/// One run, so that the counters belong to it.
#[test]
fn sessions_take_at_most_their_footprint() {
    // Scratch memory belongs to threads, not to sessions: with two of them it is small change on every machine.
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global().expect("the first use of the pool");
    for (case, width, height, num_frames, vae_tiling) in [
        ("wan-a", Some(256), Some(160), Some(5), None),
        ("wan-b", Some(128), Some(128), Some(13), None),
        ("wan-b", Some(64), Some(64), Some(49), None),
        ("flux-dev", Some(256), Some(192), None, None),
        ("sdxl-a", Some(256), Some(192), None, None),
        ("sdxl-b", Some(128), Some(160), None, None),
        ("flux-dev", Some(768), Some(512), None, Some(true)),
    ] {
        let prompt = "A cat".to_owned();
        let options = DiffusionOptions { prompt, width, height, num_frames, vae_tiling, ..Default::default() };
        let (footprint, peak) = run(case, DiffusionOptions { num_inference_steps: Some(3), ..options });
        eprintln!("{case} {width:?}x{height:?}x{num_frames:?}: footprint {footprint}, peak {peak} bytes");
        assert!(peak <= footprint + SMALL_CHANGE_BYTES, "{case}: {peak} bytes at the peak, {footprint} planned");
        assert!(footprint <= 3 * peak + SMALL_CHANGE_BYTES, "{case}: {footprint} planned, {peak} bytes at the peak");
    }
}

/// Footprint and measured peak of one session, in bytes.
fn run(case: &str, options: DiffusionOptions) -> (usize, usize) {
    let checkpoint = repository().join("tests/goldens").join(case).join("checkpoint");
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("the CPU");
    let mut model = load(&checkpoint, &placement, &LoadOptions::default(), &mut |_| ()).expect("a sound checkpoint");
    let ModelCard::Diffusion(card) = &model.card else { panic!("{case} makes pictures or clips") };
    let request = Request::Diffusion(card.resolve(options, 1).expect("a valid request"));
    let footprint = model.runner.plan(&request).peak_bytes();

    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    model.runner.submit(SessionId(1), request).expect("is accepted");
    let mut events = Events::default();
    while model.runner.next().is_some() {
        model.runner.step(&mut events).expect("a step");
        // Frames are the client's once they are out.
        assert!(!events.drain().any(|(_, event)| matches!(event, Event::Failed(_))), "{case} fails");
    }
    (footprint, PEAK.load(Relaxed) - before)
}
