"""Words stay with their client: not in the log, not in a list of processes, not in a core dump."""

import json
import os
import re
import subprocess
from pathlib import Path

import client
import ends
import server as servers
from attack import Run, attack
from load import CHATS, COMPLETIONS, GENERATIONS, make_clip
from requests import MODELS
from server import NOBODY, Server

# A letter that nothing but the prompt has: it shows where a library logs character by character.
LETTER = "\ua66e"
PROMPT = f"{LETTER} a secret of a client {LETTER}"
WORDS = ["secret of a client", LETTER, "\\u{a66e}", "\\ua66e", "\u00ea\u013b\u00ae"]
# Bytes of log that one small request may cost at trace.
LOG_BYTES = 256 << 10


@attack()
def logs(run: Run) -> None:
    """RUST_LOG=trace, in both forms: no prompt, and no log that grows with one."""
    for form in ["text", "json"]:
        with run.server("--log-format", form, models=MODELS, environment={"RUST_LOG": "trace"}) as server:
            before = len(server.log())
            for path, order in orders():
                client.ask_json(server.address, path, order)
            make_clip(server, ends.CLIP | {"prompt": PROMPT})
            log = server.log()
            found = [f"{word!r} in {line[:100]}" for word in WORDS for line in log.splitlines() if word in line]
            run.count_is_zero(f"prompts in the {form} log", found)
            grown = (len(log) - before) >> 10
            run.check(
                f"{form} log of {len(orders()) + 1} requests",
                f"{grown} KiB",
                f"{LOG_BYTES * (len(orders()) + 1) >> 10} KiB",
                grown <= LOG_BYTES * (len(orders()) + 1) >> 10,
            )


def orders() -> list[tuple[str, dict[str, object]]]:
    picture = {"prompt": PROMPT, "num_inference_steps": 1, "width": 64, "height": 64}
    return [
        (CHATS, client.chat(servers.CHAT, PROMPT, max_tokens=2, stop=[PROMPT])),
        (COMPLETIONS, {"model": servers.CHAT, "prompt": [PROMPT], "max_tokens": 2}),
        (COMPLETIONS, {"model": servers.CHAT, "prompt": PROMPT * 100, "max_tokens": 2}),
        (CHATS, client.chat(servers.CHAT, PROMPT, temperature=PROMPT)),
        (GENERATIONS, picture | {"model": servers.PICTURES}),
        (GENERATIONS, picture | {"model": servers.PLAIN_PICTURES, "negative_prompt": PROMPT, "guidance_scale": 3}),
    ]


@attack()
def dumps(run: Run) -> None:
    """While serving, no core is dumped and no other process of the user reads the memory."""
    with run.subfolder() as folder:
        if os.geteuid() == 0:
            run.binary, binary = ends.shared_copy(run, folder), run.binary
            try:
                with run.server(user=NOBODY) as server:
                    report_dumps(run, server)
            finally:
                run.binary = binary
        else:
            with run.server() as server:
                report_dumps(run, server)


def report_dumps(run: Run, server: Server) -> None:
    limits = Path(f"/proc/{server.pid}/limits").read_text()
    core = re.search(r"^Max core file size\s+(\S+)\s+(\S+)", limits, re.MULTILINE)
    run.equal("core file size, soft and hard", core.groups() if core else None, ("0", "0"))
    # The files of a process that may be neither dumped nor traced are root's.
    owner = Path(f"/proc/{server.pid}/environ").stat().st_uid
    run.equal("owner of /proc/PID/environ", "root" if owner == 0 else "the user", "root")


@attack()
def prompts_from_files(run: Run) -> None:
    """`tale generate` reads a prompt from standard input or a file, so that it need not be an argument."""
    if "--prompt-file" not in run.features.flags:
        run.check("--prompt-file", "is not there", "is there", False)
        return
    with run.subfolder() as folder:
        file = folder / "prompt.txt"
        file.write_text(PROMPT)
        command = [
            run.binary,
            "generate",
            "text",
            "--model",
            run.goldens / "qwen2/checkpoint",
            "--json",
            "--max-tokens",
            "8",
            "--seed",
            "1",
            "--temperature",
            "0",
        ]
        expected = answer([*command, "--prompt", PROMPT])
        run.check("--prompt -", *same(answer([*command, "--prompt", "-"], PROMPT), expected))
        run.check("--prompt-file FILE", *same(answer([*command, "--prompt-file", file]), expected))


def same(told: str, expected: str) -> tuple[str, str, bool]:
    return ("the same" if told == expected else told[:100]), "the same as of an argument", told == expected


def answer(command: list[object], stdin: str = "") -> str:
    ended = subprocess.run(list(map(str, command)), input=stdin, capture_output=True, text=True, timeout=60)
    if ended.returncode != 0:
        return ended.stderr
    return json.dumps(json.loads(ended.stdout).get("text"))
