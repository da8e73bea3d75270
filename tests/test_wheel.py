"""The wheel, unpacked and used in an empty folder, where no file of the checkout is in reach."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_US = """
import json, sys
sys.modules["bora_fl"] = None
from transformers import pipeline
pipe = pipeline("text-classification", "merged")
print(json.dumps(pipe(json.loads(sys.argv[1]))))
"""
WITH_US = """
import bora_fl, json, sys
import torch
assert bora_fl.__file__.startswith(sys.argv[1]), bora_fl.__file__
model, tokenizer = bora_fl.load("runs/reviews")
inputs = tokenizer(json.loads(sys.argv[2]), padding=True, return_tensors="pt")
with torch.no_grad():
    likely = model(**inputs).logits.softmax(-1).max(-1)
rows = zip(likely.indices.tolist(), likely.values.tolist())
print(json.dumps([{"label": model.config.id2label[i], "score": p} for i, p in rows]))
"""
TEXTS = ["the film is good and great", "a sad awful phone it was"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs, the only bora_fl that its programs see."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--wheel-dir", str(folder), "--quiet"]
    subprocess.run(build, check=True)
    (file,) = folder.glob("*.whl")
    zipfile.ZipFile(file).extractall(folder / "installed")
    # Ray comes with an extra alone.
    (folder / "installed" / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")
    return folder / "installed"


@pytest.mark.slow
def test_from_an_empty_folder_init_run_predict_export_and_load(
    wheel: Path, tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    frame = pd.read_parquet(tiny_data)
    frame[["text", "label_name"]].rename(columns={"label_name": "stars"}).to_csv(tmp_path / "reviews.csv", index=False)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("BORA_FL", "PYTHON"))}
    environment |= {"PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment |= {"BORA_FL_STATE": str(tmp_path / "state"), "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    said = []

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        said.append(done.stdout + done.stderr)
        return done.stdout

    def bora_fl(*arguments: str) -> str:
        return python("-P", "-m", "bora_fl.cli", *arguments)

    bora_fl("init", "--data", "reviews.csv", "--label-column", "stars", "--model", str(tiny_model), "--clients", "2")
    bora_fl("run", "-c", "run.num-rounds=2", "-c", "train.local-steps=4", "-c", "train.precision=fp32")
    (tmp_path / "reviews.csv").unlink()
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(TEXTS))
    predicted = [json.loads(row) for row in bora_fl("predict", "runs/reviews", "texts.txt").splitlines()]
    bora_fl("export", "runs/reviews", "merged")
    for place in ("", str(wheel)):
        code = WITH_US if place else WITHOUT_US
        loaded = json.loads(python("-c", code, *filter(None, [place]), json.dumps(TEXTS)))
        assert [row["label"] for row in loaded] == [row["label"] for row in predicted]
        scores = [row["score"] for row in loaded]
        assert scores == pytest.approx([row["probability"] for row in predicted], abs=1e-4)
    assert {row["label"] for row in predicted} <= {"bad", "good"}
    assert not [text for text in said if str(tmp_path / "temporary") in text]


@pytest.mark.slow
def test_the_wheel_is_what_an_index_takes(wheel: Path):
    pytest.importorskip("twine", reason="twine is not here")
    (file,) = wheel.parent.glob("*.whl")
    assert (wheel / "bora_fl" / "py.typed").is_file()
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
