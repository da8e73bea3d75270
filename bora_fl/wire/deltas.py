"""A state as its difference from one that the receiver holds, bit for bit.

An entry that did not change is left out. One of which few entries changed is sent as their positions and new values,
``<name>@gaps`` and ``<name>@values``, wherever that is smaller than the entry itself: top-k uploads are (CELLM,
arXiv:2407.20557), and so is what the server sends back to clients whose replies changed little.

Positions are sent as gaps in memory order, ``gap_k = position_k − position_{k−1} − 1``, in the smallest of 1, 2, 4 and
8 bytes that holds the largest: one byte down to a share of about 2 %.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

GAPS, VALUES = "@gaps", "@values"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GAP_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def difference(flat: Mapping[str, Tensor], base: Mapping[str, Tensor], *, omit: bool = True) -> dict[str, Tensor]:
    """What a receiver that holds `base` needs to have `flat`.

    Args:
        flat: A flattened state.
        base: What the receiver holds of such a state; entries of it may be missing or of another shape.
        omit: Leave out what did not change.
    """
    sent: dict[str, Tensor] = {}
    for name, tensor in flat.items():
        held = base.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            sent[name] = tensor
            continue
        changed = (_bits(tensor) != _bits(held)).flatten().nonzero()[:, 0]
        if omit and not len(changed):
            continue
        gaps = to_gaps(changed)
        values = tensor.detach().flatten()[changed]
        smaller = gaps.nbytes + values.nbytes < tensor.nbytes
        sent |= {f"{name}{GAPS}": gaps, f"{name}{VALUES}": values} if smaller else {name: tensor}
    return sent


def apply(sent: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that were sent, whole again: the inverse of `difference` for what it did not leave out.

    Raises:
        ValueError: If positions are out of range, or do not fit the values or the base.
    """
    whole = {name: tensor for name, tensor in sent.items() if not name.endswith((GAPS, VALUES))}
    for name in sorted({name.rpartition("@")[0] for name in sent.keys() - whole.keys()}):
        gaps, values, held = sent.get(f"{name}{GAPS}"), sent.get(f"{name}{VALUES}"), base.get(name)
        if gaps is None or values is None or held is None or name in whole:
            raise ValueError(f"{name[:200]!r} was sent as changed values that fit nothing")
        if gaps.dtype not in GAP_DTYPES or gaps.dim() != 1 or gaps.shape != values.shape or values.dtype != held.dtype:
            raise ValueError(
                f"{name}: {tuple(gaps.shape)} {gaps.dtype} gaps and {tuple(values.shape)} {values.dtype} values"
            )
        positions = positions_of(gaps, held.numel())
        flat = held.detach().flatten().clone()
        flat[positions] = values
        whole[name] = flat.reshape(held.shape)
    return whole


def digest(flat: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, the same on both sides of the wire."""
    result = hashlib.sha256()
    for name in sorted(flat):
        tensor = flat[name].detach().cpu().contiguous()
        result.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        result.update(_bits(tensor).numpy().tobytes())
    return result.hexdigest()


def not_whole(flat: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state for which the receiver needs what it holds."""
    return {name: tensor for name, tensor in flat.items() if name not in sent}


def positions_of(gaps: Tensor, length: int) -> Tensor:
    """The positions in a tensor of so many entries.

    Raises:
        ValueError: If one is out of range.
    """
    gaps = gaps.long()
    # With each gap below the length, no sum of them overflows.
    possible = len(gaps) <= length and not bool(((gaps < 0) | (gaps >= length)).any())
    positions = (gaps + 1).cumsum(0) - 1
    if not possible or (len(positions) and int(positions[-1]) >= length):
        raise ValueError(f"a position is out of range of {length} entries")
    return positions


def _bits(tensor: Tensor) -> Tensor:
    """The entries as whole numbers: zeros of both signs differ, and a NaN equals itself."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def to_gaps(positions: Tensor) -> Tensor:
    """Rising positions as gaps."""
    gaps = positions.diff(prepend=positions.new_full((1,), -1)) - 1
    largest = int(gaps.max()) if len(gaps) else 0
    return gaps.to(next(dtype for dtype in GAP_DTYPES if largest <= torch.iinfo(dtype).max))
