"""HunyuanVideo text-to-video: two tiny pipelines in the published layout, and clips stage by stage."""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from . import tokenizers_cases as tokenizers
from .common import fresh_case, normal, psnr, randomise, require, write_golden
from .diffusion import (
    ANOTHER_PROMPT,
    ANOTHER_SEED,
    Recorder,
    disturbed,
    dtypes,
    edit_json,
    quiet,
    require_loaded,
    require_moved,
    require_stable,
    require_visible,
    scale_output,
    to_u8,
)
from .flux_cases import clip, clip_id, install_all

# Tokens of the template with an empty prompt: the crop of 95 leaves most of them, since this tokenizer is a small one.
TEMPLATE_LENGTH = 267

A_RUNS = [
    # Two stretches of time, the second of them short; cut among the prompt's words.
    {
        "prompt": "A small Boat crosses the QUIET lake, 고양이 한 마리 😀",
        "width": 64,
        "height": 48,
        "num_frames": 21,
        "num_inference_steps": 3,
        "guidance_scale": 6.0,
        "seed": 42,
        "max_sequence_length": 200,
    },
    # One stretch, and a second prediction a step.
    {
        "prompt": "The lighthouse keeper counts the ships that pass in the night",
        "negative_prompt": "Rain, smoke and silence",
        "true_cfg_scale": 3.0,
        "width": 48,
        "height": 80,
        "num_frames": 13,
        "num_inference_steps": 4,
        "guidance_scale": 1.5,
        "seed": 2**31 + 11,
        "max_sequence_length": 256,
    },
]
B_RUNS = [
    # Three stretches, the last of them short; the language model is cut before the prompt, so that CLIP alone reads it.
    {
        "prompt": "바다 위로 붉은 해가 천천히 떠오른다. Slow camera movement over a green valley {0} 100%",
        "width": 32,
        "height": 48,
        "num_frames": 29,
        "num_inference_steps": 2,
        "guidance_scale": 0.0,
        "seed": 7,
        "max_sequence_length": 160,
    },
    # A single frame.
    {
        "prompt": "A red balloon",
        "negative_prompt": "",
        "true_cfg_scale": 2.0,
        "width": 80,
        "height": 32,
        "num_frames": 1,
        "num_inference_steps": 5,
        "guidance_scale": 0.0,
        "seed": 99,
        "max_sequence_length": 300,
    },
]

TRANSFORMER_WEIGHTS = [
    ("context_embedder.proj_in.weight", lambda p, g: normal(p, g, 3.0 / p.shape[1] ** 0.5)),
    ("time_text_embed.text_embedder.linear_2.weight", lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)),
    ("guidance_embedder.linear_2.weight", lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)),
    ("norm1.linear.weight", lambda p, g: normal(p, g, 0.8 / p.shape[1] ** 0.5)),
    ("norm1_context.linear.weight", lambda p, g: normal(p, g, 0.8 / p.shape[1] ** 0.5)),
    # The prompt's tokens are few among those of the template.
    ("add_q_proj.weight", lambda p, g: normal(p, g, 1.5 / p.shape[1] ** 0.5)),
    ("add_k_proj.weight", lambda p, g: normal(p, g, 1.5 / p.shape[1] ** 0.5)),
    ("add_v_proj.weight", lambda p, g: normal(p, g, 4.0 / p.shape[1] ** 0.5)),
    ("norm_added_k.weight", lambda p, g: normal(p, g, 0.5, mean=3.0)),
]


def make() -> None:
    quiet()
    make_case("hunyuan-video-a", parts_a(), publish_a, A_RUNS)
    make_case("hunyuan-video-b", parts_b(), publish_b, B_RUNS)


def make_case(name: str, parts: dict, publish, runs) -> None:
    folder = fresh_case(name)
    checkpoint = folder / "checkpoint"
    publish(parts, checkpoint)
    pipeline = HunyuanVideoPipeline.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    check_published(name, pipeline, parts)
    tensors = {}
    for i, run in enumerate(runs):
        recorded, frames = record(pipeline, run)
        require_visible(f"{name} run {i}", frames)
        require_stable(f"{name} run {i}", frames, record(pipeline, run | {"latents": disturbed(recorded["noise"])})[1])
        tensors |= {f"run{i}.{key}": value for key, value in recorded.items()} | {f"run{i}.frames": frames}
        check_sensitivity(f"{name} run {i}", pipeline, run, recorded, frames)
    facts = {"reference": "diffusers.HunyuanVideoPipeline", "dtype": dtypes(checkpoint), "runs": runs}
    write_golden(folder, facts, tensors)


def record(pipeline, run: dict):
    """Tensors of the stages, and the clip as u8 [F, H, W, 3]. Embeddings of padding are left out."""
    kept, answer = Recorder(pipeline).run(**run)
    for part in ("", "negative_"):
        prompt = run.get(f"{part}prompt")
        if prompt is None:
            continue
        embeds, pooled, mask = pipeline.encode_prompt(prompt, max_sequence_length=run["max_sequence_length"])
        kept[f"{part}prompt_embeds"] = embeds[:, : int(mask.sum())]
        kept[f"{part}pooled_prompt_embeds"] = pooled
    return kept, to_u8(answer.frames[0])


def check_sensitivity(name: str, pipeline, run: dict, recorded, frames) -> None:
    other = "Rain drums on the tin roof."
    changes = [
        ("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED),
        ("another prompt", {"prompt": other}, ANOTHER_PROMPT),
        ("another prompt for CLIP alone", embeds_of(pipeline, run, run["prompt"], other), ANOTHER_PROMPT),
    ]
    if recorded["prompt_embeds"].shape[1] > TEMPLATE_LENGTH - 95:
        changes.append(
            ("another prompt for the language model", embeds_of(pipeline, run, other, run["prompt"]), ANOTHER_PROMPT)
        )
    told = embeds_of(pipeline, run, run["prompt"], run["prompt"])
    if not told["prompt_attention_mask"].all():
        told["prompt_attention_mask"] = torch.ones_like(told["prompt_attention_mask"])
        changes.append(("padding that is looked at", told, ANOTHER_PROMPT))
    if pipeline.transformer.config.guidance_embeds:
        changes.append(("another guidance", {"guidance_scale": run["guidance_scale"] + 2.0}, ANOTHER_PROMPT))
    if "true_cfg_scale" in run:
        changes.append(("no true CFG", {"true_cfg_scale": 1.0}, ANOTHER_PROMPT))
        changes.append(("another true CFG scale", {"true_cfg_scale": run["true_cfg_scale"] + 2.0}, ANOTHER_PROMPT))
        changes.append(("another negative prompt", {"negative_prompt": "Fresh paint, open windows."}, ANOTHER_PROMPT))
    for what, change, limit in changes:
        require_moved(name, what, frames, record_changed(pipeline, run, change), limit)
    check_stretches(name, pipeline, recorded, frames)


def embeds_of(pipeline, run: dict, prompt: str, prompt_of_clip: str) -> dict:
    """Arguments for a run that is told one prompt by each encoder."""
    length = run["max_sequence_length"]
    embeds, _, mask = pipeline.encode_prompt(prompt, max_sequence_length=length)
    _, pooled, _ = pipeline.encode_prompt(prompt_of_clip, max_sequence_length=length)
    return {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}


def record_changed(pipeline, run: dict, change: dict):
    return to_u8(Recorder(pipeline).run(**run | change)[1].frames[0])


def check_stretches(name: str, pipeline, recorded, frames) -> None:
    """That the clip is decoded in stretches of time that are blended, and that frames know of those before them."""
    last = max((key for key in recorded if key.startswith("latents")), key=lambda key: int(key.removeprefix("latents")))
    latents = recorded[last] / pipeline.vae.config.scaling_factor

    def decode(latents, **settings):
        vae = copy.copy(pipeline.vae)
        for key, value in settings.items():
            setattr(vae, key, value)
        video = pipeline.video_processor.postprocess_video(vae.decode(latents, return_dict=False)[0], output_type="np")
        return to_u8(video[0])

    require(torch.equal(decode(latents), frames), f"{name}: the clip is the decoded last latents")
    if len(frames) > 1:
        still = psnr(frames[1:], frames[:-1])
        require(still < ANOTHER_SEED, f"{name}: one frame to the next is {still:.1f} dB")
        alone = decode(latents[:, :, -2:])[-4:]
        distance = psnr(frames[-4:], alone)
        require(distance < ANOTHER_PROMPT, f"{name}: without the latent frames before, {distance:.1f} dB")
    if len(frames) > 16:
        distance = psnr(frames, decode(latents, use_framewise_decoding=False))
        require(distance < ANOTHER_PROMPT, f"{name}: decoded as a whole, {distance:.1f} dB")


# --- parts -----------------------------------------------------------------------------------------------------------


def parts_a() -> dict:
    """Two heads of 12 with guidance, two refiner layers; the VAE as published in all but its widths."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": llama(seed=41, width=32, heads=4, key_value_heads=2, layers=4),
        "text_encoder_2": clip(seed=42, hidden=24, heads=2, eos_token_id=2),
        "transformer": transformer(
            seed=43,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=2,
            rope_axes_dim=(2, 6, 4),
            text_embed_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=True,
        ),
        "vae": vae(seed=44, block_out_channels=(4, 8, 8, 12), layers_per_block=1, norm_num_groups=4),
    }


def parts_b() -> dict:
    """Two heads of 16, no guidance, one latent a patch, other ratios, axes and base; a VAE of three levels."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": llama(seed=51, width=24, heads=3, key_value_heads=3, layers=3),
        "text_encoder_2": clip(seed=52, hidden=32, heads=4, eos_token_id=clip_id("<|endoftext|>")),
        "transformer": transformer(
            seed=53,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.5,
            patch_size=1,
            rope_axes_dim=(4, 4, 8),
            rope_theta=100.0,
            text_embed_dim=24,
            pooled_projection_dim=32,
            guidance_embeds=False,
            in_channels=8,
            out_channels=8,
        ),
        "vae": vae(
            seed=54,
            block_out_channels=(8, 12, 16),
            layers_per_block=2,
            norm_num_groups=2,
            latent_channels=8,
            scaling_factor=0.7,
            mid_block_add_attention=False,
        ),
    }


def llama(seed: int, width: int, heads: int, key_value_heads: int, layers: int):
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=2 * width + 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
    )
    model = LlamaModel(config).eval()
    randomise(model, seed, gain=1.3, overrides=[("embed_tokens.weight", lambda p, g: normal(p, g, 1.0))])
    return model


def transformer(seed: int, **config):
    model = HunyuanVideoTransformer3DModel(**config).eval()
    randomise(model, seed, overrides=TRANSFORMER_WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    outputs = model(
        hidden_states=torch.randn(1, model.config.in_channels, 3, 6, 8, generator=generator),
        timestep=torch.tensor([700.0]),
        encoder_hidden_states=torch.randn(1, 20, model.config.text_embed_dim, generator=generator),
        encoder_attention_mask=torch.ones(1, 20),
        pooled_projections=torch.randn(1, model.config.pooled_projection_dim, generator=generator),
        guidance=torch.tensor([6000.0]) if model.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    scale_output(model.proj_out.weight, outputs, std=1.0)
    return model


def vae(seed: int, **config):
    levels = len(config["block_out_channels"])
    model = AutoencoderKLHunyuanVideo(
        down_block_types=("HunyuanVideoDownBlock3D",) * levels,
        up_block_types=("HunyuanVideoUpBlock3D",) * levels,
        **config,
    ).eval()
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    latents = 1.5 * torch.randn(1, model.config.latent_channels, 3, 6, 8, generator=generator)
    outputs = model.decode(latents, return_dict=False)[0]
    scale_output(
        model.decoder.conv_out.conv.weight, outputs - outputs.mean((0, 2, 3, 4), keepdim=True), std=0.35
    )
    return model


# --- publishing ------------------------------------------------------------------------------------------------------


def publish_a(parts: dict, checkpoint: Path) -> None:
    """As published: a sharded transformer, a configuration of the language model as transformers 4 wrote it."""
    save(parts, checkpoint)
    shutil.rmtree(checkpoint / "transformer")
    parts["transformer"].save_pretrained(checkpoint / "transformer", max_shard_size="200KB")
    edit_json(
        checkpoint / "text_encoder/config.json",
        dtype=None,
        torch_dtype="float32",
        rope_parameters=None,
        rope_theta=500000.0,
        rope_scaling=None,
    )
    # Fields that are younger than the published files.
    edit_json(checkpoint / "transformer/config.json", image_condition_type=None)


def publish_b(parts: dict, checkpoint: Path) -> None:
    """As diffusers writes it today: single files; a bf16 transformer."""
    for parameter in parts["transformer"].parameters():
        parameter.copy_(parameter.bfloat16())
    save(parts, checkpoint)
    copy.deepcopy(parts["transformer"]).to(torch.bfloat16).save_pretrained(checkpoint / "transformer")


def save(parts: dict, checkpoint: Path, pipeline=HunyuanVideoPipeline, install=None) -> None:
    """`save_pretrained`, with the tokenizer folders as they are published instead of as transformers 5 writes them."""
    checkpoint.mkdir()
    folders = {"tokenizer": install or install_llama, "tokenizer_2": tokenizers.install_clip}
    install_all(folders, checkpoint)
    loaded = {
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(checkpoint / "tokenizer"),
        "tokenizer_2": CLIPTokenizer.from_pretrained(checkpoint / "tokenizer_2"),
    }
    pipeline(**parts, **loaded).save_pretrained(checkpoint)
    install_all(folders, checkpoint)
    # Published is LlamaTokenizerFast, which transformers 5 builds anew without the file's pre-tokenizer.
    edit_json(checkpoint / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])


def install_llama(folder: Path) -> None:
    """With padding behind the prompt, which Llama's own class has in front unless it is told otherwise."""
    tokenizers.install_llama(folder, pad_token="<|end_of_text|>", padding_side="right")


def check_published(name: str, pipeline, parts: dict) -> None:
    require_loaded(name, pipeline, parts, ("text_encoder", "text_encoder_2", "transformer", "vae"))
    require(pipeline.tokenizer.padding_side == "right", f"{name}: the tokenizer pads behind the prompt")
    text = pipeline.tokenizer("<|start_header_id|>user", add_special_tokens=True).input_ids
    begin = pipeline.tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    require(text[0] == begin and text.count(begin) == 1, f"{name}: the tokenizer begins a text once")
    sharded = (Path(pipeline.config._name_or_path) / "transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    require(sharded == (name == "hunyuan-video-a"), f"{name}: the transformer is {'' if sharded else 'not '}sharded")
