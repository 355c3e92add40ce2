//! The terms of requests, loaded and put into a model's layers.
//!
//! Owns: which files' matrices are on the device, and which set of them is active. One thread drives a model: it makes a
//! set per combination of files and weights, in bounded steps, and activates that of a step before the step. To activate a
//! set is to move pointers.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use candle_core::{DType, Device, Tensor};
use tale_kernels::conv_weight;

use super::library::{LoraKey, LoraLibrary, LoraSupport, LoraUse, footprint_bytes};
use super::names::LoraNames;
use super::reading::{FileReading, LoadedAddend, LoadedTerm};
use super::slot::{Delta, LowRank, Scaled, Slot};
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

/// How far a set is.
#[derive(Debug)]
pub enum Making {
    /// Steps done, and steps in all.
    UnderWay {
        /// At least 1.
        done: usize,
        /// More than `done`.
        total: usize,
    },
    /// It is there, for as long as somebody holds it.
    Ready(Arc<AdapterSet>),
}

/// A set that is being made.
#[derive(Debug)]
struct UnderWay {
    key: LoraKey,
    /// Weights and files that are still to be read, the first of them perhaps in part.
    waiting: VecDeque<(f64, FileReading)>,
    /// Weights and terms of those before them.
    loaded: Vec<(f64, Arc<Vec<LoadedTerm>>)>,
    done: usize,
    total: usize,
}

impl UnderWay {
    fn new(loras: &[LoraUse], budget_bytes: usize) -> Self {
        let used = loras.iter().filter(|lora| lora.weight != 0.0);
        let waiting: VecDeque<_> = used.map(|lora| (lora.weight, FileReading::new(&lora.file))).collect();
        let bytes: usize = waiting.iter().map(|(_, file)| file.bytes_left()).sum();
        let total = bytes.div_ceil(budget_bytes.max(1)).max(1);
        Self { key: LoraKey::of(loras), waiting, loaded: Vec::new(), done: 0, total }
    }
}

#[derive(Debug)]
struct State {
    active: Option<Arc<AdapterSet>>,
    under_way: Vec<UnderWay>,
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
        let state =
            State { active: None, under_way: Vec::new(), sets: Vec::new(), files: VecDeque::new(), capacity_bytes: 0 };
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

    /// The set of these files and weights, if somebody holds it. Whoever does keeps it on the device.
    pub fn ready(&self, loras: &[LoraUse]) -> Option<Arc<AdapterSet>> {
        let key = LoraKey::of(loras);
        self.state().sets.iter().filter_map(Weak::upgrade).find(|set| set.key == key)
    }

    /// The next step towards the set of these files and weights, which reads `budget_bytes` at most where no single term has
    /// more; the last one makes the set. What is on the device already is not read.
    pub fn advance(&self, loras: &[LoraUse], budget_bytes: usize) -> Result<Making> {
        if let Some(set) = self.ready(loras) {
            return Ok(Making::Ready(set));
        }
        let mut state = self.state();
        // What fails is not kept.
        let under_way = state.take_under_way(&LoraKey::of(loras));
        let mut making = under_way.unwrap_or_else(|| UnderWay::new(loras, budget_bytes));
        making.done += 1;
        let is_read = state.read_on(&mut making, budget_bytes, &self.placement)?;
        if !is_read {
            let progress = Making::UnderWay { done: making.done, total: making.total.max(making.done + 1) };
            state.under_way.push(making);
            return Ok(progress);
        }
        let set = Arc::new(self.joined(making)?);
        state.forget_some();
        state.sets.retain(|set| set.strong_count() > 0);
        state.sets.push(Arc::downgrade(&set));
        Ok(Making::Ready(set))
    }

    /// Lets go of sets that are being made and that nobody waits for any more.
    pub fn retain_under_way(&self, is_awaited: impl Fn(&LoraKey) -> bool) {
        self.state().under_way.retain(|making| is_awaited(&making.key));
    }

    /// A set of terms that are all there.
    fn joined(&self, making: UnderWay) -> Result<AdapterSet> {
        let mut by_layer: BTreeMap<(usize, String), Vec<(LoadedTerm, f64)>> = BTreeMap::new();
        for (weight, loaded) in &making.loaded {
            for term in loaded.iter() {
                let layer = (term.network, term.layer.clone());
                by_layer.entry(layer).or_default().push((term.clone(), term.scale * weight));
            }
        }
        let mut terms = Vec::with_capacity(by_layer.len());
        for ((network, layer), parts) in by_layer {
            let slot = self.names.sites(network).slot(&layer).expect("a checked layer has its slot: this is a bug");
            terms.push((slot, Arc::new(joined(&parts, &self.placement)?)));
        }
        Ok(AdapterSet { key: making.key, terms })
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
    fn take_under_way(&mut self, key: &LoraKey) -> Option<UnderWay> {
        let position = self.under_way.iter().position(|making| making.key == *key)?;
        Some(self.under_way.swap_remove(position))
    }

    /// Reads on until `budget_bytes` are read. Whether all terms are there.
    fn read_on(&mut self, making: &mut UnderWay, budget_bytes: usize, placement: &Placement) -> Result<bool> {
        let mut room = budget_bytes;
        while let Some((weight, mut reading)) = making.waiting.pop_front() {
            if let Some(terms) = self.of_file(reading.file_id()) {
                making.loaded.push((weight, terms));
                continue;
            }
            if room > 0 {
                room = room.saturating_sub(reading.advance(room, placement)?);
            }
            if !reading.is_done() {
                making.waiting.push_front((weight, reading));
                return Ok(false);
            }
            let (id, bytes) = (reading.file_id(), reading.device_bytes());
            let terms = Arc::new(reading.into_terms());
            self.files.push_back(LoadedFile { id, bytes, terms: terms.clone() });
            making.loaded.push((weight, terms));
        }
        Ok(true)
    }

    /// The terms of a file that is on the device, which becomes the one that was used last.
    fn of_file(&mut self, id: u64) -> Option<Arc<Vec<LoadedTerm>>> {
        let position = self.files.iter().position(|loaded| loaded.id == id)?;
        let loaded = self.files.remove(position)?;
        let terms = loaded.terms.clone();
        self.files.push_back(loaded);
        Some(terms)
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

/// What the terms of one layer add together.
fn joined(parts: &[(LoadedTerm, f64)], placement: &Placement) -> Result<Delta> {
    let (mut pairs, mut weights, mut biases) = (Vec::new(), Vec::new(), Vec::new());
    for (term, scale) in parts {
        let scaled = |values: &Tensor| Scaled { values: values.clone(), scale: *scale };
        match &term.addend {
            LoadedAddend::LowRank { down, up } => {
                pairs.push(LowRank { down: down.clone(), up: up.clone(), scale: *scale });
            }
            // Of a layer that multiplies the answer is scaled, which is smaller than a copy of the matrix.
            LoadedAddend::Weight(values) if matches!(values.rank(), 2 | 4) => weights.push(scaled(values)),
            // Those of norms and tables are added to the layer's own in every pass, and so are biases.
            LoadedAddend::Weight(values) => weights.push(scaled(values).applied()?),
            LoadedAddend::Bias(values) => biases.push(scaled(values).applied()?),
        }
    }
    Ok(Delta {
        low_rank: side_by_side(pairs, placement)?,
        weight: sum(weights, placement)?,
        bias: sum(biases, placement)?,
    })
}

/// One pair as it is; several as one of the sum of their ranks.
fn side_by_side(mut pairs: Vec<LowRank>, placement: &Placement) -> Result<Option<LowRank>> {
    if pairs.len() < 2 {
        return Ok(pairs.pop());
    }
    let is_conv = pairs[0].down.rank() == 4;
    let (mut downs, mut ups) = (Vec::with_capacity(pairs.len()), Vec::with_capacity(pairs.len()));
    for LowRank { down, up, scale } in &pairs {
        // A scaled weight is rounded once.
        downs.push((plain(down)? * *scale)?);
        ups.push(plain(up)?);
    }
    let placed = |x: Tensor| -> Result<Tensor> {
        let x = x.to_dtype(placement.compute_dtype)?.to_device(&placement.device)?;
        if is_conv { Ok(conv_weight(&x)?) } else { Ok(x) }
    };
    Ok(Some(LowRank { down: placed(Tensor::cat(&downs, 0)?)?, up: placed(Tensor::cat(&ups, 1)?)?, scale: 1.0 }))
}

/// One tensor as it is; several as their sum.
fn sum(mut parts: Vec<Scaled>, placement: &Placement) -> Result<Option<Scaled>> {
    if parts.len() < 2 {
        return Ok(parts.pop());
    }
    let mut total = plain(&parts[0].values)?.zeros_like()?;
    for Scaled { values, scale } in &parts {
        total = (total + (plain(values)? * *scale)?)?;
    }
    let values = total.to_dtype(placement.compute_dtype)?.to_device(&placement.device)?;
    // That of a convolution lies as its layer reads it.
    let values = if values.rank() == 4 { conv_weight(&values)? } else { values };
    Ok(Some(Scaled { values, scale: 1.0 }))
}

/// In the host's memory, in f32.
fn plain(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use safetensors::{Dtype, serialize_to_file, tensor::TensorView};

    use super::*;
    use crate::device::{DeviceSpec, WeightDtype};
    use crate::lora::{LayerShape, LoraFile, NetworkNames, Sites};
    use crate::weights::names::{Names, Place};

    struct NoOthers;

    impl Names for NoOthers {
        fn mark(&self) -> &'static str {
            ""
        }

        fn place(&self, _: &str) -> Option<Place> {
            None
        }
    }

    const LAYERS: usize = 6;
    /// Two matrices of eight f32 each.
    const TERM_BYTES: usize = 64;

    /// A network whose layers all have a term in one file.
    fn network_and_file() -> (Adapters, LoraUse) {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("x.safetensors");
        let sites = Arc::<Sites>::default();
        let values: Vec<u8> = (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let mut tensors = Vec::new();
        for layer in 0..LAYERS {
            sites.enter(&format!("layers.{layer}"), LayerShape::Linear { in_features: 4, out_features: 4 });
            for (half, shape) in [("A", vec![2, 4]), ("B", vec![4, 2])] {
                let view = TensorView::new(Dtype::F32, shape, &values).expect("view");
                tensors.push((format!("transformer.layers.{layer}.lora_{half}.weight"), view));
            }
        }
        serialize_to_file(tensors, None, &path).expect("write");
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::F32).expect("cpu");
        let names = || LoraNames::new(vec![NetworkNames::denoiser(&sites, &NoOthers, [])]);
        let file = LoraFile::read(&path, File::open(&path).expect("there"), &names(), &placement).expect("is sound");
        (Adapters::new(names(), &placement), LoraUse { name: "x".into(), weight: 1.0, file: Arc::new(file) })
    }

    #[test]
    fn a_file_is_read_in_bounded_steps() {
        for (budget, steps) in [(1000, 1), (2 * TERM_BYTES, 3), (TERM_BYTES + 1, 6), (1, 6)] {
            let (adapters, lora) = network_and_file();
            let loras = [lora];
            for step in 1..steps {
                let making = adapters.advance(&loras, budget).expect("reads");
                assert!(
                    matches!(making, Making::UnderWay { done, total } if done == step && total > step),
                    "{making:?}"
                );
                assert!(adapters.ready(&loras).is_none());
            }
            let Making::Ready(set) = adapters.advance(&loras, budget).expect("reads") else {
                panic!("{budget} bytes a step: not done after {steps}");
            };
            assert_eq!(set.terms.len(), LAYERS);
            assert!(adapters.ready(&loras).is_some_and(|ready| Arc::ptr_eq(&ready, &set)));
        }
    }

    #[test]
    fn a_set_that_nobody_waits_for_is_dropped_half_read() {
        let (adapters, lora) = network_and_file();
        let loras = [lora];
        adapters.advance(&loras, TERM_BYTES).expect("reads");
        adapters.retain_under_way(|key| *key == LoraKey::of(&loras));
        assert_eq!(adapters.state().under_way.len(), 1);
        adapters.retain_under_way(|_| false);
        assert!(adapters.state().under_way.is_empty() && adapters.state().files.is_empty());
    }
}
