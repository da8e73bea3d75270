"""A training step of BoRA against one of PEFT's LoRA, several clients at once, a kept prefix: `bora-fl bench step`.

A frozen encoder of 12 layers, 384 wide, with random weights; query and value are adapted at r = 8, b = 8. Repeats are
interleaved, and CPU time on one thread counts, so that a busy machine meets all alike; the table holds medians, and the
median of the ratio within a repeat. No time is printed before the gradients agree.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bora_fl.adapters import BoraConfig
from bora_fl.adapters.layer import BoraAdapter
from bora_fl.adapters.sigma_batch import sigmas_at_once
from bora_fl.models.prefix import PrefixCache

TARGETS, CLASSES, VOCABULARY = ["query", "value"], 4, 1000
AGREE = 1e-4  # relative, of every gradient in float32


def encoder(layers: int = 12) -> Any:
    """The frozen encoder, with a head."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **shape))


def adapted(config: Any, names: Sequence[str] = ("default",), layers: int = 12) -> Any:
    """The encoder with adapters."""
    from peft import get_peft_model

    model = get_peft_model(encoder(layers), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def bora(**options: Any) -> BoraConfig:
    """The adapter's config."""
    return BoraConfig(r=8, num_blocks=8, task_type="SEQ_CLS", **{"target_modules": TARGETS, **options})


def gradients(model: Any) -> dict[str, Tensor]:
    """What a step has left in the parameters."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_agreement(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference of two steps' gradients.

    Raises:
        AssertionError: If it is too large for a table.
    """
    assert one.keys() == other.keys()
    worst = max(float((one[n] - other[n]).norm() / one[n].norm().clamp_min(1e-12)) for n in one)
    assert worst < AGREE, f"gradients differ by {worst:.1e}"
    return worst


def interleaved(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of every way, repeat by repeat, after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if repeat:
                found[name].append(time.process_time() - began)
    return found


def table(title: str, found: dict[str, list[float]], first: str) -> None:
    """Print medians, and ratios to the first."""
    print(f"\n{title}")
    for name, seconds in found.items():
        ratio = statistics.median(s / base for s, base in zip(seconds, found[first], strict=True))
        print(f"  {name:<40}{1e3 * statistics.median(seconds):>9.1f} ms{ratio:>8.3f}")


def one_client(rows: int, tokens: int, repeats: int) -> None:
    """A step of LoRA, of BoRA layer by layer, and of BoRA with one call for all Sigmas."""
    from peft import LoraConfig

    lora = adapted(LoraConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS"))
    ours = adapted(bora())
    layers = [m for m in ours.modules() if isinstance(m, BoraAdapter)]
    ids, labels = torch.randint(0, VOCABULARY, (rows, tokens)), torch.randint(0, CLASSES, (rows,))

    def step(model: Any, shared: Sequence[BoraAdapter] = ()) -> None:
        model.zero_grad(set_to_none=True)
        with sigmas_at_once(shared) if shared else contextlib.nullcontext():
            loss = functional.cross_entropy(model(input_ids=ids).logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]

    step(ours)
    wanted = gradients(ours)
    step(ours, layers)
    require_agreement(wanted, gradients(ours))
    ways: dict[str, Callable[[], None]] = {
        "PEFT LoRA, r = 8": lambda: step(lora),
        "BoRA, a call a layer for Sigma": lambda: step(ours),
        "BoRA, one call for all": lambda: step(ours, layers),
    }
    table(f"{rows} rows of {tokens} tokens", interleaved(ways, repeats), "PEFT LoRA, r = 8")


def kept_prefix(layers: int, rows: int, tokens: int, repeats: int) -> None:
    """A step with adapters in the last two layers, and the same with the frozen ones' outputs kept."""
    targets = [f"layer.{k}.attention.self.{name}" for k in (layers - 2, layers - 1) for name in TARGETS]
    plain, kept = (adapted(bora(target_modules=targets), layers=layers) for _ in range(2))
    ids, labels = torch.randint(0, VOCABULARY, (rows, tokens)), torch.randint(0, CLASSES, (rows,))
    cache = PrefixCache(10**9)
    cache.attach(kept, [p for p in kept.parameters() if p.requires_grad])

    def step(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        functional.cross_entropy(model(input_ids=ids).logits, labels).backward()  # type: ignore[no-untyped-call]

    def first() -> None:
        cache.rows.clear()
        step(kept)

    step(plain)
    wanted = gradients(plain)
    step(kept)
    assert all(torch.equal(wanted[name], gradient) for name, gradient in gradients(kept).items())
    ways: dict[str, Callable[[], None]] = {
        "every layer": lambda: step(plain),
        "rows kept, the first time": first,
        "rows kept, later": lambda: step(kept),
    }
    title = f"adapters in the last 2 of {layers} layers, {rows} rows of {tokens} tokens, equal bits"
    table(title, interleaved(ways, repeats), "every layer")


def many_clients(clients: int, rows: int, tokens: int, repeats: int) -> None:
    """Steps of several clients in turn, and in one pass of the base model, each row with its client's adapter."""
    names = [f"client-{k}" for k in range(clients)]
    model = adapted(bora(init_weights=False), names)
    trained = [p for n, p in model.named_parameters() if "bora_adapter" in n or "modules_to_save" in n]
    ids = torch.randint(0, VOCABULARY, (clients * rows, tokens))
    labels = torch.randint(0, CLASSES, (clients * rows,))

    def in_turn() -> None:
        model.zero_grad(set_to_none=True)
        for k, name in enumerate(names):
            model.set_adapter(name)
            mine = slice(k * rows, (k + 1) * rows)
            loss = functional.cross_entropy(model(input_ids=ids[mine]).logits, labels[mine])
            loss.backward()  # type: ignore[no-untyped-call]

    def at_once() -> None:
        model.zero_grad(set_to_none=True)
        for parameter in trained:
            parameter.requires_grad_(True)
        logits = model(input_ids=ids, adapter_names=[name for name in names for _ in range(rows)]).logits
        (functional.cross_entropy(logits, labels, reduction="sum") / rows).backward()  # type: ignore[no-untyped-call]

    in_turn()
    wanted = gradients(model)
    at_once()
    worst = require_agreement(wanted, gradients(model))
    found = interleaved({"at once": at_once, "in turn": in_turn}, repeats)
    title = f"{clients} clients x {rows} rows of {tokens} tokens; gradients differ by {worst:.0e} at most"
    table(title, found, "at once")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    one_client(1, 8, 2 * chosen.repeats)
    one_client(16, 32, chosen.repeats)
    many_clients(8, 4, 32, chosen.repeats)
    for layers in (6, 12):
        kept_prefix(layers, 16, 32, chosen.repeats)


if __name__ == "__main__":
    main()
