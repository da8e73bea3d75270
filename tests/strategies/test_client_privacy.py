import pytest
import torch

from bora_fl.config import ConfigError, parse
from bora_fl.privacy.accounting import Spent
from bora_fl.privacy.central import ClientAccount
from bora_fl.report import read_rows
from bora_fl.simulations.engine import simulate
from bora_fl.strategies.client_privacy import ClientPrivacy
from bora_fl.strategies.server_state import ServerState


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


def test_rounds_are_booked_one_by_one_beside_those_of_an_older_checkpoint(fleets):
    fed = fleets["bora exp_norm"]
    settings = parse(
        {"privacy.mode": "client", "privacy.epsilon": 1e4, "privacy.noise-multiplier": 0.7, "privacy.accountant": "rdp"}
        | {"strategy.weighting": "uniform"}
    )
    agg = fed.built("fedavg")
    privacy = ClientPrivacy.build(settings, linear=True)
    state, updates = fed.round(agg, weights=[1.0] * 4)
    old = ServerState.from_tensors(state.to_tensors() | {"memory/privacy/rounds": torch.tensor(2)}, 0)
    assert sum(spent.steps for spent in privacy.account(old).history) == 2
    new, _, _ = privacy.protect(old, updates, agg.trains(1), 4)
    assert new.privacy.history == (Spent(0.7, 1.0, 1),)
    account = privacy.account(ServerState.from_tensors(new.to_tensors(), 0))
    assert account == privacy.account(new)
    three = ClientAccount(account.budget, "rdp", (Spent(0.7, 1.0, 3),))
    assert account.epsilon() == pytest.approx(three.epsilon())
