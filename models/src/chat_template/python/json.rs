//! `json.dumps`.

use minijinja::value::{Value, ValueKind};

use super::{Args, Result, fail, text};
use crate::chat_template::budget::{charge, charge_items};

/// The parameters of the filter `tojson` that transformers gives to templates.
pub const PARAMETERS: &[&str] = &["x", "ensure_ascii", "indent", "separators", "sort_keys"];
/// Deepest nesting that is written.
const MAX_DEPTH: usize = 200;

/// `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, nothing escaped for HTML.
pub fn dumps(args: &Args) -> Result<String> {
    let indent = match args.some(2) {
        Some(indent) if indent.as_str().is_some() => Some(text::to_str(indent)),
        _ => args.integer_or_none(2)?.map(|indent| " ".repeat(indent.clamp(0, 64) as usize)),
    };
    let (item, key) = match args.some(3) {
        Some(pair) => separators(pair)?,
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = Style { ensure_ascii: args.flag(1, false), indent, item, key, sort_keys: args.flag(4, false) };
    let mut out = String::new();
    style.write(&mut out, args.required(0)?, 0)?;
    Ok(out)
}

fn separators(pair: &Value) -> Result<(String, String)> {
    let both: Vec<String> = pair.try_iter()?.filter_map(|text| text.as_str().map(str::to_owned)).collect();
    match <[String; 2]>::try_from(both) {
        Ok([item, key]) => Ok((item, key)),
        Err(_) => Err(fail("tojson: separators are two strings")),
    }
}

/// How the parts of a text are written.
struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Style {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(fail(format!("tojson: nested deeper than {MAX_DEPTH}")));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.write_text(out, value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable if !text::has_own_repr(value) => self.write_list(out, value, depth)?,
            ValueKind::Map => self.write_map(out, value, depth)?,
            _ => {
                let found = super::type_name(value);
                return Err(fail(format!("tojson: Object of type {found} is not JSON serializable")));
            }
        }
        Ok(())
    }

    fn write_list(&self, out: &mut String, value: &Value, depth: usize) -> Result<()> {
        let mut items = Vec::new();
        for item in value.try_iter()? {
            charge_items(1)?;
            items.push(item);
        }
        self.write_all(out, ['[', ']'], depth, &items, |out, item| self.write(out, item, depth + 1))
    }

    fn write_map(&self, out: &mut String, value: &Value, depth: usize) -> Result<()> {
        let mut entries = Vec::new();
        for key in value.try_iter()? {
            charge_items(2)?;
            entries.push((key_text(&key)?, value.get_item(&key)?));
        }
        if self.sort_keys {
            entries.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.write_all(out, ['{', '}'], depth, &entries, |out, (key, item)| {
            self.write_text(out, key)?;
            charge(self.key.len())?;
            out.push_str(&self.key);
            self.write(out, item, depth + 1)
        })
    }

    /// Brackets around items, each on a line of its own where there is an indent.
    fn write_all<T>(
        &self,
        out: &mut String,
        brackets: [char; 2],
        depth: usize,
        items: &[T],
        mut write: impl FnMut(&mut String, &T) -> Result<()>,
    ) -> Result<()> {
        out.push(brackets[0]);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                charge(self.item.len())?;
                out.push_str(&self.item);
            }
            self.break_line(out, depth + 1)?;
            write(out, item)?;
        }
        if !items.is_empty() {
            self.break_line(out, depth)?;
        }
        out.push(brackets[1]);
        Ok(())
    }

    fn break_line(&self, out: &mut String, depth: usize) -> Result<()> {
        if let Some(indent) = &self.indent {
            charge(1 + indent.len() * depth)?;
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
        Ok(())
    }

    fn write_text(&self, out: &mut String, text: &str) -> Result<()> {
        charge(text.len())?;
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    let units =
                        c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect::<String>();
                    out.push_str(&units);
                }
                c => out.push(c),
            }
        }
        out.push('"');
        Ok(())
    }
}

/// Python writes numbers that JSON does not know under the names of JavaScript.
fn number(value: &Value) -> String {
    match text::repr(value).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        plain => plain.to_owned(),
    }
}

fn key_text(key: &Value) -> Result<String> {
    match key.kind() {
        ValueKind::String => Ok(text::to_str(key)),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key)),
        _ => Err(fail("tojson: keys must be str, int, float, bool or None")),
    }
}
