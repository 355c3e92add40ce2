"""Wan2.1 text-to-video: two tiny pipelines in the published layout, and clips stage by stage."""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

from . import tokenizers_cases as tokenizers
from .common import fresh_case, normal, psnr, randomise, read_json, require, write_golden, write_json
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
    require_loaded,
    require_moved,
    require_stable,
    require_visible,
    save_with_t5,
    scale_output,
    to_u8,
)
from .solvers_cases import WAN

LATENT_CHANNELS = 16

A_RUNS = [
    {
        # Unescaped twice: can't.
        "prompt": "  A Cat can&amp;#39;t&nbsp;&nbsp;sleep.\n\n고양이 한 마리가 창가에서\u3000잠을 자고 있다.  ",
        "negative_prompt": "Rain, smoke&#44;   and silence",
        "width": 80,
        "height": 48,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "seed": 42,
        "max_sequence_length": 512,
    },
    # No guidance, so one prediction a step; longer than it may be.
    {
        "prompt": "The lighthouse keeper counts the ships that pass in the night, and the old clock in the tower rings "
        "seven times. We walked along the river until the lights of the town were behind us.",
        "negative_prompt": None,
        "width": 48,
        "height": 64,
        "num_frames": 17,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "seed": 2**31 + 11,
        "max_sequence_length": 24,
    },
]
B_RUNS = [
    # Guidance without a negative prompt: the empty one is encoded. ftfy straightens the quote, ligature and width.
    {
        "prompt": "Slow camera movement over a green valley, i\u2019m the \ufb01rst to \uff23\uff4f\uff55\uff4e\uff54 stars",
        "negative_prompt": None,
        "width": 64,
        "height": 80,
        "num_frames": 13,
        "num_inference_steps": 6,
        "guidance_scale": 3.5,
        "seed": 7,
        "max_sequence_length": 64,
    },
    {
        "prompt": "바다 위로 붉은 해가 천천히 떠오른다",
        "negative_prompt": "A Fresh Portrait",
        "width": 96,
        "height": 32,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 7.0,
        "seed": 99,
        "max_sequence_length": 40,
    },
]


TRANSFORMER_WEIGHTS = [
    ("scale_shift_table", lambda p, g: normal(p, g, 0.4)),
    # The prompt enters by cross-attention alone, and among many padding rows.
    ("text_embedder.linear_2.weight", lambda p, g: normal(p, g, 2.5 / p.shape[1] ** 0.5)),
    ("attn2.to_out.0.weight", lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)),
    ("time_proj.weight", lambda p, g: normal(p, g, 0.7 / p.shape[1] ** 0.5)),
]


def make() -> None:
    quiet()
    make_case("wan-a", parts_a(), publish_a, A_RUNS)
    make_case("wan-b", parts_b(), publish_b, B_RUNS)


def make_case(name: str, parts: dict, publish, runs) -> None:
    folder = fresh_case(name)
    checkpoint = folder / "checkpoint"
    publish(parts, checkpoint)
    pipeline = WanPipeline.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    check_published(name, pipeline, parts)
    tensors = {}
    for i, run in enumerate(runs):
        check_prompts(pipeline, run)
        recorded, frames = record(pipeline, run)
        require_visible(f"{name} run {i}", frames)
        require_stable(f"{name} run {i}", frames, record(pipeline, run | {"latents": disturbed(recorded["noise"])})[1])
        tensors |= {f"run{i}.{key}": value for key, value in recorded.items()} | {f"run{i}.frames": frames}
        check_sensitivity(f"{name} run {i}", pipeline, run, recorded, frames)
    write_golden(folder, {"reference": "diffusers.WanPipeline", "dtype": dtypes(checkpoint), "runs": runs}, tensors)


def record(pipeline, run: dict):
    """Tensors of the stages, and the clip as u8 [F, H, W, 3]."""
    kept, answer = Recorder(pipeline).run(**run)
    embeds, negative = pipeline.encode_prompt(
        prompt=run["prompt"],
        negative_prompt=run["negative_prompt"],
        max_sequence_length=run["max_sequence_length"],
        do_classifier_free_guidance=run["guidance_scale"] > 1.0,
    )
    kept["prompt_embeds"] = embeds
    if negative is not None:
        kept["negative_prompt_embeds"] = negative
    return kept, to_u8(answer.frames[0])


def check_prompts(pipeline, run: dict) -> None:
    """No unknown token: transformers 5 gives UMT5's a wrong id (see tokenizers_cases.load_unigram)."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    texts = [prompt_clean(text) for text in (run["prompt"], run["negative_prompt"]) if text]
    ids = [id for text in texts for id in pipeline.tokenizer(text).input_ids]
    require(not {2, 3} & set(ids), f"no unknown token in {texts}")


def check_sensitivity(name: str, pipeline, run: dict, recorded, frames) -> None:
    changes = [
        ("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED),
        ("another prompt", {"prompt": "Rain drums on the tin roof."}, ANOTHER_PROMPT),
    ]
    if run["guidance_scale"] > 1.0:
        changes.append(("another negative prompt", {"negative_prompt": "Fresh paint, open windows."}, ANOTHER_PROMPT))
        changes.append(("another guidance", {"guidance_scale": run["guidance_scale"] + 1.0}, ANOTHER_PROMPT))
    for what, change, limit in changes:
        require_moved(name, what, frames, record(pipeline, run | change)[1], limit)
    check_caches(name, pipeline, recorded, frames)


def check_caches(name: str, pipeline, recorded, frames) -> None:
    """That frames depend on the chunks before them: the last latent frame decoded alone is another picture."""
    config = pipeline.vae.config
    last = max((key for key in recorded if key.startswith("latents")), key=lambda key: int(key.removeprefix("latents")))
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    latents = recorded[last] / (1.0 / std) + mean  # rounded as in the pipeline

    def decode(latents):
        video = pipeline.video_processor.postprocess_video(
            pipeline.vae.decode(latents, return_dict=False)[0], output_type="np"
        )
        return to_u8(video[0])

    require(torch.equal(decode(latents), frames), f"{name}: the clip is the decoded last latents")
    tail = decode(latents[:, :, -2:])[-4:]
    require(
        psnr(frames[-4:], tail) < ANOTHER_PROMPT, f"{name}: without the chunks before, {psnr(frames[-4:], tail):.1f} dB"
    )
    still = psnr(frames[1:], frames[:-1])
    require(still < ANOTHER_SEED, f"{name}: one frame to the next is {still:.1f} dB")


# --- parts -----------------------------------------------------------------------------------------------------------


def parts_a() -> dict:
    """Three heads of 12, VAE as published in all but its width."""
    return {
        "scheduler": UniPCMultistepScheduler(**WAN),
        "text_encoder": umt5(seed=21, width=32, heads=3, layers=2),
        "transformer": transformer(
            seed=22, num_attention_heads=3, attention_head_dim=12, text_dim=32, ffn_dim=60, num_layers=3
        ),
        "vae": vae(
            seed=23, base_dim=3, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
        ),
    }


def parts_b() -> dict:
    """Two heads of 20, another shift, time halved at other levels of the VAE."""
    return {
        "scheduler": UniPCMultistepScheduler(**WAN | {"flow_shift": 5.0}),
        "text_encoder": umt5(seed=31, width=40, heads=4, layers=3),
        "transformer": transformer(
            seed=32, num_attention_heads=2, attention_head_dim=20, text_dim=40, ffn_dim=56, num_layers=2
        ),
        "vae": vae(
            seed=33, base_dim=4, dim_mult=[1, 2, 2, 3], num_res_blocks=1, temperal_downsample=[True, False, True]
        ),
    }


def umt5(seed: int, width: int, heads: int, layers: int):
    config = UMT5Config(
        vocab_size=816,
        d_model=width,
        d_kv=8,
        d_ff=44,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = UMT5EncoderModel(config).eval()
    randomise(model, seed, overrides=T5_WEIGHTS)
    return model


def transformer(seed: int, **config):
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        freq_dim=256,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=1024,
        **config,
    ).eval()
    randomise(model, seed, overrides=TRANSFORMER_WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    outputs = model(
        hidden_states=torch.randn(1, LATENT_CHANNELS, 3, 6, 8, generator=generator),
        timestep=torch.tensor([700]),
        encoder_hidden_states=torch.randn(1, 20, model.config.text_dim, generator=generator),
        return_dict=False,
    )[0]
    scale_output(model.proj_out.weight, outputs, std=1.0)
    return model


def vae(seed: int, **config):
    generator = torch.Generator().manual_seed(seed)
    model = AutoencoderKLWan(
        z_dim=LATENT_CHANNELS,
        latents_mean=[round(x, 4) for x in (0.7 * torch.randn(LATENT_CHANNELS, generator=generator)).tolist()],
        latents_std=[round(x, 4) for x in (1.0 + 2.0 * torch.rand(LATENT_CHANNELS, generator=generator)).tolist()],
        **config,
    ).eval()
    randomise(model, seed)
    latents = 2 * torch.randn(1, LATENT_CHANNELS, 3, 6, 8, generator=generator)
    # The decoder clamps to -1..1, so the measure is taken small enough not to be clamped, and without the bias.
    model.decoder.conv_out.weight.mul_(1e-2)
    outputs = model.decode(latents, return_dict=False)[0]
    scale_output(model.decoder.conv_out.weight, outputs - outputs.mean((0, 2, 3, 4), keepdim=True), std=0.35)
    return model


# --- publishing ------------------------------------------------------------------------------------------------------


def publish_a(parts: dict, checkpoint: Path) -> None:
    """As Wan-AI published: no newer fields, sharded text encoder and transformer, `spiece.model`, `shared.weight` alone."""
    save(parts, checkpoint, tokenizer_json=False)
    shutil.rmtree(checkpoint / "text_encoder")
    parts["text_encoder"].save_pretrained(checkpoint / "text_encoder", max_shard_size="110KB")
    edit_json(checkpoint / "text_encoder/config.json", dtype=None, torch_dtype="float32", tie_word_embeddings=False)
    shutil.rmtree(checkpoint / "transformer")
    parts["transformer"].save_pretrained(checkpoint / "transformer", max_shard_size="120KB")
    keep_fields(
        checkpoint / "model_index.json",
        "_class_name _diffusers_version scheduler text_encoder tokenizer transformer vae",
    )
    keep_fields(
        checkpoint / "vae/config.json",
        "_class_name _diffusers_version attn_scales base_dim dim_mult dropout latents_mean latents_std num_res_blocks "
        "temperal_downsample z_dim",
    )


def publish_b(parts: dict, checkpoint: Path) -> None:
    """As diffusers writes it today: single files, `tokenizer.json`; a bf16 text encoder, its embedding under both names."""
    for parameter in parts["text_encoder"].parameters():
        parameter.copy_(parameter.bfloat16())
    save(parts, checkpoint, tokenizer_json=True)
    copy.deepcopy(parts["text_encoder"]).to(torch.bfloat16).save_pretrained(checkpoint / "text_encoder")
    both = {"shared.weight": ["shared.weight", "encoder.embed_tokens.weight"]}
    rename_tensors(checkpoint / "text_encoder/model.safetensors", lambda name: both.get(name, [name]))


def keep_fields(file: Path, names: str) -> None:
    value = read_json(file)
    write_json(file, {name: value[name] for name in names.split()})


def save(parts: dict, checkpoint: Path, tokenizer_json: bool, pipeline=WanPipeline) -> None:
    save_with_t5(parts, checkpoint, pipeline, lambda folder: tokenizers.install_umt5(folder, tokenizer_json), "T5TokenizerFast")


def check_published(name: str, pipeline, parts: dict) -> None:
    require_loaded(name, pipeline, parts, ("text_encoder", "transformer", "vae"))
    encoder = pipeline.text_encoder
    require(torch.equal(encoder.encoder.embed_tokens.weight, encoder.shared.weight), f"{name}: UMT5 embeds with shared")
    biases = [key for key in loaded_names(pipeline, "text_encoder") if key.endswith("relative_attention_bias.weight")]
    require(len(biases) == encoder.config.num_layers, f"{name}: a relative bias in each of {len(biases)} layers")


def loaded_names(pipeline, part: str) -> set:
    files = (Path(pipeline.config._name_or_path) / part).glob("*.safetensors")
    return {name for file in files for name in load_file(file)}
