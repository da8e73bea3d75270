"""Disk and memory against what a run takes."""

import os
import shutil
import tempfile
from pathlib import Path

from bora_fl.deployment.doctor.finding import Finding

GB = 1e9


def check_folder(purpose: str, folder: Path, needed: float) -> Finding:
    """Whether a folder can be written, and its disk holds what a run puts there.

    Args:
        purpose: What it is for.
        folder: It, or where it will be made.
        needed: Bytes that the run puts there.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    subject = f"{purpose} {folder}"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(subject, "fail", f"cannot be written: {error.strerror}", f"chown {existing}, or name another")
    return judge_space(subject, shutil.disk_usage(existing).free, needed)


def judge_space(subject: str, free: float, needed: float) -> Finding:
    """Compare free bytes with needed ones; a disk that will be nearly full is worth a warning."""
    text = f"{free / GB:.2f} GB are free, a run needs {needed / GB:.2f} GB"
    if free < needed:
        return Finding(subject, "fail", text, "make room, or name a folder on another disk")
    if free < 2 * needed + GB:
        return Finding(subject, "warn", text, "make room")
    return Finding(subject, "pass", text)


def checkpoint_bytes(adapter: int, keep: int) -> int:
    """Bytes that a server writes: `keep` checkpoints, the one being written, and the adapter."""
    return (keep + 2) * adapter


def check_device(needed: float) -> Finding:
    """Whether the device that a client trains on has the memory for it."""
    import psutil
    import torch

    from bora_fl.device import pick_device

    device = pick_device()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return judge_memory(torch.cuda.get_device_name(device), free, needed)
    return judge_memory(device.type, psutil.virtual_memory().available, needed)


def judge_memory(device: str, free: float, needed: float) -> Finding:
    """Compare a device's free memory with an estimate of what training takes."""
    text = f"{free / GB:.1f} GB are free, training takes about {needed / GB:.1f} GB"
    remedy = "lower train.batch-size or model.max-length, set train.checkpointing=true or model.dtype=bfloat16"
    if free < needed / 2:
        return Finding(f"memory of {device}", "fail", text, remedy)
    if free < needed:
        return Finding(f"memory of {device}", "warn", text, remedy)
    return Finding(f"memory of {device}", "pass", text)


def training_bytes(
    parameters: int,
    trained: int,
    width: int,
    layers: int,
    *,
    batch: int,
    length: int,
    weight_bytes: int,
    checkpointing: bool,
) -> float:
    """Estimate the memory of a training step.

    Weights, four float32 copies of what is trained (values, gradients, Adam's two moments), and activations: about 34
    values of a token's width per layer (Korthikanti et al., 2022, arXiv:2205.05198, without the attention matrix), one
    per layer with checkpointing.

    Args:
        parameters: Of the whole model.
        trained: Of them or beside them.
        width: Hidden size.
        layers: Number of layers.
        batch: Sequences in memory at once.
        length: Tokens of each.
        weight_bytes: Of a frozen weight.
        checkpointing: Gradient checkpointing.
    """
    kept = layers + 34 if checkpointing else 34 * layers
    return parameters * weight_bytes + 16 * trained + 4 * kept * width * batch * length


def check_cores(threads: int) -> Finding:
    """Whether as many threads are asked for as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{cores} cores, run.threads = {threads}"
    if threads > cores:
        return Finding("cores", "warn", text, f"set run.threads to {cores} or 0")
    return Finding("cores", "pass", text)
