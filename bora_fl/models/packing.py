"""Whether a language model keeps apart the examples that share a row."""

from typing import Any

import torch

from bora_fl.config import ConfigError
from bora_fl.device import settle

_APART = 1e-3  # of the largest logit; an example that sees the other differs by far more


def require_packing(model: Any, batch_size: int) -> None:
    """Refuse ``data.packing`` for a model or an attention that does not tell packed examples apart.

    FlashAttention, as transformers calls it, does so for a batch of one row alone.

    Args:
        model: A causal language model; it is moved to this process's device.
        batch_size: Rows of a training batch.

    Raises:
        ConfigError: If an example's logits change with the one before it in its row.
    """
    settle(model)
    if _apart(model, min(batch_size, 2)):
        return
    what = f"{type(model).__name__} with attention {model.config._attn_implementation!r}"
    if batch_size > 1 and _apart(model, 1):
        raise ConfigError(
            f"data.packing = true with train.batch-size = {batch_size}: {what} keeps the examples of a row apart in "
            "batches of one row alone; set train.batch-size to 1 with a larger model.max-length, model.attention to "
            "sdpa, or data.packing to false"
        )
    raise ConfigError(
        f"data.packing = true: {what} does not keep the examples of a row apart; set data.packing to false"
    )


def _apart(model: Any, rows: int) -> bool:
    """Whether no example's logits change with the one before it, in a batch of so many rows of two examples."""
    device = next(model.parameters()).device
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(1, 6 * rows + 1, device=device).view(rows, 6) % size
    other = ids.clone()
    other[:, :3] = ids[:, :3].flip(1)
    places = torch.tensor([[0, 1, 2, 0, 1, 2]] * rows, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            after, changed = (model(input_ids=row, position_ids=places).logits[:, 3:] for row in (ids, other))
    except TypeError as error:
        raise ConfigError(f"data.packing = true: {type(model).__name__} takes no positions; set it to false") from error
    finally:
        model.train(was_training)
    return bool((after - changed).abs().max() <= _APART * after.abs().max())
