"""The features that a model's head reads: sums over them, and how several heads do on them, in one pass over the data.

The features are the input of the last linear layer with one output for each class, or for the number, whatever comes
before it: a pooler, a dense layer, pooled token states, a decoder's last token, or each token's state where words have
classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bora_fl.data import Encoded
from bora_fl.evaluate import Metrics, example_losses
from bora_fl.heads.projection import narrow
from bora_fl.heads.solve import Head
from bora_fl.heads.sums import ClassSums

Autocast = Callable[[], torch.autocast]


def features(
    model: nn.Module, data: Encoded, batch_size: int, num_classes: int, autocast: Autocast | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of all examples, batch by batch in order of length, without dropout.

    Yields:
        ``[N, d]`` float64 and the labels, on the CPU: ``[N]`` int64, or ``[N, C]`` float of examples that may have
        several classes, or ``[N]`` float of numbers. Where words have classes, N is the number of a batch's words.

    Raises:
        ValueError: If the model's logits do not come from a linear layer with `num_classes` outputs.
    """
    device = next(model.parameters()).device
    order = torch.as_tensor(data.lengths).argsort(descending=True, stable=True).numpy()
    was_training = model.training
    model.eval()
    try:
        with _last_linear(model, num_classes) as call:
            for start in range(0, len(order), batch_size):
                batch = {k: v.to(device) for k, v in data.batch(order[start : start + batch_size]).items()}
                labels = batch.pop("labels")
                with torch.no_grad(), autocast() if autocast else torch.autocast(device.type, enabled=False):
                    logits = model(**batch).logits
                x = _inputs_of(call, logits, batch["input_ids"], model)
                if logits.dim() == 3:
                    labels = labels[:, 1 : 1 + x.shape[1]]
                    x, labels = x[labels >= 0], labels[labels >= 0]
                yield x.double().cpu(), labels.cpu()
                call.clear()
    finally:
        model.train(was_training)


def collect(
    model: nn.Module,
    data: Encoded,
    batch_size: int,
    num_classes: int,
    *,
    width: int = 0,
    clip_norm: float | None = None,
    number_range: tuple[float, float] | None = None,
    autocast: Autocast | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ClassSums:
    """Sum a client's examples up.

    Args:
        model: Takes input_ids and attention_mask, returns an object with ``logits [N, C]``.
        data: The client's training examples.
        batch_size: Examples per forward pass.
        num_classes: C.
        width: Most directions that are summed over, see `narrow`; 0 is all.
        clip_norm: Given, each feature vector is scaled by ``min(1, clip_norm / |x|) / clip_norm``, to a norm of at most
            1, as `bora_fl.heads.private.release` needs it.
        number_range: Given with `clip_norm`, each number is clipped to it and brought to [-1, 1], and features and
            number are divided by √2, so that both together have a norm of at most 1.
        autocast: Makes the autocast context to run under.
        progress: Called with (examples done, examples in all).

    Raises:
        ValueError: As `features` does, if there are no examples, or for numbers with a `clip_norm` and no range.
    """
    total: ClassSums | None = None
    done, held = 0, 0
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    for x, labels in features(model, data, batch_size, num_classes, autocast):
        x = narrow(x, width)
        if clip_norm is not None:
            x = clip(x, clip_norm)
        if clip_norm is not None and labels.is_floating_point():
            if number_range is None:
                raise ValueError("numbers are summed up to a norm of 1 within a range alone")
            low, high = number_range
            labels = (labels.double().clamp(low, high) - (low + high) / 2) / ((high - low) / 2)
            labels = labels.nan_to_num(0.0).clamp(-1, 1)  # whatever the range: it comes from the server
            x, labels = x / math.sqrt(2), labels / math.sqrt(2)
        xs.append(x)
        ys.append(labels)
        done, held = min(done + batch_size, len(data)), held + len(labels)
        if held >= x.shape[1] or done == len(data):  # a Gram matrix of d² numbers is not added up for a few rows
            part = ClassSums.of(torch.cat(xs), torch.cat(ys), num_classes)
            total = part if total is None else total + part
            xs, ys, held = [], [], 0
        if progress:
            progress(done, len(data))
    if total is None:
        raise ValueError("the head's sums need at least one example")
    return total


def clip(x: Tensor, clip_norm: float) -> Tensor:
    """Rows of norm at most 1: ``x · min(1, clip_norm / |x|) / clip_norm``; a row that is not finite becomes 0."""
    norms = x.norm(dim=1, keepdim=True)
    clipped = x / norms.clamp(min=clip_norm)
    return torch.where(torch.isfinite(norms), clipped, torch.zeros_like(x))


def head_metrics(
    model: nn.Module,
    data: Encoded,
    batch_size: int,
    heads: Mapping[str, Head],
    *,
    autocast: Autocast | None = None,
) -> dict[str, Metrics]:
    """Loss and accuracy of several heads on the same features, at the cost of one evaluation.

    Args:
        model: Gives the features; its own head is not asked.
        data: Held-out examples; may be empty.
        batch_size: Examples per forward pass.
        heads: Name to head, all of one shape.
        autocast: Makes the autocast context to run under.
    """
    totals = {name: torch.zeros(3, dtype=torch.float64) for name in heads}
    num_classes = len(next(iter(heads.values())).weight)
    for x, labels in features(model, data, batch_size, num_classes, autocast):
        for name, head in heads.items():
            totals[name] += torch.stack([part.double().sum() for part in example_losses(head(x), labels)])
    return {name: Metrics.of(data, *total.tolist()) for name, total in totals.items()}


@contextmanager
def _last_linear(model: nn.Module, num_classes: int) -> Iterator[dict[str, Tensor]]:
    """Records input and output of the linear layer with that many outputs that was called last."""
    call: dict[str, Tensor] = {}

    def record(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        call.update(x=inputs[0].detach(), y=output.detach())

    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield call
    finally:
        for hook in hooks:
            hook.remove()


def _inputs_of(call: Mapping[str, Tensor], logits: Tensor, ids: Tensor, model: nn.Module) -> Tensor:
    if "x" in call:
        x, y = call["x"], call["y"]
        # A decoder's head is applied to every token, and where a text has the class the last one's logits are taken.
        if x.dim() == 3 and logits.dim() == 2:
            pad = model.config.pad_token_id  # type: ignore[union-attr]
            place = torch.arange(ids.shape[1], device=ids.device)
            last = (place * (ids != pad)).argmax(1)
            rows = torch.arange(len(ids), device=ids.device)
            x, y = x[rows, last], y[rows, last]
        if torch.equal(y, logits):
            return x
    raise ValueError(
        f"the logits of {type(model).__name__} are not the output of a linear layer with {logits.shape[-1]} outputs: "
        "it has no closed-form head"
    )
