"""Tokenized examples: ragged token storage, padded batches."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE = -100
_MULTIPLE = 8


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokenized examples as views into one flat array, so that clients of one process share the tokens.

    Attributes:
        tokens: ``[total]`` int32, the tokens of all examples of the data set, one after the other.
        begin: ``[N]`` int64, where each example starts in `tokens`.
        lengths: ``[N]`` int64, tokens of each example.
        prompts: ``[N]`` int64, leading tokens of each example that are no targets (causal); zeros for plain text.
        classes: ``[N]`` int64 class of each example, or its number, float32, or ``[N, C]`` float32, 1 for each class
            that it has; None where tokens are what is predicted.
        pad_id: The token that fills up a batch.
        max_length: No batch is padded beyond this.
        targets: ``[total]`` bool, which of `tokens` are targets; None if all after the prompts are.
        places: ``[total]`` int32, each token's position in its own example, for rows that hold several; None if each
            row is one.
        tags: ``[total]`` int64 class of each token, -100 where it has none; None where tokens have no classes.
        cut: How many examples of the data set were longer than `max_length`, as far as that was counted.
    """

    tokens: NDArray[np.int32]
    begin: NDArray[np.int64]
    lengths: NDArray[np.int64]
    prompts: NDArray[np.int64]
    classes: NDArray[np.int64] | NDArray[np.float32] | None
    pad_id: int
    max_length: int
    targets: NDArray[np.bool_] | None = None
    places: NDArray[np.int32] | None = None
    tags: NDArray[np.int64] | None = None
    cut: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def examples(self) -> int:
        """Examples in all rows."""
        if self.places is None:
            return len(self)
        return sum(int((self.places[b : b + n] == 0).sum()) for b, n in zip(self.begin, self.lengths, strict=True))

    def select(self, indices: NDArray[np.int64]) -> "Encoded":
        """The examples at `indices`; the tokens are shared, not copied."""
        classes = None if self.classes is None else self.classes[indices]
        return replace(
            self,
            begin=self.begin[indices],
            lengths=self.lengths[indices],
            prompts=self.prompts[indices],
            classes=classes,
        )

    def batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """A padded batch.

        Args:
            indices: ``[N]`` positions of the examples; N may be 0.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[N, T]`` int64, padded on the right; T is the longest example's
            length, rounded up to a multiple of 8 but not beyond `max_length`. ``labels``: `classes`; or int64
            ``[N, T]`` with the token itself where it is to be predicted and -100 elsewhere (prompt, padding, first
            token); or int64 ``[N, T + 1]`` with each token's class one position on. The model's logits at t - 1 predict
            the label at t. Rows of several examples have ``position_ids`` in place of
            the mask, which begin anew with each example: transformers keeps such examples apart.
        """
        lengths = self.lengths[indices][:, None]
        longest = int(lengths.max(initial=1))
        width = max(longest, min(-(-longest // _MULTIPLE) * _MULTIPLE, self.max_length))
        place = np.arange(width)[None, :]
        inside = place < lengths
        flat = np.where(inside, self.begin[indices][:, None] + place, 0)
        ids = np.where(inside, self.tokens[flat] if self.tokens.size else 0, self.pad_id).astype(np.int64)
        labels: NDArray[Any]
        if self.tags is not None:
            labels = np.full((len(flat), width + 1), IGNORE, dtype=np.int64)
            labels[:, 1:][inside] = self.tags[flat[inside]]
        elif self.classes is None:
            targets = inside & (place >= np.maximum(self.prompts[indices], 1)[:, None])
            if self.targets is not None and self.targets.size:
                targets &= self.targets[flat]
            labels = np.where(targets, ids, IGNORE)
        else:
            labels = self.classes[indices]
        apart = {"attention_mask": inside.astype(np.int64)}
        if self.places is not None:
            apart = {"position_ids": np.where(inside, self.places[flat], 0).astype(np.int64)}
        arrays = {"input_ids": ids, **apart, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
