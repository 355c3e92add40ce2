#!/usr/bin/env python3
"""Tale beside diffusers (torch) and stable-diffusion.cpp on this machine's CPU: seconds per denoising step, seconds of the
VAE decode and peak memory, on one random checkpoint of published width and few layers.

    cargo build --release && pip install -r benches/beside-requirements.txt
    benches/beside.py [flux] [sdxl] [--size 256] [--steps 4] [--rounds 3] [--folder out/beside]

The checkpoint is written once into the folder, in bf16 and the diffusers layout, which all of them read. Each system runs
in a process of its own, one after the other, in rounds, so that a noisy machine disturbs all alike; medians are printed.
diffusers computes in f32, as one has to on a CPU for speed; Tale keeps the weights as published and computes in f32;
stable-diffusion.cpp does as it does by default. It gets no T5, whose depth it fixes, and takes zeros of the same length for
it; its SDXL is a network of fixed depth, which a checkpoint of few layers does not fit, so it is left out there.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Double and single blocks of FLUX; layers of each text encoder and transformer otherwise.
FLUX_BLOCKS = (2, 4)
TEXT_TOKENS = 256
PROMPT = "a lighthouse in fog"
SYSTEMS = {"flux": ["tale", "diffusers", "sd.cpp"], "sdxl": ["tale", "diffusers"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="flux, sdxl [default: both]")
    parser.add_argument("--size", type=int, default=256, help="pixels of each side")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "out/beside")
    parser.add_argument("--tale", type=Path, default=ROOT / "target/release/tale")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.models = options.models or list(SYSTEMS)
    if unknown := set(options.models) - set(SYSTEMS):
        parser.error(f"{', '.join(sorted(unknown))}: models are {', '.join(SYSTEMS)}")
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.models[0], options)))
        return
    for model in options.models:
        compare(model, options)


def compare(model: str, options) -> None:
    make(model, options.folder / model)
    if model == "flux":
        original_flux(options.folder / model)
    found = {system: [] for system in SYSTEMS[model]}
    for _ in range(options.rounds):
        for system, rounds in found.items():
            rounds.append(run(system, model, options))
    print(f"{model}, {options.size}x{options.size}, {os.cpu_count()} cores, {options.rounds} rounds of {options.steps} steps")
    for system, rounds in found.items():
        step, decode, peak = (statistics.median(r[what] for r in rounds) for what in ("step", "decode", "peak"))
        spread = f"{min(r['step'] for r in rounds):.2f} to {max(r['step'] for r in rounds):.2f}"
        print(f"  {system:<10} step {step:6.2f} s ({spread})   decode {decode:6.2f} s   peak {peak / 2**30:5.2f} GiB", flush=True)


def run(system: str, model: str, options) -> dict:
    arguments = [model, "--size", str(options.size), "--steps", str(options.steps), "--folder", str(options.folder)]
    arguments += ["--tale", str(options.tale), "--child", system]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{system} failed on {model}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def make(model: str, folder: Path) -> None:
    if (folder / "model_index.json").exists():
        return
    import diffusers
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    pipeline = {"flux": make_flux, "sdxl": make_sdxl}[model](diffusers)
    pipeline.save_pretrained(folder, max_shard_size="100GB")
    torch.set_default_dtype(torch.float32)


def preset(name: str) -> dict:
    return json.loads((ROOT / f"models/src/presets/{name}.json").read_text())


def text_encoder(kind: str, config: dict, layers: int):
    import transformers

    classes = {"clip": transformers.CLIPTextModel, "clip_projection": transformers.CLIPTextModelWithProjection,
               "t5": transformers.T5EncoderModel}
    configs = {"t5": transformers.T5Config}
    config = {**config, ("num_layers" if kind == "t5" else "num_hidden_layers"): layers}
    return classes[kind](configs.get(kind, transformers.CLIPTextConfig)(**config)).eval()


def tokenizers(case: str, second: str) -> list:
    """Of a golden: their ids are few, which costs nobody anything."""
    import transformers

    folder = ROOT / "tests/goldens" / case / "checkpoint"
    return [transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            getattr(transformers, second).from_pretrained(folder / "tokenizer_2")]


def make_flux(diffusers):
    double, single = FLUX_BLOCKS
    config = {key: value for key, value in preset("flux.1-schnell").items() if not key.startswith("_")}
    tokenizer, tokenizer_2 = tokenizers("flux-schnell", "T5TokenizerFast")
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=text_encoder("clip", preset("clip-l"), 12),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder("t5", preset("t5-xxl"), 1),
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(**{**config, "num_layers": double, "num_single_layers": single}),
        vae=vae(diffusers, preset("flux-vae")),
    )


def make_sdxl(diffusers):
    clip = preset("clip-l")
    big = {**clip, "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "hidden_act": "gelu",
           "projection_dim": 1280}
    tokenizer, tokenizer_2 = tokenizers("sdxl-a", "CLIPTokenizer")
    unet = diffusers.UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280], layers_per_block=2,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 1, 1], attention_head_dim=[5, 10, 20], cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    fields = {**preset("flux-vae"), "latent_channels": 4, "scaling_factor": 0.13025, "shift_factor": None,
              "use_quant_conv": True, "use_post_quant_conv": True}
    return diffusers.StableDiffusionXLPipeline(
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
        ),
        text_encoder=text_encoder("clip", clip, 2),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder("clip_projection", big, 2),
        tokenizer_2=tokenizer_2,
        unet=unet,
        vae=vae(diffusers, fields),
    )


def vae(diffusers, config: dict):
    return diffusers.AutoencoderKL(**{key: value for key, value in config.items() if not key.startswith("_")})


def original_flux(folder: Path) -> tuple[Path, Path]:
    """Transformer and CLIP under the names of the original files, by which stable-diffusion.cpp knows them. Which half of
    the last norm is which does not matter to the time."""
    import torch
    from safetensors.torch import load_file, save_file

    target, clip = folder / "original.safetensors", folder / "clip_l.safetensors"
    if target.exists() and clip.exists():
        return target, clip
    names = load_file(folder / "text_encoder/model.safetensors").items()
    save_file({f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in names}, clip)
    tensors = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    double, single = FLUX_BLOCKS
    parts = {}

    def move(new: str, *old: str) -> None:
        for end in ("weight", "bias"):
            found = [tensors[f"{name}.{end}"] for name in old if f"{name}.{end}" in tensors]
            if found:
                parts[f"{new}.{end}"] = torch.cat(found).contiguous()

    def scale(new: str, old: str) -> None:
        parts[f"{new}.scale"] = tensors[f"{old}.weight"]

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for new, old in [("time_in", "timestep_embedder"), ("vector_in", "text_embedder")]:
        move(f"{new}.in_layer", f"time_text_embed.{old}.linear_1")
        move(f"{new}.out_layer", f"time_text_embed.{old}.linear_2")
    for block in range(double):
        old = f"transformer_blocks.{block}"
        for stream, mod, q, k, v, out, norms, ff in [
            ("img", "norm1", "to_q", "to_k", "to_v", "to_out.0", ("norm_q", "norm_k"), "ff"),
            ("txt", "norm1_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", ("norm_added_q", "norm_added_k"), "ff_context"),
        ]:
            new = f"double_blocks.{block}.{stream}"
            move(f"{new}_attn.qkv", *(f"{old}.attn.{name}" for name in (q, k, v)))
            move(f"{new}_attn.proj", f"{old}.attn.{out}")
            move(f"{new}_mod.lin", f"{old}.{mod}.linear")
            move(f"{new}_mlp.0", f"{old}.{ff}.net.0.proj")
            move(f"{new}_mlp.2", f"{old}.{ff}.net.2")
            for name, norm in zip(("query_norm", "key_norm"), norms):
                scale(f"{new}_attn.norm.{name}", f"{old}.attn.{norm}")
    for block in range(single):
        new, old = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
        move(f"{new}.linear1", *(f"{old}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
        move(f"{new}.linear2", f"{old}.proj_out")
        move(f"{new}.modulation.lin", f"{old}.norm.linear")
        scale(f"{new}.norm.query_norm", f"{old}.attn.norm_q")
        scale(f"{new}.norm.key_norm", f"{old}.attn.norm_k")
    move("final_layer.adaLN_modulation.1", "norm_out.linear")
    move("final_layer.linear", "proj_out")
    save_file(parts, target)
    return target, clip


# --- one system, in its own process -----------------------------------------------------------------------------------


def run_tale(model: str, options) -> dict:
    size = str(options.size)
    command = [options.tale, "bench", "step", "--model", options.folder / model, "--json", "--repeat", str(options.steps)]
    command += ["--width", size, "--height", size] + (["--prompt-tokens", str(TEXT_TOKENS)] if model == "flux" else [])
    # The other systems take both branches of guidance in one pass of two rows.
    command += ["--batch", "2"] if model == "sdxl" else []
    lines = [json.loads(line) for line in subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines if "step" in line}
    step = next(value for name, value in seconds.items() if name.startswith("denoise"))
    decode = next(value for name, value in seconds.items() if name.startswith("vae"))
    return {"step": step, "decode": decode, "peak": max(line.get("peak_memory_bytes", 0) for line in lines)}


def run_diffusers(model: str, options) -> dict:
    import diffusers
    import torch

    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(options.folder / model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    ends = []
    arguments = {"flux": {"guidance_scale": 0.0, "max_sequence_length": TEXT_TOKENS}, "sdxl": {"guidance_scale": 5.0}}[model]

    def step_end(_pipeline, _step, _timestep, values):
        ends.append(time.perf_counter())
        return values

    pipeline(PROMPT, width=options.size, height=options.size, num_inference_steps=options.steps + 1,
             generator=torch.Generator("cpu").manual_seed(0), callback_on_step_end=step_end, **arguments)
    end = time.perf_counter()
    steps = [b - a for a, b in zip(ends, ends[1:])]
    return {"step": statistics.median(steps), "decode": end - ends[-1], "peak": own_peak()}


def run_sd_cpp(model: str, options) -> dict:
    from cyllama import sd

    folder = options.folder / model
    times, log = [], []
    sd.set_progress_callback(lambda step, steps, seconds: times.append((step, steps, time.perf_counter())))
    sd.set_log_callback(lambda level, text: log.append((time.perf_counter(), text)))
    weights = "diffusion_pytorch_model.safetensors"
    transformer, clip = original_flux(folder)
    context = sd.SDContext(sd.SDContextParams(diffusion_model_path=str(transformer), clip_l_path=str(clip),
                                              vae_path=str(folder / "vae" / weights), n_threads=os.cpu_count()))
    context.generate(PROMPT, width=options.size, height=options.size, sample_steps=options.steps + 1, cfg_scale=1.0, seed=0)
    end = time.perf_counter()
    ends = [at for step, steps, at in times if steps == options.steps + 1 and step > 0]
    return {"step": statistics.median(b - a for a, b in zip(ends, ends[1:])), "decode": end - ends[-1], "peak": own_peak()}


def own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CHILDREN = {"tale": run_tale, "diffusers": run_diffusers, "sd.cpp": run_sd_cpp}

if __name__ == "__main__":
    main()
