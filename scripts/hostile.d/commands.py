"""Runs `tale` for one answer, within limits of memory and time, and says how it ended.

Owns: the limits and the kinds of ends. Does not know: why the command should fail.
"""

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from server import PANIC, limit_to

# Address space and time of one command. Checkpoints of the tests need a twentieth of either.
ADDRESS_SPACE_BYTES = 4 << 30
SECONDS = 20.0
# Resident memory beyond which a command took too much of it.
RESIDENT_BYTES = 1 << 30
POLL_SECONDS = 0.005


class End(Enum):
    ACCEPTED = "accepted"
    REFUSED = "refused in one line"
    # Everything below is a fault.
    WORDY = "refused in other words"
    PANIC = "panic lines"
    SIGNAL = "ended by a signal"
    SLOW = f"over {SECONDS:.0f} s"
    MEMORY = "over 1 GiB"

    @property
    def is_fault(self) -> bool:
        return self not in (End.ACCEPTED, End.REFUSED)


@dataclass(frozen=True)
class Ended:
    end: End
    # The line that was told, or what was wrong.
    detail: str


def run(command: Sequence[str | Path], folder: Path, **limits: int) -> Ended:
    """Runs it to its end, or kills it after SECONDS. Its output goes to files, so that no pipe can block it."""
    with tempfile.TemporaryFile(dir=folder) as out, tempfile.TemporaryFile(dir=folder) as err:
        preexec = limit_to({resource.RLIMIT_AS: limits.get("address_space", ADDRESS_SPACE_BYTES), resource.RLIMIT_CORE: 0})
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, preexec_fn=preexec)
        status, usage = waited(process)
        texts = []
        for file in [out, err]:
            file.seek(0)
            texts.append(file.read(1 << 20).decode(errors="replace"))
    return judged(status, usage, *texts)


def waited(process: subprocess.Popen[bytes]) -> tuple[int | None, resource.struct_rusage]:
    """The exit status, minus the signal that ended it, None where time was up; and what it used."""
    deadline = time.monotonic() + SECONDS
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage
        if time.monotonic() > deadline:
            process.kill()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            return None, usage
        time.sleep(POLL_SECONDS)


def judged(status: int | None, usage: resource.struct_rusage, out: str, err: str) -> Ended:
    lines = err.strip().splitlines()
    told = lines[-1] if lines else out.strip().splitlines()[-1] if out.strip() else ""
    if status is None:
        return Ended(End.SLOW, told)
    if usage.ru_maxrss << 10 > RESIDENT_BYTES:
        return Ended(End.MEMORY, f"{usage.ru_maxrss >> 10} MiB")
    if status < 0:
        return Ended(End.SIGNAL, f"signal {-status}: {told}")
    if PANIC.search(err) or PANIC.search(out):
        return Ended(End.PANIC, told)
    if status == 0:
        return Ended(End.ACCEPTED, told)
    # A report on stdout that ends with problems is as good as a line on stderr.
    is_one_line = len(lines) == 1 and lines[0].startswith("error: ") or not lines and bool(told)
    return Ended(End.REFUSED if is_one_line else End.WORDY, told)
