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

from bora_fl.deployment.certificates import make_client, make_server, make_site, sign
from bora_fl.deployment.flower_app import stage
from bora_fl.deployment.processes import tool
from tests.deployment.page import Unit, blocks, environment_file

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "deploy"
UNITS = sorted((KIT / "systemd").glob("*.service"))
SERVICES = yaml.safe_load((KIT / "compose.yaml").read_text())["services"]
PAGE = (ROOT / "docs" / "deployment.md").read_text()
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")
PROXIES = {"fleet", "control", "uplink"}
# What each place has in /etc/bora-fl when its units start, by the page.
INSTALLED = {
    "server": ("superlink", "serverapp", "fleet", "control"),
    "site": ("uplink", "worker", "supernode", "clientapp"),
}


def unit(name: str) -> Unit:
    return Unit.read(KIT / "systemd" / f"bora-fl-{name}.service")


@cache
def options(*program: str) -> set[str]:
    """The long options that a program's help names."""
    command = [tool(program[0]), *program[1:], "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return set(re.findall(r"--[a-z][a-z-]+", text))


def words(name: str) -> list[str]:
    """The command of a unit."""
    return unit(name).one("ExecStart").split()


def every(key: str) -> list[str]:
    """A key's values in all units."""
    return [value for path in UNITS for value in Unit.read(path).every(key)]


def check_options(command: list[str]) -> None:
    program = [Path(command[0]).name] + ([command[1]] if Path(command[0]).name == "bora-fl" else [])
    given = {word.partition("=")[0] for word in command if word.startswith("--")}
    assert given, command
    assert given <= options(*program)


@pytest.mark.parametrize("name", sorted(set(SERVICES) - PROXIES))
def test_units_use_options_that_exist(name: str):
    check_options(words(name))


@pytest.mark.parametrize("name", sorted(set(SERVICES) - PROXIES))
def test_compose_services_use_options_that_exist(name: str):
    check_options(SERVICES[name]["command"])


def test_there_is_a_unit_and_a_service_for_every_process():
    programs = {name for names in INSTALLED.values() for name in names}
    assert {path.stem.removeprefix("bora-fl-") for path in UNITS} == programs == set(SERVICES)
    for name, service in SERVICES.items():
        flat = {word.partition("=")[0] for word in words(name) if word.startswith("-")}
        assert flat == {word.partition("=")[0] for word in service["command"] if word.startswith("-")}


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_and_its_container_are_given_the_same_files(name: str):
    given = {entry.partition(":")[0] for entry in unit(name).every("LoadCredential")}
    assert given == set(SERVICES[name].get("secrets", ()))
    options = {word for word in " ".join(words(name)).replace("=", " ").split() if not word.startswith(("%d", "-"))}
    fixed = {word for word in options if re.fullmatch(r"[\w.]+:\d+|127[\d.]+|\d{4}", word)}
    assert fixed <= set(" ".join(SERVICES[name]["command"]).replace("=", " ").split())


@pytest.mark.parametrize("place", INSTALLED)
def test_page_commands_and_units_are_one_set(place: str, tmp_path: Path):
    """Every file that a unit reads is one that the page's commands leave in /etc/bora-fl, and each unit is enabled."""
    if place == "server":
        made = make_server(tmp_path, ["localhost"])
    else:
        made = [*make_site(tmp_path, "berlin"), *make_client(tmp_path, "berlin")]
    there = {path.name for path in made} | {path.name for path in KIT.glob("nginx/*.conf")} | {f"{place}.env"}
    commands = "\n".join(block for where, block in blocks(PAGE) if place in where)
    there |= set(re.findall(r"(?:scp \S+|--into) /etc/bora-fl/(\S+)", commands))
    for name in INSTALLED[place]:
        for entry in unit(name).every("LoadCredential"):
            identity, _, path = entry.partition(":")
            assert path == f"/etc/bora-fl/{identity}"
            assert identity in there, (name, identity)
        assert {path.removeprefix("/etc/bora-fl/") for path in unit(name).every("EnvironmentFile")} <= there
        assert re.search(rf"systemctl enable --now .*\bbora-fl-{name}\b", commands)
    assert f"cp deploy/{place}.env /etc/bora-fl/" in commands


def test_the_page_names_no_path_that_the_units_do_not_know():
    writable = {f"/var/lib/{name}" for name in every("StateDirectory")}
    sockets = {f"/run/{name}" for name in every("RuntimeDirectory")}
    assert set(re.findall(r"/var/lib/[\w-]+", PAGE)) <= writable
    assert set(re.findall(r"/run/[\w-]+", PAGE)) <= sockets
    for folder in re.findall(r"run\.output-dir=(/\S+)", PAGE):
        assert any(folder.startswith(f"{known}/") for known in writable)  # ProtectSystem=strict
    assert set(every("User")) == set(re.findall(r"useradd .* ([\w-]+)$", PAGE, re.MULTILINE))
    assert "install -d -m 0755 /etc/bora-fl" in PAGE  # ca.crt is for whoever submits runs


@pytest.mark.parametrize("place", INSTALLED)
def test_services_write_where_they_may(place: str):
    environment = environment_file(KIT / f"{place}.env")
    image = (KIT / "Dockerfile").read_text()
    for key in ("FLWR_HOME", "BORA_FL_CACHE", "BORA_FL_STATE", "HF_HOME"):
        assert environment[key].startswith("/var/lib/bora-fl/")
        assert f"{key}={environment[key]}" in image
    for name in set(INSTALLED[place]) - PROXIES:
        assert unit(name).one("StateDirectory") == "bora-fl"
        assert (unit(name).one("StateDirectoryMode"), unit(name).one("UMask")) == ("0700", "0077")
        assert unit(name).one("WorkingDirectory") == "/var/lib/bora-fl"


def test_the_network_sees_the_proxies_alone():
    for name in INSTALLED["server"] + INSTALLED["site"]:
        listening = re.findall(r"--host[ =](\S+)", " ".join(words(name)))
        assert set(listening) <= {"127.0.0.1"}
    doors = {path.stem: re.findall(r"listen (\S+) ssl;", path.read_text()) for path in KIT.glob("nginx/*.conf")}
    assert {name: door for name, door in doors.items() if door} == {
        "fleet": ["8443"],
        "control": ["8444"],
        "uplink": ["127.0.0.1:9443"],
    }


def test_the_fleet_proxy_passes_what_a_supernode_asks():
    """The methods of its client that a registered node calls, and no other."""
    from flwr.supernode import fleet_http_client

    known = set(re.findall(r'"/v1/fleet/([a-z-]+)"', Path(fleet_http_client.__file__).read_text()))
    passed = re.search(r"<method>([a-z|-]+)\)", (KIT / "nginx" / "fleet.conf").read_text())[1].split("|")
    assert set(passed) == known - {"register-node", "unregister-node"}


@pytest.mark.skipif(not NGINX, reason="nginx is not installed")
@pytest.mark.parametrize("name", sorted(PROXIES))
def test_nginx_accepts_the_configurations(name: str, tmp_path: Path):
    make_server(tmp_path, ["localhost"])
    make_client(tmp_path, "berlin")
    sign(tmp_path / "berlin.csr", "site", tmp_path).rename(tmp_path / "client.crt")
    for path in KIT.glob("nginx/*.conf"):
        (tmp_path / path.name).write_text(path.read_text().replace("server.example.org", "localhost"))
    command = [NGINX, "-t", "-q", "-e", "stderr", "-p", str(tmp_path), "-c", str(tmp_path / f"{name}.conf")]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("name", ["superlink", "supernode"])
def test_the_kit_turns_every_protection_on(name: str):
    command = " ".join(words(name))
    assert "--isolation process" in command
    assert "--superexec-auth-secret-file" in command
    assert "--insecure" not in command
    assert ("--enable-supernode-auth" in command) == (name == "superlink")
    assert ("--auth-supernode-private-key" in command) == (name == "supernode")


def test_compose_pins_images_and_reads_secrets_from_files():
    compose = yaml.safe_load((KIT / "compose.yaml").read_text())
    for service in SERVICES.values():
        assert re.search(r":\d+\.\d+\.\d+$", service["image"])
        assert set(service.get("environment", ())) <= {"BORA_FL_POLICY"}
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        text = " ".join([*service["command"], *service.get("environment", {}).values()])
        used = set(re.findall(r"/run/secrets/(\S+)", text))
        assert used <= set(service.get("secrets", []))
        if service["image"].startswith("bora-fl"):
            assert used == set(service.get("secrets", []))
    assert all(set(secret) == {"file"} for secret in compose["secrets"].values())
    image = (KIT / "Dockerfile").read_text()
    assert re.search(r"^FROM \S+:\d+\.\d+\.\d+-", image, re.MULTILINE)


def test_the_image_is_built_for_cpus_and_for_gpus_and_is_neither_root_nor_has_a_compiler():
    image = (KIT / "Dockerfile").read_text()
    assert re.search(r"^ARG TORCH=cpu$", image, re.MULTILINE)
    assert "--extra-index-url https://download.pytorch.org/whl/${TORCH} " in image
    assert re.findall(r"--build-arg (\w+)=cu\d+ ", image) == ["TORCH"]
    assert image.index("USER bora-fl") < image.rindex("ENV ")
    assert not re.search(r"^USER root|apt-get|\bgcc\b", image, re.MULTILINE)


@pytest.mark.parametrize("name", SERVICES)
def test_units_read_nothing_of_root_but_credentials(name: str):
    read = " ".join([*words(name), *unit(name).every("Environment")])
    assert "/etc/bora-fl" not in read
    given = {entry.partition(":")[0] for entry in unit(name).every("LoadCredential")}
    assert set(re.findall(r"%d/(\S+)", read)) <= given
    assert unit(name).every("User") == ["bora-fl"] or unit(name).every("DynamicUser") == ["yes"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_accepts_the_units(tmp_path: Path):
    for unit in UNITS:
        text = unit.read_text().replace("/opt/bora-fl/bin/", f"{Path(sys.executable).parent}/")
        (tmp_path / unit.name).write_text(text if NGINX else text.replace("/usr/sbin/nginx", sys.executable))
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
