"""Language models in one GGUF file each: llama and qwen2, every type of blocks, every kind of vocabulary, in parts and whole.

The reference is transformers over exactly the dequantised weights, and the tokenizer from which the vocabulary was made.
"""

import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from . import corpus, k_quants, text_cases, tokenizers_cases
from .common import fresh_case, normal, randomise, relative_difference, require, write_golden
from .gguf_vocabularies import CONTROL, Vocabulary, byte_level, sentence_piece, smollm_backend

QUANTS = gguf.GGMLQuantizationType
K_QUANTS = (QUANTS.Q4_K, QUANTS.Q5_K, QUANTS.Q6_K)
# All logits of the first prompt, and those after the last token of the others.
PROMPTS = text_cases.PROMPTS
SMOLLM_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Case:
    architecture: str
    model: object
    config: object
    vocabulary: Vocabulary
    # Type of a tensor by its name in the file.
    type_of: object
    # Further metadata.
    describe: object
    # Tensors of one part; 0 for one file.
    tensors_per_part: int = 0
    notes: list = field(default_factory=list)


def make() -> None:
    for name, case in cases().items():
        make_case(name, case)
    make_published()


def make_case(name: str, case: Case) -> None:
    folder = fresh_case(f"language-gguf/{name}")
    reference = case.vocabulary.reference
    prompts = [reference(prompt).input_ids for prompt in PROMPTS]
    seed, model, written = separated_model(case, prompts)
    write_model(folder, case, written)
    require_written(folder, written)
    tensors = answers(model, prompts)
    facts = {
        "architecture": case.architecture,
        "seed": seed,
        "reference": f"transformers.{type(model).__name__}, {type(reference).__name__}",
        "types": sorted({kind.name for _, kind, _ in written.values()}),
        "prompts": PROMPTS,
        "chats": [text_cases.chat(reference, messages) for messages in chats(reference)],
        "greedy_text": [
            reference.decode(tensors[f"greedy.{i}"], skip_special_tokens=True) for i in range(len(prompts))
        ],
        "strings": [tokenizers_cases.describe(reference, text) for text in corpus.STRINGS + specials(reference)],
        "notes": case.notes,
    }
    check(name, case, model, prompts, tensors)
    write_golden(folder, facts, tensors)


def specials(reference) -> list[str]:
    end = reference.eos_token
    return [end, f"text{end}more", f"a {end} b", f"{end}\n{end}"]


def chats(reference) -> list:
    def is_taken(messages) -> bool:
        try:
            reference.apply_chat_template(messages, tokenize=False)
        except Exception:  # noqa: BLE001: a template may refuse a conversation in its own way
            return False
        return True

    return [messages for messages in text_cases.CHATS if is_taken(messages)]


# So wide that a tied model would echo with a table of the spread that narrow ones have.
WEIGHTS = [
    ("embed_tokens.weight", lambda p, g: normal(p, g, 3.0 / math.sqrt(p.shape[1]))),
    ("down_proj.weight", lambda p, g: normal(p, g, 3.0 / math.sqrt(p.shape[1]))),
    *text_cases.WEIGHTS,
]

# --- the model -------------------------------------------------------------------------------------------------------


def separated_model(case: Case, prompts):
    """The first seed whose greedy answers over the dequantised weights are varied and have no near ties."""
    for seed in range(1000):
        model = case.model(case.config).eval()
        randomise(model, seed, overrides=WEIGHTS)
        model.get_output_embeddings().weight[len(case.vocabulary.reference) :] *= 0.01
        written = quantised(case, model)
        take(case, model, written)
        if all(text_cases.is_separated(*text_cases.greedy(model, prompt)) for prompt in prompts):
            print(f"  seed {seed}")
            return seed, model, written
    raise SystemExit("FAILED: no seed separates the logits")


def quantised(case: Case, model) -> dict:
    """By name in the file: what is written, its type, and the values that this stands for."""
    written = {}
    for name, tensor in sorted(file_tensors(case, model).items()):
        kind = QUANTS.F32 if tensor.dim() < 2 else case.type_of(name)
        write = k_quants.quantise if kind in K_QUANTS else gguf.quants.quantize
        data = write(tensor.float().numpy(), kind)
        values = gguf.quants.dequantize(data, kind).astype(numpy.float32)
        written[name] = (data, kind, torch.from_numpy(values).reshape(tensor.shape))
    return written


def file_tensors(case: Case, model) -> dict:
    """Under llama.cpp's names, with its order of rows."""
    names = gguf.get_tensor_name_map(architecture(case), case.config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and case.config.tie_word_embeddings:
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensors[there] = permuted(case, name, parameter.clone())
    if rope_factors(model) is not None:
        tensors["rope_freqs.weight"] = rope_factors(model)
    return tensors


def take(case: Case, model, written: dict) -> None:
    """Gives the model the values that the file stands for."""
    names = gguf.get_tensor_name_map(architecture(case), case.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        parameter.copy_(permuted(case, name, written[there][2], back=True))


def architecture(case: Case):
    return {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[case.architecture]


def permuted(case: Case, name: str, tensor: torch.Tensor, back: bool = False) -> torch.Tensor:
    """llama.cpp's order of the rows of a Llama's queries and keys, or from it back."""
    if case.architecture != "llama" or not ("q_proj" in name or "k_proj" in name):
        return tensor
    heads = case.config.num_attention_heads if "q_proj" in name else case.config.num_key_value_heads
    half = tensor.shape[0] // heads // 2
    parts = (heads, half, 2) if back else (heads, 2, half)
    return tensor.reshape(*parts, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def rope_factors(model):
    """Divisors of the frequencies, where the configuration has a rotation that llama.cpp knows as such."""
    parameters = model.config.rope_parameters
    if parameters["rope_type"] != "llama3":
        return None
    width = 2 * model.model.rotary_emb.inv_freq.shape[0]
    plain = 1.0 / parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    return plain / model.model.rotary_emb.inv_freq


def answers(model, prompts) -> dict:
    tensors = {}
    for i, prompt in enumerate(prompts):
        tensors[f"prompt.{i}"] = torch.tensor(prompt)
        logits = model(torch.tensor([prompt])).logits[0]
        tensors[f"logits.{i}"] = logits if i == 0 else logits[-1:]
        tensors[f"greedy.{i}"] = text_cases.greedy(model, prompt)[0]
    return tensors


def check(name: str, case: Case, model, prompts, tensors) -> None:
    """That nothing about the case is trivially right."""
    long = torch.tensor([prompts[-1]])
    expected = tensors[f"logits.{len(prompts) - 1}"]
    for what, change in text_cases.mutations(model):
        difference = relative_difference(expected, text_cases.changed_logits(model, change, long)[-1:])
        require(difference > 1e-2, f"{name}: {what} moves the logits by {difference:.2g}")
    if case.architecture == "llama":
        query = model.model.layers[0].self_attn.q_proj.weight
        other = permuted(case, "q_proj", query)
        difference = relative_difference(expected, text_cases.changed_logits(model, [(query, other)], long)[-1:])
        require(difference > 1e-2, f"{name}: other rows of the queries move the logits by {difference:.2g}")


# --- the file --------------------------------------------------------------------------------------------------------


def write_model(folder: Path, case: Case, written: dict) -> None:
    writer = gguf.GGUFWriter(folder / "model.gguf", case.architecture, split_max_tensors=case.tensors_per_part)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_name("a tiny model")
    config = case.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    case.describe(writer)
    vocabulary = case.vocabulary
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_chat_template(vocabulary.template)
    vocabulary.describe(writer)
    for name, (data, kind, _) in written.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def require_written(folder: Path, written: dict) -> None:
    found = {}
    for path in sorted(folder.glob("*.gguf")):
        reader = gguf.GGUFReader(path)
        print(f"  {path.name}: {path.stat().st_size / 1024:.0f} KiB, {len(reader.tensors)} tensors")
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
            found[tensor.name] = torch.from_numpy(values)
    same = all(torch.equal(found[name], values.reshape(found[name].shape)) for name, (_, _, values) in written.items())
    require(found.keys() == written.keys() and same, f"{folder.name}: gguf reads the weights that answer")


def typed(types: list, default):
    """Type of the first part that is in a tensor's name."""
    return lambda name: next((kind for part, kind in types if part in name), default)


# --- the cases -------------------------------------------------------------------------------------------------------


def cases() -> dict:
    llama = byte_level(
        tokenizers_cases.llama_backend(),
        "llama-bpe",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        text_cases.LLAMA_TEMPLATE,
    )
    end, im_end = text_cases.special("qwen2", "<|endoftext|>", "<|im_end|>")
    qwen = byte_level(
        tokenizers_cases.qwen_backend(),
        "qwen2",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        text_cases.QWEN_TEMPLATE,
        padded=544,
        add_bos=False,
        ends=[("eot", im_end)],
    )
    smollm = byte_level(
        smollm_backend(),
        "smollm",
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"},
        SMOLLM_TEMPLATE,
        add_bos=False,
    )
    pieces = sentence_piece()
    return {
        # Blocks of 256 values; the rotation of Llama 3.1; a head that shares the table, in six bits.
        "llama-k": Case(
            "llama",
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=len(llama.tokens),
                hidden_size=256,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=2,
                max_position_embeddings=256,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                rope_parameters={"rope_theta": 10000.0, **text_cases.LLAMA3_ROPE},
            ),
            llama,
            typed([("token_embd", QUANTS.Q6_K), ("ffn_down", QUANTS.Q6_K), ("attn_v", QUANTS.Q5_K), ("ffn_up", QUANTS.Q8_0)], QUANTS.Q4_K),
            describe_llama,
            tensors_per_part=8,
            notes=["in three parts; tied; rope_freqs.weight"],
        ),
        # Heads wider than hidden / heads; biases on all four projections, of which two have permuted values.
        "llama-pieces": Case(
            "llama",
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=len(pieces.tokens),
                hidden_size=96,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                max_position_embeddings=256,
                rms_norm_eps=1e-6,
                attention_bias=True,
                tie_word_embeddings=False,
                rope_parameters={"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.5},
            ),
            pieces,
            typed(
                [
                    ("token_embd", QUANTS.Q5_1),
                    ("output.weight", QUANTS.Q8_0),
                    ("attn_q", QUANTS.Q4_0),
                    ("attn_k", QUANTS.Q5_0),
                    ("attn_v", QUANTS.F16),
                    ("attn_output", QUANTS.BF16),
                    ("ffn_down", QUANTS.Q4_1),
                    ("ffn_up", QUANTS.F32),
                ],
                QUANTS.Q5_1,
            ),
            describe_pieces,
            notes=["a SentencePiece vocabulary; head_dim is not hidden_size / heads; linear scaling; attention biases"],
        ),
        "qwen2-yarn": Case(
            "qwen2",
            Qwen2ForCausalLM,
            Qwen2Config(
                vocab_size=len(qwen.tokens),
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                rms_norm_eps=1e-6,
                tie_word_embeddings=False,
                rope_parameters={
                    "rope_theta": 10000.0,
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
            qwen,
            typed([("output.weight", QUANTS.Q8_0), ("ffn_down", QUANTS.Q5_0), ("token_embd", QUANTS.Q4_0)], QUANTS.Q8_0),
            describe_qwen,
            notes=["unused tokens up to the padded vocabulary; YaRN; untied"],
        ),
        # As SmolLM2-135M: nine heads for three.
        "smollm": Case(
            "llama",
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=len(smollm.tokens),
                hidden_size=144,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=9,
                num_key_value_heads=3,
                max_position_embeddings=512,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
            ),
            smollm,
            typed([("token_embd", QUANTS.F16)], QUANTS.BF16),
            describe_smollm,
            notes=["no blocks: 16 bits"],
        ),
    }


def describe_llama(writer) -> None:
    writer.add_vocab_size(492)
    writer.add_rope_dimension_count(32)


def describe_pieces(writer) -> None:
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(32)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.5)


def describe_qwen(writer) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_float32("general.sampling.temp", 0.75)
    writer.add_int32("general.sampling.top_k", 20)


def describe_smollm(writer) -> None:
    writer.add_rope_dimension_count(16)
    writer.add_add_space_prefix(False)


# --- a published file ------------------------------------------------------------------------------------------------

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_TOKENS = 64
SMOLLM2_CHATS = [
    [{"role": "user", "content": "Tell a very short story about a lighthouse keeper and a fox."}],
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
]


def published_file() -> Path | None:
    """Where `scripts/demo-model` keeps it, or where the variable says."""
    kept = Path(__file__).resolve().parents[2] / "out/models" / SMOLLM2
    path = Path(os.environ.get("TALE_SMOLLM2", kept))
    return path if path.exists() else None


def make_published() -> None:
    path = published_file()
    if path is None:
        print(f"  left as it is: {SMOLLM2} is not at hand (scripts/demo-model)")
        return
    folder = fresh_case("language-gguf/smollm2-135m")
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / SMOLLM2).symlink_to(path.resolve())
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=SMOLLM2, dtype=torch.float32).eval()
    reference = published_tokenizer(path)
    tensors, texts, rendered = {}, [], []
    for i, messages in enumerate(SMOLLM2_CHATS):
        chat = text_cases.chat(reference, messages)
        tokens, margins = text_cases.greedy(model, chat["ids"], SMOLLM2_TOKENS)
        require(margins.min().item() > 1e-3, f"smollm2-135m {i}: the best logits lead by {margins.min().item():.2g}")
        tensors[f"prompt.{i}"], tensors[f"greedy.{i}"] = torch.tensor(chat["ids"]), tokens
        texts.append(reference.decode(tokens, skip_special_tokens=True))
        rendered.append(chat)
        print(f"  {texts[-1][:100]!r}")
    facts = {
        "file": SMOLLM2,
        "reference": f"transformers.{type(model).__name__} over the dequantised file",
        "chats": rendered,
        "greedy_text": texts,
        "strings": [tokenizers_cases.describe(reference, text) for text in corpus.STRINGS + specials(reference)],
    }
    write_golden(folder, facts, tensors)


def published_tokenizer(path: Path):
    """Of the file's own vocabulary, with the splits with which SmolLM2's `tokenizer.json` is published."""
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizers_cases.add_special(tokenizer, [token for token, kind in zip(tokens, kinds) if kind == CONTROL])
    named = {name: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    reference = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=named["bos"], eos_token=named["eos"]
    )
    reference.chat_template = fields["tokenizer.chat_template"]
    return reference
