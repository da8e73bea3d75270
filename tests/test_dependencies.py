"""What is imported is declared, what is declared imported, and what all need imports nothing that an extra brings."""

import ast
import contextlib
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bora_fl.cli import COMMANDS
from bora_fl.config import ConfigError, Settings, extras, parse
from bora_fl.deployment.doctor.preflight import preflight
from bora_fl.server.run import Server
from bora_fl.simulations.launch import Simulation
from bora_fl.simulations.launch import run as run_simulation

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("bora_fl", "kernels", "simulations")
# Modules that go by another name than the distribution they come in.
DISTRIBUTIONS = {
    "flwr_datasets": "flwr-datasets",
    "google": "protobuf",
    "lm_eval": "lm-eval",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "ray": "flwr[simulation]",
    "mlflow": "mlflow-skinny",
    "huggingface_hub": "huggingface-hub",
}
UNPINNED = {"bora-fl", "triton"}  # PyPI's torch asks for one version of triton, and its builds for CPUs for none
NOT_SHIPPED = {"all", "test", "dev", "docs"}
# What starts without any extra: both apps, the commands, the functions of `import bora_fl`.
CORE = ("bora_fl.client.app", "bora_fl.client.job", "bora_fl.server.app", "bora_fl.cli", "bora_fl.api")


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """Modules that a file imports, as far as their names tell, and whether it does so when it is itself imported."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and not child.level:
                yield from ((f"{child.module}.{alias.name}", at_once) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = module_of(path).rsplit(".", child.level - (path.name == "__init__.py"))[0]
                yield f"{package}.{child.module}", at_once
            elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
                yield from visit(child, at_once and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return tuple(visit(ast.parse(path.read_text()), True))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "bora_fl" else ("bora_fl", *parts)).removesuffix(".__init__")


@cache
def files() -> dict[str, Path]:
    return {module_of(path): path for folder in SHIPPED for path in sorted((ROOT / folder).rglob("*.py"))}


def imported() -> dict[str, str]:
    """Distributions, each with a file that imports it."""
    found: dict[str, str] = {}
    for path in files().values():
        for name in {module.partition(".")[0] for module, _ in imports(path)} - sys.stdlib_module_names - {"bora_fl"}:
            found.setdefault(DISTRIBUTIONS.get(name, name), str(path.relative_to(ROOT)))
    return found


def reached(start: str) -> dict[str, str]:
    """Modules of others that are imported as soon as one of ours is, each with the file that does it."""
    found: dict[str, str] = {}
    todo, seen = [start], set()
    while todo:
        name = todo.pop()
        while name and name not in files():
            name = name.rpartition(".")[0]
        if not name or name in seen:
            continue
        seen.add(name)
        todo.append(name.rpartition(".")[0])
        for module, at_once in imports(files()[name]):
            if at_once and module.startswith("bora_fl"):
                todo.append(module)
            elif at_once:
                found.setdefault(module.partition(".")[0], name)
    return found


def declared(requirements: list[str]) -> set[str]:
    """Names of distributions, and of their extras as ``name[extra]``."""
    parsed = [Requirement(text) for text in requirements]
    return {row.name for row in parsed} | {f"{row.name}[{extra}]" for row in parsed for extra in row.extras}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_imported_is_declared(project: dict):
    optional = {name: declared(rows) for name, rows in project["optional-dependencies"].items()}
    known = declared(project["dependencies"]).union(*(optional[name] for name in extras.EXTRAS))
    assert {name: path for name, path in imported().items() if name not in known} == {}


def test_what_is_required_is_imported(project: dict):
    assert declared(project["dependencies"]) - imported().keys() == set()


def test_no_extra_is_required(project: dict):
    optional = {module for modules in extras.EXTRAS.values() for module in modules}
    assert not declared(project["dependencies"]) & {DISTRIBUTIONS.get(name, name) for name in optional}


@pytest.mark.parametrize("start", [*CORE, *(f"{module}.command" for module, _ in COMMANDS.values())])
def test_what_starts_without_an_extra_imports_none_of_them(start: str):
    optional = {module for modules in extras.EXTRAS.values() for module in modules} - {"triton"}
    assert start in files()
    assert {name: where for name, where in reached(start).items() if name in optional} == {}


def test_each_extra_brings_the_modules_that_are_looked_for(project: dict):
    optional = project["optional-dependencies"]
    for extra, modules in extras.EXTRAS.items():
        names = {name.partition("-skinny")[0].replace("-", "_") for name in declared(optional[extra])}
        assert names >= {"flwr[simulation]" if module == "ray" else module for module in modules}, extra
    (whole,) = (Requirement(text) for text in optional["all"])
    assert whole.extras == optional.keys() - NOT_SHIPPED == extras.EXTRAS.keys()


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        ("opacus", {"privacy.mode": "record", "strategy.weighting": "uniform"}, "privacy.mode = 'record'"),
        ("flwr_datasets", {"data.partition": "iid"}, "data.partition = 'iid'"),
    ],
)
def test_a_run_that_needs_an_extra_names_it_at_once(module, settings, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    extra = {"opacus": "privacy", "flwr_datasets": "simulation"}[module]
    with pytest.raises(ConfigError) as caught:
        Server(parse(settings))
    assert str(caught.value) == f'{message}: {module} is not installed; run `pip install "bora-fl[{extra}]"`'
    extras.require_for(Settings.model_validate({"data": {"partition": "local"}}))


def test_a_run_whose_models_package_is_missing_says_so_before_it_reads_data(monkeypatch, tmp_path):
    monkeypatch.setitem(extras.MODELS, "embedded:minilm", ("no_such_package", "model", "no-such-package==1.0"))
    message = "model.name = 'embedded:minilm': its package is missing; run `pip install --no-deps no-such-package==1.0`"
    config = {"data.name": "nowhere.csv", "run.output-dir": str(tmp_path / "run")}
    for begin in (
        lambda: run_simulation(ROOT, config, Simulation(2)),
        lambda: preflight(parse(config)),
        lambda: Server(parse(config)),
    ):
        with pytest.raises(ConfigError) as caught:
            begin()
        assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


def test_a_library_that_is_missed_anywhere_is_explained():
    assert extras.explain(ModuleNotFoundError(name="opacus.grad_sample")) == (
        'opacus is not installed; run `pip install "bora-fl[privacy]"`'
    )
    assert extras.explain(ModuleNotFoundError(name="nonsense")) is None


def test_shipped_code_imports_no_test_tool():
    tools = {"pytest", "hypothesis", "unittest", "parameterized", "sklearn"}
    assert not imported().keys() & tools


def test_the_constraints_pin_all_that_any_extra_brings(project: dict):
    """`make test` installs every extra with them, which fails where two pins exclude each other."""
    rows = [row for row in (ROOT / "constraints.txt").read_text().splitlines() if not row.startswith("#")]
    pins = {canonicalize_name(row.name): row.specifier for row in map(Requirement, rows)}
    asked = [*project["dependencies"], *(row for rows in project["optional-dependencies"].values() for row in rows)]
    todo, seen = [("bora-fl", row, "") for row in asked], set()
    while todo:
        by, text, extra = todo.pop()
        row = Requirement(text)
        name = canonicalize_name(row.name)
        if (row.marker and not row.marker.evaluate({"extra": extra})) or (text, extra) in seen or name in UNPINNED:
            continue
        seen.add((text, extra))
        assert name in pins, f"{by} needs {text}: constraints.txt does not pin it"
        (pin,) = pins[name]
        assert row.specifier.contains(pin.version, prereleases=True), f"{by} needs {text}, constraints.txt has {pin}"
        with contextlib.suppress(PackageNotFoundError):
            if pin.version == version(name).partition("+")[0]:
                todo += [(name, needed, wanted) for needed in requires(name) or () for wanted in ("", *row.extras)]
