"""What is imported is declared, and what is declared is imported."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("bora_fl", "kernels", "simulations")
# Modules that go by another name than the distribution they come in.
DISTRIBUTIONS = {
    "flwr_datasets": "flwr-datasets",
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "ray": "flwr[simulation]",
    "mlflow": "mlflow-skinny",
}


def imported() -> dict[str, str]:
    """Distributions, each with a file that imports it."""
    found: dict[str, str] = {}
    for path in sorted(path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.append(node.module)
            for name in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"bora_fl"}:
                found.setdefault(DISTRIBUTIONS.get(name, name), str(path.relative_to(ROOT)))
    return found


def declared(requirements: list[str]) -> set[str]:
    """Names of distributions, and of their extras as ``name[extra]``."""
    parsed = [Requirement(text) for text in requirements]
    return {row.name for row in parsed} | {f"{row.name}[{extra}]" for row in parsed for extra in row.extras}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_imported_is_declared(project: dict):
    extras = {
        name
        for group in ("simulation", "triton", "gguf", "tracking")
        for name in declared(project["optional-dependencies"][group])
    }
    known = declared(project["dependencies"]) | extras
    assert {name: path for name, path in imported().items() if name not in known} == {}


def test_what_is_required_is_imported(project: dict):
    assert declared(project["dependencies"]) - imported().keys() == set()


def test_the_extra_named_all_is_all_that_shipped_code_can_use(project: dict):
    (whole,) = (Requirement(text) for text in project["optional-dependencies"]["all"])
    assert whole.extras == project["optional-dependencies"].keys() - {"all", "test", "dev"}


def test_shipped_code_imports_no_test_tool():
    tools = {"pytest", "hypothesis", "unittest", "parameterized", "sklearn"}
    for folder in SHIPPED:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {name.partition(".")[0] for name in names} & tools, path
