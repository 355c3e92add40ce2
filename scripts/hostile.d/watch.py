"""Watches a server while it is attacked: its memory, `/livez`, and a neighbour's small chat.

Owns: the bounds that hold for every attack, the probes, the percentiles. Does not know: what the attack is.
"""

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import client
import server as servers
from attack import Run, shown
from probe import INTERVALS, Sample
from server import MIB, Server

# What every attack has to leave. In the short form times are FACTOR times longer: it runs in the slow development
# build, beside whatever else the machine does, and too briefly for a 99.9th percentile that is not the maximum.
LIVEZ_SECONDS = 0.050
NEIGHBOUR_P99_SECONDS = 1.0
SHORT_FACTOR = 10
NEIGHBOUR_P99_SHORT_SECONDS = 5.0
# A neighbour's first token waits at most so many times as long as when idle, and one step.
NEIGHBOUR_TIMES = 2
# Resident memory that an attack may add at its peak, unless it says otherwise.
MEMORY_MIB = 256
# Resident memory at which an attack is stopped, since the machine is shared.
STOP_BYTES = 6 << 30
# Seconds without an attack, before one, that say what idle is.
IDLE_SECONDS = 1.0
SAMPLE_SECONDS = 0.02
# What the probes ask.
LIVEZ, HEALTH, NEIGHBOUR = "/livez", "/livez of the health listener", "neighbour"


@dataclass
class Bounds:
    memory_mib: int = MEMORY_MIB
    # Whether a neighbour's chats and the main listener's /livez have to be answered: not where every client is refused.
    neighbour: bool = True
    livez: bool = True


@dataclass
class Memories:
    """Bytes before the attack, and the most during it."""

    before: servers.Memory
    resident: int = 0
    address_space: int = 0
    was_stopped: bool = False


@dataclass
class Watch:
    """What is seen from its start to its end."""

    run: Run
    server: Server
    bounds: Bounds
    probes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    began: float = 0.0

    def start(self) -> None:
        self.server.reset_peak()
        self.memories = Memories(self.server.memory())
        self.probes = {LIVEZ: probe(self.server.address, client.WATCHER, "livez")}
        if self.server.health is not None:
            self.probes[HEALTH] = probe(self.server.health, client.WATCHER, "livez")
        if self.bounds.neighbour:
            self.probes[NEIGHBOUR] = probe(self.server.address, client.NEIGHBOUR, "chat", servers.CHAT)
        time.sleep(IDLE_SECONDS)
        self.began = time.monotonic()
        self.is_over = threading.Event()
        self.sampler = threading.Thread(target=self.sample_memory, daemon=True)
        self.sampler.start()

    def sample_memory(self) -> None:
        while not self.is_over.wait(SAMPLE_SECONDS):
            try:
                memory = self.server.memory()
            except OSError:
                return  # it has ended, which `report` tells
            self.memories.resident = max(self.memories.resident, memory.peak)
            self.memories.address_space = max(self.memories.address_space, memory.address_space)
            if memory.resident > STOP_BYTES:
                self.memories.was_stopped = True
                self.server.__exit__()
                return

    def stop(self) -> None:
        self.is_over.set()
        self.sampler.join()
        for process in self.probes.values():
            assert process.stdin is not None, "probes are started with pipes"
            process.stdin.close()
        for name, process in self.probes.items():
            assert process.stdout is not None, "probes are started with pipes"
            self.samples[name] = json.loads(process.stdout.read())
            process.wait()

    def report(self) -> None:
        """Adds the checks that every attack has to pass."""
        seconds = time.monotonic() - self.began
        ended = "stopped at 6 GiB" if self.memories.was_stopped else "ended" if not self.server.is_running() else "runs"
        self.run.check("server", f"{ended} after {seconds:.1f} s", "runs", ended == "runs")
        self.report_memory()
        for name in [LIVEZ, HEALTH]:
            if name in self.samples:
                self.report_livez(name, name == HEALTH or self.bounds.livez)
        if self.bounds.neighbour:
            self.report_neighbour()
        self.run.count_is_zero("panics", self.server.panics())

    def report_memory(self) -> None:
        added = (self.memories.resident - self.memories.before.resident) / MIB
        bound = self.bounds.memory_mib
        before = self.memories.before.resident / MIB
        self.run.check("memory added", f"{added:.0f} MiB to {before:.0f}", f"{bound} MiB", added <= bound)

    def report_livez(self, name: str, is_bound: bool) -> None:
        times, problems = self.during_attack(name)
        bound = LIVEZ_SECONDS * self.run.pick(SHORT_FACTOR, 1)
        ok = not problems and percentile(times, 99.9) <= bound
        self.run.check(
            f"{name} p99.9",
            figures(times, problems),
            f"{bound * 1e3:.0f} ms" if is_bound else "none",
            ok if is_bound else None,
        )

    def report_neighbour(self) -> None:
        """The first token of a small chat: its median beside that of the idle time, its 99th percentile in seconds."""
        times, problems = self.during_attack(NEIGHBOUR)
        most = self.run.pick(NEIGHBOUR_P99_SHORT_SECONDS, NEIGHBOUR_P99_SECONDS)
        ok = not problems and percentile(times, 99) <= most
        self.run.check(
            "neighbour's first token p99",
            f"{figures(times, problems)}, idle {self.idle_median() * 1e3:.0f}",
            f"{most * 1e3:.0f} ms",
            ok,
        )

    def idle_median(self) -> float:
        """Of the neighbour's first token, in seconds; after `stop`."""
        return percentile([seconds for at, seconds, _ in self.samples[NEIGHBOUR] if at + seconds < self.began], 50)

    def during_attack(self, name: str) -> tuple[list[float], list[str]]:
        """Times, corrected for the samples that could not begin since one took long, and what was wrong."""
        samples = [sample for sample in self.samples[name] if sample[0] + sample[1] >= self.began]
        problems = [problem for _, _, problem in samples if problem is not None]
        kind = "chat" if name == NEIGHBOUR else "livez"
        return corrected([seconds for _, seconds, _ in samples], INTERVALS[kind]), problems


@contextmanager
def watched(run: Run, server: Server, bounds: Bounds | None = None) -> Iterator[Watch]:
    """Measures while the block attacks, and reports afterwards; a block that fails reports nothing."""
    watch = Watch(run, server, bounds or Bounds())
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
    watch.report()


def probe(address: client.Address, source: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), address[0], str(address[1]), source, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def corrected(times: Sequence[float], interval: float) -> list[float]:
    """Adds what requests that were due while a slow one kept the probe waiting would have taken: without them a stall
    of ten seconds would be one sample among thousands (Gil Tene's "coordinated omission")."""
    missed = [late for took in times for late in due_meanwhile(took, interval)]
    return [*times, *missed]


def due_meanwhile(took: float, interval: float) -> list[float]:
    return [took - interval * i for i in range(1, int(took / interval))]


def percentile(times: Sequence[float], percent: float) -> float:
    """The smallest time that so many percent do not exceed; infinite where nothing was measured."""
    if not times:
        return math.inf
    ordered = sorted(times)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def figures(times: Sequence[float], problems: Sequence[str]) -> str:
    parts = [percentile(times, percent) * 1e3 for percent in [50, 99, 99.9, 100]]
    wrong = f", {len(problems)} wrong ({shown(problems[0], 60)})" if problems else ""
    return "p50 {:.1f} p99 {:.1f} p99.9 {:.1f} max {:.1f} ms".format(*parts) + f" of {len(times)}{wrong}"
