//! The terms of requests, loaded and put into a model's layers.
//!
//! Owns: which files' matrices are on the device, and which set of them is active. One thread drives a model: it makes a
//! set per combination of files and weights, and activates that of a step before the step. To activate a set is to move
//! pointers.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use candle_core::{DType, Device, Tensor};
use tale_kernels::conv_weight;

use super::file::{LoadedTerm, LoraFile};
use super::library::{LoraKey, LoraLibrary, LoraSupport, LoraUse, footprint_bytes};
use super::names::LoraNames;
use super::slot::{Delta, Slot};
use crate::device::Placement;
use crate::error::Result;

/// All terms of one combination of files and weights.
#[derive(Debug)]
pub struct AdapterSet {
    key: LoraKey,
    terms: Vec<(Arc<Slot>, Arc<Delta>)>,
}

/// The layers of a model that take terms, the files on its device, and the active set.
#[derive(Debug)]
pub struct Adapters {
    names: Arc<LoraNames>,
    placement: Placement,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    active: Option<Arc<AdapterSet>>,
    /// Sets that sessions hold.
    sets: Vec<Weak<AdapterSet>>,
    /// Most recently used last.
    files: VecDeque<LoadedFile>,
    capacity_bytes: usize,
}

#[derive(Debug)]
struct LoadedFile {
    id: u64,
    bytes: usize,
    terms: Arc<Vec<LoadedTerm>>,
}

impl Adapters {
    /// Layers with these names, without a folder of files.
    pub fn new(names: LoraNames, placement: &Placement) -> Self {
        let state = State { active: None, sets: Vec::new(), files: VecDeque::new(), capacity_bytes: 0 };
        Self { names: Arc::new(names), placement: placement.clone(), state: Mutex::new(state) }
    }

    /// What a card says of them with this folder of files. `cache_bytes`: most bytes of files that stay on the device
    /// when no session uses them.
    pub fn open_folder(&self, folder: Option<&Path>, cache_bytes: usize) -> Result<LoraSupport> {
        let Some(folder) = folder else { return Ok(LoraSupport::NoFolder) };
        let library = LoraLibrary::open(folder, self.names.clone(), &self.placement)?;
        self.state().capacity_bytes = cache_bytes;
        Ok(LoraSupport::Folder(Arc::new(library)))
    }

    /// Most bytes of files that stay on the device when no session uses them.
    pub fn cache_bytes(&self) -> usize {
        self.state().capacity_bytes
    }

    /// Bytes of device memory that a session with these adapters needs for them.
    pub fn footprint_bytes(&self, loras: &[LoraUse]) -> usize {
        footprint_bytes(loras, &self.placement)
    }

    /// The set of these files and weights, read from disk as far as it is not on the device; `None` of nothing. Whoever
    /// holds it keeps it there.
    pub fn prepare(&self, loras: &[LoraUse]) -> Result<Option<Arc<AdapterSet>>> {
        let key = LoraKey::of(loras);
        if key.is_empty() {
            return Ok(None);
        }
        let mut state = self.state();
        state.sets.retain(|set| set.strong_count() > 0);
        if let Some(set) = state.sets.iter().filter_map(Weak::upgrade).find(|set| set.key == key) {
            return Ok(Some(set));
        }
        let mut by_layer: BTreeMap<(usize, String), Vec<(LoadedTerm, f64)>> = BTreeMap::new();
        for lora in loras.iter().filter(|lora| lora.weight != 0.0) {
            for term in state.load(&lora.file, &self.placement)?.iter() {
                let layer = (term.network, term.layer.clone());
                by_layer.entry(layer).or_default().push((term.clone(), term.scale * lora.weight));
            }
        }
        state.forget_some();
        let mut terms = Vec::with_capacity(by_layer.len());
        for ((network, layer), parts) in by_layer {
            let slot = self.names.sites(network).slot(&layer).expect("a checked layer has its slot: this is a bug");
            terms.push((slot, Arc::new(joined(&parts, &self.placement)?)));
        }
        let set = Arc::new(AdapterSet { key, terms });
        state.sets.push(Arc::downgrade(&set));
        Ok(Some(set))
    }

    /// From now on the layers add the terms of this set and no others.
    pub fn activate(&self, set: Option<&Arc<AdapterSet>>) {
        let mut state = self.state();
        let is_active = match (&state.active, set) {
            (Some(active), Some(set)) => Arc::ptr_eq(active, set),
            (None, None) => true,
            _ => false,
        };
        if is_active {
            return;
        }
        for (slot, _) in state.active.iter().flat_map(|active| &active.terms) {
            slot.set(None);
        }
        for (slot, delta) in set.iter().flat_map(|set| &set.terms) {
            slot.set(Some(delta.clone()));
        }
        state.active = set.cloned();
    }

    /// Whether any layer adds a term now.
    pub fn is_active(&self) -> bool {
        self.state().active.is_some()
    }

    /// Lets go of the active set where no session holds it any more.
    pub fn release_unused(&self) {
        let is_unused = self.state().active.as_ref().is_some_and(|active| Arc::strong_count(active) == 1);
        if is_unused {
            self.activate(None);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds the adapters: this is a bug")
    }
}

/// The layers' slots are known beyond the thread of the device, by whoever knows the layers' names; tensors are not.
impl Drop for Adapters {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (slot, _) in state.active.iter().flat_map(|active| &active.terms) {
            slot.set(None);
        }
    }
}

impl State {
    fn load(&mut self, file: &LoraFile, placement: &Placement) -> Result<Arc<Vec<LoadedTerm>>> {
        let found = self.files.iter().position(|loaded| loaded.id == file.id());
        let loaded = match found.and_then(|position| self.files.remove(position)) {
            Some(loaded) => loaded,
            None => LoadedFile { id: file.id(), bytes: file.device_bytes(), terms: Arc::new(file.load(placement)?) },
        };
        let terms = loaded.terms.clone();
        self.files.push_back(loaded);
        Ok(terms)
    }

    /// The files that were used longest ago go until the rest fits. What sessions use lives on in their sets.
    fn forget_some(&mut self) {
        let mut bytes: usize = self.files.iter().map(|file| file.bytes).sum();
        while bytes > self.capacity_bytes {
            let Some(oldest) = self.files.pop_front() else { return };
            bytes -= oldest.bytes;
        }
    }
}

/// One term as it is; several side by side, as one of the sum of their ranks.
fn joined(parts: &[(LoadedTerm, f64)], placement: &Placement) -> Result<Delta> {
    if let [(term, scale)] = parts {
        return Ok(Delta { down: term.down.clone(), up: term.up.clone(), scale: *scale });
    }
    let is_conv = parts[0].0.down.rank() == 4;
    let (mut downs, mut ups) = (Vec::with_capacity(parts.len()), Vec::with_capacity(parts.len()));
    for (term, scale) in parts {
        // In f32: a scaled weight is rounded once.
        let plain = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
        downs.push((plain(&term.down)? * *scale)?);
        ups.push(plain(&term.up)?);
    }
    let placed = |x: Tensor| -> Result<Tensor> {
        let x = x.to_dtype(placement.compute_dtype)?.to_device(&placement.device)?;
        if is_conv { Ok(conv_weight(&x)?) } else { Ok(x) }
    };
    Ok(Delta { down: placed(Tensor::cat(&downs, 0)?)?, up: placed(Tensor::cat(&ups, 1)?)?, scale: 1.0 })
}
