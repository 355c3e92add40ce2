//! One picture as bytes: PNG, JPEG or WebP.

use std::io::Cursor;

use ffmpeg_next::{Dictionary, Packet, codec, encoder};
use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::error::{EncodingError, ImageFormatHint};
use image::{ExtendedColorType, ImageEncoder, ImageError, ImageFormat};
use tale_models::request::Frame;

use super::ffmpeg::{Filters, frame_duration, to_rgb24};
use super::{MediaError, Result, SOFTWARE, check_frame};

/// JPEG quality when the caller names none: without visible loss, at a third of the bytes of 100.
const DEFAULT_JPEG_QUALITY: u8 = 95;

/// WebP's lossy pixels are BT.601 in limited range (RFC 6386, section 9.2).
const WEBP_FILTERS: &str =
    "scale=out_color_matrix=bt601:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp,format=yuv420p";

/// File formats of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PictureFormat {
    /// Lossless.
    Png,
    /// Lossy, 8 bits.
    Jpeg,
    /// Lossless without `compression`, lossy with it.
    Webp,
}

impl PictureFormat {
    /// The format that a file name's extension (without the dot, any case) stands for.
    pub fn from_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "png" => Some(Self::Png),
            "jpg" | "jpeg" => Some(Self::Jpeg),
            "webp" => Some(Self::Webp),
            _ => None,
        }
    }

    /// The name that the OpenAI API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::Webp => "webp",
        }
    }

    /// Media type for HTTP.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }
}

impl std::fmt::Display for PictureFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Most bytes of a compressed text in a PNG file that somebody hands us.
const MAX_TEXT_BYTES: usize = 8 << 20;

/// Encodes one picture. The same frame, text and version give the same bytes.
///
/// `text` is a keyword and what a PNG file says under it (UTF-8, in an `iTXt` chunk before the pixels), with the name and
/// version of this program beside it; without it no metadata is written. JPEG and WebP carry no text.
///
/// `compression` is `output_compression` of the OpenAI API: 0 (smallest) to 100 (best), the quality of JPEG and lossy
/// WebP. Without it JPEG has quality 95 and WebP is lossless. PNG loses nothing and takes only 100.
pub fn encode_picture(
    frame: &Frame,
    format: PictureFormat,
    compression: Option<u8>,
    text: Option<(&str, String)>,
) -> Result<Vec<u8>> {
    check_frame(frame)?;
    check_compression(format, compression)?;
    let mut bytes = Vec::new();
    match (format, compression) {
        (PictureFormat::Png, _) => write_png(frame, text, &mut bytes)?,
        (PictureFormat::Webp, None) => write(frame, format, WebPEncoder::new_lossless(&mut bytes))?,
        (PictureFormat::Webp, Some(quality)) => bytes = encode_lossy_webp(frame, quality)?,
        (PictureFormat::Jpeg, quality) => {
            // The encoder counts from 1.
            let quality = quality.unwrap_or(DEFAULT_JPEG_QUALITY).max(1);
            write(frame, format, JpegEncoder::new_with_quality(&mut bytes, quality))?;
        }
    }
    Ok(bytes)
}

fn check_compression(format: PictureFormat, compression: Option<u8>) -> Result<()> {
    let Some(compression) = compression else { return Ok(()) };
    let allowed = match format {
        PictureFormat::Png if compression != 100 => "png is lossless: only 100 is allowed",
        _ if compression > 100 => "allowed: 0 to 100",
        _ => return Ok(()),
    };
    Err(MediaError::Compression { format, compression, allowed })
}

/// Width and height as the encoders count.
fn size_u32(frame: &Frame) -> Result<(u32, u32)> {
    let bad = |_| MediaError::BadFrame { width: frame.width, height: frame.height, bytes: frame.rgb.len() };
    Ok((u32::try_from(frame.width).map_err(bad)?, u32::try_from(frame.height).map_err(bad)?))
}

/// Fast compression and adaptive filters: what the image crate, which writes no texts, would use.
fn write_png(frame: &Frame, text: Option<(&str, String)>, bytes: &mut Vec<u8>) -> Result<()> {
    let (width, height) = size_u32(frame)?;
    let mut encoder = png::Encoder::new(bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    encoder.set_filter(png::Filter::Adaptive);
    let write = || {
        if let Some((keyword, text)) = text {
            encoder.add_text_chunk("Software".to_owned(), SOFTWARE.to_owned())?;
            encoder.add_itxt_chunk(keyword.to_owned(), text)?;
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&frame.rgb)?;
        writer.finish()
    };
    write().map_err(|source: png::EncodingError| MediaError::Picture {
        format: PictureFormat::Png,
        size: (frame.width, frame.height),
        source: ImageError::Encoding(EncodingError::new(ImageFormatHint::Exact(ImageFormat::Png), source)),
    })
}

/// The same picture in another size, smooth between its pixels.
pub fn resized(frame: &Frame, width: usize, height: usize) -> Result<Frame> {
    check_frame(frame)?;
    let (from, to) = (size_u32(frame)?, size_u32(&Frame { width, height, rgb: Vec::new() })?);
    let small =
        image::RgbImage::from_raw(from.0, from.1, frame.rgb.clone()).expect("its bytes were counted: this is a bug");
    let large = image::imageops::resize(&small, to.0, to.1, image::imageops::FilterType::Triangle);
    Ok(Frame { width, height, rgb: large.into_raw() })
}

/// What a PNG file says under `keyword`, whichever kind of text chunk says it; `None` when it says nothing.
pub fn read_png_text(bytes: &[u8], keyword: &str) -> Result<Option<String>> {
    let read = || {
        let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
        // Some programs move texts behind the pixels.
        reader.finish()?;
        let info = reader.info();
        if let Some(chunk) = info.utf8_text.iter().find(|chunk| chunk.keyword == keyword) {
            let mut chunk = chunk.clone();
            chunk.decompress_text_with_limit(MAX_TEXT_BYTES)?;
            return chunk.get_text().map(Some);
        }
        if let Some(chunk) = info.compressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword) {
            let mut chunk = chunk.clone();
            chunk.decompress_text_with_limit(MAX_TEXT_BYTES)?;
            return chunk.get_text().map(Some);
        }
        let plain = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword);
        Ok(plain.map(|chunk| chunk.text.clone()))
    };
    read().map_err(|source| MediaError::NotPng { source })
}

fn write(frame: &Frame, format: PictureFormat, encoder: impl ImageEncoder) -> Result<()> {
    let size = (frame.width, frame.height);
    let (width, height) = size_u32(frame)?;
    encoder.write_image(&frame.rgb, width, height, ExtendedColorType::Rgb8).map_err(|source| MediaError::Picture {
        format,
        size,
        source,
    })
}

/// The image crate writes lossless WebP only; libwebp, through FFmpeg, writes the other kind. Its one packet is a
/// whole file.
fn encode_lossy_webp(frame: &Frame, quality: u8) -> Result<Vec<u8>> {
    let mut filters = Filters::new(frame.width, frame.height, 1, WEBP_FILTERS)?;
    filters.push(&to_rgb24(frame, frame.width, frame.height))?;
    filters.flush()?;
    let picture = filters.pull()?.ok_or(MediaError::Empty)?;

    let name = "libwebp";
    let codec = encoder::find_by_name(name).ok_or(MediaError::MissingInFfmpeg { name })?;
    let mut settings =
        codec::Context::new_with_codec(codec).encoder().video().map_err(MediaError::ffmpeg("set WebP up"))?;
    settings.set_width(picture.width());
    settings.set_height(picture.height());
    settings.set_format(picture.format());
    settings.set_time_base(frame_duration(1));
    let options = Dictionary::from_iter([("quality", quality.to_string().as_str())]);
    let mut encoder = settings.open_with(options).map_err(MediaError::ffmpeg("open its WebP encoder"))?;

    let encoded = || MediaError::ffmpeg("encode WebP");
    encoder.send_frame(&picture).map_err(encoded())?;
    encoder.send_eof().map_err(encoded())?;
    let mut packet = Packet::empty();
    encoder.receive_packet(&mut packet).map_err(encoded())?;
    Ok(packet.data().unwrap_or_default().to_vec())
}
