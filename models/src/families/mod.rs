//! One file per model family, and the table of them.

use candle_core::Tensor;

use crate::checkpoint::Manifest;
use crate::error::{Error, Result};
use crate::family::Family;

pub mod causal_lm;
pub mod cogvideox;
pub mod flux;
pub mod hunyuan_video;
pub mod llama;
mod loading;
pub mod qwen2;
pub mod sdxl;
pub mod wan;

/// All families of this build.
pub const FAMILIES: &[&dyn Family] = &[
    &llama::Llama,
    &qwen2::Qwen2,
    &flux::Flux,
    &sdxl::Sdxl,
    &wan::Wan,
    &hunyuan_video::HunyuanVideo,
    &cogvideox::CogVideoX,
];

/// The rows `[1, ...]` of the predictions for a batch.
fn split_rows(predictions: &Tensor) -> Result<Vec<Tensor>> {
    (0..predictions.dim(0)?).map(|row| Ok(predictions.narrow(0, row, 1)?.contiguous()?)).collect()
}

/// The least common multiple.
fn lcm(a: usize, b: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    a / gcd(a, b) * b
}

/// The family of the checkpoint.
pub(crate) fn detect(manifest: &Manifest) -> Result<&'static dyn Family> {
    FAMILIES.iter().copied().find(|family| family.detects(manifest)).ok_or_else(|| Error::UnknownArchitecture {
        path: manifest.root().to_owned(),
        found: manifest.architecture().to_owned(),
        supported: FAMILIES.iter().map(|family| family.name()).collect::<Vec<_>>().join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::repository;

    #[test]
    fn the_documented_table_is_this_table() {
        let docs = repository().join("docs/models.md");
        let docs = std::fs::read_to_string(docs).expect("docs/models.md is there");
        for family in FAMILIES {
            let row = format!("| `{}` | {} |", family.name(), family.makes());
            assert!(docs.contains(&row), "docs/models.md lacks the row `{row}`");
            if let Some(note) = family.licence_note() {
                assert!(docs.contains(note), "docs/models.md lacks the licence note `{note}`");
            }
        }
    }
}
