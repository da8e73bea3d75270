"""Losses of single samples, which is what a per-sample gradient is the gradient of.

The loss a language model computes itself is a mean over all unmasked tokens of the batch: it divides one sequence's
loss by a number that the others decide, so that its gradient, and with it the clipping, depends on them.
"""

from torch import Tensor

from bora_fl.evaluate import example_losses


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each sample's mean loss over its own targets.

    Args:
        logits: `[samples, classes]`, or `[samples, tokens, vocabulary]` of a causal language model.
        labels: `[samples]`, or `[samples, tokens]` with -100 where there is no target.

    Returns:
        `[samples]`, float32; 0 for a sequence without a target.
    """
    total, targets, _ = example_losses(logits, labels)
    return total / targets.clamp(min=1)
