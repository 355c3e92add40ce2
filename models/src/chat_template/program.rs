//! From the source of a template to instructions that compute as Python does, and what it asks for that is not there.
//!
//! Owns: Jinja2's rules for source text, operators whose meaning differs in minijinja, where values come to be kept, and the
//! check of every name that a template mentions. Parsing and execution are minijinja's; its machinery is public and not
//! promised to stay, so that the version is pinned. Deliberately does not know: messages, files, threads. Whoever calls it
//! does so on a thread of [`threads`](super::threads).

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use minijinja::machinery::{
    self, CompiledTemplate, Instruction, Instructions, TemplateConfig, Token, make_string_output,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, State, UndefinedBehavior};

use super::budget;
use super::python::Given;
use super::{filters, globals, kept, nesting, operators, python, weight};

/// What one rendering may execute, in instructions; a long conversation needs some hundred thousand. 64 bytes that
/// minijinja's operators and filters make or read, and two items, cost as much as an instruction, so that they make 256 MiB
/// at most.
const MAX_FUEL: u64 = 4_000_000;
/// The same for a rendering that must not take long: a short conversation needs some hundred, and so many take a fraction
/// of a millisecond, whatever they do.
const LITTLE_FUEL: u64 = 1_000;
/// How deep macros and loops of such a rendering may call themselves: a stack of usual size holds that.
const LITTLE_DEPTH: usize = 50;
/// What is said of a template that needs more.
pub(super) const OUT_OF_FUEL: &str = "it runs out of fuel: it executes or makes too much";
/// Longest source: the longest published ones have some 30 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Name of the one template.
const NAME: &str = "chat_template";
/// Filters under which operators are called; no template can name them.
const CONCAT: &str = "~";
const MODULO: &str = "%";
/// Filters through which values go before a variable or a namespace keeps them, and the method `changed` of loops, which
/// keep what they are given.
const KEEP: &str = "=";
const KEEP_IN_NAMESPACE: &str = ".=";
const CHANGED: &str = "changed()";
/// Filters for values that are compared, and for dictionaries, whose keys are.
const WEIGH: &str = "<>";
const DICTIONARY: &str = "{}";
/// Asks for no place in the cache of filters.
const UNCACHED: u8 = !0;

/// A template, and what it is rendered with.
#[derive(Debug)]
pub(super) struct Program {
    executable: Executable,
    environment: Environment<'static>,
    /// The same with [`LITTLE_FUEL`] and [`LITTLE_DEPTH`].
    frugal: Environment<'static>,
}

self_cell::self_cell!(
    /// The source of a template, normalised, and the instructions that borrow from it, as they are executed.
    struct Executable {
        owner: String,
        #[covariant]
        dependent: CompiledTemplate,
    }

    impl {Debug}
);

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
        environment.set_formatter(|out, _, value| match value.as_str().filter(|_| value.kind() == ValueKind::String) {
            Some(text) => Ok(out.write_str(text)?),
            None => {
                let text = python::to_str(value);
                budget::check()?;
                Ok(out.write_str(&text)?)
            }
        });
        environment.set_fuel(Some(MAX_FUEL));
        filters::add_to(&mut environment);
        globals::add_to(&mut environment);
        environment.add_filter(CONCAT, concat);
        environment.add_filter(MODULO, modulo);
        environment.add_filter(KEEP, kept::by_variable);
        environment.add_filter(KEEP_IN_NAMESPACE, kept::by_changeable);
        environment.add_filter(CHANGED, changed);
        environment.add_filter(WEIGH, weight::weighed);
        environment.add_filter(DICTIONARY, operators::dictionary);
        operators::add_to(&mut environment);
        if source.len() > MAX_SOURCE_BYTES {
            let problem = format!("it has {} bytes; at most {MAX_SOURCE_BYTES}", source.len());
            return Err(Error::new(minijinja::ErrorKind::SyntaxError, problem));
        }
        let source = normalised(source);
        nesting::check(&source, &syntax()?)?;
        let mut frugal = environment.clone();
        frugal.set_fuel(Some(LITTLE_FUEL));
        frugal.set_recursion_limit(LITTLE_DEPTH);
        let executable = Executable::try_new(with_python_literals(source)?, |source| executed(source))?;
        Ok(Self { executable, environment, frugal })
    }

    /// What the template would fail at, whatever the messages; in the order of lines.
    pub(super) fn unsupported(&self) -> Result<Vec<Unsupported>, Error> {
        let compiled = compiled(self.executable.borrow_owner())?;
        let mut found = Vec::new();
        for instructions in std::iter::once(&compiled.instructions).chain(compiled.blocks.values()) {
            found.extend(self.unsupported_in(instructions));
        }
        Ok(found)
    }

    /// Whether the template looks at a variable of this name.
    pub(super) fn is_variable(&self, name: &str) -> bool {
        let CompiledTemplate { instructions, blocks, .. } = self.executable.borrow_dependent();
        let looks = |instructions: &Instructions| {
            all(instructions).any(|(_, instruction)| matches!(instruction, Instruction::Lookup(of) if *of == name))
        };
        std::iter::once(instructions).chain(blocks.values()).any(looks)
    }

    /// The template's text with these variables.
    pub(super) fn render(&self, variables: Value) -> Result<String, Error> {
        self.render_in(&self.environment, variables)
    }

    /// As [`Program::render`], but out of fuel and depth sooner.
    pub(super) fn render_frugally(&self, variables: Value) -> Result<String, Error> {
        self.render_in(&self.frugal, variables)
    }

    fn render_in(&self, environment: &Environment, variables: Value) -> Result<String, Error> {
        let mut text = String::new();
        let mut out = make_string_output(&mut text);
        let CompiledTemplate { instructions, blocks, .. } = self.executable.borrow_dependent();
        machinery::eval(environment, instructions, variables, blocks, &mut out, AutoEscape::None)?;
        drop(out);
        budget::check()?;
        Ok(text)
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

fn compiled(source: &str) -> Result<CompiledTemplate<'_>, Error> {
    let config = TemplateConfig { syntax_config: syntax()?, default_auto_escape: Arc::new(|_| AutoEscape::None) };
    CompiledTemplate::new(NAME, source, &config)
}

/// The template as it is executed.
fn executed(source: &str) -> Result<CompiledTemplate<'_>, Error> {
    let mut compiled = compiled(source)?;
    for instructions in std::iter::once(&mut compiled.instructions).chain(compiled.blocks.values_mut()) {
        *instructions = rewritten(instructions, source);
    }
    Ok(compiled)
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

fn concat(left: &Value, right: &Value) -> Result<String, Error> {
    let text = python::to_str(left) + &python::to_str(right);
    budget::check()?;
    Ok(text)
}

fn modulo(left: &Value, right: &Value) -> Result<Value, Error> {
    let result = python::modulo(left, right)?;
    budget::check()?;
    Ok(result)
}

/// The method `changed` of what comes first, with the other values.
fn changed(state: &mut State, given: Given) -> Result<Value, Error> {
    let mut values = python::values(given);
    for value in values.iter_mut().skip(1) {
        *value = kept::by_changeable(value)?;
    }
    match &values[..] {
        [value, arguments @ ..] => value.call_method(state, "changed", arguments),
        [] => Err(python::fail("changed() is a method")),
    }
}

/// The instructions as they are executed: two operators and a method are calls of filters, which take the same values from
/// the stack and leave one result there, and what is kept goes through a filter first.
fn rewritten<'s>(instructions: &Instructions<'s>, source: &'s str) -> Instructions<'s> {
    let mut sequences = Vec::new();
    let mut places = Vec::new();
    let mut place = 0;
    let mut last = None;
    for (pc, instruction) in all(instructions) {
        let sequence = replacement(instruction, last);
        places.push(place);
        place += sequence.len() as u32;
        sequences.push((instructions.get_line(pc), sequence));
        last = Some(instruction);
    }
    // Jumps may lead behind the last instruction.
    places.push(place);
    let moved = |target: u32| places.get(target as usize).copied().unwrap_or(target);
    let mut out = Instructions::new(instructions.name(), source);
    for (line, sequence) in sequences {
        for instruction in sequence {
            let instruction = with_target(instruction, moved);
            match line {
                Some(line) => out.add_with_line(instruction, u16::try_from(line).unwrap_or(u16::MAX)),
                None => out.add(instruction),
            };
        }
    }
    out
}

/// What is executed in place of one instruction, which comes behind another.
fn replacement<'s>(instruction: &Instruction<'s>, last: Option<&Instruction<'s>>) -> Vec<Instruction<'s>> {
    let filter = |name, arguments| Instruction::ApplyFilter(name, arguments, UNCACHED);
    match instruction {
        Instruction::StringConcat => vec![filter(CONCAT, Some(2))],
        Instruction::Rem => vec![filter(MODULO, Some(2))],
        Instruction::CallMethod("changed", arguments) => vec![filter(CHANGED, *arguments)],
        // Items of a list are less deep than the list.
        Instruction::StoreLocal(_) if matches!(last, Some(Instruction::Iterate(_))) => vec![instruction.clone()],
        Instruction::StoreLocal(_) => vec![filter(KEEP, Some(1)), instruction.clone()],
        // The namespace lies above the value.
        Instruction::SetAttr(_) => {
            vec![Instruction::Swap, filter(KEEP_IN_NAMESPACE, Some(1)), Instruction::Swap, instruction.clone()]
        }
        // The key lies on top.
        Instruction::GetItem => vec![filter(WEIGH, Some(1)), instruction.clone()],
        Instruction::Eq
        | Instruction::Ne
        | Instruction::Lt
        | Instruction::Lte
        | Instruction::Gt
        | Instruction::Gte
        | Instruction::In
        | Instruction::CompareAndPreserve(_) => {
            let weigh = || filter(WEIGH, Some(1));
            vec![weigh(), Instruction::Swap, weigh(), Instruction::Swap, instruction.clone()]
        }
        Instruction::BuildMap(entries) if *entries > 0 => match u16::try_from(2 * entries) {
            Ok(values) => vec![filter(DICTIONARY, Some(values))],
            // More than a tag of allowed length can have with keys that are not simple.
            Err(_) => vec![instruction.clone()],
        },
        _ => vec![instruction.clone()],
    }
}

fn with_target<'s>(instruction: Instruction<'s>, moved: impl Fn(u32) -> u32) -> Instruction<'s> {
    match instruction {
        Instruction::Iterate(target) => Instruction::Iterate(moved(target)),
        Instruction::Jump(target) => Instruction::Jump(moved(target)),
        Instruction::JumpIfFalse(target) => Instruction::JumpIfFalse(moved(target)),
        Instruction::JumpIfFalseOrPop(target) => Instruction::JumpIfFalseOrPop(moved(target)),
        Instruction::JumpIfTrueOrPop(target) => Instruction::JumpIfTrueOrPop(moved(target)),
        Instruction::BuildMacro(name, start, flags) => Instruction::BuildMacro(name, moved(start), flags),
        other => other,
    }
}

/// The options with which transformers makes its environment. The last line end has gone before.
fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build()
}

/// Literals that minijinja reads or writes differently. Numbers that Python writes with an exponent become calls of a
/// filter: minijinja joins constants with `~` as it compiles, and would write them in its own way.
fn with_python_literals(source: String) -> Result<String, Error> {
    let mut out = String::with_capacity(source.len());
    let mut copied = 0;
    for token in machinery::tokenize(&source, false, syntax()?) {
        // What is no token fails when the template is parsed, with the name of the template.
        let Ok((token, span)) = token else { break };
        let place = span.start_offset as usize..span.end_offset as usize;
        let text = &source[place.clone()];
        let replacement = match token {
            Token::Float(number) if python::text::repr_float(number).contains('e') => format!("({text}|float)"),
            Token::String(_) => with_python_escapes(text),
            _ => continue,
        };
        out.push_str(&source[copied..place.start]);
        out.push_str(&replacement);
        copied = place.end;
    }
    Ok(out + &source[copied..])
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
