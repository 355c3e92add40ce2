//! Pictures as they come and go: pixels in memory, and masks over them. Plain data, no tensors.

/// One picture, or one frame of a clip: 8-bit RGB, rows top to bottom, no padding.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub rgb: Vec<u8>,
}

impl Frame {
    /// A picture of nothing.
    pub fn black(width: usize, height: usize) -> Self {
        Self { width, height, rgb: vec![0; 3 * width * height] }
    }
}

/// From this value on a pixel of a mask is made anew (diffusers: not under one half).
pub const MASK_THRESHOLD: u8 = 128;

/// Which pixels of a picture are made anew: those of [`MASK_THRESHOLD`] and more. Rows top to bottom, no padding.
#[derive(Clone, PartialEq, Eq)]
pub struct Mask {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// `height * width` bytes.
    pub grey: Vec<u8>,
}

// Requests are printed; their pictures are not.
impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frame({}x{}, {} bytes)", self.width, self.height, self.rgb.len())
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mask({}x{}, {} bytes)", self.width, self.height, self.grey.len())
    }
}
