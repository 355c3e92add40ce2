"""torch's CPU generator: normal numbers of one draw, and of draws that continue one generator.

torch draws fewer than 16 normals one by one in f64 and keeps the second of each pair for the next call; from 16 on it
fills 16 at a time and, when the size is no multiple of 16, draws the last 16 again. So sizes around 16 and mixed
sequences tell a right port from a nearly right one.
"""

import torch

from .common import fresh_case, require, write_golden

# Only the low 32 bits of a seed reach the Mersenne twister: the last two seeds must agree with 7 and with 2^32 - 5.
SEEDS = [0, 42, 7, 2**40 + 7, 2**32 - 5, 2**64 - 5]
SIZES = [1, 7, 15, 16, 17, 31, 33, 100, 4096]
SEQUENCES = [
    [15, 16, 1, 100],
    [1, 1, 1, 16, 1, 17, 1],
    [3, 4, 5, 6, 7, 8],
    [7, 4096, 7, 31, 2, 16, 15],
    [640, 640, 640],
]


def make() -> None:
    folder = fresh_case("rng")
    tensors = {f"seed{s}.n{n}": torch.randn(n, generator=seeded(s)) for s in SEEDS for n in SIZES}
    sequences = []
    for seed in (0, 42):
        for sizes in SEQUENCES:
            index = len([s for s in sequences if s["seed"] == seed])
            sequences.append({"seed": seed, "sizes": sizes})
            tensors[f"seed{seed}.seq{index}"] = draws(seed, sizes)
    require(torch.equal(tensors["seed7.n100"], tensors[f"seed{2**40 + 7}.n100"]), "seed 2^40 + 7 draws what 7 draws")
    require(torch.equal(tensors[f"seed{2**32 - 5}.n100"], tensors[f"seed{2**64 - 5}.n100"]), "only 32 bits count")
    require(not torch.equal(tensors["seed0.n100"], tensors["seed42.n100"]), "another seed draws other numbers")
    note = "the generator is seeded with the low 32 bits of a seed; seq{K} counts the sequences of its seed"
    write_golden(folder, {"seeds": SEEDS, "sizes": SIZES, "sequences": sequences, "note": note}, tensors)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def draws(seed: int, sizes) -> torch.Tensor:
    generator = seeded(seed)
    return torch.cat([torch.randn(n, generator=generator) for n in sizes])
