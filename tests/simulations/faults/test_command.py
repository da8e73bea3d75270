from pathlib import Path

import pytest

from bora_fl.simulations.faults import replies as reply_faults
from bora_fl.simulations.faults.catalogue import FAULTS
from bora_fl.simulations.faults.processes import STAGES
from bora_fl.simulations.faults.verdict import TOLERANCE


@pytest.fixture
def tiny(tiny_config, monkeypatch: pytest.MonkeyPatch):
    """The bench on a tiny model."""
    config = {key: value for key, value in tiny_config.items() if key != "run.output-dir"}
    monkeypatch.setattr(reply_faults, "CONFIG", config)


@pytest.mark.parametrize(
    "name", sorted(set(reply_faults.REPLY_FAULTS) - {"full-disk", "truncated-ledger", "fifty-clients"})
)
def test_a_bad_reply_is_rejected_and_changes_nothing(name: str, tiny, tmp_path: Path):
    verdict = reply_faults.REPLY_FAULTS[name].inject(tmp_path)
    assert verdict.outcome.startswith("rejected: ")
    assert verdict.correct
    assert verdict.rounds_lost == 1


def test_a_full_disk_stops_the_run_with_a_message_and_the_run_resumes(tiny, tmp_path: Path):
    verdict = reply_faults.REPLY_FAULTS["full-disk"].inject(tmp_path)
    assert verdict.correct
    assert all(word in verdict.outcome for word in ("round 2", "No space left on device", "run.resume=true"))


@pytest.mark.parametrize("name", ["truncated-ledger", "fifty-clients"])
def test_a_drill_in_process_ends_right(name: str, tiny, tmp_path: Path):
    verdict = reply_faults.REPLY_FAULTS[name].inject(tmp_path)
    assert verdict.correct, verdict


def test_the_bench_can_tell_a_wrong_adapter(tiny, tmp_path: Path):
    verdict = reply_faults.inject_reply(reply_faults.scaled(1.01))(tmp_path)
    assert verdict.outcome == "merged unnoticed"
    assert not verdict.correct
    assert verdict.difference > TOLERANCE


def test_every_fault_is_in_the_catalogue():
    wanted = {
        *(f"{what}-{stage}" for what in ("site", "worker", "superlink", "serverapp") for stage in STAGES),
        *(f"{what}-{stage}-no-worker" for what in ("site", "superlink", "serverapp") for stage in STAGES),
        *("clientapp-mid-round-no-worker", "clientapp-before-reply-no-worker"),
        *("superlink-75s", "worker-stopped", "other-policy", "truncated-ledger", "fifty-clients"),
        *("full-disk", "slow-site", "site-leaves", "site-joins-late", "other-schema", "garbage", "nan"),
        *("huge-weight", "negative-weight", "old-round", "scaled-100"),
    }
    assert set(FAULTS) == wanted
