"""FLUX.1: two tiny pipelines in the published layout, and pictures stage by stage."""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from . import tokenizers_cases as tokenizers
from .common import fresh_case, normal, randomise, require, write_golden
from .diffusion import (
    ANOTHER_PROMPT,
    ANOTHER_SEED,
    T5_WEIGHTS,
    Recorder,
    disturbed,
    dtypes,
    edit_json,
    quiet,
    rename_tensors,
    require_moved,
    require_stable,
    require_visible,
    scale_output,
    to_u8,
)
from .solvers_cases import FLUX_DEV, FLUX_SCHNELL

LATENT_CHANNELS = 16

LONG_PROMPT = (
    "A Golden Retriever runs through SHALLOW water, waves splashing; high above the desert a balloon drifts toward the "
    "evening. 우주 비행사가 달에서 말을 타고 있다. The lighthouse keeper counts the ships that pass in the night, and the "
    "old clock in the tower rings seven times: 7, 14, 21. 푸른 하늘 아래 노란 꽃이 피어 있다!"
)

DEV_RUNS = [
    {
        "prompt": "A small Boat crosses the QUIET lake, 고양이 한 마리 😀",
        "width": 128,
        "height": 80,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "seed": 42,
        "max_sequence_length": 48,
    },
    # Longer than CLIP's 77 tokens, and further than T5's longest exact distance.
    {
        "prompt": LONG_PROMPT,
        "width": 64,
        "height": 144,
        "num_inference_steps": 3,
        "guidance_scale": 1.5,
        "seed": 2**33 + 3,
        "max_sequence_length": 176,
    },
]
SCHNELL_RUNS = [
    {
        "prompt": "A glass city   under a violet sky,\nseen from a High Bridge.",
        "width": 72,
        "height": 40,
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
        "seed": 7,
        "max_sequence_length": 256,
    },
    # Longer than T5 may be here: cut, with the end token kept.
    {
        "prompt": LONG_PROMPT,
        "width": 40,
        "height": 56,
        "num_inference_steps": 1,
        "guidance_scale": 0.0,
        "seed": 1234567,
        "max_sequence_length": 24,
    },
]


def make() -> None:
    quiet()
    make_case("flux-dev", dev_parts(), publish_dev, DEV_RUNS)
    make_case("flux-schnell", schnell_parts(), publish_schnell, SCHNELL_RUNS)


def make_case(name: str, parts: dict, publish, runs) -> None:
    folder = fresh_case(name)
    checkpoint = folder / "checkpoint"
    publish(parts, checkpoint)
    pipeline = FluxPipeline.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    check_published(name, pipeline, parts)
    tensors, facts = {}, []
    for i, run in enumerate(runs):
        recorded, image = record(pipeline, run)
        require_visible(f"{name} run {i}", image)
        require_stable(f"{name} run {i}", image, record(pipeline, run | {"latents": disturbed(recorded["noise"])})[1])
        tensors |= {f"run{i}.{key}": value for key, value in recorded.items()} | {f"run{i}.image": image}
        check_sensitivity(f"{name} run {i}", pipeline, run, image)
        facts.append(run)
    write_golden(folder, {"reference": "diffusers.FluxPipeline", "dtype": dtypes(checkpoint), "runs": facts}, tensors)


def record(pipeline, run: dict):
    """Tensors of the stages, and the picture as u8 [H, W, 3]. `run` may have a `prompt_2` for T5 alone."""
    kept, answer = Recorder(pipeline).run(**run)
    embeds, pooled, _ = pipeline.encode_prompt(
        prompt=run["prompt"], prompt_2=run.get("prompt_2"), max_sequence_length=run["max_sequence_length"]
    )
    return kept | {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, to_u8(answer.images[0])


def check_sensitivity(name: str, pipeline, run: dict, image) -> None:
    other = "Rain drums on the tin roof."
    changes = [
        ("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED),
        ("another prompt", {"prompt": other}, ANOTHER_PROMPT),
        ("another prompt for CLIP alone", {"prompt": other, "prompt_2": run["prompt"]}, ANOTHER_PROMPT),
        ("another prompt for T5 alone", {"prompt_2": other}, ANOTHER_PROMPT),
    ]
    if pipeline.transformer.config.guidance_embeds:
        changes.append(("another guidance", {"guidance_scale": run["guidance_scale"] + 2.0}, ANOTHER_PROMPT))
    for what, change, limit in changes:
        require_moved(name, what, image, record(pipeline, run | change)[1], limit)


# --- parts -----------------------------------------------------------------------------------------------------------


def dev_parts() -> dict:
    """Four VAE levels, three heads of 12, guidance."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(**FLUX_DEV),
        # As published: an end-of-text id of 2 that no prompt has, which means "the highest id".
        "text_encoder": clip(seed=1, hidden=32, heads=4, eos_token_id=2),
        "text_encoder_2": t5(seed=2, width=40, heads=3, layers=2),
        "transformer": transformer(
            seed=3,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=12,
            num_attention_heads=3,
            axes_dims_rope=(2, 6, 4),
            joint_attention_dim=40,
            pooled_projection_dim=32,
            guidance_embeds=True,
        ),
        "vae": vae(seed=4, channels=(8, 12, 16, 16), layers=1),
    }


def schnell_parts() -> dict:
    """Three VAE levels, two heads of 16, no guidance."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(**FLUX_SCHNELL),
        "text_encoder": clip(seed=11, hidden=24, heads=2, eos_token_id=clip_id("<|endoftext|>")),
        "text_encoder_2": t5(seed=12, width=32, heads=5, layers=3),
        "transformer": transformer(
            seed=13,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=False,
        ),
        "vae": vae(seed=14, channels=(8, 12, 20), layers=2),
    }


def clip_id(token: str) -> int:
    return tokenizers.clip_tables()[0][token]


def clip(seed: int, hidden: int, heads: int, eos_token_id: int):
    config = CLIPTextConfig(
        vocab_size=len(tokenizers.clip_tables()[0]),
        hidden_size=hidden,
        intermediate_size=3 * hidden + 4,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=tokenizers.CLIP_MAX_LENGTH,
        hidden_act="quick_gelu",
        projection_dim=hidden,
        bos_token_id=0,
        eos_token_id=eos_token_id,
        pad_token_id=1,
    )
    model = CLIPTextModel(config).eval()
    randomise(model, seed, gain=1.5, overrides=[("embedding.weight", lambda p, g: normal(p, g, 0.7))])
    return model


def t5(seed: int, width: int, heads: int, layers: int):
    config = T5Config(
        vocab_size=640,
        d_model=width,
        d_kv=8,
        d_ff=52,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        tie_word_embeddings=False,
        is_encoder_decoder=True,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5EncoderModel(config).eval()
    randomise(model, seed, overrides=T5_WEIGHTS)
    return model


def transformer(seed: int, **config):
    model = FluxTransformer2DModel(patch_size=1, in_channels=4 * LATENT_CHANNELS, **config).eval()
    randomise(
        model,
        seed,
        overrides=[
            ("context_embedder.weight", lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)),
            ("text_embedder.linear_2.weight", lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)),
            ("norm1.linear.weight", lambda p, g: normal(p, g, 0.8 / p.shape[1] ** 0.5)),
            ("norm1_context.linear.weight", lambda p, g: normal(p, g, 0.8 / p.shape[1] ** 0.5)),
        ],
    )
    generator = torch.Generator().manual_seed(seed)
    text, latents = 32, torch.randn(1, 24, 4 * LATENT_CHANNELS, generator=generator)
    ids = torch.zeros(24, 3)
    ids[:, 1], ids[:, 2] = torch.arange(24) // 6, torch.arange(24) % 6
    outputs = model(
        hidden_states=latents,
        encoder_hidden_states=torch.randn(1, text, model.config.joint_attention_dim, generator=generator),
        pooled_projections=torch.randn(1, model.config.pooled_projection_dim, generator=generator),
        timestep=torch.tensor([0.7]),
        guidance=torch.tensor([3.5]) if config["guidance_embeds"] else None,
        img_ids=ids,
        txt_ids=torch.zeros(text, 3),
        return_dict=False,
    )[0]
    scale_output(model.proj_out.weight, outputs, std=1.0)
    return model


def vae(seed: int, channels, layers: int):
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
        scaling_factor=0.3611,
        shift_factor=0.1159,
        force_upcast=True,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    ).eval()
    randomise(model, seed)
    latents = 4 * torch.randn(1, LATENT_CHANNELS, 8, 12, generator=torch.Generator().manual_seed(seed))
    scale_output(model.decoder.conv_out.weight, model.decode(latents, return_dict=False)[0], std=0.35)
    return model


# --- publishing ------------------------------------------------------------------------------------------------------


def publish_dev(parts: dict, checkpoint: Path) -> None:
    """Sharded transformer and T5, `text_model.` before CLIP's names, `spiece.model`, `shared.weight` alone."""
    save(parts, checkpoint, t5_from_json=False)
    shutil.rmtree(checkpoint / "transformer")
    parts["transformer"].save_pretrained(checkpoint / "transformer", max_shard_size="250KB")
    shutil.rmtree(checkpoint / "text_encoder_2")
    parts["text_encoder_2"].save_pretrained(checkpoint / "text_encoder_2", max_shard_size="110KB")
    rename_tensors(checkpoint / "text_encoder/model.safetensors", lambda name: ["text_model." + bare(name)])
    edit_json(checkpoint / "model_index.json", image_encoder=None, feature_extractor=None)
    # transformers 4 wrote `torch_dtype`, and T5's configuration as it is for the whole model.
    edit_json(checkpoint / "text_encoder/config.json", dtype=None, torch_dtype="float32")
    whole = {"is_encoder_decoder": True, "tie_word_embeddings": False}
    edit_json(checkpoint / "text_encoder_2/config.json", dtype=None, torch_dtype="float32", **whole)


def publish_schnell(parts: dict, checkpoint: Path) -> None:
    """Single files, bare CLIP names, `tokenizer.json` for T5, T5's embedding under both names, a bf16 transformer."""
    for parameter in parts["transformer"].parameters():
        parameter.copy_(parameter.bfloat16())
    save(parts, checkpoint, t5_from_json=True)
    copy.deepcopy(parts["transformer"]).to(torch.bfloat16).save_pretrained(checkpoint / "transformer")
    rename_tensors(checkpoint / "text_encoder/model.safetensors", lambda name: [bare(name)])
    both = {"shared.weight": ["shared.weight", "encoder.embed_tokens.weight"]}
    rename_tensors(checkpoint / "text_encoder_2/model.safetensors", lambda name: both.get(name, [name]))


def bare(name: str) -> str:
    return name.removeprefix("text_model.")


def save(parts: dict, checkpoint: Path, t5_from_json: bool) -> None:
    """`save_pretrained`, with the tokenizer folders as they are published instead of as transformers 5 writes them."""
    checkpoint.mkdir()
    folders = {"tokenizer": tokenizers.install_clip, "tokenizer_2": lambda f: tokenizers.install_t5(f, t5_from_json)}
    install_all(folders, checkpoint)
    loaded = {
        "tokenizer": CLIPTokenizer.from_pretrained(checkpoint / "tokenizer"),
        "tokenizer_2": T5TokenizerFast.from_pretrained(checkpoint / "tokenizer_2"),
    }
    FluxPipeline(**parts, **loaded).save_pretrained(checkpoint)
    install_all(folders, checkpoint)
    edit_json(checkpoint / "model_index.json", tokenizer_2=["transformers", "T5TokenizerFast"])


def install_all(folders: dict, checkpoint: Path) -> None:
    for name, install in folders.items():
        shutil.rmtree(checkpoint / name, ignore_errors=True)
        (checkpoint / name).mkdir()
        install(checkpoint / name)


def check_published(name: str, pipeline, parts: dict) -> None:
    for part, model in parts.items():
        if part == "scheduler":
            continue
        loaded = dict(getattr(pipeline, part).named_parameters())
        same = all(torch.equal(loaded[key], value) for key, value in model.named_parameters())
        require(same, f"{name}: {part} loads as it was saved")
    shared = pipeline.text_encoder_2.shared.weight
    require(torch.equal(pipeline.text_encoder_2.encoder.embed_tokens.weight, shared), f"{name}: T5 embeds with shared")
    folder = Path(pipeline.config._name_or_path)
    clip_names = load_file(folder / "text_encoder/model.safetensors")
    prefixed = all(key.startswith("text_model.") for key in clip_names)
    require(prefixed == (name == "flux-dev"), f"{name}: CLIP names start with {min(clip_names)}")
    sharded = (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    require(sharded == (name == "flux-dev"), f"{name}: the transformer is {'' if sharded else 'not '}sharded")
