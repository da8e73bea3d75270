"""The memory of a client's training step, from its operations alone: no weights are read and none are allocated.

A step of the model with two and with three layers, on one and on two sequences, runs on tensors without data (torch's
`FakeTensorMode`), and every storage is counted from the operation that makes it to its end. What a step takes beside
the weights is affine in the layers and in the sequences:

    step(L, B) = a + b L + B (c + d L)

The part that goes with the sequences is what batches cost; the rest, such as copies of the weights in the precision of
autocast, is there whatever the batch.
"""

import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from bora_fl.config import Settings
from bora_fl.device import autocast
from bora_fl.evaluate import example_losses
from bora_fl.models import FederatedModel
from bora_fl.models.base import auto_class
from bora_fl.planning.quantized import QuantizedLinear, stand_in
from bora_fl.state import ALL

_SMALL_VOCABULARY = 64
# Bytes of a value: 4 bits with a scale of 8 bits for 64 of them, and one of 32 bits for 256 scales; or a byte.
_QUANTIZED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
# Bytes of an optimizer's state for a trained value.
_STATE = {"adamw": 8, "sgd": 4, "adamw-8bit": 2, "paged-adamw": 8, "paged-adamw-8bit": 2}


@dataclass(frozen=True)
class Estimate:
    """Memory of a client's training step, in bytes.

    Attributes:
        parameters: Of the base model, a count.
        trained: Parameters that train, a count.
        base: Frozen weights.
        adapter: Trained weights, in float32.
        optimizer: Gradients and the optimizer's state.
        fixed: What a step holds whatever its batch is, such as weights in the precision of autocast.
        sequence: What a sequence of `model.max-length` tokens holds in the layers.
        logits: What its logits, and the loss on them, hold.
        batch: Sequences in memory at once.
    """

    parameters: int
    trained: int
    base: float
    adapter: float
    optimizer: float
    fixed: float
    sequence: float
    logits: float
    batch: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.base + self.adapter + self.optimizer + self.fixed + self.batch * (self.sequence + self.logits)

    @property
    def travels(self) -> int:
        """Bytes of an adapter in float32, each way and round."""
        return 4 * self.trained


def estimate(settings: Settings, config: Any, label_names: list[str] | None = None) -> Estimate:
    """The memory of a training step on tensors without data.

    Args:
        settings: The run's.
        config: transformers' config of the base model.
        label_names: Class names, for a classifier.
    """
    layers = int(config.num_hidden_layers)
    whole = _on_meta(settings, config, layers, label_names)
    trained = whole.num_trained
    parameters = sum(p.numel() for p in whole.model.parameters()) - trained
    step = {(n, b): _step(settings, config, n, b, label_names) for n in (2, 3) for b in (1, 2)}
    per_layer = {b: step[3, b] - step[2, b] for b in (1, 2)}
    one, two = (step[2, b] + (layers - 2) * per_layer[b] for b in (1, 2))
    each, logits = max(two - one, 0.0), 0.0
    if settings.model.task == "causal-lm":
        small = deepcopy(config)
        small.vocab_size = _SMALL_VOCABULARY
        logits = min((step[2, 2] - _step(settings, small, 2, 2, label_names)) / 2, each)
    value = torch.empty((), dtype=getattr(torch, settings.model.dtype)).element_size()
    base = float(parameters * value)
    if settings.model.quantization != "none":
        base += _linear_values(whole) * (_QUANTIZED[settings.model.quantization] - value)
    return Estimate(
        parameters=parameters,
        trained=trained,
        base=base,
        adapter=4.0 * trained,
        optimizer=(4.0 + _STATE[settings.train.optimizer]) * trained,
        fixed=max(one - each, 0.0),
        sequence=each - logits,
        logits=logits,
        batch=settings.train.batch_size * (2 if settings.data.format == "preference" else 1),
    )


def _linear_values(model: FederatedModel) -> int:
    """Values of the frozen linear layers that are quantized."""
    return sum(m.weight.numel() for m in model.model.modules() if isinstance(m, QuantizedLinear))


def _on_meta(settings: Settings, config: Any, layers: int, label_names: list[str] | None) -> FederatedModel:
    config = deepcopy(config)
    config.num_hidden_layers, config.use_cache = layers, False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    if label_names:
        config.num_labels = len(label_names)
    causal = settings.model.task == "causal-lm"
    options = {} if settings.model.attention == "auto" else {"attn_implementation": settings.model.attention}
    with torch.device("meta"):
        base = auto_class(settings.model).from_config(config, dtype=getattr(torch, settings.model.dtype), **options)
        if settings.model.quantization != "none":
            head = base.get_output_embeddings() if causal else None
            stand_in(base, settings.model.quantization, head)
        return FederatedModel(base, settings.adapter, settings.model, settings.run.seed)


def _step(settings: Settings, config: Any, layers: int, batch: int, label_names: list[str] | None) -> float:
    """The most that forward and backward hold at once beside the weights, in bytes."""
    model = _on_meta(settings, config, layers, label_names)
    length = settings.model.max_length
    with FakeTensorMode():
        _give_storage(model.model)
        model = FederatedModel(model.model, settings.adapter, settings.model, settings.run.seed)
        if settings.train.checkpointing:
            model.checkpoint_activations()
        model.train_only(ALL)
        model.model.train()
        counter = _Peak([*model.model.parameters(), *model.model.buffers()])
        with counter:
            ids = torch.zeros(batch, length, dtype=torch.long)
            labels = _labels(settings, ids, len(label_names or ()))
            with autocast(torch.device("cpu"), settings.train.precision):
                logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            torch.autograd.backward(example_losses(logits, labels)[0].sum())
    return float(counter.peak)


def _labels(settings: Settings, ids: Tensor, num_classes: int) -> Tensor:
    """Labels of the form that a batch has them in."""
    match settings.model.task:
        case "causal-lm":
            return ids
        case "token-classification":
            return ids.new_zeros(len(ids), ids.shape[1] + 1)
        case "multi-label":
            return torch.zeros(len(ids), num_classes)
        case "regression":
            return torch.zeros(len(ids))
    return ids.new_zeros(len(ids))


def _give_storage(model: nn.Module) -> None:
    """Put tensors of this mode's device in the places of meta tensors; shared ones stay shared."""
    made: dict[int, Any] = {}

    def like(old: Tensor) -> Any:
        new = torch.empty(old.shape, dtype=old.dtype)
        return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new

    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, old in store.items():
                if old is not None:
                    store[name] = made.setdefault(id(old), (old, like(old)))[1]


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make, while they live.

    Args:
        known: Tensors that are there before and not counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                size = storage.nbytes()
                self._seen[storage] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size)
        return out
