"""The app that is run where the working folder has none."""

import importlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from packaging.requirements import Requirement

from bora_fl.config import ConfigError, Settings, parse
from bora_fl.deployment import flower_app
from bora_fl.deployment.flower_app import COMPONENTS, TABLE, stage
from bora_fl.testing import check

ROOT = Path(__file__).resolve().parents[2]
LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import bora_fl.kernels.reference, bora_fl.simulations.engine
from bora_fl.client.app import app as client
from bora_fl.server.app import app as server
print(bora_fl.kernels.reference.__file__)
"""


def test_the_installed_package_makes_a_bundle_that_flower_takes_and_python_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    app = stage(Path(), tmp_path)
    project = tomllib.loads((app / "pyproject.toml").read_text())
    groups = project["tool"]["flwr"]["app"].pop("config")
    assert {f"{group}.{key}": v for group, keys in groups.items() for key, v in keys.items()} == Settings().flat()
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    repository.pop("config")
    assert project["tool"]["flwr"]["app"] == repository == {**TABLE, "components": COMPONENTS}
    (tmp_path / "app.fab").write_bytes(build_fab_from_disk(app))
    bundle = tmp_path / "bundle"
    zipfile.ZipFile(tmp_path / "app.fab").extractall(bundle)
    command = [sys.executable, "-P", "-c", LOAD, str(bundle)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(bundle / "bora_fl" / "kernels" / "reference.py")


def test_a_folder_s_own_app_is_staged_as_it_is(tmp_path: Path):
    app = stage(ROOT, tmp_path)
    assert (app / "pyproject.toml").read_text() == (ROOT / "pyproject.toml").read_text()
    assert (app / "kernels" / "reference.py").is_file()


def test_a_folder_that_is_named_and_holds_no_app_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--app .*tool\.flwr\.app"):
        stage(tmp_path, tmp_path / "into")


def test_requirements_of_extras_are_left_out():
    assert flower_app._is_extra('gguf>=0.10; extra == "gguf"')
    assert not flower_app._is_extra("torch>=2.6")
    assert not flower_app._is_extra('triton>=3; platform_system == "Linux"')


def test_the_template_is_an_app_that_flower_builds_and_its_settings_and_strategy_are_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "app.fab").write_bytes(build_fab_from_disk(ROOT / "deploy" / "flower-app"))
    zipfile.ZipFile(tmp_path / "app.fab").extractall(tmp_path / "bundle")
    monkeypatch.syspath_prepend(tmp_path / "bundle")
    project = tomllib.loads((tmp_path / "bundle" / "pyproject.toml").read_text())
    ours = Requirement(project["project"]["dependencies"][0])
    assert (ours.name, ours.extras) == ("bora-fl", {"simulation", "ray"})  # `flwr run` simulates with Ray
    app = project["tool"]["flwr"]["app"]
    settings = parse({f"{group}.{key}": value for group, keys in app["config"].items() for key, value in keys.items()})
    check(settings.strategy.name, "only_the_ratio_of_weights_matters")
    apps = importlib.import_module("finetuning.apps")
    assert app["components"] == {"serverapp": "finetuning.apps:server", "clientapp": "finetuning.apps:client"}
    assert (apps.client.__class__.__name__, apps.server.__class__.__name__) == ("ClientApp", "ServerApp")
