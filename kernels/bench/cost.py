"""A paper model of what each path costs on a GPU: bytes, flops and launches, read off the real launch plan.

`bora-fl bench cost [--tokens 8192 --width 4096 …]`. A launch takes the longer of its memory traffic
over the bandwidth and its arithmetic over the peak, and with fewer programs than the GPU has processors (SMs), as much
longer as processors are idle; every tensor is counted once per launch that touches it, and a
slice of partial sums is written to memory once (its tile-by-tile updates stay in the cache). The floor reads x once
forward and dY and x once backward. It is a model: nothing here was timed.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bora_fl.kernels.launch_plan import Launch, LayerShape, backward_plan, forward_plan
from bora_fl.kernels.reference import Needs

BANDWIDTH = 3.0e12  # bytes/s that an H100 SXM reaches of its 3.35e12
PEAK = 800e12  # flop/s that its dense bf16 GEMMs reach of 989e12
PROCESSORS = 132  # SMs of an H100
LAUNCH_SECONDS = 2e-6  # gap between dependent kernels of a stream, shown beside the model and not part of it


@dataclass(frozen=True)
class Work:
    """One launch's memory traffic in bytes, arithmetic in flops, and programs; the vendor's fill the GPU."""

    name: str
    bytes: float
    flops: float = 0.0
    programs: int = PROCESSORS

    @property
    def seconds(self) -> float:
        """Time at the roofline of the processors that have a program."""
        return max(self.bytes / BANDWIDTH, self.flops / PEAK) * max(1.0, PROCESSORS / self.programs)


def _sizes(shape: LayerShape) -> dict[str, float]:
    """Bytes of every tensor the kernels touch."""
    x, factor = shape.x_dtype.itemsize, shape.factor_dtype.itemsize
    T, n, m, b, r = shape.tokens, shape.in_features, shape.out_features, shape.num_blocks, shape.rank
    return {
        **dict.fromkeys(("x", "dx"), T * n * x),
        **dict.fromkeys(("y", "dy"), T * m * x),
        **dict.fromkeys(("u", "z", "dz", "du"), T * b * r * factor),
        "W": m * n * x,
        "A": r * n * factor,
        "B": m * r * factor,
        "Sigma": b * b * r * 4,
    }


def launch_work(launch: Launch, shape: LayerShape) -> Work:
    """Count one launch of the plan."""
    return replace(_traffic(launch, shape), programs=math.prod(launch.grid))


def _traffic(launch: Launch, shape: LayerShape) -> Work:
    size, number = _sizes(shape), {name: int(v) for name, v in launch.constants.items() if not isinstance(v, str)}
    T, b, r, n, m = shape.tokens, shape.num_blocks, shape.rank, shape.in_features, shape.out_features
    rank = number.get("RP", 0)
    if launch.kernel == "down_kernel":
        return Work("down", size["x"] + size["A"] + size["u"], 2 * T * n * rank)
    if launch.kernel == "mix_kernel":
        return Work("mix", size["u"] + size["z"] + size["Sigma"])
    if launch.kernel == "up_kernel":
        return Work("up", size["z"] + size["B"] + size["y"], 2 * T * m * rank)
    if launch.kernel == "dy_kernel":
        slices = launch.grid[0] * m * r * 4 * number["NEED_B"]
        return Work("over dY", size["dy"] + size["z"] + size["B"] + size["dz"] + slices, 4 * T * m * rank)
    if launch.kernel == "mix_back_kernel":
        slices = launch.grid[0] * b * b * r * 4 * number["NEED_SIGMA"]
        return Work("mix back", 3 * size["u"] + size["Sigma"] + slices)
    if launch.kernel == "x_kernel":
        slices = launch.grid[0] * n * r * 4 * number["NEED_A"]
        read_x = size["x"] * number["NEED_A"]
        return Work(
            "over x", read_x + size["du"] + size["A"] + size["dx"] * number["NEED_X"] + slices, 4 * T * n * rank
        )
    sums = sum(
        4 * number[f"SIZE_{name.upper()}"] * (launch.integers[f"slices_{name}"] + 1) for name in ("A", "Sigma", "B")
    )
    return Work("add slices", sums)


def gemm(shape: LayerShape, *, accumulate: bool) -> Work:
    """Count the frozen layer's product; with `accumulate` it also reads what it adds to (beta = 1)."""
    size = _sizes(shape)
    traffic = size["x"] + size["W"] + size["y"] * (2 if accumulate else 1)
    return Work("gemm", traffic, 2.0 * shape.tokens * shape.in_features * shape.out_features)


def fused(shape: LayerShape) -> tuple[list[Work], list[Work]]:
    """Return the launches of the fused path, forward and backward, the large products included."""
    forward = [launch_work(launch, shape) for launch in forward_plan(shape)] + [gemm(shape, accumulate=True)]
    backward = [launch_work(launch, shape) for launch in backward_plan(shape, Needs())]
    return forward, [*backward, gemm(shape, accumulate=True)]


def eager_lora(shape: LayerShape, rank: int) -> tuple[list[Work], list[Work]]:
    """Return the launches of PEFT's `result + lora_B(lora_A(x)) * scaling`, forward and backward."""
    size, T = _sizes(shape), shape.tokens
    h = T * rank * shape.factor_dtype.itemsize
    x, y = size["x"], size["y"]
    down, up = 2.0 * T * shape.in_features * rank, 2.0 * T * shape.out_features * rank
    base = gemm(shape, accumulate=False)
    forward = [base, Work("A", x + h, down), Work("B", h + y, up), Work("scale", 2 * y), Work("add", 3 * y)]
    backward = [
        *(Work("scale", 2 * y), Work("dB", y + h, up), Work("dh", y + h, up), Work("dA", x + h, down)),
        *(Work("dx", h + x, down), base, Work("add", 3 * x)),
    ]
    return forward, backward


def extra_share(launches: tuple[list[Work], list[Work]], shape: LayerShape) -> float:
    """Return the time beyond the frozen layer's two products, as a share of them."""
    frozen = 2 * gemm(shape, accumulate=False).seconds
    return sum(work.seconds for part in launches for work in part) / frozen - 1


def floor_share(shape: LayerShape) -> float:
    """Return the least extra share of a branch outside the large products' epilogues: x, dY and x read once each."""
    size = _sizes(shape)
    return (2 * size["x"] + size["y"]) / BANDWIDTH / (2 * gemm(shape, accumulate=False).seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the model for one shape."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096, help="in_features and out_features")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--factors", choices=("bf16", "fp32"), default="bf16", help="dtype of A and B over a bf16 base")
    chosen = parser.parse_args(arguments)
    factor = torch.bfloat16 if chosen.factors == "bf16" else torch.float32
    width, b, r = chosen.width, chosen.blocks, chosen.rank
    shape = LayerShape(chosen.tokens, width, width, b, r, torch.bfloat16, factor, width)
    rows = {
        "fused": fused(shape),
        f"PEFT LoRA, rank {r}": eager_lora(shape, r),
        f"PEFT LoRA, rank {b * r}": eager_lora(shape, b * r),
    }
    print(f"{'path':24}{'launches':>10}{'GB':>8}{'GFLOP':>9}{'extra':>9}{'extra with launch gaps':>25}")
    frozen = 2 * gemm(shape, accumulate=False).seconds
    for name, (forward, backward) in rows.items():
        works = [*forward, *backward]
        extra = extra_share((forward, backward), shape)
        gaps = (len(works) - 2) * LAUNCH_SECONDS / frozen
        count = f"{len(forward)}+{len(backward)}"
        traffic, flops = sum(w.bytes for w in works) / 1e9, sum(w.flops for w in works) / 1e9
        print(f"{name:24}{count:>10}{traffic:8.2f}{flops:9.0f}{extra:9.1%}{extra + gaps:25.1%}")
    print(f"{'floor':24}{'':27}{floor_share(shape):9.1%}")
    unhidden = 2 * _sizes(shape)["y"] / BANDWIDTH / frozen
    print(f"If the products' epilogues hid none of the accumulator's read, fused would cost {unhidden:.1%} more.\n")
    for work in (work for part in rows["fused"] for work in part):
        print(f"  {work.name:12}{work.bytes / 1e6:9.1f} MB {work.flops / 1e9:8.1f} GFLOP {work.seconds * 1e6:8.1f} us")


if __name__ == "__main__":
    main()
