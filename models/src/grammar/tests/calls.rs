//! Answers with tools.

use serde_json::{Value, json};

use super::super::*;
use super::{Random, answer, asked, card};
use crate::tools::{CallReader, Calls, Otherwise, Said, Tool, ToolFormat};

fn tool(name: &str, parameters: Value) -> Tool {
    Tool { name: name.to_owned(), description: None, parameters, field: format!("tools.{name}") }
}

fn calls(format: ToolFormat, is_parallel: bool, otherwise: Otherwise) -> Calls {
    let properties =
        json!({"place": {"enum": ["here", "}\"{"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}});
    let arguments = json!({"type": "object", "properties": properties, "required": ["place", "days"], "additionalProperties": false});
    let empty = json!({"type": "object", "properties": {}, "additionalProperties": false});
    Calls { format, tools: vec![tool("weather", arguments), tool("time", empty)], is_parallel, otherwise }
}

/// Names and arguments of the calls of an answer, and its text.
fn read(format: ToolFormat, answer: &str) -> (Vec<(String, Value)>, String) {
    let mut reader = CallReader::new(format);
    let (mut calls, mut text): (Vec<(String, String)>, String) = Default::default();
    let mut said = reader.push(answer);
    said.extend(reader.finish());
    for said in said {
        match said {
            Said::Text(more) => text.push_str(&more),
            Said::Call(name) => calls.push((name, String::new())),
            Said::Arguments(more) => calls.last_mut().expect("a call").1.push_str(&more),
            Said::End => (),
        }
    }
    let parsed = calls.into_iter().map(|(name, arguments)| (name, serde_json::from_str(&arguments).expect("JSON")));
    (parsed.collect(), text)
}

#[test]
fn an_answer_that_must_call_has_calls_with_the_arguments_of_their_tools() {
    let card = card();
    for format in [ToolFormat::Hermes, ToolFormat::Llama3] {
        for is_parallel in [false, true] {
            let calls = calls(format, is_parallel, Otherwise::Nothing);
            let grammar = card.grammars.compile(asked(Form::Calls(calls))).expect("compiles");
            let mut most = 0;
            for seed in 0..30 {
                let answer = answer(&card, &grammar, &mut Random(seed), 3000).expect("ends");
                let (calls, text) = read(format, &answer);
                assert!(!calls.is_empty() && text.is_empty(), "{answer}");
                most = most.max(calls.len());
                for (name, arguments) in calls {
                    match name.as_str() {
                        "weather" => assert!(arguments["days"].as_u64().is_some_and(|days| days < 10), "{answer}"),
                        "time" => assert_eq!(arguments, json!({})),
                        other => panic!("{other}"),
                    }
                }
            }
            assert_eq!(most > 1, is_parallel, "{format:?}: {most} calls at most");
        }
    }
}

/// Whether an answer may begin with this text and end there.
fn may_be(grammar: &Grammar, card: &crate::TextCard, text: &str) -> (bool, bool) {
    let end = card.tokenizer.eos_token_id().expect("one");
    let mut matching = grammar.begin();
    for byte in text.bytes() {
        if !matching.mask().expect("goes on").allows(u32::from(byte)) {
            return (false, false);
        }
        if matching.accept(u32::from(byte)).expect("allowed") {
            return (true, true);
        }
    }
    (true, matching.mask().expect("goes on").allows(end))
}

/// Whether the answer is complete with the last byte of this call.
fn only_call_ends(grammar: &Grammar, call: &str) -> bool {
    let mut matching = grammar.begin();
    call.bytes().map(|byte| matching.accept(u32::from(byte)).expect("allowed")).last() == Some(true)
}

#[test]
fn text_is_free_until_a_call_begins() {
    let card = card();
    let compiled = |format, is_parallel| {
        card.grammars.compile(asked(Form::Calls(calls(format, is_parallel, Otherwise::Text)))).expect("compiles")
    };
    let hermes = compiled(ToolFormat::Hermes, true);
    let call = "<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>";
    for (text, expected) in [
        ("", (true, true)),
        ("I see: {\"name\": 1} <tool_cal", (true, true)),
        ("I see\n<tool_call>", (true, false)),
        ("<tool_call>x", (false, false)),
        ("<tool_call>\n{\"name\": \"tim", (true, false)),
        ("<tool_call>\n{\"name\": \"none", (false, false)),
        (call, (true, true)),
        (&format!("{call}\n{call}"), (true, true)),
        (&format!("{call} and text"), (true, true)),
    ] {
        assert_eq!(may_be(&hermes, &card, text), expected, "{text}");
    }
    let one = compiled(ToolFormat::Hermes, false);
    assert_eq!(may_be(&one, &card, call), (true, true));
    // Nothing follows the only call.
    assert!(only_call_ends(&one, call));
    let llama = compiled(ToolFormat::Llama3, true);
    let call = "{\"name\": \"time\", \"parameters\": {}}";
    for (text, expected) in [
        ("Some text {\"name\": 1}", (true, true)),
        ("{\"other\": 1}", (true, true)),
        ("{\"name\"", (true, false)),
        ("{\"name\": \"x", (false, false)),
        (call, (true, true)),
        (&format!("{call}; {call}"), (true, true)),
        (&format!("{call} and"), (false, false)),
    ] {
        assert_eq!(may_be(&llama, &card, text), expected, "{text}");
    }
}

#[test]
fn an_answer_without_a_call_may_be_held_to_a_schema() {
    let card = card();
    let otherwise = Otherwise::Value { schema: json!({"enum": ["no"]}), field: "response_format".to_owned() };
    let grammar =
        card.grammars.compile(asked(Form::Calls(calls(ToolFormat::Hermes, true, otherwise)))).expect("compiles");
    assert_eq!(may_be(&grammar, &card, "\"no\""), (true, true));
    assert_eq!(may_be(&grammar, &card, "<tool_call>\n{\"name\": \"time\", "), (true, false));
    assert_eq!(may_be(&grammar, &card, "text"), (false, false));
}

#[test]
fn what_a_tool_cannot_say_is_named_by_its_path() {
    let card = card();
    for (parameters, path) in [
        (json!({"type": "object", "properties": {"a": {"not": {}}}}), "tools.f.properties.a.not"),
        (
            json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}),
            "tools.f.properties.a",
        ),
    ] {
        let tools = vec![tool("e", json!({"type": "object"})), tool("f", parameters)];
        let calls = Calls { format: ToolFormat::Hermes, tools, is_parallel: true, otherwise: Otherwise::Text };
        match card.grammars.compile(asked(Form::Calls(calls))) {
            Err(Error::InvalidRequest { field, .. }) => assert_eq!(field, path),
            other => panic!("{other:?}"),
        }
    }
}
