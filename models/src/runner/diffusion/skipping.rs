//! When a pass through the blocks of a network is answered from what the last computed one has added.
//!
//! Owns: the decision of one guidance branch of one session, and what it has added up. Pure: numbers, no tensors. Does not
//! know: what is kept, how a change is measured. Sources: diffusers `hooks/first_block_cache.py`, `hooks/mag_cache.py`;
//! github.com/ali-vilab/TeaCache. Neither the first nor the last of them has a bound on skips in a row.

use std::sync::Arc;

use crate::diffusion::acceleration::{Cache, Rule};

/// Decides pass after pass.
#[derive(Debug)]
pub struct Skipping {
    cache: Arc<Cache>,
    /// Of the session: 0 is the prompt's, 1 the negative one's.
    branch: usize,
    in_a_row: usize,
    /// Error or weighed change since the last computed pass.
    sum: f64,
    /// Of magnitudes, between the last computed pass and this one.
    ratio: f64,
}

impl Skipping {
    /// Of this guidance branch of a session.
    pub fn new(cache: Arc<Cache>, branch: usize) -> Self {
        Self { cache, branch, in_a_row: 0, sum: 0.0, ratio: 1.0 }
    }

    /// By which rule.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// What it has added up: skips in a row, the sum, the ratio.
    pub fn state(&self) -> (usize, f64, f64) {
        (self.in_a_row, self.sum, self.ratio)
    }

    /// Goes on with what another one of the same rule and branch has added up.
    pub fn go_on_from(&mut self, (in_a_row, sum, ratio): (usize, f64, f64)) {
        (self.in_a_row, self.sum, self.ratio) = (in_a_row, sum, ratio);
    }

    /// Whether the pass of this step may be skipped at all, so that it is worth to measure a change.
    pub fn may_skip(&self, step: usize) -> bool {
        self.cache.threshold() > 0.0 && self.cache.steps.contains(&step) && self.in_a_row < self.cache.max_skips
    }

    /// Whether the pass of this step is skipped. `change` is what was measured, where the rule measures something: NaN where
    /// a value is not finite, and then the pass is computed.
    pub fn skips(&mut self, step: usize, change: Option<f64>) -> bool {
        let skips = self.may_skip(step) && self.is_little(step, change);
        match skips {
            true => self.in_a_row += 1,
            false => self.begin_anew(),
        }
        skips
    }

    fn is_little(&mut self, step: usize, change: Option<f64>) -> bool {
        match &self.cache.rule {
            Rule::FirstBlock { threshold } => change.is_some_and(|change| change < *threshold),
            Rule::MagCache { threshold, ratios } => {
                self.ratio *= ratios[self.branch.min(1)].get(step).copied().unwrap_or(1.0);
                self.sum += (1.0 - self.ratio).abs();
                self.sum <= *threshold
            }
            Rule::TeaCache { threshold, coefficients } => {
                let Some(change) = change else { return false };
                self.sum += polynomial(coefficients, change);
                self.sum < *threshold
            }
        }
    }

    /// As after a computed pass.
    pub fn begin_anew(&mut self) {
        self.in_a_row = 0;
        self.sum = 0.0;
        self.ratio = 1.0;
    }
}

/// Highest power first.
fn polynomial(coefficients: &[f64], x: f64) -> f64 {
    coefficients.iter().fold(0.0, |value, coefficient| value * x + coefficient)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::acceleration::Cache;
    use crate::diffusion::acceleration::published::{HUNYUAN_VIDEO, Setting, WAN_I2V_14B, WAN_T2V_1_3B, WAN_T2V_14B};

    /// For each step what a branch does: `x` computed, `-` skipped.
    fn pattern(cache: &Arc<Cache>, branch: usize, changes: &[f64]) -> String {
        let mut skipping = Skipping::new(cache.clone(), branch);
        let step = |(step, change): (usize, &f64)| if skipping.skips(step, Some(*change)) { '-' } else { 'x' };
        changes.iter().enumerate().map(step).collect()
    }

    fn cache(rule: Rule, max_skips: usize, steps: std::ops::Range<usize>) -> Arc<Cache> {
        Arc::new(Cache::new(rule, max_skips, steps))
    }

    #[test]
    fn the_first_block_is_held_against_the_threshold_and_skips_against_the_bound() {
        let of = |threshold, max_skips, steps| cache(Rule::FirstBlock { threshold }, max_skips, steps);
        assert_eq!(pattern(&of(0.1, 2, 0..9), 0, &[0.05, 0.05, 0.05, 0.05, 0.1, 0.05]), "--x-x-");
        assert_eq!(pattern(&of(0.1, 9, 1..3), 0, &[0.0; 5]), "x--xx");
        assert_eq!(pattern(&of(0.0, 9, 0..9), 0, &[0.0; 3]), "xxx");
        assert_eq!(pattern(&of(0.1, 9, 0..9), 0, &[f64::NAN, 0.0]), "x-");
    }

    #[test]
    fn ratios_multiply_and_their_errors_add_up() {
        let ratios = [vec![1.0, 1.0, 0.95, 0.95, 1.0, 1.1, 0.9], vec![1.0; 7]];
        let of = |max_skips| cache(Rule::MagCache { threshold: 0.06, ratios: ratios.clone() }, max_skips, 1..7);
        // 0, then 0.05, then 0.05 + 0.0975: too much; from there 0 and 0.1: too much; and 0.1 once more.
        assert_eq!(pattern(&of(9), 0, &[0.0; 7]), "x--x-xx");
        assert_eq!(pattern(&of(1), 0, &[0.0; 7]), "x-x-xxx");
        assert_eq!(pattern(&of(3), 1, &[0.0; 7]), "x---x--");
    }

    /// What the published ratios decide by themselves, as the documentation has it.
    #[test]
    fn published_ratios_skip_so_many_passes() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/models.md");
        let text = std::fs::read_to_string(path).expect("docs/models.md is there");
        let mut checked = 0;
        for published in [&WAN_T2V_1_3B, &WAN_T2V_14B, &WAN_I2V_14B, &HUNYUAN_VIDEO] {
            for figure in published.figures {
                let Setting::MagCache(threshold, max_skips) = figure.setting else { continue };
                let [width, height] = figure.size;
                let profile = published.profile(width * height).expect("a profile");
                // As many ratios as steps: none is left out or taken twice.
                let ratios = profile.ratios.expect("ratios").map(<[f64]>::to_vec);
                assert_eq!(ratios.each_ref().map(Vec::len), [figure.steps; 2]);
                let rule = cache(Rule::MagCache { threshold, ratios }, max_skips, figure.steps / 5..figure.steps);
                let skipped =
                    [0, 1].map(|branch| pattern(&rule, branch, &vec![0.0; figure.steps]).matches('-').count());
                assert_eq!(skipped[0], skipped[1], "{}: {figure:?}", published.name);
                let start = format!("| {} | `{}` | {width}x{height} |", published.name, figure.word.as_str());
                let end = format!("| {} of {} |", skipped[0], figure.steps);
                let is_row = |line: &str| line.starts_with(&start) && line.ends_with(&end);
                assert!(text.lines().any(is_row), "docs/models.md lacks {start} ... {end}");
                checked += 1;
            }
        }
        assert_eq!(checked, 12);
    }

    #[test]
    fn weighed_changes_add_up_until_a_pass_is_computed() {
        let rule = Rule::TeaCache { threshold: 1.0, coefficients: vec![2.0, 0.0, 0.1] };
        // 2 x^2 + 0.1: 0.6 and 1.2; 0.1 each; more than the threshold at once.
        let changes = [0.5, 0.5, 0.5, 0.0, 0.0, 1.0, 0.0];
        assert_eq!(pattern(&cache(rule.clone(), 9, 0..7), 0, &changes), "-x---x-");
        assert_eq!(pattern(&cache(rule.clone(), 9, 1..6), 0, &changes), "x-x--xx");
        assert_eq!(pattern(&cache(rule, 9, 0..7), 0, &[f64::NAN, 0.0]), "x-");
    }

    #[test]
    fn nothing_is_skipped_where_nothing_was_measured_but_for_ratios() {
        let mut skipping = Skipping::new(cache(Rule::FirstBlock { threshold: 1.0 }, 9, 0..9), 0);
        assert!(!skipping.skips(0, None));
        let tea = Rule::TeaCache { threshold: 1.0, coefficients: vec![0.0] };
        assert!(!Skipping::new(cache(tea, 9, 0..9), 0).skips(0, None));
        let mag = Rule::MagCache { threshold: 1.0, ratios: [vec![1.0], vec![1.0]] };
        assert!(Skipping::new(cache(mag, 9, 0..9), 0).skips(0, None));
    }
}
