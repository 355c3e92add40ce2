#!/usr/bin/env python3
"""Tale beside llama.cpp on this machine's CPU, over one GGUF file: greedy tokens, tokens per second of decoding at batch 1,
seconds of a prompt of 512 tokens.

    cargo build --release && pip install -r benches/beside-llama-cpp-requirements.txt
    benches/beside_llama_cpp.py [out/models/SmolLM2-135M-Instruct.Q4_1.gguf] [--threads 2] [--rounds 3]

llama.cpp runs in this process, Tale as `tale bench step` (times) and as a server (tokens), one after the other, in rounds, on the
same cores, so that a noisy machine disturbs both alike; medians are printed. llama.cpp rounds activations to eight bits, Tale
does not: where their greedy tokens part, the distance of llama.cpp's two best logits there is printed, in units of its logits'
standard deviation. llama-cpp-python is built from its source, with the instructions of this machine's CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path

import llama_cpp
import numpy

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "out/models/SmolLM2-135M-Instruct.Q4_1.gguf"
ANSWER_TOKENS = 48
DECODED_TOKENS = 128
PROMPT_TOKENS = 512
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
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tale", type=Path, default=ROOT / "target/release/tale")
    parser.add_argument("--only", choices=["tokens", "times"])
    options = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.threads]))
    print(f"{options.model.name}, {options.threads} threads, llama-cpp-python {llama_cpp.__version__}")
    llama = llama_cpp.Llama(
        str(options.model), n_ctx=1024, n_batch=PROMPT_TOKENS, n_threads=options.threads, n_threads_batch=options.threads,
        logits_all=False, verbose=False,
    )
    if options.only != "times":
        compare_tokens(options, llama)
    if options.only != "tokens":
        compare_times(options, llama)


# --- tokens ----------------------------------------------------------------------------------------------------------


def compare_tokens(options, llama) -> None:
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
    command = [options.tale, "serve", "--listen", "127.0.0.1:0", "--model", f"m={options.model}"]
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


def compare_times(options, llama) -> None:
    tale, theirs = {"prefill": [], "decode": []}, {"prefill": [], "decode": []}
    for _ in range(options.rounds):
        for found, times in ((tale, time_tale(options)), (theirs, time_llama(llama))):
            for what, seconds in times.items():
                found[what].append(seconds)
    for what, unit, count in (("prefill", f"prompt of {PROMPT_TOKENS}", PROMPT_TOKENS), ("decode", "token at batch 1", 1)):
        ours, other = statistics.median(tale[what]), statistics.median(theirs[what])
        print(
            f"{unit}: Tale {1e3 * ours:.1f} ms ({count / ours:.0f} tok/s), llama.cpp {1e3 * other:.1f} ms"
            f" ({count / other:.0f} tok/s), ratio of speeds {other / ours:.2f}"
        )


def time_tale(options) -> dict:
    command = [options.tale, "bench", "step", "--model", options.model, "--batch", "1", "--prompt-tokens", str(PROMPT_TOKENS), "--json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    steps = {line["step"]: line for line in map(json.loads, printed.splitlines())}
    return {what: steps[what]["seconds"] for what in ("prefill", "decode")}


def time_llama(llama) -> dict:
    prompt = [1000 + i % 7000 for i in range(PROMPT_TOKENS)]
    llama.reset()
    begin = time.perf_counter()
    llama.eval(prompt)
    last_logits(llama)
    prefill = time.perf_counter() - begin
    times = []
    for i in range(DECODED_TOKENS):
        begin = time.perf_counter()
        llama.eval([1000 + i])
        last_logits(llama)
        times.append(time.perf_counter() - begin)
    return {"prefill": prefill, "decode": statistics.median(times)}


if __name__ == "__main__":
    main()
