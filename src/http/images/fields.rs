//! The fields of images that are no parameters of the model: how many, and as what files.

use tale_models::diffusion::parameters::PARTIAL_IMAGES;
use tale_models::parameter::{Declaration, Options, Parameter};

use super::Encoding;
use crate::http::cold_start::ALLOW_COLD_START;
use crate::http::diffusion::{MODEL, SIZE};
use crate::http::error::ApiError;
use crate::media::PictureFormat;

/// Most images of one request.
pub const MAX_IMAGES: usize = 10;

static N: Parameter<usize> =
    Parameter::integer("n", 1, MAX_IMAGES, "Images to make; image i has seed + i. 1 when absent.");

static RESPONSE_FORMAT: Parameter<String> = Parameter::choice(
    "response_format",
    &["b64_json"],
    "`b64_json`: this server has no place from which images could be fetched later.",
);

static OUTPUT_FORMAT: Parameter<String> =
    Parameter::choice("output_format", &["png", "jpeg", "webp"], "Format of the files; png when absent.");

static OUTPUT_COMPRESSION: Parameter<usize> = Parameter::integer(
    "output_compression",
    0,
    100,
    "Quality of jpeg and webp, 0 to 100; webp is lossless when absent. A png loses nothing and takes only 100.",
);

static METADATA: Parameter<bool> =
    Parameter::boolean("metadata", "Whether a png says how it was made; true when absent, and impossible for others.");

static STREAM: Parameter<bool> =
    Parameter::boolean("stream", "Answer with server-sent events: previews, then the image. Makes one image.");

/// All of them.
pub(in crate::http) static OWN: &[&Declaration] = &[
    &MODEL.declaration,
    &N.declaration,
    &SIZE.declaration,
    &RESPONSE_FORMAT.declaration,
    &OUTPUT_FORMAT.declaration,
    &OUTPUT_COMPRESSION.declaration,
    &METADATA.declaration,
    &STREAM.declaration,
    &ALLOW_COLD_START.declaration,
];

/// What they say.
pub(super) struct ImageFields {
    pub(super) model: String,
    pub(super) n: usize,
    /// Whether the answer is a stream, which has one image and may have previews.
    pub(super) is_stream: bool,
    pub(super) encoding: Encoding,
}

impl ImageFields {
    pub(super) fn new(options: &Options) -> Result<Self, ApiError> {
        let n = options.get(&N).unwrap_or(1);
        let is_stream = options.get(&STREAM).unwrap_or(false);
        if is_stream && n != 1 {
            return Err(ApiError::field("n", "must be 1 with stream"));
        }
        if !is_stream && options.get(&PARTIAL_IMAGES).unwrap_or(0) > 0 {
            return Err(ApiError::field("partial_images", "needs stream to be true"));
        }
        let model = options.get(&MODEL).unwrap_or_default();
        Ok(Self { model, n, is_stream, encoding: encoding(options)? })
    }
}

fn encoding(options: &Options) -> Result<Encoding, ApiError> {
    let format = options.get(&OUTPUT_FORMAT).and_then(|name| PictureFormat::from_extension(&name));
    let format = format.unwrap_or(PictureFormat::Png);
    let metadata = options.get(&METADATA);
    // Asked for and impossible is an error; absent, it is what the format can do.
    if metadata == Some(true) && format != PictureFormat::Png {
        return Err(ApiError::field("metadata", "only png files hold the parameters; leave it out"));
    }
    let compression = options.get(&OUTPUT_COMPRESSION);
    if let Some(value) = compression.filter(|value| format == PictureFormat::Png && *value < 100) {
        return Err(ApiError::field("output_compression", format!("is {value}; allowed for png: 100 to 100")));
    }
    Ok(Encoding {
        format,
        compression: compression.and_then(|value| u8::try_from(value).ok()),
        metadata: metadata.unwrap_or(format == PictureFormat::Png),
    })
}
