//! Templates that take more than their share: each is refused with the name of a bound, in little time, and the process
//! goes on.

use std::time::Instant;

use super::*;

/// The error with which `source` is refused when it is loaded or, failing that, at a conversation.
#[track_caller]
fn refusal(source: &str) -> String {
    let begun = Instant::now();
    let refused = match load(source) {
        Err(problem) => problem,
        Ok(template) => template.render(&vec![message("user", "x")].into()).expect_err("refused").to_string(),
    };
    // The whole of it, on a machine that does much else.
    assert!(begun.elapsed().as_secs() < 20, "{:?}: {refused}", begun.elapsed());
    refused
}

#[track_caller]
fn check_bound(source: &str, bound: &str) {
    let refused = refusal(source);
    // On a machine that does much else, the deadline may come first.
    let is_late = TIMES.iter().any(|time| refused.contains(time));
    assert!(refused.contains(bound) || is_late, "{source:.80}: {refused}");
}

const TIMES: [&str; 2] = ["it takes longer than 2 s", "it does not end in time"];
const FUEL: &str = "runs out of fuel";
const BYTES: &str = "makes more than 134217728 bytes";
const DEPTH: &str = "deeper than 100";
const VALUES: &str = "more than 250000 values";
const OPERATORS: &str = "a tag has more than 1000 operators";

#[test]
fn text_made_of_little_is_bounded() {
    check_bound("{{ 'a' * 100000000 }}{{ 'a' * 100000000 }}{{ 'a' * 100000000 }}", FUEL);
    check_bound("{{ 'a' * 99999999 * 99999999 }}", FUEL);
    check_bound("{{ (messages * 100000) | tojson(indent='x' * 1000000) }}", BYTES);
    check_bound("{{ '%1000000000d' | format(1) }}", "is over 1048576");
    check_bound("{{ ('%1000000d' * 1000) | format(*range(1000)) }}", BYTES);
    check_bound("{{ ('{0:1000000d}' * 1000).format(1) }}", BYTES);
    check_bound("{{ 'a'.center(1000000000) }}{{ 'a' | center(1000000000) }}", "is over");
    check_bound("{{ 'a'.ljust(1000000000) }}{{ 'a'.rjust(1000000000) }}{{ '1'.zfill(1000000000) }}", "is over");
    check_bound("{{ strftime_now('%1000000Y' * 1000) }}", BYTES);
    check_bound("{{ ('a' * 100000).replace('', 'b' * 100000) }}", BYTES);
    check_bound("{{ ('a' * 100000) | replace('a', 'b' * 100000) }}", BYTES);
    check_bound("{{ ('b' * 100000).join(['a'] * 100000) }}", BYTES);
    check_bound("{{ (['a'] * 100000) | join('b' * 100000) }}", BYTES);
    check_bound("{{ ('a\n' * 10000) | indent('b' * 100000) }}", BYTES);
    check_bound("{{ ('\t' * 10000).expandtabs(1000000) }}", BYTES);
    check_bound("{{ ('a b ' * 200000) | wordwrap(1, wrapstring='b' * 1000000) }}", BYTES);
    check_bound("{{ ('a' * 1000000) | wordwrap(1) }}", BYTES);
    check_bound("{{ ('a' * 10000000).split('a') }}", BYTES);
    check_bound("{{ ('\n' * 10000000).splitlines() }}", BYTES);
    check_bound(
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        FUEL,
    );
    check_bound(
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        FUEL,
    );
    check_bound(
        "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = m(ns.s) %}{% endfor %}",
        FUEL,
    );
}

/// What minijinja makes text of or adds by itself.
#[test]
fn text_and_sums_of_lists_are_bounded() {
    let strings = "['a' * 1000000] * 100000";
    check_bound(&format!("{{% if {strings} in 'x' %}}{{% endif %}}"), BYTES);
    check_bound(&format!("{{% if 'x' in {strings} in 'x' %}}{{% endif %}}"), BYTES);
    check_bound(&format!("{{{{ ({strings}) | safe | length }}}}"), BYTES);
    check_bound(&format!("{{{{ messages | select({strings}) }}}}"), "no test of this name");
    check_bound(&format!("{{{{ messages | selectattr({strings}) }}}}"), BYTES);
    check_bound("{{ messages | select('startingwith', 'x') }}", "no test of this name");
    check_bound("{{ range(100000) | map('center', 1000000) | length }}", BYTES);
    check_bound("{{ ([(1,) * 1000] * 100000) | sum(start=()) | length }}", BYTES);
    // Lists of lists of lists, made when asked for.
    let deep = "[[x * 100000] * 100000] * 100000";
    check_bound(&format!("{{% set x = [1] %}}{{{{ {deep} == {deep} }}}}"), BYTES);
    check_bound(&format!("{{% set x = [1] %}}{{% set y = {{({deep}): 1}} %}}"), BYTES);
}

#[test]
fn lists_made_of_little_are_bounded() {
    check_bound("{{ range(1000000000) }}", "Range too big");
    check_bound("{% set x = [1] * 100000000 %}", VALUES);
    check_bound("{{ [1] * 100000000 }}", BYTES);
    check_bound("{{ ([1] * 100000000) | list | length }}", FUEL);
    check_bound("{{ ([1] * 100000000) | map('string') | length }}", BYTES);
    check_bound("{{ ([1] * 100000000).count(1) }}", BYTES);
    check_bound("{{ ([1] * 100000000) | batch(1) | length }}", BYTES);
    check_bound("{% set x = [1] %}{{ 2 in x * 100000000 }}", BYTES);
    check_bound("{{ (range(100000) | list) | unique | length }}", BYTES);
    check_bound(
        "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        VALUES,
    );
    check_bound(
        "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}",
        VALUES,
    );
    check_bound(
        "{% set ns = namespace(s={}) %}{% for i in range(64) %}{% set ns.s = {1: ns.s, 2: ns.s} %}{% endfor %}",
        VALUES,
    );
}

/// Loops that wrap what a namespace holds once more with each turn.
#[test]
fn nested_values_cannot_overflow_the_stack() {
    for wrapped in [
        "[ns.s]",
        "(ns.s,)",
        "{'a': ns.s}",
        "dict(a=ns.s)",
        "[ns.s[0:]]",
        "cycler(ns.s)",
        "joiner(ns.s)",
        "[ns.s] | batch(1)",
    ] {
        let source = format!(
            "{{% set ns = namespace(s=[]) %}}{{% for i in range(100000) %}}{{% set ns.s = {wrapped} %}}{{% endfor %}}x"
        );
        check_bound(&source, DEPTH);
    }
    let kept = "a namespace or a loop cannot be kept";
    check_bound("{% set ns = namespace() %}{% set ns.me = ns %}", kept);
    check_bound("{% set ns = namespace() %}{% set ns.me = [{'a': ns}] %}", kept);
    check_bound("{% set a = namespace() %}{% set b = namespace(a=a) %}", kept);
    check_bound("{% set ns = namespace() %}{% for i in [1] %}{% set ns.me = loop %}{% endfor %}", kept);
    check_bound("{% for i in [1] %}{{ loop.changed([loop]) }}{% endfor %}", kept);
    // Chains of lazy values cannot be seen from outside, and become lists.
    for lazy in ["ns.s[0:]", "ns.s * 1", "ns.s | reverse", "ns.s + []", "[ns.s[0][0:]]"] {
        let source = format!(
            "{{% set ns = namespace(s=[[1], 2]) %}}{{% for i in range(20000) %}}{{% set ns.s = {lazy} %}}{{% endfor %}}\
             {{{{ ns.s }}}}{{{{ ns.s == ns.s[0:] }}}}"
        );
        load(&source).expect("loads");
    }
    // Without a namespace, where a variable of a loop goes on.
    let straight = "{% set x = [x] %}".repeat(5000) + "{{ x }}";
    check_bound(&straight, DEPTH);
}

#[test]
fn source_is_not_nested_deeper_than_the_stack() {
    let chains = [
        format!("{{{{ {}1 }}}}", "-".repeat(4833)),
        format!("{{{{ {}1 }}}}", "not ".repeat(5000)),
        format!("{{{{ 1{} }}}}", " + 1".repeat(50_000)),
        format!("{{{{ 1{} }}}}", " ~ x".repeat(50_000)),
        format!("{{{{ 1{} }}}}", " ** 1".repeat(50_000)),
        format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(5000)),
        format!("{{{{ 1{} }}}}", " and 1".repeat(50_000)),
        format!("{{{{ x{} }}}}", "|list".repeat(50_000)),
        format!("{{{{ x{} }}}}", ".a".repeat(50_000)),
        format!("{{{{ x{} }}}}", "[0]".repeat(50_000)),
        format!("{{{{ x{} }}}}", "()".repeat(50_000)),
        format!("{{{{ x{} }}}}", " is defined".repeat(50_000)),
        format!("{{% set {}x{} = 1 %}}", "(".repeat(5000), ")".repeat(5000)),
    ];
    chains.iter().for_each(|source| check_bound(source, OPERATORS));
    check_bound(&format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(1758)), "more than 1000 `elif`");
    check_bound(&format!("{}{}", "{% if 1 %}".repeat(5000), "{% endif %}".repeat(5000)), "recursion limits");
    check_bound(&format!("{{{{ {}{} }}}}", "[".repeat(900), "]".repeat(900)), "recursion limits");
    check_bound(&"x".repeat((1 << 20) + 1), "1048577 bytes; at most 1048576");
    // As much as is allowed, all in one.
    let most = format!(
        "{}{{{{ {}x{} }}}}{}{{% if 0 %}}{}{{% endif %}}",
        "{% if 1 %}".repeat(100),
        "-".repeat(500),
        "|abs".repeat(500),
        "{% endif %}".repeat(100),
        "{% elif 0 %}".repeat(1000),
    );
    load(&("{% set x = 1 %}".to_owned() + &most)).expect("loads");
    let macros = "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{% endif %}{% endmacro %}";
    check_bound(&format!("{macros}{{{{ m(100000) }}}}"), "recursion limit");
    load(&format!("{macros}{{{{ m(50) }}}}")).expect("loads");
    let recursive = "{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}";
    check_bound(recursive, "recursion limit");
}

#[test]
fn what_takes_too_long_ends() {
    check_bound("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", FUEL);
    let twice = |i: usize| format!("{{% macro m{} %}}{{{{ m{i}() }}}}{{{{ m{i}() }}}}{{% endmacro %}}", i + 1);
    let doubling: String = (0..40).map(|i| twice(i).replacen(" %}", "() %}", 1)).collect();
    check_bound(&format!("{{% macro m0() %}}{{% endmacro %}}{doubling}{{{{ m40() }}}}"), FUEL);
    check_bound("{% set x = range(90000) | list %}{% for i in range(90000) %}{% set y = x %}{% endfor %}", "it ");
    check_bound("{{ ('ab' * 1000000).strip('b' * 1000000 ~ 'a') | length }}{{ 1 // 0 }}", "unable to calculate");
    let many = vec![message("user", "x"); 2000];
    let quadratic = "{% for m in messages %}{% for n in messages %}{% if m == n %}{% set y = n %}{% endif %}{% endfor %}{% endfor %}";
    let error = load(quadratic).expect("loads").render(&many.into()).expect_err("refused").to_string();
    assert!(error.contains("the model's chat template cannot be rendered") && error.contains("it "), "{error}");
}

#[test]
fn large_conversations_are_rendered() {
    let large = "0123456789abcdef".repeat(1 << 16);
    let messages: Vec<ChatMessage> = (0..8).map(|_| message("user", &large)).collect();
    let source =
        "{% for m in messages %}{% set content = m.content | trim %}{{ m.role + ': ' + content ~ '\n' }}{% endfor %}";
    assert_eq!(render(source, &messages).expect("renders").len(), 8 * (large.len() + 7));
    let many = vec![message("user", "Hi."); 10_000];
    let source = "{% set ns = namespace(n=0, last='') %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.role %}\
                  {% endfor %}{% for m in messages %}{% if loop.changed(m.role) %}{{ m.role }}{% endif %}{{ m.content }}{% endfor %}";
    assert_eq!(render(source, &many).expect("renders").len(), 30_004);
}

#[test]
fn values_are_kept_as_they_are() {
    check("{% set x = messages[1:] %}{{ x | length }}{{ x[0].role }}{{ x == messages[1:] }}", "2userTrue");
    check("{% set x = messages[0].items() %}{{ x }}", "dict_items([('role', 'system'), ('content', ' Be brief. ')])");
    check("{% set x = range(3) %}{{ x }}{% set x = (1, [2][0:]) %}{{ x }}", "range(0, 3)(1, [2])");
    check(
        "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.l }}",
        "['system', 'user', 'assistant']",
    );
    check(
        "{% for m in messages %}{% set outer = loop %}{% for x in [1] %}{{ outer.index }}{% endfor %}{% endfor %}",
        "123",
    );
    check("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}", "aba");
    check("{% macro m(x, y=[3][0:]) %}{{ x }}{{ y }}{% endmacro %}{{ m(1) }}{{ m(2, y=4) }}", "1[3]24");
    check(
        "{% for a, b in [(1, 2)] %}{% set ns = namespace() %}{% set ns.a, b = b, a %}{{ ns.a }}{{ b }}{% endfor %}",
        "21",
    );
    check(
        "{% for x in [1] if x %}{{ x }}{% else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}",
        "1none",
    );
}

/// As deep as a body may nest, on a thread with a quarter of the stack of those that render little.
#[test]
fn variables_of_requests_are_bounded() {
    let mut nested = serde_json::Value::from(1);
    for _ in 0..120 {
        nested = serde_json::json!([nested]);
    }
    let conversation = |value: serde_json::Value| {
        let variables = serde_json::Map::from_iter([("deep".to_owned(), value)]);
        Conversation { variables, ..vec![message("user", "x")].into() }
    };
    let source = "{% if deep is defined %}{{ deep | tojson }}{{ deep == deep }}{% endif %}";
    let rendered = little_of(source, &conversation(nested)).expect("little work");
    assert!(rendered.is_ok_and(|text| text.starts_with("[[[[")));
    let large = conversation("x".repeat(20_000).into());
    let error = load(source).expect("loads").render(&large).expect_err("refused").to_string();
    assert!(error.starts_with("chat_template_kwargs: has 20"), "{error}");
}
