"""The command line of scripts/hostile."""

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import checkpoints
import connections
import ends
import load
import privacy
import requests
import soak
from attack import ATTACKS, DEFAULT_SEED, Attack, Check, NotRun, Run
from server import Features

# The order in which the kinds run.
KINDS = [checkpoints, requests, connections, load, soak, ends, privacy]
REPOSITORY = Path(__file__).resolve().parents[2]
HEADING = "attack | what | figure | bound | "


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    kinds = ", ".join(module.__name__ for module in KINDS)
    parser = argparse.ArgumentParser(
        prog="scripts/hostile",
        description="Attacks Tale on this machine and prints what held. Ends with 1 where a bound did not hold.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="everything that matters, at reduced size (the default)")
    form.add_argument("--long", action="store_true", help="at full size; minutes for each kind")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"a kind ({kinds}) or one attack, such as ends.sighup; all when absent"
    )
    parser.add_argument("--list", action="store_true", help="name the attacks, and do nothing")
    parser.add_argument("--binary", type=Path, default=REPOSITORY / "target/debug/tale", help="default: target/debug/tale")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, too")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of all that is random (default: %(default)s)")
    parser.add_argument("--count", type=int, metavar="N", help="random checkpoints, and random requests of each kind")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="print two files of --json as one Markdown table"
    )
    return parser.parse_args(argv)


def chosen(names: Sequence[str], is_long: bool) -> list[Attack]:
    ordered = sorted(ATTACKS, key=lambda attack: [module.__name__ for module in KINDS].index(attack.kind))
    wanted = [attack for attack in ordered if not names or attack.kind in names or attack.full_name in names]
    known = {attack.kind for attack in ATTACKS} | {attack.full_name for attack in ATTACKS}
    if unknown := set(names) - known:
        sys.exit(f"hostile: there is no attack {', '.join(sorted(unknown))}; --list names all")
    return [attack for attack in wanted if is_long or not attack.only_long or attack.full_name in names]


def perform(run: Run, attack: Attack) -> str | None:
    """Returns why the attack could not run, if it could not. In the short form, which runs on busy machines, an attack with a
    figure over its bound is made once more, and its second figures count."""
    first = len(run.checks)
    reason = perform_once(run, attack)
    if run.is_long or all(check.ok is not False for check in run.checks[first:]):
        return reason
    for check in run.checks[first:]:
        if check.ok is False:
            print(f"# again: {check.attack}: {check.what}: {check.figure}, bound {check.bound}", file=sys.stderr)
    del run.checks[first:]
    return perform_once(run, attack)


def perform_once(run: Run, attack: Attack) -> str | None:
    run.attack = attack.full_name
    begun = time.monotonic()
    try:
        attack.act(run)
    except NotRun as reason:
        return f"{attack.full_name}: {reason}"
    except Exception as error:  # one attack that fails must not hide the others
        run.check("the attack itself", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "runs", False)
    finally:
        print(f"# {attack.full_name} took {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    return None


def compared(before: list[Check], after: list[Check]) -> str:
    """A Markdown table of the figures that are over a bound on one of the two sides, and how many are on neither."""
    earlier = {(check.attack, check.what): check for check in before}
    lines = ["| attack | what | before | after | bound |", "|---|---|---|---|---|"]
    held = 0
    for check in after:
        was = earlier.get((check.attack, check.what))
        if check.ok is False or was is not None and was.ok is False:
            lines.append(f"| {check.attack} | {check.what} | {marked(was)} | {marked(check)} | {check.bound} |")
        else:
            held += 1
    return "\n".join(
        [*lines, "", f"{held} more figures are within their bounds after, and were before where they were measured."]
    )


def marked(check: Check | None) -> str:
    if check is None:
        return "not measured"
    return f"**{check.figure}**" if check.ok is False else check.figure


def read(path: Path) -> list[Check]:
    return [Check(**fields) for fields in json.loads(path.read_text())]


def stop(*_: object) -> None:
    """SIGTERM ends as Ctrl-C does: with the servers stopped and the files removed."""
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    options = arguments(argv)
    if options.compare:
        print(compared(*map(read, options.compare)))
        return 0
    attacks = chosen(options.names, options.long)
    if options.list:
        print("\n".join(attack.full_name for attack in attacks))
        return 0
    if not options.binary.is_file():
        sys.exit(f"hostile: there is no {options.binary}; `cargo build -p tale --locked` makes it")
    signal.signal(signal.SIGTERM, stop)
    os.environ["RUST_BACKTRACE"] = "0"  # a panic is told by its first line
    allow_many_files()
    with tempfile.TemporaryDirectory(prefix="tale-hostile-", ignore_cleanup_errors=True) as folder:
        run = Run(
            options.binary.resolve(),
            REPOSITORY / "tests/goldens",
            Path(folder),
            options.long,
            options.seed,
            options.count,
            Features.of(options.binary),
        )
        print(HEADING, flush=True)
        not_run = [reason for attack in attacks if (reason := perform(run, attack)) is not None]
    if options.json:
        options.json.write_text(json.dumps([check.as_json() for check in run.checks], indent=1) + "\n")
    return summary(run.checks, not_run)


def summary(checks: list[Check], not_run: list[str]) -> int:
    failed = [check for check in checks if check.ok is False]
    for reason in not_run:
        print(f"NOT RUN: {reason}")
    print(f"{len(checks)} figures, {len(failed)} over their bounds")
    for check in failed:
        print(f"FAILED: {check.attack}: {check.what}: {check.figure}, bound {check.bound}")
    return 1 if failed else 0


def allow_many_files() -> None:
    """The attackers' sockets are this process's files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
