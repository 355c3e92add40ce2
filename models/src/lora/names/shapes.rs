//! Whether the tensors of a LoRA file have the shapes that a layer takes.
//!
//! Owns: the rules. Does not know: names, values.

use std::collections::BTreeMap;

use super::{Addend, Pair};
use crate::lora::refusal::Mismatch;
use crate::lora::sites::LayerShape;

/// Refuses tensors that do not fit the layer. `outputs` are those that they have, of which some may be the layer's.
pub(super) fn check(
    layer: &str,
    shape: LayerShape,
    outputs: usize,
    addend: &Addend,
    tensors: &BTreeMap<String, Vec<usize>>,
) -> Result<(), Mismatch> {
    let takes_none = |tensor: &str, what: &str| Err(Mismatch(format!("`{tensor}` is for layer {layer}, which {what}")));
    let allowed = match addend {
        Addend::LowRank(Pair { down, .. }) if !shape.is_product() => {
            return takes_none(down, "multiplies with no matrix");
        }
        Addend::Bias { tensor, .. } if !shape.takes_bias() => return takes_none(tensor, "has no bias"),
        Addend::LowRank(Pair { rank, .. }) => low_rank(shape, *rank, outputs),
        Addend::Weight(_) => vec![weights(shape, outputs)],
        Addend::Bias { .. } => vec![vec![vec![outputs]]],
    };
    for (tensor, allowed) in addend.tensors().zip(allowed) {
        let found = &tensors[tensor];
        let is_empty = addend.pair().is_some_and(|pair| pair.rank == 0);
        if is_empty || !allowed.contains(found) {
            let expected = &allowed[0];
            return Err(Mismatch(format!(
                "`{tensor}` has shape {found:?}; layer {layer} of this model takes {expected:?}"
            )));
        }
    }
    Ok(())
}

/// Of both matrices. Linear layers take matrices, or convolutions of one position, which are the same.
fn low_rank(shape: LayerShape, rank: usize, outputs: usize) -> Vec<Vec<Vec<usize>>> {
    let up = vec![outputs, rank];
    let with_ones = |count: usize| [&up[..], &vec![1; count]].concat();
    match shape {
        LayerShape::Conv2d { .. } => vec![weights(shape, rank), vec![with_ones(2)]],
        LayerShape::Patches { .. } => vec![weights(shape, rank), vec![with_ones(3), up.clone()]],
        _ => vec![weights(shape, rank), vec![up.clone(), with_ones(2)]],
    }
}

/// Of a weight with so many outputs.
fn weights(shape: LayerShape, outputs: usize) -> Vec<Vec<usize>> {
    match shape {
        LayerShape::Linear { in_features, .. } => {
            vec![vec![outputs, in_features], vec![outputs, in_features, 1, 1]]
        }
        LayerShape::Conv2d { in_channels, kernel, .. } => vec![vec![outputs, in_channels, kernel, kernel]],
        LayerShape::Patches { channels, bare_channels, patch: [frames, rows, columns], .. } => {
            [channels, bare_channels].map(|channels| vec![outputs, channels, frames, rows, columns]).to_vec()
        }
        LayerShape::Norm { dim, .. } => vec![vec![dim]],
        LayerShape::Table { dims } => vec![dims.to_vec()],
    }
}
