//! The tensors of a LoRA file on their way to the device.
//!
//! Owns: in which parts a file is read, and in which form layers have what is added to them. Does not know: files' headers,
//! which set of terms is active.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use candle_core::Tensor;
use tale_kernels::conv_weight;

use super::file::{LoraFile, ScaledTerm};
use super::names::{Addend, Pair, Part, Term};
use super::sites::LayerShape;
use crate::device::Placement;
use crate::error::Result;

/// A term's tensors where and as the model computes.
#[derive(Debug, Clone)]
pub struct LoadedTerm {
    /// Position of the network, and name of the layer.
    pub network: usize,
    /// See `network`.
    pub layer: String,
    /// What is added.
    pub addend: LoadedAddend,
    /// Without the request's weight.
    pub scale: f64,
}

/// As in [`super::Delta`].
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub enum LoadedAddend {
    LowRank { down: Tensor, up: Tensor },
    Weight(Tensor),
    Bias(Tensor),
}

/// The tensors of a file on their way to the device.
#[derive(Debug)]
pub struct FileReading {
    file: Arc<LoraFile>,
    terms: Vec<LoadedTerm>,
    /// By name: those that several layers share are read once.
    downs: HashMap<String, Tensor>,
    bytes_left: usize,
}

impl FileReading {
    /// Nothing is read yet.
    pub fn new(file: &Arc<LoraFile>) -> Self {
        let tensors =
            |of: fn(&Addend) -> Option<&String>| file.terms().iter().filter_map(move |term| of(&term.term.addend));
        // Matrices that several layers share are read once.
        let downs: BTreeSet<&String> = tensors(shared).collect();
        let bytes_left = downs.into_iter().chain(tensors(own)).map(|name| file.len_of(name)).sum();
        Self { file: file.clone(), terms: Vec::new(), downs: HashMap::new(), bytes_left }
    }

    /// Bytes of the file that are still to be read.
    pub fn bytes_left(&self) -> usize {
        self.bytes_left
    }

    /// See [`LoraFile::id`].
    pub fn file_id(&self) -> u64 {
        self.file.id()
    }

    /// See [`LoraFile::device_bytes`].
    pub fn device_bytes(&self) -> usize {
        self.file.device_bytes()
    }

    /// Whether all is there.
    pub fn is_done(&self) -> bool {
        self.terms.len() == self.file.terms().len()
    }

    /// The terms that are there.
    pub fn into_terms(self) -> Vec<LoadedTerm> {
        self.terms
    }

    /// Reads the next terms, as far as their matrices have `budget_bytes` in the file, and one at least: the bytes read.
    pub fn advance(&mut self, budget_bytes: usize, placement: &Placement) -> Result<usize> {
        let file = self.file.clone();
        let mut read = 0;
        while let Some(next) = file.terms().get(self.terms.len()) {
            let bytes = self.bytes_of(&next.term);
            if read > 0 && read + bytes > budget_bytes {
                break;
            }
            let loaded = self.load(next, placement)?;
            self.terms.push(loaded);
            read += bytes;
        }
        self.bytes_left -= read;
        Ok(read)
    }

    /// That are read for a term.
    fn bytes_of(&self, term: &Term) -> usize {
        let down = shared(&term.addend).filter(|name| !self.downs.contains_key(*name));
        down.into_iter().chain(own(&term.addend)).map(|name| self.file.len_of(name)).sum()
    }

    fn load(&mut self, of: &ScaledTerm, placement: &Placement) -> Result<LoadedTerm> {
        let ScaledTerm { term, scale } = of;
        let own_values = |name: &str| own_rows(&self.file.values(name)?, &term.part);
        let addend = match &term.addend {
            Addend::LowRank(Pair { down, up, .. }) => {
                let up = as_second(own_values(up)?, term, placement)?;
                let down = match self.downs.get(down) {
                    Some(shared) => shared.clone(),
                    None => {
                        let read = as_weight(self.file.values(down)?, term, placement)?;
                        self.downs.insert(down.clone(), read.clone());
                        read
                    }
                };
                LoadedAddend::LowRank { down, up }
            }
            Addend::Weight(tensor) => LoadedAddend::Weight(as_weight(own_values(tensor)?, term, placement)?),
            Addend::Bias { tensor, .. } => LoadedAddend::Bias(placed(own_values(tensor)?, term, placement)?),
        };
        Ok(LoadedTerm { network: term.network, layer: term.part.layer.clone(), addend, scale: *scale })
    }
}

/// The matrix that layers may share.
fn shared(addend: &Addend) -> Option<&String> {
    if let Addend::LowRank(Pair { down, .. }) = addend { Some(down) } else { None }
}

/// The tensor of which each layer has its own rows.
fn own(addend: &Addend) -> Option<&String> {
    addend.tensors().last()
}

/// What is multiplied with the layer's input, or added to its weight, as the layer keeps its own.
fn as_weight(values: Tensor, term: &Term, placement: &Placement) -> Result<Tensor> {
    match term.shape {
        LayerShape::Linear { .. } => placed(values.flatten_from(1)?, term, placement),
        LayerShape::Patches { channels, .. } => {
            // Of a model that sees fewer channels: nothing is added for the others.
            let all = values.pad_with_zeros(1, 0, channels - values.dim(1)?)?;
            placed(all.flatten_from(1)?, term, placement)
        }
        LayerShape::Conv2d { .. } => Ok(conv_weight(&placed(values, term, placement)?)?),
        LayerShape::Norm { .. } | LayerShape::Table { .. } => placed(values, term, placement),
    }
}

/// The second matrix of a pair, which is one of a linear layer or of a convolution of one position.
fn as_second(values: Tensor, term: &Term, placement: &Placement) -> Result<Tensor> {
    match term.shape {
        LayerShape::Conv2d { .. } => Ok(conv_weight(&placed(values, term, placement)?)?),
        _ => placed(values.flatten_from(1)?, term, placement),
    }
}

fn placed(values: Tensor, term: &Term, placement: &Placement) -> Result<Tensor> {
    let dtype = term.dtype(values.dtype(), placement);
    Ok(values.to_dtype(dtype)?.to_device(&placement.device)?)
}

/// The outputs that are the layer's own, in its own order, as a copy: a view would keep the others in memory.
fn own_rows(values: &Tensor, part: &Part) -> Result<Tensor> {
    let rows = values.narrow(0, part.rows.start, part.rows.len())?;
    if !part.swap_halves {
        return Ok(rows.force_contiguous()?);
    }
    let half = part.rows.len() / 2;
    Ok(Tensor::cat(&[rows.narrow(0, half, part.rows.len() - half)?, rows.narrow(0, 0, half)?], 0)?)
}
