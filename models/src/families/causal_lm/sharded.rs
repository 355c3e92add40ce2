//! A language model that several devices share.
//!
//! Owns: what ranks are told of a step, and how each of them comes to its part of the network and of the KV cache. Does not know: how
//! ranks reach each other (`parallel`), what a part is (`layers/decoder/split.rs`), sessions.
//!
//! The leading rank's caches have the blocks that the runner gives out; the others' have blocks of the same numbers with other heads.

use candle_core::Tensor;

use super::DecoderLm;
use crate::checkpoint::{CONFIG, LoadFormat, Manifest};
use crate::device::{DeviceSpec, Placement};
use crate::error::{Error, Result};
use crate::kv::{KvCaches, KvFormat, KvShape};
use crate::layers::decoder::{ConfigClass, DecoderConfig, DecoderInput, PreparedInput};
use crate::parallel::{Follow, Followers, Rank, Seat};
use crate::runner::text::model::CausalLm;
use crate::source::ModelSource;

/// What all ranks do.
#[derive(Debug, Clone)]
pub(super) enum Command {
    /// [`CausalLm::states`] of these rows.
    States(DecoderInput),
    /// [`CausalLm::head`] of so many states.
    Head(usize),
}

/// What the ranks that follow load, and how.
#[derive(Debug, Clone)]
pub(super) struct Parts {
    pub(super) source: ModelSource,
    pub(super) format: LoadFormat,
    pub(super) class: ConfigClass,
    pub(super) kv_format: KvFormat,
    pub(super) num_blocks: usize,
    /// In which dtypes.
    pub(super) dtypes: Placement,
}

/// The leading rank's part of a network, and the ranks that have the others.
#[derive(Debug)]
pub(super) struct Sharded {
    own: DecoderLm,
    followers: Followers<Command>,
}

impl Sharded {
    /// Starts the ranks that follow, each of which loads its part on its own thread, while `load_own` loads that of the leading one.
    pub(super) fn load(
        devices: &[DeviceSpec],
        parts: Parts,
        load_own: impl FnOnce(&Rank) -> Result<DecoderLm>,
    ) -> Result<Self> {
        let (seat, followers) = Followers::start(devices, move |seat| parts.follow(seat))?;
        let own = load_own(&seat.rank())?;
        followers.ready()?;
        Ok(Self { own, followers })
    }
}

impl Parts {
    /// On the thread of the rank's device.
    fn follow(&self, seat: Seat) -> Result<Follow<Command>> {
        let placement = self.dtypes.opened_on(seat.spec())?;
        let manifest = Manifest::read(&self.source)?.in_format(self.format);
        let config = DecoderConfig::read(&manifest.whole().fields(CONFIG)?, &self.class)?;
        let weights = manifest.whole().weights(&placement)?;
        let network = DecoderLm::load_part(&weights, config, Some(&seat.rank()))?;
        let caches = KvCaches::new(network.kv_shape(), self.kv_format, self.num_blocks, &placement)?;
        tracing::info!(device = %seat.spec(), bytes = weights.resident_bytes() + caches.bytes(), "a part is loaded");
        Ok(Box::new(move |command| match command {
            Command::States(input) => network.states(&network.prepare(&input, &caches)?, &caches).map(drop),
            Command::Head(rows) => network.follow_head(rows),
        }))
    }
}

impl CausalLm for Sharded {
    fn vocab_size(&self) -> usize {
        self.own.vocab_size()
    }

    fn context_len(&self) -> usize {
        self.own.context_len()
    }

    fn kv_shape(&self) -> KvShape {
        self.own.kv_shape()
    }

    fn is_recordable(&self) -> bool {
        false
    }

    fn problem(&self) -> Option<Error> {
        self.followers.problem()
    }

    fn prepare<'a>(&self, input: &'a DecoderInput, caches: &KvCaches) -> Result<PreparedInput<'a>> {
        self.own.prepare(input, caches)
    }

    fn states(&self, input: &PreparedInput<'_>, caches: &KvCaches) -> Result<Option<Tensor>> {
        let command = Command::States(input.input().clone());
        self.followers.together(&command, || self.own.states(input, caches))
    }

    fn head(&self, states: &Tensor) -> Result<Tensor> {
        let command = Command::Head(states.dim(0)?);
        self.followers.together(&command, || self.own.head(states))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::WeightDtype;
    use crate::families::qwen2;
    use crate::request::{Events, Request, SessionId, TextRequest};
    use crate::runner::Runner;
    use crate::runner::text::batcher::Limits;
    use crate::runner::text::model::LanguageModel;
    use crate::runner::text::{RunnerOptions, TextRunner};

    /// A rank that panics in the third command ends the step with its cause, and no step comes after it.
    #[test]
    fn a_rank_that_panics_ends_the_step_and_all_after_it() {
        let devices = [0, 1].map(|part| DeviceSpec::CpuPart { part, of: 2 });
        let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).expect("a CPU");
        let checkpoint = crate::testing::repository().join("tests/goldens/qwen2-yarn/checkpoint");
        let manifest = Manifest::read(&checkpoint).expect("a checkpoint");
        let config = qwen2::decoder_config(&manifest).expect("a configuration");
        let weights = manifest.whole().weights(&placement).expect("weights");
        let of_others = (manifest.clone(), config.clone(), placement.clone());
        let make = move |seat: Seat| {
            let (manifest, config, placement) = of_others.clone();
            let network = DecoderLm::load_part(&manifest.whole().weights(&placement)?, config, Some(&seat.rank()))?;
            let format = KvFormat::computed(&placement);
            let caches = KvCaches::new(network.kv_shape(), format, 8, &placement)?;
            let mut commands = 0;
            Ok(Box::new(move |command| {
                commands += 1;
                assert!(commands < 3, "a rank panics in a test");
                match command {
                    Command::States(input) => network.states(&network.prepare(&input, &caches)?, &caches).map(drop),
                    Command::Head(rows) => network.follow_head(rows),
                }
            }) as Follow<Command>)
        };
        let (seat, followers) = Followers::start(&devices, make).expect("started");
        let own = DecoderLm::load_part(&weights, config, Some(&seat.rank())).expect("a part");
        followers.ready().expect("ready");
        let network = Sharded { own, followers };
        let caches = KvCaches::new(network.kv_shape(), KvFormat::computed(&placement), 8, &placement).expect("caches");
        let tokenizer = manifest.whole().tokenizer().expect("a tokenizer");
        let model = LanguageModel { network, tokenizer, eos_token_ids: Vec::new() };
        let limits = Limits { max_batch_tokens: 64, max_batch_sequences: 4 };
        let mut runner = TextRunner::new(model, caches, limits, RunnerOptions::default());
        let (first, second) = (SessionId(1), SessionId(2));
        let request = || Request::Text(TextRequest { ignore_eos: true, ..TextRequest::greedy(vec![1, 2, 3], 8) });
        runner.submit(first, request()).expect("accepted");
        let mut events = Events::default();
        runner.step(&mut events).expect("two commands");
        assert!(runner.problem().is_none());
        runner.submit(second, request()).expect("accepted");
        for expected in [vec![first, second], vec![]] {
            let error = match runner.step(&mut events) {
                Err(error) => error.to_string(),
                Ok(_) => String::new(),
            };
            assert_eq!(
                error.contains("cpu:1/2: ") && error.contains("a rank panics in a test"),
                !expected.is_empty(),
                "{error}"
            );
            assert_eq!(runner.evict_step(), expected);
        }
        assert!(runner.problem().is_some_and(|problem| problem.to_string().contains("a rank panics in a test")));
        assert_eq!(runner.status().kv_blocks_used, 0);
        runner.submit(SessionId(3), request()).expect("accepted");
        assert!(runner.step(&mut events).is_err(), "the group has ended");
    }
}
