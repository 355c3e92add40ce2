"""VAE tiles of clips: frames that are larger than a tile, decoded and encoded in tiles by the pipelines of other cases'
checkpoints."""

import numpy
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from .common import ROOT, fresh_case, write_golden
from .diffusion import ANOTHER_SEED, quiet, require_moved, require_visible, to_u8
from .edits_cases import photo

# Tiles are 256 pixels wide, 192 of which are kept. The last ones are cut.
RUNS = [
    {
        "checkpoint": "wan-a",
        "prompt": "A lighthouse above the fog",
        "width": 288,
        "height": 32,
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "seed": 11,
    },
    {
        "checkpoint": "wan-b",
        "prompt": "Seven ships in one harbour",
        "width": 272,
        "height": 272,
        "num_frames": 1,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "seed": 12,
    },
    # The picture is encoded in tiles, too.
    {
        "checkpoint": "wan-i2v",
        "prompt": "A glass city in the rain",
        "width": 32,
        "height": 288,
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "seed": 13,
    },
]
# Decibels that a clip made in another way may have at most; equal ones have more.
WITHOUT_TILES = 50.0


def make() -> None:
    quiet()
    folder = fresh_case("clip-tiling")
    tensors, facts = {}, []
    for i, run in enumerate(RUNS):
        name = f"clip tiling run {i}"
        from_picture = run["checkpoint"] == "wan-i2v"
        kind = WanImageToVideoPipeline if from_picture else WanPipeline
        pipeline = kind.from_pretrained(ROOT / run["checkpoint"] / "checkpoint", dtype=torch.float32, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        source = photo(run["width"], run["height"], seed=i) if from_picture else None
        whole = clip(pipeline, run, source)
        pipeline.vae.enable_tiling()
        calls = {"encoder": 0, "decoder": 0}
        hooks = [count(pipeline.vae, part, calls) for part in calls]
        frames = clip(pipeline, run, source)
        for hook in hooks:
            hook.remove()
        require_visible(name, frames)
        require_moved(name, "no tiles", frames, whole, WITHOUT_TILES)
        require_moved(name, "another seed", frames, clip(pipeline, run | {"seed": 99}, source), ANOTHER_SEED)
        if from_picture:
            tensors[f"run{i}.input"] = torch.from_numpy(numpy.array(source))
            tiled = pipeline.vae.tiled_encode
            pipeline.vae.tiled_encode = lambda x: without_tiles(pipeline.vae, x)
            require_moved(name, "a whole encode", frames, clip(pipeline, run, source), WITHOUT_TILES)
            pipeline.vae.tiled_encode = tiled
        pipeline.vae.blend_h = pipeline.vae.blend_v = lambda before, tile, extent: tile
        require_moved(name, "no blending", frames, clip(pipeline, run, source), WITHOUT_TILES)
        tensors[f"run{i}.frames"] = frames
        facts.append(run | {"decoder_calls": calls["decoder"], "encoder_calls": calls["encoder"]})
    write_golden(folder, {"reference": "AutoencoderKLWan.enable_tiling of the checkpoints' pipelines", "runs": facts}, tensors)


def count(vae, part: str, calls: dict):
    def called(module, args, output):
        calls[part] += 1

    return getattr(vae, part).register_forward_hook(called)


def without_tiles(vae, x):
    vae.use_tiling = False
    moments = vae._encode(x)
    vae.use_tiling = True
    return moments


def clip(pipeline, run: dict, source) -> torch.Tensor:
    """As u8 [F, H, W, 3]."""
    run = {key: value for key, value in run.items() if key != "checkpoint"}
    if source is not None:
        run["image"] = source
    generator = torch.Generator("cpu").manual_seed(run.pop("seed"))
    return to_u8(pipeline(**run, output_type="np", generator=generator).frames[0])
