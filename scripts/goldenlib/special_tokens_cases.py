"""Which file decides about special tokens: folders whose files disagree, and what transformers makes of them.

All have the `tokenizer.json` of `tokenizers/llama`; the golden holds the small files beside it.
"""

import json
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from .common import fresh_case, require, write_golden
from .tokenizers_cases import llama_backend

BASE = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "clean_up_tokenization_spaces": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
MAP = {"bos_token": "<|start_header_id|>", "eos_token": {"content": "<|eom_id|>", "lstrip": True}, "pad_token": "<pad>"}


def make() -> None:
    folder = fresh_case("tokenizers/special-tokens")
    folders = [{"name": name, "files": files, **describe(files)} for name, files in variants().items()]
    answers = {json.dumps([f["cases"], f["special_tokens"]]) for f in folders}
    require(len(answers) >= 10, f"{len(answers)} different answers from {len(folders)} folders")
    write_golden(folder, {"tokenizer": "tokenizers/llama/tokenizer.json", "folders": folders})


def variants() -> dict:
    backend = json.loads(llama_backend())
    size = len(backend["model"]["vocab"]) + len(backend["added_tokens"])
    ids = {token["content"]: str(token["id"]) for token in backend["added_tokens"]}

    def entry(content, **flags) -> dict:
        plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        return {"content": content, **plain, **flags}

    def decoder(*entries) -> dict:
        listed = {ids.get(e["content"], str(size)): e for e in entries}
        return {"tokenizer_config.json": {**BASE, "added_tokens_decoder": listed}}

    config = {"tokenizer_config.json": BASE}
    return {
        "config alone": config,
        "map over config": {**config, "special_tokens_map.json": MAP},
        "map without config": {"special_tokens_map.json": MAP},
        "complete config over map": {**decoder(entry("<|eot_id|>")), "special_tokens_map.json": MAP},
        "empty decoder over map": {
            "tokenizer_config.json": {**BASE, "added_tokens_decoder": {}},
            "special_tokens_map.json": MAP,
        },
        "added token": {**config, "added_tokens.json": {"<tool>": size}},
        "added token that the map names": {
            **config,
            "added_tokens.json": {"<tool>": size},
            "special_tokens_map.json": {"pad_token": "<tool>"},
        },
        "added token that is there": {**config, "added_tokens.json": {"<|eom_id|>": int(ids["<|eom_id|>"])}},
        "added token beside a complete config": {**decoder(entry("<|eot_id|>")), "added_tokens.json": {"<tool>": size}},
        "lstrip": decoder(entry("<|eot_id|>", lstrip=True)),
        "rstrip": decoder(entry("<|eot_id|>", rstrip=True)),
        "single word": decoder(entry("<|eot_id|>", single_word=True)),
        "not special": decoder(entry("<|eom_id|>", special=False)),
        "named and not special": decoder(entry("<|eot_id|>", special=False)),
        "one more by id": decoder(entry("<tool>", special=False, normalized=True)),
        "extra list": {"tokenizer_config.json": {**BASE, "extra_special_tokens": ["<tool>", "<|eom_id|>"]}},
        "extra lists joined": {
            "tokenizer_config.json": {**BASE, "extra_special_tokens": ["<tool>"]},
            "special_tokens_map.json": {"extra_special_tokens": ["<image>", "<tool>"]},
        },
        "additional list": {"tokenizer_config.json": {**BASE, "additional_special_tokens": ["<tool>"]}},
        "token of the model's own": {"tokenizer_config.json": {**BASE, "image_token": "<image>"}},
        "extra dictionary": {"tokenizer_config.json": {**BASE, "extra_special_tokens": {"image_token": "<image>"}}},
        "no eos": {"tokenizer_config.json": {**BASE, "eos_token": None}},
    }


TEXTS = [
    "a <|eot_id|> b",
    "a<|eot_id|>b <|eom_id|> c",
    "x <tool> y <image>z",
    "<|start_header_id|>user<|end_header_id|>  <pad>  ",
    "w<tool>w <|eot_id|>",
]


def describe(files: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(llama_backend(), encoding="utf-8")
        for name, value in files.items():
            (Path(folder) / name).write_text(json.dumps(value), encoding="utf-8")
        reference = AutoTokenizer.from_pretrained(folder)
    cases = []
    for text in TEXTS:
        ids = reference(text).input_ids
        cases.append({"text": text, "ids": ids, "decoded": reference.decode(ids, skip_special_tokens=True)})
    return {
        "cases": cases,
        "special_tokens": reference.special_tokens_map,
        "eos_token_id": reference.eos_token_id,
        "vocab_size": len(reference),
    }
