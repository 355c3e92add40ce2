//! From the source of a template to instructions that compute as Python does, and what it asks for that is not there.
//!
//! Owns: Jinja2's rules for source text, operators whose meaning differs in minijinja, and the check of every name that a
//! template mentions. Parsing and execution are minijinja's; its machinery is public and not promised to stay, so that
//! the version is pinned. Deliberately does not know: messages, files.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use minijinja::machinery::{
    self, CompiledTemplate, Instruction, Instructions, TemplateConfig, Token, make_string_output,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, UndefinedBehavior};

use super::{filters, globals, python};

/// Instructions that one rendering may execute; a long conversation needs some hundred thousand.
const MAX_FUEL: u64 = 50_000_000;
/// Name of the one template.
const NAME: &str = "chat_template";
/// Filters under which operators are called; no template can name them.
const CONCAT: &str = "~";
const MODULO: &str = "%";

/// The source of a template, normalised, and what it is rendered with.
#[derive(Debug)]
pub(super) struct Program {
    source: String,
    environment: Environment<'static>,
}

/// Something that a template uses and that is not there.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unsupported {
    line: usize,
    feature: String,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.feature)
    }
}

impl Program {
    /// Fails where the source does not parse.
    pub(super) fn new(source: &str) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(python::methods::call);
        environment.set_formatter(|out, _, value| Ok(out.write_str(&python::to_str(value))?));
        environment.set_fuel(Some(MAX_FUEL));
        filters::add_to(&mut environment);
        globals::add_to(&mut environment);
        environment.add_filter(CONCAT, |left: &Value, right: &Value| python::to_str(left) + &python::to_str(right));
        environment.add_filter(MODULO, python::modulo);
        let program = Self { source: with_python_literals(normalised(source))?, environment };
        program.compile()?;
        Ok(program)
    }

    /// What the template would fail at, whatever the messages; in the order of lines.
    pub(super) fn unsupported(&self) -> Result<Vec<Unsupported>, Error> {
        let compiled = self.compile()?;
        let mut found = Vec::new();
        for instructions in std::iter::once(&compiled.instructions).chain(compiled.blocks.values()) {
            found.extend(self.unsupported_in(instructions));
        }
        Ok(found)
    }

    /// The template's text with these variables.
    pub(super) fn render(&self, variables: Value) -> Result<String, Error> {
        let mut compiled = self.compile()?;
        for instructions in std::iter::once(&mut compiled.instructions).chain(compiled.blocks.values_mut()) {
            replace_operators(instructions);
        }
        let mut text = String::new();
        let mut out = make_string_output(&mut text);
        let CompiledTemplate { instructions, blocks, .. } = &compiled;
        machinery::eval(&self.environment, instructions, variables, blocks, &mut out, AutoEscape::None)?;
        drop(out);
        Ok(text)
    }

    /// Instructions borrow from the source, so they are made for every rendering: a fraction of a millisecond.
    fn compile(&self) -> Result<CompiledTemplate<'_>, Error> {
        let config = TemplateConfig { syntax_config: syntax()?, default_auto_escape: Arc::new(|_| AutoEscape::None) };
        CompiledTemplate::new(NAME, &self.source, &config)
    }

    fn unsupported_in(&self, instructions: &Instructions) -> Vec<Unsupported> {
        let own = own_names(instructions);
        let is_function =
            |name: &str| own.contains(name) || self.environment.globals().any(|(global, _)| global == name);
        let mut found = Vec::new();
        for (pc, instruction) in all(instructions) {
            let feature = match instruction {
                Instruction::ApplyFilter(name, ..) if !filters::is_filter(name) => format!("the filter `{name}`"),
                Instruction::PerformTest(name, ..) if !filters::is_test(name) => format!("the test `{name}`"),
                Instruction::CallMethod(name, _) if !python::methods::is_known(name) && !own.contains(name) => {
                    format!("the method `{name}`")
                }
                Instruction::CallFunction(name, _) if !is_function(name) => format!("the function `{name}`"),
                Instruction::Lookup(name @ ("varargs" | "kwargs" | "self" | "lipsum")) if !own.contains(name) => {
                    format!("the variable `{name}`")
                }
                Instruction::BuildMacro(name, start, _) if a_default_names_a_parameter(instructions, pc, *start) => {
                    format!("a default of the macro `{name}` that names another parameter")
                }
                Instruction::PushAutoEscape => "the tag `autoescape`".to_owned(),
                Instruction::Include(_) | Instruction::LoadBlocks | Instruction::ExportLocals => {
                    "another template (include, import or extends)".to_owned()
                }
                _ => continue,
            };
            found.push(Unsupported { line: instructions.get_line(pc).unwrap_or(1), feature });
        }
        found
    }
}

fn all<'a, 's>(instructions: &'a Instructions<'s>) -> impl Iterator<Item = (u32, &'a Instruction<'s>)> {
    (0..).map_while(|pc| Some((pc, instructions.get(pc)?)))
}

/// Names that a template may call though nobody else defines them: what it assigns, and what it asks about with
/// `is defined`.
fn own_names<'s>(instructions: &Instructions<'s>) -> BTreeSet<&'s str> {
    let mut names = BTreeSet::from(["caller", "loop"]);
    let mut looked_up = None;
    for (_, instruction) in all(instructions) {
        match instruction {
            Instruction::StoreLocal(name) | Instruction::SetAttr(name) => drop(names.insert(name)),
            Instruction::PerformTest("defined" | "undefined", ..) => names.extend(looked_up),
            _ => {}
        }
        looked_up = match instruction {
            Instruction::Lookup(name) => Some(*name),
            _ => None,
        };
    }
    names
}

/// Whether the macro that is made at `made_at` and begins at `start` has such a default: minijinja sets parameters from
/// the last to the first, so that it would be undefined.
fn a_default_names_a_parameter(instructions: &Instructions, made_at: u32, start: u32) -> bool {
    let Some(Instruction::LoadConst(parameters)) = instructions.get(made_at - 1) else { return false };
    let parameters: Vec<Value> = parameters.try_iter().into_iter().flatten().collect();
    let mut unset = parameters.len();
    for (_, instruction) in all(instructions).skip(start as usize) {
        match instruction {
            _ if unset == 0 => break,
            Instruction::StoreLocal(_) => unset -= 1,
            Instruction::Lookup(name) if parameters.contains(&Value::from(*name)) => return true,
            _ => {}
        }
    }
    false
}

/// Two operators are calls of filters, which take the same values from the stack and leave one result there.
fn replace_operators(instructions: &mut Instructions) {
    /// Asks for no place in the cache of filters.
    const UNCACHED: u8 = !0;
    let mut pc = 0;
    while let Some(instruction) = instructions.get_mut(pc) {
        match instruction {
            Instruction::StringConcat => *instruction = Instruction::ApplyFilter(CONCAT, Some(2), UNCACHED),
            Instruction::Rem => *instruction = Instruction::ApplyFilter(MODULO, Some(2), UNCACHED),
            _ => {}
        }
        pc += 1;
    }
}

/// The options with which transformers makes its environment. The last line end has gone before.
fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build()
}

/// Literals that minijinja reads or writes differently. Numbers that Python writes with an exponent become calls of a
/// filter: minijinja joins constants with `~` as it compiles, and would write them in its own way.
fn with_python_literals(source: String) -> Result<String, Error> {
    let mut replacements = Vec::new();
    for token in machinery::tokenize(&source, false, syntax()?) {
        // What is no token fails when the template is parsed, with the name of the template.
        let Ok((token, span)) = token else { break };
        let place = span.start_offset as usize..span.end_offset as usize;
        let text = &source[place.clone()];
        match token {
            Token::Float(number) if python::text::repr_float(number).contains('e') => {
                replacements.push((place, format!("({text}|float)")));
            }
            Token::String(_) => replacements.push((place, with_python_escapes(text))),
            _ => {}
        }
    }
    let mut out = source;
    for (place, replacement) in replacements.into_iter().rev() {
        out.replace_range(place, &replacement);
    }
    Ok(out)
}

/// A string literal whose escapes minijinja knows: it lacks two of Python's, and escaped line ends.
fn with_python_escapes(literal: &str) -> String {
    let mut out = String::new();
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '\\' { chars.next() } else { None }) {
            ('\\', Some('a')) => out.push_str("\\x07"),
            ('\\', Some('v')) => out.push_str("\\x0b"),
            ('\\', Some('\n')) => {}
            (c, escaped) => out.extend([Some(c), escaped].into_iter().flatten()),
        }
    }
    out
}

/// The source as minijinja has to read it for what Jinja2 would read: one kind of line ends, no last one, and tags that
/// minijinja does not know or reads differently.
fn normalised(source: &str) -> String {
    let lines = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut rest = lines.strip_suffix('\n').unwrap_or(&lines);
    let mut out = String::with_capacity(rest.len());
    while let Some(start) = rest.find("{").filter(|start| start + 1 < rest.len()) {
        let len = match &rest.as_bytes()[start..start + 2] {
            b"{#" => rest[start..].find("#}").map_or(rest.len() - start, |end| end + 2),
            b"{{" => tag_len(&rest[start..], "}}"),
            b"{%" => tag_len(&rest[start..], "%}"),
            _ => 1,
        };
        let tag = &rest[start..start + len];
        out.push_str(&rest[..start]);
        rest = &rest[start + len..];
        match tag.strip_prefix("{%").map(|tag| tag.trim_end_matches("%}").trim_matches(['-', '+']).trim()) {
            // `{% generation %}` marks what the assistant said, for training; it is a scope of its own.
            Some("generation") => out.push_str(&tag.replacen("generation", "with", 1)),
            Some("endgeneration") => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            Some("raw") => {
                out.push_str(tag);
                // Jinja2 keeps a line end behind this tag.
                if rest.starts_with('\n') && !tag.ends_with("-%}") {
                    out.push('\n');
                }
                let end = rest.find("endraw").unwrap_or(rest.len());
                out.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            _ => out.push_str(tag),
        }
    }
    out + rest
}

/// Bytes of the tag at the start of `text` up to `end`, which may also stand in strings.
fn tag_len(text: &str, end: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if text[at..].starts_with(end) => return at + end.len(),
            None if matches!(c, '\'' | '"') => quote = Some(c),
            None => {}
        }
    }
    text.len()
}
