import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bora_fl.config import ConfigError, Settings
from bora_fl.data import source_fingerprint
from bora_fl.simulations import grid
from bora_fl.simulations.compare.plan import METHODS, Plan, Variant, plan

from . import made_up

ROOT = Path("somewhere")


def lay_out(**changes) -> Plan:
    options = {
        "strategies": ["fedavg", "refactor"],
        "scenarios": ["natural", "dirichlet-1"],
        "methods": ["bora"],
        "seeds": 2,
        "clients": 5,
        "root": ROOT,
        "threads": 1,
    }
    options |= changes
    return plan({"train.local-steps": 8}, **(options | {"seeds": range(options["seeds"])}))


def test_there_is_a_run_for_every_combination():
    found = lay_out(methods=["bora", "lora"])
    assert len(found.runs) == 2 * 2 * 2 * 2
    assert len({run.folder for run in found.runs}) == 16
    for run in found.runs:
        s = run.run_settings
        assert (s.strategy.name, s.adapter.method, s.run.seed) == (
            run.variant.strategy,
            run.variant.method,
            run.seed,
        )
        assert Path(s.run.output_dir) == run.folder
    assert {(run.scenario, run.num_clients) for run in found.runs} == {("natural", 4), ("dirichlet-1", 5)}


def test_neighbours_share_the_base_model_and_the_data():
    runs = lay_out(methods=["bora", "lora"]).runs
    keys = [(run.scenario, run.seed, run.variant.method) for run in runs]
    changes = sum(a != b for a, b in pairwise(keys))
    assert changes == len(set(keys)) - 1


def test_what_decides_the_result_decides_the_folder_and_nothing_else_does():
    run = lay_out().runs[0]
    assert run.folder == lay_out(threads=2).runs[0].folder
    assert run.folder != lay_out(chosen={"train.learning-rate": 0.01}).runs[0].folder
    assert run.folder != lay_out(clients=6, scenarios=["dirichlet-1"]).runs[0].folder
    assert run.folder.relative_to(ROOT) == replace(run, root=Path("else")).folder.relative_to("else")


def test_combinations_that_cannot_be_are_skipped_with_the_reason():
    found = lay_out(
        strategies=["fedavg", "refactor"], methods=["bora", "gralora"], scenarios=["natural", "mixed-ranks"]
    )
    assert {(s, str(v)) for s, v in found.skipped} == {
        ("natural", "gralora/refactor"),
        ("mixed-ranks", "gralora/refactor"),
        ("mixed-ranks", "bora/fedavg"),
        ("mixed-ranks", "gralora/fedavg"),
    }
    assert any(line.startswith("gralora/refactor in every scenario:") for line in found.reasons())
    assert any(line.startswith("bora/fedavg in mixed-ranks: clients have different ranks") for line in found.reasons())
    ranks = [run.node_configs for run in found.runs if run.scenario == "mixed-ranks"]
    assert ranks
    assert all(node.keys() == {"rank"} for nodes in ranks for node in nodes.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_named_method_can_be_averaged(method: str):
    found = lay_out(methods=[method], strategies=["fedavg"])
    assert not found.skipped
    assert found.runs[0].settings.train.learning_rate == METHODS[method].get(
        "train.learning-rate", Settings().train.learning_rate
    )
    chosen = lay_out(methods=[method], strategies=["fedavg"], chosen={"train.learning-rate": 0.5})
    assert chosen.runs[0].settings.train.learning_rate == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ["refactr"]}, "--strategies 'refactr'.*did you mean refactor"),
        ({"scenarios": ["natral"]}, "--scenarios 'natral'.*did you mean natural"),
        ({"methods": ["lorra"]}, "adapter.method = 'lorra'.*lora"),
        ({"methods": ["vera"], "strategies": ["flora"]}, "vera/flora in every scenario"),
        ({"seeds": 0}, "--seeds 0"),
        ({"chosen": {"run.seed": 3}}, "run.seed = 3: .*--seeds"),
        ({"chosen": {"data.alpha": 3.0}}, "data.alpha = 3.0: set by dirichlet-1"),
        ({"privacy": ["6", "some"]}, "--privacy 'some': give epsilons above 0"),
        ({"privacy": ["-1"]}, "--privacy '-1'"),
        ({"privacy": ["6"], "chosen": {"privacy.epsilon": 2.0}}, "privacy.epsilon = 2.0: set by natural-epsilon-6"),
        ({"chosen": {"privacy.ledger-dir": "x"}}, "each run has a ledger of its own"),
        ({"chosen": {"train.local-steps": -1}}, "train.local-steps = -1"),
    ],
)
def test_a_mistake_names_setting_value_and_remedy(changes, message: str):
    with pytest.raises(ConfigError, match=message):
        lay_out(**changes)


def test_labels_name_the_method_only_where_it_varies():
    assert lay_out().label(Variant("bora", "refactor")) == "refactor"
    assert lay_out(methods=["bora", "lora"]).label(Variant("lora", "refactor")) == "lora/refactor"
    assert lay_out(strategies=["fedsa"]).label(Variant("bora", "fedsa")) == "fedsa *"


def test_only_strategies_that_keep_factors_on_clients_are_personal():
    kept = {s for s in ("fedavg", "ffa", "fedsa", "fed-sb", "rolora", "refactor") if Variant("bora", s).personal}
    assert kept == {"fedsa"}


def test_every_epsilon_is_a_scenario_of_its_own_with_ledgers_of_its_own():
    found = lay_out(privacy=["none", "6", "3"], scenarios=["natural"])
    assert [row.name for row in found.scenarios] == ["natural", "natural-epsilon-6", "natural-epsilon-3"]
    modes = {run.scenario: (run.settings.privacy.mode, run.settings.privacy.epsilon) for run in found.runs}
    assert modes["natural"][0] == "none"
    assert modes["natural-epsilon-6"] == ("record", 6.0)
    assert modes["natural-epsilon-3"] == ("record", 3.0)
    ledgers = {run.run_settings.privacy.ledger_dir for run in found.runs}
    assert len(ledgers) == len(found.runs) == 3 * 2 * 2
    assert all(Path(run.run_settings.privacy.ledger_dir).parent == run.folder for run in found.runs)


def test_a_run_that_its_patience_ended_is_not_run_again(tmp_path):
    (run,) = made_up.lay_out(tmp_path, {"run.num-rounds": 5, "run.patience": 1}, seeds=1, strategies=["fedavg"]).runs
    made_up.finish(run, 0.5)  # after one round
    assert not grid.is_finished(run)
    path = run.folder / grid.FINISHED
    path.write_text(json.dumps(json.loads(path.read_text()) | {"result": {"rows": 2}}))
    assert grid.is_finished(run)
    (run.folder / "metrics.jsonl").write_text("")
    assert not grid.is_finished(run)


def test_a_run_on_files_that_have_changed_is_run_again(tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text("text,label\na,0\nb,1\n")
    (run,) = made_up.lay_out(tmp_path, {"data.name": str(data)}, seeds=1, strategies=["fedavg"]).runs
    made_up.finish(run, 0.5)
    assert grid.is_finished(run)  # of an earlier version, which did not say what it read
    path = run.folder / grid.FINISHED
    result = {"rows": 2, "data": source_fingerprint(run.settings.data, 0)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"result": result}))
    assert grid.is_finished(run)
    data.write_text("text,label\na,1\nb,0\nc,1\n")
    assert not grid.is_finished(run)
