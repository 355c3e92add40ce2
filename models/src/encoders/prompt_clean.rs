//! Cleans a prompt as the Wan pipeline of diffusers does before it is tokenised (`prompt_clean` in
//! `pipelines/wan/pipeline_wan.py`): `ftfy.fix_text`, `html.unescape` twice, whitespace collapsed.
//!
//! Owns: text in, text out. Does not know: tokenizers.
//!
//! Of ftfy 6.3 this does, in its order and per line until nothing changes: HTML entities (not from the first line with
//! a `<` on), C1 controls as Windows-1252, Latin ligatures, half- and full-width forms, straight quotes, terminal
//! escapes, control characters, NFC. Not done: repairing mojibake (text that was decoded in a wrong encoding before it
//! got here, such as `Ã©` for `é`), which is a heuristic over hundreds of letter pairs. Not needed: surrogates, which
//! Rust strings cannot hold, and line breaks, which are whitespace and collapse anyway.

use std::collections::HashMap;
use std::sync::LazyLock;

use unicode_normalization::UnicodeNormalization;

/// Named character references without the `&`: `amp;`, and those that HTML also knows without a semicolon: `amp`.
static ENTITIES: LazyLock<HashMap<&str, &str>> =
    LazyLock::new(|| entities::ENTITIES.iter().map(|entity| (&entity.entity[1..], entity.characters)).collect());

/// Longest name that `html.unescape` tries to match, in characters.
const MAX_ENTITY_CHARS: usize = 32;
/// Longest name that ftfy tries to match.
const MAX_FTFY_ENTITY_CHARS: usize = 24;

/// How often a line is fixed until nothing changes. ftfy has no such bound; a line with references inside of references
/// inside of references, that many deep, stays as it is then. Each turn reads the line once, and a prompt of the longest
/// length could ask for thousands, on the device's thread.
const MAX_TURNS: usize = 64;

/// The text that the tokenizer gets to see.
pub fn prompt_clean(prompt: &str) -> String {
    let text = html_unescape(&html_unescape(&fix_text(prompt)));
    text.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Python's `str.isspace`: Unicode white space and four ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn fix_text(text: &str) -> String {
    let mut unescape = true;
    let mut fixed = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        // Text with tags may be HTML, where `&lt;` must stay what it is.
        unescape &= !line.contains('<');
        fixed.push_str(&fix_line(line, unescape));
    }
    fixed
}

fn fix_line(line: &str, unescape: bool) -> String {
    let mut text = line.to_owned();
    for _ in 0..MAX_TURNS {
        let unescaped = if unescape { unescape_unambiguous(&text) } else { text.clone() };
        let mut characters = String::with_capacity(unescaped.len());
        for c in unescaped.chars() {
            fix_character(c, &mut characters);
        }
        let fixed: String = remove_terminal_escapes(&characters).chars().filter(|c| !is_control(*c)).nfc().collect();
        if fixed == text {
            break;
        }
        text = fixed;
    }
    text
}

/// Appends what `c` stands for: Windows-1252 for C1 controls, letters for ligatures, standard width, straight quotes.
fn fix_character(c: char, out: &mut String) {
    match windows_1252(c) {
        // Not the same as its compatibility form, which is "st".
        'ﬅ' => out.push_str("ſt"),
        c @ ('Ĳ' | 'ĳ' | 'ŉ' | 'Ǆ'..='ǌ' | 'Ǳ'..='ǳ' | 'ﬀ'..='ﬆ' | '\u{3000}' | '\u{ff01}'..='\u{ffef}') => {
            out.extend(std::iter::once(c).nfkc().map(straight_quote));
        }
        c => out.push(straight_quote(c)),
    }
}

fn straight_quote(c: char) -> char {
    match c {
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => '\'',
        '\u{201c}'..='\u{201f}' => '"',
        _ => c,
    }
}

/// C1 controls as what Windows-1252 has in their place; the five that it leaves free stay.
fn windows_1252(c: char) -> char {
    const C1: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘',
        '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
    ];
    match c as u32 {
        code @ 0x80..=0x9f => C1[code as usize - 0x80],
        _ => c,
    }
}

/// Control characters, byte order marks and the like; those that make white space stay.
fn is_control(c: char) -> bool {
    matches!(c,
        '\0'..='\x08' | '\x0b' | '\x0e'..='\x1f' | '\x7f' | '\u{206a}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffc}')
}

/// Drops `ESC [ digits-and-semicolons letter`.
fn remove_terminal_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("\x1b[") {
        let parameters = rest[start + 2..].trim_start_matches(|c: char| is_decimal(c) || c == ';');
        if parameters.starts_with(|c: char| c.is_ascii_alphabetic()) {
            out.push_str(&rest[..start]);
            rest = &parameters[1..];
        } else {
            out.push_str(&rest[..start + 2]);
            rest = &rest[start + 2..];
        }
    }
    out + rest
}

fn is_decimal(c: char) -> bool {
    c.is_ascii_digit()
}

/// ftfy's `unescape_html`: only references that end in a semicolon, and upper-case spellings of lower-case names.
fn unescape_unambiguous(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let name = ftfy_reference(rest);
        match name.and_then(unambiguous_reference) {
            Some((replacement, length)) => {
                out.push_str(&replacement);
                rest = &rest[length..];
            }
            None => {
                out.push('&');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

/// `&name;` or `&#digits;` at the start of `text`.
fn ftfy_reference(text: &str) -> Option<&str> {
    let name = text[1..].strip_prefix('#').unwrap_or(&text[1..]);
    let length = name.bytes().take_while(u8::is_ascii_alphanumeric).count();
    let fits = (1..=MAX_FTFY_ENTITY_CHARS).contains(&length) && name[length..].starts_with(';');
    fits.then(|| &text[..text.len() - name.len() + length + 1])
}

fn unambiguous_reference(reference: &str) -> Option<(String, usize)> {
    let name = &reference[1..];
    if let Some(characters) = ENTITIES.get(name) {
        return Some((characters.to_string(), reference.len()));
    }
    let unescaped = html_unescape(reference);
    if name.starts_with('#') {
        return (!unescaped.contains(';')).then_some((unescaped, reference.len()));
    }
    let is_upper = !name.bytes().any(|b| b.is_ascii_lowercase());
    let lower = ENTITIES.get(name.to_ascii_lowercase().as_str())?;
    (is_upper && unescaped == reference).then(|| (lower.to_uppercase(), reference.len()))
}

/// Python's `html.unescape`: the HTML 5 rules for text, except that references to invalid code points vanish.
pub(crate) fn html_unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        out.push_str(&rest[..start]);
        let reference = &rest[start + 1..];
        let length = match reference.strip_prefix('#') {
            Some(number) => numeric_reference(number, &mut out).map(|length| length + 1),
            None => named_reference(reference, &mut out),
        };
        if length.is_none() {
            out.push('&');
        }
        rest = &reference[length.unwrap_or(0)..];
    }
    out + rest
}

/// Appends the character of `digits;` or `xdigits;` (the semicolon may be absent) and says how many bytes that took.
fn numeric_reference(text: &str, out: &mut String) -> Option<usize> {
    let (digits, radix) = match text.strip_prefix(['x', 'X']) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let length = digits.find(|c: char| !c.is_digit(radix)).unwrap_or(digits.len());
    if length == 0 {
        return None;
    }
    // A number too large for 32 bits is as invalid as any other above the last code point.
    let code = u32::from_str_radix(&digits[..length], radix).unwrap_or(u32::MAX);
    out.extend(character(code));
    Some(text.len() - digits.len() + length + usize::from(digits[length..].starts_with(';')))
}

fn character(code: u32) -> Option<char> {
    match code {
        0x00 => Some(char::REPLACEMENT_CHARACTER),
        0x80..=0x9f => char::from_u32(code).map(windows_1252),
        0x01..=0x08 | 0x0b | 0x0e..=0x1f | 0x7f | 0xfdd0..=0xfdef => None,
        _ if code <= 0x10_ffff && code & 0xfffe == 0xfffe => None,
        _ => Some(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)),
    }
}

/// Appends the characters of the longest known name at the start of `text` and what follows it up to the end of the
/// candidate; `None` when no name fits.
fn named_reference(text: &str, out: &mut String) -> Option<usize> {
    let ends = |c: char| matches!(c, '\t' | '\n' | '\x0c' | ' ' | '<' | '&' | '#' | ';');
    let bound = text.char_indices().nth(MAX_ENTITY_CHARS).map_or(text.len(), |(at, _)| at);
    let length = text[..bound].find(ends).unwrap_or(bound);
    let with_semicolon = length + usize::from(length > 0 && text[length..].starts_with(';'));
    let candidate = &text[..with_semicolon];
    // Names are ASCII, so a byte prefix that ends inside a character cannot be one.
    let known = (2..=candidate.len()).rev().find_map(|end| Some((end, *ENTITIES.get(candidate.get(..end)?)?)));
    let (end, characters) = known?;
    out.push_str(characters);
    out.push_str(&candidate[end..]);
    Some(candidate.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `prompt_clean` of diffusers 0.42 with ftfy 6.3 answers.
    #[test]
    fn prompts_come_out_as_from_the_reference() {
        for (prompt, expected) in [
            ("A cat &amp; a dog", "A cat & a dog"),
            ("  two  spaces\tand\nlines ", "two spaces and lines"),
            ("“curly” ‘quotes’ „low‟", "\"curly\" 'quotes' \"low\""),
            ("caf&eacute; P&EACUTE;REZ BUNDESSTRA&SZLIG;E", "café PÉREZ BUNDESSTRASSE"),
            ("&amp;amp;lt;b&gt;", "<b>"),
            ("a < b &amp; c &eacute;\nsecond &notit; line", "a < b & c é second ¬it; line"),
            ("ﬂuﬃeﬆ Ǆ ŉ ﬅ", "fluffiest DŽ 'n ſt"),
            ("ＬＯＵＤ\u{3000}ＮＯＩＳＥＳ，Ｕﾀｰﾝ", "LOUD NOISES,Uターン"),
            ("一只猫，在草地上奔跑。", "一只猫,在草地上奔跑。"),
            ("\u{1b}[36;44mblue\u{1b}[0m da\u{7} ba\u{7f}", "blue da ba"),
            ("e\u{301}te\u{301}", "été"),
            ("what \u{85} is \u{93}this\u{94} \u{81}", "what … is \"this\" \u{81}"),
            ("&#59; &#x26;lt; &#0; &#128; &#xD800; &#x110000; &#1; &#xFFFE; &#99999999999999999999;", "; < � € � � �"),
            ("&notit; &ampx; &unknown; & alone &", "¬it; &x; &unknown; & alone &"),
            ("&NotEqualTilde; &Jscr;ohn &lt", "≂\u{338} 𝒥ohn <"),
            ("\u{feff}bom ￼ obj \u{206a} x", "bom obj x"),
            ("zero\u{200b}width\u{200d}join", "zero\u{200b}width\u{200d}join"),
            ("line\u{2028}sep\u{2029}para\u{d}\nend\u{d}", "line sep para end"),
            ("\u{a0}nbsp\u{a0}", "nbsp"),
            ("a\u{b}b\u{c}c\u{1c}d", "ab cd"),
            ("&LTIMES; &AMP; &FRAC12;", "<IMES; & ½"),
            ("", ""),
            ("   ", ""),
            ("emoji 👩\u{200d}👩\u{200d}👧 ok", "emoji 👩\u{200d}👩\u{200d}👧 ok"),
            ("&hellip;&ldquo;x&rdquo;&nbsp;y", "…\"x\" y"),
            (
                "&CounterClockwiseContourIntegral; &thereisnosuchentitynameatallinhtmlfiveeee;",
                "∳ &thereisnosuchentitynameatallinhtmlfiveeee;",
            ),
            ("&AMP &lt;i&gt;", "& <i>"),
            ("5 &lt 7 &#x1F431", "5 < 7 🐱"),
            ("&#x;&#;&;", "&#x;&#;&;"),
            ("Łódź – žluťoučký kůň", "Łódź – žluťoučký kůň"),
            ("Привет, «мир»", "Привет, «мир»"),
            ("\u{1b}[31mred\u{1b}[ \u{1b}[1;2", "red[ [1;2"),
        ] {
            assert_eq!(prompt_clean(prompt), expected, "{prompt:?}");
        }
    }

    /// A chain of references that gets shorter by one with each turn.
    #[test]
    fn references_are_followed_so_deep() {
        // Two more are undone at the end.
        let nested = |depth: usize| format!("&{}lt;", "amp;".repeat(depth));
        assert_eq!(prompt_clean(&nested(MAX_TURNS)), "<");
        assert_eq!(prompt_clean(&nested(MAX_TURNS + 10)), nested(8).as_str());
    }

    #[test]
    fn the_table_of_entities_is_that_of_html_5() {
        assert_eq!(ENTITIES.len(), 2231);
    }
}
