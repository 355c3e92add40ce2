//! Which sessions of a device may share denoising steps, as far as their requests tell.
//!
//! Owns: names of shapes, and how many sessions have each. Does not know: which of them do share steps; a wrong guess costs time and
//! nothing else. Pure.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use tale_models::Request;

/// Of a picture or a clip: what its latents and layers must agree in with others' to share a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape(u64);

impl Shape {
    /// Of a request; `None` of text, of which all shares steps.
    pub fn of(request: &Request) -> Option<Self> {
        let Request::Diffusion(request) = request else { return None };
        let mut hasher = DefaultHasher::new();
        let canvas = &request.canvas;
        (canvas.width, canvas.height, canvas.num_frames).hash(&mut hasher);
        request.cache.is_some().hash(&mut hasher);
        for term in &request.loras {
            (&term.name, term.weight.to_bits()).hash(&mut hasher);
        }
        Some(Self(hasher.finish()))
    }
}

/// How many sessions have which shape; none stands here with none.
#[derive(Debug, Default)]
pub struct Shapes(HashMap<Shape, usize>);

impl Shapes {
    /// A session more.
    pub fn add(&mut self, shape: Shape) {
        *self.0.entry(shape).or_default() += 1;
    }

    /// A session less.
    pub fn remove(&mut self, shape: Shape) {
        if let Some(count) = self.0.get_mut(&shape) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&shape);
            }
        }
    }

    /// Sessions of this shape.
    pub fn count(&self, shape: Shape) -> usize {
        self.0.get(&shape).copied().unwrap_or(0)
    }
}
