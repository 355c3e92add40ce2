//! The tables of fields in `docs/http-api.md`, made from the declarations.

use std::fmt::Write as _;
use std::path::Path;

use tale_models::parameter::{Declaration, Kind, Task};

use super::fields;

/// The document is written anew where this environment variable is set.
const WRITE: &str = "TALE_WRITE_DOCS";

const TEXT: &[(Task, &str)] =
    &[(Task::Chat, "chats"), (Task::Completion, "completions"), (Task::Response, "responses")];
const IMAGES_AND_VIDEOS: &[(Task, &str)] =
    &[(Task::ImageGeneration, "images"), (Task::ImageEdit, "edits"), (Task::Video, "videos")];

/// A row for each declaration of `tasks`.
fn table(tasks: &[(Task, &str)]) -> String {
    let mut declarations: Vec<&Declaration> = Vec::new();
    for declaration in tasks.iter().flat_map(|(task, _)| fields(*task)) {
        if !declarations.iter().any(|known| std::ptr::eq(*known, declaration)) {
            declarations.push(declaration);
        }
    }
    let mut table = "| field | values | of | |\n|---|---|---|---|\n".to_owned();
    for declaration in declarations {
        let has = |task: Task| fields(task).into_iter().any(|field| std::ptr::eq(field, declaration));
        let of: Vec<&str> = tasks.iter().filter(|(task, _)| has(*task)).map(|(_, name)| *name).collect();
        let of = if of.len() == tasks.len() { "all".to_owned() } else { of.join(", ") };
        let Declaration { name, doc, kind, is_required, .. } = declaration;
        let required = if *is_required { " (required)" } else { "" };
        writeln!(table, "| `{name}`{required} | {} | {of} | {doc} |", values(*kind)).expect("into memory");
    }
    table
}

fn values(kind: Kind) -> String {
    match kind {
        Kind::Text { max_bytes } => format!("text of at most {max_bytes} bytes"),
        Kind::Flag => "true, false".to_owned(),
        Kind::FlagOrAuto => "true, false, `auto`".to_owned(),
        Kind::Integer { min, max: u64::MAX } => format!("whole number, {min} or more"),
        Kind::Integer { min, max } => format!("whole number, {min} to {max}"),
        Kind::Seed => "whole number of 64 bits; one below 0 is the one with the same bits".to_owned(),
        Kind::Number { min, max } => format!("number, {min} to {max}"),
        Kind::NumberAbove { min, max } => format!("number, above {min}, at most {max}"),
        Kind::Seconds => "number above 0, also as text".to_owned(),
        Kind::Interval => "`[start, end]` with `0 <= start < end <= 1`".to_owned(),
        Kind::Numbers { max_len, min, max } => format!("list of 1 to {max_len} numbers, {min} to {max}"),
        Kind::Choice(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        Kind::Name(_) => "name".to_owned(),
        Kind::Strings { max, max_bytes, max_total_bytes } => {
            let bytes = format!("at most {max_bytes} bytes each, {max_total_bytes} in all");
            format!("text, or a list of at most {max}, none empty, {bytes}")
        }
        Kind::Tokens { max } => format!("list of at most {max} token ids"),
        Kind::Biases { max_len, min, max } => {
            format!("object of at most {max_len} numbers by token id, {min} to {max}")
        }
        Kind::Loras => "list of `{\"name\", \"weight\"}`".to_owned(),
        Kind::Image | Kind::Mask => "image file".to_owned(),
        Kind::Images { max } => format!("1 to {max} image files"),
    }
}

/// `document` with `table` between the two comments that name it.
fn with_table(document: &str, name: &str, table: &str) -> String {
    let begin = format!("<!-- table of {name} -->\n");
    let end = "<!-- end of table -->";
    let (before, rest) = document.split_once(&begin).unwrap_or_else(|| panic!("there is no {begin}"));
    let (_, after) = rest.split_once(end).expect("a table ends");
    format!("{before}{begin}\n{table}\n{end}{after}")
}

#[test]
fn the_documented_tables_are_those_of_the_declarations() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/http-api.md");
    let found = std::fs::read_to_string(&path).expect("docs/http-api.md is there");
    let expected = with_table(&found, "the fields of text", &table(TEXT));
    let expected = with_table(&expected, "the fields of images and videos", &table(IMAGES_AND_VIDEOS));
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, expected).expect("docs/http-api.md can be written");
        return;
    }
    for line in expected.lines() {
        assert!(found.contains(line), "docs/http-api.md lacks a row; run this test with {WRITE}=1, which adds\n{line}");
    }
    assert_eq!(found, expected, "docs/http-api.md: run this test with {WRITE}=1, which removes what is not declared");
}
