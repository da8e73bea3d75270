"""Where a process computes: its device, its share of a GPU, its threads, and whether bf16 pays there."""

import logging
from functools import cache

import torch
from torch import nn

from bora_fl.granted import granted

log = logging.getLogger(__name__)

OWN_CHOICE = torch.get_num_threads()
"""Torch's threads before anybody sets them."""


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
    return device_type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a forward pass.

    Args:
        device: Where it runs.
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 where the hardware has instructions for it.
    """
    if precision == "fp16":
        return torch.autocast(device.type, dtype=torch.float16)
    enabled = precision == "bf16" or (precision == "auto" and _bf16_pays(device.type))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
