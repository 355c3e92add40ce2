//! The way from a checkpoint to a loaded model, or to what one would take.

use crate::card::ModelCard;
use crate::checkpoint::{Manifest, Mode, OnDevice, OpenWeights};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::families::detect;
use crate::family::{Family, LoadOptions, LoadedModel, TextEncoders};
use crate::lora::LoraSupport;
use crate::quietly::quietly;
use crate::source::ModelSource;
use crate::weights::WeightsReport;

mod steps;

pub use self::steps::{Loading, Noted};

/// What a checkpoint is, without loading it.
#[derive(Debug)]
pub struct Inspection {
    /// Family name.
    pub family: &'static str,
    /// `text`, `image` or `video`.
    pub makes: &'static str,
    /// See [`Family::licence_note`].
    pub licence_note: Option<&'static str>,
    /// Component folder (`""` for a whole-folder model) and its report.
    pub components: Vec<(String, WeightsReport)>,
    /// Bytes of fixed caches beside the weights (the KV pool of a language model).
    pub cache_bytes: usize,
    /// See [`LoadedModel::widened_bytes`].
    pub widened_bytes: usize,
    /// Bytes of the components that are read on demand.
    pub on_demand_bytes: usize,
    /// Why the model could not be built although its tensors are there, if so.
    pub problem: Option<Error>,
}

impl Inspection {
    /// Why the model cannot be loaded, if it cannot: the first of what is wrong with it.
    pub fn into_problem(self) -> Option<Error> {
        let mut of_weights = self.components.into_iter().flat_map(|(_, report)| report.problems);
        of_weights.next().or(self.problem)
    }

    /// Bytes that the model takes on the device once it is loaded, and in any step.
    pub fn resident_bytes(&self) -> usize {
        let components = self.components.iter().map(|(_, report)| report.resident_bytes).sum::<usize>();
        self.cache_bytes + self.widened_bytes + components - self.on_demand_bytes
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
    let manifest = Manifest::read(&source)?.in_format(options.load_format);
    let family = detect(&manifest)?;
    if let Some(note) = family.licence_note() {
        tracing::warn!("{}: {note}", manifest.root().display());
    }
    let open = OpenWeights::new(&source, placement, Mode::Load, options.load_format, on_component);
    let mut open = open.restricted_to(on_device(family, options));
    let manifest = open.remembering(manifest);
    let mut model = load_with(family, &manifest, &mut open, options)?;
    model.resident_bytes += open.resident_bytes();
    say_what_is_left_over(&open);
    Ok(model)
}

fn say_what_is_left_over(open: &OpenWeights<'_>) {
    for (component, report) in open.reports() {
        if !report.unused.is_empty() {
            tracing::warn!(
                component,
                unused = report.unused.len(),
                first = report.unused[0],
                "tensors of the checkpoint are not used"
            );
        }
    }
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
    let manifest = Manifest::read(&source)?.in_format(options.load_format);
    let family = detect(&manifest)?;
    let on_component = &mut |_: &str| ();
    let open = OpenWeights::new(&source, placement, Mode::Inspect, options.load_format, on_component);
    let mut open = open.restricted_to(on_device(family, options));
    let built = load_with(family, &manifest, &mut open, options);
    Ok(inspected(family, &open, built))
}

/// What a build over dry weights says of the model.
fn inspected(
    family: &dyn Family,
    open: &OpenWeights<'_>,
    built: Result<LoadedModel>,
) -> (Inspection, Option<LoadedModel>) {
    let (model, problem) = match built {
        Ok(model) => (Some(model), None),
        Err(problem) => (None, Some(problem)),
    };
    let widened_bytes = model.as_ref().map_or(0, |model| model.widened_bytes);
    let cache_bytes = model.as_ref().map_or(0, |model| model.resident_bytes - model.widened_bytes);
    let on_demand_bytes = open.lent_bytes();
    let components = open.reports();
    let (makes, licence_note, family) = (family.makes(), family.licence_note(), family.name());
    let inspection =
        Inspection { family, makes, licence_note, components, cache_bytes, widened_bytes, on_demand_bytes, problem };
    (inspection, model)
}

/// As [`plan`], without a word in the log: for whoever loads the model afterwards, which says all of it once more.
pub fn plan_quietly(
    source: impl Into<ModelSource>,
    placement: &Placement,
    options: &LoadOptions,
) -> Result<(Inspection, Option<LoadedModel>)> {
    quietly(|| plan(source, placement, options))
}

fn on_device(family: &dyn Family, options: &LoadOptions) -> OnDevice<'static> {
    match options.text_encoders {
        TextEncoders::Resident => OnDevice::All,
        TextEncoders::OnDemand => match family.text_encoders() {
            [] => OnDevice::All,
            components => OnDevice::Without(components),
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
    if !options.tensor_parallel.is_empty() && family.makes() != "text" {
        let problem =
            format!("models of family {} are not shared out among devices; language models are", family.name());
        return Err(Error::checkpoint(manifest.root(), problem));
    }
    if !options.guidance_devices.is_empty() && family.makes() == "text" {
        let problem = format!("models of family {} have no guidance branches", family.name());
        return Err(Error::checkpoint(manifest.root(), problem));
    }
    let model = family.load(manifest, open, options)?;
    open.check_fit(manifest)?;
    // Else it would load, and every request that leaves a field out would fail.
    model.card.check_defaults().map_err(|error| {
        Error::checkpoint(manifest.root(), format!("the model's own defaults cannot be used: {error}"))
    })?;
    let has_ip_adapter = matches!(&model.card, ModelCard::Diffusion(card) if card.has_ip_adapter);
    let takes_loras = matches!(&model.card, ModelCard::Diffusion(card) if matches!(card.loras, LoraSupport::Folder(_)));
    let has_refiner = matches!(&model.card, ModelCard::Diffusion(card) if card.refiner.is_some());
    let ModelSource { ip_adapter, image_encoder, loras, refiner, .. } = open.source();
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::checkpoint::LoadFormat;
    use crate::device::{DeviceSpec, WeightDtype};
    use crate::diffusion::parameters::PROMPT;
    use crate::families::FAMILIES;
    use crate::testing::repository;

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
        let options = card.plainest().with(&PROMPT, "x".to_owned());
        model.runner.plan(&crate::Request::Diffusion(card.resolve(&options, 0).expect("valid"))).peak_bytes()
    }

    #[test]
    fn an_unknown_architecture_is_refused_with_the_known_ones() {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::write(dir.path().join("config.json"), r#"{"architectures":["MambaForCausalLM"]}"#).expect("write");
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("cpu");
        let error = inspect(dir.path(), &placement, &LoadOptions::default()).expect_err("unknown").to_string();
        assert!(error.contains("MambaForCausalLM") && error.contains("llama"), "{error}");
    }
}
