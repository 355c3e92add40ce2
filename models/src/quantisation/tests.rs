use serde_json::{Value, json};

use super::*;

fn read(config: Value) -> Result<Option<Quantisation>> {
    let fields = json!({ FIELD: config }).to_string();
    Quantisation::read(&Fields::of("config.json".into(), fields.as_bytes()).expect("an object"))
}

#[track_caller]
fn refused(config: Value, expected: &[&str]) {
    let error = read(config.clone()).expect_err("is refused").to_string();
    for part in expected.iter().chain(&["config.json: quantization_config."]) {
        assert!(error.contains(part), "{config}: expected `{part}` in: {error}");
    }
}

fn formats(config: Value, layers: &[&str]) -> Vec<bool> {
    let quantisation = read(config).expect("read").expect("quantised");
    layers.iter().map(|layer| quantisation.of_layer(layer).is_some()).collect()
}

fn group(more: Value) -> Value {
    let mut weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128});
    weights.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]})
}

fn with(mut config: Value, field: &str, value: Value) -> Value {
    config[field] = value;
    config
}

const Q: &str = "model.layers.3.self_attn.q_proj";
const DOWN: &str = "model.layers.13.mlp.down_proj";
const HEAD: &str = "lm_head";

#[test]
fn published_configurations_are_read() {
    assert!(read(Value::Null).expect("read").is_none());
    let of =
        |config: Value| read(config).expect("read").expect("quantised").of_layer(Q).cloned().expect("has a format");
    // hugging-quants/Meta-Llama-3.1-70B-Instruct-GPTQ-INT4, Qwen/Qwen2.5-72B-Instruct-GPTQ-Int8.
    let gptq = json!({"bits": 4, "checkpoint_format": "gptq", "damp_percent": 0.01, "desc_act": true, "group_size": 128,
        "model_file_base_name": null, "model_name_or_path": null, "quant_method": "gptq", "static_groups": false,
        "sym": true, "true_sequential": true});
    assert_eq!(of(gptq), Format::Gptq(Gptq { bits: 4, group_size: Some(128), zeros_less_one: true }));
    let gptq = json!({"batch_size": 1, "bits": 8, "block_name_to_quantize": null, "cache_block_outputs": true,
        "damp_percent": 0.01, "dataset": null, "desc_act": false, "exllama_config": {"version": 1}, "group_size": 128,
        "max_input_length": null, "model_seqlen": null, "modules_in_block_to_quantize": null, "quant_method": "gptq", "sym": true,
        "tokenizer": null, "true_sequential": true, "use_cuda_fp16": false, "use_exllama": true});
    assert_eq!(of(gptq), Format::Gptq(Gptq { bits: 8, group_size: Some(128), zeros_less_one: true }));
    let v2 = json!({"quant_method": "gptq", "bits": 4, "group_size": -1, "format": "gptq_v2"});
    assert_eq!(of(v2), Format::Gptq(Gptq { bits: 4, group_size: None, zeros_less_one: false }));
    // Qwen/Qwen2.5-72B-Instruct-AWQ.
    let awq = json!({"bits": 4, "group_size": 128, "modules_to_not_convert": null, "quant_method": "awq", "version": "gemm",
        "zero_point": true});
    assert_eq!(of(awq), Format::Awq(Awq { bits: 4, group_size: Some(128) }));
    assert_eq!(
        of(group(json!({"actorder": "weight", "observer": "mse"}))),
        Format::Compressed(Compressed { kind: Kind::Packed { bits: 4, is_symmetric: true }, span: Span::Group(128) })
    );
    // RedHatAI/Meta-Llama-3.1-70B-Instruct-FP8.
    let mut floats = with(
        group(json!({"num_bits": 8, "type": "float", "strategy": "tensor", "group_size": null})),
        "format",
        json!("float-quantized"),
    );
    floats["config_groups"]["group_0"]["input_activations"] = json!({"num_bits": 8, "type": "float", "dynamic": false});
    assert_eq!(of(floats), Format::Compressed(Compressed { kind: Kind::Float8, span: Span::Tensor }));
    // Meta's own of 405B, and blocks as DeepSeek and Qwen3 have them.
    let rows = json!({"activation_scale_ub": 1200.0, "modules_to_not_convert": [HEAD], "quant_method": "fbgemm_fp8"});
    assert_eq!(of(rows), Format::Float8(Float8 { block: None }));
    let blocks =
        json!({"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]});
    assert_eq!(of(blocks), Format::Float8(Float8 { block: Some([128, 128]) }));
}

#[test]
fn what_is_not_read_is_refused_by_its_name() {
    let gptq = |field: &str, value: Value| with(json!({"quant_method": "gptq", "bits": 4}), field, value);
    refused(json!({"bits": 4}), &["quant_method: is absent"]);
    for method in ["bitsandbytes", "hqq", "aqlm", "exl3", "marlin", "modelopt", "auto-round", "mxfp4"] {
        refused(json!({"quant_method": method}), &[&format!("quant_method: `{method}` is not read")]);
    }
    refused(gptq("bits", json!(3)), &["bits: 3 bits are not read; read are 4 and 8"]);
    refused(gptq("is_marlin_format", json!(true)), &["is_marlin_format", "Marlin"]);
    refused(gptq("checkpoint_format", json!("marlin")), &["checkpoint_format: `marlin` is not read"]);
    refused(gptq("dynamic", json!({"-:.*down.*": {}})), &["dynamic: "]);
    refused(gptq("group_size", json!(0)), &["group_size: is 0"]);
    refused(gptq("pack_dtype", json!("int16")), &["pack_dtype: `int16`"]);
    refused(gptq("modules_in_block_to_quantize", json!([[1]])), &["modules_in_block_to_quantize: is no list of names"]);
    let awq = |field: &str, value: Value| with(json!({"quant_method": "awq", "bits": 4}), field, value);
    refused(awq("version", json!("GEMV")), &["version: `GEMV` is not read; gemm is"]);
    refused(awq("zero_point", json!(false)), &["zero_point: "]);
    refused(awq("bits", json!(8)), &["bits: 8 bits are not read; read are 4"]);
    refused(awq("modules_to_not_convert", json!(["(a"])), &["modules_to_not_convert: `(a` is not an expression"]);
    refused(
        with(group(json!({})), "format", json!("marlin-24")),
        &["config_groups.group_0.format: `marlin-24` of int"],
    );
    refused(with(group(json!({})), "format", json!("nvfp4-pack-quantized")), &["`nvfp4-pack-quantized`"]);
    let sparse = json!({"format": "sparse-24-bitmask", "sparsity_structure": "2:4"});
    refused(with(group(json!({})), "sparsity_config", sparse), &["sparsity_config.format: `sparse-24-bitmask`", "2:4"]);
    refused(with(group(json!({})), "transform_config", json!({"config_groups": {}})), &["transform_config: "]);
    refused(
        with(group(json!({})), "quantization_status", json!("calibration")),
        &["quantization_status: `calibration`"],
    );
    refused(group(json!({"num_bits": 3})), &["config_groups.group_0.weights.num_bits: 3 bits"]);
    refused(group(json!({"group_size": null})), &["weights.group_size: is absent"]);
    refused(group(json!({"strategy": "tensor_group"})), &["weights.strategy: `tensor_group`"]);
    refused(group(json!({"strategy": "block", "block_structure": [128, 128]})), &["weights.strategy: `block`"]);
    refused(with(group(json!({})), "ignore", json!(["re:(?<=a)b"])), &["ignore: `(?<=a)b` is not an expression"]);
    let fp8 = |field: &str, value: Value| with(json!({"quant_method": "fp8"}), field, value);
    refused(fp8("scale_fmt", json!("ue8m0")), &["scale_fmt: `ue8m0`"]);
    refused(fp8("fmt", json!("e5m2")), &["fmt: `e5m2`"]);
    refused(fp8("activation_scheme", json!("none")), &["activation_scheme: `none`"]);
    refused(fp8("weight_block_size", json!([0, 128])), &["weight_block_size: its sides"]);
    refused(fp8("modules_to_convert", json!(["embed_tokens"])), &["modules_to_convert: "]);
}

#[test]
fn layers_are_kept_by_name() {
    let layers = [Q, DOWN, HEAD];
    let gptq = json!({"quant_method": "gptq", "bits": 4});
    assert_eq!(formats(gptq.clone(), &layers), [true, true, false]);
    assert_eq!(formats(with(gptq.clone(), "lm_head", json!(true)), &layers), [true; 3]);
    let some = json!([["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]);
    assert_eq!(formats(with(gptq, "modules_in_block_to_quantize", some), &layers), [true, false, false]);
    // transformers: a beginning up to a dot, an expression, an end.
    let fp8 = |names: Value| json!({"quant_method": "fp8", "modules_to_not_convert": names});
    for (names, expected) in [
        (json!(null), [true, true, false]),
        (json!([]), [true, true, true]),
        (json!(["model.layers.1"]), [true, true, true]),
        (json!(["model.layers.13", HEAD]), [true, false, false]),
        (json!(["model.layers.1."]), [true, false, true]),
        (json!(["q_proj"]), [false, true, true]),
        (json!([r"model.layers.\d.self_attn"]), [false, true, true]),
        (json!([r"model.layers.\d+.(mlp|other)"]), [true, false, true]),
        (json!(["model.layers.3.self_attn.q"]), [true, true, true]),
        (json!(["proj"]), [false, false, true]),
    ] {
        assert_eq!(formats(fp8(names.clone()), &layers), expected, "{names}");
    }
    // The head is never in AWQ.
    let awq = json!({"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["down_proj"]});
    assert_eq!(formats(awq, &layers), [true, false, false]);
    let ignored = json!({"quant_method": "fp8", "ignored_layers": [HEAD]});
    assert_eq!(formats(ignored, &layers), [true, true, false]);
    // compressed-tensors: whole names, or an expression for a beginning.
    for (ignore, expected) in [
        (json!([HEAD]), [true, true, false]),
        (json!([]), [true, true, true]),
        (json!(null), [true, true, true]),
        (json!(["self_attn.q_proj"]), [true, true, true]),
        (json!([Q]), [false, true, true]),
        (json!([r"re:.*self_attn.*", "re:lm"]), [false, true, false]),
        (json!([r"re:self_attn"]), [true, true, true]),
    ] {
        assert_eq!(formats(with(group(json!({})), "ignore", ignore.clone()), &layers), expected, "{ignore}");
    }
    let mut two = group(json!({}));
    two["config_groups"]["group_0"]["targets"] = json!([r"re:.*mlp\..*"]);
    two["config_groups"]["group_1"] = json!({"targets": ["Linear"], "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}});
    let quantisation = read(two).expect("read").expect("quantised");
    let kind = |layer: &str| match quantisation.of_layer(layer) {
        Some(Format::Compressed(Compressed { kind, .. })) => *kind,
        other => panic!("{layer}: {other:?}"),
    };
    assert_eq!(kind(DOWN), Kind::Packed { bits: 4, is_symmetric: true });
    assert_eq!(kind(Q), Kind::Float8);
}
