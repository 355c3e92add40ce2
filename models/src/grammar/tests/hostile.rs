//! Sources that want more than there is, or that say what nobody would hold answers to.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::*;
use super::{asked, card};
use crate::chat_template::threads::STACK_BYTES;

/// For a debug build on a busy machine.
const MAX_TIME: Duration = Duration::from_secs(20);

/// The path and the problem of a refusal.
fn refusal(card: &crate::TextCard, form: Form) -> Option<(String, String)> {
    let begun = Instant::now();
    let compiled = card.grammars.compile(asked(form));
    assert!(begun.elapsed() < MAX_TIME, "took {:?}", begun.elapsed());
    match compiled {
        Ok(_) => None,
        Err(Error::InvalidRequest { field, problem }) => Some((field, problem)),
        Err(other) => panic!("{other}"),
    }
}

#[track_caller]
fn check(schema: Value, path: &str, problem: &str) {
    let found = refusal(&card(), Form::Schema(schema.clone())).unwrap_or_else(|| panic!("{schema} compiles"));
    assert!(found.0 == path && found.1.contains(problem), "{schema}: {found:?}");
}

#[test]
fn what_a_schema_cannot_say_is_named_by_its_path() {
    check(json!(3), "f", "must be a schema");
    check(json!({"type": "object", "properties": {"a": {"if": {}}}}), "f.properties.a.if", "not supported");
    check(json!({"properties": {"a": {"items": {"not": {}}}}}), "f.properties.a.items.not", "not supported");
    check(json!({"type": "array", "uniqueItems": true}), "f.uniqueItems", "not supported");
    check(json!({"anyOf": [{}, {"type": "text"}]}), "f.anyOf[1].type", "one or some of null");
    check(json!({"type": "string", "format": "iban"}), "f.format", "one of date-time");
    check(json!({"minLength": -1}), "f.minLength", "0 to 100000");
    check(json!({"maxItems": 1e12}), "f.maxItems", "0 to 100000");
    check(json!({"multipleOf": 0}), "f.multipleOf", "above 0");
    check(json!({"enum": []}), "f.enum", "list of values");
    check(json!({"$ref": "https://example.com/s"}), "f.$ref", "lead to a schema here");
    check(json!({"$ref": "#/$defs/none"}), "f.$ref", "lead to a schema here");
    check(json!({"required": [1]}), "f.required", "list of names");
    check(json!({"x-guidance": {"lenient": true}}), "f.x-guidance", "not supported");
    check(json!({"properties": {"a": {"$id": "x"}}}), "f.properties.a.$id", "not supported");
}

#[test]
fn what_cannot_be_compiled_is_found_in_the_schema() {
    let pattern = json!({"properties": {"a": {"type": "string"}, "b": {"type": "string", "pattern": "(?=x)"}}});
    check(pattern, "f.properties.b", "regular expression");
    let cases = json!({"oneOf": [{"type": "integer"}, {"type": "number"}]});
    check(json!({"type": "object", "properties": {"n": cases}, "required": ["n"]}), "f.properties.n", "anyOf");
    check(
        json!({"items": {"type": "integer", "minimum": 5, "maximum": 3}, "minItems": 1, "type": "array"}),
        "f.items",
        "no value",
    );
    check(json!({"$ref": "#"}), "f", "");
    check(json!({"allOf": [{"type": "string"}, {"type": "null"}]}), "f", "no value");
}

#[test]
fn tagged_unions_and_what_says_nothing_compile() {
    let tagged = |tag: &str| json!({"type": "object", "properties": {"kind": {"const": tag}}, "required": ["kind"], "title": "T"});
    let union = json!({"oneOf": [{"$ref": "#/$defs/A"}, tagged("b")], "discriminator": {"propertyName": "kind"},
        "$defs": {"A": tagged("a")}, "$schema": "http://json-schema.org/draft-07/schema#", "x-order": 3, "deprecated": true});
    assert_eq!(refusal(&card(), Form::Schema(union)), None);
    let tree = json!({"$ref": "#/$defs/Node", "$defs": {"Node": {"type": "object", "properties": {
        "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}}}, "required": ["children"]}}});
    assert_eq!(refusal(&card(), Form::Schema(tree)), None);
    assert_eq!(refusal(&card(), Form::Schema(Value::Bool(true))), None);
    assert!(refusal(&card(), Form::Schema(Value::Bool(false))).is_some());
}

/// On a thread with the stack that those have which compile for requests.
fn on_a_compute_stack(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(work).expect("starts");
    thread.join().expect("no panic and no overflow");
}

#[test]
fn hostile_sources_are_refused_or_compiled_within_bounds() {
    on_a_compute_stack(|| {
        let card = card();
        let mut deep = json!({"type": "string"});
        for _ in 0..120 {
            deep = json!({"type": "array", "items": deep, "minItems": 1});
        }
        let mut chain: serde_json::Map<String, Value> =
            (0..2000).map(|at| (format!("d{at}"), json!({"$ref": format!("#/$defs/d{}", at + 1)}))).collect();
        chain.insert("d2000".into(), json!({"type": "null"}));
        let many: serde_json::Map<String, Value> =
            (0..4000).map(|at| (format!("p{at}"), json!({"type": "string"}))).collect();
        let product = json!({"allOf": (0..12).map(|at| json!({"anyOf": [
            {"properties": {format!("a{at}"): {"type": "integer"}}}, {"properties": {format!("b{at}"): {"type": "string"}}}]}))
            .collect::<Vec<_>>()});
        let mut nested_counts = json!({"type": "null"});
        for _ in 0..5 {
            nested_counts = json!({"type": "array", "items": nested_counts, "minItems": 100_000, "maxItems": 100_000});
        }
        let words: Vec<String> = (0..1024).map(|at| format!("word {at} {}", "x".repeat(40))).collect();
        let rules: String = (0..2000).map(|at| format!("r{at}: r{} \"x\"\n", at + 1)).collect();
        let forms = [
            Form::Schema(deep),
            Form::Schema(json!({"$ref": "#/$defs/d0", "$defs": chain})),
            Form::Schema(json!({"type": "object", "properties": many})),
            Form::Schema(product),
            Form::Schema(nested_counts),
            Form::Schema(json!({"type": "string", "minLength": 90_000, "maxLength": 100_000})),
            Form::Schema(json!({"type": "string", "pattern": "^(a|b)*a(a|b){40}c$"})),
            Form::Schema(json!({"type": "number", "multipleOf": 0.000_123_457, "minimum": 1e300})),
            Form::Schema(json!({"patternProperties": {"^(a|b)*a(a|b){30}$": {}, "^(a|b)*b(a|b){30}$": {}}})),
            Form::Regex("(a+)+$".to_owned()),
            Form::Regex("(a|a)*b".repeat(200)),
            Form::Regex("((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}".to_owned()),
            Form::Regex("(a|b)*a(a|b){5000}".to_owned()),
            Form::Regex(r"\p{L}{1,1000}(\p{Lu}|\p{Ll}){1,1000}x".to_owned()),
            Form::Regex("(".repeat(5000)),
            Form::Regex("[".to_owned()),
            Form::Regex("x".repeat(MAX_REGEX_BYTES + 1)),
            Form::Choice(words),
            Form::Choice(Vec::new()),
            Form::Lark(format!("start: r0\n{rules}r2000: \"y\"\n")),
            Form::Lark(format!("start: {}\"a\"{}", "(".repeat(3000), ")".repeat(3000))),
            Form::Lark("start: start start | \"a\"".to_owned()),
            Form::Lark("start: a*\na: b*\nb: \"x\"*".to_owned()),
            Form::Lark("start: %json {\"type\": \"object\"}".to_owned()),
            Form::Lark("%llguidance {}\nstart: \"a\"".to_owned()),
            Form::Lark("start: \"a\"~1000000..2000000".to_owned()),
            Form::Lark("start: /(?=a)b/".to_owned()),
            Form::Lark("nonsense".to_owned()),
        ];
        for form in forms {
            let begun = Instant::now();
            let shown = format!("{form:?}").chars().take(90).collect::<String>();
            let refused = refusal(&card, form.clone());
            if let (None, Ok(grammar)) = (&refused, card.grammars.compile(asked(form))) {
                // What compiles answers within its bounds, or says that it takes too much.
                let mut matching = grammar.begin();
                for _ in 0..200 {
                    let begun = Instant::now();
                    let Ok(mask) = matching.mask() else { break };
                    assert!(begun.elapsed() < Duration::from_secs(3), "a mask of {shown} took {:?}", begun.elapsed());
                    let token = (0..258).find(|id| mask.allows(*id)).expect("one");
                    if token >= 256 || matching.accept(token).unwrap_or(true) {
                        break;
                    }
                }
            }
            println!("{:>7.1} ms: {shown}: {refused:?}", begun.elapsed().as_secs_f64() * 1e3);
        }
    });
}
