"""What Jinja2, as transformers sets it up, makes of snippets of chat templates, and which of them it refuses."""

import re

from transformers.utils.chat_template_utils import _compile_jinja_template

from .common import fresh_case, require, write_golden
from .templates_corpus import SNIPPETS, TEMPLATES

VARIABLES = {
    "messages": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Hi <b>\n"},
        {"role": "assistant", "content": "Yes, naïve."},
    ],
    "bos_token": "<s>",
    "eos_token": "</s>",
    "tools": None,
    "documents": None,
    "add_generation_prompt": True,
}
# What the library that renders here does not do; it refuses these at load (docs/models.md).
UNSUPPORTED = [
    "{{ 'a b'|urlize }}",
    "{{ [1]|random }}",
    "x\n{{ 'a'|nope }}",
    "{{ 'a' is nope }}",
    "{{ (10).to_bytes(2, 'big') }}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "{% macro m() %}{{ varargs }}{% endmacro %}{{ m(1) }}",
    "{% macro m(x, y=x) %}{{ y }}{% endmacro %}{{ m(1) }}",
    "{% include 'other' %}",
]


def make() -> None:
    folder = fresh_case("templates")
    sources = [part for line in SNIPPETS.split("\n") if line for part in expressions(line)] + TEMPLATES
    rendered, failing = [], []
    for source in dict.fromkeys(sources):
        try:
            rendered.append({"source": source, "text": _compile_jinja_template(source).render(**VARIABLES)})
        except Exception as error:  # noqa: BLE001: whatever a template may raise
            failing.append({"source": source, "error": f"{type(error).__name__}: {error}"})
    require(len(rendered) > 500 and len(failing) > 20, f"{len(rendered)} templates render, {len(failing)} fail")
    require(not any(" at 0x" in case["text"] for case in rendered), "no answer depends on the process")
    facts = {"variables": VARIABLES, "rendered": rendered, "failing": failing, "unsupported": UNSUPPORTED}
    write_golden(folder, facts)


def expressions(line: str) -> list[str]:
    """A line with several expressions and no tags is a case for each of them."""
    if "{%" in line or line.count("{{") < 3:
        return [line]
    return re.split(r"(?<=\}\})\|? (?=\{\{)", line)
