//! A second device that predicts the negative guidance branches of sessions while the first predicts the positive ones.
//!
//! Owns: what that device is told of sessions and steps, and what it does with it: it has the whole model, encodes requests by itself,
//! and gets latents and gives predictions in memory of the host, once per step. Does not know: guidance, solvers, how threads follow
//! (`parallel`). Sessions whose branches skip blocks, or whose requests add LoRA terms, are computed on the first device alone: what
//! is kept of passes, and the terms, are there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use candle_core::{DType, Device, Tensor};

use super::course::Expert;
use super::model::DiffusionModel;
use super::predict_in_passes;
use super::row::DenoiseRow;
use crate::diffusion::DiffusionRequest;
use crate::error::{Error, Result};
use crate::parallel::{Follow, Followers};
use crate::request::SessionId;

/// What the second device is told.
#[derive(Debug, Clone)]
pub enum Ask {
    /// Encode what the session is conditioned on.
    Begin(SessionId, Arc<DiffusionRequest>),
    /// It has ended.
    Forget(SessionId),
    /// Predict.
    Predict(Arc<Question>),
}

/// Rows of one denoising step, for one expert.
#[derive(Debug)]
pub struct Question {
    expert: Expert,
    rows: Vec<SentRow>,
    /// Most rows of one pass.
    max_rows: usize,
    answer: Sender<Result<Vec<Vec<f32>>>>,
}

/// A [`DenoiseRow`] in memory of the host.
#[derive(Debug)]
struct SentRow {
    session: SessionId,
    branch: usize,
    timestep: f64,
    latents: Vec<f32>,
    shape: Vec<usize>,
}

/// The second device, as the first one sees it.
#[derive(Debug)]
pub struct DeviceBeside {
    followers: Followers<Ask>,
    /// Sessions that it knows.
    known: BTreeSet<SessionId>,
}

/// A row that the second device is to predict.
pub(super) struct RowBeside<'a, C> {
    pub(super) session: SessionId,
    pub(super) branch: usize,
    pub(super) row: DenoiseRow<'a, C>,
}

/// Predictions that are on their way.
pub(super) struct Coming {
    answer: Receiver<Result<Vec<Vec<f32>>>>,
    shapes: Vec<Vec<usize>>,
}

impl DeviceBeside {
    /// The one that these follow with, which are ready.
    pub fn new(followers: Followers<Ask>) -> Self {
        Self { followers, known: BTreeSet::new() }
    }

    /// Whether it predicts branches of such requests.
    pub(super) fn takes(request: &DiffusionRequest) -> bool {
        request.guidance.num_branches() > 1 && request.cache.is_none() && request.loras.is_empty()
    }

    /// Lets it encode what a session is conditioned on, if it is to predict branches of it, while the first device does so too.
    pub(super) fn begin(&mut self, session: SessionId, request: &DiffusionRequest) -> Result<()> {
        if !Self::takes(request) || !self.known.insert(session) {
            return Ok(());
        }
        self.followers.tell(&Ask::Begin(session, Arc::new(request.clone())))
    }

    /// Lets it forget a session.
    pub(super) fn forget(&mut self, session: SessionId) {
        if self.known.remove(&session) {
            // An error means that it has ended, and all that it knew is gone.
            let _ = self.followers.tell(&Ask::Forget(session));
        }
    }

    /// Lets it predict rows of sessions that have begun.
    pub(super) fn ask<C>(&self, expert: Expert, rows: &[RowBeside<'_, C>], max_rows: usize) -> Result<Coming> {
        let sent = |RowBeside { session, branch, row }: &RowBeside<'_, C>| {
            Ok(SentRow {
                session: *session,
                branch: *branch,
                timestep: row.timestep,
                latents: row.latents.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?,
                shape: row.latents.dims().to_vec(),
            })
        };
        let rows = rows.iter().map(sent).collect::<Result<Vec<_>>>()?;
        let shapes = rows.iter().map(|row| row.shape.clone()).collect();
        let (answer, coming) = channel();
        self.followers.tell(&Ask::Predict(Arc::new(Question { expert, rows, max_rows, answer })))?;
        Ok(Coming { answer: coming, shapes })
    }

    /// Waits for predictions, `[1, ...]` in f32 each, on `device`.
    pub(super) fn take(&self, coming: Coming, device: &Device) -> Result<Vec<Tensor>> {
        let Coming { answer, shapes } = coming;
        // Nothing but the end of its thread takes the answer's sender away without an answer.
        let predictions = answer.recv().map_err(|_| self.followers.wait_for_problem())??;
        let tensors = predictions.into_iter().zip(shapes);
        tensors.map(|(values, shape)| Ok(Tensor::from_vec(values, shape, device)?)).collect()
    }

    /// Why it predicts nothing any more, if so.
    pub(super) fn problem(&self) -> Option<Error> {
        self.followers.problem()
    }
}

/// What the second device has of a session.
struct Known<M: DiffusionModel> {
    request: Arc<DiffusionRequest>,
    encoded: Vec<Arc<M::Encoded>>,
    /// Of each expert that has been asked for.
    conditioning: BTreeMap<Expert, Vec<M::Conditioning>>,
}

/// What the second device does with what it is told: it has this model.
pub fn follow<M: DiffusionModel + 'static>(model: M, device: Device) -> Follow<Ask> {
    let mut sessions: BTreeMap<SessionId, Result<Known<M>>> = BTreeMap::new();
    Box::new(move |ask| {
        match ask {
            Ask::Begin(session, request) => {
                sessions.insert(session, encode(&model, request));
            }
            Ask::Forget(session) => drop(sessions.remove(&session)),
            Ask::Predict(question) => {
                let predictions = answer(&model, &device, &mut sessions, &question);
                // The receiver is gone only when the step has failed on the first device.
                let _ = question.answer.send(predictions);
            }
        }
        Ok(())
    })
}

/// All that a request has encoded.
fn encode<M: DiffusionModel>(model: &M, request: Arc<DiffusionRequest>) -> Result<Known<M>> {
    let mut encoded = Vec::new();
    for inputs in model.inputs(&request) {
        let mut encoding = model.begin_encode(&inputs.pass, &inputs.rows.iter().collect::<Vec<_>>())?;
        let of_rows = loop {
            if let Some(of_rows) = model.encode_next(&mut encoding)? {
                break of_rows;
            }
        };
        encoded.extend(of_rows.into_iter().map(Arc::new));
    }
    Ok(Known { request, encoded, conditioning: BTreeMap::new() })
}

fn answer<M: DiffusionModel>(
    model: &M,
    device: &Device,
    sessions: &mut BTreeMap<SessionId, Result<Known<M>>>,
    question: &Question,
) -> Result<Vec<Vec<f32>>> {
    let Question { expert, rows, max_rows, .. } = question;
    for row in rows {
        let known = sessions.get_mut(&row.session).expect("a session begins before it is asked for: this is a bug");
        let Known { request, encoded, conditioning } = known.as_mut().map_err(|error| error.restate())?;
        if !conditioning.contains_key(expert) {
            conditioning.insert(*expert, model.conditioning(*expert, encoded, request)?);
        }
    }
    let latents = rows.iter().map(|row| Ok(Tensor::from_slice(&row.latents, row.shape.as_slice(), device)?));
    let latents = latents.collect::<Result<Vec<_>>>()?;
    let mut of_pass: Vec<DenoiseRow<'_, M::Conditioning>> = Vec::with_capacity(rows.len());
    for (row, latents) in rows.iter().zip(&latents) {
        let Known { request, conditioning, .. } = sessions[&row.session].as_ref().map_err(Error::restate)?;
        let conditioning = &conditioning[expert][row.branch];
        of_pass.push(DenoiseRow { latents, timestep: row.timestep, conditioning, request });
    }
    let predictions = predict_in_passes(model, *expert, &of_pass, *max_rows, &mut [])?;
    predictions.iter().map(|prediction| Ok(prediction.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)).collect()
}
