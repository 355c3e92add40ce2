"""Steps that a request gives one by one, as sigmas or as timesteps: what diffusers' schedulers make of them, and pictures and
clips of the checkpoints of other cases."""

import numpy
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)

from .common import fresh_case, write_golden
from .diffusion import ANOTHER_PROMPT, ROUNDING, quiet, require_moved, require_stable, require_visible, to_u8
from .lora_cases import load

FLUX = {"prompt": "A lighthouse above the evening sea", "width": 64, "height": 64, "guidance_scale": 3.5, "seed": 7}
SDXL = {
    "prompt": "A small boat crosses the quiet lake",
    "negative_prompt": "Rain and smoke",
    "width": 64,
    "height": 48,
    "guidance_scale": 3.0,
    "seed": 42,
}
WAN = {
    "prompt": "The old clock in the tower rings seven times",
    "negative_prompt": None,
    "width": 48,
    "height": 32,
    "num_frames": 5,
    "guidance_scale": 1.0,
    "seed": 17,
}

FLOW_EULER, EULER = "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"
# `flow_shift`: another shift of the sigmas than the checkpoint's.
RUNS = [
    # Of distilled models: lightx2v's four steps, FastWan's three.
    {"case": "wan-a", "scheduler": FLOW_EULER, "sigmas": [1.0, 0.75, 0.5, 0.25], "flow_shift": 5.0},
    {"case": "wan-a", "scheduler": None, "sigmas": [1.0, 0.75, 0.5, 0.25], "flow_shift": 5.0},
    {"case": "wan-b", "scheduler": None, "sigmas": [0.97, 0.757, 0.522], "flow_shift": None},
    {"case": "flux-dev", "scheduler": None, "sigmas": [1.0, 0.8, 0.35], "flow_shift": None},
    {"case": "sdxl-a", "scheduler": EULER, "timesteps": [999, 845, 730, 587, 10]},
    {"case": "sdxl-a", "scheduler": EULER, "timesteps": [749.5, 499, 249], "timestep_spacing": "trailing"},
    {"case": "sdxl-a", "scheduler": EULER, "sigmas": [14.615, 6.315, 3.771, 0.9, 0.0]},
    {"case": "sdxl-a", "scheduler": EULER, "sigmas": [9.0, 2.5, 0.3]},
]


def make() -> None:
    quiet()
    folder = fresh_case("given-steps")
    tensors, runs = {}, []
    for index, run in enumerate(RUNS):
        name = f"{run['case']} {index}"
        found, solver = answer(run)
        require_visible(name, found)
        field = "sigmas" if "sigmas" in run else "timesteps"
        moved = run | {field: [value * (0.9 if at == 1 else 1.0) for at, value in enumerate(run[field])]}
        require_moved(name, "another second step", found, answer(moved)[0], ANOTHER_PROMPT)
        require_stable(name, found, answer(run, disturb=True)[0])
        tensors |= {f"run{index}.pixels": found}
        tensors |= {f"run{index}.timesteps": solver.timesteps.float(), f"run{index}.sigmas": solver.sigmas.float()}
        runs.append(run | base(run))
    write_golden(folder, {"reference": "diffusers set_timesteps(sigmas=..., timesteps=...)", "runs": runs}, tensors)


def base(run: dict) -> dict:
    return {"flux": FLUX, "sdxl": SDXL, "wan": WAN}[run["case"].split("-")[0]]


def answer(run: dict, disturb: bool = False):
    """Pixels as u8, and the scheduler afterwards."""
    kind = run["case"].split("-")[0]
    options = {"add_watermarker": False} if kind == "sdxl" else {}
    pipeline = load({"flux": FluxPipeline, "sdxl": StableDiffusionXLPipeline, "wan": WanPipeline}[kind], run["case"], **options)
    settings = {} if run.get("timestep_spacing") is None else {"timestep_spacing": run["timestep_spacing"]}
    scheduler = pipeline.scheduler
    if kind == "wan":
        shift = run["flow_shift"] or scheduler.config.flow_shift
        if run["scheduler"] == FLOW_EULER:
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)
        else:
            scheduler = type(scheduler).from_config(scheduler.config, flow_shift=shift)
        give(scheduler, numpy.array(run["sigmas"]))
    elif kind == "sdxl":
        scheduler = EulerDiscreteScheduler.from_config(scheduler.config, **settings)
    pipeline.scheduler = scheduler
    arguments = {key: value for key, value in base(run).items() if key != "seed"}
    if kind == "wan":
        arguments["num_inference_steps"] = len(run["sigmas"])
    else:
        field = "sigmas" if "sigmas" in run else "timesteps"
        arguments[field] = run[field]
    generator = torch.Generator("cpu").manual_seed(base(run)["seed"])
    if disturb:
        network = pipeline.unet if kind == "sdxl" else pipeline.transformer
        hook = network.register_forward_hook(disturbed_once())
    found = pipeline(**arguments, output_type="np", generator=generator)
    if disturb:
        hook.remove()
    pixels = found.frames[0] if kind == "wan" else found.images[0]
    return to_u8(pixels), scheduler


def give(scheduler, sigmas: numpy.ndarray) -> None:
    """Wan's pipeline hands over a number of steps alone: here its scheduler hears of the sigmas instead."""
    own = scheduler.set_timesteps
    scheduler.set_timesteps = lambda num_inference_steps, device=None: own(sigmas=sigmas.copy(), device=device)


def disturbed_once():
    """A hook that adds rounding errors to the first prediction."""
    state = {"done": False}

    def after(module, args, output):
        if state["done"]:
            return output
        state["done"] = True
        noise = torch.randn(output[0].shape, generator=torch.Generator().manual_seed(0))
        return (output[0] + ROUNDING * noise, *output[1:])

    return after
