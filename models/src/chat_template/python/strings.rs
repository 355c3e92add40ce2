//! The methods of `str`.

use std::collections::HashSet;

use minijinja::value::{Tuple, Value, ValueKind};

use unicode_categories::UnicodeCategories;

use super::{Args, Result, bounded, fail, format, integer, text, type_name};
use crate::chat_template::budget::{charge, charge_items};

/// A method by name, with its parameters and what it does.
pub type Method = (&'static str, &'static [&'static str], fn(&str, &Args) -> Result<Value>);

/// All methods of `str` but `format` and `format_map`, which take any arguments, and `maketrans`.
pub const METHODS: &[Method] = &[
    ("capitalize", &[], |s, _| Ok(capitalized(s).into())),
    ("casefold", &[], |s, _| Ok(casefold(s).into())),
    ("center", &["width", "fillchar"], |s, args| {
        let (missing, fill) = padding(s, args)?;
        // Python puts the odd one to the left where the width is odd.
        let left = missing / 2 + (missing & args.width(0, 0)? & 1);
        Ok((fill.repeat(left) + s + &fill.repeat(missing - left)).into())
    }),
    ("count", &["sub", "start", "end"], count),
    ("encode", &["encoding", "errors"], encode),
    ("endswith", &["suffix", "start", "end"], |s, args| affix(s, args, |s, suffix| s.ends_with(suffix))),
    ("expandtabs", &["tabsize"], |s, args| Ok(expand_tabs(s, args.width(0, 8)?)?.into())),
    ("find", &["sub", "start", "end"], |s, args| Ok(search(s, args, |s, sub| s.find(sub))?.unwrap_or(-1).into())),
    ("index", &["sub", "start", "end"], |s, args| found(search(s, args, |s, sub| s.find(sub))?)),
    ("isalnum", &[], |s, _| Ok(all(s, |c| is_letter(c) || c.is_numeric()))),
    ("isalpha", &[], |s, _| Ok(all(s, is_letter))),
    ("isascii", &[], |s, _| Ok(s.is_ascii().into())),
    ("isdecimal", &[], |s, _| Ok(all(s, is_decimal))),
    ("isdigit", &[], |s, _| Ok(all(s, is_digit))),
    ("isidentifier", &[], |s, _| Ok((!s.starts_with(char::is_numeric) && all(s, is_word).is_true()).into())),
    ("islower", &[], |s, _| Ok(cased(s, char::is_lowercase, char::is_uppercase))),
    ("isnumeric", &[], |s, _| Ok(all(s, is_numeric))),
    ("isprintable", &[], |s, _| Ok(s.chars().all(|c| charge(1).is_ok() && text::is_printable(c)).into())),
    ("isspace", &[], |s, _| Ok(all(s, is_space))),
    ("istitle", &[], |s, _| Ok((s.chars().any(is_cased) && titled(s) == s).into())),
    ("isupper", &[], |s, _| Ok(cased(s, char::is_uppercase, char::is_lowercase))),
    ("join", &["iterable"], join),
    ("ljust", &["width", "fillchar"], |s, args| {
        let (missing, fill) = padding(s, args)?;
        Ok((s.to_owned() + &fill.repeat(missing)).into())
    }),
    ("lower", &[], |s, _| Ok(s.to_lowercase().into())),
    ("lstrip", &["chars"], |s, args| Ok(stripped(s, args.text_or_none(0)?, true, false).into())),
    ("partition", &["sep"], |s, args| partition(s, args, false)),
    ("removeprefix", &["prefix"], |s, args| Ok(s.strip_prefix(args.text(0)?).unwrap_or(s).into())),
    ("removesuffix", &["suffix"], |s, args| Ok(s.strip_suffix(args.text(0)?).unwrap_or(s).into())),
    ("replace", &["old", "new", "count"], replace),
    ("rfind", &["sub", "start", "end"], |s, args| Ok(search(s, args, |s, sub| s.rfind(sub))?.unwrap_or(-1).into())),
    ("rindex", &["sub", "start", "end"], |s, args| found(search(s, args, |s, sub| s.rfind(sub))?)),
    ("rjust", &["width", "fillchar"], |s, args| {
        let (missing, fill) = padding(s, args)?;
        Ok((fill.repeat(missing) + s).into())
    }),
    ("rpartition", &["sep"], |s, args| partition(s, args, true)),
    ("rsplit", &["sep", "maxsplit"], |s, args| split(s, args, true)),
    ("rstrip", &["chars"], |s, args| Ok(stripped(s, args.text_or_none(0)?, false, true).into())),
    ("split", &["sep", "maxsplit"], |s, args| split(s, args, false)),
    ("splitlines", &["keepends"], |s, args| {
        charge_items(s.chars().filter(|c| is_line_end(*c)).count())?;
        Ok(lines(s, args.flag(0, false)).into_iter().map(Value::from).collect())
    }),
    ("startswith", &["prefix", "start", "end"], |s, args| affix(s, args, |s, prefix| s.starts_with(prefix))),
    ("strip", &["chars"], |s, args| Ok(stripped(s, args.text_or_none(0)?, true, true).into())),
    ("swapcase", &[], |s, _| Ok(swapped(s).into())),
    ("title", &[], |s, _| Ok(titled(s).into())),
    ("translate", &["table"], translate),
    ("upper", &[], |s, _| Ok(s.to_uppercase().into())),
    ("zfill", &["width"], |s, args| {
        let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
        let missing = args.width(0, 0)?.saturating_sub(s.chars().count());
        Ok((sign.to_owned() + &"0".repeat(missing) + digits).into())
    }),
];

/// White space of `str.isspace`: Unicode's, and four separators of ASCII.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

/// `str.strip`, at the left, the right or both ends: of white space, or of any of `chars`.
pub fn stripped<'a>(s: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let set: Option<HashSet<char>> = chars.map(|chars| chars.chars().collect());
    let goes = |c: char| set.as_ref().map_or_else(|| is_space(c), |set| set.contains(&c));
    let s = if left { s.trim_start_matches(goes) } else { s };
    if right { s.trim_end_matches(goes) } else { s }
}

/// `str.splitlines`.
pub fn lines(s: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = s;
    while let Some((at, end)) = rest.char_indices().find(|(_, c)| is_line_end(*c)) {
        let len = if rest[at..].starts_with("\r\n") { 2 } else { end.len_utf8() };
        lines.push(&rest[..if keep_ends { at + len } else { at }]);
        rest = &rest[at + len..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn is_line_end(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// `str.capitalize`.
pub fn capitalized(s: &str) -> String {
    let first = s.chars().next().map(char::len_utf8).unwrap_or(0);
    title_case(&s[..first]) + &s[first..].to_lowercase()
}

/// `str.title`: upper case after everything that has no case.
fn titled(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    let mut in_word = false;
    for c in s.chars() {
        if in_word {
            out.extend(c.to_lowercase())
        } else {
            out.push_str(&title_case(c.encode_utf8(&mut [0; 4])))
        }
        in_word = is_cased(c);
    }
    out
}

/// The title case of one character: of several capitals (`ß`) the first.
fn title_case(c: &str) -> String {
    match c {
        "Ǆ" | "ǅ" | "ǆ" => "ǅ".to_owned(),
        "Ǉ" | "ǈ" | "ǉ" => "ǈ".to_owned(),
        "Ǌ" | "ǋ" | "ǌ" => "ǋ".to_owned(),
        "Ǳ" | "ǲ" | "ǳ" => "ǲ".to_owned(),
        "ŉ" => "ʼN".to_owned(),
        _ if c.starts_with(|c| ('\u{10d0}'..='\u{10ff}').contains(&c)) => c.to_owned(),
        _ => {
            let upper = c.to_uppercase();
            let first = upper.chars().next().map_or(0, char::len_utf8);
            upper[..first].to_owned() + &upper[first..].to_lowercase()
        }
    }
}

fn swapped(s: &str) -> String {
    let swap =
        |c: char| -> String { if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() } };
    s.chars().map(swap).collect()
}

/// Lower case of upper case, which unfolds what has several capitals. Cherokee alone folds to its capitals.
fn casefold(s: &str) -> String {
    let fold = |c: char| -> String {
        match c {
            '\u{13a0}'..='\u{13f5}' | 'ı' => c.to_string(),
            '\u{13f8}'..='\u{13fd}' | '\u{ab70}'..='\u{abbf}' => c.to_uppercase().collect(),
            _ => c.to_uppercase().flat_map(char::to_lowercase).collect(),
        }
    };
    s.chars().map(fold).collect()
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ')
}

/// Categories of letters; Rust calls some marks, numbers and symbols alphabetic too.
fn is_letter(c: char) -> bool {
    c.is_alphabetic() && !c.is_mark() && !c.is_number() && !c.is_symbol()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Category Nd.
fn is_decimal(c: char) -> bool {
    c.is_number_decimal_digit()
}

fn is_digit(c: char) -> bool {
    is_decimal(c) || is_superscript_or_circled(c)
}

/// Numbers of all kinds, the commoner Chinese ones among them, which Rust calls letters.
fn is_numeric(c: char) -> bool {
    c.is_numeric() || "〇一二三四五六七八九十百千万亿零壹贰叁肆伍陆柒捌玖拾佰仟億萬両两".contains(c)
}

/// Characters that Unicode calls digits though no decimal system has them.
fn is_superscript_or_circled(c: char) -> bool {
    matches!(c, '²' | '³' | '¹' | '\u{1369}'..='\u{1371}' | '\u{19da}' | '\u{2070}' | '\u{2074}'..='\u{2079}'
        | '\u{2080}'..='\u{2089}' | '\u{2460}'..='\u{2468}' | '\u{2474}'..='\u{247c}' | '\u{2488}'..='\u{2490}'
        | '\u{24ea}' | '\u{24f5}'..='\u{24fd}' | '\u{24ff}' | '\u{2776}'..='\u{277e}' | '\u{2780}'..='\u{2788}'
        | '\u{278a}'..='\u{2792}' | '\u{10a40}'..='\u{10a43}' | '\u{10e60}'..='\u{10e68}'
        | '\u{11052}'..='\u{1105a}' | '\u{1f100}'..='\u{1f10a}')
}

fn all(s: &str, holds: fn(char) -> bool) -> Value {
    Value::from(!s.is_empty() && s.chars().all(holds))
}

fn cased(s: &str, wanted: fn(char) -> bool, other: fn(char) -> bool) -> Value {
    Value::from(s.chars().any(wanted) && !s.chars().any(other))
}

/// How many characters are missing to a width, and what they are.
fn padding(s: &str, args: &Args) -> Result<(usize, String)> {
    let fill = args.text_or_none(1)?.unwrap_or(" ");
    if fill.chars().count() != 1 {
        return Err(fail("The fill character must be exactly one character long"));
    }
    Ok((args.width(0, 0)?.saturating_sub(s.chars().count()), fill.to_owned()))
}

/// The characters of `s[start:end]` by the arguments 1 and 2, and how many come before them; `None` where `start` lies
/// behind the end.
fn window<'a>(s: &'a str, args: &Args) -> Result<Option<(usize, &'a str)>> {
    let len = s.chars().count() as i64;
    let place = |index: i64| (if index < 0 { index + len } else { index }).max(0);
    let start = place(args.integer(1, 0)?);
    let end = place(args.integer(2, len)?).min(len);
    if start > end {
        return Ok(None);
    }
    let byte = |place: i64| s.char_indices().nth(place as usize).map_or(s.len(), |(at, _)| at);
    Ok(Some((start as usize, &s[byte(start)..byte(end)])))
}

/// Place of a character sequence, counted in characters from the beginning.
fn search(s: &str, args: &Args, find: fn(&str, &str) -> Option<usize>) -> Result<Option<i64>> {
    let sub = args.text(0)?;
    let Some((before, window)) = window(s, args)? else { return Ok(None) };
    Ok(find(window, sub).map(|at| (before + window[..at].chars().count()) as i64))
}

fn found(place: Option<i64>) -> Result<Value> {
    place.map(Value::from).ok_or_else(|| fail("substring not found"))
}

fn count(s: &str, args: &Args) -> Result<Value> {
    let sub = args.text(0)?;
    Ok(Value::from(window(s, args)?.map_or(0, |(_, window)| window.matches(sub).count())))
}

fn affix(s: &str, args: &Args, holds: fn(&str, &str) -> bool) -> Result<Value> {
    let Some((_, window)) = window(s, args)? else { return Ok(Value::from(false)) };
    let wanted = args.required(0)?;
    let wrong = |value: &Value| fail(format!("the affix must be str or a tuple of str, not {}", type_name(value)));
    if let Some(one) = wanted.as_str() {
        return Ok(Value::from(holds(window, one)));
    }
    if !wanted.is_tuple() {
        return Err(wrong(wanted));
    }
    for one in wanted.try_iter()? {
        if holds(window, one.as_str().ok_or_else(|| wrong(&one))?) {
            return Ok(Value::from(true));
        }
    }
    Ok(Value::from(false))
}

fn join(s: &str, args: &Args) -> Result<Value> {
    let mut out = String::new();
    for (i, item) in args.required(0)?.try_iter()?.enumerate() {
        let wrong = || fail(format!("sequence item {i}: expected str instance, {} found", type_name(&item)));
        let text = item.as_str().ok_or_else(wrong)?;
        let separator = if i > 0 { s } else { "" };
        charge(separator.len() + text.len())?;
        out.push_str(separator);
        out.push_str(text);
    }
    Ok(out.into())
}

fn partition(s: &str, args: &Args, from_right: bool) -> Result<Value> {
    let separator = args.text(0)?;
    if separator.is_empty() {
        return Err(fail("empty separator"));
    }
    let split = if from_right { s.rsplit_once(separator) } else { s.split_once(separator) };
    let parts = match split {
        Some((before, after)) => [before, separator, after],
        None if from_right => ["", "", s],
        None => [s, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

fn replace(s: &str, args: &Args) -> Result<Value> {
    let (old, new) = (args.text(0)?, args.text(1)?);
    replaced(s, old, new, usize::try_from(args.integer(2, -1)?).ok()).map(Value::from)
}

/// The text with `new` in place of the first `count`, or all, of `old`.
pub fn replaced(s: &str, old: &str, new: &str, count: Option<usize>) -> Result<String> {
    let found = s.matches(old).take(count.unwrap_or(usize::MAX)).count();
    charge(found.saturating_mul(new.len()))?;
    Ok(match count {
        Some(count) => s.replacen(old, new, count),
        None => s.replace(old, new),
    })
}

/// `split` and `rsplit`: at a separator, or at runs of white space.
fn split(s: &str, args: &Args, from_right: bool) -> Result<Value> {
    let limit = usize::try_from(args.integer(1, -1)?).map_or(usize::MAX, |most| most.saturating_add(1));
    let separators = match args.text_or_none(0)? {
        Some(separator) => s.matches(separator).take(limit).count(),
        None => s.matches(is_space).take(limit).count(),
    };
    charge_items(separators)?;
    let mut parts: Vec<&str> = match args.text_or_none(0)? {
        Some("") => return Err(fail("empty separator")),
        Some(separator) if from_right => s.rsplitn(limit, separator).collect(),
        Some(separator) => s.splitn(limit, separator).collect(),
        None => words(s, limit, from_right),
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Words between white space; the last of `limit` parts is what remains.
fn words(s: &str, limit: usize, from_right: bool) -> Vec<&str> {
    let next = |rest| stripped(rest, None, !from_right, from_right);
    let mut parts = Vec::new();
    let mut rest = next(s);
    while !rest.is_empty() {
        let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(cut) = cut.filter(|_| parts.len() + 1 < limit) else {
            parts.push(rest);
            break;
        };
        let space = rest[cut..].chars().next().map_or(0, char::len_utf8);
        let (before, after) = (&rest[..cut], &rest[cut + space..]);
        parts.push(if from_right { after } else { before });
        rest = next(if from_right { before } else { after });
    }
    parts
}

fn expand_tabs(s: &str, size: usize) -> Result<String> {
    let mut out = String::with_capacity(s.len());
    let mut column = 0;
    for c in s.chars() {
        match c {
            '\t' => {
                let spaces = if size == 0 { 0 } else { size - column % size };
                charge(spaces)?;
                out.push_str(&" ".repeat(spaces));
                column += spaces;
            }
            c => {
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
                out.push(c);
            }
        }
    }
    Ok(out)
}

fn encode(s: &str, args: &Args) -> Result<Value> {
    let encoding = args.text_or_none(0)?.unwrap_or("utf-8").to_lowercase().replace('_', "-");
    match encoding.as_str() {
        "utf-8" | "utf8" => Ok(Value::from_bytes(s.as_bytes().to_vec())),
        "ascii" if s.is_ascii() => Ok(Value::from_bytes(s.as_bytes().to_vec())),
        "latin-1" | "iso-8859-1" | "latin1" if s.chars().all(|c| c <= '\u{ff}') => {
            Ok(Value::from_bytes(s.chars().map(|c| u32::from(c) as u8).collect()))
        }
        _ => Err(fail(format!("cannot encode as {encoding}"))),
    }
}

/// Characters by a dictionary from code points to text, code points or none.
fn translate(s: &str, args: &Args) -> Result<Value> {
    let table = args.required(0)?;
    let mut out = String::new();
    for c in s.chars() {
        let entry = table.get_item(&Value::from(u32::from(c)))?;
        match (entry.kind(), entry.as_str(), integer(&entry)) {
            (ValueKind::Undefined, ..) => out.push(c),
            (ValueKind::None, ..) => {}
            (_, Some(text), _) => out.push_str(text),
            (_, _, Some(code)) => {
                out.push(u32::try_from(code).ok().and_then(char::from_u32).ok_or_else(|| fail("no character"))?)
            }
            _ => return Err(fail("character mapping must return integer, None or str")),
        }
        bounded(out.len() as u64)?;
    }
    Ok(out.into())
}

/// The methods that take any arguments.
pub fn variadic(s: &str, method: &str, given: &[Value]) -> Option<Result<Value>> {
    match method {
        "format" => Some(format::str_format(s, given).map(Value::from)),
        "format_map" => Some(
            Args::bind("format_map", &["mapping"], given)
                .and_then(|args| Ok(format::format_map(s, args.required(0)?)?.into())),
        ),
        _ => None,
    }
}
