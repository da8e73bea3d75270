"""Real steps on this machine: their seconds and their memory."""

import gc

import numpy as np
import psutil
import torch

from bora_fl.client.training import train
from bora_fl.config import Settings
from bora_fl.data import Encoded
from bora_fl.device import pick_device
from bora_fl.models import FederatedModel, load_base

STEPS = 2


def measure_step(settings: Settings) -> tuple[float, float]:
    """Train a few steps on made-up tokens.

    Args:
        settings: The run's.

    Returns:
        Seconds of a step, and the bytes at the peak: of a GPU's memory, or of this process beyond what it held before.
    """
    device, before = pick_device(), psutil.Process().memory_info().rss
    model = FederatedModel(
        load_base(settings.model, None, settings.run.seed), settings.adapter, settings.model, settings.run.seed
    )
    if settings.train.checkpointing:
        model.checkpoint_activations()
    for parameter in model.model.parameters():  # of their own: pages of the model's file would count or not, by chance
        parameter.data = parameter.data.clone()
    gc.collect()
    model.train_only(frozenset({"A", "sigma", "B", "tensors"}))
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
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    result = train(model, data, settings.train.model_copy(update={"local_steps": STEPS}), seed=0)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak() - before
    return result.seconds / STEPS, float(peak)


def _forget_peak() -> None:
    """Let Linux begin anew with this process's peak."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
