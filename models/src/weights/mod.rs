//! Tensors of a checkpoint component by name: memory-mapped files, checked before use, copied once.
//!
//! Owns: the view by name (`source` has the tensors, `coded` those of quantised matrices, `files` finds and checks safetensors files, `gguf` checks GGUF files, `single` gives components
//! of a file that holds several, `split` finds the parts of one, `mapped` copies tensors out of them, `float8` and `scales` know those of eight bits,
//! `qweights` those of safetensors files that are quantised, `dummy` makes random ones where there are no files, `record` keeps what was used). Does not know: any architecture, how
//! a packed matrix is multiplied with. A *dry* view answers every request with a tensor that takes no memory and records
//! what is missing, so that `tale inspect` runs the very code that loads.
//!
//! A network asks for tensors by diffusers' names. Where a file has those of the original implementation, a map
//! (`names`) says where in the file a tensor lies, which may be some rows of one that is larger.

use std::path::Path;
use std::sync::{Arc, MutexGuard};

use candle_core::{DType, Device, Tensor};
use sha2::{Digest as _, Sha256};

use self::ahead::{Asked, How, Key, Wanted};
use self::mapped::{Located, elements};
use self::names::{Names, Place};
use self::record::Record;
use self::source::{Origin, Source, placeholder};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::lora::{LayerShape, Sites, Slot};
use crate::quantisation::Quantisation;

mod ahead;
mod coded;
mod dummy;
mod files;
mod float8;
mod gguf;
mod mapped;
mod metadata;
pub mod names;
mod qweights;
mod record;
mod scales;
mod share;
pub mod single;
mod source;
mod split;
mod stored;
mod ties;

pub use self::ahead::Ahead;
pub use self::metadata::{Metadata, MetadataValue};
pub use self::record::{Coded, WeightsReport};
pub use self::share::{Axis, Share};
pub use self::stored::Stored;
pub use self::ties::Tie;

/// A view of a component's tensors under a name prefix. Cheap to clone.
#[derive(Clone)]
pub struct Weights {
    source: Arc<Source>,
    placement: Placement,
    prefix: String,
    /// Where tensors lie, if the files do not have the network's names.
    names: Option<Arc<dyn Names>>,
    /// Where layers note that they take adapters, if they do.
    sites: Option<Arc<Sites>>,
    /// In which format matrices are kept, if the checkpoint's configuration says it.
    quantisation: Option<Arc<Quantisation>>,
    /// Where what is asked for is noted or lies ready, and the component's name there.
    ahead: Option<(Arc<Ahead>, Arc<str>)>,
    /// What is given of each tensor, if not all of it.
    share: Option<Share>,
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights").field("root", &self.source.root).field("prefix", &self.prefix).finish()
    }
}

impl Weights {
    /// Maps all weight files of the folder `dir`, or the file of this name, and checks their headers.
    ///
    /// Errors name the file: no safetensors file at all (pickles are refused), a shard that the index names and the
    /// folder lacks, a header that is truncated or lies about sizes and offsets, a tensor that the index places in a
    /// shard that does not hold it.
    pub fn open(dir: &Path, placement: &Placement) -> Result<Self> {
        Self::open_as(dir, placement, false)
    }

    /// As [`Weights::open`], but tensors take no memory and missing ones are recorded instead of failing.
    pub fn open_dry(dir: &Path, placement: &Placement) -> Result<Self> {
        Self::open_as(dir, placement, true)
    }

    /// Random weights in place of those of the component at `path`: every tensor that is asked for is made where it will
    /// live, as if published in this dtype.
    pub fn dummy(path: &Path, published: DType, placement: &Placement) -> Self {
        Self::over(Source::new(path, Origin::Dummy(published), false), placement)
    }

    /// As [`Weights::dummy`], but tensors take no memory.
    pub fn dummy_dry(path: &Path, published: DType, placement: &Placement) -> Self {
        Self::over(Source::new(path, Origin::Dummy(published), true), placement)
    }

    fn open_as(dir: &Path, placement: &Placement, dry: bool) -> Result<Self> {
        Ok(Self::over(Source::new(dir, Origin::Files(files::open(dir)?), dry), placement))
    }

    fn over(source: Source, placement: &Placement) -> Self {
        let (source, placement) = (Arc::new(source), placement.clone());
        Self {
            source,
            placement,
            prefix: String::new(),
            names: None,
            sites: None,
            quantisation: None,
            ahead: None,
            share: None,
        }
    }

    /// The same view with these names of the network's tensors, if it is they that the files have. Called before any
    /// [`Weights::pp`].
    pub fn or_named(self, names: impl Names + 'static) -> Self {
        let mark = format!("{}{}", self.source.beginning(), names.mark());
        match self.source.published().contains_key(&mark) {
            true => Self { names: Some(Arc::new(names)), ..self },
            false => self,
        }
    }

    /// The view one level down: names get `prefix.segment.` in front.
    pub fn pp(&self, segment: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{segment}.", self.prefix), ..self.clone() }
    }

    /// The same view for a network that computes in another dtype.
    pub fn computing_in(&self, dtype: DType) -> Self {
        Self { placement: self.placement.computing_in(dtype), ..self.clone() }
    }

    /// The same view for a network whose layers take adapters: they enter themselves in `sites` as they load.
    pub fn noting(&self, sites: &Arc<Sites>) -> Self {
        Self { sites: Some(sites.clone()), ..self.clone() }
    }

    /// The name of the layer that this view is of.
    pub fn layer(&self) -> &str {
        self.prefix.strip_suffix('.').unwrap_or(&self.prefix)
    }

    /// Whether tensors take no memory.
    pub fn is_dry(&self) -> bool {
        self.source.dry
    }

    /// Whether the values are made up.
    pub fn is_dummy(&self) -> bool {
        matches!(self.source.origin, Origin::Dummy(_))
    }

    /// The same view of the component of this name with tensors that are made ready before they are asked for: a dry view
    /// notes what is asked for, another one takes what is ready.
    pub fn with_ahead(self, ahead: &Arc<Ahead>, component: &str) -> Self {
        Self { ahead: Some((ahead.clone(), component.into())), ..self }
    }

    /// The place for adapters of the layer that has this view's name, where the network takes any.
    pub fn slot(&self, shape: LayerShape) -> Option<Arc<Slot>> {
        self.sites.as_ref().map(|sites| sites.enter(self.layer(), shape))
    }

    /// Where the tensors will live and in which dtypes.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Whether the files hold a tensor of this name under the prefix.
    pub fn contains(&self, name: &str) -> bool {
        self.located(name).is_some()
    }

    /// Whether the files hold any tensor below `segment.`.
    pub fn contains_below(&self, segment: &str) -> bool {
        let Some(below) = self.below(segment) else { return false };
        self.source.published().range(below.clone()..).next().is_some_and(|(name, _)| name.starts_with(&below))
    }

    /// Number of dimensions of a tensor, if the files hold it.
    pub fn rank(&self, name: &str) -> Option<usize> {
        self.shape(name).map(<[usize]>::len)
    }

    /// Shape of a tensor, if the files hold it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.located(name).map(|located| located.shape.as_slice())
    }

    /// How the files keep the values of a tensor, if they hold it.
    pub fn stored(&self, name: &str) -> Option<Stored> {
        self.located(name).map(|located| located.stored)
    }

    /// A vector, norm weight, bias, convolution kernel or table, in the compute dtype.
    pub fn get(&self, shape: &[usize], name: &str) -> Result<Tensor> {
        self.load(shape, name, |placement, _| placement.compute_dtype)
    }

    /// A weight matrix in the dtype in which [`Placement`] keeps matrices.
    pub fn matrix(&self, rows: usize, cols: usize, name: &str) -> Result<Tensor> {
        self.load(&[rows, cols], name, Placement::matrix_dtype)
    }

    /// Says what is wrong with a tensor.
    pub fn error(&self, name: &str, problem: impl std::fmt::Display) -> Error {
        Error::checkpoint(&self.source.root, format!("tensor `{}` {problem}", self.place(&self.full_name(name)).name))
    }

    /// The values of a tensor as they are published, in host memory, for what is computed there. Of a dry view `None`.
    pub fn values(&self, shape: &[usize], name: &str) -> Result<Option<Vec<f32>>> {
        let tensor = self.computing_in(DType::F32).get(shape, name)?;
        if self.source.dry {
            return Ok(None);
        }
        Ok(Some(tensor.flatten_all()?.to_device(&Device::Cpu)?.to_vec1()?))
    }

    /// A tensor of the compute dtype that takes no memory, in place of what a dry view does not read.
    pub fn placeholder(&self, shape: &[usize]) -> Result<Tensor> {
        placeholder(shape, self.placement.compute_dtype, &self.placement.device)
    }

    /// Marks a tensor as known and deliberately not loaded, so that it is not reported as unused.
    pub fn ignore(&self, name: &str) {
        self.record().used.insert(self.place(&self.full_name(name)).name);
    }

    /// As [`Weights::ignore`], for all tensors below `segment.`.
    pub fn ignore_below(&self, segment: &str) {
        let Some(below) = self.below(segment) else { return };
        let names = self.source.published().range(below.clone()..).map(|(name, _)| name);
        self.record().used.extend(names.take_while(|name| name.starts_with(&below)).cloned());
    }

    /// What was used so far, and what is left over. The problems are given once.
    pub fn report(&self) -> WeightsReport {
        let dummy = match self.source.origin {
            Origin::Dummy(dtype) => Some(dtype),
            Origin::Files(_) => None,
        };
        self.record().report(self.source.published(), dummy)
    }

    /// Adds what tells these files from others with tensors of the same names and shapes: a few values of each. Random weights
    /// are all the same.
    pub fn add_to(&self, digest: &mut Sha256) {
        match &self.source.origin {
            Origin::Files(files) => files.add_to(digest),
            Origin::Dummy(dtype) => digest.update(format!("random {dtype:?}")),
        }
    }

    /// Bytes of the tensors loaded so far.
    pub fn resident_bytes(&self) -> usize {
        self.record().resident_bytes
    }

    /// The tensors of the files, all below the component's beginning, that have no place in the network; an error where
    /// all must have one.
    pub fn check_fit(&self, config: &Path) -> Result<()> {
        let Origin::Files(files) = &self.source.origin else { return Ok(()) };
        let record = self.record();
        let is_left = |name: &&String| name.starts_with(&files.beginning) && !record.used.contains(*name);
        let left: Vec<&String> = files.tensors.keys().filter(is_left).collect();
        match left.first() {
            Some(first) if files.must_fit => {
                let network = match config == self.source.root {
                    true => "that the network of its own metadata has not".to_owned(),
                    false => format!("that the network of {} has not: another base is needed", config.display()),
                };
                let problem = format!("has {} tensors, such as `{first}`, {network}", left.len());
                Err(Error::checkpoint(&self.source.root, problem))
            }
            _ => Ok(()),
        }
    }

    fn load(&self, shape: &[usize], name: &str, dtype: impl Fn(&Placement, DType) -> DType) -> Result<Tensor> {
        let full_name = self.full_name(name);
        let place = self.place(&full_name);
        let own_shape = self.own_shape(shape, name)?;
        let (source, placement) = (&*self.source, &self.placement);
        let found = source.find(&place, shape, self.share).and_then(|found| {
            self.check_scales(name)?;
            Ok(found)
        });
        let Some(found) = self.or_noted(&place, found)? else {
            return placeholder(&own_shape, dtype(placement, DType::F32), &placement.device);
        };
        let dtype = dtype(placement, found.published_dtype());
        let bytes = elements(&own_shape).saturating_mul(dtype.size_in_bytes());
        self.record().note_use(&full_name, &place.name, elements(shape), bytes);
        if source.dry {
            self.note_ahead(&full_name, &place, shape, found.bytes_to_read(bytes), How::Values(dtype));
            return placeholder(&own_shape, dtype, &placement.device);
        }
        match (self.take_ahead(&full_name, Some(dtype)), self.share) {
            (Some(tensor), _) => Ok(tensor),
            (None, None) => found.read(&full_name, shape, dtype, &placement.device),
            (None, Some(share)) => found.read_share(&full_name, (shape, &own_shape), share, dtype, &placement.device),
        }
    }

    /// Notes for whoever makes it ready that a tensor is asked for, if somebody does.
    fn note_ahead(&self, full_name: &str, place: &Place, shape: &[usize], bytes: usize, how: How) {
        let Some((ahead, component)) = &self.ahead else { return };
        let dtype = match how {
            How::Values(dtype) => Some(dtype),
            _ => None,
        };
        let key = Key { component: component.clone(), tensor: full_name.to_owned(), dtype };
        let (source, place) = (self.source.clone(), place.clone());
        let asked = Asked { key, source, place, shape: shape.to_vec(), bytes, bytes_done: 0 };
        ahead.note(Wanted { asked, how });
    }

    /// What is ready of a tensor: values in this dtype, or what was made of its bytes.
    fn take_ahead<T: 'static>(&self, full_name: &str, dtype: Option<DType>) -> Option<T> {
        let (ahead, component) = self.ahead.as_ref()?;
        ahead.take(&Key { component: component.clone(), tensor: full_name.to_owned(), dtype })
    }

    /// What was found at `place`; a dry view notes the problem where nothing was, and goes on.
    fn or_noted<T>(&self, place: &Place, found: Result<T>) -> Result<Option<T>> {
        match found {
            Err(problem) if self.source.dry => {
                self.record().note_problem(&place.name, problem)?;
                Ok(None)
            }
            found => found.map(Some),
        }
    }

    /// Where the tensor of this name under the prefix lies, if the files hold it.
    fn located(&self, name: &str) -> Option<&Located> {
        self.source.published().get(&self.place(&self.full_name(name)).name)
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.source.record.lock().expect("no code panics while it holds the record: this is a bug")
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Where the tensor lies that the network calls `full_name`.
    fn place(&self, full_name: &str) -> Place {
        let beginning = self.source.beginning();
        let place = self.names.as_ref().and_then(|names| names.place(full_name));
        let Place { name, part } = place.unwrap_or_else(|| Place::whole(full_name));
        Place { name: format!("{beginning}{name}"), part }
    }

    /// What the names in the files begin with of all tensors below `segment.`.
    fn below(&self, segment: &str) -> Option<String> {
        let below = format!("{}{segment}.", self.prefix);
        let below = match &self.names {
            Some(names) => names.below(&below)?,
            None => below,
        };
        Some(format!("{}{below}", self.source.beginning()))
    }
}

#[cfg(test)]
mod tests;
