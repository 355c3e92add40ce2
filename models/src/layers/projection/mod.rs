//! Weight matrices that activations are multiplied with, in whatever format a checkpoint keeps them.
//!
//! Owns: which formats there are, and which of them a layer's files have. A format is one file beside this one: how it is
//! recognised, loaded and multiplied with. Does not know: bias and adapters, which a [`Linear`](super::Linear) has
//! whatever its matrix is.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::Tensor;

use crate::error::Result;
use crate::quantisation::FIELD;
use crate::weights::Weights;

mod awq;
mod blocks;
mod compressed;
mod dense;
mod float8;
mod gptq;
mod packed;

pub(super) use blocks::Blocks;
pub(super) use dense::Dense;

/// A matrix `[out, in]`.
pub trait Projection: Debug + Send + Sync {
    /// `x [..., in]` to `x Wᵀ + bias`, `[..., out]`. `bias [out]`.
    fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor>;
}

/// Loads the `[out, in]` matrix of the layer that has the view's name, if the files keep it in the loader's format.
type Load = fn(&Weights, out_features: usize, in_features: usize) -> Result<Option<Arc<dyn Projection>>>;

/// The formats that are not one number per value.
const PACKED: &[Load] = &[blocks::load, awq::load, compressed::load, float8::load, gptq::load];
/// Tensors that only a quantised matrix has.
const MARKS: [&str; 4] = ["qweight", "weight_packed", "weight_scale", "weight_scale_inv"];

/// The `[out, in]` matrix of the layer that has the view's name.
pub fn load(weights: &Weights, out_features: usize, in_features: usize) -> Result<Arc<dyn Projection>> {
    let has_mark = MARKS.iter().any(|mark| weights.contains(mark));
    if weights.format().is_some() && weights.contains("weight") && !has_mark {
        return Err(weights.error("weight", format!("is plain; {FIELD} says that its matrix is quantised")));
    }
    for load in PACKED {
        if let Some(projection) = load(weights, out_features, in_features)? {
            return Ok(projection);
        }
    }
    if let Some(mark) = MARKS.into_iter().find(|mark| weights.contains(mark)) {
        return Err(weights.error(mark, format!("is of a quantised matrix; {FIELD} does not say that it is one")));
    }
    Ok(Arc::new(Dense::load(weights, out_features, in_features)?))
}
