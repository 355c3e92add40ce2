//! `format % values` and `str.format`: both write a value by a sign, a width, a precision and a type.

use minijinja::Value;
use minijinja::value::{Kwargs, ValueKind, from_args};

use super::text::{ascii, exponent_text, repr, repr_float, to_str};
use super::{Result, bounded, fail, float, integer, type_name};
use crate::chat_template::budget::charge;

/// How one value is written.
#[derive(Debug, Clone, Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    zeros: bool,
    width: usize,
    group: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

impl Spec {
    /// `[[fill]align][sign][#][0][width][,][.precision][type]` of `str.format`.
    fn parse(text: &str) -> Result<Self> {
        let mut spec = Self::default();
        let mut chars: Vec<char> = text.chars().collect();
        let is_align = |c: Option<&char>| c.is_some_and(|c| matches!(c, '<' | '>' | '^' | '='));
        if is_align(chars.get(1)) {
            spec.fill = Some(chars[0]);
            spec.align = Some(chars[1]);
            chars.drain(..2);
        } else if is_align(chars.first()) {
            spec.align = Some(chars.remove(0));
        }
        let mut rest = chars.into_iter().peekable();
        spec.sign = rest.next_if(|c| matches!(c, '+' | '-' | ' '));
        spec.alternate = rest.next_if_eq(&'#').is_some();
        spec.zeros = rest.next_if_eq(&'0').is_some();
        spec.width = number(&mut rest)?.unwrap_or(0);
        spec.group = rest.next_if(|c| matches!(c, ',' | '_'));
        if rest.next_if_eq(&'.').is_some() {
            spec.precision = Some(number(&mut rest)?.ok_or_else(|| fail("Format specifier missing precision"))?);
        }
        spec.kind = rest.next();
        match rest.next() {
            None => Ok(spec),
            Some(_) => Err(fail(format!("Invalid format specifier '{text}'"))),
        }
    }

    fn write(&self, value: &Value) -> Result<String> {
        let is_text = matches!(self.kind, None | Some('s'));
        match value.kind() {
            ValueKind::Number | ValueKind::Bool if self.kind != Some('s') => self.write_number(value),
            ValueKind::String if is_text => {
                let cut: String = to_str(value).chars().take(self.precision.unwrap_or(usize::MAX)).collect();
                Ok(self.pad(String::new(), cut, '<'))
            }
            _ => Err(fail(format!("unsupported format string passed to {}.__format__", type_name(value)))),
        }
    }

    fn write_number(&self, value: &Value) -> Result<String> {
        let whole = integer(value);
        let (negative, digits) = match (self.kind, whole) {
            (None | Some('d' | 'n' | 'b' | 'o' | 'x' | 'X' | 'c'), Some(whole)) => (whole < 0, self.digits_of(whole)?),
            _ => {
                let number =
                    float(value).ok_or_else(|| fail(format!("a number is required, not {}", type_name(value))))?;
                (number.is_sign_negative() && !number.is_nan(), self.digits_of_float(number.abs())?)
            }
        };
        let sign = match (negative, self.sign) {
            (true, _) => "-".to_owned(),
            (false, Some(sign @ ('+' | ' '))) => sign.to_string(),
            (false, _) => String::new(),
        };
        let prefix = match self.kind {
            Some(kind @ ('b' | 'o' | 'x' | 'X')) if self.alternate => format!("0{kind}"),
            _ => String::new(),
        };
        Ok(self.pad(sign + &prefix, self.grouped(&digits), '>'))
    }

    fn digits_of(&self, number: i128) -> Result<String> {
        let magnitude = number.unsigned_abs();
        Ok(match self.kind {
            Some('b') => format!("{magnitude:b}"),
            Some('o') => format!("{magnitude:o}"),
            Some('x') => format!("{magnitude:x}"),
            Some('X') => format!("{magnitude:X}"),
            Some('c') => character(number)?,
            _ => magnitude.to_string(),
        })
    }

    /// Digits of a number that is not negative.
    fn digits_of_float(&self, number: f64) -> Result<String> {
        let precision = self.precision.unwrap_or(6).min(1 << 12);
        if !number.is_finite() {
            let text = repr_float(number);
            return Ok(if self.kind.is_some_and(char::is_uppercase) { text.to_uppercase() } else { text });
        }
        Ok(match self.kind {
            Some('f' | 'F') => format!("{number:.precision$}"),
            Some('%') => format!("{:.precision$}%", number * 100.0),
            Some('e') => scientific(number, precision),
            Some('E') => scientific(number, precision).to_uppercase(),
            Some('g' | 'n') => general(number, precision, self.alternate),
            Some('G') => general(number, precision, self.alternate).to_uppercase(),
            None => match self.precision {
                None => repr_float(number),
                Some(precision) => {
                    let text = general(number, precision, false);
                    if text.contains(['.', 'e']) { text } else { text + ".0" }
                }
            },
            Some(kind) => return Err(fail(format!("Unknown format code '{kind}' for object of type 'float'"))),
        })
    }

    /// Digits with `,` or `_` between groups: three digits, or four of a base that is a power of two.
    fn grouped(&self, digits: &str) -> String {
        let Some(separator) = self.group else { return digits.to_owned() };
        let size = if matches!(self.kind, Some('b' | 'o' | 'x' | 'X')) { 4 } else { 3 };
        let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
        let mut out = String::new();
        for (i, c) in digits[..end].chars().enumerate() {
            if i > 0 && (end - i) % size == 0 {
                out.push(separator);
            }
            out.push(c);
        }
        out + &digits[end..]
    }

    fn pad(&self, prefix: String, body: String, usual: char) -> String {
        let (fill, align) = match (self.align, self.zeros) {
            (None, true) if usual == '>' => (self.fill.unwrap_or('0'), '='),
            (None, true) => (self.fill.unwrap_or('0'), usual),
            (align, zeros) => (self.fill.unwrap_or(if zeros { '0' } else { ' ' }), align.unwrap_or(usual)),
        };
        let missing = self.width.saturating_sub(prefix.chars().count() + body.chars().count());
        let fill = |count: usize| fill.to_string().repeat(count);
        match align {
            '<' => prefix + &body + &fill(missing),
            '^' => fill(missing / 2) + &prefix + &body + &fill(missing - missing / 2),
            '=' => prefix + &fill(missing) + &body,
            _ => fill(missing) + &prefix + &body,
        }
    }
}

fn number(rest: &mut std::iter::Peekable<impl Iterator<Item = char>>) -> Result<Option<usize>> {
    let mut width = None;
    while let Some(digit) = rest.next_if(char::is_ascii_digit) {
        width = Some(bounded(width.unwrap_or(0) as u64 * 10 + u64::from(digit) - u64::from('0'))?);
    }
    Ok(width)
}

fn character(code: i128) -> Result<String> {
    let c = u32::try_from(code).ok().and_then(char::from_u32);
    c.map(String::from).ok_or_else(|| fail("%c arg not in range(0x110000)"))
}

fn scientific(number: f64, precision: usize) -> String {
    let text = format!("{number:.precision$e}");
    let (digits, exponent) = text.split_once('e').expect("Rust writes an exponent: this is a bug");
    format!("{digits}e{}", exponent_text(exponent.parse().expect("Rust writes a number: this is a bug")))
}

/// C's `%g`: so many digits, without an exponent where that is short, without trailing zeros unless asked for.
fn general(number: f64, precision: usize, keep_zeros: bool) -> String {
    let precision = precision.max(1);
    let text = scientific(number, precision - 1);
    let (digits, exponent) = text.split_once('e').expect("was written with one: this is a bug");
    let exponent: i32 = exponent.parse().expect("was written as a number: this is a bug");
    let trim = |digits: &str| match digits.contains('.') && !keep_zeros {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    if exponent < -4 || exponent >= precision as i32 {
        return format!("{}e{}", trim(digits), exponent_text(exponent));
    }
    let decimals = (precision as i32 - 1 - exponent).max(0) as usize;
    trim(&format!("{number:.decimals$}"))
}

/// `pattern % values`: one value, or a tuple of them, or a dictionary for `%(name)s`.
pub fn percent(pattern: &str, values: &Value) -> Result<String> {
    let mut positional: Vec<Value> = match values.is_tuple() {
        true => values.try_iter()?.collect(),
        false => vec![values.clone()],
    };
    positional.reverse();
    let mut uses_names = false;
    let mut out = String::new();
    let mut rest = pattern.chars().peekable();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let name = rest.next_if_eq(&'(').map(|_| rest.by_ref().take_while(|c| *c != ')').collect::<String>());
        let mut next = || positional.pop().ok_or_else(|| fail("not enough arguments for format string"));
        let spec = printf_spec(&mut rest, &mut next)?;
        let value = match (spec.kind, &name) {
            (Some('%'), _) => {
                out.push('%');
                continue;
            }
            (_, Some(name)) => {
                uses_names = true;
                let found = values.get_item(&Value::from(name.as_str()))?;
                if found.is_undefined() { return Err(fail(format!("KeyError: {name:?}"))) } else { found }
            }
            (_, None) => next()?,
        };
        let text = printf(spec, &value)?;
        charge(text.len())?;
        out.push_str(&text);
    }
    let leftover = !positional.is_empty() && !uses_names && values.kind() != ValueKind::Map;
    if leftover {
        return Err(fail("not all arguments converted during string formatting"));
    }
    Ok(out)
}

/// `[flags][width][.precision][length]type`, where `*` takes a number from the values.
fn printf_spec(
    rest: &mut std::iter::Peekable<std::str::Chars>,
    next: &mut impl FnMut() -> Result<Value>,
) -> Result<Spec> {
    let mut spec = Spec::default();
    while let Some(flag) = rest.next_if(|c| matches!(c, '-' | '+' | ' ' | '#' | '0')) {
        match flag {
            '-' => spec.align = Some('<'),
            '#' => spec.alternate = true,
            '0' => spec.zeros = true,
            sign => spec.sign = if spec.sign == Some('+') { Some('+') } else { Some(sign) },
        }
    }
    let mut count = |rest: &mut std::iter::Peekable<std::str::Chars>| -> Result<Option<i128>> {
        if rest.next_if_eq(&'*').is_some() {
            return integer(&next()?).map(Some).ok_or_else(|| fail("* wants int"));
        }
        Ok(number(rest)?.map(|count| count as i128))
    };
    if let Some(width) = count(rest)? {
        if width < 0 {
            spec.align = Some('<');
        }
        spec.width = bounded(u64::try_from(width.unsigned_abs()).unwrap_or(u64::MAX))?;
    }
    if rest.next_if_eq(&'.').is_some() {
        spec.precision = Some(bounded(count(rest)?.unwrap_or(0).max(0) as u64)?);
    }
    while rest.next_if(|c| matches!(c, 'h' | 'l' | 'L')).is_some() {}
    spec.kind = Some(rest.next().ok_or_else(|| fail("incomplete format"))?);
    Ok(spec)
}

fn printf(mut spec: Spec, value: &Value) -> Result<String> {
    let text = |spec: &Spec, text: String| {
        let cut: String = text.chars().take(spec.precision.unwrap_or(usize::MAX)).collect();
        Spec { zeros: false, ..spec.clone() }.pad(String::new(), cut, '>')
    };
    match spec.kind {
        Some('s') => Ok(text(&spec, to_str(value))),
        Some('r') => Ok(text(&spec, repr(value))),
        Some('a') => Ok(text(&spec, ascii(value))),
        Some('c') => match (value.as_str(), integer(value)) {
            (Some(one), _) if one.chars().count() == 1 => Ok(text(&spec, one.to_owned())),
            (_, Some(code)) => Ok(text(&spec, character(code)?)),
            _ => Err(fail("%c requires int or char")),
        },
        Some(kind @ ('d' | 'i' | 'u' | 'x' | 'X' | 'o')) => {
            spec.kind = Some(if matches!(kind, 'i' | 'u') { 'd' } else { kind });
            let whole = match (integer(value), float(value)) {
                (Some(whole), _) => whole,
                (None, Some(number)) if spec.kind == Some('d') && number.is_finite() => number as i128,
                _ => return Err(fail(format!("%{kind} format: a number is required, not {}", type_name(value)))),
            };
            Ok(printf_integer(&spec, whole)?)
        }
        Some('e' | 'E' | 'f' | 'F' | 'g' | 'G') => {
            if spec.align == Some('<') {
                spec.zeros = false;
            }
            spec.write_number(&Value::from(
                float(value).ok_or_else(|| fail(format!("must be real number, not {}", type_name(value))))?,
            ))
        }
        kind => Err(fail(format!("unsupported format character {kind:?}"))),
    }
}

/// A precision of an integer is its least number of digits.
fn printf_integer(spec: &Spec, whole: i128) -> Result<String> {
    let digits = spec.digits_of(whole)?;
    let digits = "0".repeat(spec.precision.unwrap_or(0).saturating_sub(digits.len())) + &digits;
    let sign = match (whole < 0, spec.sign) {
        (true, _) => "-".to_owned(),
        (false, sign) => sign.map(String::from).unwrap_or_default(),
    };
    let prefix = match spec.kind {
        Some(kind @ ('o' | 'x' | 'X')) if spec.alternate => format!("0{kind}"),
        _ => String::new(),
    };
    let zeros = spec.zeros && spec.align.is_none();
    Ok(Spec { zeros, ..spec.clone() }.pad(sign + &prefix, digits, '>'))
}

/// `pattern.format(...)`.
pub fn str_format(pattern: &str, given: &[Value]) -> Result<String> {
    let (positional, keywords): (&[Value], Kwargs) = from_args(given)?;
    // Python takes keywords that no field names.
    let used: Result<Vec<Value>> = keywords.args().map(|name| keywords.get(name)).collect();
    used?;
    let keyword = |name: &str| keywords.peek::<Option<Value>>(name).ok().flatten();
    Fields { positional, keyword: &keyword, next: 0 }.write(pattern, 2)
}

/// `pattern.format_map(mapping)`.
pub fn format_map(pattern: &str, mapping: &Value) -> Result<String> {
    let keyword = |name: &str| mapping.get_item(&Value::from(name)).ok().filter(|value| !value.is_undefined());
    Fields { positional: &[], keyword: &keyword, next: 0 }.write(pattern, 2)
}

/// The values that replacement fields name.
struct Fields<'a> {
    positional: &'a [Value],
    keyword: &'a dyn Fn(&str) -> Option<Value>,
    /// Index of the next field without a name.
    next: usize,
}

impl Fields<'_> {
    /// `depth` counts how far fields may stand in the format of others.
    fn write(&mut self, pattern: &str, depth: usize) -> Result<String> {
        let mut out = String::new();
        let mut rest = pattern;
        while let Some(start) = rest.find(['{', '}']) {
            out.push_str(&rest[..start]);
            let brace = &rest[start..=start];
            rest = &rest[start + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                out.push_str(brace);
                rest = after;
            } else if brace == "}" {
                return Err(fail("Single '}' encountered in format string"));
            } else {
                let end = closing_brace(rest).ok_or_else(|| fail("expected '}' before end of string"))?;
                let text = self.replace(&rest[..end], depth)?;
                charge(text.len())?;
                out.push_str(&text);
                rest = &rest[end + 1..];
            }
        }
        Ok(out + rest)
    }

    /// `name!conversion:format`.
    fn replace(&mut self, field: &str, depth: usize) -> Result<String> {
        let deeper = depth.checked_sub(1).ok_or_else(|| fail("Max string recursion exceeded"))?;
        let name_end = field.find(['!', ':']).unwrap_or(field.len());
        let value = self.value(&field[..name_end])?;
        let (conversion, spec) = match field[name_end..].strip_prefix('!') {
            Some(rest) => match rest.split_once(':') {
                Some((conversion, spec)) => (conversion, spec),
                None => (rest, ""),
            },
            None => ("", field[name_end..].strip_prefix(':').unwrap_or("")),
        };
        let value = match conversion {
            "" => value,
            "r" => Value::from(repr(&value)),
            "s" => Value::from(to_str(&value)),
            "a" => Value::from(ascii(&value)),
            other => return Err(fail(format!("Unknown conversion specifier '{other}'"))),
        };
        let spec = self.write(spec, deeper)?;
        if spec.is_empty() { Ok(to_str(&value)) } else { Spec::parse(&spec)?.write(&value) }
    }

    /// `name.attribute[key]`.
    fn value(&mut self, name: &str) -> Result<Value> {
        let end = name.find(['.', '[']).unwrap_or(name.len());
        let missing = || fail(format!("no argument for the field '{name}'"));
        let mut value = match (&name[..end], name[..end].parse::<usize>()) {
            ("", _) => {
                self.next += 1;
                self.positional.get(self.next - 1).cloned().ok_or_else(missing)?
            }
            (_, Ok(index)) => self.positional.get(index).cloned().ok_or_else(missing)?,
            (key, Err(_)) => (self.keyword)(key).ok_or_else(missing)?,
        };
        let mut rest = &name[end..];
        while !rest.is_empty() {
            let (key, after) = match rest.strip_prefix('[') {
                Some(inner) => inner.split_once(']').ok_or_else(|| fail("Missing ']' in format string"))?,
                None => {
                    let inner = &rest[1..];
                    inner.split_at(inner.find(['.', '[']).unwrap_or(inner.len()))
                }
            };
            let key = key.parse::<usize>().map_or_else(|_| Value::from(key), Value::from);
            value = Some(value.get_item(&key)?).filter(|value| !value.is_undefined()).ok_or_else(missing)?;
            rest = after;
        }
        Ok(value)
    }
}

fn closing_brace(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}
