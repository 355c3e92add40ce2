"""What a request can ask beyond the plain loop: true CFG, a guidance interval, CFG-Zero*, the first-block cache.

The checkpoints are those of the groups flux, sdxl and wan, which are made before this one.
"""

import contextlib

import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline, StableDiffusionXLPipeline, WanPipeline
from diffusers.guiders import ClassifierFreeZeroStarGuidance
from diffusers.hooks import first_block_cache

from .common import ROOT, fresh_case, require, write_golden
from .diffusion import ANOTHER_PROMPT, quiet, require_moved, require_visible, to_u8

# As many as Tale's; diffusers has no bound of its own.
MAX_CONSECUTIVE_SKIPS = 3
# Of FLUX.1 and Wan, as in the tables of the families.
SAFE, FAST = 0.08, 0.12
WAN_SAFE, WAN_FAST = 0.03, 0.04

# Random weights hear every small change of the timestep; trained ones do not. Scaled down, these do not either.
CALM_FLUX = {"time_text_embed.timestep_embedder.linear_2.weight": 0.125}
CALM_WAN = {"condition_embedder.time_embedder.linear_2.weight": 0.125}
# Least distance of a change from the threshold, so that rounding decides nothing.
MARGIN = 2e-5

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
    # The cache: two thresholds, one branch and two, runs of skips that the bound ends.
    {"checkpoint": "flux-dev", **FLUX, "scaled": CALM_FLUX, "acceleration": "safe", "steps": 12},
    {"checkpoint": "flux-dev", **FLUX, "scaled": CALM_FLUX, "acceleration": "fast", "steps": 12},
    {"checkpoint": "flux-dev", **FLUX, "scaled": CALM_FLUX, "acceleration": "fast", "steps": 24},
    {
        "checkpoint": "flux-dev",
        **FLUX,
        "scaled": CALM_FLUX,
        "negative_prompt": "Rain, smoke and silence",
        "true_cfg_scale": 3.0,
        "guidance_interval": [0.0, 0.6],
        "acceleration": "safe",
        "steps": 14,
    },
    {
        "checkpoint": "wan-b",
        **WAN,
        "scaled": CALM_WAN,
        "negative_prompt": "Rain",
        "guidance_scale": 4.0,
        "acceleration": "fast",
        "steps": 24,
    },
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
        pipeline = load(run["checkpoint"], run.get("scaled", {}))
        pixels, skips = record(pipeline, run)
        require_visible(name, pixels)
        check_sensitivity(name, pipeline, run, pixels, skips)
        if "acceleration" in run:
            run["skips"] = {branch: pattern(found) for branch, found in skips.items()}
        tensors[f"run{i}.pixels"] = pixels
        facts.append(run)
    facts = {"reference": "diffusers", "max_consecutive_skips": MAX_CONSECUTIVE_SKIPS, "runs": facts}
    write_golden(folder, facts, tensors)


def load(name: str, scaled: dict):
    family = {"flux": FluxPipeline, "sdxl": StableDiffusionXLPipeline, "wan": WanPipeline}[name.split("-")[0]]
    pipeline = family.from_pretrained(ROOT / name / "checkpoint", dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for tensor, factor in scaled.items():
        pipeline.transformer.get_parameter(tensor).mul_(factor)
    return pipeline


def record(pipeline, run: dict):
    """The picture or clip in u8, and for each branch in which steps the cache answered."""
    arguments = {k: run[k] for k in ("prompt", "width", "height", "num_frames", "max_sequence_length") if k in run}
    arguments |= {k: run[k] for k in ("negative_prompt", "true_cfg_scale", "guidance_scale") if k in run}
    arguments |= {"num_inference_steps": run["steps"], "output_type": "np"}
    guided = guided_steps(run)
    generator = torch.Generator("cpu").manual_seed(run["seed"])
    branches = zero_star(pipeline, run) if "cfg_zero_star" in run else interval(pipeline, run, guided, arguments)
    with branches, cache(pipeline, run) as skips:
        answer = pipeline(**arguments, generator=generator)
    return to_u8(answer.frames[0] if "num_frames" in run else answer.images[0]), skips


def guided_steps(run: dict) -> list[bool]:
    start, end = run.get("guidance_interval", [0.0, 1.0])
    return [start <= i / run["steps"] < end for i in range(run["steps"])]


def threshold(run: dict) -> float:
    values = {"safe": WAN_SAFE, "fast": WAN_FAST} if run["checkpoint"].startswith("wan") else {"safe": SAFE, "fast": FAST}
    return values[run["acceleration"]]


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


# --- the cache -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cache(pipeline, run: dict):
    """diffusers' hook with our bound, and what it decided."""
    if "acceleration" not in run:
        yield None
        return
    skips = {}
    decide = first_block_cache.FBCHeadBlockHook._should_compute_remaining_blocks

    def bounded(hook, residual):
        branch = skips.setdefault(hook.state_manager.context.name, [])
        kept = hook.state_manager.get_state().head_block_residual
        if kept is not None:
            change = ((residual - kept).abs().mean() / kept.abs().mean()).item()
            assert abs(change - hook.threshold) > MARGIN, f"a change of {change} may be rounded to another decision"
        at_bound = len(branch) >= MAX_CONSECUTIVE_SKIPS and all(branch[-MAX_CONSECUTIVE_SKIPS:])
        computes = decide(hook, residual) or at_bound
        branch.append(not computes)
        return computes

    first_block_cache.FBCHeadBlockHook._should_compute_remaining_blocks = bounded
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold(run)))
    try:
        yield skips
    finally:
        pipeline.transformer.disable_cache()
        first_block_cache.FBCHeadBlockHook._should_compute_remaining_blocks = decide


# --- sensitivity -----------------------------------------------------------------------------------------------------


def check_sensitivity(name: str, pipeline, run: dict, pixels, skips) -> None:
    def moved(what, limit=ANOTHER_PROMPT, **change):
        other = {key: value for key, value in (run | change).items() if value is not ...}
        require_moved(name, what, pixels, record(pipeline, other)[0], limit)

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
    if "acceleration" in run:
        for branch, found in skips.items():
            both = any(found) and not all(found)
            require(both, f"{name}: {branch} skips {sum(found)} of {len(found)} passes: {pattern(found)}")
        # Not as far away as another prompt: that it is nearly the same picture is what the cache is for.
        moved("no acceleration", limit=60.0, acceleration=...)


def pattern(skips: list[bool]) -> str:
    return "".join("-" if skip else "x" for skip in skips)
