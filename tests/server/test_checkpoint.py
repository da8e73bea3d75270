from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bora_fl.blocks import BlockFactors
from bora_fl.privacy.accounting import Spent
from bora_fl.privacy.central import PrivacyState
from bora_fl.server.checkpoint import Checkpoint, CheckpointError, load_newest, save
from bora_fl.state import AdapterState, flatten, flatten_factors
from bora_fl.strategies.server_optimizers import OptimizerState
from bora_fl.strategies.server_state import ServerState

CONFIG = {"adapter.rank": 2, "run.seed": 0, "run.num-rounds": 5}


def factors(seed: int) -> BlockFactors:
    g = torch.Generator().manual_seed(seed)
    return BlockFactors(
        torch.randn(4, 2, generator=g), torch.rand(2, 2, 2, generator=g), torch.randn(2, 6, generator=g), 0.5
    )


def checkpoint(round: int) -> Checkpoint:
    current = AdapterState({"a.q": factors(round), "a.v": factors(round + 50)}, {"head": torch.randn(3)})
    state = replace(
        ServerState.start(current),
        carried={"a.q": factors(7)},
        fold_version=round,
        optimizer=OptimizerState({"layers/a.q/B": torch.randn(2, 2)}, {"tensors/head": torch.randn(3)}),
        privacy=PrivacyState((Spent(0.7, 1.0, 1),) * round, clip_norm=0.3),
    )
    folds = [flatten_factors({"a.q": factors(100 + v)}, "") for v in range(round)]
    return Checkpoint(round, "run", state, folds)


def write(folder: Path, round: int) -> Checkpoint:
    made = checkpoint(round)
    save(folder, made, CONFIG, {"round": round}, keep=2)
    return made


def test_what_is_written_is_what_is_read(tmp_path: Path):
    write(tmp_path, 1)
    made = write(tmp_path, 2)
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert (found.round, found.run_id, found.state.fold_version) == (2, "run", 2)
    for mine, theirs in (
        (flatten(made.state.current), flatten(found.state.current)),
        (flatten_factors(made.state.carried, ""), flatten_factors(found.state.carried, "")),
        (made.state.optimizer.to_tensors(), found.state.optimizer.to_tensors()),
        (made.folds[0], found.folds[0]),
        (made.folds[1], found.folds[1]),
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(found.folds) == 2
    assert found.state.ranks == {"a.q": 2, "a.v": 2}
    assert found.state.privacy == made.state.privacy


def test_the_oldest_go_first(tmp_path: Path):
    for round in range(1, 5):
        write(tmp_path, round)
    assert sorted(p.name for p in tmp_path.glob("round-*")) == ["round-00003", "round-00004"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("keep", [0, 20])
def test_a_damaged_checkpoint_is_passed_over(name: str, keep: int, tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    path = tmp_path / "round-00002" / name
    path.write_bytes(path.read_bytes()[:keep])
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert found.round == 1


def test_a_half_written_checkpoint_is_not_a_checkpoint(tmp_path: Path):
    write(tmp_path, 1)
    (tmp_path / "round-00001").rename(tmp_path / ".round-00002.part")
    assert load_newest(tmp_path, CONFIG) is None


def test_settings_that_decide_the_result_must_be_the_same(tmp_path: Path):
    write(tmp_path, 1)
    assert load_newest(tmp_path, CONFIG | {"run.num-rounds": 9}) is not None
    for change in ({"adapter.rank": 3}, {"run.seed": 1}):
        with pytest.raises(CheckpointError, match=f"{next(iter(change))} was"):
            load_newest(tmp_path, CONFIG | change)
