"""Schedules and steps of the two solvers on random model outputs, without any model."""

import math

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from .common import fresh_case, relative_difference, require, write_golden

SIZE = 32

# As published with FLUX.1-dev, FLUX.1-schnell and Wan2.1.
FLUX_DEV = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
FLUX_SCHNELL = FLUX_DEV | {"shift": 1.0, "use_dynamic_shifting": False}
WAN = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "solver_order": 2,
    "prediction_type": "flow_prediction",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "predict_x0": True,
    "solver_type": "bh2",
    "lower_order_final": True,
    "disable_corrector": [],
    "solver_p": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "final_sigmas_type": "zero",
    "rescale_betas_zero_snr": False,
}


def make() -> None:
    folder = fresh_case("solvers")
    cases, tensors = [], {}
    for seed, (name, scheduler_class, config, steps, mu, sigmas) in enumerate(all_cases()):
        scheduler = scheduler_class.from_config(config)
        schedule(scheduler, steps, mu, sigmas)
        run = walk(scheduler, seed)
        tensors |= {f"{name}.{key}": value for key, value in run.items()}
        cases.append(
            {
                "name": name,
                "class": scheduler_class.__name__,
                "config": config,
                "num_inference_steps": steps,
                "mu": mu,
                "sigmas_arg": None if sigmas is None else sigmas.tolist(),
            }
        )
    check(tensors)
    notes = [
        "timesteps are given as f32 although UniPC keeps integers",
        "bh1 is stepped once less than there are steps: its last step, to sigma 0, is NaN in the reference",
    ]
    write_golden(folder, {"cases": cases, "notes": notes}, tensors)


def all_cases():
    """Name, class, configuration, steps, mu, sigmas as the pipelines hand them over."""
    euler = FlowMatchEulerDiscreteScheduler
    for steps in (1, 2, 4, 20, 50):
        sigmas = np.linspace(1.0, 1 / steps, steps)
        for length in (256, 1024, 4096):
            mu = calculate_shift(length, 256, 4096, 0.5, 1.15)
            yield f"flux-dev-{length}-{steps}", euler, FLUX_DEV, steps, mu, sigmas
        # The pipeline hands mu over even where the schedule ignores it.
        yield f"flux-schnell-{steps}", euler, FLUX_SCHNELL, steps, calculate_shift(1024, 256, 4096, 0.5, 1.15), sigmas
        for shift in (3.0, 7.0):
            config = FLUX_SCHNELL | {"shift": shift}
            yield f"shift-{shift:g}-{steps}", euler, config, steps, None, sigmas
            yield f"shift-{shift:g}-{steps}-own-sigmas", euler, config, steps, None, None
    for steps in (1, 2, 4, 20, 50):
        for shift in (3.0, 5.0):
            yield f"unipc-{shift:g}-{steps}", UniPCMultistepScheduler, WAN | {"flow_shift": shift}, steps, None, None
        order_3 = WAN | {"solver_order": 3}
        yield f"unipc-order-3-{steps}", UniPCMultistepScheduler, order_3, steps, None, None
        if steps > 1:
            yield f"unipc-bh1-{steps}", UniPCMultistepScheduler, WAN | {"solver_type": "bh1"}, steps, None, None


def schedule(scheduler, steps, mu, sigmas) -> None:
    """As `retrieve_timesteps` of the pipelines: sigmas, or else the number of steps."""
    extra = {} if mu is None else {"mu": mu}
    if sigmas is None:
        scheduler.set_timesteps(steps, **extra)
    else:
        scheduler.set_timesteps(sigmas=sigmas, **extra)


def walk(scheduler, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(SIZE, generator=generator)
    outputs = torch.randn(len(scheduler.timesteps), SIZE, generator=generator)
    sample, samples = start.view(1, -1), []
    if scheduler.config.get("solver_type") == "bh1":
        # The reference itself ends in NaN: at sigma 0 bh1 multiplies infinity by 0.
        outputs = outputs[:-1]
    for timestep, output in zip(scheduler.timesteps, outputs):
        sample = scheduler.step(output.view(1, -1), timestep, sample, return_dict=False)[0]
        samples.append(sample[0])
    return {
        "timesteps": scheduler.timesteps.float(),
        "sigmas": scheduler.sigmas.float(),
        "outputs": outputs,
        "sample": start,
        "samples": torch.stack(samples),
    }


def check(tensors) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    require(not broken, f"all numbers are finite {broken}")
    for a, b in [("flux-dev-256-20", "flux-dev-4096-20"), ("shift-3-20", "shift-7-20"), ("unipc-3-20", "unipc-5-20")]:
        require(
            relative_difference(tensors[f"{a}.sigmas"], tensors[f"{b}.sigmas"]) > 1e-2, f"sigmas of {a} and {b} differ"
        )
    # The same outputs through another order or update rule must end elsewhere.
    for name, change in [("order 2 for 3", {"solver_order": 2}), ("bh1 for bh2", {"solver_type": "bh1"})]:
        scheduler = UniPCMultistepScheduler.from_config(WAN | {"solver_order": 3} | change)
        reference = UniPCMultistepScheduler.from_config(WAN | {"solver_order": 3})
        scheduler.set_timesteps(20)
        reference.set_timesteps(20)
        difference = relative_difference(walk(reference, 0)["samples"][-1], walk(scheduler, 0)["samples"][-1])
        require(math.isfinite(difference) and difference > 1e-2, f"{name} moves the last sample by {difference:.2g}")
