from pathlib import Path

import pytest
from typer.testing import CliRunner

from bora_fl.certificates import make_server, make_site
from bora_fl.cli import cli
from bora_fl.config import ConfigError
from bora_fl.doctor.examination import Setup, connection, examine, split


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
    assert "results" in subjects
    assert not subjects & {"cache", "memory", str(site_key)}


def test_the_command_fails_where_a_run_would(tiny_config):
    pairs = [part for key, value in tiny_config.items() for part in ("-c", f"{key}={value}")]
    good = CliRunner().invoke(cli, ["doctor", "--role", "server", *pairs])
    assert good.exit_code == 0, good.output
    bad = CliRunner().invoke(cli, ["doctor", "--role", "server", *pairs, "-c", "data.text-column=txt"])
    assert bad.exit_code == 1
    assert "fail  data" in bad.output


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
