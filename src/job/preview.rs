//! A preview of a clip on its way, as a small file that the job's events carry.
//!
//! Owns: its format, and that it is small. Does not know: sessions, feeds, wire types.

use std::sync::Arc;

use tale_models::request::Frame;

use super::Progress;
use crate::media::{MediaError, PictureFormat, encode_picture, within};

/// Longest side; a VAE that shrinks frames by eight gives smaller ones of most clips.
const MAX_SIDE: usize = 256;
/// Of a picture that is a guess, and soon replaced.
const COMPRESSION: u8 = 85;
/// Format of the file.
pub const FORMAT: PictureFormat = PictureFormat::Jpeg;

/// One of them.
#[derive(Debug, Clone)]
pub struct Preview {
    /// Its number among those of the job, from 0.
    pub index: usize,
    /// How far the job was.
    pub progress: Progress,
    /// Width and height in pixels.
    pub size: (usize, usize),
    /// The file.
    pub bytes: Arc<[u8]>,
}

impl Preview {
    /// Of what a session shows, after `progress`.
    pub fn new(index: usize, progress: Progress, frame: &Frame) -> Result<Self, MediaError> {
        let small = within(frame, MAX_SIDE)?;
        let bytes = encode_picture(&small, FORMAT, Some(COMPRESSION), None)?.into();
        Ok(Self { index, progress, size: (small.width, small.height), bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::decode_picture;

    #[test]
    fn a_preview_is_small_whatever_the_latents_are() {
        for (frame, expected) in [((104, 60), (104, 60)), ((1280, 720), (256, 144)), ((100, 4000), (6, 256))] {
            // Noise, which compresses worst.
            let pixels = 3 * frame.0 * frame.1;
            let rgb = (0..pixels as u64).map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect();
            let frame = Frame { width: frame.0, height: frame.1, rgb };
            let preview = Preview::new(0, Progress::default(), &frame).expect("encoded");
            let shown = decode_picture(&preview.bytes).expect("a picture").frame;
            assert_eq!((shown.width, shown.height), expected);
            assert_eq!(preview.size, expected);
            assert!(preview.bytes.len() < 64 << 10, "{} bytes", preview.bytes.len());
        }
    }
}
