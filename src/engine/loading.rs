//! From checkpoints to devices that compute: which model goes where, and how it comes there.
//!
//! Owns: opening devices and loading models, each device on its own thread and all of them at once. Does not know: sessions.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use tale_models::device::{DeviceMemory, DeviceSpec, Placement, WeightDtype};
use tale_models::family::{LoadOptions, TextEncoders};
use tale_models::{LoadedModel, ModelSource, loading};

use super::assignment::{self, Misfit, Sizes, Wanted};
use super::device::{DeviceHandle, Loaded, OnDevice, Prepared, Starting};
use super::peers::Peer;
use super::replicas::{Replica, Replicas};
use super::residency::Choice;
use super::{EngineError, EngineOptions, ModelSpec, ServedModel, groups, memory, residency};
use crate::places::Places;

/// Devices that work, and the models on them.
pub(super) struct Ready {
    pub(super) models: Vec<ServedModel>,
    pub(super) devices: Vec<DeviceHandle>,
}

/// What one device would hold.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Which device.
    pub device: DeviceSpec,
    /// Bytes that it has to give.
    pub capacity_bytes: usize,
    /// What each model takes there, or its part where several devices share it.
    pub models: Vec<(String, Sizes)>,
}

/// A device that tells its capacity and waits for what it is to load.
struct Opening {
    capacity_bytes: Receiver<Result<usize, EngineError>>,
    models: Sender<Assigned>,
    starting: Starting,
}

/// What lies on a device.
struct Assigned {
    models: Vec<(ModelSpec, Arc<Places>)>,
    /// Of which it has a part that others lead.
    parts: Vec<ModelSpec>,
    /// Most bytes that models and sessions may take: those of the smallest of the devices that share one.
    most_bytes: usize,
}

/// Loads models onto the devices of the options.
pub(super) fn load(
    models: Vec<ModelSpec>,
    options: &EngineOptions,
    on_component: impl FnMut(&str, &str) + Send + 'static,
) -> Result<Ready, EngineError> {
    check_devices(&options.devices)?;
    let on_component = Arc::new(Mutex::new(on_component));
    let open = |device: &DeviceSpec| open(*device, options.clone(), on_component.clone());
    let opening = options.devices.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let capacity = |opening: &Opening| {
        let ended = |_| EngineError::Thread("it ended while it opened a device".into());
        opening.capacity_bytes.recv().map_err(ended)?
    };
    let capacity_bytes = opening.iter().map(capacity).collect::<Result<Vec<_>, _>>()?;
    let assigned = assign(&models, options, &capacity_bytes)?;
    let queues: Vec<_> = models.iter().map(|_| Places::new(options.max_queued_sessions)).collect();
    let names: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    let mut starting = Vec::with_capacity(opening.len());
    for (device, opening) in opening.into_iter().enumerate() {
        let here = (0..models.len()).filter(|model| assigned[*model].contains(&device));
        let is_loaded_here = |model: &usize| models[*model].is_loaded_by(options.devices[device]);
        let (own, parts): (Vec<usize>, Vec<usize>) = here.partition(is_loaded_here);
        let own = own.into_iter().map(|model| (models[model].clone(), queues[model].clone())).collect();
        let parts = parts.into_iter().map(|model| models[model].clone()).collect();
        let sharing =
            assigned.iter().zip(&models).find(|(on, spec)| !spec.sharing().is_empty() && on.contains(&device));
        let smallest = |(on, _): (&Vec<usize>, _)| on.iter().map(|device| capacity_bytes[*device]).min();
        let most_bytes = sharing.and_then(smallest).unwrap_or(usize::MAX);
        // An error means that the thread has ended, which is heard of next.
        let _ = opening.models.send(Assigned { models: own, parts, most_bytes });
        starting.push(opening.starting);
    }
    let mut ready = finish(&names, &options.devices, starting)?;
    for (served, spec) in ready.models.iter_mut().zip(&models).filter(|(_, spec)| !spec.sharing().is_empty()) {
        served.devices = spec.devices.clone();
    }
    Ok(ready)
}

/// Starts devices over models that are loaded already, one list per device.
pub(super) fn start(models: Vec<Vec<(String, LoadedModel)>>, options: &EngineOptions) -> Result<Ready, EngineError> {
    let mut names: Vec<String> = Vec::new();
    for (name, _) in models.iter().flatten() {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let queues: Vec<_> = names.iter().map(|_| Places::new(options.max_queued_sessions)).collect();
    let queue_of = |name: &str| {
        let index = names.iter().position(|known| known == name).expect("they were just collected: this is a bug");
        queues[index].clone()
    };
    let num_devices = models.len();
    let specs: Vec<DeviceSpec> = match num_devices {
        1 => options.devices[..1].to_vec(),
        of => (0..of).map(|part| DeviceSpec::CpuPart { part, of }).collect(),
    };
    let mut starting = Vec::with_capacity(num_devices);
    for (models, spec) in models.into_iter().zip(&specs) {
        let on_device = |(name, model): (String, LoadedModel)| OnDevice { queue: queue_of(&name), name, model };
        let models = models.into_iter().map(on_device).collect();
        let capacity_bytes = options.memory_bytes.unwrap_or_else(|| memory::default_capacity_bytes() / num_devices);
        let loaded = Loaded { models, parts_bytes: 0, capacity_bytes, health: Box::new(|| Ok(())), placement: None };
        starting.push(Starting::new(*spec, move || Ok(loaded))?);
    }
    finish(&names, &specs, starting)
}

/// Waits for the models, and lets the devices know each other.
fn finish(names: &[String], specs: &[DeviceSpec], starting: Vec<Starting>) -> Result<Ready, EngineError> {
    let mut prepared = starting.iter().map(Starting::prepared).collect::<Result<Vec<_>, _>>()?;
    let mut models = Vec::with_capacity(names.len());
    for name in names {
        let of_device = |(device, prepared): (usize, &Prepared)| {
            let runner = prepared.cards.iter().position(|(card, _)| card == name)?;
            Some((device, runner))
        };
        let on: Vec<(usize, usize)> = prepared.iter().enumerate().filter_map(of_device).collect();
        models.push((name.clone(), on));
    }
    let peers: Vec<Vec<Vec<Peer>>> = prepared
        .iter()
        .enumerate()
        .map(|(device, of)| of.cards.iter().map(|(name, _)| peers_of(device, name, &prepared, &starting)).collect())
        .collect();
    let gauges: Vec<_> = prepared.iter().map(|prepared| prepared.gauges.clone()).collect();
    let served = models
        .into_iter()
        .map(|(name, on)| {
            let devices = on.iter().map(|(device, _)| specs[*device]).collect();
            let commands = on.iter().map(|(device, _)| starting[*device].commands.clone()).collect();
            let (device, runner) = *on.first().expect("a model lies somewhere: this is a bug");
            let card = prepared[device].cards[runner].1.take().expect("each card is taken once: this is a bug");
            let replica = |(device, runner): (usize, usize)| {
                let gauges = prepared[device].models[runner].clone();
                Replica { device, gauges, runner }
            };
            let replicas = Replicas::new(on.into_iter().map(replica).collect(), commands);
            ServedModel::new(name, card, devices, replicas)
        })
        .collect();
    let devices =
        starting.into_iter().zip(gauges).zip(peers).map(|((starting, gauges), peers)| starting.begin(gauges, peers));
    Ok(Ready { models: served, devices: devices.collect() })
}

/// The other devices that hold a model.
fn peers_of(device: usize, name: &str, prepared: &[Prepared], starting: &[Starting]) -> Vec<Peer> {
    let others = prepared.iter().zip(starting).enumerate().filter(|(other, _)| *other != device);
    let peer = |(_, (prepared, starting)): (usize, (&Prepared, &Starting))| {
        let runner = prepared.cards.iter().position(|(card, _)| card == name)?;
        Some(Peer::new(&starting.commands, prepared.models[runner].clone(), runner))
    };
    others.filter_map(peer).collect()
}

/// Devices that can be used together.
fn check_devices(devices: &[DeviceSpec]) -> Result<(), EngineError> {
    if devices.is_empty() {
        return Err(EngineError::Devices("there is no device to compute on".into()));
    }
    let mut parts = BTreeMap::new();
    for (index, device) in devices.iter().enumerate() {
        if devices[..index].contains(device) {
            return Err(EngineError::Devices(format!("device {device} is named twice")));
        }
        if !matches!(device, DeviceSpec::Cuda(_)) {
            parts.insert(device.num_parts(), device);
        }
    }
    match parts.into_values().collect::<Vec<_>>()[..] {
        [one, other, ..] => Err(EngineError::Devices(format!(
            "devices {one} and {other} overlap; parts of the processor must be of one size"
        ))),
        _ => Ok(()),
    }
}

/// Starts the thread of a device, which opens it.
fn open(
    device: DeviceSpec,
    options: EngineOptions,
    on_component: Arc<Mutex<impl FnMut(&str, &str) + Send + 'static>>,
) -> Result<Opening, EngineError> {
    let (tell, capacity_bytes) = channel();
    let (models, assigned) = channel();
    let load = move || {
        let opened = Placement::open(device, options.weight_dtype).map_err(cannot_open).and_then(|placement| {
            let memory = placement.memory().map_err(cannot_open)?;
            Ok((placement, self::capacity_bytes(&options, device, memory)?))
        });
        let (placement, capacity_bytes) = match opened {
            Ok(opened) => opened,
            // The error is told once, by the way that is heard first.
            Err(error) => {
                let _ = tell.send(Err(error));
                return Err(EngineError::Thread(format!("{device} could not be opened")));
            }
        };
        let _ = tell.send(Ok(capacity_bytes));
        let stopped = |_| EngineError::Thread("it was not wanted any more".into());
        let Assigned { models, parts, most_bytes } = assigned.recv().map_err(stopped)?;
        let capacity_bytes = capacity_bytes.min(most_bytes);
        let part_bytes = |part| Ok(choice(part, device, &options)?.sizes(TextEncoders::Resident).resident_bytes);
        let parts_bytes = parts.iter().map(part_bytes).sum::<Result<usize, EngineError>>()?;
        let told = |model: &str, component: &str| {
            on_component.lock().expect("nothing panics while it tells of progress: this is a bug")(model, component);
        };
        let models = load_models(models, device, &placement, &options, capacity_bytes, told)?;
        let watched = placement.clone();
        let health = Box::new(move || watched.synchronize());
        Ok(Loaded { models, parts_bytes, capacity_bytes, health, placement: Some(placement) })
    };
    Ok(Opening { capacity_bytes, models, starting: Starting::new(device, load)? })
}

/// Loads the models of one device, on the calling thread: the device's.
fn load_models(
    models: Vec<(ModelSpec, Arc<Places>)>,
    device: DeviceSpec,
    placement: &Placement,
    options: &EngineOptions,
    capacity_bytes: usize,
    on_component: impl Fn(&str, &str),
) -> Result<Vec<OnDevice>, EngineError> {
    let specs: Vec<&ModelSpec> = models.iter().map(|(model, _)| model).collect();
    let text_encoders = place_text_encoders(&specs, device, options, capacity_bytes)?;
    let mut free_bytes = capacity_bytes;
    let mut loaded = Vec::with_capacity(models.len());
    for ((model, queue), text_encoders) in models.into_iter().zip(text_encoders) {
        let load = model.loaded_as(&options.load);
        // What is encoded on both devices has its encoders on both.
        let text_encoders = if model.guidance_devices.is_some() { TextEncoders::Resident } else { text_encoders };
        let ModelSpec { name, source, prompt_lookup, .. } = model;
        if text_encoders == TextEncoders::OnDemand {
            tracing::info!(
                model = name,
                %device,
                "text encoders are read when prompts are encoded, and leave the device after"
            );
        }
        let mut on_component = |component: &str| on_component(&name, component);
        let is_of_text = prompt_lookup.is_some();
        let prompt_lookup = prompt_lookup.unwrap_or(options.load.prompt_lookup);
        let load = LoadOptions { text_encoders, prompt_lookup, ..load };
        let fits = Fits { device, weight_dtype: options.weight_dtype, free_bytes, is_of_text };
        match fits.load(&source, placement, &load, &mut on_component) {
            Ok(model) => {
                free_bytes = free_bytes.saturating_sub(model.resident_bytes);
                loaded.push(OnDevice { name, model, queue });
            }
            Err(error) => return Err(EngineError::Load { model: name, source: Box::new(error) }),
        }
    }
    Ok(loaded)
}

/// What each device of the options would hold; nothing is loaded. Devices whose capacity is configured need not be there.
pub fn plan(models: &[ModelSpec], options: &EngineOptions) -> Result<Vec<Planned>, EngineError> {
    check_devices(&options.devices)?;
    let models = &groups::resolved(models.to_vec(), &options.devices)?;
    let capacity = |device: &DeviceSpec| {
        let memory = match options.memory_bytes {
            Some(_) => None,
            None => Placement::open(*device, options.weight_dtype)
                .and_then(|opened| opened.memory())
                .map_err(cannot_open)?,
        };
        capacity_bytes(options, *device, memory)
    };
    let capacity_bytes = options.devices.iter().map(capacity).collect::<Result<Vec<_>, _>>()?;
    let assigned = assign(models, options, &capacity_bytes)?;
    let planned = options.devices.iter().zip(capacity_bytes).enumerate().map(|(index, (device, capacity_bytes))| {
        let here = (0..models.len()).filter(|model| assigned[*model].contains(&index));
        let specs: Vec<&ModelSpec> = here.map(|model| &models[model]).collect();
        let text_encoders = place_text_encoders(&specs, *device, options, capacity_bytes)?;
        let sizes = specs.iter().zip(text_encoders).map(|(model, text_encoders)| {
            let text_encoders = if model.sharing().is_empty() { text_encoders } else { TextEncoders::Resident };
            Ok((model.name.clone(), choice(model, *device, options)?.sizes(text_encoders)))
        });
        Ok(Planned { device: *device, capacity_bytes, models: sizes.collect::<Result<_, EngineError>>()? })
    });
    planned.collect()
}

/// The devices of each model.
fn assign(
    models: &[ModelSpec],
    options: &EngineOptions,
    capacity_bytes: &[usize],
) -> Result<Vec<Vec<usize>>, EngineError> {
    let wanted = models.iter().map(|model| wanted(model, options)).collect::<Result<Vec<_>, _>>()?;
    if options.devices.len() == 1 {
        // There is nothing to choose, and loading says what does not fit.
        return Ok(vec![vec![0]; models.len()]);
    }
    let ways = match options.text_encoders {
        Some(text_encoders) => vec![text_encoders],
        None => vec![TextEncoders::Resident, TextEncoders::OnDemand],
    };
    let mut misfit = None;
    for text_encoders in ways {
        let sized = |(mut wanted, choices): (Wanted, Vec<Choice>)| {
            let text_encoders = if wanted.is_alone { TextEncoders::Resident } else { text_encoders };
            wanted.sizes = choices.iter().map(|choice| choice.sizes(text_encoders)).collect();
            wanted
        };
        let wanted: Vec<Wanted> = wanted.iter().cloned().map(sized).collect();
        check_parts(models, options, &wanted, capacity_bytes)?;
        match assignment::assign(&wanted, capacity_bytes) {
            Ok(assigned) => {
                for (model, devices) in models.iter().zip(&assigned) {
                    let devices = devices.iter().map(|device| options.devices[*device].to_string()).collect::<Vec<_>>();
                    tracing::info!(model = model.name, devices = devices.join(", "), "placed");
                }
                return Ok(assigned);
            }
            Err(found) => misfit = Some(found),
        }
    }
    let Misfit { model, device, needed_bytes, free_bytes } = misfit.expect("there is a way: this is a bug");
    let (model, device) = (models[model].name.clone(), options.devices[device]);
    Err(EngineError::NoRoom { model, device, needed_bytes, free_bytes })
}

/// Refuses a model that several devices share where it cannot be shared out, or a part has no room on its device.
fn check_parts(
    models: &[ModelSpec],
    options: &EngineOptions,
    wanted: &[Wanted],
    capacity_bytes: &[usize],
) -> Result<(), EngineError> {
    for (model, wanted) in models.iter().zip(wanted).filter(|(_, wanted)| wanted.is_alone) {
        let (load, dry) = inspected_as(model, model.devices[0], options);
        let problem = loading::plan_quietly(&model.source, &dry, &load).map(|(found, _)| found.into_problem());
        if let Some(source) = problem.unwrap_or_else(Some) {
            return Err(EngineError::Load { model: model.name.clone(), source: Box::new(source) });
        }
        for &device in &wanted.devices {
            let Sizes { resident_bytes, request_bytes } = wanted.sizes[device];
            let (needed_bytes, free_bytes) = (resident_bytes.saturating_add(request_bytes), capacity_bytes[device]);
            if needed_bytes > free_bytes {
                let (model, device) = (model.name.clone(), options.devices[device]);
                return Err(EngineError::NoRoomForPart { model, device, needed_bytes, free_bytes });
            }
        }
    }
    Ok(())
}

/// Where a model may lie, and what it takes on each device.
fn wanted(model: &ModelSpec, options: &EngineOptions) -> Result<(Wanted, Vec<Choice>), EngineError> {
    let mut devices = Vec::with_capacity(model.devices.len());
    for device in &model.devices {
        let index = options.devices.iter().position(|known| known == device).ok_or_else(|| {
            let known = options.devices.iter().map(DeviceSpec::to_string).collect::<Vec<_>>().join(", ");
            EngineError::Devices(format!("model `{}`: {device} is none of this server's devices: {known}", model.name))
        })?;
        if devices.contains(&index) {
            return Err(EngineError::Devices(format!("model `{}`: device {device} is named twice", model.name)));
        }
        devices.push(index);
    }
    let most = if devices.is_empty() { options.devices.len() } else { devices.len() };
    let replicas = model.replicas.map(usize::from);
    if let Some(replicas) = replicas.filter(|replicas| *replicas > most) {
        let problem = format!("model `{}`: {replicas} replicas need as many devices; it may have {most}", model.name);
        return Err(EngineError::Devices(problem));
    }
    let mut choices = Vec::with_capacity(options.devices.len());
    if options.devices.len() > 1 {
        let mut of_kind: [Option<Choice>; 2] = [None, None];
        for device in &options.devices {
            let of_kind = &mut of_kind[usize::from(matches!(device, DeviceSpec::Cuda(_)))];
            let known = match *of_kind {
                Some(choice) => choice,
                None => *of_kind.insert(choice(model, *device, options)?),
            };
            choices.push(known);
        }
    }
    let is_alone = model.num_sharing().is_some();
    Ok((Wanted { sizes: Vec::new(), devices, replicas, is_alone }, choices))
}

fn choice(model: &ModelSpec, device: DeviceSpec, options: &EngineOptions) -> Result<Choice, EngineError> {
    let (load, dry) = inspected_as(model, device, options);
    Choice::of(&model.source, &dry, &load)
        .map_err(|error| EngineError::Load { model: model.name.clone(), source: Box::new(error) })
}

/// How a model is looked at before it is loaded onto a device.
fn inspected_as(model: &ModelSpec, device: DeviceSpec, options: &EngineOptions) -> (LoadOptions, Placement) {
    let load = model.loaded_as(&options.load);
    (load, Placement::in_host_memory(device, options.weight_dtype))
}

/// Where the text encoders of each model are, on a device of this capacity.
pub(crate) fn place_text_encoders(
    models: &[&ModelSpec],
    device: DeviceSpec,
    options: &EngineOptions,
    capacity_bytes: usize,
) -> Result<Vec<TextEncoders>, EngineError> {
    if let Some(text_encoders) = options.text_encoders {
        return Ok(vec![text_encoders; models.len()]);
    }
    let choices = models.iter().map(|model| choice(model, device, options)).collect::<Result<Vec<_>, _>>()?;
    Ok(residency::choose(&choices, capacity_bytes))
}

fn cannot_open(error: tale_models::Error) -> EngineError {
    EngineError::Open(Box::new(error))
}

/// What is configured, or most of what the device has; `gpu` is absent on the CPU. A GPU cannot give more than is free;
/// the CPU's memory may be configured beyond that, since the operating system takes it from elsewhere. Parts of the CPU share its
/// memory out as they do its cores.
pub(crate) fn capacity_bytes(
    options: &EngineOptions,
    device: DeviceSpec,
    gpu: Option<DeviceMemory>,
) -> Result<usize, EngineError> {
    match (options.memory_bytes, gpu) {
        (Some(needed_bytes), Some(DeviceMemory { free_bytes, .. })) if needed_bytes > free_bytes => {
            Err(EngineError::Memory { device, needed_bytes, free_bytes })
        }
        (Some(bytes), _) => Ok(bytes),
        (None, Some(gpu)) => Ok(gpu.usable_bytes()),
        (None, None) => Ok(memory::default_capacity_bytes() / device.num_parts()),
    }
}

/// What a model has to be to be loaded.
struct Fits {
    device: DeviceSpec,
    weight_dtype: WeightDtype,
    /// What it may take.
    free_bytes: usize,
    /// Whether something is said of it that only a language model can have.
    is_of_text: bool,
}

impl Fits {
    /// What a model takes is known from its headers, so that a model too large is refused before a tensor is read, and so is
    /// one that cannot be loaded.
    fn load(
        &self,
        source: &ModelSource,
        placement: &Placement,
        load: &LoadOptions,
        on_component: &mut dyn FnMut(&str),
    ) -> Result<LoadedModel, tale_models::Error> {
        let dry = Placement::in_host_memory(self.device, self.weight_dtype);
        let (inspection, _) = loading::plan_quietly(source, &dry, load)?;
        let (needed_bytes, free_bytes) = (inspection.resident_bytes(), self.free_bytes);
        let (family, makes) = (inspection.family, inspection.makes);
        if let Some(problem) = inspection.into_problem() {
            return Err(problem);
        }
        if self.is_of_text && makes != "text" {
            let problem = format!("models of family {family} make no tokens that could be guessed");
            return Err(tale_models::Error::checkpoint(&source.path, problem));
        }
        if needed_bytes > free_bytes {
            return Err(tale_models::Error::OutOfMemory { phase: None, needed_bytes, free_bytes });
        }
        loading::load(source, placement, load, on_component)
    }
}
