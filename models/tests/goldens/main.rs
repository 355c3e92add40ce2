//! The models held against the reference libraries: tiny checkpoints and recorded answers under `tests/goldens`, made
//! by `scripts/goldens`.

mod flux;
mod rng;
mod support;
mod text;
mod tokenizers;
mod wan;
