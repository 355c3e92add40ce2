"""Damaged checkpoints: each is refused in one line within limits, or serves.

`tale inspect` judges every one; what it accepts has to generate something. Nothing may panic, be ended by a signal, or
take more than 20 s or 1 GiB.
"""

import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import commands
import mutations
import pictures
from attack import Run, attack
from commands import End, Ended
from mutations import (
    TEXT_CHECKPOINTS,
    Damage,
    Steps,
    add_bpe_piece,
    add_spiece,
    add_unigram_piece,
    set_value,
    set_values,
    write,
)
from templates import TEMPLATES

WORKERS = 2
# Random checkpoints of the short and of the long form.
SHORT_COUNT, LONG_COUNT = 100, 2_000
# What a checkpoint that is accepted may end its requests with: values that are not finite come from weights, of which
# headers say nothing; a template may fail for some messages, or make more text or less than can be answered.
OF_REQUEST = ["not finite", "template", "fit this model's context", "has no tokens"]


def in_file(file: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Damage to one file of a copy."""
    return lambda folder: damage(folder / file)


def of_rope(**fields: Any) -> Callable[[Path], None]:
    return set_values("config.json", rope_parameters=None, rope_scaling=fields)


def of_tokenizer(steps: Steps, raw: str) -> Damage:
    name = f"tokenizer.json {'.'.join(map(str, steps))} = {raw}"
    return Damage(name, "qwen2", in_file("tokenizer.json", lambda path: set_value(path, steps, raw)))


def not_a_regular_file(checkpoint: str, file: str) -> list[Damage]:
    kinds = {
        "a fifo": mutations.make_fifo,
        "/dev/zero": lambda path: mutations.make_link(path, "/dev/zero"),
        "a circle of links": lambda path: mutations.make_link(path, path.name),
        "a folder": mutations.make_folder,
        "64 GiB": mutations.make_huge,
    }
    return [Damage(f"{file} is {name}", checkpoint, in_file(file, damage)) for name, damage in kinds.items()]


# What `inspect` has to refuse: sizes that no file bears out, values under which a model answers nothing or lies.
REFUSED = [
    *[Damage(f"llama head_dim {n}", "llama-tied", set_values("config.json", head_dim=n)) for n in [2**31, 2**53, 2**62]],
    Damage("hidden_size 2^31, one head", "qwen2", set_values("config.json", hidden_size=2**31, num_attention_heads=1)),
    Damage("llama num_hidden_layers 10^9", "llama-tied", set_values("config.json", num_hidden_layers=10**9)),
    Damage("llama vocab_size 2^40", "llama-tied", set_values("config.json", vocab_size=2**40)),
    Damage("sdxl VAE layers_per_block 10^8", "sdxl-a", set_values("vae/config.json", layers_per_block=10**8)),
    Damage("wan num_layers 10^6", "wan-a", set_values("transformer/config.json", num_layers=10**6)),
    Damage("wan VAE base_dim 2^40", "wan-a", set_values("vae/config.json", base_dim=2**40)),
    Damage("flux num_layers 10^8", "flux-schnell", set_values("transformer/config.json", num_layers=10**8)),
    Damage("t5 num_layers 10^8", "flux-schnell", set_values("text_encoder_2/config.json", num_layers=10**8)),
    Damage("rms_norm_eps -1", "llama-tied", set_values("config.json", rms_norm_eps=-1)),
    Damage("generation_config.top_p 1.5", "llama-tied", set_values("generation_config.json", top_p=1.5)),
    Damage("rope factor 0", "llama-untied", of_rope(rope_type="linear", factor=0)),
    Damage("rope factor -1", "llama-untied", of_rope(rope_type="linear", factor=-1)),
    Damage("yarn without a factor", "qwen2-yarn", of_rope(type="yarn", original_max_position_embeddings=32)),
    Damage("wan latents_std 0", "wan-a", set_values("vae/config.json", latents_std=[0.0] * 16)),
    *not_a_regular_file("qwen2", "config.json"),
    *not_a_regular_file("qwen2", "tokenizer.json"),
    *not_a_regular_file("qwen2", "model.safetensors"),
    *not_a_regular_file("flux-dev", "model_index.json"),
    *not_a_regular_file("flux-dev", "tokenizer_2/spiece.model"),
    *not_a_regular_file("llama-tied", "model.safetensors.index.json"),
    of_tokenizer(("normalizer",), '{"type": "Replace", "pattern": {"String": ""}, "content": "a"}'),
    of_tokenizer(("normalizer",), '{"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}'),
    of_tokenizer(("pre_tokenizer",), '{"type": "FixedLength", "length": 0}'),
]

# Odd, but nothing that a name or a size forbids: either answer will do.
ODD = [
    of_tokenizer(("model", "continuing_subword_prefix"), '"##"'),
    Damage("a piece of 131 kB", "wan-a", in_file("tokenizer/spiece.model", lambda path: add_spiece(path, b"a" * 131_000))),
    Damage(
        "a piece of 200 kB", "wan-b", in_file("tokenizer/tokenizer.json", lambda path: add_unigram_piece(path, "a" * 200_000))
    ),
    Damage("a piece of 200 kB", "qwen2", in_file("tokenizer.json", lambda path: add_bpe_piece(path, "a" * 200_000))),
    *[
        Damage(f"template: {name}", "qwen2", in_file("chat_template.jinja", partial(write, content=text)))
        for name, text in TEMPLATES.items()
    ],
]


@attack()
def harmful(run: Run) -> None:
    """Every checkpoint that once did harm, or was accepted and then answered nothing."""
    judged = judge(run, REFUSED)
    report(run, judged)
    accepted = [told_of(damage, ended) for damage, ended, _ in judged if ended.end is End.ACCEPTED]
    run.count_is_zero("accepted although nothing can be answered", accepted)


@attack()
def odd(run: Run) -> None:
    """Templates that ask for too much, pieces that are far too long."""
    report(run, judge(run, ODD))


@attack()
def mutated(run: Run) -> None:
    """Random damage to values, keys and files of every golden."""
    count = run.count or run.pick(SHORT_COUNT, LONG_COUNT)
    report(run, judge(run, mutations.random_damages(run.goldens, run.random(), count)))


Judged = tuple[Damage, Ended, Ended | None]


def judge(run: Run, damages: Iterable[Damage]) -> list[Judged]:
    """What `inspect` says of each, and how those end that are accepted."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda damage: judge_one(run, damage), damages))


def judge_one(run: Run, damage: Damage) -> Judged:
    with run.subfolder() as folder:
        copy = folder / "checkpoint"
        copy.mkdir()
        path = mutations.copied(run.goldens, damage.checkpoint, copy)
        damage.apply(copy)
        inspected = commands.run([run.binary, "inspect", path], folder)
        if inspected.end is not End.ACCEPTED:
            return damage, inspected, None
        return damage, inspected, commands.run(generate(run.binary, damage, path, folder), folder)


def generate(binary: Path, damage: Damage, path: Path, folder: Path) -> list[str | Path]:
    """The smallest request of this medium."""
    if damage.checkpoint.startswith(TEXT_CHECKPOINTS):
        messages = folder / "messages.json"
        messages.write_text(json.dumps([{"role": "user", "content": "hi"}]))
        return [binary, "generate", "text", "--model", path, "--messages", messages, "--max-tokens", "2"]
    small = ["--prompt", "hi", "--num-inference-steps", "1", "--width", "64", "--height", "64"]
    if damage.checkpoint.startswith("wan"):
        return [binary, "generate", "video", "--model", path, *small, "--num-frames", "5", "--output", folder / "out.mp4"]
    if "refiner" in damage.checkpoint:  # which makes pictures from pictures only
        image = folder / "in.png"
        image.write_bytes(pictures.grey(64, 64))
        small += ["--image", str(image), "--strength", "1"]
    return [binary, "generate", "image", "--model", path, *small, "--output", folder / "out.png"]


def report(run: Run, judged: list[Judged]) -> None:
    later = [(damage, ended) for damage, _, ended in judged if ended is not None]
    report_ends(run, "inspect", [(damage, ended) for damage, ended, _ in judged])
    report_ends(run, "generate with what was accepted", later)
    refused = [(damage, ended) for damage, ended in later if ended.end is End.REFUSED]
    late = [told_of(damage, ended) for damage, ended in refused if not is_of_request(ended)]
    run.count_is_zero("accepted by inspect, then refused", late)


def report_ends(run: Run, what: str, ended: list[tuple[Damage, Ended]]) -> None:
    """How many ended in which way; the bound is on those ways that are faults."""
    ends = [each.end for _, each in ended]
    told = ", ".join(f"{ends.count(end)} {end.value}" for end in End if end in ends)
    faults = [told_of(damage, each) for damage, each in ended if each.end.is_fault]
    for fault in faults:
        print(f"# {run.attack}: {what}: {fault}", file=sys.stderr, flush=True)
    run.check(what, f"{told} of {len(ended)}", "0 faults", not faults)


def is_of_request(ended: Ended) -> bool:
    return any(words in ended.detail for words in OF_REQUEST)


def told_of(damage: Damage, ended: Ended) -> str:
    return f"{damage.checkpoint}: {damage.name}: {ended.end.value}: {ended.detail}"
