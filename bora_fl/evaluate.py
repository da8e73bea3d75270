"""The training objective and the metrics, alike for classes, for numbers and for causal language models."""

import json
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bora_fl.data import Encoded, Pairs
from bora_fl.data.spans import span_counts, tells_spans

IGNORE = -100
_MINUS = re.compile(r"(?<!\w)[-\N{MINUS SIGN}](?=\.?\d)")
DPO_BETA = 0.1


def example_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of every example, or squared error, so that no example's loss depends on the others in the batch.

    Args:
        logits: ``[N, classes]`` with labels ``[N]``, or ``[N, T, classes]`` with labels ``[N, T]`` or ``[N, T + 1]``.
        labels: Class ids, or token ids, with ``-100`` where there is no target: position t of the logits predicts
            t + 1. Or ``[N, classes]`` float, 1 for the classes that an example has and 0 for the others, or ``[N]``
            float, the numbers that the only logit is to be.

    Returns:
        Per example, each ``[N]`` float32: the summed loss, the number of targets, the number predicted right. Where an
        example may have several classes: the mean over the classes of the binary cross-entropy, 1, and F1 of the
        classes that have a probability above a half, which is 1 where neither they nor the labels are any. Of a
        number: its squared error, 1, and 0.
    """
    if labels.is_floating_point() and labels.dim() == 1:
        losses = (logits.float()[:, 0] - labels).square()
        return losses, torch.ones_like(losses), torch.zeros_like(losses)
    if labels.is_floating_point():
        return _several(logits.float(), labels)
    if logits.dim() == 3:
        logits, labels = logits[:, : labels.shape[1] - 1], labels[:, 1:]
    else:
        logits, labels = logits[:, None], labels[:, None]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    targets = labels != IGNORE
    right = (logits.argmax(-1) == labels) & targets
    return losses.view(labels.shape).sum(1), targets.sum(1).float(), right.sum(1).float()


def _several(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1)
    found = (logits > 0).float()
    both, any_of = 2 * (found * labels).sum(1), found.sum(1) + labels.sum(1)
    return losses, torch.ones_like(losses), torch.where(any_of > 0, both / any_of.clamp(min=1), 1.0).float()


def num_targets(labels: Tensor) -> int:
    """Targets of a batch, as `example_losses` counts them."""
    if labels.dim() == 2 and not labels.is_floating_point():
        return int((labels[:, 1:] >= 0).sum())
    return len(labels)


def preference_losses(logits: Tensor, labels: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Direct preference optimization of each pair (Rafailov et al., NeurIPS 2023, arXiv:2305.18290, equation 7).

    With ``r(y) = beta (log p(y | x) - log p_ref(y | x))``, a response's reward, the loss is
    ``-log sigmoid(r(chosen) - r(rejected))``; log-probabilities are sums over a response's tokens.

    Args:
        logits: ``[2 N, T, vocabulary]``: of the chosen responses, then of the rejected ones.
        labels: ``[2 N, T]``, with -100 where there is no target.
        reference: ``[N, 2]``, the reference model's log-probability of each chosen and each rejected response.
        beta: In units of 1 / nat.

    Returns:
        Loss and margin ``r(chosen) - r(rejected)`` of each pair, each ``[N]`` float32.
    """
    chosen, rejected = (-example_losses(logits, labels)[0]).chunk(2)
    margins = beta * ((chosen - reference[:, 0]) - (rejected - reference[:, 1]))
    return -F.logsigmoid(margins), margins


@dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy per target, share of targets predicted right, and how many examples and targets there were.

    Of examples with several classes: their mean F1 in the place of that share. Of numbers: mean squared error, and R²
    of these examples, or 0 where it is negative or they are all alike. Of words, where their classes are those
    of entities, also F1 of the entities: ``2 right / (found + known)``, 0 where there are none.
    Of preference pairs: mean DPO loss, share of pairs whose chosen response has the larger reward, pairs, and the mean
    margin between the two rewards.
    """

    loss: float
    accuracy: float
    examples: int
    targets: int
    margin: float | None = None
    f1: float | None = None

    @classmethod
    def of(cls, data: Encoded, loss: float, targets: float, right: float, f1: float | None = None) -> "Metrics":
        """The metrics of examples, from the sums of what `example_losses` returns."""
        share, classes = right / max(targets, 1), data.classes
        if targets and classes is not None and classes.ndim == 1 and classes.dtype == np.float32:
            spread = len(classes) * float(classes.var(dtype=np.float64))
            share = max(1 - loss / spread, 0.0) if spread > 0 else 0.0
        return cls(loss / max(targets, 1), share, len(data), int(targets), f1=f1)


def perplexity(loss: float) -> float:
    """``exp(loss)`` of a mean loss per token in nats; at most the largest float."""
    return math.exp(min(loss, math.log(sys.float_info.max)))


def exact_match(response: str, reference: str) -> float:
    """1 if two texts are the same words in the same order, whatever their case and punctuation; else 0.

    A number's minus counts, and texts without words are compared as they are.
    """
    ours, theirs = (_words(_MINUS.sub("minus ", text)) for text in (response, reference))
    return float(ours == theirs if ours or theirs else response.strip() == reference.strip())


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


def has_form(response: str, form: str) -> float:
    """1 if a response has a form, else 0: ``json`` if it is JSON, else whether all of it fits the expression."""
    if form != "json":
        return float(re.fullmatch(form, response.strip(), re.DOTALL) is not None)
    try:
        json.loads(response)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _words(text: str) -> list[str]:
    """Runs of letters and digits, each with its marks: without them, words of many scripts are the same."""
    plain = unicodedata.normalize("NFC", text.casefold())
    return "".join(c if c == "_" or unicodedata.category(c)[0] in "LMN" else " " for c in plain).split()


def evaluate(
    model: nn.Module,
    data: Encoded,
    batch_size: int,
    *,
    beta: float = DPO_BETA,
    names: Sequence[str] = (),
    autocast: Callable[[], torch.autocast] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Evaluate a model on encoded examples, in order of length so that little is padding.

    Args:
        model: Takes input_ids and attention_mask, returns an object with ``logits``.
        data: The examples, or pairs with their reference; may be empty (then loss and accuracy are 0 over 0 examples).
        batch_size: Sequences per forward pass.
        beta: Of `preference_losses`.
        names: The classes' names, which tell whether words' classes are those of entities.
        autocast: Makes the autocast context to run under.
        progress: Called with (examples done, examples in all).
    """
    device = next(model.parameters()).device
    order = torch.as_tensor(data.lengths).argsort(descending=True, stable=True).numpy()
    if isinstance(data, Pairs) and data.reference is None:
        raise ValueError("pairs have no reference yet; see bora_fl.models.reference")
    totals, paired = torch.zeros(3, dtype=torch.float64), isinstance(data, Pairs)
    if paired:
        batch_size = max(batch_size // 2, 1)
    entities, counts = data.tags is not None and tells_spans(names), np.zeros(3, dtype=np.int64)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                batch = {k: v.to(device) for k, v in data.batch(order[start : start + batch_size]).items()}
                labels, reference = batch.pop("labels"), batch.pop("reference", None)
                with autocast() if autocast else torch.autocast(device.type, enabled=False):
                    logits = model(**batch).logits
                if reference is not None:
                    losses, margins = preference_losses(logits, labels, reference, beta)
                    parts = (losses, margins, (margins > 0).float())
                else:
                    parts = example_losses(logits, labels)
                if entities:
                    counts += span_counts(logits, labels, names)
                totals += torch.stack([part.double().sum().cpu() for part in parts])
                if progress:
                    progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
    loss, targets, right = totals.tolist()
    if paired:
        pairs = max(len(order), 1)
        return Metrics(loss / pairs, right / pairs, len(order), len(order), targets / pairs)
    found, known, both = counts.tolist()
    f1 = 2 * both / max(found + known, 1) if entities else None
    return Metrics.of(data, loss, targets, right, f1)
