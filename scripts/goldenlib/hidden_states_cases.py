"""Language models as text encoders: the hidden states of every layer for padded batches, on the checkpoints of `text`."""

import torch
from transformers import AutoModelForCausalLM

from .common import ROOT, fresh_case, read_json, relative_difference, require, write_golden

CASES = ["llama-tied", "llama-untied", "qwen2", "qwen2-yarn"]
# Tokens of each row; the others are padding.
LENGTHS = [5, 11, 1]
SIDES = ["right", "left"]
PADDING_ID = 7


def make() -> None:
    folder = fresh_case("hidden-states")
    tensors = {}
    for case in CASES:
        model = AutoModelForCausalLM.from_pretrained(ROOT / case / "checkpoint", dtype=torch.float32).model.eval()
        for side in SIDES:
            tensors |= {f"{case}.{side}.{name}": tensor for name, tensor in answers(case, model, side).items()}
    write_golden(folder, {"reference": "output_hidden_states", "cases": CASES, "sides": SIDES}, tensors)


def answers(case: str, model, side: str) -> dict:
    ids, mask = padded(case, side)
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    real = mask.bool()
    alone = [model(row[keep][None], output_hidden_states=True).hidden_states for row, keep in zip(ids, real)]
    blind = model(ids, output_hidden_states=True).hidden_states
    for i, state in enumerate(states):
        packed = torch.cat([rows[i][0] for rows in alone])
        same = relative_difference(packed, state[real]) < 1e-4
        require(same, f"{case} {side}: padding changes nothing for the tokens of layer {i}")
    # Padding after the tokens is behind them: there only its own states know of the mask.
    looked_at = real if side == "left" else ~real
    moved = relative_difference(states[-1][looked_at], blind[-1][looked_at]) > 0.05
    require(moved, f"{case} {side}: without the mask the states are others")
    return {"ids": ids, "mask": mask, **{f"state{i}": state for i, state in enumerate(states)}}


def padded(case: str, side: str):
    """Token ids and attention mask `[rows, longest]`."""
    vocabulary = read_json(ROOT / case / "checkpoint" / "config.json")["vocab_size"]
    generator = torch.Generator().manual_seed(5)
    longest = max(LENGTHS)
    ids = torch.full((len(LENGTHS), longest), PADDING_ID)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place] = torch.randint(0, vocabulary, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask
