"""LoRA: files in every dialect for the tiny checkpoints of sdxl-a and flux-dev, and the pictures that they make."""

import json
import math
from pathlib import Path

import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers as kohya_flux_to_diffusers,
)
from safetensors.torch import load_file, save_file

from .common import ROOT, fresh_case, require, write_golden
from .diffusion import disturbed, quiet, require_moved, require_stable, require_visible, to_u8

# dB that a file must cost, and that a part of it must.
WHOLE, PART = 35.0, 45.0
SDXL_RUN = {
    "prompt": "A small boat crosses the quiet lake",
    "negative_prompt": "Rain and smoke",
    "width": 64,
    "height": 64,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "seed": 42,
}
FLUX_RUN = {
    "prompt": "A lighthouse above the evening sea",
    "width": 64,
    "height": 64,
    "num_inference_steps": 2,
    "guidance_scale": 3.5,
    "seed": 7,
}


def make() -> None:
    quiet()
    folder = fresh_case("lora")
    tensors, runs = {}, []
    for make_family in (make_sdxl, make_flux):
        make_family(folder, tensors, runs)
    write_golden(folder, {"reference": "diffusers load_lora_weights, set_adapters", "runs": runs}, tensors)


# --- random terms ----------------------------------------------------------------------------------------------------


class Terms:
    """Random pairs of matrices for layers of a network, by the layers' own names."""

    def __init__(self, model: torch.nn.Module, seed: int):
        self.modules = dict(model.named_modules())
        self.generator = torch.Generator().manual_seed(seed)

    def pair(self, layer: str, rank: int, strength: float):
        """`down` and `up`, with a product about `strength` times as large as a weight."""
        module = self.modules[layer]
        out, inner, *kernel = module.weight.shape
        return self.matrices(out, inner, kernel, rank, strength)

    def matrices(self, out: int, inner: int, kernel, rank: int, strength: float):
        fan_in = inner * math.prod(kernel)
        down = torch.randn([rank, inner, *kernel], generator=self.generator) / math.sqrt(fan_in)
        up = torch.randn([out, rank, *[1 for _ in kernel]], generator=self.generator) * strength / math.sqrt(rank)
        return down.half(), up.half()


def layers_ending(model: torch.nn.Module, *endings: str) -> list:
    return [name for name, module in model.named_modules() if hasattr(module, "weight") and name.endswith(endings)]


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


# --- SDXL ------------------------------------------------------------------------------------------------------------


def make_sdxl(folder: Path, tensors: dict, runs: list) -> None:
    files = folder / "sdxl"
    files.mkdir()
    pipeline = load(StableDiffusionXLPipeline, "sdxl-a", add_watermarker=False)
    unet = Terms(pipeline.unet, seed=101)
    one, two = Terms(pipeline.text_encoder, seed=102), Terms(pipeline.text_encoder_2, seed=103)

    peft = {}
    for layer in layers_ending(pipeline.unet, *ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")[::3]:
        peft |= as_peft(f"unet.{layer}", unet.pair(layer, rank=2, strength=0.6))
    for name, terms, model in [("text_encoder", one, pipeline.text_encoder), ("text_encoder_2", two, pipeline.text_encoder_2)]:
        for layer in layers_ending(model, *CLIP_ATTENTION, "fc1", "fc2"):
            peft |= as_peft(f"{name}.text_model.{bare(layer)}", terms.pair(layer, rank=1, strength=0.5))
    save(peft, files / "peft.safetensors")

    alphas = {}
    for layer in layers_ending(pipeline.unet, "attn1.to_q")[::2] + layers_ending(pipeline.unet, "attn2.to_v")[::2]:
        alphas |= as_peft(f"unet.{layer}", unet.pair(layer, rank=4, strength=0.5))
    # What diffusers' training scripts write beside the tensors: here twice the rank, and another alpha for some.
    own = sorted({key.split(".lora_")[0].removeprefix("unet.") for key in alphas if "attn2.to_v" in key})
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {own[0]: 2}, "unet.rank_pattern": {}}
    config |= {"unet.target_modules": ["to_q", "to_v"], "unet.use_dora": False, "unet.use_rslora": False}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    save({key: value.float() for key, value in alphas.items()}, files / "metadata.safetensors", metadata)

    before = {}
    for layer in layers_ending(pipeline.unet, *ATTENTION)[1::4]:
        attention, _, leaf = layer.removesuffix(".0").rpartition(".")
        before |= as_down_up(f"unet.{attention}.processor.{leaf}_lora", unet.pair(layer, rank=3, strength=0.7))
    for layer in layers_ending(pipeline.text_encoder, "q_proj", "out_proj"):
        before |= as_down_up(
            f"text_encoder.text_model.{bare(layer)}.lora_linear_layer", one.pair(layer, rank=2, strength=0.5)
        )
    save(before, files / "before-peft.safetensors")

    # diffusers finds no alphas of an attention's layers but the commonest of the file, and of a text encoder no layer at
    # all unless `out_proj` is among them. Trainers write one alpha for all, and all layers.
    inner = layers_ending(pipeline.unet, *ATTENTION, "ff.net.0.proj", "proj_in")[::4]
    ldm_files = {"kohya": {}, "original": {}}
    for i, layer in enumerate(inner + SDXL_OUTER_LAYERS):
        pair, alpha = unet.pair(layer, rank=2, strength=0.8), 1.0 if layer in inner else [1.0, 2.0, 0.5][i % 3]
        ldm_files["kohya"] |= as_kohya("lora_unet_" + ldm_name(layer).replace(".", "_"), pair, alpha)
        ldm_files["original"] |= as_peft("diffusion_model." + ldm_name(layer), pair, alpha)
    for prefix, terms, model in [("te1", one, pipeline.text_encoder), ("te2", two, pipeline.text_encoder_2)]:
        clip = {"te1": "text_encoders.clip_l.transformer.", "te2": "text_encoders.clip_g.transformer."}[prefix]
        for layer in layers_ending(model, "q_proj", "v_proj", "out_proj", "fc1"):
            pair, name = terms.pair(layer, rank=2, strength=0.6), f"text_model.{bare(layer)}"
            ldm_files["kohya"] |= as_kohya(f"lora_{prefix}_" + name.replace(".", "_"), pair, 1.0)
            ldm_files["original"] |= as_peft(clip + name, pair, 1.0)
    for name, values in ldm_files.items():
        save(values, files / f"{name}.safetensors")

    # As LCM-LoRA is published: kohya's way of writing, diffusers' names.
    mixed = {}
    for layer in layers_ending(pipeline.unet, *ATTENTION, "conv1", "time_emb_proj", "ff.net.2")[2::7]:
        mixed |= as_kohya("lora_unet_" + layer.replace(".", "_"), unet.pair(layer, rank=3, strength=0.7), 1.5)
    save(mixed, files / "kohya-diffusers.safetensors")

    def picture(adapters: list, latents=None):
        return picture_of(pipeline, SDXL_RUN, files, adapters, latents)

    plain = picture([])
    require_parts_matter(picture, plain, files, "peft", ["unet.", "text_encoder.", "text_encoder_2."])
    require_parts_matter(picture, plain, files, "kohya", ["lora_unet_", "lora_te1_", "lora_te2_"])
    convolutions = {key: value for key, value in load_file(files / "kohya.safetensors").items() if value.dim() == 4}
    convolutions = {key: value for key, value in convolutions.items() if value.shape[-1] == 3 or "up" in key}
    require(len(convolutions) >= 12, "sdxl kohya: has convolutions of 3x3")
    for adapters in [
        [["peft", 1.0]],
        [["metadata", 0.9]],
        [["before-peft", 0.8]],
        [["kohya", 1.0]],
        [["kohya-diffusers", -1.25]],
        [["peft", 0.7], ["kohya", 0.9]],
        [["kohya", 0.5], ["before-peft", 1.5], ["kohya-diffusers", 0.75]],
    ]:
        add_run("sdxl-a", "sdxl", SDXL_RUN, adapters, picture, plain, tensors, runs)
    # diffusers reads the original names of FLUX.1 alone; the same values under other names make the same picture.
    add_same("sdxl", "original", "kohya", runs)


# One of each kind that is not in a transformer.
SDXL_OUTER_LAYERS = [
    "conv_in",
    "conv_out",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
    "down_blocks.0.resnets.1.conv1",
    "down_blocks.1.resnets.0.conv2",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.1.resnets.1.time_emb_proj",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.1.conv2",
    "mid_block.resnets.0.time_emb_proj",
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.upsamplers.0.conv",
    "up_blocks.2.resnets.2.conv1",
    "up_blocks.2.resnets.0.conv_shortcut",
]


def ldm_name(layer: str) -> str:
    """What the original SDXL calls a layer of a UNet with two layers per block and three levels."""
    outer = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    if layer in outer:
        return outer[layer]
    list_name, *rest = layer.split(".")
    if list_name == "mid_block":
        kind, number, *inner = rest
        place = 1 if kind == "attentions" else 2 * int(number)
        return ".".join(["middle_block", str(place), *ldm_inner(kind, inner)])
    block, kind, number, *inner = rest
    block, number = int(block), int(number)
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.2.conv"
    position = 3 * block + number + (1 if list_name == "down_blocks" else 0)
    original = "input_blocks" if list_name == "down_blocks" else "output_blocks"
    return ".".join([original, str(position), "0" if kind == "resnets" else "1", *ldm_inner(kind, inner)])


def ldm_inner(kind: str, inner: list) -> list:
    names = {
        "conv1": ["in_layers", "2"],
        "conv2": ["out_layers", "3"],
        "time_emb_proj": ["emb_layers", "1"],
        "conv_shortcut": ["skip_connection"],
    }
    return names[inner[0]] if kind == "resnets" else inner


# --- FLUX.1 ----------------------------------------------------------------------------------------------------------


def make_flux(folder: Path, tensors: dict, runs: list) -> None:
    files = folder / "flux"
    files.mkdir()
    pipeline = load(FluxPipeline, "flux-dev")
    transformer, clip = Terms(pipeline.transformer, seed=201), Terms(pipeline.text_encoder, seed=202)
    config = pipeline.transformer.config
    dim = config.num_attention_heads * config.attention_head_dim

    peft = {}
    for layer in layers_ending(
        pipeline.transformer, *ATTENTION, "add_k_proj", "to_add_out", "ff.net.2", "norm1.linear", "proj_mlp", "proj_out",
        "x_embedder", "norm_out.linear",
    ):
        peft |= as_peft(f"transformer.{layer}", transformer.pair(layer, rank=2, strength=0.35))
    for layer in layers_ending(pipeline.text_encoder, *CLIP_ATTENTION):
        peft |= as_peft(f"text_encoder.text_model.{bare(layer)}", clip.pair(layer, rank=2, strength=1.0))
    save(peft, files / "peft.safetensors")

    kohya, original, reference = {}, {}, {}
    for i, (name, out, inner) in enumerate(original_flux_layers(config, dim)):
        pair = transformer.matrices(out, inner, [], rank=3, strength=0.5)
        # diffusers takes no notice of the last layers' alphas.
        alpha = 3.0 if name.startswith("final_layer") else [1.5, 3.0, 2.0][i % 3]
        kohya |= as_kohya("lora_unet_" + name.replace(".", "_"), pair, alpha)
        original |= as_peft(name, pair, alpha)
        if not name.endswith("linear1"):
            reference |= as_kohya("lora_unet_" + name.replace(".", "_"), pair, alpha)
    for layer in layers_ending(pipeline.text_encoder, "q_proj", "out_proj", "fc2"):
        pair, name = clip.pair(layer, rank=2, strength=1.0), f"text_model.{bare(layer)}"
        kohya |= as_kohya("lora_te1_" + name.replace(".", "_"), pair, 1.0)
        original |= as_peft(f"text_encoders.clip_l.transformer.{name}", pair, 1.0)
        reference |= as_kohya("lora_te1_" + name.replace(".", "_"), pair, 1.0)
    save(kohya, files / "kohya.safetensors")
    save({f"base_model.model.{k}" if "blocks" in k else k: v for k, v in original.items()}, files / "original.safetensors")

    xlabs = {}
    for block in range(config.num_layers):
        for stream in (1, 2):
            for name, out in [("qkv_lora", 3 * dim), ("proj_lora", dim)]:
                pair = transformer.matrices(out, dim, [], rank=2, strength=0.6)
                xlabs |= as_down_up(f"double_blocks.{block}.processor.{name}{stream}", pair)
    save(xlabs, files / "xlabs.safetensors")

    def picture(adapters: list, latents=None):
        converted = {"kohya": lambda values: flux_reference(values, reference, dim)}
        return picture_of(pipeline, FLUX_RUN, files, adapters, latents, converted)

    plain = picture([])
    require_parts_matter(picture, plain, files, "peft", ["transformer.", "text_encoder."])
    for adapters in [[["peft", 1.0]], [["kohya", 1.0]], [["xlabs", 1.1]], [["kohya", 0.8], ["peft", -0.6]]]:
        add_run("flux-dev", "flux", FLUX_RUN, adapters, picture, plain, tensors, runs)
    add_same("flux", "original", "kohya", runs)


def original_flux_layers(config, dim: int) -> list:
    """Names of the original, outputs and inputs."""
    layers = [
        ("img_in", dim, config.in_channels),
        ("txt_in", dim, config.joint_attention_dim),
        ("time_in.in_layer", dim, 256),
        ("vector_in.out_layer", dim, dim),
        ("guidance_in.in_layer", dim, 256),
        ("final_layer.adaLN_modulation.1", 2 * dim, dim),
        ("final_layer.linear", config.in_channels, dim),
    ]
    for block in range(config.num_layers):
        for stream in ("img", "txt"):
            layers += [
                (f"double_blocks.{block}.{stream}_attn.qkv", 3 * dim, dim),
                (f"double_blocks.{block}.{stream}_attn.proj", dim, dim),
                (f"double_blocks.{block}.{stream}_mod.lin", 6 * dim, dim),
                (f"double_blocks.{block}.{stream}_mlp.0", 4 * dim, dim),
                (f"double_blocks.{block}.{stream}_mlp.2", dim, 4 * dim),
            ]
    for block in range(config.num_single_layers):
        layers += [
            (f"single_blocks.{block}.linear1", 7 * dim, dim),
            (f"single_blocks.{block}.linear2", dim, 5 * dim),
            (f"single_blocks.{block}.modulation.lin", 3 * dim, dim),
        ]
    return layers


def flux_reference(values: dict, known: dict, dim: int) -> dict:
    """As diffusers converts kohya's names. It knows `linear1` in the published width alone, which is split here; layers
    outside of the blocks get the prefix that it leaves out."""
    converted = kohya_flux_to_diffusers({key: values[key] for key in known})
    converted = {
        key if key.startswith(("transformer.", "text_encoder.")) else f"transformer.{key}": value
        for key, value in converted.items()
    }
    for key in [key for key in values if key.endswith("linear1.lora_down.weight")]:
        name = key.removesuffix(".lora_down.weight")
        block = name.removeprefix("lora_unet_single_blocks_").removesuffix("_linear1")
        down, up, alpha = values[key], values[f"{name}.lora_up.weight"], values[f"{name}.alpha"]
        down = down * (alpha / down.shape[0])
        for layer, rows in zip(["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], up.split([dim, dim, dim, 4 * dim])):
            converted |= as_peft(f"transformer.single_transformer_blocks.{block}.{layer}", (down, rows))
    return converted


# --- dialects --------------------------------------------------------------------------------------------------------


def as_peft(name: str, pair, alpha=None) -> dict:
    values = {f"{name}.lora_A.weight": pair[0], f"{name}.lora_B.weight": pair[1]}
    return values if alpha is None else values | {f"{name}.alpha": torch.tensor(alpha)}


def as_kohya(name: str, pair, alpha: float) -> dict:
    values = {f"{name}.lora_down.weight": pair[0], f"{name}.lora_up.weight": pair[1]}
    return values | {f"{name}.alpha": torch.tensor(alpha)}


def as_down_up(name: str, pair) -> dict:
    return {f"{name}.down.weight": pair[0], f"{name}.up.weight": pair[1]}


def bare(layer: str) -> str:
    return layer.removeprefix("text_model.")


def save(values: dict, file: Path, metadata=None) -> None:
    save_file({key: value.contiguous() for key, value in values.items()}, file, metadata=metadata or {"format": "pt"})


# --- pictures --------------------------------------------------------------------------------------------------------


def load(pipeline_class, case: str, **options):
    pipeline = pipeline_class.from_pretrained(
        ROOT / case / "checkpoint", dtype=torch.float32, local_files_only=True, **options
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture_of(pipeline, run: dict, files: Path, adapters: list, latents=None, converted=None) -> torch.Tensor:
    """The picture with these files at these weights, from `files` or as tensors at hand."""
    for name, _, *values in adapters:
        values = {k: v.float() for k, v in (values[0] if values else load_file(files / f"{name}.safetensors")).items()}
        if converted and name in converted:
            values = converted[name](values)
        # Only from its file comes what stands beside the tensors.
        source = files / f"{name}.safetensors" if name == "metadata" else values
        pipeline.load_lora_weights(source, adapter_name=name)
        # diffusers leaves out what it does not know, and says so to nobody here.
        downs = [key for key in values if key.endswith((".lora_A.weight", "down.weight"))]
        wanted = sum(3 if "qkv_lora" in key else 1 for key in downs)
        names = ("unet", "transformer", "text_encoder", "text_encoder_2")
        parts = [getattr(pipeline, part) for part in names if hasattr(pipeline, part)]
        used = sum(name in getattr(module, "lora_A", {}) for part in parts for module in part.modules())
        assert used == wanted, f"{name}: diffusers uses {used} of {wanted}"
    if adapters:
        pipeline.set_adapters([name for name, *_ in adapters], [weight for _, weight, *_ in adapters])
    arguments = {key: value for key, value in run.items() if key != "seed"}
    generator = torch.Generator("cpu").manual_seed(run["seed"])
    image = to_u8(pipeline(**arguments, latents=latents, output_type="np", generator=generator).images[0])
    if adapters:
        pipeline.unload_lora_weights()
    return image


def require_parts_matter(picture, plain, files: Path, name: str, prefixes: list) -> None:
    """That the tensors below each prefix alone make another picture."""
    values = load_file(files / f"{name}.safetensors")
    require(all(key.startswith(tuple(prefixes)) for key in values), f"{files.name} {name}: has no other tensors")
    for prefix in prefixes:
        part = {key: value for key, value in values.items() if key.startswith(prefix)}
        if any(key.startswith("lora_unet_single") for key in part):
            continue
        require_moved(f"{files.name} {name}", f"what is below {prefix}", picture([[name, 1.0, part]]), plain, PART)


def add_run(case: str, files: str, run: dict, adapters: list, picture, plain, tensors: dict, runs: list) -> None:
    name = f"{files} " + " + ".join(f"{weight} {file}" for file, weight in adapters)
    image = picture(adapters)
    require_visible(name, image)
    require_moved(name, "the picture without", image, plain, WHOLE)
    if len(adapters) > 1:
        require_moved(name, "the first file alone", image, picture(adapters[:1]), WHOLE)
        halved = [[file, weight / 2] for file, weight in adapters]
        require_moved(name, "the picture of half the weights", image, picture(halved), WHOLE)
    shape = noise_shape(case, run)
    noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(run["seed"]))
    require_stable(name, image, picture(adapters, packed(case, disturbed(noise))))
    tensors[f"run{len(runs)}.image"] = image
    runs.append({"checkpoint": case, "files": files, "loras": [{"name": f, "weight": w} for f, w in adapters]} | run)


def add_same(files: str, name: str, like: str, runs: list) -> None:
    """A file that holds the values of another under other names."""
    others = [run for run in runs if run["files"] == files and run["loras"] == [{"name": like, "weight": 1.0}]]
    require(len(others) == 1, f"{files} {name}: there is a picture of {like}")
    runs.append(others[0] | {"loras": [{"name": name, "weight": 1.0}], "image_of_run": runs.index(others[0])})


def noise_shape(case: str, run: dict):
    channels = {"sdxl-a": 4, "flux-dev": 16}[case]
    return (1, channels, run["height"] // 8, run["width"] // 8)


def packed(case: str, noise: torch.Tensor) -> torch.Tensor:
    if case == "sdxl-a":
        return noise
    _, channels, height, width = noise.shape
    return FluxPipeline._pack_latents(noise, 1, channels, height, width)
