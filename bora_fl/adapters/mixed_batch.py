"""Mixed-adapter batches, `model(..., adapter_names=[...])`: one pass of the base model, each row with its own adapter.

Adapters of one rank and block count run as one batched product over a table of factors, one entry a row; where only
one or two adapters share a shape, each runs through its own call on its rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.model import _get_encoder
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layer import BoraAdapter

BASE = "__base__"  # PEFT's name for a row without an adapter
_TABLE_FROM = 3  # adapters of one shape, from which on the table is quicker than calls one by one


@contextmanager
def rows_with_adapters(
    model: nn.Module, layers: type[nn.Module], known: set[str], names: Sequence[str], num_beams: int = 1
) -> Iterator[None]:
    """Within the context, hand every adapted layer the name of each row's adapter.

    Args:
        model: The adapted model, in evaluation mode.
        layers: The class of the adapted layers; modules to save know their adapters' names too.
        known: The adapters that the model has.
        names: One for each row of the batch; `"__base__"` for none.
        num_beams: Beams of a search, which repeats every row outside the encoder.

    Raises:
        ValueError: The model is in training mode, or a name is not known.
        TypeError: A beam search is given names that are not a list or tuple.
    """
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    unknown = set(names) - known - {BASE}
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    repeated = names
    if num_beams > 1:
        if not isinstance(names, list | tuple):
            raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
        repeated = [name for name in names for _ in range(num_beams)]
    encoder = _get_encoder(model) if num_beams > 1 else None
    encoded = set() if encoder is None else set(encoder.modules())
    with ExitStack() as handles:  # a call that fails must not leave its names behind
        for module in model.modules():
            if isinstance(module, (layers, AuxiliaryTrainingWrapper)):
                hook = partial(_give_names, names=names if module in encoded else repeated)
                handles.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def _give_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def add_branches(result: Tensor, x: Tensor, adapters: Mapping[str, BoraAdapter], names: Sequence[str]) -> Tensor:
    """Return the base layer's output plus, in each row, the branch of the adapter of that name, if there is one.

    Args:
        result: `[R, ..., m]`.
        x: `[R, ..., n]`.
        adapters: The layer's, by name.
        names: R of them.
    """
    alike: dict[tuple[Any, ...], dict[BoraAdapter, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, name in enumerate(names):
        if name in adapters:
            adapter = adapters[name]
            alike[adapter.rank, adapter.num_blocks, adapter.A.dtype][adapter].append(row)
    for rows_of in alike.values():
        groups = [list(rows_of)] if len(rows_of) >= _TABLE_FROM else [[adapter] for adapter in rows_of]
        for group in groups:
            chosen = [adapter for adapter in group for _ in rows_of[adapter]]
            index = torch.tensor([row for adapter in group for row in rows_of[adapter]], device=x.device)
            some = x.index_select(0, index)
            branch = group[0](some) if len(group) == 1 else _by_table(some, chosen)
            result = result.index_add(0, index, branch.to(result.dtype))
    return result


def _by_table(x: Tensor, chosen: Sequence[BoraAdapter]) -> Tensor:
    """Return each row's branch; `x [R, ..., n]`, one adapter for each row, all of one shape.

    Rows of one adapter that follow each other, as many for each adapter, are one entry of the table.
    """
    runs = [(adapter, len(list(rows))) for adapter, rows in groupby(chosen)]
    even = len({count for _, count in runs}) == 1
    entries = [adapter for adapter, _ in runs] if even else list(chosen)
    Sigma = {adapter: adapter.effective_sigma() * adapter.scaling for adapter in set(entries)}
    factors = [torch.stack(part) for part in zip(*((a.A, Sigma[a], a.B) for a in entries), strict=True)]
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        work = x.dtype
    else:
        work = torch.promote_types(x.dtype, factors[0].dtype)
    A, S, B = (f.to(work) for f in factors)
    G, b, r, n, m = len(entries), S.shape[1], A.shape[1], A.shape[2], B.shape[1]
    with torch.autocast(device, enabled=False):
        tokens = x.to(work).reshape(G, -1, b, n // b).transpose(1, 2)  # [G, j, t, p]
        u = tokens @ A.reshape(G, r, b, n // b).permute(0, 2, 3, 1)  # [G, j, t, r]
        z = torch.einsum("gijr,gjtr->gitr", S, u)
        y = z @ B.reshape(G, b, m // b, r).mT  # [G, i, t, q]
    return y.transpose(1, 2).reshape(*x.shape[:-1], m).to(x.dtype)
