"""The effective Sigma of all layers from one call: with few tokens, calls are what a step costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from bora_fl.kernels.reference import exp_norm

if TYPE_CHECKING:
    from .layer import BoraAdapter


@contextmanager
def sigmas_at_once(adapters: Iterable[BoraAdapter]) -> Iterator[None]:
    """Within the context, hand every adapter under `exp_norm` its Sigma, differentiable in its sigma.

    The parameters must not change within it, and their backward pass is taken in it or right after it, once. Not for
    gradient checkpointing, which calls the layers again.

    Args:
        adapters: Of any shapes; those of one shape share a call.
    """
    alike: dict[tuple[object, ...], list[BoraAdapter]] = defaultdict(list)
    for adapter in adapters:
        if adapter.sigma_transform == "exp_norm":
            alike[adapter.sigma.shape, adapter.sigma.dtype, adapter.sigma.device].append(adapter)
    groups = [group for group in alike.values() if len(group) > 1]
    for group in groups:
        for adapter, Sigma in zip(group, exp_norm(torch.stack([a.sigma for a in group])).unbind(), strict=True):
            adapter.given_sigma = Sigma
    try:
        yield
    finally:
        for group in groups:
            for adapter in group:
                adapter.given_sigma = None
