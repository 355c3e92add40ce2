//! Which devices share a model, where one is told to be shared out.
//!
//! Owns: choosing the devices of such a group, and that nothing else lies on them: a step of the group has all of its devices at once, so
//! that the thread of none of them could work for others meanwhile without making the rest wait. Pure. Does not know: what a part takes
//! (`residency`), how ranks work together (`tale_models::parallel`).

use std::num::NonZeroUsize;

use tale_models::device::DeviceSpec;
use tale_models::family::LoadOptions;

use super::catalogue::Entry;
use super::{EngineError, ModelSpec, Shared};

/// The models, where each that is to be shared out has its devices: those that were named, or the first of one kind that no model
/// names and no other group has.
pub(super) fn resolved(mut models: Vec<ModelSpec>, devices: &[DeviceSpec]) -> Result<Vec<ModelSpec>, EngineError> {
    for (model, chosen) in choose(&models, devices)? {
        models[model].devices = chosen.into_iter().map(|device| devices[device]).collect();
    }
    Ok(models)
}

impl ModelSpec {
    /// Whether it is loaded on the thread of this device, which is one of its own: of those that share it the first one's.
    pub(super) fn is_loaded_by(&self, device: DeviceSpec) -> bool {
        self.num_sharing().is_none() || self.devices.first() == Some(&device)
    }

    /// The devices that share it; none where one has it.
    pub(super) fn sharing(&self) -> &[DeviceSpec] {
        if self.num_sharing().is_some() { &self.devices } else { &[] }
    }

    /// How many devices share it, if several do.
    pub(super) fn num_sharing(&self) -> Option<NonZeroUsize> {
        self.tensor_parallel.or(self.guidance_devices)
    }

    /// What of it follows for its loading.
    pub(super) fn loaded_as(&self, load: &LoadOptions) -> LoadOptions {
        let devices = |shares: bool| if shares { self.devices.clone() } else { Vec::new() };
        let tensor_parallel = devices(self.tensor_parallel.is_some());
        let guidance_devices = devices(self.guidance_devices.is_some());
        LoadOptions { tensor_parallel, guidance_devices, ..load.clone() }
    }
}

/// A model that several devices share, and these, by position, the leading one first.
type Group = (usize, Vec<usize>);

fn choose(models: &[ModelSpec], devices: &[DeviceSpec]) -> Result<Vec<Group>, EngineError> {
    let mut groups: Vec<Group> = Vec::new();
    // What was named first: it leaves no choice.
    let mut shared: Vec<usize> = (0..models.len()).filter(|model| models[*model].num_sharing().is_some()).collect();
    shared.sort_by_key(|model| models[*model].devices.is_empty());
    for model in shared {
        let chosen = chosen(&models[model], models, devices, &groups)?;
        groups.push((model, chosen));
    }
    groups.iter().try_for_each(|group| check_alone(group, &groups, models, devices))?;
    groups.sort();
    Ok(groups)
}

fn chosen(
    spec: &ModelSpec,
    models: &[ModelSpec],
    devices: &[DeviceSpec],
    groups: &[Group],
) -> Result<Vec<usize>, EngineError> {
    let refuse = |problem: String| Err(EngineError::Devices(format!("model `{}`: {problem}", spec.name)));
    let count = spec.num_sharing().map_or(1, usize::from);
    let key = if spec.tensor_parallel.is_some() { "tensor_parallel" } else { "guidance_devices" };
    if spec.tensor_parallel.is_some() && spec.guidance_devices.is_some() {
        return refuse("tensor_parallel is of language models, guidance_devices of others".to_owned());
    }
    if spec.guidance_devices.is_some() && count != 2 {
        return refuse(format!("guidance_devices is {count}; guidance has two branches"));
    }
    if spec.replicas.is_some() {
        return refuse("a model that devices share has no replicas".to_owned());
    }
    if spec.on_demand || spec.idle_unload.is_some() {
        return refuse("a model that devices share is loaded when the server starts, and stays".to_owned());
    }
    let found = match spec.devices.as_slice() {
        [] => free(count, models, devices, groups),
        named if named.len() != count => {
            return refuse(format!("{key} is {count}, and {} devices are named", named.len()));
        }
        named => match named.iter().find(|device| !devices.contains(device)) {
            Some(unknown) => {
                return refuse(format!("{unknown} is none of this server's devices: {}", names(devices)));
            }
            None => named.iter().filter_map(|named| devices.iter().position(|device| device == named)).collect(),
        },
    };
    if found.len() < count {
        let devices = names(devices);
        return refuse(format!(
            "{key} is {count}; of this server's devices, {devices}, fewer are of one kind and free of other models"
        ));
    }
    let specs: Vec<DeviceSpec> = found.iter().map(|index| devices[*index]).collect();
    match tale_models::parallel::check_devices(&specs) {
        Ok(()) => Ok(found),
        Err(error) => refuse(error.to_string()),
    }
}

/// So many devices of one kind, GPUs before processors, that no model names and no group has; fewer where there are fewer.
fn free(count: usize, models: &[ModelSpec], devices: &[DeviceSpec], groups: &[Group]) -> Vec<usize> {
    let is_free = |index: &usize| {
        let is_named = models.iter().any(|model| model.devices.contains(&devices[*index]));
        !is_named && groups.iter().all(|(_, group)| !group.contains(index))
    };
    let of_kind = |is_gpu: bool| {
        let of_kind = (0..devices.len()).filter(|index| matches!(devices[*index], DeviceSpec::Cuda(_)) == is_gpu);
        of_kind.filter(is_free).take(count).collect::<Vec<_>>()
    };
    let found = [true, false].map(of_kind);
    found.into_iter().find(|found| found.len() == count).unwrap_or_default()
}

/// Refuses another model on a device of a group.
fn check_alone(
    (model, group): &Group,
    groups: &[Group],
    models: &[ModelSpec],
    devices: &[DeviceSpec],
) -> Result<(), EngineError> {
    for (index, other) in models.iter().enumerate().filter(|(index, _)| index != model) {
        let has = |device: &usize| match groups.iter().find(|(model, _)| *model == index) {
            Some((_, theirs)) => theirs.contains(device),
            None => other.devices.contains(&devices[*device]),
        };
        if let Some(both) = group.iter().find(|device| has(device)) {
            return Err(taken(&other.name, devices[*both], &models[*model].name));
        }
    }
    Ok(())
}

/// Why a model cannot have a device.
pub(super) fn taken(name: &str, device: DeviceSpec, owner: &str) -> EngineError {
    EngineError::Devices(format!(
        "model `{name}`: {device} is one of the devices that share model `{owner}`, which have no other model"
    ))
}

impl Shared {
    /// The model that this device shares with others, if it does.
    pub(super) fn sharer_of(&self, device: DeviceSpec) -> Option<String> {
        let shares = |entry: &&Entry| entry.state().spec.sharing().contains(&device);
        self.catalogue.entries.iter().find(shares).map(|entry| entry.name.clone())
    }
}

fn names(devices: &[DeviceSpec]) -> String {
    devices.iter().map(DeviceSpec::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn devices(names: &str) -> Vec<DeviceSpec> {
        names.split_whitespace().map(|name| name.parse().expect("a device")).collect()
    }

    fn model(name: &str, on: &str, tensor_parallel: usize) -> ModelSpec {
        let tensor_parallel = NonZeroUsize::new(tensor_parallel);
        ModelSpec { devices: devices(on), tensor_parallel, ..ModelSpec::new(name, Path::new("nowhere")) }
    }

    fn guided(count: usize) -> ModelSpec {
        ModelSpec { guidance_devices: NonZeroUsize::new(count), ..model("g", "", 0) }
    }

    fn chosen(models: &[ModelSpec], on: &str) -> Result<Vec<Vec<usize>>, String> {
        let groups = choose(models, &devices(on)).map_err(|error| error.to_string())?;
        Ok(groups.into_iter().map(|(_, group)| group).collect())
    }

    #[test]
    fn groups_get_what_was_named_or_what_is_free() {
        let on = "cpu cuda:0 cuda:1 cuda:2 cuda:3 cuda:4";
        let models = [model("a", "", 2), model("b", "cuda:1 cuda:0", 2), model("c", "cuda:3", 0), model("d", "", 0)];
        assert_eq!(chosen(&models, on), Ok(vec![vec![3, 5], vec![2, 1]]));
        assert_eq!(chosen(&[model("a", "", 2)], "cpu:0/2 cpu:1/2"), Ok(vec![vec![0, 1]]));
        assert_eq!(chosen(&[model("d", "", 0)], "cpu"), Ok(vec![]));
        assert_eq!(chosen(&[guided(2)], "cpu:0/2 cpu:1/2"), Ok(vec![vec![0, 1]]));
    }

    #[test]
    fn what_cannot_be_is_refused_in_one_line() {
        let on = "cuda:0 cuda:1 cuda:2";
        let replicas = ModelSpec { replicas: NonZeroUsize::new(2), ..model("a", "", 2) };
        for (models, words) in [
            (vec![model("a", "cuda:0", 2)], "tensor_parallel is 2, and 1 devices are named"),
            (vec![model("a", "cuda:0 cuda:0", 2)], "cuda:0 is named twice"),
            (vec![model("a", "cuda:0 cuda:7", 2)], "cuda:7 is none of this server's devices: cuda:0, cuda:1, cuda:2"),
            (vec![model("a", "", 4)], "tensor_parallel is 4; of this server's devices"),
            (vec![model("a", "", 1)], "2 to 8 devices can, these are 1"),
            (vec![replicas], "has no replicas"),
            (vec![guided(3)], "guidance_devices is 3; guidance has two branches"),
            (vec![ModelSpec { tensor_parallel: NonZeroUsize::new(2), ..guided(2) }], "guidance_devices of others"),
            (vec![ModelSpec { on_demand: true, ..model("a", "", 2) }], "is loaded when the server starts, and stays"),
            (vec![model("a", "cuda:0 cuda:1", 2), model("b", "cuda:1", 0)], "model `b`: cuda:1 is one of the devices"),
            (vec![model("a", "cuda:0 cuda:1", 2), model("b", "cuda:1 cuda:2", 2)], "share model `a`"),
            (vec![model("a", "cuda:0 cuda:1", 2), model("b", "", 2)], "model `b`: tensor_parallel is 2; of"),
        ] {
            let error = chosen(&models, on).expect_err(words);
            assert!(error.starts_with("model `") && error.contains(words) && !error.contains('\n'), "{error}: {words}");
        }
    }
}
