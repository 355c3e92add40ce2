//! Templates with the constructs of published ones, and the places where they are found.

use super::*;

mod hostile;
mod named;
mod tools;

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage::new(role, content)
}

fn load(source: &str) -> Result<ChatTemplate, String> {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, token)| (name.into(), token.into()));
    ChatTemplate::load(source, tokens.into(), Served::All)
}

fn render(source: &str, messages: &[ChatMessage]) -> Result<String> {
    load(source).expect("loads").render(&messages.to_vec().into())
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

#[track_caller]
fn check_refused(source: &str, words: &[&str]) {
    let problem = load(source).expect_err("refused");
    for expected in words {
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn what_a_template_refuses_reaches_the_client_in_its_own_words() {
    let error = render("{{ raise_exception('Roles must alternate') }}", &[]).expect_err("refused");
    assert_eq!(error.to_string(), "messages: Roles must alternate");
    assert!(matches!(error, Error::InvalidRequest { .. }));
}

/// What [`ChatTemplate::render_little`] says on a thread that renders little, with a quarter of its stack.
fn little(source: &str, messages: &[ChatMessage]) -> Option<Result<String>> {
    little_of(source, &messages.to_vec().into())
}

/// The same of a whole conversation.
fn little_of(source: &str, conversation: &Conversation) -> Option<Result<String>> {
    let template = load(source).expect("loads");
    assert!(template.render_little(conversation).is_none(), "this thread renders nothing");
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(threads::LITTLE_STACK_BYTES / 4);
        let rendering = thread.spawn_scoped(scope, || {
            threads::render_little_on_this_thread();
            template.render_little(conversation)
        });
        rendering.expect("starts").join().expect("holds")
    })
}

#[test]
fn little_is_rendered_at_once_as_it_is_elsewhere() {
    let source = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{% endfor %}{{ [1, 2] | tojson }}";
    let messages = [message("system", " Be brief. "), message("user", "Hi <b>\n"), message("assistant", "Yes.")];
    let text = little(source, &messages).expect("little").expect("renders");
    assert_eq!(text, render(source, &messages).expect("renders"));
    let refusal = little("{{ raise_exception('Roles must alternate') }}", &messages).expect("little");
    assert_eq!(refusal.expect_err("refused").to_string(), "messages: Roles must alternate");
}

#[test]
fn what_is_not_little_is_for_another_thread() {
    let two = [message("user", "a"), message("user", "b")];
    for much in [
        "{% for i in range(3000) %}{% endfor %}",
        "{{ 'a' * 200000 }}",
        "{{ ('%100000d' | format(1)) | length }}",
        "{% set ns = namespace(t='aaaaaaaa') %}{% for i in range(14) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{{ range(9000) | list | length }}",
        "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for x in [range(70) | list] recursive %}{{ loop([x[1:]]) if x else '' }}{% endfor %}",
        "{% set ns = namespace(s=[]) %}{% for i in range(90) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s == 1 }}{{ 1 // 0 if messages[0].content == 'b' }}{% for i in range(3000) %}{% endfor %}",
    ] {
        let source = format!("{{% if messages | length == 2 %}}{much}{{% endif %}}");
        assert!(little(&source, &two).is_none(), "{much}");
        render(&source, &two).expect("there it is rendered");
    }
}

#[test]
fn a_failure_of_the_template_is_not_the_clients() {
    let source = "{% if messages | length > 4 %}{{ messages[9].role.upper() }}{% endif %}";
    let messages = vec![message("user", "secret"); 5];
    let error = render(source, &messages).expect_err("fails");
    assert!(matches!(error, Error::ChatTemplate(_)), "{error}");
    assert!(error.to_string().contains("line 1: undefined value") && !error.to_string().contains("secret"), "{error}");
}

#[test]
fn a_failure_does_not_quote_the_conversation() {
    // Longer than those that are tried at load, whose words are nobody's.
    let conversation = vec![message("user", "secret"); 5];
    for expression in [
        "messages[1].content + 1",
        "messages[1].content.secret.secret",
        "messages[1].content | sum",
        "('%d' | format(messages[1].content))",
        "range(messages[1].content)",
    ] {
        let source = format!("{{% if messages | length == 5 %}}{{{{ {expression} }}}}{{% endif %}}");
        let error = render(&source, &conversation).expect_err(expression).to_string();
        assert!(error.contains("line 1: ") && !error.contains("secret"), "{expression}: {error}");
    }
}

#[test]
fn what_is_missing_is_said_with_its_line_when_a_template_is_loaded() {
    check_refused("a\n{{ messages | urlize }}", &["line 2", "filter `urlize`"]);
    check_refused("{% if messages is weird %}{% endif %}", &["line 1", "test `weird`"]);
    check_refused("\n\n{{ messages[0].content.splat() }}", &["line 3", "method `splat`"]);
    check_refused("{% if false %}{{ today() }}{% endif %}", &["line 1", "function `today`"]);
    check_refused("{% include 'other' %}", &["line 1", "another template"]);
    check_refused("{% macro m() %}\n{{ kwargs }}{% endmacro %}", &["line 2", "variable `kwargs`"]);
    check_refused(
        "{{ 'a' | splat }}\r\n{{ 'a' | splosh }}",
        &["line 1: the filter `splat`", "line 2: the filter `splosh`"],
    );
    check_refused("{{ messages | map('splat') | list }}", &["splat"]);
    check_refused("a\n{% if %}", &["chat_template:2"]);
}

#[test]
fn a_template_that_always_fails_is_refused_when_it_is_loaded() {
    check_refused("{{ messages[0].role + 1 }}", &["chat_template:1"]);
    check_refused("{% set l = [] %}{{ l.append(1) }}", &["append", "unsafe"]);
    check_refused("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", &["fuel"]);
    load("{% if messages[0].role == 'system' %}{{ messages[0].role + 1 }}{% endif %}").expect("others are answered");
    load("{{ raise_exception('never') }}").expect("refuses by itself");
}

#[test]
fn functions_that_a_template_asks_about_first_may_be_missing() {
    check("{% if today is defined %}{{ today() }}{% else %}no date{% endif %}", "no date");
    check("{% set f = dict %}{{ f(a=1) }}{% macro g() %}g{% endmacro %}{{ g() }}", "{'a': 1}g");
}

#[test]
fn today_is_a_date() {
    let today = render("{{ strftime_now('%d %b %Y') }}", &[]).expect("renders");
    assert_eq!(today.split(' ').map(str::len).collect::<Vec<_>>(), [2, 3, 4], "{today}");
    let fraction = render("{{ strftime_now('%f') }}", &[]).expect("renders");
    assert!(fraction.len() == 6 && fraction.bytes().all(|b| b.is_ascii_digit()), "{fraction}");
}

/// The same rule as for the tokenizer: `special_tokens_map.json` counts where no added tokens are listed by id.
#[test]
fn special_tokens_of_templates_are_those_of_the_tokenizer() {
    let dir = tempfile::tempdir().expect("temp dir");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("write");
    let rendered = || {
        ChatTemplates::from_dir(dir.path())
            .expect("reads")
            .expect("is there")
            .render(&Conversation::default())
            .expect("renders")
    };
    write("chat_template.jinja", "{{ bos_token }}{{ eos_token }}{{ image_token }}");
    write("tokenizer_config.json", r#"{"bos_token": "<a>", "image_token": "<i>", "eos_token": {"content": "<b>"}}"#);
    assert_eq!(rendered(), "<a><b><i>");
    write("special_tokens_map.json", r#"{"bos_token": "<c>", "eos_token": {"content": "<d>"}}"#);
    assert_eq!(rendered(), "<c><d><i>");
    write("tokenizer_config.json", r#"{"bos_token": "<a>", "added_tokens_decoder": {}}"#);
    assert_eq!(rendered(), "<a>");
}

#[test]
fn a_conversation_ends_where_the_request_says() {
    let source =
        "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}";
    let ends = |source: &str, ending| {
        let messages = vec![message("user", "a"), message("assistant", " b  ")];
        load(source).expect("loads").render(&Conversation { ending, ..messages.into() })
    };
    assert_eq!(ends(source, Ending::Answer).expect("renders"), "[a][b]>");
    assert_eq!(ends(source, Ending::Messages).expect("renders"), "[a][b]");
    assert_eq!(ends(source, Ending::FinalMessage).expect("renders"), "[a][b");
    let kept = source.replace(" | trim", "");
    assert_eq!(ends(&kept, Ending::FinalMessage).expect("renders"), "[a][ b  ");
    let error = ends("{{ messages[0].content }}", Ending::FinalMessage).expect_err("refused").to_string();
    assert!(error.starts_with("continue_final_message: "), "{error}");
}

#[test]
fn a_template_is_given_the_variables_that_it_looks_at_and_no_others() {
    let source =
        "{{ messages[0].content }}{% if style is defined %}{{ style.name }} {{ style.sizes | tojson }}{% endif %}";
    let render = |variables| {
        let messages = vec![message("user", "x")];
        load(source).expect("loads").render(&Conversation { variables, ..messages.into() })
    };
    let object = |value: serde_json::Value| value.as_object().expect("an object").clone();
    assert_eq!(render(object(serde_json::json!({}))).expect("renders"), "x");
    let style = serde_json::json!({"style": {"name": "y", "sizes": [1, 2.5, null, true, {"a": -3}]}});
    assert_eq!(render(object(style)).expect("renders"), r#"xy [1, 2.5, null, true, {"a": -3}]"#);
    for (variables, name) in [
        (serde_json::json!({"mood": 1}), "chat_template_kwargs.mood"),
        (serde_json::json!({"messages": []}), "chat_template_kwargs.messages"),
    ] {
        let error = render(object(variables)).expect_err("refused").to_string();
        assert!(error.starts_with(&format!("{name}: ")), "{error}");
    }
}
