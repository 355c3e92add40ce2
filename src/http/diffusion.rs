//! What images and videos have in common on the wire.

use std::sync::Arc;

use tale_models::ModelCard;
use tale_models::cancel::CancelToken;
use tale_models::diffusion::parameters::{HEIGHT, LORAS, WIDTH};
use tale_models::diffusion::{DiffusionRequest, Medium};
use tale_models::parameter::{Options, Parameter};
use tokio::sync::Semaphore;

use super::body::MAX_PICTURE_BODY_BYTES;
use super::body::memory::Held;
use super::body::upload::Upload;
use super::cold_start::ALLOW_COLD_START;
use super::error::ApiError;
use super::files::FileWork;
use super::parameters::{Given, image_bytes};
use super::{AppState, stored};
use crate::compute::Compute;

/// Most requests whose images are decoded at a time: each may take a few hundred megabytes for a moment.
const MAX_DECODING: usize = 4;
static DECODING: Semaphore = Semaphore::const_new(MAX_DECODING);
/// What decoding counts for among work that computes: it is long, however short a file is.
const DECODING_COST: usize = MAX_PICTURE_BODY_BYTES;

/// Most requests whose LoRA files are looked at at a time.
const MAX_LORA_READERS: usize = 8;
static LORA_FILES: FileWork = FileWork::new(MAX_LORA_READERS);

/// Longest name of a model.
pub(super) const MAX_MODEL_BYTES: usize = 256;
/// Longest `WIDTHxHEIGHT`.
const MAX_SIZE_BYTES: usize = 64;

/// The name under which a model is served.
pub(super) static MODEL: Parameter<String> =
    Parameter::text("model", MAX_MODEL_BYTES, "Name of the model, as in `GET /v1/models`.").required();

/// Width and height in one field.
pub(super) static SIZE: Parameter<String> =
    Parameter::text("size", MAX_SIZE_BYTES, "`WIDTHxHEIGHT` in pixels, or `auto`; excludes `width` and `height`.");

/// Where the client gave the size, so that errors name the field that it wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SizeField {
    Size,
    WidthAndHeight,
}

impl SizeField {
    /// Turns `size`, if it is there, into width and height.
    pub(super) fn take(options: &mut Options) -> Result<Self, ApiError> {
        let Some(size) = options.get(&SIZE) else { return Ok(Self::WidthAndHeight) };
        if options.has(&WIDTH) || options.has(&HEIGHT) {
            return Err(ApiError::field("size", "excludes width and height; give one or the other"));
        }
        if size == "auto" {
            return Ok(Self::Size);
        }
        let sides = size.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
        let Some((width, height)): Option<(usize, usize)> = sides else {
            return Err(ApiError::field("size", "must be WIDTHxHEIGHT in pixels, such as 512x512, or auto"));
        };
        options.set(&WIDTH, width);
        options.set(&HEIGHT, height);
        Ok(Self::Size)
    }

    /// The error of a card about a side, told in the words of the client.
    fn rename(self, error: ApiError) -> ApiError {
        match self {
            Self::WidthAndHeight => error,
            Self::Size => error.within("width", "size").within("height", "size"),
        }
    }
}

/// The card of a model that makes `medium`, or the error that names the right endpoint.
pub(super) fn card(state: &AppState, model: &str, medium: Medium) -> Result<Arc<ModelCard>, ApiError> {
    of_medium(state.engine()?.model(model)?.card(), medium)
}

/// The card, if its model makes `medium`, or the error that names the right endpoint.
pub(super) fn of_medium(card: Arc<ModelCard>, medium: Medium) -> Result<Arc<ModelCard>, ApiError> {
    match &*card {
        ModelCard::Text(_) => Err(ApiError::field("model", "writes text; use /v1/chat/completions")),
        ModelCard::Diffusion(diffusion) if diffusion.medium() != medium => Err(super::wrong_endpoint(diffusion)),
        ModelCard::Diffusion(_) => Ok(card),
    }
}

/// Reads frames of videos that a body names from their files.
pub(super) async fn fetch_frames(state: &AppState, given: &mut Given, held: &mut Held) -> Result<(), ApiError> {
    for (name, upload) in given.uploads_mut() {
        if let Upload::Frame(frame) = upload {
            *upload = Upload::File(stored::fetch_frame(state, &name, frame, held).await?);
        }
    }
    Ok(())
}

/// The options of a body with its images decoded, and the memory of these. First of all it waits for the model where the body allows
/// that.
pub(super) async fn decoded(state: &AppState, mut given: Given, mut held: Held) -> Result<(Options, Held), ApiError> {
    if let (Some(true), Some(model)) = (given.options.get(&ALLOW_COLD_START), given.options.get(&MODEL)) {
        state.engine()?.wait_for_model(&model, held.client()).await?;
    }
    if !given.has_files() {
        held.shrink_to(0);
        return Ok((given.options, held));
    }
    fetch_frames(state, &mut given, &mut held).await?;
    let _permit = DECODING.acquire().await.map_err(|_| ApiError::internal("decoding has ended"))?;
    let decode = move |cancelled: &CancelToken| given.decode(&mut held, cancelled).map(|options| (options, held));
    state.compute().run(DECODING_COST, decode).await?
}

/// The validated request. `settle` makes of the options what the model's card knows, and says where the size was given.
/// Images are resized, and the files of LoRAs are looked at on a thread for that.
pub(super) async fn resolve(
    compute: &Compute,
    mut options: Options,
    card: Arc<ModelCard>,
    settle: impl FnOnce(&mut Options) -> Result<SizeField, ApiError>,
) -> Result<DiffusionRequest, ApiError> {
    let size = settle(&mut options)?;
    let (reads_files, num_bytes) = (options.has(&LORAS), image_bytes(&options));
    let resolve = move || match &*card {
        ModelCard::Diffusion(card) => Ok(card.resolve(&options, super::random_seed())?),
        ModelCard::Text(_) => Err(ApiError::internal("a text model was asked for an image")),
    };
    let resolved = match reads_files {
        true => LORA_FILES.run(resolve).await?,
        false => compute.run_sized(num_bytes, move |_| resolve()).await?,
    };
    resolved.map_err(|error| size.rename(error))
}
