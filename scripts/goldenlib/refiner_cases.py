"""The SDXL refiner: a tiny one with one text encoder and aesthetic scores, on pictures and on a base model's latents."""

import shutil

import numpy
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from . import sdxl_cases as sdxl
from .common import fresh_case, normal, randomise, require, write_golden
from .diffusion import ANOTHER_PROMPT, ANOTHER_SEED, quiet, require_moved, require_visible, scale_output, to_u8
from .edits_cases import photo

NAME = "edits/sdxl-refiner"
PROMPT = "A small Boat crosses the QUIET lake!"
ALONE = [
    {"picture": (75, 61), "strength": 0.5, "steps": 6, "guidance": 5.0, "negative": "Rain", "seed": 42},
    {"picture": (48, 64), "strength": 0.9, "steps": 3, "guidance": 1.0, "seed": 7},
]

TOGETHER_NAME = "sdxl-refined"
# On the checkpoint of sdxl-a, handed over to that of edits/sdxl-refiner.
TOGETHER = [
    {"end": 0.6, "steps": 6, "guidance": 5.0, "negative": "Rain", "size": (96, 64), "seed": 42},
    # Neither pipeline takes an absent negative prompt for the same; noise is drawn on both sides.
    {"end": 0.5, "steps": 5, "guidance": 3.0, "scheduler": "euler_a", "size": (64, 72), "seed": 7},
    {"end": 0.75, "steps": 5, "guidance": 1.0, "scheduler": "dpmpp_2m", "size": (64, 64), "seed": 8},
]
SCHEDULERS = {"euler_a": EulerAncestralDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}


def make() -> None:
    make_alone()
    make_together()


def make_together() -> None:
    folder = fresh_case(TOGETHER_NAME)
    base = pipeline_of(StableDiffusionXLPipeline, folder.parent / "sdxl-a" / "checkpoint")
    refiner = pipeline_of(StableDiffusionXLImg2ImgPipeline, folder.parent / NAME / "checkpoint")
    own = base.scheduler, refiner.scheduler
    tensors, facts = {}, []
    for i, run in enumerate(TOGETHER):
        for pipeline, scheduler in zip((base, refiner), own, strict=True):
            kind = SCHEDULERS.get(run.get("scheduler"))
            pipeline.scheduler = kind.from_config(scheduler.config) if kind else scheduler
        image, name = refined(base, refiner, run), f"{TOGETHER_NAME} run {i}"
        require_visible(name, image)
        changes = [("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED)]
        changes += [("another prompt", {"prompt": "x"}, ANOTHER_PROMPT), ("another end", {"end": 0.3}, ANOTHER_PROMPT)]
        for what, change, limit in changes:
            require_moved(name, what, image, refined(base, refiner, run | change), limit)
        tensors[f"run{i}.image"] = image
        facts.append(
            {
                "prompt": PROMPT,
                "negative_prompt": run.get("negative"),
                "width": run["size"][0],
                "height": run["size"][1],
                "num_inference_steps": run["steps"],
                "guidance_scale": run["guidance"],
                "scheduler": run.get("scheduler"),
                "denoising_end": run["end"],
                "seed": run["seed"],
            }
        )
    reference = "diffusers.StableDiffusionXLPipeline, then diffusers.StableDiffusionXLImg2ImgPipeline"
    write_golden(folder, {"reference": reference, "runs": facts}, tensors)


def refined(base, refiner, run: dict):
    both = {
        "prompt": run.get("prompt", PROMPT),
        "negative_prompt": run.get("negative"),
        "num_inference_steps": run["steps"],
        "guidance_scale": run["guidance"],
        "generator": torch.Generator("cpu").manual_seed(run["seed"]),
    }
    width, height = run["size"]
    latents = base(**both, width=width, height=height, denoising_end=run["end"], output_type="latent").images
    return to_u8(refiner(**both, image=latents, denoising_start=run["end"], output_type="np").images[0])


def pipeline_of(kind, checkpoint):
    pipeline = kind.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_alone() -> None:
    quiet()
    folder = fresh_case(NAME)
    checkpoint = folder / "checkpoint"
    publish(checkpoint)
    pipeline = pipeline_of(StableDiffusionXLImg2ImgPipeline, checkpoint)
    require(pipeline.config.requires_aesthetics_score, f"{NAME}: wants aesthetic scores")
    tensors, facts = {}, []
    for i, run in enumerate(ALONE):
        picture = photo(*run["picture"], seed=20 + i)
        image = record(pipeline, run, picture)
        name = f"{NAME} run {i}"
        require_visible(name, image)
        changes = [("another seed", {"seed": run["seed"] + 1}, ANOTHER_SEED), ("another prompt", {"prompt": "x"}, ANOTHER_PROMPT)]
        changes.append(("another aesthetic score", {"aesthetic_score": 2.0}, ANOTHER_PROMPT))
        if run["guidance"] > 1:
            changes.append(("another negative score", {"negative_aesthetic_score": 6.0}, ANOTHER_PROMPT))
        for what, change, limit in changes:
            require_moved(name, what, image, record(pipeline, run | change, picture), limit)
        distribution = pipeline.vae.encode(pipeline.image_processor.preprocess(picture)).latent_dist
        tensors |= {f"run{i}.mean": distribution.mean, f"run{i}.std": distribution.std}
        tensors |= {f"run{i}.input": torch.from_numpy(numpy.array(picture)), f"run{i}.image": image}
        facts.append(
            {
                "prompt": PROMPT,
                "negative_prompt": run.get("negative"),
                "width": None,
                "height": None,
                "strength": run["strength"],
                "num_inference_steps": run["steps"],
                "guidance_scale": run["guidance"],
                "seed": run["seed"],
            }
        )
    write_golden(folder, {"reference": "diffusers.StableDiffusionXLImg2ImgPipeline", "runs": facts}, tensors)


def record(pipeline, run: dict, picture):
    arguments = {name: run[name] for name in ("aesthetic_score", "negative_aesthetic_score") if name in run}
    answer = pipeline(
        prompt=run.get("prompt", PROMPT),
        negative_prompt=run.get("negative"),
        image=picture,
        strength=run["strength"],
        num_inference_steps=run["steps"],
        guidance_scale=run["guidance"],
        generator=torch.Generator("cpu").manual_seed(run["seed"]),
        output_type="np",
        **arguments,
    )
    return to_u8(answer.images[0])


def publish(checkpoint) -> None:
    parts = {
        "scheduler": EulerDiscreteScheduler(**sdxl.SCHEDULER),
        "text_encoder_2": sdxl.clip(
            CLIPTextModelWithProjection, seed=42, hidden=40, heads=5, hidden_act="gelu", projection_dim=36, eos_token_id=2
        ),
        "unet": unet(),
        "vae": sdxl.vae(seed=24, channels=(8, 12, 16, 16), layers=1, scaling_factor=0.13025),
    }
    for name, part in parts.items():
        if name != "scheduler":
            for parameter in part.parameters():
                parameter.copy_(parameter.half())
            part.half()
    checkpoint.mkdir()
    sdxl.install_all(checkpoint)
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer_2")
    StableDiffusionXLImg2ImgPipeline(
        **parts,
        text_encoder=None,
        tokenizer=None,
        tokenizer_2=tokenizer,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(checkpoint)
    sdxl.install_all(checkpoint)
    shutil.rmtree(checkpoint / "tokenizer")


def unet():
    seed, width, pooled = 43, 8, 36
    model = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        addition_embed_type="text_time",
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 24),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 3),
        cross_attention_dim=40,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_time_embed_dim=width,
        projection_class_embeddings_input_dim=5 * width + pooled,
    ).eval()
    strong = [(name, lambda p, g: normal(p, g, 2.0 / p.shape[1] ** 0.5)) for name in ("add_embedding.linear", "attn2.to_out.0.weight")]
    randomise(model, seed, overrides=[(name + "_2.weight" if "linear" in name else name, fill) for name, fill in strong])
    generator = torch.Generator().manual_seed(seed)
    outputs = model(
        torch.randn(1, 4, 12, 16, generator=generator),
        600,
        encoder_hidden_states=torch.randn(1, 77, 40, generator=generator),
        added_cond_kwargs={
            "text_embeds": torch.randn(1, pooled, generator=generator),
            "time_ids": torch.tensor([[96.0, 128.0, 0.0, 0.0, 6.0]]),
        },
        return_dict=False,
    )[0]
    scale_output(model.conv_out.weight, outputs, std=1.0)
    return model
