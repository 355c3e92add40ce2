"""Wan2.1 in other files than diffusers': how its tiny checkpoints look under the names of the original implementation, a
transformer in eight bits with scales, and a transformer and a text encoder as GGUF.

`*.names` are written as in `single_files_cases`. What diffusers' own converters read from them has to be the checkpoint.
"""

import copy
import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from . import wan_cases
from .common import ROOT, fresh_case, require, write_golden
from .diffusion import ANOTHER_PROMPT, disturbed, quiet, require_moved, require_stable, require_visible
from .lora_cases import load
from .single_files_cases import QUANTS, assemble, load_component, write_gguf, write_names

RUN = {
    "prompt": "Slow camera movement over a green valley",
    "negative_prompt": "Rain and smoke",
    "width": 48,
    "height": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "seed": 19,
    "max_sequence_length": 40,
}


def make() -> None:
    quiet()
    folder = fresh_case("wan-files")
    for case in ("wan-a", "wan-b", "wan-i2v", "wan-flf2v"):
        make_names(case, folder)
    tensors = eight_bits(folder) | ggufs(folder)
    facts = {"reference": "diffusers.WanPipeline", "run": RUN, "eight_bits": "wan-a", "gguf": "wan-a"}
    write_golden(folder, facts, tensors)


# --- original names --------------------------------------------------------------------------------------------------


def make_names(case: str, folder: Path) -> None:
    checkpoint = ROOT / case / "checkpoint"
    names = {original_transformer_name(name): f"transformer/{name}" for name in load_component(checkpoint / "transformer")}
    write_names(folder / f"{case}.names", names)
    converted = convert_wan_transformer_to_diffusers(assemble(checkpoint, names))
    # The one name that diffusers' converter does not know, which tells first-last-frame models.
    own = "condition_embedder.image_embedder.pos_embed"
    converted = {own if key == "img_emb.emb_pos" else key: value for key, value in converted.items()}
    require_same(f"{case} transformer", converted, load_component(checkpoint / "transformer"))

    config = json.loads((checkpoint / "vae/config.json").read_text())
    vae = load_component(checkpoint / "vae")
    names = {original_vae_name(name, config["num_res_blocks"]): f"vae/{name}" for name in vae}
    write_names(folder / f"{case}-vae.names", names)
    if config["num_res_blocks"] == AutoencoderKLWan().config.num_res_blocks:
        require_same(f"{case} vae", convert_wan_vae_to_diffusers(assemble(checkpoint, names)), vae)

    encoder = load_component(checkpoint / "text_encoder")
    encoder.pop("encoder.embed_tokens.weight", None)
    write_names(folder / f"{case}-umt5.names", {original_umt5_name(name): f"text_encoder/{name}" for name in encoder})
    if (checkpoint / "image_encoder").is_dir():
        write_names(folder / f"{case}-visual.names", visual_names(load_component(checkpoint / "image_encoder")))


def require_same(what: str, converted: dict, tensors: dict) -> None:
    same = converted.keys() == tensors.keys() and all(torch.equal(converted[k], t) for k, t in tensors.items())
    require(same, f"{what}: diffusers reads the checkpoint's tensors from the original names ({len(tensors)})")


def original_transformer_name(name: str) -> str:
    for pattern, replacement in [
        (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
        (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
        (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
        (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
        (r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
        (r"^scale_shift_table", "head.modulation"),
        (r"scale_shift_table", "modulation"),
        (r"^proj_out", "head.head"),
        (r"\.norm2\.", ".norm3."),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.add_([kv])_proj\.", r".\1_img."),
        (r"\.norm_added_k\.", ".norm_k_img."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
    ]:
        name = re.sub(pattern, replacement, name)
    return name


def original_vae_name(name: str, num_res_blocks: int) -> str:
    def flat(match) -> str:
        block, kind, index = int(match[1]), match[2], int(match[3])
        place = index if kind == "resnets" else num_res_blocks + 1
        return f"decoder.upsamples.{block * (num_res_blocks + 2) + place}."

    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, name)
    for pattern, replacement in [
        (r"^encoder\.down_blocks\.", "encoder.downsamples."),
        (r"mid_block\.resnets\.0\.", "middle.0."),
        (r"mid_block\.attentions\.0\.", "middle.1."),
        (r"mid_block\.resnets\.1\.", "middle.2."),
        (r"\.norm1\.", ".residual.0."),
        (r"\.conv1\.", ".residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"\.conv2\.", ".residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"\.conv_in\.", ".conv1."),
        (r"\.norm_out\.", ".head.0."),
        (r"\.conv_out\.", ".head.2."),
        (r"^quant_conv\.", "conv1."),
        (r"^post_quant_conv\.", "conv2."),
    ]:
        name = re.sub(pattern, replacement, name)
    return name


def original_umt5_name(name: str) -> str:
    for pattern, replacement in [
        (r"^shared\.", "token_embedding."),
        (r"^encoder\.final_layer_norm\.", "norm."),
        (r"^encoder\.block\.(\d+)\.", r"blocks.\1."),
        (r"layer\.0\.SelfAttention\.relative_attention_bias\.", "pos_embedding.embedding."),
        (r"layer\.0\.SelfAttention\.", "attn."),
        (r"layer\.([01])\.layer_norm\.", lambda m: f"norm{int(m[1]) + 1}."),
        (r"layer\.1\.DenseReluDense\.wi_0\.", "ffn.gate.0."),
        (r"layer\.1\.DenseReluDense\.wi_1\.", "ffn.fc1."),
        (r"layer\.1\.DenseReluDense\.wo\.", "ffn.fc2."),
    ]:
        name = re.sub(pattern, replacement, name)
    return name


def visual_names(tensors: dict) -> dict:
    """Embeddings have the dimensions of a batch in front there, which the test adds."""
    names = {}
    for full in tensors:
        name = full.removeprefix("vision_model.")
        if found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)", name):
            parts = [re.sub(r"\.[qkv]_proj\.", f".{part}_proj.", full) for part in "qkv"]
            names[f"visual.transformer.{found[1]}.attn.to_qkv.{found[2]}"] = " + ".join(
                f"image_encoder/{part}" for part in parts
            )
            continue
        for pattern, replacement in [
            (r"^embeddings\.class_embedding$", "cls_embedding"),
            (r"^embeddings\.position_embedding\.weight$", "pos_embedding"),
            (r"^embeddings\.patch_embedding\.", "patch_embedding."),
            (r"^pre_layrnorm\.", "pre_norm."),
            (r"^post_layernorm\.", "post_norm."),
            (r"^encoder\.layers\.", "transformer."),
            (r"\.self_attn\.out_proj\.", ".attn.proj."),
            (r"\.layer_norm([12])\.", r".norm\1."),
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.2."),
        ]:
            name = re.sub(pattern, replacement, name)
        names[f"visual.{name}"] = f"image_encoder/{full}"
    return names


# --- eight bits ------------------------------------------------------------------------------------------------------


def eight_bits(folder: Path) -> dict:
    """As ComfyUI's scaled files: the matrices of the blocks in eight bits, each with a scale, and a marker."""
    pipeline = load(WanPipeline, "wan-a")
    model = pipeline.transformer
    file = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    plain = wan_clip(pipeline)
    for name, parameter in model.named_parameters():
        original = original_transformer_name(name)
        is_matrix = name.startswith("blocks.") and parameter.dim() == 2 and name.endswith(".weight")
        if not is_matrix:
            file[original] = parameter.clone()
            continue
        # Half of the range is used, so that the scale matters.
        scale = (parameter.abs().max() / 200.0).reshape(())
        file[original] = (parameter / scale).to(torch.float8_e4m3fn)
        layer = original.removesuffix(".weight")
        file[f"{layer}.scale_weight"] = scale.clone()
        if ".ffn." in original:
            file[f"{layer}.scale_input"] = torch.ones(())
        parameter.copy_(file[original].float() * scale)
    save_file(file, folder / "transformer-e4m3.safetensors", metadata={"format": "pt"})
    clip = judged("eight bits", pipeline, plain)

    # Without scales, and in the wider of the two formats.
    pipeline = load(WanPipeline, "wan-a")
    file = {}
    for name, parameter in pipeline.transformer.named_parameters():
        is_narrow = name.startswith("blocks.") and parameter.dim() == 2
        value = parameter.to(torch.float8_e5m2) if is_narrow else parameter.clone()
        file[f"model.diffusion_model.{original_transformer_name(name)}"] = value
        parameter.copy_(value.float())
    save_file(file, folder / "transformer-e5m2.safetensors", metadata={"format": "pt"})
    return {"e4m3.frames": clip, "e5m2.frames": judged("e5m2", pipeline, plain)}


# --- GGUF ------------------------------------------------------------------------------------------------------------

# Types of the matrices by what their names contain; the first that fits. Columns of K-quants come in 256s.
TRANSFORMER_TYPES = [
    ("patch_embedding", QUANTS.F32),
    ("time_embedding.0.weight", QUANTS.Q4_K),
    ("ffn.2.weight", QUANTS.Q6_K),
    ("self_attn.q.weight", QUANTS.Q4_0),
    ("cross_attn.v.weight", QUANTS.Q5_0),
    ("head.head.weight", QUANTS.F16),
    ("time_projection.1.weight", QUANTS.BF16),
]
# Rows of 44 are no whole blocks: such matrices stay as they are, as converters leave them.
ENCODER_TYPES = [("ffn_down", QUANTS.F16), ("attn_rel_b", QUANTS.F16), ("token_embd", QUANTS.Q8_0), ("attn_o", QUANTS.Q5_1)]


def ggufs(folder: Path) -> dict:
    """A transformer and a text encoder in blocks, beside the other parts of `wan-a`."""
    pipeline = load(WanPipeline, "wan-a")
    transformer = wan_cases.transformer(
        seed=61, num_attention_heads=2, attention_head_dim=32, text_dim=32, ffn_dim=256, num_layers=2
    )
    encoder = wan_cases.umt5(seed=62, width=32, heads=4, layers=2)
    pipeline.transformer, pipeline.text_encoder = copy.deepcopy(transformer), copy.deepcopy(encoder)
    plain = wan_clip(pipeline)

    tensors = {original_transformer_name(name): tensor for name, tensor in transformer.state_dict().items()}
    read = write_gguf(folder / "transformer.gguf", "wan", tensors, typed(TRANSFORMER_TYPES), seed=100)
    require(read["patch_embedding.weight"].dim() == 5, "gguf: the patches have five dimensions")
    pipeline.transformer.load_state_dict(convert_wan_transformer_to_diffusers(read))
    transformer.save_config(folder / "gguf-transformer")

    own = {name: gguf_name(name) for name in encoder.state_dict() if name != "encoder.embed_tokens.weight"}
    tensors = {gguf: encoder.state_dict()[name] for name, gguf in own.items()}
    read = write_gguf(folder / "text_encoder.gguf", "t5encoder", tensors, typed(ENCODER_TYPES), seed=100)
    read = {name: read[gguf] for name, gguf in own.items()}
    pipeline.text_encoder.load_state_dict(read | {"encoder.embed_tokens.weight": read["shared.weight"]})
    (folder / "gguf-text_encoder").mkdir()
    encoder.config.architectures = ["UMT5EncoderModel"]
    (folder / "gguf-text_encoder/config.json").write_text(encoder.config.to_json_string())

    clip = judged("gguf", pipeline, plain)
    for network, part in [
        (pipeline.transformer, "time_embedder.linear_1.weight"),
        (pipeline.transformer, "ffn.net.2.weight"),
        (pipeline.transformer, "attn2.to_v.weight"),
        (pipeline.text_encoder, "SelfAttention.o.weight"),
        (pipeline.text_encoder, "shared.weight"),
    ]:
        for name, parameter in network.named_parameters():
            if part in name:
                saved = parameter.clone()
                parameter.mul_(0.5)
                require_moved("gguf", f"half of {name}", clip, wan_clip(pipeline), ANOTHER_PROMPT + 10)
                parameter.copy_(saved)
    return {"gguf.frames": clip}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of a T5 encoder."""
    for pattern, replacement in [
        (r"^shared\.", "token_embd."),
        (r"^encoder\.final_layer_norm\.", "enc.output_norm."),
        (r"^encoder\.block\.(\d+)\.", r"enc.blk.\1."),
        (r"layer\.0\.SelfAttention\.relative_attention_bias\.", "attn_rel_b."),
        (r"layer\.0\.SelfAttention\.([qkvo])\.", r"attn_\1."),
        (r"layer\.0\.layer_norm\.", "attn_norm."),
        (r"layer\.1\.layer_norm\.", "ffn_norm."),
        (r"layer\.1\.DenseReluDense\.wi_0\.", "ffn_gate."),
        (r"layer\.1\.DenseReluDense\.wi_1\.", "ffn_up."),
        (r"layer\.1\.DenseReluDense\.wo\.", "ffn_down."),
    ]:
        name = re.sub(pattern, replacement, name)
    return name


def typed(types: list):
    """What `write_gguf` asks, of such a table."""
    return lambda name, tensor: type_of(name, tensor, types)


def type_of(name: str, tensor: torch.Tensor, types: list):
    if tensor.dim() < 2 or "modulation" in name:
        return QUANTS.F32
    return next((kind for part, kind in types if part in name), QUANTS.Q8_0)


# --- clips -----------------------------------------------------------------------------------------------------------


def wan_clip(pipeline, **changes) -> torch.Tensor:
    return wan_cases.record(pipeline, RUN | changes)[1]


def judged(name: str, pipeline, plain: torch.Tensor) -> torch.Tensor:
    kept, clip = wan_cases.record(pipeline, RUN)
    require_visible(name, clip)
    require_moved(name, "the clip of the weights before they were rounded", clip, plain, 60.0)
    require_stable(name, clip, wan_clip(pipeline, latents=disturbed(kept["noise"])))
    return clip
