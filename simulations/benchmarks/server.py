"""What a round costs the server: `bora-fl bench server [--clients 10 100 1000]`.

For each adapter and strategy one layer is merged from made-up clients, in a process of its own, and its CPU time and
peak memory are scaled to all layers: layers are merged one after the other, so time adds up and a layer's working
memory is needed once. Replies are held until the round is merged, so their memory is clients × adapter.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from bora_fl.blocks import BlockFactors
from bora_fl.config import AdapterSettings, Settings, StrategySettings
from bora_fl.state import AdapterState, ClientUpdate
from bora_fl.strategies.aggregation import build
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


def _base_delta(adapter: Adapter, strategy: str, clients: int) -> int:
    """Bytes of the base delta of a round, which every client is sent: the smaller of the stack and the dense one."""
    folds = PRESETS[strategy].folds
    return adapter.layers * min(clients * adapter.layer_bytes, 4 * adapter.side**2) if folds else 0


def measure(adapter: Adapter, strategy: str, clients: int) -> Cost:
    """Merge one layer of an adapter from this many clients, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Cost] = context.Queue()
    process = context.Process(target=_measure, args=(adapter, strategy, clients, results))
    process.start()
    cost = results.get()
    process.join()
    return cost


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000], help="clients that reply in a round")
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
        console.print(table)


if __name__ == "__main__":
    main()
