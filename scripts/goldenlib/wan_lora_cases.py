"""LoRA of Wan2.1: files in every dialect for the tiny checkpoints of wan-a and wan-i2v, and the clips that they make.

What diffusers honours is loaded by it. What it drops (differences of norms, of the modulation, of whole weights, of the
patches) is added to the weights by hand.
"""

import math
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file

from .common import fresh_case, require, write_golden
from .diffusion import disturbed, quiet, require_moved, require_stable, require_visible, to_u8
from .lora_cases import Terms, as_kohya, as_peft, layers_ending, load, save
from .wan_cases import LATENT_CHANNELS
from .wan_images_cases import PICTURES, picture

# dB that a file must cost, and that a part of it must.
WHOLE, PART = 35.0, 45.0
T2V_RUN = {
    "prompt": "The old clock in the tower rings seven times",
    "negative_prompt": "Rain and smoke",
    "width": 48,
    "height": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "seed": 17,
}
I2V_RUN = {
    "prompt": "Slow camera movement over a green valley",
    "negative_prompt": None,
    "picture": 1,
    "width": 32,
    "height": 48,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "seed": 23,
}
# Original names of a block's layers, and diffusers' own.
OWN_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
OF_PICTURES = {"k_img": "add_k_proj", "v_img": "add_v_proj"}
FEED_FORWARD = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
EMBEDDERS = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
}
PICTURE_EMBEDDERS = {
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}


def make() -> None:
    quiet()
    folder = fresh_case("wan-lora")
    tensors, runs = {}, []
    make_t2v(folder, tensors, runs)
    make_i2v(folder, tensors, runs)
    write_golden(folder, {"reference": "diffusers load_lora_weights, set_adapters", "runs": runs}, tensors)


# --- files -----------------------------------------------------------------------------------------------------------


def make_t2v(folder: Path, tensors: dict, runs: list) -> None:
    files = folder / "t2v"
    files.mkdir()
    pipeline = load(WanPipeline, "wan-a")
    terms = Terms(pipeline.transformer, seed=301)
    layers = block_layers(pipeline.transformer, pictures=False)
    maker = Maker(pipeline, "wan-a", "t2v", T2V_RUN, files, tensors, runs)

    peft = {}
    for layer in layers_ending(pipeline.transformer, *ATTENTION.values(), "ffn.net.2", "time_proj", "proj_out")[::2]:
        peft |= as_peft(f"transformer.{layer}", terms.pair(layer, rank=2, strength=0.5))
    save(peft, files / "peft.safetensors")

    # As lightx2v's files: pairs, differences of biases everywhere, and the head as a whole.
    original = {}
    for name, layer in layers.items():
        original |= as_kohya(name, terms.pair(layer, rank=3, strength=0.4), 2.0)
        original[f"{name}.diff_b"] = vector(terms, layer)
    for name, layer in EMBEDDERS.items():
        down, up = terms.pair(layer, rank=2, strength=0.3)
        original |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.diff_b": vector(terms, layer)}
    original["head.head.diff"] = whole(terms, "proj_out", strength=0.3)
    original["head.head.diff_b"] = vector(terms, "proj_out")
    save({f"diffusion_model.{key}": value for key, value in original.items()}, files / "original.safetensors")

    musubi = {}
    for name, layer in layers.items():
        musubi |= as_kohya("lora_unet_" + name.replace(".", "_"), terms.pair(layer, rank=2, strength=0.4), 1.0)
    save(musubi, files / "musubi.safetensors")

    # What diffusers drops, of every kind once.
    differences = {}
    for block in range(pipeline.transformer.config.num_layers):
        for norm in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k", "norm3"):
            differences[f"blocks.{block}.{norm}.diff"] = vector(terms, norm_layer(block, norm), std=0.3)
        differences[f"blocks.{block}.norm3.diff_b"] = vector(terms, norm_layer(block, "norm3"))
        table = pipeline.transformer.blocks[block].scale_shift_table
        differences[f"blocks.{block}.diff_m"] = 0.2 * torch.randn(table.shape, generator=terms.generator)
    table = pipeline.transformer.scale_shift_table
    differences["head.diff_m"] = 0.2 * torch.randn(table.shape, generator=terms.generator)
    differences["patch_embedding.diff"] = whole(terms, "patch_embedding", strength=0.3)
    differences["patch_embedding.diff_b"] = vector(terms, "patch_embedding")
    differences["blocks.1.self_attn.v.diff"] = whole(terms, "blocks.1.attn1.to_v", strength=0.5)
    save({f"diffusion_model.{key}": value for key, value in differences.items()}, files / "differences.safetensors")

    for adapters in [
        [["peft", 1.0]],
        [["original", 0.9]],
        [["musubi", 1.1]],
        [["original", 0.6], ["peft", -0.8]],
        [["differences", 0.7]],
        [["differences", 0.5], ["original", 0.8]],
    ]:
        maker.add(adapters)
    for part in [".norm_q.diff", ".norm_k.diff", "norm3.diff", "norm3.diff_b", "blocks.1.diff_m", "head.diff_m",
                 "patch_embedding.diff", "self_attn.v.diff"]:
        maker.require_part_matters("differences", part)
    for part in ["self_attn.q.", "cross_attn.k.", "ffn.0", "time_projection", "text_embedding", "head.head.diff",
                 "self_attn.v.diff_b", "ffn.2.diff_b"]:
        maker.require_part_matters("original", part)


def make_i2v(folder: Path, tensors: dict, runs: list) -> None:
    files = folder / "i2v"
    files.mkdir()
    pipeline = load(WanImageToVideoPipeline, "wan-i2v")
    terms = Terms(pipeline.transformer, seed=302)
    maker = Maker(pipeline, "wan-i2v", "i2v", I2V_RUN, files, tensors, runs)

    own = {}
    for name, layer in block_layers(pipeline.transformer, pictures=True).items():
        own |= as_kohya(name, terms.pair(layer, rank=2, strength=0.4), 1.5)
    for name, layer in PICTURE_EMBEDDERS.items():
        down, up = terms.pair(layer, rank=2, strength=0.5)
        own |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.diff_b": vector(terms, layer)}
    save({f"diffusion_model.{key}": value for key, value in own.items()}, files / "original.safetensors")

    # Of a model that makes clips from text: nothing of pictures, patches of the latents alone.
    of_text = {}
    for name, layer in block_layers(pipeline.transformer, pictures=False).items():
        of_text |= as_kohya("lora_unet_" + name.replace(".", "_"), terms.pair(layer, rank=2, strength=0.5), 1.5)
    save(of_text, files / "of-text.safetensors")
    patches = {"diffusion_model.patch_embedding.diff": whole(terms, "patch_embedding", 0.5)[:, :LATENT_CHANNELS]}
    save(patches, files / "patches-of-text.safetensors")

    for adapters in [[["original", 1.0]], [["of-text", 0.8]], [["patches-of-text", 1.0]], [["of-text", 0.5], ["original", 0.5]]]:
        maker.add(adapters)
    for part in ["k_img", "v_img", "img_emb.proj.1", "img_emb.proj.3"]:
        maker.require_part_matters("original", part)


def block_layers(model, pictures: bool) -> dict:
    """diffusers' names of all layers of the blocks by the original ones."""
    layers = {}
    for block in range(model.config.num_layers):
        for original, own in OWN_ATTENTIONS.items():
            inner = ATTENTION | (OF_PICTURES if pictures and own == "attn2" else {})
            layers |= {f"blocks.{block}.{original}.{a}": f"blocks.{block}.{own}.{b}" for a, b in inner.items()}
        layers |= {f"blocks.{block}.{a}": f"blocks.{block}.{b}" for a, b in FEED_FORWARD.items()}
    return layers


def norm_layer(block: int, original: str) -> str:
    where, _, name = original.partition(".")
    return f"blocks.{block}.{OWN_ATTENTIONS[where]}.{name}" if name else f"blocks.{block}.norm2"


def vector(terms: Terms, layer: str, std: float = 0.2) -> torch.Tensor:
    """As large as the layer has outputs."""
    return std * torch.randn(terms.modules[layer].weight.shape[0], generator=terms.generator)


def whole(terms: Terms, layer: str, strength: float) -> torch.Tensor:
    weight = terms.modules[layer].weight
    return strength * torch.randn(weight.shape, generator=terms.generator) / math.sqrt(weight[0].numel())


# --- clips -----------------------------------------------------------------------------------------------------------


class Maker:
    def __init__(self, pipeline, case: str, kind: str, run: dict, files: Path, tensors: dict, runs: list):
        self.pipeline, self.case, self.kind, self.run, self.files = pipeline, case, kind, run, files
        self.tensors, self.runs = tensors, runs
        self.plain = self.clip([])

    def add(self, adapters: list) -> None:
        name = f"wan {self.kind} " + " + ".join(f"{weight} {file}" for file, weight in adapters)
        clip = self.clip(adapters)
        require_visible(name, clip)
        require_moved(name, "the clip without", clip, self.plain, WHOLE)
        if len(adapters) > 1:
            require_moved(name, "the first file alone", clip, self.clip(adapters[:1]), WHOLE)
        halved = [[file, weight / 2] for file, weight in adapters]
        require_moved(name, "the clip of half the weights", clip, self.clip(halved), PART)
        require_stable(name, clip, self.clip(adapters, latents=disturbed(self.noise())))
        self.tensors[f"run{len(self.runs)}.frames"] = clip
        loras = [{"name": file, "weight": weight} for file, weight in adapters]
        self.runs.append({"checkpoint": self.case, "files": self.kind, "loras": loras} | self.run)

    def require_part_matters(self, file: str, part: str) -> None:
        values = load_file(self.files / f"{file}.safetensors")
        of_part = [key for key in values if part in key and not key.endswith(".alpha")]
        require(len(of_part) > 0, f"{self.kind} {file}: has {part}")
        # As zeros: diffusers wants some parts together.
        without = {key: value * (key not in of_part) for key, value in values.items()}
        other = self.clip([[file, 1.0, without]])
        require_moved(f"{self.kind} {file}", f"the file without {part}", self.clip([[file, 1.0]]), other, PART + 10)

    def noise(self) -> torch.Tensor:
        run = self.run
        shape = (1, LATENT_CHANNELS, (run["num_frames"] - 1) // 4 + 1, run["height"] // 8, run["width"] // 8)
        return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(run["seed"]))

    def clip(self, adapters: list, latents=None) -> torch.Tensor:
        """The clip with these files at these weights, as u8 [F, H, W, 3]."""
        loaded, undo = [], []
        for name, weight, *values in adapters:
            values = values[0] if values else load_file(self.files / f"{name}.safetensors")
            values = {key: value.float() for key, value in values.items()}
            by_hand = {key: value for key, value in values.items() if is_dropped(key)}
            undo += self.add_by_hand(by_hand, weight)
            rest = {key: value for key, value in values.items() if key not in by_hand}
            if rest:
                self.load(name, rest)
                loaded.append((name, weight))
        if loaded:
            self.pipeline.set_adapters([name for name, _ in loaded], [weight for _, weight in loaded])
        arguments = {key: value for key, value in self.run.items() if key not in ("seed", "picture")}
        if "picture" in self.run:
            arguments["image"] = picture(self.run["picture"], PICTURES[self.run["picture"]])
        generator = torch.Generator("cpu").manual_seed(self.run["seed"])
        frames = to_u8(self.pipeline(**arguments, latents=latents, output_type="np", generator=generator).frames[0])
        if loaded:
            self.pipeline.unload_lora_weights()
        for parameter, value in reversed(undo):
            parameter.copy_(value)
        return frames

    def load(self, name: str, values: dict) -> None:
        # Biases that a file has not are zeros then; otherwise they are nothing at all.
        self.pipeline.load_lora_weights(values, adapter_name=name, low_cpu_mem_usage=False)
        # diffusers leaves out what it does not know, and says so to nobody here.
        wanted = sum(key.endswith((".lora_A.weight", ".lora_down.weight", "head.head.diff")) for key in values)
        modules = dict(self.pipeline.transformer.named_modules())
        used = {key for key, module in modules.items() if name in getattr(module, "lora_A", {})}
        if not any("_img" in key or "add_" in key for key in values):
            # Layers of pictures get zeros where a file has none for them.
            used -= {key for key in used if "add_" in key}
        assert len(used) == wanted, f"{name}: diffusers uses {len(used)} of {wanted}"
        biases = sum(key.endswith(".diff_b") and value.any().item() for key, value in values.items())
        moved = [key for key in used if (bias := modules[key].lora_B[name].bias) is not None and bias.any()]
        assert len(moved) == biases, f"{name}: diffusers uses {len(moved)} of {biases} biases"

    def add_by_hand(self, values: dict, weight: float) -> list:
        """Adds differences to the weights; what they were, to be put back."""
        parameters = dict(self.pipeline.transformer.named_parameters())
        undo = []
        for key, difference in values.items():
            parameter = parameters[parameter_of(key.removeprefix("diffusion_model."))]
            undo.append((parameter, parameter.clone()))
            if difference.dim() == 5:
                missing = parameter.shape[1] - difference.shape[1]
                difference = torch.nn.functional.pad(difference, (0, 0, 0, 0, 0, 0, 0, missing))
            parameter.add_(weight * difference)
        return undo


def is_dropped(key: str) -> bool:
    """Whether diffusers would leave it out."""
    if key.endswith(".diff_m"):
        return True
    is_norm = "norm" in key and key.endswith((".diff", ".diff_b"))
    is_whole = key.endswith(".diff") and "head.head" not in key
    return is_norm or is_whole or "patch_embedding" in key


def parameter_of(key: str) -> str:
    """diffusers' name of the parameter that a difference is for."""
    if key == "head.diff_m":
        return "scale_shift_table"
    layer, _, kind = key.rpartition(".")
    if kind == "diff_m":
        return f"{layer}.scale_shift_table"
    leaf = {"diff": "weight", "diff_b": "bias"}[kind]
    if layer == "patch_embedding":
        return f"{layer}.{leaf}"
    _, block, inner = layer.split(".", 2)
    if "norm" in inner:
        return f"{norm_layer(int(block), inner)}.{leaf}"
    where, name = inner.split(".")
    return f"blocks.{block}.{OWN_ATTENTIONS[where]}.{ATTENTION[name]}.{leaf}"
