"""Real steps on this machine: their seconds and their memory."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from bora_fl.client.training import train
from bora_fl.config import Settings
from bora_fl.data import Encoded
from bora_fl.device import pick_device
from bora_fl.models import FederatedModel, load_base
from bora_fl.state import ALL

STEPS = 2
# glibc's malloc: the parameters' numbers, and the most to which it raises them by itself (mallopt's manual page).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_RAISED = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_SMALL = 100_000  # bytes; what is smaller adds up to little


@dataclass(frozen=True)
class Measured:
    """Real steps.

    Attributes:
        seconds: Of a step.
        held: Bytes of tensors at the peak: of a GPU's memory, or of this process beyond what it held before.
        kept: The same with what malloc keeps between a CPU's tensors.
    """

    seconds: float
    held: float
    kept: float


def measure_step(settings: Settings) -> Measured:
    """Train a few steps on made-up tokens, twice on a CPU: with every tensor a mapping of its own, and as runs do.

    Args:
        settings: The run's.
    """
    device, before = pick_device(), psutil.Process().memory_info().rss
    with _tensors_apart():
        model, data = _prepare(settings)
        held = _steps(model, data, settings, before)[1]
    seconds, kept = _steps(model, data, settings, before)
    return Measured(seconds, held, held if device.type == "cuda" else kept)


def _prepare(settings: Settings) -> tuple[FederatedModel, Encoded]:
    model = FederatedModel(
        load_base(settings.model, None, settings.run.seed), settings.adapter, settings.model, settings.run.seed
    )
    if settings.train.checkpointing:
        model.checkpoint_activations()
    for parameter in model.model.parameters():  # of their own: pages of the model's file would count or not, by chance
        parameter.data = parameter.data.clone()
    gc.collect()
    model.train_only(ALL)
    length, count = settings.model.max_length, STEPS * settings.train.batch_size * settings.train.accumulation
    zeros = np.zeros(count, dtype=np.int64)
    data = Encoded(
        tokens=np.arange(count * length, dtype=np.int32) % int(model.model.config.vocab_size),
        begin=np.arange(count, dtype=np.int64) * length,
        lengths=zeros + length,
        prompts=zeros,
        classes=None,
        pad_id=0,
        max_length=length,
    )
    return model, data


def _steps(model: FederatedModel, data: Encoded, settings: Settings, before: float) -> tuple[float, float]:
    """Seconds of a step, and bytes at the peak."""
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    result = train(model, data, settings.train.model_copy(update={"local_steps": STEPS}), seed=0)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak() - before
    return result.seconds / STEPS, float(peak)


@contextmanager
def _tensors_apart() -> Iterator[None]:
    """Let glibc's malloc map each tensor by itself, so that the process's memory is that of its tensors."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        for parameter, value in _RAISED.items():
            mallopt(parameter, value)


def _forget_peak() -> None:
    """Let Linux begin anew with this process's peak."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
