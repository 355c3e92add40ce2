//! `str(value)` and `repr(value)`.

use std::fmt::Write as _;

use minijinja::value::{Value, ValueKind};

use crate::chat_template::budget::{self, Exceeded, ITEM_BYTES, MAX_DEPTH, charge};

pub mod views;

/// `str(value)`; an undefined value is the empty text, as in Jinja2.
pub fn to_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => repr(value),
    }
}

/// Deepest nesting that is printed: what a value that is kept may have, and what one expression can put around it.
const MAX_PRINTED_DEPTH: usize = 3 * MAX_DEPTH;

/// `repr(value)`. Ends early where the rendering has made too much; see [`budget::check`].
pub fn repr(value: &Value) -> String {
    let mut out = String::new();
    // What has no end is found out by whoever asks the account.
    let _ = write_repr(&mut out, value, 0);
    out
}

/// Writes `repr(value)` until it is paid for no longer.
fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Exceeded> {
    match value.kind() {
        ValueKind::Undefined => write(out, "Undefined"),
        ValueKind::Number if !value.is_integer() => {
            write(out, &f64::try_from(value.clone()).map_or_else(|_| value.to_string(), repr_float))
        }
        ValueKind::String => write(out, &repr_text(value.as_str().unwrap_or_default())),
        ValueKind::Bytes => write(out, &repr_bytes(value.as_bytes().unwrap_or_default())),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map if depth > MAX_PRINTED_DEPTH => {
            budget::exceed(Exceeded::Depth);
            Err(Exceeded::Depth)
        }
        ValueKind::Seq | ValueKind::Iterable if !has_own_repr(value) => write_sequence(out, value, depth),
        ValueKind::Map => write_map(out, value, depth),
        _ => write(out, &value.to_string()),
    }
}

fn write(out: &mut String, text: &str) -> Result<(), Exceeded> {
    charge(text.len())?;
    out.push_str(text);
    Ok(())
}

/// Whether a sequence is none of Python's lists and tuples.
pub fn has_own_repr(value: &Value) -> bool {
    value.downcast_object_ref::<views::View>().is_some() || value.downcast_object_ref::<views::Range>().is_some()
}

fn write_sequence(out: &mut String, value: &Value, depth: usize) -> Result<(), Exceeded> {
    let [open, close] = if value.is_tuple() { ["(", ")"] } else { ["[", "]"] };
    write(out, open)?;
    let mut len = 0;
    for item in value.try_iter().into_iter().flatten() {
        // A list that repeats another has items at no cost.
        charge(ITEM_BYTES)?;
        write(out, if len > 0 { ", " } else { "" })?;
        write_repr(out, &item, depth + 1)?;
        len += 1;
    }
    write(out, if value.is_tuple() && len == 1 { "," } else { "" })?;
    write(out, close)
}

fn write_map(out: &mut String, value: &Value, depth: usize) -> Result<(), Exceeded> {
    write(out, "{")?;
    for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
        write(out, if i > 0 { ", " } else { "" })?;
        write_repr(out, &key, depth + 1)?;
        write(out, ": ")?;
        write_repr(out, &value.get_item(&key).unwrap_or_default(), depth + 1)?;
    }
    write(out, "}")
}

/// Shortest digits that read back as the same number, with an exponent from 1e16 on and below 1e-4.
pub fn repr_float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    if number.is_infinite() {
        return if number < 0.0 { "-inf" } else { "inf" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').expect("Rust writes an exponent: this is a bug");
    let exponent: i32 = exponent.parse().expect("Rust writes a number: this is a bug");
    if !(-4..16).contains(&exponent) {
        return format!("{digits}e{}", exponent_text(exponent));
    }
    let plain = number.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// An exponent as C writes it: a sign and at least two digits.
pub fn exponent_text(exponent: i32) -> String {
    format!("{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// A quoted string; quotes are double where the text has single ones alone.
pub fn repr_text(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            // Looking at a character takes long enough for megabytes to need the clock.
            _ if !c.is_ascii() && charge(1).is_err() => break,
            c if is_printable(c) => out.push(c),
            c => push_escaped(&mut out, c),
        }
    }
    out.push(quote);
    out
}

/// `ascii(value)`: as `repr`, with escapes for everything outside ASCII.
pub fn ascii(value: &Value) -> String {
    let mut out = String::new();
    for c in repr(value).chars() {
        if c.is_ascii() { out.push(c) } else { push_escaped(&mut out, c) }
    }
    out
}

fn push_escaped(out: &mut String, c: char) {
    let written = match u32::from(c) {
        code @ 0..=0xff => write!(out, "\\x{code:02x}"),
        code @ 0x100..=0xffff => write!(out, "\\u{code:04x}"),
        code => write!(out, "\\U{code:08x}"),
    };
    written.expect("a string takes all text: this is a bug");
}

fn repr_bytes(bytes: &[u8]) -> String {
    let quote = if bytes.contains(&b'\'') && !bytes.contains(&b'"') { '"' } else { '\'' };
    let mut out = format!("b{quote}");
    for byte in bytes {
        match byte {
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            b if char::from(*b) == quote => out.extend(['\\', quote]),
            0x20..=0x7e => out.push(char::from(*byte)),
            _ => push_escaped(&mut out, char::from(*byte)),
        }
    }
    out.push(quote);
    out
}

/// `str.isprintable` of one character. Rust escapes the same categories, except for a mark that begins a text.
pub fn is_printable(c: char) -> bool {
    match c {
        ' '..='~' => true,
        _ => format!("{:?}", format!("a{c}")).len() == c.len_utf8() + 3,
    }
}
