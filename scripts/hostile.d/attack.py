"""What an attack is, what it reports, and the registry of all of them.

Owns: `Attack`, `Check`, `Run`. Does not know: how anything is attacked or measured.
"""

import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import server as servers

# Random choices begin here unless `--seed` says otherwise: the same seed makes the same attacks.
DEFAULT_SEED = 11


class NotRun(Exception):
    """An attack that this machine or this binary cannot show; the message says why."""


@dataclass(frozen=True)
class Check:
    """One row of the table: a figure beside its bound."""

    attack: str
    what: str
    figure: str
    bound: str
    # None where the figure is told for information, or could not be had.
    ok: bool | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Run:
    """How attacks run this time, and what they have found so far."""

    binary: Path
    goldens: Path
    folder: Path
    is_long: bool
    seed: int
    # Damaged checkpoints and fuzzed requests; the module's own number when None.
    count: int | None
    features: "servers.Features"
    checks: list[Check] = field(default_factory=list)
    attack: str = ""

    def random(self) -> random.Random:
        """Fresh for each attack, so that one does not depend on which ran before."""
        return random.Random(f"{self.seed} {self.attack}")

    def pick(self, short: Any, long: Any) -> Any:
        """The size of an attack in this form."""
        return long if self.is_long else short

    def check(self, what: str, figure: str, bound: str, ok: bool | None) -> None:
        check = Check(self.attack, what, shown(figure), bound, ok)
        self.checks.append(check)
        print(row(check), flush=True)

    def count_is_zero(self, what: str, found: Sequence[str]) -> None:
        """Bound 0; the first of what was found is told beside the number, all of it on stderr."""
        for each in found:
            print(f"# {self.attack}: {what}: {shown(each, 1_000)}", file=sys.stderr, flush=True)
        first = f": {shown(found[0])}" if found else ""
        self.check(what, f"{len(found)}{first}", "0", not found)

    def equal(self, what: str, figure: Any, expected: Any) -> None:
        self.check(what, str(figure), str(expected), figure == expected)

    @contextmanager
    def server(self, *arguments: str, **options: Any) -> Iterator["servers.Server"]:
        """A server of its own, gone afterwards. The options are those of `Server`."""
        with self.subfolder() as folder:
            started = servers.Server(self.binary, self.goldens, folder, self.features, arguments, **options)
            with started:
                yield started

    @contextmanager
    def subfolder(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as path:
            yield Path(path)


@dataclass(frozen=True)
class Attack:
    kind: str
    name: str
    act: Callable[[Run], None]
    # Left out of the short form: it needs more time than that has.
    only_long: bool

    @property
    def full_name(self) -> str:
        return f"{self.kind}.{self.name}"


ATTACKS: list[Attack] = []


def attack(*, only_long: bool = False) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Registers an attack under the names of its module and its function."""

    def register(act: Callable[[Run], None]) -> Callable[[Run], None]:
        name = act.__name__.replace("_", "-")
        ATTACKS.append(Attack(act.__module__, name, act, only_long))
        return act

    return register


def shown(text: str, length: int = 240) -> str:
    """One line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[:length] + "..."


def row(check: Check) -> str:
    verdict = {True: "ok", False: "FAILED", None: "-"}[check.ok]
    return f"{check.attack} | {check.what} | {check.figure} | {check.bound} | {verdict}"
