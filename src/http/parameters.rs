//! From a body to the values of its parameters, as their declarations say.
//!
//! Owns: which fields a body may have, and the words for those that it may not. Does not know: what any of them means.

use axum::body::Bytes;
use serde::Deserialize;
use tale_models::cancel::CancelToken;
use tale_models::diffusion::parameters::PARAMETERS;
use tale_models::lora::library::MAX_LORAS;
use tale_models::parameter::{self, Declaration, IMAGES, Kind, Options, Task};

use super::body::memory::Held;
use super::body::of_field;
use super::body::upload::{OneOrMany, Upload};
use super::body::value::{Object, Room, Value};
use super::error::ApiError;
use super::openai;
use crate::parameters::{is_image, set_images};

/// What a body says. Its images are not decoded yet.
#[derive(Debug)]
pub(super) struct Given {
    /// Everything but images.
    pub(super) options: Options,
    files: Vec<(&'static Declaration, Vec<Upload>)>,
}

/// Reads a body for `task`; `own` are the endpoint's fields beside the parameters of the model.
pub(super) fn read(mut body: Value, own: &[&'static Declaration], task: Task) -> Result<Given, ApiError> {
    openai::settle(openai::fields(task), &mut body)?;
    let of_task = PARAMETERS.iter().filter(|declaration| declaration.is_for(task));
    let declarations: Vec<_> = own.iter().chain(of_task).copied().collect();
    take(&mut body.into_object()?, &declarations, &[])
}

/// How much a field may hold that `declarations` say something of.
pub(super) fn room_in(declarations: &[&Declaration], name: &str) -> Room {
    match declarations.iter().find(|declaration| declaration.name == name).map(|declaration| declaration.kind) {
        Some(Kind::Strings { max, .. } | Kind::Images { max }) => Room::items(max),
        Some(Kind::Image | Kind::Mask) => Room::items(1),
        Some(Kind::Loras) => Room::items(MAX_LORAS),
        Some(Kind::Tokens { max } | Kind::Biases { max_len: max, .. }) => {
            Room { max_numbers: max, max_values: 1 + max, ..Room::SMALL }
        }
        _ => Room::SMALL,
    }
}

/// Takes the declared fields out of a body; what is left is one of `others`.
pub(super) fn take(
    fields: &mut Object,
    declarations: &[&'static Declaration],
    others: &[&str],
) -> Result<Given, ApiError> {
    let mut given = Given { options: Options::default(), files: Vec::new() };
    for declaration in declarations {
        match fields.shift_remove(declaration.name) {
            None | Some(Value::Null) if declaration.is_required => {
                return Err(ApiError::field_code(declaration.name, "missing_required_parameter", "is missing"));
            }
            None | Some(Value::Null) => (),
            Some(value) => given.take(declaration, value)?,
        }
    }
    match fields.keys().find(|name| !others.contains(&name.as_str())) {
        None => Ok(given),
        Some(name) => Err(unknown(name, others.iter().copied().chain(declarations.iter().map(|of| of.name)))),
    }
}

/// A field that the endpoint does not have.
fn unknown<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> ApiError {
    let problem = match PARAMETERS.iter().find(|declaration| declaration.name == name).map(|of| of.tasks) {
        Some([Task::ImageEdit]) => "is for /v1/images/edits".to_owned(),
        Some([Task::Video]) => "is for /v1/videos".to_owned(),
        Some(IMAGES) => "is for images".to_owned(),
        _ => {
            let known: Vec<&str> = known.collect();
            format!("is not known here; known: {}", known.join(", "))
        }
    };
    ApiError::field_code(name, "unknown_parameter", problem)
}

impl Given {
    fn take(&mut self, declaration: &'static Declaration, value: Value) -> Result<(), ApiError> {
        let name = declaration.name;
        if is_image(declaration) {
            let OneOrMany(uploads) = of_field(name, value, OneOrMany::<Upload>::deserialize)?;
            check_count(declaration, uploads.len())?;
            self.files.push((declaration, uploads));
            return Ok(());
        }
        if let Some(value) = of_field(name, value, |value| declaration.read(value))? {
            declaration.check(&value)?;
            self.options.insert(declaration, value);
        }
        Ok(())
    }

    /// The images, each with the name of its field.
    pub(super) fn uploads_mut(&mut self) -> Vec<(String, &mut Upload)> {
        let mut all = Vec::new();
        for (declaration, uploads) in &mut self.files {
            let named = uploads.iter_mut().enumerate().map(|(number, upload)| (path(declaration, number), upload));
            all.extend(named);
        }
        all
    }

    /// The files of its images, each with its field; of those that lie here, once they are fetched.
    pub(super) fn files(&self) -> Vec<(String, Bytes)> {
        let all = self
            .files
            .iter()
            .flat_map(|(declaration, uploads)| uploads.iter().map(|upload| (declaration.name, upload)));
        all.filter_map(|(name, upload)| Some((name.to_owned(), upload.file()?.clone()))).collect()
    }

    /// Whether there are images to decode.
    pub(super) fn has_files(&self) -> bool {
        !self.files.is_empty()
    }

    /// The options with the images decoded, which takes time. `held` is the memory of what was given, and then that of the
    /// images; ends early when nobody waits for it.
    pub(super) fn decode(self, held: &mut Held, cancelled: &CancelToken) -> Result<Options, ApiError> {
        let mut options = self.options;
        let mut no_memory = None;
        for (declaration, files) in self.files {
            let mut reserve = |bytes| {
                no_memory = held.add(bytes).err();
                no_memory.is_none() && !cancelled.is_cancelled()
            };
            let files: Vec<Bytes> = files.into_iter().map(Upload::into_file).collect();
            let decoded = set_images(&mut options, declaration, &files, &mut reserve);
            decoded.map_err(|(number, error)| {
                no_memory.take().unwrap_or_else(|| ApiError::field(path(declaration, number), error))
            })?;
        }
        held.shrink_to(image_bytes(&options));
        Ok(options)
    }
}

/// One image of a field.
fn path(declaration: &Declaration, number: usize) -> String {
    match declaration.kind {
        Kind::Images { .. } => format!("{}[{number}]", declaration.name),
        _ => declaration.name.to_owned(),
    }
}

/// Bytes of the images that a request brings.
pub(super) fn image_bytes(options: &Options) -> usize {
    let bytes = |declaration: &&Declaration| match options.value(declaration) {
        Some(parameter::Value::Image(image)) => image.rgb.len(),
        Some(parameter::Value::Images(images)) => images.iter().map(|image| image.rgb.len()).sum(),
        Some(parameter::Value::Mask(mask)) => mask.grey.len(),
        _ => 0,
    };
    PARAMETERS.iter().map(bytes).sum()
}

fn check_count(declaration: &Declaration, count: usize) -> Result<(), ApiError> {
    match declaration.kind {
        Kind::Images { max } if count > max => {
            Err(ApiError::field(declaration.name, format!("are {count}; allowed: 1 to {max}")))
        }
        Kind::Image | Kind::Mask if count != 1 => {
            Err(ApiError::field(declaration.name, format!("holds {count} images; must be one")))
        }
        _ => Ok(()),
    }
}
