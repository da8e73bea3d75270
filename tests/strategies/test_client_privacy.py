import pytest

from bora_fl.config import ConfigError, parse
from bora_fl.report import read_rows
from bora_fl.simulations.engine import simulate


@pytest.fixture
def private(tiny_config):
    return tiny_config | {
        "privacy.mode": "client",
        "privacy.epsilon": 50.0,
        "privacy.delta": 1e-2,
        "privacy.accountant": "rdp",
        "strategy.weighting": "uniform",
    }


@pytest.mark.parametrize("strategy", ["fedavg", "refactor", "ffa"])
def test_a_run_uses_up_its_budget_and_no_more(strategy: str, private):
    rows = read_rows(simulate(private | {"strategy.name": strategy}, 3) / "metrics.jsonl")
    spent = [row["epsilon"]["largest"] for row in rows]
    assert spent == sorted(spent)
    assert 49 < spent[-1] <= 50.0
    assert rows[0]["epsilon"]["unit"] == "client"


def test_the_budget_survives_a_restart(private):
    from bora_fl.privacy.accounting import BudgetExceeded

    fixed = private | {"privacy.noise-multiplier": 0.7, "run.num-rounds": 2, "train.local-steps": 1}
    simulate(fixed, 3)
    with pytest.raises(BudgetExceeded):
        simulate(fixed | {"run.num-rounds": 60, "run.resume": True}, 3)


def test_unequal_weights_are_refused():
    with pytest.raises(ConfigError, match=r"strategy\.weighting"):
        parse({"privacy.mode": "client"})
