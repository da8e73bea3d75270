"""Where a process computes: its device, its share of a GPU, its threads, and whether bf16 pays there."""

import contextlib
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from bora_fl.granted import granted
from bora_fl.paths import cache_folder, write_atomically

log = logging.getLogger(__name__)

OWN_CHOICE = torch.get_num_threads()
"""Torch's threads before anybody sets them."""
_LOCK_SECONDS = 20.0  # for all processes of a machine to wait for the one that measures


@cache
def pick_device() -> torch.device:
    """CUDA if there is one, capped at the share that a simulation granted; else MPS, else the CPU."""
    if torch.cuda.is_available():
        share = granted("GPU")
        if 0 < share < 1:
            torch.cuda.set_per_process_memory_fraction(share)
            log.info("using %.2f of the GPU's memory", share)
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def settle(model: nn.Module) -> torch.device:
    """Move a model to this process's device, if it is not there, and return the device."""
    device = pick_device()
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    return device


def set_threads(threads: int) -> int:
    """Set torch's threads: as told, else the cores that this process was granted, else torch's own choice."""
    wanted = threads or int(granted("CPU")) or OWN_CHOICE
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


@cache
def _bf16_pays(device_type: str) -> bool:
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Without tile or dot-product instructions, bf16 on a CPU is emulated and slower than float32.
    supported = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device_type == "cpu" and supported and _measured(cache_folder() / "bf16-on-cpu.json", _bf16_share)


def _measured(path: Path, measure: Callable[[], float]) -> bool:
    """Whether bf16 took less time than float32 when this machine's processes first asked; kept, so that all agree."""
    machine = f"{_processor()}, torch {torch.__version__}"
    share = _kept(path).get(machine)  # before anything is written: the folder may be another user's
    if isinstance(share, float):
        return share < 1
    with contextlib.suppress(OSError, NotImplementedError):  # a file system may have no locks, or never grant one
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            kept = _kept(path)
            share = kept.get(machine)
            if not isinstance(share, float):
                kept[machine] = share = round(float(measure()), 3)
                write_atomically(path, json.dumps(kept, indent=1) + "\n")
            return share < 1
    return measure() < 1  # nothing can be kept here


def _kept(path: Path) -> dict[str, object]:
    """What is in the file; nothing if it is no JSON object, or cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}


def _bf16_share(repeats: int = 15) -> float:
    """CPU time of a small encoder's product, forward and backward, under autocast to bf16, over that in float32."""
    shares = []
    with torch.inference_mode(False), torch.enable_grad():
        x, weight = torch.ones(512, 384, requires_grad=True), torch.ones(1536, 384)  # no random number is drawn
        for repeat in range(repeats + 1):
            seconds = []
            for enabled in (True, False):
                began = time.process_time()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                    nn.functional.linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
                seconds.append(time.process_time() - began)
            if repeat:
                shares.append(seconds[0] / max(seconds[1], 1e-9))
    return statistics.median(shares)


def _processor() -> str:
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a forward pass.

    Args:
        device: Where it runs.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 where it is fast, see `_bf16_pays`.
    """
    if precision == "fp16":
        return torch.autocast(device.type, dtype=torch.float16)
    enabled = precision == "bf16" or (precision == "auto" and _bf16_pays(device.type))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
