"""What frozen lower layers make of a site's examples, computed once and kept.

Where all that trains sits in the upper layers, the lower ones give the same for an example in every pass: training,
evaluation and the head's sums take it from memory. A row of a batch depends on its own tokens and on the width it is
padded to, not on the other rows, so that is what it is known by.

Kept rows are those of evaluation mode: dropout in the frozen layers is off in training too.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class _UnknownOutputError(Exception):
    """A block gives more than a hidden state."""


def frozen_blocks(model: nn.Module, trained: Sequence[Tensor]) -> tuple[list[nn.Module], str]:
    """A model's blocks from the lowest on that are frozen, with nothing adapted below them, and all that follow.

    Args:
        model: With its adapter.
        trained: Parameters that train in any round.

    Returns:
        The frozen blocks; none with the reason in words.
    """
    count = getattr(model.config, "num_hidden_layers", 0)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and 1 < len(m) == count]
    if len(lists) != 1:
        return [], f"{type(model).__name__} has no one list of its {count} layers"
    top: Any = model
    whole = top.get_base_model() if hasattr(top, "get_base_model") else top
    body = getattr(whole, whole.base_model_prefix, whole)
    adapted = [m for m in model.modules() if hasattr(m, "get_base_layer")]
    ids = {id(p) for p in trained} | {id(p) for module in adapted for p in module.parameters()}
    ids &= {id(p) for p in body.parameters()}  # a head stands above all layers
    blocks = list(lists[0])
    first = next((k for k, block in enumerate(blocks) if any(id(p) in ids for p in block.parameters())), len(blocks))
    inside = {id(p) for block in blocks for p in block.parameters()}
    if ids - inside:
        return [], "something beside the layers is trained, which may stand below them"
    return blocks[:first], "" if first else "the lowest layer is adapted"


@dataclass
class PrefixCache:
    """Rows of the frozen blocks' outputs, up to a budget; further ones are computed in every pass.

    Args:
        budget: Bytes.
        every: Keep every frozen block's output, for a head that reads them, and not the last one's alone.
    """

    budget: int
    every: bool = False
    size: int = 0
    rows: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)
    _model: Any = None
    _blocks: list[nn.Module] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)
    _replayed: list[Tensor] | None = None
    _recorded: list[Tensor] | None = None
    _form: int = 0  # of a block's output: a hidden state, or a tuple of it and so many less one that are None

    def attach(self, model: Any, trained: Sequence[Tensor]) -> str:
        """Serve a model's forward passes; one that is attached is detached first.

        Returns:
            Why there is nothing to keep; empty if there is.
        """
        self.detach()
        frozen, reason = frozen_blocks(model, trained)
        if not frozen:
            log.info("train.prefix-cache-mb: nothing is kept, %s", reason)
            return reason
        (blocks,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and m[0] is frozen[0])
        self._model, self._blocks = model, list(blocks)
        for k, block in enumerate(blocks):
            block.forward = partial(self._run, k, len(frozen), block.forward)
        before = model.register_forward_pre_hook(partial(self._before, len(frozen)), with_kwargs=True)
        after = model.register_forward_hook(self._after, always_call=True)
        self._hooks = [before, after]
        log.info("the outputs of the lowest %d of %d layers are kept", len(frozen), len(blocks))
        return ""

    def detach(self) -> None:
        """Leave the model as it was; the rows stay."""
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            del block.forward
        self._model, self._blocks, self._hooks = None, [], []

    def _run(self, place: int, frozen: int, forward: Any, hidden: Tensor, *given: Any, **named: Any) -> Any:
        """A block's forward pass: as it is, from memory, or, of an upper block while rows are computed, none."""
        if self._recorded is not None:
            if place >= frozen:
                return self._formed(hidden)
            output = forward(hidden, *given, **named)
            self._form = len(output) if isinstance(output, tuple) else 0
            first, *others = output if self._form else (output,)
            if not isinstance(first, Tensor) or any(other is not None for other in others):
                raise _UnknownOutputError
            if self.every or place == frozen - 1:
                self._recorded.append(first)
            return output
        if self._replayed is None or place >= frozen:
            return forward(hidden, *given, **named)
        kept = self._replayed[place if self.every else 0] if self.every or place == frozen - 1 else hidden
        return self._formed(kept)

    def _formed(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._form - 1)) if self._form else hidden

    def _before(self, frozen: int, model: Any, args: Any, named: Mapping[str, Any]) -> None:
        if self._recorded is not None or args or named.get("past_key_values") is not None or named.get("use_cache"):
            return
        inputs = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        shapes = {tuple(value.shape) for value in inputs.values()}
        if "input_ids" not in inputs or len(shapes) != 1 or len(next(iter(shapes))) != 2:
            return
        keys = _keys(inputs)
        missing = [k for k, key in enumerate(keys) if key not in self.rows]
        try:
            computed = self._compute(inputs, missing) if missing else {}
        except _UnknownOutputError:
            log.info(
                "train.prefix-cache-mb: nothing is kept, a layer of %s gives more than its state", type(model).__name__
            )
            self.detach()
            return
        found = [computed[k] if k in computed else self.rows[key] for k, key in enumerate(keys)]
        for k in missing:
            size = sum(t.numel() * t.element_size() for t in computed[k])
            if keys[k] not in self.rows and self.size + size <= self.budget:
                self.rows[keys[k]] = [t.clone() for t in computed[k]]
                self.size += size
        self._replayed = [torch.stack(parts) for parts in zip(*found, strict=True)]

    def _after(self, *_: Any) -> None:
        if self._recorded is None:
            self._replayed = None

    def _compute(self, inputs: Mapping[str, Tensor], rows: Sequence[int]) -> dict[int, list[Tensor]]:
        """The frozen blocks' outputs for some rows of a batch, in evaluation mode."""
        chosen = list(rows)
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask.all()) and bool(mask[chosen].all()):
            # Without any padding a model takes another path, and rounds otherwise.
            chosen.append(int(mask.all(1).logical_not().nonzero()[0]))
        was_training, self._recorded = self._model.training, []
        self._model.eval()
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._model(**{name: value[chosen].clone() for name, value in inputs.items()})
            outputs = self._recorded
        finally:
            self._recorded = None
            self._model.train(was_training)
        return {row: [output[k] for output in outputs] for k, row in enumerate(rows)}


def _keys(inputs: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    """What each row of a batch is known by: its own numbers, and how the batch is computed."""
    kind = inputs["input_ids"].device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    mask = inputs.get("attention_mask")
    how = (*inputs, precision, mask is None or bool(mask.all()))
    rows = torch.cat([value.long() for value in inputs.values()], 1).cpu().numpy()
    return [(*how, row.tobytes()) for row in rows]
