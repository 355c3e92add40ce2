//! Where a component's tensors come from: files, or nowhere.
//!
//! Owns: finding a tensor by its place, and reading what was found. Does not know: the names under which a network asks, dtypes in
//! which it keeps them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};

use super::dummy;
use super::mapped::{Files, Located, Slice, elements, whole_shape};
use super::names::Place;
use super::record::Record;
use super::share::Share;
use crate::error::{Error, Result};

/// A component's tensors, whoever asks for them.
pub(super) struct Source {
    pub(super) root: PathBuf,
    pub(super) origin: Origin,
    /// Whether tensors take no memory.
    pub(super) dry: bool,
    pub(super) record: Mutex<Record>,
}

/// Where tensors come from.
pub(super) enum Origin {
    Files(Files),
    /// Random values: whatever is asked for is there, as if published in this dtype.
    Dummy(DType),
}

/// A tensor that was asked for.
pub(super) enum Found<'a> {
    /// It lies in a file, or what is wanted of it.
    InFiles(&'a Files, Slice),
    /// It is made up, as if published in this dtype.
    Dummy(DType),
}

impl Found<'_> {
    /// The tensor, in this dtype and where it will live.
    pub(super) fn read(&self, full_name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        match self {
            Self::InFiles(files, slice) => files.read(slice, shape, dtype, device),
            Self::Dummy(_) => dummy::tensor(full_name, shape, dtype, device),
        }
    }

    /// As [`Found::read`], of a tensor the share with which it was found, which has a shape of its own.
    pub(super) fn read_share(
        &self,
        full_name: &str,
        (shape, own_shape): (&[usize], &[usize]),
        share: Share,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        match self {
            Self::InFiles(files, slice) => files.read(slice, own_shape, dtype, device),
            Self::Dummy(_) => dummy::share(full_name, (shape, own_shape), share, dtype, device),
        }
    }

    /// The values of some of its rows, as a vector.
    pub(super) fn read_rows(
        &self,
        full_name: &str,
        shape: &[usize],
        rows: Range<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let row_values = elements(shape) / shape[0];
        let values = rows.start * row_values..rows.end * row_values;
        match self {
            Self::InFiles(files, slice) => {
                let row_bytes = slice.len() / shape[0];
                let of_rows = slice.range(rows.start * row_bytes..rows.end * row_bytes);
                Ok(files.read(&of_rows, &[values.len()], dtype, device)?)
            }
            Self::Dummy(_) => dummy::part(full_name, shape, values, dtype, device),
        }
    }

    /// Bytes that are read or made for it, of which the tensor has `bytes`.
    pub(super) fn bytes_to_read(&self, bytes: usize) -> usize {
        match self {
            Self::InFiles(_, slice) => slice.len(),
            Self::Dummy(_) => bytes,
        }
    }

    pub(super) fn published_dtype(&self) -> DType {
        match self {
            Self::InFiles(_, slice) => slice.stored.dtype(),
            Self::Dummy(dtype) => *dtype,
        }
    }
}

impl Source {
    pub(super) fn new(dir: &Path, origin: Origin, dry: bool) -> Self {
        Self { root: dir.to_path_buf(), origin, dry, record: Mutex::new(Record::default()) }
    }

    /// The tensors of the files; none where there are no files.
    pub(super) fn published(&self) -> &BTreeMap<String, Located> {
        static NONE: BTreeMap<String, Located> = BTreeMap::new();
        match &self.origin {
            Origin::Files(files) => &files.tensors,
            Origin::Dummy(_) => &NONE,
        }
    }

    pub(super) fn beginning(&self) -> &str {
        match &self.origin {
            Origin::Files(files) => &files.beginning,
            Origin::Dummy(_) => "",
        }
    }

    /// The numbers of this shape at `place`, or a share of them.
    pub(super) fn find(&self, place: &Place, shape: &[usize], share: Option<Share>) -> Result<Found<'_>> {
        if let Origin::Dummy(dtype) = &self.origin {
            return Ok(Found::Dummy(*dtype));
        }
        let (files, slice) = self.find_in_files(place, shape, share)?;
        files.check_is_read(&place.name, &slice)?;
        Ok(Found::InFiles(files, slice))
    }

    /// The tensor of this shape at `place`, or a share of it, whatever its values are; errors name the whole that it would be
    /// part of.
    pub(super) fn find_in_files(
        &self,
        place: &Place,
        shape: &[usize],
        share: Option<Share>,
    ) -> Result<(&Files, Slice)> {
        let whole = whole_shape(place.part, shape);
        let missing =
            || Error::MissingTensor { path: self.root.clone(), tensor: place.name.clone(), expected: whole.clone() };
        let Origin::Files(files) = &self.origin else { return Err(missing()) };
        let located = files.tensors.get(&place.name).ok_or_else(missing)?;
        files.check_shape(&place.name, located, &whole)?;
        let whole = Slice::new(located, place.part);
        let slice = match share.and_then(|share| share.values_of(shape)) {
            Some(values) => whole.values(&values),
            None => whole,
        };
        files.check_is_whole(&place.name, &slice)?;
        Ok((files, slice))
    }
}

pub(super) fn placeholder(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros((), dtype, device)?.broadcast_as(shape)?)
}
