"""HunyuanVideo in other files than diffusers': how its tiny checkpoints look under the names of the original implementation
and under ComfyUI's, networks in eight bits with scales, and a transformer and a language model as GGUF.

`*.names` are written as in `single_files_cases`. What diffusers' own converter reads from them has to be the checkpoint, and
what transformers reads from the language model's GGUF file is what answers.
"""

import copy
import inspect
import re
import shutil
import tempfile
from pathlib import Path

import gguf
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from transformers import LlamaModel

from . import hunyuan_video_cases
from .common import ROOT, fresh_case, require, write_golden
from .diffusion import ANOTHER_PROMPT, disturbed, quiet, require_moved, require_stable, require_visible
from .lora_cases import load
from .single_files_cases import QUANTS, assemble, from_model, load_component, original_vae_name, write_gguf, write_names
from .wan_files_cases import require_same

RUN = {
    "prompt": "Slow camera movement over a green valley",
    "width": 48,
    "height": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 6.0,
    "seed": 19,
    "max_sequence_length": 200,
}


def make() -> None:
    quiet()
    folder = fresh_case("hunyuan-files")
    for case in ("hunyuan-video-a", "hunyuan-video-b", "hunyuan-video-i2v", "hunyuan-video-i2v-33ch"):
        make_names(case, folder)
    tensors = eight_bits(folder) | ggufs(folder)
    facts = {"reference": "diffusers.HunyuanVideoPipeline", "run": RUN, "eight_bits": "hunyuan-video-a", "gguf": "hunyuan-video-a"}
    write_golden(folder, facts, tensors)


# --- original names --------------------------------------------------------------------------------------------------


def make_names(case: str, folder: Path) -> None:
    checkpoint = ROOT / case / "checkpoint"
    transformer = load_component(checkpoint / "transformer")
    names = original_names(transformer)
    write_names(folder / f"{case}.names", names)
    write_names(folder / f"{case}-comfy.names", {comfy_name(name): made for name, made in names.items()})
    width = transformer["proj_out.weight"].shape[1]
    converted = converter(width)(assemble(checkpoint, names))
    require_same(f"{case} transformer", converted, transformer)

    vae = load_component(checkpoint / "vae")
    names = vae_names(vae)
    write_names(folder / f"{case}-vae.names", names)
    require_vae(case, assemble(checkpoint, names), vae)

    encoder = load_component(checkpoint / "text_encoder")
    language, sight = {}, {}
    for name in encoder:
        made = f"text_encoder/{name}"
        if "vision_tower." in name:
            own = name.split("vision_tower.")[1].removeprefix("vision_model.")
            sight[f"vision_model.{own}"] = made
        elif "multi_modal_projector." in name:
            sight["multi_modal_projector." + name.split("multi_modal_projector.")[1]] = made
        elif "lm_head." not in name:
            language["model." + re.sub(r"^(model\.)?(language_model\.)?(model\.)?", "", name)] = made
    write_names(folder / f"{case}-llama.names", language)
    if sight:
        write_names(folder / f"{case}-sight.names", sight)


def vae_names(tensors: dict) -> dict:
    """Under which ComfyUI saves the VAE (`comfy/diffusers_convert.py`): the names of the VAEs of pictures, with the attention's
    projections as kernels."""
    levels = 1 + max(int(found[1]) for name in tensors if (found := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    names = {}
    for name, tensor in tensors.items():
        is_projection = ".attentions." in name and tensor.dim() == 2
        names[original_vae_name(name, levels)] = f"{'kernel ' if is_projection else ''}vae/{name}"
    return names


def require_vae(case: str, original: dict, tensors: dict) -> None:
    """diffusers' converter is that of the VAEs of pictures: it knows neither kernels of three dimensions nor what a causal
    convolution calls its own."""
    bare = lambda name: re.sub(r"\.conv\.(weight|bias)$", r".\1", name)
    tensors = {bare(name): tensor for name, tensor in tensors.items()}
    projection = lambda name, tensor: ".attn_1." in name and tensor.dim() == 5
    flat = {bare(name): tensor[..., 0] if projection(name, tensor) else tensor for name, tensor in original.items()}
    levels = {name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks.")}
    config = {"down_block_types": ["x"] * len(levels), "up_block_types": ["x"] * len(levels)}
    converted = single_file_utils.convert_ldm_vae_checkpoint(flat, config)
    same = converted.keys() == tensors.keys() and all(torch.equal(converted[name], tensors[name]) for name in tensors)
    require(same, f"{case}: diffusers reads the VAE's tensors from those of original names ({len(tensors)})")


def converter(width: int):
    """diffusers' converter, which knows the published width only."""
    source = inspect.getsource(single_file_utils.convert_hunyuan_video_transformer_to_diffusers)
    require(source.count("hidden_size = 3072") == 1, "diffusers' converter of HunyuanVideo names its width once")
    scope = dict(vars(single_file_utils))
    exec(source.replace("hidden_size = 3072", f"hidden_size = {width}"), scope)
    return scope["convert_hunyuan_video_transformer_to_diffusers"]


def original_names(tensors: dict) -> dict:
    names = {}
    for name in tensors:
        original, parts = original_name(name)
        names[original] = parts if isinstance(parts, str) else " + ".join(f"transformer/{part}" for part in parts)
    return names


SIMPLE_NAMES = [
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1", "txt_in.t_embedder.mlp.0"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2", "txt_in.t_embedder.mlp.2"),
    (r"^context_embedder\.time_text_embed\.text_embedder", "txt_in.c_embedder"),
    (r"^context_embedder\.proj_in", "txt_in.input_embedder"),
    (r"^context_embedder\.token_refiner\.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
    (r"(individual_token_refiner.*)\.attn\.to_out\.0", r"\1.self_attn_proj"),
    (r"(individual_token_refiner.*)\.norm_out\.linear", r"\1.adaLN_modulation.1"),
    (r"(individual_token_refiner.*)\.ff\.net\.0\.proj", r"\1.mlp.fc1"),
    (r"(individual_token_refiner.*)\.ff\.net\.2", r"\1.mlp.fc2"),
    (r"^x_embedder", "img_in"),
    (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
    (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.mlp.0"),
    (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^proj_out", "final_layer.linear"),
    (r"^single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.linear"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])", r"single_blocks.\1.\2_norm"),
    (r"^single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.linear"),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.linear"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_([qk])", r"double_blocks.\1.img_attn_\2_norm"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_([qk])", r"double_blocks.\1.txt_attn_\2_norm"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn_proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn_proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.fc2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.fc2"),
]


def original_name(name: str):
    """The original name, and the tensors that it is made of."""
    block, _, leaf = name.rpartition(".")
    if name.startswith("norm_out."):
        return f"final_layer.adaLN_modulation.1.{leaf}", f"swapped transformer/{name}"
    if found := re.fullmatch(r"single_transformer_blocks\.(\d+)\.(attn\.to_[qkv]|proj_mlp)", block):
        parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
        block = f"single_transformer_blocks.{found[1]}"
        return f"single_blocks.{found[1]}.linear1.{leaf}", [f"{block}.{part}.{leaf}" for part in parts]
    if found := re.fullmatch(r"(.*\.attn)\.(to_[qkv]|add_[qkv]_proj)", block):
        parts = "to_{}" if found[2].startswith("to") else "add_{}_proj"
        fused = [f"{found[1]}.{parts.format(part)}.{leaf}" for part in "qkv"]
        number = re.search(r"blocks\.(\d+)\.", name)[1]
        if name.startswith("context_embedder."):
            return f"txt_in.individual_token_refiner.blocks.{number}.self_attn_qkv.{leaf}", fused
        stream = "img" if found[2].startswith("to") else "txt"
        return f"double_blocks.{number}.{stream}_attn_qkv.{leaf}", fused
    original = name
    for pattern, replacement in SIMPLE_NAMES:
        original = re.sub(pattern, replacement, original)
    return original, [name]


def comfy_name(original: str) -> str:
    """What ComfyUI calls a tensor when it saves the network (`HunyuanVideo.process_unet_state_dict`)."""
    for pattern, replacement in [
        (r"c_embedder\.linear_1\.", "c_embedder.in_layer."),
        (r"c_embedder\.linear_2\.", "c_embedder.out_layer."),
        (r"^((txt_in\.t_embedder|time_in|guidance_in)\.)mlp\.0\.", r"\1in_layer."),
        (r"^((txt_in\.t_embedder|time_in|guidance_in)\.)mlp\.2\.", r"\1out_layer."),
        (r"_mod\.linear\.", "_mod.lin."),
        (r"\.modulation\.linear\.", ".modulation.lin."),
        (r"_attn_(qkv|proj)\.", r"_attn.\1."),
        (r"mlp\.fc1\.", "mlp.0."),
        (r"mlp\.fc2\.", "mlp.2."),
        (r"_attn_q_norm\.weight", "_attn.norm.query_norm.scale"),
        (r"_attn_k_norm\.weight", "_attn.norm.key_norm.scale"),
        (r"\.q_norm\.weight", ".norm.query_norm.scale"),
        (r"\.k_norm\.weight", ".norm.key_norm.scale"),
    ]:
        original = re.sub(pattern, replacement, original)
    return original


# --- eight bits ------------------------------------------------------------------------------------------------------


def eight_bits(folder: Path) -> dict:
    """As ComfyUI's scaled files: the matrices of blocks and layers in eight bits, each with a scale, and a marker."""
    pipeline = load(HunyuanVideoPipeline, "hunyuan-video-a")
    plain = clip(pipeline)
    in_blocks = lambda name, tensor: "_blocks." in name and tensor.dim() == 2
    narrowed = narrow(original_tensors(pipeline.transformer), in_blocks, torch.float8_e4m3fn, scaled=True)
    put(pipeline.transformer, narrowed.values)
    save_file(narrowed.file, folder / "transformer-e4m3.safetensors", metadata={"format": "pt"})
    language = {f"model.{name}": tensor for name, tensor in pipeline.text_encoder.state_dict().items()}
    in_layers = lambda name, tensor: ".layers." in name and tensor.dim() == 2
    narrowed = narrow(language, in_layers, torch.float8_e4m3fn, scaled=True)
    pipeline.text_encoder.load_state_dict({name.removeprefix("model."): v for name, v in narrowed.values.items()})
    save_file(narrowed.file, folder / "text_encoder-e4m3.safetensors", metadata={"format": "pt"})
    frames = judged("eight bits", pipeline, plain)

    # Without scales, in the wider of the two formats, and as ComfyUI saves it.
    pipeline = load(HunyuanVideoPipeline, "hunyuan-video-a")
    narrowed = narrow(original_tensors(pipeline.transformer), in_blocks, torch.float8_e5m2, scaled=False)
    put(pipeline.transformer, narrowed.values)
    file = {f"model.model.{comfy_name(name)}": tensor for name, tensor in narrowed.file.items()}
    save_file(file, folder / "transformer-e5m2.safetensors", metadata={"format": "pt"})
    return {"e4m3.frames": frames, "e5m2.frames": judged("e5m2", pipeline, plain)}


def original_tensors(transformer) -> dict:
    state = transformer.state_dict()
    return {name: from_model(state, made).clone() for name, made in original_names(state).items()}


class Narrowed:
    def __init__(self):
        self.file, self.values = {}, {}


def narrow(tensors: dict, is_narrow, dtype, scaled: bool) -> Narrowed:
    """What the file holds, and the values that it stands for."""
    made = Narrowed()
    if scaled:
        made.file["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    for name, tensor in tensors.items():
        if not is_narrow(name, tensor):
            made.file[name] = made.values[name] = tensor.clone()
            continue
        # Half of the range is used, so that the scale matters.
        scale = (tensor.abs().max() / 200.0).reshape(()) if scaled else torch.ones(())
        made.file[name] = (tensor / scale).to(dtype)
        made.values[name] = made.file[name].float() * scale
        if scaled:
            layer = name.removesuffix(".weight")
            made.file[f"{layer}.scale_weight"] = scale.clone()
            if "fc1" in name or "gate_proj" in name:
                made.file[f"{layer}.scale_input"] = torch.ones(())
    return made


def put(transformer, original: dict) -> None:
    """Into the network, by diffusers' converter."""
    transformer.load_state_dict(converter(transformer.proj_out.weight.shape[1])(dict(original)))


# --- GGUF ------------------------------------------------------------------------------------------------------------

# Types of the matrices by what their names contain; the first that fits. Columns of K-quants come in 256s.
TRANSFORMER_TYPES = [
    ("img_in.", QUANTS.F32),
    ("vector_in.in_layer", QUANTS.F32),
    ("time_in.mlp.0.weight", QUANTS.Q4_K),
    ("img_mlp.fc2.weight", QUANTS.Q6_K),
    ("txt_mlp.fc2.weight", QUANTS.Q5_K),
    ("img_attn_qkv.weight", QUANTS.Q4_0),
    ("linear1.weight", QUANTS.Q5_1),
    ("adaLN_modulation.1.weight", QUANTS.Q5_0),
    ("final_layer.linear.weight", QUANTS.F16),
    ("guidance_in.mlp.2", QUANTS.BF16),
    ("modulation.linear.weight", QUANTS.Q4_1),
    ("_mod.linear.weight", QUANTS.Q4_1),
    ("_mlp.fc1.weight", QUANTS.Q4_0),
    ("linear2.weight", QUANTS.Q4_0),
]
# Rows of 68 are no whole blocks: such matrices stay as they are, as converters leave them.
ENCODER_TYPES = [
    ("ffn_down", QUANTS.F16),
    ("attn_k", QUANTS.Q4_0),
    ("attn_v", QUANTS.Q5_1),
    ("blk.1.attn_q", QUANTS.F16),
]


def ggufs(folder: Path) -> dict:
    """A transformer and a language model in blocks, beside the other parts of `hunyuan-video-a`."""
    pipeline = load(HunyuanVideoPipeline, "hunyuan-video-a")
    transformer = hunyuan_video_cases.transformer(
        seed=81,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        rope_axes_dim=(8, 12, 12),
        text_embed_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
    )
    encoder = hunyuan_video_cases.llama(seed=82, width=32, heads=4, key_value_heads=2, layers=4)
    pipeline.transformer, pipeline.text_encoder = copy.deepcopy(transformer), copy.deepcopy(encoder)
    plain = clip(pipeline)

    read = write_gguf(folder / "transformer.gguf", "hyvid", original_tensors(transformer), typed(TRANSFORMER_TYPES), seed=200)
    require(read["img_in.proj.weight"].dim() == 5, "gguf: the patches have five dimensions")
    put(pipeline.transformer, read)
    transformer.save_config(folder / "gguf-transformer")

    write_gguf(
        folder / "text_encoder.gguf",
        "llama",
        llama_cpp_tensors(encoder),
        typed(ENCODER_TYPES),
        seed=300,
        add_metadata=lambda writer: add_llama(writer, encoder.config),
    )
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(folder / "text_encoder.gguf", scratch)
        read = LlamaModel.from_pretrained(scratch, gguf_file="text_encoder.gguf", dtype=torch.float32)
    require(read.config.rope_parameters["rope_theta"] == 500000.0, "transformers reads the base of the rotations")
    for name, tensor in encoder.state_dict().items():
        distance = (read.state_dict()[name] - tensor).norm() / tensor.norm()
        require(distance < 0.1, f"transformers reads {name} to {distance:.3f}")
    pipeline.text_encoder.load_state_dict(read.state_dict())
    (folder / "gguf-text_encoder").mkdir()
    encoder.config.architectures = ["LlamaModel"]
    (folder / "gguf-text_encoder/config.json").write_text(encoder.config.to_json_string())

    frames = judged("gguf", pipeline, plain)
    for network, part in [
        (pipeline.transformer, "time_text_embed.timestep_embedder.linear_1.weight"),
        (pipeline.transformer, "ff.net.2.weight"),
        (pipeline.transformer, "attn.to_v.weight"),
        (pipeline.transformer, "norm_out.linear.weight"),
        (pipeline.text_encoder, "embed_tokens.weight"),
        (pipeline.text_encoder, "layers.1.mlp.down_proj.weight"),
    ]:
        for name, parameter in network.named_parameters():
            if part in name:
                saved = parameter.clone()
                parameter.mul_(0.5)
                require_moved("gguf", f"half of {name}", frames, clip(pipeline), ANOTHER_PROMPT + 10)
                parameter.copy_(saved)
    # Rows that are rotated with others than their own.
    for projection, heads in (("q_proj", 4), ("k_proj", 2)):
        weights = [getattr(layer.self_attn, projection).weight for layer in pipeline.text_encoder.layers]
        saved = [weight.clone() for weight in weights]
        for weight in weights:
            weight.copy_(permuted(weight, heads))
        require_moved("gguf", f"other rows of {projection}", frames, clip(pipeline), ANOTHER_PROMPT + 10)
        for weight, before in zip(weights, saved):
            weight.copy_(before)
    return {"gguf.frames": frames}


def typed(types: list):
    """What `write_gguf` asks, of such a table."""

    def type_of(name: str, tensor: torch.Tensor):
        if tensor.dim() < 2:
            return QUANTS.F32
        return next((kind for part, kind in types if part in name), QUANTS.Q8_0)

    return type_of


def llama_cpp_tensors(model) -> dict:
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name:
            tensor = permuted(tensor, config.num_attention_heads)
        if "k_proj" in name:
            tensor = permuted(tensor, config.num_key_value_heads)
        tensors[llama_cpp_name(name)] = tensor.contiguous()
    # The head, which says words and is not read.
    tensors["output.weight"] = tensors["token_embd.weight"].clone()
    return tensors


def permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head as llama.cpp has them: one of the first half, one of the second, and so on."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(tensor.shape)


def llama_cpp_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 64)
    layer, leaf = name.rsplit(".", 1)
    found = names.get_name(f"model.{layer}")
    require(found is not None, f"llama.cpp has a name for {name}: {found}")
    return f"{found}.{leaf}"


def add_llama(writer, config) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


# --- clips -----------------------------------------------------------------------------------------------------------


def clip(pipeline, **changes) -> torch.Tensor:
    return hunyuan_video_cases.record(pipeline, RUN | changes)[1]


def judged(name: str, pipeline, plain: torch.Tensor) -> torch.Tensor:
    kept, frames = hunyuan_video_cases.record(pipeline, RUN)
    require_visible(name, frames)
    require_moved(name, "the clip of the weights before they were rounded", frames, plain, 60.0)
    require_stable(name, frames, clip(pipeline, latents=disturbed(kept["noise"])))
    return frames
