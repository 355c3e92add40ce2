#!/usr/bin/env python3
"""lm-eval's `local-completions` against a running Tale, beside its `hf` over the same weights in transformers.

Usage, from the root of the repository:
    tale serve --model smollm2=MODEL.gguf --dtype f32 &
    benches/lm_eval/beside_transformers.py MODEL.gguf http://127.0.0.1:8000 smollm2

Transformers dequantises the file, in float32. The tasks are the small ones beside this script,
so that no hub is needed. Each is run with tokens (`tokenized_requests`) and with texts as prompts. Printed are the scores of
both, the greatest difference of a log-likelihood, and how many answers and greedy flags are the same.

Needs `pip install lm-eval[api]==0.4.13 gguf torch transformers`.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

FOLDER = Path(__file__).parent
TASKS = ["tale_choices", "tale_texts", "tale_words"]


def of_transformers(gguf, tokenizer):
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


def evaluate(model, /, **arguments):
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    joined = ",".join(f"{name}={value}" for name, value in arguments.items())
    found = lm_eval.simple_evaluate(
        model=model, model_args=joined or None, tasks=TASKS, task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    return found["results"], found["samples"]


def answers(samples, task):
    """What the model said to each request of a task."""
    return [response for sample in samples[task] for responses in sample["resps"] for response in flat(responses)]


def flat(responses):
    return [responses] if isinstance(responses, (str, float, tuple)) else [one for part in responses for one in flat(part)]


def number_and_flag(samples, task):
    pairs = [tuple(response[0]) for sample in samples[task] for response in sample["resps"]]
    return [(float(number), str(flag)) for number, flag in pairs]


def scores(results, task):
    named = {name.partition(",")[0]: value for name, value in results[task].items() if "," in name and "stderr" not in name}
    return ", ".join(f"{name} {value:.4f}" for name, value in named.items())


def main():
    gguf, url, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    theirs, expected = evaluate(of_transformers(gguf, tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for tokens in [True, False]:
            ours, found = evaluate(
                "local-completions", base_url=f"{url}/v1/completions", model=name, tokenizer=folder,
                tokenizer_backend="huggingface", tokenized_requests=tokens, num_concurrent=4, max_retries=1, batch_size=4,
            )
            print(f"prompts as {'tokens' if tokens else 'texts'}")
            compare(theirs, expected, ours, found)


def compare(theirs, expected, ours, found):
    for task in TASKS:
        print(f"  {task}: {scores(ours, task)}; transformers {scores(theirs, task)}")
    a, b = number_and_flag(found, "tale_choices"), number_and_flag(expected, "tale_choices")
    same = sum(ours[1] == theirs[1] for ours, theirs in zip(a, b, strict=True))
    print(f"  {len(a)} choices: log-likelihoods differ by {greatest(a, b):.1e} at most, {same} greedy flags are the same")
    a, b = (answers(samples, "tale_texts") for samples in (found, expected))
    difference = max(abs(float(ours) - float(theirs)) for ours, theirs in zip(a, b, strict=True))
    print(f"  {len(a)} texts: log-likelihoods differ by {difference:.1e} at most")
    a, b = (answers(samples, "tale_words") for samples in (found, expected))
    print(f"  {len(a)} answers: {sum(ours == theirs for ours, theirs in zip(a, b, strict=True))} are the same")


def greatest(ours, theirs):
    return max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
