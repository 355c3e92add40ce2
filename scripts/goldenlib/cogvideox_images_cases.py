"""CogVideoX from a picture, and CogVideoX 1.5 from text and from a picture: tiny pipelines, clips stage by stage."""

import numpy
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video

from .common import fresh_case, normal, require, write_golden
from .cogvideox_cases import (
    OF_5B,
    check_caches,
    check_published,
    disturbed_frames,
    record,
    save,
    transformer,
    vae,
)
from .diffusion import (
    ANOTHER_PROMPT,
    ANOTHER_SEED,
    dtypes,
    quiet,
    require_moved,
    require_stable,
    require_visible,
    scale_output,
)
from .flux_cases import t5
from .wan_images_cases import PICTURES, picture

I2V_RUNS = [
    # The model's own length: learned positions.
    {
        "prompt": "The lighthouse keeper counts the ships that pass in the night",
        "negative_prompt": "Rain, smoke and silence",
        "picture": 0,
        "width": 48,
        "height": 32,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": True,
        "seed": 42,
        "max_sequence_length": 20,
    },
    # Another length: computed positions. A tall picture is stretched.
    {
        "prompt": "고양이 한 마리가 창가에서 잠을 자고 있다.",
        "negative_prompt": None,
        "picture": 1,
        "width": 48,
        "height": 32,
        "num_frames": 17,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "use_dynamic_cfg": False,
        "seed": 2**31 + 11,
        "max_sequence_length": 20,
    },
]
LATER_RUNS = [
    # Five latent frames, filled up to six.
    {
        "prompt": "Slow camera movement over a green valley",
        "negative_prompt": None,
        "width": 48,
        "height": 40,
        "num_frames": 17,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "use_dynamic_cfg": True,
        "seed": 7,
        "max_sequence_length": 226,
    },
    {
        "prompt": "바다 위로 붉은 해가 천천히 떠오른다",
        "negative_prompt": "A Fresh Portrait",
        "width": 24,
        "height": 48,
        "num_frames": 33,
        "num_inference_steps": 2,
        "guidance_scale": 4.0,
        "use_dynamic_cfg": False,
        "seed": 99,
        "max_sequence_length": 30,
    },
    # One latent frame, filled up to two.
    {
        "prompt": "A glass city",
        "negative_prompt": None,
        "width": 64,
        "height": 24,
        "num_frames": 1,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "use_dynamic_cfg": False,
        "seed": 3,
        "max_sequence_length": 16,
    },
]
LATER_I2V_RUNS = [
    {
        "prompt": "Seven ships in a harbour under the evening sun",
        "negative_prompt": None,
        "picture": 2,
        "width": 40,
        "height": 32,
        "num_frames": 17,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "use_dynamic_cfg": False,
        "seed": 8,
        "max_sequence_length": 226,
    },
    {
        "prompt": "She looks up",
        "negative_prompt": "",
        "picture": 3,
        "width": 24,
        "height": 48,
        "num_frames": 33,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "use_dynamic_cfg": True,
        "seed": 100,
        "max_sequence_length": 226,
    },
]


def make() -> None:
    quiet()
    make_case("cogvideox-i2v", CogVideoXImageToVideoPipeline, parts_i2v(), I2V_RUNS)
    make_case("cogvideox-1.5", CogVideoXPipeline, parts_later(), LATER_RUNS)
    make_case("cogvideox-1.5-i2v", CogVideoXImageToVideoPipeline, parts_later_i2v(), LATER_I2V_RUNS)


def make_case(name: str, pipeline_class, parts: dict, runs: list) -> None:
    folder = fresh_case(name)
    checkpoint = folder / "checkpoint"
    save(parts, checkpoint, tokenizer_json=True, pipeline=pipeline_class)
    pipeline = pipeline_class.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    check_published(name, pipeline, parts)
    takes_picture = pipeline_class is CogVideoXImageToVideoPipeline
    pictures = [picture(i, size) for i, size in enumerate(PICTURES)] if takes_picture else []
    tensors = {f"picture{i}": torch.from_numpy(numpy.array(image)) for i, image in enumerate(pictures)}
    for i, run in enumerate(runs):
        arguments = with_picture(run, pictures)
        recorded, frames = record(pipeline, arguments)
        if takes_picture:
            channels = recorded["noise"].shape[2] // 2
            noise, condition = recorded["noise"].split(channels, dim=2)
            recorded |= {"noise": noise.contiguous(), "condition": condition.contiguous()}
        require_visible(f"{name} run {i}", frames)
        require_stable(f"{name} run {i}", frames, disturbed_frames(pipeline, arguments))
        check_sensitivity(f"{name} run {i}", pipeline, run, pictures, recorded, frames)
        tensors |= {f"run{i}.{key}": value for key, value in recorded.items()} | {f"run{i}.frames": frames}
    if takes_picture:
        tensors |= encoded_video(pipeline.vae)
    facts = {"reference": f"diffusers.{pipeline_class.__name__}", "dtype": dtypes(checkpoint), "runs": runs}
    write_golden(folder, facts, tensors)


def with_picture(run: dict, pictures: list) -> dict:
    """The arguments of the pipeline."""
    run = dict(run)
    index = run.pop("picture", None)
    return run if index is None else run | {"image": pictures[index]}


def check_sensitivity(name: str, pipeline, run: dict, pictures: list, recorded, frames) -> None:
    changes = [
        ("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED),
        ("another prompt", {"prompt": "Rain drums on the tin roof."}, ANOTHER_PROMPT),
    ]
    if pictures:
        changes.append(("another picture", {"picture": (run["picture"] + 1) % len(pictures)}, ANOTHER_PROMPT))
    for what, change, limit in changes:
        require_moved(name, what, frames, record(pipeline, with_picture(run | change, pictures))[1], limit)
    if pictures:
        retrieve = pipeline_cogvideox_image2video.retrieve_latents
        pipeline_cogvideox_image2video.retrieve_latents = lambda encoded, generator: encoded.latent_dist.mode()
        of_mean = record(pipeline, with_picture(run, pictures))[1]
        pipeline_cogvideox_image2video.retrieve_latents = retrieve
        require_moved(name, "the mean of what the picture's latents may be", frames, of_mean, ANOTHER_PROMPT)
    # Frames that only fill a patch are dropped from the front.
    last = max((key for key in recorded if key.startswith("latents")), key=lambda key: int(key.removeprefix("latents")))
    kept = (run["num_frames"] - 1) // pipeline.vae_scale_factor_temporal + 1
    check_caches(name, pipeline, {"latents0": recorded[last][:, -kept:]}, frames)


def encoded_video(model) -> dict:
    """What the VAE says of 17 frames, which it sees in two chunks."""
    side = 2 ** (len(model.config.block_out_channels) - 1)
    video = 2 * torch.rand(1, 3, 17, 3 * side, 4 * side, generator=torch.Generator().manual_seed(5)) - 1
    # As bytes: the test reads pixels.
    video = (video * 64).round() / 64
    posterior = model.encode(video).latent_dist
    alone = model.encode(video[:, :, :9]).latent_dist.mean
    require(torch.allclose(alone, posterior.mean[:, :, :3], atol=1e-5), "the first chunk knows nothing of the second")
    late = model.encode(video[:, :, 9:]).latent_dist.mean
    require(not torch.allclose(late, posterior.mean[:, :, 3:], atol=1e-2), "the second chunk knows of the first")
    return {"video": video, "video.mean": posterior.mean, "video.std": posterior.std}


# --- parts -----------------------------------------------------------------------------------------------------------


def parts_i2v() -> dict:
    """As the 5B model from a picture: learned positions beside rotations, the stochastic solver; a VAE of three levels."""
    model = transformer(
        seed=142,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=12,
        out_channels=6,
        time_embed_dim=24,
        text_embed_dim=32,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=20,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    )
    model.patch_embed.pos_embedding = normal(model.patch_embed.pos_embedding, torch.Generator().manual_seed(1), 0.7)
    return {
        "scheduler": CogVideoXDPMScheduler(**OF_5B),
        "text_encoder": t5(seed=141, width=32, heads=3, layers=2),
        "transformer": model,
        "vae": encodable(vae(seed=143, block_out_channels=(6, 8, 12), latent_channels=6, layers_per_block=1, groups=2)),
    }


def parts_later() -> dict:
    """As 1.5: patches of two latent frames, rotations on a part of a large grid, a text limit that nobody heeds."""
    return {
        "scheduler": CogVideoXDPMScheduler(**OF_5B),
        "text_encoder": t5(seed=151, width=24, heads=2, layers=2),
        "transformer": transformer(
            seed=152,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=6,
            out_channels=6,
            time_embed_dim=24,
            text_embed_dim=24,
            num_layers=2,
            sample_width=16,
            sample_height=14,
            sample_frames=17,
            max_text_seq_length=12,
            patch_size_t=2,
            patch_bias=False,
            use_rotary_positional_embeddings=True,
        ),
        "vae": vae(seed=153, block_out_channels=(6, 8, 12), latent_channels=6, layers_per_block=1, groups=2),
    }


def parts_later_i2v() -> dict:
    """As 1.5 from a picture: an embedding of offsets, latents of the picture that are divided by the scale."""
    return {
        "scheduler": CogVideoXDDIMScheduler(**OF_5B),
        "text_encoder": t5(seed=161, width=24, heads=2, layers=2),
        "transformer": transformer(
            seed=162,
            num_attention_heads=3,
            attention_head_dim=16,
            in_channels=12,
            out_channels=6,
            time_embed_dim=20,
            ofs_embed_dim=20,
            text_embed_dim=24,
            num_layers=2,
            sample_width=14,
            sample_height=14,
            sample_frames=17,
            max_text_seq_length=12,
            patch_size_t=2,
            patch_bias=False,
            use_rotary_positional_embeddings=True,
        ),
        "vae": encodable(
            vae(
                seed=163,
                block_out_channels=(6, 8, 12),
                latent_channels=6,
                layers_per_block=1,
                groups=2,
                std=0.18,
                invert_scale_latents=True,
            )
        ),
    }


def encodable(model):
    """The answers of the encoder as large as latents are."""
    generator = torch.Generator().manual_seed(1)
    video = 2 * torch.rand(1, 3, 1, 32, 32, generator=generator) - 1
    mean = model.encode(video).latent_dist.mean
    scale_output(model.encoder.conv_out.conv.weight, mean - mean.mean((0, 2, 3, 4), keepdim=True), std=1.5)
    return model
