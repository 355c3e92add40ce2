//! The filters and tests of Jinja2 that minijinja lacks or that answer differently there.
//!
//! Source: `jinja2/filters.py`, `jinja2/tests.py`; `tojson` is transformers'.

use minijinja::Environment;
use minijinja::value::{Value, ValueKind};

use super::budget::{charge, charge_items};
use super::python::{self, Args, Given, bounded, fail, float, integer, json, strings, to_str};
use super::sequences;
use super::weight::charge_result;

type Result<T, E = minijinja::Error> = std::result::Result<T, E>;
type Filter = (&'static str, &'static [&'static str], fn(&Args) -> Result<Value>);

/// Filters by name, with their parameters and what they do.
const FILTERS: &[Filter] = &[
    ("capitalize", &["s"], |args| Ok(strings::capitalized(&text(args)?).into())),
    ("center", &["value", "width"], |args| {
        let (text, width) = (text(args)?, args.width(1, 80)?);
        let missing = width.saturating_sub(text.chars().count());
        let left = missing / 2 + (missing & width & 1);
        Ok((" ".repeat(left) + &text + &" ".repeat(missing - left)).into())
    }),
    ("d", &["value", "default_value", "boolean"], default),
    ("default", &["value", "default_value", "boolean"], default),
    ("dictsort", &["value", "case_sensitive", "by", "reverse"], sequences::dictsort),
    ("e", &["s"], escape),
    ("escape", &["s"], escape),
    ("filesizeformat", &["value", "binary"], filesizeformat),
    ("float", &["value", "default"], to_float),
    ("forceescape", &["value"], |args| Ok(Value::from_safe_string(escaped(&text(args)?)))),
    ("indent", &["s", "width", "first", "blank"], indent),
    ("int", &["value", "default", "base"], to_int),
    ("join", &["value", "d", "attribute"], sequences::join),
    ("lower", &["s"], |args| Ok(text(args)?.to_lowercase().into())),
    ("pprint", &["value"], |args| Ok(python::repr(args.required(0)?).into())),
    ("replace", &["s", "old", "new", "count"], replace),
    ("string", &["object"], |args| {
        let value = args.required(0)?;
        Ok(if value.as_str().is_some() { value.clone() } else { to_str(value).into() })
    }),
    ("striptags", &["value"], |args| Ok(striptags(&text(args)?).into())),
    ("title", &["s"], |args| Ok(title(&text(args)?).into())),
    ("tojson", json::PARAMETERS, |args| Ok(json::dumps(args)?.into())),
    ("trim", &["value", "chars"], |args| Ok(strings::stripped(&text(args)?, args.text_or_none(1)?, true, true).into())),
    ("truncate", &["s", "length", "killwords", "end", "leeway"], truncate),
    ("unique", &["value", "case_sensitive", "attribute"], sequences::unique),
    ("upper", &["s"], |args| Ok(text(args)?.to_uppercase().into())),
    ("urlencode", &["value"], urlencode),
    ("wordcount", &["s"], |args| Ok(wordcount(&text(args)?).into())),
    ("wordwrap", &["s", "width", "break_long_words", "wrapstring", "break_on_hyphens"], wordwrap),
    ("xmlattr", &["d", "autospace"], xmlattr),
];

/// Filters of minijinja that answer as Jinja2's do.
const AS_IN_JINJA2: &[&str] = &[
    "abs",
    "attr",
    "count",
    "first",
    "items",
    "last",
    "length",
    "list",
    "reject",
    "rejectattr",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "sum",
];

/// Tests of Jinja2, all of which minijinja has or [`add_to`] adds.
const TESTS: &[&str] = &[
    "!=",
    "<",
    "<=",
    "==",
    ">",
    ">=",
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];

/// Whether templates may use a filter of this name.
pub(super) fn is_filter(name: &str) -> bool {
    AS_IN_JINJA2.contains(&name) || sequences::NAMES.contains(&name) || FILTERS.iter().any(|filter| filter.0 == name)
}

/// Whether templates may use a test of this name.
pub(super) fn is_test(name: &str) -> bool {
    TESTS.contains(&name)
}

/// Makes all filters and tests known.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    for (name, parameters, filter) in FILTERS {
        environment.add_filter(*name, move |given: Given| -> Result<Value> {
            let result = filter(&Args::bind(name, parameters, &python::values(given))?)?;
            charge_result(&result)?;
            Ok(result)
        });
    }
    sequences::add_to(environment);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.add_test("filter", is_filter);
    environment.add_test("test", is_test);
    environment.add_test("iterable", |value: &Value| {
        !matches!(value.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Plain)
    });
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Bytes)
    });
}

/// The filtered value as text.
fn text(args: &Args) -> Result<String> {
    args.required(0).map(to_str)
}

fn default(args: &Args) -> Result<Value> {
    let value = args.get(0).cloned().unwrap_or(Value::UNDEFINED);
    let is_absent = value.is_undefined() || (args.flag(2, false) && !value.is_true());
    Ok(if is_absent { args.get(1).cloned().unwrap_or_else(|| Value::from("")) } else { value })
}

fn escape(args: &Args) -> Result<Value> {
    let value = args.required(0)?;
    Ok(if value.is_safe() { value.clone() } else { Value::from_safe_string(escaped(&to_str(value))) })
}

/// As MarkupSafe escapes.
fn escaped(text: &str) -> String {
    let entities = [('&', "&amp;"), ('<', "&lt;"), ('>', "&gt;"), ('\'', "&#39;"), ('"', "&#34;")];
    let entity = |c: char| entities.iter().find(|(special, _)| *special == c).map(|(_, entity)| (*entity).to_owned());
    text.chars().map(|c| entity(c).unwrap_or_else(|| c.to_string())).collect()
}

fn filesizeformat(args: &Args) -> Result<Value> {
    let value = args.required(0)?;
    let read = float(value).or_else(|| value.as_str()?.trim().parse().ok());
    let bytes: f64 = read.ok_or_else(|| fail("filesizeformat: not a number"))?;
    let (base, units): (f64, [&str; 8]) = match args.flag(1, false) {
        true => (1024.0, ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"]),
        false => (1000.0, ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"]),
    };
    if bytes == 1.0 {
        return Ok("1 Byte".into());
    }
    if bytes < base {
        return Ok(format!("{} Bytes", bytes as i64).into());
    }
    let power = (2..=units.len() as i32).find(|power| bytes < base.powi(*power)).unwrap_or(units.len() as i32 + 1) - 1;
    Ok(format!("{:.1} {}", bytes / base.powi(power), units[power as usize - 1]).into())
}

fn to_float(args: &Args) -> Result<Value> {
    let value = args.required(0)?;
    let number = float(value).or_else(|| python_float(value.as_str()?));
    Ok(number.map_or_else(|| args.get(1).cloned().unwrap_or_else(|| Value::from(0.0)), Value::from))
}

/// `float(text)`.
fn python_float(text: &str) -> Option<f64> {
    let digits = without_underscores(strings::stripped(text, None, true, true))?;
    digits.parse().ok()
}

/// A number's text without the underscores that may stand between digits.
fn without_underscores(text: &str) -> Option<String> {
    let is_digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    for (at, _) in text.match_indices('_') {
        if !is_digit(text[..at].chars().next_back()) || !is_digit(text[at + 1..].chars().next()) {
            return None;
        }
    }
    Some(text.replace('_', ""))
}

fn to_int(args: &Args) -> Result<Value> {
    let value = args.required(0)?;
    let base = args.integer(2, 10)?;
    let number = match value.as_str() {
        Some(text) => python_int(text, base).or_else(|| whole(python_float(text)?)),
        None => integer(value).or_else(|| whole(float(value)?)),
    };
    Ok(number.map_or_else(|| args.get(1).cloned().unwrap_or_else(|| Value::from(0)), Value::from))
}

fn whole(number: f64) -> Option<i128> {
    (number.is_finite() && number.abs() < 1e38).then_some(number as i128)
}

/// `int(text, base)`.
fn python_int(text: &str, base: i64) -> Option<i128> {
    let text = without_underscores(strings::stripped(text, None, true, true))?;
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(&text)),
    };
    let prefixes = [("0x", 16), ("0X", 16), ("0o", 8), ("0O", 8), ("0b", 2), ("0B", 2)];
    let prefixed = prefixes.iter().find_map(|(prefix, radix)| Some((digits.strip_prefix(prefix)?, *radix)));
    let (digits, radix) = match (prefixed, base) {
        (Some((digits, radix)), base) if base == radix || base == 0 => (digits, radix),
        (None, 0) if digits.starts_with('0') && digits.contains(|c| c != '0') => return None,
        (_, 0) => (digits, 10),
        (_, base) => (digits, base),
    };
    if digits.starts_with(['+', '-']) || !(2..=36).contains(&radix) {
        return None;
    }
    Some(sign * i128::from_str_radix(digits, radix as u32).ok()?)
}

fn indent(args: &Args) -> Result<Value> {
    let text = text(args)?;
    let indent = match args.some(1).and_then(|width| width.as_str()) {
        Some(indent) => indent.to_owned(),
        None => " ".repeat(args.width(1, 4)?),
    };
    // A last line break counts as a line, as in Jinja2.
    let lines = strings::lines(&text, false);
    let lines: Vec<&str> = if text.is_empty() || text.ends_with('\n') { [&lines[..], &[""]].concat() } else { lines };
    let blank = args.flag(3, false);
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        let is_indented = if i == 0 { args.flag(2, false) } else { blank || !line.is_empty() };
        if is_indented {
            charge(indent.len())?;
            out.push_str(&indent);
        }
        out.push_str(line);
    }
    Ok(out.into())
}

fn replace(args: &Args) -> Result<Value> {
    let (text, old, new) = (text(args)?, to_str(args.required(1)?), to_str(args.required(2)?));
    let count = args.integer_or_none(3)?.and_then(|count| usize::try_from(count).ok());
    strings::replaced(&text, &old, &new, count).map(Value::from)
}

/// As MarkupSafe strips: comments, tags, runs of white space; then entities are unescaped.
fn striptags(text: &str) -> String {
    let without = |text: &str, open: &str, close: &str| {
        let mut out = String::new();
        let mut rest = text;
        while let Some(start) = rest.find(open) {
            let Some(end) = rest[start + open.len()..].find(close) else { break };
            out.push_str(&rest[..start]);
            rest = &rest[start + open.len() + end + close.len()..];
        }
        out + rest
    };
    let plain = without(&without(text, "<!--", "-->"), "<", ">");
    let words: Vec<&str> = plain.split(strings::is_space).filter(|word| !word.is_empty()).collect();
    crate::encoders::prompt_clean::html_unescape(&words.join(" "))
}

/// Every word begins with a capital; words end at white space, hyphens and opening brackets.
fn title(text: &str) -> String {
    let ends = |c: char| strings::is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
    let mut out = String::new();
    for part in text.split_inclusive(ends) {
        let first = part.chars().next().map_or(0, char::len_utf8);
        out.push_str(&part[..first].to_uppercase());
        out.push_str(&part[first..].to_lowercase());
    }
    out
}

fn truncate(args: &Args) -> Result<Value> {
    let text = text(args)?;
    let length = args.width(1, 255)?;
    let end = args.text_or_none(3)?.unwrap_or("...");
    let leeway = args.width(4, 5)?;
    let end_length = end.chars().count();
    let room =
        length.checked_sub(end_length).ok_or_else(|| fail(format!("expected length >= {end_length}, got {length}")))?;
    if text.chars().count() <= length + leeway {
        return Ok(text.into());
    }
    let cut: String = text.chars().take(room).collect();
    let kept = if args.flag(2, false) { &cut } else { cut.rsplit_once(' ').map_or(cut.as_str(), |(kept, _)| kept) };
    Ok(format!("{kept}{end}").into())
}

/// Text is quoted, and of a dictionary or a list of pairs a query string is made.
fn urlencode(args: &Args) -> Result<Value> {
    let value = args.required(0)?;
    let pairs: Vec<(Value, Value)> = match value.kind() {
        ValueKind::Map => python::methods::pairs(value)?,
        ValueKind::Seq | ValueKind::Iterable => {
            let pair = |pair: Value| Ok((pair.get_item_by_index(0)?, pair.get_item_by_index(1)?));
            value.try_iter()?.map(pair).collect::<Result<_>>()?
        }
        _ => return Ok(quoted(&to_str(value), "/").into()),
    };
    let part = |value: &Value| quoted(&to_str(value), "").replace("%20", "+");
    let query: Vec<String> = pairs.iter().map(|(key, value)| format!("{}={}", part(key), part(value))).collect();
    Ok(query.join("&").into())
}

/// `urllib.parse.quote`.
fn quoted(text: &str, safe: &str) -> String {
    let keeps = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || safe.as_bytes().contains(&byte);
    let quote = |byte: u8| if keeps(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(quote).collect()
}

/// Runs of letters, digits and underscores.
fn wordcount(text: &str) -> usize {
    text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty()).count()
}

fn wordwrap(args: &Args) -> Result<Value> {
    let (text, width) = (text(args)?, args.width(1, 79)?.max(1));
    let wrapstring = args.text_or_none(3)?.unwrap_or("\n");
    let (breaks_words, breaks_hyphens) = (args.flag(2, true), args.flag(4, true));
    // Every character may be a piece of its own, and a line.
    charge_items(bounded(text.len() as u64)?)?;
    charge(text.len().saturating_mul(wrapstring.len()))?;
    let wrap = |line: &str| Ok(wrap_line(line, width, breaks_words, breaks_hyphens)?.join(wrapstring));
    let lines: Vec<String> = strings::lines(&text, false).into_iter().map(wrap).collect::<Result<_>>()?;
    Ok(lines.join(wrapstring).into())
}

/// `textwrap.wrap` of one line, white space kept as it is inside a line and dropped at its ends.
fn wrap_line(line: &str, width: usize, breaks_words: bool, breaks_hyphens: bool) -> Result<Vec<String>> {
    let mut chunks: std::collections::VecDeque<String> = chunks_of(line, breaks_hyphens).into();
    let len = |text: &str| text.chars().count();
    let mut lines = Vec::new();
    while !chunks.is_empty() {
        let mut current = String::new();
        let mut used = 0;
        if !lines.is_empty() && chunks[0].trim().is_empty() {
            chunks.pop_front();
        }
        while let Some(chunk) = chunks.pop_front() {
            let room = width.saturating_sub(used);
            if len(&chunk) <= room {
                used += len(&chunk);
                current.push_str(&chunk);
                continue;
            }
            if len(&chunk) > width && breaks_words {
                let cut = chunk.char_indices().nth(room).map_or(chunk.len(), |(at, _)| at);
                current.push_str(&chunk[..cut]);
                charge(chunk.len() - cut)?;
                chunks.push_front(chunk[cut..].to_owned());
            } else if len(&chunk) > width && current.is_empty() {
                current = chunk;
            } else {
                chunks.push_front(chunk);
            }
            break;
        }
        let kept = current.trim_end();
        if !kept.is_empty() {
            lines.push(kept.to_owned());
        }
    }
    Ok(lines)
}

/// Words and the white space between them; words are also cut behind hyphens between letters.
fn chunks_of(line: &str, breaks_hyphens: bool) -> Vec<String> {
    let mut chunks: Vec<String> = Vec::new();
    let mut last: Option<char> = None;
    let chars: Vec<char> = line.chars().collect();
    for (i, c) in chars.iter().enumerate() {
        let behind_hyphen =
            breaks_hyphens && last == Some('-') && c.is_alphabetic() && i >= 2 && chars[i - 2].is_alphabetic();
        let continues = last.is_some_and(|last| strings::is_space(last) == strings::is_space(*c)) && !behind_hyphen;
        match chunks.last_mut() {
            Some(chunk) if continues => chunk.push(*c),
            _ => chunks.push(c.to_string()),
        }
        last = Some(*c);
    }
    chunks
}

fn xmlattr(args: &Args) -> Result<Value> {
    let mut out = Vec::new();
    for (key, value) in python::methods::pairs(args.required(0)?)? {
        let key = to_str(&key);
        if key.contains(|c: char| c.is_ascii_whitespace() || matches!(c, '/' | '>' | '=')) {
            return Err(fail(format!("Invalid character in attribute name: {key:?}")));
        }
        if !value.is_none() && !value.is_undefined() {
            out.push(format!("{}=\"{}\"", escaped(&key), escaped(&to_str(&value))));
        }
    }
    let space = if args.flag(1, true) && !out.is_empty() { " " } else { "" };
    Ok(Value::from_safe_string(space.to_owned() + &out.join(" ")))
}
