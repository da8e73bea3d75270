"""Whether a language model keeps apart the examples that share a row."""

from typing import Any

import torch

from bora_fl.config import ConfigError

_APART = 1e-3  # of the largest logit; an example that sees the other differs by far more


def require_packing(model: Any) -> None:
    """Refuse ``data.packing`` for a model or an attention that does not tell packed examples apart.

    Args:
        model: A causal language model, on any device.

    Raises:
        ConfigError: If an example's logits change with the one before it in its row.
    """
    device = next(model.parameters()).device
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]], device=device) % size
    other = ids.clone()
    other[0, :3] = torch.tensor([6, 5, 4]) % size
    places = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            after, changed = (model(input_ids=row, position_ids=places).logits[0, 3:] for row in (ids, other))
    except TypeError as error:
        raise ConfigError(f"data.packing = true: {type(model).__name__} takes no positions; set it to false") from error
    finally:
        model.train(was_training)
    if (after - changed).abs().max() > _APART * after.abs().max():
        raise ConfigError(
            f"data.packing = true: {type(model).__name__} with attention {model.config._attn_implementation!r} does "
            "not keep the examples of a row apart; set data.packing to false"
        )
