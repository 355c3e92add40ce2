//! What a family adds whose pictures may follow reference pictures.

use std::sync::Arc;

use candle_core::Tensor;

use crate::error::Result;
use crate::request::Frame;

/// Encodes reference pictures. Requests with [`crate::diffusion::References`] are for models with this alone.
pub trait ReferenceModel {
    /// All pictures of a request; `guided` says whether it has a negative branch.
    fn encode(&self, pictures: &[Arc<Frame>], guided: bool) -> Result<ReferenceTokens>;
}

/// What the branches of a session see of its reference pictures. Sessions with the same pictures share it.
#[derive(Debug)]
pub struct ReferenceTokens {
    /// Of the pictures, one after the other: `[1, tokens, width]`.
    pub positive: Tensor,
    /// What stands for them in the negative branch, in the same shape; a session without guidance has none.
    pub negative: Option<Tensor>,
}

impl ReferenceTokens {
    /// Of the branch with this number: the positive one is first.
    pub fn of_branch(&self, branch: usize) -> &Tensor {
        match branch {
            0 => &self.positive,
            _ => self.negative.as_ref().expect("a guided session encodes its negative branch: this is a bug"),
        }
    }
}
