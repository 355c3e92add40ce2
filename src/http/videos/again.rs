//! Videos that are made from earlier ones: remixes, which are made anew with other parameters, and extensions, which go on.
//!
//! Owns: what such a video takes over, the fields that its body may have, and the frames that stand for pictures which are not
//! kept. Does not know: how a video is made.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use tale_models::ModelCard;
use tale_models::cancel::CancelToken;
use tale_models::diffusion::parameters::{
    FPS, HEIGHT, INPUT_REFERENCE, KEY_IMAGES, LAST_IMAGE, NUM_FRAMES, OVERLAP_FRAMES, PARAMETERS, PROMPT, SEED,
    SHOT_METHOD, VAE_TILING, WIDTH,
};
use tale_models::diffusion::{Canvas, Medium, options_over};
use tale_models::parameter::{Declaration, Options, Parameter, Task};

use super::fields::{self, SECONDS};
use super::{Ordered, Spelling, decoded, order, terms};
use crate::http::body::value::{Object, Value};
use crate::http::body::{self, Format};
use crate::http::cold_start::ALLOW_COLD_START;
use crate::http::diffusion::{self, MAX_MODEL_BYTES, MODEL, SIZE};
use crate::http::error::ApiError;
use crate::http::parameters::{Given, read, room_in};
use crate::http::path::Id;
use crate::http::stored;
use crate::http::{AppState, admission::with_place};
use crate::job::spec::Origin;
use crate::job::{Job, UnknownJob};

/// The model of a video that has one before it.
static MODEL_AGAIN: Parameter<String> = Parameter::text(
    "model",
    MAX_MODEL_BYTES,
    "Name of the model, as in `GET /v1/models`; that of the earlier video when absent.",
);
/// The field of an extension that names the video.
const VIDEO: &str = "video";

/// A kind of video that is made from an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http) enum Again {
    Remix,
    Extension,
}

impl Again {
    /// The fields that a body may have beside the parameters of the model.
    fn own(self) -> Vec<&'static Declaration> {
        // Which pictures are brought depends on a model that is there.
        let others = [MODEL.declaration.name, ALLOW_COLD_START.declaration.name];
        let own = super::OWN.iter().copied().filter(|of| !others.contains(&of.name) && self.takes(of));
        std::iter::once(&MODEL_AGAIN.declaration).chain(own).collect()
    }

    /// Whether a body may have this field. What an extension has of the video before is not its own to say.
    fn takes(self, declaration: &Declaration) -> bool {
        let of_before = [
            SIZE.declaration.name,
            WIDTH.declaration.name,
            HEIGHT.declaration.name,
            FPS.declaration.name,
            INPUT_REFERENCE.declaration.name,
        ];
        let of_file = fields::is_of_encoding(declaration);
        self == Self::Remix || !of_file && !of_before.contains(&declaration.name)
    }

    /// All fields that a body may have, but for the video that an extension names.
    pub(in crate::http) fn fields(self) -> Vec<&'static Declaration> {
        let parameters = PARAMETERS.iter().copied().filter(|of| of.is_for(Task::Video) && self.takes(of));
        self.own().into_iter().chain(parameters).collect()
    }
}

/// `POST /v1/videos/{id}/remix`.
pub(in crate::http) async fn remix(
    State(state): State<AppState>,
    Id(id): Id,
    request: Request,
) -> Result<Response, ApiError> {
    let source = super::job(&state, &id).await?;
    make(&state, request, Again::Remix, Some(source)).await
}

/// `POST /v1/videos/{id}/extend`.
pub(in crate::http) async fn extend_of(
    State(state): State<AppState>,
    Id(id): Id,
    request: Request,
) -> Result<Response, ApiError> {
    let source = super::job(&state, &id).await?;
    make(&state, request, Again::Extension, Some(source)).await
}

/// `POST /v1/videos/extensions`, OpenAI's name for it.
pub(in crate::http) async fn extend(State(state): State<AppState>, request: Request) -> Result<Response, ApiError> {
    make(&state, request, Again::Extension, None).await
}

/// `source` is the video before, where it does not stand in the body.
async fn make(state: &AppState, request: Request, again: Again, source: Option<Job>) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let received = body::receive(state, request, Format::JsonOrForm, body::MAX_PICTURE_BODY_BYTES).await?;
    let received = received.not_waiting();
    let room_of = |name: &str| room_in(&PARAMETERS, name);
    with_place(state, received.client, async |admitted| {
        let source = source.clone();
        let read_body = |body: Value| {
            let hash = body.hash();
            let (body, spelling) = Spelling::of(body)?;
            Ok((body.into_object().map_err(|error| spelling.restored(error))?, spelling, hash))
        };
        let ((mut fields, spelling, hash), held) = received.read(state.compute(), room_of, read_body).await?;
        let ordered = async {
            let source = match source {
                Some(source) => source,
                None => named(state, &mut fields).await?,
            };
            let (state_of_body, of_body) = (state.clone(), source.clone());
            let read = move |_: &CancelToken| read_over(&state_of_body, again, &of_body, fields);
            let given = state.compute().run_sized(held.bytes(), read).await??;
            let (options, mut held, inputs) = decoded(state, given, held).await?;
            let is_other = options.get(&MODEL).is_some_and(|model| model != source.model);
            let options = over(options, &source, again, is_other);
            let origin = match again {
                Again::Remix => Origin::Remix(source.id),
                Again::Extension => {
                    let num_frames = source.spec.num_frames();
                    let checked = stored::check_before(&source, num_frames, &mut held).await;
                    checked.map_err(|error| error.about(VIDEO))?;
                    Origin::Extension { of: source.id, num_frames }
                }
            };
            let terms = terms::terms(&options, &headers, hash)?;
            order(state, admitted.client(), Ordered { options, inputs, origin: Some(origin), terms }).await
        };
        ordered.await.map_err(|error| spelling.restored(error))
    })
    .await
}

/// What a body says of a video that is made from `source`.
fn read_over(state: &AppState, again: Again, source: &Job, mut fields: Object) -> Result<Given, ApiError> {
    if again == Again::Extension {
        check_before(source, &fields)?;
    }
    let model = match fields.get(MODEL.declaration.name) {
        Some(Value::Text(model) | Value::Part(model)) => model.clone(),
        _ => source.model.clone(),
    };
    bring_pictures(state, again, source, &model, &mut fields)?;
    read(Value::Object(fields), &again.own(), Task::Video)
}

/// Takes the video that an extension names out of its body.
async fn named(state: &AppState, fields: &mut Object) -> Result<Job, ApiError> {
    let id = match fields.shift_remove(VIDEO) {
        Some(Value::Object(mut video)) => match (video.shift_remove("id"), video.is_empty()) {
            (Some(Value::Text(id) | Value::Part(id)), true) => id,
            _ => return Err(ApiError::field(VIDEO, "must be {\"id\": \"video_...\"}")),
        },
        Some(Value::File(_)) => {
            return Err(ApiError::field(VIDEO, "is a file; give the id of a video of this server"));
        }
        Some(Value::Null) | None => {
            return Err(ApiError::field_code(VIDEO, "missing_required_parameter", "is missing"));
        }
        Some(_) => return Err(ApiError::field(VIDEO, "must be {\"id\": \"video_...\"}")),
    };
    let found = super::job(state, &id).await;
    found.map_err(
        |error| if error.status() == StatusCode::NOT_FOUND { ApiError::field("video.id", UnknownJob) } else { error },
    )
}

/// Refuses a video that cannot go on, and fields that would make of it another one.
fn check_before(job: &Job, fields: &Object) -> Result<(), ApiError> {
    if !job.spec.file.encoding.can_go_on() {
        return Err(ApiError::field(VIDEO, "is a gif, whose one palette is that of its own frames; it cannot go on"));
    }
    stored::completed(job).map_err(|error| error.about("video.id"))?;
    for declaration in PARAMETERS.iter().copied().chain(super::OWN.iter().copied()) {
        if is_given(fields, declaration) && !Again::Extension.takes(declaration) {
            return Err(ApiError::field(declaration.name, "is that of the video before; leave it out"));
        }
    }
    Ok(())
}

/// Whether a body has this field; a null is as good as absent.
fn is_given(fields: &Object, declaration: &Declaration) -> bool {
    fields.get(declaration.name).is_some_and(|value| !matches!(value, Value::Null))
}

/// Adds the frames that a model begins and ends with, where the body has no pictures for it: an extension begins with the last
/// frame of the video before, a remix with the first, and ends with the last, since pictures themselves are not kept.
fn bring_pictures(
    state: &AppState,
    again: Again,
    source: &Job,
    model: &str,
    fields: &mut Object,
) -> Result<(), ApiError> {
    let card = diffusion::card(state, model, Medium::Video)?;
    let ModelCard::Diffusion(card) = &*card else { return Ok(()) };
    let Some(keyframes) = card.keyframes else {
        return match again {
            Again::Remix => Ok(()),
            Again::Extension => {
                let problem = "makes videos from text alone, which cannot go on from another; name a model that begins \
                               from a picture";
                Err(ApiError::field("model", problem))
            }
        };
    };
    let key_images = &KEY_IMAGES.declaration;
    let had_key_images = source.spec.fittings.iter().any(|fitting| fitting.field == key_images.name);
    if again == Again::Remix && had_key_images && !is_given(fields, key_images) {
        return Err(ApiError::field(key_images.name, "are not kept; give them again"));
    }
    let mut bring = |declaration: &Declaration, end: &str| {
        if !is_given(fields, declaration) {
            let pairs = [("video_id", source.id.to_string()), ("frame", end.to_owned())];
            let frame = pairs.map(|(name, value)| (name.to_owned(), Value::Text(value)));
            fields.insert(declaration.name.to_owned(), Value::Object(frame.into()));
        }
    };
    bring(&INPUT_REFERENCE.declaration, if again == Again::Extension { "last" } else { "first" });
    if again == Again::Remix && keyframes.takes_last() {
        bring(&LAST_IMAGE.declaration, "last");
    }
    Ok(())
}

/// What the body says, and what is taken over of the video before.
fn over(options: Options, source: &Job, again: Again, is_other_model: bool) -> Options {
    let echo = source.spec.parameters.options().clone();
    let mut base = match is_other_model {
        false => echo,
        // Nothing of what one model allows holds for another.
        true => {
            let Canvas { width, height, num_frames, fps } = source.spec.canvas();
            let base = Options::default().with(&PROMPT, echo.get(&PROMPT)).with(&SEED, echo.get(&SEED));
            base.with(&WIDTH, width).with(&HEIGHT, height).with(&NUM_FRAMES, num_frames).with(&FPS, fps)
        }
    };
    if options.has(&SIZE) {
        base.set(&WIDTH, None);
        base.set(&HEIGHT, None);
        base.set(&VAE_TILING, None);
    }
    if again == Again::Extension || options.has(&SECONDS) {
        base.set(&NUM_FRAMES, None);
        base.set(&SHOT_METHOD, None);
        base.set(&OVERLAP_FRAMES, None);
        base.set(&VAE_TILING, None);
    }
    if again == Again::Extension {
        // Other noise for other frames.
        base.set(&SEED, None);
    }
    let options = fields::file_options_over(options, source);
    options_over(options, base.with(&MODEL, source.model.clone()))
}
