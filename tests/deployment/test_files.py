"""The deployment kit, checked without an engine: every command line against the programs' own help."""

import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
import yaml

from bora_fl.deployment.certificates import make_server, make_site
from bora_fl.deployment.launch import stage, tool

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "deploy"
UNITS = sorted((KIT / "systemd").glob("*.service"))
SERVICES = yaml.safe_load((KIT / "compose.yaml").read_text())["services"]
SECRET_FILES = {"server.key", "superexec.secret", "site.key"}


@cache
def options(*program: str) -> set[str]:
    """The long options that a program's help names."""
    command = [tool(program[0]), *program[1:], "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return set(re.findall(r"--[a-z][a-z-]+", text))


def words(unit: Path) -> list[str]:
    """The command of a unit, its lines joined."""
    text = unit.read_text().replace("\\\n", " ")
    return re.search(r"^ExecStart=(.*)$", text, re.MULTILINE).group(1).split()


def check_options(command: list[str]) -> None:
    program = [Path(command[0]).name] + ([command[1]] if Path(command[0]).name == "bora-fl" else [])
    given = {word.partition("=")[0] for word in command if word.startswith("--")}
    assert given, command
    assert given <= options(*program)


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.stem)
def test_units_use_options_that_exist(unit: Path):
    check_options(words(unit))


@pytest.mark.parametrize("name", SERVICES)
def test_compose_services_use_options_that_exist(name: str):
    check_options(SERVICES[name]["command"])


def test_there_is_a_unit_and_a_service_for_every_process():
    programs = {"superlink", "serverapp", "supernode", "clientapp", "worker"}
    assert {unit.stem.removeprefix("bora-fl-") for unit in UNITS} == programs == set(SERVICES)
    for name, service in SERVICES.items():
        unit = words(KIT / "systemd" / f"bora-fl-{name}.service")
        flat = {word.partition("=")[0] for word in unit if word.startswith("--")}
        assert flat == {word.partition("=")[0] for word in service["command"] if word.startswith("--")}


@pytest.mark.parametrize("name", ["superlink", "supernode"])
def test_the_kit_turns_every_protection_on(name: str):
    command = " ".join(words(KIT / "systemd" / f"bora-fl-{name}.service"))
    assert "--isolation process" in command
    assert "--superexec-auth-secret-file" in command
    assert "--insecure" not in command
    assert ("--enable-supernode-auth" in command) == (name == "superlink")
    assert ("--auth-supernode-private-key" in command) == (name == "supernode")


def test_compose_pins_images_and_reads_secrets_from_files():
    compose = yaml.safe_load((KIT / "compose.yaml").read_text())
    for service in SERVICES.values():
        assert re.search(r":\d+\.\d+\.\d+$", service["image"])
        assert "environment" not in service
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        used = {part.rpartition("/")[2] for word in service["command"] if (part := word) and "/run/secrets/" in word}
        assert used == set(service.get("secrets", []))
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+-", (KIT / "Dockerfile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.stem)
def test_units_hand_secrets_over_as_credentials(unit: Path):
    text = unit.read_text()
    for name in SECRET_FILES:
        if name in " ".join(words(unit)):
            assert f"LoadCredential={name}:/etc/bora-fl/{name}" in text
            assert f"%d/{name}" in text
    assert "User=bora-fl" in text


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_accepts_the_units(tmp_path: Path):
    for unit in UNITS:
        text = unit.read_text().replace("/opt/bora-fl/bin/", f"{Path(sys.executable).parent}/")
        (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", *(str(path) for path in tmp_path.glob("*.service"))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not [line for line in result.stderr.splitlines() if str(tmp_path) in line or "bora-fl-" in line]


def test_no_secret_gets_into_a_bundle(tmp_path: Path):
    app = stage(ROOT, tmp_path)
    made = [*make_server(app / "certificates", ["localhost"]), *make_site(app / "deploy", "berlin")]
    subprocess.run([tool("flwr"), "build", "--app", str(app)], cwd=tmp_path, check=True, capture_output=True)
    (bundle,) = tmp_path.glob("*.fab")
    staged = stage(app, tmp_path / "again")
    with zipfile.ZipFile(bundle) as file:
        inside = {name: file.read(name) for name in file.namelist()}
    inside |= {str(path): path.read_bytes() for path in staged.rglob("*") if path.is_file()}
    assert "bora_fl/server/app.py" in inside
    assert not [name for name in inside if Path(name).name in {path.name for path in made}]
    secrets = [path.read_bytes() for path in made if path.suffix not in {".crt", ".pem", ".pub"}]
    assert not [name for name, content in inside.items() if any(secret in content for secret in secrets)]
