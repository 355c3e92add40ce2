"""Llama and Qwen2: four tiny checkpoints, logits of whole prompts, greedy tokens, rendered chats."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from . import tokenizers_cases as tokenizers
from .common import fresh_case, normal, randomise, read_json, relative_difference, require, write_golden, write_json

GREEDY_TOKENS = 48
# The best two logits of every greedy step are further apart than f32 rounding can bring them.
MARGIN = 1e-2

LLAMA_TEMPLATE = """\
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_text = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system_text = '' %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- if system_text or tools is not none %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_text + '<|eot_id|>' }}
{%- endif %}
{%- for message in rest %}
    {%- if message['role'] not in ['user', 'assistant', 'system'] %}
        {{- raise_exception('Unknown role: ' + message['role']) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Other habits of published templates: a namespace, loop variables, string methods, a JSON dump.
QWEN_TEMPLATE = """\
{%- set state = namespace(seen_user=false) %}
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {%- set state.seen_user = true %}
    {%- endif %}
    {%- if message.role == 'assistant' and not loop.last and message.content.startswith('{') %}
        {{- '<|im_start|>assistant\\n<tool_call>\\n' + (message.content | tojson) + '\\n</tool_call><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if not state.seen_user %}
    {{- raise_exception('No user message') }}
{%- endif %}
{%- if add_generation_prompt is defined and add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

PROMPTS = [
    "A small boat",
    "고양이 한 마리가 창가에서 잠을 자고 있다. The cat 🐱 can't sleep.",
    "The lighthouse keeper counts the ships that pass in the night, and every morning he writes 3, 14 and 159 into a "
    "yellow notebook.\n\nWe walked along the river until the lights of the town were behind us. 안녕하세요!",
]

CHATS = [
    [{"role": "user", "content": "What is the largest city?"}],
    [
        {"role": "system", "content": "  You answer in one sentence.\n"},
        {"role": "user", "content": "안녕하세요, 무엇을 도와드릴까요? 😀"},
    ],
    [
        {"role": "user", "content": "Read the file "},
        {"role": "assistant", "content": '{"name": "read", "path": "a \\"b\\" <c> 한국"}'},
        {"role": "user", "content": "\n Now\tstop.  "},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why? <|eot_id|> <|im_end|>"},
    ],
]


@dataclass
class Case:
    """One checkpoint and how it is published."""

    model: Callable
    config: object
    install: Callable
    template: str
    template_file: bool
    shard_size: str
    dtype: torch.dtype
    publish: Callable
    notes: list = field(default_factory=list)


def make() -> None:
    transformers.utils.logging.disable_progress_bar()
    for name, case in cases().items():
        make_case(name, case)


def make_case(name: str, case: Case) -> None:
    folder = fresh_case(name)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    tokenizer = install_tokenizer(case, checkpoint)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    seed, model = separated_model(case, len(tokenizer), prompts)
    unpublished = answers(model, prompts)
    publish(case, model, checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tensors = answers(model, prompts)
    require(
        all(torch.equal(t, unpublished[k]) for k, t in tensors.items()), f"{name}: the published files are the model"
    )
    facts = {
        "dtype": str(case.dtype).removeprefix("torch."),
        "seed": seed,
        "reference": f"transformers.{type(model).__name__}",
        "prompts": PROMPTS,
        "chats": [chat(tokenizer, messages) for messages in CHATS],
        "greedy_text": [
            tokenizer.decode(tensors[f"greedy.{i}"], skip_special_tokens=True) for i in range(len(prompts))
        ],
        "notes": case.notes,
    }
    check(name, checkpoint, model, prompts, tensors)
    write_golden(folder, facts, tensors)


def install_tokenizer(case: Case, checkpoint: Path):
    if case.template_file:
        case.install(checkpoint)
        (checkpoint / "chat_template.jinja").write_text(case.template, encoding="utf-8")
    else:
        case.install(checkpoint, chat_template=case.template)
    return AutoTokenizer.from_pretrained(checkpoint)


def chat(tokenizer, messages) -> dict:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return {"messages": messages, "text": text, "ids": ids}


# --- the model -------------------------------------------------------------------------------------------------------


def separated_model(case: Case, tokens: int, prompts):
    """The first seed whose greedy answers are varied and have no near ties."""
    for seed in range(1000):
        model = case.model(case.config).eval()
        randomise(model, seed, overrides=WEIGHTS)
        # As in published checkpoints with a padded vocabulary, tokens that do not exist are never likely.
        model.get_output_embeddings().weight[tokens:] *= 0.01
        for parameter in model.parameters():
            parameter.copy_(parameter.to(case.dtype))
        if all(is_separated(*greedy(model, prompt)) for prompt in prompts):
            print(f"  seed {seed}")
            return seed, model
    raise SystemExit("FAILED: no seed separates the logits")


def is_separated(tokens, margins) -> bool:
    return margins.min().item() > MARGIN and len(set(tokens.tolist())) >= GREEDY_TOKENS // 3


WEIGHTS = [
    # Sharp attention, so that positions matter; layers that outweigh the embedding, so that tied models do not echo.
    ("q_proj.weight", lambda p, g: normal(p, g, 1.6 / math.sqrt(p.shape[1]))),
    ("k_proj.weight", lambda p, g: normal(p, g, 1.6 / math.sqrt(p.shape[1]))),
    ("_proj.bias", lambda p, g: normal(p, g, 0.5)),
    ("o_proj.weight", lambda p, g: normal(p, g, 1.5 / math.sqrt(p.shape[1]))),
    ("down_proj.weight", lambda p, g: normal(p, g, 2.0 / math.sqrt(p.shape[1]))),
    ("lm_head.weight", lambda p, g: normal(p, g, 4.0 / math.sqrt(p.shape[1]))),
    ("embed_tokens.weight", lambda p, g: normal(p, g, 0.5)),
]


def greedy(model, prompt, length=GREEDY_TOKENS):
    """`length` tokens after `prompt`, never stopping, and how far the best logit led at each."""
    ids, past, tokens, margins = torch.tensor([prompt]), None, [], []
    for _ in range(length):
        answer = model(ids, past_key_values=past, use_cache=True)
        past, best = answer.past_key_values, answer.logits[0, -1].topk(2)
        margins.append(best.values[0] - best.values[1])
        tokens.append(best.indices[0])
        ids = best.indices[:1].view(1, 1)
    return torch.stack(tokens), torch.stack(margins)


def answers(model, prompts) -> dict:
    tensors = {}
    for i, prompt in enumerate(prompts):
        tensors[f"prompt.{i}"] = torch.tensor(prompt)
        tensors[f"logits.{i}"] = model(torch.tensor([prompt])).logits[0]
        tensors[f"greedy.{i}"] = greedy(model, prompt)[0]
    return tensors


# --- publishing ------------------------------------------------------------------------------------------------------


def publish(case: Case, model, checkpoint: Path) -> None:
    """`save_pretrained` in the dtype of the case; then the JSON files get the spelling of the case."""
    model.to(case.dtype).save_pretrained(checkpoint, max_shard_size=case.shard_size)
    case.publish(checkpoint)


def transformers_4(checkpoint: Path, rope_scaling: dict | None, version: str) -> None:
    """`rope_theta`, `rope_scaling` and `torch_dtype` in config.json instead of `rope_parameters` and `dtype`."""
    config = read_json(checkpoint / "config.json")
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope_scaling, "torch_dtype": config.pop("dtype")}
    config["transformers_version"] = version
    write_json(checkpoint / "config.json", dict(sorted(config.items())))


def set_generation(checkpoint: Path, **fields) -> None:
    write_json(checkpoint / "generation_config.json", fields)


def publish_llama_tied(checkpoint: Path) -> None:
    transformers_4(checkpoint, LLAMA3_ROPE, "4.45.0.dev0")
    eos = special("llama", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    config = read_json(checkpoint / "config.json") | {"eos_token_id": eos}
    write_json(checkpoint / "config.json", config)
    set_generation(
        checkpoint,
        bos_token_id=config["bos_token_id"],
        eos_token_id=eos,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        transformers_version="4.45.0.dev0",
    )


def publish_llama_untied(checkpoint: Path) -> None:
    config = read_json(checkpoint / "config.json")
    assert "rope_parameters" in config and "dtype" in config and "rope_theta" not in config
    set_generation(
        checkpoint, bos_token_id=config["bos_token_id"], eos_token_id=config["eos_token_id"], _from_model_config=True
    )


def publish_qwen2(checkpoint: Path) -> None:
    transformers_4(checkpoint, None, "4.43.1")
    config = read_json(checkpoint / "config.json")
    del config["rope_scaling"]  # Qwen2.5 publishes none
    config.pop("layer_types", None)
    write_json(
        checkpoint / "config.json",
        config | {"sliding_window": 512, "max_window_layers": 3, "use_sliding_window": False},
    )
    end, im_end = special("qwen2", "<|endoftext|>", "<|im_end|>")
    set_generation(
        checkpoint,
        bos_token_id=end,
        pad_token_id=end,
        eos_token_id=[im_end, end],
        do_sample=True,
        repetition_penalty=1.05,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        transformers_version="4.37.0",
    )


def publish_qwen2_yarn(checkpoint: Path) -> None:
    # The spelling of Qwen2.5's own instructions has "type", not "rope_type".
    transformers_4(checkpoint, YARN_ROPE, "4.46.1")
    config = read_json(checkpoint / "config.json")
    config.pop("layer_types", None)
    write_json(checkpoint / "config.json", config)
    end, im_end = special("qwen2", "<|endoftext|>", "<|im_end|>")
    set_generation(checkpoint, bos_token_id=end, eos_token_id=im_end, do_sample=False)


def special(family: str, *names) -> list[int]:
    backend = json.loads({"llama": tokenizers.llama_backend, "qwen2": tokenizers.qwen_backend}[family]())
    ids = {token["content"]: token["id"] for token in backend["added_tokens"]}
    return [ids[name] for name in names]


# --- the four cases --------------------------------------------------------------------------------------------------

LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
# As Qwen2.5 publishes it: max_position_embeddings is the context before the extension.
YARN_ROPE = {"factor": 6.0, "original_max_position_embeddings": 32, "type": "yarn"}


def cases() -> dict:
    begin, eot = special("llama", "<|begin_of_text|>", "<|eot_id|>")
    end, im_end = special("qwen2", "<|endoftext|>", "<|im_end|>")
    common = dict(initializer_range=0.02, use_cache=True)
    llama = dict(bos_token_id=begin, eos_token_id=eot, pad_token_id=None, rms_norm_eps=1e-5, vocab_size=492, **common)
    qwen = dict(bos_token_id=end, eos_token_id=im_end, rms_norm_eps=1e-6, vocab_size=536, **common)
    return {
        # Heads are wider than hidden / heads: 6 x 16 against 48.
        "llama-tied": Case(
            LlamaForCausalLM,
            LlamaConfig(
                hidden_size=48,
                intermediate_size=104,
                num_hidden_layers=3,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                rope_parameters={"rope_theta": 10000.0, **LLAMA3_ROPE},
                **llama,
            ),
            tokenizers.install_llama,
            LLAMA_TEMPLATE,
            False,
            "100KB",
            torch.float32,
            publish_llama_tied,
            ["config.json in the spelling of transformers 4; three shards or more; three EOS ids"],
        ),
        # One key-value head for five query heads.
        "llama-untied": Case(
            LlamaForCausalLM,
            LlamaConfig(
                hidden_size=80,
                intermediate_size=136,
                num_hidden_layers=3,
                num_attention_heads=5,
                num_key_value_heads=1,
                max_position_embeddings=160,
                tie_word_embeddings=False,
                attention_bias=True,
                rope_parameters={"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.5},
                **llama,
            ),
            tokenizers.install_llama,
            LLAMA_TEMPLATE,
            False,
            "10MB",
            torch.float32,
            publish_llama_untied,
            ["config.json as transformers 5 writes it; one EOS id"],
        ),
        "qwen2": Case(
            Qwen2ForCausalLM,
            Qwen2Config(
                hidden_size=72,
                intermediate_size=152,
                num_hidden_layers=4,
                num_attention_heads=6,
                num_key_value_heads=3,
                max_position_embeddings=256,
                tie_word_embeddings=False,
                rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
                **qwen,
            ),
            tokenizers.install_qwen,
            QWEN_TEMPLATE,
            True,
            "10MB",
            torch.bfloat16,
            publish_qwen2,
            [
                "published in bf16, answered in f32 from those bf16 weights",
                "the vocabulary is padded: 536 rows, fewer tokens",
            ],
        ),
        "qwen2-yarn": Case(
            Qwen2ForCausalLM,
            Qwen2Config(
                hidden_size=64,
                intermediate_size=120,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
                tie_word_embeddings=True,
                rope_parameters={
                    "rope_theta": 10000.0,
                    "rope_type": "yarn",
                    "factor": 6.0,
                    "original_max_position_embeddings": 32,
                },
                **qwen,
            ),
            tokenizers.install_qwen,
            QWEN_TEMPLATE,
            False,
            "10MB",
            torch.float32,
            publish_qwen2_yarn,
            ['rope_scaling spelled with "type"', "the vocabulary is padded: 536 rows, fewer tokens"],
        ),
    }


# --- checks ----------------------------------------------------------------------------------------------------------


def check(name: str, checkpoint: Path, model, prompts, tensors) -> None:
    """That nothing about the case is trivially right."""
    files = sorted(f.name for f in checkpoint.glob("*.safetensors"))
    if name == "llama-tied":
        require(
            len(files) >= 3 and (checkpoint / "model.safetensors.index.json").exists(), f"{name}: {len(files)} shards"
        )
        index = read_json(checkpoint / "model.safetensors.index.json")
        require("lm_head.weight" not in index["weight_map"], f"{name}: no lm_head is published")
    last = [tensors[f"logits.{i}"][-1] for i in range(len(prompts))]
    require(relative_difference(last[0], last[1]) > 1e-2, f"{name}: another prompt, other logits")
    long = torch.tensor([prompts[-1]])
    require(long.shape[1] > 64, f"{name}: the long prompt has {long.shape[1]} tokens")
    expected = tensors[f"logits.{len(prompts) - 1}"]
    exact = copy.deepcopy(model).double()(long).logits[0].float()
    require(
        relative_difference(expected, exact) < 2e-5,
        f"{name}: f64 differs by {relative_difference(expected, exact):.1e}",
    )
    for what, change in mutations(model):
        difference = relative_difference(expected, changed_logits(model, change, long))
        require(difference > 1e-2, f"{name}: {what} moves the logits by {difference:.2g}")
    print(f"  logits of {name}: largest {expected.abs().max():.1f}, std {expected.std():.2f}")


def mutations(model):
    """Mistakes that a port could make, as changes of the reference."""
    rope = model.model.rotary_emb
    kind = model.config.rope_parameters["rope_type"]
    theta, width = model.config.rope_parameters["rope_theta"], 2 * rope.inv_freq.shape[0]
    unscaled = 1.0 / theta ** (torch.arange(0, width, 2) / width)
    if kind != "default":
        yield f"{kind} rope scaling left out", [(rope.inv_freq, unscaled)]
    yield "rope left out", [(rope.inv_freq, torch.zeros_like(unscaled))]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    if biases:
        yield "biases left out", [(b, torch.zeros_like(b)) for b in biases]
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    yield "norm weights of one", [(n, torch.ones_like(n)) for n in norms]
    key = model.model.layers[0].self_attn.k_proj.weight
    if key.shape[0] > width:
        yield "key-value heads swapped", [(key, key.roll(width, 0))]


def changed_logits(model, change, ids):
    kept = [tensor.clone() for tensor, _ in change]
    for tensor, value in change:
        tensor.copy_(value)
    logits = model(ids).logits[0]
    for (tensor, _), value in zip(change, kept):
        tensor.copy_(value)
    return logits
