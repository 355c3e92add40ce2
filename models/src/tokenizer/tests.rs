//! Small tokenizers written by hand: what happens at the edges. Equality with transformers: `tests/goldens/tokenizers.rs`.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;

/// A folder with these files.
fn folder(files: &[(&str, String)]) -> TempDir {
    let dir = tempfile::tempdir().expect("temp dir");
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).expect("write");
    }
    dir
}

/// The character that stands for a byte in a byte-level vocabulary.
fn char_of_byte(byte: u8) -> char {
    (0..0x144).filter_map(char::from_u32).find(|c| byte_of_char(*c) == Some(byte)).expect("every byte has a character")
}

/// `tokenizer.json` of a byte-level tokenizer: id = byte, then a few merges, then `<end>` (special) and `<tool>` (not).
pub(crate) fn byte_level() -> Tokenizer {
    static ONCE: LazyLock<Tokenizer> = LazyLock::new(make_byte_level);
    ONCE.clone()
}

fn make_byte_level() -> Tokenizer {
    let config = json!({"eos_token": "<end>", "pad_token": null});
    let dir = folder(&[("tokenizer.json", byte_level_json()), ("tokenizer_config.json", config.to_string())]);
    Tokenizer::from_dir(dir.path()).expect("loads")
}

fn byte_level_json() -> String {
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        (0..=255u8).map(|b| (char_of_byte(b).to_string(), json!(b))).collect();
    let two_of_the_euro_sign = format!("{}{}", char_of_byte(0xe2), char_of_byte(0x82));
    let tail_and_space = format!("{}{}", char_of_byte(0xac), char_of_byte(b' '));
    for (id, token) in ["ab", "abc", "bca", &two_of_the_euro_sign, &tail_and_space].into_iter().enumerate() {
        vocab.insert(token.to_string(), json!(256 + id));
    }
    let added = |id, content, special| {
        json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    let whole = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [added(261, "<end>", true), added(262, "<tool é>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                  "merges": [["a", "b"]]},
    });
    whole.to_string()
}

/// `tokenizer.json` as converted from Llama 2: spaces as U+2581, bytes as `<0xNN>` (id = 3 + byte), words after them.
pub(crate) fn sentencepiece_style() -> Tokenizer {
    static ONCE: LazyLock<Tokenizer> = LazyLock::new(make_sentencepiece_style);
    ONCE.clone()
}

fn make_sentencepiece_style() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    let words = ["\u{2581}", "\u{2581}Hello", "\u{2581}world", "wor", "ld", "!", "\u{fffd}"].map(String::from);
    let bytes = (0..=255u8).map(|b| format!("<0x{b:02X}>"));
    let tokens = ["<unk>", "<s>", "</s>"].map(String::from).into_iter().chain(bytes).chain(words);
    for (id, token) in tokens.enumerate() {
        vocab.insert(token, json!(id));
    }
    let added = |id, content| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false})
    };
    let whole = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": []},
    });
    let dir = folder(&[("tokenizer.json", whole.to_string())]);
    Tokenizer::from_dir(dir.path()).expect("loads")
}

fn clip_files(config: &str) -> [(&'static str, String); 3] {
    let vocab = r#"{"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}"#;
    let merges = "#version: 0.2\na b</w>\n";
    [("vocab.json", vocab.into()), ("merges.txt", merges.into()), ("tokenizer_config.json", config.into())]
}

#[track_caller]
fn check_refused(files: &[(&str, String)], words: &str) {
    let error = Tokenizer::from_dir(folder(files).path()).expect_err("refused");
    assert!(matches!(error, Error::Checkpoint { .. }) && error.to_string().contains(words), "{error}");
}

#[test]
fn every_byte_has_a_character_of_its_own() {
    let chars: std::collections::BTreeSet<char> = (0..=255).map(char_of_byte).collect();
    assert_eq!(chars.len(), 256);
    assert_eq!((char_of_byte(b' '), char_of_byte(b'\n'), char_of_byte(0xad)), ('Ġ', 'Ċ', 'Ń'));
}

#[test]
fn lengths_baked_into_tokenizer_json_do_not_count() {
    assert_eq!(byte_level().encode("a b c d e", false).expect("encodes").len(), 9);
}

#[test]
fn clip_prompts_are_padded_with_the_end_token_and_keep_it_when_cut() {
    let dir = folder(&clip_files(r#"{"tokenizer_class": "CLIPTokenizer"}"#));
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("loads");
    let padded = tokenizer.encode_padded("AB  b", 6).expect("encodes");
    assert_eq!(padded, Padded { ids: vec![5, 4, 3, 6, 6, 6], num_tokens: 4 });
    let cut = tokenizer.encode_padded("b b b b b", 4).expect("encodes");
    assert_eq!(cut, Padded { ids: vec![5, 3, 3, 6], num_tokens: 4 });
    assert!(matches!(tokenizer.encode_padded("b", 1), Err(Error::InvalidRequest { .. })));
    assert_eq!(tokenizer.decode(&cut.ids).expect("decodes"), "b b");
}

#[test]
fn another_padding_token_comes_from_the_configuration() {
    let dir = folder(&clip_files(r#"{"tokenizer_class": "CLIPTokenizer", "pad_token": "a"}"#));
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("loads");
    assert_eq!(tokenizer.encode_padded("b", 5).expect("encodes").ids, [5, 3, 6, 0, 0]);
    assert_eq!((tokenizer.pad_token_id(), tokenizer.eos_token_id()), (Some(0), Some(6)));
}

#[test]
fn clip_is_known_by_its_word_ends_without_a_configuration() {
    let [vocab, merges, _] = clip_files("");
    let tokenizer = Tokenizer::from_dir(folder(&[vocab, merges]).path()).expect("loads");
    assert_eq!(tokenizer.encode("ab", true).expect("encodes"), [5, 4, 6]);
}

#[test]
fn qwen2_and_gpt2_files_alone_make_byte_level_tokenizers() {
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..=255u8).map(|b| (char_of_byte(b).to_string(), json!(b))).collect();
    let added = json!({"256": {"content": "<|im_end|>", "special": true}, "257": {"content": "<x>", "special": false}});
    for (class, ids) in [("Qwen2TokenizerFast", [49, 50, 256, 257]), ("GPT2Tokenizer", [49, 50, 256, 257])] {
        let config = json!({"tokenizer_class": class, "added_tokens_decoder": added, "eos_token": "<|im_end|>",
            "unk_token": null, "bos_token": null, "pad_token": null});
        let dir = folder(&[
            ("vocab.json", json!(vocab).to_string()),
            ("merges.txt", "#version: 0.2\n".into()),
            ("tokenizer_config.json", config.to_string()),
        ]);
        let tokenizer = Tokenizer::from_dir(dir.path()).expect("loads");
        assert_eq!(tokenizer.encode("12<|im_end|><x>", true).expect("encodes"), ids);
        assert_eq!(tokenizer.decode(&ids).expect("decodes"), "12<x>");
        assert_eq!((tokenizer.eos_token_id(), tokenizer.vocab_size()), (Some(256), 258));
    }
}

#[test]
fn folders_that_are_no_tokenizer_are_refused_with_the_reason() {
    check_refused(&[], "no tokenizer.json");
    check_refused(&[("tokenizer.json", "{".into())], "tokenizer.json");
    check_refused(&clip_files("[]"), "tokenizer_config.json");
    check_refused(&clip_files(r#"{"tokenizer_class": "BartTokenizer"}"#), "BartTokenizer");
    let misplaced = r#"{"added_tokens_decoder": {"9": {"content": "<x>", "special": true}}}"#;
    check_refused(&clip_files(misplaced), "should have id 9");
}

/// A SentencePiece model of three pieces; `tail` goes after them.
fn spiece(tail: &[u8]) -> Vec<u8> {
    let piece = |text: &str, kind: u8| {
        let mut inner = vec![0x0a, text.len() as u8];
        inner.extend(text.as_bytes());
        inner.extend([0x15, 0, 0, 0x80, 0xbf, 0x18, kind]); // score -1, type
        [vec![0x0a, inner.len() as u8], inner].concat()
    };
    [piece("</s>", 3), piece("<unk>", 2), piece("\u{2581}", 1), tail.to_vec()].concat()
}

#[test]
fn damaged_or_other_sentencepiece_models_are_refused() {
    let check = |bytes: &[u8], words: &str| {
        let dir = folder(&[]);
        std::fs::write(dir.path().join("spiece.model"), bytes).expect("write");
        let error = Tokenizer::from_dir(dir.path()).expect_err("refused").to_string();
        assert!(error.contains("spiece.model") && error.contains(words), "{error}");
    };
    let whole = spiece(&[]);
    check(&whole[..whole.len() - 3], "not a whole");
    check(&[0xff; 40], "not a whole");
    check(&spiece(&[0x12, 2, 0x18, 2]), "model_type 2"); // trainer_spec.model_type BPE
    check(&[], "no unknown piece");
    check(&[0x0a, 0].repeat(3 << 20), "has 2097153 tokens; at most 2097152");
    let long = [&[0x0a, 0x84, 0x08, 0x0a, 0x81, 0x08][..], &[b'a'; 1025]].concat();
    check(&spiece(&long), "a token of 1025 bytes; at most 1024");
}

#[test]
fn sentinels_follow_the_pieces_backwards() {
    let dir = folder(&[("tokenizer_config.json", r#"{"extra_ids": 2, "pad_token": "</s>"}"#.into())]);
    std::fs::write(dir.path().join("spiece.model"), spiece(&[])).expect("write");
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("loads");
    assert_eq!(tokenizer.encode("x<extra_id_0><extra_id_1>", true).expect("encodes"), [2, 1, 4, 3, 0]);
}

#[test]
fn any_text_is_encoded_or_refused() {
    let tokenizer = byte_level();
    let texts = ["", "\0", "\u{feff}\u{200d}", "👩‍👩‍👧‍👦🏳️‍🌈", "e\u{301}\u{301}\u{301}", "\u{10ffff}", "ﷺ", "\r\n\r\n"];
    for text in texts {
        let ids = tokenizer.encode(text, true).expect("encodes");
        assert_eq!(tokenizer.decode(&ids).expect("decodes"), text);
    }
    for text in [" ".repeat(1 << 20), "a".repeat(1 << 20), "é ".repeat(1 << 18)] {
        assert!(!tokenizer.encode(&text, true).expect("encodes").is_empty());
    }
}

#[test]
fn a_split_that_gives_up_is_the_texts_fault_and_no_panic() {
    let mut whole: serde_json::Value = serde_json::from_str(&byte_level_json()).expect("JSON");
    whole["pre_tokenizer"] =
        json!({"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": false});
    let dir = folder(&[("tokenizer.json", whole.to_string())]);
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("loads");
    let error = tokenizer.encode(&"a".repeat(64), true).expect_err("gives up");
    assert!(matches!(error, Error::InvalidRequest { .. }), "{error}");
    assert_eq!(tokenizer.encode("ab", true).expect("still works"), [256]);
}

/// Texts of what is cut at, what is split and joined around it, and added tokens.
fn long_texts() -> impl Strategy<Value = String> {
    let parts = vec![
        " ",
        " ",
        "  ",
        "\n",
        "\n",
        "\n\n",
        "\r\n",
        " \n",
        "\n ",
        "\t",
        "\u{a0}",
        "\u{3000}",
        "a",
        "word",
        "It's",
        "'ll",
        "'S",
        ".",
        "!?",
        "...",
        ",\n",
        "1",
        "234",
        "56789",
        "é",
        "e\u{301}",
        "\u{301}",
        "\u{308}",
        "日本",
        "語。",
        "\u{37a}",
        "¨",
        "\u{212a}",
        "ﬁ",
        "ẞ",
        "👩\u{200d}👧",
        "가",
        "\u{1100}",
        "\u{1161}",
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<mask>",
        "</s>",
        "<extra_id_0>",
    ];
    prop::collection::vec(prop::sample::select(parts), 0..60).prop_map(|parts| parts.concat())
}

/// The tokenizers of the goldens, and whether long texts of theirs are cut and bounded.
fn published() -> &'static [(&'static str, Tokenizer, bool, bool)] {
    static ONCE: LazyLock<Vec<(&str, Tokenizer, bool, bool)>> = LazyLock::new(|| {
        let folders = [
            ("tokenizers/clip", true, true),
            ("tokenizers/llama", true, true),
            ("tokenizers/qwen2", true, true),
            ("tokenizers/t5", false, false),
            ("tokenizers/umt5", false, false),
            ("wan-b/checkpoint/tokenizer", false, false),
        ];
        let load = |(folder, is_cut, is_bounded): (&'static str, bool, bool)| {
            let dir = crate::testing::repository().join("tests/goldens").join(folder);
            (folder, Tokenizer::from_dir(&dir).expect("loads"), is_cut, is_bounded)
        };
        folders.map(load).into()
    });
    &ONCE
}

/// Byte-level tokenizers by hand, with what goldens lack: a prefix space, tokens that take the white space beside them,
/// special tokens around a text, normalisers.
fn variants() -> &'static [Tokenizer] {
    static ONCE: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
        let plain: serde_json::Value = serde_json::from_str(&byte_level_json()).expect("JSON");
        let mut all = Vec::new();
        for (prefix, normalizer) in [
            (false, json!(null)),
            (true, json!({"type": "NFKC"})),
            (false, json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]})),
            (false, json!({"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "})),
        ] {
            let mut whole = plain.clone();
            whole["normalizer"] = normalizer;
            whole["pre_tokenizer"]["add_prefix_space"] = json!(prefix);
            let added = |id, content, lstrip, rstrip| {
                json!({"id": id, "content": content, "special": true, "single_word": id == 262, "lstrip": lstrip,
                       "rstrip": rstrip, "normalized": id == 261})
            };
            whole["added_tokens"] = json!([
                added(261, "<mask>", true, false),
                added(262, "word", false, false),
                added(263, "<|im_end|>", false, true),
            ]);
            whole["post_processor"] = json!({
                "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "single": [{"SpecialToken": {"id": "<mask>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                           {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
                "special_tokens": {"<mask>": {"id": "<mask>", "ids": [261], "tokens": ["<mask>"]},
                                   "<|im_end|>": {"id": "<|im_end|>", "ids": [263], "tokens": ["<|im_end|>"]}},
            });
            let dir = folder(&[("tokenizer.json", whole.to_string())]);
            all.push(Tokenizer::from_dir(dir.path()).expect("loads"));
        }
        all
    });
    &ONCE
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn pieces_have_the_tokens_of_the_whole(text in long_texts(), piece_bytes in 1usize..40, special: bool) {
        for tokenizer in published().iter().map(|(_, tokenizer, ..)| tokenizer).chain(variants()) {
            let whole = tokenizer.encode(&text, special).expect("encodes");
            let in_pieces =
                tokenizer.encode_in_pieces(&text, special, usize::MAX, &CancelToken::default(), piece_bytes);
            prop_assert_eq!(in_pieces.expect("encodes"), whole, "{:?}", text);
        }
    }

    #[test]
    fn no_text_has_fewer_tokens_than_its_bytes_say(text in long_texts()) {
        for tokenizer in published().iter().map(|(_, tokenizer, ..)| tokenizer).chain(variants()) {
            let tokens = tokenizer.encode(&text, false).expect("encodes").len();
            let least = tokenizer.least_tokens(&text);
            prop_assert!(least <= tokens, "{} > {}: {:?}", least, tokens, text);
        }
    }
}

#[test]
fn long_texts_are_cut_and_bounded_where_that_is_known_to_be_right() {
    for (folder, tokenizer, is_cut, is_bounded) in published() {
        let known = tokenizer.for_long_texts();
        assert_eq!((known.cutting.is_some(), known.least.is_some()), (*is_cut, *is_bounded), "{folder}");
    }
    assert!(variants().iter().all(|tokenizer| tokenizer.for_long_texts().cutting.is_some()));
    // Its pieces of words are joined before they are split, and its added token holds a space.
    assert!(sentencepiece_style().for_long_texts().cutting.is_none());
    assert!(byte_level().for_long_texts().cutting.is_none());
    assert!(byte_level().for_long_texts().least.is_some());
}

#[test]
fn a_text_that_cannot_fit_is_refused_before_it_is_tokenised() {
    let tokenizer = &published()[2].1;
    let refused = |text: &str, limit| tokenizer.encode_within(text, true, limit, &CancelToken::default());
    let digits = "1".repeat(8 << 20);
    let begun = std::time::Instant::now();
    let error = refused(&digits, 255).expect_err("too long");
    assert!(begun.elapsed().as_secs_f64() < 1.0, "{:?}", begun.elapsed());
    let Error::ContextLength { prompt_tokens, is_exact: false, limit: 255 } = error else { panic!("{error}") };
    assert!(prompt_tokens > 255);
    // Within a context so long that its bytes would fit there is no place to cut it.
    let error = refused(&digits, 10 << 20).expect_err("too long").to_string();
    assert!(error.contains("8388608 bytes without a place to cut") && error.contains("524288"), "{error}");
    // Its bytes could fit, the tokens of its first pieces do not.
    let words = "a b ".repeat(1 << 16);
    let limit = tokenizer.least_tokens(&words);
    let error = refused(&words, limit).expect_err("too long");
    let Error::ContextLength { prompt_tokens, is_exact: false, .. } = error else { panic!("{error}") };
    assert!((limit + 1..limit + PIECE_BYTES).contains(&prompt_tokens), "{prompt_tokens}");
    assert_eq!(refused(&words, 1 << 20).expect("fits"), tokenizer.encode(&words, true).expect("encodes"));
}

#[test]
fn nothing_is_tokenised_for_nobody() {
    let cancelled = CancelToken::default();
    drop(cancelled.cancel_on_drop());
    let result = published()[1].1.encode_within(&"a b ".repeat(1 << 14), true, 1 << 20, &cancelled);
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
}

/// `tokenizer.json` of [`byte_level`] with another value at this JSON pointer.
fn byte_level_with(pointer: &str, value: serde_json::Value) -> TempDir {
    let mut whole: serde_json::Value = serde_json::from_str(&byte_level_json()).expect("JSON");
    *whole.pointer_mut(pointer).expect("is there") = value;
    folder(&[("tokenizer.json", whole.to_string())])
}

/// The library finds none of these when it reads the file.
#[test]
fn a_tokenizer_that_fails_at_plain_text_is_refused_when_it_is_loaded() {
    let around = |ids: Vec<u32>| {
        json!({"type": "TemplateProcessing", "pair": [], "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "special_tokens": {"x": {"id": "x", "ids": ids, "tokens": vec!["x"; ids.len()]}}})
    };
    let replace =
        |pattern: &str, content: &str| json!({"type": "Replace", "pattern": {"Regex": pattern}, "content": content});
    for (pointer, value, words) in [
        ("/pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "chunk size must be non-zero"),
        ("/model", json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<nothing>"}), "UNK"),
        ("/post_processor", around(vec![1; 65]), "puts 65 tokens around every text; at most 64"),
        ("/normalizer", replace(".", &"ab".repeat(100)), "at most 8 of each"),
        ("/model/vocab", json!({"a": 0, "x".repeat(2000): 1}), "a token of 2000 bytes; at most 1024"),
    ] {
        let error = Tokenizer::from_dir(byte_level_with(pointer, value).path()).expect_err("is refused").to_string();
        assert!(error.contains("tokenizer.json: ") && error.contains(words), "{pointer}: {error}");
    }
}

#[test]
fn an_id_beyond_the_embeddings_is_found_wherever_it_comes_from() {
    let beyond = |dir: &TempDir, vocab_size, is_padding_used| {
        Tokenizer::from_dir(dir.path()).expect("loads").id_beyond(vocab_size, is_padding_used)
    };
    let (end, tool) = (261, 262);
    let plain = folder(&[("tokenizer.json", byte_level_json())]);
    assert_eq!(beyond(&plain, 263, true), None);
    assert_eq!((beyond(&plain, 262, true), beyond(&plain, 0, false)), (Some(tool), Some(tool)));
    let of_model = byte_level_with("/model/vocab/ab", json!(5000));
    assert_eq!(beyond(&of_model, 263, true), Some(5000));
    let template = json!({"type": "TemplateProcessing", "pair": [],
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [7000], "tokens": ["x"]}}});
    assert_eq!(beyond(&byte_level_with("/post_processor", template), 263, true), Some(7000));
    // Fine-tuned language models are published with a padding token for which there is no embedding.
    let config = json!({"pad_token": "<tool é>", "eos_token": "<end>"}).to_string();
    let padded = folder(&[("tokenizer.json", byte_level_json()), ("tokenizer_config.json", config)]);
    assert_eq!((beyond(&padded, 262, true), beyond(&padded, 262, false)), (Some(tool), None));
    assert_eq!(beyond(&padded, 261, false), Some(end));
}

/// Published models of speech add 65,536 tokens: one at a time, the library would build its search as often.
#[test]
fn many_added_tokens_load_in_time() {
    let added: serde_json::Map<String, serde_json::Value> = (0..20_000)
        .map(|i| ((263 + i).to_string(), json!({"content": format!("<|s{i}|>"), "special": true})))
        .collect();
    let names: Vec<String> = (0..20_000).map(|i| format!("<|s{i}|>")).collect();
    let config = json!({"added_tokens_decoder": added, "additional_special_tokens": names}).to_string();
    let dir = folder(&[("tokenizer.json", byte_level_json()), ("tokenizer_config.json", config)]);
    let started = std::time::Instant::now();
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("loads");
    assert_eq!(tokenizer.encode("<|s19999|>", true).expect("encodes"), [263 + 19_999]);
    assert!(started.elapsed() < std::time::Duration::from_secs(20), "{:?}", started.elapsed());
}
