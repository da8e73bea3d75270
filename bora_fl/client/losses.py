"""Losses of local training: of single samples, and under label skew.

**Single samples**, which is what a per-sample gradient is the gradient of. The loss a language model computes itself is
a mean over all unmasked tokens of the batch: it divides one sequence's loss by a number that the others decide, so that
its gradient, and with it the clipping, depends on them.

**Label skew.** A client whose examples are nearly all of one class learns to answer with that class. Cross-entropy of
shifted logits takes its class shares out of what is learned (logit adjustment: Menon et al., ICLR 2021,
arXiv:2007.07314; FedLC, which has n_c^(-1/4) in the place of the share: Zhang et al., ICML 2022, arXiv:2209.00189):

    loss = CE(logits + τ log(q_c / p_c)),    q_c = (1 − φ) n_c / n + φ p_c

with p the shares over all clients. Where they are known, the best logits are those of a central model, and training
from such a model moves nothing that the client's shares alone would move. The floor φ leaves a gradient to classes
that the client does not have, as FedRS does (Li, Zhan, KDD 2021): with φ = 0 and a single class there is none at all.

**Forgetting of what the others know.** A term holds the predictions where the received model has them (FedGKD with the
last model alone for a teacher; Yao, Pan, Dai, Wan, Ding, Jin, Xu, Sun, 2021, arXiv:2107.00051):

    loss = CE(logits) + β KL(p ‖ q),    p, q: softmax of the received model's logits and of this one's

At a client of one class the least loss then has that class at (1 + β p) / (1 + β) instead of 1. Not-true distillation
(FedNTD; Lee, Jeong, Shin, Bae, Yun, NeurIPS 2022, arXiv:2106.03395) leaves an example's own class out and holds the
others' odds where the received model has them:

    loss = CE(logits) + β KL(p̃ ‖ q̃),    p̃, q̃: softmax over the classes but the label, of the received model and of this
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bora_fl.evaluate import example_losses


def prior_shift(
    classes: NDArray[Any], num_classes: int, shares: Sequence[float], strength: float, floor: float
) -> Tensor:
    """``τ log(q_c / p_c)``, which local training adds to the logits.

    Args:
        classes: ``[N]``, the client's labels.
        num_classes: C.
        shares: ``[C]``, p, each class's share of all clients' examples; empty where it is not known, and then every
            class counts as equally frequent.
        strength: τ.
        floor: φ, above 0.

    Returns:
        ``[C]`` float32. A class that nobody has is shifted by 0.

    Raises:
        ValueError: If `shares` are not one finite share, from 0 on, for each class.
    """
    own = torch.from_numpy(np.bincount(classes, minlength=num_classes)).double()
    everywhere = torch.tensor(shares, dtype=torch.float64) if len(shares) else torch.full_like(own, 1 / num_classes)
    if everywhere.shape != own.shape or not bool((everywhere.isfinite() & (everywhere >= 0)).all()):
        raise ValueError(f"class shares {list(shares)} for {num_classes} classes")
    mixed = (1 - floor) * own / max(len(classes), 1) + floor * everywhere
    ratio = torch.where(everywhere > 0, mixed / everywhere, torch.ones_like(mixed))
    return (strength * ratio.log()).float()


def divergence(logits: Tensor, received: Tensor) -> Tensor:
    """``KL(p ‖ q)`` from the received model's predictions to this one's, at temperature 1.

    Args:
        logits: ``[N, C]`` of the model that trains.
        received: ``[N, C]`` of the model that the round started from.

    Returns:
        ``[N]`` float32.
    """
    q, p = (z.float().log_softmax(-1) for z in (logits, received))
    return (p.exp() * (p - q)).sum(-1)


def not_true_divergence(logits: Tensor, received: Tensor, labels: Tensor) -> Tensor:
    """``KL(p̃ ‖ q̃)`` of FedNTD at temperature 1.

    Args:
        logits: ``[N, C]`` of the model that trains, C at least 2.
        received: ``[N, C]`` of the model that the round started from.
        labels: ``[N]``.

    Returns:
        ``[N]`` float32, 0 where both models agree on the odds of the classes that are not the label.
    """
    own = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    others = (len(labels), logits.shape[-1] - 1)
    return divergence(*(z.float()[~own].view(others) for z in (logits, received)))


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
