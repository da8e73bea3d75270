"""Disk and memory against what a run takes."""

import os
import shutil
import tempfile
from pathlib import Path

from bora_fl.config import Settings
from bora_fl.deployment.doctor.finding import Finding
from bora_fl.planning.memory import estimate

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


def check_memory(settings: Settings, label_names: list[str] | None) -> Finding:
    """Whether the device that a client trains on has the memory that a training step is estimated to take.

    Args:
        settings: The run's, with the format of its data.
        label_names: Class names, for a classifier.
    """
    import psutil
    import torch
    from transformers import AutoConfig

    from bora_fl.device import pick_device
    from bora_fl.models import resolve

    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        config = AutoConfig.from_pretrained(resolve(settings.model.name), revision=settings.model.revision or None)
        needed = estimate(settings, config, label_names).total
    except Exception as error:  # a model may fail in its own ways on tensors without data
        text = f"what training takes cannot be estimated for this model ({type(error).__name__})"
        return Finding(f"memory of {name}", "warn", text, "the first round will tell")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return judge_memory(name, free, needed)


def judge_memory(device: str, free: float, needed: float) -> Finding:
    """Compare a device's free memory with an estimate of what training takes.

    Measured steps took from 11 % less than the estimate (a GPU) to a third more (a CPU; docs/training.md).
    """
    text = f"{free / GB:.1f} GB are free, training takes about {needed / GB:.1f} GB"
    remedy = "lower train.batch-size or model.max-length, set train.checkpointing=true or model.dtype=bfloat16"
    if free < 0.8 * needed:
        return Finding(f"memory of {device}", "fail", text, remedy)
    if free < 1.35 * needed:
        return Finding(f"memory of {device}", "warn", text, remedy)
    return Finding(f"memory of {device}", "pass", text)


def check_cores(threads: int) -> Finding:
    """Whether as many threads are asked for as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{cores} cores, run.threads = {threads}"
    if threads > cores:
        return Finding("cores", "warn", text, f"set run.threads to {cores} or 0")
    return Finding("cores", "pass", text)
