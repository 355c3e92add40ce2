"""Measures a server until standard input closes, and prints its samples as JSON. A process of its own, so that the
attack beside it does not slow it down.

usage: probe.py HOST PORT SOURCE livez
       probe.py HOST PORT SOURCE chat MODEL

A sample is [when it began on the clock that never goes back, seconds that it took, what was wrong or null]. Of a chat the
second is the time to the first text of the stream; what is wrong may be that the answer differs from the first one.
"""

import http.client
import json
import select
import sys
import time

sys.dont_write_bytecode = True

import client  # noqa: E402

# Seconds between the beginnings of two samples.
INTERVALS = {"livez": 0.02, "chat": 0.05}
# Seconds until a sample counts as unanswered.
PATIENCE = 10.0

Sample = tuple[float, float, str | None]


class Probe:
    def __init__(self, address: client.Address, source: str, kind: str, model: str) -> None:
        self.address, self.source, self.kind, self.model = address, source, kind, model
        self.expected: str | None = None

    def run(self) -> list[Sample]:
        samples: list[Sample] = []
        interval = INTERVALS[self.kind]
        measure = self.livez if self.kind == "livez" else self.chat
        while not is_over(0):
            start = time.monotonic()
            try:
                seconds, problem = measure()
            except client.NO_ANSWER as error:
                seconds, problem = time.monotonic() - start, f"{type(error).__name__}: {error}"
            samples.append((start, seconds, problem))
            if is_over(start + interval - time.monotonic()):
                break
        return samples

    def livez(self) -> tuple[float, str | None]:
        answer = client.ask(self.address, "GET", "/livez", source=self.source, timeout=PATIENCE)
        return answer.seconds, None if answer.status == 200 else f"status {answer.status}"

    def chat(self) -> tuple[float, str | None]:
        start = time.monotonic()
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE, source_address=(self.source, 0))
        try:
            body = client.encoded(client.chat(self.model, "hello", stream=True))
            connection.request("POST", "/v1/chat/completions", body, {"content-type": client.JSON})
            response = connection.getresponse()
            seconds, text = self.heard(response, start)
        finally:
            connection.close()
        if response.status != 200:
            return seconds, f"status {response.status}"
        if self.expected is None:
            self.expected = text
        return seconds, None if text == self.expected else "another answer"

    def heard(self, response: http.client.HTTPResponse, start: float) -> tuple[float, str]:
        """Seconds until the first text came, and all of it. Events without text, such as keep-alives, are no answer."""
        parts: list[str] = []
        seconds = 0.0
        for line in response:
            if part := client.spoken(line):
                seconds = seconds or time.monotonic() - start
                parts.append(part)
        return seconds or time.monotonic() - start, "".join(parts)


def is_over(seconds: float) -> bool:
    """Waits so long for the end of standard input."""
    readable, _, _ = select.select([sys.stdin], [], [], max(seconds, 0))
    return bool(readable)


def main() -> None:
    host, port, source, kind, *model = sys.argv[1:]
    print(json.dumps(Probe((host, int(port)), source, kind, model[0] if model else "").run()))


if __name__ == "__main__":
    main()
