//! Quantised matrices of a component: their parts as the files keep them, and what they take.
//!
//! Owns: which format a layer has, reading bytes that are no numbers of a dtype, and what a product with such a matrix needs for a
//! moment. Does not know: what any format's bytes mean.

use std::sync::Arc;

use candle_core::Device;

use super::ahead::{How, Made};
use super::mapped::elements;
use super::record::Coded;
use super::scales::OTHER_SCALES;
use super::{Stored, Weights};
use crate::error::{Error, Result};
use crate::quantisation::{Format, Quantisation};

impl Weights {
    /// The same view of a component whose matrices are kept so.
    pub fn quantised(&self, quantisation: Option<&Arc<Quantisation>>) -> Self {
        Self { quantisation: quantisation.cloned(), ..self.clone() }
    }

    /// The format of the matrix of the layer that has this view's name, if it is not plain.
    pub fn format(&self) -> Option<&Format> {
        self.quantisation.as_ref()?.of_layer(self.layer())
    }

    /// What `read` makes, on the device, of a tensor's bytes as the files keep them, whatever they mean: integers, blocks
    /// of quantised values. `shape` is that of the tensor in the files; of a share they are the bytes of that, whole blocks. Of a
    /// dry view `None`.
    pub fn packed<T: Send + 'static>(
        &self,
        shape: &[usize],
        name: &str,
        read: impl FnOnce(&[u8], &Device) -> Result<T> + Send + 'static,
    ) -> Result<Option<T>> {
        self.raw(shape, name, None, read)
    }

    /// As [`Weights::packed`], of a tensor that is part of a quantised matrix: `said` is what it takes and stands for. Whole even
    /// where a share is wanted: whoever knows what the bytes mean takes its share of that.
    pub fn coded<T: Send + 'static>(
        &self,
        shape: &[usize],
        name: &str,
        said: Coded,
        read: impl FnOnce(&[u8], &Device) -> Result<T> + Send + 'static,
    ) -> Result<Option<T>> {
        self.raw(shape, name, Some(said), read)
    }

    /// Notes a matrix that is made up in a format of codes.
    pub fn note_made_up(&self, name: &str, said: Coded) {
        let full_name = self.full_name(name);
        self.record().note_coded(&full_name, &full_name, said);
    }

    fn raw<T: Send + 'static>(
        &self,
        shape: &[usize],
        name: &str,
        said: Option<Coded>,
        read: impl FnOnce(&[u8], &Device) -> Result<T> + Send + 'static,
    ) -> Result<Option<T>> {
        let full_name = self.full_name(name);
        let place = self.place(&full_name);
        let share = match said {
            None => self.own_shape(shape, name).map(|_| self.share)?,
            Some(_) => None,
        };
        let found = self.source.find_in_files(&place, shape, share);
        let Some((files, slice)) = self.or_noted(&place, found)? else { return Ok(None) };
        match said {
            None => self.record().note_use(&full_name, &place.name, elements(shape), slice.len()),
            Some(said) => self.record().note_coded(&full_name, &place.name, said),
        }
        if self.source.dry {
            let make = move |bytes: &[u8], device: &Device| Ok(Box::new(read(bytes, device)?) as Made);
            self.note_ahead(&full_name, &place, shape, slice.len(), How::Bytes(Box::new(make)));
            return Ok(None);
        }
        if let Some(made) = self.take_ahead(&full_name, None) {
            return Ok(Some(made));
        }
        let made = read(&files.bytes(&slice), &self.placement.device)?;
        files.drop_pages(&slice);
        Ok(Some(made))
    }

    /// Remembers that a product with one of the matrices takes so many bytes for a moment.
    pub fn note_dequantised(&self, bytes: usize) {
        let mut record = self.record();
        record.dequantised_bytes = record.dequantised_bytes.max(bytes);
    }

    /// Most bytes that a product with one of the quantised matrices takes for a moment beside weights and activations.
    pub fn dequantised_bytes(&self) -> usize {
        self.record().dequantised_bytes
    }

    /// As [`Weights::ignore`], of what stands beside a quantised matrix and is no parameter.
    pub fn ignore_beside(&self, name: &str) {
        let place = self.place(&self.full_name(name)).name;
        let mut record = self.record();
        record.coded.insert(place.clone(), Default::default());
        record.used.insert(place);
    }

    /// Refuses a weight of eight bits whose scales no format has read.
    pub(super) fn check_scales(&self, name: &str) -> Result<()> {
        let Some(layer) = name.strip_suffix("weight").filter(|_| matches!(self.stored(name), Some(Stored::Float8(_))))
        else {
            return Ok(());
        };
        let Some(scale) =
            OTHER_SCALES.map(|scale| format!("{layer}{scale}")).into_iter().find(|scale| self.contains(scale))
        else {
            return Ok(());
        };
        let [scale, name] = [&*scale, name].map(|name| self.place(&self.full_name(name)).name);
        let problem = format!("tensor `{scale}` scales `{name}` in a way that its configuration does not say");
        Err(Error::checkpoint(&self.source.root, problem))
    }
}
