"""What every group shares: folders, writing a case, random weights, distances."""

import importlib.metadata
import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2] / "tests" / "goldens"
LIBRARIES = ["torch", "transformers", "diffusers", "tokenizers", "sentencepiece", "safetensors", "ftfy"]


def fresh_case(name: str) -> Path:
    """Empty folder of a case."""
    folder = ROOT / name
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def write_json(path: Path, value) -> None:
    """Indented, with lists of numbers on one line."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    text = re.sub(r"\[\n\s+(-?\d[^\[\]\"{}]*?)\n\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    assert json.loads(text) == json.loads(json.dumps(value)), f"{path}: not the same JSON"
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def versions() -> dict:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def write_golden(folder: Path, facts: dict, tensors: dict | None = None) -> None:
    """`golden.json` (with library versions) and `golden.safetensors` of a case; prints its size."""
    write_json(folder / "golden.json", {**facts, "versions": versions()})
    if tensors is not None:
        save_file({k: tensors[k].detach().contiguous() for k in sorted(tensors)}, folder / "golden.safetensors")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder.relative_to(ROOT)}: {size / 1024:.0f} KiB")


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over largest value of `a`: the measure of the tests."""
    return ((a - b).abs().max() / a.abs().max()).item()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """dB between two u8 pictures or clips of one shape."""
    mse = (a.double() - b.double()).square().mean().item()
    return math.inf if mse == 0 else 10 * math.log10(255.0**2 / mse)


def require(condition: bool, message: str) -> None:
    """A claim about a golden, printed when it holds and fatal when it does not."""
    if not condition:
        raise SystemExit(f"FAILED: {message}")
    print(f"  holds: {message}")


def randomise(module: torch.nn.Module, seed: int, gain: float = 1.0, overrides=()) -> None:
    """Random values for every parameter, in the order of their names.

    Matrices and convolutions get `gain / sqrt(fan_in)`, norm weights (vectors called weight, gamma) lie around one, biases
    and other vectors around zero. `overrides` are `(part of the name, function(parameter, generator))`, first match wins.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        with torch.no_grad():
            for part, fill in overrides:
                if part in name:
                    parameter.copy_(fill(parameter, generator))
                    break
            else:
                parameter.copy_(_default(name, parameter, gain, generator))


def normal(parameter: torch.Tensor, generator: torch.Generator, std: float, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(parameter.shape, generator=generator) * std + mean


def _default(name, parameter, gain, generator):
    if parameter.dim() >= 2 and not name.endswith("gamma"):
        fan_in = parameter[0].numel()
        return normal(parameter, generator, gain / math.sqrt(fan_in))
    if name.endswith(("weight", "gamma")):
        return normal(parameter, generator, 0.25, mean=1.0)
    return normal(parameter, generator, 0.2)
