//! `POST /v1/images/generations` and `/v1/images/edits`.

mod fields;
mod stream;

use std::time::SystemTime;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;
use tale_models::Event;
use tale_models::diffusion::parameters::PARAMETERS;
use tale_models::diffusion::{DiffusionRequest, Medium};
use tale_models::parameter::Task;
use tale_models::request::{Frame, Usage};

use self::fields::ImageFields;
use super::admission::{Admitted, with_place};
use super::body::memory::Held;
use super::body::{self, Format};
use super::diffusion::{self, SizeField};
use super::error::ApiError;
use super::parameters::{Given, room_in};
use super::{AppState, unix_seconds};
use crate::compute::Compute;
use crate::engine::Session;
use crate::media::{PictureFormat, encode_picture, resized};
use crate::parameters::{self, EffectiveParameters};

pub use fields::MAX_IMAGES;
pub(super) use fields::OWN;

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
    parameters: EffectiveParameters,
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
    let received = body::receive(&state, request, Format::Json, body::MAX_PICTURE_BODY_BYTES).await?;
    let room_of = |name: &str| room_in(&PARAMETERS, name);
    let read = |body| super::parameters::read(body, fields::OWN, Task::ImageGeneration);
    with_place(&state, received.client, async |admitted| {
        let (given, held) = received.read(state.compute(), room_of, read).await?;
        make(&state, admitted, given, held, stream::GENERATION).await
    })
    .await
}

/// `POST /v1/images/edits`.
pub(super) async fn edit(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    let received = body::receive(&state, request, Format::JsonOrForm, body::MAX_PICTURE_BODY_BYTES).await?;
    let room_of = |name: &str| room_in(&PARAMETERS, name);
    let read = |body| super::parameters::read(body, fields::OWN, Task::ImageEdit);
    with_place(&state, received.client, async |admitted| {
        let (given, held) = received.read(state.compute(), room_of, read).await?;
        make(&state, admitted, given, held, stream::EDIT).await
    })
    .await
}

/// `held` is the memory of what was given, for as long as the answer takes.
async fn make(
    state: &AppState,
    admitted: &Admitted,
    given: Given,
    held: Held,
    names: stream::Names,
) -> Result<Response, ApiError> {
    let created = unix_seconds(SystemTime::now());
    let fields = ImageFields::new(&given.options)?;
    let ImageFields { model, n, is_stream, encoding } = fields;
    let card = diffusion::of_medium(admitted.card(&model, &given.options).await?, Medium::Image)?;
    let (options, held) = diffusion::decoded(state, given, held).await?;
    let request = diffusion::resolve(state.compute(), options, card, SizeField::take).await?;
    let parameters = EffectiveParameters::new(&model, &request);
    if is_stream {
        let session = admitted.submit(&model, tale_models::Request::Diffusion(request.clone()))?;
        let compute = state.compute().clone();
        let head = stream::Head { names, created_at: created, encoding, parameters, request, compute, _held: held };
        return stream::respond(head, session).await;
    }
    let seeds: Vec<u64> = (0..n as u64).map(|index| request.sampling.seed.wrapping_add(index)).collect();
    let with_seed = |seed| tale_models::Request::Diffusion(request.with_seed(seed));
    // All are submitted before the first is awaited; an error drops them, which cancels them.
    let sessions: Vec<_> =
        seeds.iter().map(|&seed| admitted.submit(&model, with_seed(seed))).collect::<Result<_, _>>()?;
    let mut data = Vec::with_capacity(n);
    for (mut session, seed) in sessions.into_iter().zip(seeds) {
        let (picture, usage) = picture(&mut session).await?;
        let skipped_passes = skipped_passes(&request, usage);
        let b64_json = encoding.encode(state.compute(), picture, parameters.with_seed(seed)).await?;
        data.push(Image { b64_json, seed, skipped_passes });
    }
    let num_bytes = data.iter().map(|image| image.b64_json.len()).sum();
    let images = Images {
        created,
        data,
        output_format: encoding.format.as_str(),
        size: format!("{}x{}", request.canvas.width, request.canvas.height),
        metadata: encoding.metadata,
        num_reference_images: num_reference_images(&request),
        parameters,
    };
    Ok(state.compute().run_sized(num_bytes, move |_| Json(images).into_response()).await?)
}

fn num_reference_images(request: &DiffusionRequest) -> Option<usize> {
    request.references.as_ref().map(|references| references.images.len())
}

/// Predictions that a cache, where one was asked for, took from ones before them.
fn skipped_passes(request: &DiffusionRequest, usage: Usage) -> Option<usize> {
    request.cache.as_ref().map(|_| usage.skipped_passes)
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
            Some(Event::Started | Event::Progress { .. } | Event::Preview { .. } | Event::Checkpoint(_)) => (),
            Some(Event::Prompt(_) | Event::Text { .. }) => (),
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
    async fn encode(
        self,
        compute: &Compute,
        picture: Frame,
        parameters: EffectiveParameters,
    ) -> Result<String, ApiError> {
        let encoded = compute.run(picture.rgb.len(), move |_| {
            let text = self.metadata.then(|| (parameters::KEYWORD, parameters.to_json()));
            encode_picture(&picture, self.format, self.compression, text).map(|bytes| BASE64.encode(bytes))
        });
        Ok(encoded.await??)
    }

    /// A preview in the size that the picture will have; it says nothing of how it was made.
    async fn encode_preview(
        self,
        compute: &Compute,
        preview: Frame,
        (width, height): (usize, usize),
    ) -> Result<String, ApiError> {
        let encoded = compute.run(width * height * 3, move |_| {
            let preview = resized(&preview, width, height)?;
            encode_picture(&preview, self.format, self.compression, None).map(|bytes| BASE64.encode(bytes))
        });
        Ok(encoded.await??)
    }
}
