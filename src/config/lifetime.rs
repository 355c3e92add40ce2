//! When a model comes and goes, as far as configurations say it.
//!
//! Owns: the keys. Does not know: how models are loaded.

use std::num::NonZeroU32;

use serde::Deserialize;

/// When a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoadTime {
    /// When the server starts.
    #[default]
    Start,
    /// With the first request for it.
    OnDemand,
}

/// What is said of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lifetime {
    /// When it is loaded.
    pub load: Option<LoadTime>,
    /// Seconds without a request after which it is unloaded.
    pub idle_unload_seconds: Option<NonZeroU32>,
}

/// Takes the value of a key; false where it is none, or comes once too often.
type Take = fn(&mut Lifetime, &str) -> bool;

impl Lifetime {
    /// The keys on the command line, each with what takes its value.
    pub(super) const KEYS: [(&'static str, Take); 2] = [
        ("load", |lifetime, when| match when {
            "start" => lifetime.load.replace(LoadTime::Start).is_none(),
            "on-demand" => lifetime.load.replace(LoadTime::OnDemand).is_none(),
            _ => false,
        }),
        ("idle_unload_seconds", |lifetime, seconds| {
            seconds.parse().is_ok_and(|seconds| lifetime.idle_unload_seconds.replace(seconds).is_none())
        }),
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_model_are_taken_once() {
        let set = |key: &str, value: &str, lifetime: &mut Lifetime| {
            let (_, set) = Lifetime::KEYS.iter().find(|(known, _)| *known == key).expect("a key");
            set(lifetime, value)
        };
        let mut lifetime = Lifetime::default();
        assert!(set("load", "on-demand", &mut lifetime) && set("idle_unload_seconds", "600", &mut lifetime));
        let expected = Lifetime { load: Some(LoadTime::OnDemand), idle_unload_seconds: NonZeroU32::new(600) };
        assert_eq!(lifetime, expected);
        for (key, value) in [("load", "start"), ("load", "never"), ("idle_unload_seconds", "1")] {
            assert!(!set(key, value, &mut lifetime), "{key}={value}");
        }
        assert!(!set("idle_unload_seconds", "0", &mut Lifetime::default()));
    }
}
