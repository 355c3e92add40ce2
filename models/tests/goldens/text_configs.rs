//! Checkpoints of language models whose files say things in other ways, or nonsense: what loads as in transformers, and what
//! is refused with file and field.

use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use tale_models::checkpoint::Manifest;
use tale_models::family::{LoadOptions, LoadedModel};
use tale_models::layers::decoder::DecoderInput;
use tale_models::loading;
use tale_models::parameter::Options;
use tale_models::runner::text::model::CausalLm;
use tale_models::text_parameters::{REPETITION_PENALTY, TEMPERATURE};
use tale_models::{Error, ModelCard, TextCard};

use crate::support::assert_close;
use crate::text::{Copy, SharedCaches, cpu, network_of, prompts};

/// Tied, in one file.
const TIED: &str = "qwen2-yarn";

/// Logits of every position of the first prompt.
fn logits(case: &str, copy: &Copy) -> Tensor {
    let network = network_of(case, &Manifest::read(copy.path()).unwrap(), &cpu());
    let prompt = prompts(case).remove(0);
    let mut shared = SharedCaches::new(&network, prompt.len());
    let mut input = DecoderInput::default();
    input.push(&prompt, 0, &shared.table(prompt.len()));
    input.want_all_logits();
    network.forward(&input, shared.caches()).unwrap().unwrap()
}

fn card(model: &LoadedModel) -> &TextCard {
    match &model.card {
        ModelCard::Text(card) => card,
        ModelCard::Diffusion(_) => panic!("a language model was loaded"),
    }
}

fn resident_bytes(copy: &Copy) -> usize {
    let loaded = copy.load().unwrap().resident_bytes;
    let inspected = loading::inspect(copy.path(), &cpu(), &LoadOptions::default()).unwrap();
    assert!(inspected.components[0].1.unused.is_empty());
    assert_eq!(inspected.resident_bytes(), loaded, "an inspection sees what is loaded");
    loaded
}

#[test]
fn a_head_that_differs_from_the_embeddings_is_used_though_the_configuration_ties_them() {
    let copy = Copy::of(TIED);
    let (tied, tied_bytes) = (logits(TIED, &copy), resident_bytes(&copy));
    let mut head_bytes = 0;
    copy.edit_tensors(|tensors| {
        let head = (&tensors["model.embed_tokens.weight"] * -0.5).unwrap();
        head_bytes = head.elem_count() * head.dtype().size_in_bytes();
        tensors.insert("lm_head.weight".to_owned(), head);
    });
    let expected = (&tied * -0.5).unwrap();
    assert_close("config says tied", &logits(TIED, &copy), &expected, 1e-6);
    assert_eq!(resident_bytes(&copy), tied_bytes + head_bytes);
    copy.set_config("tie_word_embeddings", json!(false));
    assert_close("config says untied", &logits(TIED, &copy), &expected, 1e-6);
}

#[test]
fn a_head_that_equals_the_embeddings_is_not_kept_twice() {
    let copy = Copy::of(TIED);
    // Values that both dtypes hold.
    copy.edit_tensors(|tensors| {
        let table = tensors.get_mut("model.embed_tokens.weight").unwrap();
        *table = table.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    });
    let (tied, tied_bytes) = (logits(TIED, &copy), resident_bytes(&copy));
    for dtype in [DType::F32, DType::BF16] {
        copy.edit_tensors(|tensors| {
            let head = tensors["model.embed_tokens.weight"].to_dtype(dtype).unwrap();
            tensors.insert("lm_head.weight".to_owned(), head);
        });
        assert_close("tied", &logits(TIED, &copy), &tied, 0.0);
        assert_eq!(resident_bytes(&copy), tied_bytes);
    }
}

#[test]
fn a_head_alone_is_the_embeddings_too() {
    let copy = Copy::of(TIED);
    let (tied, tied_bytes) = (logits(TIED, &copy), resident_bytes(&copy));
    copy.edit_tensors(|tensors| {
        let table = tensors.remove("model.embed_tokens.weight").unwrap();
        tensors.insert("lm_head.weight".to_owned(), table);
    });
    assert_close("tied", &logits(TIED, &copy), &tied, 0.0);
    assert_eq!(resident_bytes(&copy), tied_bytes);
}

#[test]
fn an_untied_model_without_a_head_is_refused() {
    let copy = Copy::of(TIED);
    copy.set_config("tie_word_embeddings", json!(false));
    let error = copy.load().err().expect("must be refused").to_string();
    assert!(error.contains("lm_head.weight") && error.contains("missing"), "{error}");
}

#[test]
fn a_models_own_sampling_may_lie_outside_of_the_range_of_requests() {
    let copy = Copy::of("llama-untied");
    copy.write_json("generation_config.json", &json!({"repetition_penalty": 2.5, "temperature": 3.0, "top_k": -1}));
    let model = copy.load().unwrap();
    let resolve = |options: Options| card(&model).resolve(vec![1, 2], &options, 0);
    let bare = resolve(Options::default()).unwrap().sampling;
    assert_eq!((bare.repetition_penalty, bare.temperature, bare.top_k), (2.5, 3.0, 0));
    let asked = [Options::default().with(&TEMPERATURE, 3.0), Options::default().with(&REPETITION_PENALTY, 2.5)];
    for options in asked {
        assert!(matches!(resolve(options), Err(Error::InvalidRequest { .. })));
    }
}

#[test]
fn sampling_that_means_nothing_is_refused_at_load() {
    for (field, value) in [("temperature", json!(-1)), ("repetition_penalty", json!(0)), ("top_k", json!(-7))] {
        let copy = Copy::of("llama-untied");
        copy.write_json("generation_config.json", &json!({field: value}));
        let error = copy.load().err().expect("must be refused").to_string();
        assert!(error.contains(&format!("generation_config.json: {field}: ")), "{error}");
    }
}

/// Every field that the reference does not need, said in another way or not at all, leaves the tokens as they are.
#[test]
fn configurations_load_that_say_less_or_in_other_words() {
    let changes: [(&str, &str, Option<Value>); 8] = [
        ("llama-untied", "architectures", None),
        ("llama-untied", "architectures", Some(json!(null))),
        ("llama-untied", "model_type", None),
        ("llama-untied", "hidden_act", Some(json!("swish"))),
        ("llama-untied", "hidden_size", Some(json!(80.0))),
        ("llama-untied", "max_position_embeddings", None),
        ("qwen2", "architectures", Some(json!([]))),
        ("qwen2", "max_position_embeddings", None),
    ];
    for (case, field, value) in changes {
        let copy = Copy::of(case);
        copy.change_config(|config| match &value {
            Some(value) => config[field] = value.clone(),
            None => drop(config.as_object_mut().unwrap().remove(field)),
        });
        let model = copy.load().unwrap_or_else(|error| panic!("{case} {field} {value:?}: {error}"));
        assert_eq!(card(&model).family, case.split('-').next().unwrap());
        assert_close(&format!("{case} {field}"), &logits(case, &copy), &logits(case, &Copy::of(case)), 0.0);
    }
}

#[test]
fn positions_are_those_of_the_class_where_the_file_has_none() {
    for (case, positions) in [("llama-untied", 2048), ("qwen2", 32_768)] {
        let copy = Copy::of(case);
        copy.change_config(|config| drop(config.as_object_mut().unwrap().remove("max_position_embeddings")));
        assert_eq!(network_of(case, &Manifest::read(copy.path()).unwrap(), &cpu()).context_len(), positions);
    }
}
