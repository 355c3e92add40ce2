//! What images and videos have in common on the wire.

use std::sync::Arc;

use tale_models::diffusion::parameters::{HEIGHT, WIDTH};
use tale_models::diffusion::{DiffusionRequest, Medium};
use tale_models::parameter::{Options, Parameter};
use tale_models::{DiffusionCard, ModelCard};

use super::AppState;
use super::error::ApiError;

/// Longest name of a model.
const MAX_MODEL_BYTES: usize = 256;
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
    let card = state.engine()?.model(model)?.card.clone();
    match &*card {
        ModelCard::Text(_) => Err(ApiError::field("model", "writes text; use /v1/chat/completions")),
        ModelCard::Diffusion(diffusion) if diffusion.medium() != medium => Err(super::wrong_endpoint(diffusion)),
        ModelCard::Diffusion(_) => Ok(card),
    }
}

/// The validated request.
pub(super) fn resolve(card: &ModelCard, options: &Options, size: SizeField) -> Result<DiffusionRequest, ApiError> {
    let card: &DiffusionCard = match card {
        ModelCard::Diffusion(card) => card,
        ModelCard::Text(_) => return Err(ApiError::internal("a text model was asked for an image")),
    };
    card.resolve(options, super::random_seed()).map_err(|error| size.rename(error.into()))
}
