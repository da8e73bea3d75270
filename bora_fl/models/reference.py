"""What the base model makes of preference pairs: the reference that DPO holds the trained model to.

The reference is the frozen base model with the adapter off, which is TRL's for an adapter that it makes (with an
adapter that was there before, TRL takes a frozen copy of it; a federation's starts at zero, so both are the same). It
never changes during a run, whatever a strategy folds into the weights, so each pair's two numbers are computed once and
kept in the cache folder.
"""

import hashlib
import io
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bora_fl.config import ConfigError, Settings
from bora_fl.data import Pairs
from bora_fl.device import pick_device, settle
from bora_fl.evaluate import example_losses
from bora_fl.models.federated import FederatedModel
from bora_fl.paths import cache_folder, write_atomically

log = logging.getLogger(__name__)

Autocast = Callable[[], torch.autocast]
_SAMPLED = 64  # values of each frozen tensor by which a base model is known


def require_preferences(settings: Settings) -> None:
    """Refuse what preference pairs cannot be trained with.

    Raises:
        ConfigError: For a classifier, record-level privacy, full fine-tuning or packing.
    """
    rules = (
        (
            settings.model.task != "causal-lm",
            f"model.task = {settings.model.task!r}",
            "pairs of responses are for language models; set model.task to causal-lm",
        ),
        (
            settings.privacy.mode == "record",
            "privacy.mode = 'record'",
            "the record would be a pair, whose two sequences share one loss, and per-sample gradients are taken by "
            "sequence; set privacy.mode to client or local, whose unit is a client, or train on the chosen responses "
            "alone (data.format = prompt or messages)",
        ),
        (
            settings.adapter.method == "full",
            "adapter.method = 'full'",
            "the reference is the base model with the adapter off; choose an adapter",
        ),
        (settings.data.packing, "data.packing = true", "a batch holds pairs; set it to false"),
    )
    for refused, what, why in rules:
        if refused:
            raise ConfigError(f"{what} with data.format = 'preference': {why}")


class References:
    """The reference log-probabilities of pairs, each computed once.

    Args:
        model: A base model that nothing was folded into, with its adapter.
    """

    def __init__(self, model: FederatedModel) -> None:
        self._base = _fingerprint(model)
        self._known: dict[str, NDArray[np.float32]] = {}

    def find(self, pairs: Pairs, autocast: Autocast) -> Pairs | None:
        """Pairs with their reference at this precision, if it is known here or, undamaged, in the cache folder."""
        key = self._key(pairs, autocast)
        if key not in self._known:
            with suppress(OSError, ValueError, EOFError, TypeError):
                found = np.load(io.BytesIO(_path(key).read_bytes()))
                if found.shape == (len(pairs), 2) and np.isfinite(found).all():
                    self._known[key] = found
        return replace(pairs, reference=self._known[key]) if key in self._known else None

    def compute(self, model: FederatedModel, pairs: Pairs, batch_size: int, autocast: Autocast) -> Pairs:
        """Pairs with their reference.

        Args:
            model: As in the constructor; its adapter's values do not matter.
            pairs: The pairs; may be none.
            batch_size: Sequences per forward pass.
            autocast: Makes the autocast context to run under, the same as in training.
        """
        found = reference_log_probs(model, pairs, batch_size, autocast)
        key = self._key(pairs, autocast)
        self._known[key], content = found, io.BytesIO()
        np.save(content, found)
        try:
            write_atomically(_path(key), content.getvalue(), mode=0o600)
        except OSError as error:
            log.warning("the reference of the pairs is not kept beyond this process: %s", error)
        return replace(pairs, reference=found)

    def _key(self, pairs: Pairs, autocast: Autocast) -> str:
        digest = hashlib.sha256(self._base)
        with autocast():
            kind = pick_device().type
            digest.update(f"{torch.is_autocast_enabled(kind)} {torch.get_autocast_dtype(kind)}".encode())
        rows = pairs.rows()
        for array in (rows.lengths, rows.prompts):
            digest.update(array.tobytes())
        for begin, length in zip(rows.begin, rows.lengths, strict=True):
            digest.update(rows.tokens[begin : begin + length].tobytes())
        return digest.hexdigest()


def reference_log_probs(
    model: FederatedModel, pairs: Pairs, batch_size: int, autocast: Autocast
) -> NDArray[np.float32]:
    """``[N, 2]``, the log-probability of each chosen and each rejected response with the adapter off."""
    found = np.zeros((len(pairs), 2), np.float32)
    device, net = settle(model.model), model.model
    was_training, size = net.training, max(batch_size // 2, 1)
    order = np.argsort(-pairs.lengths, kind="stable")
    net.eval()
    try:
        with torch.no_grad(), net.disable_adapter():
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                batch = {name: t.to(device) for name, t in replace(pairs, reference=None).batch(chosen).items()}
                labels = batch.pop("labels")
                with autocast():
                    logits = net(**batch).logits
                found[chosen] = -example_losses(logits, labels)[0].view(2, -1).T.cpu().numpy()
    finally:
        net.train(was_training)
    return found


def _path(key: str) -> Path:
    return cache_folder() / "references" / f"{key}.npy"


def _fingerprint(model: FederatedModel) -> bytes:
    """A digest of a few values of every frozen tensor: another base model has others."""
    digest = hashlib.sha256()
    for name, parameter in model.model.named_parameters():
        if not parameter.requires_grad:
            tensor = parameter.detach()
            flat = getattr(tensor, "full_tensor", lambda whole=tensor: whole)().flatten()  # of which this may be a part
            values = flat[:: max(len(flat) // _SAMPLED, 1)].float().cpu().numpy()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode() + values.tobytes())
    return digest.digest()
