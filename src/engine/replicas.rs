//! The devices that hold one model, and which of them a request goes to: the one on which it is expected to end first.
//!
//! That is the device time that all its sessions will still take, and what this request takes there: as fast as such work was on
//! that device so far, without the beginning of a prompt that it has read lately, and of a picture or a clip that shares its steps with
//! others of its shape there no more than such steps grow by. While nothing is known of a device, what a request
//! takes there counts for nothing, so that it is tried. Expectations are wrong at times: what waits on a device goes on to one that
//! has nothing to do ([`super::peers`]).

use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use tale_models::kv::PrefixCache;
use tale_models::{ClientId, Request};

use super::affinity::{Affinity, Beginnings};
use super::arbiter::RunnerKey;
use super::command::Command;
use super::gauges::ModelGauges;
use super::shapes::Shape;
use crate::places::Places;

/// One model on one device.
#[derive(Debug)]
pub(super) struct Replica {
    /// Position of the device.
    pub(super) device: usize,
    /// Of the model there.
    pub(super) gauges: Arc<ModelGauges>,
    /// Which of the device's runners has the model.
    pub(super) runner: RunnerKey,
}

/// All devices that hold one model.
#[derive(Debug)]
pub(super) struct Replicas {
    /// By device; at least one.
    pub(super) on: Vec<Replica>,
    /// Of all of them. Their lengths are bounded: a submission holds a place of the model's queue, a cancellation needs a
    /// submission, and what has room again was full.
    pub(super) commands: Arc<[Arc<Sender<Command>>]>,
    affinity: Mutex<Affinity>,
}

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Chosen {
    /// Position among the replicas.
    pub(super) index: usize,
    /// What it is expected to take there.
    pub(super) seconds: f64,
}

impl Replicas {
    pub(super) fn new(on: Vec<Replica>, commands: Arc<[Arc<Sender<Command>>]>) -> Self {
        Self { on, commands, affinity: Mutex::default() }
    }

    /// In which sessions wait, whichever of the devices they are for.
    pub(super) fn queue(&self) -> &Arc<Places> {
        &self.on[0].gauges.queue
    }

    /// Sessions that are submitted and not ended, on all of them.
    pub(super) fn live(&self) -> usize {
        self.on.iter().map(|replica| replica.gauges.live()).sum()
    }

    /// What a session may take on each of them beside their models.
    pub(super) fn room_bytes(&self) -> usize {
        let rooms = self.on.iter().map(|replica| replica.gauges.device.room_bytes.load(Relaxed));
        rooms.min().unwrap_or(0)
    }

    /// What the model holds on the device at this position.
    pub(super) fn resident_bytes_on(&self, device: usize) -> usize {
        let there = self.on.iter().filter(|replica| replica.device == device);
        there.map(|replica| replica.gauges.resident_bytes.load(Relaxed)).sum()
    }

    /// Whether a device is left.
    pub(super) fn is_alive(&self) -> bool {
        self.on.iter().any(|replica| replica.gauges.device.is_alive())
    }

    /// What a request is expected to take where it is fastest; `None` while nothing is known of any device.
    pub(super) fn predicted_seconds(&self, request: &Request) -> Option<f64> {
        let alive = self.on.iter().filter(|replica| replica.gauges.device.is_alive());
        let expected = alive.filter_map(|replica| replica.gauges.rates().predict(request, 0));
        expected.min_by(f64::total_cmp)
    }

    /// The replica for a request, whose device has it in its backlog from then on; `None` where no device is left.
    pub(super) fn choose(&self, client: ClientId, request: &Request, prefix_cache: PrefixCache) -> Option<Chosen> {
        let beginnings = match request {
            // With one device there is nothing to remember.
            Request::Text(request) if self.on.len() > 1 => Beginnings::of(request, client, prefix_cache),
            _ => Beginnings::default(),
        };
        let shape = Shape::of(request);
        let mut affinity = self.affinity.lock().expect("nothing panics while it holds this: this is a bug");
        let alive = self.on.iter().enumerate().filter(|(_, replica)| replica.gauges.device.is_alive());
        let expected = alive.map(|(index, Replica { device, gauges, .. })| {
            let cached_tokens = affinity.cached_tokens(&beginnings, *device);
            let others = shape.map_or(0, |shape| gauges.live_of(shape));
            let rates = *gauges.rates();
            let seconds = rates.predict(request, cached_tokens).unwrap_or(0.0) * rates.share_beside(others);
            (gauges.device.backlog_seconds() + seconds, gauges.device.live(), Chosen { index, seconds })
        });
        let (_, _, chosen) = expected.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))?;
        let Replica { device, gauges, .. } = &self.on[chosen.index];
        affinity.note(&beginnings, *device);
        gauges.enter(shape, chosen.seconds);
        Some(chosen)
    }
}
