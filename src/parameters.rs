//! The effective parameters of an image or a video: what answers echo, and what a file remembers of how it was made.
//!
//! As JSON they are a body that the endpoint takes as it is and answers with the same result. Which parameters there are,
//! and how a value is read, is said by their declarations ([`PARAMETERS`]). Also reads the image files that requests bring,
//! for the server and the command line alike.

use std::sync::Arc;

use serde::{Serialize, Serializer};
use tale_models::diffusion::DiffusionRequest;
use tale_models::diffusion::parameters::{FPS, IMAGE, MASK, PARAMETERS, PARTIAL_IMAGES, SEED};
use tale_models::diffusion::references::MAX_REFERENCE_PIXELS;
use tale_models::parameter::{Declaration, Kind, Options, Task, Value};

use crate::media::{InputError, decode_picture_within};

/// Keyword of the PNG text that holds them.
pub const KEYWORD: &str = "parameters";
/// The field that names the model.
const MODEL: &str = "model";

/// Everything that decides what an image or a video looks like.
#[derive(Debug, Clone, PartialEq)]
pub struct EffectiveParameters {
    /// The name under which the model was served; on the command line the name of its folder.
    pub model: String,
    task: Task,
    options: Options,
}

impl EffectiveParameters {
    /// Of a request to the model of this name.
    pub fn new(model: &str, request: &DiffusionRequest) -> Self {
        let task = match (&request.edit, request.canvas.fps) {
            (Some(_), _) => Task::ImageEdit,
            (None, 0) => Task::ImageGeneration,
            (None, _) => Task::Video,
        };
        Self { model: model.to_owned(), task, options: request.echo() }
    }

    /// The same for one image of several.
    pub fn with_seed(&self, seed: u64) -> Self {
        Self { options: self.options.clone().with(&SEED, seed), ..self.clone() }
    }

    /// The values.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// What a client would say to have the same image again.
    pub fn into_options(self) -> Options {
        self.options
    }

    /// The text of a file.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers and text are always JSON: this is a bug")
    }

    /// Reads the text of a file; what is wrong is said with the field's name.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let fields: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut parameters = Self { model: String::new(), task: Task::ImageEdit, options: Options::default() };
        for (name, value) in fields {
            if name == MODEL {
                parameters.model = value.as_str().ok_or("model: must be a string")?.to_owned();
                continue;
            }
            let declaration = PARAMETERS.iter().find(|of| of.name == name).ok_or(format!("{name}: is not known"))?;
            let value = declaration.read(value).map_err(|error| format!("{name}: {error}"))?;
            if let Some(value) = value {
                declaration.check(&value).map_err(|error| error.to_string())?;
                parameters.options.insert(declaration, value);
            }
        }
        if parameters.options.has(&FPS) {
            parameters.task = Task::Video;
        }
        Ok(parameters)
    }
}

impl Serialize for EffectiveParameters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serde_json::Map::from_iter([(MODEL.to_owned(), self.model.as_str().into())]);
        let of_task = PARAMETERS.iter().copied().filter(|of| of.is_for(self.task) && is_echoed(of));
        fields.extend(self.options.to_json(of_task));
        fields.serialize(serializer)
    }
}

/// Decodes the image files of a parameter. Transparent parts of the image to edit are its mask, unless one is given
/// later. `reserve` says whether there are so many bytes of memory for the next. An error comes with the number of the
/// file.
pub fn set_images(
    options: &mut Options,
    declaration: &'static Declaration,
    files: &[impl AsRef<[u8]>],
    reserve: &mut dyn FnMut(usize) -> bool,
) -> Result<(), (usize, InputError)> {
    let mut pictures = Vec::with_capacity(files.len());
    let mut pixels = 0;
    for (number, file) in files.iter().enumerate() {
        let picture = decode_picture_within(file.as_ref(), reserve).map_err(|error| (number, error))?;
        pixels += picture.frame.width * picture.frame.height;
        pictures.push(picture);
        // More are refused for their size; no more than that are decoded.
        if pixels > MAX_REFERENCE_PIXELS {
            break;
        }
    }
    let value = match declaration.kind {
        Kind::Images { .. } => Value::Images(pictures.into_iter().map(|picture| Arc::new(picture.frame)).collect()),
        Kind::Mask => match pictures.pop() {
            Some(picture) => Value::Mask(Arc::new(picture.into_mask().map_err(|error| (0, error))?)),
            None => return Ok(()),
        },
        _ => match pictures.pop() {
            Some(picture) => {
                if declaration.name == IMAGE.declaration.name {
                    options.set(&MASK, picture.transparent().map(Arc::new));
                }
                Value::Image(Arc::new(picture.frame))
            }
            None => return Ok(()),
        },
    };
    options.insert(declaration, value);
    Ok(())
}

/// Whether answers repeat its value: it changes the result, and is no file.
pub fn is_echoed(declaration: &Declaration) -> bool {
    !is_image(declaration) && declaration.name != PARTIAL_IMAGES.declaration.name
}

/// Whether its values are image files.
pub fn is_image(declaration: &Declaration) -> bool {
    matches!(declaration.kind, Kind::Image | Kind::Images { .. } | Kind::Mask)
}
