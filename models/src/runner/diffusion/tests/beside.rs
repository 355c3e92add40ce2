//! Guidance branches on a second device.

use std::sync::Mutex;

use super::*;
use crate::device::DeviceSpec;
use crate::parallel::{Followers, Seat};
use crate::runner::diffusion::beside::{DeviceBeside, follow};

type Passes = Arc<Mutex<Vec<(Expert, usize)>>>;

/// A runner with a second device, and the passes there.
fn runner(max_rows: usize) -> (DiffusionRunner<Toy>, Passes) {
    let passes = Passes::default();
    let devices = [0, 1].map(|part| DeviceSpec::CpuPart { part, of: 2 });
    let of_second = passes.clone();
    let make = move |_: Seat| Ok(follow(Toy { passes: of_second.clone(), ..Toy::new() }, candle_core::Device::Cpu));
    let (_, followers) = Followers::start(&devices, make).expect("started");
    followers.ready().expect("ready");
    let beside = DeviceBeside::new(followers);
    (DiffusionRunner::new(Toy::new(), max_rows).with_device_beside(Some(beside)), passes)
}

fn rows(passes: &Passes) -> Vec<usize> {
    passes.lock().expect("no panic").iter().map(|(_, rows)| *rows).collect()
}

#[test]
fn each_device_predicts_a_branch_and_nothing_else_changes() {
    let requests = || [guided("a fox", "rain"), request("no guidance", 2), guided("a long tale", "and its negative")];
    let expected: Vec<_> = requests().map(alone).into();
    let (mut runner, passes) = runner(8);
    for (id, request) in (0..).zip(requests()) {
        submit(&mut runner, id, request);
    }
    let all = run(&mut runner);
    for (id, expected) in (0..).zip(&expected) {
        assert_eq!(&all[&id], expected, "{id}");
    }
    // Three steps of two negative branches, and of three positive ones.
    assert_eq!(rows(&passes), [2, 2, 2]);
    assert_eq!(rows(&runner.model().passes), [3, 3, 3]);
}

#[test]
fn no_pass_has_more_rows_than_one_device_may_have() {
    let (mut runner, passes) = runner(1);
    submit(&mut runner, 1, guided("a fox", "rain"));
    assert_eq!(run(&mut runner)[&1], alone(guided("a fox", "rain")));
    assert_eq!(rows(&passes), [1, 1, 1]);
}

#[test]
fn an_error_there_ends_the_step_and_a_panic_all_steps() {
    let (mut runner, _) = runner(4);
    submit(&mut runner, 1, guided("a fox", "error in denoise"));
    let ended = |all: HashMap<u64, Vec<String>>, id: u64| all[&id].last().cloned().unwrap_or_default();
    assert!(ended(run(&mut runner), 1).starts_with("failed"));
    assert!(runner.problem().is_none(), "the device lives");
    submit(&mut runner, 2, guided("a fox", "rain"));
    assert_eq!(ended(run(&mut runner), 2), "finished");
    submit(&mut runner, 3, guided("a fox", "panic in denoise"));
    assert!(ended(run(&mut runner), 3).starts_with("failed"));
    let problem = runner.problem().expect("the device has ended").to_string();
    assert!(problem.contains("cpu:1/2: "), "{problem}");
    submit(&mut runner, 4, guided("a fox", "rain"));
    assert!(ended(run(&mut runner), 4).starts_with("failed"), "nothing is guided any more");
}

#[test]
fn sessions_that_are_cancelled_leave_nothing_there() {
    for steps in 0..6 {
        let (mut runner, _) = runner(4);
        submit(&mut runner, 1, guided("a fox", "rain"));
        (0..steps).for_each(|_| drop(step(&mut runner)));
        runner.cancel(SessionId(1));
        assert_empty(&runner);
        submit(&mut runner, 1, guided("a fox", "snow and rain"));
        assert_eq!(run(&mut runner)[&1], alone(guided("a fox", "snow and rain")));
    }
}
