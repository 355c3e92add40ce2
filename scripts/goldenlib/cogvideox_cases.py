"""CogVideoX text-to-video: two tiny pipelines in the published layout, clips stage by stage, and the two solvers alone."""

import copy
import itertools
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from . import tokenizers_cases as tokenizers
from .common import fresh_case, normal, psnr, randomise, relative_difference, require, write_golden
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
    save_with_t5,
    scale_output,
    to_u8,
)
from .flux_cases import t5
from .wan_cases import keep_fields

# As published with the 2B and with the 5B models.
OF_2B = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
}
OF_5B = OF_2B | {"snr_shift_scale": 1.0}

A_RUNS = [
    # The model's own size and length.
    {
        "prompt": "A Panda in a small, RED jacket plays a tiny guitar; 고양이 한 마리",
        "negative_prompt": "Rain, smoke and silence",
        "width": 80,
        "height": 48,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": False,
        "seed": 42,
        "max_sequence_length": 24,
    },
    # No guidance, so one prediction a step; longer than it may be; two chunks.
    {
        "prompt": "The lighthouse keeper counts the ships that pass in the night, and the old clock in the tower rings "
        "seven times. We walked along the river until the lights of the town were behind us.",
        "negative_prompt": None,
        "width": 48,
        "height": 64,
        "num_frames": 17,
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "use_dynamic_cfg": False,
        "seed": 2**31 + 11,
        "max_sequence_length": 24,
    },
]
B_RUNS = [
    # Guidance without a negative prompt: the empty one is encoded. Three chunks.
    {
        "prompt": "Slow camera movement over a green valley",
        "negative_prompt": None,
        "width": 48,
        "height": 32,
        "num_frames": 25,
        "num_inference_steps": 5,
        "guidance_scale": 3.5,
        "use_dynamic_cfg": True,
        "seed": 7,
        "max_sequence_length": 226,
    },
    {
        "prompt": "바다 위로 붉은 해가 천천히 떠오른다",
        "negative_prompt": "A Fresh Portrait",
        "width": 40,
        "height": 56,
        "num_frames": 9,
        "num_inference_steps": 3,
        "guidance_scale": 6.0,
        "use_dynamic_cfg": False,
        "seed": 99,
        "max_sequence_length": 40,
    },
    # One frame, from one latent frame; the only step goes from nothing but noise to none.
    {
        "prompt": "",
        "negative_prompt": None,
        "width": 64,
        "height": 24,
        "num_frames": 1,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "use_dynamic_cfg": False,
        "seed": 3,
        "max_sequence_length": 16,
    },
]

TRANSFORMER_WEIGHTS = [
    # The prompt is a few of many tokens.
    ("text_proj.weight", lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)),
    ("attn1.to_out.0.weight", lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)),
    ("norm1.linear.weight", lambda p, g: normal(p, g, 0.7 / p.shape[1] ** 0.5)),
    ("norm2.linear.weight", lambda p, g: normal(p, g, 0.7 / p.shape[1] ** 0.5)),
]


def make() -> None:
    quiet()
    make_solvers()
    make_case("cogvideox-a", parts_a(), publish_a, A_RUNS)
    make_case("cogvideox-b", parts_b(), publish_b, B_RUNS)


def make_case(name: str, parts: dict, publish, runs) -> None:
    folder = fresh_case(name)
    checkpoint = folder / "checkpoint"
    publish(parts, checkpoint)
    pipeline = CogVideoXPipeline.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    check_published(name, pipeline, parts)
    tensors = {}
    for i, run in enumerate(runs):
        recorded, frames = record(pipeline, run)
        require_visible(f"{name} run {i}", frames)
        require_stable(f"{name} run {i}", frames, disturbed_frames(pipeline, run))
        tensors |= {f"run{i}.{key}": value for key, value in recorded.items()} | {f"run{i}.frames": frames}
        check_sensitivity(f"{name} run {i}", pipeline, run, recorded, frames)
    write_golden(folder, {"reference": "diffusers.CogVideoXPipeline", "dtype": dtypes(checkpoint), "runs": runs}, tensors)


def record(pipeline, run: dict, **changes):
    """Tensors of the stages, and the clip as u8 [F, H, W, 3]."""
    run = run | changes
    kept, answer = Recorder(pipeline).run(**run)
    guided = run["guidance_scale"] > 1.0
    # Both branches are rows of one pass, the negative one first.
    kept["noise"], kept["prediction0"] = kept["noise"][:1].contiguous(), kept["prediction0"][-1:].contiguous()
    embeds, negative = pipeline.encode_prompt(
        prompt=run["prompt"],
        negative_prompt=run["negative_prompt"],
        max_sequence_length=run["max_sequence_length"],
        do_classifier_free_guidance=guided,
    )
    kept["prompt_embeds"] = embeds
    if guided:
        kept["negative_prompt_embeds"] = negative
    return kept, to_u8(answer.frames[0])


def disturbed_frames(pipeline, run: dict) -> torch.Tensor:
    """The clip of disturbed noise, which the generator has drawn: the steps go on with it."""
    prepare = pipeline.prepare_latents

    def disturbing(*arguments, **keywords):
        answer = prepare(*arguments, **keywords)
        return disturbed(answer) if torch.is_tensor(answer) else (disturbed(answer[0]), *answer[1:])

    pipeline.prepare_latents = disturbing
    frames = record(pipeline, run)[1]
    del pipeline.prepare_latents
    return frames


def check_sensitivity(name: str, pipeline, run: dict, recorded, frames) -> None:
    changes = [
        ("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED),
        ("another prompt", {"prompt": "Rain drums on the tin roof."}, ANOTHER_PROMPT),
    ]
    if run["guidance_scale"] > 1.0:
        changes.append(("another negative prompt", {"negative_prompt": "Fresh paint, open windows."}, ANOTHER_PROMPT))
        changes.append(("another guidance", {"guidance_scale": run["guidance_scale"] + 1.0}, ANOTHER_PROMPT))
        changes.append(("the other rule of guidance", {"use_dynamic_cfg": not run["use_dynamic_cfg"]}, ANOTHER_PROMPT))
    for what, change, limit in changes:
        require_moved(name, what, frames, record(pipeline, run | change)[1], limit)
    check_noise_of_steps(name, pipeline, run, recorded, frames)
    check_caches(name, pipeline, recorded, frames)


def check_noise_of_steps(name: str, pipeline, run: dict, recorded, frames) -> None:
    """That the stochastic solver goes on with the generator that drew the first noise: given that, it draws another."""
    if isinstance(pipeline.scheduler, CogVideoXDPMScheduler) and run["num_inference_steps"] > 1:
        given = record(pipeline, run, latents=recorded["noise"])[1]
        require_moved(name, "noise of a fresh generator in the steps", frames, given, ANOTHER_PROMPT)


def check_caches(name: str, pipeline, recorded, frames) -> None:
    """That frames depend on the chunks before them: the last latent frames decoded alone are another picture."""
    last = max((key for key in recorded if key.startswith("latents")), key=lambda key: int(key.removeprefix("latents")))
    latents = recorded[last]

    def decode(latents):
        video = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), output_type="np")
        return to_u8(video[0])

    require(torch.equal(decode(latents), frames), f"{name}: the clip is the decoded last latents")
    if latents.shape[1] > 3:
        tail = decode(latents[:, -2:])[-8:]
        alone = psnr(frames[-8:], tail)
        require(alone < ANOTHER_PROMPT, f"{name}: without the chunks before, {alone:.1f} dB")
    if len(frames) > 1:
        still = psnr(frames[1:], frames[:-1])
        require(still < ANOTHER_SEED, f"{name}: one frame to the next is {still:.1f} dB")


# --- parts -----------------------------------------------------------------------------------------------------------


def parts_a() -> dict:
    """As the 2B model: sinusoids for positions, no rotation; VAE as published in all but its widths."""
    return {
        "scheduler": CogVideoXDDIMScheduler(**OF_2B),
        "text_encoder": t5(seed=121, width=32, heads=3, layers=2),
        "transformer": transformer(
            seed=122,
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=8,
            out_channels=8,
            time_embed_dim=24,
            text_embed_dim=32,
            num_layers=2,
            sample_width=10,
            sample_height=6,
            sample_frames=9,
            max_text_seq_length=24,
        ),
        "vae": vae(seed=123, block_out_channels=(6, 8, 8, 12), latent_channels=8, layers_per_block=1, groups=2),
    }


def parts_b() -> dict:
    """As the 5B model: rotations; no biases before the attention, nor of patches; a VAE of three levels."""
    return {
        "scheduler": CogVideoXDPMScheduler(**OF_5B),
        "text_encoder": t5(seed=131, width=40, heads=4, layers=3),
        "transformer": transformer(
            seed=132,
            num_attention_heads=3,
            attention_head_dim=16,
            in_channels=6,
            out_channels=6,
            time_embed_dim=20,
            text_embed_dim=40,
            num_layers=3,
            attention_bias=False,
            patch_bias=False,
            norm_eps=1e-4,
            sample_width=12,
            sample_height=8,
            sample_frames=25,
            use_rotary_positional_embeddings=True,
        ),
        "vae": vae(seed=133, block_out_channels=(6, 12, 9), latent_channels=6, layers_per_block=1, groups=3),
    }


def transformer(seed: int, **config):
    model = CogVideoXTransformer3DModel(**config).eval()
    randomise(model, seed, overrides=TRANSFORMER_WEIGHTS)
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    width, height = config.sample_width, config.sample_height
    frames = 4 if config.patch_size_t else 3
    rotary = rotations(model, frames, height, width) if config.use_rotary_positional_embeddings else None
    outputs = model(
        hidden_states=torch.randn(1, frames, config.in_channels, height, width, generator=generator),
        timestep=torch.tensor([700]),
        encoder_hidden_states=torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator),
        ofs=None if config.ofs_embed_dim is None else torch.full((1,), 2.0),
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
    scale_output(model.proj_out.weight, outputs, std=1.0)
    return model


def rotations(model, frames: int, height: int, width: int):
    """As the pipelines make them, of latents of this size."""
    like = type("Pipeline", (), {})()
    like.vae_scale_factor_spatial, like.transformer = 1, model
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(like, height, width, frames, torch.device("cpu"))


def vae(
    seed: int, block_out_channels, latent_channels: int, layers_per_block: int, groups: int, std: float = 0.25, **config
):
    levels = len(block_out_channels)
    model = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        block_out_channels=block_out_channels,
        latent_channels=latent_channels,
        layers_per_block=layers_per_block,
        norm_num_groups=groups,
        **{"scaling_factor": 0.7, "sample_height": 48, "sample_width": 64} | config,
    ).eval()
    randomise(model, seed, overrides=[("conv_b.conv.weight", lambda p, g: normal(p, g, 0.5 / p.shape[1] ** 0.5))])
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, latent_channels, 5, 6, 8, generator=generator) / model.config.scaling_factor
    outputs = model.decode(latents, return_dict=False)[0]
    scale_output(model.decoder.conv_out.conv.weight, outputs - outputs.mean((0, 2, 3, 4), keepdim=True), std=std)
    return model


# --- publishing ------------------------------------------------------------------------------------------------------


def publish_a(parts: dict, checkpoint: Path) -> None:
    """As THUDM published: no newer fields, sharded text encoder and transformer, `spiece.model`."""
    save(parts, checkpoint, tokenizer_json=False)
    for part, size in (("text_encoder", "110KB"), ("transformer", "60KB")):
        shutil.rmtree(checkpoint / part)
        parts[part].save_pretrained(checkpoint / part, max_shard_size=size)
    edit_json(checkpoint / "text_encoder/config.json", dtype=None, torch_dtype="float32")
    keep_fields(
        checkpoint / "transformer/config.json",
        "_class_name _diffusers_version activation_fn attention_bias attention_head_dim dropout flip_sin_to_cos freq_shift "
        "in_channels max_text_seq_length norm_elementwise_affine norm_eps num_attention_heads num_layers out_channels "
        "patch_size sample_frames sample_height sample_width spatial_interpolation_scale temporal_compression_ratio "
        "temporal_interpolation_scale text_embed_dim time_embed_dim timestep_activation_fn",
    )
    keep_fields(
        checkpoint / "vae/config.json",
        "_class_name _diffusers_version act_fn block_out_channels down_block_types force_upcast in_channels latent_channels "
        "latents_mean latents_std layers_per_block norm_eps norm_num_groups out_channels sample_height sample_width "
        "scaling_factor shift_factor temporal_compression_ratio up_block_types use_post_quant_conv use_quant_conv",
    )


def publish_b(parts: dict, checkpoint: Path) -> None:
    """As diffusers writes it today: single files, `tokenizer.json`; a bf16 transformer."""
    for parameter in parts["transformer"].parameters():
        parameter.copy_(parameter.bfloat16())
    save(parts, checkpoint, tokenizer_json=True)
    copy.deepcopy(parts["transformer"]).to(torch.bfloat16).save_pretrained(checkpoint / "transformer")


def save(parts: dict, checkpoint: Path, tokenizer_json: bool, pipeline=CogVideoXPipeline) -> None:
    save_with_t5(parts, checkpoint, pipeline, lambda folder: tokenizers.install_t5(folder, tokenizer_json), "T5Tokenizer")


def check_published(name: str, pipeline, parts: dict) -> None:
    require_loaded(name, pipeline, parts, ("text_encoder", "transformer", "vae"))


# --- solvers ---------------------------------------------------------------------------------------------------------

SIZE = 16


def make_solvers() -> None:
    """Schedules and steps of both solvers on random model outputs: `0.3 * sample + randn`."""
    folder = fresh_case("cogvideox-solvers")
    cases, tensors = [], {}
    for seed, (scheduler_class, change, steps) in enumerate(solver_cases()):
        scheduler = scheduler_class.from_config(OF_5B | change)
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) != steps:
            require(False, f"{change}: {steps} timesteps")
        tensors[f"{seed}.timesteps"] = scheduler.timesteps.float()
        tensors[f"{seed}.samples"] = walk(scheduler, steps, seed)
        case = {"name": f"{seed}", "class": scheduler_class.__name__, "config": OF_5B | change}
        cases.append(case | {"num_inference_steps": steps, "seed": seed})
    require(all(torch.isfinite(tensor).all() for tensor in tensors.values()), "all numbers of the solvers are finite")
    moved = relative_difference(tensors["0.samples"][-1], tensors[f"{len(cases) // 2}.samples"][-1])
    require(moved > 1e-2, f"the two solvers end {moved:.2g} apart")
    notes = [
        "start and noise of the steps: generator of `seed`",
        "the model's randn [steps, 16]: generator of `seed` + 1000",
    ]
    write_golden(folder, {"cases": cases, "notes": notes}, tensors)


def solver_cases():
    for scheduler_class in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler):
        for spacing, prediction, zero_snr, shift in itertools.product(
            ("trailing", "leading", "linspace"), ("v_prediction", "epsilon", "sample"), (True, False), (1.0, 3.0)
        ):
            # Noise cannot be told from a sample without signal.
            if zero_snr and prediction == "epsilon" and spacing != "leading":
                continue
            yield scheduler_class, {
                "timestep_spacing": spacing,
                "prediction_type": prediction,
                "rescale_betas_zero_snr": zero_snr,
                "snr_shift_scale": shift,
            }, 6
        for steps in (1, 2, 3, 50):
            yield scheduler_class, {}, steps
        for change in (
            {"set_alpha_to_one": False, "timestep_spacing": "leading"},
            {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
            {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": False},
            {"num_train_timesteps": 60},
        ):
            yield scheduler_class, change, 5


def walk(scheduler, steps: int, seed: int) -> torch.Tensor:
    """The sample at the beginning and after every step, as the pipelines call the solvers."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(1, SIZE, generator=generator)
    outputs = torch.randn(steps, SIZE, generator=torch.Generator().manual_seed(1000 + seed))
    samples, old = [sample[0]], None
    for i, timestep in enumerate(scheduler.timesteps):
        output = 0.3 * sample + outputs[i : i + 1]
        if isinstance(scheduler, CogVideoXDPMScheduler):
            back = scheduler.timesteps[i - 1] if i > 0 else None
            sample, old = scheduler.step(output, old, timestep, back, sample, generator=generator, return_dict=False)
        else:
            sample = scheduler.step(output, timestep, sample, generator=generator, return_dict=False)[0]
        # The pipelines round to the dtype of the prompts.
        sample = sample.float()
        samples.append(sample[0])
    return torch.stack(samples)
