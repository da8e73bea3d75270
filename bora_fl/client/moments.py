"""Adam's moments, kept at a client from one round to the next.

A moment belongs to a coordinate. A merge that refactorizes may turn a layer's components, permute them or flip their
signs, and what was learned of one coordinate then stands for another. So the moments of a layer are kept only where
every row of the received A points where the client left it, ``cos(A_k received, A_k left) ≥ 0.9``; else that layer's
start anew, as all do without ``train.optimizer-state = kept``. What the round before did not train has none.

Under ``exp_norm`` sigma's effective value does not depend on its norm, which is set afresh in each round; its gradient
goes with one over the norm, and so do its moments.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from flwr.app import RecordDict
from torch import Tensor

from bora_fl.blocks.matching import ALIGNED
from bora_fl.models import FederatedModel
from bora_fl.state import AdapterState
from bora_fl.wire.records import from_arrays, to_arrays

MOMENTS = "optimizer-moments"
_STEPS, _LEFT, _KINDS = "steps", "left/", ("exp_avg", "exp_avg_sq")


@contextmanager
def kept(
    memory: RecordDict, received: AdapterState, model: FederatedModel, adam: torch.optim.Optimizer
) -> Iterator[int]:
    """Train with the moments of the client's last round, and keep those that this one ends with; as `restore`."""
    yield restore(memory, received, model, adam)
    keep(memory, model, adam)


def restore(memory: RecordDict, received: AdapterState, model: FederatedModel, adam: torch.optim.Optimizer) -> int:
    """Give a fresh AdamW the moments of this client's last round, where its coordinates are still the same.

    Args:
        memory: What the client keeps between rounds.
        received: The state that this round starts from.
        model: Has been brought to it.
        adam: Over what trains now.

    Returns:
        How many parameters go on; 0 in the first round.
    """
    kept = memory.array_records.get(MOMENTS)
    if kept is None:
        return 0
    flat = from_arrays(kept)
    turned = {name for name, factors in received.layers.items() if not _aligned(factors.A, flat.get(_LEFT + name))}
    restored = 0
    for name, parameter in model.named_trained().items():
        moments = [flat.get(f"{kind}/{name}") for kind in _KINDS]
        layer = name.removeprefix("layers/").rpartition("/")[0]
        if (name.startswith("layers/") and layer in turned) or any(m is None for m in moments):
            continue
        if all(m is not None and m.shape == parameter.shape for m in moments):
            norm = flat.get(_LEFT + name)  # of exp_norm's sigma alone
            ratio = 1.0 if norm is None else float(norm / parameter.detach().norm().cpu())
            first, second = (m.to(parameter) * ratio**power for power, m in enumerate(moments, 1) if m is not None)
            adam.state[parameter] = {"step": flat[_STEPS].clone(), _KINDS[0]: first, _KINDS[1]: second}
            restored += 1
    return restored


def keep(memory: RecordDict, model: FederatedModel, adam: torch.optim.Optimizer) -> None:
    """Keep the moments that a round ends with, and where its components point."""
    flat: dict[str, Tensor] = {f"{_LEFT}{name}": f.A for name, f in model.read().layers.items()}
    for name, parameter in model.named_trained().items():
        if state := adam.state.get(parameter):
            flat |= {f"{kind}/{name}": state[kind].detach().cpu() for kind in _KINDS}
            if name.endswith("/sigma") and model.adapter.transform == "exp_norm":
                flat[_LEFT + name] = parameter.detach().norm().cpu()
            flat[_STEPS] = torch.as_tensor(state["step"], dtype=torch.float32)
    memory[MOMENTS] = to_arrays(flat)


def _aligned(received: Tensor, left: Tensor | None) -> bool:
    if left is None or left.shape != received.shape:
        return False
    cosines = torch.nn.functional.cosine_similarity(received.double(), left.double(), dim=1)
    return bool((cosines >= ALIGNED).all())
