"""Folds on a site's disk: whole, those of the run, and nowhere but in their folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bora_fl.blocks import BlockFactors
from bora_fl.client.site import Site
from bora_fl.config import parse
from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate
from bora_fl.state import flatten_factors
from bora_fl.wire.records import Instruction


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BORA_FL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "folds"


@pytest.fixture
def here(tiny_config: dict[str, Any]) -> Site:
    return Site(parse(tiny_config))


def folds(here: Site, *versions: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    flat = {}
    layer, factors = next(iter(here.model().read().layers.items()))
    for version in versions:
        fold = BlockFactors(torch.full_like(factors.B, scale * version), factors.sigma, factors.A, 1.0)
        flat |= flatten_factors({layer: fold}, f"{version}/")
    return flat


def frozen(here: Site) -> torch.Tensor:
    model = here.model()
    return model.save_base(next(iter(model.read().layers))).detach().clone()


def test_a_damaged_fold_is_deleted_and_said_to_be_missing(here: Site, cache: Path):
    here.store_folds("run", folds(here, 1, 2, 3))
    assert here.held_folds("run", 3) == 3
    path = cache / "run" / "2.fold"
    whole = path.read_bytes()
    for position in (0, 40, len(whole) // 2, len(whole) - 1):
        spoiled = bytearray(whole)
        spoiled[position] ^= 1
        path.write_bytes(spoiled)
        assert here.held_folds("run", 3) == 1
        assert not path.exists()
        here.store_folds("run", folds(here, 2))
        assert here.held_folds("run", 3) == 3
    for cut in (0, 10, 100):
        path.write_bytes(whole[:cut])
        assert here.held_folds("run", 3) == 1
    assert {p.stat().st_mode & 0o777 for p in (cache / "run").iterdir()} == {0o600}


def test_another_fold_of_the_same_version_takes_the_place_of_the_first(here: Site):
    """A server that resumes from an older checkpoint does rounds again, with other clients."""
    start = frozen(here)
    here.store_folds("run", folds(here, 1, scale=5.0))
    here.fold_to(here.model(), "run", 1)
    assert not torch.equal(frozen(here), start)
    here.store_folds("run", folds(here, 1, scale=-2.0))
    assert here.held_folds("run", 1) == 1
    here.fold_to(here.model(), "run", 1)
    other = Site(here.settings)
    other.fold_to(other.model(), "run", 1)
    assert torch.equal(frozen(here), frozen(other))


@pytest.mark.parametrize("run_id", ["../escape", "/tmp/escape", "..", "", "a/b", "a\0", "." * 3])
def test_a_run_id_that_leads_elsewhere_is_refused(run_id: str, here: Site, cache: Path, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    for use in (lambda: here.store_folds(run_id, folds(here, 1)), lambda: here.held_folds(run_id, 1)):
        with pytest.raises(ValueError, match="is no name for a file"):
            use()
    record = Instruction(1, "run", frozenset("A"), frozenset("A"), False).record()
    record["run-id"] = run_id
    from flwr.app import RecordDict

    with pytest.raises(ValueError, match="is no name for a file"):
        Instruction.read(RecordDict({"instruction": record}))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("version", ["0", "-1", "+1", "01", "1_0", " 1", "²", "..", "", "1" * 10])
def test_a_version_is_a_plain_number(version: str, here: Site, cache: Path):
    with pytest.raises(ValueError, match="a fold is named"):
        here.store_folds("run", {f"{version}/layer/A": torch.ones(2)})
    assert not cache.exists()


def test_a_fold_that_is_not_finite_is_refused(here: Site, cache: Path):
    with pytest.raises(ValueError, match="not finite"):
        here.store_folds("run", {"1/layer/A": torch.tensor([1.0, float("nan")])})
    assert not cache.exists()


def test_a_site_with_a_damaged_fold_is_back_a_round_later(tiny_config: dict[str, Any], cache: Path):
    from bora_fl.client import site as sites

    config = tiny_config | {"strategy.name": "fedex", "run.num-rounds": 4}
    spoiled = []

    def spoil(message: Any, partition: int) -> Any:
        paths = list(cache.rglob("1.fold"))
        if partition == 2 and paths and not spoiled:
            spoiled.extend(paths)
            paths[0].write_bytes(paths[0].read_bytes()[:-1] + b"x")
            sites._current = None  # the next message meets a new process
        return message

    rows = training_rows(simulate(config, 3, tamper=spoil) / "metrics.jsonl")
    assert spoiled
    assert [row["clients"] for row in rows].count(3) >= 3
    assert rows[-1]["clients"] == 3
