"""The settings of a run: every group, and what must hold across groups."""

import math
import re
from typing import Self

from pydantic import model_validator

from bora_fl.config.groups import (
    AdapterSettings,
    DataSettings,
    Group,
    HeadSettings,
    ModelSettings,
    PrivacySettings,
    RunSettings,
    Scalar,
    StrategySettings,
    TrainSettings,
    WireSettings,
)
from bora_fl.config.tasks import MOST_NUMBER


class Settings(Group):
    """Every run-config key, in groups."""

    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    head: HeadSettings = HeadSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    strategy: StrategySettings = StrategySettings()
    wire: WireSettings = WireSettings()
    privacy: PrivacySettings = PrivacySettings()
    run: RunSettings = RunSettings()

    @property
    def solves_head(self) -> bool:
        """Whether the classification head is solved before round 1."""
        return self.head.init != "random" and not self._unsolvable()

    def _unsolvable(self) -> str:
        """Why there is no closed-form head, as the setting at fault and the reason; empty if there is one."""
        if not self.model.kind.head:
            return f"model.task = {self.model.task!r}: it has no head of its own"
        if self.privacy.mode == "record" and self.model.kind.number and not self.head.number_range:
            return "privacy.mode = 'record', head.number-range = '': nothing bounds what one number adds to the sums"
        if self.privacy.mode == "record" and self.model.task not in ("classification", "regression"):
            return (
                f"privacy.mode = 'record', model.task = {self.model.task!r}: an example adds to the sums as often as "
                "it has labels, which the noise for one would not hide"
            )
        if self.privacy.mode in ("client", "local"):
            return (
                f"privacy.mode = {self.privacy.mode!r}: a client's sums as a whole cannot be hidden at a useful noise; "
                "record hides every example in them"
            )
        return ""

    @property
    def number_range(self) -> tuple[float, float] | None:
        """Low and high of the numbers that are clipped where they must be bounded; None where they are not known."""
        if not self.head.number_range:
            return None
        try:
            low, high = map(float, self.head.number_range.split(","))
        except ValueError:
            low, high = math.nan, math.nan
        largest = max(abs(low), abs(high))
        if not (largest <= MOST_NUMBER and high - low > 1e-6 * largest):
            raise ValueError(
                f"head.number-range = {self.head.number_range!r}: is no pair low,high of numbers that float32 "
                "tells apart, such as -4,4; correct it, or leave it empty"
            )
        return low, high

    @model_validator(mode="after")
    def _check_across_groups(self) -> Self:
        if self.number_range and not self.model.kind.number:
            raise ValueError(
                f"head.number-range = {self.head.number_range!r} with model.task = {self.model.task!r}: classes and "
                "tokens have no range; leave head.number-range empty"
            )
        if self.head.init == "closed-form" and (reason := self._unsolvable()):
            raise ValueError(f"head.init = 'closed-form' with {reason}; set head.init to auto or random")
        if self.run.num_rounds == 0 and not self.solves_head:
            raise ValueError("run.num-rounds = 0: without a head to solve, nothing would be learned; set 1 or more")
        if self.model.pooling != "auto" and not self.model.kind.pooled:
            raise ValueError(
                f"model.pooling = {self.model.pooling!r} with model.task = {self.model.task!r}: only a head on "
                "whole texts reads a pooled one; set model.pooling to auto"
            )
        if self.data.packing and (self.model.task != "causal-lm" or self.privacy.mode == "record"):
            at = f"model.task = '{self.model.task}'" if self.privacy.mode != "record" else "privacy.mode = 'record'"
            raise ValueError(
                f"data.packing = true with {at}: only a language model's rows can be packed, and under record-level "
                "privacy a row is one record; set data.packing to false"
            )
        if self.run.patience or self.run.restart_margin:
            self._check_held_out_losses()
        if self.run.generate_every and (self.model.task != "causal-lm" or not self.data.test_split):
            lacking = f"data.test-split = {self.data.test_split!r}"
            lacking = lacking if self.model.task == "causal-lm" else f"model.task = {self.model.task!r}"
            raise ValueError(
                f"run.generate-every = {self.run.generate_every} with {lacking}: a language model generates for "
                "prompts of the central test set; set run.generate-every to 0"
            )
        if self.data.general_text and self.model.task != "causal-lm":
            raise ValueError(
                f"data.general-text = {self.data.general_text!r} with model.task = {self.model.task!r}: its loss is a "
                "language model's; leave data.general-text empty"
            )
        try:
            re.compile(self.run.generate_format)
        except re.error as error:
            raise ValueError(
                f"run.generate-format = {self.run.generate_format!r}: is no regular expression ({error}); correct it, "
                "or use json"
            ) from error
        if self.privacy.mode == "record" and self.adapter.dropout > 0:
            raise ValueError(
                f"adapter.dropout = {self.adapter.dropout} with privacy.mode = 'record': per-sample gradients are "
                "taken without dropout; set adapter.dropout to 0"
            )
        if self.train.prefix_cache_mb and self.train.compile:
            raise ValueError(
                f"train.prefix-cache-mb = {self.train.prefix_cache_mb} with train.compile = true: a compiled step runs "
                "every layer; set train.prefix-cache-mb to 0, or train.compile to false"
            )
        if self.privacy.mode == "record" and self.train.compile:
            raise ValueError(
                "train.compile = true with privacy.mode = 'record': gradients of single examples are taken by hooks, "
                "which a compiled model does not call; set train.compile to false"
            )
        if self.privacy.mode == "record" and self.train.label_prior not in (0.0, TrainSettings().label_prior):
            raise ValueError(
                f"train.label-prior = {self.train.label_prior:g} with privacy.mode = 'record': a client's class shares "
                "would be in its loss without noise, so there is no label prior; set train.label-prior to 0"
            )
        if self.train.distillation and not self.solves_head:
            raise ValueError(
                f"train.distillation = {self.train.distillation:g} without a solved head (model.task = "
                f"{self.model.task!r}, head.init = {self.head.init!r}): there are no predictions worth holding before "
                "training; set train.distillation to 0"
            )
        for key, value in (
            ("label-prior", self.train.label_prior),
            ("distillation", self.train.distillation),
            ("not-true-distillation", self.train.not_true_distillation),
        ):
            if value and self.model.task != "classification":
                raise ValueError(
                    f"train.{key} = {value:g} with model.task = {self.model.task!r}: it goes by one class of each "
                    f"text; set train.{key} to 0"
                )
        if self.train.optimizer_state == "kept" and (self.train.optimizer, self.privacy.mode) != ("adamw", "none"):
            raise ValueError(
                f"train.optimizer-state = 'kept' with train.optimizer = {self.train.optimizer!r}, privacy.mode = "
                f"{self.privacy.mode!r}: only adamw's moments are kept, and only without privacy; set "
                "train.optimizer-state to fresh"
            )
        self._check_precision()
        ignored = {
            "proximal-mu": (self.train.proximal_mu, {0.0}),
            "max-grad-norm": (self.train.max_grad_norm, {0.0, 1.0}),
            "distillation": (self.train.distillation, {0.0}),
            "not-true-distillation": (self.train.not_true_distillation, {0.0}),
        }
        for key, (value, harmless) in ignored.items():
            if self.privacy.mode == "record" and value not in harmless:
                raise ValueError(
                    f"train.{key} = {value:g} with privacy.mode = 'record': DP-SGD clips every example's gradient to "
                    f"privacy.clip-norm and takes its steps without it; set train.{key} to {max(harmless):g}"
                )
        if self.privacy.mode in ("client", "local") and self.privacy.delta * self.data.num_partitions >= 1:
            raise ValueError(
                f"privacy.delta = {self.privacy.delta:g} with data.num-partitions = {self.data.num_partitions}: "
                "publishing one client's update in full would be within it; use a privacy.delta well below "
                f"{1 / self.data.num_partitions:g}"
            )
        if self.privacy.adaptive_clipping and self.privacy.mode != "client":
            raise ValueError(
                f"privacy.adaptive-clipping = true with privacy.mode = '{self.privacy.mode}': only the server's "
                "clipping adapts; set it to false, or privacy.mode to client"
            )
        if self.privacy.mode == "client":
            self._check_client_privacy()
        if 0 < self.privacy.quantization_bits < 8:
            raise ValueError(
                f"privacy.quantization-bits = {self.privacy.quantization_bits}: an entry needs 8 to 30; set 0 to have "
                "as many as there is room for"
            )
        if self.privacy.mode in ("record", "local") and self.strategy.weighting != "uniform":
            raise ValueError(
                f"strategy.weighting = 'examples' with privacy.mode = '{self.privacy.mode}': the server would learn "
                "how many examples each client has, which no noise covers; set strategy.weighting to uniform"
            )
        if self.privacy.mode in ("record", "local") and self.strategy.fraction_evaluate > 0:
            raise ValueError(
                f"strategy.fraction-evaluate = {self.strategy.fraction_evaluate} with privacy.mode = "
                f"'{self.privacy.mode}': clients would report accuracies without noise; set strategy.fraction-evaluate "
                "to 0"
            )
        if self.strategy.max_loss_increase > 0 and not self.data.test_split:
            raise ValueError(
                f"strategy.max-loss-increase = {self.strategy.max_loss_increase} with data.test-split = '': the server "
                "has no examples to measure a loss on; set data.test-split, or strategy.max-loss-increase to 0"
            )
        if self.privacy.secure_aggregation and self.wire.codec != "float32":
            raise ValueError(
                f"wire.codec = {self.wire.codec!r} with privacy.secure-aggregation = true: masked updates are "
                "summed entry by entry, and a codec would leave entries out or scale each client's in its own way; set "
                "wire.codec to float32"
            )
        if self.privacy.secure_aggregation and self.privacy.mode == "client":
            raise ValueError(
                "privacy.secure-aggregation = true with privacy.mode = 'client': the server cannot clip updates that "
                "it does not see; set privacy.mode to record or local"
            )
        if self.privacy.secure_aggregation and self.strategy.fraction_evaluate > 0:
            raise ValueError(
                f"strategy.fraction-evaluate = {self.strategy.fraction_evaluate} with privacy.secure-aggregation = "
                "true: clients would report accuracies one by one; set strategy.fraction-evaluate to 0"
            )
        if self.strategy.residual != "drop" and self.strategy.residual_rank == 0:
            raise ValueError(
                f"strategy.residual-rank = 0 with strategy.residual = '{self.strategy.residual}': nothing would be "
                "kept; set a rank of 1 or more, or strategy.residual to drop"
            )
        return self

    def _check_precision(self) -> None:
        """What a low precision of weights or gradients cannot be had together with."""
        model, fp16 = self.model, self.train.precision == "fp16"
        if fp16 and self.privacy.mode == "record":
            raise ValueError(
                "train.precision = 'fp16' with privacy.mode = 'record': single examples' gradients are clipped, and a "
                "scaled loss is not for them; set train.precision to bf16 or fp32"
            )
        whole = self.adapter.method == "full" or bool(self.adapter.modules_to_save)
        whole = whole or (model.kind.head and self.adapter.train_head)
        if fp16 and model.dtype == "float16" and whole:
            raise ValueError(
                "train.precision = 'fp16' with model.dtype = 'float16': modules that are trained whole would have "
                "gradients in float16, too coarse to be unscaled; set model.dtype to float32"
            )
        if model.quantization != "none" and self.adapter.method == "full":
            raise ValueError(
                f"model.quantization = {model.quantization!r} with adapter.method = 'full': quantized weights are not "
                "trained; set model.quantization to none, or adapter.method to bora"
            )

    def _check_held_out_losses(self) -> None:
        """What goes by the rounds' held-out losses needs them from all clients in every round."""
        rules: tuple[tuple[str, Scalar, Scalar], ...] = (
            ("run.keep-best", self.run.keep_best, True),
            ("privacy.mode", self.privacy.mode, "none"),
            ("privacy.secure-aggregation", self.privacy.secure_aggregation, False),
            ("strategy.evaluate-in-train", self.strategy.evaluate_in_train, True),
            ("strategy.fraction-train", self.strategy.fraction_train, 1.0),
        )
        for key, value, needed in rules:
            if value != needed:
                raise ValueError(
                    f"{key} = {value!r} with run.patience = {self.run.patience}, run.restart-margin = "
                    f"{self.run.restart_margin:g}: they go by the held-out losses of all clients; set {key} to "
                    f"{needed!r}, or both to 0"
                )

    def _check_client_privacy(self) -> None:
        """Noise at the server hides a client only if nothing else tells its update from another."""
        strategy = self.strategy
        if strategy.weighting != "uniform":
            raise ValueError(
                "strategy.weighting = 'examples' with privacy.mode = 'client': one client could move the mean by more "
                "than the noise hides; set strategy.weighting to uniform"
            )
        rules: tuple[tuple[str, Scalar, tuple[Scalar, ...]], ...] = (
            ("robust", strategy.robust, ("none",)),
            ("max-update-norm", strategy.max_update_norm, (0.0,)),
            ("min-cosine", strategy.min_cosine, (-1.0,)),
            ("max-loss-increase", strategy.max_loss_increase, (0.0,)),
            # The default compares weights, which are all alike here.
            ("max-weight-ratio", strategy.max_weight_ratio, (0.0, StrategySettings().max_weight_ratio)),
        )
        for key, value, harmless in rules:
            if value not in harmless:
                raise ValueError(
                    f"strategy.{key} = {value!r} with privacy.mode = 'client': it judges updates by each other, so "
                    "that one client decides who else counts, and no noise covers that; clipping bounds every update "
                    f"already, so set strategy.{key} to {harmless[0]!r}"
                )

    def flat(self) -> dict[str, Scalar]:
        """The settings as Flower's flat run config."""
        groups = self.model_dump(by_alias=True)
        return {f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()}
