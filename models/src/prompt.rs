//! The language of prompts: `(text:1.2)` weighs its text, everything else is text.
//!
//! A group is an opening parenthesis, text, a colon, a decimal number and the closing parenthesis, without white space
//! around the number. Groups nest, and their weights multiply. A parenthesis that is part of no such group is text, and
//! `\(` and `\)` are parentheses that never are. So a prompt without groups and escapes is itself, letter for letter.
//! What the weights do is the affair of the encoders.

use crate::error::{Error, Result};

/// Largest weight, written or multiplied.
pub const MAX_WEIGHT: f32 = 2.0;

/// A prompt that has been read.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Text between changes of the weight, in order; at least one piece.
    pub pieces: Vec<Piece>,
}

/// Text of one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Without the marks of groups and escapes.
    pub text: String,
    /// 1 is neutral.
    pub weight: f32,
}

impl Prompt {
    /// `field` is named, with the position, where a weight is out of range.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        let mut reader = Reader::new();
        let mut chars = text.chars().enumerate().peekable();
        while let Some((at, c)) = chars.next() {
            match c {
                '\\' => match chars.next_if(|(_, next)| matches!(next, '(' | ')')) {
                    Some((_, parenthesis)) => reader.push_escaped(parenthesis),
                    None => reader.push('\\'),
                },
                '(' => reader.open(at + 1),
                ')' => reader.close(),
                c => reader.push(c),
            }
        }
        reader.finish(field)
    }

    fn into_plain(self, field: &str) -> Result<String> {
        match <[Piece; 1]>::try_from(self.pieces) {
            Ok([Piece { text, weight: 1.0 }]) => Ok(text),
            _ => {
                let problem = "weighs words, as in (text:1.2), which this model's text encoders do not know; write \\( and \
                               \\) for parentheses that are text";
                Err(Error::invalid(field, problem))
            }
        }
    }
}

/// The text of a prompt for encoders that know no weights.
pub fn plain_text(field: &str, text: &str) -> Result<String> {
    Prompt::parse(field, text)?.into_plain(field)
}

/// Text between two parentheses; the first of those that a group is made of remembers it.
#[derive(Debug, Default)]
struct Part {
    text: String,
    /// The text up to here cannot be part of a weight: its last character was escaped or closed a group.
    sealed: usize,
    group: Option<Group>,
}

#[derive(Debug)]
struct Group {
    weight: f32,
    /// Parts that belong to it end before this one.
    end: usize,
    /// Of the opening parenthesis, in characters from 1.
    at: usize,
}

struct Reader {
    parts: Vec<Part>,
    /// Part and position of each opening parenthesis that has not been closed.
    open: Vec<(usize, usize)>,
}

impl Reader {
    fn new() -> Self {
        Self { parts: vec![Part::default()], open: Vec::new() }
    }

    fn last(&mut self) -> &mut Part {
        self.parts.last_mut().expect("there is one from the start: this is a bug")
    }

    fn push(&mut self, c: char) {
        self.last().text.push(c);
    }

    fn push_escaped(&mut self, c: char) {
        let last = self.last();
        last.text.push(c);
        last.sealed = last.text.len();
    }

    /// Text until it is closed behind a weight.
    fn open(&mut self, at: usize) {
        self.open.push((self.parts.len(), at));
        self.parts.push(Part { text: "(".into(), sealed: 1, group: None });
    }

    fn close(&mut self) {
        let Some((start, at)) = self.open.pop() else { return self.push_escaped(')') };
        let last = self.last();
        let weight = weight_at_end(&last.text[last.sealed..]);
        let Some((weight, digits)) = weight.filter(|(_, chars)| self.has_text(start, *chars)) else {
            return self.push_escaped(')');
        };
        let last = self.last();
        last.text.truncate(last.text.len() - digits);
        self.parts[start].text.remove(0);
        self.parts[start].group = Some(Group { weight, end: self.parts.len(), at });
        self.parts.push(Part::default());
    }

    /// Whether a group from this part on would hold more than its parenthesis and so many bytes of a weight.
    fn has_text(&self, start: usize, weight_bytes: usize) -> bool {
        let bytes = |part: &Part| part.text.len();
        // A group inside has been found to hold text.
        self.parts.len() > start + 1 || bytes(&self.parts[start]) > "(".len() + weight_bytes
    }

    /// Joins what has one weight.
    fn finish(self, field: &str) -> Result<Prompt> {
        let mut pieces: Vec<Piece> = Vec::new();
        // Groups around the current part: where they end, and the product of their weights.
        let mut around: Vec<(usize, f32)> = Vec::new();
        for (index, part) in self.parts.into_iter().enumerate() {
            while around.pop_if(|(end, _)| *end == index).is_some() {}
            let mut weight = around.last().map_or(1.0, |(_, weight)| *weight);
            if let Some(group) = part.group {
                weight *= group.weight;
                if !(0.0..=MAX_WEIGHT).contains(&weight) {
                    let problem = format!(
                        "weighs the text behind character {} with {weight}; allowed: 0 to {MAX_WEIGHT}, also where \
                         groups multiply; write \\( and \\) for parentheses that are text",
                        group.at
                    );
                    return Err(Error::invalid(field, problem));
                }
                around.push((group.end, weight));
            }
            match pieces.last_mut() {
                _ if part.text.is_empty() => (),
                Some(last) if last.weight == weight => last.text.push_str(&part.text),
                _ => pieces.push(Piece { text: part.text, weight }),
            }
        }
        if pieces.is_empty() {
            pieces.push(Piece { text: String::new(), weight: 1.0 });
        }
        Ok(Prompt { pieces })
    }
}

/// The number behind the last colon, and the bytes of both.
fn weight_at_end(text: &str) -> Option<(f32, usize)> {
    let head = text.trim_end_matches(|c: char| c.is_ascii_digit() || matches!(c, '.' | '+' | '-'));
    let number = &text[head.len()..];
    let weight = number.parse().ok()?;
    head.ends_with(':').then_some((weight, number.len() + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &[(&str, f32)]) {
        let pieces = Prompt::parse("prompt", text).expect("fine").pieces;
        let found: Vec<_> = pieces.iter().map(|piece| (piece.text.as_str(), piece.weight)).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn a_group_weighs_its_text() {
        check("a (red:1.5) cat", &[("a ", 1.0), ("red", 1.5), (" cat", 1.0)]);
        check("(a:.5)(b:2)(c:0)", &[("a", 0.5), ("b", 2.0), ("c", 0.0)]);
        check("(a:1.25)(b:+1.25)", &[("ab", 1.25)]);
        check("((a:1.5) b:0.5)", &[("a", 0.75), (" b", 0.5)]);
        check("(x (y (z:0.5):0.5):0.5) w", &[("x ", 0.5), ("y ", 0.25), ("z", 0.125), (" w", 1.0)]);
        check("((a:0.5):2)", &[("a", 1.0)]);
        check("(時計:1.5)", &[("時計", 1.5)]);
        check("(a: b:1.5)", &[("a: b", 1.5)]);
    }

    #[test]
    fn everything_else_is_text() {
        for text in [
            "",
            " ",
            "plain",
            "(plain)",
            "a (b) (c",
            ")(",
            "(a:)",
            "(a:b)",
            "(a: 1.2)",
            "(a:1.2 )",
            "(a:1.2.3)",
            "(a:1e1)",
            "(a:inf)",
            "(a:NaN)",
            "(:1.2)",
            "()",
            "(a:1.2",
            "a:1.2)",
            "[a:1.2]",
            "C:\\a",
            "\\",
            ":)",
            "(1.2)",
            "(a:-)",
        ] {
            check(text, &[(text, 1.0)]);
        }
        check("(a (plain) (b:1.5):0.5)", &[("a (plain) ", 0.5), ("b", 0.75)]);
        check("(a (b:1.5", &[("(a (b:1.5", 1.0)]);
        check("(a (b:1.5)", &[("(a ", 1.0), ("b", 1.5)]);
    }

    #[test]
    fn an_escaped_parenthesis_is_never_a_group() {
        check("\\(a:1.2\\)", &[("(a:1.2)", 1.0)]);
        check("\\(a:1.2)", &[("(a:1.2)", 1.0)]);
        check("(a\\):1.5)", &[("a)", 1.5)]);
        check("(a:1.2\\))", &[("(a:1.2))", 1.0)]);
        check("(\\(:1.5)", &[("(", 1.5)]);
        check("\\\\(", &[("\\(", 1.0)]);
    }

    #[test]
    fn a_weight_out_of_range_is_refused_with_its_place() {
        for (text, place) in
            [("é (16:9)", "3"), ("(a:-1)", "1"), ("(a (b:1.5):1.5)", "4"), ("(a:99999999999999999999)", "1")]
        {
            let error = Prompt::parse("negative_prompt", text).expect_err(text).to_string();
            assert!(error.contains("negative_prompt") && error.contains(&format!("character {place} ")), "{error}");
            assert!(error.contains("0 to 2"), "{error}");
        }
        let huge = format!("(a:{})", "9".repeat(400));
        assert!(Prompt::parse("prompt", &huge).is_err(), "no infinite weight");
    }

    #[test]
    fn a_plain_prompt_has_no_weights() {
        let plain = |text| plain_text("prompt", text);
        assert_eq!(plain("a (b) \\(c:1\\)").expect("plain"), "a (b) (c:1)");
        assert_eq!(plain("").expect("plain"), "");
        assert!(plain("a (b:1.1)").expect_err("weighed").to_string().contains("prompt"));
        assert!(plain("(b:1.1)").is_err());
    }

    #[test]
    fn millions_of_parentheses_take_no_time() {
        let deep = "(".repeat(1_000_000) + &")".repeat(1_000_000);
        check(&deep, &[(&deep, 1.0)]);
        let weighed = "(".repeat(300_000) + "a" + &":1)".repeat(300_000);
        check(&weighed, &[("a", 1.0)]);
    }
}
