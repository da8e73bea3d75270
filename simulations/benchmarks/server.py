"""What a round costs the server: `bora-fl bench server [--clients 10 100 1000] [--whole 10 20 100]`.

For each adapter and strategy one layer is merged from made-up clients, in a process of its own, and its CPU time and
peak memory are scaled to all layers. Replies are held until the round is merged: in memory up to `strategy.memory-mb`,
beyond it in a file.

The last table takes the whole larger adapter through the merge, with every thread of this machine: seconds of wall
clock to hold the replies and to merge them, the report's share of the merge's work, and what the process grew by.
"""

import argparse
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bora_fl.blocks import BlockFactors
from bora_fl.config import AdapterSettings, Settings, StrategySettings
from bora_fl.state import AdapterState, ClientUpdate
from bora_fl.strategies import aggregation
from bora_fl.strategies.aggregation import Aggregator, build
from bora_fl.strategies.holding import Held
from bora_fl.strategies.merge_report import squares
from bora_fl.strategies.presets import PRESETS
from bora_fl.strategies.server_state import ServerState


@dataclass(frozen=True)
class Adapter:
    """The size of an adapter: `layers` square weights."""

    name: str
    side: int
    rank: int
    num_blocks: int
    layers: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer's factors in float32."""
        return 4 * (2 * self.side * self.rank + self.num_blocks**2 * self.rank)


ADAPTERS = (
    Adapter("33 M encoder: query, value of 12 layers", 384, 8, 8, 24),
    Adapter("7 B decoder: q, k, v, o of 32 layers", 4096, 16, 8, 128),
)
STRATEGIES = ("fedavg", "flora", "refactor")


@dataclass(frozen=True)
class Cost:
    """CPU seconds and working memory, in bytes, of merging one layer."""

    seconds: float
    memory: int


def _factors(adapter: Adapter, seed: int) -> BlockFactors:
    g = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    n, r, b = adapter.side, adapter.rank, adapter.num_blocks
    log = torch.randn(b, b, r, generator=g)
    A = torch.randn(r, n, generator=g) / n**0.5
    return BlockFactors(
        torch.randn(n, r, generator=own),
        (log / log.abs().mean()).exp(),
        A + 0.2 * torch.randn(r, n, generator=own) / n**0.5,
        2.0,
    )


def _measure(adapter: Adapter, strategy: str, clients: int, results: "multiprocessing.Queue[Cost]") -> None:
    torch.set_num_threads(1)
    blocks = AdapterSettings(num_blocks=adapter.num_blocks)
    aggregator = build(Settings(strategy=StrategySettings(name=strategy), adapter=blocks))
    state = ServerState.start(AdapterState({"layer": _factors(adapter, 0)}))
    updates = [ClientUpdate(k, 1.0, AdapterState({"layer": _factors(adapter, k + 1)})) for k in range(clients)]
    aggregator.aggregate(state, updates[:2], 1)  # code and library buffers come into memory
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    aggregator.aggregate(state, updates, 1)
    seconds = time.process_time() - started
    results.put(Cost(seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


@dataclass(frozen=True)
class Whole:
    """Wall-clock and CPU seconds, the report's share of the layers' seconds, and bytes, of a whole adapter's merge."""

    hold: float
    merge: float
    cpu: float
    report: float
    memory: int


def _measure_whole(
    adapter: Adapter, strategy: str, clients: int, memory_mb: int, results: "multiprocessing.Queue[Whole]"
) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    settings = StrategySettings(name=strategy, memory_mb=memory_mb)
    aggregator = build(Settings(strategy=settings, adapter=AdapterSettings(num_blocks=adapter.num_blocks)))
    names = [f"layer.{k:03d}" for k in range(adapter.layers)]
    drawn = _factors(adapter, 0)
    state = ServerState.start(AdapterState(dict.fromkeys(names, drawn)))

    def update(client: int) -> ClientUpdate:
        """A client's own factors, as copies: the same draw moved along by another step for every layer."""
        moved = _factors(adapter, client + 1)
        layers = {}
        for k, name in enumerate(names):
            B, A = moved.B.roll(31 * k, 0), moved.A.roll(17 * k, 1)
            layers[name] = BlockFactors(B, moved.sigma.clone(), A, moved.scaling)
        return ClientUpdate(client, 1.0 + client % 7, AdapterState(layers))

    spent = {"work": 0.0, "report": 0.0}

    def clocked(key: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = time.thread_time()
            result = work(*given)
            spent[key] += time.thread_time() - began
            return result

        return run

    aggregation.squares = clocked("report", squares)  # type: ignore[attr-defined]
    Aggregator._merged = clocked("work", Aggregator._merged)  # type: ignore[method-assign]
    small = AdapterState({names[0]: drawn})
    aggregator.aggregate(ServerState.start(small), [ClientUpdate(k, 1.0, small) for k in range(2)], 1)
    spent.update(work=0.0, report=0.0)
    before, held, waiting = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [], 0.0
    holder = Held(memory_mb * 1_000_000, state.current)
    for client in range(clients):
        given = update(client)
        started = time.perf_counter()
        held.append(holder.hold(given))
        waiting += time.perf_counter() - started
        del given
    started, cpu = time.perf_counter(), time.process_time()
    aggregator.aggregate(state, held, 1)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    results.put(Whole(waiting, seconds, cpu, spent["report"] / (spent["report"] + spent["work"]), memory))


def _base_delta(adapter: Adapter, strategy: str, clients: int) -> int:
    """Bytes of the base delta of a round, which every client is sent: the smaller of the stack and the dense one."""
    folds = PRESETS[strategy].folds
    return adapter.layers * min(clients * adapter.layer_bytes, 4 * adapter.side**2) if folds else 0


def measure(adapter: Adapter, strategy: str, clients: int) -> Cost:
    """Merge one layer of an adapter from this many clients, in a fresh process."""
    found: Cost = _in_process(_measure, adapter, strategy, clients)
    return found


def measure_whole(adapter: Adapter, strategy: str, clients: int, memory_mb: int) -> Whole:
    """Hold and merge a whole adapter from this many clients, in a fresh process."""
    found: Whole = _in_process(_measure_whole, adapter, strategy, clients, memory_mb)
    return found


def _in_process(work: Callable[..., None], *given: object) -> Any:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Any] = context.Queue()
    process = context.Process(target=work, args=(*given, results))
    process.start()
    found = results.get()
    process.join()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="*", default=[10, 100, 1000], help="clients that reply in a round")
    parser.add_argument("--whole", type=int, nargs="*", default=[10, 20, 100], help="the same for the last table")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), help="of the last table")
    parser.add_argument("--layers", type=int, default=ADAPTERS[-1].layers, help="layers of the last table")
    parser.add_argument("--memory-mb", type=int, default=512, help="strategy.memory-mb of the last table")
    chosen = parser.parse_args(arguments)
    console = Console()
    for adapter in ADAPTERS:
        table = Table(title=f"{adapter.name}: side {adapter.side}, r = {adapter.rank}, b = {adapter.num_blocks}")
        for name in ("strategy", "clients", "server s", "replies GB", "working GB", "traffic GB a round"):
            table.add_column(name, justify="left" if name == "strategy" else "right")
        size = adapter.layer_bytes * adapter.layers
        for strategy in STRATEGIES:
            for clients in chosen.clients:
                cost = measure(adapter, strategy, clients)
                numbers = (
                    cost.seconds * adapter.layers,
                    clients * size / 1e9,
                    cost.memory / 1e9,
                    clients * (2 * size + _base_delta(adapter, strategy, clients)) / 1e9,
                )
                table.add_row(strategy, str(clients), *(f"{number:.3g}" for number in numbers))
        if chosen.clients:
            console.print(table)
    if not chosen.whole:
        return
    adapter = replace(ADAPTERS[-1], layers=chosen.layers)
    console.print(f"{adapter.name}, {adapter.layers} layers; strategy.memory-mb = {chosen.memory_mb}")
    console.print("strategy    clients   hold s  merge s   CPU s  report %   grown MB")
    for strategy in chosen.strategies:
        for clients in chosen.whole:
            whole = measure_whole(adapter, strategy, clients, chosen.memory_mb)
            console.print(
                f"{strategy:<10}{clients:>9}{whole.hold:>9.1f}{whole.merge:>9.1f}{whole.cpu:>8.1f}"
                f"{100 * whole.report:>10.1f}{whole.memory / 1e6:>11.0f}"
            )


if __name__ == "__main__":
    main()
