"""What a codec lost of a client's updates, kept until the next one, in the coordinates of the adapter it was lost on.

An entry of B, Sigma or A belongs to a component. A merge that refactorizes sorts the components by energy, and turns
those that it has to. So a component's losses are added to that component of the received adapter which points where
theirs did, ``cos(A_k received, A_k before) ≥ 0.9``, and are forgotten if there is none.
"""

from collections.abc import Mapping

import torch
from flwr.app import RecordDict
from torch import Tensor

from bora_fl.blocks.matching import matches
from bora_fl.wire.records import Instruction, from_arrays, part_of, to_arrays

LOST = "codec-lost"
_ROUND, _LEFT = "round", "left/"


def recall_lost(memory: RecordDict, received: Mapping[str, Tensor], instruction: Instruction) -> dict[str, Tensor]:
    """What is to be added to this round's update, by name.

    Args:
        memory: What the client keeps between rounds.
        received: The flattened state that the message carried.
        instruction: Says from which round on losses count; a round that is taken again has had its own already.
    """
    if not instruction.feedback or LOST not in memory.array_records:
        return {}
    kept = from_arrays(memory.array_records[LOST])
    if not instruction.feedback <= int(kept.pop(_ROUND)) < instruction.round:
        return {}
    left = {name.removeprefix(_LEFT): kept.pop(name) for name in list(kept) if name.startswith(_LEFT)}
    found = {}
    for name, lost in kept.items():
        layer, _, part = name.rpartition("/")
        if part_of(name) == "tensors":
            found[name] = lost
        elif layer in left and (source := matches(received[f"{layer}/A"], left[layer])) is not None:
            found[name] = _moved(lost, source, 0 if part == "A" else lost.dim() - 1)
    return found


def keep_lost(
    memory: RecordDict, lost: Mapping[str, Tensor], flat: Mapping[str, Tensor], instruction: Instruction
) -> None:
    """Keep what an update has lost, and of the parts that it does not hold what earlier ones have.

    Args:
        memory: What the client keeps between rounds; changed.
        lost: By name.
        flat: The flattened state that the client was sent, with what it has trained.
        instruction: The round's.
    """
    memory.pop(LOST, None)
    if instruction.feedback:
        layers = {name.rpartition("/")[0] for name in lost if part_of(name) != "tensors"}
        left = {f"{_LEFT}{layer}": flat[f"{layer}/A"] for layer in layers}
        memory[LOST] = to_arrays({**lost, **left, _ROUND: torch.tensor(instruction.round)})


def _moved(lost: Tensor, source: Tensor, dim: int) -> Tensor:
    """Component k from where `source` says it was; zero where it is nowhere."""
    moved = lost.index_select(dim, source.clamp_min(0))
    there = (source >= 0).to(lost.dtype)
    return moved * (there[:, None] if dim == 0 else there)
