//! What pictures and clips have in common on the wire.

use std::sync::Arc;

use serde::{Deserialize, Deserializer};
use tale_models::card::{DiffusionOptions, Medium};
use tale_models::diffusion::DiffusionRequest;
use tale_models::{DiffusionCard, ModelCard};

use super::AppState;
use super::error::ApiError;

/// Where the client gave the size, so that errors name the field that is theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SizeField {
    Size,
    WidthAndHeight,
}

/// `size`, or `width` and `height`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) width: Option<usize>,
    pub(super) height: Option<usize>,
    field: SizeField,
}

impl Size {
    /// `size` is `WIDTHxHEIGHT` or `auto`, and excludes the other two.
    pub(super) fn new(size: Option<&str>, width: Option<u64>, height: Option<u64>) -> Result<Self, ApiError> {
        let [width, height] = [width, height].map(|side| side.map(saturate));
        let Some(size) = size else { return Ok(Self { width, height, field: SizeField::WidthAndHeight }) };
        if width.is_some() || height.is_some() {
            return Err(ApiError::field("size", "excludes width and height; give one or the other"));
        }
        if size == "auto" {
            return Ok(Self { width: None, height: None, field: SizeField::Size });
        }
        let sides = size.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
        let Some((width, height)) = sides else {
            return Err(ApiError::field("size", "must be WIDTHxHEIGHT in pixels, such as 512x512, or auto"));
        };
        Ok(Self { width: Some(width), height: Some(height), field: SizeField::Size })
    }

    /// The error of a card about a side, told in the words of the client.
    pub(super) fn rename(self, error: ApiError) -> ApiError {
        match self.field {
            SizeField::WidthAndHeight => error,
            SizeField::Size => error.within("width", "size").within("height", "size"),
        }
    }
}

/// Two fractions: a JSON list, or the text of one, as a form has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Interval(pub(super) [f64; 2]);

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntervalVisitor;

        impl<'de> serde::de::Visitor<'de> for IntervalVisitor {
            type Value = Interval;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of two numbers")
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, list: A) -> Result<Interval, A::Error> {
                let numbers = Vec::deserialize(serde::de::value::SeqAccessDeserializer::new(list))?;
                let numbers: Result<[f64; 2], Vec<f64>> = numbers.try_into();
                numbers.map(Interval).map_err(|numbers| serde::de::Error::invalid_length(numbers.len(), &self))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Interval, E> {
                serde_json::from_str(text).map(Interval).map_err(|_| E::custom("must be a list of two numbers"))
            }
        }

        deserializer.deserialize_any(IntervalVisitor)
    }
}

/// The interval, where guidance has one to speak of.
pub(super) fn interval(request: &DiffusionRequest) -> Option<[f64; 2]> {
    request.guidance.negative_prompt.is_some().then_some(request.guidance.interval)
}

/// The card of a model that makes `medium`, or the error that names the right endpoint.
pub(super) fn card(state: &AppState, model: &str, medium: Medium) -> Result<Arc<ModelCard>, ApiError> {
    let card = state.engine()?.model(model)?.card.clone();
    match &*card {
        ModelCard::Text(_) => Err(ApiError::field("model", "writes text; use /v1/chat/completions")),
        ModelCard::Diffusion(diffusion) if diffusion.medium != medium => Err(super::wrong_endpoint(diffusion)),
        ModelCard::Diffusion(_) => Ok(card),
    }
}

/// The validated request; `max_sequence_length` and the like are checked by the card.
pub(super) fn resolve(card: &ModelCard, options: DiffusionOptions, size: Size) -> Result<DiffusionRequest, ApiError> {
    let card: &DiffusionCard = match card {
        ModelCard::Diffusion(card) => card,
        ModelCard::Text(_) => return Err(ApiError::internal("a text model was asked for a picture")),
    };
    if options.prompt.is_empty() {
        return Err(ApiError::field("prompt", "is empty"));
    }
    card.resolve(options, super::random_seed()).map_err(|error| size.rename(error.into()))
}

/// A number that no limit reaches is over every limit.
pub(super) fn saturate(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
