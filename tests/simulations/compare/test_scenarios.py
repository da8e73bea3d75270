import pytest

from bora_fl.config import ConfigError, parse
from bora_fl.simulations.compare.scenarios import SCENARIOS, scenario


@pytest.mark.parametrize("row", SCENARIOS.values(), ids=lambda row: row.name)
def test_every_scenario_is_a_valid_config_of_equal_work(row):
    base = parse({"train.local-steps": 8, "run.num-rounds": 12, "run.evaluate-every": 4})
    settings = row.settings(base)
    assert settings.train.local_steps * settings.run.num_rounds == 96
    assert settings.run.num_rounds / settings.run.evaluate_every == 3
    assert row.clients(8) >= (1 if row.name == "one-client" else 2)
    untouched = {
        k: v for k, v in base.flat().items() if k not in row.overrides and not k.startswith(("run.", "train."))
    }
    assert untouched.items() <= settings.flat().items()


def test_scenarios_differ():
    base = parse({"train.local-steps": 8, "run.num-rounds": 12})
    told = [(row.settings(base).flat(), row.clients(8), row.node_configs(8, 8)) for row in SCENARIOS.values()]
    assert all(a != b for i, a in enumerate(told) for b in told[:i])


def test_any_dirichlet_alpha_is_a_scenario():
    assert scenario("dirichlet-0.35").settings(parse({})).data.alpha == 0.35
    assert scenario("dirichlet-1") is SCENARIOS["dirichlet-1"]


def test_natural_silos_of_any_number_are_a_scenario():
    three = scenario("natural-3")
    assert (three.clients(8), scenario("natural").clients(8)) == (3, 4)
    assert three.settings(parse({})).data.partition == "natural"
    with pytest.raises(ConfigError, match="--scenarios 'natural-0'"):
        scenario("natural-0")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("dirichlet0.1", "dirichlet-0.1"), ("many-step", "many-steps"), ("dirichlet-0", "dirichlet"), ("xyz", "natural")],
)
def test_an_unknown_scenario_lists_near_misses(name: str, meant: str):
    with pytest.raises(ConfigError, match=f"--scenarios '{name}'.*{meant}"):
        scenario(name)


def test_scaling_local_steps_needs_them():
    with pytest.raises(ConfigError, match=r"train.local-steps = 0 with --scenarios few-steps"):
        scenario("few-steps").settings(parse({"train.local-steps": 0}))


def test_mixed_ranks_are_shares_of_the_adapters():
    configs = scenario("mixed-ranks").node_configs(4, 8)
    assert configs == {0: {"rank": 2}, 1: {"rank": 4}, 2: {"rank": 8}, 3: {"rank": 2}}
    assert scenario("natural").node_configs(4, 8) == {}
