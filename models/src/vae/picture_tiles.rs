//! A picture on its way through an encoder, as a whole or in overlapping tiles.
//!
//! Owns: the picture, which tile comes next, and what became of those before it. Does not know: any encoder.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::tiling::{Mosaic, Tiling, Window};
use crate::error::Result;
use crate::request::Frame;

/// A picture between two steps of its encoding.
#[derive(Debug)]
pub struct PictureEncoding {
    picture: Arc<Frame>,
    /// `None` where it is encoded as a whole.
    mosaic: Option<Mosaic>,
}

/// Calls of [`PictureEncoding::next`] for a picture of this height and width.
pub fn num_steps(tiling: Option<Tiling>, height: usize, width: usize) -> usize {
    tiling.map_or(1, |tiling| tiling.count(height, width))
}

impl PictureEncoding {
    /// Before the first tile.
    pub fn new(picture: Arc<Frame>, tiling: Option<Tiling>) -> Self {
        let mosaic = tiling.map(|tiling| Mosaic::new(tiling, picture.height, picture.width));
        Self { picture, mosaic }
    }

    /// Has the whole picture encoded, or its next tile: f32 pixels `[1, 3, height, width]` in -1..=1 on `device`, to `[1, c, h,
    /// w]`. That of the whole picture once it was the last.
    pub fn next(&mut self, device: &Device, encode: impl FnOnce(Tensor) -> Result<Tensor>) -> Result<Option<Tensor>> {
        let Some(mosaic) = &mut self.mosaic else {
            let whole = Window::whole(self.picture.height, self.picture.width);
            return encode(pixels(&self.picture, whole, device)?).map(Some);
        };
        mosaic.push(encode(pixels(&self.picture, mosaic.next_window(), device)?)?)
    }
}

fn pixels(picture: &Frame, window: Window, device: &Device) -> Result<Tensor> {
    let values = super::pixels(picture, window);
    Ok(Tensor::from_vec(values, (1, 3, window.height, window.width), device)?)
}
