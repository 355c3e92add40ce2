//! The boundary between models and everything above: a runner drives the sessions of one loaded model step by step.

use crate::error::{Error, Result};
use crate::memory::MemoryPlan;
use crate::request::{ClientId, Events, Phase, Request, SessionId};
use crate::session_checkpoint::{Refusal, SessionCheckpoint};
use std::sync::Arc;

pub mod diffusion;
pub mod fair_queue;
pub mod text;

/// What the next step of a runner would be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepPlan {
    /// Kind of work.
    pub phase: Phase,
    /// Sessions that the step advances.
    pub sessions: usize,
    /// How much work it is, in a unit of its phase: tokens of prefill and decode, positions (pixels of all frames and guidance
    /// branches) of denoising; 0 of what else a picture takes.
    pub amount: f64,
}

/// What a runner holds now, for metrics and for tests that nothing leaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RunnerStatus {
    /// Sessions that have been part of a step and are not done.
    pub running: usize,
    /// Sessions that wait for their first step (or, preempted, for their next).
    pub waiting: usize,
    /// KV blocks in use; 0 for diffusion.
    pub kv_blocks_used: usize,
    /// KV blocks in all; 0 for diffusion.
    pub kv_blocks_total: usize,
}

/// Drives all sessions of one loaded model. Used from one thread: the device's.
pub trait Runner: Send {
    /// Bytes of device memory that a session of this request needs beside the weights in each of its phases. The caller
    /// reserves the most of them before `submit` and frees them when the session ends.
    fn plan(&self, request: &Request) -> MemoryPlan;

    /// Says how many bytes the device has for work beside all weights, before the first plan. A runner may do with less
    /// memory where that is short.
    fn set_room(&mut self, _bytes: usize) {}

    /// Accepts a session of a client: checks it, plans it, computes nothing heavy. Clients take turns.
    fn submit_for(&mut self, client: ClientId, session: SessionId, request: Request) -> Result<()>;

    /// As [`Runner::submit_for`], of this process itself.
    fn submit(&mut self, session: SessionId, request: Request) -> Result<()> {
        self.submit_for(ClientId::default(), session, request)
    }

    /// Most sessions that it holds, running and waiting; more are refused.
    fn max_sessions(&self) -> usize;

    /// Forgets a session and frees what it holds. Unknown ids are ignored: the session may just have ended.
    fn cancel(&mut self, session: SessionId);

    /// Forgets a session that has had no step, and gives its request back; `None` for one that has had a step, and for unknown
    /// ids.
    fn take_back(&mut self, session: SessionId) -> Option<Request>;

    /// Leaves a session out of all steps until [`Runner::unpause`]; it keeps what it holds. Called where the frames that it has
    /// given have nowhere to go, so that a runner without frames is never asked. Unknown ids are ignored, as in `cancel`.
    fn pause(&mut self, _session: SessionId) {}

    /// Lets a paused session go on; nothing happens to another.
    fn unpause(&mut self, _session: SessionId) {}

    /// What a session needs to go on in another runner over the same weights, as it stands between two steps. `None` for one that
    /// has not come so far that less would be done again than begun anew, for one that cannot go on elsewhere, and for unknown
    /// ids. Nothing changes for the session; the device needs no memory for it.
    fn checkpoint(&mut self, _session: SessionId) -> Result<Option<Arc<SessionCheckpoint>>> {
        Ok(None)
    }

    /// As [`Runner::submit_for`], for a session that goes on where another one of the same request was at `checkpoint`. What
    /// that had given out by then (frames, previews) is not given out again; the rest has the same bits on the same kind of
    /// device. Errors: [`Error::NotResumable`], here or as the end of the session before its first denoising step.
    fn resume_for(
        &mut self,
        _client: ClientId,
        _session: SessionId,
        _request: Request,
        _checkpoint: Arc<SessionCheckpoint>,
    ) -> Result<()> {
        Err(Error::NotResumable(Refusal::Unsupported))
    }

    /// What the next call of `step` would do; `None` when there is nothing to do.
    fn next(&self) -> Option<StepPlan>;

    /// Bytes that the runner needs for its next step beside the weights and what its sessions have reserved, and holds
    /// until it asks for fewer; 0 but for work that is done once more in wider networks. The caller reserves them before
    /// the step.
    fn borrowed_bytes(&self) -> usize;

    /// Forgets the sessions of the next step, whose borrowed bytes there are not, and names them. The others go on.
    fn evict_next(&mut self) -> Vec<SessionId>;

    /// The first half of a step: gives the device its work, as far as that needs no answer of the device, and does not wait
    /// for it. Nothing where work begins and ends in one call, as on the CPU. After an error (or a panic) the caller must
    /// call [`Runner::evict_step`]; otherwise [`Runner::collect`] follows, and only `pause` and `unpause` come between.
    fn launch(&mut self) -> Result<()> {
        Ok(())
    }

    /// The second half: one bounded piece of work ends, and what came of it is said. After an error (or a panic) the caller
    /// must call [`Runner::evict_step`].
    fn collect(&mut self, events: &mut Events) -> Result<StepPlan>;

    /// Both halves.
    fn step(&mut self, events: &mut Events) -> Result<StepPlan> {
        self.launch()?;
        self.collect(events)
    }

    /// Forgets the sessions of the step that failed, frees what they held, and names them. The others go on.
    fn evict_step(&mut self) -> Vec<SessionId>;

    /// Why no step will succeed any more, if so. Asked after a step that failed.
    fn problem(&self) -> Option<Error> {
        None
    }

    /// What the runner holds now.
    fn status(&self) -> RunnerStatus;
}
