"""Tokenized preference pairs: two examples each, which batches hold together."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bora_fl.data.encoded import Encoded


@dataclass(frozen=True, eq=False)
class Pairs(Encoded):
    """Pairs of examples with the same prompt; what `Encoded` says is of the responses that were chosen.

    Attributes:
        rejected: The other responses, as views into the same tokens.
        reference: ``[N, 2]`` float32, the base model's log-probability of each chosen and each rejected response; None
            until it is known.
    """

    rejected: Encoded | None = None
    reference: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, both: Encoded) -> "Pairs":
        """Pairs of examples that alternate: a chosen one, then the rejected one."""
        values: dict[str, Any] = {field.name: getattr(both, field.name) for field in fields(Encoded)}
        return cls(**values).with_rows(both.select(np.arange(0, len(both), 2)), both.select(np.arange(1, len(both), 2)))

    def with_rows(self, chosen: Encoded, rejected: Encoded) -> "Pairs":
        """Other pairs of the same tokens, without their reference."""
        return replace(
            self, begin=chosen.begin, lengths=chosen.lengths, prompts=chosen.prompts, rejected=rejected, reference=None
        )

    def select(self, indices: NDArray[np.int64]) -> "Pairs":
        """The pairs at `indices`; the tokens are shared, not copied."""
        assert self.rejected is not None
        chosen, reference = super().select(indices), self.reference
        found = self.with_rows(chosen, self.rejected.select(indices))
        return found if reference is None else replace(found, reference=reference[indices])

    def rows(self) -> Encoded:
        """``[2 N]`` examples: the chosen responses, then the rejected ones."""
        assert self.rejected is not None
        return replace(
            self.rejected,
            begin=np.concatenate([self.begin, self.rejected.begin]),
            lengths=np.concatenate([self.lengths, self.rejected.lengths]),
            prompts=np.concatenate([self.prompts, self.rejected.prompts]),
        )

    def num_alike(self) -> int:
        """Pairs whose responses became the same tokens: one that is cut before the first difference teaches nothing."""
        assert self.rejected is not None
        chosen, rejected = (self.begin, self.lengths), (self.rejected.begin, self.rejected.lengths)
        rows = zip(*chosen, *rejected, strict=True)
        return sum(
            np.array_equal(self.tokens[a : a + size], self.tokens[b : b + other])
            for a, size, b, other in rows
            if size == other
        )

    def batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """A padded batch of both responses.

        Args:
            indices: ``[N]`` positions of the pairs.

        Returns:
            As `Encoded.batch` has it, ``[2 N, T]``: the chosen responses, then the rejected ones. ``reference``
            ``[N, 2]`` float32, if it is known.
        """
        found = self.select(indices).rows().batch(np.arange(2 * len(indices)))
        if self.reference is not None:
            found["reference"] = torch.from_numpy(self.reference[indices])
        return found
