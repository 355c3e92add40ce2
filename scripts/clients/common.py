"""What the clients' scripts share: where the server is, what is asked for, and how an answer is checked.

Shapes have no text of any length, so that a model with random weights fills them soon, too.
"""

import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

QUESTION = "Who keeps the lighthouse?"


class Shot(BaseModel):
    """One shot of a film."""

    model_config = ConfigDict(extra="forbid")

    camera: Literal["near", "far"] = Field(description="How near the camera is")
    seconds: int = Field(ge=1, le=9)
    is_night: bool


class Weather(BaseModel):
    """The weather of a place."""

    model_config = ConfigDict(extra="forbid")

    place: Literal["harbour", "island"]
    days: int = Field(ge=0, le=9)


class Place(BaseModel):
    """Arguments of `weather`, and no others."""

    model_config = ConfigDict(extra="forbid")

    place: Literal["harbour", "island"]


def weather(place: Literal["harbour", "island"]) -> str:
    """The weather of a place."""
    return f"fog over the {place}"


def server() -> tuple[str, str]:
    """Its base URL and the name of its language model, as the command line says."""
    base_url, model, *_ = sys.argv[1:]
    return f"{base_url}/v1", model


def check(condition: object, *seen: object) -> None:
    if not condition:
        raise AssertionError(*seen)
