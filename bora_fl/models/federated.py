"""A base model with its adapter, in the federation's terms: read and write what is trained."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bora_fl.blocks import BlockFactors
from bora_fl.config import AdapterSettings, ConfigError, ModelSettings
from bora_fl.models.adapting import CORE_STRUCTURES, adapted
from bora_fl.state import AdapterState


class FederatedModel:
    """A base model with its adapter, in the federation's terms; a model that has its adapter already keeps it.

    Attributes:
        model: The PEFT model (or the base model itself, for full fine-tuning).
        rank: The adapter's rank, which may be smaller than the federation's.
    """

    def __init__(
        self, base: Any, adapter: AdapterSettings, model: ModelSettings, seed: int, *, keep_head: bool = False
    ) -> None:
        self.adapter, self.task, self.has_head, self.rank = adapter, model.task, model.kind.head, adapter.rank
        if adapter.method == "full" or hasattr(base, "peft_config"):
            self.model: Any = base
        else:
            self.model = adapted(base, adapter, model, seed)
        self.forward: Any = self.model  # what a training step calls
        # The module tree is walked here and never again: read and write are called for every client and round.
        modules = {_plain(name): m for name, m in self.model.named_modules()}
        self._layers: dict[str, Any] = {name: m for name, m in modules.items() if hasattr(m, "get_base_layer")}
        self._factors = self._factor_parameters()
        inside = {id(p) for parts in self._factors.values() for p in parts.values()}
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in inside}
        self._frozen: set[str] = set()
        if model.kind.head and not adapter.train_head and adapter.method != "full":
            for name in [n for n in trained if "modules_to_save" in n]:
                trained[name].requires_grad_(False)
                if keep_head:
                    self._frozen.add(_plain(name))
                else:
                    del trained[name]
        self._tensors: dict[str, nn.Parameter] = {_plain(name): p for name, p in trained.items()}
        # Cores travel with their scales in them: the mean of both apart would not be that of the products.
        names = [n for n in self._tensors if adapter.method in CORE_STRUCTURES and n.endswith(".ravan_cores.scales")]
        self._scales = {f"{n.removesuffix('scales')}H": self._tensors.pop(n) for n in names}
        self._head = {_plain(name) for name in trained if self._in_head(name)}
        self.num_trained = sum(p.numel() for p in self.trained_parameters())

    def _in_head(self, name: str) -> bool:
        """Whether a parameter sits outside the base model proper: PEFT copies such modules, full training does not."""
        body = getattr(self.model, "base_model_prefix", "")
        return "modules_to_save" in name or (self.adapter.method == "full" and not name.startswith(f"{body}."))

    def _factor_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        found: dict[str, dict[str, nn.Parameter]] = {}
        if self.adapter.method == "bora":
            for name, module in self._layers.items():
                if "default" in getattr(module, "bora_adapter", {}):
                    adapter = module.bora_adapter["default"]
                    found[name] = {"A": adapter.A, "sigma": adapter.sigma, "B": adapter.B}
        elif self.adapter.method in {"lora", "dora"}:
            for name, module in self._layers.items():
                if "default" in getattr(module, "lora_A", {}):
                    found[name] = {"A": module.lora_A["default"].weight, "B": module.lora_B["default"].weight}
        return found

    def read(self) -> AdapterState:
        """The trained state, detached copies on the CPU in float32."""
        tensors = {name: p.detach().float().cpu().clone() for name, p in self._tensors.items()}
        for name, scales in self._scales.items():
            tensors[name] *= scales.detach().float().cpu()[..., None, None]
        return AdapterState(self._read_layers(), tensors)

    def _read_layers(self) -> dict[str, BlockFactors]:
        if self.adapter.method == "bora":
            from bora_fl.adapters.state import read_layers

            found = read_layers({name: self._layers[name] for name in self._factors})
            return {name: factors.to(torch.float32, "cpu") for name, factors in found.items()}
        layers = {}
        for name, parts in self._factors.items():
            A, B = (parts[key].detach().float().cpu().clone() for key in ("A", "B"))
            layers[name] = BlockFactors(B, torch.ones(1, 1, A.shape[0]), A, self._scaling())
        return layers

    def _scaling(self) -> float:
        return self.adapter.alpha / (self.rank**0.5 if self.adapter.rslora else self.rank)

    def write(self, state: AdapterState) -> None:
        """Put a state into the model, in place.

        Raises:
            ValueError: If its layers or tensors are not this model's.
        """
        if set(state.layers) != set(self._factors) or set(state.tensors) != set(self._tensors):
            odd = sorted((set(state.layers) ^ set(self._factors)) | (set(state.tensors) ^ set(self._tensors)))
            raise ValueError(f"the state does not fit the model: {odd[:3]} are on one side only")
        with torch.no_grad():
            for name, parameter in self._tensors.items():
                parameter.copy_(state.tensors[name])
            for scales in self._scales.values():
                scales.fill_(1.0)
        if self.adapter.method == "bora":
            from bora_fl.adapters.state import write_layers

            write_layers({name: self._layers[name] for name in self._factors}, state.layers)
            return
        with torch.no_grad():
            for name, parts in self._factors.items():
                factors = state.layers[name]
                parts["A"].copy_(factors.A)
                parts["B"].copy_(factors.B * factors.sigma[0, 0] * (factors.scaling / self._scaling()))

    def checkpoint_activations(self) -> None:
        """Let layers compute their activations again in the backward pass instead of keeping them."""
        enable = getattr(self.model, "activation_checkpointing_enable", None)  # the other name is deprecated
        (enable or self.model.gradient_checkpointing_enable)()
        self.model.enable_input_require_grads()

    def compile(self, backend: str = "inductor") -> None:
        """Let `forward` run through torch.compile; evaluation goes on with the model as it is.

        Raises:
            ConfigError: If there is no C++ compiler, which torch's own compiler calls.
        """
        compilers = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
        if backend == "inductor" and not any(shutil.which(name) for name in compilers if name):
            raise ConfigError(
                "train.compile = true: torch.compile needs a C++ compiler, and none of $CXX, g++, clang++ and c++ is "
                "there; install one, or set train.compile to false"
            )
        self.forward = torch.compile(self.model, backend=backend)

    def train_only(self, trains: frozenset[str]) -> None:
        """Let gradients flow to the named parts (of A, sigma, B, tensors) and to no other."""
        for parts in self._factors.values():
            for part, parameter in parts.items():
                parameter.requires_grad_(part in trains)
        for name, parameter in self._tensors.items():
            parameter.requires_grad_("tensors" in trains and name not in self._frozen)
        for scales in self._scales.values():
            scales.requires_grad_("tensors" in trains)

    @contextmanager
    def quick_step(self) -> Iterator[None]:
        """A context for one forward and backward pass, in which layers share what they can compute together."""
        if self.adapter.method != "bora":
            yield
            return
        from bora_fl.adapters.sigma_batch import sigmas_at_once

        with sigmas_at_once(self._layers[name].bora_adapter["default"] for name in self._factors):
            yield

    def adapted_layers(self) -> dict[str, nn.Module]:
        """The layers with block factors, by the names that they have in the state."""
        return {name: self._layers[name] for name in self._factors}

    def layer_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Rows, columns and blocks of the layers with block factors, by name."""
        return {n: (len(parts["B"]), parts["A"].shape[1], self.adapter.blocks) for n, parts in self._factors.items()}

    def factor_parameters(self, parts: frozenset[str] = frozenset({"A", "sigma", "B"})) -> list[nn.Parameter]:
        """The adapter's factors of these parts that train now, layer by layer."""
        factors = [item for layer in self._factors.values() for item in layer.items()]
        return [p for part, p in factors if part in parts and p.requires_grad]

    def other_parameters(self) -> list[nn.Parameter]:
        """The other tensors of the adapter, or of the model, that train now."""
        body = [p for name, p in self._tensors.items() if name not in self._head]
        return [p for p in [*body, *self._scales.values()] if p.requires_grad]

    def all_trained_parameters(self) -> list[nn.Parameter]:
        """All that trains in any round."""
        factors = [p for parts in self._factors.values() for p in parts.values()]
        return [*factors, *self._tensors.values(), *self._scales.values()]

    def head_parameters(self) -> list[nn.Parameter]:
        """The head's parameters that train now."""
        return [p for name, p in self._tensors.items() if p.requires_grad and name in self._head]

    @property
    def num_classes(self) -> int:
        """Logits of the head: classes, or 1 for a number."""
        return int(self.model.config.num_labels)

    def head_layer(self) -> tuple[str, str | None] | None:
        """Names, in the state's ``tensors``, of weight and bias of the linear layer that makes the logits.

        Returns:
            The bias is None if the layer has none; None if the head is not part of the state, or there is no such head.
        """
        if not self.has_head:
            return None
        classes = self.num_classes
        rows = [n for n, p in self._tensors.items() if n in self._head and p.dim() == 2 and len(p) == classes]
        if not rows:
            return None
        bias = f"{rows[-1].removesuffix('weight')}bias"
        return rows[-1], bias if bias in self._tensors else None

    def trained_parameters(self) -> list[nn.Parameter]:
        """All that trains now."""
        return self.factor_parameters() + self.other_parameters() + self.head_parameters()

    def named_trained(self) -> dict[str, nn.Parameter]:
        """All that trains now, as ``layers/<layer>/<part>`` and ``tensors/<name>``."""
        found = {f"layers/{layer}/{part}": p for layer, parts in self._factors.items() for part, p in parts.items()}
        found |= {f"tensors/{name}": p for name, p in (self._tensors | self._scales).items()}
        return {name: p for name, p in found.items() if p.requires_grad}

    def save(self, folder: Path, folds: list[dict[str, Tensor]]) -> None:
        """Write the adapter as PEFT does, and beside it ``folds.safetensors``: what was merged into the frozen weights.

        Args:
            folder: Made if it is missing.
            folds: Every fold of the run, in order, flattened.
        """
        options = {} if self.adapter.method == "full" else {"save_embedding_layers": False}
        self.model.save_pretrained(str(folder), **options)
        if folds:
            flat = {f"{version}/{name}": t for version, fold in enumerate(folds, 1) for name, t in fold.items()}
            save_file(flat, folder / "folds.safetensors")

    def add_to_base(self, layers: Mapping[str, BlockFactors | Tensor]) -> None:
        """Add each layer's delta_W, as factors or dense, to its frozen weight, one layer at a time.

        Raises:
            ConfigError: If a frozen weight cannot be written, as under some quantizations.
        """
        from bora_fl.adapters.base_weight import add_to_base

        for name, delta in layers.items():
            if isinstance(delta, BlockFactors):
                delta = delta.to(torch.promote_types(delta.B.dtype, torch.float32)).dense()
            try:
                add_to_base(self._layers[name], delta)
            except TypeError as error:
                raise ConfigError(
                    f"the strategy changes the frozen weights, and in layer {name!r} {error}; or choose a strategy.name"
                    " and strategy.residual that leave them alone"
                ) from error

    def save_base(self, layer: str) -> Tensor | nn.Module:
        """A copy of the frozen weight under an adapted layer, for `restore_base`."""
        from bora_fl.adapters.base_weight import save_base

        return save_base(self._layers[layer])

    def restore_base(self, saved: Mapping[str, Tensor | nn.Module]) -> None:
        """Put frozen weights back, by layer, as `save_base` returned them."""
        from bora_fl.adapters.base_weight import restore_base

        for name, base in saved.items():
            restore_base(self._layers[name], base)


def _plain(name: str) -> str:
    """A parameter's or module's name without PEFT's wrappers and adapter name."""
    name = name.removeprefix("base_model.model.")
    return ".".join(part for part in name.split(".") if part not in {"default", "modules_to_save"})
