import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.prepare import hugging_face_kernels

ROOT = Path(__file__).resolve().parents[1]

# A module may import its own level and those before it.
LEVELS = [
    {"kernels", "seeds", "paths", "granted", "quiet"},
    {"blocks", "adapters"},
    {"state", "config", "preload"},
    {"device", "data"},
    {"wire", "privacy", "models", "evaluate", "heads"},
    {"report", "tracking"},
    {"client", "strategies"},
    {"server"},
    {"planning"},
    {"deployment"},
    {"exporting", "hub", "page", "predicting", "testing", "chat", "evaluating"},
    {"simulations", "cli", "api"},
]
FLOWER = {
    "bora_fl/wire/masked.py",
    "bora_fl/wire/records.py",
    "bora_fl/wire/release.py",
    "bora_fl/wire/replies.py",
    "bora_fl/wire/schema.py",
    "bora_fl/client/app.py",
    "bora_fl/deployment/doctor/registration.py",
    "bora_fl/client/bridge.py",
    "bora_fl/client/head.py",
    "bora_fl/client/leaving.py",
    "bora_fl/client/lost.py",
    "bora_fl/client/moments.py",
    "bora_fl/client/processes.py",
    "bora_fl/client/job.py",
    "bora_fl/client/refusing.py",
    "bora_fl/client/worker/pieces.py",
    "bora_fl/client/worker/servicer.py",
    "bora_fl/client/worker/stub.py",
    "bora_fl/client/round.py",
    "bora_fl/client/secure_aggregation.py",
    "bora_fl/strategies/arrivals.py",
    "bora_fl/strategies/base.py",
    "bora_fl/strategies/rounds.py",
    "bora_fl/strategies/downlink.py",
    "bora_fl/strategies/exchange.py",
    "bora_fl/strategies/head.py",
    "bora_fl/strategies/intake.py",
    "bora_fl/strategies/nodes.py",
    "bora_fl/strategies/observer.py",
    "bora_fl/strategies/secure_aggregation.py",
    "bora_fl/server/app.py",
    "bora_fl/server/run.py",
    "simulations/engine.py",
    "simulations/parallel.py",
    "simulations/process.py",
    "simulations/ray_backend.py",
    "simulations/attacks/clients.py",
    "simulations/benchmarks/wire.py",
    "simulations/faults/replies.py",
}


def sources() -> list[Path]:
    return [p for top in ("bora_fl", "kernels", "simulations") for p in sorted((ROOT / top).rglob("*.py"))]


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "bora_fl" else (parts[1] if len(parts) > 1 else "")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    here = room(path)
    if here == "__init__":
        return
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("bora_fl.") and name.count(".") >= 1}
    ours -= {"__version__"}
    upward = {name for name in ours if level(name) > level(here)}
    assert not upward
    if here == "client":
        assert "strategies" not in ours
    if here == "strategies":
        assert not ours & {"client", "models"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_seams_know_flower(path: Path):
    if any(name.split(".")[0] == "flwr" for name in imported(path)):
        assert str(path.relative_to(ROOT)) in FLOWER


LOAD_LLAMA = """
import bora_fl.kernels.reference, bora_fl.simulations.engine, sys
import kernels
assert "hugging" in (kernels.__doc__ or "").lower() or hasattr(kernels, "get_kernel"), kernels
import transformers.models.llama.modeling_llama as llama
from transformers import LlamaConfig
llama.LlamaModel(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=1, num_key_value_heads=1))
print(bora_fl.kernels.reference.__file__)
"""


@pytest.mark.parametrize("kind", ["checkout", "bundle"])
def test_lives_beside_hugging_face_kernels(kind: str, tmp_path: Path):
    root = ROOT
    if kind == "bundle":
        from flwr.cli.build import build_fab_from_disk

        (tmp_path / "app.fab").write_bytes(build_fab_from_disk(ROOT))
        root = tmp_path / "app"
        zipfile.ZipFile(tmp_path / "app.fab").extractall(root)
    path = [str(root), str(hugging_face_kernels())]
    code = f"import sys; sys.path[:0] = {path!r}\n{LOAD_LLAMA}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(root / "kernels" / "reference.py")
