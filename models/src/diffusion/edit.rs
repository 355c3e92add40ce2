//! The image that is made into another one.

use std::sync::Arc;

use crate::request::{Frame, Mask};

/// A picture that is made into another one.
#[derive(Debug, Clone, PartialEq)]
pub struct Edit {
    /// The picture, in the width and height of the request.
    pub image: Arc<Frame>,
    /// What is made anew, in the width and height of the request; without it everything is.
    pub mask: Option<Arc<Mask>>,
    /// How far the picture is taken back to noise: 1 all the way.
    pub strength: f64,
    /// Steps of the schedule that are left out, as follows from `strength`; fewer than there are.
    pub first_step: usize,
}
