import json
from pathlib import Path

import pytest

from bora_fl.client.private import noise_multiplier, planned_steps
from bora_fl.config import parse
from bora_fl.privacy.accounting import epsilon
from bora_fl.report import training_rows
from bora_fl.simulations.engine import simulate


@pytest.fixture
def private(tiny_config, tmp_path):
    return tiny_config | {
        "privacy.mode": "record",
        "privacy.epsilon": 8.0,
        "privacy.delta": 1e-3,
        "privacy.accountant": "rdp",
        "privacy.ledger-dir": str(tmp_path / "ledger"),
        "strategy.name": "ffa",
        "strategy.weighting": "uniform",
    }


@pytest.mark.parametrize("strategy", ["ffa", "fedsvd", "fed-sb", "cyclic"])
def test_a_private_run_stays_within_its_budget_and_says_so(strategy: str, private):
    rows = training_rows(simulate(private | {"strategy.name": strategy}, 3) / "metrics.jsonl")
    assert all(row["rejected"] == 0 for row in rows)
    assert [row["epsilon"]["largest"] for row in rows] == [8.0] * 3  # what is spent tells the number of records
    assert rows[-1]["epsilon"]["unit"] == "record"
    ledgers = [json.loads(file.read_text()) for file in Path(private["privacy.ledger-dir"]).glob("*.json")]
    assert len(ledgers) == 3
    for ledger in ledgers:
        history = [(e["noise_multiplier"], e["sample_rate"], e["steps"]) for e in ledger["entries"]]
        assert 7.0 < epsilon(history, 1e-3, "rdp") <= 8.0  # noise was solved for the whole run, which used it up


def test_the_noise_does_not_tell_the_number_of_records_but_roughly(private):
    settings = parse(private)
    found = {n: noise_multiplier(settings, n) for n in (40, 400, 401, 420, 4000)}
    assert found[400] == found[401] == found[420]
    assert found[40] > found[400] > found[4000]
    for n, noise in found.items():
        rate, steps = settings.train.batch_size / n, planned_steps(settings, n)
        assert 0.9 * 8.0 < epsilon([(noise, rate, steps)], 1e-3, "rdp") <= 8.0
    assert noise_multiplier(parse(private | {"privacy.noise-multiplier": 1.3}), 400) == 1.3


def test_what_is_computed_from_the_records_without_noise_stays_at_the_site(private):
    rows = training_rows(simulate(private, 3) / "metrics.jsonl")
    sent = set(rows[0]["per_client"]["0"])
    assert sent == {"partition", "rank", "num-examples", "epsilon-per-record"}
    assert {m["num-examples"] for m in rows[0]["per_client"].values()} == {1}


def test_a_second_run_on_the_same_data_is_refused_in_words(private, tmp_path):
    from bora_fl.strategies.observer import RunFailedError

    simulate(private, 3)
    again = {"run.output-dir": str(tmp_path / "again"), "model.max-length": 12, "data.max-train-examples": 200}
    with pytest.raises(RunFailedError, match="budget"):
        simulate(private | again, 3)  # no setting of the run makes the data look like other data
