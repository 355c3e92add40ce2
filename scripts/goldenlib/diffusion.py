"""What the picture and the clip cases share: weights that keep everything in range, recording a run, judging a run."""

import json
import math
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import T5TokenizerFast

from .common import normal, psnr, require, write_json

# Least share of sample values strictly inside 0..255, and their least standard deviation.
INSIDE, SPREAD = 0.9, 15.0
# Relative size of a disturbance of the noise that stands for another order of sums, and the dB that it may cost.
ROUNDING, STABLE = 1e-5, 60.0
# dB: a change of the seed must cost more than the first, a change of the prompt alone more than the second.
ANOTHER_SEED, ANOTHER_PROMPT = 35.0, 45.0

T5_WEIGHTS = [
    ("shared.weight", lambda p, g: normal(p, g, 1.0)),
    ("embed_tokens.weight", lambda p, g: normal(p, g, 1.0)),
    ("relative_attention_bias.weight", lambda p, g: normal(p, g, 1.0)),
    # T5 does not divide scores by the root of the head width; its query weights are that much smaller.
    (".q.weight", lambda p, g: normal(p, g, 0.6 / math.sqrt(p.shape[1]))),
]


def quiet() -> None:
    """No progress bars, and no warning for every prompt that is cut on purpose."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()


def scale_output(weight: torch.nn.Parameter, outputs: torch.Tensor, std: float) -> None:
    """Scales the last layer of a network so that outputs like `outputs` get a standard deviation of `std`."""
    weight.mul_(std / outputs.std())


def rename_tensors(file: Path, rename) -> None:
    """Rewrites one safetensors file; `rename` maps a name to its list of new names."""
    tensors = load_file(file)
    renamed = {new: tensor.clone() for name, tensor in tensors.items() for new in rename(name)}
    save_file(renamed, file, metadata={"format": "pt"})


def edit_json(file: Path, **fields) -> None:
    """Sets fields; a field set to None is removed."""
    value = json.loads(file.read_text(encoding="utf-8")) | fields
    write_json(
        file, {key: item for key, item in value.items() if fields.get(key, item) is not None or key not in fields}
    )


def dtypes(checkpoint: Path) -> dict:
    """The dtype in which each component is published; the reference computes in f32 throughout."""
    files = sorted(checkpoint.glob("*/*.safetensors"))
    return {f.parent.name: str(next(iter(load_file(f).values())).dtype).removeprefix("torch.") for f in files}


class Recorder:
    """Runs a pipeline and keeps what passes between its parts."""

    def __init__(self, pipeline, transformer_input: str = "hidden_states"):
        self.pipeline = pipeline
        self.input = transformer_input
        pipeline.set_progress_bar_config(disable=True)

    def run(self, **arguments):
        """Tensors by name, and the pipeline's answer."""
        kept = {}

        def before(module, args, kwargs):
            if "noise" not in kept:
                kept["noise"] = kwargs[self.input].clone()

        def after(module, args, kwargs, output):
            if "prediction0" not in kept:
                kept["prediction0"] = output[0].clone()

        def step_end(pipeline, step, timestep, values):
            kept[f"latents{step}"] = values["latents"].clone()
            return values

        hooks = [
            self.pipeline.transformer.register_forward_pre_hook(before, with_kwargs=True),
            self.pipeline.transformer.register_forward_hook(after, with_kwargs=True),
        ]
        seed = arguments.pop("seed")
        generator = torch.Generator("cpu").manual_seed(seed)
        answer = self.pipeline(**arguments, output_type="np", callback_on_step_end=step_end, generator=generator)
        for hook in hooks:
            hook.remove()
        kept["timesteps"] = self.pipeline.scheduler.timesteps.float()
        if hasattr(self.pipeline.scheduler, "sigmas"):
            kept["sigmas"] = self.pipeline.scheduler.sigmas.float()
        return kept, answer


def to_u8(values) -> torch.Tensor:
    """0..1 to 0..255 as the pipelines round."""
    return torch.from_numpy((values * 255).round().astype("uint8"))


def require_visible(name: str, image: torch.Tensor) -> None:
    inside = ((image > 0) & (image < 255)).float().mean().item()
    spread = image.float().std().item()
    require(inside > INSIDE and spread > SPREAD, f"{name}: {inside:.1%} inside 0..255, standard deviation {spread:.0f}")


def require_moved(name: str, what: str, a: torch.Tensor, b: torch.Tensor, limit: float) -> None:
    distance = psnr(a, b)
    require(distance < limit, f"{name}: {what} is {distance:.1f} dB away (limit {limit:g})")


def require_loaded(name: str, pipeline, parts: dict, components: tuple) -> None:
    """The components of a published pipeline are those that were saved."""
    for part in components:
        loaded = dict(getattr(pipeline, part).named_parameters())
        same = all(torch.equal(loaded[key], value) for key, value in parts[part].named_parameters())
        require(same, f"{name}: {part} loads as it was saved")


def save_with_t5(parts: dict, checkpoint: Path, pipeline, install, tokenizer_class: str) -> None:
    """`save_pretrained`, with the tokenizer folder as it is published instead of as transformers 5 writes it."""
    folder = checkpoint / "tokenizer"
    folder.mkdir(parents=True)
    install(folder)
    pipeline(**parts, tokenizer=T5TokenizerFast.from_pretrained(folder)).save_pretrained(checkpoint)
    shutil.rmtree(folder)
    folder.mkdir()
    install(folder)
    edit_json(checkpoint / "model_index.json", tokenizer=["transformers", tokenizer_class])


def disturbed(noise: torch.Tensor) -> torch.Tensor:
    """The noise as a port with other rounding errors might see it, and worse."""
    return noise + ROUNDING * torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))


def require_stable(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """That a right port can be as close as the tests want: rounding errors must not grow into other pictures."""
    require(
        psnr(a, b) > STABLE, f"{name}: noise disturbed by {ROUNDING:g} costs {psnr(a, b):.1f} dB (at least {STABLE:g})"
    )
