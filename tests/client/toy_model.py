"""A small model with every kind of trained layer: adapters with and without their base weights, a norm, a head."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bora_fl.adapters.layer import BoraAdapter

CLASSES, TOKENS, WIDTH = 3, 5, 16


class Toy(nn.Module):
    """Tokens to classes; only `embedding` and the base weights are frozen."""

    def __init__(self, transform: str = "exp_norm", num_blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, WIDTH).requires_grad_(False)
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.first = BoraAdapter(WIDTH, WIDTH, 2, num_blocks, 1.5, transform)
        self.second = BoraAdapter(WIDTH, WIDTH, 3, num_blocks, 0.5, transform)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        for adapter in (self.first, self.second):
            adapter.reset_parameters(init_weights=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.first(self.embedding(tokens), self.base.weight, self.base.bias))
        h = self.norm(h + self.second(h))
        return self.head(torch.tanh(h.mean(dim=1)))


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, labels = batch
    return functional.cross_entropy(model(tokens), labels, reduction="none")


def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, labels = zip(*rows, strict=True)
    return torch.stack(tokens), torch.stack(labels)


def make_records(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (count, TOKENS), generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return list(zip(tokens, labels, strict=True))
