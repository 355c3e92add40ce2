"""Fuzzed requests over every route of GET /openapi.json: some that its schemas allow, some that nothing allows.

No answer may be a 5xx but 503 and 507, each error has the API's shape and repeats no text of the client, the log has no
panic, and afterwards nothing is left running.
"""

import base64
import random
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import client
import server as servers
from attack import Run, attack
from client import JSON, Answer
from schemas import MARKER, Shapes, damaged_text, marked
from server import Server

WORKERS = 4
# Requests of each fuzzer in the short and in the long form.
SHORT_COUNT, LONG_COUNT = 1_000, 10_000
# 503 and 507 say what is missing, and pass.
ALLOWED_5XX = (503, 507)
SECONDS = 60.0
MODELS = (servers.CHAT, servers.PICTURES, servers.PLAIN_PICTURES, servers.CLIPS)
# By what stands in a path; the others are of text.
MODELS_OF = {"images": servers.PICTURES, "videos": servers.CLIPS}
BOUNDARY = "hostile-boundary"
# Identifiers in paths: none is there, none may be read as a path.
IDS = [
    MARKER,
    f"..%2f..%2f{MARKER}",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%00",
    "%ff",
    "a" * 5_000,
    "video_0",
    f"{MARKER}%0d%0aset-cookie:x",
    "-1",
    "video_00000000000000000000000000000000",
]
OTHER_METHODS = ["PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "MARK"]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes | None = None
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)

    def told(self) -> str:
        return f"{self.method} {self.path[:60]} {self.content_type.split(';')[0]} {(self.body or b'')[:200]!r}"


@dataclass
class Findings:
    statuses: Counter[int] = field(default_factory=Counter)
    wrong_5xx: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)

    def add(self, request: Request, answer: Answer) -> None:
        self.statuses[answer.status] += 1
        if answer.status < 400:
            return
        if answer.status >= 500 and answer.status not in ALLOWED_5XX:
            self.wrong_5xx.append(f"{answer.status} {answer.body[:150]!r} to {request.told()}")
        if MARKER.encode() in answer.body:
            self.repeated.append(f"{answer.body[:150]!r} to {request.told()}")
        has_body = request.method != "HEAD" and answer.status != 416
        if has_body and (problem := answer.problem()):
            self.wrong_shape.append(f"{problem} to {request.told()}")


@attack()
def valid(run: Run) -> None:
    """Requests within their schemas."""
    fuzz(run, lambda fuzzer: fuzzer.valid())


@attack()
def invalid(run: Run) -> None:
    """Requests outside of their schemas, or outside of JSON, forms and HTTP's methods."""
    fuzz(run, lambda fuzzer: fuzzer.invalid())


def fuzz(run: Run, make: Callable[["Fuzzer"], Request]) -> None:
    count = run.count or run.pick(SHORT_COUNT, LONG_COUNT)
    with run.server(models=MODELS) as server:
        document = client.ask(server.address, "GET", "/openapi.json").json()
        fuzzer = Fuzzer(document, run.random())
        requests = [make(fuzzer) for _ in range(count)]
        findings = Findings()
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda request: send(server, request, findings), requests))
        report(run, server, findings)


def send(server: Server, request: Request, findings: Findings) -> None:
    try:
        answer = client.ask(
            server.address,
            request.method,
            request.path,
            request.body,
            request.content_type,
            headers=request.headers,
            timeout=SECONDS,
        )
    except client.NO_ANSWER as error:
        findings.unanswered.append(f"{type(error).__name__} {error} to {request.told()}")
    else:
        findings.add(request, answer)


def report(run: Run, server: Server, findings: Findings) -> None:
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(findings.statuses.items()))
    run.check("answers", statuses, "none", None)
    run.count_is_zero("5xx but 503 and 507", findings.wrong_5xx)
    run.count_is_zero("errors of another shape", findings.wrong_shape)
    run.count_is_zero("errors that repeat a client's text", findings.repeated)
    run.count_is_zero("unanswered", findings.unanswered)
    run.count_is_zero("panics", server.panics())
    run.count_is_zero("gauges that stay", servers_at_rest(server))


def servers_at_rest(server: Server, seconds: float = 60.0) -> list[str]:
    """Gauges of work that are not zero; waits until they are, or so long."""
    deadline = time.monotonic() + seconds
    while True:
        names = ["tale_sessions_live", "tale_sessions_running", "tale_queue_depth", "tale_kv_blocks_used", "tale_jobs_active"]
        left = [f"{name} {value}" for name, value in server.metrics().items() if value and name.split("{")[0] in names]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def model_of(path: str) -> str:
    """A model of the medium that an endpoint is for."""
    return next((model for medium, model in MODELS_OF.items() if f"/{medium}" in path), servers.CHAT)


@dataclass
class Operation:
    method: str
    path: str
    # Schemas of a body by content type; none without a body.
    bodies: dict[str, Any]
    queries: list[dict[str, Any]]


class Fuzzer:
    """Makes requests from a document."""

    def __init__(self, document: dict[str, Any], rng: random.Random) -> None:
        self.rng = rng
        self.shapes = Shapes(document, rng, list(MODELS))
        self.operations = list(self.read_operations(document))

    def read_operations(self, document: dict[str, Any]) -> Iterator[Operation]:
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                contents = operation.get("requestBody", {}).get("content", {})
                bodies = {kind: self.shapes.resolved(content["schema"]) for kind, content in contents.items()}
                parameters = map(self.shapes.resolved, operation.get("parameters", []))
                queries = [parameter for parameter in parameters if parameter["in"] == "query"]
                yield Operation(method.upper(), path, bodies, queries)

    def operation(self) -> Operation:
        """Those with a body more often: they have the fields."""
        return self.rng.choices(self.operations, [6 if operation.bodies else 1 for operation in self.operations])[0]

    def valid(self) -> Request:
        operation = self.operation()
        path = operation.path.replace("{id}", self.rng.choice([*MODELS, "video_0"])) + self.query(operation)
        if not operation.bodies:
            return Request(operation.method, path)
        kind = self.rng.choice(list(operation.bodies))
        value = self.shapes.valid(operation.bodies[kind])
        if self.rng.random() < 0.9:  # a model of the endpoint's own medium
            value["model"] = model_of(operation.path)
        return self.request(operation, path, kind, value)

    def query(self, operation: Operation) -> str:
        chosen = {q["name"]: self.shapes.valid(q["schema"], q["name"]) for q in operation.queries if self.rng.random() < 0.5}
        return "?" + urllib.parse.urlencode(chosen) if chosen else ""

    def request(self, operation: Operation, path: str, kind: str, value: Any) -> Request:
        if kind == JSON:
            return Request(operation.method, path, client.encoded(value))
        return Request(operation.method, path, form(value), f"multipart/form-data; boundary={BOUNDARY}")

    def invalid(self) -> Request:
        operation = self.operation()
        if not operation.bodies or self.rng.random() < 0.15:
            return self.odd_path(operation)
        kind = self.rng.choice(list(operation.bodies))
        value = self.shapes.valid(operation.bodies[kind])
        value["model"] = self.rng.choice([value.get("model", MARKER), model_of(operation.path), MARKER])
        request = self.request(operation, operation.path, kind, self.shapes.invalid(marked(value)))
        damage: Callable[[Request], Request] = self.rng.choice([lambda r: r, lambda r: r, self.damaged_body, self.odd_head])
        return damage(request)

    def odd_path(self, operation: Operation) -> Request:
        path = operation.path.replace("{id}", self.rng.choice(IDS))
        query = self.rng.choice(
            [
                "",
                f"?unknown={MARKER}",
                f"?limit={MARKER}&order={MARKER}",
                f"?variant={MARKER}",
                "?limit=1&limit=2",
                "?%ff=%ff",
                "?" + "a=b&" * 2_000,
            ]
        )
        method = self.rng.choice([operation.method, *OTHER_METHODS])
        # Of a body that nobody asked for nothing may be read as one.
        return Request(method, path + query, self.rng.choice([None, MARKER.encode()]))

    def damaged_body(self, request: Request) -> Request:
        return Request(request.method, request.path, damaged_text(request.body or b"{}", self.rng), request.content_type)

    def odd_head(self, request: Request) -> Request:
        """The body is not what the head says of it."""
        content_type = self.rng.choice(
            [
                "",
                "text/plain",
                f"{MARKER}/{MARKER}",
                JSON,
                f"{JSON}; charset={MARKER}",
                "multipart/form-data",
                f"multipart/form-data; boundary={MARKER}",
                "multipart/form-data; boundary=",
                "application/x-www-form-urlencoded",
            ]
        )
        headers = self.rng.choice(
            [
                {},
                {"content-encoding": "gzip"},
                {"content-encoding": MARKER},
                {"content-encoding": "gzip, gzip"},
                {"expect": MARKER},
                {"accept": MARKER},
                {"range": f"bytes={MARKER}"},
                {"last-event-id": MARKER},
                {"authorization": f"Bearer {MARKER}"},
                {"x-" + MARKER: "a" * 4_000},
            ]
        )
        return Request(request.method, request.path, request.body, content_type, headers)


def form(value: Any) -> bytes:
    """A multipart body with a part for each field; files and lists are spelled as clients of OpenAI's API do."""
    fields = value.items() if isinstance(value, dict) else [("value", value)]
    parts = [part(name, content) for name, content in fields]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def part(name: str, content: Any) -> bytes:
    is_file = name.rstrip("[]") in ("image", "mask", "reference_images")
    file_name = f'; filename="{name}.png"' if is_file else ""
    head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"{file_name}\r\n\r\n'
    return head.encode(errors="replace") + part_content(content, is_file) + b"\r\n"


def part_content(content: Any, is_file: bool) -> bytes:
    if not isinstance(content, str):
        return client.encoded(content)
    try:
        return base64.b64decode(content, validate=True) if is_file else content.encode(errors="replace")
    except ValueError:
        return content.encode(errors="replace")
