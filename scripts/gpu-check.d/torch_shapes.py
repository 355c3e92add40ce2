"""Times torch at the shapes of `tale bench kernels`, beside Tale's figures of the same machine.

usage: torch_shapes.py [--device cuda:0] [--beside FILE] [--small]

--beside FILE is the output of `tale bench kernels`, from which Tale's times are taken; --small divides rows by 16 and
sides of pictures by 4, as that command does on a CPU. The shapes, their names and the way to time are those of
kernels/src/bench/table.rs. Ends with code 3 and a last line that says why where torch or the device cannot be had.
"""

import argparse
import math
import re
import statistics
import sys
import time

# Of one round of calls, and how many rounds there are after one to warm up; as in table.rs.
ROUND_SECONDS = 0.02
ROUNDS = 5

# A line of Tale's table: operation, shape, microseconds. The columns are separated by at least one space, shapes hold
# single ones.
TALE_LINE = re.compile(r"^(?P<op>\w+) +(?P<shape>\S.*?) +(?P<us>[0-9.]+) us +[0-9.]+ (GB/s|TFLOP/s)")


def cannot(reason):
    print(reason)
    sys.exit(3)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--beside", metavar="FILE")
    parser.add_argument("--small", action="store_true")
    return parser.parse_args()


def tale_times(path):
    """Microseconds by operation and shape; empty without a table."""
    if path is None:
        return {}
    try:
        lines = open(path, encoding="utf-8", errors="replace").read().splitlines()
    except FileNotFoundError:
        return {}
    found = filter(None, map(TALE_LINE.match, lines))
    return {(line["op"], line["shape"]): float(line["us"]) for line in found}


class Bench:
    def __init__(self, torch, device, small, tale):
        self.torch, self.device, self.small, self.tale = torch, torch.device(device), small, tale
        # What Tale computes in: see `tale bench kernels`.
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def rows(self, published):
        return math.ceil(published / 16) if self.small else published

    def side(self, published):
        return math.ceil(published / 4) if self.small else published

    def random(self, *dims):
        return self.torch.rand(dims, device=self.device).mul_(2).sub_(1).to(self.dtype)

    def wait(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)

    def seconds_per_call(self, call):
        def round_of(calls):
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            self.wait()
            return (time.perf_counter() - start) / calls

        round_of(2)
        calls = min(max(math.ceil(ROUND_SECONDS / round_of(1)), 1), 1000)
        return statistics.median(round_of(calls) for _ in range(ROUNDS))

    def measure(self, op, shape, call, flops=None, moved=None):
        """One line. `flops` are counted, else `moved` values are."""
        try:
            seconds = self.seconds_per_call(call)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"{op:<16} {shape:<44} torch cannot: {reason}", flush=True)
            return
        if flops is not None:
            rate, unit = flops / seconds / 1e12, "TFLOP/s"
        else:
            rate, unit = moved * self.dtype.itemsize / seconds / 1e9, "GB/s"
        micros = seconds * 1e6
        tale = self.tale.get((op, shape))
        beside = f"{tale:>11.1f} us {micros / tale:>6.2f} times torch's rate" if tale else f"{'-':>11}"
        print(f"{op:<16} {shape:<44} {micros:>11.1f} us {rate:>9.2f} {unit:<8} {beside}", flush=True)

    def roofs(self):
        values = (1 << 30) // self.dtype.itemsize // (16 if self.small else 1)
        x = self.random(values)
        self.measure("copy", f"{values} values", lambda: x.clone(), moved=2 * values)
        del x
        side = 1024 if self.small else 8192
        a, b = self.random(side, side), self.random(side, side)
        self.measure("matmul", f"{side} x {side} x {side}", lambda: a @ b, flops=2 * side**3)

    def products(self):
        functional = self.torch.nn.functional
        for shape, m, n, k in [
            ("llama 8B up, 1 token", 1, 14336, 4096),
            ("llama 8B up, 64 tokens", 64, 14336, 4096),
            ("flux mlp 1024x1024", 4608, 12288, 3072),
        ]:
            m = self.rows(m) if m > 64 else m
            x, weight = self.random(m, k), self.random(n, k)
            flops = None if m == 1 else 2 * m * n * k
            self.measure("linear", shape, lambda: functional.linear(x, weight), flops=flops, moved=n * k)

    def attentions(self):
        attend = self.torch.nn.functional.scaled_dot_product_attention
        for shape, b, lq, lk, heads, d in [
            ("flux 1024x1024", 1, 4608, 4608, 24, 128),
            ("16k tokens", 1, 16384, 16384, 24, 128),
            ("wan 1.3B 480p", 1, 32760, 32760, 12, 128),
            ("sdxl 1024x1024, 64 x 64", 2, 4096, 4096, 10, 64),
            ("sdxl cross attention", 2, 4096, 77, 10, 64),
        ]:
            lq, lk = self.rows(lq), self.rows(lk) if lk > 77 else lk
            # As Tale has them: heads beside each other.
            q, k = (self.random(b, length, heads, d).transpose(1, 2) for length in (lq, lk))
            self.measure("attention", shape, lambda: attend(q, k, k), flops=4 * b * heads * lq * d * lk)

    def pictures(self):
        functional = self.torch.nn.functional
        for channels, published in [(128, 1024), (512, 256)]:
            side = self.side(published)
            shape, values = f"KL-VAE, {channels} x {side} x {side}", channels * side * side
            x, weight = self.random(1, channels, side, side), self.random(channels)
            kernel = self.random(channels, channels, 3, 3)
            self.measure(
                "group_norm", shape, lambda: functional.group_norm(x, 32, weight, weight, 1e-6), moved=2 * values
            )
            self.measure(
                "conv2d", shape, lambda: functional.conv2d(x, kernel, weight, padding=1), flops=2 * values * channels * 9
            )
        h, w = self.side(480), self.side(832)
        x, kernel = self.random(1, 96, 6, h, w), self.random(96, 96, 3, 3, 3)
        # No padding in time: six frames of context and picture give four.
        self.measure(
            "conv3d",
            f"Wan VAE, 96 x 4 frames of {h} x {w}",
            lambda: functional.conv3d(x, kernel, padding=(0, 1, 1)),
            flops=2 * 96 * 96 * 27 * 4 * h * w,
        )


def main():
    options = arguments()
    try:
        import torch
    except Exception as error:  # a broken installation raises anything, OSError for a missing library among it
        cannot(f"python3 ({sys.executable}) has no torch that works: {error}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        cannot(f"torch {torch.__version__} sees no CUDA device")
    tale = tale_times(options.beside)
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    print(f"torch {torch.__version__} on {name}; Tale's times: {len(tale)} lines of {options.beside or 'nothing'}")
    print(f"{'operation':<16} {'shape':<44} {'torch':>14} {'':>18} {'Tale':>14}")
    bench = Bench(torch, options.device, options.small, tale)
    with torch.inference_mode():
        for section in (bench.roofs, bench.products, bench.attentions, bench.pictures):
            section()


if __name__ == "__main__":
    main()
