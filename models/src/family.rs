//! The table of model families, and the way from a checkpoint folder to a loaded model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use candle_core::DType;

use crate::card::ModelCard;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::lora::LoraSupport;
use crate::manifest::Manifest;
use crate::runner::Runner;
use crate::runner::diffusion::on_demand::OnDemand;
use crate::source::ModelSource;
use crate::weights::{Weights, WeightsReport};

/// Everything about one family of models. One unit struct per family, one line in [`FAMILIES`].
pub trait Family: Sync {
    /// Name in messages, metrics and docs.
    fn name(&self) -> &'static str;

    /// What it makes, for the table in the docs: `text`, `image`, `video`.
    fn makes(&self) -> &'static str;

    /// Whether the checkpoint is of this family.
    fn detects(&self, manifest: &Manifest) -> bool;

    /// Components that work on prompts alone and may be away from the device in between, if there are such.
    fn text_encoders(&self) -> &'static [&'static str] {
        &[]
    }

    /// Builds the model from the weights that `open` gives for each component (`""` for a whole-folder model).
    /// `inspect` calls it with dry weights, `load` with real ones.
    fn load(&self, manifest: &Manifest, open: &mut OpenWeights<'_>, options: &LoadOptions) -> Result<LoadedModel>;
}

/// All families of this build.
pub const FAMILIES: &[&dyn Family] = &[
    &crate::families::llama::Llama,
    &crate::families::qwen2::Qwen2,
    &crate::families::flux::Flux,
    &crate::families::sdxl::Sdxl,
    &crate::families::wan::Wan,
];

/// Why a model is built.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// To run.
    Load,
    /// To see what its files lack, and what it would take.
    Inspect,
}

/// Which components are for the device; the others are dry: not even their shapes are made there.
#[derive(Clone, Copy)]
enum Parts<'a> {
    All,
    /// These alone.
    Only(&'a [&'a str]),
    /// All but these.
    Without(&'a [&'a str]),
}

impl Parts<'_> {
    fn contains(self, component: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(&component),
            Self::Without(names) => !names.contains(&component),
        }
    }
}

/// Opens a component's weights by folder name and reports progress; remembers them for [`inspect`].
pub struct OpenWeights<'a> {
    source: &'a ModelSource,
    placement: &'a Placement,
    parts: Parts<'a>,
    mode: Mode,
    format: LoadFormat,
    on_component: &'a mut dyn FnMut(&str),
    opened: Vec<(String, Weights)>,
}

impl OpenWeights<'_> {
    /// The weights of the component in folder `name`; the empty name is the checkpoint folder itself.
    pub fn component(&mut self, manifest: &Manifest, name: &str) -> Result<Weights> {
        let component = if name.is_empty() { manifest.whole() } else { manifest.component(name)? };
        let (mode, placement) = self.how(name);
        let weights = match self.of_single_file(manifest, name, mode, &placement) {
            Some(weights) => weights,
            None => self.of_folder(&component.dir, mode, &placement)?,
        };
        self.opened.push((name.to_owned(), weights.clone()));
        Ok(weights)
    }

    /// The weights in a folder or file that goes with the checkpoint, by the name under which they are reported.
    pub fn beside(&mut self, name: &str, path: &Path) -> Result<Weights> {
        if self.format == LoadFormat::Dummy {
            return Err(Error::checkpoint(path, "goes with the files of a checkpoint, not with random weights"));
        }
        let (mode, placement) = self.how(name);
        let weights = match mode {
            Mode::Load => Weights::open(path, &placement)?,
            Mode::Inspect => Weights::open_dry(path, &placement)?,
        };
        self.opened.push((name.to_owned(), weights.clone()));
        Ok(weights)
    }

    /// Where the model lies, and what goes with it.
    pub fn source(&self) -> &ModelSource {
        self.source
    }

    fn of_single_file(&self, manifest: &Manifest, name: &str, mode: Mode, placement: &Placement) -> Option<Weights> {
        let file = manifest.single_file.as_ref().filter(|_| self.format == LoadFormat::Auto)?;
        file.weights(name, placement, mode == Mode::Inspect)
    }

    fn of_folder(&self, dir: &Path, mode: Mode, placement: &Placement) -> Result<Weights> {
        match (self.format, mode) {
            (LoadFormat::Auto, Mode::Load) => Weights::open(dir, placement),
            (LoadFormat::Auto, Mode::Inspect) => Weights::open_dry(dir, placement),
            (LoadFormat::Dummy, Mode::Load) => Weights::dummy(dir, placement),
            (LoadFormat::Dummy, Mode::Inspect) => Weights::dummy_dry(dir, placement),
        }
    }

    /// Whether the networks took all of the files that must fit them.
    fn check_fit(&self, manifest: &Manifest) -> Result<()> {
        let config = |component: &str| manifest.root.join(component).join("config.json");
        self.opened.iter().try_for_each(|(component, weights)| weights.check_fit(&config(component)))
    }

    /// How the component of this name is opened.
    fn how(&mut self, name: &str) -> (Mode, Placement) {
        match self.parts.contains(name) {
            true => {
                (self.on_component)(name);
                (self.mode, self.placement.clone())
            }
            false => (Mode::Inspect, self.placement.in_memory_of_the_host()),
        }
    }

    /// What gives text encoders that are not kept on the device to work with; `None` where they are. Asked when all
    /// components have been opened.
    pub fn text_encoders<M: 'static>(&self, build: Build<M>) -> Option<OnDemand<M>> {
        let Parts::Without(components) = self.parts else { return None };
        let reread = self.reread();
        let components: Vec<String> = components.iter().map(|name| (*name).to_owned()).collect();
        let read = move || {
            let names: Vec<&str> = components.iter().map(String::as_str).collect();
            Ok(reread.built(reread.placement.clone(), Mode::Load, &names, build)?.0)
        };
        Some(OnDemand::new(self.bytes(|name| !self.parts.contains(name)), Box::new(read)))
    }

    /// Bytes that opened components take on the device once they are there.
    fn bytes(&self, which: impl Fn(&str) -> bool) -> usize {
        let opened = self.opened.iter().filter(|(name, _)| which(name));
        opened.map(|(_, weights)| weights.report().resident_bytes).sum()
    }

    /// For whoever may want to read parts of the model once more.
    pub fn reread(&self) -> Reread {
        let source = self.source.clone();
        let files = WeightFiles::of(&source);
        Reread { source, files, placement: self.placement.clone(), format: self.format }
    }

    /// Where tensors will live.
    pub fn placement(&self) -> &Placement {
        self.placement
    }

    /// Whether this is an inspection: tensors take no memory, so nothing large may be computed from them.
    pub fn is_dry(&self) -> bool {
        self.mode != Mode::Load
    }
}

/// Where a model was read from, to read parts of it in f32 later. No file is kept open or mapped meanwhile: whoever
/// overwrites it must not end the process.
pub struct Reread {
    source: ModelSource,
    /// As they were when the model was read.
    files: WeightFiles,
    placement: Placement,
    format: LoadFormat,
}

/// What makes a model of the weights that are opened for it.
pub type Build<M> = fn(&Manifest, &mut OpenWeights<'_>) -> Result<M>;

impl Reread {
    /// A model whose components of these names are read in f32. The others are dry: they take no memory, and nothing may be
    /// computed from them.
    pub fn in_f32<M>(&self, components: &[&str], build: Build<M>) -> Result<M> {
        Ok(self.built(self.placement.computing_in(DType::F32), Mode::Load, components, build)?.0)
    }

    /// The same, wholly dry, and the bytes of the weights that would be read.
    pub fn dry_in_f32<M>(&self, components: &[&str], build: Build<M>) -> Result<(M, usize)> {
        let placement = self.placement.computing_in(DType::F32).in_memory_of_the_host();
        let (model, opened) = self.built(placement, Mode::Inspect, components, build)?;
        let of_components = opened.iter().filter(|(name, _)| components.contains(&name.as_str()));
        Ok((model, of_components.map(|(_, weights)| weights.report().resident_bytes).sum()))
    }

    /// See [`Placement::spare_bytes`].
    pub fn spare_bytes(&self) -> Result<Option<usize>> {
        self.placement.spare_bytes()
    }

    fn built<M>(
        &self,
        placement: Placement,
        mode: Mode,
        components: &[&str],
        build: Build<M>,
    ) -> Result<(M, Vec<(String, Weights)>)> {
        if WeightFiles::of(&self.source) != self.files {
            let problem = "has changed since the model was loaded, so that nothing more can be read from it; restart";
            return Err(Error::checkpoint(&self.source.path, problem));
        }
        let manifest = Manifest::read(&self.source)?;
        let (format, opened) = (self.format, Vec::new());
        let mut open = OpenWeights {
            source: &self.source,
            placement: &placement,
            parts: Parts::Only(components),
            mode,
            format,
            on_component: &mut |_| (),
            opened,
        };
        let model = build(&manifest, &mut open)?;
        Ok((model, open.opened))
    }
}

/// Length and time of change of the files that a model is made of, by which one can tell that they are the same.
#[derive(PartialEq, Eq)]
struct WeightFiles(BTreeMap<PathBuf, (u64, SystemTime)>);

impl WeightFiles {
    /// Of a checkpoint's folder and those in it, or of a file and its base. LoRA files may come and go.
    fn of(source: &ModelSource) -> Self {
        let mut found = Self(BTreeMap::new());
        let own = || source.path.parent().filter(|folder| folder.join("model_index.json").exists());
        let base = source.base.as_deref().or_else(|| own().filter(|_| source.path.is_file()));
        for path in std::iter::once(source.path.as_path())
            .chain(base)
            .chain(source.ip_adapter.as_deref())
            .chain(source.refiner.as_deref())
        {
            found.add(path, source.loras.as_deref(), 1);
        }
        found
    }

    fn add(&mut self, path: &Path, left_out: Option<&Path>, depth: usize) {
        if Some(path) == left_out {
            return;
        }
        let Ok(metadata) = path.metadata() else { return };
        if metadata.is_file() {
            let changed = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            self.0.insert(path.to_owned(), (metadata.len(), changed));
            return;
        }
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_file() || depth > 0 {
                self.add(&path, left_out, depth.saturating_sub(1));
            }
        }
    }
}

/// `--load-format`: where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The checkpoint's files, in the format that they have.
    #[default]
    Auto,
    /// Nowhere: random values in the shapes that the configurations ask for, made on the device.
    Dummy,
}

impl std::str::FromStr for LoadFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "dummy" => Ok(Self::Dummy),
            _ => Err(Error::invalid("load_format", format!("`{name}` is not a load format; allowed: auto, dummy"))),
        }
    }
}

/// Where text encoders are while no prompt is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TextEncoders {
    /// On the device.
    #[default]
    Resident,
    /// Nowhere: they are read for the steps that encode prompts, whose sessions have reserved their bytes.
    OnDemand,
}

/// Where weights come from, and sizes of what a runner allocates beside them.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// Bytes of the paged KV cache of a language model.
    pub kv_cache_bytes: usize,
    /// Most tokens (decode and prefill together) of one text step.
    pub max_batch_tokens: usize,
    /// Most sequences of one text step.
    pub max_batch_sequences: usize,
    /// Most rows (sessions times guidance branches) of one denoising step.
    pub max_denoise_rows: usize,
    /// Bytes of device memory for LoRA files that no request uses, for each model that has a folder of them.
    pub lora_cache_bytes: usize,
    /// Where the text encoders of a model that makes pictures or clips are while no prompt is encoded.
    pub text_encoders: TextEncoders,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            load_format: LoadFormat::Auto,
            kv_cache_bytes: 1 << 30,
            max_batch_tokens: 512,
            max_batch_sequences: 64,
            max_denoise_rows: 4,
            lora_cache_bytes: 1 << 30,
            text_encoders: TextEncoders::Resident,
        }
    }
}

/// A model ready to serve: its card for everybody, its runner for the device thread.
pub struct LoadedModel {
    /// Limits, defaults, tokenizer.
    pub card: ModelCard,
    /// Drives its sessions.
    pub runner: Box<dyn Runner>,
    /// Bytes that the weights and fixed caches take on the device.
    pub resident_bytes: usize,
}

/// What a checkpoint is, without loading it.
#[derive(Debug)]
pub struct Inspection {
    /// Family name.
    pub family: &'static str,
    /// `text`, `image` or `video`.
    pub makes: &'static str,
    /// Component folder (`""` for a whole-folder model) and its report.
    pub components: Vec<(String, WeightsReport)>,
    /// Bytes of fixed caches beside the weights (the KV pool of a language model).
    pub cache_bytes: usize,
    /// Bytes of the components that are read on demand.
    pub on_demand_bytes: usize,
    /// Why the model could not be built although its tensors are there, if so.
    pub problem: Option<Error>,
}

impl Inspection {
    /// Bytes that the model takes on the device once it is loaded.
    pub fn resident_bytes(&self) -> usize {
        let components = self.components.iter().map(|(_, report)| report.resident_bytes).sum::<usize>();
        self.cache_bytes + components - self.on_demand_bytes
    }
}

/// Loads a checkpoint. `on_component` hears the name of each component before it is read.
pub fn load(
    source: impl Into<ModelSource>,
    placement: &Placement,
    options: &LoadOptions,
    on_component: &mut dyn FnMut(&str),
) -> Result<LoadedModel> {
    let source = source.into();
    let manifest = Manifest::read(&source)?;
    let family = detect(&manifest)?;
    let (source, mode, format) = (&source, Mode::Load, options.load_format);
    let parts = parts(family, options);
    let mut open = OpenWeights { source, placement, parts, mode, format, on_component, opened: Vec::new() };
    let mut model = load_with(family, &manifest, &mut open, options)?;
    model.resident_bytes += open.bytes(|name| parts.contains(name));
    for (component, weights) in &open.opened {
        let report = weights.report();
        if !report.unused.is_empty() {
            tracing::warn!(
                component,
                unused = report.unused.len(),
                first = report.unused[0],
                "tensors of the checkpoint are not used"
            );
        }
    }
    Ok(model)
}

/// Says what a checkpoint is, what is missing or unused and what it would take, without loading it.
pub fn inspect(source: impl Into<ModelSource>, placement: &Placement, options: &LoadOptions) -> Result<Inspection> {
    Ok(plan(source, placement, options)?.0)
}

/// As [`inspect`], with the model itself, over tensors that take no memory: its card and the footprints of its requests
/// are those of the loaded one. There is no model where the inspection names a problem.
pub fn plan(
    source: impl Into<ModelSource>,
    placement: &Placement,
    options: &LoadOptions,
) -> Result<(Inspection, Option<LoadedModel>)> {
    let source = source.into();
    let manifest = Manifest::read(&source)?;
    let family = detect(&manifest)?;
    let (source, mode, format) = (&source, Mode::Inspect, options.load_format);
    let (parts, on_component) = (parts(family, options), &mut |_: &str| ());
    let mut open = OpenWeights { source, placement, parts, mode, format, on_component, opened: Vec::new() };
    let (model, problem) = match load_with(family, &manifest, &mut open, options) {
        Ok(model) => (Some(model), None),
        Err(problem) => (None, Some(problem)),
    };
    let cache_bytes = model.as_ref().map_or(0, |model| model.resident_bytes);
    let on_demand_bytes = open.bytes(|name| !parts.contains(name));
    let components = open.opened.into_iter().map(|(name, weights)| (name, weights.report())).collect();
    let (family, makes) = (family.name(), family.makes());
    let inspection = Inspection { family, makes, components, cache_bytes, on_demand_bytes, problem };
    Ok((inspection, model))
}

fn parts(family: &dyn Family, options: &LoadOptions) -> Parts<'static> {
    match options.text_encoders {
        TextEncoders::Resident => Parts::All,
        TextEncoders::OnDemand => match family.text_encoders() {
            [] => Parts::All,
            components => Parts::Without(components),
        },
    }
}

/// Builds the model, and sees to it that nothing of its source is left lying.
fn load_with(
    family: &dyn Family,
    manifest: &Manifest,
    open: &mut OpenWeights<'_>,
    options: &LoadOptions,
) -> Result<LoadedModel> {
    let model = family.load(manifest, open, options)?;
    open.check_fit(manifest)?;
    let has_ip_adapter = matches!(&model.card, ModelCard::Diffusion(card) if card.has_ip_adapter);
    let takes_loras = matches!(&model.card, ModelCard::Diffusion(card) if matches!(card.loras, LoraSupport::Folder(_)));
    let has_refiner = matches!(&model.card, ModelCard::Diffusion(card) if card.refiner.is_some());
    let ModelSource { ip_adapter, image_encoder, loras, refiner, .. } = open.source;
    if let Some(folder) = loras.as_ref().filter(|_| !takes_loras) {
        return Err(Error::checkpoint(folder, format!("models of family {} take no LoRA", family.name())));
    }
    if let Some(folder) = refiner.as_ref().filter(|_| !has_refiner) {
        return Err(Error::checkpoint(folder, format!("models of family {} take no refiner", family.name())));
    }
    match (ip_adapter, image_encoder) {
        (Some(path), _) if !has_ip_adapter => {
            Err(Error::checkpoint(path, format!("models of family {} take no IP-Adapter", family.name())))
        }
        (None, Some(path)) => Err(Error::checkpoint(path, "is an image encoder without an `ip_adapter` to serve")),
        _ => Ok(model),
    }
}

fn detect(manifest: &Manifest) -> Result<&'static dyn Family> {
    FAMILIES.iter().copied().find(|family| family.detects(manifest)).ok_or_else(|| Error::UnknownArchitecture {
        path: manifest.root.clone(),
        found: manifest.architecture().to_owned(),
        supported: FAMILIES.iter().map(|family| family.name()).collect::<Vec<_>>().join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{DeviceSpec, WeightDtype};
    use crate::testing::repository;

    #[test]
    fn files_that_changed_are_told_from_those_that_were_loaded() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("created");
            std::fs::write(path, text).expect("written");
        };
        write("unet/model.safetensors", "old");
        let source = ModelSource { loras: Some(dir.path().join("loras")), ..ModelSource::at(dir.path()) };
        let loaded = WeightFiles::of(&source);
        write("loras/new.safetensors", "any");
        assert!(WeightFiles::of(&source) == loaded, "LoRA files come and go");
        write("unet/model.safetensors", "longer");
        assert!(WeightFiles::of(&source) != loaded);
    }

    /// Golden cases by the family that recognises their checkpoint.
    fn goldens_by_family() -> BTreeMap<&'static str, Vec<String>> {
        let goldens = repository().join("tests/goldens");
        let mut cases: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
        for entry in std::fs::read_dir(&goldens).expect("tests/goldens is there") {
            let case = entry.expect("readable").path();
            if let Ok(manifest) = Manifest::read(&case.join("checkpoint")) {
                let family = detect(&manifest).expect("a golden's checkpoint is of a known family");
                cases.entry(family.name()).or_default().push(case.display().to_string());
            }
        }
        cases
    }

    #[test]
    fn every_family_has_goldens() {
        let goldens = goldens_by_family();
        for family in FAMILIES {
            let cases = goldens.get(family.name()).map_or(0, Vec::len);
            assert!(cases >= 2, "family {} has {cases} golden cases; scripts/goldens makes them", family.name());
        }
    }

    #[test]
    fn inspection_finds_nothing_missing_and_nothing_unused_in_the_goldens() {
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("cpu");
        for case in goldens_by_family().into_values().flatten() {
            let inspection =
                inspect(&Path::new(&case).join("checkpoint"), &placement, &LoadOptions::default()).expect("inspect");
            assert!(inspection.problem.is_none(), "{case}: {:?}", inspection.problem);
            for (component, report) in inspection.components {
                assert!(report.problems.is_empty(), "{case} {component}: {:?}", report.problems);
                assert!(report.unused.is_empty(), "{case} {component}: unused {:?}", report.unused);
            }
        }
    }

    /// Random weights take what the files take, whoever asks: the inspection or the load.
    #[test]
    fn dummy_weights_take_the_memory_of_the_files() {
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::F32).expect("cpu");
        for case in goldens_by_family().into_values().flatten() {
            let path = Path::new(&case).join("checkpoint");
            let options = |load_format| LoadOptions { load_format, kv_cache_bytes: 1 << 18, ..Default::default() };
            let of_files = inspect(&path, &placement, &options(LoadFormat::Auto)).expect("inspect");
            let dummy = inspect(&path, &placement, &options(LoadFormat::Dummy)).expect("inspect");
            assert!(dummy.problem.is_none(), "{case}: {:?}", dummy.problem);
            assert_eq!(dummy.resident_bytes(), of_files.resident_bytes(), "{case}");
            let loaded = load(&path, &placement, &options(LoadFormat::Dummy), &mut |_| ()).expect("load");
            assert_eq!(loaded.resident_bytes, of_files.resident_bytes(), "{case}");
        }
    }

    /// With the dtypes of a GPU weights, caches and what a request needs are counted in the compute dtype; only latents
    /// and tables stay f32.
    #[test]
    fn bytes_follow_the_compute_dtype() {
        let options = LoadOptions { kv_cache_bytes: 1 << 18, ..LoadOptions::default() };
        for case in goldens_by_family().into_values().flatten() {
            let facts = |dtype| {
                let (path, placement) = (Path::new(&case).join("checkpoint"), as_on_a_gpu(dtype));
                let inspection = inspect(&path, &placement, &options).expect("inspect");
                let model = load(&path, &placement, &options, &mut |_| ()).expect("load");
                assert_eq!(model.resident_bytes, inspection.resident_bytes(), "{case}");
                let blocks = model.runner.status().kv_blocks_total;
                (inspection.resident_bytes() - inspection.cache_bytes, blocks, default_footprint_bytes(&model))
            };
            let (wide, narrow) = (facts(WeightDtype::F32), facts(WeightDtype::Auto));
            assert_eq!((wide.0, wide.1), (2 * narrow.0, narrow.1 / 2), "{case}: weights, KV blocks");
            match wide.2 {
                0 => assert_eq!(narrow.2, 0),
                bytes => assert!((bytes / 2 + 1..bytes).contains(&narrow.2), "{case}: {bytes}, {}", narrow.2),
            }
        }
    }

    fn as_on_a_gpu(dtype: WeightDtype) -> Placement {
        Placement::in_host_memory(DeviceSpec::Cuda(0), dtype)
    }

    /// Of a request that asks for nothing but a prompt.
    fn default_footprint_bytes(model: &LoadedModel) -> usize {
        let ModelCard::Diffusion(card) = &model.card else { return 0 };
        let options = crate::card::DiffusionOptions { prompt: "x".into(), ..Default::default() };
        model.runner.plan(&crate::Request::Diffusion(card.resolve(options, 0).expect("valid"))).peak_bytes()
    }

    #[test]
    fn an_unknown_architecture_is_refused_with_the_known_ones() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("config.json"), r#"{"architectures":["MambaForCausalLM"]}"#).expect("write");
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("cpu");
        let error = inspect(dir.path(), &placement, &LoadOptions::default()).expect_err("unknown").to_string();
        assert!(error.contains("MambaForCausalLM") && error.contains("llama"), "{error}");
    }

    #[test]
    fn the_documented_table_is_this_table() {
        let docs = repository().join("docs/models.md");
        let docs = std::fs::read_to_string(docs).expect("docs/models.md is there");
        for family in FAMILIES {
            let row = format!("| `{}` | {} |", family.name(), family.makes());
            assert!(docs.contains(&row), "docs/models.md lacks the row `{row}`");
        }
    }
}
