//! Pictures that clients send: PNG, JPEG and WebP to RGB.
//!
//! What a file says of its size is believed before a pixel is: nothing is allocated for pictures that are refused. A
//! picture with 16 bits per value keeps the upper eight, as in PIL; a palette and grey become RGB; what the EXIF data
//! say of the camera's orientation is done. Embedded colour profiles are not applied.

use std::io::Cursor;

use image::codecs::jpeg::JpegDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, Limits};
use tale_models::request::{Frame, MASK_THRESHOLD, Mask};

use super::jpeg;

/// Most pixels on a side of an input picture.
pub const MAX_INPUT_SIDE: usize = 16_384;
/// Most pixels of an input picture.
pub const MAX_INPUT_PIXELS: usize = 1 << 25;
/// Bytes that a decoder may take for itself, for chunks that say how long they are.
const MAX_DECODER_BYTES: u64 = 64 << 20;
/// A picture is there twice while its colours are told from its alpha.
const COPIES: usize = 2;
/// Formats in the words of an error.
const FORMATS: &str = "a PNG, JPEG or WebP picture";

/// What is wrong with an input picture. Texts follow the name of the field that it came in.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// Nothing that is read here.
    #[error("must be {FORMATS}")]
    Unknown,
    /// A picture format, but another one.
    #[error("is a {found} file; must be {FORMATS}")]
    Format {
        /// Its name.
        found: &'static str,
    },
    /// A file of one of the formats that is torn or worse.
    #[error("cannot be read as {format}: {problem}")]
    Broken {
        /// The format.
        format: &'static str,
        /// In the decoder's words.
        problem: String,
    },
    /// More pixels than are taken.
    #[error("has {width}x{height} pixels; at most {MAX_INPUT_SIDE} on a side and {MAX_INPUT_PIXELS} in all are taken")]
    TooLarge {
        /// Pixels.
        width: usize,
        /// Pixels.
        height: usize,
    },
    /// More than one picture.
    #[error("is animated; must be one picture")]
    Animated,
    /// Colours that need a profile to mean something.
    #[error("is a JPEG in CMYK; must be in RGB or grey")]
    Cmyk,
    /// The caller has no memory for it.
    #[error("needs more memory than there is")]
    NoMemory,
    /// A mask that changes nothing.
    #[error("marks nothing: the parts to make anew are where alpha is 0 (or white where there is no alpha)")]
    EmptyMask,
}

/// An input picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputPicture {
    /// Its colours, whatever its alpha says.
    pub frame: Frame,
    /// Opacity of each pixel, where the file says it.
    pub alpha: Option<Vec<u8>>,
}

impl InputPicture {
    /// What is transparent, if anything is.
    pub fn transparent(&self) -> Option<Mask> {
        let grey: Vec<u8> = self.alpha.as_ref()?.iter().map(|alpha| 255 - alpha).collect();
        let is_any = grey.iter().any(|value| *value >= MASK_THRESHOLD);
        is_any.then_some(Mask { width: self.frame.width, height: self.frame.height, grey })
    }

    /// The mask that it is: what is transparent is made anew (OpenAI's way), or what is white in a picture without alpha
    /// (diffusers' way).
    pub fn into_mask(self) -> Result<Mask, InputError> {
        if self.alpha.is_some() {
            return self.transparent().ok_or(InputError::EmptyMask);
        }
        let Frame { width, height, rgb } = self.frame;
        let grey: Vec<u8> = rgb.chunks_exact(3).map(luma).collect();
        match grey.iter().any(|value| *value >= MASK_THRESHOLD) {
            true => Ok(Mask { width, height, grey }),
            false => Err(InputError::EmptyMask),
        }
    }
}

/// As PIL makes grey of colours (ITU-R BT.601), in 16 bits after the point.
fn luma(pixel: &[u8]) -> u8 {
    let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
    ((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16) as u8
}

/// Decodes one picture.
pub fn decode_picture(bytes: &[u8]) -> Result<InputPicture, InputError> {
    decode_picture_within(bytes, &mut |_| true)
}

/// Decodes one picture, if `reserve` has the bytes of memory that it takes, which it is asked for before a pixel is
/// decoded.
pub fn decode_picture_within(bytes: &[u8], reserve: &mut dyn FnMut(usize) -> bool) -> Result<InputPicture, InputError> {
    let format = image::guess_format(bytes).map_err(|_| InputError::Unknown)?;
    match format {
        ImageFormat::Png => {
            let mut limits = Limits::no_limits();
            limits.max_alloc = Some(MAX_DECODER_BYTES);
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), limits).map_err(broken(format))?;
            check_still(decoder.is_apng().map_err(broken(format))?)?;
            decode(decoder, format, reserve)
        }
        ImageFormat::WebP => {
            let decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(broken(format))?;
            check_still(decoder.has_animation())?;
            decode(decoder, format, reserve)
        }
        ImageFormat::Jpeg if jpeg::components(bytes) == Some(4) => Err(InputError::Cmyk),
        ImageFormat::Jpeg if !jpeg::is_whole(bytes) => {
            Err(InputError::Broken { format: name(format), problem: "the file is truncated".to_owned() })
        }
        ImageFormat::Jpeg => decode(JpegDecoder::new(Cursor::new(bytes)).map_err(broken(format))?, format, reserve),
        ImageFormat::Gif | ImageFormat::Tiff | ImageFormat::Bmp => Err(InputError::Format { found: name(format) }),
        _ => Err(InputError::Unknown),
    }
}

fn check_still(is_animated: bool) -> Result<(), InputError> {
    if is_animated { Err(InputError::Animated) } else { Ok(()) }
}

fn decode(
    mut decoder: impl ImageDecoder,
    format: ImageFormat,
    reserve: &mut dyn FnMut(usize) -> bool,
) -> Result<InputPicture, InputError> {
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    if width.max(height) > MAX_INPUT_SIDE || width * height > MAX_INPUT_PIXELS {
        return Err(InputError::TooLarge { width, height });
    }
    let decoded_bytes = usize::try_from(decoder.total_bytes()).unwrap_or(usize::MAX);
    if !reserve(decoded_bytes.saturating_mul(COPIES)) {
        return Err(InputError::NoMemory);
    }
    let orientation = decoder.orientation().map_err(broken(format))?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(broken(format))?;
    picture.apply_orientation(orientation);
    Ok(split(picture))
}

/// Colours and alpha, eight bits each.
fn split(picture: DynamicImage) -> InputPicture {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let color = picture.color();
    let is_wide = color.bytes_per_pixel() > color.channel_count();
    let upper = |values: Vec<u16>| values.into_iter().map(|value| (value >> 8) as u8).collect::<Vec<u8>>();
    if !color.has_alpha() {
        let rgb = if is_wide { upper(picture.into_rgb16().into_raw()) } else { picture.into_rgb8().into_raw() };
        return InputPicture { frame: Frame { width, height, rgb }, alpha: None };
    }
    let rgba = if is_wide { upper(picture.into_rgba16().into_raw()) } else { picture.into_rgba8().into_raw() };
    let rgb = rgba.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
    let alpha = rgba.chunks_exact(4).map(|pixel| pixel[3]).collect();
    InputPicture { frame: Frame { width, height, rgb }, alpha: Some(alpha) }
}

fn broken(format: ImageFormat) -> impl Fn(ImageError) -> InputError {
    move |problem| InputError::Broken { format: name(format), problem: problem.to_string() }
}

fn name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Png => "PNG",
        ImageFormat::Jpeg => "JPEG",
        ImageFormat::WebP => "WebP",
        ImageFormat::Gif => "GIF",
        ImageFormat::Tiff => "TIFF",
        ImageFormat::Bmp => "BMP",
        _ => "picture",
    }
}
