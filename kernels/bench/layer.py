"""Time the layer against its rivals on this machine: `bora-fl bench layer [--tokens 2048 …]`.

Every rival is a frozen linear layer plus an adapter, forward and backward; each first has to agree with float64, and no
time is printed for one that does not. Rounds are interleaved, so that drift of the machine meets all alike; the table
holds medians, and medians of the ratio to PEFT's LoRA within a round. On a CPU it counts process CPU time on one
thread, under two settings of the allocator, each in a process of its own:

- `default`: glibc's malloc as it comes, which hands large blocks back to the system and faults them in again;
- `warmed`: `GLIBC_TUNABLES` such that large blocks are kept, so that arithmetic and memory passes are what differs.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bora_fl.kernels.bench.rivals import GPU_ALONE, RIVALS, Problem

WARMED = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456"
BASELINE = "PEFT LoRA, rank r"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2.4e-2}


def _clock(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter_ns()
    return time.process_time_ns()


def _step(layer: Callable[[Tensor], Tensor], problem: Problem) -> None:
    problem.x.grad = None
    layer(problem.x).backward(problem.dy)  # type: ignore[no-untyped-call]


def _saved_bytes(layer: Callable[[Tensor], Tensor], problem: Problem) -> int:
    """Count what a forward pass keeps for backward: every storage once, parameters left out."""
    kept: dict[int, int] = {}
    parameters = {tensor.untyped_storage().data_ptr() for tensor in problem.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(problem.x)
    del y
    return sum(size for place, size in kept.items() if place not in parameters)


def _peak_bytes(layer: Callable[[Tensor], Tensor], problem: Problem, device: str) -> int:
    """Return the most memory a step holds beyond what it starts with."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        _step(layer, problem)
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(profile_memory=True) as profile:
        _step(layer, problem)
    held = peak = 0
    for event in profile.profiler.kineto_results.events() if profile.profiler else []:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _runs(name: str, problem: Problem) -> bool:
    """Whether dense products take the problem's dtypes; Triton's kernels take all."""
    return name != "BoRA, dense products" or problem.x.dtype == problem.A.dtype


def measure(arguments: argparse.Namespace, dtype: str) -> dict[str, dict[str, Any]]:
    """Return one row per rival: milliseconds, ratios to the baseline, saved and peak bytes, relative error."""
    torch.manual_seed(0)
    problem = Problem.draw(
        arguments.tokens, arguments.width, arguments.width, arguments.blocks, arguments.rank, dtype, arguments.device
    )
    expected = problem.expected_bora()
    rows: dict[str, dict[str, Any]] = {}
    layers: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, build in RIVALS.items():
        if name in GPU_ALONE and not (arguments.device == "cuda" and _runs(name, problem)):
            continue
        layers[name] = build(problem)
        rows[name] = {}
        if name in problem.BORA:
            y = layers[name](problem.x).detach().double()
            error = float((y - expected).norm() / expected.norm())
            if not error < TOLERANCE[problem.x.dtype]:
                raise SystemExit(f"{name} is off by {error:.1e} in {dtype}: no times for a wrong result")
            rows[name]["relative_error"] = error
    for layer in layers.values():
        for _ in range(3):
            _step(layer, problem)
    forward: dict[str, list[int]] = {name: [] for name in layers}
    both: dict[str, list[int]] = {name: [] for name in layers}
    gc.disable()
    for _ in range(arguments.rounds):
        for name, layer in layers.items():
            start = _clock(arguments.device)
            with torch.no_grad():
                layer(problem.x)
            middle = _clock(arguments.device)
            _step(layer, problem)
            forward[name].append(middle - start)
            both[name].append(_clock(arguments.device) - middle)
    gc.enable()
    for name, layer in layers.items():
        ratios = [mine / base for mine, base in zip(both[name], both[BASELINE], strict=True)]
        rows[name] |= {
            "forward_ms": statistics.median(forward[name]) / 1e6,
            "both_ms": statistics.median(both[name]) / 1e6,
            "ratio": statistics.median(ratios),
            "saved_bytes": _saved_bytes(layer, problem),
            "peak_bytes": _peak_bytes(layer, problem, arguments.device),
        }
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Lay the rows out as a Markdown table."""
    lines = ["| layer | forward ms | forward + backward ms | ratio | saved MB | peak MB |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {row['forward_ms']:.2f} | {row['both_ms']:.2f} | {row['ratio']:.2f} "
        f"| {row['saved_bytes'] / 1e6:.2f} | {row['peak_bytes'] / 1e6:.1f} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="bora-fl bench layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--width", type=int, default=768, help="in_features and out_features")
    options.add_argument("--blocks", type=int, default=8)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--dtype", nargs="+", default=["fp32", "bf16", "bf16/fp32"])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--json", help="also write the rows to this file")
    options.add_argument("--allocator", choices=("default", "warmed"), help="measure here, under this setting only")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: each allocator setting in a process of its own, because malloc reads it once."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser().parse_args(given)
    if chosen.device == "cpu" and chosen.allocator is None:
        for allocator in ("warmed", "default"):
            environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
            environment |= {"KINETO_LOG_LEVEL": "99"}  # the memory profiler logs every start and stop
            environment |= {"GLIBC_TUNABLES": WARMED} if allocator == "warmed" else {}
            command = [sys.executable, "-m", "bora_fl.kernels.bench.layer", *given, "--allocator", allocator]
            subprocess.run(command, env=environment, check=True)
        return
    torch.set_num_threads(1)
    results = {}
    for dtype in chosen.dtype:
        results[dtype] = measure(chosen, dtype)
        allocator = f", {chosen.allocator} allocator" if chosen.allocator else ""
        print(f"\n{dtype}{allocator}, T={chosen.tokens}, n=m={chosen.width}, b={chosen.blocks}, r={chosen.rank}\n")
        print(table(results[dtype]), flush=True)
    if chosen.json:
        suffix = f".{chosen.allocator}" if chosen.allocator else ""
        with open(chosen.json + suffix, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
