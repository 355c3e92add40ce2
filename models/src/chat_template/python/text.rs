//! `str(value)` and `repr(value)`.

use std::fmt::Write as _;

use minijinja::value::{Value, ValueKind};

pub mod views;

/// `str(value)`; an undefined value is the empty text, as in Jinja2.
pub fn to_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => repr(value),
    }
}

/// `repr(value)`.
pub fn repr(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => "Undefined".to_owned(),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), repr_float)
        }
        ValueKind::String => repr_text(value.as_str().unwrap_or_default()),
        ValueKind::Bytes => repr_bytes(value.as_bytes().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable if has_own_repr(value) => value.to_string(),
        ValueKind::Seq | ValueKind::Iterable => repr_sequence(value),
        ValueKind::Map => repr_map(value),
        _ => value.to_string(),
    }
}

/// Whether a sequence is none of Python's lists and tuples.
pub fn has_own_repr(value: &Value) -> bool {
    value.downcast_object_ref::<views::View>().is_some() || value.downcast_object_ref::<views::Range>().is_some()
}

fn repr_sequence(value: &Value) -> String {
    let items: Vec<String> = value.try_iter().into_iter().flatten().map(|item| repr(&item)).collect();
    match (value.is_tuple(), &items[..]) {
        (true, [only]) => format!("({only},)"),
        (true, _) => format!("({})", items.join(", ")),
        (false, _) => format!("[{}]", items.join(", ")),
    }
}

fn repr_map(value: &Value) -> String {
    let entry = |key: Value| format!("{}: {}", repr(&key), repr(&value.get_item(&key).unwrap_or_default()));
    let entries: Vec<String> = value.try_iter().into_iter().flatten().map(entry).collect();
    format!("{{{}}}", entries.join(", "))
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
        '\\' | '"' | '\'' => true,
        _ => format!("{:?}", format!("a{c}")).len() == c.len_utf8() + 3,
    }
}
