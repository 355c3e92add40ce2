//! What an answer may say: a JSON schema, a regular expression, a choice or a grammar that a request holds it to.
//!
//! Owns: what can be asked for and within which bounds, compiling it once for all requests that ask for the same, and the
//! tokens that may come next at each place of an answer. Does not know: HTTP, how a token is chosen (`sampler`), batches.
//!
//! `llguidance` does the work: an Earley parser over lexemes that are derivatives of regular expressions, run over the
//! vocabulary as a trie of bytes. It is handed sources of bounded size and depth, whose meaning it knows (`schema.rs`
//! refuses by its path what it would ignore), and bounded in states and work (`limits`). A mask is a function of the grammar
//! and the tokens before it alone, so that a request has the same tokens whatever runs beside it.

use std::sync::{Arc, Mutex, OnceLock};

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv};
use llguidance::{Matcher, ParserFactory, TokenParser};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::tools::Calls;
use crate::unpanicked::unpanicked;

mod blame;
mod cache;
mod matching;
mod problem;
mod schema;
mod source;
mod vocabulary;

use cache::Cache;
pub use matching::Matching;

/// Longest regular expression.
pub const MAX_REGEX_BYTES: usize = 8 << 10;
/// Longest Lark grammar.
pub const MAX_LARK_BYTES: usize = 64 << 10;
/// Longest schema, written as JSON without spaces.
pub const MAX_SCHEMA_BYTES: usize = 256 << 10;
/// Most choices, and most bytes of all together.
pub const MAX_CHOICES: usize = 1024;
/// See [`MAX_CHOICES`].
pub const MAX_CHOICE_BYTES: usize = 64 << 10;

/// What an answer is held to, as a request says it.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// Path of the field that says it, for errors.
    pub field: String,
    /// What it says.
    pub form: Form,
}

/// In which language it is said.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// A JSON value that a JSON Schema (draft 2020-12) is true of.
    Schema(Value),
    /// A text that the whole of a regular expression matches (the syntax of Rust's `regex`; `\d` and `\w` are ASCII's).
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of a context-free grammar in llguidance's variant of Lark, from its rule `start`.
    Lark(String),
    /// Calls of tools, or what else the answer may be.
    Calls(Calls),
}

impl Asked {
    /// Any JSON object.
    pub fn json_object(field: impl Into<String>) -> Self {
        let schema = serde_json::json!({"type": "object"});
        Self { field: field.into(), form: Form::Schema(schema) }
    }
}

/// The grammars of one model. Cheap to make: what they need of the vocabulary is found when the first request asks.
#[derive(Debug)]
pub struct Grammars {
    tokenizer: Tokenizer,
    vocab_size: usize,
    eos_token_ids: Vec<u32>,
    factory: OnceLock<std::result::Result<Factory, String>>,
    cache: Mutex<Cache>,
}

/// What all grammars of a model share: its vocabulary, and how its tokens fall into common kinds of text.
struct Factory(ParserFactory);

impl std::fmt::Debug for Factory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Factory")
    }
}

/// A compiled grammar. Cheap to clone; shared by the requests that ask for the same.
#[derive(Debug, Clone)]
pub struct Grammar(Arc<Compiled>);

/// A parser before its first token.
struct Compiled {
    form: Form,
    field: String,
    parser: Mutex<TokenParser>,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Compiled({})", self.field)
    }
}

impl Grammars {
    /// For the answers of a model with logits for `vocab_size` tokens that end with any of `eos_token_ids`.
    pub fn new(tokenizer: Tokenizer, vocab_size: usize, eos_token_ids: &[u32]) -> Self {
        Self {
            tokenizer,
            vocab_size,
            eos_token_ids: eos_token_ids.to_vec(),
            factory: OnceLock::new(),
            cache: Mutex::default(),
        }
    }

    /// What is asked for, compiled or found compiled. Takes milliseconds, and at the first call of a model as long as a look
    /// at its whole vocabulary: not for threads that wait for sockets, nor for those of a device. Needs the stack of
    /// [`STACK_BYTES`](crate::chat_template::threads::STACK_BYTES).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidRequest`] with the path of what is not supported, is no such source, takes more states or work than
    /// there may be, or that no answer can satisfy.
    pub fn compile(&self, asked: Asked) -> Result<Grammar> {
        if let Some(found) = self.lock().find(&asked.form) {
            return Ok(found);
        }
        let factory = self.factory(&asked.field)?;
        let has_token = |spelling: &str| self.tokenizer.token_id(spelling).is_some();
        let checked = source::checked(&asked, has_token)?;
        let parser = match parser(factory, checked) {
            Ok(parser) => parser,
            Err(said) => return Err(blame::error(factory, &asked, &said)),
        };
        let Asked { field, form } = asked;
        let grammar = Grammar(Arc::new(Compiled { form, field, parser: Mutex::new(parser) }));
        self.lock().keep(grammar.clone());
        Ok(grammar)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().expect("no code panics while it holds the grammars: this is a bug")
    }

    fn factory(&self, field: &str) -> Result<&ParserFactory> {
        let made = self.factory.get_or_init(|| {
            let trie = vocabulary::trie(&self.tokenizer, self.vocab_size, &self.eos_token_ids)?;
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let made = unpanicked(|| ParserFactory::new_simple(&environment).map_err(|error| error.to_string()));
            let mut factory = made.unwrap_or_else(Err)?;
            factory.quiet();
            *factory.limits_mut() = limits();
            Ok(Factory(factory))
        });
        match made {
            Ok(factory) => Ok(&factory.0),
            Err(problem) => Err(Error::invalid(field, format!("cannot be asked of this model: {problem}"))),
        }
    }
}

/// Bounds of what one grammar may take. A mask has 5 ms of work at most, and the states of one lexer, which take 1 to 2 KB
/// each, some tens of megabytes.
fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 100_000,
        step_max_items: 50_000,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        verbose_errors: false,
    }
}

/// A parser that can take a first token, or why there is none, in the library's words.
fn parser(factory: &ParserFactory, grammar: TopLevelGrammar) -> std::result::Result<TokenParser, String> {
    let made = unpanicked(|| {
        let mut parser = factory.create_parser(grammar).map_err(|error| format!("{error:#}"))?;
        parser.start_without_prompt();
        // What no answer satisfies is found here and not by the session; the clone's lexer is the parser's own, so that the
        // work is not done twice.
        parser.clone().compute_mask().map_err(|error| format!("no token: {error:#}"))?;
        Ok(parser)
    });
    made.unwrap_or_else(Err)
}

impl Grammar {
    /// The state of an answer that has not begun.
    pub fn begin(&self) -> Matching {
        let parser = self.0.parser.lock().expect("no code panics while it holds a parser: this is a bug").clone();
        Matching::new(Matcher::new(Ok(parser)), self.0.field.clone())
    }

    /// Bytes of the automata that its answers have needed so far.
    fn num_bytes(&self) -> usize {
        let parser = self.0.parser.lock().expect("no code panics while it holds a parser: this is a bug");
        parser.parser.lexer_stats().num_bytes
    }

    fn form(&self) -> &Form {
        &self.0.form
    }
}

#[cfg(test)]
mod tests;
