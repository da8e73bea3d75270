"""A client's Gram matrices: what goes into each adapted layer of the model that it has trained."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bora_fl.blocks.gram import Kind, gram_of, packed
from bora_fl.data import Encoded
from bora_fl.heads.features import Autocast
from bora_fl.models import FederatedModel


def input_grams(
    model: FederatedModel, data: Encoded, kind: Kind, count: int, batch_size: int, seed: int, autocast: Autocast
) -> dict[str, Tensor]:
    """Mean of `x xᵀ` over the tokens of a sample of the client's examples, without dropout.

    Args:
        model: As trained.
        data: The client's training examples.
        kind: Diagonal blocks, as many as the adapter has, or diagonals.
        count: At most so many examples, drawn by the seed.
        batch_size: Examples per forward pass.
        seed: Seeds the sample.
        autocast: Makes the autocast context to run under.

    Returns:
        Layer name to the packed Gram matrix, float32.
    """
    sample = np.random.default_rng(seed).permutation(len(data))[:count]
    layers, blocks = model.adapted_layers(), model.adapter.blocks
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    mask: Tensor | None = None

    def record(name: str, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        # Padding is no input; a layer that sees no sequence sees every row.
        x = x[mask] if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape else x.flatten(0, -2)
        found = gram_of(x.cpu(), blocks, kind)
        sums[name] = sums[name] + found if name in sums else found
        rows[name] = rows.get(name, 0) + len(x)

    def hook(name: str) -> Any:
        return lambda module, inputs: record(name, inputs)

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    net: nn.Module = model.model
    was_training, device = net.training, next(net.parameters()).device
    net.eval()
    try:
        for first in range(0, len(sample), batch_size):
            batch = {k: v.to(device) for k, v in data.batch(np.sort(sample[first : first + batch_size])).items()}
            batch.pop("labels")
            batch.pop("reference", None)
            mask = batch["attention_mask"].bool()
            with torch.no_grad(), autocast():
                net(**batch)
    finally:
        net.train(was_training)
        for handle in hooks:
            handle.remove()
    return {name: (packed(total) / max(rows[name], 1)).float() for name, total in sums.items()}
