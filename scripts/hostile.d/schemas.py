"""Values for the schemas of an OpenAPI document: some that fit, some that do not.

Owns: what is made from a schema. Does not know: routes, answers. A parameter that is new in the document is tried
without a change here, but for those whose large values are allowed and only cost time (`CHEAP`).
"""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pictures

Schema = dict[str, Any]

# Stands in every text that is sent; no error may repeat it. Names of fields are told where they are unknown.
MARKER = "m4rk3r-of-a-client"
# Fields whose bounds allow what takes minutes here: small values that are as valid.
CHEAP: dict[str, list[Any]] = {
    "num_inference_steps": [1, 2],
    "width": [16, 32, 48, 64],
    "height": [16, 32, 48, 64],
    "size": ["64x64", "32x64"],
    "num_frames": [1, 5],
    "seconds": [0.1, "0.3"],
    "n": [1, 2],
    "max_tokens": [1, 4],
    "max_completion_tokens": [1, 4],
    "max_output_tokens": [1, 4],
    "max_sequence_length": [8, 77, 128],
    "fps": [1, 16, 120],
    "original_inference_steps": [4, 50],
}
# Always given, so that nothing takes the model's own, larger default.
ALWAYS = ["num_inference_steps", "max_tokens", "max_output_tokens", "num_frames"]
CANVASES = [["size"], ["width", "height"]]
# Of fields that are in OpenAI's API and ask for nothing here.
NEUTRAL = [None, None, False, "auto", "none", [], {}, 0, 1, "u1", ["text"], {"type": "text"}]
WORDS = [
    "a boat",
    "",
    "hello",
    "wolkenkratzer",
    "\u4f60\u597d",
    "a\u0301\u0302",
    "(fog:1.2)",
    "\\(x\\)",
    "<|im_end|>",
    "\x00",
    "\U0001f980" * 20,
    "1 2 3 " * 100,
    "\ud7ff\ue000",
]
# What fits hardly any field. None is a large value that would be valid and cost time.
HOSTILE: list[Any] = [
    -1,
    0,
    10**7,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    0.5,
    -0.0,
    1e308,
    -1e308,
    1e-320,
    True,
    False,
    None,
    [],
    {},
    "",
    [[]],
    [{}],
    {"a": MARKER},
    [MARKER],
    MARKER,
    MARKER * 1000,
    f"{MARKER}\u0000",
    f"\n{MARKER}\r\n",
    f"../{MARKER}",
    [MARKER] * 100,
    [0] * 10_000,
    [None] * 100,
    {"unknown": MARKER},
    [-1],
    [2**40],
    ["" for _ in range(1000)],
]
NESTED = 300


@dataclass
class Shapes:
    """The schemas of one document."""

    document: dict[str, Any]
    rng: random.Random
    models: list[str]

    def resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            found: Any = self.document
            for step in schema["$ref"].removeprefix("#/").split("/"):
                found = found[step]
            schema = found
        return schema

    def valid(self, schema: Schema, name: str = "") -> Any:
        """A value that the schema allows; the server may still refuse it for the model."""
        schema = self.resolved(schema)
        if name == "model":
            return self.rng.choice(self.models)
        if name in CHEAP:
            return self.rng.choice(CHEAP[name])
        for choices in (schema.get("anyOf"), schema.get("oneOf")):
            if choices:
                return self.valid(self.rng.choice(choices), name)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self.rng.choice(schema["enum"])
        kinds = schema.get("type")
        if kinds is None:
            return self.rng.choice(NEUTRAL)
        kind = self.rng.choice(kinds) if isinstance(kinds, list) else kinds
        return MAKERS[kind](self, schema)

    def integer(self, schema: Schema) -> int:
        low, high = int(schema.get("minimum", -(2**63))), int(schema.get("maximum", 2**63 - 1))
        return self.rng.choice([low, high, self.rng.randint(low, high), min(max(self.rng.randint(0, 100), low), high)])

    def number(self, schema: Schema) -> float:
        low = float(schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1e-6))
        high = float(schema.get("maximum", low + 100))
        return self.rng.choice([low, high, self.rng.uniform(low, high)])

    def string(self, schema: Schema) -> str:
        if "base64" in schema.get("description", "") or schema.get("format") == "binary":
            return pictures.as_base64(pictures.grey(*self.rng.choice([(64, 64), (33, 65), (1, 1)])))
        text = self.rng.choice(WORDS)
        return (text or "a" * schema.get("minLength", 0))[: schema.get("maxLength", len(text) + 1)]

    def array(self, schema: Schema) -> list[Any]:
        items = dict(schema.get("items", {}))
        if "base64" in schema.get("description", ""):
            items["description"] = schema["description"]
        low = schema.get("minItems", 0)
        count = self.rng.randint(low, max(low, min(schema.get("maxItems", 3), 3)))
        return [self.valid(items) for _ in range(count)]

    def object(self, schema: Schema) -> dict[str, Any]:
        """The required fields and some of the others, more often few than many."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        share = self.rng.choice([0.02, 0.1, 0.3])
        always = [*required, *ALWAYS, *self.rng.choice(CANVASES)]
        sizes = [name for names in CANVASES for name in names]
        wanted = [name for name in properties if name in always or name not in sizes and self.rng.random() < share]
        return {name: self.valid(properties[name], name) for name in wanted}

    def invalid(self, value: Any) -> Any:
        """One to three places of a value made hostile."""
        value = copy.deepcopy(value)
        for _ in range(self.rng.randint(1, 3)):
            damage = self.rng.choice([self.replace, self.replace, self.replace, self.remove, self.add, self.nest])
            value = damage(value)
        return value

    def replace(self, value: Any) -> Any:
        place = self.rng.choice(list(parents(value)) or [None])
        if place is None:
            return self.rng.choice(HOSTILE)
        holder, key = place
        holder[key] = copy.deepcopy(self.rng.choice(HOSTILE))
        return value

    def remove(self, value: Any) -> Any:
        if places := list(parents(value)):
            holder, key = self.rng.choice(places)
            del holder[key]
        return value

    def add(self, value: Any) -> Any:
        if isinstance(value, dict):
            value[f"unknown_{self.rng.randint(0, 9)}"] = MARKER
        return value

    def nest(self, value: Any) -> Any:
        if places := list(parents(value)):
            holder, key = self.rng.choice(places)
            nested: Any = MARKER
            for _ in range(NESTED):
                nested = self.rng.choice([[nested], {"a": nested}])
            holder[key] = nested
        return value


MAKERS: dict[str, Callable[[Shapes, Schema], Any]] = {
    "integer": Shapes.integer,
    "number": Shapes.number,
    "string": Shapes.string,
    "array": Shapes.array,
    "object": Shapes.object,
    "boolean": lambda shapes, _: shapes.rng.choice([True, False]),
    "null": lambda _shapes, _schema: None,
}


def parents(value: Any, depth: int = 0) -> Any:
    """Each place inside: what holds it, and its key or index there."""
    if depth > 6:
        return
    children = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, child in children[:50]:
        yield value, key
        yield from parents(child, depth + 1)


def marked(value: Any) -> Any:
    """The marker in front of every text, where that leaves it a text of the same kind."""
    if isinstance(value, dict):
        return {key: child if key in ("model", "role", "type") else marked(child) for key, child in value.items()}
    if isinstance(value, list):
        return [marked(child) for child in value]
    return f"{MARKER} {value}" if isinstance(value, str) else value


def damaged_text(text: bytes, rng: random.Random) -> bytes:
    """JSON that is none any more, or hardly."""
    place = rng.randrange(len(text))
    return rng.choice(
        [
            text[:place],
            text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :],
            text[:place] + b"\xff\xfe" + text[place:],
            text + text,
            text + b"\0",
            b"\xef\xbb\xbf" + text,
            b"[" * 100_000 + text,
            b'{"a":' * 100_000 + text,
            text.replace(b":", b":" + b" " * 10_000, 1),
            text[:-1] + b', "model": "' + MARKER.encode() + b'"}',
            text[:-1] + b', "temperature": NaN, "top_p": 1e999}',
            text[:-1] + b', "seed": ' + b"9" * 100_000 + b"}",
            text.replace(b'"', b"'"),
            b"",
            json.dumps(text.decode(errors="replace")).encode(),
        ]
    )
