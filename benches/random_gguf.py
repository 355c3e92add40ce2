"""GGUF files of TinyLlama's shape with random weights, in several types of blocks, for benches beside llama.cpp.

Owns: the f16 file, written with the `gguf` package, and its quantised versions, made by llama.cpp itself: every matrix has the one
type, embeddings and head too. What they say is noise; shapes, types and vocabulary are valid for both programs.
"""

import json
from pathlib import Path

import gguf
import llama_cpp
import numpy

ROOT = Path(__file__).resolve().parents[1]
SHAPE = json.loads((ROOT / "models/src/presets/tinyllama-1.1b.json").read_text())
TYPES = {
    "F16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
}


def files(folder: Path, types: list[str], threads: int) -> list[Path]:
    """One file for each type, made unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "tinyllama-1.1b-random.F16.gguf"
    if not plain.exists():
        write_plain(plain.with_suffix(".part"))
        plain.with_suffix(".part").rename(plain)
    return [plain if name == "F16" else quantised(plain, name, threads) for name in types]


def quantised(plain: Path, name: str, threads: int) -> Path:
    path = plain.with_name(f"tinyllama-1.1b-random.{name}.gguf")
    if not path.exists():
        part = path.with_suffix(".part")
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.pure, params.nthread = TYPES[name], True, threads
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(part).encode(), params) != 0:
            raise SystemExit(f"llama.cpp could not quantise {plain} as {name}")
        part.rename(path)
    return path


def write_plain(path: Path) -> None:
    dim, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    heads, kv_heads, layers = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"], SHAPE["num_hidden_layers"]
    kv_dim = dim // heads * kv_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(dim // heads)
    writer.add_rope_freq_base(SHAPE["rope_theta"])
    writer.add_layer_norm_rms_eps(SHAPE["rms_norm_eps"])
    writer.add_vocab_size(SHAPE["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_vocabulary(writer)

    # One stretch of noise, from another place for each matrix: 1.1 billion draws would take longer than the bench.
    noise = (0.02 * numpy.random.default_rng(1).standard_normal(SHAPE["vocab_size"] * dim + (1 << 16), numpy.float32))
    noise = noise.astype(numpy.float16)
    starts = iter(numpy.random.default_rng(2).integers(0, 1 << 16, 7 * layers + 2).tolist())

    def matrix(name: str, rows: int, columns: int) -> None:
        start = next(starts)
        writer.add_tensor(f"{name}.weight", noise[start : start + rows * columns].reshape(rows, columns))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(dim, numpy.float32))

    matrix("token_embd", SHAPE["vocab_size"], dim)
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        for name, rows, columns in [
            ("attn_q", dim, dim),
            ("attn_k", kv_dim, dim),
            ("attn_v", kv_dim, dim),
            ("attn_output", dim, dim),
            ("ffn_gate", inner, dim),
            ("ffn_up", inner, dim),
            ("ffn_down", dim, inner),
        ]:
            matrix(f"{block}.{name}", rows, columns)
    norm("output_norm")
    matrix("output", SHAPE["vocab_size"], dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Control tokens, all bytes, and pieces that are as many as the shape asks for."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256]
    pieces = [f"\u2581{number}" for number in range(SHAPE["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + pieces)
    writer.add_token_scores([0.0] * len(tokens) + [-float(number) for number in range(len(pieces))])
    writer.add_token_types(types + [gguf.TokenType.NORMAL] * len(pieces))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
