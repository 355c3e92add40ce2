#!/usr/bin/env python3
"""What a trained model shows: whether answers keep to their schemas, what that costs, and what prompt lookup gains.

    cargo build --release && scripts/demo-model && pip install jsonschema
    benches/smollm2.py [schemas] [masks] [lookup] [--count 200] [--seed 1] [--threads 2]

schemas   generates schemas (objects in objects, lists, enums, patterns, references, alternatives, numbers with bounds), asks
          SmolLM2-135M-Instruct for each at temperature 0.8, and holds each answer against its schema with the `jsonschema`
          package. An answer that ends with `length` was cut and is counted by itself.
masks     milliseconds a token of the same prompts at batch 1 and 16, free and held to a schema, in turns.
lookup    tokens per second of texts that the model is to write once more with a change, without and with guesses, in turns;
          the answers must be the same.

Starts servers of its own on free ports of the loopback and ends them.
"""

import argparse
import concurrent.futures
import json
import os
import random
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "out/models/SmolLM2-135M-Instruct.Q4_1.gguf"
ROUNDS = 5

STORY = (
    "A girl named Mira found an old brass key under the floor of the lighthouse. The key had a small fox on it. "
    "She walked down to the harbour and tried the key in every door of the long grey wall. The last door was green, and it "
    "opened without a sound. Behind it lay a garden full of lamps, and in the middle of the garden sat a fox who knew her name."
)
CODE = """class Camera:
    def __init__(self, position, focal_length, exposure):
        self.position = position
        self.focal_length = focal_length
        self.exposure = exposure

    def describe(self):
        return f"Camera at {self.position} with {self.focal_length} mm and {self.exposure} s"

    def move(self, offset):
        self.position = [a + b for a, b in zip(self.position, offset)]
"""
REWRITES = [
    f"Write this text once more, word for word, but call the girl Nora:\n\n{STORY}",
    f"Copy this text and change nothing:\n\n{STORY}",
    f"Repeat this code exactly, but rename the class to Lens:\n\n```python\n{CODE}```",
    f"Correct the spelling of this text and write it out in full:\n\n{STORY.replace('found', 'fuond').replace('every', 'evry')}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["schemas", "masks", "lookup", []])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tale", type=Path, default=ROOT / "target/release/tale")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.threads]))
    parts = {"schemas": schemas, "masks": masks, "lookup": lookup}
    for name in options.parts or parts:
        parts[name](options)


class Server:
    """`tale serve` with one model, `m`."""

    def __init__(self, options, *flags: str):
        command = [options.tale, "serve", "--state-dir", "none", "--listen", "127.0.0.1:0", "--model", f"m={options.model}", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.url = self.process.stdout.readline().split()[-1]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()

    def chat(self, text: str, **fields) -> dict:
        body = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
        head = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + "/v1/chat/completions", json.dumps(body).encode(), head)
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{error.code}: {error.read().decode()}\n{json.dumps(fields)}") from error


# --- schemas ---------------------------------------------------------------------------------------------------------

WORDS = "title scene camera mood color shot actor place time sound light age name count size tags score steps".split()
PATTERNS = ["[A-Z]{2,3}-[0-9]{4}", "(day|night)", "[a-z]+(_[a-z]+){0,2}", "#[0-9a-f]{6}", "[0-9]{2}:[0-9]{2}"]


class Schemas:
    """Schemas by a seed. Every text, list and number has bounds, so that a small model comes to an end."""

    def __init__(self, seed: int):
        self.dice = random.Random(seed)

    def document(self) -> dict:
        self.definitions: dict = {}
        root = self.object(depth=3)
        return {**root, "$defs": self.definitions} if self.definitions else root

    def object(self, depth: int) -> dict:
        names = self.dice.sample(WORDS, self.dice.randint(1, 4))
        properties = {name: self.value(depth - 1) for name in names}
        required = [name for name in names if self.dice.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def value(self, depth: int) -> dict:
        plain = [self.text, self.chosen, self.pattern, self.whole, self.number, self.flag, self.constant]
        deep = [self.list, self.alternatives, self.reference, lambda depth: self.object(depth)]
        kind = self.dice.choice(plain + deep if depth > 0 else plain)
        return kind(depth)

    def text(self, _) -> dict:
        return {"type": "string", "minLength": self.dice.randint(0, 3), "maxLength": self.dice.randint(4, 30)}

    def chosen(self, _) -> dict:
        return {"enum": self.dice.sample([*WORDS, 1, 2.5, True, None, "two words", 'a "quote"'], self.dice.randint(1, 5))}

    def pattern(self, _) -> dict:
        return {"type": "string", "pattern": f"^{self.dice.choice(PATTERNS)}$", "maxLength": 30}

    def whole(self, _) -> dict:
        least = self.dice.randint(-50, 50)
        return {"type": "integer", "minimum": least, "maximum": least + self.dice.randint(0, 1000)}

    def number(self, _) -> dict:
        return {"type": "number", "minimum": 0, "maximum": self.dice.randint(1, 10), "multipleOf": 0.25}

    def flag(self, _) -> dict:
        return {"type": self.dice.choice(["boolean", "null", ["boolean", "null"]])}

    def constant(self, _) -> dict:
        return {"const": self.dice.choice(WORDS)}

    def list(self, depth: int) -> dict:
        least = self.dice.randint(0, 2)
        return {"type": "array", "items": self.value(depth - 1), "minItems": least, "maxItems": least + self.dice.randint(0, 2)}

    def alternatives(self, depth: int) -> dict:
        return {"anyOf": [self.value(depth - 1) for _ in range(self.dice.randint(2, 3))]}

    def reference(self, depth: int) -> dict:
        value = self.value(depth - 1)
        name = f"d{len(self.definitions)}"
        self.definitions[name] = value
        return {"$ref": f"#/$defs/{name}"}


def schemas(options) -> None:
    from jsonschema import Draft202012Validator

    made = Schemas(options.seed)
    asked = [made.document() for _ in range(options.count)]

    def ask(numbered):
        index, schema = numbered
        wanted = {"type": "json_schema", "json_schema": {"name": "scene", "schema": schema, "strict": True}}
        text = f"Describe scene {index} of a film about a lighthouse as JSON with: {', '.join(schema['properties'])}."
        said = server.chat(text, response_format=wanted, temperature=0.8, seed=index, max_tokens=1024)["choices"][0]
        if said["finish_reason"] == "length":
            return "cut"
        try:
            problems = list(Draft202012Validator(schema).iter_errors(json.loads(said["message"]["content"])))
        except json.JSONDecodeError as error:
            problems = [error]
        for problem in problems:
            print(f"  {json.dumps(schema)}\n    {said['message']['content']}\n    {problem}")
        return "wrong" if problems else "valid"

    with Server(options) as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        begun = time.monotonic()
        found = list(pool.map(ask, enumerate(asked)))
    counts = {kind: found.count(kind) for kind in ("valid", "wrong", "cut")}
    print(f"{options.count} schemas of seed {options.seed}: {counts} in {time.monotonic() - begun:.0f} s")


# --- masks -----------------------------------------------------------------------------------------------------------

SHOTS = {
    "type": "object",
    "properties": {
        "shots": {
            "type": "array",
            "minItems": 4,
            "items": {
                "type": "object",
                "properties": {"prompt": {"type": "string", "minLength": 40}, "seconds": {"enum": [4, 8]}},
                "required": ["prompt", "seconds"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["shots"],
    "additionalProperties": False,
}


def masks(options) -> None:
    held = {"response_format": {"type": "json_schema", "json_schema": {"name": "shots", "schema": SHOTS, "strict": True}}}
    tokens = 160

    def milliseconds(fields: dict, streams: int) -> float:
        def ask(index: int) -> int:
            text = f"Split this story into shots, as JSON:\n\n{STORY}"
            answer = server.chat(text, **fields, max_tokens=tokens, seed=index, temperature=0.8)
            return answer["usage"]["completion_tokens"]

        begun = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(streams) as pool:
            made = sum(pool.map(ask, range(streams)))
        return 1e3 * (time.monotonic() - begun) * streams / made

    with Server(options) as server:
        milliseconds(held, 1)
        for streams in (1, 16):
            pairs = [(milliseconds({"ignore_eos": True}, streams), milliseconds(held, streams)) for _ in range(ROUNDS)]
            free, bound = (statistics.median(times) for times in zip(*pairs))
            ratio = statistics.median(b / a for a, b in pairs)
            print(f"{streams} streams: {free:.2f} ms a token free, {bound:.2f} held to a schema, ratio {ratio:.3f}")


# --- lookup ----------------------------------------------------------------------------------------------------------


def lookup(options) -> None:
    def ask(server: Server, text: str):
        begun = time.monotonic()
        answer = server.chat(text, temperature=0, max_tokens=200)
        seconds = time.monotonic() - begun
        usage = answer["usage"]
        guessed = usage.get("completion_tokens_details") or {}
        return answer["choices"][0]["message"]["content"], usage["completion_tokens"] / seconds, guessed

    for guesses in (4, 8):
        with Server(options) as plain, Server(options, "--num-speculative-tokens", str(guesses)) as guessing:
            for text in REWRITES:
                pairs = [(ask(plain, text), ask(guessing, text)) for _ in range(ROUNDS)]
                same = all(a[0] == b[0] for a, b in pairs)
                without, with_guesses = (statistics.median(one[1] for one in of) for of in zip(*pairs))
                ratio = statistics.median(b[1] / a[1] for a, b in pairs)
                print(
                    f"{guesses} guesses: {without:.1f} tok/s without, {with_guesses:.1f} with, {ratio:.2f} times, "
                    f"{'same answers' if same else 'OTHER ANSWERS'}, {json.dumps(pairs[-1][1][2])}: {text.splitlines()[0]}"
                )


if __name__ == "__main__":
    main()
