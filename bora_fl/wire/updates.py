"""A client's update through a codec: the change of each shared tensor, with what earlier codings lost.

Entries are named ``<name>#<part>``. What is coded is the change in the coordinates in which updates are noised too:
Sigma moves in its logarithm under ``exp_norm``, so that whatever is lost it stays positive. A tensor that is sent whole
is taken as it is, so that a client that cannot code, or trains another rank, takes part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bora_fl.config import Settings
from bora_fl.privacy.gaussian import from_coordinates, to_coordinates
from bora_fl.wire.codecs import Codec

SIGN = "#"


@dataclass(frozen=True)
class Coding:
    """How updates are coded.

    Attributes:
        codec: The codec.
        sigma_transform: Of the adapter.
    """

    codec: Codec
    sigma_transform: str

    @classmethod
    def of(cls, settings: Settings) -> "Coding":
        """As the settings say."""
        return cls(Codec.parse(settings.wire.codec), settings.adapter.transform)

    def encode(
        self, after: Mapping[str, Tensor], sent: Mapping[str, Tensor], lost: Mapping[str, Tensor], seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Code what a client trained.

        Args:
            after: The tensors to send.
            sent: What the client was sent, of the same names and shapes.
            lost: What earlier codings lost, by name, as far as it is known.
            seed: Of the rounding.

        Returns:
            What is sent, and what this coding lost.
        """
        generator = torch.Generator().manual_seed(seed)
        entries, rest = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in after.items():
            if not tensor.is_floating_point() or not self.codec.stages:
                entries[name] = tensor
                continue
            change = self._moved(name, tensor) - self._moved(name, sent[name])
            if name in lost and lost[name].shape == change.shape:
                change = change + lost[name].double()
            parts = self.codec.encode(change.float(), generator)
            entries |= {f"{name}{SIGN}{part}": t for part, t in parts.items()}
            rest[name] = (change - self.codec.decode(parts, tuple(change.shape)).double()).float()
        return entries, rest

    def decode(self, entries: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that a reply holds.

        Raises:
            ValueError: If a coded tensor is unknown or its parts do not fit.
        """
        whole = {name: tensor for name, tensor in entries.items() if SIGN not in name}
        coded: dict[str, dict[str, Tensor]] = {}
        for name in entries.keys() - whole.keys():
            tensor, _, part = name.partition(SIGN)
            coded.setdefault(tensor, {})[part] = entries[name]
        for name, parts in sorted(coded.items()):
            if name not in sent or name in whole:
                raise ValueError(f"{name[:200]!r} was sent coded, and is no tensor of the adapter or was sent twice")
            held = sent[name]
            try:
                change = self.codec.decode(parts, tuple(held.shape))
            except ValueError as error:
                raise ValueError(f"{name} does not decode by {self.codec.name}: {error}") from error
            reached = self._moved(name, held) + change.double()
            whole[name] = from_coordinates({name: reached}, self.sigma_transform)[name].to(held.dtype)
        return whole

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        return to_coordinates({name: tensor.double()}, self.sigma_transform)[name]
