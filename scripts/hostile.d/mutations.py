"""Damage to checkpoints: copies of the goldens in which one thing is hostile.

Owns: what is damaged and how, named cases and random ones. Does not know: what a program makes of it.
"""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Goldens with a folder `checkpoint`, a folder of a diffusers pipeline or of a language model.
CHECKPOINTS = [
    "llama-tied",
    "llama-untied",
    "qwen2",
    "qwen2-yarn",
    "flux-dev",
    "flux-schnell",
    "sdxl-a",
    "sdxl-b",
    "wan-a",
    "wan-b",
    "edits/sdxl-refiner",
]
TEXT_CHECKPOINTS = ("llama", "qwen2", "language-gguf")
# A GGUF transformer over the other parts of flux-schnell.
GGUF = "single-files"
GGUF_FILE = "transformer.gguf"
# A language model in one GGUF file, and how much of it is header.
LANGUAGE_GGUF = "language-gguf/qwen2-yarn"
LANGUAGE_GGUF_FILE = "model.gguf"
LANGUAGE_GGUF_HEADER = 15 << 10
# Bytes of a sparse file that stands for one that is far too large; it takes no place on the disk.
HUGE_BYTES = 64 << 30
# A list or object of more children is damaged at a few of them only.
MOST_CHILDREN = 40
# Stands for the damaged value until the text is written; JSON itself cannot spell all of HOSTILE_VALUES.
PLACE = "@hostile@"

# As they stand in the file. Each is a shape, a size or a kind that some reader has believed.
HOSTILE_VALUES = [
    "null",
    "true",
    "false",
    "-1",
    "0",
    "1",
    "0.5",
    "-0.5",
    "1.5",
    "1e308",
    "-1e308",
    "1e999",
    "1e-320",
    "NaN",
    "Infinity",
    "2147483648",
    "4294967296",
    "9007199254740992",
    "4611686018427387904",
    "9223372036854775807",
    "18446744073709551616",
    "100000000",
    '""',
    '"x"',
    '"\\u0000"',
    '"../../../../etc/passwd"',
    '"' + "x" * 100_000 + '"',
    "[]",
    "{}",
    "[null]",
    "[-1]",
    "[1e308, 1e308]",
    "[" * 200 + "]" * 200,
    "[" * 100_000 + "]" * 100_000,
    "[" + "1," * 50_000 + "1]",
    '{"a": 1, "a": 2}',
    '{"type": "x"}',
]


@dataclass(frozen=True)
class Damage:
    name: str
    checkpoint: str
    # What is done to the copy.
    apply: Callable[[Path], None]


def copied(goldens: Path, checkpoint: str, folder: Path) -> Path:
    """A copy of links, as the cache of the Hugging Face hub has them, and the path that is given to `tale`."""
    if checkpoint == GGUF:
        return copied_gguf(goldens, folder)
    if checkpoint == LANGUAGE_GGUF:
        (folder / LANGUAGE_GGUF_FILE).symlink_to(goldens / LANGUAGE_GGUF / LANGUAGE_GGUF_FILE)
        return folder / LANGUAGE_GGUF_FILE
    link_tree(goldens / checkpoint / "checkpoint", folder)
    return folder


def copied_gguf(goldens: Path, folder: Path) -> Path:
    link_tree(goldens / "flux-schnell/checkpoint", folder)
    for file in (folder / "transformer").iterdir():
        file.unlink()
    (folder / "transformer/config.json").symlink_to(goldens / GGUF / "gguf-transformer/config.json")
    (folder / GGUF_FILE).symlink_to(goldens / GGUF / GGUF_FILE)
    return folder / GGUF_FILE


def link_tree(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        copy.mkdir() if path.is_dir() else copy.symlink_to(path)


def write(path: Path, content: bytes | str) -> None:
    """In place of the link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# --- JSON -------------------------------------------------------------------------------------------------------------

Steps = tuple[str | int, ...]


def places(value: Any, rng: random.Random, steps: Steps = ()) -> Iterator[Steps]:
    """The path of every value inside, of a few of those that a long list or a vocabulary holds."""
    if steps:
        yield steps
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    if len(children) > MOST_CHILDREN:
        children = [*children[:2], children[-1], *rng.sample(children, 3)]
    for key, child in children:
        yield from places(child, rng, (*steps, key))


def at(value: Any, steps: Steps) -> Any:
    for step in steps:
        value = value[step]
    return value


def set_value(path: Path, steps: Steps, raw: str) -> None:
    """Puts a text, which need not be JSON, where a value was."""
    document = json.loads(path.read_text())
    at(document, steps[:-1])[steps[-1]] = PLACE
    write(path, json.dumps(document).replace(f'"{PLACE}"', raw))


def set_values(file: str, **values: Any) -> Callable[[Path], None]:
    """Sets top-level keys of one file."""

    def apply(folder: Path) -> None:
        path = folder / file
        document = json.loads(path.read_text()) if path.exists() else {}
        write(path, json.dumps(document | values))

    return apply


def remove_value(path: Path, steps: Steps) -> None:
    document = json.loads(path.read_text())
    del at(document, steps[:-1])[steps[-1]]
    write(path, json.dumps(document))


def double_key(path: Path, steps: Steps) -> None:
    """The same key again with another value, where the place is in an object."""
    key, old = steps[-1], json.dumps(at(json.loads(path.read_text()), steps))
    set_value(path, steps, f"{old}, {json.dumps(key)}: 1" if isinstance(key, str) else f"{old}, {old}")


# --- files ------------------------------------------------------------------------------------------------------------


def truncate(path: Path, length: int) -> None:
    write(path, path.read_bytes()[:length])


def make_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def make_huge(path: Path) -> None:
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(HUGE_BYTES)


def make_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def flip(path: Path, rng: random.Random, most: int = 4_096) -> None:
    """Changes up to four bytes of the beginning, where headers are."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(min(len(content), most))] = rng.randrange(256)
    write(path, bytes(content))


def set_header_length(path: Path, length: int) -> None:
    """Of a safetensors file; of others, whatever their first eight bytes are."""
    write(path, struct.pack("<Q", length) + path.read_bytes()[8:])


FILE_DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "removed": lambda path, _: path.unlink(),
    "empty": lambda path, _: truncate(path, 0),
    "cut": lambda path, rng: truncate(path, rng.randrange(1, max(path.stat().st_size, 2))),
    "longer": lambda path, _: write(path, path.read_bytes() + b"\0" * 64),
    "bytes flipped": lambda path, rng: flip(path, rng),
    "header length": lambda path, rng: set_header_length(path, rng.choice([0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])),
    "a fifo": lambda path, _: make_fifo(path),
    "/dev/zero": lambda path, _: make_link(path, "/dev/zero"),
    "a circle of links": lambda path, _: make_link(path, path.name),
    "a folder": lambda path, _: make_folder(path),
    "64 GiB": lambda path, _: make_huge(path),
    "not UTF-8": lambda path, _: write(path, b'{"a": "\xff\xfe"}'),
}


# --- random damage ----------------------------------------------------------------------------------------------------


def random_damages(goldens: Path, rng: random.Random, count: int) -> Iterator[Damage]:
    for _ in range(count):
        checkpoint = rng.choice([*CHECKPOINTS, GGUF, LANGUAGE_GGUF])
        has_values = checkpoint != LANGUAGE_GGUF and rng.random() < 0.65
        yield random_value(goldens, checkpoint, rng) if has_values else random_file(goldens, checkpoint, rng)


def random_value(goldens: Path, checkpoint: str, rng: random.Random) -> Damage:
    root = goldens / ("flux-schnell" if checkpoint == GGUF else checkpoint) / "checkpoint"
    files = [path for path in sorted(root.rglob("*.json")) if path.name != "vocab.json"]
    path = rng.choice(files)
    file, steps = path.relative_to(root), rng.choice(list(places(json.loads(path.read_text()), rng)))
    if checkpoint == GGUF and file.parts[0] == "transformer":
        checkpoint = "flux-schnell"  # the GGUF file brings a configuration of its own
    where = f"{file} {'.'.join(map(str, steps))}"
    kind = rng.random()
    if kind < 0.1:
        return Damage(f"{where} removed", checkpoint, lambda folder: remove_value(folder / file, steps))
    if kind < 0.15:
        return Damage(f"{where} twice", checkpoint, lambda folder: double_key(folder / file, steps))
    raw = rng.choice(HOSTILE_VALUES)
    return Damage(f"{where} = {raw[:32]}", checkpoint, lambda folder: set_value(folder / file, steps, raw))


def random_file(goldens: Path, checkpoint: str, rng: random.Random) -> Damage:
    root = goldens / ("flux-schnell" if checkpoint == GGUF else checkpoint) / "checkpoint"
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    if checkpoint == GGUF:
        files = [Path(GGUF_FILE)]
    if checkpoint == LANGUAGE_GGUF:
        files = [Path(LANGUAGE_GGUF_FILE)]
        if rng.random() < 0.7:
            seed = rng.random()
            flipped = lambda folder: flip(folder / LANGUAGE_GGUF_FILE, random.Random(seed), LANGUAGE_GGUF_HEADER)
            return Damage(f"{LANGUAGE_GGUF_FILE} header flipped", checkpoint, flipped)
    file, (name, damage), seed = rng.choice(files), rng.choice(list(FILE_DAMAGES.items())), rng.random()
    return Damage(f"{file} {name}", checkpoint, lambda folder: damage(folder / file, random.Random(seed)))


# --- pieces of a unigram model ----------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def add_spiece(path: Path, piece: bytes) -> None:
    """Appends a piece to a sentencepiece model: field 1 of the message, in it the text (1) and a score (2)."""
    message = b"\x0a" + varint(len(piece)) + piece + b"\x15" + struct.pack("<f", -5.0)
    write(path, path.read_bytes() + b"\x0a" + varint(len(message)) + message)


def add_unigram_piece(path: Path, piece: str) -> None:
    """Of a tokenizer.json with a unigram model."""
    document = json.loads(path.read_text())
    document["model"]["vocab"].append([piece, -5.0])
    write(path, json.dumps(document))


def add_bpe_piece(path: Path, piece: str) -> None:
    """Of a tokenizer.json with a BPE model."""
    document = json.loads(path.read_text())
    document["model"]["vocab"][piece] = len(document["model"]["vocab"])
    write(path, json.dumps(document))
