"""What travels a client and round: `bora-fl bench wire [--clients 10] [--rounds 4]`.

The server's own strategy talks to made-up clients, which answer what they are sent with factors that moved a little, in
the reply's own form. Nothing is trained and nothing is sent anywhere: bytes are those of the messages' arrays.
"""

import argparse
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import Message, RecordDict
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bora_fl.blocks import BlockFactors
from bora_fl.blocks.gram import Kind, gram_of, packed
from bora_fl.config import Scalar, Settings, parse
from bora_fl.simulations.engine import identify
from bora_fl.state import ALL, AdapterState, flatten, unflatten
from bora_fl.strategies.base import FederatedStrategy
from bora_fl.strategies.observer import Observer
from bora_fl.strategies.presets import PRESETS
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.codecs import Codec
from bora_fl.wire.records import (
    changes,
    from_arrays,
    keep,
    part_of,
    plain,
    read_message,
    reply_content,
    size,
    to_arrays,
)
from bora_fl.wire.release import GramRelease
from bora_fl.wire.schema import roll_call
from bora_fl.wire.sparsity import sparsify
from bora_fl.wire.updates import Coding

SIDE, RANK, BLOCKS, LAYERS, CLASSES = 384, 8, 8, 24, 3
PLAIN, SPARSE = ("float32", "fp16", "int8", "int4"), ("topk:0.1", "topk:0.1+int8", "topk:0.02+int8")
CODECS = (*PLAIN, *SPARSE, "lowrank:2", "lowrank:2+int8")


def start(method: str = "bora") -> AdapterState:
    """An adapter of a 33 M encoder: query and value of 12 layers, and a head."""
    g = torch.Generator().manual_seed(0)
    b = BLOCKS if method == "bora" else 1
    layers = {}
    for k in range(LAYERS):
        log = torch.rand(b, b, RANK, generator=g) * 4 - 2
        sigma = (log / log.abs().mean()).exp() if b > 1 else torch.ones(b, b, RANK)
        B, A = torch.zeros(SIDE, RANK), (2 * torch.rand(RANK, SIDE, generator=g) - 1) / SIDE**0.5
        layers[f"layer.{k:02d}"] = BlockFactors(B, sigma, A, 2.0)
    return AdapterState(layers, {"head.weight": torch.randn(CLASSES, SIDE, generator=g)})


class Clients:
    """A grid of clients that move what they are asked to train."""

    def __init__(self, settings: Settings, count: int) -> None:
        identify()
        self.settings, self.count = settings, count
        self.memory = {node: RecordDict() for node in self.get_node_ids()}

    def get_node_ids(self) -> list[int]:
        """Node ids."""
        return list(range(2, self.count + 2))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Answer every message."""
        return [Message(self._answer(message), reply_to=message) for message in messages]

    def _answer(self, message: Message) -> RecordDict:
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "query":
            return roll_call(node - 2, self.count)
        memory, settings = self.memory[node], self.settings
        instruction, flat = read_message(message.content, memory)
        coding, g = Coding.of(settings), torch.Generator().manual_seed(1000 * instruction.round + node)
        moves = instruction.trains - settings.adapter.untrained
        trained = unflatten({name: _moved(name, t, g, moves) for name, t in flat.items()})
        if instruction.sparsity < 1:
            trained = sparsify(trained, unflatten(flat), instruction.sparsity)
        keep(memory, flat, instruction.keeps)

        def pack(entries: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return coding.encode(entries, sent, {}, node)[0]

        shared = instruction.shares & instruction.trains
        how = changes if instruction.sparsity < 1 else pack if coding.codec.stages else plain
        reply = reply_content(trained, unflatten(flat), shared, instruction.round, {"num-examples": 10}, how)
        if instruction.gram:
            reply.update(GramRelease(_grams(trained, instruction.gram, g)).content())
        return reply


def _grams(state: AdapterState, kind: Kind, generator: torch.Generator) -> dict[str, Tensor]:
    """Gram matrices of inputs that were drawn."""
    inputs = {name: torch.randn(64, f.shape[1], generator=generator) for name, f in state.layers.items()}
    return {name: (packed(gram_of(inputs[name], f.num_blocks, kind)) / 64).float() for name, f in state.layers.items()}


def _moved(name: str, tensor: Tensor, generator: torch.Generator, parts: frozenset[str]) -> Tensor:
    """A heavy-tailed step, as Adam's first ones are not but later ones are."""
    if part_of(name) not in parts:
        return tensor
    noise = torch.randn(tensor.shape, generator=generator)
    step = 0.01 * noise * noise.abs()
    return tensor * step.exp() if part_of(name) == "sigma" else tensor + step


class Watch(Observer):
    """Keeps each round's bytes."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []

    def on_round(self, report: Any, state: ServerState, folds: Any) -> None:
        """Note them."""
        assert not report.rejected, report.reasons
        self.rows.append((report.bytes_up, report.bytes_down))


def measure(changed: Mapping[str, Scalar], clients: int, rounds: int) -> list[tuple[float, float]]:
    """Kilobytes up and down a client, round by round."""
    method = str(changed.get("adapter.method", "bora"))
    settings = parse(
        {
            "adapter.rank": RANK,
            "adapter.num-blocks": BLOCKS,
            "run.num-rounds": rounds,
            "head.init": "random",
            "strategy.evaluate-in-train": False,
            **changed,
        }
    )
    watch = Watch()
    strategy = FederatedStrategy(settings, observer=watch)
    strategy.run(Clients(settings, clients), ServerState.start(start(method)), [], 1)  # type: ignore[arg-type]
    return [(up / clients / 1e3, down / clients / 1e3) for up, down in watch.rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench wire", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=10, help="clients of a round")
    parser.add_argument("--rounds", type=int, default=4, help="rounds")
    chosen = parser.parse_args(arguments)
    console = Console()
    table = Table(title=f"kB a client and round, {chosen.clients} clients")
    for name in ("strategy", "up", "down, round 1", "down, later rounds"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    cases: dict[str, dict[str, Scalar]] = {name: {"strategy.name": name} for name in PRESETS if name != "cellm"}
    cases["fed-sb, identity"] = {"strategy.name": "fed-sb", "adapter.sigma-transform": "identity"}
    for method in ("bora", "lora"):
        for share in (1.0, 0.25, 0.05):
            cases[f"cellm, {method}, upload-fraction {share:g}"] = {
                "strategy.name": "cellm",
                "strategy.upload-fraction": share,
                "adapter.method": method,
            }
    for name, changed in cases.items():
        (_, first), *later = rows = measure({"strategy.sweeps": 1, **changed}, chosen.clients, chosen.rounds)
        up = sum(row[0] for row in rows) / len(rows)
        down = [row[1] for row in later]
        table.add_row(name, f"{up:.1f}", f"{first:.1f}", " ".join(f"{value:.1f}" for value in down))
    console.print(table)
    table = Table(title="codecs of one update")
    for name in ("wire.codec", "kB", "share", "relative error", "ms to encode", "ms to decode"):
        table.add_column(name, justify="left" if name == "wire.codec" else "right")
    sent, g = flatten(start()), torch.Generator().manual_seed(1)
    trained = {n: _moved(n, t, g, ALL) for n, t in sent.items()}
    entries = {name: tensor for name, tensor in trained.items() if part_of(name) != "scaling"}
    whole = size(RecordDict({"state": to_arrays(entries)}))
    for name in CODECS:
        coding = Coding(Codec.parse(name), "exp_norm")
        began = time.perf_counter()
        packed, _ = coding.encode(entries, sent, {}, 0)
        encoded = time.perf_counter()
        record = to_arrays(packed)
        found = coding.decode(from_arrays(record), sent)
        decoded = time.perf_counter()
        move = sum(float((entries[n] - sent[n]).square().sum()) for n in entries) ** 0.5
        error = sum(float((found[n] - entries[n]).square().sum()) for n in entries) ** 0.5
        count = size(RecordDict({"state": record}))
        figures = (count / 1e3, count / whole, error / move, 1e3 * (encoded - began), 1e3 * (decoded - encoded))
        table.add_row(name, *(f"{figure:.3g}" for figure in figures))
    console.print(table)


if __name__ == "__main__":
    main()
