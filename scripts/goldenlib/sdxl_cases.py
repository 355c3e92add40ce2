"""SDXL: two tiny pipelines in the published layout, one of them as a single file too, and pictures stage by stage."""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import tokenizers_cases as tokenizers
from .common import fresh_case, normal, randomise, require, write_golden
from .diffusion import (
    ANOTHER_PROMPT,
    ANOTHER_SEED,
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

LATENT_CHANNELS = 4
# As published with SDXL base 1.0.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "num_train_timesteps": 1000,
}
# Over 77 tokens; the second tokenizer has one of its own for "!".
LONG_PROMPT = (
    "A Golden Retriever runs through SHALLOW water! Waves splash; high above the desert a balloon drifts toward the "
    "evening. 우주 비행사가 달에서 말을 타고 있다!! The lighthouse keeper counts the ships that pass in the night."
)
A_RUNS = [
    {
        "prompt": "A small Boat crosses the QUIET lake!, 고양이 한 마리 😀",
        "negative_prompt": "Rain, smoke and silence",
        "width": 128,
        "height": 96,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "seed": 42,
    },
    # Latents of 9 x 15: halved to 5 x 8 and 3 x 4, and made larger again by less than two.
    {
        "prompt": LONG_PROMPT,
        "negative_prompt": None,
        "width": 120,
        "height": 72,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "seed": 2**33 + 3,
    },
    {
        "prompt": "A glass city under a violet sky",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "seed": 7,
    },
]
B_RUNS = [
    # No negative prompt, and no zeros for it.
    {
        "prompt": "A glass city   under a violet sky,\nseen from a High Bridge!",
        "negative_prompt": None,
        "width": 72,
        "height": 40,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "seed": 7,
    },
    # Without guidance.
    {
        "prompt": "Seven ships",
        "negative_prompt": None,
        "width": 40,
        "height": 56,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "seed": 1234567,
    },
]


def make() -> None:
    quiet()
    make_case("sdxl-a", a_parts(), publish_a, A_RUNS, force_zeros=True)
    make_case("sdxl-b", b_parts(), publish_b, B_RUNS, force_zeros=False)


def make_case(name: str, parts: dict, publish, runs, force_zeros: bool) -> None:
    folder = fresh_case(name)
    checkpoint = folder / "checkpoint"
    variant = publish(parts, checkpoint, force_zeros)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        checkpoint, dtype=torch.float32, variant=variant, local_files_only=True, add_watermarker=False
    )
    check_published(name, pipeline, parts)
    tensors, facts = {}, []
    for i, run in enumerate(runs):
        recorded, image = record(pipeline, run)
        require_visible(f"{name} run {i}", image)
        require_stable(f"{name} run {i}", image, record(pipeline, run | {"latents": disturbed(recorded["noise"])})[1])
        tensors |= {f"run{i}.{key}": value for key, value in recorded.items()} | {f"run{i}.image": image}
        check_sensitivity(f"{name} run {i}", pipeline, run, image)
        facts.append(run)
    write_golden(
        folder, {"reference": "diffusers.StableDiffusionXLPipeline", "dtype": dtypes(checkpoint), "runs": facts}, tensors
    )


def record(pipeline, run: dict):
    """Tensors of the stages, and the picture as u8 [H, W, 3]. `run` may have more of the pipeline's arguments."""
    pipeline.set_progress_bar_config(disable=True)
    run = dict(run)
    seed = run.pop("seed")
    generator = torch.Generator("cpu").manual_seed(seed)
    side = pipeline.vae_scale_factor
    shape = (1, LATENT_CHANNELS, run["height"] // side, run["width"] // side)
    kept = {"noise": torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))}

    def after(module, args, kwargs, output):
        # With guidance the negative branch is first.
        kept.setdefault("prediction0", output[0][-1:].clone())

    def step_end(pipeline, step, timestep, values):
        kept[f"latents{step}"] = values["latents"].clone()
        return values

    hook = pipeline.unet.register_forward_hook(after, with_kwargs=True)
    answer = pipeline(**run, output_type="np", callback_on_step_end=step_end, generator=generator)
    hook.remove()
    kept["timesteps"] = pipeline.scheduler.timesteps.float()
    kept["sigmas"] = pipeline.scheduler.sigmas.float()
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompt=run["prompt"], negative_prompt=run["negative_prompt"], prompt_2=run.get("prompt_2")
    )
    kept |= {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if run["guidance_scale"] > 1:
        kept |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    return kept, to_u8(answer.images[0])


def check_sensitivity(name: str, pipeline, run: dict, image) -> None:
    other = "Rain drums on the tin roof."
    size = (run["height"], run["width"])
    changes = [
        ("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED),
        ("another prompt", {"prompt": other}, ANOTHER_PROMPT),
        ("another prompt for the first encoder alone", {"prompt": other, "prompt_2": run["prompt"]}, ANOTHER_PROMPT),
        ("another prompt for the second encoder alone", {"prompt_2": other}, ANOTHER_PROMPT),
        ("another original size", {"original_size": (size[0] * 3, size[1] * 3)}, ANOTHER_PROMPT),
        ("width and height exchanged", {"target_size": (size[1], size[0] + 64)}, ANOTHER_PROMPT),
    ]
    if run["guidance_scale"] > 1:
        changes.append(("another guidance", {"guidance_scale": run["guidance_scale"] + 2.0}, ANOTHER_PROMPT))
        changes.append(("another negative prompt", {"negative_prompt": other}, ANOTHER_PROMPT))
        if pipeline.config.force_zeros_for_empty_prompt and run["negative_prompt"] in (None, ""):
            exchanged = "" if run["negative_prompt"] is None else None
            what = "an empty negative prompt instead of none, or none instead of an empty one"
            changes.append((what, {"negative_prompt": exchanged}, ANOTHER_PROMPT))
    for what, change, limit in changes:
        require_moved(name, what, image, record(pipeline, run | change)[1], limit)


# --- parts -----------------------------------------------------------------------------------------------------------


def a_parts() -> dict:
    """Three levels with SDXL's kinds of blocks and linear projections."""
    return {
        "scheduler": EulerDiscreteScheduler(**SCHEDULER),
        # As published: an end-of-text id of 2 that no prompt has, which means "the highest id".
        "text_encoder": clip(CLIPTextModel, seed=21, hidden=24, heads=4, hidden_act="quick_gelu", eos_token_id=2),
        "text_encoder_2": clip(
            CLIPTextModelWithProjection, seed=22, hidden=40, heads=5, hidden_act="gelu", projection_dim=36, eos_token_id=2
        ),
        "unet": unet(
            seed=23,
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 24, 32),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 1),
            attention_head_dim=(2, 3, 4),
            cross_attention_dim=64,
            use_linear_projection=True,
            norm_num_groups=8,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 36,
        ),
        "vae": vae(seed=24, channels=(8, 12, 16, 16), layers=1, scaling_factor=0.13025),
    }


def b_parts() -> dict:
    """Two levels, convolutions around the transformers, one count of heads, latents with mean and deviation."""
    end = tokenizers.clip_tables()[0]["<|endoftext|>"]
    return {
        "scheduler": EulerDiscreteScheduler(**SCHEDULER | {"timestep_spacing": "trailing"}),
        "text_encoder": clip(CLIPTextModel, seed=31, hidden=32, heads=2, hidden_act="quick_gelu", eos_token_id=end),
        "text_encoder_2": clip(
            CLIPTextModelWithProjection, seed=32, hidden=16, heads=2, hidden_act="gelu", projection_dim=20, eos_token_id=end
        ),
        "unet": unet(
            seed=33,
            sample_size=12,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(20, 40),
            layers_per_block=1,
            transformer_layers_per_block=2,
            attention_head_dim=2,
            cross_attention_dim=48,
            use_linear_projection=False,
            norm_num_groups=4,
            norm_eps=1e-6,
            addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=6 * 6 + 20,
        ),
        "vae": vae(
            seed=34,
            channels=(8, 12, 20),
            layers=2,
            scaling_factor=0.5,
            latents_mean=[-1.5, 0.25, 0.75, 2.0],
            latents_std=[0.8, 1.25, 1.5, 0.6],
        ),
    }


def clip(model_class, seed: int, hidden: int, heads: int, **fields):
    config = CLIPTextConfig(
        vocab_size=len(tokenizers.clip_tables()[0]),
        hidden_size=hidden,
        intermediate_size=3 * hidden + 4,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=tokenizers.CLIP_MAX_LENGTH,
        bos_token_id=0,
        pad_token_id=1,
        **fields,
    )
    model = model_class(config).eval()
    randomise(model, seed, gain=1.5, overrides=[("embedding.weight", lambda p, g: normal(p, g, 0.7))])
    return model


def unet(seed: int, **config):
    model = UNet2DConditionModel(
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, addition_embed_type="text_time", **config
    ).eval()
    randomise(
        model,
        seed,
        overrides=[
            ("add_embedding.linear_2.weight", lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)),
            ("attn2.to_out.0.weight", lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)),
        ],
    )
    generator = torch.Generator().manual_seed(seed)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    outputs = model(
        torch.randn(1, LATENT_CHANNELS, 12, 16, generator=generator),
        600,
        encoder_hidden_states=torch.randn(1, 77, config["cross_attention_dim"], generator=generator),
        added_cond_kwargs={
            "text_embeds": torch.randn(1, pooled, generator=generator),
            "time_ids": torch.tensor([[96.0, 128.0, 0.0, 0.0, 96.0, 128.0]]),
        },
        return_dict=False,
    )[0]
    scale_output(model.conv_out.weight, outputs, std=1.0)
    return model


def vae(seed: int, channels, layers: int, **fields):
    levels = len(channels)
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=layers,
        act_fn="silu",
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        force_upcast=True,
        **fields,
    ).eval()
    randomise(model, seed)
    latents = 20 * torch.randn(1, LATENT_CHANNELS, 8, 12, generator=torch.Generator().manual_seed(seed))
    scale_output(model.decoder.conv_out.weight, model.decode(latents, return_dict=False)[0], std=0.35)
    return model


# --- publishing ------------------------------------------------------------------------------------------------------


def publish_a(parts: dict, checkpoint: Path, force_zeros: bool) -> None:
    """Plain files, the UNet in bf16 and in shards."""
    for parameter in parts["unet"].parameters():
        parameter.copy_(parameter.bfloat16())
    save(parts, checkpoint, force_zeros)
    shutil.rmtree(checkpoint / "unet")
    copy.deepcopy(parts["unet"]).to(torch.bfloat16).save_pretrained(checkpoint / "unet", max_shard_size="600KB")
    return None


def publish_b(parts: dict, checkpoint: Path, force_zeros: bool) -> str:
    """Only the fp16 files (`*.fp16.safetensors`) of every part."""
    models = [part for name, part in parts.items() if name != "scheduler"]
    for model in models:
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
        model.half()
    save(parts, checkpoint, force_zeros, variant="fp16")
    for model in models:
        model.float()
    return "fp16"


def save(parts: dict, checkpoint: Path, force_zeros: bool, **options) -> None:
    """`save_pretrained`, with the tokenizer folders as they are published instead of as transformers 5 writes them."""
    checkpoint.mkdir()
    install_all(checkpoint)
    loaded = {name: CLIPTokenizer.from_pretrained(checkpoint / name) for name in ("tokenizer", "tokenizer_2")}
    require(loaded["tokenizer_2"].pad_token_id == 0, "the second tokenizer pads with !, which is token 0")
    StableDiffusionXLPipeline(
        **parts, **loaded, force_zeros_for_empty_prompt=force_zeros, add_watermarker=False
    ).save_pretrained(checkpoint, **options)
    install_all(checkpoint)


def install_all(checkpoint: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        folder = checkpoint / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tokenizers.install_clip(folder)
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        edit_json(checkpoint / "tokenizer_2" / file, pad_token="!")


def check_published(name: str, pipeline, parts: dict) -> None:
    for part, model in parts.items():
        if part == "scheduler":
            continue
        loaded = dict(getattr(pipeline, part).named_parameters())
        same = all(torch.equal(loaded[key], value) for key, value in model.named_parameters())
        require(same, f"{name}: {part} loads as it was saved")
    folder = Path(pipeline.config._name_or_path)
    files = [f for f in folder.glob("*/*.safetensors") if f.name.endswith(".fp16.safetensors")]
    require(len(files) == (4 if name == "sdxl-b" else 0), f"{name}: {len(files)} fp16 files")
    first = min(load_file(next((folder / "text_encoder").glob("*.safetensors"))))
    print(f"  {name}: CLIP names as {first}")
