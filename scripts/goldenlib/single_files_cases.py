"""Single files: how the tiny checkpoints of SDXL and FLUX.1 look in the layout of the original implementations, a velocity
model, and a GGUF file.

No weights are written twice: `CASE.names` has one line per tensor of the single file, `ORIGINAL = TENSOR`, where TENSOR is
`component/name` of the case's own checkpoint, several of them joined by ` + ` (rows one after the other), or one behind
`transposed `, `swapped ` (the halves of its rows exchanged) or `kernel ` (of a convolution over one position of a clip). A test makes the file from that. Here it is made too, and
what diffusers reads from it has to be the checkpoint again.
"""

import inspect
import json
import re
import tempfile
from pathlib import Path

import gguf
import numpy
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from . import flux_cases, sdxl_cases
from .common import ROOT, fresh_case, require, write_golden
from .diffusion import (
    ANOTHER_PROMPT,
    disturbed,
    quiet,
    require_moved,
    require_stable,
    require_visible,
)

V_PREDICTION_RUN = {
    "prompt": "A paper boat, 종이배",
    "negative_prompt": "rain",
    "width": 64,
    "height": 48,
    "num_inference_steps": 2,
    "guidance_scale": 5.0,
    "seed": 11,
}
GGUF_RUN = {
    "prompt": "A glass city under a violet sky",
    "width": 64,
    "height": 48,
    "num_inference_steps": 3,
    "guidance_scale": 0.0,
    "seed": 5,
    "max_sequence_length": 32,
}


def make() -> None:
    quiet()
    folder = fresh_case("single-files")
    for case in ("sdxl-a", "sdxl-b"):
        make_sdxl(case, folder)
    make_flux("flux-dev", folder)
    tensors = velocity_picture() | gguf_picture(folder)
    facts = {
        "reference": "diffusers.StableDiffusionXLPipeline and FluxPipeline",
        "v_prediction": V_PREDICTION_RUN | {"checkpoint": "sdxl-b"},
        "gguf": GGUF_RUN | {"checkpoint": "flux-schnell"},
    }
    write_golden(folder, facts, tensors)


# --- SDXL ------------------------------------------------------------------------------------------------------------


def make_sdxl(case: str, folder: Path) -> None:
    checkpoint = ROOT / case / "checkpoint"
    names = sdxl_names(checkpoint)
    write_names(folder / f"{case}.names", names)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.safetensors"
        save_file(assemble(checkpoint, names), file)
        pipeline = StableDiffusionXLPipeline.from_single_file(file, config=str(checkpoint), local_files_only=True)
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            require_same(f"{case} {part}", getattr(pipeline, part), load_component(checkpoint / part))


def sdxl_names(checkpoint: Path) -> dict:
    unet = json.loads((checkpoint / "unet/config.json").read_text())
    levels = len(json.loads((checkpoint / "vae/config.json").read_text())["block_out_channels"])
    names = {}
    for name in load_component(checkpoint / "unet"):
        names["model.diffusion_model." + original_unet_name(name, unet)] = f"unet/{name}"
    for name in load_component(checkpoint / "text_encoder"):
        prefixed = name if name.startswith("text_model.") else f"text_model.{name}"
        names[f"conditioner.embedders.0.transformer.{prefixed}"] = f"text_encoder/{name}"
    for name, tensor in open_clip_names(load_component(checkpoint / "text_encoder_2")).items():
        names[f"conditioner.embedders.1.model.{name}"] = tensor
    for name in load_component(checkpoint / "vae"):
        names["first_stage_model." + original_vae_name(name, levels)] = f"vae/{name}"
    return names


def original_unet_name(name: str, config: dict) -> str:
    layers = config["layers_per_block"]
    simple = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    layer, leaf = name.rsplit(".", 1)
    if layer in simple:
        return f"{simple[layer]}.{leaf}"
    part = r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)"
    if found := re.fullmatch(r"mid_block\." + part, name):
        kind, index, rest = found[1], int(found[2]), found[3]
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * index}.{resnet(rest)}"
    way, block, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\." + part, name).groups()
    block, index = int(block), int(index)
    number = block * (layers + 1) + index + (1 if way == "down" else 0)
    place = f"{'input' if way == 'down' else 'output'}_blocks.{number}"
    if kind == "resnets":
        return f"{place}.0.{resnet(rest)}"
    if kind == "attentions":
        return f"{place}.1.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{leaf}"
    after = 2 if config["up_block_types"][block] == "CrossAttnUpBlock2D" else 1
    return f"output_blocks.{(block + 1) * (layers + 1) - 1}.{after}.conv.{leaf}"


def resnet(name: str) -> str:
    layer, leaf = name.rsplit(".", 1)
    original = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return f"{original[layer]}.{leaf}"


def original_vae_name(name: str, levels: int) -> str:
    for pattern, replacement in [
        (r"conv_norm_out", "norm_out"),
        (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_shortcut", "nin_shortcut"),
    ]:
        name = re.sub(pattern, replacement, name)
    return name


def open_clip_names(tensors: dict) -> dict:
    names = {}
    for full in tensors:
        name = full.removeprefix("text_model.")
        if name == "text_projection.weight":
            names["text_projection"] = f"transposed text_encoder_2/{full}"
            continue
        for part, replacement in [
            ("embeddings.token_embedding.", "token_embedding."),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("encoder.layers.", "transformer.resblocks."),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("final_layer_norm", "ln_final"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
        ]:
            name = name.replace(part, replacement)
        if found := re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", name):
            fused = [full.replace(f"{found[2]}_proj", f"{part}_proj") for part in "qkv"]
            name = f"{found[1]}attn.in_proj_{found[3]}"
            names[name] = " + ".join(f"text_encoder_2/{part}" for part in fused)
        else:
            names[name] = f"text_encoder_2/{full}"
    return names


# --- FLUX.1 ----------------------------------------------------------------------------------------------------------


def make_flux(case: str, folder: Path) -> None:
    """The transformer as `flux1-dev.safetensors` has it, and the VAE as `ae.safetensors` does."""
    checkpoint = ROOT / case / "checkpoint"
    names = flux_names(load_component(checkpoint / "transformer"))
    write_names(folder / f"{case}.names", names)
    loaded = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(checkpoint / "transformer"))
    loaded.load_state_dict(convert_flux(assemble(checkpoint, names), loaded.inner_dim))
    require_same(f"{case} transformer", loaded, load_component(checkpoint / "transformer"))

    vae = load_component(checkpoint / "vae")
    levels = len(json.loads((checkpoint / "vae/config.json").read_text())["block_out_channels"])
    names = {original_vae_name(name, levels): f"vae/{name}" for name in vae}
    write_names(folder / f"{case}-ae.names", names)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "ae.safetensors"
        save_file(assemble(checkpoint, names), file)
        loaded = AutoencoderKL.from_single_file(file, config=str(checkpoint), subfolder="vae", local_files_only=True)
        require_same(f"{case} vae", loaded, vae)


def convert_flux(original: dict, inner_dim: int) -> dict:
    """diffusers' converter, which knows the published width only."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    require(source.count("inner_dim = 3072") == 1, "diffusers' converter of FLUX.1 names its width once")
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {inner_dim}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(original))


def flux_names(tensors: dict) -> dict:
    names = {}
    for name in tensors:
        original, parts = original_flux_name(name)
        names[original] = parts if isinstance(parts, str) else " + ".join(f"transformer/{part}" for part in parts)
    return names


SIMPLE_FLUX_NAMES = [
    (r"x_embedder", "img_in"),
    (r"context_embedder", "txt_in"),
    (r"time_text_embed\.timestep_embedder", "time_in"),
    (r"time_text_embed\.guidance_embedder", "guidance_in"),
    (r"time_text_embed\.text_embedder", "vector_in"),
    (r"linear_1", "in_layer"),
    (r"linear_2", "out_layer"),
    (r"^proj_out", "final_layer.linear"),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
]


def original_flux_name(name: str):
    """The original name, and the tensors that it is made of."""
    block, _, leaf = name.rpartition(".")
    if name.startswith("norm_out."):
        return f"final_layer.adaLN_modulation.1.{leaf}", f"swapped transformer/{name}"
    if found := re.fullmatch(r"single_transformer_blocks\.(\d+)\.(attn\.to_[qkv]|proj_mlp)", block):
        parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
        block = f"single_transformer_blocks.{found[1]}"
        return f"single_blocks.{found[1]}.linear1.{leaf}", [f"{block}.{part}.{leaf}" for part in parts]
    if found := re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.(to_[qkv]|add_[qkv]_proj)", block):
        stream, parts = ("img", "to_{}") if found[2].startswith("to") else ("txt", "add_{}_proj")
        block = f"transformer_blocks.{found[1]}.attn"
        fused = [f"{block}.{parts.format(part)}.{leaf}" for part in "qkv"]
        return f"double_blocks.{found[1]}.{stream}_attn.qkv.{leaf}", fused
    original = name
    for pattern, replacement in SIMPLE_FLUX_NAMES:
        original = re.sub(pattern, replacement, original)
    return original, [name]


# --- reading and writing ---------------------------------------------------------------------------------------------


def load_component(folder: Path) -> dict:
    """All tensors of a component, as published."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_names(path: Path, names: dict) -> None:
    path.write_text("".join(f"{name} = {names[name]}\n" for name in sorted(names)), encoding="utf-8")


def assemble(checkpoint: Path, names: dict) -> dict:
    parts = {tensor.split("/")[0].split(" ")[-1] for tensor in names.values()}
    tensors = {f"{part}/{name}": t for part in parts for name, t in load_component(checkpoint / part).items()}

    def tensor(expression: str) -> torch.Tensor:
        if expression.startswith("transposed "):
            return tensors[expression.removeprefix("transposed ")].T.contiguous()
        if expression.startswith("swapped "):
            first, second = tensors[expression.removeprefix("swapped ")].chunk(2)
            return torch.cat([second, first])
        if expression.startswith("kernel "):
            return tensors[expression.removeprefix("kernel ")][:, :, None, None, None]
        return torch.cat([tensors[part] for part in expression.split(" + ")]).contiguous()

    return {name: tensor(expression) for name, expression in names.items()}


def require_same(what: str, model, tensors: dict) -> None:
    loaded = {name.removeprefix("text_model."): parameter for name, parameter in model.named_parameters()}
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    same = loaded.keys() == tensors.keys() and all(torch.equal(loaded[k].float(), t.float()) for k, t in tensors.items())
    require(same, f"{what}: diffusers reads the checkpoint's tensors from the single file ({len(tensors)})")


# --- velocities ------------------------------------------------------------------------------------------------------


def velocity_picture() -> dict:
    """What the markers `v_pred` and `ztsnr` of a file ask for, said to diffusers by hand."""
    checkpoint = ROOT / "sdxl-b" / "checkpoint"
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        checkpoint, dtype=torch.float32, variant="fp16", local_files_only=True, add_watermarker=False
    )
    published = sdxl_cases.record(pipeline, V_PREDICTION_RUN)[1]

    def picture(run=V_PREDICTION_RUN, **settings):
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **settings)
        return sdxl_cases.record(pipeline, run)

    without_snr = picture(prediction_type="v_prediction")[1]
    kept, image = picture(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    require_visible("velocities", image)
    require_moved("velocities", "the schedule without zero SNR", image, without_snr, ANOTHER_PROMPT)
    require_moved("velocities", "the model taken for one of noise", image, published, ANOTHER_PROMPT)
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    disturbed_run = V_PREDICTION_RUN | {"latents": disturbed(kept["noise"])}
    require_stable("velocities", image, picture(disturbed_run, **settings)[1])
    return {"v_prediction.image": image, "v_prediction_alone.image": without_snr}


# --- GGUF ------------------------------------------------------------------------------------------------------------

QUANTS = gguf.GGMLQuantizationType
# Types of the matrices, by what their names contain; the first that fits. Columns of K-quants come in 256s.
GGUF_TYPES = [
    ("time_in.in_layer.weight", QUANTS.Q4_K),
    ("img_mlp.2.weight", QUANTS.Q6_K),
    ("txt_mlp.2.weight", QUANTS.Q5_K),
    ("img_attn.proj.weight", QUANTS.Q4_0),
    ("txt_attn.proj.weight", QUANTS.Q5_1),
    ("img_mlp.0.weight", QUANTS.Q4_1),
    ("txt_mlp.0.weight", QUANTS.Q5_0),
    ("vector_in.", QUANTS.F32),
    ("txt_in.weight", QUANTS.F16),
    ("img_in.weight", QUANTS.BF16),
]
BLOCK_BYTES = {QUANTS.Q4_K: 144, QUANTS.Q5_K: 176, QUANTS.Q6_K: 210}


def gguf_picture(folder: Path) -> dict:
    """A transformer of one block of each kind, every type of blocks, beside the other parts of `flux-schnell`."""
    checkpoint = ROOT / "flux-schnell" / "checkpoint"
    model = flux_cases.transformer(
        seed=41,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=False,
    )
    names = flux_names(dict(model.state_dict()))
    original = {name: from_model(model.state_dict(), expression) for name, expression in names.items()}
    words = lambda writer: writer.add_array("test.words", ["a list", "of text"])
    original = write_gguf(folder / "transformer.gguf", "flux", original, type_of, seed=0, add_metadata=words)
    model.load_state_dict(convert_flux(original, model.inner_dim))
    model.save_config(folder / "gguf-transformer")
    pipeline = FluxPipeline.from_pretrained(
        checkpoint, transformer=model, dtype=torch.float32, local_files_only=True
    )
    kept, image = flux_cases.record(pipeline, GGUF_RUN)
    require_visible("gguf", image)
    require_stable("gguf", image, flux_cases.record(pipeline, GGUF_RUN | {"latents": disturbed(kept["noise"])})[1])
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("timestep_embedder.linear_1.weight", "ff.net.2.weight", "attn.to_out.0.weight")):
            saved = parameter.clone()
            parameter.mul_(0.5)
            require_moved("gguf", f"half of {name}", image, flux_cases.record(pipeline, GGUF_RUN)[1], ANOTHER_PROMPT)
            parameter.copy_(saved)
    return {"gguf.image": image, "gguf.prediction0": kept["prediction0"], "gguf.noise": kept["noise"]}


def from_model(tensors: dict, expression: str) -> torch.Tensor:
    if expression.startswith("swapped "):
        first, second = tensors[expression.removeprefix("swapped transformer/")].chunk(2)
        return torch.cat([second, first])
    return torch.cat([tensors[part.removeprefix("transformer/")] for part in expression.split(" + ")])


def write_gguf(path: Path, architecture: str, tensors: dict, type_of, seed: int, add_metadata=lambda writer: None) -> dict:
    """Writes the file, and gives what gguf reads from it. `type_of`: of a tensor with this name and values."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    add_metadata(writer)
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        kind = type_of(name, tensor)
        if kind in BLOCK_BYTES:
            data = random_blocks(kind, tensor, seed=seed + index)
        else:
            data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(path)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    print(f"  {path.name}: {path.stat().st_size / 1024:.0f} KiB, {', '.join(sorted(kinds))}")

    def values(tensor) -> torch.Tensor:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(found.astype(numpy.float32)).reshape(tensors[tensor.name].shape)

    return {tensor.name: values(tensor) for tensor in reader.tensors}


def type_of(name: str, tensor: torch.Tensor):
    if tensor.dim() < 2:
        return QUANTS.F32
    return next((kind for part, kind in GGUF_TYPES if part in name), QUANTS.Q8_0)


def random_blocks(kind, tensor: torch.Tensor, seed: int) -> numpy.ndarray:
    """Blocks of the spread of `tensor`: gguf reads K-quants and does not make them."""
    rows, columns = tensor.shape
    blocks = numpy.random.default_rng(seed).integers(0, 256, (rows * columns // 256, BLOCK_BYTES[kind]), numpy.uint8)
    scale = numpy.float16(1.0).tobytes()
    # Where a block has its scales (and the scale of its minima).
    for place in {QUANTS.Q4_K: (0, 2), QUANTS.Q5_K: (0, 2), QUANTS.Q6_K: (208,)}[kind]:
        blocks[:, place : place + 2] = numpy.frombuffer(scale, numpy.uint8)
    spread = gguf.quants.dequantize(blocks, kind).std()
    for place in {QUANTS.Q4_K: (0, 2), QUANTS.Q5_K: (0, 2), QUANTS.Q6_K: (208,)}[kind]:
        factor = numpy.float16(tensor.std().item() / spread).tobytes()
        blocks[:, place : place + 2] = numpy.frombuffer(factor, numpy.uint8)
    return blocks.reshape(rows, -1)
