from pathlib import Path

import pytest
from typer.testing import CliRunner

from bora_fl.cli import cli
from bora_fl.client.init import policy_text
from bora_fl.config import ConfigError
from bora_fl.deployment.doctor.policy import check_policy
from bora_fl.privacy.policy import VARIABLE, SitePolicy, read_policy

CHOSEN = {"data-set": "reviews", "data-path": '/srv/a "b" 📁.parquet', "models": ["m@1", "n"]}
OPTIONS = ["--data-set", "reviews", "--data", "/srv/a.parquet", "--model", "m@1", "--model", "n"]


def test_the_file_says_what_was_chosen_and_names_every_other_key_with_its_default(tmp_path: Path):
    file = tmp_path / "policy.toml"
    file.write_text(policy_text(CHOSEN))
    assert read_policy(file) == SitePolicy.model_validate(CHOSEN)
    lines = file.read_text().splitlines()
    for name, info in SitePolicy.model_fields.items():
        key = name.replace("_", "-")
        assert any(line.removeprefix("# ").startswith((f"{key} =", f"[{key}]")) for line in lines), key
        assert f"# {info.description}" in lines


def test_the_command_writes_for_its_owner_alone_and_never_over_a_file(tmp_path: Path):
    file = tmp_path / "policy.toml"
    command = ["init", "site", *OPTIONS, "--mode", "local", "--into", str(file)]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert str(file) in result.output
    assert file.stat().st_mode & 0o777 == 0o600
    assert (read_policy(file).modes, read_policy(file).models) == (["local"], ["m@1", "n"])
    assert isinstance(CliRunner().invoke(cli, command).exception, ConfigError)
    assert read_policy(file).modes == ["local"]


def test_a_policy_that_could_not_be_used_is_not_left_behind(tmp_path: Path):
    file = tmp_path / "policy.toml"
    result = CliRunner().invoke(cli, ["init", "site", *OPTIONS, "--mode", "recrd", "--into", str(file)])
    assert isinstance(result.exception, ConfigError)
    assert not file.exists()


def test_a_folder_that_is_missing_is_named(tmp_path: Path):
    result = CliRunner().invoke(cli, ["init", "site", *OPTIONS, "--into", str(tmp_path / "no" / "policy.toml")])
    assert isinstance(result.exception, ConfigError)
    assert "--into" in str(result.exception)


def test_a_worker_with_a_malformed_policy_does_not_start(tmp_path: Path):
    file = tmp_path / "policy.toml"
    file.write_text("")
    result = CliRunner().invoke(cli, ["worker", "--policy", str(file), "--listen", f"unix:{tmp_path}/w/s"])
    assert isinstance(result.exception, ConfigError)
    assert "data-set" in str(result.exception)


def test_the_doctor_warns_of_none_and_fails_one_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert check_policy(None).level == "warn"
    assert check_policy(tmp_path / "missing").level == "fail"
    file = tmp_path / "policy.toml"
    file.write_text(policy_text(CHOSEN))
    monkeypatch.setenv(VARIABLE, str(file))
    assert check_policy(None).level == check_policy(file).level == "pass"
