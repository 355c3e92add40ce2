"""Attacks on memory and time: requests that are allowed to be sent and cost far more than they should."""

import gzip
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import client
import pictures
import server as servers
from attack import NotRun, Run, attack
from client import ATTACKER
from requests import servers_at_rest
from server import MIB, Server
from watch import NEIGHBOUR, NEIGHBOUR_TIMES, SHORT_FACTOR, Bounds, percentile, watched

COMPLETIONS, CHATS, EDITS, GENERATIONS, VIDEOS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/images/edits",
    "/v1/images/generations",
    "/v1/videos",
)
# Just under the bound of a body without pictures, 8 MiB, and of one with them, 32 MiB.
TEXT_BYTES, PICTURE_BYTES = 8_000_000, 32_000_000
# CPU time that one hostile request of 8 MB may take, beside what the probes cost.
CPU_SECONDS = 2.0
# A clip that no socket's buffers hold: loopback begins with 2.6 MB of them.
LARGE_CLIP_BYTES = 3 * MIB
READERS = 520
STREAMS = 1_000
EDITED = (servers.CHAT, servers.PLAIN_PICTURES)


@attack()
def digits(run: Run) -> None:
    """One prompt of 8 MB of digits, the client leaving after 0.2 s; then eight at once."""
    with run.server() as server:
        body = client.encoded({"model": servers.CHAT, "prompt": "7" * (TEXT_BYTES - 100), "max_tokens": 1})
        spent = cpu_of_abandoned(server, COMPLETIONS, body)
        run.check("CPU time of an abandoned one", f"{spent:.2f} s", f"{CPU_SECONDS:.0f} s", spent <= CPU_SECONDS)
        with watched(run, server):
            refused(run, server, COMPLETIONS, body, 8)


@attack()
def shapes_of_prompts(run: Run) -> None:
    """8 MB of other texts before tokens: spaces, accents, one letter, emoji, messages and parts of them."""
    texts = {
        "spaces": " " * TEXT_BYTES,
        "accents": "a\u0301" * (TEXT_BYTES // 3),
        "letters": "a" * TEXT_BYTES,
        "emoji": "\U0001f980" * (TEXT_BYTES // 4),
        "special tokens": "<|im_end|>" * (TEXT_BYTES // 10),
        "lines": "\n\r" * (TEXT_BYTES // 4),
    }
    chosen = texts if run.is_long else {name: texts[name] for name in ["spaces", "accents"]}
    with run.server() as server, watched(run, server):
        for text in chosen.values():
            prompt = text[: TEXT_BYTES - 1000]
            message = {"role": "user", "content": prompt}
            for path, value in [
                (COMPLETIONS, {"model": servers.CHAT, "prompt": prompt}),
                (CHATS, {"model": servers.CHAT, "messages": [message]}),
            ]:
                body = json.dumps(value, ensure_ascii=False).encode()[:TEXT_BYTES]
                refused(run, server, path, body, run.pick(1, 4), quiet=True)


@attack()
def long_lists(run: Run) -> None:
    """Lists of hundreds of thousands of small things in every field that takes a list."""
    count = 250_000
    message = {"role": "user", "content": ""}
    bodies = {
        "messages": (CHATS, {"model": servers.CHAT, "messages": [message] * count}),
        "parts": (
            CHATS,
            {"model": servers.CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * count}]},
        ),
        "prompts": (COMPLETIONS, {"model": servers.CHAT, "prompt": [""] * 2_000_000}),
        "tokens": (COMPLETIONS, {"model": servers.CHAT, "prompt": [1] * 3_000_000}),
        "lists of tokens": (COMPLETIONS, {"model": servers.CHAT, "prompt": [[]] * 2_000_000}),
        "stop": (CHATS, client.chat(servers.CHAT, "hi", stop=["a"] * 1_500_000)),
        "loras": (GENERATIONS, {"model": servers.PLAIN_PICTURES, "prompt": "a", "loras": [{"name": "a"}] * 500_000}),
        "logit_bias": (CHATS, client.chat(servers.CHAT, "hi", logit_bias={str(i): 0 for i in range(500_000)})),
        "metadata": (CHATS, client.chat(servers.CHAT, "hi", metadata={str(i): "" for i in range(500_000)})),
        "unknown fields": (CHATS, client.chat(servers.CHAT, "hi", **{f"x{i}": 0 for i in range(500_000)})),
    }
    with run.server(models=EDITED) as server, watched(run, server, Bounds(memory_mib=512)):
        for path, value in bodies.values():
            refused(run, server, path, client.encoded(value), run.pick(1, 4), quiet=True, accepts=True)


@attack()
def empty_messages(run: Run) -> None:
    """Four chats of 250,000 empty messages at once."""
    body = client.encoded({"model": servers.CHAT, "messages": [{"role": "user", "content": ""}] * 250_000})
    with run.server() as server, watched(run, server, Bounds(memory_mib=512)):
        refused(run, server, CHATS, body, 4)


@attack()
def empty_pictures(run: Run) -> None:
    """An edit with 10 million empty texts in reference_images; then four at once."""
    list_of_texts = b'{"model":"sdxl","prompt":"a","image":"","reference_images":[' + b'"",' * 10_000_000 + b'""]}'
    with run.server(models=EDITED) as server, watched(run, server, Bounds(memory_mib=512)):
        refused(run, server, EDITS, list_of_texts, run.pick(1, 4))


@attack()
def nesting(run: Run) -> None:
    """Millions of brackets, and objects that are nearly JSON."""
    bodies = [
        b"[" * TEXT_BYTES,
        b'{"a":' * (TEXT_BYTES // 5),
        b'{"model":"chat","messages":' + b"[" * TEXT_BYTES,
        b'"' + b"\\u0000" * (TEXT_BYTES // 6) + b'"',
        b'{"model":"chat","prompt":' + b"9" * (TEXT_BYTES - 100) + b"}",
    ]
    with run.server() as server, watched(run, server, Bounds(memory_mib=512)):
        for body in bodies:
            refused(run, server, CHATS, body[:TEXT_BYTES], run.pick(1, 4), quiet=True)


@attack()
def stop_strings(run: Run) -> None:
    """16 stop strings of 30,000 characters that nearly match all the time, beside a neighbour's streams."""
    stop = ["a" * 29_998 + f"{i:02}" for i in range(16)]
    longest = ["a" * length + "b" for length in (250, 1_000)]
    with run.server() as server, watched(run, server):
        ends = time.monotonic() + run.pick(3, 20)
        bodies = [
            client.encoded(client.chat(servers.CHAT, "aaaa", stop=texts, max_tokens=200, n=16, stream=True))
            for texts in [stop, stop, longest, longest]
        ]
        with ThreadPoolExecutor(len(bodies)) as pool:
            list(pool.map(lambda body: repeat(server, CHATS, body, ends), bodies))


@attack()
def readers_that_do_not_read(run: Run) -> None:
    """520 clients that ask for a large clip and read nothing; a neighbour reads its own."""
    with run.subfolder() as output, run.server(models=(servers.CHAT, servers.CLIPS), output=output / "clips") as server:
        path = large_clip(server, output / "clips")
        with watched(run, server):
            request = client.head("GET", path)
            readers = [lazy_reader(server, request) for _ in range(READERS)]
            time.sleep(run.pick(2, 10))
            other = answer_or_none(server, path, headers={"range": "bytes=0-65535"})
            client.close_all(readers)
        run.equal("a neighbour's read of the file", other, 206)


@attack()
def streams_of_one(run: Run) -> None:
    """1,000 streams of one client: a neighbour's first token takes twice its idle time and a step, at the median."""
    if client.OWN_ADDRESS is None:
        raise NotRun("the neighbour needs an address of its own, and this machine has none but loopback")
    with run.server() as server:
        before = server.metrics()
        with watched(run, server) as watch:
            body = client.encoded(client.chat(servers.CHAT, "tell me", stream=True, max_tokens=200))
            request = client.post(CHATS, body)
            streams = [lazy_reader(server, request) for _ in range(STREAMS)]
            time.sleep(run.pick(4, 10))
            step = mean_step(before, server.metrics())
            client.close_all(streams)
        waited, _ = watch.during_attack(NEIGHBOUR)
        bound = (NEIGHBOUR_TIMES * watch.idle_median() + step) * run.pick(SHORT_FACTOR, 1)
        median = percentile(waited, 50)
        run.check(
            "neighbour's first token p50",
            f"{median * 1e3:.1f} ms, step {step * 1e3:.1f}",
            f"{bound * 1e3:.1f} ms",
            median <= bound,
        )
        run.count_is_zero("gauges that stay", servers_at_rest(server))


@attack()
def picture_bombs(run: Run) -> None:
    """Small files that would be large pictures, as an image to edit and as references, four at once."""
    with run.server(models=EDITED) as server, watched(run, server, Bounds(memory_mib=1024)):
        for content in pictures.bombs().values():
            text = pictures.as_base64(content)
            body = client.encoded(
                {
                    "model": servers.PLAIN_PICTURES,
                    "prompt": "a",
                    "image": text,
                    "num_inference_steps": 1,
                    "width": 64,
                    "height": 64,
                }
            )
            refused(run, server, EDITS, body, run.pick(1, 4), quiet=True, accepts=True)


@attack()
def compressed_bombs(run: Run) -> None:
    """Bodies of a few kB that are gigabytes once decompressed."""
    spaces = gzip.compress(b" " * (64 * MIB), 9)
    bodies = [spaces, b"".join([spaces] * 16), gzip.compress(spaces, 9)]
    with run.server(models=EDITED) as server, watched(run, server):
        for path in [CHATS, EDITS]:
            for body in bodies:
                refused(run, server, path, body, 4, quiet=True, headers={"content-encoding": "gzip"})


# --- parts ------------------------------------------------------------------------------------------------------------


def refused(
    run: Run,
    server: Server,
    path: str,
    body: bytes,
    at_once: int,
    *,
    quiet: bool = False,
    accepts: bool = False,
    headers: dict[str, str] | None = None,
) -> None:
    """Sends the body several times at once; each has to be answered with 4xx or 503. `quiet` tells only what is wrong."""
    with ThreadPoolExecutor(at_once) as pool:
        statuses = list(pool.map(lambda _: answer_of(server, path, body, headers), range(at_once)))
    fine = [
        status
        for status in statuses
        if isinstance(status, int) and (400 <= status < 500 or status == 503 or accepts and status == 200)
    ]
    is_fine = len(fine) == len(statuses)
    if not quiet or not is_fine:
        told = ", ".join(map(str, statuses))
        run.check(f"{at_once} x {path} of {len(body) / 1e6:.1f} MB", told, "4xx or 503", is_fine)


def answer_of(server: Server, path: str, body: bytes, headers: dict[str, str] | None = None) -> int | str:
    try:
        answer = client.exchange(server.address, client.post(path, body, **(headers or {})), timeout=60)
    except client.NO_ANSWER as error:
        return type(error).__name__
    return answer.status


def answer_or_none(server: Server, path: str, headers: dict[str, str]) -> int | None:
    try:
        return client.ask(server.address, "GET", path, headers=headers, source=client.NEIGHBOUR, timeout=10).status
    except client.NO_ANSWER:
        return None


def repeat(server: Server, path: str, body: bytes, ends: float) -> None:
    while time.monotonic() < ends:
        answer_of(server, path, body)


def cpu_of_abandoned(server: Server, path: str, body: bytes) -> float:
    """CPU seconds that a request takes whose client goes 0.2 s after the last byte. Waits until the server rests."""
    before = server.cpu_seconds()
    with client.connect(server.address) as connection:
        try:
            connection.sendall(client.post(path, body))
            time.sleep(0.2)
        except OSError:
            pass  # answered before all was sent
    while True:
        last = server.cpu_seconds()
        time.sleep(0.5)
        if server.cpu_seconds() - last < 0.05:
            return server.cpu_seconds() - before


def lazy_reader(server: Server, request: bytes) -> socket.socket:
    """A client that asks and never reads, with the smallest buffer that the system gives."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    connection.settimeout(client.PATIENCE)
    connection.bind((ATTACKER, 0))
    try:
        connection.connect(server.address)
        connection.sendall(request)
    except OSError:
        pass  # refused; the place stays free for a neighbour
    return connection


def large_clip(server: Server, output: Path) -> str:
    """The path of a clip whose file no buffer holds: frames of noise, in the format that compresses them least."""
    order = {
        "model": servers.CLIPS,
        "prompt": "a",
        "width": 256,
        "height": 256,
        "num_frames": 57,
        "num_inference_steps": 1,
        "seed": 1,
        "output_format": "gif",
    }
    video = make_clip(server, order)
    bytes_made = sum(path.stat().st_size for path in output.iterdir())
    if bytes_made < LARGE_CLIP_BYTES:
        raise RuntimeError(f"the clip has {bytes_made} bytes only")
    return f"{VIDEOS}/{video['id']}/content"


def make_clip(server: Server, order: dict[str, Any], seconds: float = 120) -> dict[str, Any]:
    """Orders a clip and waits until its job has ended."""
    video: dict[str, Any] = client.ask_json(server.address, VIDEOS, order).json()
    deadline = time.monotonic() + seconds
    while video.get("status") in ("queued", "in_progress") and time.monotonic() < deadline:
        time.sleep(0.1)
        video = client.ask(server.address, "GET", f"{VIDEOS}/{video['id']}").json()
    return video


def mean_step(before: dict[str, float], after: dict[str, float]) -> float:
    """Seconds of a step between two readings, of the phase with the longest ones."""
    means = []
    for name, total in after.items():
        if name.startswith("tale_step_seconds_sum"):
            count_name = name.replace("_sum", "_count", 1)
            count = after[count_name] - before.get(count_name, 0)
            means += [(total - before.get(name, 0)) / count] if count else []
    return max(means, default=0.0)
