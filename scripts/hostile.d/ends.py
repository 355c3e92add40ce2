"""Signals, folders that are full, read-only or gone, and a system that gives no threads."""

import http.client
import os
import resource
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import client
import server as servers
from attack import NotRun, Run, attack
from load import CHATS, VIDEOS, make_clip
from server import NOBODY, Server, ServerError

CLIP = {"model": servers.CLIPS, "prompt": "a", "width": 64, "height": 64, "num_frames": 5, "num_inference_steps": 1, "seed": 1}
# Takes longer than any of these tests waits, so that it is running when the signal comes.
LONG_CLIP = CLIP | {"num_frames": 81, "num_inference_steps": 1000}
BOTH = (servers.CHAT, servers.CLIPS)
# A temporary file system too small for a clip.
SMALL = "size=16k"
STORAGE_CODE = "insufficient_storage"
SERVES = "serves"
# Within which /readyz says that the disk has gone.
READY_SECONDS = 3.0


@attack()
def sigterm(run: Run) -> None:
    """A stream that runs is finished, new work is refused, and nothing is left on the disk."""
    drain(run, signal.SIGTERM)


@attack()
def sighup(run: Run) -> None:
    """As SIGTERM: a terminal that closes takes no answer away."""
    drain(run, signal.SIGHUP)


def drain(run: Run, number: int) -> None:
    with run.server(models=BOTH) as server:
        make_clip(server, CLIP)
        with client.connect(server.address) as connection:
            connection.sendall(client.post(CHATS, client.encoded(client.chat(servers.CHAT, "hi", stream=True, max_tokens=200))))
            connection.recv(1)  # it has begun
            server.kill(number)
            events = rest_of(connection)
        status = server.wait()
        run.check("the running stream", "whole" if b"[DONE]" in events else "cut", "whole", b"[DONE]" in events)
        run.equal("exit status", status, 0)
        run.count_is_zero("left in the temporary folder", server.left_behind())


def rest_of(connection: Any) -> bytes:
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except OSError:
        pass
    return b"".join(parts)


@attack()
def second_signal(run: Run) -> None:
    """Ends at once, with the temporary folder removed."""
    with run.server(models=BOTH) as server:
        make_clip(server, CLIP)
        client.ask_json(server.address, VIDEOS, LONG_CLIP)
        server.kill(signal.SIGTERM)
        time.sleep(0.5)
        begun = time.monotonic()
        status = server.end()
        run.check(
            "end",
            f"status {status} after {time.monotonic() - begun:.1f} s",
            "143 in 3 s",
            status == 143 and time.monotonic() - begun < 3,
        )
        run.count_is_zero("left in the temporary folder", server.left_behind())


@attack()
def full_log(run: Run) -> None:
    """Logs that cannot be written (stderr is full) end nothing."""
    with run.server("--log-format", "json", wrapper=["sh", "-c", 'exec "$@" 2>/dev/full', "sh"]) as server:
        run.equal("a chat", client.ask_json(server.address, CHATS, client.chat(servers.CHAT, "hi")).status, 200)


# --- folders ----------------------------------------------------------------------------------------------------------


@attack()
def removed_file(run: Run) -> None:
    """The file of a clip goes away: 404 or 410, not a cut 200."""
    with run.subfolder() as folder, run.server(models=BOTH, output=folder / "clips") as server:
        video = make_clip(server, CLIP)
        for path in (folder / "clips").iterdir():
            path.unlink()
        answer = content_of(server, video)
        run.check("its content", answer, "404 or 410", answer in ("404", "410"))


@attack()
def cut_file(run: Run) -> None:
    """The file of a clip is cut: no answer that announces more than comes."""
    with run.subfolder() as folder, run.server(models=BOTH, output=folder / "clips") as server:
        video = make_clip(server, CLIP)
        for path in (folder / "clips").iterdir():
            os.truncate(path, 10)
        answer = content_of(server, video)
        run.check("its content", answer, "404 or 410", answer in ("404", "410"))


@attack()
def modes(run: Run) -> None:
    """Files are their owner's alone, and so is the folder."""
    previous = os.umask(0)
    try:
        with run.subfolder() as folder, run.server(models=BOTH, output=folder / "clips") as server:
            make_clip(server, CLIP)
            files = list((folder / "clips").iterdir())
            run.equal("folder", oct(mode_of(folder / "clips")), oct(0o700))
            run.equal("files", ", ".join(sorted({oct(mode_of(path)) for path in files})), oct(0o600))
            others = [f"{path.name} {mode_of(path):o}" for path in server.temporary.rglob("*") if mode_of(path) & 0o077]
            run.count_is_zero("temporary files that others can read", others)
    finally:
        os.umask(previous)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@attack()
def vanished_folder(run: Run) -> None:
    """The output folder goes away while serving: told before device work, and by /readyz where clips are all it makes."""
    with run.subfolder() as folder, run.server(models=(servers.CLIPS,), output=folder / "clips") as server:
        shutil.rmtree(folder / "clips")
        report_without_storage(run, server)


@attack()
def full_folder(run: Run) -> None:
    """The output folder's file system has room for no clip: the job says so, and by its code."""
    setting = run.features.setting("--min-free-disk", "1KB")
    with mounted(run, SMALL) as (folder, wrapper), run.server(*setting, models=BOTH, output=folder, wrapper=wrapper) as server:
        video = make_clip(server, CLIP | {"num_frames": 17, "width": 256, "height": 256})
        run.check("a clip that does not fit", outcome(video), STORAGE_CODE, STORAGE_CODE in outcome(video))
        run.equal("a chat beside it", client.ask_json(server.address, CHATS, client.chat(servers.CHAT, "hi")).status, 200)
        run.count_is_zero("panics", server.panics())


@attack()
def read_only_folder(run: Run) -> None:
    """Found at start, in one line."""
    with mounted(run, "ro,size=1m") as (folder, wrapper):
        refused_at_start(run, output=folder, wrapper=wrapper)


@attack()
def no_folder(run: Run) -> None:
    """An output folder that is a file, or below one: found at start, in one line."""
    with run.subfolder() as folder:
        file = folder / "file"
        file.write_text("")
        refused_at_start(run, output=file)
        refused_at_start(run, output=file / "clips")


def refused_at_start(run: Run, **options: Any) -> None:
    try:
        with run.server(models=BOTH, **options) as server:
            video = make_clip(server, CLIP)
            told = f"it starts; a clip: {outcome(video)}"
    except ServerError as error:
        # Lines of the log may come before it.
        told = str(error).splitlines()[-1]
    run.check("start", told, "one line", told.startswith("error: "))


def report_without_storage(run: Run, server: Server) -> None:
    # A server that has other work stays ready, and says that clips are refused.
    ready = told_within(server, READY_SECONDS)
    run.check("/readyz", f"{ready.status} {ready.body[:100]!r}", f"says {STORAGE_CODE}", STORAGE_CODE.encode() in ready.body)
    before = server.metrics()
    video = make_clip(server, CLIP)
    run.check("a clip", outcome(video), STORAGE_CODE, STORAGE_CODE in outcome(video))
    run.equal("steps that it took", steps(server.metrics()) - steps(before), 0.0)


def told_within(server: Server, seconds: float) -> client.Answer:
    """What /readyz says, as soon as it names the disk, or after so long."""
    deadline = time.monotonic() + seconds
    while True:
        ready = client.ask(server.address, "GET", "/readyz")
        if STORAGE_CODE.encode() in ready.body or time.monotonic() > deadline:
            return ready
        time.sleep(0.1)


def steps(metrics: dict[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("tale_step_seconds_count") and servers.CLIPS in name)


def outcome(video: dict[str, Any]) -> str:
    error = video.get("error") or {}
    return f"{video.get('status', 'refused')} {error.get('code', '')}: {error.get('message', '')}"


def content_of(server: Server, video: dict[str, Any]) -> str:
    """The status, or how the answer broke off."""
    try:
        return str(client.ask(server.address, "GET", f"{VIDEOS}/{video['id']}/content").status)
    except http.client.IncompleteRead as error:
        return f"200, and {len(error.partial)} bytes of {len(error.partial) + (error.expected or 0)}"
    except client.NO_ANSWER as error:
        return f"200, and {type(error).__name__}"


@contextmanager
def mounted(run: Run, options: str) -> Iterator[tuple[Path, list[str]]]:
    """A folder, and a wrapper under which a program has a small file system there; no other program sees that."""
    with run.subfolder() as folder:
        mount = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"', str(folder)]
        try:
            subprocess.run([*mount, "true"], check=True, capture_output=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            raise NotRun("a file system of its own needs `unshare` and the rights of root") from None
        yield folder, mount


# --- no threads -------------------------------------------------------------------------------------------------------


@attack()
def no_threads(run: Run) -> None:
    """`ulimit -u 4`: one line, no panic; or it serves, where so few threads do."""
    if os.geteuid() != 0:
        raise NotRun("the limit counts all processes of a user; this needs root, to become one that has none")
    with run.subfolder() as folder:
        binary = shared_copy(run, folder)
        command = [binary, "serve", "--state-dir", "none", "--listen", "127.0.0.1:0", "--model", f"chat={run.goldens / 'qwen2/checkpoint'}"]
        for most in [1, 4, 6]:
            told = told_with_threads(command, most)
            run.check(f"start with {most}", told, "one line", is_one_line(told) or told == SERVES)


def told_with_threads(command: list[Any], most: int) -> str:
    limit = servers.limit_to({resource.RLIMIT_NPROC: most})
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limit,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
    )
    try:
        told, _ = process.communicate(timeout=3)
        return told.strip()
    except subprocess.TimeoutExpired:
        process.kill()
        told, _ = process.communicate()
        return SERVES if "listening on" in told and not servers.PANIC.search(told) else f"does not end: {told.strip()}"


def is_one_line(told: str) -> bool:
    return told.startswith("error: ") and len(told.splitlines()) == 1


def shared_copy(run: Run, folder: Path) -> Path:
    """The binary where another user can run it."""
    for path in [run.folder, folder]:
        path.chmod(0o711)
    copy = folder / "tale"
    shutil.copyfile(run.binary, copy)
    copy.chmod(0o755)
    return copy
