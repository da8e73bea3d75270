"""The training objective and the metrics, for classification and for causal language models alike."""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bora_fl.data import Encoded

IGNORE = -100


def example_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of every example, so that no example's loss depends on the others in the batch.

    Args:
        logits: ``[N, classes]`` with labels ``[N]``, or ``[N, T, vocabulary]`` with labels ``[N, T]``.
        labels: Class ids, or token ids with ``-100`` where there is no target. Position t of the logits predicts t + 1.

    Returns:
        Per example, each ``[N]`` float32: the summed loss, the number of targets, the number predicted right.
    """
    if logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    else:
        logits, labels = logits[:, None], labels[:, None]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    targets = labels != IGNORE
    right = (logits.argmax(-1) == labels) & targets
    return losses.view(labels.shape).sum(1), targets.sum(1).float(), right.sum(1).float()


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy per target, share of targets predicted right, and how many examples and targets there were."""

    loss: float
    accuracy: float
    examples: int
    targets: int


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a mean loss per token in nats; at most the largest float."""
    return math.exp(min(loss, math.log(sys.float_info.max)))


def exact_match(response: str, reference: str) -> float:
    """1 if two texts are the same words in the same order, whatever their case and punctuation; else 0."""
    return float(_words(response) == _words(reference))


def rouge_l(response: str, reference: str) -> float:
    """ROUGE-L (Lin, 2004): the F1 of the longest common subsequence of two texts' words, whatever their case.

    With ``LCS`` words in common, precision is ``LCS / |response|`` and recall ``LCS / |reference|``.
    """
    ours, theirs = _words(response), _words(reference)
    row = [0] * (len(theirs) + 1)  # longest subsequences with each beginning of the reference
    for word in ours:
        before = 0
        for at, other in enumerate(theirs, 1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    return 2 * row[-1] / (len(ours) + len(theirs)) if row[-1] else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def evaluate(
    model: nn.Module,
    data: Encoded,
    batch_size: int,
    *,
    autocast: Callable[[], torch.autocast] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Evaluate a model on encoded examples, in order of length so that little is padding.

    Args:
        model: Takes input_ids and attention_mask, returns an object with ``logits``.
        data: The examples; may be empty (then loss and accuracy are 0 over 0 examples).
        batch_size: Examples per forward pass.
        autocast: Makes the autocast context to run under.
        progress: Called with (examples done, examples in all).
    """
    device = next(model.parameters()).device
    order = torch.as_tensor(data.lengths).argsort(descending=True, stable=True).numpy()
    totals = torch.zeros(3, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                batch = {k: v.to(device) for k, v in data.batch(order[start : start + batch_size]).items()}
                labels = batch.pop("labels")
                with autocast() if autocast else torch.autocast(device.type, enabled=False):
                    logits = model(**batch).logits
                totals += torch.stack([part.double().sum().cpu() for part in example_losses(logits, labels)])
                if progress:
                    progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
    loss, targets, right = totals.tolist()
    return Metrics(loss / max(targets, 1), right / max(targets, 1), len(order), int(targets))
