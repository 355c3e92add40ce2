"""Tiny tokenizers in the published layouts, and what the reference classes make of difficult strings."""

import io
import json
from collections import Counter
from functools import cache
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, CLIPTokenizer, T5TokenizerFast

from . import corpus
from .common import fresh_case, require, write_golden, write_json

# The pre-tokenization patterns are part of the published formats.
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

LLAMA_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Ordinary text when decoded, but one token each: Qwen2.5's tool marks.
QWEN_ADDED = ["<tool_call>", "</tool_call>"]

CLIP_MAX_LENGTH = 77
UMT5_EXTRA_IDS = 12


def make() -> None:
    for name, (install, load, special) in FORMATS.items():
        folder = fresh_case(f"tokenizers/{name}")
        install(folder)
        reference = load(folder)
        cases = [describe(reference, text) for text in corpus.STRINGS + special]
        require(len(cases) >= 40, f"{name}: {len(cases)} strings")
        require(len({tuple(c["ids"]) for c in cases}) > 40, f"{name}: the strings are told apart")
        facts = {
            "reference": f"{type(reference).__module__}.{type(reference).__name__}",
            "vocab_size": len(reference),
            "decoded": "decode(ids, skip_special_tokens=True)",
            "notes": NOTES.get(name, []),
            "cases": cases,
        }
        write_golden(folder, facts)


def describe(reference, text: str) -> dict:
    ids = reference(text).input_ids
    return {
        "text": text,
        "ids": ids,
        "ids_no_special": reference(text, add_special_tokens=False).input_ids,
        "decoded": reference.decode(ids, skip_special_tokens=True),
    }


# --- byte-level BPE, Llama 3 and Qwen2 -------------------------------------------------------------------------------


@cache
def llama_backend() -> str:
    tokenizer = byte_level(LLAMA3_PATTERN, merges=230)
    add_special(tokenizer, LLAMA_SPECIAL)
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=[("<|begin_of_text|>", begin)],
            ),
        ]
    )
    tokenizer.model.ignore_merges = True  # as published: a word that is a token is taken whole
    return tokenizer.to_str(pretty=False)


@cache
def qwen_backend() -> str:
    tokenizer = byte_level(QWEN2_PATTERN, merges=260)
    tokenizer.normalizer = normalizers.NFC()
    add_special(tokenizer, QWEN_SPECIAL)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in QWEN_ADDED])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer.to_str(pretty=False)


def byte_level(pattern: str, merges: int) -> Tokenizer:
    """A tokenizer without normaliser and post-processor; ids: the bytes in GPT-2's order, then the merges."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    pairs = train_bpe(words(pre_tokenizer, corpus.TRAINING), merges)
    tokens = list(bytes_to_unicode().values()) + ["".join(pair) for pair in pairs]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def words(pre_tokenizer, sentences) -> Counter:
    return Counter(word for sentence in sentences for word, _ in pre_tokenizer.pre_tokenize_str(sentence))


def train_bpe(words: Counter, merges: int, suffix: str = "") -> list[tuple[str, str]]:
    """The most frequent pair, again and again. The library's trainer breaks ties by chance; this one by the alphabet."""
    spellings = {word: [*word[:-1], word[-1] + suffix] for word in sorted(words)}
    pairs = []
    while len(pairs) < merges:
        counts = Counter()
        for word, symbols in spellings.items():
            for pair in zip(symbols, symbols[1:]):
                counts[pair] += words[word]
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        pairs.append(best)
        spellings = {word: merge(symbols, best) for word, symbols in spellings.items()}
    return pairs


def merge(symbols, pair):
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def add_special(tokenizer: Tokenizer, tokens) -> None:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])


def install_llama(folder: Path, **config) -> None:
    """`tokenizer.json` and `tokenizer_config.json`; `config` adds fields to the latter."""
    (folder / "tokenizer.json").write_text(llama_backend(), encoding="utf-8")
    shared = {
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", {**shared, **config})


def install_qwen(folder: Path, **config) -> None:
    """As [`install_llama`]."""
    (folder / "tokenizer.json").write_text(qwen_backend(), encoding="utf-8")
    shared = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", {**shared, **config})


# --- CLIP ------------------------------------------------------------------------------------------------------------


@cache
def clip_tables() -> tuple[dict, list]:
    """Vocabulary in the published order (bytes, bytes at a word's end, merges, the two special tokens), and merges."""
    split = pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True)
    pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    sentences = [sentence.lower() for sentence in corpus.TRAINING]
    merges = train_bpe(words(pre_tokenizer, sentences), 300, suffix="</w>")
    alphabet = list(bytes_to_unicode().values())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def bytes_to_unicode() -> dict:
    """The printable stand-in of every byte, in the order of GPT-2's and CLIP's vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def install_clip(folder: Path) -> None:
    vocabulary, merges = clip_tables()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": added("<|startoftext|>", normalized=True),
        "eos_token": added("<|endoftext|>", normalized=False),
        "pad_token": "<|endoftext|>",
        "unk_token": added("<|endoftext|>", normalized=False),
    }
    write_json(folder / "special_tokens_map.json", special)
    config = {
        "add_prefix_space": False,
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": CLIP_MAX_LENGTH,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    write_json(folder / "tokenizer_config.json", config)


def added(content: str, normalized: bool) -> dict:
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


# --- T5 and UMT5 -----------------------------------------------------------------------------------------------------


@cache
def t5_model() -> bytes:
    """As published for T5: no BOS, no byte fallback."""
    return train_unigram(vocab_size=700, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@cache
def umt5_model() -> bytes:
    """As published for UMT5: `<s>` before `<unk>`, a piece for every byte."""
    return train_unigram(vocab_size=960, pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True)


def train_unigram(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.TRAINING),
        model_writer=model,
        model_type="unigram",
        character_coverage=1.0,
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def install_t5(folder: Path, tokenizer_json: bool = False) -> None:
    """`spiece.model` with its two small JSON files, or `tokenizer.json` instead of it."""
    extra = [f"<extra_id_{i}>" for i in range(100)]
    install_unigram(folder, t5_model(), {}, extra, tokenizer_json)


def install_umt5(folder: Path, tokenizer_json: bool = False) -> None:
    """As [`install_t5`]."""
    extra = [f"<extra_id_{i}>" for i in range(UMT5_EXTRA_IDS)]
    install_unigram(folder, umt5_model(), {"bos_token": "<s>"}, extra, tokenizer_json)


def install_unigram(folder, model, special, extra, tokenizer_json):
    (folder / "spiece.model").write_bytes(model)
    special = {
        "additional_special_tokens": extra,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        **special,
    }
    write_json(folder / "special_tokens_map.json", special)
    config = {
        **special,
        "clean_up_tokenization_spaces": False,
        "extra_ids": len(extra),
        "model_max_length": 512,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    if tokenizer_json:
        load_unigram(folder).backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "spiece.model").unlink()


def load_unigram(folder: Path):
    """The class that the pipelines load, with the unknown id of the model file.

    transformers 5 fixes the unknown id of `T5Tokenizer` at 2, which is `<s>` in UMT5's vocabulary; the published
    `tokenizer.json` (and so every earlier version) has the model's own, 3.
    """
    tokenizer = T5TokenizerFast.from_pretrained(folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["unk_id"] = next(i for i, (piece, _) in enumerate(backend["model"]["vocab"]) if piece == "<unk>")
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return tokenizer


NOTES = {
    "umt5": [
        "the unknown id is the model file's 3; T5Tokenizer of transformers 5 would say 2 (see load_unigram)",
        "the model file has byte_fallback and a piece for every byte, but the reference class (like the published "
        "tokenizer.json) does not use them: a run of unknown characters is one unknown token",
    ],
}

FORMATS = {
    "llama": (
        install_llama,
        AutoTokenizer.from_pretrained,
        [
            "<|begin_of_text|>",
            "text<|eot_id|>more",
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
            "<|eot_id>",
        ],
    ),
    "qwen2": (
        install_qwen,
        AutoTokenizer.from_pretrained,
        [
            "<|im_start|>user\nHi<|im_end|>\n",
            "a<|endoftext|>b",
            "<tool_call>\n{}\n</tool_call>",
            "<|im_start>",
        ],
    ),
    "clip": (
        install_clip,
        CLIPTokenizer.from_pretrained,
        [
            "<|startoftext|>",
            "a <|endoftext|> b",
            "<|EndOfText|>",
            "A Photograph of an Astronaut, riding a HORSE!",
        ],
    ),
    "t5": (
        install_t5,
        load_unigram,
        ["a <extra_id_0> b", "</s>", "text</s> more", "<pad><unk>", "<extra_id_99><extra_id_5>x"],
    ),
    "umt5": (install_umt5, load_unigram, ["a <extra_id_0> b", "</s>", "<s>text</s> more", "<pad><unk>", "<0x41>"]),
}
