"""Load and abort: mixed requests, most of which their clients leave. Afterwards nothing is left of them."""

import random
import threading
import time
from collections import Counter
from typing import Any

import client
import pictures
import server as servers
from attack import Run, attack
from load import CHATS, COMPLETIONS, EDITS, GENERATIONS, VIDEOS
from requests import MODELS, servers_at_rest
from server import MIB, Server
from watch import Bounds, watched

WORKERS = 6
# Resident memory that may be there more at the end than after the first third.
GROWTH_MIB = 64
# Files that may be open more at the end than at the start: the log of metrics, a connection that is closing.
FILES = 8


@attack()
def aborts(run: Run) -> None:
    """Six clients with chats, pictures, edits and clips, two thirds of them left at a random moment."""
    with run.server(models=MODELS) as server:
        files = server.num_open_files()
        soak = Soak(server, run)
        with watched(run, server, Bounds(memory_mib=1024)):
            soak.work(run.pick(5, 300))
        run.check("requests", ", ".join(f"{count} {name}" for name, count in sorted(soak.ended.items())), "none", None)
        run.count_is_zero("5xx", soak.failed)
        run.count_is_zero("gauges that stay", servers_at_rest(server))
        more = ledger(server) - soak.ledger
        run.check("ledger", f"{more:.0f} bytes more than before", "0", more == 0)
        growth = (server.memory().resident - soak.resident) / MIB
        run.check("memory after the first third", f"{growth:+.0f} MiB", f"{GROWTH_MIB} MiB", growth <= GROWTH_MIB)
        left = server.num_open_files() - files
        run.check("files left open", str(left), f"{FILES}", left <= FILES)


def ledger(server: Server) -> float:
    """Bytes that are reserved on all devices."""
    return sum(value for name, value in server.metrics().items() if name.startswith("tale_ledger_used_bytes"))


class Soak:
    def __init__(self, server: Server, run: Run) -> None:
        self.server, self.rng = server, run.random()
        self.ended: Counter[str] = Counter()
        self.failed: list[str] = []
        self.ledger = ledger(server)
        self.picture = pictures.as_base64(pictures.grey(64, 64))
        self.resident = 0

    def work(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(random.Random(self.rng.random()),)) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 3)
        self.resident = self.server.memory().resident
        for thread in threads:
            thread.join()

    def client(self, rng: random.Random) -> None:
        while time.monotonic() < self.deadline:
            path, value = self.order(rng)
            try:
                if rng.random() < 2 / 3:
                    self.leave(path, value, rng.uniform(0, 0.2))
                else:
                    self.finish(path, value, rng)
            except client.NO_ANSWER as error:
                self.failed.append(f"{type(error).__name__} of {path}")

    def order(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        small = {"prompt": "a boat", "num_inference_steps": rng.randint(1, 3), "width": 64, "height": 64}
        return rng.choice(
            [
                (
                    CHATS,
                    client.chat(
                        servers.CHAT,
                        "hello " * rng.randint(1, 20),
                        stream=rng.random() < 0.5,
                        max_tokens=rng.randint(1, 60),
                        n=rng.randint(1, 3),
                    ),
                ),
                (
                    COMPLETIONS,
                    {"model": servers.CHAT, "prompt": ["a", "b"], "max_tokens": rng.randint(1, 40), "ignore_eos": True},
                ),
                (GENERATIONS, small | {"model": servers.PICTURES}),
                (GENERATIONS, small | {"model": servers.PLAIN_PICTURES, "stream": True, "partial_images": 2}),
                (EDITS, small | {"model": servers.PLAIN_PICTURES, "image": self.picture, "strength": 1.0}),
                (VIDEOS, small | {"model": servers.CLIPS, "num_frames": 5}),
            ]
        )

    def leave(self, path: str, value: dict[str, Any], after: float) -> None:
        with client.connect(self.server.address) as connection:
            connection.sendall(client.post(path, client.encoded(value)))
            time.sleep(after)
        self.ended["left"] += 1

    def finish(self, path: str, value: dict[str, Any], rng: random.Random) -> None:
        answer = client.ask_json(self.server.address, path, value, timeout=60)
        self.ended[str(answer.status)] += 1
        if answer.status >= 500:
            self.failed.append(f"{answer.status} of {path}: {answer.body[:100]!r}")
        if path == VIDEOS and answer.status == 200 and rng.random() < 0.7:
            time.sleep(rng.uniform(0, 0.3))
            client.ask(self.server.address, "DELETE", f"{VIDEOS}/{answer.json()['id']}")
