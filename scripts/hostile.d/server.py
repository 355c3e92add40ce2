"""A `tale serve` of the tests' checkpoints: its start, its end, and what the system says of its process.

Owns: the child process and its folder. Does not know: what is sent to it.
"""

import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import client

# Seconds that a server may take to load the tests' checkpoints, and to end after SIGTERM.
START_SECONDS = 60
END_SECONDS = 60
# The models that attacks name. Tiny, with random weights.
CHAT, PICTURES, PLAIN_PICTURES, CLIPS = "chat", "flux", "sdxl", "wan"
CHECKPOINTS = {CHAT: "qwen2", PICTURES: "flux-schnell", PLAIN_PICTURES: "sdxl-a", CLIPS: "wan-a"}
# Whoever a process without rights is here: the user nobody.
NOBODY = 65534
# An address of its own, so that the port that is free there is not the one that the other listener gets from the system.
HEALTH_HOST = "127.0.0.4"
PANIC = re.compile(r"^.*panicked at.*$|^.*has overflowed its stack.*$|^memory allocation of .* failed.*$", re.MULTILINE)
MIB = 1 << 20


class ServerError(Exception):
    """The server did not start, or ended too early."""


@dataclass(frozen=True)
class Features:
    """Which settings this binary has: those of older ones are fewer."""

    flags: frozenset[str]

    @classmethod
    def of(cls, binary: Path) -> "Features":
        texts = [help_text(binary, "serve"), help_text(binary, "generate", "text")]
        return cls(frozenset(re.findall(r"--[a-z][a-z0-9-]*", "\n".join(texts))))

    def setting(self, flag: str, value: str) -> list[str]:
        """The flag and its value, or nothing where there is no such flag."""
        return [flag, value] if flag in self.flags else []


def help_text(binary: Path, *command: str) -> str:
    return subprocess.run([binary, *command, "--help"], capture_output=True, text=True, timeout=30, check=True).stdout


@dataclass(frozen=True)
class Memory:
    """Bytes, as /proc/PID/status has them."""

    resident: int
    peak: int
    address_space: int


class Server:
    """A running server; a context manager."""

    def __init__(
        self,
        binary: Path,
        goldens: Path,
        folder: Path,
        features: Features,
        arguments: Sequence[str] = (),
        *,
        models: Sequence[str] = (CHAT,),
        paths: dict[str, Path] | None = None,
        limits: dict[int, int] | None = None,
        environment: dict[str, str] | None = None,
        wrapper: Sequence[str] = (),
        user: int | None = None,
        output: Path | None = None,
    ) -> None:
        self.folder, self.limits, self.user = folder, limits or {}, user
        # Temporary folders of the server lie here, so that what it leaves behind can be seen.
        self.temporary = folder / "tmp"
        self.output = output
        named = {name: goldens / CHECKPOINTS[name] / "checkpoint" for name in models} | (paths or {})
        self.command = [*wrapper, str(binary), "serve", "--state-dir", "none", "--listen", "127.0.0.1:0"]
        for name, path in named.items():
            self.command += ["--model", f"{name}={path}"]
        # Where /livez is answered whatever happens to the other listener; None of a binary that has no such place.
        self.health = (HEALTH_HOST, free_port(HEALTH_HOST)) if "--health-listen" in features.flags else None
        if self.health is not None:
            self.command += ["--health-listen", "{}:{}".format(*self.health)]
        if output is not None:
            self.command += ["--output-dir", str(output)]
        self.command += arguments
        self.environment = os.environ | {"TMPDIR": str(self.temporary)} | (environment or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.address: client.Address = ("127.0.0.1", 0)

    def __enter__(self) -> "Server":
        self.spawn()
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def spawn(self) -> None:
        """Starts the process and does not wait for it."""
        self.temporary.mkdir(mode=0o700)
        if self.user is not None:
            os.chown(self.temporary, self.user, self.user)
            for folder in [self.folder, self.folder.parent]:
                folder.chmod(0o711)  # to pass through, not to read
        with open(self.folder / "stdout", "wb") as out, open(self.folder / "stderr", "wb") as err:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environment,
                preexec_fn=limit_to(self.limits),
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            written = (self.folder / "stdout").read_text()
            if match := re.search(r"^listening on http://127\.0\.0\.1:(\d+)$", written, re.MULTILINE):
                self.address = ("127.0.0.1", int(match[1]))
                return
            if not self.is_running():
                raise ServerError(f"the server ended before it was ready:\n{self.log()[-400:]}")
            time.sleep(0.02)
        raise ServerError(f"the server was not ready within {START_SECONDS} s")

    @property
    def pid(self) -> int:
        assert self.process is not None, "spawn comes first"
        return self.process.pid

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self, number: int) -> None:
        assert self.process is not None, "spawn comes first"
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM, seconds: float = END_SECONDS) -> int:
        """Asks the server to end and returns its exit status, minus the signal where one killed it."""
        self.kill(number)
        return self.wait(seconds)

    def wait(self, seconds: float = END_SECONDS) -> int:
        assert self.process is not None, "spawn comes first"
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ServerError(f"the server had not ended after {seconds} s") from None

    def log(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def panics(self) -> list[str]:
        """Lines of the log that no input may cause."""
        return PANIC.findall(self.log())

    def memory(self) -> Memory:
        status = Path(f"/proc/{self.pid}/status").read_text()
        kib = {key: int(value) for key, value in re.findall(r"^(Vm\w+):\s+(\d+) kB$", status, re.MULTILINE)}
        return Memory(*(kib.get(key, 0) << 10 for key in ["VmRSS", "VmHWM", "VmSize"]))

    def reset_peak(self) -> None:
        """VmHWM begins anew; needs the rights of the process's owner."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def num_open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def left_behind(self) -> list[str]:
        """What lies in the folder for temporary files."""
        return sorted(path.name for path in self.temporary.iterdir())

    def metrics(self) -> dict[str, float]:
        """Samples by name with labels."""
        answer = client.ask(self.health or self.address, "GET", "/metrics", source=client.WATCHER)
        lines = [line for line in answer.body.decode().splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def free_port(host: str) -> int:
    """A port of this address on which nobody listens, now."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
        return port


def limit_to(limits: dict[int, int]) -> Callable[[], None]:
    """For the child, before it becomes another program. A hangup that is ignored here, as under nohup, is not ignored there."""

    def limit() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for what, value in limits.items():
            resource.setrlimit(what, (value, value))

    return limit
