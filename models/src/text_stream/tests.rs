//! The one law of text streams, on random tokens: pieces joined are the whole text, cut where the first stop begins.

use proptest::prelude::*;

use super::*;
use crate::tokenizer::tests::{byte_level, sentencepiece_style};

/// Pieces of an answer up to its end or its first stop string, and whether a stop string ended it.
fn stream(tokenizer: &Tokenizer, prompt: &[u32], tokens: &[u32], stops: &[&str]) -> (Vec<String>, bool) {
    let stops = stops.iter().map(ToString::to_string).collect();
    let mut stream =
        TextStream::new(tokenizer.clone(), prompt, StreamOptions { stop: stops, ..StreamOptions::default() });
    let mut pieces = Vec::new();
    for token in tokens {
        let piece = stream.push(*token).expect("pushes");
        pieces.push(piece.text);
        if piece.stopped {
            return (pieces, true);
        }
    }
    pieces.push(stream.finish().expect("finishes"));
    (pieces, false)
}

fn cut<'a>(text: &'a str, stops: &[&str]) -> &'a str {
    let end = stops.iter().filter_map(|stop| text.find(stop)).min();
    &text[..end.unwrap_or(text.len())]
}

#[track_caller]
fn check(text: &str, stops: &[&str], expected: &str, expect_stopped: bool) {
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    let (pieces, stopped) = stream(&byte_level(), &[], &tokens, stops);
    assert_eq!((pieces.concat().as_str(), stopped), (expected, expect_stopped), "{text:?} {stops:?}");
    assert_eq!(expected, cut(text, stops));
}

#[test]
fn a_character_waits_until_it_is_whole() {
    // The euro sign (e2 82 ac) in two tokens, the second of which goes on with a space.
    let (pieces, _) = stream(&byte_level(), &[], &[259, 260, u32::from(b'x')], &[]);
    assert_eq!(pieces, ["", "€ ", "x", ""]);
}

#[test]
fn bytes_that_cannot_become_a_character_are_replaced_at_once() {
    let (pieces, _) = stream(&byte_level(), &[], &[0xff, 0xe2, 0x82, 0x41, 0xe2], &[]);
    assert_eq!(pieces, ["\u{fffd}", "", "", "\u{fffd}A", "", "\u{fffd}"]);
}

#[test]
fn special_tokens_have_no_text_and_added_ones_do() {
    let (pieces, _) = stream(&byte_level(), &[], &[261, 262, 9999], &[]);
    assert_eq!(pieces, ["", "<tool é>", "", ""]);
}

#[test]
fn stop_strings_cut_inside_and_across_tokens() {
    let tokenizer = byte_level();
    // "abc" in one token, "ab" + "c" in two.
    assert_eq!(stream(&tokenizer, &[], &[257, 65], &["b"]), (vec!["a".into()], true));
    assert_eq!(stream(&tokenizer, &[], &[256, 99, 65], &["bc"]), (vec!["a".into(), String::new()], true));
}

#[test]
fn text_that_may_become_a_stop_string_is_held_and_released() {
    let (pieces, stopped) = stream(&byte_level(), &[], &[120, 256, 120], &["abc"]);
    assert_eq!((pieces, stopped), (vec!["x".into(), String::new(), "abx".into(), String::new()], false));
}

#[test]
fn the_stop_string_that_begins_first_wins() {
    check("xabcy", &["b", "abc"], "x", true);
    check("xabdy", &["b", "abc"], "xa", true);
    check("xaby", &["bc", "ab"], "x", true);
    check("xab", &["b", "abc"], "xa", false); // the answer ends while "abc" is open
    check("aab", &["ab"], "a", true);
    check("ababac", &["abac"], "ab", true);
    check("aé", &["é"], "a", true);
    check("è", &["é"], "è", false); // shares its first byte with the stop string
}

#[test]
fn nothing_follows_a_stop_string() {
    let mut stream =
        TextStream::new(byte_level(), &[], StreamOptions { stop: vec!["a".into()], ..StreamOptions::default() });
    assert!(stream.push(97).expect("pushes").stopped);
    assert_eq!(stream.push(98).expect("pushes"), Piece { text: String::new(), stopped: true });
    assert_eq!(stream.finish().expect("finishes"), "");
}

const HELLO: u32 = 260;
const WORLD: u32 = 261;

#[test]
fn words_after_a_prompt_keep_their_space() {
    let tokenizer = sentencepiece_style();
    assert_eq!(stream(&tokenizer, &[1, HELLO], &[WORLD, 264], &[]).0, [" world", "!", ""]);
    assert_eq!(stream(&tokenizer, &[1], &[HELLO, 2, WORLD], &[]).0, ["Hello", "", " world", ""]);
}

#[test]
fn bytes_as_pieces_wait_for_their_character() {
    let euro = [0xe2, 0x82, 0xac].map(|byte| byte + 3);
    let tokens = [&[HELLO], &euro[..], &euro, &[264]].concat();
    let (pieces, _) = stream(&sentencepiece_style(), &[], &tokens, &[]);
    assert_eq!(pieces, ["Hello", "", "", "€", "", "", "€", "!", ""]);
}

#[test]
fn bytes_as_pieces_that_are_no_text_do_not_wait_for_ever() {
    let (pieces, _) = stream(&sentencepiece_style(), &[], &[HELLO, 3 + 0xe2, 3 + 0xff, 3 + 0xff, 3 + 0xff, 264], &[]);
    assert_eq!(pieces, ["Hello", "", "", "", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}", "!", ""]);
}

/// Tokens of the byte-level tokenizer, with many of the bytes of the euro sign and of `a`, `b`, `c`.
fn tokens() -> impl Strategy<Value = Vec<u32>> {
    let often = prop::sample::select(vec![97, 98, 99, 0xe2, 0x82, 0xac, 256, 257, 258, 259, 260, 261, 262, 263]);
    prop::collection::vec(prop_oneof![4 => often, 1 => 0u32..256], 0..60)
}

fn stops() -> impl Strategy<Value = Vec<&'static str>> {
    let some = vec!["ab", "abc", "ca", "b", "bb", "bca", "€", "€ a", "c\u{fffd}", "aaab", "<tool é>", "cabcab"];
    prop::collection::vec(prop::sample::select(some), 0..4)
}

/// The specification of [`StopMatcher`]: looks through all held text with every piece.
struct NaiveMatcher {
    stops: Vec<&'static str>,
    held: String,
}

impl NaiveMatcher {
    fn push(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        let complete = self.stops.iter().filter_map(|stop| self.held.find(stop)).min();
        let is_open = |at: &usize| {
            let rest = &self.held.as_bytes()[*at..];
            self.stops.iter().any(|stop| stop.len() > rest.len() && stop.as_bytes().starts_with(rest))
        };
        let open = (0..self.held.len()).filter(|at| self.held.is_char_boundary(*at)).find(is_open);
        let stopped = complete.is_some_and(|complete| open.is_none_or(|open| complete <= open));
        let end = if stopped { complete } else { open };
        let rest = self.held.split_off(end.unwrap_or(self.held.len()));
        Piece { text: std::mem::replace(&mut self.held, rest), stopped }
    }

    fn finish(self) -> String {
        let end = self.stops.iter().filter_map(|stop| self.held.find(stop)).min();
        self.held[..end.unwrap_or(self.held.len())].to_owned()
    }
}

/// Ten thousand pieces against the longest of stop strings that nearly match at every byte: looking at all that is held
/// with each piece would be ten billion comparisons.
#[test]
fn long_stop_strings_cost_no_more_than_the_text() {
    const HELD: usize = 100_000;
    let stops: Vec<String> = (0..16).map(|i| "a".repeat(HELD - i) + "b").collect();
    let mut matcher = StopMatcher::new(stops, false);
    for _ in 0..HELD / 10 {
        assert_eq!(matcher.push(&"a".repeat(10)), Piece::default());
    }
    assert_eq!(matcher.push("a"), Piece { text: "a".into(), stopped: false });
    assert_eq!(matcher.push("b"), Piece { text: String::new(), stopped: true });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn stop_strings_are_found_as_by_looking_at_everything(
        pieces in prop::collection::vec("[abcé€]{0,4}", 0..20),
        stops in prop::collection::vec(
            prop::sample::select(vec!["a", "ab", "abc", "aab", "aabaab", "bca", "cé", "é€é", "€", "éé", "abababac"]), 0..5),
    ) {
        let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect(), false);
        let mut naive = NaiveMatcher { stops, held: String::new() };
        for piece in &pieces {
            let expected = naive.push(piece);
            prop_assert_eq!(&matcher.push(piece), &expected);
            prop_assert_eq!(&matcher.held, &naive.held);
            if expected.stopped {
                return Ok(());
            }
        }
        prop_assert_eq!(matcher.finish(), naive.finish());
    }
}

proptest! {
    #[test]
    fn pieces_joined_are_the_whole_text_up_to_the_first_stop_string(tokens in tokens(), stops in stops()) {
        let tokenizer = byte_level();
        let (pieces, stopped) = stream(&tokenizer, &[], &tokens, &stops);
        let whole = tokenizer.decode(&tokens).expect("decodes");
        prop_assert_eq!(pieces.concat(), cut(&whole, &stops));
        prop_assert!(!stopped || stops.iter().any(|stop| whole.contains(stop)));
    }

    #[test]
    fn text_in_bytes_as_pieces_comes_out_whole(text in "[a-zé€😀 ]{0,20}", words in prop::collection::vec(259u32..265, 0..5)) {
        let tokenizer = sentencepiece_style();
        let bytes = text.bytes().map(|byte| u32::from(byte) + 3);
        let tokens: Vec<u32> = words.iter().copied().chain(bytes).chain(words.iter().copied()).collect();
        let (pieces, _) = stream(&tokenizer, &[], &tokens, &[]);
        prop_assert_eq!(pieces.concat(), tokenizer.decode(&tokens).expect("decodes"));
    }
}

#[test]
fn a_stop_string_may_be_part_of_the_text() {
    let read = |pieces: &[&str]| {
        let mut matcher = StopMatcher::new(vec!["ab".into(), "abc".into(), "x".into()], true);
        let mut text = String::new();
        for piece in pieces {
            let found = matcher.push(piece);
            text.push_str(&found.text);
            if found.stopped {
                return (text, true);
            }
        }
        text.push_str(&matcher.finish());
        (text, false)
    };
    assert_eq!(read(&["1a", "b2"]), ("1ab".into(), true));
    assert_eq!(read(&["1abc"]), ("1ab".into(), true));
    assert_eq!(read(&["x", "ab"]), ("x".into(), true));
    assert_eq!(read(&["1a", "c"]), ("1ac".into(), false));
}

#[test]
fn early_tokens_are_not_looked_through_for_stop_strings() {
    let tokenizer = byte_level();
    let tokens = tokenizer.encode("aa", false).expect("encodes");
    assert!(!tokens.is_empty());
    let options = StreamOptions { stop: vec!["a".into()], ..StreamOptions::default() };
    let mut stream = TextStream::new(tokenizer, &[], options);
    let mut text = String::new();
    for token in &tokens {
        let piece = stream.push_early(*token).expect("pushes");
        assert!(!piece.stopped);
        text.push_str(&piece.text);
    }
    assert_eq!(text, "aa");
    assert!(stream.push(tokens[0]).expect("pushes").stopped);
}
