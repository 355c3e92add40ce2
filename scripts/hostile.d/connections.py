"""Attacks on connections: heads and bodies that come slowly, not at all, or in no form of HTTP."""

import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import client
import server as servers
from attack import Run, attack
from client import ATTACKER, Answer
from server import MIB, Server
from watch import Bounds, watched

# The usual limit of open files of a process.
USUAL_FILES = 1024
SILENT_CONNECTIONS = 1_100
CONNECT_SECONDS = 0.5
# Other clients than ATTACKER, NEIGHBOUR and WATCHER.
OTHERS = [f"127.0.1.{i}" for i in range(1, 41)]
# A head has to be there in 10 s; a body may take 30 s. Silence between two requests is closed after 75 s.
HEAD_SECONDS, BODY_SECONDS = 10, 30
# Set in the short form, where the binary can.
SHORT_HEAD_SECONDS = 2
SLACK_SECONDS = 5.0
CHAT_PATH, EDIT_PATH = "/v1/chat/completions", "/v1/images/edits"
PICTURE_BODY_BYTES = 32 << 20


@attack()
def silent(run: Run) -> None:
    """1,100 connections of one client that say nothing, to a server that may open 1,024 files."""
    with run.server(limits={resource.RLIMIT_NOFILE: USUAL_FILES}) as server, watched(run, server):
        with held(server, [ATTACKER] * SILENT_CONNECTIONS):
            time.sleep(run.pick(3, 20))


@attack()
def silent_of_many(run: Run) -> None:
    """The same from 40 addresses: the listener for health answers where the other has no place left."""
    with (
        run.server(limits={resource.RLIMIT_NOFILE: USUAL_FILES}) as server,
        watched(run, server, Bounds(neighbour=False, livez=False)),
    ):
        with held(server, [OTHERS[i % len(OTHERS)] for i in range(SILENT_CONNECTIONS)]):
            time.sleep(run.pick(3, 20))
        recovered(run, server)


@attack()
def half_heads(run: Run) -> None:
    """Heads that never end, and as many that get a byte a second: closed when their time is over."""
    count = run.pick(50, 250)
    setting = run.features.setting("--header-seconds", str(SHORT_HEAD_SECONDS))
    setting, seconds = ([], HEAD_SECONDS) if run.is_long or not setting else (setting, SHORT_HEAD_SECONDS)
    with run.server(*setting) as server, watched(run, server):
        half = [begun(server, b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: ") for _ in range(count)]
        slow = [begun(server, b"G") for _ in range(count)]
        left = wait_until_closed(half + slow, seconds + SLACK_SECONDS, each_second=lambda: drip(slow, b"E"))
        run.equal("connections that are still open", left, 0)


@attack(only_long=True)
def slow_bodies(run: Run) -> None:
    """Announced bodies that get a byte a second: 408 or closed when their time is over, and no place is taken."""
    count = run.pick(20, 200)
    with run.server(models=(servers.CHAT, servers.PLAIN_PICTURES)) as server, watched(run, server):
        slow = [
            begun(server, client.head("POST", path, content_type=client.JSON, content_length=1_000) + b"{")
            for path in [CHAT_PATH, EDIT_PATH]
            for _ in range(count)
        ]
        left = wait_until_closed(slow, BODY_SECONDS + SLACK_SECONDS, each_second=lambda: drip(slow, b" "))
        run.equal("connections that are still open", left, 0)


@attack()
def announced_bodies(run: Run) -> None:
    """376 bodies of 32 MiB that are announced and never come: memory is taken for bytes that are there."""
    with run.server(models=(servers.CHAT, servers.PLAIN_PICTURES)) as server:
        with watched(run, server) as watch:
            head = client.head("POST", EDIT_PATH, content_type=client.JSON, content_length=PICTURE_BODY_BYTES)
            held_open = [begun(server, head) for _ in range(376)]
            time.sleep(run.pick(2, 10))
            client.close_all(held_open)
        added = (watch.memories.address_space - watch.memories.before.address_space) / MIB
        run.check("address space added", f"{added:.0f} MiB", "2048 MiB", added <= 2048)


@attack()
def first_bytes(run: Run) -> None:
    """1,030 times the first byte of a body: no place is taken before the rest is there."""
    with run.server() as server, watched(run, server):
        request = client.head("POST", CHAT_PATH, content_type=client.JSON, content_length=1_000) + b"{"
        held_open = [begun(server, request) for _ in range(1_030)]
        time.sleep(run.pick(2, 20))
        client.close_all(held_open)


@attack()
def floods(run: Run) -> None:
    """Connections that are opened and dropped as fast as one client can, with requests and without. They fill the system's
    queue of the listener that they flood: the listener for health answers."""
    with run.server() as server:
        files = server.num_open_files()
        with watched(run, server, Bounds(livez=server.health is None)):
            ends = time.monotonic() + run.pick(3, 20)
            with ThreadPoolExecutor(4) as pool:
                opened = sum(pool.map(lambda i: flood(server, ends, i % 2 == 0), range(4)))
        run.check("connections", str(opened), "none", None)
        left = settled(lambda: server.num_open_files() - files, 5)
        run.check("files left open", str(left), "at most 8", left <= 8)


def flood(server: Server, ends: float, with_request: bool) -> int:
    opened = 0
    while time.monotonic() < ends:
        try:
            with client.connect(server.address, timeout=CONNECT_SECONDS) as connection:
                if with_request:
                    connection.sendall(client.head("GET", "/v1/models"))
        except OSError:
            pass
        opened += 1
    return opened


# --- malformed heads and bodies -----------------------------------------------------------------------------------------


def malformed() -> dict[str, bytes]:
    """Each has to be answered with 4xx in the API's shape, soon."""
    good = client.encoded(client.chat(servers.CHAT, "hi", max_tokens=1))
    posted = client.head("POST", CHAT_PATH, content_type=client.JSON)[:-2]
    return {
        "no Host": b"GET /v1/models HTTP/1.1\r\n\r\n",
        "two Hosts": b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
        "an empty Host": b"GET /v1/models HTTP/1.1\r\nhost:\r\n\r\n",
        "a control character in a value": b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-a: a\x01b\r\n\r\n",
        "a zero byte in a name": b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx\x00a: b\r\n\r\n",
        "a space before the colon": b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-a : b\r\n\r\n",
        "a bare CR": b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-a: a\rb: c\r\n\r\n",
        "no version": b"GET /v1/models\r\n\r\n",
        "version 9.9": b"GET /v1/models HTTP/9.9\r\nhost: localhost\r\n\r\n",
        "no method": b"/v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "binary": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4 + b"\r\n\r\n",
        "a head of 1 MiB": b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-a: " + b"a" * MIB + b"\r\n\r\n",
        "20,000 headers": b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        "a path of 100 kB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "a length that is none": posted + b"content-length: x\r\n\r\n" + good,
        "a negative length": posted + b"content-length: -1\r\n\r\n" + good,
        "a length of 2^64": posted + b"content-length: 18446744073709551616\r\n\r\n" + good,
        "two lengths": posted + b"content-length: 2\r\ncontent-length: 300\r\n\r\n" + good,
        "a chunk of 2^64-1": posted + b"transfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n" + good,
        "a chunk size that is none": posted + b"transfer-encoding: chunked\r\n\r\nxyz\r\n" + good,
        "a chunk without an end": posted + b"transfer-encoding: chunked\r\n\r\n2\r\n{}abc\r\n0\r\n\r\n",
        "an unknown transfer encoding": posted + b"transfer-encoding: x\r\n\r\n" + good,
        "a form without its end": client.post(
            EDIT_PATH, b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nchat', "multipart/form-data; boundary=x"
        ),
    }


@attack()
def malformed_heads(run: Run) -> None:
    """What is no HTTP is told so in the API's shape, at once."""
    wrong, slow = [], []
    with run.server(models=(servers.CHAT, servers.PLAIN_PICTURES)) as server:
        for name, request in malformed().items():
            begun_at = time.monotonic()
            if problem := problem_of(server, request):
                wrong.append(f"{name}: {problem}")
            if (seconds := time.monotonic() - begun_at) > SLACK_SECONDS:
                slow.append(f"{name}: {seconds:.1f} s")
        panics = server.panics()
    run.count_is_zero("not told in the API's shape", wrong)
    run.count_is_zero(f"answered after {SLACK_SECONDS:.0f} s", slow)
    run.count_is_zero("panics", panics)


def problem_of(server: Server, request: bytes) -> str | None:
    try:
        answer = client.exchange(server.address, request, timeout=BODY_SECONDS + SLACK_SECONDS)
    except client.NO_ANSWER as error:
        return f"no answer, {type(error).__name__}"
    return answer.problem() if 400 <= answer.status < 500 else f"status {answer.status}"


@attack()
def half_closed(run: Run) -> None:
    """A client that has said all and closed its half of the connection gets its answer, whole or as a stream."""
    with run.server() as server:
        for stream in [False, True]:
            chat = client.chat(servers.CHAT, "hi", stream=stream, max_tokens=40)
            expected = text_of(client.ask_json(server.address, CHAT_PATH, chat), stream)
            answer = half_closed_answer(server, client.post(CHAT_PATH, client.encoded(chat)))
            told = text_of(answer, stream) if isinstance(answer, Answer) else answer
            kind = "as a stream" if stream else "whole"
            run.check(f"an answer {kind}", "the same" if told == expected else told[:100], "the same", told == expected)


def half_closed_answer(server: Server, request: bytes) -> Answer | str:
    with client.connect(server.address, timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        try:
            return client.read_answer(connection)
        except client.NO_ANSWER as error:
            return type(error).__name__


def text_of(answer: Answer, stream: bool) -> str:
    return client.spoken(answer.body) if stream else answer.json()["choices"][0]["message"]["content"]


@attack()
def web_pages(run: Run) -> None:
    """What a browser sends for a page from elsewhere: orders nothing and reads nothing, by rebinding or with a form."""
    chat = client.encoded(client.chat(servers.CHAT, "hi", max_tokens=1))
    form = b"".join(
        f'--x\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in {
            "model": servers.CLIPS,
            "prompt": "a",
            "num_frames": 1,
            "num_inference_steps": 1,
            "size": "32x32",
        }.items()
    )
    form += b"--x--\r\n"
    with run.server(models=(servers.CHAT, servers.CLIPS)) as server:
        local = f"127.0.0.1:{server.address[1]}"
        foreign = [
            ("evil.example", None),
            (f"evil.example:{server.address[1]}", None),
            (local, "http://evil.example"),
            (local, "null"),
            ("localhost.evil.example", None),
            ("evil.example", "http://evil.example"),
        ]
        allowed = [(local, None), (f"localhost:{server.address[1]}", None), (local, f"http://{local}")]
        tried = [
            (*names, path, body, kind)
            for names in foreign
            for path, body, kind in [
                (CHAT_PATH, chat, client.JSON),
                ("/v1/videos", form, "multipart/form-data; boundary=x"),
                ("/v1/videos", form, "text/plain"),
                ("/v1/models", None, client.JSON),
            ]
        ]
        taken = [
            f"Host {host}, Origin {origin}, {path}: {status}"
            for host, origin, path, body, kind in tried
            if not 400 <= (status := status_of(server, host, origin, path, body, kind)) < 500
        ]
        refused = [
            f"Host {host}, Origin {origin}: {status}"
            for host, origin in allowed
            if (status := status_of(server, host, origin, CHAT_PATH, chat, client.JSON)) != 200
        ]
    run.count_is_zero("orders of foreign pages that were taken", taken)
    run.count_is_zero("local clients that were refused", refused)


def status_of(server: Server, host: str, origin: str | None, path: str, body: bytes | None, kind: str) -> int:
    headers = {"host": host} | ({"origin": origin} if origin else {})
    return client.ask(server.address, "POST" if body else "GET", path, body, kind, headers=headers).status


# --- parts ------------------------------------------------------------------------------------------------------------


@contextmanager
def held(server: Server, sources: Sequence[str]) -> Iterator[list[socket.socket]]:
    """Connections that are open and silent; those that nobody accepts are given up soon."""
    with ThreadPoolExecutor(32) as pool:
        opened = [connection for connection in pool.map(lambda source: try_connect(server, source), sources) if connection]
    try:
        yield opened
    finally:
        client.close_all(opened)


def try_connect(server: Server, source: str) -> socket.socket | None:
    try:
        return client.connect(server.address, source, CONNECT_SECONDS)
    except OSError:
        return None


def begun(server: Server, request: bytes) -> socket.socket:
    """A connection on which the beginning of a request was written, if anybody reads it."""
    connection = client.connect(server.address)
    drip([connection], request)
    return connection


def drip(connections: Sequence[socket.socket], content: bytes) -> None:
    for connection in connections:
        # A closed one is what the attack waits for.
        with suppress(OSError):
            connection.sendall(content)


def wait_until_closed(connections: Sequence[socket.socket], seconds: float, each_second: Callable[[], None]) -> int:
    """How many are open after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        each_second()
        time.sleep(1)
        connections = [connection for connection in connections if not client.is_closed_by_peer(connection)]
        if not connections:
            return 0
    client.close_all(list(connections))
    return len(connections)


def settled(measure: Callable[[], int], seconds: float) -> int:
    """The least value within so many seconds."""
    deadline = time.monotonic() + seconds
    least = measure()
    while least > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
        least = min(least, measure())
    return least


def recovered(run: Run, server: Server) -> None:
    """A small chat is answered soon after the attack."""
    begun_at = time.monotonic()
    chat = client.chat(servers.CHAT, "hi")
    try:
        told = str(client.ask_json(server.address, CHAT_PATH, chat, source=client.NEIGHBOUR, timeout=BODY_SECONDS).status)
    except client.NO_ANSWER as error:
        told = type(error).__name__
    seconds = time.monotonic() - begun_at
    run.check("a chat afterwards", f"{told} in {seconds:.1f} s", "200 in 5 s", told == "200" and seconds < 5)
