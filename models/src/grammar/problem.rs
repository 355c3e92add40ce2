//! What is said of a grammar that cannot be had.
//!
//! Owns: our words for what the library says. Its own repeat what a client wrote, which belongs into no log and no answer.

/// Of a grammar that takes more than it may.
pub(super) const TOO_MUCH: &str = "takes more states or work than a grammar may have";
/// Of a place where the grammar leaves nothing to say.
pub(super) const NO_TOKEN: &str = "leaves no token that could come next";

/// Beginnings and parts of the library's messages, and ours for them; the first that fits.
const WORDS: &[(&str, &str)] = &[
    ("nsatisfiable schema", "is satisfied by no value"),
    ("anyOf is empty", "is satisfied by no value"),
    ("no token", "is satisfied by no answer of this model's tokens"),
    ("oneOf constraints are not supported", "oneOf is supported where no two cases can hold at once; else use anyOf"),
    ("circular references with sibling keys", "a $ref that leads to itself cannot stand beside other keywords"),
    ("are not disjoint", "patternProperties that share names are not supported"),
    ("determine if patternProperty", "patternProperties that share names are not supported"),
    ("minLength", "the bounds of the length leave no string"),
    ("fuel", TOO_MUCH),
    ("too large", TOO_MUCH),
    ("too big", TOO_MUCH),
    ("too complex", TOO_MUCH),
    ("too many", TOO_MUCH),
    ("limit", TOO_MUCH),
    ("stack level", TOO_MUCH),
    ("parsing regex", "is no regular expression that is supported"),
    ("regex parse error", "is no regular expression that is supported"),
    ("look-around", "is no regular expression that is supported: there is no look-around"),
];

/// Our words for the library's, with the place where it is of a text that the client wrote as it is.
pub(super) fn in_own_words(said: &str, has_place: bool) -> String {
    let place = said.lines().next().and_then(line_and_column).filter(|_| has_place);
    let found = WORDS.iter().find(|(part, _)| said.contains(part)).map(|(_, words)| (*words).to_owned());
    let words = found.unwrap_or_else(|| "cannot be compiled".to_owned());
    match place {
        Some((line, column)) => format!("{words} (line {line}, column {column})"),
        None => words,
    }
}

/// Of a message that begins with `3(14): `, as those about Lark do.
fn line_and_column(message: &str) -> Option<(usize, usize)> {
    let message = message.strip_prefix("at ").unwrap_or(message);
    let (line, rest) = message.split_once('(')?;
    let (column, _) = rest.split_once(')')?;
    Some((line.parse().ok()?, column.parse().ok()?))
}
