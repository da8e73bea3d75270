"""What a private step costs: time and peak memory against the same step without privacy, and against Opacus on LoRA.

Every row takes one optimizer step (forward, backward, clipping, noise, SGD) of a classifier on one batch. Rows take
turns, so that whatever else the machine does hits all of them, and medians of the process' CPU time are compared:

    bora-fl bench private-step
"""

import argparse
import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from bora_fl.adapters import BoraConfig
from bora_fl.client.dpsgd import train_privately
from bora_fl.config import ModelSettings
from bora_fl.models import load_base

NOISE, CLIP, RATE = 1.0, 1.0, 1e-3
Step = Callable[[], object]


def sample_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each sequence, `[samples]`."""
    tokens, labels = batch
    logits: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return functional.cross_entropy(logits, labels, reduction="none")


def count_trained(model: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def bora_model(arguments: argparse.Namespace) -> nn.Module:
    """The base model with BoRA adapters and a trained head."""
    config = BoraConfig(
        r=arguments.rank,
        num_blocks=arguments.blocks,
        target_modules=_targets(arguments),
        modules_to_save=["classifier"],
        init_weights=False,
    )
    return _adapted(arguments, config)


def lora_model(arguments: argparse.Namespace, trained: int) -> nn.Module:
    """The base model with PEFT's LoRA at the rank whose number of trained parameters is nearest to `trained`."""
    settings = {"target_modules": _targets(arguments), "modules_to_save": ["classifier"], "init_lora_weights": False}
    one, two = (count_trained(_adapted(arguments, LoraConfig(r=rank, **settings))) for rank in (1, 2))
    rank = max(1, round(1 + (trained - one) / (two - one)))
    return _adapted(arguments, LoraConfig(r=rank, lora_alpha=rank, **settings))


def plain_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    """SGD on the batch's mean loss."""
    optimizer = _sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(sample_losses(model, batch).mean())
        optimizer.step()

    return step


def private_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    """DP-SGD by `train_privately`, at sample rate 1 so that every step sees the same batch."""
    optimizer = _sgd(model)
    tokens, labels = batch
    records = list(zip(tokens, labels, strict=True))

    def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([row for row, _ in rows]), torch.stack([label for _, label in rows])

    def step() -> None:
        train_privately(
            model,
            sample_losses,
            records,
            collate,
            optimizer,
            clip_norm=CLIP,
            noise_multiplier=NOISE,
            expected_batch_size=len(records),
            physical_batch_size=len(records),
            steps=1,
            spend=None,
        )

    return step


def opacus_step(model: nn.Module, batch: tuple[Tensor, Tensor], mode: str) -> Step:
    """DP-SGD by Opacus, in its `hooks` or `ghost` mode, without wrapping the model."""
    from opacus.grad_sample.utils import prepare_module
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    settings: dict[str, Any] = {"max_grad_norm": CLIP} if mode == "ghost" else {}
    hooks = prepare_module(model, mode, wrap_model=False, loss_reduction="mean", **settings)
    optimizer = (DPOptimizerFastGradientClipping if mode == "ghost" else DPOptimizer)(
        _sgd(model), noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=len(batch[1])
    )

    def step() -> None:
        optimizer.zero_grad()
        losses = sample_losses(model, batch)
        if mode == "ghost":
            DPTensorFastGradientClipping(hooks, optimizer, losses).backward()
        else:
            torch.autograd.backward(losses.mean())
        optimizer.step()

    return step


def peak_memory(step: Step) -> float:
    """Return by how many MB the process grows at most during a step (0 where /proc does not tell)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        step()
        return (_status("VmHWM") - before) / 1024
    except (AttributeError, OSError):
        return 0.0


def measure(arguments: argparse.Namespace) -> list[tuple[str, int, float, float]]:
    """Return name, trained parameters, median CPU seconds and peak MB of each kind of step."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 20000, (arguments.batch, arguments.length), generator=generator)
    batch = tokens, torch.randint(arguments.classes, (arguments.batch,), generator=generator)
    bora = bora_model(arguments)
    trained = count_trained(bora)
    lora = {name: lora_model(arguments, trained) for name in ("plain", "private", "hooks", "ghost")}
    steps: dict[str, tuple[nn.Module, Step]] = {
        "BoRA, not private": (bora, plain_step(bora, batch)),
        "BoRA, private": (bora, private_step(bora, batch)),
        "LoRA, not private": (lora["plain"], plain_step(lora["plain"], batch)),
        "LoRA, private by this library": (lora["private"], private_step(lora["private"], batch)),
        "LoRA, Opacus hooks": (lora["hooks"], opacus_step(lora["hooks"], batch, "hooks")),
        "LoRA, Opacus ghost": (lora["ghost"], opacus_step(lora["ghost"], batch, "ghost")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    memory: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + 1):
        for name, (_, step) in steps.items():
            start = time.process_time()
            step()
            if repeat:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    for _ in range(3):
        for name, (_, step) in steps.items():
            memory[name].append(peak_memory(step))
    return [
        (name, count_trained(model), statistics.median(seconds[name]), statistics.median(memory[name]))
        for name, (model, _) in steps.items()
    ]


def table(rows: list[tuple[str, int, float, float]]) -> str:
    """Return the rows as text, times as ratios to the first."""
    _, _, base, _ = rows[0]
    lines = [f"{'step':32}{'trained':>10}{'CPU s':>9}{'ratio':>8}{'peak MB':>10}"]
    lines += [f"{name:32}{n:>10}{s:>9.3f}{s / base:>8.2f}{mb:>10.0f}" for name, n, s, mb in rows]
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="bora-fl bench private-step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded:minilm", help="hub id, local folder or embedded:…")
    parser.add_argument("--targets", default="query,value", help="comma-separated modules, or all-linear")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # Opacus' hooks warn of first layers, once per layer
    print(table(measure(arguments)))


def _targets(arguments: argparse.Namespace) -> str | list[str]:
    return "all-linear" if arguments.targets == "all-linear" else arguments.targets.split(",")


def _adapted(arguments: argparse.Namespace, config: Any) -> nn.Module:
    base = load_base(ModelSettings(name=arguments.model), [str(k) for k in range(arguments.classes)], seed=0)
    model: nn.Module = get_peft_model(base, config).train()
    return model


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


def _status(field: str) -> int:
    """Return a size in kB from /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
