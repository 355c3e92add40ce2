//! Templates with the constructs of published ones, and the places where they are found.

use super::*;

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.into(), content: content.into(), name: None }
}

fn render(source: &str, messages: &[ChatMessage]) -> Result<String> {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.into(), token.into()));
    ChatTemplate::compile(source, tokens.into()).expect("compiles").render(messages)
}

#[track_caller]
fn check(source: &str, expected: &str) {
    let messages = [message("system", " Be brief. "), message("user", "Hi <b>\n"), message("assistant", "Yes.")];
    assert_eq!(render(source, &messages).expect("renders"), expected);
}

#[test]
fn constructs_of_published_templates() {
    check(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] | trim }};{% endfor %}{{ eos_token }}",
        "<s>system:Be brief.;user:Hi <b>;assistant:Yes.;</s>",
    );
    check(
        "{% for m in messages[1:] %}{{ loop.index0 }}{{ loop.first }}{{ m.role.upper() }} {% endfor %}",
        "0trueUSER 1falseASSISTANT ".replace("true", "True").replace("false", "False").as_str(),
    );
    check(
        "{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'system' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "2",
    );
    check("{{ messages[-1].content.split('.')[0] }}{{ messages[0].get('name', 'none') }}", "Yesnone");
    check("{% if tools is none and tools is defined and custom is not defined %}plain{% endif %}", "plain");
    check("{% if add_generation_prompt %}go{% endif %}", "go");
    check("{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say(messages[0].role) }}", "[system]");
    check("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }} {% endfor %}", "system user ");
}

#[test]
fn blocks_take_their_line_with_them() {
    check("a\n    {% if true %}\nb\n    {% endif %}\nc\n", "a\nb\nc");
    check("{%- generation %}x{%- endgeneration %}y", "xy");
}

#[test]
fn json_is_written_as_python_writes_it() {
    check("{{ messages[1:2] | tojson }}", r#"[{"role": "user", "content": "Hi <b>\n"}]"#);
    check("{{ {'a': [1, 2], 'ü': none} | tojson }}", r#"{"a": [1, 2], "ü": null}"#);
    check("{{ {'a': 1} | tojson(indent=4) }}", "{\n    \"a\": 1\n}");
}

#[test]
fn what_a_template_refuses_reaches_the_client_in_its_own_words() {
    let error = render("{{ raise_exception('Roles must alternate') }}", &[]).expect_err("refused");
    assert_eq!(error.to_string(), "messages: Roles must alternate");
}

#[test]
fn today_is_a_date() {
    let today = render("{{ strftime_now('%d %b %Y') }}", &[]).expect("renders");
    assert_eq!(today.split(' ').map(str::len).collect::<Vec<_>>(), [2, 3, 4], "{today}");
}

#[test]
fn an_endless_template_is_stopped() {
    let error = render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", &[]);
    assert!(error.expect_err("stopped").to_string().contains("takes too long"));
}

#[test]
fn templates_are_found_where_they_are_published() {
    let dir = tempfile::tempdir().expect("temp dir");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("write");
    let rendered = || {
        let template = ChatTemplate::from_dir(dir.path()).expect("reads")?;
        Some(template.render(&[message("user", "x")]).expect("renders"))
    };
    assert_eq!(rendered(), None);
    write("tokenizer_config.json", r#"{"bos_token": {"content": "<s>", "lstrip": false}, "add_bos_token": true}"#);
    assert_eq!(rendered(), None);
    let named = r#"{"bos_token": "<s>", "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d{{ bos_token }}"}]}"#;
    write("tokenizer_config.json", named);
    assert_eq!(rendered().as_deref(), Some("d<s>"));
    write("chat_template.json", r#"{"chat_template": "json"}"#);
    assert_eq!(rendered().as_deref(), Some("json"));
    write("chat_template.jinja", "jinja {{ messages[0].content }}");
    assert_eq!(rendered().as_deref(), Some("jinja x"));
    write("chat_template.jinja", "{% if %}");
    let error = ChatTemplate::from_dir(dir.path()).expect_err("does not compile").to_string();
    assert!(error.contains("chat_template.jinja"), "{error}");
}
