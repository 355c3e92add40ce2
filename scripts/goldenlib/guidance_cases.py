"""What a request can ask of guidance: true CFG, a guidance interval, CFG-Zero*.

The checkpoints are those of the groups flux, sdxl and wan, which are made before this one.
"""

import contextlib

import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline, WanPipeline
from diffusers.guiders import ClassifierFreeZeroStarGuidance

from .common import ROOT, fresh_case, require, write_golden
from .diffusion import ANOTHER_PROMPT, quiet, require_moved, require_visible, to_u8

FLUX = {"prompt": "A small Boat crosses the QUIET lake", "width": 64, "height": 48, "max_sequence_length": 32}
SDXL = {"prompt": "A glass city under a violet sky", "width": 64, "height": 48}
WAN = {"prompt": "A valley in slow motion", "width": 48, "height": 32, "num_frames": 5, "max_sequence_length": 32}

RUNS = [
    # True CFG; an empty negative prompt is one, and schnell takes it too.
    {"checkpoint": "flux-dev", **FLUX, "negative_prompt": "Rain, smoke and silence", "true_cfg_scale": 3.0, "steps": 4},
    {"checkpoint": "flux-dev", **FLUX, "negative_prompt": "", "true_cfg_scale": 2.0, "guidance_scale": 1.5, "steps": 3},
    {"checkpoint": "flux-schnell", **FLUX, "negative_prompt": "Rain, smoke", "true_cfg_scale": 4.0, "steps": 4},
    # An interval: at the beginning, in the middle, at the end.
    {
        "checkpoint": "flux-dev",
        **FLUX,
        "negative_prompt": "Rain, smoke and silence",
        "true_cfg_scale": 3.0,
        "guidance_interval": [0.2, 0.75],
        "steps": 5,
    },
    {"checkpoint": "sdxl-a", **SDXL, "negative_prompt": "Rain", "guidance_scale": 5.0, "guidance_interval": [0.0, 0.5], "steps": 4},
    {"checkpoint": "sdxl-a", **SDXL, "negative_prompt": None, "guidance_scale": 5.0, "guidance_interval": [0.3, 1.0], "steps": 5},
    {"checkpoint": "wan-b", **WAN, "negative_prompt": "Rain", "guidance_scale": 4.0, "guidance_interval": [0.0, 0.4], "steps": 5},
    {"checkpoint": "wan-b", **WAN, "negative_prompt": "Rain", "guidance_scale": 4.0, "guidance_interval": [0.25, 0.7], "steps": 6},
    # CFG-Zero*: as it comes, beside an interval, without steps that are left out.
    {"checkpoint": "wan-b", **WAN, "negative_prompt": "Rain", "guidance_scale": 4.0, "cfg_zero_star": True, "steps": 5},
    {
        "checkpoint": "wan-b",
        **WAN,
        "negative_prompt": "Rain",
        "guidance_scale": 4.0,
        "guidance_interval": [0.0, 0.6],
        "cfg_zero_star": True,
        "zero_init_steps": 2,
        "steps": 5,
    },
    {
        "checkpoint": "flux-dev",
        **FLUX,
        "negative_prompt": "Rain, smoke and silence",
        "true_cfg_scale": 3.0,
        "cfg_zero_star": True,
        "zero_init_steps": 0,
        "steps": 4,
    },
]


def make() -> None:
    quiet()
    folder = fresh_case("guidance")
    tensors, facts = {}, []
    for i, run in enumerate(RUNS):
        run = {"seed": 40 + i} | run
        name = f"guidance run {i} ({run['checkpoint']})"
        pipeline = load(run["checkpoint"])
        pixels = record(pipeline, run)
        require_visible(name, pixels)
        check_sensitivity(name, pipeline, run, pixels)
        tensors[f"run{i}.pixels"] = pixels
        facts.append(run)
    write_golden(folder, {"reference": "diffusers", "runs": facts}, tensors)


def load(name: str):
    family = {"flux": FluxPipeline, "sdxl": StableDiffusionXLPipeline, "wan": WanPipeline}[name.split("-")[0]]
    pipeline = family.from_pretrained(ROOT / name / "checkpoint", dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def record(pipeline, run: dict):
    """The picture or clip in u8."""
    arguments = {k: run[k] for k in ("prompt", "width", "height", "num_frames", "max_sequence_length") if k in run}
    arguments |= {k: run[k] for k in ("negative_prompt", "true_cfg_scale", "guidance_scale") if k in run}
    arguments |= {"num_inference_steps": run["steps"], "output_type": "np"}
    guided = guided_steps(run)
    generator = torch.Generator("cpu").manual_seed(run["seed"])
    branches = zero_star(pipeline, run) if "cfg_zero_star" in run else interval(pipeline, run, guided, arguments)
    with branches:
        answer = pipeline(**arguments, generator=generator)
    return to_u8(answer.frames[0] if "num_frames" in run else answer.images[0])


def guided_steps(run: dict) -> list[bool]:
    start, end = run.get("guidance_interval", [0.0, 1.0])
    return [start <= i / run["steps"] < end for i in range(run["steps"])]


# --- the interval ----------------------------------------------------------------------------------------------------


def interval(pipeline, run: dict, guided: list[bool], arguments: dict):
    """Switches the negative branch off in the steps that are not guided."""
    if all(guided):
        return contextlib.nullcontext()
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return sdxl_switch(pipeline, run, guided, arguments)
    # A callback comes too late for the first step, and nothing can tell FLUX.1's.
    if isinstance(pipeline, WanPipeline) and guided[0]:
        return wan_switch(pipeline, run, guided, arguments)
    return gated(pipeline, guided)


@contextlib.contextmanager
def gated(pipeline, guided: list[bool]):
    """Where the negative branch is off, the pipeline hears the positive prediction twice: of guidance there is left
    `p + scale * (p - p)`."""
    steps, kept, forward, context = iter(guided), {}, pipeline.transformer.forward, pipeline.transformer.cache_context

    @contextlib.contextmanager
    def named(name, **kwargs):
        kept["branch"] = name
        if name == "cond":
            kept["guided"] = next(steps)
        with context(name, **kwargs):
            yield

    def heard(*args, **kwargs):
        if kept["branch"] == "uncond" and not kept["guided"]:
            return kept["positive"]
        output = forward(*args, **kwargs)
        if kept["branch"] == "cond":
            kept["positive"] = output
        return output

    pipeline.transformer.forward, pipeline.transformer.cache_context = heard, named
    yield
    del pipeline.transformer.forward, pipeline.transformer.cache_context


@contextlib.contextmanager
def sdxl_switch(pipeline, run: dict, guided: list[bool], arguments: dict):
    """`callback_on_step_end` as in diffusers' guide to callbacks ("dynamic classifier-free guidance"), both ways."""
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    prompt, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompt=run["prompt"], negative_prompt=run["negative_prompt"], do_classifier_free_guidance=True
    )
    positive, both = {}, {}

    def step_end(pipe, step, timestep, values):
        if not positive:
            ids = values["add_time_ids"][-1:]
            positive.update(zip(names, [prompt, pooled, ids]))
            pairs = [(negative, prompt), (negative_pooled, pooled), (ids, ids)]
            both.update({name: torch.cat(pair) for name, pair in zip(names, pairs)})
        is_guided = guided[min(step + 1, len(guided) - 1)]
        pipe._guidance_scale = run["guidance_scale"] if is_guided else 0.0
        return values | (both if is_guided else positive)

    arguments |= {"callback_on_step_end": step_end, "callback_on_step_end_tensor_inputs": names}
    if not guided[0]:
        arguments["guidance_scale"] = 1.0
    yield


@contextlib.contextmanager
def wan_switch(pipeline, run: dict, guided: list[bool], arguments: dict):
    """The scale of the pipeline decides whether there is a negative branch, its argument how strong that is."""

    def step_end(pipe, step, timestep, values):
        pipe._guidance_scale = run["guidance_scale"] if guided[min(step + 1, len(guided) - 1)] else 1.0
        return values

    arguments["callback_on_step_end"] = step_end
    yield


# --- CFG-Zero* -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def zero_star(pipeline, run: dict):
    """diffusers' guider in place of the pipeline's own formula: both branches answer what it has made of them, of which
    there is left `g + scale * (g - g)`."""
    start, stop = run.get("guidance_interval", [0.0, 1.0])
    options = {"zero_init_steps": run["zero_init_steps"]} if "zero_init_steps" in run else {}
    scale = run.get("true_cfg_scale", run["guidance_scale"] if "guidance_scale" in run else None)
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=scale, start=start, stop=stop, **options)
    kept, forward, context = {"step": 0}, pipeline.transformer.forward, pipeline.transformer.cache_context

    @contextlib.contextmanager
    def named(name, **kwargs):
        kept["branch"] = name
        with context(name, **kwargs):
            yield

    def heard(*args, **kwargs):
        (prediction,) = forward(*args, **kwargs)
        if kept["branch"] == "cond":
            kept["positive"] = prediction
            return (prediction,)
        guider.set_state(kept["step"], run["steps"], torch.tensor(0.0))
        guided = guider.forward(kept["positive"].clone(), prediction).pred
        # The pipeline holds this very tensor.
        kept["positive"].copy_(guided)
        kept["step"] += 1
        return (guided,)

    pipeline.transformer.forward, pipeline.transformer.cache_context = heard, named
    yield
    del pipeline.transformer.forward, pipeline.transformer.cache_context


# --- sensitivity -----------------------------------------------------------------------------------------------------


def check_sensitivity(name: str, pipeline, run: dict, pixels) -> None:
    def moved(what, limit=ANOTHER_PROMPT, **change):
        other = {key: value for key, value in (run | change).items() if value is not ...}
        require_moved(name, what, pixels, record(pipeline, other), limit)

    if "true_cfg_scale" in run:
        moved("no true CFG", true_cfg_scale=...)
        moved("another true CFG scale", true_cfg_scale=run["true_cfg_scale"] + 2.0)
        moved("another negative prompt", negative_prompt="Fresh paint, open windows.")
    if "guidance_interval" in run:
        guided = guided_steps(run)
        require(any(guided) and not all(guided), f"{name}: guided are {sum(guided)} of {len(guided)} steps")
        moved("guidance in all steps", guidance_interval=...)
    if "cfg_zero_star" in run:
        moved("plain guidance", cfg_zero_star=..., limit=60.0)
        moved("another step left out", zero_init_steps=run.get("zero_init_steps", 1) + 1)
