"""Pictures from pictures: image to image and inpainting on the checkpoints of the sdxl and flux cases, PIL's resizing, and
files as clients send them."""

import diffusers
import numpy
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image, ImageOps

from .common import ROOT, fresh_case, require, write_golden
from .diffusion import ANOTHER_PROMPT, ANOTHER_SEED, quiet, require_moved, require_visible, to_u8

PROMPT = "A small Boat crosses the QUIET lake!"
# `size` and `picture` are width and height; a run without `size` is as large as its picture, rounded down.
RUNS = {
    "sdxl-a": [
        {"picture": (75, 61), "strength": 0.5, "steps": 6, "guidance": 5.0, "negative": "Rain", "seed": 42},
        {"picture": (40, 40), "size": (64, 48), "strength": 1.0, "steps": 3, "guidance": 1.0, "seed": 3},
        {"picture": (64, 64), "mask": True, "strength": 0.9999, "steps": 4, "guidance": 7.5, "seed": 2**33 + 5},
        # Full strength begins from noise alone; this solver draws more noise after that.
        {
            "picture": (80, 60),
            "size": (64, 48),
            "mask": True,
            "strength": 1.0,
            "steps": 3,
            "guidance": 3.0,
            "seed": 7,
            "scheduler": "EulerAncestralDiscreteScheduler",
        },
        {"picture": (64, 48), "strength": 0.6, "steps": 5, "guidance": 3.0, "seed": 5, "scheduler": "UniPCMultistepScheduler"},
    ],
    "sdxl-b": [
        {"picture": (64, 48), "strength": 0.7, "steps": 5, "guidance": 1.0, "seed": 11},
    ],
    "flux-dev": [
        {"picture": (70, 50), "size": (64, 48), "strength": 0.6, "steps": 4, "guidance": 3.5, "seed": 42},
        {"picture": (64, 64), "size": (64, 64), "mask": True, "strength": 0.85, "steps": 4, "guidance": 7.0, "seed": 8},
    ],
    "flux-schnell": [
        {
            "picture": (48, 40),
            "size": (48, 40),
            "mask": True,
            "strength": 1.0,
            "steps": 3,
            "guidance": 0.0,
            "seed": 9,
            "tokens": 256,
        },
    ],
}


def make() -> None:
    quiet()
    for case, runs in RUNS.items():
        make_case(case, runs)
    make_resample()
    make_files()


def make_case(case: str, runs) -> None:
    variant = "fp16" if case == "sdxl-b" else None
    kinds = (
        (FluxImg2ImgPipeline, FluxInpaintPipeline)
        if case.startswith("flux")
        else (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)
    )
    pipelines = [
        kind.from_pretrained(ROOT / case / "checkpoint", dtype=torch.float32, variant=variant, local_files_only=True)
        for kind in kinds
    ]
    tensors, facts = {}, []
    for i, run in enumerate(runs):
        name = f"edits {case} run {i}"
        picture, mask = photo(*run["picture"], seed=i), mask_of(*run["picture"]) if "mask" in run else None
        recorded, image = record(pipelines, run, picture, mask)
        require_visible(name, image)
        check_sensitivity(name, pipelines, run, picture, mask, image)
        recorded |= {"input": torch.from_numpy(numpy.array(picture)), "image": image}
        if mask is not None:
            recorded["mask"] = torch.from_numpy(numpy.array(mask))
        tensors |= {f"run{i}.{key}": value for key, value in recorded.items()}
        height, width = image.shape[:2]
        facts.append(
            {
                "prompt": PROMPT,
                "negative_prompt": run.get("negative"),
                "width": width if "size" in run else None,
                "height": height if "size" in run else None,
                "strength": run["strength"],
                "num_inference_steps": run["steps"],
                "guidance_scale": run["guidance"],
                "seed": run["seed"],
                "max_sequence_length": run.get("tokens"),
                "scheduler": run.get("scheduler"),
            }
        )
    folder = fresh_case(f"edits/{case}")
    write_golden(folder, {"reference": [kind.__name__ for kind in kinds], "checkpoint": case, "runs": facts}, tensors)


def record(pipelines, run: dict, picture, mask):
    """What the VAE says of the picture, the latents after each step, and the picture as u8 [H, W, 3]."""
    pipeline = pipelines[mask is not None]
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    if "scheduler" in run:
        pipeline.scheduler = getattr(diffusers, run["scheduler"]).from_config(own.config)
    arguments = {
        "prompt": run.get("prompt", PROMPT),
        "image": picture,
        "strength": run["strength"],
        "num_inference_steps": run["steps"],
        "guidance_scale": run["guidance"],
    }
    if "negative" in run:
        arguments["negative_prompt"] = run["negative"]
    if "tokens" in run:
        arguments["max_sequence_length"] = run["tokens"]
    if mask is not None:
        arguments["mask_image"] = mask
    if isinstance(pipeline, StableDiffusionXLImg2ImgPipeline):
        # It has no width and height of its own.
        if "size" in run:
            arguments["image"] = picture.resize(run["size"], Image.Resampling.LANCZOS)
    else:
        arguments["width"], arguments["height"] = run.get("size", run["picture"])
    kept = {}

    def step_end(pipeline, step, timestep, values):
        kept[f"latents{step}"] = values["latents"].clone()
        return values

    generator = torch.Generator("cpu").manual_seed(run["seed"])
    answer = pipeline(**arguments, output_type="np", callback_on_step_end=step_end, generator=generator)
    pipeline.scheduler = own
    image = to_u8(answer.images[0])
    size = {"height": image.shape[0], "width": image.shape[1]}
    distribution = pipeline.vae.encode(pipeline.image_processor.preprocess(picture, **size)).latent_dist
    kept |= {"mean": distribution.mean, "std": distribution.std}
    return kept, image


def check_sensitivity(name: str, pipelines, run: dict, picture, mask, image) -> None:
    other = photo(*run["picture"], seed=99)
    weaker = {"strength": run["strength"] * 0.6}
    changes = [
        ("another seed", run | {"seed": run["seed"] + 1}, picture, mask, ANOTHER_SEED),
        ("another prompt", run | {"prompt": "Rain drums on the tin roof."}, picture, mask, ANOTHER_PROMPT),
        ("less strength", run | weaker, picture, mask, ANOTHER_PROMPT),
    ]
    # At full strength little of the picture is left.
    if run["strength"] < 1:
        changes.append(("another picture", run, other, mask, ANOTHER_PROMPT))
    if mask is not None:
        changes.append(("the mask inverted", run, picture, ImageOps.invert(mask), ANOTHER_PROMPT))
    for what, changed, another_picture, another_mask, limit in changes:
        moved = record(pipelines, changed, another_picture, another_mask)[1]
        require_moved(name, what, image, moved, limit)


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Soft shapes with some grain."""
    generator = numpy.random.default_rng(seed)
    x, y = numpy.meshgrid(numpy.linspace(0, 1, width), numpy.linspace(0, 1, height))
    waves = [numpy.sin(7 * (seed + 1) * x + phase) * numpy.cos(5 * y - 2 * phase) for phase in (0.0, 1.1, 2.5)]
    values = 127 + 90 * numpy.stack(waves, axis=-1) + generator.normal(0, 12, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(numpy.uint8))


def mask_of(width: int, height: int) -> Image.Image:
    """White where the picture is made anew: a slanted edge with values in between, and a hole."""
    x, y = numpy.meshgrid(numpy.arange(width), numpy.arange(height))
    values = (127 + 20 * (x + y / 2 - 0.6 * width)).clip(0, 255)
    values[height // 5 : height // 2, width * 3 // 4 :] = 0
    return Image.fromarray(values.astype(numpy.uint8))


# --- resizing ----------------------------------------------------------------------------------------------------------

RESIZED = [((40, 30), (40, 30)), ((40, 30), (17, 9)), ((40, 30), (64, 48)), ((40, 30), (1, 1)), ((40, 30), (7, 61))]
RESIZED += [((301, 3), (8, 8)), ((1, 50), (16, 16)), ((8, 8), (8, 5))]
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


def make_resample() -> None:
    tensors, facts = {}, []
    for name, resampling in FILTERS.items():
        for (width, height), size in RESIZED:
            colours = pattern(width * height * 3).reshape(height, width, 3)
            key = f"{name}.{width}x{height}.{size[0]}x{size[1]}"
            resized = Image.fromarray(colours).resize(size, resampling)
            tensors[key] = torch.from_numpy(numpy.array(resized))
            grey = Image.fromarray(colours[:, :, 0].copy()).resize(size, resampling)
            tensors[f"{key}.grey"] = torch.from_numpy(numpy.array(grey))
            facts.append({"filter": name, "from": [width, height], "to": list(size)})
    different = [key for key in tensors if key.startswith("lanczos") and ".40x30.40x30" not in key]
    moved = sum(not torch.equal(tensors[key], tensors[key.replace("lanczos", "bicubic")]) for key in different)
    require(moved >= len(different) - 2, f"edits resample: the filters differ in {moved} of {len(different)} pictures")
    write_golden(fresh_case("edits/resample"), {"reference": "PIL.Image.resize", "cases": facts}, tensors)


def pattern(count: int):
    """Values that no two neighbours share; the formula is that of the tests."""
    i = numpy.arange(count, dtype=numpy.int64)
    return ((i * 7919 + i * i % 251 * 13) % 256).astype(numpy.uint8)


# --- files -------------------------------------------------------------------------------------------------------------


def make_files() -> None:
    """Each file, and what PIL makes of it: RGB, turned as its EXIF data say, and its alpha."""
    folder = fresh_case("edits/files")
    colours = photo(24, 16, seed=5)
    grey, alpha = colours.convert("L"), mask_of(24, 16)
    rgba = colours.copy()
    rgba.putalpha(alpha)
    wide = numpy.array(colours).astype(numpy.uint16) * 256 + 200
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = colours.quantize(16)
    files = {
        "rgb.png": (colours, {}),
        "rgba.png": (rgba, {}),
        "grey.png": (grey, {}),
        "grey-alpha.png": (Image.merge("LA", (grey, alpha)), {}),
        "palette.png": (palette, {}),
        "palette-transparent.png": (palette, {"transparency": 3}),
        "bits.png": (grey.point(lambda value: 255 * (value > 127)).convert("1"), {}),
        "rgb.webp": (colours, {"lossless": True}),
        "rgba.webp": (rgba, {"lossless": True, "exact": True}),
        "lossy.webp": (colours, {"quality": 90}),
        "rgb.jpg": (colours, {"quality": 95, "subsampling": 0}),
        "grey.jpg": (grey, {"quality": 95}),
        "restarts.jpg": (colours, {"quality": 95, "subsampling": 0, "restart_marker_blocks": 1}),
        "progressive.jpg": (colours, {"quality": 95, "subsampling": 0, "progressive": True, "restart_marker_blocks": 1}),
        "turned.jpg": (colours, {"quality": 95, "subsampling": 0, "exif": turned}),
        "turned.png": (colours, {"exif": turned}),
    }
    tensors = {}
    for name, (picture, options) in files.items():
        picture.save(folder / name, **options)
        read = ImageOps.exif_transpose(Image.open(folder / name))
        tensors[name] = torch.from_numpy(numpy.array(read.convert("RGB")))
        if "A" in read.getbands() or "transparency" in read.info:
            tensors[f"{name}.alpha"] = torch.from_numpy(numpy.array(read.convert("RGBA"))[:, :, 3].copy())
    require(tensors["turned.jpg"].shape == (24, 16, 3), "edits files: a turned picture is as high as it was wide")
    write_wide_png(folder / "wide.png", wide)
    tensors["wide.png"] = torch.from_numpy((wide >> 8).astype(numpy.uint8))
    require(
        torch.equal(torch.from_numpy(numpy.array(Image.open(folder / "wide.png").convert("RGB"))), tensors["wide.png"]),
        "edits files: PIL keeps the upper eight of 16 bits",
    )
    refused = {"cmyk.jpg": (colours.convert("CMYK"), {}), "still.gif": (palette, {}), "other.bmp": (colours, {})}
    frames = {"save_all": True, "append_images": [photo(24, 16, seed=6)]}
    refused |= {name: (colours, frames) for name in ("animated.gif", "animated.png", "animated.webp")}
    refused["long.png"] = (Image.new("L", (65535, 1)), {})
    for name, (picture, options) in refused.items():
        picture.save(folder / name, **options)
    write_golden(folder, {"reference": "PIL.Image", "read": sorted(files) + ["wide.png"], "refused": sorted(refused)}, tensors)


def write_wide_png(path, values) -> None:
    """PIL writes no colours of 16 bits."""
    import struct
    import zlib

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
