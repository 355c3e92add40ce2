//! A scripted runner for tests and benches.
