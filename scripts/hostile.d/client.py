"""Clients on this machine: whole requests through http.client, and raw bytes through sockets.

Every server listens on a loopback address, so that nothing leaves the machine, whatever address a client has. All of
127.0.0.0/8 is one client to Tale where clients take turns; so the neighbour has the machine's own address, if there is one.
"""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Address = tuple[str, int]


def own_address() -> str | None:
    """This machine's address in its network, if it is in one. Nothing is sent: the system only chooses a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as chooser, contextlib.suppress(OSError):
        chooser.connect(("192.0.2.1", 9))
        address: str = chooser.getsockname()[0]
        return None if address.startswith("127.") else address
    return None


OWN_ADDRESS = own_address()
ATTACKER, NEIGHBOUR, WATCHER = "127.0.0.1", OWN_ADDRESS or "127.0.0.2", "127.0.0.3"
# Seconds that a client waits unless an attack says otherwise.
PATIENCE = 30.0
JSON = "application/json"


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)

    def problem(self) -> str | None:
        """Why this is no error in the API's shape; None when it is one."""
        try:
            error = self.json()["error"]
        except (ValueError, KeyError, TypeError):
            return f"{self.status} without the API's error: {self.body[:80]!r}"
        if not isinstance(error.get("message"), str) or not isinstance(error.get("type"), str):
            return f"{self.status} with an error of another shape: {self.body[:80]!r}"
        if not self.headers.get("content-type", "").startswith(JSON):
            return f"{self.status} with content-type {self.headers.get('content-type')}"
        return None


def connect(address: Address, source: str = ATTACKER, timeout: float = PATIENCE) -> socket.socket:
    return socket.create_connection(address, timeout, source_address=(source, 0))


def head(method: str, path: str, **headers: str | int) -> bytes:
    """The head of a request as it goes over the wire; underscores in names of headers are dashes."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def post(path: str, body: bytes, content_type: str = JSON, **headers: str | int) -> bytes:
    """A whole request as it goes over the wire."""
    return head("POST", path, content_type=content_type, content_length=len(body), **headers) + body


def encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def read_answer(connection: socket.socket, method: str = "POST") -> Answer:
    """What comes on a connection that a request was written to. Fails as `ask` does."""
    begun = time.monotonic()
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    body = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, body, time.monotonic() - begun)


def ask(
    address: Address,
    method: str,
    path: str,
    body: bytes | None = None,
    content_type: str = JSON,
    *,
    headers: Mapping[str, str] | None = None,
    source: str = ATTACKER,
    timeout: float = PATIENCE,
) -> Answer:
    """One request on a connection of its own. Raises OSError or http.client.HTTPException where no whole answer comes."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection(*address, timeout=timeout, source_address=(source, 0))
    try:
        sent = ({"content-type": content_type} if body is not None else {}) | dict(headers or {})
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        content = response.read()
        names = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, names, content, time.monotonic() - begun)
    finally:
        connection.close()


def ask_json(address: Address, path: str, value: Any, **options: Any) -> Answer:
    return ask(address, "POST", path, encoded(value), **options)


def exchange(address: Address, request: bytes, *, source: str = ATTACKER, timeout: float = PATIENCE) -> Answer:
    """Raw bytes, and what is answered. Fails as `ask` does."""
    with connect(address, source, timeout) as connection:
        # Where it is answered and closed before all was sent, the answer counts.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request)
        return read_answer(connection)


NO_ANSWER = (OSError, http.client.HTTPException)


def chat(model: str, text: str, **fields: Any) -> dict[str, Any]:
    """A chat that always gives the same answer."""
    message = {"role": "user", "content": text}
    return {"model": model, "messages": [message], "seed": 7, "ignore_eos": True, "max_tokens": 8} | fields


def spoken(events: bytes) -> str:
    """The text of a stream of a chat; how it was cut into events is left out."""
    data = [line.removeprefix(b"data: ") for line in events.splitlines() if line.startswith(b"data: {")]
    choices = [choice for event in data for choice in json.loads(event).get("choices", [])]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def close_all(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def is_closed_by_peer(connection: socket.socket) -> bool:
    """Whether the other side has closed; what it wrote before is thrown away."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True
