//! The passes through encoders that are under way between two steps.
//!
//! Owns: their state, and which result belongs to which input. Does not know: which sessions wait for them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::inputs::Pass;
use super::model::DiffusionModel;
use crate::error::Result;

/// Number of a pass that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PassId(u64);

#[cfg(test)]
impl PassId {
    /// The pass of this number.
    pub(super) fn numbered(number: u64) -> Self {
        Self(number)
    }
}

/// The passes that are under way between two steps.
pub(super) struct Passes<M: DiffusionModel> {
    next_id: u64,
    under_way: BTreeMap<PassId, UnderWay<M>>,
}

struct UnderWay<M: DiffusionModel> {
    pass: Pass,
    rows: Vec<M::Input>,
    encoding: M::Encoding,
}

/// What a pass has made of its inputs.
pub(super) struct Finished<M: DiffusionModel> {
    rows: Vec<(M::Input, Arc<M::Encoded>)>,
}

impl<M: DiffusionModel> Passes<M> {
    pub(super) fn new() -> Self {
        Self { next_id: 0, under_way: BTreeMap::new() }
    }

    /// Begins a pass over these different inputs. `model` has the components that compute it.
    pub(super) fn begin(&mut self, model: &M, pass: &Pass, rows: Vec<M::Input>) -> Result<PassId> {
        let encoding = model.begin_encode(pass, &rows.iter().collect::<Vec<_>>())?;
        let id = PassId(self.next_id);
        self.next_id += 1;
        self.under_way.insert(id, UnderWay { pass: pass.clone(), rows, encoding });
        Ok(id)
    }

    /// The pass of this number.
    pub(super) fn pass(&self, id: PassId) -> &Pass {
        &self.under_way.get(&id).expect(IS_UNDER_WAY).pass
    }

    /// The next step of a pass; what it has made once that was the last.
    pub(super) fn advance(&mut self, model: &M, id: PassId) -> Result<Option<Finished<M>>> {
        let under_way = self.under_way.get_mut(&id).expect(IS_UNDER_WAY);
        let Some(encoded) = model.encode_next(&mut under_way.encoding)? else { return Ok(None) };
        let UnderWay { rows, .. } = self.under_way.remove(&id).expect(IS_UNDER_WAY);
        assert_eq!(encoded.len(), rows.len(), "one result per input: this is a bug of the family");
        Ok(Some(Finished { rows: rows.into_iter().zip(encoded.into_iter().map(Arc::new)).collect() }))
    }

    /// Forgets the passes that nobody waits for.
    pub(super) fn retain(&mut self, is_awaited: impl Fn(PassId) -> bool) {
        self.under_way.retain(|id, _| is_awaited(*id));
    }
}

impl<M: DiffusionModel> Finished<M> {
    /// What became of an input of the pass.
    pub(super) fn of(&self, input: &M::Input) -> Arc<M::Encoded> {
        let found = self.rows.iter().find(|(row, _)| row == input);
        found.expect("a member's inputs are rows of its pass: this is a bug").1.clone()
    }
}

const IS_UNDER_WAY: &str = "a session that goes on with a pass keeps it alive: this is a bug";
