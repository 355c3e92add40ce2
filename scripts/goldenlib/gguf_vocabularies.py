"""Vocabularies as GGUF files have them, made of tiny tokenizers in the published layouts."""

import io
import json
from dataclasses import dataclass

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from . import corpus, tokenizers_cases
from .common import require

# Kinds of tokens, `llama_token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PIECES_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}"
    "{{ eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)


@dataclass
class Vocabulary:
    """What a GGUF file has of a tokenizer, and the tokenizer."""

    reference: object
    tokens: list
    types: list
    # Writes the rest of it.
    describe: object
    template: str


def byte_level(backend: str, pre: str, special: dict, template: str, padded: int = 0, add_bos=None, ends=()) -> Vocabulary:
    """Of a byte-level `tokenizer.json`, with unused tokens up to `padded`. `ends`: further ids that end an answer."""
    reference = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), **special)
    reference.chat_template = template
    parsed = json.loads(backend)
    tokens = {id: token for token, id in parsed["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    for token in parsed["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    for id in range(len(tokens), padded):
        tokens[id] = f"[PAD{id}]"
        kinds[id] = UNUSED
    order = range(len(tokens))

    def describe(writer) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in parsed["model"]["merges"]]
        writer.add_token_merges([" ".join(pair) for pair in pairs])
        add_ids(writer, reference)
        for name, id in ends:
            getattr(writer, f"add_{name}_token_id")(id)
        if add_bos is not None:
            writer.add_add_bos_token(add_bos)

    return Vocabulary(reference, [tokens[id] for id in order], [kinds[id] for id in order], describe, template)


def add_ids(writer, reference) -> None:
    for name in ("bos", "eos", "pad", "unk"):
        id = getattr(reference, f"{name}_token_id")
        if id is not None:
            getattr(writer, f"add_{name}_token_id")(id)


def smollm_backend() -> str:
    """As SmolLM2 is published: digits alone, special tokens before all others."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pairs = tokenizers_cases.train_bpe(tokenizers_cases.words(split, corpus.TRAINING), 240)
    tokens = special + list(tokenizers_cases.bytes_to_unicode().values()) + ["".join(pair) for pair in pairs]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizers_cases.add_special(tokenizer, special)
    return tokenizer.to_str(pretty=False)


def sentence_piece() -> Vocabulary:
    """Of a SentencePiece model of pairs, as Llama 2's `tokenizer.json` is published."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.TRAINING),
        model_writer=file,
        model_type="bpe",
        vocab_size=620,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.995,
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    size = pieces.vocab_size()
    tokens = [pieces.id_to_piece(id) for id in range(size)]
    scores = [pieces.get_score(id) for id in range(size)]
    kinds = [piece_kind(pieces, id) for id in range(size)]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, {token: score for token, score in zip(tokens, scores)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    reference = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    reference.chat_template = PIECES_TEMPLATE
    plain = [text for text in corpus.STRINGS if text and "\x00" not in text]
    same = [reference(text, add_special_tokens=False).input_ids == pieces.encode(text) for text in plain]
    require(all(same), f"sentencepiece gives the same ids of {len(plain)} strings: {[t for t, s in zip(plain, same) if not s]}")

    def describe(writer) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        add_ids(writer, reference)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(True)

    return Vocabulary(reference, tokens, kinds, describe, PIECES_TEMPLATE)


def piece_kind(pieces, id: int) -> int:
    tests = [(pieces.is_unknown, UNKNOWN), (pieces.is_control, CONTROL), (pieces.is_unused, UNUSED), (pieces.is_byte, BYTE)]
    return next((kind for test, kind in tests if test(id)), NORMAL)
