"""HunyuanVideo image-to-video: a tiny pipeline whose first frame is the picture, and one with the picture beside the latents."""

import numpy
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
)
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from tokenizers import AddedToken, Tokenizer

from . import tokenizers_cases as tokenizers
from .common import fresh_case, normal, randomise, require, write_golden
from .diffusion import (
    ANOTHER_PROMPT,
    ANOTHER_SEED,
    Recorder,
    disturbed,
    dtypes,
    edit_json,
    quiet,
    rename_tensors,
    require_loaded,
    require_moved,
    require_stable,
    require_visible,
    scale_output,
    to_u8,
)
from .flux_cases import clip
from .hunyuan_video_cases import save, transformer, vae
from .wan_images_cases import PICTURES, picture, processor

TOKEN_REPLACE, LATENT_CONCAT = "token_replace", "latent_concat"
# Frames that the pipeline drops of a clip with the picture beside the latents: the number of a run is what comes out.
DROPPED = 4
# What the template has as many places for as the vision encoder makes patches: 24 x 24.
SIDE, PATCH = 48, 2

A_RUNS = [
    {
        "prompt": "The lighthouse keeper counts the ships",
        "picture": 0,
        "width": 64,
        "height": 48,
        "num_frames": 21,
        "num_inference_steps": 3,
        "guidance_scale": 6.0,
        "seed": 42,
        "max_sequence_length": 280,
    },
    # The black picture of the negative prompt is told in more patches.
    {
        "prompt": "A Fresh Portrait, 고양이 한 마리",
        "negative_prompt": "Rain, smoke and silence",
        "true_cfg_scale": 3.0,
        "picture": 1,
        "width": 32,
        "height": 64,
        "num_frames": 5,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "seed": 7,
        "max_sequence_length": 240,
    },
    # One frame, and a prompt that is cut with its header.
    {
        "prompt": "The old clock in the tower rings seven times",
        "picture": 2,
        "width": 48,
        "height": 32,
        "num_frames": 1,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "seed": 5,
        "max_sequence_length": 200,
    },
]
B_RUNS = [
    {
        "prompt": "바다 위로 붉은 해가 떠오른다",
        "negative_prompt": "",
        "true_cfg_scale": 2.0,
        "picture": 3,
        "width": 48,
        "height": 32,
        "num_frames": 17,
        "num_inference_steps": 3,
        "guidance_scale": 0.0,
        "seed": 2**31 + 12,
        "max_sequence_length": 256,
    },
    {
        "prompt": "Slow camera movement",
        "picture": 0,
        "width": 32,
        "height": 48,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
        "seed": 3,
        "max_sequence_length": 256,
    },
]


def make() -> None:
    quiet()
    make_case("hunyuan-video-i2v", parts_a(), A_RUNS)
    make_case("hunyuan-video-i2v-33ch", parts_b(), B_RUNS)


def make_case(name: str, parts: dict, runs: list) -> None:
    folder = fresh_case(name)
    checkpoint = folder / "checkpoint"
    publish(name, parts, checkpoint)
    pipeline = HunyuanVideoImageToVideoPipeline.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    check_published(name, pipeline, parts)
    pictures = [picture(i, size) for i, size in enumerate(PICTURES)]
    tensors = {f"picture{i}": torch.from_numpy(numpy.array(image)) for i, image in enumerate(pictures)}
    for i, run in enumerate(runs):
        recorded, frames = record(pipeline, run, pictures)
        require_visible(f"{name} run {i}", frames)
        again = record(pipeline, run, pictures, latents=disturbed(recorded["noise"]))[1]
        require_stable(f"{name} run {i}", frames, again)
        check_sensitivity(f"{name} run {i}", pipeline, run, pictures, frames)
        tensors |= {f"run{i}.{key}": value for key, value in recorded.items()} | {f"run{i}.frames": frames}
    facts = {"reference": "diffusers.HunyuanVideoImageToVideoPipeline", "dtype": dtypes(checkpoint), "runs": runs}
    write_golden(folder, facts, tensors)


def record(pipeline, run: dict, pictures: list, **changes):
    """Tensors of the stages, and the clip as u8 [F, H, W, 3]. Embeddings of padding are left out."""
    run = run | changes
    image = pictures[run.pop("picture")]
    config = pipeline.transformer.config
    replaces = config.image_condition_type == TOKEN_REPLACE
    channels = pipeline.vae.config.latent_channels
    if not replaces:
        run["num_frames"] += DROPPED
    kept, answer = Recorder(pipeline).run(**run, image=image)
    begin = kept.pop("noise")
    kept["begin"] = begin[:, :channels].contiguous()
    generator = torch.Generator("cpu").manual_seed(run["seed"])
    kept["noise"] = torch.randn(kept["begin"].shape, generator=generator)
    if replaces:
        # The solver does not see it.
        kept["prediction0"][:, :, :1] = 0
    else:
        kept["behind"] = begin[:, channels:].contiguous()
    black = Image.new("RGB", (run["width"], run["height"]), 0)
    interleave = 4 if replaces else 2
    for part, of, every in (("", image, interleave), ("negative_", black, 2)):
        prompt = run.get(f"{part}prompt")
        if prompt is None:
            continue
        embeds, pooled, mask = pipeline.encode_prompt(
            of, prompt, max_sequence_length=run["max_sequence_length"], image_embed_interleave=every
        )
        kept[f"{part}prompt_embeds"] = embeds[:, : int(mask.sum())]
        kept[f"{part}pooled_prompt_embeds"] = pooled
    return kept, to_u8(answer.frames[0])


def check_sensitivity(name: str, pipeline, run: dict, pictures: list, frames) -> None:
    changes = [
        ("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED),
        ("another prompt", {"prompt": "Rain drums on the tin roof."}, ANOTHER_PROMPT),
        ("another picture", {"picture": (run["picture"] + 1) % len(pictures)}, ANOTHER_PROMPT),
    ]
    if "true_cfg_scale" in run:
        changes.append(("another negative prompt", {"negative_prompt": "Fresh paint, open windows."}, ANOTHER_PROMPT))
    if pipeline.transformer.config.guidance_embeds and run["num_frames"] > 1:
        changes.append(("another guidance", {"guidance_scale": run["guidance_scale"] + 2.0}, ANOTHER_PROMPT))
    # A single frame whose latents are the picture's knows of nothing else.
    still = pipeline.transformer.config.image_condition_type == TOKEN_REPLACE and run["num_frames"] == 1
    for what, change, limit in changes:
        if not still or "picture" in change:
            require_moved(name, what, frames, record(pipeline, run | change, pictures)[1], limit)
    if still:
        return
    # The picture enters in two ways, each of which is seen: here what the language model sees is of the other sign.
    projector = pipeline.text_encoder.model.multi_modal_projector.linear_2
    projector.weight.neg_()
    blind = record(pipeline, run, pictures)[1]
    projector.weight.neg_()
    require_moved(name, "other words of the vision encoder", frames, blind, ANOTHER_PROMPT)


# --- parts -----------------------------------------------------------------------------------------------------------


def parts_a() -> dict:
    """The first frame is the picture; guidance; the VAE as published in all but its widths."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": llava(seed=61, width=24, heads=2, layers=4, vision_width=16, vision_layers=3),
        "text_encoder_2": clip(seed=62, hidden=24, heads=2, eos_token_id=2),
        "image_processor": processor(SIDE),
        "transformer": transformer(
            seed=63,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            rope_axes_dim=(2, 6, 4),
            text_embed_dim=24,
            pooled_projection_dim=24,
            guidance_embeds=True,
            image_condition_type=TOKEN_REPLACE,
        ),
        "vae": encodable(vae(seed=64, block_out_channels=(4, 8, 8, 12), layers_per_block=1, norm_num_groups=4)),
    }


def parts_b() -> dict:
    """The picture and a mask behind the latents' channels; no guidance; a VAE of three levels."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": llava(seed=71, width=32, heads=4, layers=3, vision_width=20, vision_layers=2),
        "text_encoder_2": clip(seed=72, hidden=24, heads=2, eos_token_id=2),
        "image_processor": processor(SIDE),
        "transformer": transformer(
            seed=73,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=2,
            rope_axes_dim=(4, 4, 4),
            text_embed_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=False,
            image_condition_type=LATENT_CONCAT,
            in_channels=17,
            out_channels=8,
        ),
        "vae": encodable(
            vae(seed=74, block_out_channels=(4, 8, 12), layers_per_block=1, norm_num_groups=4, latent_channels=8)
        ),
    }


def llava(seed: int, width: int, heads: int, layers: int, vision_width: int, vision_layers: int):
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width + 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
    )
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=2 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
    )
    image, pad = token_ids()
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, pad_token_id=pad)
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model, seed, gain=1.3, overrides=[("embed_tokens.weight", lambda p, g: normal(p, g, 1.0))])
    return model


def encodable(model):
    """The answers of the encoder as large as latents are."""
    generator = torch.Generator().manual_seed(1)
    video = 2 * torch.rand(1, 3, 1, 32, 32, generator=generator) - 1
    mean = model.encode(video).latent_dist.mean
    scale_output(model.quant_conv.weight, mean - mean.mean((0, 2, 3, 4), keepdim=True), std=2.0)
    return model


# --- publishing ------------------------------------------------------------------------------------------------------


def tokenizer_json() -> str:
    """That of Llama 3 with a token for a picture."""
    backend = Tokenizer.from_str(tokenizers.llama_backend())
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    return backend.to_str(pretty=False)


def token_ids() -> tuple:
    backend = Tokenizer.from_str(tokenizer_json())
    return backend.token_to_id("<image>"), backend.token_to_id("<|end_of_text|>")


def install_llava(folder) -> None:
    tokenizers.install_llama(folder, pad_token="<|end_of_text|>", padding_side="right")
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")


def publish(name: str, parts: dict, checkpoint) -> None:
    """The text encoder's tensors under the names of transformers 4, and under those of 5."""
    save(parts, checkpoint, pipeline=HunyuanVideoImageToVideoPipeline, install=install_llava)
    edit_json(checkpoint / "model_index.json", image_processor=["transformers", "CLIPImageProcessor"])
    file = checkpoint / "text_encoder/model.safetensors"
    if name == "hunyuan-video-i2v":
        rename_tensors(file, lambda tensor: [tensor.replace("vision_tower.", "vision_tower.vision_model.")])
    else:
        rename_tensors(file, as_in_memory)
    processors = list((checkpoint / "image_processor").glob("*.json"))
    require(len(processors) == 1, f"one file of the image processor: {[file.name for file in processors]}")


def as_in_memory(tensor: str) -> list:
    """The names of transformers 5, which writes those of 4."""
    if tensor == "language_model.lm_head.weight":
        return ["lm_head.weight"]
    return ["model." + tensor.replace("language_model.model.", "language_model.")]


def check_published(name: str, pipeline, parts: dict) -> None:
    require_loaded(name, pipeline, parts, ("text_encoder", "text_encoder_2", "transformer", "vae"))
    require(pipeline.tokenizer.padding_side == "right", f"{name}: the tokenizer pads behind the prompt")
