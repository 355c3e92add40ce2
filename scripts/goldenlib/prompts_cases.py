"""Long and weighted prompts for SDXL, on the checkpoints of the group sdxl: embeddings made here from the encoders of
transformers, pictures by diffusers from these embeddings.

The rules: a prompt is cut into chunks of 75 tokens, each between a start and an end token; the last one is padded as the
tokenizer pads; the shorter of prompt and negative prompt gets chunks of nothing. A weight moves a hidden state along the
line from the end token of its chunk. The pooled vector is that of the first chunk.

Held by hand against `examples/community/lpw_stable_diffusion_xl.py` of diffusers at 58eb52c0 (its constant start and end
ids set to those of the tiny vocabulary, its weights in f32, its pooled vector taken from the first chunk, both tokenizers
padding with the end token): with a weighted prompt that fills two chunks, and a plain negative prompt beside it, both
embeddings and both pooled vectors were equal bit for bit.
"""

import re

import torch
from diffusers import StableDiffusionXLPipeline

from .common import ROOT, fresh_case, require, write_golden
from .diffusion import ANOTHER_PROMPT, quiet, require_moved, require_visible, to_u8

CHUNK = 77
# Pieces of (text, weight); `text` of a run is the same as a client writes it.
PLAIN_LONG = (
    "A Golden Retriever runs through SHALLOW water! Waves splash; high above the desert a balloon drifts toward the "
    "evening. 우주 비행사가 달에서 말을 타고 있다!! The lighthouse keeper (an old man) counts the ships that pass in the night, "
    "seen from a High Bridge under a violet sky. A small Boat crosses the QUIET lake!"
)
RUNS = [
    # Two chunks and more, with weights on both sides of a cut, against a short negative prompt.
    {
        "checkpoint": "sdxl-a",
        "prompt": "A (Golden Retriever:1.5) runs through (SHALLOW (water:1.25)!:0.75) Waves splash; high above the desert a "
        "balloon (drifts toward the evening:0.5). (우주 비행사가 달에서:1.75) 말을 타고 있다! (The lighthouse keeper:2) counts the "
        "ships that pass in the night, seen from a High Bridge.",
        "pieces": [
            ["A ", 1.0],
            ["Golden Retriever", 1.5],
            [" runs through ", 1.0],
            ["SHALLOW ", 0.75],
            ["water", 0.9375],
            ["!", 0.75],
            [" Waves splash; high above the desert a balloon ", 1.0],
            ["drifts toward the evening", 0.5],
            [". ", 1.0],
            ["우주 비행사가 달에서", 1.75],
            [" 말을 타고 있다! ", 1.0],
            ["The lighthouse keeper", 2.0],
            [" counts the ships that pass in the night, seen from a High Bridge.", 1.0],
        ],
        "negative_prompt": "Rain, (smoke:1.5)",
        "negative_pieces": [["Rain, ", 1.0], ["smoke", 1.5]],
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "seed": 42,
    },
    # A short prompt with parentheses that are text, against a longer negative prompt.
    {
        "checkpoint": "sdxl-a",
        "prompt": "A boat (small), \\(16:9\\)",
        "pieces": [["A boat (small), (16:9)", 1.0]],
        "negative_prompt": PLAIN_LONG,
        "negative_pieces": [[PLAIN_LONG, 1.0]],
        "width": 72,
        "height": 56,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "seed": 7,
    },
    # Zeros for an absent negative prompt, as long as the prompt.
    {
        "checkpoint": "sdxl-a",
        "prompt": PLAIN_LONG,
        "pieces": [[PLAIN_LONG, 1.0]],
        "negative_prompt": None,
        "negative_pieces": None,
        "width": 64,
        "height": 48,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "seed": 3,
    },
    # An absent one that is the empty text, in as many chunks.
    {
        "checkpoint": "sdxl-b",
        "prompt": f"({PLAIN_LONG}:0.5)",
        "pieces": [[PLAIN_LONG, 0.5]],
        "negative_prompt": None,
        "negative_pieces": None,
        "width": 48,
        "height": 40,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "seed": 3,
    },
]


def make() -> None:
    quiet()
    folder = fresh_case("sdxl-prompts")
    pipelines = {}
    tensors, facts = {}, []
    for i, run in enumerate(RUNS):
        name = run["checkpoint"]
        if name not in pipelines:
            pipelines[name] = open_pipeline(name)
        pipeline, title = pipelines[name], f"sdxl-prompts run {i} ({name})"
        embeds = encode(pipeline, run)
        chunks = embeds["prompt_embeds"].shape[1] // CHUNK
        require(chunks > 1, f"{title}: {chunks} chunks")
        image = picture(pipeline, run, embeds)
        require_visible(title, image)
        check_sensitivity(title, pipeline, run, image)
        tensors |= {f"run{i}.{key}": value for key, value in embeds.items()} | {f"run{i}.image": image}
        kept = {key: value for key, value in run.items() if "pieces" not in key}
        facts.append(kept | {"max_sequence_length": chunks * CHUNK})
    check_plain(pipelines["sdxl-a"])
    write_golden(folder, {"reference": "diffusers.StableDiffusionXLPipeline", "runs": facts}, tensors)


def open_pipeline(name: str):
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        ROOT / name / "checkpoint",
        dtype=torch.float32,
        variant="fp16" if name == "sdxl-b" else None,
        local_files_only=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- the rules -------------------------------------------------------------------------------------------------------


def encode(pipeline, run: dict, least_chunks: int = 1) -> dict:
    """What the pipeline's call takes: the embeddings of both prompts."""
    sides = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
    negative = run["negative_pieces"]
    zeros = negative is None and pipeline.config.force_zeros_for_empty_prompt
    prompts = [run["pieces"]] + ([] if zeros else [negative or [["", 1.0]]])
    tokens = [[weighted_tokens(tokenizer, pieces) for tokenizer, _ in sides] for pieces in prompts]
    chunks = max([least_chunks] + [-(-len(side) // (CHUNK - 2)) for sides_of in tokens for side in sides_of])
    embeds = [encode_one(sides, sides_of, chunks) for sides_of in tokens]
    if zeros:
        embeds.append([torch.zeros_like(tensor) for tensor in embeds[0]])
    names = ["prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds"]
    return dict(zip(names, embeds[0] + embeds[1]))


def weighted_tokens(tokenizer, pieces) -> list:
    return [
        (token, weight)
        for text, weight in pieces
        for token in tokenizer(text, add_special_tokens=False, truncation=False).input_ids
    ]


def encode_one(sides, tokens, chunks: int) -> list:
    """Embeddings of both encoders side by side, and the pooled vector of the second one."""
    hidden, pooled = [], None
    for (tokenizer, encoder), tokens_of in zip(sides, tokens):
        states = []
        for chunk in range(chunks):
            part = tokens_of[chunk * (CHUNK - 2) : (chunk + 1) * (CHUNK - 2)]
            ids = [tokenizer.bos_token_id] + [token for token, _ in part] + [tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * (CHUNK - len(ids))
            answer = encoder(torch.tensor([ids]), output_hidden_states=True)
            state, end = answer.hidden_states[-2].clone(), len(part) + 1
            for position, (_, weight) in enumerate(part, start=1):
                if weight != 1.0:
                    anchor = answer.hidden_states[-2][:, end]
                    state[:, position] = anchor + (state[:, position] - anchor) * weight
            states.append(state)
            if chunk == 0:
                pooled = answer[0]
        hidden.append(torch.cat(states, dim=1))
    return [torch.cat(hidden, dim=2), pooled]


def picture(pipeline, run: dict, embeds: dict):
    arguments = {key: run[key] for key in ("width", "height", "num_inference_steps", "guidance_scale")}
    generator = torch.Generator("cpu").manual_seed(run["seed"])
    return to_u8(pipeline(**arguments, **embeds, output_type="np", generator=generator).images[0])


# --- claims ----------------------------------------------------------------------------------------------------------


def check_plain(pipeline) -> None:
    """A plain prompt of one chunk is what the pipeline itself makes of it."""
    run = {"pieces": [["A boat (small), 16:9", 1.0]], "negative_pieces": [["Rain", 1.0]]}
    own = pipeline.encode_prompt(prompt="A boat (small), 16:9", negative_prompt="Rain")
    made = encode(pipeline, run)
    order = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    same = all(torch.equal(a, made[name]) for a, name in zip(own, order))
    require(same, "a plain prompt of one chunk is encoded as the pipeline encodes it")


def check_sensitivity(title: str, pipeline, run: dict, image) -> None:
    first_chunk = {
        name: embeds[:, :CHUNK] if embeds.dim() == 3 else embeds for name, embeds in encode(pipeline, run).items()
    }
    require_moved(title, "the first chunk alone", image, picture(pipeline, run, first_chunk), ANOTHER_PROMPT)
    for side in ("pieces", "negative_pieces"):
        if run[side] and any(weight != 1.0 for _, weight in run[side]):
            plain = run | {side: [["".join(text for text, _ in run[side]), 1.0]]}
            away = picture(pipeline, plain, encode(pipeline, plain))
            require_moved(title, f"{side} without weights", image, away, ANOTHER_PROMPT)
    longer = encode(pipeline, run, least_chunks=1 + encode(pipeline, run)["prompt_embeds"].shape[1] // CHUNK)
    require_moved(title, "one more chunk of nothing", image, picture(pipeline, run, longer), ANOTHER_PROMPT)
    marked = re.sub(r"\\", "", run["prompt"])
    if run["pieces"] != [[marked, 1.0]]:
        literal = run | {"pieces": [[run["prompt"], 1.0]]}
        away = picture(pipeline, literal, encode(pipeline, literal))
        require_moved(title, "the marks as text", image, away, ANOTHER_PROMPT)
