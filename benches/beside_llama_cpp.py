#!/usr/bin/env python3
"""Tale beside llama.cpp on this machine's CPU, over the same GGUF files: greedy tokens, a prompt of 512 tokens, tokens of one
stream behind it, and of 16 streams.

    cargo build --release && pip install -r benches/beside-llama-cpp-requirements.txt
    benches/beside_llama_cpp.py [out/models/SmolLM2-135M-Instruct.Q4_1.gguf] [--threads 2] [--rounds 3]
    benches/beside_llama_cpp.py --random Q4_K,Q8_0,Q4_0,F16

llama.cpp runs in this process, Tale as `tale bench step` (times) and as a server (tokens), one after the other, in rounds, on the
same cores, so that a noisy machine disturbs both alike; medians are printed. With `--random` the files are of TinyLlama's shape with
random weights, made under `out/` where they are not there yet, and there are times only. llama.cpp rounds activations to eight
bits, Tale does not: where their greedy tokens part, the distance of llama.cpp's two best logits there is printed, in units of its
logits' standard deviation. llama-cpp-python is built from its source, with the instructions of this machine's CPU.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path

import llama_cpp
import numpy
import random_gguf

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "out/models/SmolLM2-135M-Instruct.Q4_1.gguf"
ANSWER_TOKENS = 48
DECODED_TOKENS = 32
PROMPT_TOKENS = 512
STREAMS = 16
STREAM_PROMPT_TOKENS = 32
QUESTIONS = [
    "What is the capital of France?",
    "Why is the sky blue?",
    "Tell a very short story about a lighthouse keeper and a fox.",
    "Write a haiku about rain.",
    "Name three animals that live in the sea.",
    "How do I boil an egg?",
    "What is the difference between a river and a lake?",
    "Explain gravity to a child.",
    "Who wrote Romeo and Juliet?",
    "What is 12 times 7?",
    "List the days of the week.",
    "Give me a recipe for pancakes.",
    "Translate 'good morning' into Spanish.",
    "What does a film director do?",
    "Describe a rainy street at night.",
    "Why do leaves fall in autumn?",
    "What is a prime number? Is 97 one?",
    "Write one sentence about a dog named Max.",
    "How many minutes are in a day?",
    "Split this story into two scenes: a girl finds a map, then a treasure.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--random", metavar="TYPE,...", type=lambda types: types.split(","))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tale", type=Path, default=ROOT / "target/release/tale")
    parser.add_argument("--only", choices=["tokens", "times"])
    options = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.threads]))
    print(f"{options.threads} threads, llama-cpp-python {llama_cpp.__version__}")
    if options.random:
        files = random_gguf.files(ROOT / "out/beside-llama-cpp", options.random, options.threads)
        print_times(options, files)
        return
    if options.only != "times":
        compare_tokens(options)
    if options.only != "tokens":
        print_times(options, [options.model])


# --- tokens ----------------------------------------------------------------------------------------------------------


def compare_tokens(options) -> None:
    llama = llama_cpp.Llama(
        str(options.model), n_ctx=1024, n_batch=PROMPT_TOKENS, n_threads=options.threads, n_threads_batch=options.threads,
        logits_all=False, verbose=False,
    )
    chats = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in QUESTIONS]
    server, url = start(options)
    try:
        same, ids_differ, parted = 0, 0, []
        for question, chat in zip(QUESTIONS, chats):
            prompt = llama.tokenize(chat.encode(), add_bos=False, special=True)
            ids_differ += num_ids(url, chat) != len(prompt)
            ours = llama.tokenize(answer(url, prompt).encode(), add_bos=False, special=False)
            theirs, gaps = greedy(llama, prompt)
            text = llama.detokenize(theirs).decode(errors="ignore")
            common = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            if common == len(theirs) or answer_is(text, llama.detokenize(ours).decode(errors="ignore")):
                same += 1
            else:
                parted.append((question, common, gaps[common]))
    finally:
        server.terminate()
        server.wait()
    print(f"prompts with other numbers of tokens: {ids_differ} of {len(QUESTIONS)}")
    print(f"answers of {ANSWER_TOKENS} greedy tokens: {same} of {len(QUESTIONS)} equal")
    for question, token, gap in parted:
        print(f"  parts at token {token}, where llama.cpp's best two are {gap:.4f} deviations apart: {question}")


def answer_is(one: str, other: str) -> bool:
    return one.strip() == other.strip()


def greedy(llama, prompt):
    """Tokens, and how far the best logit led at each."""
    llama.reset()
    llama.eval(prompt)
    tokens, gaps = [], []
    for _ in range(ANSWER_TOKENS):
        logits = last_logits(llama)
        best = numpy.partition(logits, -2)[-2:]
        gaps.append((best[1] - best[0]) / logits.std())
        tokens.append(int(logits.argmax()))
        if tokens[-1] == llama.token_eos():
            tokens.pop()
            break
        llama.eval(tokens[-1:])
    return tokens, [*gaps, 0.0]


def last_logits(llama) -> numpy.ndarray:
    size = llama.n_vocab()
    pointer = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
    return numpy.ctypeslib.as_array(pointer, shape=(size,)).copy()


def start(options):
    command = [options.tale, "serve", "--state-dir", "none", "--listen", "127.0.0.1:0", "--model", f"m={options.model}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return server, server.stdout.readline().split()[-1]


def ask(url: str, path: str, **body) -> dict:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def answer(url: str, prompt) -> str:
    said = ask(url, "/v1/completions", model="m", prompt=prompt, max_tokens=ANSWER_TOKENS, temperature=0)
    return said["choices"][0]["text"]


def num_ids(url: str, text: str) -> int:
    """The ids themselves are held against the reference in the tests."""
    return ask(url, "/v1/completions", model="m", prompt=text, max_tokens=1, temperature=0)["usage"]["prompt_tokens"]


# --- times -----------------------------------------------------------------------------------------------------------


def print_times(options, paths: list[Path]) -> None:
    print("| file | step | Tale | of roof | llama.cpp | of roof | ratio of speeds |")
    print("|---|---|---|---|---|---|---|")
    for path in paths:
        llama = Llama(path, options.threads)
        rounds = [(time_tale(options, path), llama.times()) for _ in range(options.rounds)]
        llama.close()
        for step, tokens in (("prompt", PROMPT_TOKENS), ("stream", 1), ("streams", STREAMS)):
            ours = statistics.median(tale[step]["seconds"] for tale, _ in rounds)
            theirs = statistics.median(seconds[step] for _, seconds in rounds)
            # What the step must do, and how much of it this machine did in a second beside it.
            work = rounds[0][0][step]["work"]
            roof = statistics.median(tale[step]["roof"] for tale, _ in rounds)
            unit = rounds[0][0][step]["unit"]
            shares = [f"{100 * work / seconds / roof:.0f} % of {roof / 1e9:.0f} {unit}" for seconds in (ours, theirs)]
            print(
                f"| {path.stem} | {STEPS[step]} | {1e3 * ours:.1f} ms, {tokens / ours:.1f} tok/s | {shares[0]} |"
                f" {1e3 * theirs:.1f} ms, {tokens / theirs:.1f} tok/s | {shares[1]} | {theirs / ours:.2f} |",
                flush=True,
            )


STEPS = {
    "prompt": f"prompt of {PROMPT_TOKENS}",
    "stream": f"a token behind {PROMPT_TOKENS}",
    "streams": f"{STREAMS} tokens of {STREAMS} streams behind {STREAM_PROMPT_TOKENS} each",
}


def time_tale(options, path: Path) -> dict:
    alone = bench_step(options, path, 1, PROMPT_TOKENS)
    streams = bench_step(options, path, STREAMS, STREAM_PROMPT_TOKENS)
    return {"prompt": alone["prefill"], "stream": alone["decode"], "streams": streams["decode"]}


def bench_step(options, path: Path, batch: int, prompt_tokens: int) -> dict:
    """Seconds of both steps, and their roof: that of the two which Tale's own bench says is met first."""
    command = [options.tale, "bench", "step", "--model", path, "--batch", str(batch)]
    command += ["--prompt-tokens", str(prompt_tokens), "--repeat", "2", "--json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    steps = {line["step"]: line for line in map(json.loads, printed.splitlines())}
    return {
        step: {
            "seconds": steps[step]["seconds"],
            "work": steps[step][steps[step]["bound"]],
            "roof": steps[step]["roof_per_second"],
            "unit": {"bytes": "GB/s", "flops": "GFLOP/s"}[steps[step]["bound"]],
        }
        for step in ("prefill", "decode")
    }


@llama_cpp.llama_log_callback
def silent(_level, _text, _data) -> None:
    """llama.cpp says how it loads a model."""


class Llama:
    """A context of llama.cpp with a cache for each of the streams."""

    def __init__(self, path: Path, threads: int):
        llama_cpp.llama_log_set(silent, ctypes.c_void_p())
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = STREAMS * 2 * PROMPT_TOKENS, STREAMS, PROMPT_TOKENS
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def times(self) -> dict:
        prompt = [1000 + i % 7000 for i in range(PROMPT_TOKENS)]
        self.forget()
        seconds = {"prompt": self.step([(token, at, 0) for at, token in enumerate(prompt)], [len(prompt) - 1])}
        stream = [self.step([(1000 + i, PROMPT_TOKENS + i, 0)], [0]) for i in range(DECODED_TOKENS)]
        self.forget()
        for sequence in range(STREAMS):
            first = [(token + sequence, at, sequence) for at, token in enumerate(prompt[:STREAM_PROMPT_TOKENS])]
            self.step(first, [len(first) - 1])
        streams = []
        for i in range(DECODED_TOKENS // 4):
            rows = [(1000 + i + sequence, STREAM_PROMPT_TOKENS + i, sequence) for sequence in range(STREAMS)]
            streams.append(self.step(rows, range(STREAMS)))
        return {**seconds, "stream": statistics.median(stream), "streams": statistics.median(streams)}

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def step(self, rows: list[tuple[int, int, int]], with_logits) -> float:
        """Seconds of a step of (token, position, sequence), up to the logits of the rows that have some."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        for row, (token, position, sequence) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, position, 1
            batch.seq_id[row][0], batch.logits[row] = sequence, row in with_logits
        batch.n_tokens = len(rows)
        begin = time.perf_counter()
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama.cpp could not compute the step")
        for row in with_logits:
            pointer = llama_cpp.llama_get_logits_ith(self.context, row)
            numpy.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).argmax()
        seconds = time.perf_counter() - begin
        llama_cpp.llama_batch_free(batch)
        return seconds


if __name__ == "__main__":
    main()
