//! What loading a component used of its files, and what it would have needed.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::DType;

use super::mapped::{Located, elements};
use crate::error::{Error, Result};

/// Most missing tensors and wrong shapes that are noted of one component. The largest published has some ten thousand
/// tensors; the first of them say what is wrong.
const MAX_PROBLEMS: usize = 1 << 10;

/// Kept while a network loads.
#[derive(Default)]
pub(super) struct Record {
    /// By the network's names.
    loaded: BTreeSet<String>,
    /// By the names in the files.
    pub(super) used: BTreeSet<String>,
    problems: Vec<Error>,
    /// What tensors of the files stand for that are parts of quantised matrices: in words, and how many values.
    pub(super) coded: BTreeMap<String, (String, usize)>,
    /// Elements of the used tensors.
    used_elements: usize,
    pub(super) resident_bytes: usize,
    /// Most bytes that a product with one of the matrices takes for a moment.
    pub(super) dequantised_bytes: usize,
}

/// What a tensor of a quantised matrix is once loaded.
#[derive(Debug, Clone, Default)]
pub struct Coded {
    /// How its values are kept, for people; nothing of what is beside them.
    pub kept: String,
    /// Values that it stands for.
    pub values: usize,
    /// Bytes that are kept because of it.
    pub resident_bytes: usize,
}

/// What loading a component used, and what it would have needed.
#[derive(Debug)]
pub struct WeightsReport {
    /// Elements of all tensors in the files; of dummy weights, of all that were asked for.
    pub num_parameters: usize,
    /// Elements by published dtype.
    pub dtypes: BTreeMap<String, usize>,
    /// Bytes that the used tensors take once loaded.
    pub resident_bytes: usize,
    /// Missing tensors and wrong shapes.
    pub problems: Vec<Error>,
    /// Tensors in the files that the architecture did not ask for.
    pub unused: Vec<String>,
}

impl Record {
    /// The network has the tensor that it calls `full_name`. A tensor that is loaded twice is counted once.
    pub(super) fn note_use(&mut self, full_name: &str, name_in_files: &str, elements: usize, bytes: usize) {
        self.used.insert(name_in_files.to_owned());
        if self.loaded.insert(full_name.to_owned()) {
            self.used_elements = self.used_elements.saturating_add(elements);
            self.resident_bytes = self.resident_bytes.saturating_add(bytes);
        }
    }

    /// As [`Record::note_use`], of a part of a quantised matrix.
    pub(super) fn note_coded(&mut self, full_name: &str, name_in_files: &str, said: Coded) {
        self.note_use(full_name, name_in_files, said.values, said.resident_bytes);
        self.coded.insert(name_in_files.to_owned(), (said.kept, said.values));
    }

    /// The network would have needed a tensor. Other parts of the same one have the same problem. Fails with the last of
    /// more problems than anybody reads: a configuration may ask for millions of tensors that no file has.
    pub(super) fn note_problem(&mut self, name_in_files: &str, problem: Error) -> Result<()> {
        if self.problems.len() >= MAX_PROBLEMS {
            return Err(problem);
        }
        if self.used.insert(name_in_files.to_owned()) {
            self.problems.push(problem);
        }
        Ok(())
    }

    /// What is to be said beside the tensors that the files hold. `dummy`: the dtype of random weights in place of files, but for
    /// those that are made up in codes. Takes the problems.
    pub(super) fn report(&mut self, published: &BTreeMap<String, Located>, dummy: Option<DType>) -> WeightsReport {
        let mut dtypes = BTreeMap::new();
        let mut add = |kept: String, values: usize| {
            let sum: &mut usize = dtypes.entry(kept).or_insert(0);
            *sum = sum.saturating_add(values);
        };
        for (name, tensor) in published {
            match self.coded.get(name) {
                // What is beside codes is no parameter.
                Some((_, 0)) => continue,
                Some((kept, values)) => add(kept.clone(), *values),
                None => add(tensor.stored.to_string(), elements(&tensor.shape)),
            }
        }
        if let Some(dtype) = dummy {
            let mut plain = self.used_elements;
            for (kept, values) in self.coded.values() {
                add(kept.clone(), *values);
                plain = plain.saturating_sub(*values);
            }
            add(format!("{dtype:?}"), plain);
        }
        WeightsReport {
            num_parameters: dtypes.values().fold(0, |sum: usize, more| sum.saturating_add(*more)),
            dtypes,
            resident_bytes: self.resident_bytes,
            problems: std::mem::take(&mut self.problems),
            unused: published.keys().filter(|name| !self.used.contains(*name)).cloned().collect(),
        }
    }
}
