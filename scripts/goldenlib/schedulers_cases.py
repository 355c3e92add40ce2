"""What every name of a scheduler means: schedules and steps without a model, and whole SDXL pictures.

A name is `Class.from_config(pipe.scheduler.config, **settings)`, where `pipe.scheduler` is of the checkpoint's own class. The
model of a case answers `0.3 * input + randn`, as in the group `noise_solvers`."""

import inspect
import itertools

import diffusers
import torch
from diffusers import StableDiffusionXLPipeline

from . import noise_solvers_cases as noise
from .common import ROOT, fresh_case, psnr, relative_difference, require, write_golden
from .diffusion import disturbed, quiet, require_moved, require_stable, require_visible, to_u8

OWN = "EulerDiscreteScheduler"
V = noise.V
SNR = {"rescale_betas_zero_snr": True}
KARRAS = {"use_karras_sigmas": True}
TRAILING, LINSPACE = {"timestep_spacing": "trailing"}, {"timestep_spacing": "linspace"}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"


def dpmpp_2m(algorithm: str, karras: bool):
    return DPM, {"algorithm_type": algorithm, "solver_order": 2, "use_karras_sigmas": karras}


# Class and settings of every name.
NAMES = {
    "euler": (OWN, {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": dpmpp_2m("dpmsolver++", False),
    "dpmpp_2m_karras": dpmpp_2m("dpmsolver++", True),
    "dpmpp_2m_sde": dpmpp_2m("sde-dpmsolver++", False),
    "dpmpp_2m_sde_karras": dpmpp_2m("sde-dpmsolver++", True),
    "unipc": (UNIPC, {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "flow_euler": (FLOW, {}),
}
NAMES |= {class_name: (class_name, {}) for class_name, _ in list(NAMES.values())}
CONSISTENCY = ("lcm", "tcd")
DRAWS = ("euler_a", "dpmpp_2m_sde", "dpmpp_2m_sde_karras", "lcm")

# As published with Wan2.1, and a checkpoint made from it.
WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "predict_x0": True}
WAN_EULER = {"shift": 7.0, "num_train_timesteps": 1000}

PICTURE = {
    "prompt": "A small Boat crosses the QUIET lake!",
    "negative_prompt": "Rain, smoke and silence",
    "width": 64,
    "height": 64,
    "guidance_scale": 3.0,
}
# Name with its spacing, if that is not the file's, eta, steps, seed.
PICTURES = [
    ("euler", None, 4, 11),
    ("euler_a", None, 4, 12),
    ("ddim", None, 4, 13),
    ("ddim", 0.7, 4, 13),
    ("dpmpp_2m", None, 5, 14),
    ("dpmpp_2m_karras", None, 5, 15),
    ("dpmpp_2m_sde", None, 5, 16),
    ("dpmpp_2m_sde_karras", None, 5, 17),
    ("unipc", None, 5, 18),
    ("lcm", None, 4, 19),
    ("tcd", None, 4, 20),
    ("tcd", 0.3, 4, 20),
    # As distilled models want it.
    (("euler", "trailing"), None, 4, 21),
    (("dpmpp_2m_sde", "linspace"), None, 4, 22),
]
# Checkpoints of other classes, sampled as they say and by another name.
OWN_PICTURES = [
    (DPM, noise.SDXL | KARRAS | {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True}, None, 4, 31),
    (DPM, noise.SDXL | KARRAS | {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True}, "unipc", 4, 31),
    ("LCMScheduler", {"original_inference_steps": 20}, None, 3, 32),
    ("LCMScheduler", {"original_inference_steps": 20}, "dpmpp_2m", 3, 32),
]


def make() -> None:
    quiet()
    make_steps()
    make_pictures()


def scheduler_of(own: str, file: dict, name: str | None):
    """As a user of diffusers has it: the checkpoint's scheduler, and another one made from it."""
    own = getattr(diffusers, own).from_config(file)
    if name is None:
        return own
    name, spacing = name if isinstance(name, tuple) else (name, None)
    class_name, settings = NAMES[name]
    settings = settings | ({"timestep_spacing": spacing} if spacing else {})
    return getattr(diffusers, class_name).from_config(own.config, **settings, **flow_settings(own, class_name))


def flow_settings(own, class_name: str) -> dict:
    """Without these a flow-matching configuration loses its shift, and what the model predicts, in the other class."""
    if class_name == UNIPC and type(own).__name__ == FLOW:
        return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": own.config.shift}
    if class_name == FLOW and type(own).__name__ == UNIPC:
        return {"shift": own.config.flow_shift}
    return {}


# --- steps -----------------------------------------------------------------------------------------------------------


def make_steps() -> None:
    folder = fresh_case("schedulers")
    cases, tensors = [], {}
    for seed, (name, own, file, steps, eta) in enumerate(all_cases()):
        run = walk(scheduler_of(own, file, name), own, file, name, steps, eta, seed)
        tensors |= {f"{seed}.{key}": value for key, value in run.items()}
        # `_class_name` is the case's own class; most fields are those of the base.
        base = all(file.get(key) is not None or value is None for key, value in noise.SDXL.items())
        change = {key: value for key, value in file.items() if not base or noise.SDXL.get(key) != value}
        cases.append({"name": name, "own": own, "base": base, "change": change, "steps": steps, "eta": eta, "seed": seed})
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    require(not broken, f"all numbers are finite {broken}")
    check_steps()
    notes = [
        "a case's file is `base` (if so) with `change`, written for the class `own`",
        "start and in-loop noise: generator of `seed`; the model's randn [steps, 16]: generator of `seed` + 1000",
        "late: the loop entered in the middle, from the model's first row with the start's noise; generator of `seed` + 2000",
    ]
    write_golden(folder, {"base": noise.SDXL, "cases": cases, "notes": notes}, tensors)


def sdxl(name: str, change: dict, steps: int, eta: float | None = None):
    return name, OWN, noise.SDXL | change, steps, eta


def all_cases():
    """Name, the checkpoint's own class, its file, steps, eta."""
    for name in NAMES:
        if name in ("euler", "flow_euler") or name.endswith("Scheduler"):
            continue
        yield from grid_cases(name)
        yield from count_cases(name)
    yield from ddim_cases()
    yield from dpm_cases()
    yield from unipc_cases()
    yield from consistency_cases()
    yield from crossing_cases()
    yield from flow_cases()


def grid_cases(name: str):
    """Spacings, predictions and zero SNR. Where the last alpha is 0, a predicted noise says nothing about the picture."""
    spacings = ("leading",) if name in CONSISTENCY else noise.SPACINGS
    predictions = noise.PREDICTIONS[:2] if name == "euler_a" else noise.PREDICTIONS
    for spacing, prediction, zero_snr in itertools.product(spacings, predictions, (False, True)):
        begins_at_zero = name in CONSISTENCY or (name == "ddim" and spacing != "leading")
        if not (zero_snr and prediction == "epsilon" and begins_at_zero):
            yield sdxl(name, noise.change(spacing, prediction, zero_snr=zero_snr), 8)
    for schedule in ("linear", "squaredcos_cap_v2"):
        yield sdxl(name, {"beta_schedule": schedule} | V, 7)
    if name not in CONSISTENCY:
        yield sdxl(name, {"num_train_timesteps": 50, "steps_offset": 0}, 7)


def count_cases(name: str):
    for steps in (1, 2, 3, 4, 16):
        for spacing in ({},) if name in CONSISTENCY else ({}, TRAILING, LINSPACE):
            yield sdxl(name, spacing, steps)


def ddim_cases():
    for eta in (0.0, 0.5, 1.0):
        for change, steps in (({}, 1), ({}, 6), (V | TRAILING, 6), ({"set_alpha_to_one": True}, 6)):
            yield sdxl("ddim", change, steps, eta)
    yield sdxl("ddim", {"clip_sample": True}, 6)
    yield sdxl("ddim", {"clip_sample": True, "clip_sample_range": 2.0}, 6, 0.5)
    # A file of another class that says nothing about clipping.
    yield "ddim", OWN, {"beta_schedule": "scaled_linear"}, 6, None


def dpm_cases():
    for algorithm, order in itertools.product(("dpmsolver++", "sde-dpmsolver++"), (1, 2, 3)):
        fields = {"algorithm_type": algorithm, "solver_order": order}
        for extra, steps in (
            ({}, 14),
            ({}, 15),
            ({"solver_type": "heun"}, 9),
            ({"euler_at_final": True} | SIGMA_MIN, 9),
            (SIGMA_MIN | TRAILING | {"lower_order_final": False}, 9),
            (SIGMA_MIN | TRAILING, 16),
            (KARRAS | {"sigma_min": 0.1, "sigma_max": 9.5}, 9),
        ):
            yield DPM, DPM, noise.SDXL | fields | extra, steps, None
    yield sdxl(DPM, KARRAS, 9)
    yield sdxl("dpmpp_2m_karras", {"beta_schedule": "squaredcos_cap_v2"} | V, 9)
    yield sdxl("dpmpp_2m_karras", SIGMA_MIN, 9)
    # The name's own settings outweigh the file's.
    yield sdxl("dpmpp_2m", KARRAS, 9)
    yield "dpmpp_2m", DPM, noise.SDXL | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, 9, None


def unipc_cases():
    for order in (1, 3):
        for extra in ({}, V | TRAILING, KARRAS):
            yield "unipc", UNIPC, noise.SDXL | {"solver_order": order} | extra, 9, None
    for extra, steps in ((KARRAS, 9), (KARRAS, 1), (KARRAS | SIGMA_MIN, 9), (SIGMA_MIN, 9), (KARRAS | SNR | V, 9)):
        yield sdxl("unipc", extra, steps)
    yield sdxl("unipc", {"beta_schedule": "squaredcos_cap_v2"} | V | KARRAS, 9)
    yield "unipc", UNIPC, noise.SDXL | {"disable_corrector": [0, 3]}, 9, None
    yield "unipc", UNIPC, noise.SDXL | {"solver_type": "bh1"} | SIGMA_MIN, 9, None
    yield "unipc", UNIPC, noise.SDXL | {"sigma_min": 0.1, "sigma_max": 9.5} | KARRAS, 9, None


def consistency_cases():
    for steps in (8, 50):
        yield sdxl("lcm", {}, steps)
        yield sdxl("tcd", {}, steps)
    for eta in (0.0, 0.3, 1.0):
        for change, steps in (({}, 1), ({}, 4), (V, 7), (V | SNR, 4), ({"prediction_type": "sample"}, 4)):
            yield sdxl("tcd", change, steps, eta)
    for own, name in (("LCMScheduler", "lcm"), ("TCDScheduler", "tcd")):
        yield name, own, {"original_inference_steps": 20}, 6, None
        yield name, own, {"original_inference_steps": 4, "timestep_scaling": 1.0}, 4, None
    yield "lcm", "LCMScheduler", {"timestep_scaling": 0.001}, 4, None
    yield sdxl("lcm", {"clip_sample": True}, 4)
    yield sdxl("lcm", {"clip_sample": True, "clip_sample_range": 2.0}, 4)


def crossing_cases():
    """Files of other classes: a field that is not there takes the default of the class that reads."""
    for own in ("LCMScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler", DPM, UNIPC, "TCDScheduler"):
        for name in ("euler", "euler_a", "ddim", "dpmpp_2m", "unipc", "lcm", "tcd"):
            yield name, own, {"num_train_timesteps": 900}, 4, None
    # diffusers replaces a name that it does not know when it makes the first of the two.
    yield DPM, UNIPC, noise.SDXL | {"solver_type": "heun"}, 6, None
    yield UNIPC, DPM, noise.SDXL | {"solver_type": "bh1"} | SIGMA_MIN, 6, None
    yield "unipc", DPM, noise.SDXL | {"solver_type": "heun"}, 6, None


def flow_cases():
    for steps in (1, 2, 4, 20):
        for name in ("unipc", "flow_euler"):
            yield name, UNIPC, WAN, steps, None
            yield name, FLOW, WAN_EULER, steps, None


def walk(scheduler, own: str, file: dict, name: str, steps: int, eta: float | None, seed: int) -> dict:
    what = f"{name} of {own} {file} in {steps}"
    fresh = lambda begin: started(scheduler_of(own, file, name), steps, begin)  # noqa: E731
    scheduler = fresh(0)
    noise.require_quietly(len(scheduler.timesteps) == steps, f"{what}: {len(scheduler.timesteps)} timesteps")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(noise.SIZE, generator=generator).view(1, -1)
    outputs = torch.randn(steps, noise.SIZE, generator=torch.Generator().manual_seed(noise.MODEL_SEED + seed))
    run = {"timesteps": scheduler.timesteps.float()}
    sigma = getattr(scheduler, "init_noise_sigma", 1.0)
    run["samples"] = torch.stack(loop(scheduler, start * sigma, outputs, 0, generator, eta))
    if steps > 2:
        begin = steps // 2
        scheduler = fresh(begin)
        add = scheduler.scale_noise if hasattr(scheduler, "scale_noise") else scheduler.add_noise
        middle = (outputs[:1], scheduler.timesteps[begin : begin + 1], start)
        noisy = add(*middle) if hasattr(scheduler, "scale_noise") else add(middle[0], middle[2], middle[1])
        late = torch.Generator().manual_seed(noise.LATE_SEED + seed)
        run["late"] = torch.stack(loop(scheduler, noisy, outputs, begin, late, eta))
    return run


def started(scheduler, steps: int, begin: int):
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler


def loop(scheduler, sample, outputs, begin, generator, eta) -> list:
    """The sample at `begin` and after every step, as the pipelines step: they hand over `eta`, 0 unless they are told."""
    parameters = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in parameters else {}
    extra |= {"eta": eta or 0.0} if "eta" in parameters else {}
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    samples = [sample[0]]
    for timestep, output in zip(scheduler.timesteps[begin:], outputs[begin:]):
        model_output = 0.3 * scale(sample, timestep) + output
        sample = scheduler.step(model_output, timestep, sample, return_dict=False, **extra)[0]
        samples.append(sample[0])
    return samples


def check_steps() -> None:
    """Every name ends elsewhere than every other one, and names that draw noise follow their generator."""
    names = [name for name in NAMES if not name.endswith("Scheduler") and name != "flow_euler"]
    ends = {}
    for name in names:
        ends[name] = walk(None, OWN, noise.SDXL, name, 8, None, 0)["samples"][-1]
    closest = min(
        (relative_difference(ends[a], ends[b]), a, b) for a, b in itertools.combinations(names, 2)
    )
    require(closest[0] > 1e-2, f"no two names end in the same sample: {closest}")
    for name, eta in [(name, None) for name in DRAWS] + [("ddim", 0.5), ("tcd", 0.3)]:
        a, b = (
            torch.stack(
                loop(
                    started(scheduler_of(OWN, noise.SDXL, name), 4, 0),
                    torch.ones(1, noise.SIZE),
                    torch.ones(4, noise.SIZE),
                    0,
                    torch.Generator().manual_seed(seed),
                    eta,
                )
            )[-1]
            for seed in (1, 2)
        )
        require(relative_difference(a, b) > 1e-2, f"{name}: another generator moves the last sample")


# --- pictures --------------------------------------------------------------------------------------------------------


def make_pictures() -> None:
    folder = fresh_case("sdxl-schedulers")
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        ROOT / "sdxl-a" / "checkpoint", dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    file = dict(pipeline.scheduler.config)
    runs = [(None, file, *picture) for picture in PICTURES]
    runs += [(own, config, name, None, steps, seed) for own, config, name, steps, seed in OWN_PICTURES]
    tensors, facts, images = {}, [], []
    for i, (own, config, name, eta, steps, seed) in enumerate(runs):
        what = f"sdxl-schedulers {i} ({own or OWN} as {name}, eta {eta})"
        pipeline.scheduler = scheduler_of(own or OWN, config, name)
        final, image = record(pipeline, steps, seed, eta)
        require_visible(what, image)
        shaken = disturbed(torch.randn(final.shape, generator=torch.Generator().manual_seed(seed)))
        # The pipeline does not draw the start when it is given: the generator has to be where it would be.
        require_stable(what, image, record(pipeline, steps, seed, eta, shaken)[1])
        require_moved(what, "another seed", image, record(pipeline, steps, seed + 1, eta)[1], 35.0)
        pipeline.scheduler = scheduler_of(OWN, file, "euler" if i else "ddim")
        require_moved(what, "another scheduler", image, record(pipeline, steps, seed, None)[1], 45.0)
        tensors |= {f"run{i}.latents": final, f"run{i}.image": image}
        name, spacing = name if isinstance(name, tuple) else (name, None)
        facts.append(
            {"own": own, "config": config if own else None, "scheduler": name, "timestep_spacing": spacing}
            | {"eta": eta, "num_inference_steps": steps, "seed": seed}
        )
        images.append(image)
    for a, b in itertools.combinations(range(len(runs)), 2):
        noise.require_quietly(psnr(images[a], images[b]) < 45.0, f"pictures {a} and {b} are the same")
    write_golden(folder, {"checkpoint": "sdxl-a", "request": PICTURE, "runs": facts}, tensors)


def record(pipeline, steps: int, seed: int, eta: float | None, start=None):
    """The last latents, and the picture as u8 [H, W, 3]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    extra = {} if eta is None else {"eta": eta}
    if start is not None:
        torch.randn(start.shape, generator=generator)
        extra["latents"] = start
    kept = {}

    def step_end(pipeline, step, timestep, values):
        kept["latents"] = values["latents"].clone()
        return values

    answer = pipeline(
        **PICTURE,
        **extra,
        num_inference_steps=steps,
        output_type="np",
        callback_on_step_end=step_end,
        generator=generator,
    )
    return kept["latents"], to_u8(answer.images[0])
