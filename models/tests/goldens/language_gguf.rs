//! Language models in one GGUF file: logits, tokens and chats against transformers over exactly the dequantised weights, ids
//! against the tokenizer from which the vocabulary was made, and what damaged files are refused for.

use std::path::PathBuf;

use candle_core::Tensor;
use serde_json::Value;
use tale_models::cancel::CancelToken;
use tale_models::chat_template::{ChatMessage, Conversation};
use tale_models::checkpoint::Manifest;
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::families::causal_lm::DecoderLm;
use tale_models::families::{llama, qwen2};
use tale_models::family::{LoadOptions, LoadedModel};
use tale_models::layers::decoder::DecoderInput;
use tale_models::loading;
use tale_models::request::TextRequest;
use tale_models::runner::text::model::CausalLm;
use tale_models::tools::Tool;
use tale_models::{Encoding, Error, ModelCard, ModelSource, TextCard};

use crate::files::{assert_clean, check_refused, cpu, inspect};
use crate::support::{assert_close, case_dir, golden_json, golden_tensors};
use crate::text::{Server, SharedCaches, golden_ids, greedy};

pub const CASES: [&str; 4] = ["llama-k", "llama-pieces", "qwen2-yarn", "smollm"];
/// Of f32 over the same weights.
const TOLERANCE: f64 = 1e-4;

/// As the golden's functions name it.
pub fn named(case: &str) -> String {
    format!("language-gguf/{case}")
}

/// The file that is given to a program.
pub fn file(case: &str) -> PathBuf {
    let first = if case == "llama-k" { "model-00001-of-00003.gguf" } else { "model.gguf" };
    case_dir(&named(case)).join(first)
}

fn network(case: &str, placement: &Placement) -> DecoderLm {
    let manifest = Manifest::read(file(case).as_path()).expect("a language model");
    let config = match case.starts_with("qwen2") {
        true => qwen2::decoder_config(&manifest),
        false => llama::decoder_config(&manifest),
    };
    let weights = manifest.whole().weights(placement).expect("weights");
    DecoderLm::load(&weights, config.expect("a config")).expect("a network")
}

pub fn prompts(case: &str) -> Vec<Vec<u32>> {
    let count = golden_json(&named(case))["prompts"].as_array().expect("a list").len();
    (0..count).map(|index| golden_ids(&named(case), &format!("prompt.{index}"))).collect()
}

fn card(model: &LoadedModel) -> &TextCard {
    let ModelCard::Text(card) = &model.card else { panic!("a language model was loaded") };
    card
}

/// Logits of as many positions as are wanted, the last ones.
fn logits(network: &DecoderLm, prompt: &[u32], wanted: usize) -> Tensor {
    let mut shared = SharedCaches::new(network, prompt.len());
    let table = shared.table(prompt.len());
    let mut input = DecoderInput::default();
    input.push(prompt, 0, &table);
    input.want_all_logits();
    let logits = network.forward(&input, shared.caches()).expect("computed").expect("logits were asked for");
    logits.narrow(0, prompt.len() - wanted, wanted).expect("as many rows")
}

/// In f32 whatever dtype is asked for: blocks stay as they are, and are multiplied with in f32.
#[test]
fn logits_equal_the_reference() {
    for case in CASES {
        let golden = golden_tensors(&named(case));
        for dtype in [WeightDtype::Auto, WeightDtype::F32] {
            let network = network(case, &Placement::open(DeviceSpec::Cpu, dtype).expect("a CPU"));
            for (index, prompt) in prompts(case).iter().enumerate() {
                let expected = &golden[&format!("logits.{index}")];
                let found = logits(&network, prompt, expected.dim(0).expect("rows"));
                assert_close(&format!("{case} {dtype:?} logits.{index}"), &found, expected, TOLERANCE);
            }
        }
    }
}

#[test]
fn greedy_tokens_and_text_equal_the_reference() {
    for case in CASES {
        let mut server = Server::open(&file(case), LoadOptions::default());
        let texts = golden_json(&named(case))["greedy_text"].clone();
        for (index, prompt) in prompts(case).into_iter().enumerate() {
            let answer = server.answer_alone(greedy(prompt));
            assert_eq!(answer.tokens, golden_ids(&named(case), &format!("greedy.{index}")), "{case} greedy.{index}");
            let expected = texts[index].as_str();
            assert_eq!(
                Some(server.card().tokenizer.decode(&answer.tokens).expect("decodes").as_str()),
                expected,
                "{case}"
            );
            // Bytes of a SentencePiece vocabulary that are no character stand for themselves as they come, and not for the whole
            // run of bytes that they are in; and what follows a prompt keeps its first space.
            if case != "llama-pieces" {
                assert_eq!(Some(answer.text.as_str()), expected, "{case} greedy_text {index}");
            }
        }
    }
}

#[test]
fn texts_have_the_ids_of_the_tokenizer_that_was_written() {
    for case in CASES {
        let model =
            tale_models::load(file(case).as_path(), &cpu(), &LoadOptions::default(), &mut |_| ()).expect("loaded");
        check_texts(case, card(&model));
    }
}

/// Strings and chats of a case.
fn check_texts(case: &str, card: &TextCard) {
    let golden = golden_json(&named(case));
    let strings = golden["strings"].as_array().expect("strings");
    assert!(strings.len() > 40, "{case}: {} strings", strings.len());
    let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).expect("ids") };
    for string in strings {
        let text = string["text"].as_str().expect("text");
        let encode = |special| card.tokenizer.encode(text, special).expect("encodes");
        assert_eq!(encode(true), ids(&string["ids"]), "{case}: {text:?}");
        assert_eq!(encode(false), ids(&string["ids_no_special"]), "{case}: {text:?}");
        let decoded = card.tokenizer.decode(&ids(&string["ids"])).expect("decodes");
        assert_eq!(Some(decoded.as_str()), string["decoded"].as_str(), "{case}: {text:?}");
    }
    for chat in golden["chats"].as_array().expect("chats") {
        let messages: Vec<ChatMessage> = serde_json::from_value(chat["messages"].clone()).expect("messages");
        let conversation = messages.into();
        let template = card.chat_template.as_ref().expect("the file has a chat template");
        assert_eq!(Some(template.render(&conversation).expect("rendered").as_str()), chat["text"].as_str(), "{case}");
        assert_eq!(
            card.encode_chat(&conversation, Encoding::CHAT, &CancelToken::default()).expect("encoded"),
            ids(&chat["ids"]),
            "{case}"
        );
    }
}

/// Cut where a proof says so, or whole: a long text has the ids that it has at once.
#[test]
fn long_texts_have_the_same_ids() {
    for case in CASES {
        let model =
            tale_models::load(file(case).as_path(), &cpu(), &LoadOptions::default(), &mut |_| ()).expect("loaded");
        let tokenizer = &card(&model).tokenizer;
        let strings = golden_json(&named(case))["strings"].clone();
        let texts: Vec<&str> =
            strings.as_array().expect("strings").iter().map(|s| s["text"].as_str().expect("text")).collect();
        let text = texts.join(" 7 ").repeat(20);
        let in_pieces = tokenizer.encode_within(&text, true, usize::MAX, &CancelToken::default()).expect("encodes");
        assert_eq!(in_pieces, tokenizer.encode(&text, true).expect("encodes"), "{case}");
    }
}

#[test]
fn the_card_says_what_the_metadata_say() {
    let load =
        |case| tale_models::load(file(case).as_path(), &cpu(), &LoadOptions::default(), &mut |_| ()).expect("loaded");
    let qwen = load("qwen2-yarn");
    assert_eq!((card(&qwen).family, card(&qwen).max_context, card(&qwen).vocab_size), ("qwen2", 256, 544));
    assert_eq!((card(&qwen).defaults.temperature, card(&qwen).defaults.top_k), (Some(0.75), Some(20)));
    let llama = load("llama-k");
    assert_eq!((card(&llama).family, card(&llama).max_context, card(&llama).vocab_size), ("llama", 256, 492));
    assert_eq!(card(&llama).defaults.temperature, None);
}

/// A tied table takes its place once, and blocks stay as they are: the tensors of the file, with norms and 16-bit ones as
/// published.
#[test]
fn weights_take_the_memory_that_they_have_in_the_file() {
    for case in CASES {
        let inspection = inspect(&file(case), None);
        assert_clean(&inspection);
        let folder = case_dir(&named(case));
        let parts = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
        let is_part = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "gguf");
        let bytes: u64 = parts.filter(is_part).map(|path| path.metadata().expect("a file").len()).sum();
        let found: usize = inspection.components.iter().map(|(_, report)| report.resident_bytes).sum();
        let (found, bytes) = (found as f64, bytes as f64);
        assert!(found < bytes && found > 0.85 * bytes, "{case}: {found} of {bytes} bytes");
    }
}

/// As llama.cpp's converter writes a list of templates: the default one under the key of a single one, others under their names.
#[test]
fn a_conversation_with_tools_gets_the_template_for_tools() {
    let copy = Copy::of("smollm");
    let rendered = || {
        let model =
            tale_models::load(copy.first.as_path(), &cpu(), &LoadOptions::default(), &mut |_| ()).expect("loaded");
        let templates = card(&model).chat_template.as_ref().expect("the file has templates");
        let plain: Conversation = vec![ChatMessage::new("user", "Hi.")].into();
        let tool = Tool {
            name: "weather".to_owned(),
            description: None,
            parameters: serde_json::json!({"type": "object"}),
            field: String::new(),
        };
        let with_tool = Conversation { tools: vec![tool], ..plain.clone() };
        [plain, with_tool].map(|conversation| templates.render(&conversation).expect("rendered"))
    };
    let [plain, with_tool] = rendered();
    assert_eq!(plain, with_tool, "its only template shows no tools");
    copy.add_text("tokenizer.chat_template.tool_use", "{{ tools[0].function.name }}: {{ messages[0].content }}{# #}");
    copy.add_text("tokenizer.chat_template.rag", "{% if %}");
    let [same, named] = rendered();
    assert_eq!((same, named.trim_end()), (plain, "weather: Hi."));
    let broken = Copy::of("smollm");
    broken.add_text("tokenizer.chat_template.tool_use", "{% if %}");
    broken.check_refused(&["chat template"]);
}

// --- damage ----------------------------------------------------------------------------------------------------------

/// A copy of a case's files.
struct Copy {
    dir: tempfile::TempDir,
    first: PathBuf,
}

impl Copy {
    fn of(case: &str) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        for entry in std::fs::read_dir(case_dir(&named(case))).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "gguf") {
                std::fs::copy(&path, dir.path().join(path.file_name().expect("a name"))).expect("copied");
            }
        }
        let first = dir.path().join(file(case).file_name().expect("a name"));
        Self { dir, first }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Changes the bytes of a file where `key` stands as a name.
    fn change(&self, name: &str, key: &str, change: impl FnOnce(&mut [u8])) {
        let path = self.path(name);
        let mut bytes = std::fs::read(&path).expect("read");
        let name = [&(key.len() as u64).to_le_bytes()[..], key.as_bytes()].concat();
        let at = bytes.windows(name.len()).position(|window| window == name).expect("the file has the key");
        change(&mut bytes[at..]);
        std::fs::write(&path, bytes).expect("written");
    }

    /// Gives a key of the first file a value of as many bytes as its own, of the type that it has.
    fn set(&self, key: &str, value: &[u8]) {
        self.change(&self.name(), key, |bytes| bytes[8 + key.len() + 4..][..value.len()].copy_from_slice(value));
    }

    /// Renames a key of the first file, so that it has none of this name.
    fn remove(&self, key: &str) {
        self.change(&self.name(), key, |bytes| bytes[8 + key.len() - 1] = b'!');
    }

    /// Gives the first file a key more, with a text filled up with spaces to keep the distances in the file.
    fn add_text(&self, key: &str, text: &str) {
        const ALIGNMENT: usize = 32;
        // Of a text; it begins with its length, as the key does.
        const KIND: u32 = 8;
        let path = self.path(&self.name());
        let mut bytes = std::fs::read(&path).expect("read");
        let len = (8 + key.len() + 4 + 8 + text.len()).next_multiple_of(ALIGNMENT) - (8 + key.len() + 4 + 8);
        let (key_len, text_len) = ((key.len() as u64).to_le_bytes(), (len as u64).to_le_bytes());
        let value = format!("{text:len$}");
        let entry = [&key_len[..], key.as_bytes(), &KIND.to_le_bytes(), &text_len, value.as_bytes()].concat();
        // Magic, version and number of tensors stand before the number of keys.
        let count = &mut bytes[16..24];
        let more = u64::from_le_bytes(count.try_into().expect("eight bytes")) + 1;
        count.copy_from_slice(&more.to_le_bytes());
        bytes.splice(24..24, entry);
        std::fs::write(&path, bytes).expect("written");
    }

    fn name(&self) -> String {
        self.first.file_name().and_then(|name| name.to_str()).expect("a name").to_owned()
    }

    #[track_caller]
    fn check_refused(&self, words: &[&str]) {
        let name = self.name();
        let words: Vec<&str> = words.iter().copied().chain([name.split("-0").next().expect("a beginning")]).collect();
        check_refused(&self.first, None, &words);
    }
}

#[track_caller]
fn check_number(case: &str, key: &str, value: u32, words: &[&str]) {
    let copy = Copy::of(case);
    copy.set(key, &value.to_le_bytes());
    copy.check_refused(words);
}

#[test]
fn sizes_that_cannot_be_are_refused_by_key() {
    for (key, short) in [
        ("llama.block_count", "block_count: is 4294967295"),
        ("llama.embedding_length", "embedding_length: is 4294967295"),
        ("llama.feed_forward_length", "feed_forward_length: is 4294967295"),
        ("llama.attention.head_count", "attention.head_count: is 4294967295"),
        ("llama.attention.head_count_kv", "attention.head_count_kv: is 4294967295"),
        ("llama.context_length", "context_length: is 4294967295"),
    ] {
        check_number("smollm", key, u32::MAX, &[short]);
        let copy = Copy::of("smollm");
        copy.set(key, &0u32.to_le_bytes());
        copy.check_refused(&[&short.replace("4294967295", "0")]);
    }
    check_number("llama-pieces", "llama.attention.key_length", 0, &["attention.key_length: is 0"]);
    check_number("llama-pieces", "llama.attention.value_length", 16, &["`llama.attention.value_length` is 16", "32"]);
    check_number("llama-pieces", "llama.rope.dimension_count", 16, &["`llama.rope.dimension_count` is 16", "32"]);
    check_number("llama-k", "llama.vocab_size", 493, &["`llama.vocab_size` is 493", "has 492"]);
    check_number("smollm", "llama.attention.head_count", 7, &["`llama.attention.head_count` is 7", "144"]);
    check_number("smollm", "llama.block_count", 3, &["blk.2.attn_norm.weight", "missing"]);
    check_number(
        "smollm",
        "llama.block_count",
        1,
        &["such as `blk.1.attn_k.weight`", "the network of its own metadata"],
    );
    check_number("smollm", "llama.feed_forward_length", 191, &["blk.0.ffn_gate.weight", "[192, 144]", "[191, 144]"]);
    let copy = Copy::of("smollm");
    copy.set("llama.attention.layer_norm_rms_epsilon", &f32::NAN.to_le_bytes());
    copy.check_refused(&["`llama.attention.layer_norm_rms_epsilon` is no number"]);
    copy.set("llama.attention.layer_norm_rms_epsilon", &2f32.to_le_bytes());
    copy.check_refused(&["attention.layer_norm_rms_epsilon: is 2"]);
    let copy = Copy::of("smollm");
    copy.set("llama.rope.freq_base", &0f32.to_le_bytes());
    copy.check_refused(&["rope_theta", "is 0"]);
}

#[test]
fn missing_keys_are_refused_by_name() {
    for key in [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
    ] {
        let copy = Copy::of("smollm");
        copy.remove(key);
        copy.check_refused(&[&format!("`{key}` is missing")]);
    }
    let copy = Copy::of("llama-pieces");
    copy.remove("tokenizer.ggml.scores");
    copy.check_refused(&["`tokenizer.ggml.scores` is missing"]);
    let copy = Copy::of("qwen2-yarn");
    copy.remove("qwen2.rope.scaling.factor");
    copy.check_refused(&["`qwen2.rope.scaling.factor` is missing"]);
}

/// A text of the same length in place of one.
#[test]
fn what_is_not_read_is_refused_by_name() {
    let with_text = |case: &str, key: &str, text: &str| {
        let copy = Copy::of(case);
        copy.change(&copy.name(), key, |bytes| {
            bytes[8 + key.len() + 12..][..text.len()].copy_from_slice(text.as_bytes())
        });
        copy
    };
    with_text("smollm", "tokenizer.ggml.pre", "smellm")
        .check_refused(&["`tokenizer.ggml.pre` is `smellm`", "llama-bpe"]);
    with_text("smollm", "tokenizer.ggml.model", "bert").check_refused(&["`tokenizer.ggml.model` is `bert`", "gpt2"]);
    let copy = with_text("qwen2-yarn", "qwen2.rope.scaling.type", "warp");
    copy.check_refused(&["`qwen2.rope.scaling.type` is `warp`", "yarn"]);
    let copy = with_text("smollm", "general.architecture", "mamba");
    copy.check_refused(&["architecture `mamba`", "`llama`", "`qwen2`", "`flux`"]);
    // Type 23 is IQ4_XS.
    let copy = Copy::of("smollm");
    let name = "token_embd.weight";
    copy.change("model.gguf", name, |bytes| {
        bytes[8 + name.len() + 4 + 16..][..4].copy_from_slice(&23u32.to_le_bytes())
    });
    copy.check_refused(&["`token_embd.weight` has type IQ4_XS; read are", "Q4_K"]);
}

#[test]
fn vocabularies_that_do_not_fit_are_refused() {
    check_number("smollm", "tokenizer.ggml.bos_token_id", 10_000, &["bos_token is 10000"]);
    check_number("smollm", "tokenizer.ggml.eos_token_id", 4_000_000_000, &["eos_token is 4000000000"]);
    // Lengths of lists: of texts, of types, of merges; four bytes of type, eight of length.
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"] {
        let copy = Copy::of("smollm");
        copy.change("model.gguf", key, |bytes| {
            bytes[8 + key.len() + 8..][..8].copy_from_slice(&(1u64 << 60).to_le_bytes())
        });
        copy.check_refused(&["is not a sound GGUF file", "claims 1152921504606846976 values of a list"]);
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let [second, third] = ["model-00002-of-00003.gguf", "model-00003-of-00003.gguf"];
    let copy = Copy::of("llama-k");
    std::fs::remove_file(copy.path(third)).expect("removed");
    copy.check_refused(&[third, "this part is missing"]);

    let copy = Copy::of("llama-k");
    std::fs::copy(copy.path(second), copy.path(third)).expect("copied");
    copy.check_refused(&[third, "part 2 of 3", "expected is part 3 of 3"]);

    // A part that leads back to the first.
    let copy = Copy::of("llama-k");
    std::fs::remove_file(copy.path(second)).expect("removed");
    std::os::unix::fs::symlink(&copy.first, copy.path(second)).expect("linked");
    copy.check_refused(&[second, "part 1 of 3", "expected is part 2 of 3"]);

    let copy = Copy::of("llama-k");
    copy.change(third, "split.tensors.count", |bytes| bytes[8 + 19 + 4..][..4].copy_from_slice(&22u32.to_le_bytes()));
    copy.check_refused(&[third, "with 22 tensors", "with 21 tensors"]);

    let copy = Copy::of("llama-k");
    check_refused(&copy.path(second), None, &["is part 2 of 3", "model-00001-of-00003.gguf"]);
    std::fs::rename(&copy.first, copy.path("model.gguf")).expect("renamed");
    check_refused(&copy.path("model.gguf"), None, &["must end with `-00001-of-00003.gguf`"]);
}

#[test]
fn a_whole_model_needs_no_base() {
    let source = ModelSource { base: Some(case_dir("qwen2").join("checkpoint")), ..ModelSource::at(file("smollm")) };
    let error = loading::inspect(&source, &cpu(), &LoadOptions::default()).expect_err("refused").to_string();
    assert!(error.contains("is no base") && error.contains("has all of a model"), "{error}");
}

/// Any byte of a header may be any other: the file loads or is refused, and nothing panics.
#[test]
fn damaged_headers_do_no_harm() {
    let mut random = 1u64;
    let mut next = |below: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    for case in ["llama-pieces", "qwen2-yarn"] {
        let copy = Copy::of(case);
        let own = std::fs::read(&copy.first).expect("read");
        let is_name = |window: &[u8]| window == b"blk.0.attn_k.weight";
        let header = own.windows(19).position(is_name).expect("a tensor's name") + 2000;
        let mut refused = 0;
        for _ in 0..60 {
            let mut bytes = own.clone();
            for _ in 0..=next(3) {
                bytes[next(header)] = [0, 1, 0x7f, 0xff, next(256) as u8][next(5)];
            }
            std::fs::write(&copy.first, &bytes).expect("written");
            match loading::inspect(copy.first.as_path(), &cpu(), &LoadOptions::default()) {
                Ok(inspection) => refused += usize::from(inspection.into_problem().is_some()),
                Err(Error::Checkpoint { path, .. }) => {
                    assert_eq!(path, copy.first);
                    refused += 1;
                }
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 8, "{case}: only {refused} were refused");
    }
}

// --- a published file ------------------------------------------------------------------------------------------------

/// SmolLM2-135M-Instruct, where it is at hand: `scripts/demo-model` keeps it, or the variable says where.
fn smollm2() -> Option<PathBuf> {
    let kept = tale_models::testing::repository().join("out/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("TALE_SMOLLM2").map_or(kept, PathBuf::from);
    path.exists().then_some(path)
}

#[test]
fn a_published_model_says_what_the_reference_says() {
    const CASE: &str = "smollm2-135m";
    let Some(path) = smollm2() else {
        eprintln!("NOT RUN: there is no SmolLM2-135M-Instruct.Q4_1.gguf; scripts/demo-model gets it");
        return;
    };
    let mut server = Server::open(&path, LoadOptions::default());
    check_texts(CASE, server.card());
    let texts = golden_json(&named(CASE))["greedy_text"].clone();
    for (index, text) in texts.as_array().expect("texts").iter().enumerate() {
        let expected = golden_ids(&named(CASE), &format!("greedy.{index}"));
        let prompt = golden_ids(&named(CASE), &format!("prompt.{index}"));
        let answer = server.answer_alone(TextRequest { max_tokens: expected.len(), ..greedy(prompt) });
        assert_eq!(answer.tokens, expected, "greedy.{index}");
        assert_eq!(Some(answer.text.as_str()), text.as_str(), "greedy_text {index}");
    }
}
