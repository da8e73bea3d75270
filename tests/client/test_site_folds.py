"""Folds on a site's disk: whole, those of the run, and nowhere but in their folder."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from bora_fl.blocks import BlockFactors
from bora_fl.client.app import app
from bora_fl.client.identity import ClientIdentity
from bora_fl.client.job import whole_job
from bora_fl.client.site import Site
from bora_fl.config import parse
from bora_fl.privacy.policy import SitePolicy
from bora_fl.report import training_rows
from bora_fl.server.run import Server
from bora_fl.simulations.engine import InProcessGrid, simulate
from bora_fl.state import flatten_factors
from bora_fl.wire.records import Instruction, fold_record_name, to_arrays
from bora_fl.wire.refusals import Refused


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


def store(here: Site, received: dict[str, torch.Tensor], run_id: str = "run", newest: int = 9) -> None:
    here.store_folds(here.model(), run_id, received, newest)


def frozen(here: Site) -> torch.Tensor:
    model = here.model()
    return model.save_base(next(iter(model.read().layers))).detach().clone()


def test_a_damaged_fold_is_deleted_and_said_to_be_missing(here: Site, cache: Path):
    store(here, folds(here, 1, 2, 3))
    assert here.held_folds("run", 3) == 3
    path = cache / "run" / "2.fold"
    whole = path.read_bytes()
    for position in (0, 40, len(whole) // 2, len(whole) - 1):
        spoiled = bytearray(whole)
        spoiled[position] ^= 1
        path.write_bytes(spoiled)
        assert here.held_folds("run", 3) == 1
        assert not path.exists()
        store(here, folds(here, 2))
        assert here.held_folds("run", 3) == 3
    for cut in (0, 10, 100):
        path.write_bytes(whole[:cut])
        assert here.held_folds("run", 3) == 1
    assert {p.stat().st_mode & 0o777 for p in (cache / "run").iterdir()} == {0o600}


def test_another_fold_of_the_same_version_takes_the_place_of_the_first(here: Site):
    """A server that resumes from an older checkpoint does rounds again, with other clients."""
    start = frozen(here)
    store(here, folds(here, 1, scale=5.0))
    here.fold_to(here.model(), "run", 1)
    assert not torch.equal(frozen(here), start)
    store(here, folds(here, 1, scale=-2.0))
    assert here.held_folds("run", 1) == 1
    here.fold_to(here.model(), "run", 1)
    other = Site(here.settings)
    other.fold_to(other.model(), "run", 1)
    assert torch.equal(frozen(here), frozen(other))


@pytest.mark.parametrize("run_id", ["../escape", "/tmp/escape", "..", "", "a/b", "a\0", "." * 3])
def test_a_run_id_that_leads_elsewhere_is_refused(run_id: str, here: Site, cache: Path, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    for use in (lambda: store(here, folds(here, 1), run_id), lambda: here.held_folds(run_id, 1)):
        with pytest.raises(ValueError, match="is no name for a file"):
            use()
    record = Instruction(1, "run", frozenset("A"), frozenset("A"), False).record()
    record["run-id"] = run_id
    with pytest.raises(ValueError, match="is no name for a file"):
        Instruction.read(RecordDict({"instruction": record}))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("version", ["0", "-1", "+1", "01", "1_0", " 1", "²", "..", "", "1" * 10])
def test_a_version_is_a_plain_number(version: str, here: Site, cache: Path):
    with pytest.raises(ValueError, match="a fold is named"):
        store(here, {f"{version}/layer/A": torch.ones(2)})
    assert not cache.exists()


def test_a_fold_that_is_not_finite_is_refused(here: Site, cache: Path):
    with pytest.raises(ValueError, match="not finite"):
        store(here, {"1/layer/A": torch.tensor([1.0, float("nan")])})
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


def test_a_fold_that_no_layer_can_take_is_refused_and_not_kept(here: Site, cache: Path):
    layer, (m, n, b) = next(iter(here.model().layer_shapes().items()))
    good = folds(here, 1)
    wide = {f"1/{layer}/A": torch.ones(9 * m, n), f"1/{layer}/B": torch.ones(m, 9 * m)}
    for bad in (
        {"1/no/layer/dense": torch.ones(m, n)},
        {f"1/{layer}/weight": torch.ones(m, n)},
        {f"1/{layer}/dense": torch.ones(m, n + 1)},
        {f"1/{layer}/dense": torch.ones(m, n, dtype=torch.float64)},
        {f"1/{layer}/dense": torch.ones(m, n, dtype=torch.int32)},
        good | {f"1/{layer}/sigma": torch.ones(b + 1, b, 2)},
        wide,
    ):
        with pytest.raises(ValueError, match=r"adapted layer|no delta of"):
            store(here, bad)
    with pytest.raises(ValueError, match="version 2 in a message of version 1"):
        store(here, folds(here, 1, 2), newest=1)
    assert not cache.exists()
    store(
        here,
        good
        | {
            f"1/{name}/dense": torch.ones(rows, columns)
            for name, (rows, columns, _) in list(here.model().layer_shapes().items())[1:]
        },
        newest=1,
    )
    assert here.held_folds("run", 1) == 1


def test_what_a_server_sends_does_not_fill_the_disk(here: Site, cache: Path, monkeypatch: pytest.MonkeyPatch):
    store(here, folds(here, 1), "first")
    size = (cache / "first" / "1.fold").stat().st_size
    os.utime(cache / "first" / "1.fold", (1, 1))
    store(here, folds(here, 1), "second")
    free = 5 * size
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free - used()))

    def used() -> int:
        return sum(path.stat().st_size for path in cache.glob("*/*"))

    store(here, folds(here, 1), "third")  # half of what would be free is two and a half
    assert sorted(path.name for path in cache.iterdir()) == ["second", "third"]
    store(here, folds(here, 2), "third")
    with pytest.raises(Refused, match="have room for"):
        store(here, folds(here, 3), "third")
    assert used() <= free / 2
    assert here.held_folds("third", 9) == 2

    here.folds_mb = 1
    store(here, folds(here, 3), "third")
    assert here.held_folds("third", 9) == 3


def test_the_policy_says_how_much_room_there_is(tiny_config: dict[str, Any]):
    settings, who = parse(tiny_config), ClientIdentity(0, 3)
    policy = SitePolicy.model_validate({"data-set": "tiny", "data-path": "x", "models": ["*"], "folds-mb": 7})
    for given, wanted in ((policy, 7), (None, 0)):
        with whole_job(settings, RecordDict(), who, RecordDict(), "warm-up", given, None) as (here, _):
            assert here.folds_mb == wanted


def test_a_hostile_message_is_refused_with_a_code(tiny_config: dict[str, Any], cache: Path):
    settings = parse(tiny_config | {"strategy.name": "fedex", "run.num-rounds": 2})

    class Hostile(InProcessGrid):
        def _handle(self, message: Any) -> Any:
            if message.metadata.dst_node_id == 2 and message.metadata.message_type == "train":
                flood = {f"{version}/x/dense": torch.zeros(100, 100) for version in range(1, 30)}
                message.content[fold_record_name(1)] = to_arrays(flood)
            return super()._handle(message)

    folder = Server(settings).run(Hostile(app, 3, settings.flat()))
    for row in training_rows(folder / "metrics.jsonl"):
        assert row["clients"] == 2
        assert "message-invalid" in row["reasons"]["2"]
    assert sum(path.stat().st_size for path in cache.rglob("*.fold")) < 20_000
