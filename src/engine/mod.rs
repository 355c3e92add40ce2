//! The step-wise engine.
