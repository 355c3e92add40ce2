//! Size and length of what is made.

/// Size of an image, or size and length of a video.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Canvas {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Frames of a video; 1 for an image.
    pub num_frames: usize,
    /// Frames per second of a video; 0 for an image.
    pub fps: usize,
}
