//! Steps that tell how likely the tokens of prompts were.
//!
//! A prompt's rows all want logits, which are many: a step keeps their last hidden states and makes logits of a few at a time.
//! Does not know: what is told of a token ([`logprobs`]), how an answer goes on.

use std::ops::Range;

use candle_core::Tensor;

use super::batcher::Plan;
use super::logprobs::{self, MAX_PROMPT_ROWS};
use super::model::CausalLm;
use super::session::End;
use super::{Computed, TextRunner};
use crate::error::Result;
use crate::layers::decoder::DecoderInput;
use crate::request::{Event, Events, SessionId};

/// Last hidden states of tokens of prompts, of which it is asked how likely the next ones are.
#[derive(Debug)]
pub(super) struct PromptStates {
    /// `[rows, n]`.
    states: Tensor,
    /// Positions in their sequences, in the order of the rows.
    of: Vec<(SessionId, Range<usize>)>,
}

impl<M: CausalLm> TextRunner<M> {
    /// The same of a step that keeps the states of `prompt_rows`.
    pub(super) fn forward_with_prompts(
        &self,
        mut input: DecoderInput,
        prompt_rows: Vec<Range<usize>>,
        of: Vec<(SessionId, Range<usize>)>,
    ) -> Result<Computed> {
        let network = &self.model.network;
        let num_sampling = input.num_wanted();
        prompt_rows.into_iter().for_each(|rows| input.want_logits_of(rows));
        let states = network.states(&network.prepare(&input, &self.caches)?, &self.caches)?;
        let states = states.expect("rows of prompts were asked for: this is a bug");
        let logits = match num_sampling {
            0 => None,
            rows => Some(network.head(&states.narrow(0, 0, rows)?)?),
        };
        let states = states.narrow(0, num_sampling, input.num_wanted() - num_sampling)?;
        Ok(Computed { logits, prompts: Some(PromptStates { states, of }) })
    }

    /// Makes logits of the states of prompts and tells of the prompts that are whole.
    pub(super) fn tell_prompts(
        &mut self,
        plan: &Plan,
        prompts: Option<PromptStates>,
        events: &mut Events,
    ) -> Result<()> {
        let phase = plan.phase().as_str();
        if let Some(PromptStates { states, of }) = prompts {
            let mut row = 0;
            for (id, positions) in of {
                let num_rows = positions.len();
                self.tell_prompt(id, positions, &states.narrow(0, row, num_rows)?, phase, events)?;
                row += num_rows;
            }
        }
        for chunk in &plan.chunks {
            let Some(session) = self.sessions.get_mut(&chunk.session) else { continue };
            if let Some(told) = session.take_prompt_logprobs() {
                events.emit(chunk.session, Event::Prompt(told));
            }
            let is_read = chunk.start + chunk.num_tokens == session.num_prompt_tokens;
            if session.ends_with_prompt() && is_read {
                self.finish(chunk.session, End::Length, events);
            }
        }
        Ok(())
    }

    /// Notes the tokens behind these positions of a prompt, whose states `[rows, n]` are; ends a session whose logits are not
    /// finite.
    fn tell_prompt(
        &mut self,
        id: SessionId,
        mut positions: Range<usize>,
        states: &Tensor,
        phase: &'static str,
        events: &mut Events,
    ) -> Result<()> {
        let begin = positions.start;
        while !positions.is_empty() {
            let rows = positions.len().min(MAX_PROMPT_ROWS);
            let some = positions.start..positions.start + rows;
            let logits = self.model.network.head(&states.narrow(0, some.start - begin, rows)?)?;
            let logits = logprobs::on_host(&logits)?;
            let session = self.sessions.get_mut(&id).expect("only live sessions are planned: this is a bug");
            if let Err(error) = session.note_prompt(some.clone(), &logits, phase) {
                self.discard(id);
                events.emit(id, Event::Failed(error));
                return Ok(());
            }
            positions.start = some.end;
        }
        Ok(())
    }
}
