"""Figures of the block algebra: `bora-fl bench merging [planted|layer|stream|model ...]`.

* planted: share of planted problems recovered from a cold start, without noise and with 1 % of it;
* layer: merge and refactorization of one 4096 × 4096 layer against dense means and their decompositions;
* stream: peak memory and time of streaming 20 and 1,000 clients;
* model: 32 layers × q, k, v, o.

Every time is given as wall-clock and as process CPU time; the second means more on a busy machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bora_fl.blocks.factors import BlockFactors
from bora_fl.blocks.left_fit import fit_left
from bora_fl.blocks.merging import factor_mean, merge
from bora_fl.blocks.planted import drifting_clients, from_dense, planted
from bora_fl.blocks.refactorization import Refactorization, refactorize
from bora_fl.blocks.streaming import StreamingMerge

SIDE, BLOCKS, RANK, CLIENTS = 4096, 8, 16, 10


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the largest storage, in elements, that any operation under it returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the operation and look at what it returned."""
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(out, Tensor):
                self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return result


def timed(work: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
    """Median wall-clock and CPU seconds of some work."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return sorted(walls)[repeats // 2], sorted(cpus)[repeats // 2]


def _clients(seed: int, count: int, side: int = SIDE) -> list[BlockFactors]:
    drifting = drifting_clients(seed, count, side, side, BLOCKS, RANK)
    return [f.to(torch.float32) for f in drifting]


def _merge_and_refactorize(clients: list[BlockFactors]) -> Refactorization:
    weights = [1 / len(clients)] * len(clients)
    return refactorize(merge(clients, weights), RANK, start=factor_mean(clients, weights))


def _fit_left(clients: list[BlockFactors]) -> BlockFactors | None:
    weights = [1 / len(clients)] * len(clients)
    return fit_left(clients, weights, factor_mean(clients, weights), "identity")


def bench_planted(seeds: int) -> Iterator[str]:
    """Recovered planted problems, of each kind `seeds`."""
    yield f"{'b':>3} {'r':>3}  recovered to 1e-6   within 5 % of the truth's error at 1 % noise   s/problem"
    for b in (2, 4, 8, 16):
        for r in (4, 8, 16):
            exact, noisy, began = 0, 0, time.process_time()
            for seed in range(seeds):
                truth = planted(seed, b, r, side=2 * r).dense()
                exact += refactorize(from_dense(truth, b), r).relative_error < 1e-6
                noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=truth.dtype)
                target = truth + 0.01 * truth.norm() / noise.norm() * noise
                bar = 1.05 * float((target - truth).norm() / target.norm())
                noisy += refactorize(from_dense(target, b), r, cold=4).relative_error < bar
            seconds = (time.process_time() - began) / seeds
            yield f"{b:>3} {r:>3}  {exact:>7}/{seeds:<9} {noisy:>7}/{seeds:<36} {seconds:.2f}"


def bench_layer() -> Iterator[str]:
    """One layer against what a dense server would do."""
    clients = _clients(0, CLIENTS)

    def dense_mean() -> Tensor:
        total = torch.zeros(SIDE, SIDE)
        for f in clients:
            total += f.dense() / CLIENTS
        return total

    fit = _merge_and_refactorize(clients)
    wall, cpu = timed(lambda: _merge_and_refactorize(clients), 5)
    yield f"relative error {fit.relative_error:.4f}, of the factor mean {fit.start_error:.4f}"
    yield f"merge + refactorize        {wall:8.3f} s wall {cpu:8.3f} s CPU"
    left_wall, left_cpu = timed(lambda: _fit_left(clients), 5)
    yield f"merge, B alone (default)   {left_wall:8.3f} s wall {left_cpu:8.3f} s CPU"
    rivals: list[tuple[str, Callable[[], object], int]] = [
        ("dense mean", dense_mean, 3),
        ("dense mean + svd_lowrank", lambda: torch.svd_lowrank(dense_mean(), RANK), 3),
        ("dense mean + svd", lambda: torch.linalg.svd(dense_mean()), 1),
    ]
    for name, work, repeats in rivals:
        other_wall, other_cpu = timed(work, repeats)
        ratios = f"CPU {other_cpu / cpu:6.1f} times refactorize, {other_cpu / left_cpu:6.1f} times B alone"
        yield f"{name:<26} {other_wall:8.3f} s wall {other_cpu:8.3f} s CPU {ratios}"
    with LargestTensor() as largest:
        _merge_and_refactorize(clients)
    bound = 2 * SIDE * RANK * CLIENTS
    yield f"largest tensor {largest.elements} elements, (m + n)·Σr = {bound}, m·n = {SIDE * SIDE}"


def _stream(count: int, results: multiprocessing.Queue[tuple[float, float, float]]) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(SIDE, RANK, generator=generator), torch.randn(RANK, SIDE, generator=generator)
    sigma = torch.rand(BLOCKS, BLOCKS, RANK, generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, stream = time.process_time(), StreamingMerge()
    for k in range(count):
        drift = 0.3 * torch.randn(SIDE, RANK, generator=generator)
        stream.add(BlockFactors(B + drift, sigma.roll(k, 2), A + drift.mT), 1.0)
    stream.result()
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    results.put((grown, seconds, before / 1024))


def bench_stream() -> Iterator[str]:
    """Peak resident memory and CPU time of a stream of clients, each count in a fresh process."""
    context = multiprocessing.get_context("spawn")
    for count in (20, 100, 1000):
        results: multiprocessing.Queue[tuple[float, float, float]] = context.Queue()
        process = context.Process(target=_stream, args=(count, results))
        process.start()
        grown, seconds, base = results.get()
        process.join()
        yield (
            f"{count:>5} clients: peak {base + grown:7.1f} MiB, {grown:7.1f} MiB of it the stream's;"
            f" {seconds:7.2f} s CPU, {1000 * seconds / count:6.1f} ms a client"
        )


def bench_model(layers: int) -> Iterator[str]:
    """A whole model's adapters, layer by layer; the clients' factors are made outside the clock."""
    pool = [_clients(seed, CLIENTS) for seed in range(2)]
    wall, cpu = timed(lambda: [_merge_and_refactorize(pool[k % 2]) for k in range(layers)])
    size = f"{layers} layers of {SIDE} x {SIDE}, r={RANK}, b={BLOCKS}, {CLIENTS} clients"
    yield f"{size}: {wall:.1f} s wall, {cpu:.1f} s CPU"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts named on the command line, or all."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench merging", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["planted", "layer", "stream", "model"])
    parser.add_argument("--seeds", type=int, default=5, help="planted problems of every kind (default 5)")
    parser.add_argument("--layers", type=int, default=128, help="layers of the whole model (default 32 x 4)")
    options = parser.parse_args(arguments)
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "planted": lambda: bench_planted(options.seeds),
        "layer": bench_layer,
        "stream": bench_stream,
        "model": lambda: bench_model(options.layers),
    }
    unknown = set(options.parts) - set(parts)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; use {', '.join(parts)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in options.parts:
        print(f"\n{name}")
        for line in parts[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
