"""The command line: which groups to make, in which order."""

import argparse
import importlib
import os
import time

GROUPS = ["rng", "tokenizers", "text", "solvers", "noise_solvers", "flux", "sdxl", "wan", "wan_images", "wan_lora", "wan_files", "guidance", "schedulers"]
GROUPS += ["hunyuan_video", "hunyuan_video_images", "hunyuan_files", "tiling", "clip_tiling", "ip_adapter", "single_files", "lora", "prompts", "edits", "refiner", "hidden_states"]
GROUPS += ["language_gguf", "quantised", "special_tokens", "templates", "given_steps", "cogvideox", "cogvideox_images", "cogvideox_lora", "caches"]


def main(arguments) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/goldens",
        description="Make the golden cases under tests/goldens. Needs the packages of scripts/goldenlib/requirements.txt.",
        epilog="Cases are made from fixed seeds: with the same library versions the same files come out.",
    )
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"any of: {' '.join(GROUPS)}; all when none is named"
    )
    chosen = parser.parse_args(arguments).groups
    unknown = [group for group in chosen if group not in GROUPS]
    if unknown:
        parser.error(f"no group called {', '.join(unknown)}; there are: {' '.join(GROUPS)}")
    make(chosen or GROUPS)
    return 0


def make(groups) -> None:
    # Nothing here may reach out to a hub, and sums must not depend on the number of cores.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for group in [g for g in GROUPS if g in groups]:
        start = time.monotonic()
        importlib.import_module(f"goldenlib.{group}_cases").make()
        print(f"== {group}: {time.monotonic() - start:.1f} s\n")
    report_size()


def report_size() -> None:
    from .common import ROOT

    files = [f for f in ROOT.rglob("*") if f.is_file()]
    print(f"tests/goldens: {len(files)} files, {sum(f.stat().st_size for f in files) / 2**20:.2f} MiB")
