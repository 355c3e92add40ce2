//! Tools in the two kinds of templates that are known, written as those of Qwen2.5 and Llama 3.1 are.

use serde_json::json;

use super::*;
use crate::tools::ToolFormat;

const QWEN: &str = r##"{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nReturn <tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"##;

const LLAMA: &str = r#"{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<h>' + message['role'] + '</h>\n\n'+ message['content'] | trim + '<e>' }}
        {%- if loop.first and tools is not none %}
            {%- for t in tools %}
                {{- t | tojson(indent=4) }}
            {%- endfor %}
        {%- endif %}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<h>assistant</h>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<e>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<h>ipython</h>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<e>" }}
    {%- endif %}
{%- endfor %}"#;

fn tool() -> Tool {
    let parameters = json!({"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}});
    Tool { name: "f".to_owned(), description: Some("Does.".to_owned()), parameters, field: String::new() }
}

fn conversation() -> Vec<ChatMessage> {
    let arguments = serde_json::Map::from_iter([("z".to_owned(), json!("\u{fc}")), ("a".to_owned(), json!(1))]);
    let call = ToolCall { id: "c1".to_owned(), name: "f".to_owned(), arguments };
    let called = ChatMessage { tool_calls: vec![call], ..message("assistant", "") };
    vec![message("user", "Hi"), called, ChatMessage { tool_call_id: Some("c1".to_owned()), ..message("tool", "42") }]
}

#[test]
fn a_template_tells_how_its_model_calls() {
    let support = |source: &str| load(source).expect("loads").tools();
    assert_eq!(support(QWEN), Some(ToolSupport { format: Some(ToolFormat::Hermes) }));
    assert_eq!(support(LLAMA), Some(ToolSupport { format: Some(ToolFormat::Llama3) }));
    assert_eq!(support("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"), None);
    // Shown, and called in a way that nobody knows.
    let other = "{{ tools }}{% for m in messages %}{{ m.content }}[{{ m.tool_calls }}]{% endfor %}";
    assert_eq!(support(other), Some(ToolSupport { format: None }));
}

#[test]
fn calls_and_results_are_written_as_the_template_does() {
    let text = load(QWEN)
        .expect("loads")
        .render(&Conversation { tools: vec![tool()], ..conversation().into() })
        .expect("renders");
    let schema = r#"{"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}}"#;
    let shown = format!(
        r#"{{"type": "function", "function": {{"name": "f", "description": "Does.", "parameters": {schema}}}}}"#
    );
    assert!(text.contains(&format!("<tools>\n{shown}\n</tools>")), "{text}");
    let said = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{\"name\": \"f\", \"arguments\": \
        {\"z\": \"\u{fc}\", \"a\": 1}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n\
        <|im_start|>assistant\n";
    assert!(text.ends_with(said), "{text}");
    let text = load(LLAMA).expect("loads").render(&conversation().into()).expect("renders");
    let said = "<h>user</h>\n\nHi<e><h>assistant</h>\n\n{\"name\": \"f\", \"parameters\": {\"z\": \"\u{fc}\", \"a\": 1}}<e>\
        <h>ipython</h>\n\n\"42\"<e>";
    assert_eq!(text, said);
    let mut two = conversation();
    let again = two[1].tool_calls[0].clone();
    two[1].tool_calls.push(again);
    let refused = load(LLAMA).expect("loads").render(&two.into()).expect_err("two calls").to_string();
    assert!(refused.contains("single tool-calls"), "{refused}");
}
