from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.client.worker.address import Address, WorkerSettings
from bora_fl.config import FEDERATION_FILE, ConfigError, Federation, federation_text
from bora_fl.deployment.certificates import make_server, make_site
from bora_fl.deployment.doctor import machine
from bora_fl.deployment.doctor.examination import Setup, connection, examine, split
from bora_fl.deployment.doctor.worker import check_worker
from bora_fl.planning.memory import Estimate
from tests.client.worker.in_process import serving


def test_a_machine_where_all_is_well(tiny_config, tmp_path: Path):
    authority, _, certificate, key, secret = make_server(tmp_path / "server", ["localhost"])
    site_key = make_site(tmp_path / "site", "a")[0]
    setup = Setup(
        "all",
        tiny_config,
        authority=authority,
        certificate=certificate,
        key=key,
        site_key=site_key,
        secret=secret,
        database=tmp_path / "state.db",
    )
    findings = list(examine(setup))
    assert not [finding for finding in findings if finding.level == "fail"]
    assert len(findings) > 12


def test_a_server_is_not_asked_for_what_only_a_site_has(tiny_config, tmp_path: Path):
    site_key = tmp_path / "none.key"
    subjects = {f.subject.split()[0] for f in examine(Setup("server", tiny_config, site_key=site_key))}
    assert {"results", "strategy"} <= subjects
    assert not subjects & {"cache", "memory", str(site_key)}


def test_a_sites_memory_is_compared_with_two_sequences_for_each_pair(
    tiny_config, tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "the film was", "chosen": "good", "rejected": "bad"}\n' * 40)
    pairs = {
        "model.name": str(tiny_causal),
        "model.task": "causal-lm",
        "adapter.target-modules": "q_proj,v_proj",
        "data.name": str(rows),
        "data.test-split": "",
        "data.partition": "iid",
    }
    counted = []
    known = machine.estimate

    def counting(*given: Any) -> Estimate:
        found = known(*given)
        counted.append(found.batch)
        return found

    monkeypatch.setattr(machine, "estimate", counting)
    findings = list(examine(Setup("site", tiny_config | pairs)))
    assert counted == [2 * tiny_config["train.batch-size"]]
    told = [finding.text for finding in findings if finding.subject.startswith("memory of")]
    assert ["training takes about" in text for text in told] == [True]


def test_a_site_without_a_policy_is_warned(tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("BORA_FL_POLICY", raising=False)
    policies = [f for f in examine(Setup("site", tiny_config)) if f.subject.startswith("policy")]
    assert [f.level for f in policies] == ["warn"]
    assert not [f for f in examine(Setup("server", tiny_config)) if f.subject.startswith("policy")]


def test_the_servers_files_that_others_read_are_warned_of(tiny_config, tmp_path: Path):
    database, metrics = tmp_path / "state.db", Path(tiny_config["run.output-dir"]) / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    for path in (database, metrics):
        path.touch(0o644)
        path.chmod(0o644)
    warned = {f.subject for f in examine(Setup("server", tiny_config, database=database)) if f.level == "warn"}
    assert {str(database), str(metrics)} <= warned


def test_a_worker_is_asked(tmp_path: Path):
    settings = WorkerSettings(Address(path=tmp_path / "sockets" / "worker.sock"), wait=1.0)
    missing = check_worker(settings)
    assert (missing.level, "there is no such socket" in missing.text) == ("fail", True)
    with serving(settings):
        assert check_worker(settings).level == "pass"


def test_a_worker_of_another_version_would_refuse_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = WorkerSettings(Address(path=tmp_path / "sockets" / "worker.sock"), wait=5.0)
    monkeypatch.setattr("bora_fl.deployment.doctor.worker.__version__", "9.9.9")
    with serving(settings):
        found = check_worker(settings)
    assert (found.level, "9.9.9" in found.text) == ("fail", True)


def test_the_command_fails_where_a_run_would(tiny_config):
    pairs = [part for key, value in tiny_config.items() for part in ("-c", f"{key}={value}")]
    good = CliRunner().invoke(cli, ["doctor", "--role", "server", *pairs])
    assert good.exit_code == 0, good.output
    bad = CliRunner().invoke(cli, ["doctor", "--role", "server", *pairs, "-c", "data.text-column=txt"])
    assert bad.exit_code == 1
    assert "fail  data" in bad.output


def test_the_command_examines_the_run_of_the_folder(tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path(FEDERATION_FILE).write_text(federation_text(Federation(2, "", tiny_config | {"data.text-column": "txt"})))
    bad = CliRunner().invoke(cli, ["doctor", "--role", "server"])
    assert FEDERATION_FILE in bad.output
    assert f"data {tiny_config['data.name']}: data.text-column = 'txt'" in bad.output
    good = CliRunner().invoke(cli, ["doctor", "--role", "server", "-c", "data.text-column=text"])
    assert good.exit_code == 0, good.output


def test_a_connection_of_flowers_config(tmp_path: Path):
    config = tmp_path / "config.toml"
    config.write_text('[superlink.hospitals]\naddress = "fed:8443"\nroot-certificates = "/etc/ca.crt"\n')
    assert connection("hospitals", config) == ("fed:8443", Path("/etc/ca.crt"))
    with pytest.raises(ConfigError, match="banks"):
        connection("banks", config)


@pytest.mark.parametrize("address", ["server", "server:", "server:port", ":8443", "server:99999"])
def test_an_address_that_is_none(address: str):
    with pytest.raises(ConfigError, match="host:port"):
        split(address)
