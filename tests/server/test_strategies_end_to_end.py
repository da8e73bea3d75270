"""Every strategy through the whole system: wire, clients, folds, checkpoints, export."""

import pytest
import torch
from safetensors.torch import load_file

from bora_fl import load
from bora_fl.config import parse
from bora_fl.report import training_rows
from bora_fl.server.run import Server
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.presets import PRESETS

FREEZES = {"ffa": 0.7, "rolora": 0.7, "fedsa": 0.6, "fed-sb": 0.6, "fedsvd": 0.9}
"""Share of the first round's bytes above which later rounds of a strategy that leaves parts alone never are."""


@pytest.mark.parametrize("strategy", sorted(PRESETS))
def test_a_strategy_runs_and_its_adapter_is_whole(strategy: str, tiny_config):
    config = tiny_config | {"strategy.name": strategy, "train.local-steps": 2, "run.evaluate-every": 3}
    folder = simulate(config, 3)
    rows = training_rows(folder / "metrics.jsonl")
    assert [row["rejected"] for row in rows] == [0, 0, 0]
    first, *later = (row["bytes_down"] for row in rows)
    if strategy in FREEZES:
        assert all(bytes_down < FREEZES[strategy] * first for bytes_down in later)
    assert all(torch.isfinite(t).all() for t in load_file(folder / "adapter" / "adapter_model.safetensors").values())
    folds = folder / "adapter" / "folds.safetensors"
    assert folds.is_file() == PRESETS[strategy].folds


def test_a_codec_composes_with_a_strategy(tiny_config):
    options = {"wire.codec": "topk:0.2+int8", "train.local-steps": 1, "run.num-rounds": 2, "head.init": "random"}
    rows = training_rows(simulate(tiny_config | options, 2) / "metrics.jsonl")
    assert [row["rejected"] for row in rows] == [0, 0]
    assert rows[-1]["strategy"]["update_norm"] > 0


@pytest.mark.parametrize("options", [{"strategy.residual": "fold"}, {"strategy.residual": "carry"}])
def test_the_residual_can_be_kept(options, tiny_config):
    config = tiny_config | {"strategy.name": "refactor", "train.local-steps": 2, "strategy.residual-rank": 2} | options
    rows = training_rows(simulate(config, 3) / "metrics.jsonl")
    assert [row["rejected"] for row in rows] == [0, 0, 0]


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_server_optimizer_composes(optimizer: str, tiny_config):
    options = {"strategy.server-optimizer": optimizer, "strategy.server-learning-rate": 0.01}
    rows = training_rows(simulate(tiny_config | {"train.local-steps": 2} | options, 3) / "metrics.jsonl")
    assert len(rows) == 3


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum", "norm-clip"])
def test_a_robust_rule_composes(rule: str, tiny_config):
    options = {"strategy.robust": rule, "run.num-rounds": 1, "train.local-steps": 1}
    rows = training_rows(simulate(tiny_config | options, 3) / "metrics.jsonl")
    assert rows[0]["strategy"]["clients"] >= 1


def test_a_merged_adapter_of_lower_rank_is_evaluated_and_saved_at_the_adapter_s(tiny_config):
    options = {"strategy.name": "florist", "strategy.threshold": 0.01, "train.local-steps": 2}
    folder = simulate(tiny_config | options, 3)
    rows = training_rows(folder / "metrics.jsonl")
    assert rows[-1]["strategy"]["rank"] == 1
    assert rows[-1]["evaluated"] == "central"
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in adapter.items() if name.endswith(".A")} == {2}


@pytest.mark.parametrize("strategy", ["florist", "hetlora"])
def test_one_block_takes_clients_of_several_ranks(strategy: str, tiny_config):
    options = {"strategy.name": strategy, "strategy.threshold": 0.01, "train.local-steps": 1, "run.num-rounds": 2}
    options |= {"adapter.num-blocks": 1, "adapter.sigma-transform": "exp_norm"}
    rows = training_rows(simulate(tiny_config | options, 3, node_configs={1: {"rank": 1}}) / "metrics.jsonl")
    assert [row["rejected"] for row in rows] == [0, 0]
    assert [rows[-1]["per_client"][client]["rank"] for client in "012"] == [2, 1, 2]


def test_one_block_spends_no_round_on_sigma(tiny_config):
    one, several = (
        Server(parse(tiny_config | {"strategy.name": "cyclic", "adapter.num-blocks": blocks})) for blocks in (1, 4)
    )
    assert ["A" in one.aggregator.trains(round) for round in (1, 2, 3)] == [False, True, False]
    assert ["sigma" in several.aggregator.trains(round) for round in (1, 2, 3)] == [False, True, False]


@pytest.mark.parametrize(("method", "privacy"), [("dense-core", "none"), ("ravan", "record"), ("ravan", "secure")])
def test_cores_between_frozen_bases_are_trained_averaged_and_exported(method: str, privacy: str, tiny_config, tmp_path):
    options = {"adapter.method": method, "run.num-rounds": 1, "train.local-steps": 2, "data.evaluation-fraction": 0.0}
    if privacy == "record":
        options |= {"privacy.mode": "record", "privacy.epsilon": 8.0, "privacy.ledger-dir": str(tmp_path / "ledger")}
        options |= {"train.max-grad-norm": 0.0, "strategy.evaluate-in-train": False, "strategy.weighting": "uniform"}
    if privacy == "secure":
        options |= {"privacy.secure-aggregation": True, "strategy.fraction-evaluate": 0.0}
    folder = simulate(tiny_config | options, 3)
    (row,) = training_rows(folder / "metrics.jsonl")
    assert (row["clients"], row["rejected"]) == (3, 0)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    cores = {name: t for name, t in saved.items() if name.endswith(".ravan_cores.H")}
    assert len(cores) == 4
    assert all(bool(t.any()) for t in cores.values())
    model, _ = load(folder)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[f"{name.removesuffix('H')}default.H"], t) for name, t in cores.items())
