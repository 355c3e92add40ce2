//! Benches that need tensors: the steps of a model beside the roofs of its device.
//!
//! `tale bench` prints what comes from here. The table of single operations is in `tale-kernels`.

pub mod kernels;
mod memory;
pub mod step;

pub use tale_kernels::bench::Roofs;
