"""The server's side of a strategy: pure functions from a state and the round's updates to the next state."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bora_fl.blocks import BlockFactors, normalize_sigma
from bora_fl.config import AdapterSettings, ConfigError, Settings, StrategySettings
from bora_fl.seeds import derive
from bora_fl.state import ALL, PARTS, AdapterState, ClientUpdate
from bora_fl.strategies.catalogue import find
from bora_fl.strategies.layer_merge import LayerMerge, LayerRound, Trains
from bora_fl.strategies.layers import each_layer
from bora_fl.strategies.merge_report import measured, squares
from bora_fl.strategies.merge_report import report as summed
from bora_fl.strategies.presets import PRESETS, Preset
from bora_fl.strategies.robust import COORDINATE_RULES, RULES, WHOLE_RULES, RobustRound
from bora_fl.strategies.server_optimizers import server_step
from bora_fl.strategies.server_state import ServerState
from bora_fl.wire.codecs import Codec

logger = logging.getLogger(__name__)

BLOCK_METHODS = frozenset({"bora", "lora"})


@dataclass(frozen=True)
class Aggregator:
    """A preset with its settings: what trains, what is shared, how it is merged.

    Attributes:
        preset: The row of the table.
        settings: The strategy's settings.
        adapter: The adapter's settings; methods other than BoRA and LoRA have no block factors.
        seed: The run's seed.
    """

    preset: Preset
    settings: StrategySettings
    adapter: AdapterSettings
    seed: int

    @property
    def linear(self) -> bool:
        """Whether the result depends on the updates through their weighted mean alone, as secure aggregation needs."""
        s = self.settings
        unscreened = s.max_update_norm == 0 and s.min_cosine == -1 and s.max_loss_increase == 0
        return self.preset.linear and s.robust == "none" and unscreened

    def trains(self, round: int) -> Trains:
        """The parts that clients train in a round, of A, sigma, B and tensors; rounds count from 1."""
        schedule = self.preset.schedule
        if len(schedule) > 1 and self.adapter.blocks == 1:  # its Sigma is a scale that B holds as well
            schedule = tuple(parts for parts in schedule if "sigma" not in parts)
        return schedule[(round - 1) % len(schedule)]

    def shares(self) -> Trains:
        """The parts that may leave a client; a reply holds those of them that were trained."""
        return self.preset.shares

    @property
    def gram(self) -> Literal["", "blocks", "diagonal"]:
        """What of the Gram matrices of their layers' inputs clients send; empty for nothing."""
        return self.settings.gram if self.preset.gram else ""

    def keeps(self, round: int, *, secure: bool = False) -> Trains:
        """The parts that clients keep of what a round sends, since the next message may leave out what did not change.

        They are those that no client moves; where updates are sparse, all of them, since few entries change then.

        Args:
            round: From 1.
            secure: Whether updates are masked, and so sent and received in full.
        """
        if self.preset.sparse and self.settings.upload_fraction < 1 and not secure:
            return ALL
        return ALL - (self.trains(round) & self.preset.shares)

    def refuses(self, update: ClientUpdate, state: ServerState) -> str:
        """Why this update cannot be merged, in words; empty if it can."""
        for name, current in state.current.layers.items():
            rank = update.state.rank(name)
            if self.preset.same_rank and rank != current.rank:
                return f"layer {name} has rank {rank}, the adapter {current.rank}: {self.preset.same_rank}"
            if self.settings.robust in COORDINATE_RULES and rank != current.rank:
                return (
                    f"layer {name} has rank {rank}, the adapter {current.rank}: strategy.robust = "
                    f"{self.settings.robust!r} compares entries; use krum, multi-krum or norm-clip"
                )
        return ""

    def prepare(self, state: ServerState, round: int) -> ServerState:
        """Ready the state for a round, without changing the model that clients start from.

        Args:
            state: The state after the previous round; preparing it twice is preparing it once.
            round: The round to come, from 1.

        Returns:
            The state whose `current` (and `fold`, if there is one) clients receive.
        """
        rule = self.preset.prepare
        if rule is None or not state.current.layers:
            return state
        trains = self.trains(round)
        merges = {
            name: rule(self._layer_round(name, factors, state, round, trains))
            for name, factors in state.current.layers.items()
        }
        layers = {name: layer.current for name, layer in merges.items()}
        current = self._normalized(AdapterState(layers, state.current.tensors), trains)
        fold = {name: layer.fold for name, layer in merges.items() if layer.fold is not None}
        if not fold:
            return replace(state, current=current)
        return replace(state, current=current, fold=fold, fold_version=state.fold_version + 1)

    def aggregate(
        self, state: ServerState, updates: Sequence[ClientUpdate], round: int
    ) -> tuple[ServerState, dict[str, float]]:
        """Merge a round.

        Args:
            state: The prepared state that the clients trained on.
            updates: Their checked updates, in any order.
            round: From 1.

        Returns:
            The next state, and a report: `clients` merged, `set_aside` (those rejected), `update_norm` (of the mean
            product's change), `merge_error` (of adapter plus base delta plus carry-over against the mean product,
            relative), `rank` (mean over layers), `fold_norm` (of the base delta), `carried_norm`. Without a usable
            update the state stays as it is.
        """
        trains = self.trains(round)
        usable = []
        for update in sorted(updates, key=lambda update: update.client):
            if reason := self.refuses(update, state):
                logger.warning("client %s is rejected: %s", update.client, reason)
            else:
                usable.append(update)
        chosen = self._robust(usable, state, trains) if usable else []
        combined = len(usable) if self.settings.robust in COORDINATE_RULES else len(chosen)
        report = {"clients": float(combined), "set_aside": float(len(updates) - combined)}
        if not chosen:
            return state, report
        total = math.fsum(update.weight for update in chosen)
        weights = [update.weight / total for update in chosen]
        reported = "B" in self.preset.shares or "sigma" in self.preset.shares
        layers = list(state.current.layers)
        reporting = set(measured(layers)) if reported else set()

        def work(name: str) -> tuple[LayerMerge, dict[str, float]]:
            layer = replace(
                self._layer_round(name, state.current.layers[name], state, round, trains),
                updates=[update.state.layers[name] for update in chosen],
                weights=weights,
                grams=[u.grams[name] for u in chosen] if all(name in u.grams for u in chosen) else [],
                carried=state.carried.get(name),
                velocity=state.velocity.get(name),
            )
            result = self._merged(layer)
            return result, squares(layer, result) if name in reporting else {}

        found = each_layer(work, layers, self._layer_bytes(state, chosen), self._memory_bytes)
        merges = {name: result for name, (result, _) in found.items()}
        current = AdapterState(
            {name: layer.current for name, layer in merges.items()},
            _mean_tensors(state.current.tensors, chosen, weights),
        )
        if reported:
            report |= summed(
                [norms for _, norms in found.values() if norms], [layer.current.rank for layer in merges.values()]
            )
        optimizer = state.optimizer
        if self.settings.server_optimizer != "none":
            shared = trains & self.preset.shares
            transform = self.adapter.transform
            current, optimizer = server_step(current, state.current, optimizer, self.settings, transform, shared)
            current = self._normalized(current, trains)
        fold = {name: layer.fold for name, layer in merges.items() if layer.fold is not None}
        carried = {name: layer.carried for name, layer in merges.items() if layer.carried is not None}
        version = state.fold_version + bool(fold)
        velocity = {name: layer.velocity for name, layer in merges.items() if layer.velocity is not None}
        after = replace(
            state,
            current=current,
            carried=carried,
            velocity=velocity,
            fold=fold,
            fold_version=version,
            optimizer=optimizer,
        )
        return after, report

    @property
    def _memory_bytes(self) -> int:
        return self.settings.memory_mb * 1_000_000

    def _memory(self) -> str:
        """What of the replies is in memory at once, in words."""
        if self.settings.robust in WHOLE_RULES:
            return f"all replies at once, since {self.settings.robust} makes new updates of them"
        return f"{self.settings.memory_mb} MB of replies, the others in a file, merged layer by layer"

    @staticmethod
    def _layer_bytes(state: ServerState, updates: Sequence[ClientUpdate]) -> int:
        """Bytes of the updates of the largest layer, at the adapter's rank, in float32."""
        layers = state.current.layers.values()
        return 4 * len(updates) * max((sum(getattr(f, part).numel() for part in PARTS) for f in layers), default=0)

    def summary(self) -> str:
        """The composition in words, with what it cannot take and why."""
        row, settings = self.preset, self.settings
        schedule = [" + ".join(sorted(self.trains(i + 1))) for i in range(len(row.schedule))]
        lines = [
            f"strategy {row.name}: {row.summary}",
            f"  source: {row.source}",
            f"  merge: {row.equation}",
            f"  here: {row.differs}",
            f"  trains: {', then '.join(dict.fromkeys(schedule))}; shares: {' + '.join(sorted(row.shares))}",
            f"  blocks: {row.blocks}",
            f"  clients of different ranks: {'no, ' + row.same_rank if row.same_rank else 'yes'}",
            "  slow or lost clients: a round merges the replies that came in time"
            + (
                "; the model a late client trained on may lack base deltas, which it is sent with the next round"
                if row.folds
                else ""
            ),
            f"  memory: {self._memory()}",
            f"  secure aggregation: {'possible' if self.linear else 'no, the server must see every update'}",
        ]
        if row.fits:
            rank = "" if settings.residual == "drop" else f", at most rank {settings.residual_rank}"
            lines.append(f"  residual: {settings.residual}{rank}")
            if settings.product_step != 1 or settings.product_momentum:
                lines.append(f"  product: step {settings.product_step:g}, momentum {settings.product_momentum:g}")
        if settings.robust != "none":
            lines.append(f"  robust rule: {settings.robust}, {settings.byzantine} clients assumed bad")
            if settings.robust in {"krum", "multi-krum"}:
                need = 2 * settings.byzantine + 3
                lines.append(
                    f"    its guarantee needs at least {need} replies a round; with fewer it still ranks, unproved"
                )
            if settings.robust in COORDINATE_RULES:
                lines.append("    needs clients of one rank; the result stands for all of them as one update")
        if settings.server_optimizer != "none":
            lines.append(f"  server optimizer: {settings.server_optimizer}, step {settings.server_learning_rate:g}")
        return "\n".join(lines)

    def _merged(self, layer: LayerRound) -> LayerMerge:
        """The rule's result with its Sigma normalized, and then what becomes of what it does not hold."""
        merged = self.preset.merge(layer)
        current = normalize_sigma(merged.current, self.adapter.transform, self._kept(layer.trains))
        return self.preset.rest(layer, current) if self.preset.rest else merged._replace(current=current)

    def _normalized(self, state: AdapterState, trains: Trains) -> AdapterState:
        kept = self._kept(trains)
        layers = {name: normalize_sigma(f, self.adapter.transform, kept) for name, f in state.layers.items()}
        return AdapterState(layers, state.tensors)

    @staticmethod
    def _kept(trains: Trains) -> Literal["A", "B"]:
        """The factor that normalizing leaves alone: B where it is the frozen one, whose form may matter."""
        return "B" if "A" in trains and "B" not in trains else "A"

    def _layer_round(
        self, name: str, factors: BlockFactors, state: ServerState, round: int, trains: Trains
    ) -> LayerRound:
        return LayerRound(
            factors,
            state.rank(name),
            trains,
            sigma_transform=self.adapter.transform,
            settings=self.settings,
            seed=derive(self.seed, f"strategy/{name}", round),
        )

    def _robust(self, updates: list[ClientUpdate], state: ServerState, trains: Trains) -> list[ClientUpdate]:
        if self.settings.robust == "none":
            return updates
        return RULES[self.settings.robust](
            RobustRound(
                updates, state.current, self.settings.byzantine, trains, self.preset.shares, self.adapter.transform
            )
        )


def build(settings: Settings) -> Aggregator:
    """The aggregator that a run's settings describe.

    Raises:
        ConfigError: For an unknown name, with near misses, or a combination that cannot be; names key, value and
            remedy.
    """
    strategy, method = settings.strategy, settings.adapter.method
    row = find(strategy.name)
    generic = method not in BLOCK_METHODS
    refusals = (
        (generic and row.no_generic, f"adapter.method = {method!r}", row.no_generic + "; use fedavg or cellm"),
        (method == "lora" and row.no_lora, "adapter.method = 'lora'", row.no_lora),
        (
            row.gram and settings.privacy.mode != "none",
            f"privacy.mode = {settings.privacy.mode!r}",
            "clients send Gram matrices of their inputs, which no noise protects; use refactor",
        ),
        (
            settings.model.quantization != "none" and row.folds,
            f"model.quantization = {settings.model.quantization!r}",
            "what it adds to the frozen weights would be rounded away; set model.quantization to none, or "
            "strategy.name to refactor",
        ),
        (
            settings.model.quantization != "none" and strategy.residual == "fold",
            f"model.quantization = {settings.model.quantization!r}, strategy.residual = 'fold'",
            "what is added to a quantized weight is rounded away; set model.quantization to none, or "
            "strategy.residual to carry or drop",
        ),
        (
            strategy.residual != "drop" and not row.fits,
            f"strategy.residual = {strategy.residual!r}",
            "it leaves no residual to keep; set strategy.residual to drop, or strategy.name to refactor",
        ),
        (
            not row.fits and (strategy.product_step != 1 or strategy.product_momentum > 0),
            f"strategy.product-step = {strategy.product_step:g}, product-momentum = {strategy.product_momentum:g}",
            "it makes no product of the adapter's rank; set them to 1 and 0, or strategy.name to refactor",
        ),
        (
            strategy.product_momentum > 0 and strategy.residual_rank == 0,
            "strategy.residual-rank = 0",
            f"product-momentum = {strategy.product_momentum:g} is kept at that rank; set it to 1 or more",
        ),
        (
            strategy.server_optimizer != "none" and row.no_server_optimizer,
            f"strategy.server-optimizer = {strategy.server_optimizer!r}",
            row.no_server_optimizer + "; set it to none",
        ),
        (
            strategy.server_optimizer in {"adam", "yogi"} and strategy.server_learning_rate >= 1,
            f"strategy.server-learning-rate = {strategy.server_learning_rate:g} with {strategy.server_optimizer}",
            "an adaptive step moves every entry by about that much a round, and entries are far below 1; try 0.01",
        ),
        (
            row.sparse and settings.wire.codec != "float32",
            f"wire.codec = {settings.wire.codec!r}",
            "it sends changed entries as they are; set wire.codec to float32, or use fedavg with topk",
        ),
    )
    Codec.parse(settings.wire.codec)
    for refused, key, why in refusals:
        if refused:
            raise ConfigError(f"{key} with strategy.name = {strategy.name!r}: {why}")
    found = Aggregator(row, strategy, settings.adapter, settings.run.seed)
    if settings.privacy.secure_aggregation and not found.linear:
        raise ConfigError(f"privacy.secure-aggregation = true with {_needs_every_update(found)}")
    return found


def _needs_every_update(aggregator: Aggregator) -> str:
    """Which setting is it that a mean of the updates is not enough for, why, and the remedy."""
    settings = aggregator.settings
    if not aggregator.preset.linear:
        able = ", ".join(name for name, row in PRESETS.items() if row.linear)
        return (
            f"strategy.name = {settings.name!r}: what it merges is no function of the updates' mean, and nothing else "
            f"is unmasked; use one of {able}"
        )
    if settings.robust != "none":
        return f"strategy.robust = {settings.robust!r}: it compares the updates with each other; set it to none"
    return (
        f"strategy.max-update-norm = {settings.max_update_norm:g}, strategy.min-cosine = {settings.min_cosine:g}, "
        f"strategy.max-loss-increase = {settings.max_loss_increase:g}: screening looks at every update; set them to 0, "
        "-1 and 0"
    )


def _mean_tensors(
    current: Mapping[str, Tensor], updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Weighted means in float64; whole numbers are rounded."""
    means = {}
    for name, tensor in current.items():
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for update, weight in zip(updates, weights, strict=True):
            total += weight * update.state.tensors[name].double()
        means[name] = (total if tensor.is_floating_point() else total.round()).to(tensor.dtype)
    return means
