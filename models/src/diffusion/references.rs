//! Images whose look is followed.

use std::sync::Arc;

use crate::request::Frame;

/// Pictures that an IP-Adapter follows.
#[derive(Debug, Clone, PartialEq)]
pub struct References {
    /// In any sizes, at least one.
    pub images: Vec<Arc<Frame>>,
    /// How much of them is followed: diffusers' scale of the adapter.
    pub scale: f64,
}
