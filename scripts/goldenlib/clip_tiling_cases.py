"""VAE tiles of clips: frames that are larger than a tile, decoded and encoded in tiles by the pipelines of other cases'
checkpoints."""

import numpy
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
)

from .common import ROOT, fresh_case, write_golden
from .diffusion import ANOTHER_SEED, quiet, require_moved, require_visible, to_u8
from .edits_cases import photo
from .hunyuan_video_images_cases import DROPPED

# Tiles are 256 pixels wide, 192 of which are kept. The last ones are cut.
WAN_RUNS = [
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
# The sides of tiles are half of what the VAE's configuration says, and a sixth of the height and a fifth of the width are
# covered twice: `sample_height` and `sample_width` are changed so that these are whole latents.
COGVIDEOX_RUNS = [
    # Tiles of 48x40 pixels, eight of them; one chunk of time.
    {
        "checkpoint": "cogvideox-a",
        "sample_height": 96,
        "sample_width": 80,
        "prompt": "A lighthouse above the fog",
        "width": 112,
        "height": 64,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "seed": 21,
    },
    # Three chunks of time.
    {
        "checkpoint": "cogvideox-b",
        "sample_height": 48,
        "sample_width": 80,
        "prompt": "Seven ships in one harbour",
        "width": 56,
        "height": 40,
        "num_frames": 25,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": 22,
    },
    # One row of tiles, and latent frames that only fill a patch.
    {
        "checkpoint": "cogvideox-1.5",
        "sample_height": 96,
        "sample_width": 40,
        "prompt": "The clock tower in the rain",
        "width": 48,
        "height": 40,
        "num_frames": 17,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "seed": 23,
    },
    # The picture is encoded in tiles, too.
    {
        "checkpoint": "cogvideox-i2v",
        "sample_height": 48,
        "sample_width": 40,
        "prompt": "A glass city in the rain",
        "width": 48,
        "height": 32,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "seed": 24,
    },
    {
        "checkpoint": "cogvideox-1.5-i2v",
        "sample_height": 48,
        "sample_width": 80,
        "prompt": "A paper boat on the river",
        "width": 56,
        "height": 32,
        "num_frames": 17,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "seed": 25,
    },
]
# As Wan's.
HUNYUAN_RUNS = [
    # Two stretches of time.
    {
        "checkpoint": "hunyuan-video-a",
        "prompt": "A lighthouse above the fog",
        "width": 288,
        "height": 16,
        "num_frames": 21,
        "num_inference_steps": 2,
        "guidance_scale": 6.0,
        "seed": 31,
        "max_sequence_length": 240,
    },
    # More tiles in both directions, and three stretches; a few of the frames are kept.
    {
        "checkpoint": "hunyuan-video-b",
        "prompt": "Seven ships in one harbour",
        "width": 272,
        "height": 272,
        "num_frames": 29,
        "num_inference_steps": 2,
        "guidance_scale": 0.0,
        "seed": 32,
        "max_sequence_length": 240,
        "kept_frames": [14, 28],
    },
    # The picture is encoded in tiles, too.
    {
        "checkpoint": "hunyuan-video-i2v",
        "prompt": "A glass city in the rain",
        "width": 272,
        "height": 32,
        "num_frames": 5,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "seed": 33,
        "max_sequence_length": 240,
    },
    {
        "checkpoint": "hunyuan-video-i2v-33ch",
        "prompt": "A paper boat on the river",
        "width": 16,
        "height": 288,
        "num_frames": 13,
        "num_inference_steps": 2,
        "guidance_scale": 0.0,
        "seed": 34,
        "max_sequence_length": 240,
    },
]
FAMILIES = {
    "wan": (WanPipeline, WanImageToVideoPipeline),
    "cogvideox": (CogVideoXPipeline, CogVideoXImageToVideoPipeline),
    "hunyuan": (HunyuanVideoPipeline, HunyuanVideoImageToVideoPipeline),
}
FROM_A_PICTURE = "i2v"
# What a run says beside the pipeline's arguments.
NOT_ARGUMENTS = ("checkpoint", "sample_height", "sample_width", "kept_frames")
# Decibels that a clip made in another way may have at most; equal ones have more.
WITHOUT_TILES = 50.0


def make() -> None:
    quiet()
    make_case("clip-tiling", WAN_RUNS)
    make_case("cogvideox-tiling", COGVIDEOX_RUNS)
    make_case("hunyuan-video-tiling", HUNYUAN_RUNS)


def make_case(case: str, runs: list) -> None:
    folder = fresh_case(case)
    tensors, facts = {}, []
    for i, run in enumerate(runs):
        name = f"{case} run {i}"
        checkpoint = run["checkpoint"]
        from_picture = FROM_A_PICTURE in checkpoint
        kind = FAMILIES[checkpoint.split("-")[0]][from_picture]
        pipeline = kind.from_pretrained(ROOT / checkpoint / "checkpoint", dtype=torch.float32, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        source = photo(run["width"], run["height"], seed=i) if from_picture else None
        whole = clip(pipeline, run, source)
        enable_tiling(pipeline.vae, run)
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
        tensors[f"run{i}.frames"] = frames[run["kept_frames"]] if "kept_frames" in run else frames
        facts.append(run | {"decoder_calls": calls["decoder"], "encoder_calls": calls["encoder"]})
    reference = {
        "clip-tiling": "AutoencoderKLWan.enable_tiling of the checkpoints' pipelines",
        "cogvideox-tiling": "AutoencoderKLCogVideoX.enable_tiling of the checkpoints' pipelines",
        "hunyuan-video-tiling": "AutoencoderKLHunyuanVideo.enable_tiling of the checkpoints' pipelines",
    }
    write_golden(folder, {"reference": reference[case], "runs": facts}, tensors)


def enable_tiling(vae, run: dict) -> None:
    """As if the configuration said what the run says."""
    if "sample_height" not in run:
        return vae.enable_tiling()
    height, width = run["sample_height"] // 2, run["sample_width"] // 2
    vae.enable_tiling(tile_sample_min_height=height, tile_sample_min_width=width)


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
    run = {key: value for key, value in run.items() if key not in NOT_ARGUMENTS}
    if source is not None:
        run["image"] = source
    if isinstance(pipeline, FAMILIES["hunyuan"]) and pipeline.transformer.config.image_condition_type == "latent_concat":
        run["num_frames"] += DROPPED
    if isinstance(pipeline, FAMILIES["cogvideox"]):
        config = pipeline.transformer.config
        if config.use_learned_positional_embeddings or not config.use_rotary_positional_embeddings:
            # There are positions for prompts of one length.
            run["max_sequence_length"] = config.max_text_seq_length
    generator = torch.Generator("cpu").manual_seed(run.pop("seed"))
    return to_u8(pipeline(**run, output_type="np", generator=generator).frames[0])
