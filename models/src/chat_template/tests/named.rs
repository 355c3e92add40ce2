//! Where templates are found, and which of several a conversation gets.

use super::*;

/// A folder with files of these names and texts, and what its templates make of a conversation.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("temp dir"))
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().expect("in the folder")).expect("made");
        std::fs::write(path, text).expect("written");
    }

    fn templates(&self) -> Result<Option<ChatTemplates>> {
        ChatTemplates::from_dir(self.0.path())
    }

    /// Without tools, and with one; what is refused is the refusal.
    #[track_caller]
    fn check(&self, plain: &str, with_tools: &str) {
        let templates = self.templates().expect("read").expect("there are some");
        let messages: Conversation = vec![message("user", "x")].into();
        let found = |conversation: &Conversation| match templates.render(conversation) {
            Ok(text) => text,
            Err(error) => error.to_string(),
        };
        assert_eq!(found(&messages), plain);
        assert_eq!(found(&Conversation { tools: vec![tool_to_try()], ..messages }), with_tools);
    }
}

const ONLY_WITH_TOOLS: &str =
    "messages: this model's only chat template is for conversations with tools (`tool_use`, no `default`)";

#[test]
fn templates_are_found_where_they_are_published() {
    let folder = Folder::new();
    let is_none = || folder.templates().expect("read").is_none();
    assert!(is_none());
    folder
        .write("tokenizer_config.json", r#"{"bos_token": {"content": "<s>", "lstrip": false}, "add_bos_token": true}"#);
    assert!(is_none());
    folder.write("tokenizer_config.json", r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#);
    assert!(is_none());
    let named = r#"{"bos_token": "<s>", "chat_template": [{"name": "tool_use", "template": "t"},
        {"name": "rag", "template": "{% if %}"}, {"name": "default", "template": "d{{ bos_token }}"}]}"#;
    folder.write("tokenizer_config.json", named);
    folder.check("d<s>", "t");
    folder.write("tokenizer_config.json", r#"{"chat_template": [{"name": "tool_use", "template": "t"}]}"#);
    folder.check(ONLY_WITH_TOOLS, "t");
    folder.write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    folder.check("one", "one");
    folder.write("chat_template.json", r#"{"chat_template": "json"}"#);
    folder.check("json", "json");
    folder.write("chat_template.jinja", "jinja {{ messages[0].content }}");
    folder.check("jinja x", "jinja x");
    folder.write("chat_template.jinja", "{% if %}");
    let error = folder.templates().expect_err("does not compile").to_string();
    assert!(error.contains("chat_template.jinja"), "{error}");
}

/// As transformers 5.24 has it: files of the folder go before those of one name elsewhere, and where there are some, no
/// template of a configuration counts.
#[test]
fn additional_templates_have_their_folder() {
    let folder = Folder::new();
    folder.write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    folder.write("chat_template.jinja", "jinja");
    folder.write("additional_chat_templates/tool_use.jinja", "t {{ tools[0].function.name }}");
    folder.check("jinja", "t look_up_the_weather");
    folder.write("additional_chat_templates/default.jinja", "d");
    folder.check("d", "t look_up_the_weather");
    folder.write("additional_chat_templates/tool_use.jinja", "{{ 1 | random }}");
    let error = folder.templates().expect_err("not supported").to_string();
    assert!(error.contains("additional_chat_templates/tool_use.jinja") && error.contains("line 1"), "{error}");

    let alone = Folder::new();
    alone.write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    alone.write("additional_chat_templates/tool_use.jinja", "t");
    alone.check(ONLY_WITH_TOOLS, "t");
    let other = Folder::new();
    other.write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    other.write("additional_chat_templates/rag.jinja", "r");
    assert!(other.templates().expect("read").is_none());
}

/// It counts the tools without asking whether there are any.
#[test]
fn a_template_for_tools_need_not_bear_that_there_are_none() {
    let source = "{{ tools | length }}: {% for tool in tools %}{{ tool.function.name }} {% endfor %}{% for m in messages %}{{ m.content }}\
                  {% for call in m.tool_calls or [] %}<tool_call>\n{\"name\": \"{{ call.function.name }}\", \
                  \"arguments\": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}";
    load(source).expect_err("of all conversations it is none");
    let folder = Folder::new();
    folder.write("chat_template.jinja", "plain");
    folder.write("additional_chat_templates/tool_use.jinja", source);
    folder.check("plain", "1: look_up_the_weather x");
    let templates = folder.templates().expect("read").expect("there are some");
    assert_eq!(templates.tools().and_then(|tools| tools.format), Some(ToolFormat::Hermes));
    folder.write("additional_chat_templates/tool_use.jinja", "says nothing of them");
    assert_eq!(folder.templates().expect("read").expect("there are some").tools(), None);
}
