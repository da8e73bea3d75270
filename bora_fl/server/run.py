"""One run from config to adapter folder, free of Flower's ServerApp machinery except the grid."""

import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import shorten

import numpy as np
from flwr.serverapp import Grid
from safetensors import SafetensorError
from torch import Tensor

from bora_fl.blocks import at_rank, normalize_sigma
from bora_fl.config import ConfigError, Settings, extras
from bora_fl.data import Encoded, Pairs, labels, load_dataset, partition_picture, source_fingerprint, test_data
from bora_fl.data.columns import require_response
from bora_fl.data.general import general_text
from bora_fl.data.prompts import Prompt, held_out_prompts
from bora_fl.device import autocast, set_threads, settle
from bora_fl.evaluate import Metrics, evaluate, perplexity
from bora_fl.heads import public_clip_norm
from bora_fl.models import FederatedModel, load_base, load_tokenizer, peft_config, settled, write_result
from bora_fl.models.packing import require_packing
from bora_fl.models.pooling import PooledClassification
from bora_fl.models.reference import References, require_preferences
from bora_fl.models.result import read_labels, write_labels
from bora_fl.paths import digest, write_atomically
from bora_fl.privacy.audit_log import AUDIT_LOG, append
from bora_fl.report import RoundReport, append_row, drop_rows_after, read_rows, round_line, rounds_picture
from bora_fl.seeds import derive
from bora_fl.server.checkpoint import MANIFEST, Checkpoint, CheckpointError, load_newest, save
from bora_fl.server.model_card import model_card
from bora_fl.server.output_folder import held, refuse_another_run
from bora_fl.server.samples import SAMPLES, generate
from bora_fl.server.versions import versions
from bora_fl.state import AdapterState, unflatten_deltas
from bora_fl.strategies.base import FederatedStrategy
from bora_fl.strategies.best import keeps_best
from bora_fl.strategies.head import HeadLayout
from bora_fl.strategies.merge_report import mean_effective_rank
from bora_fl.strategies.observer import Observer, RunFailedError
from bora_fl.strategies.server_state import ServerState
from bora_fl.strategies.trial import tried
from bora_fl.tracking import activity
from bora_fl.tracking.prometheus import serving
from bora_fl.tracking.sinks import Sinks, scalars

log = logging.getLogger(__name__)

Save = Callable[..., Path]
"""Writes a checkpoint, as `save` does."""


class Server(Observer):
    """Watches a run: central evaluation, metrics and a checkpoint after each round, the adapter at the end.

    Args:
        settings: The run's settings.
        save: How a checkpoint is written.
    """

    def __init__(self, settings: Settings, save: Save = save) -> None:
        extras.require_for(settings)
        self.settings = settings = settled(settings)
        self.folder = Path(settings.run.output_dir).expanduser().resolve()
        if settings.adapter.method != "full":
            peft_config(settings.adapter, settings.model)  # names the methods there are, before a strategy refuses it
        self.aggregator = tried(settings)
        self.sinks = Sinks(settings.run.sinks)
        set_threads(settings.run.threads)
        raw = load_dataset(settings.data)
        labels.require(raw.train, raw.settings, settings.model, raw.label_names)
        self._data = raw.settings
        self._source = source_fingerprint(settings.data, 0)
        if not settings.model.kind.head:
            require_response(settings.data, raw.settings, raw.train.column_names)
        if raw.settings.format == "preference":
            require_preferences(settings)
        self.label_names = raw.logit_names(settings.model)
        base = load_base(settings.model, self.label_names, settings.run.seed)
        if settings.data.packing:
            require_packing(base, settings.train.batch_size)
        self.pooling = base.pooling if isinstance(base, PooledClassification) else None
        self.model = FederatedModel(
            base, settings.adapter, settings.model, settings.run.seed, keep_head=settings.solves_head
        )
        self.tokenizer = load_tokenizer(settings.model)
        self.test: Encoded | None = test_data(settings.data, settings.model, self.tokenizer)
        if isinstance(self.test, Pairs):
            train, device = settings.train, settle(self.model.model)
            self.test = References(self.model).compute(
                self.model, self.test, train.evaluation_batch_size, lambda: autocast(device, train.precision)
            )
        self._general: Encoded | None = None
        if settings.data.general_text:
            self._general = general_text(settings.data.general_text, settings.model, self.tokenizer)
        self._prompts: list[Prompt] = []
        if settings.run.generate_every and raw.test is not None:
            self._prompts = held_out_prompts(raw.test, raw.settings, self.tokenizer, settings.run.generate_examples)
        self.screening: Encoded | None = None
        if settings.strategy.max_loss_increase > 0 and self.test is not None:
            self.screening, self.test = _split(
                self.test, settings.strategy.screening_examples, derive(settings.run.seed, "screening")
            )
        self._save = save
        self._folded = 0
        self._latest: dict[str, float] = {}
        self._central: Metrics | None = None
        self._run_id = ""

    @property
    def metrics_path(self) -> Path:
        """One JSON object a round."""
        return self.folder / "metrics.jsonl"

    def run(self, grid: Grid) -> Path:
        """Run to the last round and write the adapter.

        Returns:
            The output folder.

        Raises:
            ConfigError: If the output folder holds another run, or another process writes to it.
            CheckpointError: If the run cannot go on from its checkpoints.
            RunFailedError: If the federation stops being able to train.
        """
        run = self.settings.run
        with held(self.folder), serving(run.metrics_port, lambda: self._latest, "run.metrics-port ="):
            try:
                return self._run(grid)
            finally:
                self.sinks.finish()

    def _run(self, grid: Grid) -> Path:
        config = self.settings.flat()
        found = load_newest(self.folder / "checkpoints", config) if self.settings.run.resume else None
        first_round = 0
        if found is None:
            refuse_another_run(self.folder, resumes=self.settings.run.resume)
            if self.settings.run.resume:
                log.info("there is no checkpoint in %s to go on from; the run begins", self.folder)
            checkpoint = Checkpoint(0, uuid.uuid4().hex, ServerState.start(self.model.read()), [])
        else:
            checkpoint, first_round = found, found.round + 1
            self._require_the_same_data(found)
            log.info("resuming after round %d from %s", checkpoint.round, self.folder)
            drop_rows_after(self.metrics_path, checkpoint.round)
            if (self.folder / SAMPLES).is_file():
                drop_rows_after(self.folder / SAMPLES, checkpoint.round)
        (self.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        write_labels(self.folder, self.label_names)
        (self.folder / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
        self._run_id = checkpoint.run_id
        self.sinks.start(self.folder, config)
        strategy = FederatedStrategy(self.settings, self.aggregator, self._run_id, self, self._head_layout())
        state = strategy.run(grid, checkpoint.state, checkpoint.folds, first_round)
        self._bring_to(state.current, strategy.folds)
        activity.tell("write the adapter")
        self._write_result(strategy.folds)
        return self.folder

    def _require_the_same_data(self, found: Checkpoint) -> None:
        """Refuse to go on where the logits would mean other classes; say where the test set is another."""
        name = self.settings.data.name
        try:
            before = read_labels(self.folder)
        except (ValueError, TypeError):  # damaged; it is written anew
            before = None
        if self.label_names is not None and before is not None and before != self.label_names:
            old, new = (shorten(", ".join(names), 200, placeholder=" ...") for names in (before, self.label_names))
            raise CheckpointError(
                f"{self.folder} belongs to a run on other classes ({old}); data.name = {name!r} has {new}: "
                "restore the data, or start anew with another run.output-dir"
            )
        if found.data and found.data != self._source:
            log.warning(
                "data.name = %r is not what it was in round %d: accuracies from here on are of other examples",
                name,
                found.round,
            )

    def _write_result(self, folds: list[dict[str, Tensor]]) -> None:
        adapter, rows = self.folder / "adapter", read_rows(self.metrics_path)
        self.model.save(adapter, folds)
        settings = self.settings.model_copy(update={"data": self._data})  # with the columns that were found
        write_result(adapter, self.tokenizer, settings, self.label_names, rows[-1]["round"])
        test = 0 if self.test is None else len(self.test)
        after = self.settings.strategy.fraction_evaluate > 0 or keeps_best(self.settings, self.aggregator.shares())
        card = model_card(self.settings, rows, self.label_names, self.pooling, test, after)
        write_atomically(adapter / "README.md", card)
        if extras.missing("report", "matplotlib"):
            log.info("rounds.png is not drawn: matplotlib is not installed; run `%s`", extras.remedy("report"))
        else:
            rounds_picture(rows, self.folder / "rounds.png")

    def _head_layout(self) -> HeadLayout | None:
        """Where the head stands in the adapter's state, if it is to be solved and is a linear layer."""
        found = self.model.head_layer() if self.settings.solves_head else None
        if found is None:
            if self.settings.head.init == "closed-form":
                raise ConfigError(
                    f"head.init = 'closed-form' with model.name = {self.settings.model.name!r}: the adapter's state "
                    "has no linear layer that makes the logits; set head.init to random"
                )
            return None
        clip_norm = 0.0
        if self.settings.privacy.mode == "record":
            model = self.settings.model
            classes = int(self.model.model.config.num_labels)
            width = self.settings.head.max_width
            clip_norm = public_clip_norm(self.model.model, self.tokenizer, classes, model.max_length, width)
        return HeadLayout(*found, clip_norm)

    def on_start(self, num_partitions: int) -> None:
        """Draw how the data is dealt to the clients, in ``partition.png``, unless the sites have data of their own."""
        data, seed = self.settings.data, self.settings.run.seed
        if data.partition == "local":
            return
        clients, numbers = data.num_partitions or num_partitions, self.settings.model.kind.number
        partition_picture(data, clients, seed, self.folder / "partition.png", numbers=numbers)

    # --- what the strategy calls -------------------------------------------------------------------------------------

    def evaluate(self, round: int, state: ServerState, folds: list[dict[str, Tensor]]) -> tuple[float, float] | None:
        """Central loss and accuracy on the test set, in the rounds that the config names."""
        if self.test is None or not self.settings.run.evaluates(round):
            return None
        self._bring_to(state.current, folds)
        metrics = self._central = self._evaluate(self.test)
        return metrics.loss, metrics.accuracy

    def held_out_loss(self, state: AdapterState, folds: list[dict[str, Tensor]]) -> float:
        """Loss on the part of the central test set that is kept for screening; a client's Sigma may be out of range."""
        if self.screening is None:
            raise ValueError("no examples are kept for screening; set strategy.max-loss-increase")
        transform = self.settings.adapter.transform
        layers = {name: normalize_sigma(factors, transform) for name, factors in state.layers.items()}
        self._bring_to(AdapterState(layers, state.tensors), folds)
        return self._evaluate(self.screening).loss

    def _evaluate(self, data: Encoded) -> Metrics:
        activity.tell("evaluate")
        train, device = self.settings.train, settle(self.model.model)
        return evaluate(
            self.model.model,
            data,
            train.evaluation_batch_size,
            beta=train.dpo_beta,
            names=self.label_names or (),
            autocast=lambda: autocast(device, train.precision),
        )

    def on_round(self, report: RoundReport, state: ServerState, folds: list[dict[str, Tensor]]) -> None:
        """Checkpoint first, then the metrics line: a crash in between repeats the round's line, never loses it."""
        report = self._measured(report, state, folds)
        row = report.row()
        checkpoint = Checkpoint(report.round, self._run_id, state, folds, self._source)
        keep = self.settings.run.keep_checkpoints
        try:
            saved = self._save(self.folder / "checkpoints", checkpoint, self.settings.flat(), row, keep)
            append(
                self.folder / AUDIT_LOG,
                kind="round",
                run=self._run_id,
                round=report.round,
                replies=dict(report.replies),
                clients=sorted(report.per_client),
                rejected=sorted(report.reasons),
                charge=row["epsilon"],
                checkpoint=digest(saved / MANIFEST),
            )
            append_row(self.metrics_path, row)
        except CheckpointError as error:
            raise RunFailedError(str(error)) from error
        except (OSError, SafetensorError) as error:
            raise RunFailedError(
                f"round {report.round} could not be written to {self.folder} ({error}); make room there, then go on "
                "from the last whole checkpoint with run.resume=true"
            ) from error
        self._latest = scalars(row) | {"round": row["round"]}
        self.sinks.round(row)
        log.info("%s", round_line(row, self.settings.run.num_rounds))

    def _measured(self, report: RoundReport, state: ServerState, folds: list[dict[str, Tensor]]) -> RoundReport:
        """The report with the effective rank, and a language model's perplexity and how what it writes compares."""
        if self.settings.run.evaluates(report.round):
            report = replace(report, effective_rank=mean_effective_rank(state.current))
        if self._central and report.evaluated == "central":
            report = replace(report, margin=self._central.margin, f1=self._central.f1)
        if self.settings.model.task != "causal-lm":
            return report
        if self._data.format != "preference" and report.loss is not None:
            report = replace(report, perplexity=perplexity(report.loss))
        run = self.settings.run
        if self._general is not None and run.evaluates(report.round):
            self._bring_to(state.current, folds)
            report = replace(report, general_loss=self._evaluate(self._general).loss)
        if not run.generate_every or (report.round % run.generate_every and report.round != run.num_rounds):
            return report
        self._bring_to(state.current, folds)
        means, samples = generate(
            self.model.model, self.tokenizer, self._prompts, run.generate_tokens, run.generate_format
        )
        append_row(self.folder / SAMPLES, {"round": report.round, **means, "samples": samples})
        return replace(report, generation=means)

    def _bring_to(self, state: AdapterState, folds: list[dict[str, Tensor]]) -> None:
        for fold in folds[self._folded :]:
            self.model.add_to_base(unflatten_deltas(fold))
        self._folded = len(folds)
        adapter = self.settings.adapter  # a strategy's state, or a client's, may be of a lower rank
        layers = {name: at_rank(f, adapter.rank, adapter.transform) for name, f in state.layers.items()}
        self.model.write(AdapterState(layers, state.tensors))


def _split(test: Encoded, count: int, seed: int) -> tuple[Encoded, Encoded]:
    """Examples kept for screening, and the others, which alone are evaluated on."""
    if len(test) <= count:
        raise ConfigError(
            f"strategy.screening-examples = {count}: the central test set has {len(test)} examples, and some must be "
            "left to evaluate on; lower it"
        )
    order = np.random.default_rng(seed).permutation(len(test))
    return test.select(order[:count]), test.select(order[count:])
