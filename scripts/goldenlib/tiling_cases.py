"""VAE tiles: pictures that are larger than a tile, decoded and encoded in tiles by the pipelines of other cases'
checkpoints."""

import numpy
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from .common import ROOT, fresh_case, require, write_golden
from .diffusion import ANOTHER_PROMPT, ANOTHER_SEED, quiet, require_moved, require_visible, to_u8
from .edits_cases import photo

# Tiles are 64 pixels wide, 48 of which are kept. The last ones are cut.
RUNS = [
    {
        "checkpoint": "sdxl-a",
        "prompt": "A lighthouse above the fog",
        "width": 112,
        "height": 128,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "seed": 11,
    },
    {
        "checkpoint": "sdxl-b",
        "prompt": "Seven ships in one harbour",
        "width": 136,
        "height": 72,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "seed": 12,
    },
    # One row of tiles.
    {
        "checkpoint": "flux-dev",
        "prompt": "A glass city",
        "width": 160,
        "height": 48,
        "num_inference_steps": 2,
        "guidance_scale": 3.5,
        "seed": 13,
    },
]
# From a picture of this size.
EDITS = [
    {
        "checkpoint": "sdxl-a",
        "prompt": "The same harbour at night",
        "width": 128,
        "height": 112,
        "strength": 0.4,
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "seed": 21,
    },
    {
        "checkpoint": "flux-dev",
        "prompt": "A glass city in the rain",
        "width": 160,
        "height": 96,
        "strength": 0.5,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "seed": 22,
    },
]


def make() -> None:
    quiet()
    folder = fresh_case("tiling")
    tensors, facts = {}, []
    for i, run in enumerate(RUNS):
        pipeline = open_pipeline(run["checkpoint"])
        whole = picture(pipeline, run)
        pipeline.vae.enable_tiling()
        tiles = []
        hook = pipeline.vae.decoder.register_forward_hook(lambda module, args, output: tiles.append(output.shape))
        image = picture(pipeline, run)
        hook.remove()
        name = f"tiling run {i}"
        require_visible(name, image)
        require(len(tiles) > 1, f"{name}: {len(tiles)} tiles")
        require_moved(name, "no tiles", image, whole, ANOTHER_PROMPT)
        require_moved(name, "another seed", image, picture(pipeline, run | {"seed": run["seed"] + 1}), ANOTHER_SEED)
        pipeline.vae.blend_h = pipeline.vae.blend_v = lambda before, tile, extent: tile
        require_moved(name, "no blending", image, picture(pipeline, run), ANOTHER_PROMPT)
        tensors[f"run{i}.image"] = image
        facts.append(run | {"tiles": len(tiles)})
    edits = [make_edit(i, run, tensors) for i, run in enumerate(EDITS)]
    facts = {"reference": "AutoencoderKL.enable_tiling of the checkpoints' pipelines", "runs": facts, "edits": edits}
    write_golden(folder, facts, tensors)


def make_edit(i: int, run: dict, tensors: dict) -> dict:
    name = f"tiling edit {i}"
    pipeline = open_pipeline(run["checkpoint"], (FluxImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline))
    source = photo(run["width"], run["height"], seed=i)
    pipeline.vae.enable_tiling()
    tiles = []
    hook = pipeline.vae.encoder.register_forward_hook(lambda module, args, output: tiles.append(output.shape))
    image = picture(pipeline, run, source)
    hook.remove()
    require_visible(name, image)
    require(len(tiles) > 1, f"{name}: {len(tiles)} tiles")
    another = picture(pipeline, run, photo(run["width"], run["height"], seed=9))
    require_moved(name, "another picture", image, another, ANOTHER_PROMPT)
    require_moved(name, "another seed", image, picture(pipeline, run | {"seed": 99}, source), ANOTHER_PROMPT)
    vae = pipeline.vae
    vae._tiled_encode = lambda x: vae.encoder(x) if vae.quant_conv is None else vae.quant_conv(vae.encoder(x))
    require_moved(name, "a whole encode", image, picture(pipeline, run, source), ANOTHER_PROMPT)
    tensors[f"edit{i}.input"] = torch.from_numpy(numpy.array(source))
    tensors[f"edit{i}.image"] = image
    return run | {"tiles": len(tiles)}


def open_pipeline(case: str, kinds=(FluxPipeline, StableDiffusionXLPipeline)):
    checkpoint = ROOT / case / "checkpoint"
    if case.startswith("flux"):
        pipeline = kinds[0].from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    else:
        variant = "fp16" if list(checkpoint.glob("unet/*.fp16.*")) else None
        pipeline = kinds[1].from_pretrained(
            checkpoint, dtype=torch.float32, variant=variant, local_files_only=True, add_watermarker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline, run: dict, source=None) -> torch.Tensor:
    """As u8 [H, W, 3]."""
    run = {key: value for key, value in run.items() if key != "checkpoint"}
    if source is not None:
        run["image"] = source
    if isinstance(pipeline, StableDiffusionXLImg2ImgPipeline):
        # It has no width and height of its own.
        del run["width"], run["height"]
    generator = torch.Generator("cpu").manual_seed(run.pop("seed"))
    return to_u8(pipeline(**run, output_type="np", generator=generator).images[0])
