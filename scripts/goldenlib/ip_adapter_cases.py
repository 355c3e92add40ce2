"""IP-Adapter over the UNet of `sdxl-a`: a base and a plus adapter, each with a vision encoder of its own."""

import numpy
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from .common import ROOT, fresh_case, psnr, randomise, read_json, require, write_golden
from .diffusion import ANOTHER_PROMPT, disturbed, quiet, require_moved, require_stable, require_visible
from .sdxl_cases import record

CHECKPOINT = ROOT / "sdxl-a" / "checkpoint"
# Wide, high, smaller than what the encoders see, and larger.
PICTURES = [(53, 37), (41, 90), (9, 7), (131, 77)]
# Of a resampler's heads, in every published adapter.
HEAD_DIM = 64
PROMPT = "A Golden Retriever crosses the quiet lake"
RUNS = [
    {"adapter": "base", "scale": 1.0, "references": [0], "negative_prompt": "Rain and smoke", "seed": 3},
    {"adapter": "base", "scale": 0.5, "references": [1, 3], "negative_prompt": None, "seed": 2**33 + 1},
    {"adapter": "plus", "scale": 1.0, "references": [1], "negative_prompt": "", "seed": 5},
    {"adapter": "plus", "scale": 0.5, "references": [2, 0, 3], "negative_prompt": None, "seed": 6},
    # Without guidance.
    {"adapter": "plus", "scale": 0.75, "references": [3], "negative_prompt": None, "guidance_scale": 1.0, "seed": 7},
]


def make() -> None:
    quiet()
    folder = fresh_case("ip-adapter")
    unet = read_json(CHECKPOINT / "unet" / "config.json")
    pictures = [picture(i, size) for i, size in enumerate(PICTURES)]
    tensors = {f"picture{i}": torch.from_numpy(numpy.array(image)) for i, image in enumerate(pictures)}
    publish_base(folder / "base", unet)
    publish_plus(folder / "plus", unet)
    plain = pipeline_of(None)
    facts = []
    for i, run in enumerate(RUNS):
        run = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 5.0} | run
        name = f"ip-adapter run {i}"
        pipeline = pipeline_of(folder / run["adapter"])
        kept, image = make_picture(pipeline, run, pictures)
        tensors |= {f"run{i}.{key}": kept[key] for key in ("noise", "prediction0")} | {f"run{i}.image": image}
        tensors |= stages(pipeline, [pictures[k] for k in run["references"]], f"run{i}.")
        require_visible(name, image)
        noise = {"latents": disturbed(kept["noise"])}
        require_stable(name, image, make_picture(pipeline, run | noise, pictures)[1])
        check_sensitivity(name, pipeline, plain, run, pictures, image)
        facts.append(run)
    for adapter in ("base", "plus"):
        processor = pipeline_of(folder / adapter).feature_extractor
        for i, image in enumerate(pictures):
            tensors[f"{adapter}.pixel_values{i}"] = processor(image, return_tensors="pt").pixel_values
    reference = "diffusers.StableDiffusionXLPipeline with load_ip_adapter"
    write_golden(folder, {"reference": reference, "checkpoint": "sdxl-a", "runs": facts}, tensors)


def make_picture(pipeline, run: dict, pictures):
    """As `record`, with the adapter where the run has one."""
    run = dict(run)
    adapter, scale, references = run.pop("adapter"), run.pop("scale"), run.pop("references")
    if adapter is not None:
        pipeline.set_ip_adapter_scale(scale)
        run["ip_adapter_image"] = [[pictures[i] for i in references]]
    return record(pipeline, run)


def stages(pipeline, references, prefix: str) -> dict:
    """What the encoder says of the pictures, and the tokens of both branches."""
    projection = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    is_plus = not isinstance(projection, ImageProjection)
    positive, negative = pipeline.encode_image(references, "cpu", 1, is_plus)
    joined = {"tokens": positive, "negative_tokens": negative}
    width = pipeline.unet.config.cross_attention_dim
    tokens = {f"{prefix}{key}": projection(value).reshape(1, -1, width) for key, value in joined.items()}
    return tokens | {f"{prefix}image_embeds": positive}


def check_sensitivity(name: str, pipeline, plain, run: dict, pictures, image) -> None:
    other = next(i for i in range(len(pictures)) if i not in run["references"])
    changes = [
        ("another picture", {"references": [other] + run["references"][1:]}),
        ("one picture more", {"references": run["references"] + [other]}),
        ("another scale", {"scale": run["scale"] - 0.4}),
        ("no adapter", {"scale": 0.0}),
    ]
    for what, change in changes:
        require_moved(name, what, image, make_picture(pipeline, run | change, pictures)[1], ANOTHER_PROMPT)
    nothing = make_picture(pipeline, run | {"scale": 0.0}, pictures)[1]
    without = make_picture(plain, run | {"adapter": None}, pictures)[1]
    require(torch.equal(nothing, without), f"{name}: scale 0 is the picture without an adapter")
    swapped = make_picture(pipeline, run | {"references": run["references"][::-1]}, pictures)[1]
    require(psnr(image, swapped) > 60, f"{name}: the order of the pictures does not matter")
    if run["guidance_scale"] > 1:
        embeds = pipeline.prepare_ip_adapter_image_embeds(
            [[pictures[i] for i in run["references"]]], None, "cpu", 1, True
        )
        pipeline.set_ip_adapter_scale(run["scale"])
        same = [torch.cat([embeds[0][1:], embeds[0][1:]])]
        arguments = {k: v for k, v in run.items() if k not in ("adapter", "scale", "references")}
        moved = record(pipeline, arguments | {"ip_adapter_image_embeds": same})[1]
        require_moved(name, "the picture in the negative branch too", image, moved, ANOTHER_PROMPT)


def pipeline_of(adapter):
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        CHECKPOINT, dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    if adapter is not None:
        if (adapter / "image_encoder" / "preprocessor_config.json").exists():
            extractor = CLIPImageProcessor.from_pretrained(adapter / "image_encoder")
            pipeline.register_modules(feature_extractor=extractor)
        pipeline.load_ip_adapter(str(adapter), subfolder="", weight_name="ip-adapter_sdxl.safetensors")
    return pipeline


def picture(seed: int, size) -> Image.Image:
    """Waves of several lengths with sharp edges between them."""
    width, height = size
    generator = numpy.random.default_rng(seed)
    y, x = numpy.mgrid[0:height, 0:width] / max(size)
    channels = []
    for _ in range(3):
        a, b, c, d = generator.uniform(2, 25, 4)
        wave = numpy.sin(a * x + b * y) + numpy.sin(c * x - d * y) + numpy.sign(numpy.sin(b * x * y * 8))
        channels.append((wave + 3) / 6 * 255)
    return Image.fromarray(numpy.stack(channels, 2).round().astype("uint8"))


# --- publishing ------------------------------------------------------------------------------------------------------


def publish_base(folder, unet: dict) -> None:
    """As published for ViT-bigG: the exact gelu, patches that fit, the class's own processor."""
    encoder = vision(41, hidden=24, heads=3, layers=2, image=30, patch=10, hidden_act="gelu", projection_dim=20)
    publish_encoder(folder, encoder.half())
    text = unet["cross_attention_dim"]
    shapes = {"proj.weight": (4 * text, 20), "proj.bias": (4 * text,), "norm.weight": (text,), "norm.bias": (text,)}
    publish_adapter(folder, unet, shapes, seed=42)


def publish_plus(folder, unet: dict) -> None:
    """A resampler of two heads; patches that leave a rest; a processor of its own."""
    encoder = vision(51, hidden=16, heads=2, layers=3, image=28, patch=8, hidden_act="quick_gelu", projection_dim=12)
    publish_encoder(folder, encoder.half())
    values = {"size": {"shortest_edge": 33}, "crop_size": {"height": 28, "width": 28}}
    values |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2]}
    CLIPImageProcessor(**values).save_pretrained(folder / "image_encoder")
    hidden, inner, queries = 24, 2 * HEAD_DIM, 6
    shapes = {
        "latents": (1, queries, hidden),
        "proj_in.weight": (hidden, 16),
        "proj_in.bias": (hidden,),
        "proj_out.weight": (unet["cross_attention_dim"], hidden),
        "proj_out.bias": (unet["cross_attention_dim"],),
        "norm_out.weight": (unet["cross_attention_dim"],),
        "norm_out.bias": (unet["cross_attention_dim"],),
    }
    for i in range(4):
        shapes |= {f"layers.{i}.0.{norm}.{part}": (hidden,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        shapes |= {
            f"layers.{i}.0.to_q.weight": (inner, hidden),
            f"layers.{i}.0.to_kv.weight": (2 * inner, hidden),
            f"layers.{i}.0.to_out.weight": (hidden, inner),
            f"layers.{i}.1.0.weight": (hidden,),
            f"layers.{i}.1.0.bias": (hidden,),
            f"layers.{i}.1.1.weight": (4 * hidden, hidden),
            f"layers.{i}.1.3.weight": (hidden, 4 * hidden),
        }
    publish_adapter(folder, unet, shapes, seed=52)


def vision(seed: int, hidden: int, heads: int, layers: int, image: int, patch: int, **fields):
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden + 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
        **fields,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    randomise(model, seed, gain=1.5)
    return model


def publish_encoder(folder, model) -> None:
    model.save_pretrained(folder / "image_encoder")
    names = load_file(folder / "image_encoder" / "model.safetensors")
    require("vision_model.pre_layrnorm.weight" in names, f"{folder.name}: the encoder has its published names")


def publish_adapter(folder, unet: dict, projection: dict, seed: int) -> None:
    """The original names and dtype: `image_proj.*`, and `ip_adapter.N.*` for N of 1, 3, 5, ..."""
    shapes = {f"image_proj.{name}": shape for name, shape in projection.items()}
    for i, channels in enumerate(attention_widths(unet)):
        shapes |= {f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight": (channels, unet["cross_attention_dim"]) for part in "kv"}
    module = torch.nn.Module()
    for name, shape in shapes.items():
        # Parameters may not have dots in their names.
        module.register_parameter(name.replace(".", "/"), torch.nn.Parameter(torch.empty(shape)))
    randomise(module, seed)
    tensors = {name.replace("/", "."): value.detach().half() for name, value in module.named_parameters()}
    save_file(tensors, folder / "ip-adapter_sdxl.safetensors", metadata={"format": "pt"})


def attention_widths(unet: dict) -> list:
    """Channels of each attention over the text, in the order of `attn_processors`: down, up, middle."""
    widths, depths = unet["block_out_channels"], unet["transformer_layers_per_block"]
    layers = unet["layers_per_block"]
    down = [(w, d, layers) for w, d, block in zip(widths, depths, unet["down_block_types"]) if "CrossAttn" in block]
    mirrored = zip(widths[::-1], depths[::-1], unet["up_block_types"])
    up = [(w, d, layers + 1) for w, d, block in mirrored if "CrossAttn" in block]
    return [w for w, d, count in down + up + [(widths[-1], depths[-1], 1)] for _ in range(d * count)]
