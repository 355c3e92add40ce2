"""Schedules and steps of the solvers of discrete models (epsilon, v and sample prediction), without any model.

The model of a case answers `0.3 * input + randn`, so that the scaling of its input shows in the samples. Its noise and the
start are torch's, which the tests draw themselves: only what the schedulers computed is recorded."""

import inspect
import itertools

import torch
from diffusers import EulerDiscreteScheduler

from .common import fresh_case, relative_difference, require, write_golden

SIZE = 16
MODEL_SEED, LATE_SEED = 1000, 2000

# As published with SDXL base 1.0, with the fields that other classes left there.
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def make() -> None:
    folder = fresh_case("noise-solvers")
    cases, tensors = [], {}
    for seed, (scheduler_class, change, steps) in enumerate(all_cases()):
        run = walk(scheduler_class, change, steps, seed)
        name = f"{seed}"
        tensors |= {f"{name}.{key}": value for key, value in run.items()}
        cases.append(
            {
                "name": name,
                "class": scheduler_class.__name__,
                "change": change,
                "num_inference_steps": steps,
                "seed": seed,
            }
        )
    check(tensors)
    notes = [
        "a case's configuration is `base` with `change`",
        "start and in-loop noise: generator of `seed`; the model's randn [steps, 16]: generator of `seed` + 1000",
        "late: the loop entered in the middle, from the model's first row with the start's noise; generator of `seed` + 2000",
    ]
    write_golden(folder, {"base": SDXL, "cases": cases, "notes": notes}, tensors)


def all_cases():
    """Class, change of the base configuration, steps."""
    yield from euler_cases(EulerDiscreteScheduler)


def euler_cases(scheduler_class):
    euler = scheduler_class is EulerDiscreteScheduler
    for spacing, prediction, karras, zero_snr in itertools.product(
        SPACINGS, PREDICTIONS if euler else PREDICTIONS[:2], (False, True) if euler else (False,), (False, True)
    ):
        yield scheduler_class, change(spacing, prediction, karras, zero_snr), 10
    for steps in (1, 2, 3, 4, 30):
        yield scheduler_class, {}, steps
        yield scheduler_class, {"timestep_spacing": "trailing"}, steps
        yield scheduler_class, {"timestep_spacing": "linspace"}, steps
    if euler:
        for steps in (1, 2, 30):
            yield scheduler_class, {"use_karras_sigmas": True}, steps
        yield scheduler_class, {"final_sigmas_type": "sigma_min"}, 8
        yield scheduler_class, {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}, 8
        yield scheduler_class, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.5}, 8
    yield from beta_cases(scheduler_class)


def beta_cases(scheduler_class):
    for schedule in ("linear", "squaredcos_cap_v2"):
        for zero_snr in (False, True):
            yield scheduler_class, {"beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr} | V, 7
    yield scheduler_class, {"num_train_timesteps": 50, "steps_offset": 0}, 7


V = {"prediction_type": "v_prediction"}


def change(spacing, prediction, karras=False, zero_snr=False) -> dict:
    """What differs from the base configuration."""
    wanted = {
        "timestep_spacing": spacing,
        "prediction_type": prediction,
        "use_karras_sigmas": karras,
        "rescale_betas_zero_snr": zero_snr,
    }
    return {key: value for key, value in wanted.items() if value != SDXL.get(key, False)}


def walk(scheduler_class, change: dict, steps: int, seed: int) -> dict:
    scheduler = started(scheduler_class, change, steps, 0)
    # numpy.arange gives one timestep too many for some counts; none of them is here.
    require_quietly(len(scheduler.timesteps) == steps, f"{scheduler_class.__name__} {change}: {steps} timesteps")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SIZE, generator=generator).view(1, -1)
    outputs = torch.randn(steps, SIZE, generator=torch.Generator().manual_seed(MODEL_SEED + seed))
    run = {"timesteps": scheduler.timesteps.float()}
    if hasattr(scheduler, "sigmas"):
        run["sigmas"] = scheduler.sigmas.float()
    run["samples"] = torch.stack(loop(scheduler, noise * scheduler.init_noise_sigma, outputs, 0, generator))
    if steps > 2:
        # A picture of the first outputs, entered in the middle.
        begin = steps // 2
        scheduler = started(scheduler_class, change, steps, begin)
        start = scheduler.add_noise(outputs[:1], noise, scheduler.timesteps[begin : begin + 1])
        late = torch.Generator().manual_seed(LATE_SEED + seed)
        run["late"] = torch.stack(loop(scheduler, start, outputs, begin, late))
    return run


def started(scheduler_class, change: dict, steps: int, begin: int):
    scheduler = scheduler_class.from_config(SDXL | change)
    scheduler.set_timesteps(steps)
    # Without it a scheduler looks the first timestep up, and begins one too late where two of them are equal.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler


def loop(scheduler, sample, outputs, begin, generator) -> list:
    """The sample at `begin` and after every step."""
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    samples = [sample[0]]
    for timestep, output in zip(scheduler.timesteps[begin:], outputs[begin:]):
        model_output = 0.3 * scheduler.scale_model_input(sample, timestep) + output
        sample = scheduler.step(model_output, timestep, sample, return_dict=False, **extra)[0]
        samples.append(sample[0])
    return samples


def require_quietly(condition: bool, message: str) -> None:
    if not condition:
        require(condition, message)


def check(tensors) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    require(not broken, f"all numbers are finite {broken}")
    steps, seed = 10, 0
    for name, part in [
        ("karras", {"use_karras_sigmas": True}),
        ("v prediction", V),
        ("zero SNR", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("trailing", {"timestep_spacing": "trailing"}),
    ]:
        a, b = (walk(EulerDiscreteScheduler, c, steps, seed)["samples"][-1] for c in ({}, part))
        require(relative_difference(a, b) > 1e-2, f"{name} moves the last sample by {relative_difference(a, b):.2g}")
