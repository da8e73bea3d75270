"""Lossy codecs of an update's tensors, as stages that compose: ``topk:0.1+int8`` is the top tenth at 8 bits each.

A stage takes a tensor apart into tensors that are sent as they are and tensors that the next stage takes on. What a
codec loses is known where it is applied, so a client adds it to its next update (error feedback; Seide et al., 2014;
Karimireddy et al., ICML 2019, arXiv:1901.09847): a biased codec such as top-k then loses nothing in the long run.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bora_fl.wire.deltas import GAP_DTYPES, positions_of, to_gaps

Parts = Mapping[str, Tensor]
Decode = Callable[[str, tuple[int, ...]], Tensor]
"""The tensor of a name and shape that the next stage was given."""


class Stage(Protocol):
    """One step of a codec."""

    def split(self, tensor: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is sent as it is, and what the next stage takes on, of a float32 tensor."""
        ...

    def join(self, sent: Parts, decode: Decode, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `split`.

        Raises:
            ValueError: If a part is missing or of another dtype or shape than `split` gives.
        """
        ...


@dataclass(frozen=True)
class Half:
    """Sixteen bits an entry: relative error at most 2⁻¹¹ (fp16, in its normal range) or 2⁻⁸ (bf16).

    Attributes:
        dtype: float16 or bfloat16.
    """

    dtype: torch.dtype

    def split(self, tensor: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Stage`; what is out of range becomes the largest number."""
        largest = torch.finfo(self.dtype).max
        return {"bits": tensor.clamp(-largest, largest).to(self.dtype).view(torch.int16)}, {}

    def join(self, sent: Parts, decode: Decode, shape: tuple[int, ...]) -> Tensor:
        """See `Stage`."""
        return _part(sent, "bits", torch.int16, shape).view(self.dtype).float()


@dataclass(frozen=True)
class Integer:
    """Whole multiples of a scale per row, rounded at random so that the mean is the entry: 4 or 8 bits an entry.

    Rows run along the longer side, so that each component of A, B and Sigma has a scale of its own:
    ``code = ⌊x / s + u⌋`` with u uniform in [0, 1) and ``s = max|x| / (2^(bits−1) − 1)``. An entry's error is
    below s, its mean zero and its variance at most s²/4.

    Attributes:
        bits: 4 (two entries a byte) or 8.
    """

    bits: int

    def split(self, tensor: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Stage`."""
        rows, most = _rows(tensor), 2 ** (self.bits - 1) - 1
        scale = rows.abs().amax(1, keepdim=True) / most if rows.numel() else rows.new_zeros(len(rows), 1)
        steps = rows / scale.clamp_min(torch.finfo(torch.float32).tiny)
        noise = torch.rand(steps.shape, generator=generator)
        code = (steps + noise).floor().clamp(-most, most).to(torch.int8)
        if self.bits == 4:
            flat = torch.nn.functional.pad(code.flatten() + 8, (0, code.numel() % 2)).to(torch.uint8)
            code = flat[::2] | (flat[1::2] << 4)
        return {"code": code, "scale": scale[:, 0]}, {}

    def join(self, sent: Parts, decode: Decode, shape: tuple[int, ...]) -> Tensor:
        """See `Stage`."""
        count, length = _row_shape(shape)
        scale = _part(sent, "scale", torch.float32, (count,))
        if self.bits == 4:
            packed = _part(sent, "code", torch.uint8, (math.ceil(count * length / 2),))
            pairs = torch.stack([packed & 15, packed >> 4], 1).flatten()[: count * length]
            code = pairs.to(torch.int8).reshape(count, length) - 8
        else:
            code = _part(sent, "code", torch.int8, (count, length))
        return _from_rows(code.float() * scale[:, None], shape)


@dataclass(frozen=True)
class TopK:
    """The share of entries that is largest by size; the others are zero.

    No choice of as many entries leaves a smaller error: ``‖x − topk(x)‖² ≤ (1 − share) ‖x‖²``.

    Attributes:
        share: Of the entries, rounded up.
    """

    share: float

    def split(self, tensor: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Stage`."""
        flat = tensor.flatten()
        order = torch.argsort(flat.abs(), descending=True, stable=True)
        positions = order[: math.ceil(self.share * len(flat))].sort().values
        return {"gaps": to_gaps(positions)}, {"values": flat[positions]}

    def join(self, sent: Parts, decode: Decode, shape: tuple[int, ...]) -> Tensor:
        """See `Stage`."""
        gaps = sent.get("gaps")
        if gaps is None or gaps.dtype not in GAP_DTYPES or gaps.dim() != 1:
            raise ValueError("no gaps")
        positions = positions_of(gaps, math.prod(shape))
        flat = torch.zeros(math.prod(shape))
        flat[positions] = decode("values", (len(positions),))
        return flat.reshape(shape)


@dataclass(frozen=True)
class LowRank:
    """The truncated singular value decomposition of a matrix: the closest of its rank, and ``rank · (m + n)`` numbers.

    A tensor of more dimensions is taken as the matrix of its last one; what would not become smaller is passed on.

    Attributes:
        rank: Of the delta that is sent.
    """

    rank: int

    def split(self, tensor: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Stage`."""
        if not self._applies(tuple(tensor.shape)):
            return {}, {"whole": tensor}
        U, S, Vh = torch.linalg.svd(tensor.reshape(-1, tensor.shape[-1]).double(), full_matrices=False)
        root = S[: self.rank].sqrt()
        left, right = U[:, : self.rank] * root, root[:, None] * Vh[: self.rank]
        return {}, {"left": left.float(), "right": right.float()}

    def join(self, sent: Parts, decode: Decode, shape: tuple[int, ...]) -> Tensor:
        """See `Stage`."""
        if not self._applies(shape):
            return decode("whole", shape)
        m, n = math.prod(shape[:-1]), shape[-1]
        return (decode("left", (m, self.rank)) @ decode("right", (self.rank, n))).reshape(shape)

    def _applies(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and self.rank * (math.prod(shape[:-1]) + shape[-1]) < math.prod(shape)


@dataclass(frozen=True)
class Codec:
    """Stages in order; without any, tensors are sent as they are.

    Attributes:
        name: As in ``wire.codec``.
        stages: Its stages.
    """

    name: str
    stages: tuple[Stage, ...]

    @classmethod
    def parse(cls, name: str) -> "Codec":
        """The codec of a name: ``float32``, or stages joined by ``+``.

        Raises:
            ValueError: For a name that is none, with what could be.
        """
        stages = () if name == "float32" else tuple(_stage(part, name) for part in name.split("+"))
        if any(isinstance(stage, (Half, Integer)) for stage in stages[:-1]):
            raise ValueError(f"wire.codec = {name!r}: nothing can follow fp16, bf16, int8 or int4; put it last")
        return cls(name, stages)

    def encode(self, tensor: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What is sent of a float32 tensor, by part."""
        return _encode(tensor.float(), self.stages, generator)

    def decode(self, sent: Parts, shape: tuple[int, ...]) -> Tensor:
        """The float32 tensor that was sent.

        Raises:
            ValueError: If parts are missing or do not fit the shape.
        """
        return _decode(sent, shape, self.stages)


def _stage(text: str, whole: str) -> Stage:
    kind, _, value = text.partition(":")
    plain: dict[str, Stage] = {
        "fp16": Half(torch.float16),
        "bf16": Half(torch.bfloat16),
        "int8": Integer(8),
        "int4": Integer(4),
    }
    try:
        if not value and kind in plain:
            return plain[kind]
        if kind == "topk" and 0 < float(value) <= 1:
            return TopK(float(value))
        if kind == "lowrank" and int(value) > 0:
            return LowRank(int(value))
    except ValueError:
        pass
    raise ValueError(
        f"wire.codec = {whole!r}: {text!r} is no stage; use float32, or some of topk:SHARE, lowrank:RANK, fp16, bf16, "
        "int8, int4 joined by +, such as topk:0.1+int8"
    )


def _encode(tensor: Tensor, stages: tuple[Stage, ...], generator: torch.Generator) -> dict[str, Tensor]:
    if not stages:
        return {"": tensor}
    sent, inner = stages[0].split(tensor, generator)
    for name, part in inner.items():
        sent |= {f"{name}.{path}": t for path, t in _encode(part, stages[1:], generator).items()}
    return sent


def _decode(sent: Parts, shape: tuple[int, ...], stages: tuple[Stage, ...]) -> Tensor:
    if not stages:
        return _part(sent, "", torch.float32, shape)

    def inner(name: str, inner_shape: tuple[int, ...]) -> Tensor:
        prefix = f"{name}."
        under = {path.removeprefix(prefix): t for path, t in sent.items() if path.startswith(prefix)}
        return _decode(under, inner_shape, stages[1:])

    return stages[0].join(sent, inner, shape)


def _part(sent: Parts, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    found = sent.get(name)
    if found is None or found.dtype != dtype or tuple(found.shape) != shape:
        what = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
        raise ValueError(f"the part {name!r} is {what}, expected {shape} {dtype}")
    return found


def _row_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    m, n = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    return min(m, n), max(m, n)


def _rows(tensor: Tensor) -> Tensor:
    """A tensor as a matrix with its rows along the longer side."""
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _from_rows(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    m, n = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    return (rows if m <= n else rows.T).reshape(shape)
