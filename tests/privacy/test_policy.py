"""The site's policy: what it grants, what it refuses, and that no file that cannot be used lets anything train."""

from pathlib import Path

import pytest

from bora_fl import __version__
from bora_fl.config import ConfigError, parse
from bora_fl.privacy.policy import (
    VARIABLE,
    SitePolicy,
    find_policy,
    grant,
    read_policy,
    released,
    require_small_delta,
)
from bora_fl.wire.refusals import Code, Refused

FILE = 'data-set = "reviews-2026"\ndata-path = "/srv/reviews.parquet"\nmodels = ["embedded:minilm"]\n'
RECORD = {
    "privacy.mode": "record",
    "strategy.weighting": "uniform",
    "privacy.epsilon": 1.0,
    "data.name": "/etc/passwd",
    "privacy.ledger-dir": "elsewhere",
}


@pytest.fixture(autouse=True)
def _without_a_policy_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def policy(**keys) -> SitePolicy:
    base = {"data-set": "reviews-2026", "data-path": "/srv/reviews.parquet", "models": ["embedded:minilm"]}
    return SitePolicy.model_validate(base | {name.replace("_", "-"): value for name, value in keys.items()})


def code(held: SitePolicy | None, change: dict, request: str = "train") -> Code:
    with pytest.raises(Refused) as refused:
        grant(held, parse(RECORD | change), request)
    return refused.value.code


def test_data_and_ledger_are_the_site_s_whatever_the_run_says():
    granted = grant(policy(ledger_folder="/var/ledger"), parse(RECORD), "train")
    assert (granted.data.name, granted.privacy.ledger_dir) == ("/srv/reviews.parquet", "/var/ledger")
    assert grant(policy(), parse(RECORD), "train").privacy.ledger_dir == ""
    assert granted.model_copy(update={"data": None, "privacy": None}) == parse(RECORD).model_copy(
        update={"data": None, "privacy": None}
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"privacy.mode": "none"}, Code.POLICY_MODE),
        ({"privacy.mode": "client"}, Code.POLICY_MODE),
        ({"privacy.epsilon": 1.0001}, Code.POLICY_BUDGET),
        ({"privacy.delta": 1.1e-5}, Code.POLICY_BUDGET),
        ({"privacy.clip-norm": 11.0}, Code.POLICY_NOISE),
        ({"privacy.noise-multiplier": 0.2}, Code.POLICY_NOISE),
        ({"privacy.noise-multiplier": 1001.0}, Code.POLICY_NOISE),
        ({"model.name": "evil/model"}, Code.POLICY_MODEL),
    ],
)
def test_a_run_that_asks_for_less_protection_is_refused(change: dict, expected: Code):
    assert grant(policy(), parse(RECORD), "train")
    assert code(policy(), change) is expected


def test_bounds_are_a_mode_s_own():
    held = policy(local={"epsilon": 50.0})
    assert grant(held, parse(RECORD | {"privacy.mode": "local", "privacy.epsilon": 50.0}), "train")
    assert code(held, {"privacy.epsilon": 50.0}) is Code.POLICY_BUDGET


def test_a_revision_is_trusted_alone_or_with_all_others():
    pinned = policy(models=["a/b@1", "c"])
    assert pinned.trusts("a/b", "1")
    assert not pinned.trusts("a/b", "2")
    assert not pinned.trusts("a/b", "")
    assert pinned.trusts("c", "7")
    assert policy(models=["*"]).trusts("a/b", "2")


def test_versions_and_secure_aggregation_can_be_wanted():
    assert code(policy(versions=["0.0.1"]), {}) is Code.POLICY_VERSION
    assert grant(policy(versions=[__version__]), parse(RECORD), "train")
    assert code(policy(secure_aggregation=True), {}) is Code.POLICY_SECURE_AGGREGATION
    assert grant(policy(secure_aggregation=True), parse(RECORD | {"privacy.secure-aggregation": True}), "train")


@pytest.mark.parametrize("mode", ["record", "local", "client"])
def test_exact_evaluations_are_withheld_under_privacy_with_and_without_a_policy(mode: str):
    for held in (None, policy(modes=["record", "local", "client"])):
        assert code(held, {"privacy.mode": mode}, "evaluate") is Code.EVALUATION_WITHHELD
    every = ["eval-loss", "eval-accuracy", "eval-examples"]
    lenient = policy(modes=["record", "local", "client"], metrics=every)
    if mode == "client":  # the server is trusted, so the site may say so
        assert grant(lenient, parse(RECORD | {"privacy.mode": mode}), "evaluate")
    else:
        assert code(lenient, {"privacy.mode": mode}, "evaluate") is Code.EVALUATION_WITHHELD
    assert code(lenient, {"privacy.mode": mode}, "head-losses") is Code.EVALUATION_WITHHELD  # no run has use for them


def test_evaluations_are_withheld_under_secure_aggregation_too():
    plain = {"privacy.mode": "none", "privacy.secure-aggregation": True}
    assert code(None, plain, "evaluate") is Code.EVALUATION_WITHHELD
    assert grant(None, parse({"privacy.mode": "none"}), "evaluate")


def test_what_is_measured_leaves_by_mode_and_by_the_site_s_word():
    assert "train-loss" in released(None, "none")
    assert released(None, "client") == frozenset()
    assert released(policy(metrics=["steps"]), "none") == {"steps"}
    assert released(policy(metrics=["steps"]), "client") == {"steps"}
    assert released(policy(metrics=["steps"]), "record") == released(policy(metrics=["steps"]), "local") == frozenset()


def test_statistics_for_the_head_need_the_site_s_word():
    assert code(policy(), {}, "head-statistics") is Code.STATISTICS_WITHHELD
    assert grant(policy(head_statistics=True), parse(RECORD), "head-statistics")


def test_delta_is_held_against_the_records_without_telling_their_number():
    """What is refused depends on the policy's bound alone, so that trying one δ after the other finds nothing out."""
    held = policy(record={"delta": 1e-3, "epsilon": 1.0})
    for asked in (1e-3, 1e-5, 1e-9):
        settings = parse(RECORD | {"privacy.delta": asked})
        require_small_delta(held, settings, 999)
        with pytest.raises(Refused) as refused:
            require_small_delta(held, settings, 1000)
        assert refused.value.code is Code.POLICY_BUDGET
    require_small_delta(None, parse(RECORD | {"privacy.delta": 1e-3}), 999)
    with pytest.raises(Refused):
        require_small_delta(None, parse(RECORD | {"privacy.delta": 1e-3}), 1000)
    require_small_delta(held, parse(RECORD | {"privacy.mode": "local", "privacy.delta": 1e-3}), 10**6)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not toml",
        FILE + "epsilom = 1.0\n",
        FILE + 'modes = ["recrd"]\n',
        FILE + "modes = []\n",
        FILE + 'head-statistics = "no"\n',
        FILE + "[record]\nepsilon = true\n",
        FILE + "[record]\nepsilon = inf\n",
        FILE + "[record]\ndelta = 1.0\n",
        FILE + "[record]\nmin-noise-multiplier = 2.0\nmax-noise-multiplier = 1.0\n",
        FILE + "[none]\nepsilon = 1.0\n",
        FILE.replace("reviews-2026", "../limit"),
        FILE.replace("reviews-2026", "reviews-client"),
        FILE.replace('data-path = "/srv/reviews.parquet"\n', ""),
        FILE.replace("data-set", "data_set"),
    ],
)
def test_a_malformed_policy_refuses(content: str, tmp_path: Path):
    file = tmp_path / "policy.toml"
    file.write_text(FILE)
    assert read_policy(file)
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"policy\.toml"):
        read_policy(file)
    with pytest.raises(Refused) as refused:
        find_policy({"policy": str(file)})
    assert refused.value.code is Code.POLICY_INVALID


@pytest.mark.parametrize("node_config", [{"policy": "/no/such.toml"}, {"policy": ""}, {"policy": True}, {"Polcy": "x"}])
def test_a_misnamed_policy_refuses(node_config: dict):
    with pytest.raises(Refused) as refused:
        find_policy({"partition-id": 0, "num-partitions": 3} | node_config)
    assert refused.value.code is Code.POLICY_INVALID


def test_a_file_that_anyone_may_change_is_no_policy(tmp_path: Path):
    file = tmp_path / "policy.toml"
    file.write_text(FILE)
    file.chmod(0o646)
    with pytest.raises(ConfigError, match="chmod o-w"):
        read_policy(file)


def test_the_process_s_own_policy_wins_over_the_environment_and_that_over_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = {}
    for name in ("own", "environment", "message"):
        files[name] = tmp_path / name
        files[name].write_text(FILE.replace("reviews-2026", name))
    node_config = {
        "partition-id": 0,
        "num-partitions": 3,
        "rank": 2,
        "worker": "unix:/x",
        "policy": str(files["message"]),
    }
    assert find_policy({}) is None
    assert find_policy(node_config).data_set == "message"
    monkeypatch.setenv(VARIABLE, str(files["environment"]))
    assert find_policy(node_config).data_set == "environment"
    assert find_policy(node_config, files["own"]).data_set == "own"
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(Refused):
        find_policy(node_config)
