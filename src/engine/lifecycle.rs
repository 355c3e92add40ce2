//! Models come and go while the server works.
//!
//! Owns: the order of a loading (find room, reserve, read, take the place of what was there) and of an unloading (no further
//! requests, wait for those that work with it, free), on a thread for each that ends with it. Does not know: how a device reads
//! weights ([`super::worker`]), or who asked.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use tale_models::Error;
use tale_models::device::DeviceSpec;

use super::assignment::{self, Misfit, Wanted};
use super::catalogue::{Entry, ServedModel, State, Work};
use super::coming::{Arrival, Arrived, Loadable, Progress};
use super::command::{Command, Neighbour};
use super::device::DeviceHandle;
use super::replicas::{Replica, Replicas};
use super::{EngineError, ModelSpec, Shared, groups};

/// How often it is looked whether the last request that works with a model has ended.
const DRAIN_POLL: Duration = Duration::from_millis(5);

/// When new weights take the place of old ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// They are loaded beside the old ones, which serve meanwhile.
    Beside,
    /// The old ones go first.
    After,
}

/// How a model is to be loaded.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// From where, with what goes with the checkpoint as it is configured; `None`: as it is configured, or as it was loaded last.
    pub path: Option<PathBuf>,
    /// On which devices; empty as above.
    pub devices: Vec<DeviceSpec>,
    /// `None`: beside what is there where there is room, else after it.
    pub when: Option<When>,
    /// How long requests that work with the old weights may take to end; `None`: as long as they need where the new ones are there,
    /// and [`super::EngineOptions::drain`] where those wait for them.
    pub drain: Option<Duration>,
}

/// Tells whoever asked for a loading that it has begun, or why not.
pub type Begun = Receiver<Result<(), EngineError>>;

/// The work on a model, until it is dropped.
struct Claim {
    shared: Arc<Shared>,
    index: usize,
}

impl Claim {
    /// Nobody else loads or unloads it meanwhile.
    fn of(shared: &Arc<Shared>, index: usize, work: Work) -> Result<Self, EngineError> {
        let entry = &shared.catalogue.entries[index];
        let mut state = entry.state();
        check_rests(entry, &state)?;
        state.work = Some(work);
        drop(state);
        shared.catalogue.tell();
        Ok(Self { shared: shared.clone(), index })
    }

    fn entry(&self) -> &Entry {
        &self.shared.catalogue.entries[self.index]
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.entry().state().work = None;
        self.shared.catalogue.tell();
    }
}

/// One thing at a time is done with a model.
fn check_rests(entry: &Entry, state: &State) -> Result<(), EngineError> {
    let doing = match &state.work {
        None => return Ok(()),
        Some(Work::Loading(_)) => "loaded",
        Some(Work::Unloading) => "unloaded",
    };
    Err(EngineError::AtWork { model: entry.name.clone(), doing })
}

/// The parts of a model that devices share are no runners that could come and go one by one.
fn check_may_go(entry: &Entry) -> Result<(), EngineError> {
    match entry.state().spec.sharing() {
        [] => Ok(()),
        _ => Err(EngineError::Stays { model: entry.name.clone() }),
    }
}

/// A model whose devices have reserved its memory and read it.
struct Placed {
    /// Positions of devices and the keys of the runners there.
    on: Vec<(usize, usize)>,
    told: Vec<Receiver<Result<Arrived, Error>>>,
}

/// Begins to load a model on a thread of its own.
pub(super) fn begin_to_load(shared: &Arc<Shared>, index: usize, wish: Wish) -> Result<Begun, EngineError> {
    let entry = &shared.catalogue.entries[index];
    check_may_go(entry)?;
    let is_the_same = wish.path.is_none() && wish.devices.is_empty();
    if is_the_same && entry.state().current.is_some() {
        check_rests(entry, &entry.state())?;
        return Err(EngineError::AlreadyLoaded { model: entry.name.clone() });
    }
    let progress = Arc::new(Progress::default());
    let claim = Claim::of(shared, index, Work::Loading(progress.clone()))?;
    let (tell, begun) = channel();
    on_a_thread(shared, move || load(claim, &wish, &progress, &tell))?;
    Ok(begun)
}

/// Refuses a model that cannot be loaded, or fits nowhere even alone.
pub(super) fn check(shared: &Arc<Shared>, spec: &ModelSpec) -> Result<(), EngineError> {
    let search = Search::begin(shared, spec)?;
    let of_device = search.allowed.iter().zip(&search.loadable).map(|(device, loadable)| {
        let DeviceHandle { spec, gauges, .. } = &shared.devices[*device];
        (loadable.sizes.resident_bytes, gauges.ledger_capacity_bytes.load(Relaxed), *spec)
    });
    let nearest =
        of_device.min_by_key(|(needed_bytes, capacity_bytes, _)| needed_bytes.saturating_sub(*capacity_bytes));
    match nearest {
        Some((needed_bytes, free_bytes, device)) if needed_bytes > free_bytes => {
            Err(EngineError::NoRoom { model: spec.name.clone(), device, needed_bytes, free_bytes })
        }
        _ => Ok(()),
    }
}

/// Unloads a model on a thread of its own: requests get it no more, and those that work with it have so much time.
pub(super) fn begin_to_unload(shared: &Arc<Shared>, index: usize, drain: Duration) -> Result<(), EngineError> {
    let entry = &shared.catalogue.entries[index];
    check_may_go(entry)?;
    let mut state = entry.state();
    check_rests(entry, &state)?;
    let old = state.take().ok_or_else(|| EngineError::NothingToUnload { model: entry.name.clone() })?;
    state.is_put_away();
    drop(state);
    let claim = Claim { shared: shared.clone(), index };
    shared.catalogue.tell();
    tracing::info!(model = entry.name, "unloading");
    on_a_thread(shared, move || {
        retire(&claim.shared, old, Some(drain));
        drop(claim);
    })
}

/// Unloads what nobody has worked with for as long as it may be idle.
pub(super) fn unload_idle(shared: &Arc<Shared>, now: Instant) {
    for (index, entry) in shared.catalogue.entries.iter().enumerate() {
        let Some(old) = entry.state().take_idle(now) else { continue };
        let claim = Claim { shared: shared.clone(), index };
        shared.catalogue.tell();
        tracing::info!(model = entry.name, "unloading, since nobody has used it");
        let unload = move || {
            retire(&claim.shared, old, None);
            drop(claim);
        };
        if let Err(error) = on_a_thread(shared, unload) {
            tracing::error!(%error, "an idle model stays");
        }
    }
}

/// One for each model that comes or goes, and for each whose old weights still work; their memory bounds those.
fn on_a_thread(shared: &Arc<Shared>, work: impl FnOnce() + Send + 'static) -> Result<(), EngineError> {
    struct Counted(Arc<Shared>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.num_threads.fetch_sub(1, Relaxed);
        }
    }
    shared.num_threads.fetch_add(1, Relaxed);
    let counted = Counted(shared.clone());
    let thread = std::thread::Builder::new().name("models".into()).spawn(move || {
        work();
        drop(counted);
    });
    thread.map(drop).map_err(|error| EngineError::Thread(error.to_string()))
}

fn load(claim: Claim, wish: &Wish, progress: &Arc<Progress>, begun: &Sender<Result<(), EngineError>>) {
    let name = claim.entry().name.clone();
    let spec = wished(&claim.entry().state().spec, wish);
    let old = match replace(&claim, &spec, wish, progress, begun) {
        Ok(old) => old,
        Err(error) => {
            tracing::error!(model = name, %error, "the model is not loaded");
            claim.entry().state().has_failed(error.to_string());
            // Nobody waits for it once it has begun.
            let _ = begun.send(Err(error));
            return;
        }
    };
    tracing::info!(model = name, "loaded");
    let shared = claim.shared.clone();
    // What is new can be replaced while what was old still works.
    drop(claim);
    if let Some(old) = old {
        retire(&shared, old, wish.drain);
    }
}

fn wished(spec: &ModelSpec, wish: &Wish) -> ModelSpec {
    let mut spec = spec.clone();
    if let Some(path) = &wish.path {
        spec.source.path = path.clone();
    }
    if !wish.devices.is_empty() {
        (spec.devices, spec.replicas) = (wish.devices.clone(), None);
    }
    spec
}

/// Loads a model and lets it take the place of what is there, which is returned if it has to be retired still.
fn replace(
    claim: &Claim,
    spec: &ModelSpec,
    wish: &Wish,
    progress: &Arc<Progress>,
    begun: &Sender<Result<(), EngineError>>,
) -> Result<Option<Arc<ServedModel>>, EngineError> {
    let (shared, entry) = (&claim.shared, claim.entry());
    let placed = {
        let _turn = shared.placing.lock().expect("nothing panics while it holds this: this is a bug");
        let search = Search::begin(shared, spec)?;
        let beside = search.devices(&[]);
        let is_there = entry.state().current.clone();
        let comes_after =
            is_there.is_some() && (wish.when == Some(When::After) || (wish.when.is_none() && beside.is_err()));
        match is_there.filter(|_| comes_after) {
            None => {
                let devices = beside.or_else(|misfit| search.make_room(misfit))?;
                search.reserve_at(devices, entry, progress)?
            }
            Some(old) => {
                // Before anything is given up for it.
                search.devices(&[&old])?;
                drop(old);
                let _ = begun.send(Ok(()));
                // In a statement of its own, which ends before the waiting begins.
                let old = entry.state().current.take();
                if let Some(old) = old {
                    shared.catalogue.tell();
                    retire(shared, old, Some(wish.drain.unwrap_or(shared.options.drain)));
                }
                let devices = search.devices(&[]).or_else(|misfit| search.make_room(misfit))?;
                search.reserve_at(devices, entry, progress)?
            }
        }
    };
    let _ = begun.send(Ok(()));
    let model = finish(shared, spec, placed)?;
    let old = entry.state().becomes(spec.clone(), Arc::new(model));
    shared.catalogue.tell();
    Ok(old)
}

/// A search for devices that take a model.
struct Search<'a> {
    shared: &'a Arc<Shared>,
    spec: &'a ModelSpec,
    /// Positions of devices that it may lie on.
    allowed: Vec<usize>,
    loadable: Vec<Loadable>,
}

impl<'a> Search<'a> {
    /// Reads headers.
    fn begin(shared: &'a Arc<Shared>, spec: &'a ModelSpec) -> Result<Self, EngineError> {
        let known = |device: &DeviceSpec| shared.devices.iter().position(|of| of.spec == *device);
        let mut allowed = Vec::new();
        for device in &spec.devices {
            let name = &spec.name;
            let index = known(device).ok_or_else(|| {
                let known = shared.devices.iter().map(|of| of.spec.to_string()).collect::<Vec<_>>().join(", ");
                EngineError::Devices(format!("model `{name}`: {device} is none of this server's devices: {known}"))
            })?;
            if allowed.contains(&index) {
                return Err(EngineError::Devices(format!("model `{name}`: device {device} is named twice")));
            }
            if let Some(owner) = shared.sharer_of(*device) {
                return Err(groups::taken(name, *device, &owner));
            }
            allowed.push(index);
        }
        if allowed.is_empty() {
            allowed = (0..shared.devices.len()).collect();
            allowed.retain(|device| shared.sharer_of(shared.devices[*device].spec).is_none());
        }
        allowed.retain(|device| shared.devices[*device].gauges.is_alive());
        let loadable = allowed.iter().map(|device| {
            let DeviceHandle { spec: device, gauges, .. } = &shared.devices[*device];
            let loadable = shared.loader.loadable(spec, *device, gauges.room_bytes.load(Relaxed));
            loadable.map_err(|error| EngineError::Load { model: spec.name.clone(), source: Box::new(error) })
        });
        let loadable = loadable.collect::<Result<Vec<_>, _>>()?;
        if loadable.is_empty() {
            let problem = format!("model `{}`: none of its devices works", spec.name);
            return Err(EngineError::Devices(problem));
        }
        Ok(Self { shared, spec, allowed, loadable })
    }

    /// Where it would lie if these models were gone; positions among those that it may lie on.
    fn devices(&self, gone: &[&Arc<ServedModel>]) -> Result<Vec<usize>, EngineError> {
        let room = |device: &usize| {
            let freed = gone.iter().map(|model| model.replicas.resident_bytes_on(*device)).sum::<usize>();
            self.shared.devices[*device].gauges.room_bytes.load(Relaxed) + freed
        };
        let rooms: Vec<usize> = self.allowed.iter().map(room).collect();
        let replicas = self.spec.replicas.map(usize::from);
        let num_named = self.spec.devices.len();
        // What comes on demand takes no more than it needs, and all devices that were named hold it.
        let replicas = replicas.or(if num_named > 0 { Some(num_named) } else { self.spec.on_demand.then_some(1) });
        let sizes = self.loadable.iter().map(|loadable| loadable.sizes).collect();
        let wanted = Wanted {
            sizes,
            devices: Vec::new(),
            replicas: replicas.map(|replicas| replicas.min(rooms.len())),
            is_alone: false,
        };
        let assigned = assignment::assign(&[wanted], &rooms);
        assigned.map(|mut of_model| of_model.remove(0)).map_err(|misfit| {
            let Misfit { device, needed_bytes, free_bytes, .. } = misfit;
            let device = self.shared.devices[self.allowed[device]].spec;
            EngineError::NoRoom { model: self.spec.name.clone(), device, needed_bytes, free_bytes }
        })
    }

    /// Unloads models that come back by themselves and that nobody works with, the one that was used longest ago first, until there
    /// is room; none where that does not help.
    fn make_room(&self, misfit: EngineError) -> Result<Vec<usize>, EngineError> {
        let entries = self.shared.catalogue.entries.iter().enumerate();
        let mut idle: Vec<(Instant, usize)> = entries
            .filter(|(_, entry)| entry.name != self.spec.name)
            .filter_map(|(index, entry)| {
                let state = entry.state();
                state.may_make_room().then(|| (state.last_used(), index))
            })
            .collect();
        idle.sort_unstable();
        let mut going: Vec<(usize, Arc<ServedModel>)> = Vec::new();
        for (_, index) in idle {
            let Some(model) = self.shared.catalogue.entries[index].state().current.clone() else { continue };
            going.push((index, model));
            if self.devices(&going.iter().map(|(_, model)| model).collect::<Vec<_>>()).is_ok() {
                break;
            }
        }
        let gone: Vec<_> = going.iter().map(|(_, model)| model).collect();
        if going.is_empty() || self.devices(&gone).is_err() {
            return Err(misfit);
        }
        let indices: Vec<usize> = going.into_iter().map(|(index, _)| index).collect();
        for index in indices {
            let entry = &self.shared.catalogue.entries[index];
            let mut state = entry.state();
            let old = if state.may_make_room() { state.take() } else { None };
            drop(state);
            let Some(old) = old else { continue };
            let claim = Claim { shared: self.shared.clone(), index };
            self.shared.catalogue.tell();
            tracing::info!(model = entry.name, "unloading, since another model needs the room");
            retire(self.shared, old, None);
            drop(claim);
        }
        self.devices(&[])
    }

    /// Has the devices reserve its memory and begin to load it.
    fn reserve_at(
        mut self,
        devices: Vec<usize>,
        entry: &Entry,
        progress: &Arc<Progress>,
    ) -> Result<Placed, EngineError> {
        let mut placed = Placed { on: Vec::new(), told: Vec::new() };
        // From the last, so that positions stay what they are.
        for position in devices.into_iter().rev() {
            let device = self.allowed[position];
            let Loadable { sizes, begin } = self.loadable.swap_remove(position);
            self.allowed.swap_remove(position);
            let handle = &self.shared.devices[device];
            let runner = self.shared.next_runner.fetch_add(1, Relaxed);
            let (tell_begun, begun) = channel();
            let (tell, told) = channel();
            let arrival = Arrival {
                name: entry.name.clone(),
                queue: entry.queue.clone(),
                resident_bytes: sizes.resident_bytes,
                begin,
                progress: progress.clone(),
                begun: tell_begun,
                told: tell,
            };
            placed.on.push((device, runner));
            placed.told.push(told);
            let sent = handle.commands.send(Command::Load(runner, Box::new(arrival)));
            let begun = sent.ok().and_then(|()| begun.recv().ok());
            let problem = match begun {
                Some(Ok(())) => continue,
                Some(Err(Error::OutOfMemory { needed_bytes, free_bytes, .. })) => {
                    let model = entry.name.clone();
                    EngineError::NoRoom { model, device: handle.spec, needed_bytes, free_bytes }
                }
                Some(Err(error)) => EngineError::Load { model: entry.name.clone(), source: Box::new(error) },
                None => EngineError::Thread(format!("{}: it has ended", handle.spec)),
            };
            free(self.shared, &placed.on);
            return Err(problem);
        }
        Ok(placed)
    }
}

/// Waits until all devices of a model have loaded it, and lets them know each other.
fn finish(shared: &Shared, spec: &ModelSpec, placed: Placed) -> Result<ServedModel, EngineError> {
    let Placed { on, told } = placed;
    let mut arrived = Vec::with_capacity(on.len());
    for (told, (device, _)) in told.iter().zip(&on) {
        let problem = match told.recv() {
            Ok(Ok(model)) => {
                arrived.push(model);
                continue;
            }
            Ok(Err(error)) => EngineError::Load { model: spec.name.clone(), source: Box::new(error) },
            Err(_) => {
                EngineError::Thread(format!("{}: it ended while it loaded a model", shared.devices[*device].spec))
            }
        };
        free(shared, &on);
        return Err(problem);
    }
    let replicas = on.iter().zip(&arrived).map(|((device, runner), Arrived { gauges, .. })| {
        let (device, runner, gauges) = (*device, *runner, gauges.clone());
        Replica { device, gauges, runner }
    });
    let replicas: Vec<Replica> = replicas.collect();
    for own in &replicas {
        let others = replicas.iter().filter(|other| other.device != own.device);
        let neighbour = |of: &Replica| Neighbour {
            commands: shared.devices[of.device].commands.clone(),
            gauges: of.gauges.clone(),
            runner: of.runner,
        };
        tell(shared, own.device, |done| Command::Join(own.runner, others.clone().map(neighbour).collect(), done));
    }
    let devices = replicas.iter().map(|replica| shared.devices[replica.device].spec).collect();
    let commands = replicas.iter().map(|replica| shared.devices[replica.device].commands.clone()).collect();
    let Some(Arrived { card, .. }) = arrived.pop() else {
        return Err(EngineError::Devices(format!("model `{}` lies nowhere", spec.name)));
    };
    Ok(ServedModel::new(spec.name.clone(), card, devices, Replicas::new(replicas, commands)))
}

/// Waits until nobody works with a model any more, for `drain` at most, and frees it. Nobody gets it meanwhile.
fn retire(shared: &Shared, old: Arc<ServedModel>, drain: Option<Duration>) {
    let begun = Instant::now();
    while old.is_used(1) && !shared.draining.load(Relaxed) {
        if drain.is_some_and(|drain| begun.elapsed() >= drain) {
            tracing::warn!(model = old.name, "requests that work with a model are ended, since it is unloaded");
            break;
        }
        std::thread::sleep(DRAIN_POLL);
    }
    old.close();
    let on: Vec<(usize, usize)> = old.replicas.on.iter().map(|replica| (replica.device, replica.runner)).collect();
    free(shared, &on);
    tracing::info!(model = old.name, "unloaded");
}

/// Frees what devices hold of a model, loaded or not. Sessions that are left end.
fn free(shared: &Shared, on: &[(usize, usize)]) {
    // First none sends its sessions to another, then they go.
    for (device, runner) in on {
        tell(shared, *device, |done| Command::Join(*runner, Vec::new(), done));
    }
    for (device, runner) in on {
        tell(shared, *device, |done| Command::Unload(*runner, done));
    }
}

/// Waits until a device has done it; one whose thread has ended holds nothing.
fn tell(shared: &Shared, device: usize, command: impl FnOnce(Sender<()>) -> Command) {
    let (done, heard) = channel();
    if shared.devices[device].commands.send(command(done)).is_ok() {
        let _ = heard.recv();
    }
}
