"""The Gaussian mechanism on named tensors: clip them jointly, add noise, and where the randomness comes from.

A unit's contribution `v` (all its tensors as one vector) is scaled by `min(1, C / |v|)`, so that adding or removing
the unit moves a sum by at most C; noise `N(0, (z C)²)` on every coordinate of the sum hides that (z: noise multiplier).
"""

import math
import os
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Randomness(Protocol):
    """Where noise and sampling decisions come from."""

    def normal(self, count: int) -> Tensor:
        """Return `count` independent standard normal values, float64, on the CPU."""

    def uniform(self, count: int) -> Tensor:
        """Return `count` independent values uniform on [0, 1), float64, on the CPU."""


class SystemRandomness:
    """Random bits of the operating system, made normal by the Box-Muller transform in float64.

    A seeded torch generator is no substitute: on the CPU it keeps only 32 bits of its seed, so that its whole noise can
    be found by trying the seeds. The bits here are those of the system's cryptographic generator. The arithmetic on
    them is ordinary floating point, not hardened against attacks on the last bits of a noised value (Mironov, 2012).
    """

    def uniform(self, count: int) -> Tensor:
        """See `Randomness`."""
        return torch.from_numpy(self._bits(count) * 2.0**-53)

    def normal(self, count: int) -> Tensor:
        """See `Randomness`."""
        half = (count + 1) // 2
        bits = self._bits(2 * half)
        # (0, 1] for the logarithm, [0, 1) for the angle.
        radius = np.sqrt(-2.0 * np.log((bits[:half] + 1.0) * 2.0**-53))
        angle = bits[half:] * (2.0 * math.pi * 2.0**-53)
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return torch.from_numpy(values[:count])

    @staticmethod
    def _bits(count: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """Return `count` integers uniform on [0, 2^53), as float64."""
        return (np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)).astype(np.float64)


class SeededRandomness:
    """A reproducible stream, for simulations and tests only: whoever knows or guesses the seed can subtract the noise.

    Args:
        seed: Any integer.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, count: int) -> Tensor:
        """See `Randomness`."""
        return torch.randn(count, dtype=torch.float64, generator=self._generator)

    def uniform(self, count: int) -> Tensor:
        """See `Randomness`."""
        return torch.rand(count, dtype=torch.float64, generator=self._generator)


def poisson_sample(population: int, sample_rate: float, randomness: Randomness) -> list[int]:
    """Draw each of `population` units independently with probability `sample_rate`.

    Returns:
        The positions drawn, ascending; possibly none.
    """
    return torch.nonzero(randomness.uniform(population) < sample_rate).flatten().tolist()


def joint_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of all tensors as one vector, summed in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def clip(update: Mapping[str, Tensor], clip_norm: float) -> tuple[dict[str, Tensor], float]:
    """Scale an update so that its joint norm is at most `clip_norm`.

    An update that is not finite counts as zero: its contribution must stay bounded, whatever was sent.

    Returns:
        The clipped update in float64, since rounding to a short dtype could exceed the norm, and a sum of many in one
        loses what the bound is about; and the norm before clipping.
    """
    norm = joint_norm(update)
    if not math.isfinite(norm):
        return {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in update.items()}, norm
    factor = min(1.0, clip_norm / norm) if norm > 0 else 1.0
    return {name: tensor.double() * factor for name, tensor in update.items()}, norm


def add_noise(tensor: Tensor, std: float, randomness: Randomness) -> Tensor:
    """Return `tensor + N(0, std²)`, added in float64 and rounded once to the tensor's dtype and device."""
    if std == 0:
        return tensor.clone()
    noise = randomness.normal(tensor.numel()).view(tensor.shape).to(tensor.device)
    return (tensor.double() + std * noise).to(tensor.dtype)


def privatize(
    update: Mapping[str, Tensor], clip_norm: float, noise_multiplier: float, randomness: Randomness | None = None
) -> dict[str, Tensor]:
    """Clip one update and noise it before it leaves: local differential privacy of the update.

    The unit is the client, the neighbour a client that sends zeros, and the server need not be trusted. One call is one
    step at sample rate 1: `epsilon([(noise_multiplier, 1.0, rounds)], delta)` is what `rounds` replies have spent.
    Exchanging the client's data for other data moves the clipped update by up to 2 C: half the noise multiplier then.

    Args:
        update: What the client changed (trained minus received), every tensor it sends.
        clip_norm: C, finite and above 0.
        noise_multiplier: z; the noise has standard deviation z·C on every coordinate.
        randomness: Left out, the operating system's.

    Returns:
        The noised update, in the dtypes of `update`. Whatever is computed from it is as private.

    Raises:
        ValueError: If `clip_norm` or `noise_multiplier` is out of range.
    """
    require_mechanism(clip_norm, noise_multiplier)
    clipped, _ = clip(update, clip_norm)
    randomness = randomness or SystemRandomness()
    std = noise_multiplier * clip_norm
    return {name: add_noise(tensor, std, randomness).to(update[name].dtype) for name, tensor in clipped.items()}


def to_coordinates(state: Mapping[str, Tensor], sigma_transform: str) -> dict[str, Tensor]:
    """Return the state in the coordinates in which it is clipped and noised.

    Args:
        state: Named tensors; a name that ends in `/sigma` is a Sigma.
        sigma_transform: Under `"exp_norm"` Sigma is positive and stands as its logarithm, so that a noised one stays
            positive; under `"identity"` it stands as it is.
    """
    return {name: tensor.log() if _in_logarithms(name, sigma_transform) else tensor for name, tensor in state.items()}


def from_coordinates(coordinates: Mapping[str, Tensor], sigma_transform: str) -> dict[str, Tensor]:
    """The inverse of `to_coordinates`."""
    return {n: tensor.exp() if _in_logarithms(n, sigma_transform) else tensor for n, tensor in coordinates.items()}


def _in_logarithms(name: str, sigma_transform: str) -> bool:
    return sigma_transform == "exp_norm" and name.endswith("/sigma")


def require_mechanism(clip_norm: float, noise_multiplier: float) -> None:
    """Check a clipping norm and a noise multiplier.

    Raises:
        ValueError: If one is out of range, or they do not combine.
    """
    if not clip_norm > 0:
        raise ValueError(f"clip_norm = {clip_norm}: use a value above 0, such as the median norm seen on public data")
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(
            f"noise_multiplier = {noise_multiplier}: use a finite value of at least 0, such as solve_noise's"
        )
    if noise_multiplier > 0 and not math.isfinite(clip_norm):
        raise ValueError(
            f"clip_norm = {clip_norm} with noise_multiplier = {noise_multiplier}: noise needs a finite clip_norm"
        )
