//! From a row to what is computed: the request is resolved again, with the pictures beside the row and the clip before it.
//!
//! Owns: that what is made is what was promised when it was ordered. Does not know: sessions, leases.

use std::sync::Arc;

use bytes::Bytes;
use tale_models::ModelCard;
use tale_models::diffusion::parameters::{PARAMETERS, PARTIAL_IMAGES};
use tale_models::diffusion::{Canvas, DiffusionRequest};
use tale_models::parameter::{Declaration, Options};

use super::Shared;
use crate::job::encoder::Before;
use crate::job::failure::Failure;
use crate::job::files::{ClipFiles, StoredFile};
use crate::job::spec::{ClipSpec, Origin};
use crate::job::store::StoreError;
use crate::job::{Job, JobId, JobState};
use crate::media::{OpenClip, Still, decode_picture};
use crate::parameters::{EffectiveParameters, set_images};

/// What decoding and resolving counts for among work that computes: it is long, whatever the pictures are.
const PREPARING_COST: usize = 32 << 20;

/// A clip that can be made now.
pub(super) struct Prepared {
    pub(super) request: DiffusionRequest,
    pub(super) before: Option<Before>,
}

/// Why it cannot.
pub(super) enum Unprepared {
    /// It never can.
    Failed(Failure),
    /// Something is away for now.
    Later(String),
}

/// What the names of the objects of pictures begin with.
pub(super) const INPUT: &str = "input-";

/// The name of the object of a picture.
pub(super) fn input_name(index: usize) -> String {
    format!("{INPUT}{index}")
}

/// What `job` asks for.
pub(super) async fn prepare(shared: &Shared, card: Arc<ModelCard>, job: &Job) -> Result<Prepared, Unprepared> {
    let mut inputs = Vec::with_capacity(job.spec.inputs.len());
    for (index, input) in job.spec.inputs.iter().enumerate() {
        let bytes = shared.objects.get(job.id, &input_name(index)).await;
        let bytes =
            bytes.map_err(|error| Unprepared::Later(format!("a picture of the job cannot be read: {error}")))?;
        inputs.push((input.field.clone(), bytes));
    }
    let (spec, model) = (job.spec.clone(), job.model.clone());
    let resolved = shared.compute.run(PREPARING_COST, move |_| resolve(&card, &model, &spec, inputs)).await;
    let request = resolved.map_err(|error| Unprepared::Later(error.to_string()))?.map_err(Unprepared::Failed)?;
    let before = match job.spec.origin {
        Some(Origin::Extension { of, num_frames }) => Some(before(shared, of, num_frames, request.canvas).await?),
        Some(Origin::Remix(_)) | None => None,
    };
    Ok(Prepared { request, before })
}

fn resolve(
    card: &ModelCard,
    model: &str,
    spec: &ClipSpec,
    inputs: Vec<(String, Bytes)>,
) -> Result<DiffusionRequest, Failure> {
    let ModelCard::Diffusion(card) = card else {
        return Err(Failure::changed(format!("model `{model}` does not make clips any more")));
    };
    let options = options(spec, inputs).map_err(Failure::changed)?;
    let seed = spec.parameters.options().get(&tale_models::diffusion::parameters::SEED).unwrap_or_default();
    let request = card.resolve(&options, seed).map_err(|error| Failure::changed(error.to_string()))?;
    let effective = EffectiveParameters::new(model, &request);
    if effective.to_json() != spec.parameters.to_json() {
        return Err(Failure::changed(format!("model `{model}` would make another clip now than was promised")));
    }
    Ok(request)
}

/// What the client would say, with the pictures.
fn options(spec: &ClipSpec, inputs: Vec<(String, Bytes)>) -> Result<Options, String> {
    let mut options = spec.parameters.options().clone();
    options.set(&PARTIAL_IMAGES, Some(spec.partial_images).filter(|previews| *previews > 0));
    let mut fields: Vec<(&'static Declaration, Vec<Bytes>)> = Vec::new();
    for (field, bytes) in inputs {
        let declaration = PARAMETERS.iter().find(|declaration| declaration.name == field);
        let declaration = declaration.ok_or_else(|| format!("`{field}` is not known"))?;
        match fields.iter_mut().find(|(known, _)| known.name == declaration.name) {
            Some((_, files)) => files.push(bytes),
            None => fields.push((declaration, vec![bytes])),
        }
    }
    for (declaration, files) in fields {
        // They were decoded when they were ordered, within the bounds of memory that hold for requests.
        let set = set_images(&mut options, declaration, &files, &mut |_| true);
        set.map_err(|(_, error)| format!("{}: {error}", declaration.name))?;
    }
    Ok(options)
}

/// The clip that the file begins with.
async fn before(shared: &Shared, of: JobId, num_frames: usize, canvas: Canvas) -> Result<Before, Unprepared> {
    let removed = || Unprepared::Failed(Failure::changed("the video that it goes on from was removed".into()));
    let source = match shared.store.get(of).await {
        Ok(record) => Job::of(record, &shared.outputs).map_err(|_| removed())?,
        Err(StoreError::Unknown) => return Err(removed()),
        Err(error) => return Err(Unprepared::Later(error.to_string())),
    };
    let JobState::Completed(files) = source.state else { return Err(removed()) };
    let opened = tokio::task::spawn_blocking(move || open_before(&files, canvas, num_frames)).await;
    opened.ok().flatten().ok_or_else(removed)
}

/// A finished clip to go on from; `None` where its files are not there as they were made.
pub fn open_before(files: &ClipFiles, canvas: Canvas, num_frames: usize) -> Option<Before> {
    let clip = &files.clip;
    let is_as_made = std::fs::metadata(&clip.path).is_ok_and(|found| found.len() == clip.bytes);
    let clip = OpenClip::open(&clip.path).ok().filter(|_| is_as_made)?;
    let first = decode_picture(&read(files.still(Still::First)?)?).ok()?.frame;
    ((first.width, first.height) == (canvas.width, canvas.height)).then_some(Before { clip, first, num_frames })
}

/// The bytes of a file that is as it was made.
pub fn read(file: &StoredFile) -> Option<Bytes> {
    match std::fs::read(&file.path) {
        Ok(bytes) if bytes.len() as u64 == file.bytes => Some(bytes.into()),
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(path = %file.path.display(), %error, "a frame of a video cannot be read");
            None
        }
    }
}
