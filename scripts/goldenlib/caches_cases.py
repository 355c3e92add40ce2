"""Blocks that are skipped: the first-block cache, MagCache and TeaCache, on networks of every family.

The checkpoints are those of the groups flux, wan, cogvideox and hunyuan_video, which are made before this one. diffusers has hooks
for the first two; of the third the decision is ours, made of its published formula, within diffusers' hook of MagCache.
"""

import contextlib
import math

import numpy as np
import torch
from diffusers import (
    CogVideoXPipeline,
    FirstBlockCacheConfig,
    FluxPipeline,
    HunyuanVideoPipeline,
    MagCacheConfig,
    WanPipeline,
)
from diffusers.hooks import first_block_cache, mag_cache

from .common import ROOT, fresh_case, require, write_golden
from .diffusion import quiet, require_moved, require_visible, to_u8
from .guidance_cases import guided_steps, interval

# Where a run says nothing else; the first and the third method have no bound of their own in the reference.
MAX_SKIPS = 3
# Part of the steps that MagCache computes first, in diffusers and here.
FIRST_PART = 0.2

# Random weights hear every small change of the timestep; trained ones do not. Scaled down, these do not either.
CALM_FLUX = {"time_text_embed.timestep_embedder.linear_2.weight": 0.125}
CALM_WAN = {"condition_embedder.time_embedder.linear_2.weight": 0.125}
CALM_COGVIDEOX = {"time_embedding.linear_2.weight": 0.125}
# Least distance of a change or an error from the threshold, so that rounding decides nothing.
MARGIN = 2e-5

FLUX = {"checkpoint": "flux-dev", "prompt": "A small Boat crosses the QUIET lake", "width": 64, "height": 48, "max_sequence_length": 32}
WAN = {"checkpoint": "wan-b", "prompt": "A valley in slow motion", "width": 48, "height": 32, "num_frames": 5, "max_sequence_length": 32}
COGVIDEOX = {"checkpoint": "cogvideox-b", "prompt": "Slow camera movement", "width": 48, "height": 32, "num_frames": 9, "max_sequence_length": 40}
HUNYUAN = {"checkpoint": "hunyuan-video-a", "prompt": "A small Boat", "width": 48, "height": 32, "num_frames": 5, "max_sequence_length": 200}
GUIDED = {"negative_prompt": "Rain, smoke and silence", "guidance_scale": 4.0}
TRULY_GUIDED = {"negative_prompt": "Rain, smoke and silence", "true_cfg_scale": 3.0}
UNGUIDED = {"guidance_scale": 1.0}

FIRST = {"cache_method": "first_block"}
MAG = {"cache_method": "magcache"}
TEA = {"cache_method": "teacache"}
# Errors of a few hundredths a step, growing towards the end as the published ones do.
RATIOS = [1.0, 1.02, 1.01, 1.0, 0.99, 0.985, 0.99, 0.98, 0.985, 0.97, 0.94, 0.9]

RUNS = [
    # The first block: two thresholds, one branch and two, runs of skips that the bound ends.
    {**FLUX, **FIRST, "scaled": CALM_FLUX, "cache_threshold": 0.08, "steps": 12},
    {**FLUX, **FIRST, "scaled": CALM_FLUX, "cache_threshold": 0.12, "steps": 24},
    {**FLUX, **FIRST, **TRULY_GUIDED, "scaled": CALM_FLUX, "cache_threshold": 0.08, "guidance_interval": [0.0, 0.6], "steps": 14},
    {**WAN, **FIRST, **GUIDED, "scaled": CALM_WAN, "cache_threshold": 0.04, "steps": 24},
    {**COGVIDEOX, **FIRST, **UNGUIDED, "scaled": CALM_COGVIDEOX, "cache_threshold": 0.5, "steps": 12},
    {**HUNYUAN, **FIRST, **TRULY_GUIDED, "scaled": CALM_FLUX, "cache_threshold": 0.1, "steps": 10},
    # Magnitudes: as many ratios as steps, fewer, more; another bound, another beginning.
    {**WAN, **MAG, **GUIDED, "cache_threshold": 0.062, "cache_ratios": RATIOS, "steps": 12},
    {**WAN, **MAG, **GUIDED, "cache_threshold": 0.122, "cache_ratios": RATIOS[:5], "cache_max_skips": 2, "cache_interval": [0.4, 1.0], "steps": 9},
    {**FLUX, **MAG, "cache_threshold": 0.09, "cache_ratios": RATIOS, "cache_max_skips": 5, "steps": 7},
    {**COGVIDEOX, **MAG, **GUIDED, "cache_threshold": 0.052, "cache_ratios": RATIOS, "steps": 8},
    {**HUNYUAN, **MAG, **TRULY_GUIDED, "cache_threshold": 0.062, "cache_ratios": RATIOS, "guidance_interval": [0.0, 0.6], "steps": 10},
    # Timesteps: a polynomial of the first degree and one of the third.
    {**WAN, **TEA, **GUIDED, "scaled": CALM_WAN, "cache_threshold": 0.1, "cache_coefficients": [0.5, 0.01], "steps": 12},
    {**COGVIDEOX, **TEA, **GUIDED, "scaled": CALM_COGVIDEOX, "cache_threshold": 0.2, "cache_coefficients": [0.1, 0.0, 0.2, 0.02], "steps": 10},
    {**HUNYUAN, **TEA, **TRULY_GUIDED, "scaled": CALM_FLUX, "cache_threshold": 0.12, "cache_coefficients": [0.5, 0.01], "steps": 10},
    {**FLUX, **TEA, "scaled": CALM_FLUX, "cache_threshold": 0.15, "cache_coefficients": [1.0, 0.0], "cache_max_skips": 2, "cache_interval": [0.25, 0.75], "steps": 12},
]


def make() -> None:
    quiet()
    folder = fresh_case("caches")
    tensors, facts = {}, []
    for i, run in enumerate(RUNS):
        run = {"seed": 60 + i} | run
        name = f"caches run {i} ({run['checkpoint']}, {run['cache_method']})"
        pipeline = load(run["checkpoint"], run.get("scaled", {}))
        pixels, skips = record(pipeline, run)
        require_visible(name, pixels)
        patterns = {branch: pattern(found) for branch, found in skips.items()}
        print(f"  {name}: {patterns}")
        for branch, found in skips.items():
            require(any(found) and not all(found), f"{name}: {branch} skips {sum(found)} of {len(found)} passes")
        other, _ = record(pipeline, {key: value for key, value in run.items() if not key.startswith("cache_")})
        # Not as far away as another prompt: that it is nearly the same picture is what the cache is for.
        require_moved(name, "everything computed", pixels, other, 60.0)
        tensors[f"run{i}.pixels"] = pixels
        facts.append(run | {"skips": patterns})
    write_golden(folder, {"reference": "diffusers", "max_skips": MAX_SKIPS, "runs": facts}, tensors)


def load(name: str, scaled: dict):
    families = {"flux": FluxPipeline, "wan": WanPipeline, "cogvideox": CogVideoXPipeline, "hunyuan": HunyuanVideoPipeline}
    family = families[name.split("-")[0]]
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
    generator = torch.Generator("cpu").manual_seed(run["seed"])
    with interval(pipeline, run, guided_steps(run), arguments), cache(pipeline, run) as skips:
        answer = pipeline(**arguments, generator=generator)
    # Both branches are rows of one pass of CogVideoX, and look at the same.
    if skips and "cond_uncond" in skips:
        both = skips.pop("cond_uncond")
        skips |= {"cond": both, "uncond": both} if run["guidance_scale"] > 1.0 else {"cond": both}
    return to_u8(answer.frames[0] if "num_frames" in run else answer.images[0]), skips


def cache(pipeline, run: dict):
    if "cache_method" not in run:
        return contextlib.nullcontext()
    return first_block(pipeline, run) if run["cache_method"] == "first_block" else whole_stack(pipeline, run)


def decided(value: float, threshold: float) -> None:
    assert abs(value - threshold) > MARGIN, f"{value} may be rounded to another decision"


def at_bound(branch: list[bool], run: dict) -> bool:
    bound = run.get("cache_max_skips", MAX_SKIPS)
    return len(branch) >= bound and all(branch[-bound:])


@contextlib.contextmanager
def first_block(pipeline, run: dict):
    """diffusers' hook with our bound, and what it decided."""
    skips = {}
    decide = first_block_cache.FBCHeadBlockHook._should_compute_remaining_blocks

    def bounded(hook, residual):
        branch = skips.setdefault(hook.state_manager.context.name, [])
        kept = hook.state_manager.get_state().head_block_residual
        if kept is not None:
            decided(((residual - kept).abs().mean() / kept.abs().mean()).item(), hook.threshold)
        computes = decide(hook, residual) or at_bound(branch, run)
        branch.append(not computes)
        return computes

    first_block_cache.FBCHeadBlockHook._should_compute_remaining_blocks = bounded
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=run["cache_threshold"]))
    try:
        yield skips
    finally:
        pipeline.transformer.disable_cache()
        first_block_cache.FBCHeadBlockHook._should_compute_remaining_blocks = decide


@contextlib.contextmanager
def whole_stack(pipeline, run: dict):
    """diffusers' hook of MagCache, which leaves out all blocks, and what was decided: by itself, or for TeaCache by us."""
    skips, tea = {}, {}
    go_on = mag_cache.MagCacheHeadHook.new_forward
    of_tea = run["cache_method"] == "teacache"
    start, _ = run.get("cache_interval", [FIRST_PART, 1.0])
    config = MagCacheConfig(
        threshold=run["cache_threshold"],
        max_skip_steps=run.get("cache_max_skips", MAX_SKIPS),
        retention_ratio=start,
        num_inference_steps=run["steps"],
        mag_ratios=run.get("cache_ratios", [1.0]),
    )
    if of_tea:
        config.retention_ratio, config.max_skip_steps = 0.0, run["steps"]

    def watched(hook, module, *args, **kwargs):
        name = hook.state_manager._current_context.name if hasattr(hook.state_manager, "_current_context") else hook.state_manager._context.name
        branch = skips.setdefault(name, [])
        state = hook.state_manager.get_state()
        if of_tea:
            signal = signal_of(pipeline, module, args, kwargs)
            # Below any error, or above all of them.
            hook.config.threshold = math.inf if tea_skips(tea.setdefault(name, {}), signal, branch, run) else -1.0
        else:
            check_margin(state, hook.config)
        answer = go_on(hook, module, *args, **kwargs)
        branch.append(not state.should_compute)
        return answer

    mag_cache.MagCacheHeadHook.new_forward = watched
    pipeline.transformer.enable_cache(config)
    try:
        yield skips
    finally:
        pipeline.transformer.disable_cache()
        mag_cache.MagCacheHeadHook.new_forward = go_on


def check_margin(state, config) -> None:
    """That rounding does not decide about the coming step."""
    ratio = state.accumulated_ratio * config.mag_ratios[state.step_index].item()
    if state.step_index >= int(config.retention_ratio * config.num_inference_steps + 0.5):
        decided(state.accumulated_err + abs(1.0 - ratio), config.threshold)


def signal_of(pipeline, block, args, kwargs) -> torch.Tensor:
    """What the authors' code compares from step to step."""
    if isinstance(pipeline, WanPipeline):
        return args[2]
    if isinstance(pipeline, CogVideoXPipeline):
        return kwargs["temb"]
    hidden, temb = (args[0], args[2]) if isinstance(pipeline, HunyuanVideoPipeline) else (kwargs["hidden_states"], kwargs["temb"])
    return block.norm1(hidden, emb=temb)[0]


def tea_skips(state: dict, signal: torch.Tensor, branch: list[bool], run: dict) -> bool:
    """TeaCache's decision about one pass, with our bound."""
    step, steps, previous = len(branch), run["steps"], state.get("previous")
    start, end = run.get("cache_interval", [1 / steps, (steps - 1) / steps])
    state["previous"] = signal.clone()
    skips = False
    if previous is not None and int(start * steps + 0.5) <= step < int(end * steps + 0.5) and not at_bound(branch, run):
        change = ((signal - previous).abs().mean() / previous.abs().mean()).item()
        state["sum"] = state.get("sum", 0.0) + np.poly1d(run["cache_coefficients"])(change)
        decided(state["sum"], run["cache_threshold"])
        skips = state["sum"] < run["cache_threshold"]
    if not skips:
        state["sum"] = 0.0
    return skips


def pattern(skips: list[bool]) -> str:
    return "".join("-" if skip else "x" for skip in skips)
