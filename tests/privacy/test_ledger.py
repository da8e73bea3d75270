"""The ledger: spent steps survive everything, and the budget holds however often a client is asked."""

import json
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from bora_fl.paths import state_folder, state_in
from bora_fl.privacy import accounting
from bora_fl.privacy.accounting import Budget, BudgetExceeded, epsilon, solve_noise
from bora_fl.privacy.ledger import Ledger, fingerprint

DATA = fingerprint(["first", "second"])
LARGE = Budget(1000.0, 1e-5)


@pytest.fixture(autouse=True)
def _state(tmp_path_factory):
    with state_in(tmp_path_factory.mktemp("state")):
        yield


def open_ledger(folder, *, run_id="run", data=DATA, budget=LARGE, accountant="rdp"):
    return Ledger.open(folder, run_id=run_id, dataset_fingerprint=data, budget=budget, accountant=accountant)


def test_history_is_there_after_a_restart(tmp_path):
    open_ledger(tmp_path).spend(1.0, 0.1, 10)
    open_ledger(tmp_path).spend(1.0, 0.1, 5)
    open_ledger(tmp_path).spend(2.0, 0.1, 1)
    assert open_ledger(tmp_path).history() == [(1.0, 0.1, 15), (2.0, 0.1, 1)]


def test_epsilon_covers_every_round_not_the_last(tmp_path):
    ledger = open_ledger(tmp_path)
    reported = [ledger.spend(1.0, 0.1, 10) for _ in range(4)]
    assert reported[-1] == ledger.epsilon() == epsilon([(1.0, 0.1, 40)], 1e-5, "rdp")
    assert reported == sorted(reported)
    assert reported[-1] > 1.3 * reported[0]


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_is_that_of_opacus_on_the_same_history(tmp_path, accountant):
    from opacus.accountants import create_accountant

    ledger = open_ledger(tmp_path, accountant=accountant)
    opacus = create_accountant(accountant)
    for noise, rate, steps in [(1.1, 0.05, 30), (0.9, 0.02, 20), (1.1, 0.05, 10)]:
        ledger.spend(noise, rate, steps)
        for _ in range(steps):
            opacus.step(noise_multiplier=noise, sample_rate=rate)
    assert ledger.epsilon() == pytest.approx(opacus.get_epsilon(1e-5), rel=0.01)


def test_runs_on_the_same_records_add_up(tmp_path):
    open_ledger(tmp_path, run_id="monday").spend(1.0, 0.1, 10)
    tuesday = open_ledger(tmp_path, run_id="tuesday")
    tuesday.spend(1.0, 0.1, 20)
    assert tuesday.history() == [(1.0, 0.1, 30)]
    assert tuesday.history("monday") == [(1.0, 0.1, 10)]
    assert tuesday.epsilon("monday") < tuesday.epsilon()


def test_data_sets_are_apart(tmp_path):
    open_ledger(tmp_path).spend(1.0, 0.1, 10)
    assert open_ledger(tmp_path, data=fingerprint(["other"])).epsilon() == 0.0


def test_beyond_the_budget_is_refused_and_not_booked(tmp_path):
    ledger = open_ledger(tmp_path, budget=Budget(3.0, 1e-5))
    spent = ledger.spend(1.0, 0.05, 20)
    with pytest.raises(BudgetExceeded) as caught:
        ledger.spend(1.0, 0.05, 200)
    assert ledger.history() == [(1.0, 0.05, 20)]
    assert caught.value.spent == spent
    assert caught.value.requested > caught.value.budget == 3.0
    for part in (
        "epsilon = 3 per record at delta = 1e-05",
        f"{spent:.4g} is spent",
        "200 more steps",
        "Nothing was trained",
    ):
        assert part in str(caught.value)
    ledger.spend(1.0, 0.05, 1)


def test_a_client_that_is_asked_more_often_than_planned_stays_within_its_budget(tmp_path):
    """Noise is solved once for all planned steps; every round books its own share of them."""
    rounds, steps, rate, budget = 5, 20, 0.05, Budget(2.0, 1e-5)
    noise = solve_noise(budget.epsilon, budget.delta, rate, rounds * steps, "rdp")
    ledger = open_ledger(tmp_path, budget=budget)
    for _ in range(rounds):
        ledger.spend(noise, rate, steps)
    assert 0.97 * budget.epsilon < ledger.epsilon() <= budget.epsilon
    for _ in range(3):
        with pytest.raises(BudgetExceeded):
            ledger.spend(noise, rate, steps)
    assert ledger.epsilon() <= budget.epsilon


def test_no_noise_fits_no_finite_budget(tmp_path):
    with pytest.raises(BudgetExceeded):
        open_ledger(tmp_path).spend(0.0, 0.1, 1)
    assert open_ledger(tmp_path, budget=Budget(math.inf, 1e-5)).spend(0.0, 0.1, 1) == math.inf


def test_the_site_s_limit_binds_whatever_the_run_asks_for(tmp_path):
    (tmp_path / "limit.json").write_text('{"epsilon": 1.0, "delta": 1e-6}')
    with pytest.raises(BudgetExceeded, match="the site's limit"):
        open_ledger(tmp_path).spend(1.0, 0.05, 100)
    open_ledger(tmp_path).spend(10.0, 0.05, 1)
    (tmp_path / "limit.json").write_text('{"epsilon": "much"}')
    with pytest.raises(ValueError, match=r"limit\.json"):
        open_ledger(tmp_path).spend(10.0, 0.05, 1)


def test_a_client_killed_before_its_reply_has_spent(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            open_ledger(tmp_path).spend(1.0, 0.1, 7)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert open_ledger(tmp_path).history() == [(1.0, 0.1, 7)]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_stops_the_training_and_leaves_the_old_state(tmp_path, monkeypatch, call):
    ledger = open_ledger(tmp_path)
    ledger.spend(1.0, 0.1, 7)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="disk full"):
            ledger.spend(1.0, 0.1, 5)
    assert open_ledger(tmp_path).history() == [(1.0, 0.1, 7)]


def test_the_entry_is_flushed_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (order.append(name), real(*args))[1])
    open_ledger(tmp_path).spend(1.0, 0.1, 5)
    assert order == ["fsync", "replace", "fsync"] * 2  # the ledger, then its head


def test_processes_may_spend_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(accounting, "_epsilon_by_rdp", lambda history, delta: 0.5)
    ledgers = [open_ledger(tmp_path, run_id=f"run-{k}") for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda ledger: [ledger.spend(1.0, 0.1, 1) for _ in range(5)], ledgers))
    assert open_ledger(tmp_path).history() == [(1.0, 0.1, 40)]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2, "unit": "record", "dataset": "x", "entries": []}'])
def test_an_unreadable_ledger_is_never_started_anew(tmp_path, content):
    (tmp_path / f"{DATA}.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read"):
        open_ledger(tmp_path)


@pytest.mark.parametrize("old", [0, 1, 2])
def test_an_older_copy_that_is_put_back_is_refused(tmp_path, old):
    file, copies = tmp_path / f"{DATA}.json", []
    for steps in (3, 5, 7):
        copies.append(file.read_bytes() if file.exists() else None)
        open_ledger(tmp_path).spend(1.0, 0.1, steps)
    newest = file.read_bytes()
    file.unlink()
    if copies[old] is not None:
        file.write_bytes(copies[old])
    with pytest.raises(ValueError, match=r"was rolled back or changed: its \d entries .* Put the newest copy"):
        open_ledger(tmp_path)
    file.write_bytes(newest)
    assert open_ledger(tmp_path).history() == [(1.0, 0.1, 15)]


def test_a_ledger_that_is_open_notices_a_rollback_too(tmp_path):
    ledger = open_ledger(tmp_path)
    ledger.spend(1.0, 0.1, 5)
    (tmp_path / f"{DATA}.json").unlink()
    with pytest.raises(ValueError, match="rolled back"):
        ledger.spend(1.0, 0.1, 5)


def test_a_changed_entry_is_refused(tmp_path):
    open_ledger(tmp_path).spend(1, 0.1, 100)
    file = tmp_path / f"{DATA}.json"
    file.write_text(file.read_text().replace('"steps": 100', '"steps": 1'))
    with pytest.raises(ValueError, match="rolled back or changed"):
        open_ledger(tmp_path)


def test_a_crash_between_ledger_and_head_is_no_rollback(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path)
    ledger.spend(1, 0.1, 5)
    real = os.replace
    renamed = []

    def crash_before_the_head(source, target):
        renamed.append(target)
        if len(renamed) == 2:
            raise OSError("killed")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash_before_the_head)
        with pytest.raises(OSError, match="killed"):
            ledger.spend(1.0, 0.1, 7)
    assert open_ledger(tmp_path).history() == [(1.0, 0.1, 12)]
    open_ledger(tmp_path).spend(1.0, 0.1, 1)
    assert open_ledger(tmp_path).history() == [(1.0, 0.1, 13)]


def test_a_ledger_from_before_heads_is_adopted(tmp_path):
    open_ledger(tmp_path).spend(1.0, 0.1, 5)
    shutil.rmtree(state_folder() / "ledger-heads")
    assert open_ledger(tmp_path).history() == [(1.0, 0.1, 5)]
    open_ledger(tmp_path).spend(1.0, 0.1, 5)
    assert len(list((state_folder() / "ledger-heads").glob("*.json"))) == 1


def test_an_unreadable_head_is_refused(tmp_path):
    open_ledger(tmp_path).spend(1.0, 0.1, 5)
    for head in (state_folder() / "ledger-heads").glob("*.json"):
        head.write_text("{}")
    with pytest.raises(ValueError, match="which counts the entries"):
        open_ledger(tmp_path)


def test_ledger_and_head_are_their_owner_s_alone(tmp_path):
    open_ledger(tmp_path / "ledger").spend(1.0, 0.1, 5)
    for folder in (tmp_path / "ledger", state_folder() / "ledger-heads"):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def test_a_ledger_of_other_records_is_refused(tmp_path):
    open_ledger(tmp_path).spend(1.0, 0.1, 1)
    other = fingerprint(["other"])
    (tmp_path / f"{DATA}.json").rename(tmp_path / f"{other}.json")
    with pytest.raises(ValueError, match="cannot be read"):
        open_ledger(tmp_path, data=other)


def test_the_file_says_whose_presence_is_hidden(tmp_path):
    open_ledger(tmp_path).spend(1.0, 0.1, 1)
    assert json.loads((tmp_path / f"{DATA}.json").read_text())["unit"] == "record"


def test_gdp_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'gdp'"):
        open_ledger(tmp_path, accountant="gdp")


def test_fingerprint_follows_the_records_not_their_order():
    assert fingerprint(["a", "b", "b"]) == fingerprint(["b", "a", "b"])
    assert len({fingerprint(records) for records in (["a", "b"], ["a"], ["ab"], ["a", "b", "b"], [])}) == 5
    assert fingerprint([b"a"]) == fingerprint(["a"])


@pytest.mark.parametrize(("epsilon_", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_a_budget_is_checked(epsilon_, delta):
    with pytest.raises(ValueError, match=r"epsilon|delta"):
        Budget(epsilon_, delta)
