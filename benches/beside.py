#!/usr/bin/env python3
"""Tale beside diffusers (torch) and stable-diffusion.cpp on this machine's CPU: seconds per denoising step, seconds of the
VAE decode and peak memory, on one random checkpoint: SDXL as published, the others of published width and few blocks.

    cargo build --release && pip install -r benches/beside-requirements.txt
    benches/beside.py [flux] [sdxl] [wan] [cogvideox] [hunyuan] [--size 256] [--frames 9] [--steps 4] [--rounds 3] [--folder out/beside]

The checkpoint is written once into the folder, in bf16 and the diffusers layout, which all of them read (8 GB for SDXL,
which has all its layers because stable-diffusion.cpp fixes their number). Each system runs in a process of its own, one
after the other, in rounds, so that a noisy machine disturbs all alike; medians are printed. A step is one of guidance with
two branches for SDXL, and one without for the others. diffusers computes in f32, as one has to on a CPU for speed; Tale keeps the
weights as published and computes in f32; stable-diffusion.cpp does as it does by default. Of FLUX it gets no T5, whose
number of layers it fixes, and takes zeros of the same length for it; video models it does not get. With --bf16 diffusers
computes in bf16 too, which is fast where the CPU has the units for it (avx512_bf16, amx_bf16).
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
sys.path.append(str(ROOT / "scripts"))  # for the names of original files
# Double and single blocks of FLUX.
FLUX_BLOCKS = (2, 4)
TEXT_TOKENS = 256
PROMPT = "a lighthouse in fog"
# Layers of Wan2.1 1.3B and of CogVideoX-5B, double and single blocks of HunyuanVideo.
WAN_LAYERS = 4
COGVIDEOX_LAYERS = 4
HUNYUAN_BLOCKS = (1, 2)
# The text is read from the third layer from the end.
LLAMA_LAYERS = 3
IMAGE_SYSTEMS = ["tale", "diffusers", "sd.cpp"]
VIDEO_SYSTEMS = ["tale", "diffusers"]
VIDEO_MODELS = ["wan", "cogvideox", "hunyuan"]
MODELS = ["flux", "sdxl", *VIDEO_MODELS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"any of {', '.join(MODELS)} [default: all]")
    parser.add_argument("--size", type=int, default=256, help="pixels of each side")
    parser.add_argument("--frames", type=int, default=9, help="of a video")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--bf16", action="store_true", help="diffusers in bf16 too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "out/beside")
    parser.add_argument("--tale", type=Path, default=ROOT / "target/release/tale")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.models = options.models or MODELS
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"{', '.join(sorted(unknown))}: models are {', '.join(MODELS)}")
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.models[0], options)))
        return
    for model in options.models:
        compare(model, options)


def compare(model: str, options) -> None:
    # In a process of its own too: a child's peak is never below what its parent held when it began.
    run("checkpoint", model, options)
    systems = VIDEO_SYSTEMS if model in VIDEO_MODELS else IMAGE_SYSTEMS
    found = {system: [] for system in systems + (["diffusers-bf16"] if options.bf16 else [])}
    for _ in range(options.rounds):
        for system, rounds in found.items():
            rounds.append(run(system, model, options))
    frames = f", {options.frames} frames" if model in VIDEO_MODELS else ""
    size = f"{options.size}x{options.size}{frames}"
    print(f"{model}, {size}, {os.cpu_count()} cores, {options.rounds} rounds of {options.steps} steps")
    for system, rounds in found.items():
        step, decode, peak = (statistics.median(r[what] for r in rounds) for what in ("step", "decode", "peak"))
        spread = f"{min(r['step'] for r in rounds):.2f} to {max(r['step'] for r in rounds):.2f}"
        print(f"  {system:<14} step {step:6.2f} s ({spread})   decode {decode:6.2f} s   peak {peak / 2**30:5.2f} GiB", flush=True)


def run(system: str, model: str, options) -> dict:
    arguments = [model, "--size", str(options.size), "--steps", str(options.steps), "--folder", str(options.folder)]
    arguments += ["--frames", str(options.frames), "--tale", str(options.tale), "--child", system]
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
    makers = {"flux": make_flux, "sdxl": make_sdxl, "wan": make_wan, "cogvideox": make_cogvideox,
              "hunyuan": make_hunyuan}
    pipeline = makers[model](diffusers)
    pipeline.save_pretrained(folder, max_shard_size="100GB")
    torch.set_default_dtype(torch.float32)


def preset(name: str) -> dict:
    return json.loads((ROOT / f"models/src/presets/{name}.json").read_text())


def text_encoder(kind: str, config: dict, layers: int):
    import transformers

    classes = {"clip": transformers.CLIPTextModel, "clip_projection": transformers.CLIPTextModelWithProjection,
               "t5": transformers.T5EncoderModel, "umt5": transformers.UMT5EncoderModel, "llama": transformers.LlamaModel}
    configs = {"t5": transformers.T5Config, "umt5": transformers.UMT5Config, "llama": transformers.LlamaConfig}
    config = {**config, ("num_layers" if kind.endswith("t5") else "num_hidden_layers"): layers}
    return classes[kind](configs.get(kind, transformers.CLIPTextConfig)(**config)).eval()


def tokenizers(case: str, second: str) -> list:
    """Of a golden: their ids are few, which costs nobody anything."""
    import transformers

    folder = ROOT / "tests/goldens" / case / "checkpoint"
    return [transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            getattr(transformers, second).from_pretrained(folder / "tokenizer_2")]


def make_flux(diffusers):
    double, single = FLUX_BLOCKS
    config = own_fields("flux.1-schnell")
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
    clip, big = preset("sdxl-clip-l"), preset("clip-bigg")
    tokenizer, tokenizer_2 = tokenizers("sdxl-a", "CLIPTokenizer")
    return diffusers.StableDiffusionXLPipeline(
        scheduler=diffusers.EulerDiscreteScheduler.from_config(preset("sdxl-scheduler")),
        text_encoder=text_encoder("clip", clip, clip["num_hidden_layers"]),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder("clip_projection", big, big["num_hidden_layers"]),
        tokenizer_2=tokenizer_2,
        unet=diffusers.UNet2DConditionModel.from_config(preset("sdxl")),
        vae=vae(diffusers, preset("sdxl-vae")),
    )


def make_wan(diffusers):
    import transformers

    golden = ROOT / "tests/goldens/wan-a/checkpoint"
    transformer = {**own_fields("wan2.1-t2v-1.3b"), "num_layers": WAN_LAYERS}
    return diffusers.WanPipeline(
        scheduler=diffusers.UniPCMultistepScheduler.from_config(preset("wan-scheduler")),
        tokenizer=transformers.AutoTokenizer.from_pretrained(golden / "tokenizer"),
        text_encoder=text_encoder("umt5", preset("umt5-xxl"), 1),
        transformer=diffusers.WanTransformer3DModel(**transformer),
        vae=diffusers.AutoencoderKLWan(**own_fields("wan-vae")),
    )


def make_cogvideox(diffusers):
    import transformers

    golden = ROOT / "tests/goldens/cogvideox-a/checkpoint"
    return diffusers.CogVideoXPipeline(
        scheduler=diffusers.CogVideoXDDIMScheduler.from_config(preset("cogvideox-scheduler")),
        tokenizer=transformers.AutoTokenizer.from_pretrained(golden / "tokenizer"),
        text_encoder=text_encoder("t5", preset("t5-xxl"), 1),
        transformer=diffusers.CogVideoXTransformer3DModel(**{**own_fields("cogvideox-5b"), "num_layers": COGVIDEOX_LAYERS}),
        vae=diffusers.AutoencoderKLCogVideoX(**own_fields("cogvideox-vae")),
    )


def make_hunyuan(diffusers):
    import transformers

    golden = ROOT / "tests/goldens/hunyuan-video-a/checkpoint"
    double, single = HUNYUAN_BLOCKS
    transformer = {**own_fields("hunyuanvideo"), "num_layers": double, "num_single_layers": single}
    return diffusers.HunyuanVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(preset("hunyuanvideo-scheduler")),
        tokenizer=transformers.AutoTokenizer.from_pretrained(golden / "tokenizer"),
        text_encoder=text_encoder("llama", preset("llava-llama-3-8b"), LLAMA_LAYERS),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(golden / "tokenizer_2"),
        text_encoder_2=text_encoder("clip", preset("clip-l"), 12),
        transformer=diffusers.HunyuanVideoTransformer3DModel(**transformer),
        vae=diffusers.AutoencoderKLHunyuanVideo(**own_fields("hunyuanvideo-vae")),
    )


def own_fields(name: str) -> dict:
    return {key: value for key, value in preset(name).items() if not key.startswith("_")}


def vae(diffusers, config: dict):
    return diffusers.AutoencoderKL(**{key: value for key, value in config.items() if not key.startswith("_")})


def original(model: str, folder: Path) -> dict:
    """The files by which stable-diffusion.cpp knows the model, written under their original names where that is needed."""
    target, clip = folder / "original.safetensors", folder / "clip_l.safetensors"
    if not target.exists():
        from goldenlib.single_files_cases import assemble, flux_names, load_component, sdxl_names
        from safetensors.torch import save_file

        names = sdxl_names(folder) if model == "sdxl" else flux_names(load_component(folder / "transformer"))
        save_file(assemble(folder, names), target)
        encoder = load_component(folder / "text_encoder").items()
        save_file({f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in encoder}, clip)
    if model == "sdxl":
        return {"model_path": target}
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    return {"diffusion_model_path": target, "clip_l_path": clip, "vae_path": vae}


# --- one system, in its own process -----------------------------------------------------------------------------------


def write_checkpoint(model: str, options) -> dict:
    make(model, options.folder / model)
    if model in VIDEO_MODELS:
        return {}
    original(model, options.folder / model)
    return {}


def run_tale(model: str, options) -> dict:
    size = str(options.size)
    command = [options.tale, "bench", "step", "--model", options.folder / model, "--json", "--repeat", str(options.steps)]
    command += ["--width", size, "--height", size] + (["--prompt-tokens", str(TEXT_TOKENS)] if model == "flux" else [])
    command += ["--frames", str(options.frames)] if model in VIDEO_MODELS else []
    # The other systems take both branches of guidance in one pass of two rows.
    command += ["--batch", "2"] if model == "sdxl" else []
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    lines = [json.loads(line) for line in printed.splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines if "step" in line}
    step = next(value for name, value in seconds.items() if name.startswith("denoise"))
    decode = next(value for name, value in seconds.items() if name.startswith("vae"))
    return {"step": step, "decode": decode, "peak": max(line.get("peak_memory_bytes", 0) for line in lines)}


def run_diffusers(model: str, options, dtype: str = "float32") -> dict:
    import diffusers
    import torch

    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(options.folder / model, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    ends = []
    arguments = {
        "flux": {"guidance_scale": 0.0, "max_sequence_length": TEXT_TOKENS},
        "sdxl": {"guidance_scale": 5.0},
        "wan": {"guidance_scale": 1.0, "num_frames": options.frames},
        "cogvideox": {"guidance_scale": 1.0, "num_frames": options.frames},
        "hunyuan": {"num_frames": options.frames},
    }[model]

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

    times = []
    sd.set_progress_callback(lambda step, steps, seconds: times.append((step, steps, time.perf_counter())))
    sd.set_log_callback(lambda level, text: None)
    files = {parameter: str(path) for parameter, path in original(model, options.folder / model).items()}
    context = sd.SDContext(sd.SDContextParams(**files, n_threads=os.cpu_count()))
    context.generate(PROMPT, width=options.size, height=options.size, sample_steps=options.steps + 1,
                     cfg_scale={"flux": 1.0, "sdxl": 5.0}[model], seed=0)
    end = time.perf_counter()
    ends = [at for step, steps, at in times if steps == options.steps + 1 and step > 0]
    return {"step": statistics.median(b - a for a, b in zip(ends, ends[1:])), "decode": end - ends[-1], "peak": own_peak()}


def own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CHILDREN = {
    "checkpoint": write_checkpoint,
    "tale": run_tale,
    "diffusers": run_diffusers,
    "diffusers-bf16": lambda model, options: run_diffusers(model, options, "bfloat16"),
    "sd.cpp": run_sd_cpp,
}

if __name__ == "__main__":
    main()
