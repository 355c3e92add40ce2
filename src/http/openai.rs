//! Fields of OpenAI's API that Tale has nothing for, and what is made of them.
//!
//! Clients send them without wanting anything: every optional argument as `null`, the documented default, or a label that is
//! about the request and not about its answer. A value that asks for nothing is taken; one that asks for what Tale does not
//! do is refused by name, since it would be ignored; a field that is neither here nor in the body's type is unknown. What
//! becomes supported moves from these tables into the type.
//!
//! The reference is the `openai` package's `types/`, version 3.57. Does not know: what the other fields mean.

use tale_models::parameter::Task;

use super::body::value::{Object, Value};
use super::error::ApiError;

/// What is made of one field. `null` always asks for nothing.
#[derive(Debug)]
pub(super) struct Field {
    /// Keys, joined by dots; `[]` behind one stands for each element of its list. A dot after a key alone is into its object.
    pub(super) path: &'static str,
    /// Whether the value asks for nothing.
    is_neutral: fn(&Value) -> bool,
    /// Why other values are refused, behind the field's name.
    pub(super) problem: &'static str,
}

const fn field(path: &'static str, is_neutral: fn(&Value) -> bool, problem: &'static str) -> Field {
    Field { path, is_neutral, problem }
}

/// A field that says something about the request and asks for nothing, whatever it says.
const fn label(path: &'static str) -> Field {
    field(path, |value| value.text().is_some(), "must be a string")
}

/// A field that has no value but `null` that asks for nothing.
const fn unsupported(path: &'static str, problem: &'static str) -> Field {
    field(path, |_| false, problem)
}

/// Of `/v1/chat/completions`.
pub(super) const CHAT: &[&[Field]] = &[TEXT, METADATA, CHAT_ALONE];
/// Of `/v1/completions`.
pub(super) const COMPLETION: &[&[Field]] = &[TEXT, METADATA, COMPLETION_ALONE];
/// Of `/v1/responses`.
pub(super) const RESPONSE: &[&[Field]] = &[TEXT, RESPONSE_ALONE];

/// Of `/v1/images/generations` and `/v1/images/edits`.
pub(super) const IMAGE: &[&[Field]] = &[IMAGES];
/// Of `/v1/videos`.
pub(super) const VIDEO: &[&[Field]] = &[VIDEOS];

/// Those of a body for `task`.
pub(super) fn fields(task: Task) -> &'static [&'static [Field]] {
    match task {
        Task::Chat => CHAT,
        Task::Completion => COMPLETION,
        Task::Response => RESPONSE,
        Task::ImageGeneration | Task::ImageEdit => IMAGE,
        Task::Video => VIDEO,
    }
}

const IMAGES: &[Field] = &[
    label("user"),
    label("safety_identifier"),
    field(
        "quality",
        |value| is_one_of(value, &["auto", "standard"]),
        "is not supported; must be auto (see num_inference_steps)",
    ),
    field("background", |value| is_one_of(value, &["auto", "opaque"]), "is always opaque; must be opaque or auto"),
    field("moderation", |value| is_one_of(value, &["auto", "low"]), "there is none here; must be auto or low"),
    field("input_fidelity", |value| is_one_of(value, &["low"]), "is not supported; must be low (see strength)"),
    unsupported("style", "is not supported; say it in the prompt"),
    unsupported("complexity", "is not supported; leave it out"),
    unsupported("frame_count", "images do not move; leave it out"),
    unsupported("frame_duration_ms", "images do not move; leave it out"),
    unsupported("svg", "is not supported; leave it out"),
    unsupported("markup", "is not supported; leave it out"),
];

const VIDEOS: &[Field] = &[label("user"), label("safety_identifier")];

const TEXT: &[Field] = &[
    label("user"),
    label("safety_identifier"),
    label("prompt_cache_key"),
    field("store", is_false, "answers are not stored here; must be false"),
    field("service_tier", |value| is_one_of(value, &["auto", "default"]), "there is one tier; must be auto or default"),
];

/// Responses repeat it.
const METADATA: &[Field] = &[field("metadata", |value| matches!(value, Value::Object(_)), "must be an object")];

const CHAT_ALONE: &[Field] = &[
    field("functions", is_empty, "are not supported; they are tools now"),
    field("function_call", is_no_choice, "functions are not supported; they are tools now, with tool_choice"),
    field("modalities", is_text_alone, "answers are text; must be [\"text\"]"),
    unsupported("audio", "answers are text; leave it out"),
    unsupported("prediction", "is not supported; leave it out"),
    unsupported("moderation", "is not supported; leave it out"),
    unsupported("web_search_options", "there is no search here; leave it out"),
    field("reasoning_effort", |value| is_one_of(value, &["none"]), "is not supported; must be none"),
    field("verbosity", |value| is_one_of(value, &["medium"]), "is not supported; must be medium"),
    field("prompt_cache_retention", |value| is_one_of(value, &["in_memory"]), "must be in_memory"),
    field("prompt_cache_options", is_default_cache, "only {\"mode\": \"implicit\", \"ttl\": \"30m\"} is supported"),
    unsupported("messages[].audio", MESSAGES_ARE_TEXT),
    unsupported("messages[].refusal", "is not supported; leave it out"),
    unsupported("messages[].function_call", "functions are not supported; they are tools now, with tool_calls"),
    field("messages[].annotations", is_empty, "are not supported; leave it out"),
    // The SDK's own reading of what stands beside it, in messages that are sent back.
    field("messages[].parsed", |_| true, IS_A_COPY),
    field("messages[].tool_calls[].function.parsed_arguments", |_| true, IS_A_COPY),
    unsupported("messages[].content[].prompt_cache_breakpoint", "is not supported; leave it out"),
    unsupported("messages[].content[].image_url", MESSAGES_ARE_TEXT),
    unsupported("messages[].content[].input_audio", MESSAGES_ARE_TEXT),
    unsupported("messages[].content[].file", MESSAGES_ARE_TEXT),
    unsupported("messages[].content[].refusal", MESSAGES_ARE_TEXT),
];

const IS_A_COPY: &str = "is a copy of what the text beside it says, whatever it is";
const MESSAGES_ARE_TEXT: &str = "messages are text; leave it out";

const COMPLETION_ALONE: &[Field] =
    &[field("suffix", |value| value.text() == Some(""), "is not supported; leave it out")];

/// What is within an object stands before it, so that the object is empty if nothing is left to ask for.
const RESPONSE_ALONE: &[Field] = &[
    field("background", is_false, "answers are not stored here; must be false"),
    unsupported("background_options", "there is no background here; leave it out"),
    unsupported("previous_response_id", NOTHING_IS_STORED),
    unsupported("conversation", NOTHING_IS_STORED),
    unsupported("prompt", "no prompts are stored here; leave it out"),
    field("context_management", is_empty, "is not supported; leave it out"),
    field("truncation", |value| is_one_of(value, &["disabled"]), "is not supported; must be disabled"),
    field("include", is_of_absent_items, "holds something that is not supported; leave it out"),
    unsupported("max_tool_calls", "is about built-in tools, of which there are none; leave it out"),
    field("top_logprobs", |value| *value == Value::Unsigned(0), "are not returned here; must be 0"),
    field("reasoning.effort", |value| is_one_of(value, &["none"]), NO_REASONING),
    field("reasoning.mode", |value| is_one_of(value, &["standard"]), NO_REASONING),
    unsupported("reasoning.summary", NO_REASONING),
    unsupported("reasoning.generate_summary", NO_REASONING),
    unsupported("reasoning.context", NO_REASONING),
    field("reasoning", |value| is_object_of(value, &[]), NO_REASONING),
    field("text.verbosity", |value| is_one_of(value, &["medium"]), "is not supported; must be medium"),
    unsupported("moderation", "is not supported; leave it out"),
    unsupported("image", "answers are text; leave it out"),
    unsupported("access_programs", "is not supported; leave it out"),
    field("prompt_cache_retention", |value| is_one_of(value, &["in_memory"]), "must be in_memory"),
    field("prompt_cache_options", is_default_cache, "only {\"mode\": \"implicit\", \"ttl\": \"30m\"} is supported"),
    field("tools[].defer_loading", is_false, "is not supported; must be false"),
    field("tools[].async", is_false, "is not supported; must be false"),
    field("tools[].allowed_callers", is_direct_alone, "models call tools themselves; must be [\"direct\"]"),
    unsupported("tools[].output_schema", "is not supported; leave it out"),
    field("input[].caller", |value| is_object_of(value, &[("type", "direct")]), "must be {\"type\": \"direct\"}"),
    field("input[].async", is_false, "is not supported; must be false"),
    unsupported("input[].namespace", "is not supported; leave it out"),
    label("input[].created_by"),
    field("input[].content[].annotations", is_empty, "are not supported; leave them out"),
    field("input[].content[].logprobs", |value| matches!(value, Value::List(_)), "must be a list"),
    unsupported("input[].content[].prompt_cache_breakpoint", "is not supported; leave it out"),
    unsupported("input[].output[].prompt_cache_breakpoint", "is not supported; leave it out"),
];

const NOTHING_IS_STORED: &str = "nothing is stored here; send the whole conversation in input";
const NO_REASONING: &str = "there is no reasoning apart from the text here; leave it out";

/// What of an answer's items may be asked for that are never there: results of built-in tools, pictures, reasoning.
const ABSENT_ITEMS: &[&str] = &[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
];

fn is_of_absent_items(value: &Value) -> bool {
    matches!(value, Value::List(values) if values.iter().all(|of| is_one_of(of, ABSENT_ITEMS)))
}

fn is_direct_alone(value: &Value) -> bool {
    matches!(value, Value::List(callers) if callers.iter().all(|caller| is_one_of(caller, &["direct"])))
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_one_of(value: &Value, neutral: &[&str]) -> bool {
    value.text().is_some_and(|text| neutral.contains(&text))
}

fn is_empty(value: &Value) -> bool {
    matches!(value, Value::List(values) if values.is_empty())
}

fn is_no_choice(value: &Value) -> bool {
    is_one_of(value, &["none", "auto"])
}

fn is_default_cache(value: &Value) -> bool {
    is_object_of(value, &[("mode", "implicit"), ("ttl", "30m")])
}

fn is_object_of(value: &Value, neutral: &[(&str, &str)]) -> bool {
    let is_neutral = |(key, value): (&String, &Value)| neutral.contains(&(key, value.text().unwrap_or_default()));
    matches!(value, Value::Object(fields) if fields.iter().all(is_neutral))
}

fn is_text_alone(value: &Value) -> bool {
    matches!(value, Value::List(kinds) if matches!(&kinds[..], [kind] if is_one_of(kind, &["text"])))
}

/// Takes those of `fields` that ask for nothing out of `body`; the first that asks for something is an error.
pub(super) fn settle(fields: &[&[Field]], body: &mut Value) -> Result<(), ApiError> {
    let Value::Object(body) = body else { return Ok(()) };
    for field in fields.iter().copied().flatten() {
        let taken = take(field, field.path, body);
        taken.map_err(|path| ApiError::field_code(path, "unsupported_value", field.problem))?;
    }
    Ok(())
}

/// Removes the field at `path` whose value asks for nothing; the error is the path of one that does.
fn take(field: &Field, path: &str, object: &mut Object) -> Result<(), String> {
    if let Some((parent, rest)) = path.split_once('.') {
        return take_within(field, parent, rest, object);
    }
    let is_neutral = match object.get(path) {
        None => return Ok(()),
        Some(value) => *value == Value::Null || (field.is_neutral)(value),
    };
    if !is_neutral {
        return Err(path.to_owned());
    }
    object.shift_remove(path);
    Ok(())
}

/// The same of an object in a field, or of each in a list.
fn take_within(field: &Field, parent: &str, rest: &str, object: &mut Object) -> Result<(), String> {
    let key = parent.trim_end_matches("[]");
    match object.get_mut(key) {
        Some(Value::List(values)) if key != parent => {
            for (index, value) in values.iter_mut().enumerate() {
                let Value::Object(object) = value else { continue };
                take(field, rest, object).map_err(|path| format!("{key}[{index}].{path}"))?;
            }
            Ok(())
        }
        Some(Value::Object(inner)) if key == parent => take(field, rest, inner).map_err(|path| format!("{key}.{path}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGES: &str = r#""messages": [{"role": "user", "content": "hello"}]"#;

    fn settled(fields: &[&[Field]], json: &str) -> Result<Value, (String, String)> {
        let mut body = Value::from_json(json.as_bytes()).expect(json);
        let settled = settle(fields, &mut body).map(|()| body);
        settled.map_err(|error| {
            let body = serde_json::to_value(error.body()).expect("serializes");
            let text = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
            assert!(text("message").starts_with(&format!("{}: ", text("param"))), "{body}");
            (text("param"), text("code"))
        })
    }

    #[track_caller]
    fn check(fields: &[&[Field]], base: &str, neutral: &[&str], refused: &[(&str, &str)]) {
        let plain = Value::from_json(format!("{{{base}}}").as_bytes()).expect(base);
        for extra in neutral {
            assert_eq!(settled(fields, &format!("{{{base}, {extra}}}")), Ok(plain.clone()), "{extra}");
        }
        for (extra, param) in refused {
            let refusal = ((*param).to_owned(), "unsupported_value".to_owned());
            assert_eq!(settled(fields, &format!("{{{base}, {extra}}}")), Err(refusal), "{extra}");
        }
    }

    #[test]
    fn what_asks_for_nothing_of_a_chat_is_taken_and_the_rest_refused_by_name() {
        let neutral = [
            r#""user": "u1", "safety_identifier": "u1", "prompt_cache_key": "k", "metadata": {"a": "b"}"#,
            r#""store": false, "service_tier": "auto""#,
            r#""service_tier": "default""#,
            r#""functions": [], "function_call": "auto""#,
            r#""function_call": "none", "modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium""#,
            r#""prompt_cache_retention": "in_memory", "prompt_cache_options": {"mode": "implicit"}"#,
        ];
        let refused = [
            (r#""user": 1"#, "user"),
            (r#""metadata": "x""#, "metadata"),
            (r#""store": true"#, "store"),
            (r#""service_tier": "flex""#, "service_tier"),
            (r#""functions": [{"name": "f"}]"#, "functions"),
            (r#""modalities": ["text", "audio"]"#, "modalities"),
            (r#""audio": {"voice": "alloy"}"#, "audio"),
            (r#""prediction": {"type": "content"}"#, "prediction"),
            (r#""reasoning_effort": "high""#, "reasoning_effort"),
            (r#""verbosity": "low""#, "verbosity"),
            (r#""web_search_options": {}"#, "web_search_options"),
            (r#""prompt_cache_options": {"mode": "explicit"}"#, "prompt_cache_options"),
        ];
        check(CHAT, MESSAGES, &neutral, &refused);
    }

    #[test]
    fn what_asks_for_nothing_of_a_completion_is_taken_and_the_rest_refused_by_name() {
        let neutral = [r#""suffix": "", "user": "u1""#];
        let refused = [(r#""suffix": "end""#, "suffix")];
        check(COMPLETION, r#""prompt": "x", "n": 2"#, &neutral, &refused);
    }

    #[test]
    fn what_asks_for_nothing_of_a_response_is_taken_and_the_rest_refused_by_name() {
        let neutral = [
            r#""user": "u1", "safety_identifier": "u1", "prompt_cache_key": "k", "store": false, "background": false"#,
            r#""previous_response_id": null, "conversation": null, "prompt": null, "truncation": "disabled""#,
            r#""include": [], "service_tier": "auto", "reasoning": {}, "context_management": []"#,
            r#""include": ["reasoning.encrypted_content", "file_search_call.results"], "top_logprobs": 0"#,
            r#""reasoning": {"effort": "none", "summary": null, "generate_summary": null}"#,
        ];
        let refused = [
            (r#""store": true"#, "store"),
            (r#""background": true"#, "background"),
            (r#""previous_response_id": "resp_1""#, "previous_response_id"),
            (r#""conversation": "conv_1""#, "conversation"),
            (r#""conversation": {"id": "conv_1"}"#, "conversation"),
            (r#""prompt": {"id": "p"}"#, "prompt"),
            (r#""truncation": "auto""#, "truncation"),
            (r#""include": ["message.output_text.logprobs"]"#, "include"),
            (r#""reasoning": {"effort": "high"}"#, "reasoning.effort"),
            (r#""reasoning": {"summary": "auto"}"#, "reasoning.summary"),
            (r#""reasoning": {"other": 1}"#, "reasoning"),
            (r#""reasoning": "high""#, "reasoning"),
            (r#""service_tier": "flex""#, "service_tier"),
            (r#""max_tool_calls": 5"#, "max_tool_calls"),
        ];
        check(RESPONSE, r#""input": "hello""#, &neutral, &refused);
        let items =
            |extra: &str| format!(r#"{{"input": [{{"type": "message", "content": [{{"text": "a"{extra}}}]}}]}}"#);
        let plain = Value::from_json(items("").as_bytes()).expect("JSON");
        assert_eq!(settled(RESPONSE, &items(r#", "annotations": [], "logprobs": [{"token": "a"}]"#)), Ok(plain));
        let refusal = ("input[0].content[0].annotations".to_owned(), "unsupported_value".to_owned());
        assert_eq!(settled(RESPONSE, &items(r#", "annotations": [{}]"#)), Err(refusal));
        // Of the text's format something is left for others to read.
        let format = r#"{"text": {"format": {"type": "text"}}}"#;
        let settled_format = settled(RESPONSE, r#"{"text": {"format": {"type": "text"}, "verbosity": "medium"}}"#);
        assert_eq!(settled_format, Ok(Value::from_json(format.as_bytes()).expect("JSON")));
    }

    #[test]
    fn what_asks_for_nothing_of_an_image_is_taken_and_the_rest_refused_by_name() {
        let neutral = [
            r#""user": "u1", "safety_identifier": "u1", "quality": "auto", "background": "opaque", "moderation": "low""#,
            r#""quality": "standard", "background": "auto", "moderation": "auto", "input_fidelity": "low", "style": null"#,
        ];
        let refused = [
            (r#""quality": "high""#, "quality"),
            (r#""quality": "hd""#, "quality"),
            (r#""background": "transparent""#, "background"),
            (r#""moderation": "none""#, "moderation"),
            (r#""input_fidelity": "high""#, "input_fidelity"),
            (r#""style": "vivid""#, "style"),
            (r#""frame_count": 9"#, "frame_count"),
        ];
        check(IMAGE, r#""prompt": "x""#, &neutral, &refused);
        check(VIDEO, r#""prompt": "x""#, &[r#""user": "u1""#], &[]);
    }

    #[test]
    fn messages_may_be_sent_back_whole() {
        let message = |extra: &str| format!(r#"{{"messages": [{{"role": "user"}}, {{"role": "assistant"{extra}}}]}}"#);
        let plain = Value::from_json(message("").as_bytes()).expect("JSON");
        let whole = r#", "refusal": null, "annotations": [], "audio": null, "function_call": null"#;
        assert_eq!(settled(CHAT, &message(whole)), Ok(plain.clone()));
        assert_eq!(settled(CHAT, &message(r#", "annotations": null, "function_call": null"#)), Ok(plain));
        let call =
            |extra: &str| message(&format!(r#", "tool_calls": [{{"function": {{"arguments": "{{}}"{extra}}}}}]"#));
        let plain = Value::from_json(call("").as_bytes()).expect("JSON");
        assert_eq!(settled(CHAT, &call(r#", "parsed_arguments": {"a": [1]}"#)), Ok(plain));
        for (extra, param) in [
            (r#", "function_call": {"name": "a"}"#, "messages[1].function_call"),
            (r#", "refusal": "no""#, "messages[1].refusal"),
            (r#", "content": [{"type": "image_url", "image_url": {}}]"#, "messages[1].content[0].image_url"),
            (r#", "content": [{}, {"prompt_cache_breakpoint": {}}]"#, "messages[1].content[1].prompt_cache_breakpoint"),
        ] {
            let refusal = (param.to_owned(), "unsupported_value".to_owned());
            assert_eq!(settled(CHAT, &message(extra)), Err(refusal), "{extra}");
        }
    }

    #[test]
    fn null_asks_for_nothing_and_every_field_is_documented() {
        let document = include_str!("../../docs/http-api.md");
        for field in [CHAT, COMPLETION, RESPONSE, IMAGE, VIDEO].concat().into_iter().flatten() {
            let name = field.path.rsplit('.').next().expect("has a last part");
            assert!(document.contains(&format!("`{name}`")), "{} is not in docs/http-api.md", field.path);
            if !field.path.contains('.') {
                let nothing = Value::Object(Object::new());
                assert_eq!(settled(&[std::slice::from_ref(field)], &format!(r#"{{"{name}": null}}"#)), Ok(nothing));
            }
        }
    }
}
