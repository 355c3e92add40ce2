use std::time::Instant;

use serde_json::json;

use super::*;
use crate::testing::{Script, text_model};
use crate::{ModelCard, TextCard};

mod calls;
mod generated;
mod hostile;

fn card() -> TextCard {
    match text_model(Script::default()).expect("sound").card {
        ModelCard::Text(card) => card,
        ModelCard::Diffusion(_) => panic!("makes text"),
    }
}

fn asked(form: Form) -> Asked {
    Asked { field: "f".to_owned(), form }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// What a model with no preference says: any of the tokens that may come, until the answer ends; `None` when it does not
/// within so many tokens.
fn answer(card: &TextCard, grammar: &Grammar, random: &mut Random, most: usize) -> Option<String> {
    let end = card.tokenizer.eos_token_id().expect("one");
    let (mut matching, mut bytes) = (grammar.begin(), Vec::new());
    for _ in 0..most {
        let mask = matching.mask().expect("goes on");
        let allowed: Vec<u32> = (0..card.vocab_size as u32).filter(|id| mask.allows(*id)).collect();
        let token = allowed[random.below(allowed.len())];
        if token == end {
            return Some(String::from_utf8(bytes).expect("UTF-8"));
        }
        bytes.extend(card.tokenizer.bytes_within_text(token));
        if matching.accept(token).expect("allowed") {
            return Some(String::from_utf8(bytes).expect("UTF-8"));
        }
    }
    None
}

fn check_answers(form: Form, seeds: u64, holds: impl Fn(&str) -> bool) {
    let card = card();
    let grammar = card.grammars.compile(asked(form.clone())).unwrap_or_else(|error| panic!("{form:?}: {error}"));
    for seed in 0..seeds {
        let answer = answer(&card, &grammar, &mut Random(seed), 400).unwrap_or_else(|| panic!("{form:?} goes on"));
        assert!(holds(&answer), "{form:?}: {answer}");
    }
}

#[test]
fn an_answer_is_one_of_its_form() {
    let choices = ["red", "green", "\"blue\\", "re"].map(str::to_owned).to_vec();
    check_answers(Form::Choice(choices.clone()), 50, |answer| choices.iter().any(|choice| choice == answer));
    let is_date = |answer: &str| answer.len() == 10 && answer.as_bytes()[4] == b'-';
    check_answers(Form::Regex(r"\d{4}-[0-9]\d-\d\d".to_owned()), 20, is_date);
    let lark = "start: \"<\" inner \">\"\ninner: /[ab]{1,4}/ | start\n";
    let is_nested = |answer: &str| answer.starts_with('<') && answer.ends_with('>') && answer.contains(['a', 'b']);
    check_answers(Form::Lark(lark.to_owned()), 30, is_nested);
}

/// The only answer of a grammar that leaves no choice.
fn only_answer(form: Form) -> String {
    let card = card();
    let grammar = card.grammars.compile(asked(form)).expect("compiles");
    answer(&card, &grammar, &mut Random(1), 200).expect("ends")
}

#[test]
fn a_complete_answer_ends_without_its_end_token() {
    let card = card();
    let end = card.tokenizer.eos_token_id().expect("one");
    let grammar = card.grammars.compile(asked(Form::Schema(json!({"enum": ["ab"]})))).expect("compiles");
    let mut matching = grammar.begin();
    for (byte, is_last) in b"\"ab\"".iter().zip([false, false, false, true]) {
        let mask = matching.mask().expect("goes on");
        assert!(mask.allows(u32::from(*byte)) && !mask.allows(end));
        assert_eq!(matching.accept(u32::from(*byte)).expect("allowed"), is_last);
    }
    // Where an answer may end or go on, its end is among what may come.
    let grammar = card.grammars.compile(asked(Form::Regex("ab*".to_owned()))).expect("compiles");
    let mut matching = grammar.begin();
    assert!(!matching.mask().expect("goes on").allows(end));
    assert!(!matching.accept(u32::from(b'a')).expect("allowed"));
    let mask = matching.mask().expect("goes on");
    assert!(mask.allows(end) && mask.allows(u32::from(b'b')) && !mask.allows(u32::from(b'a')));
    assert!(matching.accept(u32::from(b'a')).is_err());
}

#[test]
fn properties_come_in_the_order_of_the_schema() {
    let constant = |text: &str| json!({"const": text});
    let schema = json!({"type": "object", "properties": {"z": constant("1"), "a": constant("2"), "m": constant("3")},
        "required": ["a", "m", "z"], "additionalProperties": false});
    let answer: String = only_answer(Form::Schema(schema)).chars().filter(|c| !c.is_whitespace()).collect();
    assert_eq!(answer, r#"{"z":"1","a":"2","m":"3"}"#);
}

#[test]
fn white_space_does_not_go_on() {
    let card = card();
    let grammar = card.grammars.compile(Asked::json_object("f")).expect("compiles");
    let mut matching = grammar.begin();
    for (byte, may_follow) in [(b'{', b' '), (b' ', b'"'), (b'"', b'a')] {
        matching.accept(u32::from(byte)).expect("allowed");
        assert!(matching.mask().expect("goes on").allows(u32::from(may_follow)));
        assert!(byte != b' ' || !matching.mask().expect("goes on").allows(u32::from(b' ')));
    }
}

#[test]
fn what_is_compiled_is_kept() {
    let card = card();
    let form = Form::Schema(json!({"type": "integer"}));
    let first = card.grammars.compile(asked(form.clone())).expect("compiles");
    let second = card.grammars.compile(Asked { field: "g".to_owned(), form }).expect("compiles");
    assert!(Arc::ptr_eq(&first.0, &second.0));
    let other = card.grammars.compile(Asked::json_object("f")).expect("compiles");
    assert!(!Arc::ptr_eq(&first.0, &other.0));
}

/// Printed, not held: machines differ. Of a vocabulary of 258 tokens.
#[test]
fn what_a_token_costs() {
    let card = card();
    let schema = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 8}}, "required": ["name", "age", "tags"],
        "additionalProperties": false});
    let begun = Instant::now();
    let grammar = card.grammars.compile(asked(Form::Schema(schema))).expect("compiles");
    let compiling = begun.elapsed();
    let (mut tokens, mut spent) = (0u32, std::time::Duration::ZERO);
    for seed in 0..20 {
        let mut random = Random(seed);
        let mut matching = grammar.begin();
        for _ in 0..100 {
            let begun = Instant::now();
            let mask = matching.mask().expect("goes on");
            spent += begun.elapsed();
            let allowed: Vec<u32> = (0..256).filter(|id| mask.allows(*id)).collect();
            let token = allowed[random.below(allowed.len())];
            let begun = Instant::now();
            let is_complete = matching.accept(token).expect("allowed");
            spent += begun.elapsed();
            tokens += 1;
            if is_complete {
                break;
            }
        }
    }
    println!("compiled in {compiling:?} with the vocabulary; {:?} a token over {tokens} tokens", spent / tokens);
    assert!(tokens > 20);
}
