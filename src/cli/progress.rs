//! Progress bars on a terminal; silence in a pipe.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tale_models::request::Phase;

/// Whether a person watches stderr.
pub fn is_watched() -> bool {
    stderr().is_terminal()
}

/// What is being loaded. Hidden when nobody watches, like everything of this file (indicatif asks the terminal).
pub fn loading() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} loading {msg}").expect("a constant: this is a bug");
    let bar = ProgressBar::new_spinner().with_style(style);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// One bar per phase of a picture or clip.
pub struct Phases {
    current: Option<(Phase, ProgressBar)>,
}

impl Phases {
    /// Nothing is shown yet.
    pub fn new() -> Self {
        Self { current: None }
    }

    /// `done` of `total` steps of `phase` are done.
    pub fn update(&mut self, phase: Phase, done: usize, total: usize) {
        let bar = match self.current.take() {
            Some((same, bar)) if same == phase => bar,
            _ => phase_bar(phase, total),
        };
        bar.set_position(done as u64);
        if done == total {
            bar.finish();
        }
        self.current = Some((phase, bar));
    }
}

fn phase_bar(phase: Phase, total: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:>10} {wide_bar} {pos}/{len} [{elapsed}, {eta} left]")
        .expect("a constant: this is a bug");
    let bar = ProgressBar::new(total as u64).with_style(style).with_message(phase.as_str());
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}
