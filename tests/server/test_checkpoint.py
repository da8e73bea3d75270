import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bora_fl.blocks import BlockFactors
from bora_fl.privacy.accounting import Spent
from bora_fl.privacy.central import PrivacyState
from bora_fl.server.checkpoint import Checkpoint, CheckpointError, load_newest, save
from bora_fl.state import AdapterState, flatten, flatten_factors
from bora_fl.strategies.server_optimizers import OptimizerState
from bora_fl.strategies.server_state import ServerState

CONFIG = {"adapter.rank": 2, "run.seed": 0, "run.num-rounds": 5}

FOLD = "fold-00002.safetensors"


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


def test_a_setting_that_an_earlier_version_did_not_have_was_at_its_default(tmp_path: Path):
    write(tmp_path, 1)
    assert load_newest(tmp_path, CONFIG | {"train.distillation": 0.0}) is not None
    with pytest.raises(CheckpointError, match=r"train\.distillation was 0\.0, is 0\.5"):
        load_newest(tmp_path, CONFIG | {"train.distillation": 0.5})


def flip(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def change(folder: Path, **fields: Any) -> None:
    """Change fields of a manifest as a program of format 1 would have written them: without digests."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 1} | fields
    for name in ("digest", "sha256"):
        manifest.pop(name, None)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name", ["round-00002/state.safetensors", "round-00002/manifest.json", "fold-00002.safetensors"]
)
@pytest.mark.parametrize("where", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_a_flipped_bit_is_found(name: str, where: float, tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    flip(tmp_path / name, where)
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert found.round == 1


def test_every_bit_of_a_manifest_counts(tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    path = tmp_path / "round-00002" / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        for bit in (0x01, 0x20):
            spoiled = bytearray(whole)
            spoiled[position] ^= bit
            path.write_bytes(spoiled)
            try:
                same = json.loads(spoiled) == json.loads(whole)  # white space
            except ValueError:
                same = False
            found = load_newest(tmp_path, CONFIG)
            assert found is not None
            assert found.round == (2 if same else 1), (position, bit)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["round-00002/state.safetensors", FOLD])
def test_a_checkpoint_without_digests_is_read_unless_it_is_not_finite(name: str, value: float, tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    change(tmp_path / "round-00001")
    change(tmp_path / "round-00002")
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert found.round == 2
    tensors = load_file(tmp_path / name)
    tensors[min(tensors)].view(-1)[0] = value
    save_file(tensors, tmp_path / name)
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert found.round == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"round": "2"},
        {"round": 7},
        {"round": None},
        {"run_id": 5},
        {"run_id": "../../escape"},
        {"num_folds": -1},
        {"num_folds": "two"},
        {"fold_version": [1]},
        {"config": []},
        {"config": {"adapter.rank": {}}},
        {"format": "1"},
        {"format": None},
    ],
    ids=str,
)
def test_a_manifest_of_wrong_types_is_passed_over(fields: dict[str, Any], tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    change(tmp_path / "round-00002", **fields)
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert found.round == 1


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "[[[]]]", "{}", "\udcff"])
def test_a_manifest_that_is_no_object_is_passed_over(content: str, tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "round-00002" / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert found.round == 1


def test_when_no_checkpoint_is_whole_the_message_says_what_to_do(tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    flip(tmp_path / "fold-00001.safetensors", 0.9)
    with pytest.raises(CheckpointError) as error:
        load_newest(tmp_path, CONFIG)
    for part in ("round-00001", "round-00002", "fold-00001.safetensors is not as it was written", "backup", "anew"):
        assert part in str(error.value)
    assert len(list(tmp_path.glob("round-*"))) == 2


def test_a_later_format_is_not_taken_for_damage(tmp_path: Path):
    write(tmp_path, 1)
    change(tmp_path / "round-00001", format=3)
    path = tmp_path / "round-00001" / "manifest.json"
    content = json.loads(path.read_text())
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content | {"digest": digest}))
    with pytest.raises(CheckpointError, match=r"format 3, this version reads 1 to 2; install"):
        load_newest(tmp_path, CONFIG)


@pytest.mark.parametrize("part", ["carried", "memory", "fold"])
def test_what_is_not_finite_is_not_written(part: str, tmp_path: Path):
    write(tmp_path, 1)
    made = checkpoint(2)
    bad = torch.full((2, 2), float("nan"))
    if part == "memory":
        made = replace(made, state=replace(made.state, optimizer=OptimizerState(first={"a": bad})))
    elif part == "carried":
        odd = BlockFactors(torch.full((4, 2), float("inf")), torch.ones(2, 2, 2), torch.ones(2, 6), 0.5)
        made = replace(made, state=replace(made.state, carried={"a.q": odd}))
    else:
        made.folds[1]["a.q/A"].fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"round 2 is not written .* not finite"):
        save(tmp_path, made, CONFIG, {}, keep=2)
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert found.round == 1


def test_a_fold_of_a_round_that_is_done_again_replaces_the_first(tmp_path: Path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    again = checkpoint(2)
    again.folds[1]["a.q/B"].add_(1.0)  # other clients took part this time
    save(tmp_path, again, CONFIG, {}, keep=2)
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert torch.equal(found.folds[1]["a.q/B"], again.folds[1]["a.q/B"])


def test_a_fold_that_is_there_is_not_written_again(tmp_path: Path):
    write(tmp_path, 1)
    before = (tmp_path / "fold-00001.safetensors").stat().st_mtime_ns
    write(tmp_path, 2)
    write(tmp_path, 3)
    assert (tmp_path / "fold-00001.safetensors").stat().st_mtime_ns == before


def test_damaged_checkpoints_ahead_do_not_push_out_whole_ones(tmp_path: Path):
    for round in (1, 2, 3):
        save(tmp_path, checkpoint(round), CONFIG, {}, keep=3)
    for round in (2, 3):
        flip(tmp_path / f"round-0000{round}" / "state.safetensors", 0.9)
    save(tmp_path, checkpoint(2), CONFIG, {}, keep=2)
    assert (tmp_path / "round-00001").is_dir()
    found = load_newest(tmp_path, CONFIG)
    assert found is not None
    assert found.round == 2


def test_checkpoints_are_their_owner_s_alone(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    write(folder, 1)
    assert {p.stat().st_mode & 0o777 for p in (folder, folder / "round-00001")} == {0o700}
    assert {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()} == {0o600}
