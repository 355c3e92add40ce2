"""LoRA of CogVideoX: files as diffusers writes them for the tiny checkpoints of cogvideox-b and cogvideox-1.5-i2v."""

from pathlib import Path

from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from safetensors.torch import load_file

from .cogvideox_cases import disturbed_frames, record
from .cogvideox_images_cases import with_picture
from .common import fresh_case, write_golden
from .diffusion import quiet, require_moved, require_stable, require_visible
from .lora_cases import ATTENTION, Terms, as_peft, layers_ending, load, save
from .wan_images_cases import PICTURES, picture
from .wan_lora_cases import PART, WHOLE

T2V_RUN = {
    "prompt": "The old clock in the tower rings seven times",
    "negative_prompt": "Rain and smoke",
    "width": 40,
    "height": 32,
    "num_frames": 9,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "use_dynamic_cfg": False,
    "seed": 17,
    "max_sequence_length": 24,
}
I2V_RUN = {
    "prompt": "Slow camera movement over a green valley",
    "negative_prompt": None,
    "picture": 1,
    "width": 32,
    "height": 40,
    "num_frames": 17,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "use_dynamic_cfg": False,
    "seed": 23,
    "max_sequence_length": 24,
}


def make() -> None:
    quiet()
    folder = fresh_case("cogvideox-lora")
    tensors, runs = {}, []
    of_text = load(CogVideoXPipeline, "cogvideox-b")
    # As published ones: all of the attention; and what else a training may choose.
    files = {"attention": [*ATTENTION], "rest": ["ff.net.0.proj", "ff.net.2", "norm1.linear", "time_embedding.linear_2"]}
    make_files(folder / "t2v", of_text, files, seed=401)
    for adapters in ([["attention", 1.0]], [["rest", 0.8]], [["rest", 0.5], ["attention", -0.7]]):
        add(folder / "t2v", of_text, "cogvideox-b", T2V_RUN, adapters, tensors, runs)
    from_a_picture = load(CogVideoXImageToVideoPipeline, "cogvideox-1.5-i2v")
    files = {"attention": [*ATTENTION], "rest": ["ff.net.2", "ofs_embedding.linear_1", "patch_embed.proj", "proj_out"]}
    make_files(folder / "i2v", from_a_picture, files, seed=402)
    for adapters in ([["attention", 0.9]], [["rest", 1.0]]):
        add(folder / "i2v", from_a_picture, "cogvideox-1.5-i2v", I2V_RUN, adapters, tensors, runs)
    write_golden(folder, {"reference": "diffusers load_lora_weights, set_adapters", "runs": runs}, tensors)


def make_files(folder: Path, pipeline, files: dict, seed: int) -> None:
    folder.mkdir()
    terms = Terms(pipeline.transformer, seed=seed)
    for name, endings in files.items():
        values = {}
        for layer in layers_ending(pipeline.transformer, *endings):
            values |= as_peft(f"transformer.{layer}", terms.pair(layer, rank=2, strength=0.6))
        save(values, folder / f"{name}.safetensors")


def add(folder: Path, pipeline, case: str, run: dict, adapters: list, tensors: dict, runs: list) -> None:
    name = f"{case} " + " + ".join(f"{weight} {file}" for file, weight in adapters)
    arguments = with_picture(run, [picture(i, size) for i, size in enumerate(PICTURES)])
    plain = record(pipeline, arguments)[1]
    clip = clip_of(folder, pipeline, arguments, adapters)
    require_visible(name, clip)
    require_moved(name, "the clip without", clip, plain, WHOLE)
    if len(adapters) > 1:
        require_moved(name, "the first file alone", clip, clip_of(folder, pipeline, arguments, adapters[:1]), WHOLE)
    halved = [[file, weight / 2] for file, weight in adapters]
    require_moved(name, "the clip of half the weights", clip, clip_of(folder, pipeline, arguments, halved), PART)
    require_stable(name, clip, clip_of(folder, pipeline, arguments, adapters, disturbed_frames))
    tensors[f"run{len(runs)}.frames"] = clip
    loras = [{"name": file, "weight": weight} for file, weight in adapters]
    runs.append({"checkpoint": case, "files": folder.name, "loras": loras} | run)


def clip_of(folder: Path, pipeline, arguments: dict, adapters: list, make=lambda *given: record(*given)[1]):
    for name, _ in adapters:
        values = {key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()}
        pipeline.load_lora_weights(values, adapter_name=name)
        used = sum(name in getattr(module, "lora_A", {}) for module in pipeline.transformer.modules())
        assert 2 * used == len(values), f"{name}: diffusers uses {used} of {len(values) // 2} layers"
    pipeline.set_adapters([name for name, _ in adapters], [weight for _, weight in adapters])
    frames = make(pipeline, arguments)
    pipeline.unload_lora_weights()
    return frames
