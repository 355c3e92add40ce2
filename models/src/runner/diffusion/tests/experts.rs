//! Two denoisers of one model, by noise level.

use super::*;

/// Below half of the noise the second one predicts.
fn two_experts() -> Toy {
    Toy { boundary: Some(500.0), ..Toy::new() }
}

/// Expert and rows of each forward pass.
type Passes = Vec<(Expert, usize)>;

fn run_of(requests: &[DiffusionRequest]) -> (HashMap<u64, Vec<String>>, Passes) {
    let mut runner = DiffusionRunner::new(two_experts(), 4);
    for (id, request) in requests.iter().enumerate() {
        submit(&mut runner, id as u64, request.clone());
    }
    let events = run(&mut runner);
    let passes = runner.model().passes.lock().expect("lock").clone();
    (events, passes)
}

fn steps(request: DiffusionRequest, steps: usize) -> DiffusionRequest {
    with(request, |request| request.sampling.num_inference_steps = steps)
}

/// One solver and one conditioning for both: `x + p / 2` with `p = ±(c - x t / 1000)`.
#[test]
fn the_second_expert_goes_on_where_the_first_left_off() {
    let request = steps(request("twelve chars", 7), 4);
    let mut runner = DiffusionRunner::new(two_experts(), 4);
    submit(&mut runner, 1, request);
    (0..5).for_each(|_| drop(step(&mut runner)));
    let Stage::Latents(found) = &runner.session(SessionId(1)).stage else { panic!("denoising is done") };
    assert_eq!(*runner.model().passes.lock().expect("lock"), [(0, 1), (0, 1), (0, 1), (1, 1)]);
    assert_eq!(found.expert, 1, "who made the last step decodes");
    let expected = TorchGenerator::new(7).randn(4).into_iter().map(|mut x| {
        for (timestep, sign) in [(1.0, 1.0), (0.75, 1.0), (0.5, 1.0), (0.25, -1.0)] {
            x += 0.5 * sign * (12.0 - x * timestep);
        }
        x
    });
    assert!(values(&found.values).into_iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-4));
}

#[test]
fn rows_of_different_experts_never_share_a_pass() {
    let requests = [steps(request("four steps", 1), 4), steps(guided("two", "no"), 2), steps(request("six", 3), 6)];
    let (events, passes) = run_of(&requests);
    let rows = |expert| passes.iter().filter(|(of, _)| *of == expert).map(|(_, rows)| *rows).sum::<usize>();
    // Timesteps of at least 500: 1000, 750, 500; 1000, 500 in two rows; 1000, 833, 667, 500.
    assert_eq!((rows(0), rows(1)), (3 + 2 * 2 + 4, 1 + 2));
    assert!(passes.iter().any(|(_, rows)| *rows > 1), "{passes:?}");
    for (id, request) in requests.iter().enumerate() {
        assert_eq!(events[&(id as u64)], run_of(std::slice::from_ref(request)).0[&0], "session {id}");
    }
}

#[test]
fn an_image_may_leave_nothing_to_the_first_expert() {
    let late = with(edit([9; 4], None, 1), |request| {
        request.sampling.num_inference_steps = 4;
        request.edit = request.edit.take().map(|edit| Edit { first_step: 3, ..edit });
    });
    let (events, passes) = run_of(&[late]);
    assert_eq!(passes, [(1, 1)]);
    assert!(events[&0].contains(&"denoise 1/1".to_owned()));
}
