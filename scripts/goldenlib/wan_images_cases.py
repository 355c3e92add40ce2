"""Wan2.1 image-to-video: a tiny pipeline that begins with a picture, and one that goes from a first picture to a last."""

import shutil
from pathlib import Path

import numpy
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from .common import fresh_case, normal, randomise, require, write_golden
from .diffusion import (
    ANOTHER_PROMPT,
    ANOTHER_SEED,
    Recorder,
    disturbed,
    dtypes,
    edit_json,
    quiet,
    require_moved,
    require_stable,
    require_visible,
    scale_output,
    to_u8,
)
from .solvers_cases import WAN
from .wan_cases import LATENT_CHANNELS, TRANSFORMER_WEIGHTS, check_prompts, save, umt5, vae

# Width and height: wide, high, smaller than what the encoder sees, and larger.
PICTURES = [(53, 37), (41, 90), (25, 19), (131, 77)]
# Latents, and beside them the mask of four frames and the latents of the pictures.
IN_CHANNELS = 2 * LATENT_CHANNELS + 4
# The pipeline takes so many rows for the text, whatever there are.
TEXT_ROWS = 512

I2V_RUNS = [
    {
        "prompt": "The lighthouse keeper counts the ships that pass in the night",
        "negative_prompt": "Rain, smoke and silence",
        "pictures": [0],
        "width": 80,
        "height": 48,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "seed": 42,
    },
    # No guidance, another aspect than the picture's.
    {
        "prompt": "바다 위로 붉은 해가 천천히 떠오른다",
        "negative_prompt": None,
        "pictures": [1],
        "width": 64,
        "height": 64,
        "num_frames": 17,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "seed": 2**31 + 12,
    },
    # One frame: nothing follows the picture.
    {
        "prompt": "The old clock in the tower rings seven times",
        "negative_prompt": None,
        "pictures": [2],
        "width": 48,
        "height": 32,
        "num_frames": 1,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "seed": 5,
    },
]
FLF_RUNS = [
    {
        "prompt": "Slow camera movement over a green valley",
        "negative_prompt": None,
        "pictures": [0, 3],
        "width": 64,
        "height": 48,
        "num_frames": 13,
        "num_inference_steps": 4,
        "guidance_scale": 5.5,
        "seed": 7,
    },
    {
        "prompt": "바다 위로 붉은 해가 천천히 떠오른다",
        "negative_prompt": "A Fresh Portrait",
        "pictures": [2, 1],
        "width": 32,
        "height": 80,
        "num_frames": 5,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "seed": 99,
    },
]


def make() -> None:
    quiet()
    make_case("wan-i2v", parts_i2v(), I2V_RUNS)
    make_case("wan-flf2v", parts_flf2v(), FLF_RUNS)


def make_case(name: str, parts: dict, runs: list) -> None:
    folder = fresh_case(name)
    checkpoint = folder / "checkpoint"
    publish(parts, checkpoint)
    pipeline = WanImageToVideoPipeline.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    pictures = [picture(i, size) for i, size in enumerate(PICTURES)]
    tensors = {f"picture{i}": torch.from_numpy(numpy.array(image)) for i, image in enumerate(pictures)}
    for i, run in enumerate(runs):
        check_prompts(pipeline, run)
        recorded, frames = record(pipeline, run, pictures)
        require_visible(f"{name} run {i}", frames)
        again = record(pipeline, run, pictures, latents=disturbed(recorded["noise"]))[1]
        require_stable(f"{name} run {i}", frames, again)
        check_sensitivity(f"{name} run {i}", pipeline, run, pictures, frames)
        tensors |= {f"run{i}.{key}": value for key, value in recorded.items()} | {f"run{i}.frames": frames}
    facts = {"reference": "diffusers.WanImageToVideoPipeline", "dtype": dtypes(checkpoint), "runs": runs}
    write_golden(folder, facts, tensors)


def record(pipeline, run: dict, pictures: list, **changes):
    """Tensors of the stages, and the clip as u8 [F, H, W, 3]."""
    run = run | changes
    chosen = [pictures[index] for index in run.pop("pictures")]
    last = chosen[1] if len(chosen) > 1 else None
    kept, answer = Recorder(pipeline).run(**run, image=chosen[0], last_image=last, max_sequence_length=TEXT_ROWS)
    # What the hook saw first are the noise and the condition side by side.
    noise, kept["condition"] = kept["noise"].split([LATENT_CHANNELS, IN_CHANNELS - LATENT_CHANNELS], dim=1)
    kept["noise"] = noise.contiguous()
    kept["condition"] = kept["condition"].contiguous()
    kept["image_embeds"] = pipeline.encode_image(chosen, None)
    return kept, to_u8(answer.frames[0])


def check_sensitivity(name: str, pipeline, run: dict, pictures: list, frames) -> None:
    changes = [
        ("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED),
        ("another prompt", {"prompt": "Rain drums on the tin roof."}, ANOTHER_PROMPT),
    ]
    for place in range(len(run["pictures"])):
        others = list(run["pictures"])
        others[place] = (others[place] + 1) % len(pictures)
        changes.append((f"another picture {place}", {"pictures": others}, ANOTHER_PROMPT))
    for what, change, limit in changes:
        require_moved(name, what, frames, record(pipeline, run | change, pictures)[1], limit)
    # The pictures enter in two ways, each of which is seen: here what the vision encoder says is of the other sign.
    encode = pipeline.encode_image
    pipeline.encode_image = lambda image, device=None: -encode(image, device)
    blind = record(pipeline, run, pictures)[1]
    pipeline.encode_image = encode
    require_moved(name, "other words of the vision encoder", frames, blind, ANOTHER_PROMPT)


# --- parts -----------------------------------------------------------------------------------------------------------


def parts_i2v() -> dict:
    """Exact gelu and patches that fit, as ViT-H/14; the VAE as published in all but its width."""
    return {
        "scheduler": UniPCMultistepScheduler(**WAN),
        "text_encoder": umt5(seed=41, width=32, heads=2, layers=2),
        "image_encoder": vision(seed=42, hidden_act="gelu", hidden_size=24, num_attention_heads=2, num_hidden_layers=3),
        "image_processor": processor(),
        "transformer": transformer(
            seed=43, num_attention_heads=2, attention_head_dim=12, text_dim=32, image_dim=24, ffn_dim=48, num_layers=2
        ),
        "vae": encodable(vae(
            seed=44, base_dim=3, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
        )),
    }


def parts_flf2v() -> dict:
    """Positions for both pictures; time halved at other levels of the VAE, whose decoder is wider than its encoder."""
    config = {"image_size": 32, "patch_size": 8}
    vision_encoder = vision(
        seed=52, hidden_act="quick_gelu", hidden_size=20, num_attention_heads=4, num_hidden_layers=2, **config
    )
    positions = 2 * (1 + (config["image_size"] // config["patch_size"]) ** 2)
    return {
        "scheduler": UniPCMultistepScheduler(**WAN | {"flow_shift": 5.0}),
        "text_encoder": umt5(seed=51, width=24, heads=3, layers=2),
        "image_encoder": vision_encoder,
        "image_processor": processor(config["image_size"]),
        "transformer": transformer(
            seed=53,
            num_attention_heads=2,
            attention_head_dim=16,
            text_dim=24,
            image_dim=20,
            ffn_dim=40,
            num_layers=2,
            pos_embed_seq_len=positions,
        ),
        "vae": encodable(vae(
            seed=54,
            base_dim=3,
            decoder_base_dim=4,
            dim_mult=[1, 2, 2, 3],
            num_res_blocks=1,
            temperal_downsample=[True, False, True],
        )),
    }


def vision(seed: int, image_size: int = 28, patch_size: int = 7, **config):
    model = CLIPVisionModel(
        CLIPVisionConfig(image_size=image_size, patch_size=patch_size, intermediate_size=36, projection_dim=16, **config)
    ).eval()
    randomise(model, seed)
    return model


def processor(side: int = 28) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def encodable(model):
    """The answers of the encoder as large as latents are."""
    generator = torch.Generator().manual_seed(1)
    video = 2 * torch.rand(1, 3, 5, 32, 32, generator=generator) - 1
    mean = model.encode(video).latent_dist.mean
    scale_output(model.quant_conv.weight, mean - mean.mean((0, 2, 3, 4), keepdim=True), std=2.0)
    return model


def transformer(seed: int, image_dim: int, **config):
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=IN_CHANNELS,
        out_channels=LATENT_CHANNELS,
        freq_dim=256,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=1024,
        image_dim=image_dim,
        added_kv_proj_dim=config["num_attention_heads"] * config["attention_head_dim"],
        **config,
    ).eval()
    randomise(model, seed, overrides=[*TRANSFORMER_WEIGHTS, ("pos_embed", lambda p, g: normal(p, g, 0.5))])
    generator = torch.Generator().manual_seed(seed)
    tokens = model.config.pos_embed_seq_len or 17
    outputs = model(
        hidden_states=torch.randn(1, IN_CHANNELS, 3, 6, 8, generator=generator),
        timestep=torch.tensor([700]),
        encoder_hidden_states=torch.randn(1, TEXT_ROWS, model.config.text_dim, generator=generator),
        encoder_hidden_states_image=torch.randn(1, tokens, image_dim, generator=generator)
        if model.config.pos_embed_seq_len is None
        else torch.randn(2, tokens // 2, image_dim, generator=generator),
        return_dict=False,
    )[0]
    scale_output(model.proj_out.weight, outputs, std=1.0)
    return model


def picture(index: int, size: tuple) -> Image.Image:
    """Soft shapes in strong colours."""
    width, height = size
    generator = torch.Generator().manual_seed(300 + index)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    values = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return Image.fromarray((values[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


# --- publishing ------------------------------------------------------------------------------------------------------


def publish(parts: dict, checkpoint: Path) -> None:
    """As Wan-AI published: the tokenizer from `spiece.model`, sharded text encoder and transformer."""
    save(parts, checkpoint, tokenizer_json=False, pipeline=WanImageToVideoPipeline)
    edit_json(checkpoint / "model_index.json", image_processor=["transformers", "CLIPImageProcessor"])
    for part in ("text_encoder", "transformer"):
        shutil.rmtree(checkpoint / part)
        parts[part].save_pretrained(checkpoint / part, max_shard_size="110KB")
    processors = list((checkpoint / "image_processor").glob("*.json"))
    require(len(processors) == 1, f"one file of the image processor: {processors}")
