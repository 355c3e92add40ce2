//! What a session has encoded before it denoises: texts, images, whatever its family names.
//!
//! Owns: which inputs share a pass through an encoder. Does not know: what an input is, which is a type of the family, or
//! the passes that are under way (`passes`). Pure.

use crate::diffusion::DiffusionRequest;
use crate::lora::LoraKey;
use crate::request::Phase;

/// Most texts of one pass through the text encoders: more wait for the next one, so that a step stays bounded.
pub const MAX_TEXTS_PER_PASS: usize = 8;

/// A pass through an encoder. Inputs of several sessions whose passes are equal share one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pass {
    /// Kind of its steps.
    pub phase: Phase,
    /// The components of the checkpoint that compute it, by their names.
    pub components: &'static [&'static str],
    /// Tokens that texts are padded or cut to; 0 where there are none.
    pub sequence_length: usize,
    /// What is added to the encoder's layers; `None` where they take no adapters.
    pub loras: Option<LoraKey>,
    /// Most different inputs that it takes from several sessions.
    pub max_rows: usize,
}

impl Pass {
    /// The VAE's over one image.
    pub fn of_image() -> Self {
        Self { phase: Phase::VaeEncode, components: &["vae"], sequence_length: 0, loras: None, max_rows: 1 }
    }
}

/// The inputs of one session that are encoded in one pass. All equal ones of that pass are encoded once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inputs<I> {
    /// Which pass.
    pub pass: Pass,
    /// At least one.
    pub rows: Vec<I>,
}

/// Each input once, in the order in which they first come.
pub fn distinct<'a, I: PartialEq + 'a>(inputs: impl IntoIterator<Item = &'a Inputs<I>>) -> Vec<&'a I> {
    let mut distinct = Vec::new();
    for row in inputs.into_iter().flat_map(|inputs| &inputs.rows) {
        if !distinct.contains(&row) {
            distinct.push(row);
        }
    }
    distinct
}

/// The texts of a request's guidance branches, the positive one first, where an absent negative prompt is the empty text.
pub fn branch_texts(request: &DiffusionRequest) -> Vec<String> {
    let negative = request.guidance.negative_prompt.as_ref();
    let negative = negative.map(|negative| negative.text().unwrap_or_default().to_owned());
    std::iter::once(request.prompt.text.clone()).chain(negative).collect()
}
