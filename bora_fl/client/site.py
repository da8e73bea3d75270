"""What one process of a site holds: base model and tokenized data, loaded once, shared by all clients there."""

import logging
import threading
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from bora_fl.client import folds
from bora_fl.client.sharding import shard_base
from bora_fl.config import Settings
from bora_fl.data import ClientData, Encoded, Pairs, client_data, load_dataset
from bora_fl.device import autocast, set_threads, settle
from bora_fl.models import FederatedModel, load_base, load_tokenizer, settled
from bora_fl.models.base import without_dropout
from bora_fl.models.prefix import PrefixCache
from bora_fl.models.reference import References, require_preferences
from bora_fl.state import unflatten_deltas
from bora_fl.wire.refusals import Code, refuse_as

log = logging.getLogger(__name__)


class Site:
    """The models and data of one process; virtual clients that run in it take turns.

    Args:
        settings: The run's settings.
        mesh: The processes that share the base model's weights out; None to have all.

    Attributes:
        folds_mb: As in the site's policy.
    """

    def __init__(self, settings: Settings, mesh: DeviceMesh | None = None) -> None:
        self.settings, self._mesh = settings, mesh
        self.folds_mb = 0
        with refuse_as(Code.DATA_UNREADABLE, Code.OUT_OF_MEMORY):
            raw = load_dataset(settings.data)
        if raw.settings.format == "preference":
            with refuse_as(Code.RUN_CONFIG_INVALID):
                require_preferences(settings)
        with refuse_as(Code.MODEL_UNAVAILABLE, Code.OUT_OF_MEMORY):
            self._tokenizer: Any = load_tokenizer(settings.model)
            self._label_names = raw.logit_names(settings.model)
            self._base: Any = self._load()
        self._model: FederatedModel | None = None
        self._folded: tuple[str, int] = ("", 0)
        self._references: References | None = None
        budget, every = 1_000_000 * settings.train.prefix_cache_mb, settings.model.pooling == "layers"
        if budget and mesh is not None:
            log.info(
                "train.prefix-cache-mb: nothing is kept, processes that share the base model run its layers together"
            )
        self._prefix = PrefixCache(budget, every) if budget and mesh is None else None
        self._originals: dict[str, torch.Tensor | torch.nn.Module] = {}

    def _load(self) -> Any:
        global _loads
        _loads += 1
        base = load_base(self.settings.model, self._label_names, self.settings.run.seed)
        if not self.settings.train.base_dropout:
            without_dropout(base)
        return base

    def data(self, partition: int, num_partitions: int) -> ClientData:
        """A client's training and evaluation examples."""
        s = self.settings
        found = client_data(
            s.data, s.model, self._tokenizer, partition, s.data.num_partitions or num_partitions, s.run.seed
        )
        return ClientData(self._compared(found.train), self._compared(found.evaluation))

    def _compared(self, examples: Encoded) -> Encoded:
        """Preference pairs with what the base model makes of them; anything else as it is."""
        if not isinstance(examples, Pairs):
            return examples
        model, (run, version) = self._model or self.model(), self._folded
        train, device = self.settings.train, settle(model.model)
        precision = partial(autocast, device, train.precision)
        known = self._references.find(examples, precision) if self._references else None
        if known is not None:
            return known
        if version:
            self._restore(model)  # the reference is the base model of the run's start
        if self._references is None:
            self._references = References(model)
        found = self._references.find(examples, precision) or self._references.compute(
            model, examples, train.evaluation_batch_size, precision
        )
        self.fold_to(model, run, version)
        return found

    def texts(self) -> list[str]:
        """The text of each record of the training split, all partitions'."""
        with refuse_as(Code.DATA_UNREADABLE, Code.OUT_OF_MEMORY):
            return load_dataset(self.settings.data).texts()

    def model(self, rank: int | None = None) -> FederatedModel:
        """The adapted model at a rank (the run's own by default); the base model is shared by all ranks."""
        adapter = self.settings.adapter
        if rank is not None and rank != adapter.rank:
            adapter = adapter.model_copy(update={"rank": rank, "alpha": adapter.alpha * rank / adapter.rank})
        if self._model is None or self._model.rank != adapter.rank:
            if self._model is not None:
                if self._prefix:
                    self._prefix.detach()
                sharded, self._base = self._mesh is not None, self._model.model.unload()
                self._model = None
                if sharded:  # the weights are cut as they lie under one adapter
                    self._base, self._folded, self._originals = None, ("", 0), {}
                    self._base = self._load()
            self._model = FederatedModel(
                self._base, adapter, self.settings.model, self.settings.run.seed, keep_head=self.settings.solves_head
            )
            if self._mesh is not None:
                shard_base(self._model, self._mesh)
            if self.settings.train.checkpointing:
                self._model.checkpoint_activations()
            if self.settings.train.compile:
                self._model.compile()
            if self._prefix:
                self._prefix.attach(self._model.model, self._model.all_trained_parameters())
        return self._model

    def warm_up(self, partition: tuple[int, int] | None) -> None:
        """Load the model, and a partition's data if one is named, as its number and out of how many."""
        self.model()
        if partition:
            self.data(*partition)

    def store_folds(self, model: FederatedModel, run_id: str, received: dict[str, torch.Tensor], newest: int) -> None:
        """Keep received folds on disk; see `folds.store`."""
        changed = folds.store(run_id, received, model.layer_shapes(), newest, 1_000_000 * self.folds_mb)
        if self._folded[0] == run_id and any(version <= self._folded[1] for version in changed):
            self._folded = ("", self._folded[1])  # the frozen weights hold another one: they are restored first

    def held_folds(self, run_id: str, wanted: int) -> int:
        """The newest version up to which every fold is on this site and whole; a damaged one is deleted."""
        run, version = self._folded
        first = version + 1 if run == run_id and version <= wanted else 1  # earlier ones are in the frozen weights
        return next((v - 1 for v in range(first, wanted + 1) if folds.read(run_id, v) is None), wanted)

    def fold_to(self, model: FederatedModel, run_id: str, version: int) -> None:
        """Bring the frozen weights to a fold version, from wherever they are."""
        if self._folded != (run_id, version) and (self._folded[0] != run_id or self._folded[1] > version):
            self._restore(model)
        if self._folded[0] != run_id:
            self._folded = (run_id, 0)
        for v in range(self._folded[1] + 1, version + 1):
            fold = folds.read(run_id, v)
            if fold is None:
                raise ValueError(f"fold {v} is not on this site any more")
            layers = unflatten_deltas(fold)
            for name in layers:
                if name not in self._originals:
                    self._originals[name] = model.save_base(name)
            try:
                model.add_to_base(layers)
            except BaseException:
                self._restore(model)  # a process that lives on must not train on half a fold
                raise
            self._folded = (run_id, v)

    def _restore(self, model: FederatedModel) -> None:
        model.restore_base(self._originals)
        self._folded = ("", 0)


_loads = 0
_current: tuple[object, Site] | None = None
_lock = threading.Lock()


def base_loads() -> int:
    """How often this process has loaded a base model."""
    return _loads


def forget() -> None:
    """Let go of this process's site."""
    global _current
    with _lock:
        _current = None


def site(settings: Settings, mesh: DeviceMesh | None = None) -> Site:
    """This process's site for a run's settings: made at the first call, and anew when model, adapter or data change.

    Args:
        settings: As the site grants them.
        mesh: As for `Site`.
    """
    global _current
    with refuse_as(Code.MODEL_UNAVAILABLE):
        settings = settled(settings)
    made_of = (settings.model, settings.adapter, settings.data, settings.run.seed)
    train = settings.train
    how = (train.base_dropout, train.checkpointing, train.compile, train.prefix_cache_mb)
    key = (*made_of, *how, settings.solves_head, mesh)
    with _lock:
        set_threads(settings.run.threads)
        if _current is None or _current[0] != key:
            _current = None  # frees the old model before the new one is loaded
            _current = (key, Site(settings, mesh))
        _current[1].settings = settings
        return _current[1]
