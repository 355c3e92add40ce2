//! Command-line flags of declared parameters.
//!
//! Owns: how a value is written on a command line, and that texts may stand in files instead. Does not know: what any
//! parameter means.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser as _, ValueParser};
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Args, Command, FromArgMatches, value_parser};
use tale_models::diffusion::options_over;
use tale_models::diffusion::parameters::{PARAMETERS, PARTIAL_IMAGES, PROMPT};
use tale_models::lora::LoraOption;
use tale_models::parameter::{Declaration, Kind, Options, Task, Value};
use tale_models::text_parameters::{CACHE_SALT, TEXT_PARAMETERS};

use super::CliError;
use super::prompt::{self, Source};
use crate::parameters::{is_image, set_images};

/// The group of arguments that say what to show.
pub const SUBJECT: &str = "subject";

/// At least one of them is needed.
pub fn subject() -> ArgGroup {
    ArgGroup::new(SUBJECT).required(true).multiple(true)
}

/// What a command makes.
pub trait Makes {
    /// As the declarations of parameters have it.
    const TASK: Task;
    /// What the help puts the flags under.
    const HEADING: &'static str;

    /// The declarations among which are those for the task.
    fn parameters() -> &'static [&'static Declaration];
}

/// Text.
#[derive(Debug)]
pub struct Text;

impl Makes for Text {
    const TASK: Task = Task::Completion;
    const HEADING: &'static str = "Sampling";

    fn parameters() -> &'static [&'static Declaration] {
        TEXT_PARAMETERS
    }
}

/// Images, also from images.
#[derive(Debug)]
pub struct Images;

impl Makes for Images {
    const TASK: Task = Task::ImageEdit;
    const HEADING: &'static str = "Generation";

    fn parameters() -> &'static [&'static Declaration] {
        &PARAMETERS
    }
}

/// Videos.
#[derive(Debug)]
pub struct Videos;

impl Makes for Videos {
    const TASK: Task = Task::Video;
    const HEADING: &'static str = "Generation";

    fn parameters() -> &'static [&'static Declaration] {
        &PARAMETERS
    }
}

/// One flag for each parameter; absent ones take the model's own defaults.
#[derive(Debug)]
pub struct ParameterArgs<M> {
    options: Options,
    /// Parameters that are to take the model's own default, whatever other options say.
    cleared: Vec<&'static Declaration>,
    files: Vec<(&'static Declaration, Vec<PathBuf>)>,
    texts: Vec<(&'static Declaration, Source)>,
    makes: PhantomData<M>,
}

impl<M: Makes> ParameterArgs<M> {
    /// What was said, and `base` for the rest. Reads and decodes the image files.
    pub fn options_over(self, mut base: Options) -> Result<Options, CliError> {
        let mut options = self.options;
        for (declaration, paths) in self.files {
            let read =
                |path: &PathBuf| std::fs::read(path).map_err(|source| CliError::File { path: path.into(), source });
            let files = paths.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            set_images(&mut options, declaration, &files, &mut |_| true).map_err(|(number, error)| {
                let path = paths[number].display();
                CliError::Argument(format!("--{}: {path} {error}", declaration.flag()))
            })?;
        }
        if self.texts.iter().filter(|(_, source)| *source == Source::Stdin).count() > 1 {
            return Err(CliError::Argument("-: standard input holds one text only".into()));
        }
        for (declaration, source) in self.texts {
            let flag = match source {
                Source::Stdin => format!("--{}", declaration.flag()),
                Source::File(_) => format!("--{}-file", declaration.flag()),
            };
            options.insert(declaration, Value::Text(source.read(&flag)?));
        }
        self.cleared.iter().for_each(|declaration| base.remove(declaration));
        Ok(options_over(options, base))
    }
}

/// What has no flag: nobody would see previews, and a command makes one request, before which there was none.
static WITHOUT_FLAG: [&Declaration; 2] = [&PARTIAL_IMAGES.declaration, &CACHE_SALT.declaration];

/// The parameters that a command has flags for.
fn declarations<M: Makes>() -> impl Iterator<Item = &'static Declaration> {
    let has_flag = |declaration: &&Declaration| declaration.is_for(M::TASK) && !WITHOUT_FLAG.contains(declaration);
    M::parameters().iter().copied().filter(has_flag)
}

impl<M: Makes> Args for ParameterArgs<M> {
    fn augment_args(command: Command) -> Command {
        let command = command.next_help_heading(M::HEADING);
        declarations::<M>().fold(command, |command, declaration| {
            let command = command.arg(flag(declaration));
            if is_text(declaration) { command.arg(text_file_flag(declaration)) } else { command }
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// What a flag says.
#[derive(Debug, Clone)]
enum Said {
    Value(Value),
    /// The model's own default.
    Auto,
}

impl<M: Makes> FromArgMatches for ParameterArgs<M> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found = Self {
            options: Options::default(),
            cleared: Vec::new(),
            files: Vec::new(),
            texts: Vec::new(),
            makes: PhantomData,
        };
        for declaration in declarations::<M>() {
            found.take(declaration, matches);
        }
        Ok(found)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<M: Makes> ParameterArgs<M> {
    fn take(&mut self, declaration: &'static Declaration, matches: &ArgMatches) {
        let id = id(declaration);
        let id = id.as_str();
        if is_image(declaration) {
            let paths: Vec<PathBuf> = matches.get_many(id).into_iter().flatten().cloned().collect();
            if !paths.is_empty() {
                self.files.push((declaration, paths));
            }
            return;
        }
        if is_text(declaration)
            && let Some(path) = matches.get_one::<PathBuf>(&text_file_id(declaration))
        {
            self.texts.push((declaration, Source::File(path.clone())));
        }
        let mut loras = Vec::new();
        let mut strings = Vec::new();
        for said in matches.get_many::<Said>(id).into_iter().flatten() {
            match said {
                Said::Value(Value::Loras(one)) => loras.extend(one.iter().cloned()),
                Said::Value(Value::Strings(one)) => strings.extend(one.iter().cloned()),
                Said::Value(Value::Text(text)) if is_text(declaration) && text == prompt::STDIN => {
                    self.texts.push((declaration, Source::Stdin));
                }
                Said::Value(value) => self.options.insert(declaration, value.clone()),
                Said::Auto => self.cleared.push(declaration),
            }
        }
        if !loras.is_empty() {
            self.options.insert(declaration, Value::Loras(loras));
        }
        if !strings.is_empty() {
            self.options.insert(declaration, Value::Strings(strings));
        }
    }
}

/// What clap calls the argument; a command's own arguments may have a parameter's name.
fn id(declaration: &Declaration) -> String {
    format!("parameter:{}", declaration.name)
}

/// Whether its values are what people write: those may stand in a file.
fn is_text(declaration: &Declaration) -> bool {
    matches!(declaration.kind, Kind::Text { .. })
}

fn text_file_id(declaration: &Declaration) -> String {
    format!("file:{}", declaration.name)
}

fn text_file_flag(declaration: &'static Declaration) -> Arg {
    let name = declaration.flag();
    let arg = Arg::new(text_file_id(declaration)).long(format!("{name}-file")).value_name("FILE");
    let arg = arg.help(format!("A file with the text of --{name}")).value_parser(value_parser!(PathBuf));
    in_subject(arg.conflicts_with(id(declaration)), declaration)
}

/// A prompt, wherever it stands, says what to show.
fn in_subject(arg: Arg, declaration: &Declaration) -> Arg {
    if declaration.name == PROMPT.declaration.name { arg.group(SUBJECT) } else { arg }
}

fn flag(declaration: &'static Declaration) -> Arg {
    let is_repeated = matches!(declaration.kind, Kind::Images { .. } | Kind::Loras | Kind::Strings { .. });
    let doc = declaration.doc.trim_end_matches('.');
    let help = match is_repeated {
        true => format!("{doc}; may be given several times"),
        false if is_text(declaration) => format!("{doc}; - reads it from standard input"),
        false => doc.to_owned(),
    };
    let arg = Arg::new(id(declaration)).long(declaration.flag()).value_name(value_name(declaration.kind)).help(help);
    let arg = arg.value_parser(parser(declaration)).action(match is_repeated {
        true => ArgAction::Append,
        false => ArgAction::Set,
    });
    let arg = match declaration.kind {
        // A switch, which says that it is so.
        Kind::Flag => arg.num_args(0).default_missing_value("true"),
        // A number below 0 is for the declaration to refuse.
        _ => arg.allow_negative_numbers(true),
    };
    in_subject(arg, declaration)
}

fn value_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Text { .. } | Kind::Strings { .. } => "TEXT",
        Kind::Flag | Kind::FlagOrAuto | Kind::Choice(_) => "HOW",
        Kind::Name(_) => "NAME",
        Kind::Integer { .. } | Kind::Seed => "N",
        Kind::Number { .. } | Kind::NumberAbove { .. } => "X",
        Kind::Seconds => "SECONDS",
        Kind::Interval => "START,END",
        Kind::Numbers { .. } => "X,X,...",
        Kind::Tokens { .. } => "ID,ID,...",
        Kind::Biases { .. } => "ID:X,ID:X,...",
        Kind::Loras => "NAME[:WEIGHT]",
        Kind::Image | Kind::Images { .. } | Kind::Mask => "FILE",
    }
}

fn parser(declaration: &'static Declaration) -> ValueParser {
    let words = match declaration.kind {
        Kind::Choice(words) => words,
        Kind::FlagOrAuto => &["auto", "true", "false"],
        _ if is_image(declaration) => return value_parser!(PathBuf),
        _ => return ValueParser::from(move |text: &str| parse(declaration, text)),
    };
    PossibleValuesParser::new(words).try_map(move |word| parse(declaration, &word)).into()
}

/// Reads the text of one flag. Bounds are for the model to check, which has narrower ones.
fn parse(declaration: &Declaration, text: &str) -> Result<Said, String> {
    let value = match declaration.kind {
        Kind::Flag | Kind::FlagOrAuto if text == "auto" => return Ok(Said::Auto),
        Kind::Flag | Kind::FlagOrAuto => Value::Flag(text == "true"),
        Kind::Integer { min, max: u64::MAX } => {
            Value::Integer(text.parse().map_err(|_| format!("expected a whole number, {min} or more"))?)
        }
        Kind::Integer { min, max } => {
            Value::Integer(text.parse().map_err(|_| format!("expected a whole number from {min} to {max}"))?)
        }
        Kind::Seed => Value::Integer(seed(text).ok_or("expected a whole number of 64 bits")?),
        Kind::Number { .. } | Kind::NumberAbove { .. } | Kind::Seconds => {
            Value::Number(text.parse().map_err(|_| "expected a number")?)
        }
        Kind::Interval => Value::Interval(interval(text).ok_or("expected two numbers, such as 0,0.4")?),
        Kind::Numbers { .. } => Value::Numbers(numbers(text).ok_or("expected numbers, such as 1,0.75,0.5")?),
        Kind::Strings { .. } => Value::Strings(vec![text.to_owned()]),
        Kind::Tokens { .. } => Value::Tokens(tokens(text).ok_or("expected token ids, such as 0,17")?),
        Kind::Biases { .. } => {
            Value::Biases(biases(text).ok_or("expected numbers by token id, such as 17:-100,0:2.5")?)
        }
        Kind::Loras => Value::Loras(vec![lora(text)?]),
        _ => Value::Text(text.to_owned()),
    };
    Ok(Said::Value(value))
}

/// With or without a sign, as `torch.manual_seed` takes it.
fn seed(text: &str) -> Option<u64> {
    text.parse::<u64>().ok().or_else(|| text.parse::<i64>().ok().map(i64::cast_unsigned))
}

fn interval(text: &str) -> Option<[f64; 2]> {
    let (start, end) = text.split_once(',')?;
    Some([start.trim().parse().ok()?, end.trim().parse().ok()?])
}

fn numbers(text: &str) -> Option<Vec<f64>> {
    text.split(',').map(|number| number.trim().parse().ok()).collect()
}

fn tokens(text: &str) -> Option<Vec<u32>> {
    text.split(',').map(|token| token.trim().parse().ok()).collect()
}

/// Of a token that is said twice the last one counts.
fn biases(text: &str) -> Option<Vec<(u32, f64)>> {
    let bias = |said: &str| {
        let (token, bias) = said.split_once(':')?;
        Some((token.trim().parse().ok()?, bias.trim().parse().ok()?))
    };
    let biases: Option<BTreeMap<u32, f64>> = text.split(',').map(bias).collect();
    Some(biases?.into_iter().collect())
}

/// `NAME`, or `NAME:WEIGHT`.
fn lora(text: &str) -> Result<LoraOption, String> {
    let (name, weight) = text.rsplit_once(':').unwrap_or((text, "1"));
    let weight =
        weight.parse().map_err(|_| format!("`{weight}` is not a weight; expected NAME:WEIGHT, such as sketch:0.8"))?;
    if name.is_empty() {
        return Err("the name is empty; expected NAME:WEIGHT, such as sketch:0.8".to_owned());
    }
    Ok(LoraOption { name: name.to_owned(), weight })
}
