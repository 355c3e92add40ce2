//! Which layers of a quantised model stay as they are, by their names.
//!
//! Owns: the patterns of transformers (`quantizers/quantizers_utils.py`, `should_convert_module`), of GPTQ and of
//! compressed-tensors (`utils/match.py`). Does not know: which layers there are.

use regex::Regex;

use crate::config::Fields;
use crate::error::Result;

/// The output projection, which transformers keeps unless something else is said.
const HEAD: &str = "lm_head";
/// What the names of layers in blocks begin with.
const BLOCKS: &str = "model.layers.";
/// The class of every layer that is asked about.
const LINEAR: &str = "Linear";
/// Most patterns of a list, and bytes of one; bounds what expressions take.
const MAX_PATTERNS: usize = 1 << 12;
const MAX_PATTERN_BYTES: usize = 1 << 10;
const MAX_EXPRESSION_BYTES: usize = 1 << 18;

/// Layers that are not quantised.
#[derive(Debug, Clone)]
pub(super) enum Kept {
    /// Those that a pattern of transformers names.
    Named(Vec<Pattern>),
    /// All but these: the layers of all blocks, or those of each block that end so; and the head, perhaps.
    AllBut { in_blocks: Option<Vec<String>>, head: bool },
    /// Those that a target of compressed-tensors names.
    Targets(Vec<Target>),
}

/// When transformers keeps the output projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Default {
    Always,
    WhereNoneIsNamed,
}

impl Kept {
    /// Of `modules_to_not_convert`, or `ignored_layers`, which means the same.
    pub(super) fn of_transformers(fields: &Fields, default: Default) -> Result<Self> {
        let mut field = "modules_to_not_convert";
        let mut named: Option<Vec<String>> = fields.nullable_or(field, None)?;
        if named.is_none() {
            field = "ignored_layers";
            named = fields.nullable_or(field, None)?;
        }
        let mut patterns = Vec::new();
        if named.is_none() || default == Default::Always {
            patterns.push(Pattern::of(fields, field, HEAD)?);
        }
        let named = named.unwrap_or_default();
        check_number(fields, field, named.len())?;
        for pattern in &named {
            patterns.push(Pattern::of(fields, field, pattern)?);
        }
        Ok(Self::Named(patterns))
    }

    /// Of `modules_in_block_to_quantize` and `lm_head`.
    pub(super) fn of_gptq(fields: &Fields) -> Result<Self> {
        const FIELD: &str = "modules_in_block_to_quantize";
        // A list for each step in which a block was quantised, or one list.
        let steps: Option<serde_json::Value> = fields.nullable_or(FIELD, None)?;
        let in_blocks = match steps {
            None => None,
            Some(steps) => {
                let flat: Option<Vec<String>> = steps.as_array().and_then(|steps| {
                    let all = steps.iter().flat_map(|step| match step.as_array() {
                        Some(names) => names.clone(),
                        None => vec![step.clone()],
                    });
                    all.map(|name| name.as_str().map(str::to_owned)).collect()
                });
                Some(flat.ok_or_else(|| fields.error(FIELD, "is no list of names"))?)
            }
        };
        Ok(Self::AllBut { in_blocks, head: fields.flag("lm_head", false)? })
    }

    /// Of `ignore`.
    pub(super) fn of_compressed_tensors(fields: &Fields) -> Result<Self> {
        let named: Vec<String> = fields.nullable_or("ignore", None)?.unwrap_or_default();
        check_number(fields, "ignore", named.len())?;
        let targets = named.iter().map(|name| Target::read(fields, "ignore", name)).collect::<Result<_>>()?;
        Ok(Self::Targets(targets))
    }

    /// Whether the layer of this name is one.
    pub(super) fn has(&self, layer: &str) -> bool {
        match self {
            Self::Named(patterns) => patterns.iter().any(|pattern| pattern.fits(layer)),
            Self::Targets(targets) => targets.iter().any(|target| target.is_of_linear(layer)),
            Self::AllBut { in_blocks, head } => {
                let Some((_, in_block)) = layer.strip_prefix(BLOCKS).and_then(|rest| rest.split_once('.')) else {
                    return layer != HEAD || !head;
                };
                in_blocks.as_ref().is_some_and(|names| names.iter().all(|name| name != in_block))
            }
        }
    }
}

/// A pattern of transformers: an expression for the beginning of a name up to a dot, or what a name ends with.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    text: String,
    beginning: Regex,
}

impl Pattern {
    fn of(fields: &Fields, field: &str, text: &str) -> Result<Self> {
        Ok(Self { text: text.to_owned(), beginning: expression(fields, field, text, "$")? })
    }

    fn fits(&self, layer: &str) -> bool {
        let ends = (0..=layer.len()).filter(|end| layer.is_char_boundary(*end));
        let mut parts = ends.filter(|end| {
            let (before, after) = layer.split_at(*end);
            before.ends_with('.') || after.is_empty() || after.starts_with('.')
        });
        layer.ends_with(&self.text) || parts.any(|end| self.beginning.is_match(&layer[..end]))
    }
}

/// A target of compressed-tensors: a name, a class, or an expression for the beginning of a name.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// A whole name, or a class.
    Name(String),
    /// After `re:`.
    Expression(Regex),
}

impl Target {
    pub(super) fn read(fields: &Fields, field: &str, text: &str) -> Result<Self> {
        match text.strip_prefix("re:") {
            Some(text) => Ok(Self::Expression(expression(fields, field, text, "")?)),
            None => Ok(Self::Name(text.to_owned())),
        }
    }

    /// Whether it names the linear layer of this name.
    pub(super) fn is_of_linear(&self, layer: &str) -> bool {
        match self {
            Self::Name(name) => name == layer || name == LINEAR,
            Self::Expression(expression) => expression.is_match(layer),
        }
    }
}

/// As Python's `re.match`, up to `end`.
fn expression(fields: &Fields, field: &str, text: &str, end: &str) -> Result<Regex> {
    if text.len() > MAX_PATTERN_BYTES {
        return Err(fields.error(field, format!("a pattern has more than {MAX_PATTERN_BYTES} bytes")));
    }
    let built = regex::RegexBuilder::new(&format!("^(?:{text}){end}")).size_limit(MAX_EXPRESSION_BYTES).build();
    built.map_err(|_| fields.error(field, format!("`{text}` is not an expression that is read")))
}

fn check_number(fields: &Fields, field: &str, number: usize) -> Result<()> {
    match number <= MAX_PATTERNS {
        true => Ok(()),
        false => Err(fields.error(field, format!("has {number} names; allowed: {MAX_PATTERNS}"))),
    }
}
