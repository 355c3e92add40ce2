//! Tables that a network has once and a file may hold under two names: what the file says goes before what the
//! configuration does.
//!
//! Source: transformers `modeling_utils.py`, `PreTrainedModel.tie_weights`.

use candle_core::{DType, Device};

use super::Weights;
use super::mapped::{Files, Located, Slice};
use super::names::Extent;
use super::source::Origin;
use crate::error::Result;

/// What the files say of two names of one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tie {
    /// There is one table: the other name is absent, or has the same values.
    One,
    /// There is one table, but under the second name alone.
    OneUnderSecond,
    /// The names have different values: two tables.
    Two,
}

impl Weights {
    /// Compares two names of a table that the configuration wants tied, and marks the one that need not be loaded. Where
    /// the values differ this warns: the file has what the configuration denies.
    pub fn tie(&self, first: &str, second: &str) -> Result<Tie> {
        let (Some(one), Some(two)) = (self.located(first), self.located(second)) else {
            return Ok(if self.contains(second) { Tie::OneUnderSecond } else { Tie::One });
        };
        if self.are_equal(one, two)? {
            self.ignore(second);
            return Ok(Tie::One);
        }
        let path = self.source.root.display();
        tracing::warn!("{path}: `{first}` and `{second}` are tied by the configuration but differ; both are used");
        Ok(Tie::Two)
    }

    fn are_equal(&self, one: &Located, two: &Located) -> Result<bool> {
        let Origin::Files(files) = &self.source.origin else { return Ok(true) };
        if one.shape != two.shape {
            return Ok(false);
        }
        let slices = [Slice::new(one, Extent::Whole), Slice::new(two, Extent::Whole)];
        let are_equal = match one.stored == two.stored {
            true => files.bytes(&slices[0]) == files.bytes(&slices[1]),
            false => {
                let values = |slice| values(files, slice, &one.shape);
                values(&slices[0])? == values(&slices[1])?
            }
        };
        slices.iter().for_each(|slice| files.drop_pages(slice));
        Ok(are_equal)
    }
}

/// The numbers of a table, whatever they are stored as.
fn values(files: &Files, slice: &Slice, shape: &[usize]) -> Result<Vec<f32>> {
    Ok(files.read(slice, shape, DType::F32, &Device::Cpu)?.flatten_all()?.to_vec1()?)
}
