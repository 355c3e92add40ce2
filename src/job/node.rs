//! A process that takes part in the work: it takes orders, claims jobs, has them made, and hands them over when it ends.
//!
//! Owns: which jobs this node has, that none is written whose lease may have ended, and what followers here hear. The order of jobs is
//! the store's, the order of steps the engine's. Does not know: HTTP, how one clip is made (`drive`).

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use tale_models::ClientId;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use self::drive::{Claim, drive};
use self::prepare::{INPUT, input_name};
use super::feed::{Feeds, JobEvent, JobFeed};
use super::objects::Objects;
use super::output::{OutputDir, StorageProblem};
use super::spec::{BadSpec, ClipSpec, InputSpec};
use super::store::{
    Claimed, Claimer, Filter, Idempotency, JobRecord, JobStore, Lease, NewJob, Page, Priority, RecordState, Renewed,
    StoreError, Submitted,
};
use super::{Job, JobId, JobKind};
use crate::compute::Compute;
use crate::engine::{Engine, ModelReport};

mod drive;
pub mod prepare;
mod saved;

/// For how long a claim lasts without being renewed.
const LEASE: Duration = Duration::from_secs(30);
/// Of a lease, so much is left to the store's clock and to the way there: work on a job stops before another node may begin.
const LEASE_MARGIN: Duration = Duration::from_secs(5);
/// How often leases are renewed where other processes use the store; what they want of this one's jobs is heard then.
const RENEW_SHARED: Duration = Duration::from_secs(1);
/// The same where nobody else does.
const RENEW_ALONE: Duration = Duration::from_secs(5);
/// How often jobs of silent nodes, past deadlines and surplus are looked for.
const REAP: Duration = Duration::from_secs(2);
/// How often what lies beside rows is looked through.
const SWEEP: Duration = Duration::from_secs(600);
/// A row comes within this time after the first picture of its order.
const ORDER_IS_KEPT_WITHIN: Duration = Duration::from_secs(3600);
/// How often work is looked for when nobody says that there is some.
const POLL: Duration = Duration::from_secs(1);
/// How often the row of a job that another node makes is looked at for followers here.
const WATCH: Duration = Duration::from_millis(500);
/// Most jobs that a node has at a time. Each holds the pictures that it was given, and a thread while its frames are encoded.
const MAX_HELD: usize = 64;
/// Jobs of a model that may wait for its devices beside one for each of them, so that none idles between two.
const WAITING_AHEAD: usize = 1;
/// For how long no job is claimed of a model that was not there.
const REST: Duration = Duration::from_secs(5);
/// How long a hand-over may take: a preempted machine is gone after 15 seconds.
const HAND_OVER: Duration = Duration::from_secs(8);

/// What a node works with.
#[derive(Debug)]
pub struct NodeOptions {
    /// Its name, which no other node has.
    pub name: String,
    /// Where jobs live.
    pub store: Arc<dyn JobStore>,
    /// Where the bytes beside them lie; as durable as the store.
    pub objects: Objects,
    /// Jobs outlive this process.
    pub is_durable: bool,
    /// Other processes use the store.
    pub is_shared: bool,
}

/// The handle of a node; clones are the same node.
#[derive(Debug, Clone)]
pub struct Node(Arc<Shared>);

#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    pub(super) store: Arc<dyn JobStore>,
    pub(super) objects: Objects,
    pub(super) outputs: Arc<OutputDir>,
    pub(super) compute: Compute,
    pub(super) is_durable: bool,
    is_shared: bool,
    engine: OnceLock<Engine>,
    feeds: Feeds,
    held: Mutex<HashMap<JobId, Held>>,
    /// There may be something to claim.
    wake: Notify,
    stops_claiming: AtomicBool,
    /// Models whose jobs are not claimed before then: they were not there.
    resting: Mutex<HashMap<String, Instant>>,
}

/// A job that this node has.
#[derive(Debug)]
struct Held {
    lease: Lease,
    model: String,
    control: watch::Sender<Control>,
    /// When its lease was asked for last.
    lasts_from: watch::Sender<Instant>,
    has_begun: bool,
    is_alone: bool,
}

/// What the holder of a job is told; what comes later here is stronger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Control {
    /// Go on.
    Run,
    /// This process ends: leave it for another.
    HandOver,
    /// Its owner does not want it any more.
    Cancel,
    /// It is no longer this node's.
    Lost,
}

/// An order.
#[derive(Debug)]
pub struct Order {
    /// Whose it is.
    pub client: ClientId,
    /// The model that makes it.
    pub model: String,
    /// What is asked for, without its inputs.
    pub spec: ClipSpec,
    /// The picture files that it was given, each with its field.
    pub inputs: Vec<(String, Bytes)>,
    /// When, and how urgent.
    pub terms: Terms,
    /// Device time that it is expected to take in seconds, compared with others where that is not known.
    pub cost_seconds: f64,
}

/// What is asked of the order itself.
#[derive(Debug, Clone)]
pub struct Terms {
    /// How urgent.
    pub priority: Priority,
    /// Not before so much time has gone.
    pub wait: Duration,
    /// It fails if it has not ended by then.
    pub deadline: Option<Duration>,
    /// The client's name for the order.
    pub idempotency: Option<Idempotency>,
    /// Who hears of its end.
    pub webhook: Option<String>,
}

impl Default for Terms {
    fn default() -> Self {
        Self { priority: Priority::Standard, wait: Duration::ZERO, deadline: None, idempotency: None, webhook: None }
    }
}

/// Why a node cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The job's row cannot be read here.
    #[error(transparent)]
    Spec(#[from] BadSpec),
    /// The pictures of an order cannot be kept.
    #[error(transparent)]
    Storage(#[from] StorageProblem),
}

impl NodeError {
    /// Whether there is no such job.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Store(StoreError::Unknown))
    }
}

/// Where a job stands in the queue.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueuePlace {
    /// Jobs before it.
    pub position: usize,
    /// Until it is done, in seconds; where what is before it, and it itself, are of a known length.
    pub eta_seconds: Option<f64>,
}

/// Most jobs of a queue in which a place is looked for.
const MAX_QUEUE: usize = 1000;

impl Node {
    /// A node that takes orders, and works none off before [`Node::work`].
    pub fn new(options: NodeOptions, outputs: Arc<OutputDir>, compute: Compute) -> Self {
        let NodeOptions { name, store, objects, is_durable, is_shared } = options;
        Self(Arc::new(Shared {
            name,
            store,
            objects,
            outputs,
            compute,
            is_durable,
            is_shared,
            engine: OnceLock::new(),
            feeds: Feeds::default(),
            held: Mutex::default(),
            wake: Notify::new(),
            stops_claiming: AtomicBool::new(false),
            resting: Mutex::default(),
        }))
    }

    /// Works jobs off with `engine` from now on, on the runtime that this is called on. Only the first call counts.
    pub fn work(&self, engine: Engine) {
        if self.0.engine.set(engine).is_err() {
            return;
        }
        // They end when the last handle is gone and the last job has ended.
        tokio::spawn(claim(Arc::downgrade(&self.0)));
        tokio::spawn(renew(Arc::downgrade(&self.0)));
        tokio::spawn(reap(Arc::downgrade(&self.0)));
    }

    /// Keeps an order, and gives it as a job. It is durable when this returns. The second is false where the same order was given before.
    pub async fn submit(&self, order: Order) -> Result<(Job, bool), NodeError> {
        let Order { client, model, mut spec, inputs, terms, cost_seconds } = order;
        let id = JobId::generate(JobKind::Video);
        for (index, (field, bytes)) in inputs.into_iter().enumerate() {
            spec.inputs.push(InputSpec { field, bytes: bytes.len() as u64 });
            if let Err(error) = self.0.objects.put(id, &input_name(index), bytes).await {
                self.0.forget_objects(id).await;
                return Err(StorageProblem::NotWritable { reason: error.to_string() }.into());
            }
        }
        let Terms { priority, wait, deadline, idempotency, webhook } = terms;
        let spec = spec.to_text();
        let job = NewJob {
            id,
            owner: owner_of(client),
            priority,
            model,
            spec,
            cost_seconds,
            wait,
            deadline,
            idempotency,
            webhook,
        };
        // Before it can be claimed. Where it may be made elsewhere, only those who follow it need one.
        if !self.0.is_shared {
            self.0.feeds.of(id, JobFeed::default);
        }
        match self.0.store.submit(job).await {
            Ok(Submitted::New(record)) => {
                self.0.wake.notify_one();
                Ok((self.job(record)?, true))
            }
            Ok(Submitted::Known(record)) => {
                self.0.feeds.remove(id);
                self.0.forget_objects(id).await;
                Ok((self.job(record)?, false))
            }
            Err(error) => {
                self.0.feeds.remove(id);
                // It may be there after all, where the answer was lost; then its pictures must stay.
                if !matches!(error, StoreError::Unavailable(_)) {
                    self.0.forget_objects(id).await;
                }
                Err(error.into())
            }
        }
    }

    /// The job as it stands.
    pub async fn get(&self, id: JobId) -> Result<Job, NodeError> {
        self.job(self.0.store.get(id).await?)
    }

    /// A page of jobs, and whether there are more behind. One whose row cannot be read here is left out.
    pub async fn list(&self, filter: &Filter, page: &Page) -> Result<(Vec<Job>, bool), NodeError> {
        let listing = self.0.store.list(filter, page).await?;
        let jobs = listing.jobs.into_iter().filter_map(|record| {
            let id = record.id;
            let job = self.job(record);
            job.inspect_err(|error| tracing::warn!(job = %id, %error, "a job is left out of a list")).ok()
        });
        Ok((jobs.collect(), listing.has_more))
    }

    /// Wants a job to end.
    pub async fn cancel(&self, id: JobId) -> Result<Job, NodeError> {
        let record = self.0.store.cancel(id).await?;
        self.tell(id, Control::Cancel);
        self.0.hear_of_end(record.clone());
        self.job(record)
    }

    /// Puts a job that failed or was cancelled into the queue again.
    pub async fn retry(&self, id: JobId) -> Result<Job, NodeError> {
        let record = self.0.store.retry(id).await?;
        // Its events begin anew.
        self.0.feeds.remove(id);
        self.0.wake.notify_one();
        self.job(record)
    }

    /// Makes a job that waits more or less urgent.
    pub async fn prioritise(&self, id: JobId, priority: Priority) -> Result<Job, NodeError> {
        self.job(self.0.store.prioritise(id, priority).await?)
    }

    /// Forgets a job and removes its files, whatever its state.
    pub async fn remove(&self, id: JobId) -> Result<(), NodeError> {
        let record = self.0.store.remove(id).await?;
        self.tell(id, Control::Lost);
        self.0.clean(record).await;
        if let Some(feed) = self.0.feeds.get(id) {
            feed.push(JobEvent::Cancelled);
        }
        self.0.feeds.remove(id);
        Ok(())
    }

    /// What happened to a job and what will, wherever it is made.
    pub async fn feed(&self, id: JobId) -> Result<Arc<JobFeed>, NodeError> {
        let job = self.get(id).await?;
        let feed = self.0.feeds.of(id, || JobFeed::of(&job));
        if !feed.has_ended() && self.0.feeds.take_source(id) {
            tokio::spawn(watch_row(self.clone(), id, feed.clone()));
        }
        Ok(feed)
    }

    /// Where a job that waits stands; `None` for others, and for one too far back to look.
    pub async fn place(&self, job: &Job) -> Result<Option<QueuePlace>, NodeError> {
        let Some(engine) = self.0.engine.get() else { return Ok(None) };
        let queue = self.0.store.queue(MAX_QUEUE).await?;
        let Some(index) = queue.iter().position(|record| record.id == job.id) else { return Ok(None) };
        if !matches!(queue[index].state, RecordState::Queued) {
            return Ok(None);
        }
        let devices = engine.model(&job.model).map_or(1, |model| model.devices.len()).max(1);
        let rivals = || queue[..index].iter().filter(|record| record.model == job.model);
        let waiting = rivals().filter(|record| matches!(record.state, RecordState::Queued));
        let position = waiting.count();
        let left = |record: &JobRecord| {
            let progress = record.progress.as_deref().and_then(|text| super::Progress::from_text(text).ok());
            let done = f64::from(progress.unwrap_or_default().percent) / 100.0;
            Some(ClipSpec::from_text(&record.spec).ok()?.predicted_seconds? * (1.0 - done))
        };
        let before: Option<f64> = rivals().map(left).sum();
        let eta_seconds = before.zip(job.spec.predicted_seconds).map(|(before, own)| before / devices as f64 + own);
        Ok(Some(QueuePlace { position, eta_seconds }))
    }

    /// Jobs that have not ended, on all nodes; 0 where the store does not say in time.
    pub async fn num_active(&self) -> usize {
        match tokio::time::timeout(POLL, self.0.store.num_active()).await {
            Ok(Ok(active)) => active,
            _ => 0,
        }
    }

    /// Whether work is left that ends with this process.
    pub async fn is_idle(&self) -> bool {
        match self.0.is_durable {
            true => self.0.lock().is_empty(),
            false => self.num_active().await == 0,
        }
    }

    /// Whether jobs outlive this process.
    pub fn is_durable(&self) -> bool {
        self.0.is_durable
    }

    /// Whether the store can be written.
    pub async fn check(&self) -> Result<(), StoreError> {
        self.0.store.check().await
    }

    /// Claims nothing more, and leaves the jobs that it has for other nodes or its next process. Returns when that is done, after a bounded time.
    pub async fn hand_over(&self) {
        self.0.stops_claiming.store(true, Relaxed);
        let leases: Vec<Lease> = self.0.lock().values().map(|held| held.lease.clone()).collect();
        leases.iter().for_each(|lease| self.0.tell(lease, Control::HandOver));
        let deadline = Instant::now() + HAND_OVER;
        while !self.0.lock().is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let left = self.0.lock().len();
        if left > 0 {
            tracing::warn!(left, "jobs were not handed over in time; other nodes take them when their leases end");
        }
    }

    /// Tells the holder of a job, if it is here.
    fn tell(&self, id: JobId, control: Control) {
        let lease = self.0.lock().get(&id).map(|held| held.lease.clone());
        if let Some(lease) = lease {
            self.0.tell(&lease, control);
        }
    }

    /// What a row says, and what is known here beyond it.
    fn job(&self, record: JobRecord) -> Result<Job, NodeError> {
        let mut job = Job::of(record, &self.0.outputs)?;
        if job.state.is_terminal() || !self.0.lock().contains_key(&job.id) {
            return Ok(job);
        }
        if let Some(feed) = self.0.feeds.get(job.id).filter(|feed| feed.has_started()) {
            job.state = super::JobState::InProgress;
            job.progress = feed.progress().unwrap_or(job.progress);
        }
        Ok(job)
    }
}

/// Whose jobs a client's are.
fn owner_of(client: ClientId) -> String {
    client.0.to_string()
}

/// The client of an owner, for whose work devices take turns.
pub(super) fn client_of(owner: &str) -> ClientId {
    owner.parse().map_or_else(|_| ClientId::default(), ClientId)
}

/// Claims jobs whenever one more would keep a device busy.
async fn claim(shared: Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let Some(engine) = shared.engine.get().filter(|_| !shared.stops_claiming.load(Relaxed)) else { return };
        let asked = Instant::now();
        let claimed = match shared.claimer(engine) {
            Some(claimer) => shared.store.claim(&claimer).await,
            None => Ok(None),
        };
        match claimed {
            Ok(Some(claimed)) => shared.clone().begin(engine.clone(), claimed, asked),
            Ok(None) => {
                tokio::select! {
                    () = shared.wake.notified() => (),
                    () = shared.store.news(POLL) => (),
                }
            }
            Err(error) => {
                tracing::warn!(%error, "no job can be claimed");
                tokio::time::sleep(POLL).await;
            }
        }
    }
}

/// Keeps the leases of this node's jobs, and hears what their owners want.
async fn renew(shared: Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        shared.renew_all().await;
        let every = if shared.is_shared { RENEW_SHARED } else { RENEW_ALONE };
        drop(shared);
        tokio::time::sleep(every).await;
    }
}

/// Looks after jobs that nobody looks after.
async fn reap(shared: Weak<Shared>) {
    let mut swept: Option<Instant> = None;
    while let Some(shared) = shared.upgrade() {
        if swept.is_none_or(|swept| swept.elapsed() >= SWEEP) {
            if let Err(error) = shared.sweep().await {
                tracing::warn!(%error, "what lies beside jobs cannot be looked through");
            }
            swept = Some(Instant::now());
        }
        if let Err(error) = shared.reap().await {
            tracing::warn!(%error, "the job store cannot be looked after");
        }
        drop(shared);
        tokio::time::sleep(REAP).await;
    }
}

/// Tells the holder of a job that it may be another's by now, once its lease has not been renewed for too long. Goes by this machine's monotonic clock,
/// from before the lease was asked for.
async fn fence(shared: Weak<Shared>, lease: Lease, mut lasts_from: watch::Receiver<Instant>) {
    loop {
        let from = *lasts_from.borrow_and_update();
        tokio::select! {
            () = tokio::time::sleep_until(from + LEASE - LEASE_MARGIN) => break,
            changed = lasts_from.changed() => if changed.is_err() { return },
        }
    }
    let Some(shared) = shared.upgrade() else { return };
    tracing::warn!(job = %lease.id, "the lease of a job ends without being renewed; its work stops here");
    shared.tell(&lease, Control::Lost);
}

/// Adds to the feed of a job that another node may make, for as long as somebody follows it.
async fn watch_row(node: Node, id: JobId, feed: Arc<JobFeed>) {
    loop {
        tokio::time::sleep(WATCH).await;
        // Ours, and that of the node.
        let has_followers = Arc::strong_count(&feed) > 2;
        if feed.has_ended() || !has_followers {
            break;
        }
        // What is made here says it itself.
        if node.0.lock().contains_key(&id) {
            continue;
        }
        match node.get(id).await {
            Ok(job) => feed.catch_up(&job),
            Err(NodeError::Store(StoreError::Unknown)) => feed.push(JobEvent::Cancelled),
            Err(error) => tracing::debug!(job = %id, %error, "a job cannot be followed"),
        }
    }
    node.0.feeds.give_source_back(id);
    drop(feed);
    node.0.leave_feed(id);
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<JobId, Held>> {
        self.held.lock().expect("no code panics while it holds the jobs: this is a bug")
    }

    /// What this node looks for; `None` while it has enough.
    fn claimer(&self, engine: &Engine) -> Option<Claimer> {
        if self.outputs.problem().is_some() {
            return None;
        }
        let held = self.lock();
        if held.len() >= MAX_HELD || held.values().any(|held| held.is_alone) {
            return None;
        }
        let waiting = |model: &str| held.values().filter(|held| !held.has_begun && held.model == model).count();
        let resting = self.resting();
        let wants_more = |model: &ModelReport| {
            let rests = resting.get(&model.name).is_some_and(|until| Instant::now() < *until);
            !rests && waiting(&model.name) < model.devices.len() + WAITING_AHEAD
        };
        let models = engine.models().into_iter().filter(wants_more).map(|model| model.name);
        let models: Vec<String> = models.collect();
        let is_free = held.is_empty();
        (!models.is_empty()).then(|| Claimer { node: self.name.clone(), models, lease: LEASE, is_free })
    }

    /// Has a job made that was just claimed.
    fn begin(self: Arc<Self>, engine: Engine, claimed: Claimed, asked: Instant) {
        let Claimed { lease, record, is_alone } = claimed;
        let id = record.id;
        let (control, told) = watch::channel(Control::Run);
        let model = record.model.clone();
        let (lasts_from, lasts) = watch::channel(asked);
        let held = Held { lease: lease.clone(), model, control, lasts_from, has_begun: false, is_alone };
        if self.lock().insert(id, held).is_some() {
            // Its lease ended, and the node that has it now is this one again: the earlier claim is void.
            tracing::warn!(job = %id, "a job was claimed again while this node still had it");
        }
        tokio::spawn(async move {
            tokio::spawn(fence(Arc::downgrade(&self), lease.clone(), lasts));
            drive(Claim { shared: self.clone(), engine, lease: lease.clone(), told }, record).await;
            self.lock().retain(|_, held| held.lease != lease);
            self.leave_feed(id);
            self.wake.notify_one();
        });
    }

    fn resting(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.resting.lock().expect("no code panics while it holds these: this is a bug")
    }

    /// Claims no job of a model for a while.
    pub(super) fn rest(&self, model: &str) {
        self.resting().insert(model.to_owned(), Instant::now() + REST);
    }

    /// Whether the device has begun the job of a lease.
    fn is_begun(&self, lease: &Lease) -> bool {
        self.lock().get(&lease.id).is_some_and(|held| held.lease == *lease && held.has_begun)
    }

    /// The device has begun a job: another one may be claimed.
    pub(super) fn has_begun(&self, id: JobId) {
        if let Some(held) = self.lock().get_mut(&id) {
            held.has_begun = true;
        }
        self.wake.notify_one();
    }

    async fn renew_all(&self) {
        let leases: Vec<Lease> = self.lock().values().map(|held| held.lease.clone()).collect();
        if leases.is_empty() {
            return;
        }
        let asked = Instant::now();
        match tokio::time::timeout(LEASE_MARGIN, self.store.renew(&leases, LEASE)).await {
            Ok(Ok(renewed)) => {
                leases.iter().zip(renewed).for_each(|(lease, renewed)| self.renewed(lease, renewed, asked))
            }
            Ok(Err(error)) => tracing::warn!(%error, "leases could not be renewed"),
            Err(_) => tracing::warn!("leases could not be renewed: the job store does not answer"),
        }
    }

    fn renewed(&self, lease: &Lease, renewed: Renewed, asked: Instant) {
        if renewed == Renewed::Lost {
            return self.tell(lease, Control::Lost);
        }
        if let Some(held) = self.lock().get(&lease.id).filter(|held| held.lease == *lease) {
            held.lasts_from.send_replace(asked);
        }
        if renewed == Renewed::Cancelled {
            self.tell(lease, Control::Cancel);
        }
    }

    /// Tells the holder of a lease, unless it was told something stronger.
    fn tell(&self, lease: &Lease, control: Control) {
        if let Some(held) = self.lock().get(&lease.id).filter(|held| held.lease == *lease) {
            held.control.send_if_modified(|told| {
                control > *told && {
                    *told = control;
                    true
                }
            });
        }
    }

    async fn reap(&self) -> Result<(), StoreError> {
        for record in self.store.reap().await? {
            let (job, state) = (record.id, record.state.as_str());
            tracing::warn!(%job, state, crashes = record.crashes, "a job's holder went silent, or its time is over");
            self.hear_of_end(record);
            self.wake.notify_one();
        }
        for record in self.store.retain().await? {
            self.feeds.remove(record.id);
            self.clean(record).await;
        }
        Ok(())
    }

    /// Removes what a process that was killed has left beside rows that need nothing any more, or that never came to be.
    async fn sweep(&self) -> io::Result<()> {
        for id in self.objects.jobs().await? {
            let is_left = match self.store.get(id).await {
                Ok(record) => matches!(record.state, RecordState::Completed { .. }),
                // An order's pictures are there before its row.
                Err(StoreError::Unknown) => {
                    id.made().and_then(|made| made.elapsed().ok()).is_some_and(|age| age > ORDER_IS_KEPT_WITHIN)
                }
                Err(_) => false,
            };
            if is_left {
                self.forget_objects(id).await;
            }
        }
        Ok(())
    }

    /// Followers hear of a state that may have become terminal by another hand than the holder's.
    fn hear_of_end(&self, record: JobRecord) {
        let feed = self.feeds.get(record.id);
        if let Some((feed, job)) =
            feed.zip(Job::of(record, &self.outputs).ok()).filter(|(_, job)| job.state.is_terminal())
        {
            feed.catch_up(&job);
        }
    }

    /// Forgets what was told of a job that goes on elsewhere, unless somebody follows it or nobody else can have it.
    fn leave_feed(&self, id: JobId) {
        if self.is_shared && !self.lock().contains_key(&id) {
            self.feeds.remove_unfollowed(id);
        }
    }

    /// What followers of a job on this node hear.
    pub(super) fn feed(&self, job: &Job) -> Arc<JobFeed> {
        self.feeds.of(job.id, || JobFeed::of(job))
    }

    /// Removes what lies beside a row that has gone.
    async fn clean(&self, record: JobRecord) {
        let id = record.id;
        self.forget_objects(id).await;
        if let Ok(Job { state: super::JobState::Completed(files), .. }) = Job::of(record, &self.outputs) {
            let removed = tokio::task::spawn_blocking(move || files.remove()).await;
            if let Err(error) = removed.map_err(io::Error::other).flatten() {
                tracing::warn!(job = %id, %error, "the file of a job that has gone stays");
            }
        }
    }

    /// Forgets what lies beside a row.
    pub(super) async fn forget_objects(&self, id: JobId) {
        if let Err(error) = self.objects.remove_all(id).await {
            tracing::warn!(job = %id, %error, "the pictures of a job stay");
        }
    }

    /// Forgets what a clip had so far, and keeps the pictures with which it could begin anew.
    pub(super) async fn forget_work(&self, id: JobId) {
        if let Err(error) = self.objects.remove_others(id, INPUT).await {
            tracing::warn!(job = %id, %error, "what a job had so far stays");
        }
    }
}
