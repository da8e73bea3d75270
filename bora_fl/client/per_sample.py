"""Collect per-sample gradients in one backward pass, without ever forming a batch gradient.

While a `SampleGradients` is active the trained parameters do not require gradients: autograd propagates to the
activations only, a hook on each layer's output receives `dL/dY`, and the layer's rule turns it, with the layer's input,
into one gradient per sample. An unclipped batch gradient, which nothing may be released from, is never in memory.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bora_fl.adapters.layer import BoraAdapter
from bora_fl.client.grad_sample import adapter_sample_gradients


class SampleGradients:
    """A context in which a model's backward pass of a summed loss yields per-sample gradients.

    Every trained parameter must belong to a `BoraAdapter` or to a layer type with an Opacus grad sampler (linear, norm,
    embedding, convolution), and be used through the layer's call with the samples in the first dimension.

    Args:
        model: The model.

    Raises:
        ValueError: If no parameter is trained, one has no per-sample rule, or a layer mixes the samples of a batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._layers = dict(_trained_layers(model))
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._called: set[str] = set()
        self._samples_seen: defaultdict[str, set[int]] = defaultdict(set)
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_hook(partial(self._on_forward, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._gradients.clear()
        self._samples_seen.clear()
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def take(self, samples: int) -> dict[nn.Parameter, Tensor]:
        """Return the gradients collected since the last call.

        Args:
            samples: How many samples the backward passes since then covered.

        Returns:
            Parameter to `[samples, *shape]`; a parameter that the loss did not depend on is missing.

        Raises:
            RuntimeError: If a layer was never called, or saw another number of samples: its gradients would be wrong.
        """
        unused = self._layers.keys() - self._called
        if unused:
            raise RuntimeError(
                f"layer {min(unused)!r} is trained, yet the forward pass did not go through its call: its per-sample "
                "gradients would be missing; freeze it, or call the layer itself"
            )
        gradients, self._gradients = self._gradients, {}
        for name, seen in self._samples_seen.items():
            if seen != {samples}:
                raise RuntimeError(
                    f"layer {name!r} saw inputs of {sorted(seen)} samples where the batch has {samples}: its input "
                    "must hold one row per sample; freeze layers whose input is shared, such as position embeddings"
                )
        self._samples_seen.clear()
        return gradients

    def _on_forward(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        self._called.add(name)
        x = inputs[0].detach()
        replaced = None
        if not output.requires_grad:
            # Nothing below needs a gradient: a zero that does makes autograd reach this output.
            output = replaced = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        output.register_hook(  # type: ignore[no-untyped-call]
            partial(self._on_gradient, name, layer, x, x._version)
        )
        return replaced

    def _on_gradient(self, name: str, layer: nn.Module, x: Tensor, version: int, dy: Tensor) -> None:
        if x._version != version:
            raise RuntimeError(f"the input of layer {name!r} was changed in place after its call: its gradient is lost")
        self._samples_seen[name].add(x.shape[0])
        with torch.no_grad():
            for parameter, gradient in self._rule(layer, x, dy).items():
                seen = self._gradients.get(parameter)
                # Unequal sizes are reported by `take`; adding them would broadcast.
                if seen is not None and seen.shape == gradient.shape:
                    gradient = seen + gradient
                self._gradients[parameter] = gradient

    def _rule(self, layer: nn.Module, x: Tensor, dy: Tensor) -> dict[nn.Parameter, Tensor]:
        trained = {name: p for name, p in layer.named_parameters(recurse=False) if any(p is q for q in self.parameters)}
        if isinstance(layer, BoraAdapter):
            gradients = adapter_sample_gradients(layer, x, dy, frozenset(trained))
            return {trained[name]: gradient for name, gradient in gradients.items()}
        with _requiring_gradients(trained.values()):
            dtype = next(iter(trained.values())).dtype
            x = x.to(dtype) if x.is_floating_point() else x
            found: dict[nn.Parameter, Tensor] = GradSampleModule.GRAD_SAMPLERS[type(layer)](layer, [x], dy.to(dtype))
        return found


def _trained_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train privately")
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__} in training mode, which mixes the samples of a batch; put "
                "it in evaluation mode or use a GroupNorm"
            )
        trained = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
        if not trained:
            continue
        if type(layer) is not BoraAdapter and type(layer) not in GradSampleModule.GRAD_SAMPLERS:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__}, which has no rule for per-sample gradients; freeze it, "
                "or register one with opacus.grad_sample.register_grad_sampler"
            )
        yield name, layer


@contextmanager
def _requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    # Opacus' rules compute what requires a gradient.
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
