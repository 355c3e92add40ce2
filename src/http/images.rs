//! `POST /v1/images/generations` and `/v1/images/edits`.

mod stream;
mod upload;

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};
use tale_models::card::{DiffusionOptions, MAX_REFERENCE_IMAGES, MAX_REFERENCE_PIXELS, Medium};
use tale_models::diffusion::{Acceleration, DiffusionRequest};
use tale_models::lora::LoraOption;
use tale_models::request::{Frame, Usage};
use tale_models::solver::names::Spacing;
use tale_models::{Event, ModelCard};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use self::upload::{OneOrMany, Upload};

use super::diffusion::{self, Interval, Size, saturate};
use super::error::ApiError;
use super::{AppState, body, unix_seconds};
use crate::engine::Session;
use crate::media::{PictureFormat, decode_picture, encode_picture, enlarge};
use crate::parameters::{self, LoraParameter, PictureParameters};

/// Most pictures of one request.
pub const MAX_IMAGES: usize = 10;
/// Most requests whose pictures are decoded at a time: each may take a few hundred megabytes for a moment.
const MAX_DECODING: usize = 4;
static DECODING: Semaphore = Semaphore::const_new(MAX_DECODING);

/// The body of either endpoint. `response_format` is `b64_json`: this server has no place from which pictures could be fetched later.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ImageBody {
    model: String,
    prompt: String,
    n: Option<u64>,
    size: Option<String>,
    width: Option<u64>,
    height: Option<u64>,
    response_format: Option<ResponseFormat>,
    output_format: Option<OutputFormat>,
    output_compression: Option<u64>,
    negative_prompt: Option<String>,
    num_inference_steps: Option<u64>,
    guidance_scale: Option<f64>,
    scheduler: Option<String>,
    timestep_spacing: Option<Spacing>,
    eta: Option<f64>,
    true_cfg_scale: Option<f64>,
    guidance_interval: Option<Interval>,
    acceleration: Option<Acceleration>,
    seed: Option<u64>,
    max_sequence_length: Option<u64>,
    loras: Option<Vec<LoraParameter>>,
    metadata: Option<bool>,
    vae_tiling: Option<VaeTiling>,
    stream: Option<bool>,
    partial_images: Option<u64>,
    reference_images: Option<OneOrMany<Upload>>,
    ip_adapter_scale: Option<f64>,
    denoising_end: Option<f64>,
    /// This and the rest of edits alone.
    image: Option<OneOrMany<Upload>>,
    mask: Option<Upload>,
    strength: Option<f64>,
}

/// Whether the VAE works in tiles: as asked, or where memory is too short for the whole picture.
#[derive(Debug, Clone, Copy)]
enum VaeTiling {
    Asked(bool),
    Auto,
}

impl VaeTiling {
    fn asked(self) -> Option<bool> {
        match self {
            Self::Asked(asked) => Some(asked),
            Self::Auto => None,
        }
    }
}

impl<'de> Deserialize<'de> for VaeTiling {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct VaeTilingVisitor;

        impl Visitor<'_> for VaeTilingVisitor {
            type Value = VaeTiling;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("true, false or auto")
            }

            fn visit_bool<E: serde::de::Error>(self, asked: bool) -> Result<VaeTiling, E> {
                Ok(VaeTiling::Asked(asked))
            }

            /// Forms spell everything as text.
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<VaeTiling, E> {
                match text {
                    "auto" => Ok(VaeTiling::Auto),
                    "true" => Ok(VaeTiling::Asked(true)),
                    "false" => Ok(VaeTiling::Asked(false)),
                    _ => Err(E::custom("must be true, false or \"auto\"")),
                }
            }
        }

        deserializer.deserialize_any(VaeTilingVisitor)
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ResponseFormat {
    B64Json,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OutputFormat {
    Png,
    Jpeg,
    Webp,
}

impl From<OutputFormat> for PictureFormat {
    fn from(format: OutputFormat) -> Self {
        match format {
            OutputFormat::Png => PictureFormat::Png,
            OutputFormat::Jpeg => PictureFormat::Jpeg,
            OutputFormat::Webp => PictureFormat::Webp,
        }
    }
}

/// The answer: OpenAI's fields, and the effective parameters beside them.
#[derive(Debug, Serialize)]
pub(super) struct Images {
    created: u64,
    data: Vec<Image>,
    output_format: &'static str,
    size: String,
    metadata: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    num_reference_images: Option<usize>,
    /// Of the first picture; picture i has its seed plus i.
    #[serde(flatten)]
    parameters: PictureParameters,
}

#[derive(Debug, Serialize)]
struct Image {
    b64_json: String,
    seed: u64,
    /// Predictions that the acceleration took from ones before them.
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped_passes: Option<usize>,
}

/// `POST /v1/images/generations`.
pub(super) async fn generate(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let body: ImageBody = body::json_with_pictures(request).await?;
    let of_edits =
        [("image", body.image.is_some()), ("mask", body.mask.is_some()), ("strength", body.strength.is_some())];
    if let Some((field, _)) = of_edits.into_iter().find(|(_, is_given)| *is_given) {
        return Err(ApiError::field_code(field, "unknown_parameter", "is for /v1/images/edits"));
    }
    make(&state, body, stream::GENERATION).await
}

/// `POST /v1/images/edits`.
pub(super) async fn edit(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let body: ImageBody = body::json_or_form(request, body::MAX_PICTURE_BODY_BYTES).await?;
    match &body.image {
        None => Err(ApiError::field_code("image", "missing_required_parameter", "is missing")),
        Some(OneOrMany(images)) if images.len() != 1 => {
            Err(ApiError::field("image", format!("holds {} pictures; must be one", images.len())))
        }
        Some(_) => make(&state, body, stream::EDIT).await,
    }
}

async fn make(state: &AppState, body: ImageBody, names: stream::Names) -> Result<Response, ApiError> {
    let created = unix_seconds(SystemTime::now());
    let card = diffusion::card(state, &body.model, Medium::Picture)?;
    let (n, encoding, is_stream) = (body.count()?, body.encoding()?, body.is_stream()?);
    let model = body.model.clone();
    let request = resolve(body, card).await?;
    let parameters = PictureParameters::new(&model, &request);
    let engine = state.engine()?;
    if is_stream {
        let (partial_images, num_reference_images) = (request.partial_images, num_reference_images(&request));
        let session = engine.submit(&model, tale_models::Request::Diffusion(request))?;
        let head =
            stream::Head { names, created_at: created, encoding, parameters, partial_images, num_reference_images };
        return stream::respond(head, session).await;
    }
    let seeds: Vec<u64> = (0..n as u64).map(|index| request.sampling.seed.wrapping_add(index)).collect();
    let with_seed = |seed| tale_models::Request::Diffusion(request.with_seed(seed));
    // All are submitted before the first is awaited; an error drops them, which cancels them.
    let sessions: Vec<_> =
        seeds.iter().map(|&seed| engine.submit(&model, with_seed(seed))).collect::<Result<_, _>>()?;
    let mut data = Vec::with_capacity(n);
    for (mut session, seed) in sessions.into_iter().zip(seeds) {
        let (picture, usage) = picture(&mut session).await?;
        let skipped_passes = skipped_passes(&parameters, usage);
        let b64_json = encoding.encode(picture, parameters.with_seed(seed)).await?;
        data.push(Image { b64_json, seed, skipped_passes });
    }
    let images = Images {
        created,
        data,
        output_format: encoding.format.as_str(),
        size: format!("{}x{}", request.canvas.width, request.canvas.height),
        metadata: encoding.metadata,
        num_reference_images: num_reference_images(&request),
        parameters,
    };
    Ok(Json(images).into_response())
}

fn num_reference_images(request: &DiffusionRequest) -> Option<usize> {
    request.references.as_ref().map(|references| references.images.len())
}

/// Predictions that an acceleration, where one was asked for, took from ones before them.
fn skipped_passes(parameters: &PictureParameters, usage: Usage) -> Option<usize> {
    (parameters.acceleration != Acceleration::None).then_some(usage.skipped_passes)
}

impl ImageBody {
    /// Whether the answer is a stream, which has one picture and may have previews.
    fn is_stream(&self) -> Result<bool, ApiError> {
        let is_stream = self.stream.unwrap_or(false);
        if is_stream && self.n.unwrap_or(1) != 1 {
            return Err(ApiError::field("n", "must be 1 with stream"));
        }
        if !is_stream && self.partial_images.unwrap_or(0) > 0 {
            return Err(ApiError::field("partial_images", "needs stream to be true"));
        }
        Ok(is_stream)
    }

    fn count(&self) -> Result<usize, ApiError> {
        let n = saturate(self.n.unwrap_or(1));
        if n == 0 || n > MAX_IMAGES {
            return Err(ApiError::field("n", format!("is {n}; allowed: 1 to {MAX_IMAGES}")));
        }
        Ok(n)
    }

    fn format(&self) -> PictureFormat {
        // The only one there is; a value that is not it has been refused.
        let (None | Some(ResponseFormat::B64Json)) = self.response_format;
        self.output_format.map_or(PictureFormat::Png, PictureFormat::from)
    }

    fn encoding(&self) -> Result<Encoding, ApiError> {
        let format = self.format();
        // Said and impossible is an error; said by nobody, it is what the format can do.
        if self.metadata == Some(true) && format != PictureFormat::Png {
            return Err(ApiError::field("metadata", "only png files hold the parameters; leave it out"));
        }
        let metadata = self.metadata.unwrap_or(format == PictureFormat::Png);
        Ok(Encoding { format, compression: self.compression()?, metadata })
    }

    fn compression(&self) -> Result<Option<u8>, ApiError> {
        let allowed = match self.format() {
            PictureFormat::Png => 100..=100,
            PictureFormat::Jpeg | PictureFormat::Webp => 0..=100,
        };
        match self.output_compression {
            None => Ok(None),
            Some(value) if allowed.contains(&value) => Ok(u8::try_from(value).ok()),
            Some(value) => {
                let (format, low) = (self.format(), allowed.start());
                let problem = format!("is {value}; allowed for {format}: {low} to 100");
                Err(ApiError::field("output_compression", problem))
            }
        }
    }

    fn resolve(self, card: &ModelCard) -> Result<DiffusionRequest, ApiError> {
        let size = Size::new(self.size.as_deref(), self.width, self.height)?;
        let decode =
            |field, Upload(bytes): &Upload| decode_picture(bytes).map_err(|error| ApiError::field(field, error));
        let image = self.image.as_ref().and_then(|OneOrMany(images)| images.first());
        let image = image.map(|image| decode("image", image)).transpose()?;
        let mask = match &self.mask {
            Some(mask) => Some(decode("mask", mask)?.into_mask().map_err(|error| ApiError::field("mask", error))?),
            None => image.as_ref().and_then(|image| image.transparent()),
        };
        let OneOrMany(references) = self.reference_images.unwrap_or(OneOrMany(Vec::new()));
        let reference_images = decode_references(&references)?;
        let options = DiffusionOptions {
            prompt: self.prompt,
            negative_prompt: self.negative_prompt,
            width: size.width,
            height: size.height,
            num_frames: None,
            fps: None,
            num_inference_steps: self.num_inference_steps.map(saturate),
            guidance_scale: self.guidance_scale,
            scheduler: self.scheduler,
            timestep_spacing: self.timestep_spacing,
            eta: self.eta,
            true_cfg_scale: self.true_cfg_scale,
            guidance_interval: self.guidance_interval.map(|Interval(interval)| interval),
            acceleration: self.acceleration,
            seed: self.seed,
            max_sequence_length: self.max_sequence_length.map(saturate),
            vae_tiling: self.vae_tiling.and_then(VaeTiling::asked),
            reference_images,
            ip_adapter_scale: self.ip_adapter_scale,
            loras: self.loras.unwrap_or_default().into_iter().map(LoraOption::from).collect(),
            partial_images: self.partial_images.map(saturate),
            image: image.map(|image| Arc::new(image.frame)),
            mask: mask.map(Arc::new),
            strength: self.strength,
            denoising_end: self.denoising_end,
        };
        diffusion::resolve(card, options, size)
    }
}

/// Reference pictures, in any sizes. Those that are over the card's limits are left to it: no more than that are decoded.
fn decode_references(files: &[Upload]) -> Result<Vec<Arc<Frame>>, ApiError> {
    let mut references = Vec::new();
    let mut pixels = 0;
    for (i, Upload(bytes)) in files.iter().enumerate().take(MAX_REFERENCE_IMAGES + 1) {
        let picture =
            decode_picture(bytes).map_err(|error| ApiError::field(format!("reference_images[{i}]"), error))?;
        pixels += picture.frame.width * picture.frame.height;
        references.push(Arc::new(picture.frame));
        if pixels > MAX_REFERENCE_PIXELS {
            break;
        }
    }
    Ok(references)
}

/// The validated request, made on a thread that may wait: pictures are decoded and resized, the files of LoRAs are
/// looked at.
async fn resolve(body: ImageBody, card: Arc<ModelCard>) -> Result<DiffusionRequest, ApiError> {
    let _permit = match body.image.is_some() || body.reference_images.is_some() {
        true => Some(DECODING.acquire().await.map_err(|_| ApiError::internal("decoding has ended"))?),
        false => None,
    };
    let resolved = spawn_blocking(move || body.resolve(&card)).await;
    resolved.map_err(|_| ApiError::internal("a request could not be resolved"))?
}

/// The picture of a session, once it is whole, and what it did not need.
async fn picture(session: &mut Session) -> Result<(Frame, Usage), ApiError> {
    let mut picture = None;
    loop {
        match session.recv().await {
            Some(Event::Frames(frames)) => picture = frames.into_iter().next_back(),
            Some(Event::Finished { usage, .. }) => {
                let picture = picture.ok_or_else(|| ApiError::internal("the model finished without a picture"))?;
                return Ok((picture, usage));
            }
            Some(Event::Failed(error)) => return Err(error.into()),
            Some(Event::Started | Event::Progress { .. } | Event::Preview { .. } | Event::Text { .. }) => (),
            None => return Err(cut_off()),
        }
    }
}

/// Why a session has no more events before its end.
fn cut_off() -> ApiError {
    ApiError::unready("shutting_down", "the server shut down before the picture was whole")
}

/// How pictures become files.
#[derive(Debug, Clone, Copy)]
struct Encoding {
    format: PictureFormat,
    compression: Option<u8>,
    /// Whether the file says how it was made.
    metadata: bool,
}

impl Encoding {
    async fn encode(self, picture: Frame, parameters: PictureParameters) -> Result<String, ApiError> {
        let encoded = spawn_blocking(move || {
            let text = self.metadata.then(|| (parameters::KEYWORD, parameters.to_json()));
            encode_picture(&picture, self.format, self.compression, text).map(|bytes| BASE64.encode(bytes))
        });
        Ok(encoded.await.map_err(|_| ApiError::internal("the picture encoder panicked"))??)
    }

    /// A preview in the size that the picture will have; it says nothing of how it was made.
    async fn encode_preview(self, preview: Frame, (width, height): (usize, usize)) -> Result<String, ApiError> {
        let encoded = spawn_blocking(move || {
            let preview = enlarge(&preview, width, height)?;
            encode_picture(&preview, self.format, self.compression, None).map(|bytes| BASE64.encode(bytes))
        });
        Ok(encoded.await.map_err(|_| ApiError::internal("the picture encoder panicked"))??)
    }
}
