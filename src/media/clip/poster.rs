//! The poster of an mp4: a small picture beside the frames, which players show of the file (its cover, `covr`).
//!
//! Owns: what it shows, and how a muxer is told. Does not know: how frames are coded.

use ffmpeg_next::{Packet, codec, ffi, format};
use tale_models::request::Frame;

use crate::media::picture::{PictureFormat, encode_picture};
use crate::media::stills::{THUMBNAIL_SIDE, size_within, within};
use crate::media::{MediaError, Result};

/// As of a thumbnail.
const COMPRESSION: u8 = 85;
/// The stream of the frames is the first.
const STREAM: usize = 1;

/// Adds the stream behind that of the frames, which have so many pixels. It is no track of the file.
pub fn add_stream(muxer: &mut format::context::Output, size: (usize, usize)) -> Result<()> {
    let none = ffmpeg_next::encoder::find(codec::Id::None);
    let mut stream = muxer.add_stream(none).map_err(MediaError::ffmpeg("add a poster"))?;
    let (width, height) = size_within(size, THUMBNAIL_SIDE);
    // SAFETY: the stream is ours, and its header is not written yet, which is when these fields may be set.
    unsafe {
        let stream = &mut *stream.as_mut_ptr();
        stream.disposition = ffi::AV_DISPOSITION_ATTACHED_PIC;
        let parameters = &mut *stream.codecpar;
        parameters.codec_type = ffi::AVMediaType::AVMEDIA_TYPE_VIDEO;
        parameters.codec_id = ffi::AVCodecID::AV_CODEC_ID_MJPEG;
        parameters.width = width as i32;
        parameters.height = height as i32;
    }
    Ok(())
}

/// Writes the poster, of the first `frame`, before any packet of the frames.
pub fn write(muxer: &mut format::context::Output, frame: &Frame) -> Result<()> {
    let small = within(frame, THUMBNAIL_SIDE)?;
    let mut packet = Packet::copy(&encode_picture(&small, PictureFormat::Jpeg, Some(COMPRESSION), None)?);
    packet.set_stream(STREAM);
    packet.set_flags(codec::packet::Flags::KEY);
    packet.set_pts(Some(0));
    packet.set_dts(Some(0));
    packet.write(muxer).map(drop).map_err(MediaError::ffmpeg("write the poster"))
}
