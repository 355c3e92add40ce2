"""Llama and Qwen2 in the formats of quantised language models: the codes are written here as the formats' own packers do, and
the reference is transformers with the numbers that they stand for.

Every variant has the tensors that `base-*.safetensors` has not, and a `quantization_config`. Its tokenizer is that of another case.
"""

import copy
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from . import text_cases
from .common import fresh_case, randomise, relative_difference, require, write_golden, write_json

# Whose tokenizers they have.
TOKENIZERS = {"llama": "llama-untied", "qwen2": "qwen2"}
TOKENS = 24
# Logits of so many of the last positions are kept.
KEPT = 4
GREEDY_TOKENS = 12
PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
# Bounds of what a mistake moves at the least.
MOVED = 1e-2


def make() -> None:
    folder = fresh_case("quantised")
    models = {}
    for family, make_model in (("llama", llama), ("qwen2", qwen2)):
        models[family] = model = make_model()
        state = {k: v.to(torch.float16) for k, v in model.state_dict().items()}
        model.load_state_dict({k: v.float() for k, v in state.items()})
        plain = {k: v for k, v in state.items() if not is_matrix(k)}
        # Matrices of blocks that variants leave as they are.
        save_file(plain, folder / f"base-{family}.safetensors", metadata={"format": "pt"})
        write_json(folder / f"base-{family}.json", model.config.to_diff_dict() | {"dtype": "float16"})
    tensors, facts = {}, {}
    for name, variant in VARIANTS.items():
        print(name)
        tensors |= make_variant(folder, name, variant, models[variant["family"]])
        facts[name] = {"family": variant["family"], "tokenizer": TOKENIZERS[variant["family"]]}
    write_golden(folder, {"reference": "transformers", "variants": facts, "tokens": TOKENS, "kept": KEPT}, tensors)


def is_matrix(name: str) -> bool:
    return name.endswith("_proj.weight")


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        vocab_size=492,
        eos_token_id=None,
    )
    return random_model(LlamaForCausalLM(config), 41)


def qwen2() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
        vocab_size=536,
        eos_token_id=None,
    )
    return random_model(Qwen2ForCausalLM(config), 42)


def random_model(model, seed: int):
    randomise(model, seed, overrides=text_cases.WEIGHTS)
    return model.eval()


# --- variants --------------------------------------------------------------------------------------------------------


def gptq(bits: int, group: int, sym: bool, desc_act: bool, v2: bool, family: str = "llama", **more) -> dict:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": desc_act}
    config |= {"checkpoint_format": "gptq_v2"} if v2 else ({"checkpoint_format": "gptq"} if sym else {})
    return {"family": family, "config": config | more, "pack": "gptq", "zero_plus_one": not v2}


def awq(group: int, family: str, **more) -> dict:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return {"family": family, "config": config | more, "pack": "awq"}


def compressed(fmt: str, weights: dict, ignore: list, family: str = "llama", scales=torch.bfloat16, **more) -> dict:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "group_size": None, "actorder": None} | weights
    group = {"targets": ["Linear"], "weights": weights, "input_activations": more.pop("activations", None), "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return {"family": family, "config": config, "pack": "compressed", "scales": scales} | more


def float8(config: dict, family: str = "llama", **more) -> dict:
    return {"family": family, "config": config, "pack": "float8"} | more


TENSOR_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
VARIANTS = {
    "gptq-4-sym": gptq(4, 32, True, False, False),
    "gptq-4-asym-act": gptq(4, 16, False, True, False, "qwen2"),
    "gptq-4-v2-rows": gptq(4, -1, False, False, True),
    "gptq-8-sym": gptq(8, 32, True, False, False, "qwen2"),
    "gptq-8-v2-act": gptq(8, 32, False, True, True),
    # Columns of the last group are fewer.
    "gptq-4-uneven": gptq(4, 64, False, False, False),
    "gptq-4-some": gptq(
        4, 32, True, False, False,
        modules_in_block_to_quantize=[["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["mlp.down_proj"]],
    ),
    "awq": awq(32, "llama"),
    "awq-some": awq(64, "qwen2", modules_to_not_convert=["v_proj", r"model.layers.0.mlp.(gate|up)_proj"]),
    "awq-rows": awq(-1, "qwen2"),
    "ct-4-sym": compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, ["lm_head"]),
    "ct-4-asym": compressed(
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
        ["lm_head", "re:.*layers\\.0.*down_proj"],
        scales=torch.float16,
    ),
    "ct-4-act": compressed(
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"},
        ["lm_head", "model.layers.0.self_attn.o_proj"],
        "qwen2",
    ),
    "ct-8-channel": compressed("pack-quantized", {"strategy": "channel", "symmetric": False}, ["lm_head"], "qwen2"),
    "ct-int8": compressed("int-quantized", {"strategy": "channel"}, ["lm_head"], activations={"num_bits": 8, "dynamic": True}),
    "ct-fp8-channel": compressed(
        "float-quantized", {"type": "float", "strategy": "channel"}, ["lm_head"], activations={"num_bits": 8, "dynamic": True}
    ),
    # The head too.
    "ct-fp8-tensor": compressed("float-quantized", TENSOR_FP8, [], "qwen2", input_scales=True),
    "ct-fp8-block": compressed(
        "float-quantized", {"type": "float", "strategy": "block", "block_structure": [48, 40]}, ["re:.*lm_head"]
    ),
    "fp8-static": float8({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, scale="tensor", input_scales=True),
    "fp8-block": float8(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [40, 48]}, "qwen2", scale="block"
    ),
    "fp8-rows": float8(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head", "model.layers.1"]}, scale="rows"
    ),
}


# What each variant leaves as it is beside the head, spelled out by hand: ends of names.
KEPT_PLAIN = {
    "gptq-4-some": ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"],
    "awq-some": ["self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"],
    "ct-4-asym": ["layers.0.mlp.down_proj"],
    "ct-4-act": ["layers.0.self_attn.o_proj"],
    "fp8-rows": [f"layers.1.{part}" for part in PROJECTIONS],
}
QUANTISED_HEADS = ["ct-fp8-tensor"]


def kept_plain(name: str, tensor: str) -> bool:
    layer = tensor.removesuffix(".weight")
    if layer == "lm_head":
        return name not in QUANTISED_HEADS
    return layer.endswith(tuple(KEPT_PLAIN.get(name, ["nothing"])))


def make_variant(folder: Path, name: str, variant: dict, model) -> dict:
    rng = np.random.default_rng(list(name.encode()))
    file, values = {}, {}
    for layer, weight in model.state_dict().items():
        if not (is_matrix(layer) or layer == "lm_head.weight"):
            continue
        if kept_plain(name, layer):
            if is_matrix(layer):
                file[layer] = weight.to(torch.float16)
            continue
        packed, values[layer] = PACKERS[variant["pack"]](weight.numpy(), variant, rng)
        prefix = layer.removesuffix("weight")
        file |= {prefix + part: tensor for part, tensor in packed.items()}
    save_file({k: v.contiguous() for k, v in file.items()}, folder / f"{name}.safetensors", metadata={"format": "pt"})
    write_json(folder / f"{name}.json", variant["config"])

    quantised = copy.deepcopy(model)
    quantised.load_state_dict(values, strict=False)
    prompt = torch.from_numpy(rng.integers(0, 400, TOKENS))
    logits = quantised(prompt[None]).logits[0]
    plain = model(prompt[None]).logits[0]
    distance = relative_difference(logits, plain)
    require(MOVED < distance < 1.0, f"{name}: rounding moves the logits by {distance:.2g}")
    for mistake in mistakes(name, variant, model, values):
        moved = relative_difference(logits, mistake(prompt))
        require(moved > MOVED, f"{name}: a mistake moves the logits by {moved:.2g}")
    return {
        f"{name}.prompt": prompt,
        f"{name}.logits": logits[-KEPT:].clone(),
        f"{name}.greedy": greedy(quantised, prompt),
    }


def greedy(model, prompt: torch.Tensor) -> torch.Tensor:
    """Up to the first token whose logit leads by too little."""
    tokens = []
    for _ in range(GREEDY_TOKENS):
        ids = torch.cat([prompt, torch.tensor(tokens, dtype=torch.long)])
        best = model(ids[None]).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < text_cases.MARGIN:
            break
        tokens.append(best.indices[0].item())
    require(len(tokens) > 2, f"{len(tokens)} greedy tokens without a tie")
    return torch.tensor(tokens)


def mistakes(name: str, variant: dict, model, values: dict):
    """The same model with one matrix wrong: columns out of order, a scale off."""
    layer = sorted(values)[0]

    def changed(change):
        def logits(prompt):
            wrong = copy.deepcopy(model)
            wrong.load_state_dict(values | {layer: change(values[layer])}, strict=False)
            return wrong(prompt[None]).logits[0]

        return logits

    yield changed(lambda x: x.roll(1, 1))
    yield changed(lambda x: torch.cat([x[: len(x) // 2], 1.25 * x[len(x) // 2 :]]))


# --- integers --------------------------------------------------------------------------------------------------------


def grouped(weight: np.ndarray, bits: int, group: int, sym: bool, scale_dtype, order=None, lowest_zero: int = 0):
    """Codes, scales and zeros of rows in groups of columns, rounded to the nearest; `order[i]` is the column at place i."""
    rows, columns = weight.shape
    order = np.arange(columns) if order is None else order
    groups = -(-columns // group)
    codes = np.zeros((rows, columns), np.int64)
    scales = np.zeros((rows, groups), np.float32)
    zeros = np.zeros((rows, groups), np.int64)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    for g in range(groups):
        at = order[g * group : (g + 1) * group]
        part = weight[:, at].astype(np.float64)
        if sym:
            scale = 2 * np.abs(part).max(1) / top
            zero = np.full(rows, middle)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / top
            zero = np.clip(np.round(-low / scale), lowest_zero, top)
        scale = torch.from_numpy(scale).to(scale_dtype).float().numpy()
        codes[:, at] = np.clip(np.round(part / scale[:, None]) + zero[:, None], 0, top)
        scales[:, g], zeros[:, g] = scale, zero
    # Of each column of the matrix.
    group_of = np.empty(columns, np.int64)
    group_of[order] = np.arange(columns) // group
    values = (codes - zeros[:, group_of]) * scales[:, group_of].astype(np.float64)
    return codes, scales, zeros, group_of, torch.from_numpy(values.astype(np.float32))


def pack_words(codes: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """Neighbours along an axis in words of 32 bits, from the lowest on; zeros fill the last one."""
    per_word = 32 // bits
    codes = np.moveaxis(codes, axis, -1).astype(np.uint64)
    padded = -codes.shape[-1] % per_word
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padded)])
    codes = codes.reshape(*codes.shape[:-1], -1, per_word)
    words = (codes << (bits * np.arange(per_word, dtype=np.uint64))).sum(-1).astype(np.uint32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def whole(group: int, columns: int) -> int:
    return columns if group == -1 else group


def pack_gptq(weight: np.ndarray, variant: dict, rng):
    config = variant["config"]
    bits, group = config["bits"], whole(config["group_size"], weight.shape[1])
    order = rng.permutation(weight.shape[1]) if config["desc_act"] else None
    # Zeros less one: none is 0.
    lowest = 1 if variant["zero_plus_one"] else 0
    codes, scales, zeros, group_of, values = grouped(weight, bits, group, config["sym"], torch.float16, order, lowest)
    file = {
        "qweight": pack_words(codes.T, bits, 0),
        "qzeros": pack_words(zeros.T - lowest, bits, 1),
        "scales": torch.from_numpy(scales.T.copy()).to(torch.float16),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    if not config["desc_act"] and bits == 8:
        del file["g_idx"]
    return file, values


def pack_awq(weight: np.ndarray, variant: dict, rng):
    group = whole(variant["config"]["group_size"], weight.shape[1])
    codes, scales, zeros, _, values = grouped(weight, 4, group, False, torch.float16)
    # Outputs of a word in AutoAWQ's order.
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    mixed = lambda x: x.reshape(len(x), -1, 8)[:, :, order].reshape(len(x), -1)
    file = {
        "qweight": pack_words(mixed(codes.T), 4, 1),
        "qzeros": pack_words(mixed(zeros.T), 4, 1),
        "scales": torch.from_numpy(scales.T.copy()).to(torch.float16),
    }
    return file, values


def pack_compressed(weight: np.ndarray, variant: dict, rng):
    args = variant["config"]["config_groups"]["group_0"]["weights"]
    if args["type"] == "float":
        spans = {"tensor": weight.shape, "channel": (1, weight.shape[1]), "block": args.get("block_structure")}
        file, values = scaled_floats(weight, spans[args["strategy"]], torch.float32 if args["strategy"] == "block" else variant["scales"])
        scale = file.pop("scale")
        file["weight_scale"] = scale.reshape(-1) if args["strategy"] == "tensor" else scale
        if variant.get("input_scales"):
            file["input_scale"] = torch.ones(1)
        return file, values
    group = weight.shape[1] if args["strategy"] == "channel" else args["group_size"]
    order = rng.permutation(weight.shape[1]) if args["actorder"] == "group" else None
    codes, scales, zeros, group_of, values = grouped(weight, args["num_bits"], group, args["symmetric"], variant["scales"], order)
    file = {"weight_scale": torch.from_numpy(scales).to(variant["scales"])}
    if variant["config"]["format"] == "int-quantized":
        file["weight"] = torch.from_numpy((codes - 128).astype(np.int8))
        return file, values
    file["weight_packed"] = pack_words(codes, args["num_bits"], 1)
    file["weight_shape"] = torch.tensor(weight.shape)
    if not args["symmetric"]:
        file["weight_zero_point"] = pack_words(zeros, args["num_bits"], 0)
    if args["actorder"] == "group":
        file["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return file, values


# --- floats ----------------------------------------------------------------------------------------------------------


def scaled_floats(weight: np.ndarray, block, scale_dtype):
    """Bytes and scales of blocks of rows and columns."""
    rows, columns = weight.shape
    height, width = block
    grid = (-(-rows // height), -(-columns // width))
    scales = torch.zeros(grid)
    spread = torch.zeros(rows, columns)
    weight = torch.from_numpy(weight)
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = (weight[at].abs().max() / 448.0).to(scale_dtype).float()
            spread[at] = scales[i, j]
    narrow = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": narrow, "scale": scales.to(scale_dtype)}, narrow.float() * spread


def pack_float8(weight: np.ndarray, variant: dict, rng):
    block = {"tensor": weight.shape, "rows": (1, weight.shape[1]), "block": variant["config"].get("weight_block_size")}
    file, values = scaled_floats(weight, block[variant["scale"]], torch.float32)
    scale = file.pop("scale")
    if variant["scale"] == "block":
        file["weight_scale_inv"] = scale
    else:
        file["weight_scale"] = scale.reshape(()) if variant["scale"] == "tensor" else scale
    if variant.get("input_scales"):
        file["input_scale"] = torch.tensor(0.02)
    return file, values


PACKERS = {"gptq": pack_gptq, "awq": pack_awq, "compressed": pack_compressed, "float8": pack_float8}
